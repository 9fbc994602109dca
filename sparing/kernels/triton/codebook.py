"""Triton kernel of the nearest-code search: a matrix product whose epilogue is the running argmin, so no score is
ever stored.

A program owns ``ROWS`` vectors and walks the codebook tile by tile; within a tile the inner loop runs over the
dimension. The best score and index stay in registers. A later tile wins only with a strictly smaller score and the
argmin inside a tile prefers the left, so exact ties go to the lowest index. Every column of a tile adds its products
in the same order: equal codes tie exactly.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparing.kernels.triton.config import Config, next_power_of_2, pick_config
from sparing.kernels.triton.device import on_their_device

__all__ = ["codebook_argmin_forward", "default_config"]


@triton.jit(do_not_specialize=["num_vectors"])
def code_offset_kernel(
    codebook_ptr,  # (K, D) contiguous
    offset_ptr,  # (K,): |c|^2 (l2) or 1 / max(|c|, eps) (cosine)
    num_codes,
    eps,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COSINE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    square = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, DIM, BLOCK):
        column = start + tl.arange(0, BLOCK)
        live = (row < num_codes)[:, None] & (column < DIM)[None, :]
        code = tl.load(codebook_ptr + row[:, None] * DIM + column[None, :], mask=live, other=0.0).to(tl.float32)
        square += tl.sum(code * code, axis=1)
    if COSINE:
        square = 1.0 / tl.maximum(tl.sqrt(square), eps)
    tl.store(offset_ptr + row, square, mask=row < num_codes)


@triton.jit(do_not_specialize=["num_vectors"])
def codebook_argmin_kernel(
    x_ptr,  # (N, D) contiguous
    codebook_ptr,  # (K, D) contiguous
    offset_ptr,  # (K,) as code_offset_kernel wrote it
    index_ptr,  # (N,) int32
    distance_ptr,  # (N,)
    num_vectors,
    num_codes,
    eps,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    BLOCK: tl.constexpr,
    COSINE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live_row = row < num_vectors
    best = tl.full([ROWS], float("inf"), dtype=tl.float32)
    index = tl.zeros([ROWS], dtype=tl.int32)
    for first in range(0, num_codes, CODES):
        code = first + tl.arange(0, CODES)
        live_code = code < num_codes
        product = tl.zeros([ROWS, CODES], dtype=tl.float32)
        for start in range(0, DIM, BLOCK):
            column = start + tl.arange(0, BLOCK)
            live_column = column < DIM
            x = tl.load(
                x_ptr + row[:, None] * DIM + column[None, :], mask=live_row[:, None] & live_column[None, :], other=0.0
            )
            c = tl.load(
                codebook_ptr + code.to(tl.int64)[None, :] * DIM + column[:, None],
                mask=live_code[None, :] & live_column[:, None],
                other=0.0,
            )
            if INTERPRETED:
                # The interpreter's dot is wrong on bfloat16 and adds the products of different columns in different
                # orders.
                product += tl.dot(x.to(tl.float64), c.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
            else:
                product = tl.dot(x, c, acc=product, input_precision=PRECISION)
        offset = tl.load(offset_ptr + code, mask=live_code, other=0.0)
        if COSINE:
            score = -product * offset[None, :]
        else:
            score = offset[None, :] - 2.0 * product
        score = tl.where(live_code[None, :], score, float("inf"))
        tile_best, tile_index = tl.min(score, axis=1, return_indices=True, return_indices_tie_break_left=True)
        better = tile_best < best
        index = tl.where(better, first + tile_index, index)
        best = tl.where(better, tile_best, best)
    square = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, DIM, BLOCK):
        column = start + tl.arange(0, BLOCK)
        live = live_row[:, None] & (column < DIM)[None, :]
        x = tl.load(x_ptr + row[:, None] * DIM + column[None, :], mask=live, other=0.0).to(tl.float32)
        square += tl.sum(x * x, axis=1)
    if COSINE:
        distance = best / tl.maximum(tl.sqrt(square), eps)
    else:
        distance = tl.maximum(best + square, 0.0)
    tl.store(index_ptr + row, index, mask=live_row)
    tl.store(distance_ptr + row, distance, mask=live_row)


def default_config(dim: int, dtype: torch.dtype) -> Config:
    """Vectors (``block_m``) and codes (``block_n``) of a tile. Float32 products are split into parts and need smaller
    tiles."""
    if dtype in (torch.bfloat16, torch.float16):
        return Config(128, 128, num_warps=8, num_stages=3)
    return Config(64, 64, num_warps=4, num_stages=2)


def dimension_block(dim: int, dtype: torch.dtype) -> int:
    """Columns of x and of the codebook that one dot takes: the tensor core wants at least 16."""
    widest = 64 if dtype in (torch.bfloat16, torch.float16) else 32
    return min(widest, max(16, next_power_of_2(dim)))


@on_their_device
def codebook_argmin_forward(
    x: Tensor, codebook: Tensor, metric: str, precision: str, eps: float, *, interpreted: bool
) -> tuple[Tensor, Tensor]:
    """Index ``(N,)`` int32 and distance ``(N,)`` of the nearest code.

    Args:
        x: ``(N, D)`` contiguous; codebook ``(K, D)`` contiguous, of the same dtype.
        codebook: the codes.
        metric: ``'l2'`` or ``'cosine'``.
        precision: of a float32 dot: ``'tf32'``, ``'tf32x3'``, ``'bf16x3'``, ``'bf16x6'`` or ``'ieee'``.
        eps: lower clamp of the norms.
        interpreted: the kernel runs in the interpreter.
    """
    (num_vectors, dim), num_codes = x.shape, codebook.shape[0]
    index = torch.empty(num_vectors, dtype=torch.int32, device=x.device)
    distance = x.new_empty(num_vectors, dtype=torch.float32)
    if num_vectors == 0:
        return index, distance
    config = pick_config("codebook_argmin", default_config(dim, x.dtype), head_dim=dim, dtype=x.dtype)
    offset = x.new_empty(num_codes, dtype=torch.float32)
    block = dimension_block(dim, x.dtype)
    cosine = metric == "cosine"
    code_offset_kernel[(triton.cdiv(num_codes, 16),)](
        codebook, offset, num_codes, eps, DIM=dim, BLOCK=min(256, next_power_of_2(dim)), ROWS=16, COSINE=cosine
    )
    codebook_argmin_kernel[(triton.cdiv(num_vectors, config.block_m),)](
        x,
        codebook,
        offset,
        index,
        distance,
        num_vectors,
        num_codes,
        eps,
        DIM=dim,
        ROWS=config.block_m,
        CODES=config.block_n,
        BLOCK=block,
        COSINE=cosine,
        PRECISION=precision,
        INTERPRETED=interpreted,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return index, distance
