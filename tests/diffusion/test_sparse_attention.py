"""Calibrated block-sparse attention on tiny random diffusers pipelines: a dispatching one, DiT and PixArt."""

import math

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)

from sparing.diffusion import SparseThresholds, apply_sparse, calibrate_sparse, measure_sparse
from sparing.diffusion.sparse_attention import BlockThreshold, SparseAttnProcessor, attention_sites

ALL = BlockThreshold(sim_threshold=-1.0, topk=1.0)
HALF = BlockThreshold(sim_threshold=-1.0, topk=0.5)


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4,), latent_channels=4, norm_num_groups=2, down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",), sample_size=16,
    )  # fmt: skip


def _flux() -> tuple[FluxPipeline, list[dict], dict]:
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=12, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, transformer=transformer,
    )  # fmt: skip
    prompts = [{"prompt_embeds": torch.randn(1, 8, 24), "pooled_prompt_embeds": torch.randn(1, 12)} for _ in range(4)]
    return pipe, prompts, {"num_inference_steps": 4, "height": 128, "width": 128}


def _dit() -> tuple[DiTPipeline, list[int], dict]:
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=4, sample_size=16,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    pipe = DiTPipeline(transformer=transformer, vae=_vae(), scheduler=DDIMScheduler())
    return pipe, [1, 7, 4, 2], {"num_inference_steps": 4, "guidance_scale": 1.0}


def _pixart() -> tuple[PixArtAlphaPipeline, list[dict], dict]:
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=4, sample_size=16,
        patch_size=2, cross_attention_dim=16, caption_channels=12, use_additional_conditions=False,
    )  # fmt: skip
    pipe = PixArtAlphaPipeline(
        tokenizer=None, text_encoder=None, vae=_vae(), transformer=transformer, scheduler=DPMSolverMultistepScheduler()
    )
    masks = {"prompt_attention_mask": torch.ones(1, 6), "negative_prompt_attention_mask": torch.ones(1, 6)}
    prompts = [
        {
            "prompt_embeds": torch.randn(1, 6, 12),
            "negative_prompt_embeds": torch.randn(1, 6, 12),
            "negative_prompt": None,
        }
        | masks
        for _ in range(4)
    ]
    return pipe, prompts, {"num_inference_steps": 4, "use_resolution_binning": False, "height": 16, "width": 16}


PIPELINES = {"flux": _flux, "dit": _dit, "pixart": _pixart}


@pytest.fixture(scope="module", params=PIPELINES, ids=str)
def made(request):
    torch.manual_seed(0)
    pipe, prompts, call = PIPELINES[request.param]()
    for parameter in pipe.transformer.parameters():  # zero-initialised gates would hide the attention
        if parameter.abs().sum() == 0:
            torch.nn.init.normal_(parameter, std=0.05)
    pipe.transformer.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe, prompts, call


def _run(pipe, prompt, call, seed=0):
    arguments = {"class_labels": [prompt]} if isinstance(prompt, int) else prompt
    generator = torch.Generator().manual_seed(seed)
    out = pipe(generator=generator, return_dict=False, output_type="latent", **arguments, **call)[0]
    return torch.as_tensor(out)


def _thresholds(pipe, threshold, **options) -> SparseThresholds:
    layers = {site.name: None if site.dense else threshold for site in attention_sites(pipe)}
    return SparseThresholds(layers, block_q=16, block_k=16, **{"dense_steps": 0.0, **options})


def _error(a, b) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_sites_are_self_attention_in_the_inner_blocks(made):
    pipe, _, _ = made
    sites = attention_sites(pipe)
    open_sites = [site for site in sites if site.dense is None]
    assert {site.block for site in open_sites}.isdisjoint({sites[0].block, sites[-1].block})
    assert len({site.block for site in open_sites}) == 2
    assert all(not getattr(site.module, "is_cross_attention", False) for site in open_sites)
    assert any(site.dense == "first or last block" for site in sites)


