"""The attention family on a CUDA device: backends against the reference, bitwise repeatability, CUDA graphs, no
hidden syncs.
"""

import pytest
import torch

from sparing import kernels
from sparing.kernels import BackendUnsupported

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.bfloat16: 1.2e-2, torch.float16: 2e-3, torch.float32: 1e-5}
DTYPES = list(TOLERANCE)


def _randn(*shape: int, dtype: torch.dtype, grad: bool = True) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype).requires_grad_(grad)


def _calls(dtype: torch.dtype) -> dict:
    """name -> (leaves, run(*leaves, backend))."""
    torch.manual_seed(0)
    calls = {}
    for dim in (64, 72, 128):
        q, k, v = (_randn(2, 4, 1000, dim, dtype=dtype) for _ in range(3))
        mask = torch.rand(2, 4, 8, 16, device="cuda") < 0.4
        mask[0, 0, 1] = False
        block_map = kernels.BlockMap.from_mask(mask, block_q=128, block_k=64)
        calls[f"block_sparse/{dim}"] = (
            (q, k, v),
            lambda q, k, v, backend, m=block_map: kernels.block_sparse_attention(
                q, k, v, m, causal=True, backend=backend
            ),
        )
    q, k, v = (
        _randn(3, 4, 16, 64, dtype=dtype),
        _randn(3, 4, 4099, 64, dtype=dtype),
        _randn(3, 4, 4099, 64, dtype=dtype),
    )
    bias, kv_len = _randn(1, 4, 16, 4099, dtype=dtype), torch.tensor([4099, 1000, 0], device="cuda", dtype=torch.int32)
    calls["few_query"] = (
        (q, k, v, bias),
        lambda q, k, v, b, backend: kernels.few_query_attention(q, k, v, bias=b, kv_len=kv_len, backend=backend),
    )
    for window, side in ((7, 56), (12, 48)):
        calls[f"window/{window}"] = (
            (_randn(2, side, side, 3 * 96, dtype=dtype), _randn((2 * window - 1) ** 2, 3, dtype=dtype)),
            lambda x, t, backend, w=window: kernels.window_attention(
                x, t, window=w, heads=3, shift=w // 2, backend=backend
            ),
        )
    calls["tiny"] = (
        (_randn(512, 8, 8, 64, dtype=dtype), _randn(512, 8, 16, 64, dtype=dtype), _randn(512, 8, 16, 64, dtype=dtype)),
        lambda q, k, v, backend: kernels.tiny_attention(q, k, v, backend=backend),
    )
    q, k, v = (_randn(2, 4, 500, 64, dtype=dtype) for _ in range(3))
    padded = torch.arange(500, device="cuda") >= torch.tensor([[0], [300]], device="cuda")  # sample 0 wholly padded
    bias = _randn(1, 4, 500, 500, dtype=dtype)
    calls["attention/bias-padding"] = (
        (q, k, v, bias),
        lambda q, k, v, b, backend: kernels.attention(q, k, v, bias=b, key_padding_mask=padded, backend=backend),
    )
    calls["attention/causal"] = (
        (q, k, v),
        lambda q, k, v, backend: kernels.attention(q, k[:, :, :400], v[:, :, :400], causal=True, backend=backend),
    )
    packed = [_randn(900, 4, 64, dtype=dtype) for _ in range(3)]
    cu_q, cu_k = (
        torch.tensor(c, device="cuda", dtype=torch.int32) for c in ([0, 400, 400, 700, 900], [0, 500, 600, 600, 900])
    )
    calls["varlen"] = (
        tuple(packed),
        lambda q, k, v, backend: kernels.varlen_attention(q, k, v, cu_q, cu_k, 400, 500, backend=backend),
    )
    return calls


NAMES = ["block_sparse/64", "block_sparse/72", "block_sparse/128", "few_query", "window/7", "window/12", "tiny"]
NAMES += ["attention/bias-padding", "attention/causal", "varlen"]


def _all(leaves, run, backend):
    out = run(*leaves, backend)
    upstream = torch.cos(torch.arange(out.numel(), device="cuda")).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize("backend", ["triton", "varlen", "flex", "xformers", "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_equal_the_float64_reference(name, dtype, backend):
    leaves, run = _calls(dtype)[name]
    try:
        found = _all(leaves, run, backend)
    except BackendUnsupported as refusal:
        pytest.skip(str(refusal))
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    for a, b in zip(found, _all(wide, run, "reference")):
        error = (a.double() - b).norm() / b.norm().clamp_min(1e-6)
        assert error < TOLERANCE[dtype], f"{error:.2e}"


@pytest.mark.parametrize("name", NAMES[:7])
def test_two_runs_give_the_same_bits(name):
    leaves, run = _calls(torch.bfloat16)[name]
    assert all(torch.equal(a, b) for a, b in zip(_all(leaves, run, "triton"), _all(leaves, run, "triton")))


def _stream_inputs() -> tuple:
    cache = kernels.RingCache.empty(16, 64, heads=8, head_dim=128, device="cuda", dtype=torch.bfloat16)
    new = _randn(16, 1, 8, 128, dtype=torch.bfloat16, grad=False)
    return cache, new, torch.rand(16, device="cuda") < 0.7, torch.rand(16, device="cuda") < 0.1


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_the_ring_step_makes_no_synchronisation(backend):
    cache, new, active, reset = _stream_inputs()
    kernels.ring_attention_step(new, new, new, cache, active=active, reset=reset, backend=backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.ring_attention_step(new, new, new, cache, active=active, reset=reset, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_ring_step_replays_in_a_cuda_graph():
    cache, new, active, reset = _stream_inputs()

    def step():
        return kernels.ring_attention_step(new, new, new, cache, active=active, reset=reset, backend="triton")

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    cache.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    eager = kernels.RingCache.empty(16, 64, heads=8, head_dim=128, device="cuda", dtype=torch.bfloat16)
    cache.clear()
    cache.k.zero_()
    for _ in range(70):
        new.normal_()
        graph.replay()
        wanted = kernels.ring_attention_step(new, new, new, eager, active=active, reset=reset, backend="triton")
        assert torch.equal(out, wanted)
    assert torch.equal(cache.k, eager.k)
    assert torch.equal(cache.head, eager.head)


def test_window_attention_reads_no_expanded_bias():
    qkv = _randn(16, 56, 56, 3 * 96, dtype=torch.bfloat16, grad=False)
    table = _randn(169, 3, dtype=torch.bfloat16, grad=False)
    kernels.window_attention(qkv, table, window=7, heads=3, shift=3, backend="triton")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = kernels.window_attention(qkv, table, window=7, heads=3, shift=3, backend="triton")
    grown = torch.cuda.max_memory_allocated() - before
    lse = 16 * 64 * 3 * 49 * 4
    assert grown < out.numel() * out.element_size() + lse + 2**20


def test_building_and_predicting_block_maps_makes_no_synchronisation():
    q, k = (_randn(1, 2, 1024, 64, dtype=torch.bfloat16, grad=False) for _ in range(2))
    options = {"block_q": 128, "block_k": 64, "sim_threshold": 0.3, "cdf": 0.9}
    kernels.predict_block_map(q, k, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.predict_block_map(q, k, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
