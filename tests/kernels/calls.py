"""One small random call of every attention op that has Triton kernels, as ``call(*tensors, backend=...)`` with its
leaves.

``make(seed, dtype)`` gives the leaves (tensors that may require a gradient) and the call; every test file runs over
these.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparing import kernels


@dataclass(frozen=True)
class Call:
    """``op`` with its leaves; ``run(*leaves, backend=..., return_lse=...)``."""

    op: Callable[..., Any]
    leaves: tuple[Tensor, ...]
    run: Callable[..., Any]


def _randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def few_query(dtype: torch.dtype) -> Call:
    """Bias broadcast over heads; one full, one ragged, one empty sample; three splits."""
    q, k, v = _randn(3, 2, 3, 8, dtype=dtype), _randn(3, 2, 21, 8, dtype=dtype), _randn(3, 2, 21, 5, dtype=dtype)
    bias = _randn(3, 1, 3, 21, dtype=dtype)
    kv_len = torch.tensor([21, 9, 0], dtype=torch.int32)

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, **options: Any) -> Any:
        return kernels.few_query_attention(q, k, v, bias=bias, kv_len=kv_len, splits=3, **options)

    return Call(kernels.few_query_attention, (q, k, v, bias), run)


def block_sparse(dtype: torch.dtype) -> Call:
    """Ragged blocks, a causal mask, one empty query block, a head dim cut in two parts."""
    q, k, v = _randn(1, 2, 37, 40, dtype=dtype), _randn(1, 2, 41, 40, dtype=dtype), _randn(1, 2, 41, 24, dtype=dtype)
    mask = torch.rand(1, 2, 3, 3) < 0.6
    mask[0, 0, 1] = False
    block_map = kernels.BlockMap.from_mask(mask, block_q=16, block_k=16)

    def run(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return kernels.block_sparse_attention(q, k, v, block_map, causal=True, **options)

    return Call(kernels.block_sparse_attention, (q, k, v), run)


def window(dtype: torch.dtype) -> Call:
    """A shifted, rectangular window with its table; the map is fused qkv."""
    qkv, table = _randn(1, 6, 4, 3 * 16, dtype=dtype), _randn(5 * 3, 2, dtype=dtype)

    def run(qkv: Tensor, table: Tensor, **options: Any) -> Any:
        return kernels.window_attention(qkv, table, window=(3, 2), shift=(1, 1), heads=2, **options)

    return Call(kernels.window_attention, (qkv, table), run)


def tiny(dtype: torch.dtype) -> Call:
    """A bias shared by the batch and by the queries."""
    q, k, v = _randn(3, 2, 5, 8, dtype=dtype), _randn(3, 2, 7, 8, dtype=dtype), _randn(3, 2, 7, 4, dtype=dtype)
    bias = _randn(1, 2, 1, 7, dtype=dtype)
    return Call(kernels.tiny_attention, (q, k, v, bias), kernels.tiny_attention)


CALLS: dict[str, Callable[[torch.dtype], Call]] = {
    "few_query": few_query,
    "block_sparse": block_sparse,
    "window": window,
    "tiny": tiny,
}


def make(name: str, *, dtype: torch.dtype, seed: int = 0) -> Call:
    """The call of that name with leaves that require gradients."""
    torch.manual_seed(seed)
    call = CALLS[name](dtype)
    return Call(call.op, tuple(leaf.requires_grad_() for leaf in call.leaves), call.run)


def outputs_and_gradients(call: Call, *, backend: str) -> list[Tensor]:
    """out, lse and the gradients of a fixed weighting of out."""
    out, lse = call.run(*call.leaves, backend=backend, return_lse=True)
    upstream = torch.cos(torch.arange(out.numel(), device=out.device)).view(out.shape).to(out.dtype)
    return [out.detach(), lse, *torch.autograd.grad(out, call.leaves, upstream)]
