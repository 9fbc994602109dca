"""The video twin: equal to Latte without sparse layers, run by LattePipeline unmodified (specification, 5B and
9.16).
"""

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, LattePipeline, LatteTransformer3DModel
from diffusion.conftest import randomise
from torch import nn

import sparing
from sparing.diffusion import FlexDiTVideoTransformer3DModel

LAYOUT = {"num_pooling": 1, "num_sdtm": 1, "sdtm_group": [1, 1, 1, 1], "num_dense_top": 1}
PLAIN = {"num_pooling": 0, "num_sdtm": 0, "num_dense_top": 6}


def _host(**kwargs) -> LatteTransformer3DModel:
    shape = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 6,
        "cross_attention_dim": 24,
        "attention_bias": True,
        "sample_size": 8,
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "caption_channels": 12,
        "video_length": 4,
    }
    return randomise(LatteTransformer3DModel(**{**shape, **kwargs})).eval()


def _inputs(batch: int = 2, frames: int = 4, size: int = 8):
    generator = torch.Generator().manual_seed(2)
    return {
        "hidden_states": torch.randn(batch, 4, frames, size, size, generator=generator),
        "timestep": torch.linspace(30, 950, batch).long(),
        "encoder_hidden_states": torch.randn(batch, 5, 12, generator=generator),
    }


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("temporal", [True, False])
def test_without_sparse_layers_it_equals_the_host(frames, temporal):
    host, batch = _host(), {**_inputs(frames=frames), "enable_temporal_attentions": temporal}
    twin = FlexDiTVideoTransformer3DModel.from_host(host, **PLAIN).eval()
    torch.testing.assert_close(twin(**batch).sample, host(**batch).sample, atol=1e-5, rtol=1e-5)
    assert twin.status == "exact"


def test_the_text_mask_is_the_hosts_in_image_mode_and_repeated_per_frame_in_video():
    host = _host()
    twin = FlexDiTVideoTransformer3DModel.from_host(host, **PLAIN).eval()
    mask = torch.ones(2, 5)
    mask[0, 3:] = 0
    bias = (1 - mask[:, None]) * -10000.0  # the host adds a 2-D mask to the scores as it is: compare with a bias
    image = {**_inputs(frames=1), "encoder_attention_mask": bias}
    torch.testing.assert_close(twin(**image).sample, host(**image).sample, atol=1e-5, rtol=1e-5)
    as_mask = {**image, "encoder_attention_mask": mask}
    torch.testing.assert_close(twin(**as_mask).sample, twin(**image).sample)
    video = {**_inputs(), "encoder_attention_mask": mask}
    want = twin(**video).sample
    changed = {**video, "encoder_hidden_states": video["encoder_hidden_states"].clone()}
    changed["encoder_hidden_states"][0, 3:] = 1e3  # masked words do not matter, in any frame
    torch.testing.assert_close(twin(**changed).sample, want)


def test_fewer_frames_than_the_table_use_its_beginning():
    twin = FlexDiTVideoTransformer3DModel.from_host(_host(), **PLAIN).eval()
    short = LatteTransformer3DModel(**{**_host().config, "video_length": 2})
    short.load_state_dict(_host().state_dict())
    batch = _inputs(frames=2)
    torch.testing.assert_close(twin(**batch).sample, short.eval()(**batch).sample, atol=1e-5, rtol=1e-5)


def test_pooling_never_crosses_frames():
    model = randomise(FlexDiTVideoTransformer3DModel.from_host(_host(), **LAYOUT)).eval()
    batch = {**_inputs(), "enable_temporal_attentions": False, "density": 2}
    want = model(**batch).sample
    changed = {**batch, "hidden_states": batch["hidden_states"].clone()}
    changed["hidden_states"][:, :, 3] += 1
    got = model(**changed).sample
    torch.testing.assert_close(got[:, :, :3], want[:, :, :3])
    assert (got[:, :, 3] - want[:, :, 3]).abs().max() > 1e-3


