"""Triton kernels of the exit test: one pass over both states, then one small program per sample.

The first kernel gives each block of tokens one program, so that a batch of one still fills the device, and writes
four partial sums; the second adds a sample's partials in a fixed order, takes the similarity and compares it on the
device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparing.kernels.triton.config import Config, next_power_of_2, pick_config
from sparing.kernels.triton.device import on_their_device

__all__ = ["cosine_exit_forward", "default_config"]


@triton.jit(do_not_specialize=["tokens", "parts"])
def cosine_partial_kernel(
    prev_ptr,  # (B, L, C)
    cur_ptr,  # (B, L, C)
    valid_ptr,  # (B, L) contiguous, uint8
    partial_ptr,  # (B, parts, 4): mean mode (sum of cosines, -, -, count); flat mode (dot, prev^2, cur^2, count)
    tokens,
    parts,
    eps,
    prev_stride_b,
    prev_stride_l,
    cur_stride_b,
    cur_stride_l,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    FLAT: tl.constexpr,
    ACC: tl.constexpr,
):
    sample = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    row = (part * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    live_row = row < tokens
    valid = tl.load(valid_ptr + sample * tokens + row, mask=live_row, other=0) != 0
    dot = tl.zeros([ROWS], dtype=ACC)
    prev_square = tl.zeros([ROWS], dtype=ACC)
    cur_square = tl.zeros([ROWS], dtype=ACC)
    for start in range(0, DIM, BLOCK):
        column = start + tl.arange(0, BLOCK)
        live = valid[:, None] & (column < DIM)[None, :]
        prev_at = prev_ptr + sample * prev_stride_b + row[:, None] * prev_stride_l + column[None, :]
        cur_at = cur_ptr + sample * cur_stride_b + row[:, None] * cur_stride_l + column[None, :]
        prev = tl.load(prev_at, mask=live, other=0.0).to(ACC)
        cur = tl.load(cur_at, mask=live, other=0.0).to(ACC)
        dot += tl.sum(prev * cur, axis=1)
        prev_square += tl.sum(prev * prev, axis=1)
        cur_square += tl.sum(cur * cur, axis=1)
    partial = partial_ptr + (sample * parts + part) * 4
    if FLAT:
        tl.store(partial, tl.sum(dot, axis=0))
        tl.store(partial + 1, tl.sum(prev_square, axis=0))
        tl.store(partial + 2, tl.sum(cur_square, axis=0))
    else:
        cosine = dot / (tl.maximum(tl.sqrt(prev_square), eps) * tl.maximum(tl.sqrt(cur_square), eps))
        tl.store(partial, tl.sum(tl.where(valid, cosine, 0.0), axis=0))
    tl.store(partial + 3, tl.sum(valid.to(ACC), axis=0))


@triton.jit(do_not_specialize=["parts"])
def cosine_finish_kernel(
    partial_ptr,  # (B, parts, 4)
    threshold_ptr,  # (B,) of the accumulation dtype
    similarity_ptr,  # (B,)
    exit_ptr,  # (B,) uint8
    parts,
    eps,
    BLOCK: tl.constexpr,
    FLAT: tl.constexpr,
    ACC: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    first = tl.zeros([BLOCK], dtype=ACC)
    second = tl.zeros([BLOCK], dtype=ACC)
    third = tl.zeros([BLOCK], dtype=ACC)
    number = tl.zeros([BLOCK], dtype=ACC)
    for start in range(0, parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        at = partial_ptr + (sample * parts + part) * 4
        first += tl.load(at, mask=part < parts, other=0.0)
        number += tl.load(at + 3, mask=part < parts, other=0.0)
        if FLAT:
            second += tl.load(at + 1, mask=part < parts, other=0.0)
            third += tl.load(at + 2, mask=part < parts, other=0.0)
    total = tl.sum(first, axis=0)
    count = tl.sum(number, axis=0)
    if FLAT:
        norms = tl.maximum(tl.sqrt(tl.sum(second, axis=0)), eps) * tl.maximum(tl.sqrt(tl.sum(third, axis=0)), eps)
        similarity = total / norms
    else:
        similarity = total / tl.maximum(count, 1.0)
    leaves = (similarity >= tl.load(threshold_ptr + sample)) & (count > 0.0)
    tl.store(similarity_ptr + sample, similarity)
    tl.store(exit_ptr + sample, leaves.to(tl.uint8))


def default_config(dim: int) -> Config:
    """Tokens (``block_m``) and columns (``block_n``) of a tile."""
    columns = min(1024, max(16, next_power_of_2(dim)))
    return Config(max(1, min(16, 4096 // columns)), columns, num_warps=4, num_stages=2)


@on_their_device
def cosine_exit_forward(
    prev: Tensor, cur: Tensor, valid: Tensor, threshold: Tensor, mode: str, eps: float
) -> tuple[Tensor, Tensor]:
    """Similarity ``(batch,)`` and exit ``(batch,)`` bool of ``prev`` and ``cur``: ``(batch, tokens, dim)``, last
    stride 1.

    ``valid``: ``(batch, tokens)`` bool; ``threshold``: ``(batch,)`` of the accumulation dtype.
    """
    batch, tokens, dim = prev.shape
    accumulate = threshold.dtype
    if prev.numel() == 0:
        return prev.new_zeros(batch, dtype=accumulate), torch.zeros(batch, dtype=torch.bool, device=prev.device)
    config = pick_config("cosine_exit", default_config(dim), head_dim=dim, dtype=prev.dtype)
    parts = triton.cdiv(tokens, config.block_m)
    partial = prev.new_empty((batch, parts, 4), dtype=accumulate)
    similarity = prev.new_empty(batch, dtype=accumulate)
    leaves = torch.empty(batch, dtype=torch.uint8, device=prev.device)
    acc = tl.float64 if accumulate == torch.float64 else tl.float32
    cosine_partial_kernel[(batch * parts,)](
        prev,
        cur,
        valid.contiguous().view(torch.uint8),
        partial,
        tokens,
        parts,
        eps,
        prev.stride(0),
        prev.stride(1),
        cur.stride(0),
        cur.stride(1),
        DIM=dim,
        BLOCK=config.block_n,
        ROWS=config.block_m,
        FLAT=mode == "flat",
        ACC=acc,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    cosine_finish_kernel[(batch,)](
        partial,
        threshold.contiguous(),
        similarity,
        leaves,
        parts,
        eps,
        BLOCK=128,
        FLAT=mode == "flat",
        ACC=acc,
        num_warps=1,
    )
    return similarity, leaves.view(torch.bool)
