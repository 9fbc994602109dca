"""The text-to-image twin: equal to PixArt without sparse layers, run by PixArtAlphaPipeline unmodified (specification,
5A and 9.16).
"""

import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from diffusion.conftest import LAYOUT, randomise
from torch import nn

import sparing
from sparing.diffusion import FlexDiTPixArtTransformer2DModel

PLAIN = {"num_pooling": 0, "num_sdtm": 0, "num_dense_top": 10}


def _host(**kwargs) -> PixArtTransformer2DModel:
    shape = {
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "num_layers": 10,
        "cross_attention_dim": 32,
        "sample_size": 16,
        "caption_channels": 12,
        "use_additional_conditions": False,
    }
    return randomise(PixArtTransformer2DModel(**{**shape, **kwargs})).eval()


def _inputs(batch: int = 2, height: int = 16, width: int = 16):
    generator = torch.Generator().manual_seed(2)
    mask = torch.ones(batch, 7)
    mask[0, 4:] = 0
    return {
        "hidden_states": torch.randn(batch, 4, height, width, generator=generator),
        "encoder_hidden_states": torch.randn(batch, 7, 12, generator=generator),
        "timestep": torch.linspace(30, 950, batch).long(),
        "encoder_attention_mask": mask,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


@pytest.mark.parametrize("size", [(16, 16), (12, 24)])
def test_without_sparse_layers_it_equals_the_host_also_on_rectangles(size):
    host, batch = _host(), _inputs(height=size[0], width=size[1])
    twin = FlexDiTPixArtTransformer2DModel.from_host(host, **PLAIN).eval()
    torch.testing.assert_close(twin(**batch).sample, host(**batch).sample, atol=1e-5, rtol=1e-5)
    assert twin.status == "exact"
    unmasked = {**batch, "encoder_attention_mask": None}
    assert (twin(**unmasked).sample - twin(**batch).sample).abs().max() > 1e-4


def test_size_conditions_and_an_interpolated_position_table_are_the_hosts():
    host = _host(num_attention_heads=3, cross_attention_dim=24, use_additional_conditions=True, interpolation_scale=2)
    sizes = {"resolution": torch.tensor([[512.0, 512.0], [256.0, 512.0]]), "aspect_ratio": torch.tensor([[1.0], [0.5]])}
    batch = {**_inputs(), "added_cond_kwargs": sizes}
    twin = FlexDiTPixArtTransformer2DModel.from_host(host, **PLAIN).eval()
    torch.testing.assert_close(twin(**batch).sample, host(**batch).sample, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="resolution and aspect_ratio: pass added_cond_kwargs"):
        twin(**{**batch, "added_cond_kwargs": None})


def test_a_converted_model_runs_at_three_densities_and_on_mixed_timesteps():
    model = FlexDiTPixArtTransformer2DModel.from_host(_host(), **LAYOUT).eval()
    batch = _inputs()
    outputs = [model(**batch, density=density).sample for density in (2, 5, "all")]
    assert all(out.shape == (2, 8, 16, 16) for out in outputs)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-6
    randomise(model)
    model.set_density([(0, 6), (500, 3)])
    together = model(**batch).sample
    for i, side in ((0, 6), (1, 3)):
        one = {k: v if k == "added_cond_kwargs" else v[i : i + 1] for k, v in batch.items()}
        torch.testing.assert_close(together[i : i + 1], model(**one, density=side).sample, atol=2e-5, rtol=2e-5)


def test_sparse_tokens_attend_to_the_text_under_its_mask():
    model = randomise(FlexDiTPixArtTransformer2DModel.from_host(_host(), **LAYOUT)).eval()
    batch, queries = _inputs(), []
    for block in model.transformer_blocks:
        block.attn2.register_forward_hook(lambda m, args, out: queries.append(args[0].shape[1]))
    want = model(**batch, density=3).sample
    assert queries == [64, 9, 9, 64, 64, 9, 9, 64, 64, 64]
    hidden = {**batch, "encoder_hidden_states": batch["encoder_hidden_states"].clone()}
    hidden["encoder_hidden_states"][0, 4:] = 1e3  # masked words do not matter
    torch.testing.assert_close(model(**hidden, density=3).sample, want)


def test_initialisation_is_the_hosts_block_by_block():
    host = _host()
    model = FlexDiTPixArtTransformer2DModel.from_host(host, **LAYOUT)
    dense = host.state_dict()
    own = dict(model.named_parameters())
    added = {name for name in own if name not in dense}
    assert all("merge_sparse" in name or "merge_dense" in name for name in added)
    assert all(torch.equal(own[name], dense[name]) for name in own if name not in added)
    dropped = {name for name in dense if name not in own and "pos_embed.pos_embed" not in name}
    assert dropped == {f"transformer_blocks.0.attn1.to_{p}.{leaf}" for p in "qk" for leaf in ("weight", "bias")}
    assert torch.equal(own["transformer_blocks.3.merge_dense.weight"], torch.eye(32))


def test_gradients_reach_every_parameter_and_checkpointing_keeps_them():
    model = randomise(FlexDiTPixArtTransformer2DModel.from_host(_host(), **LAYOUT)).train()
    model(**_inputs(), density=4).sample.square().mean().backward()
    # Softmax does not see a bias of K.
    silent = [n for n, p in model.named_parameters() if not p.grad.abs().sum() > 0 and not n.endswith("to_k.bias")]
    assert silent == []
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.enable_gradient_checkpointing()
    model(**_inputs(), density=4).sample.square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, before[name], atol=1e-6, rtol=1e-5)


