"""Habits of a diffusers transformer, one test each: adapters, offload, layerwise casting, regional compile, backends,
caches.
"""

import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.models.attention_dispatch import attention_backend
from diffusion.conftest import build_flexdit, build_host, inputs

from sparing.diffusion.blocks import BlockSparseAttnProcessor, FlexAttention
from sparing.diffusion.flexdit import FlexDiTTransformer2DModel
from sparing.kernels import use_backend

TABLE = [(0, 6, 6), (300, 4, 4), (700, 3, 3)]


# -- adapters, memory, compile


def test_add_adapter_trains_only_the_adapter_on_the_hosts_own_target_names():
    peft = pytest.importorskip("peft")
    model, batch = build_flexdit(), inputs()
    want = model(*batch, density=4).sample
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False))
    adapted = model(*batch, density=4).sample
    assert (adapted - want).abs().max() > 1e-4
    adapted.square().mean().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained
    assert all("lora" in name for name in trained)
    model.disable_adapters()
    torch.testing.assert_close(model(*batch, density=4).sample, want)


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offload_gives_the_same_output(kind):
    model, batch = build_flexdit(density_table=TABLE), inputs()
    want = model(*batch).sample
    extra = {"num_blocks_per_group": 2} if kind == "block_level" else {}
    with torch.no_grad():
        model.enable_group_offload(torch.device("cpu"), offload_type=kind, **extra)
        torch.testing.assert_close(model(*batch).sample, want)


def test_layerwise_casting_stores_in_a_small_type_and_keeps_norms_and_embeddings():
    model, batch = build_flexdit(), inputs()
    want = model(*batch, density=4).sample
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    block = model.transformer_blocks[1]
    assert block.attn1.to_q.weight.dtype == torch.bfloat16 == block.ff.net[2].weight.dtype
    assert block.norm1.linear.weight.dtype == torch.float32 == model.pos_embed.proj.weight.dtype
    got = model(*batch, density=4).sample
    # bfloat16 keeps 8 bits of every weight.
    assert 1e-6 < (got - want).abs().mean() / want.std() < 0.05


def test_regional_compile_compiles_every_block_and_changes_nothing():
    torch._dynamo.reset()
    # One block of each kind: pooling, merge, sparse, recover, dense.
    model, batch = build_flexdit(num_layers=5, num_sdtm=1, num_dense_top=0), inputs()
    want = model(*batch, density=4).sample
    model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    assert all(block._compiled_call_impl is not None for block in model.transformer_blocks)
    with torch.no_grad():
        torch.testing.assert_close(model(*batch, density=4).sample, want, atol=2e-5, rtol=2e-5)


def test_quantize_runs_when_torchao_is_installed():
    quantization = pytest.importorskip("torchao.quantization")
    model, batch = build_flexdit(), inputs()
    want = model(*batch, density=4).sample
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    got = model(*batch, density=4).sample
    assert 0 < (got - want).abs().mean() / want.std() < 0.05


# -- attention backends


@pytest.fixture
def restored_backend():
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    before = registry._active_backend
    yield
    registry.set_active_backend(before)


def test_diffusers_attention_backends_reach_every_attention(restored_backend, monkeypatch):
    from sparing.diffusion import blocks

    model, batch = build_flexdit(), inputs()
    want = model(*batch, density=4).sample
    used = []
    original = blocks.dispatch_attention
    monkeypatch.setattr(
        blocks, "dispatch_attention", lambda *a, **k: used.append(k["backend"].value) or original(*a, **k)
    )
    with attention_backend("_native_math"):
        torch.testing.assert_close(model(*batch, density=4).sample, want, atol=2e-5, rtol=2e-5)
    assert used == ["_native_math"] * 9  # every block but the pooling one
    model.set_attention_backend("native")
    torch.testing.assert_close(model(*batch, density=4).sample, want, atol=2e-5, rtol=2e-5)
    assert used[9:] == ["native"] * 9


