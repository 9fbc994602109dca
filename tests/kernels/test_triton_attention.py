"""The Triton attention kernels in the interpreter: equal to the reference, differentiable, deterministic, inside
their bounds.
"""

import pytest
import torch
from kernels.calls import CALLS, make, outputs_and_gradients

from sparing import kernels
from sparing.kernels.dispatch import interpreting
from sparing.kernels.triton.tiles import split_dim

pytestmark = pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    finite = torch.isfinite(b)
    assert torch.equal(a[~finite], b[~finite])
    return float((a[finite] - b[finite]).norm() / b[finite].norm().clamp_min(1e-6))


@pytest.mark.parametrize("name", CALLS)
def test_outputs_and_gradients_equal_the_reference(name):
    found = outputs_and_gradients(make(name, dtype=torch.float32, seed=1), backend="triton")
    wanted = outputs_and_gradients(make(name, dtype=torch.float32, seed=1), backend="reference")
    assert max(_relative(a, b) for a, b in zip(found, wanted)) < 1e-5


@pytest.mark.parametrize("name", CALLS)
def test_gradcheck_in_float64(name):
    call = make(name, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *leaves: call.run(*leaves, backend="triton"), call.leaves, fast_mode=True)


@pytest.mark.parametrize("name", CALLS)
def test_gradcheck_of_the_reference_in_float64(name):
    call = make(name, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *leaves: call.run(*leaves, backend="reference"), call.leaves, fast_mode=True)