def test_it_comes_back_bit_equal(tmp_path):
    model = randomise(FlexDiTPixArtTransformer2DModel.from_host(_host(), density_table=[(0, 6), (500, 3)], **LAYOUT))
    model.save_pretrained(tmp_path)
    for loaded in (FlexDiTPixArtTransformer2DModel.from_pretrained(tmp_path), sparing.load(tmp_path)):
        assert loaded.density_table == model.density_table
        assert all(torch.equal(loaded.state_dict()[name], t) for name, t in model.state_dict().items())


def test_bad_input_is_refused_by_value():
    model, batch = FlexDiTPixArtTransformer2DModel.from_host(_host(), **LAYOUT), _inputs()
    for change, message in (
        ({"density": 9}, "9x9 is above the dense grid of 8x8"),
        ({"encoder_hidden_states": None}, "both needed"),
        ({"attention_mask": torch.ones(2, 64)}, "attention_mask is not supported"),
        ({"hidden_states": torch.zeros(2, 3, 16, 16)}, r"expected \(batch, 4, H, W\)"),
        ({"encoder_attention_mask": torch.ones(2, 1, 1, 7)}, r"got \(2, 1, 1, 7\)"),
        ({"timestep": torch.tensor([1, 1000])}, "timestep 1000 is outside"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**{**batch, **change})
    with pytest.raises(ValueError, match=r"= 6 blocks, but the model has num_layers 10"):
        FlexDiTPixArtTransformer2DModel.from_host(_host(), **{**LAYOUT, "num_sdtm": 1})
    with pytest.raises(TypeError, match="Linear is not a diffusers PixArtTransformer2DModel"):
        FlexDiTPixArtTransformer2DModel.from_host(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="norm_elementwise_affine is True"):
        FlexDiTPixArtTransformer2DModel.from_host(_host(norm_elementwise_affine=True))


@pytest.mark.parametrize(("side", "gmacs"), [(8, 276.5), (12, 302.7), (16, 339.8), ("all", None)])
def test_flops_of_pixart_xl_at_512_pixels(side, gmacs):
    with torch.device("meta"):
        model = FlexDiTPixArtTransformer2DModel()
        dense = FlexDiTPixArtTransformer2DModel(num_pooling=0, num_sdtm=0, num_dense_top=28)
    if gmacs is None:
        assert dense.flops(side) / 1e9 == pytest.approx(618.0, abs=0.1)
    else:
        # The specification's figures have both recover maps on N tokens; ours applies W1 to the M sparse ones.
        saved = 4 * (1024 - side**2) * 1152**2
        assert (model.flops(side) + saved) / 1e9 == pytest.approx(gmacs, abs=0.1)


def test_executed_flops_equal_torchs_counter():
    model = FlexDiTPixArtTransformer2DModel.from_host(_host(), **LAYOUT).eval()
    batch = _inputs(batch=1)
    arguments = (batch["hidden_states"], batch["encoder_hidden_states"], batch["timestep"])
    counted = sparing.profile(model, *arguments, None, None, None, None, True, 4, measure=False).macs
    assert model.flops(4, text_tokens=7) == pytest.approx(counted, rel=1e-6)


def test_pixart_alpha_pipeline_runs_it_unmodified():
    model = randomise(FlexDiTPixArtTransformer2DModel.from_host(_host(), density_table=[(0, 6), (500, 3)], **LAYOUT))
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4)
    pipeline = PixArtAlphaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=randomise(vae),
        transformer=model.eval(),
        scheduler=DPMSolverMultistepScheduler(),
    )
    pipeline.set_progress_bar_config(disable=True)
    text = _inputs()
    out = pipeline(
        negative_prompt=None,
        prompt_embeds=text["encoder_hidden_states"][:1],
        prompt_attention_mask=text["encoder_attention_mask"][:1],
        negative_prompt_embeds=text["encoder_hidden_states"][1:],
        negative_prompt_attention_mask=text["encoder_attention_mask"][1:],
        num_inference_steps=3,
        height=16,
        width=24,
        use_resolution_binning=False,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images
    assert out.shape == (1, 16, 24, 3)


# -- the authors' checkpoints


def _authors_names(host) -> dict[str, torch.Tensor]:
    """A host's weights as PixArt's own code calls them, written out by hand."""
    own = host.state_dict()
    found = {
        "x_embedder.proj": "pos_embed.proj",
        "y_embedder.y_proj.fc1": "caption_projection.linear_1",
        "y_embedder.y_proj.fc2": "caption_projection.linear_2",
        "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
        "t_block.1": "adaln_single.linear",
        "final_layer.linear": "proj_out",
    }
    if host.use_additional_conditions:
        for theirs, ours in (("csize_embedder", "resolution_embedder"), ("ar_embedder", "aspect_ratio_embedder")):
            found |= {f"{theirs}.mlp.{2 * i}": f"adaln_single.emb.{ours}.linear_{i + 1}" for i in range(2)}
    state = {f"{a}.{kind}": own[f"{b}.{kind}"] for a, b in found.items() for kind in ("weight", "bias")}
    state["final_layer.scale_shift_table"] = own["scale_shift_table"]
    for i in range(host.config.num_layers):
        a, b = f"blocks.{i}", f"transformer_blocks.{i}"
        state[f"{a}.scale_shift_table"] = own[f"{b}.scale_shift_table"]
        for kind in ("weight", "bias"):
            state[f"{a}.attn.qkv.{kind}"] = torch.cat([own[f"{b}.attn1.to_{n}.{kind}"] for n in "qkv"])
            state[f"{a}.attn.proj.{kind}"] = own[f"{b}.attn1.to_out.0.{kind}"]
            state[f"{a}.cross_attn.q_linear.{kind}"] = own[f"{b}.attn2.to_q.{kind}"]
            state[f"{a}.cross_attn.kv_linear.{kind}"] = torch.cat([own[f"{b}.attn2.to_{n}.{kind}"] for n in "kv"])
            state[f"{a}.cross_attn.proj.{kind}"] = own[f"{b}.attn2.to_out.0.{kind}"]
            state[f"{a}.mlp.fc1.{kind}"] = own[f"{b}.ff.net.0.proj.{kind}"]
            state[f"{a}.mlp.fc2.{kind}"] = own[f"{b}.ff.net.2.{kind}"]
    state["pos_embed"] = torch.zeros(1, 64, host.inner_dim)
    state["y_embedder.y_embedding"] = torch.zeros(120, 12)
    return state


@pytest.mark.parametrize("additional", [False, True])
def test_the_authors_checkpoint_gives_what_the_live_host_gives(additional, tmp_path):
    host = _host(num_attention_heads=3, cross_attention_dim=24, use_additional_conditions=additional)
    state = _authors_names(host)
    expected = FlexDiTPixArtTransformer2DModel.from_host(host, **LAYOUT)
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "pixart.pth")
    for source in (state, tmp_path / "pixart.pth"):
        model = FlexDiTPixArtTransformer2DModel.from_pixart(source, num_attention_heads=3, **LAYOUT)
        assert {k: v for k, v in model.config.items() if k[0] != "_"} == {
            k: v for k, v in expected.config.items() if k[0] != "_"
        }
        assert model.state_dict().keys() == expected.state_dict().keys()
        assert all(torch.equal(value, expected.state_dict()[key]) for key, value in model.state_dict().items())
    plain = FlexDiTPixArtTransformer2DModel.from_pixart(
        host.state_dict(), num_attention_heads=3, sample_size=16, **LAYOUT
    )
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in plain.state_dict().items())