def test_temporal_blocks_run_over_the_current_positions():
    model = FlexDiTVideoTransformer3DModel.from_host(_host(), **LAYOUT).eval()
    shapes = []
    for block in model.temporal_transformer_blocks:
        block.register_forward_hook(lambda m, args, out: shapes.append(tuple(args[0].shape[:2])))
    model(**_inputs(batch=1), density=3)
    assert shapes == [(16, 4), (9, 4), (9, 4), (16, 4), (16, 4), (16, 4)]


def test_a_converted_model_runs_at_three_densities_and_on_mixed_timesteps():
    model = FlexDiTVideoTransformer3DModel.from_host(_host(), **LAYOUT).eval()
    batch = _inputs()
    outputs = [model(**batch, density=density).sample for density in (1, 3, "all")]
    assert all(out.shape == (2, 8, 4, 8, 8) for out in outputs)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-6
    randomise(model)
    model.set_density([(0, 3), (500, 2)])
    together = model(**batch).sample
    for i, side in ((0, 3), (1, 2)):
        one = {name: value[i : i + 1] for name, value in batch.items()}
        torch.testing.assert_close(together[i : i + 1], model(**one, density=side).sample, atol=2e-5, rtol=2e-5)


def test_temporal_blocks_are_copied_whole_and_it_comes_back_bit_equal(tmp_path):
    host = _host()
    model = FlexDiTVideoTransformer3DModel.from_host(host, density_table=[(0, 3), (500, 2)], **LAYOUT)
    dense = host.state_dict()
    temporal = {name: t for name, t in model.state_dict().items() if name.startswith("temporal_")}
    assert temporal
    assert all(torch.equal(t, dense[name]) for name, t in temporal.items())
    model.save_pretrained(tmp_path)
    loaded = sparing.load(tmp_path)
    assert isinstance(loaded, FlexDiTVideoTransformer3DModel)
    assert loaded.knobs == model.knobs
    assert all(torch.equal(loaded.state_dict()[name], t) for name, t in model.state_dict().items())


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = randomise(FlexDiTVideoTransformer3DModel.from_host(_host(), **LAYOUT)).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(**_inputs(batch=1), density=2).sample.square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], atol=1e-6, rtol=1e-5)


