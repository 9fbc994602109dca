"""Inputs that a user may give and a kernel may not expect: strided lengths, huge biases, spare rows, NaN next door."""

import importlib
import threading

import calls
import pytest
import torch

from sparing import kernels


def _qkv(batch=4, heads=2, queries=3, keys=12, dim=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, heads, n, dim, generator=generator).to(dtype) for n in (queries, keys, keys)]


@pytest.mark.parametrize("lengths", ["strided", "expanded"])
def test_few_query_kernels_read_lengths_of_any_stride(lengths):
    q, k, v = (t.requires_grad_() for t in _qkv())
    kv_len = torch.tensor([[7, 1], [9, 2], [11, 3], [12, 4]], dtype=torch.int32)[:, 0]
    kv_len = kv_len if lengths == "strided" else torch.tensor([7], dtype=torch.int32).expand(4)
    outs = [kernels.few_query_attention(q, k, v, kv_len=kv_len, backend=name) for name in ("triton", "reference")]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in outs]
    for got, want in zip(*grads):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_huge_finite_bias_stays_finite_in_half_precision():
    q, k, v = _qkv(dtype=torch.float16)
    bias = torch.zeros(1, 1, 3, 12)
    bias[:, :, 1] = -1e9
    out = kernels.attention(q, k, v, bias=bias, backend="sdpa")
    want = kernels.attention(q.float(), k.float(), v.float(), backend="reference")  # one number for a whole row cancels
    torch.testing.assert_close(out.float(), want, rtol=0, atol=2e-2)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_rows_that_no_segment_uses_are_zero_and_give_no_gradient(backend):
    q, k, v = (torch.randn(6, 2, 16, requires_grad=True) for _ in range(3))
    cu = torch.tensor([0, 2, 3], dtype=torch.int32)
    out = kernels.varlen_attention(q, k, v, cu, cu, 3, 3, backend=backend)
    assert out[:3].abs().sum() > 0
    assert not out[3:].any()
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert all(not grad[3:].any() for grad in grads)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_a_segment_with_nan_leaves_its_neighbours_alone(backend):
    q, k, v = (torch.randn(6, 2, 16) for _ in range(3))
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)
    want = kernels.varlen_attention(q, k, v, cu, cu, 4, 4, backend=backend)[:2]
    k[2], v[3] = float("nan"), float("nan")
    got = kernels.varlen_attention(q, k, v, cu, cu, 4, 4, backend=backend)
    torch.testing.assert_close(got[:2], want)
    assert got[2:].isnan().any()


def test_longest_lengths_that_are_too_small_are_refused():
    q, k, v = (torch.randn(6, 2, 16) for _ in range(3))
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match="max_q 2 and max_k 4 are below the longest segments, 4 and 4"):
        kernels.varlen_attention(q, k, v, cu, cu, 2, 4)


def test_no_heads_give_an_empty_output_and_no_head_dim_is_refused():
    z = torch.zeros(1, 0, 4, 8)
    assert kernels.attention(z, z, z).shape == z.shape
    with pytest.raises(ValueError, match="head_dim is 0"):
        kernels.attention(*[torch.zeros(1, 2, 4, 0)] * 3)


def test_region_ids_are_integers():
    qkv, table = torch.randn(1, 4, 4, 3 * 8), torch.randn(9, 2)
    with pytest.raises(TypeError, match=r"integers within int32; got torch\.float32"):
        kernels.window_attention(qkv, table, window=2, shift=1, heads=2, region=torch.rand(4, 4))


def test_gathering_with_swapped_axes_is_refused():
    packing = kernels.compact(torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"expected \(2, 3, \.\.\.\)"):
        kernels.gather_rows(torch.randn(3, 2, 8), packing)


def test_what_an_empty_part_holds_does_not_reach_the_merge():
    outs, lses = torch.randn(1, 2, 2, 3, 4), torch.randn(1, 2, 2, 3)
    outs[:, :, 1], lses[:, :, 1] = float("nan"), float("-inf")
    merged, lse = kernels.merge_attention(outs, lses)
    torch.testing.assert_close(merged, outs[:, :, 0])
    torch.testing.assert_close(lse, lses[:, :, 0])
    with pytest.raises(ValueError, match="nothing to merge"):
        kernels.merge_attention([], [])


def test_explaining_in_two_threads_disturbs_no_call():
    q, k, v = _qkv()
    errors: list[BaseException] = []

    def work(explaining: bool) -> None:
        try:
            for _ in range(200):
                if explaining:
                    assert kernels.explain("attention", q, k, v).chosen == "sdpa"
                else:
                    kernels.attention(q, k, v)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(kind,)) for kind in (True, True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


@pytest.mark.parametrize("name", ["few_query", "block_sparse", "window", "tiny"])
def test_a_program_exported_with_kernels_runs_where_none_can(name, monkeypatch):
    torch.manual_seed(0)
    call = getattr(calls, name)(torch.float32)
    op = call.op.__name__
    kernel = "window_attention" if name == "tiny" else op
    monkeypatch.setattr(importlib.import_module(f"sparing.kernels.ops.{op}"), "triton_here", lambda device: ["no"])
    monkeypatch.delattr(importlib.import_module(f"sparing.kernels.triton.{kernel}"), "forward")
    with torch.no_grad():
        got = call.run(*call.leaves, backend="triton", return_lse=True)
        want = call.run(*call.leaves, backend="reference", return_lse=True)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)


def test_the_ring_step_runs_where_no_kernel_can(monkeypatch):
    module = importlib.import_module("sparing.kernels.ops.ring_attention_step")
    monkeypatch.setattr(module, "triton_here", lambda device: ["no"])
    monkeypatch.delattr(importlib.import_module("sparing.kernels.triton.ring_attention_step"), "step")
    q, k, v = (torch.randn(3, 1, 2, 8) for _ in range(3))
    caches = [
        kernels.RingCache(torch.zeros(3, 4, 2, 8), torch.zeros(3, 4, 2, 8), *torch.zeros(2, 3).int(), 4) for _ in "ab"
    ]
    outs = [kernels.ring_attention_step(q, k, v, cache, backend=b) for cache, b in zip(caches, ("triton", "reference"))]
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(caches[0].k, caches[1].k)
    assert caches[0].head.tolist() == [1, 1, 1]