def test_keeping_all_blocks_gives_what_the_dense_pipeline_gives(made):
    pipe, prompts, call = made
    want = _run(pipe, prompts[0], call)
    with apply_sparse(pipe, _thresholds(pipe, ALL)):
        got = _run(pipe, prompts[0], call)
    assert _error(got, want) < 1e-5


def test_sparsity_changes_the_output_and_dense_steps_and_layers_stop_it(made):
    pipe, prompts, call = made
    want = _run(pipe, prompts[0], call)
    with apply_sparse(pipe, _thresholds(pipe, HALF)):
        assert _error(_run(pipe, prompts[0], call), want) > 1e-6
    with apply_sparse(pipe, _thresholds(pipe, HALF, dense_steps=1.0)):
        assert torch.equal(_run(pipe, prompts[0], call), want)
        assert torch.equal(_run(pipe, prompts[0], call), want)  # a second run starts its steps anew
    with apply_sparse(pipe, _thresholds(pipe, None)):
        assert torch.equal(_run(pipe, prompts[0], call), want)


def test_everything_is_put_back_also_after_an_exception(made):
    pipe, prompts, call = made
    want = _run(pipe, prompts[0], call)
    before = [(site.module.processor, dict(vars(site.module.processor))) for site in attention_sites(pipe)]
    hooks = [len(site.module._forward_hooks) for site in attention_sites(pipe)]
    scheduler = set(vars(pipe.scheduler))

    def broken(*args):
        raise RuntimeError("stop here")

    handle = pipe.transformer.register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="stop here"), apply_sparse(pipe, _thresholds(pipe, HALF)):
        _run(pipe, prompts[0], call)
    handle.remove()
    for site, (processor, state) in zip(attention_sites(pipe), before):
        assert site.module.processor is processor
        assert vars(processor) == state
    assert hooks == [len(site.module._forward_hooks) for site in attention_sites(pipe)]
    assert set(vars(pipe.scheduler)) - scheduler <= {"timesteps", "num_inference_steps", "sigmas"}
    assert "step" not in vars(pipe.scheduler)
    assert torch.equal(_run(pipe, prompts[0], call), want)


def test_calibration_holds_its_bound_on_held_out_prompts_and_reports_what_it_measured(made, tmp_path):
    pipe, prompts, call = made
    candidates = [BlockThreshold(-1.0, cdf=cdf) for cdf in (0.3, 0.7, 0.9)] + [BlockThreshold(-1.0, topk=0.9)]
    found = calibrate_sparse(
        pipe, prompts[:3], held_out=prompts[3:], max_error=0.5, candidates=candidates, block_q=16, block_k=16, **call
    )
    report = found.report
    chosen = [name for name, threshold in found.layers.items() if threshold is not None]
    assert chosen
    for site in attention_sites(pipe):
        layer = report["layers"][site.name]
        if site.dense:
            assert layer == {"dense": site.dense}
        elif site.name in chosen:
            assert layer["error"] <= 0.8 * 0.5
            assert layer["density"] < 1.0
            dense_steps = math.ceil(found.dense_steps * 4)
            assert sorted(map(int, layer["error_by_step"])) == list(range(dense_steps, 4))
    held_out = report["held_out"]
    assert held_out["within_bound"]
    assert held_out["layer_error"] <= 0.5
    assert 0 < held_out["density"] < 1
    assert held_out["density"] < held_out["attention_density"] < 1
    assert min(held_out["dense_seconds"], held_out["sparse_seconds"], report["calibration_seconds"]) > 0
    found.save(tmp_path / "thresholds.json")
    loaded = SparseThresholds.load(tmp_path / "thresholds.json")
    assert loaded == found
    again = measure_sparse(pipe, loaded, prompts[3:], seeds=[1], **call)
    assert again["output_error"] == pytest.approx(held_out["output_error"], rel=1e-4)
    with apply_sparse(pipe, loaded):
        sparse = _run(pipe, prompts[3], call, seed=1)
    assert _error(sparse, _run(pipe, prompts[3], call, seed=1)) == pytest.approx(held_out["output_error"], rel=1e-3)