def test_bad_input_is_refused_by_value():
    model, batch = FlexDiTVideoTransformer3DModel.from_host(_host(), **LAYOUT), _inputs()
    for change, message in (
        ({"hidden_states": torch.zeros(2, 4, 8, 8)}, r"\(2, 4, 8, 8\); expected \(batch, 4, F, H, W\)"),
        ({"hidden_states": torch.zeros(2, 4, 5, 8, 8)}, r"5 frames given; this model has 1\.\.4"),
        ({"hidden_states": torch.zeros(2, 3, 4, 8, 8)}, r"expected \(batch, 4, H, W\)"),
        ({"density": 5}, "5x5 is above the dense grid of 4x4"),
        ({"timestep": None}, "both needed"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**{**batch, **change})
    with pytest.raises(ValueError, match="must not start with a merge pair"):
        FlexDiTVideoTransformer3DModel.from_host(_host(), **{**LAYOUT, "num_pooling": 0, "num_dense_top": 2})
    with pytest.raises(ValueError, match=r"no layout of ours for 6 pairs \(have \[14, 28\]\)"):
        FlexDiTVideoTransformer3DModel.from_host(_host())
    with pytest.raises(TypeError, match="Linear is not a diffusers LatteTransformer3DModel"):
        FlexDiTVideoTransformer3DModel.from_host(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="norm_type is 'layer_norm'"):
        FlexDiTVideoTransformer3DModel.from_host(_host(norm_type="layer_norm"))


@pytest.mark.parametrize(
    ("layout", "side", "gmacs"),
    [
        ({"num_pooling": 0, "num_sdtm": 0, "num_dense_top": 14}, 16, 1862.8),
        ({"num_pooling": 1, "num_sdtm": 2, "num_dense_top": 1}, 8, 1056.0),
        ({"num_pooling": 1, "num_sdtm": 2, "num_dense_top": 1}, 4, 857.4),
        ({"num_pooling": 1, "num_sdtm": 1, "sdtm_group": [1, 9, 1, 1], "num_dense_top": 1}, 6, 701.7),
    ],
)
def test_flops_of_a_class_conditional_latte_at_256_pixels(layout, side, gmacs):
    with torch.device("meta"):
        model = FlexDiTVideoTransformer3DModel(num_layers=14, sample_size=32, cross_attention_dim=None, **layout)
    # The specification's figures have both recover maps on N tokens (ours applies W1 to the M sparse ones) and
    # adaLN-zero blocks (6 D^2 a block, no shared projection: 0.2 G together).
    saved = 16 * layout["num_sdtm"] * (256 - side**2) * 1152**2
    assert (model.flops(side) + saved) / 1e9 == pytest.approx(gmacs, abs=0.3)


def test_executed_flops_equal_torchs_counter():
    model, batch = FlexDiTVideoTransformer3DModel.from_host(_host(), **LAYOUT).eval(), _inputs(batch=1)
    counted = sparing.profile(model, *batch.values(), None, True, True, 2, measure=False).macs
    assert model.flops(2, text_tokens=5) == pytest.approx(counted, rel=1e-6)


def test_latte_pipeline_runs_it_unmodified():
    model = randomise(FlexDiTVideoTransformer3DModel.from_host(_host(), density_table=[(0, 3), (500, 2)], **LAYOUT))
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4)
    pipeline = LattePipeline(
        tokenizer=None,
        text_encoder=None,
        vae=randomise(vae).eval(),
        transformer=model.eval(),
        scheduler=DDIMScheduler(),
    )
    pipeline.set_progress_bar_config(disable=True)
    text = _inputs()["encoder_hidden_states"]
    frames = pipeline(
        negative_prompt=None,
        prompt_embeds=text[:1],
        negative_prompt_embeds=text[1:],
        num_inference_steps=2,
        video_length=4,
        height=8,
        width=8,
        output_type="pt",
        mask_feature=False,
        generator=torch.Generator().manual_seed(0),
    ).frames
    assert frames.shape == (1, 4, 3, 8, 8)


def test_a_twin_is_in_its_hosts_mode():
    assert not FlexDiTVideoTransformer3DModel.from_host(_host(), **LAYOUT).training
    assert FlexDiTVideoTransformer3DModel.from_host(_host().train(), **LAYOUT).training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timestep": torch.tensor([3, 700, 900])}, r"for 2 latents, timestep has shape \(3,\).*expected \(2,\)"),
        ({"timestep": torch.tensor([[3], [700]])}, r"timestep has shape \(2, 1\)"),
        ({"encoder_hidden_states": torch.zeros(1, 5, 12)}, r"encoder_hidden_states \(1, 5, 12\); .* \(2, L, 12\)"),
        ({"encoder_hidden_states": torch.zeros(2, 5, 11)}, r"\(2, 5, 11\); expected \(2, L, 12\)"),
        ({"encoder_attention_mask": torch.ones(1, 5)}, r"mask has shape \(1, 5\).*expected \(2, "),
        ({"encoder_attention_mask": torch.ones(2, 3)}, r"mask has shape \(2, 3\).*expected \(2, "),
    ],
)
@pytest.mark.parametrize("table", [3, [(0, 3), (500, 2)]])
def test_timesteps_and_texts_of_another_batch_are_refused_by_shape(change, message, table):
    model = FlexDiTVideoTransformer3DModel.from_host(_host(), **LAYOUT, density_table=table)
    with pytest.raises(ValueError, match=message):
        model(**{**_inputs(), **change})
