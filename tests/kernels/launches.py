"""Launches of every Triton kernel of the attention family at published sizes, for offline compilation: name ->
callable that calls the real launcher. Names end in ``/default`` where one compile a kernel is enough, the rest are
for the slow run.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sparing.kernels import BlockMap, RingCache

BF16, FP32 = torch.bfloat16, torch.float32


def _qkv(
    m: int, n: int, d: int, dtype: torch.dtype, *, batch: int = 1, heads: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty(batch, heads, rows, d, dtype=dtype) for rows in (m, n, n))  # type: ignore[return-value]


def block_sparse(
    d: int, dtype: torch.dtype, *, tokens: int = 512, causal: bool = False, block_q: int = 128, block_k: int = 64
) -> None:
    from sparing.kernels.triton import block_sparse_attention as kernels

    q, k, v = _qkv(tokens, tokens, d, dtype)
    mask = torch.ones(1, 1, -(-tokens // block_q), -(-tokens // block_k), dtype=torch.bool)
    block_map = BlockMap.from_mask(mask, block_q=block_q, block_k=block_k)
    options = {"block_q": block_q, "block_k": block_k, "causal": causal, "scale": 0.1}
    lists = (block_map.kv_num, block_map.kv_idx, block_map.q_num, block_map.q_idx)
    out, lse = kernels.forward(q, k, v, *lists[:2], **options)
    kernels.backward(q, q, k, v, out, lse, *lists, **options)


def window(size: int, dim: int, dtype: torch.dtype, *, side: int = 56, shift: int = 0) -> None:
    from sparing.kernels.triton import window_attention as kernels

    heads = 4
    qkv = torch.empty(1, side, side, 3 * heads * dim, dtype=dtype)
    q, k, v = qkv.chunk(3, dim=-1)
    table = torch.empty((2 * size - 1) ** 2, heads, dtype=dtype)
    problems = kernels.Problems.of_maps(q, heads, (size, size), (shift, shift))
    out, lse = kernels.forward(problems, q, k, v, table, None, table=True, scale=0.1)
    kernels.backward(problems, out, q, k, v, table, None, out, lse, table=True, scale=0.1, bias_grad=True)


def tiny(m: int, n: int, d: int, dtype: torch.dtype) -> None:
    from sparing.kernels.triton import window_attention as kernels

    q, k, v = _qkv(m, n, d, dtype, batch=4, heads=8)
    problems = kernels.Problems.of_batch(q, k, v)
    out, lse = kernels.forward(problems, q, k, v, None, None, table=False, scale=0.1)
    kernels.backward(problems, out, q, k, v, None, None, out, lse, table=False, scale=0.1, bias_grad=False)


def few_query(m: int, n: int, d: int, dtype: torch.dtype) -> None:
    from sparing.kernels.triton import few_query_attention as kernels

    q, _, _ = _qkv(m, m, d, dtype)
    _, k, v = _qkv(m, n, d, dtype)
    bias = torch.empty(1, 16, m, n, dtype=dtype)
    kv_len = torch.empty(1, dtype=torch.int32)
    out, lse = kernels.forward(q, k, v, bias, kv_len, scale=0.1, splits=None)
    kernels.backward(q, q, k, v, bias, kv_len, out, lse, scale=0.1, splits=None, bias_grad=True)


def ring(tokens: int, d: int, dtype: torch.dtype) -> None:
    from sparing.kernels.triton import ring_attention_step as kernels

    cache = RingCache.empty(16, 64, heads=8, head_dim=d, tokens_per_step=tokens, dtype=dtype)
    new = torch.empty(16, tokens, 8, d, dtype=dtype)
    flags = torch.ones(16, dtype=torch.bool)
    state = (cache.k, cache.v, cache.head, cache.length)
    kernels.step(new, new, new, *state, flags, flags, None, window=64, scale=0.1)


LAUNCHES: dict[str, Callable[[], None]] = {
    "block_sparse/d128-bf16/default": partial(block_sparse, 128, BF16),
    "block_sparse/d72-bf16": partial(block_sparse, 72, BF16),
    "block_sparse/d64-bf16-causal": partial(block_sparse, 64, BF16, causal=True, block_q=64),
    "block_sparse/d64-fp32": partial(block_sparse, 64, FP32),
    "block_sparse/d128-fp32": partial(block_sparse, 128, FP32),
    "block_sparse/d256-bf16": partial(block_sparse, 256, BF16),
    "window/w7-d32-bf16-shifted/default": partial(window, 7, 32, BF16, shift=3),
    "window/w12-d32-bf16/default": partial(window, 12, 32, BF16, side=48),
    "window/w7-d32-fp32": partial(window, 7, 32, FP32, shift=3),
    "window/w12-d32-fp32": partial(window, 12, 32, FP32, side=48, shift=6),
    "window/w8-d128-bf16": partial(window, 8, 128, BF16),
    "tiny/8x16-d64-bf16/default": partial(tiny, 8, 16, 64, BF16),
    "tiny/16x16-d64-fp32": partial(tiny, 16, 16, 64, FP32),
    "tiny/64x64-d64-bf16": partial(tiny, 64, 64, 64, BF16),
    "tiny/32x32-d64-fp32": partial(tiny, 32, 32, 64, FP32),
    "tiny/64x64-d72-bf16": partial(tiny, 64, 64, 72, BF16),
    "few_query/16x4096-d64-bf16/default": partial(few_query, 16, 4096, 64, BF16),
    "few_query/64x4096-d128-bf16": partial(few_query, 64, 4096, 128, BF16),
    "few_query/9x1024-d72-bf16": partial(few_query, 9, 1024, 72, BF16),
    "few_query/32x4096-d64-fp32": partial(few_query, 32, 4096, 64, FP32),
    "few_query/16x4096-d128-fp32": partial(few_query, 16, 4096, 128, FP32),
    "few_query/16x4096-d256-bf16": partial(few_query, 16, 4096, 256, BF16),
    "few_query/64x4096-d256-bf16": partial(few_query, 64, 4096, 256, BF16),
    "ring/1-d128-bf16/default": partial(ring, 1, 128, BF16),
    "ring/3-d128-fp32": partial(ring, 3, 128, FP32),
}


def length_sweeps() -> dict[str, Callable[[], None]]:
    """Fifty token counts of each op at a fixed model: what a server with changing inputs launches."""
    sweeps: dict[str, Callable[[], None]] = {}
    for i in range(50):
        tokens = 300 + 37 * i
        sweeps[f"few_query/{tokens}"] = partial(few_query, 16, tokens, 72, BF16)
        sweeps[f"block_sparse/{tokens}"] = partial(block_sparse, 72, BF16, tokens=tokens)
        sweeps[f"window/{tokens}"] = partial(window, 7, 32, BF16, side=7 * (i + 1), shift=3)
        sweeps[f"tiny/{tokens}"] = partial(tiny, 1 + i, 1 + i, 64, BF16)
    return sweeps