def test_other_checkpoints_are_refused_by_name(tmp_path):
    state = _authors_names(_host())

    def convert(state, **kwargs):
        return FlexDiTPixArtTransformer2DModel.from_pixart(state, **{"num_attention_heads": 4, **LAYOUT, **kwargs})

    for change, message in (
        ({"blocks.3.attn.rel_pos_h": torch.zeros(3)}, "'blocks.3.attn.rel_pos_h', which no PixArt-alpha has"),
        ({"blocks.2.attn.qkv.weight": torch.zeros(31, 32)}, "no stack of 3 layers"),
        ({"blocks.2.mlp.fc2.bias": torch.zeros(31)}, r"'transformer_blocks.2.ff.net.2.bias' has shape \(31,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            convert({**state, **change})
    with pytest.raises(ValueError, match=r"1 missing, first 'transformer_blocks.4.ff.net.2.bias'"):
        convert({key: value for key, value in state.items() if key != "blocks.4.mlp.fc2.bias"})
    with pytest.raises(ValueError, match="pass sample_size"):
        convert({key: value for key, value in state.items() if key != "pos_embed"})
    with pytest.raises(ValueError, match="number of attention heads cannot be read"):
        convert(state, num_attention_heads=None)
    with pytest.raises(ValueError, match="not a PixArt checkpoint"):
        convert({"conv.weight": torch.zeros(1)})
    with pytest.raises(FileNotFoundError):
        convert(tmp_path / "absent.pth")
    bad = {**state, "blocks.1.mlp.fc1.bias": state["blocks.1.mlp.fc1.bias"] * float("nan")}
    with pytest.raises(ValueError, match="NaN or infinity"):
        convert(bad, check_finite=True)


def test_a_twin_is_in_its_hosts_mode():
    assert not FlexDiTPixArtTransformer2DModel.from_host(_host(), **LAYOUT).training
    assert FlexDiTPixArtTransformer2DModel.from_host(_host().train(), **LAYOUT).training


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
    model = FlexDiTPixArtTransformer2DModel.from_host(_host(), **LAYOUT, density_table=table)
    with pytest.raises(ValueError, match=message):
        model(**{**_inputs(), **change})