@pytest.mark.parametrize("name", CALLS)
def test_every_element_is_written_and_two_runs_give_the_same_bits(name, monkeypatch):
    first = outputs_and_gradients(make(name, dtype=torch.float32), backend="triton")
    empty = torch.empty

    def poisoned(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)
    second = outputs_and_gradients(make(name, dtype=torch.float32), backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize(("queries", "keys", "dim"), [(1, 1, 8), (5, 130, 72), (64, 17, 24), (20, 65, 96)])
def test_few_query_reads_nothing_outside_its_tensors_at_odd_sizes_and_strides(queries, keys, dim):
    torch.manual_seed(0)
    walled = torch.full((2, keys + 4, 1, dim + 8), float("nan"))  # rows and columns of NaN around k and v
    walled[:, 2:-2, :, 4:-4] = torch.randn(2, keys, 1, dim)
    k = v = walled[:, 2:-2, :, 4:-4].transpose(1, 2)
    q = torch.randn(2, queries, 1, dim).transpose(1, 2)
    found = kernels.few_query_attention(q, k, v, splits=2, backend="triton")
    assert _relative(found, kernels.few_query_attention(q, k, v, backend="reference")) < 2e-6


@pytest.mark.parametrize(("queries", "keys", "dim", "block_q"), [(1, 1, 16, 16), (50, 33, 80, 48), (17, 130, 64, 32)])
def test_block_sparse_at_odd_sizes_blocks_and_strides(queries, keys, dim, block_q):
    torch.manual_seed(0)
    qkv = torch.randn(1, max(queries, keys), 3, 2, dim)  # slices of one fused projection, nothing contiguous
    q, k, v = qkv[:, :queries, 0], qkv[:, :keys, 1], qkv[:, :keys, 2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mask = torch.rand(1, 1, -(-queries // block_q), -(-keys // 32)) < 0.7
    block_map = kernels.BlockMap.from_mask(mask, block_q=block_q, block_k=32)
    found = kernels.block_sparse_attention(q, k, v, block_map, backend="triton")
    assert _relative(found, kernels.block_sparse_attention(q, k, v, block_map, backend="reference")) < 2e-6


def test_windows_of_more_than_one_tile_with_regions_and_a_gathered_bias():
    torch.manual_seed(0)
    qkv = torch.randn(1, 9, 18, 3 * 16, requires_grad=True)
    bias = torch.randn(1, 81, 81, requires_grad=True)
    region = torch.randint(0, 2, (9, 18))
    grads = []
    for backend in ("triton", "reference"):
        out = kernels.window_attention(qkv, rel_bias=bias, window=9, heads=1, region=region, backend=backend)
        grads.append([out.detach(), *torch.autograd.grad(out.square().sum(), (qkv, bias))])
    assert max(_relative(a, b) for a, b in zip(*grads)) < 1e-5


def test_a_bias_for_each_problem_gets_its_own_gradient():
    torch.manual_seed(0)
    q, bias = torch.randn(2, 2, 5, 8), torch.randn(2, 1, 5, 5, requires_grad=True)
    grads = [
        torch.autograd.grad(kernels.tiny_attention(q, q, q, bias, backend=backend).square().sum(), bias)[0]
        for backend in ("triton", "reference")
    ]
    assert _relative(*grads) < 1e-5


@pytest.mark.parametrize("name", CALLS)
def test_zero_sizes_return_without_a_launch(name):
    call = make(name, dtype=torch.float32)
    if name == "window":
        leaves = (call.leaves[0][:0], call.leaves[1])
        assert call.run(*leaves, backend="triton").shape == (0, 6, 4, 16)
        return
    empty = torch.zeros(2, 1, 0, 16, requires_grad=True)
    some = torch.randn(2, 1, 4, 16, requires_grad=True)
    block_map = kernels.BlockMap.from_mask(torch.zeros(1, 1, 1, 0, dtype=torch.bool), block_q=16, block_k=16)
    extra = (block_map,) if name == "block_sparse" else ()
    out, lse = call.op(some, empty, empty, *extra, return_lse=True, backend="triton")
    assert torch.equal(out, torch.zeros(2, 1, 4, 16))
    assert torch.equal(lse, torch.full((2, 1, 4), float("-inf")))
    assert torch.equal(torch.autograd.grad(out.sum(), some)[0], torch.zeros(2, 1, 4, 16))


def test_addresses_beyond_32_bits_are_reached():
    far = 2**31  # elements between two heads: 4 GiB of address space, of which only the pages touched are ever backed
    buffer = torch.empty(far + 1024, dtype=torch.float16)
    x = buffer.as_strided((1, 2, 4, 16), (0, far, 16, 1))
    torch.manual_seed(0)
    x.copy_(torch.randn(x.shape))
    block_map = kernels.BlockMap.from_mask(torch.ones(1, 1, 1, 1) > 0, block_q=16, block_k=16)
    wanted = kernels.attention(x, x, x, backend="reference")
    for found in (
        kernels.tiny_attention(x, x, x, backend="triton"),
        kernels.few_query_attention(x, x, x, backend="triton"),
        kernels.block_sparse_attention(x, x, x, block_map, backend="triton"),
    ):
        assert _relative(found.float(), wanted.float()) < 2e-3


def test_head_dims_are_cut_into_powers_of_two_where_it_saves_work():
    assert [split_dim(d) for d in (8, 16, 24, 40, 64, 72, 80, 96, 120, 128)] == [
        (16, 0), (16, 0), (32, 0), (32, 16), (64, 0), (64, 16), (64, 16), (64, 32), (128, 0), (128, 0),
    ]  # fmt: skip


def test_without_the_interpreter_triton_on_cpu_is_refused_with_the_reason(monkeypatch):
    call = make("tiny", dtype=torch.float32)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(kernels.BackendUnsupported, match="needs CUDA") as caught:
        call.run(*call.leaves, backend="triton")
    assert "reference" in caught.value.usable


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda q: kernels.tiny_attention(q, q, q, backend="triton"), "head_dim 160 is above 64"),
        (lambda q: kernels.few_query_attention(q, q, q, splits=65, backend="triton"), "splits 65 is above 64"),
        (
            lambda q: kernels.block_sparse_attention(
                q, q, q, kernels.BlockMap.from_mask(torch.ones(1, 1, 1, 1) > 0, block_q=8, block_k=8), backend="triton"
            ),
            "block_q 8 is no multiple of 16",
        ),
        (lambda q: kernels.attention(q, q, q, backend="triton"), "attention has no triton implementation"),
    ],
)
def test_kernels_refuse_what_they_cannot_serve_in_words(call, reason):
    with pytest.raises(kernels.BackendUnsupported, match=reason):
        call(torch.randn(1, 1, 4, 160))