def test_backends_of_the_kernel_layer_reach_it_too():
    model, batch = build_flexdit(), inputs()
    want = model(*batch, density=4).sample
    with use_backend("reference"):
        torch.testing.assert_close(model(*batch, density=4).sample, want, atol=2e-5, rtol=2e-5)


def test_processors_can_be_listed_and_set():
    model = build_flexdit()
    names = model.attn_processors
    assert len(names) == 9
    assert "transformer_blocks.1.attn1.processor" in names


def test_block_sparse_attention_is_exact_when_it_keeps_every_block_and_differs_when_it_does_not():
    model, batch = build_flexdit(), inputs()
    want = model(*batch, density=4).sample
    model.set_block_sparse_attention(block_q=16, block_k=16, sim_threshold=-1.0, topk=1.0)
    kinds = {
        b.kind
        for b in model.transformer_blocks
        if isinstance(getattr(b.attn1, "processor", None), BlockSparseAttnProcessor)
    }
    assert kinds == {"plain", "dense"}  # never on the few sparse tokens
    torch.testing.assert_close(model(*batch, density=4).sample, want, atol=2e-5, rtol=2e-5)
    model.set_block_sparse_attention(block_q=16, block_k=16, sim_threshold=-1.0, topk=0.25)
    assert (model(*batch, density=4).sample - want).abs().max() > 1e-4
    model.set_block_sparse_attention(None)
    torch.testing.assert_close(model(*batch, density=4).sample, want)


# -- step caches


def _run_steps(model, timesteps=(900, 900, 400, 380, 100)):
    """Denoiser outputs of neighbouring steps: the first two see equal inputs, the later ones other densities."""
    latents, _, labels = inputs()
    outputs, computed = [], []
    handle = model.transformer_blocks[-1].ff.register_forward_hook(lambda *_: computed.append(len(outputs)))
    with torch.no_grad(), model.cache_context("cond"):
        for t in timesteps:
            outputs.append(model(latents, torch.full((2,), t), labels).sample)
    handle.remove()
    return outputs, computed


def test_first_block_cache_fires_and_token_counts_stay_right_across_densities():
    model = build_flexdit(density_table=TABLE)
    want, _ = _run_steps(model)
    model.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    got, computed = _run_steps(model)
    assert computed == [0]  # the first step computes all blocks, every later one only the first
    assert all(out.shape == (2, 8, 16, 16) and torch.isfinite(out).all() for out in got)
    torch.testing.assert_close(got[0], want[0])
    assert (got[-1] - want[-1]).abs().max() > 1e-4
    torch.testing.assert_close(got[1], want[1], atol=2e-5, rtol=2e-5)  # equal inputs: the cached residual is exact


def test_a_cache_that_never_fires_and_one_switched_off_equal_no_cache():
    model = build_flexdit(density_table=TABLE)
    want, everywhere = _run_steps(model)
    model.enable_cache(FirstBlockCacheConfig(threshold=-1.0))
    got, computed = _run_steps(model)
    assert computed == everywhere == [0, 1, 2, 3, 4]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    model.disable_cache()
    got, _ = _run_steps(model)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_caches_that_would_break_are_refused_with_the_reason():
    pyramid = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )
    with pytest.raises(ValueError, match=r"keeps activations inside blocks.*changes with the timestep"):
        build_flexdit(density_table=TABLE).enable_cache(pyramid)
    merge_first = build_flexdit(num_pooling=0, num_dense_top=2)
    with pytest.raises(ValueError, match="layout starts with a merge block; use num_pooling >= 1"):
        merge_first.enable_cache(FirstBlockCacheConfig())


def test_the_pieces_diffusers_looks_for_are_there():
    model = FlexDiTTransformer2DModel.from_host(build_host(), num_pooling=0, num_sdtm=0, num_dense_top=10)
    assert all(isinstance(block.attn1, FlexAttention) for block in model.transformer_blocks)
    for name in ("_no_split_modules", "_repeated_blocks"):
        assert "FlexDiTBlock" in getattr(model, name)