def test_a_bound_that_nothing_holds_leaves_every_layer_dense(made):
    pipe, prompts, call = made
    found = calibrate_sparse(
        pipe, prompts[:1], max_error=1e-9, candidates=[BlockThreshold(-1.0, cdf=0.3)], block_q=16, block_k=16, **call
    )
    assert all(threshold is None for threshold in found.layers.values())
    assert found.report["held_out"]["output_error"] == 0
    assert found.report["held_out"]["attention_density"] == 1


def _transformer_inputs(name: str):
    generator = torch.Generator().manual_seed(5)
    if name == "flux":
        grid = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij"), -1).view(64, 2)
        return {
            "hidden_states": torch.randn(1, 64, 16, generator=generator), "timestep": torch.tensor([0.5]),
            "encoder_hidden_states": torch.randn(1, 8, 24, generator=generator),
            "pooled_projections": torch.randn(1, 12, generator=generator), "txt_ids": torch.zeros(8, 3),
            "img_ids": torch.cat([torch.zeros(64, 1), grid], 1),
        }  # fmt: skip
    found = {"hidden_states": torch.randn(1, 4, 16, 16, generator=generator), "timestep": torch.tensor([500])}
    if name == "dit":
        return found | {"class_labels": torch.tensor([3])}
    return found | {
        "encoder_hidden_states": torch.randn(1, 6, 12, generator=generator),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def test_gradients_flow_through_the_sparse_model_and_match_the_dense_ones_when_all_blocks_stay(made, request):
    pipe, _, _ = made
    inputs = _transformer_inputs(request.node.callspec.params["made"])
    weight = attention_sites(pipe)[len(attention_sites(pipe)) // 2].module.to_q.weight

    def gradient():
        pipe.transformer.zero_grad()
        out = pipe.transformer(**inputs, return_dict=False)[0]
        out.square().mean().backward()
        return weight.grad.clone()

    dense = gradient()
    with apply_sparse(pipe.transformer, _thresholds(pipe.transformer, ALL)):
        torch.testing.assert_close(gradient(), dense, rtol=1e-3, atol=1e-7)
    with apply_sparse(pipe.transformer, _thresholds(pipe.transformer, HALF)):
        sparse = gradient()
    assert sparse.isfinite().all()
    assert not torch.equal(sparse, dense)


def test_dispatching_models_use_the_registered_backend_and_the_others_wrapped_processors(made, request):
    pipe, prompts, call = made
    with apply_sparse(pipe, _thresholds(pipe, HALF)):
        sites = [site for site in attention_sites(pipe) if not getattr(site.module, "is_cross_attention", False)]
        if request.node.callspec.params["made"] == "flux":
            assert {site.module.processor._attention_backend.value for site in sites} == {"sparing_sparse"}
        else:
            assert all(isinstance(site.module.processor, SparseAttnProcessor) for site in sites)


def test_thresholds_of_another_model_and_broken_files_are_named(made, tmp_path):
    pipe, _, _ = made
    with (
        pytest.raises(ValueError, match=r"does not have: blocks\.9\.attn"),
        apply_sparse(pipe, SparseThresholds({"blocks.9.attn": HALF})),
    ):
        raise AssertionError("must not be entered")
    (tmp_path / "broken.json").write_text("[]")
    with pytest.raises(ValueError, match=r"broken\.json holds no sparse attention thresholds"):
        SparseThresholds.load(tmp_path / "broken.json")
    with pytest.raises(ValueError, match="max_error is 0"):
        calibrate_sparse(pipe, [1], max_error=0)
    with pytest.raises(ValueError, match="at least one prompt"):
        calibrate_sparse(pipe, [], max_error=0.1)
    with pytest.raises(ValueError, match="has none of transformer, unet"):
        attention_sites(object())
