"""Lengths that vary: a compiled op is traced once for fixed and at most once more for dynamic lengths."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from sparing import kernels

LENGTHS = (5, 12, 33, 7, 48)
MOST = 2  # graphs over all lengths


def _heads(n: int, *, m: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(2, 2, n, 4) for _ in range(3))
    return q[:, :, :m], k, v


def _attention(n: int) -> tuple[Any, ...]:
    return (*_heads(n), torch.randn(1, 2, n, n), torch.arange(2 * n).view(2, n) % 5 == 4)


def _packed(n: int) -> tuple[Any, ...]:
    q, k, v = torch.randn(3, n, 2, 4)
    return q, k, v, torch.tensor([0, 2, n], dtype=torch.int32)


def _map(n: int) -> tuple[Any, ...]:
    return torch.randn(1, 4, 2 * n, 3 * 2 * 4), torch.randn(9, 2)


def _tokens(n: int) -> tuple[Any, ...]:
    return (*torch.randn(2, 3, n, 8), *torch.randn(3, 3, 1, 8))


def _kept(n: int) -> tuple[Any, ...]:
    return torch.randn(3, n, 8), torch.arange(3 * n).view(3, n) % 3 != 0


def _compaction(x: Tensor, keep: Tensor) -> Tensor:
    packing = kernels.compact(keep, capacity=keep.numel())
    return kernels.scatter_rows(kernels.gather_rows(x, packing) * 2, packing)


OPS: dict[str, tuple[Callable[..., Any], Callable[[int], tuple[Any, ...]]]] = {
    "attention": (lambda q, k, v, b, p: kernels.attention(q, k, v, bias=b, key_padding_mask=p), _attention),
    "causal attention": (lambda q, k, v: kernels.attention(q, k, v, causal=True), _heads),
    "attention_weights": (lambda q, k, v: kernels.attention_weights(q, k), _heads),
    "varlen_attention": (lambda q, k, v, c: kernels.varlen_attention(q, k, v, c, c, q.shape[0], q.shape[0]), _packed),
    "few_query_attention": (kernels.few_query_attention, lambda n: _heads(n, m=3)),
    "tiny_attention": (kernels.tiny_attention, _heads),
    "window_attention": (lambda x, t: kernels.window_attention(x, t, window=2, shift=1, heads=2), _map),
    "ln_modulate": (lambda x, y, g, s, c: kernels.ln_modulate(x, s, c), _tokens),
    "gate_residual": (lambda x, y, g, s, c: kernels.gate_residual(x, y, g), _tokens),
    "gate_residual_ln_modulate": (kernels.gate_residual_ln_modulate, _tokens),
    "compaction": (_compaction, _kept),
}


@pytest.mark.parametrize("name", OPS)
def test_varying_lengths_are_compiled_at_most_twice(name):
    run, inputs = OPS[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, backend=counter, fullgraph=True, dynamic=True)
    torch.manual_seed(0)
    for length in LENGTHS:
        given = inputs(length)
        wanted = run(*given)  # first, as an op is imported where it is first named
        torch.testing.assert_close(compiled(*given), wanted, rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= MOST
