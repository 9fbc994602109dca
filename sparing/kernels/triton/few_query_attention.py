"""Triton kernels of few-query attention (split-K): partial attentions over parts of the keys, their merge, and the
backward.

All queries of a head stay resident, each program walks one part of the keys. In the backward a part of the keys
belongs to one program, which writes its dk and dv itself; only dq is summed over the parts, by a second sum. No
atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparing.kernels.ops.few_query_attention import MAX_SPLITS
from sparing.kernels.triton.config import Config, next_power_of_2, pick_config
from sparing.kernels.triton.device import on_their_device
from sparing.kernels.triton.tiles import (
    LN2,
    LOG2E,
    acc_type,
    accumulator,
    dot_options,
    load_base2_lse,
    load_tile,
    natural_lse,
    product,
    row_dot,
    softmax_step,
    store_tile,
    strides_in_units,
    unit_last_stride,
)

_SIZES = [f"{name}_{part}" for name in ("q", "k", "v", "g", "bias") for part in ("batch", "head", "row")]
_SIZES += ["heads", "splits", "chunk", "num_queries", "num_keys"]
_PROGRAMS = (
    264  # two for each of the 132 processors of an H100; from the sizes alone, so that bits do not depend on the device
)
_MIN_CHUNK = 256  # keys a program should have at least


@triton.jit
def biased_scores(
    scores, bias_ptr, rows, columns, bias_row, num_queries, end, scale,
    HAS_BIAS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """q k^T in base 2: scaled, with bias, -inf from ``end`` on. ``bias_ptr`` stands at this batch element and head."""
    scores = scores * (scale * LOG2E)
    live = (columns < end)[None, :]
    if HAS_BIAS:
        at = rows.to(tl.int64)[:, None] * bias_row + columns[None, :]
        scores += tl.load(bias_ptr + at, mask=live & (rows < num_queries)[:, None], other=0.0).to(ACC) * LOG2E
    return tl.where(live, scores, float("-inf"))


@triton.jit(do_not_specialize=_SIZES)
def few_query_forward_kernel(
    q_ptr,  # (B, H, M, D)
    k_ptr,  # (B, H, N, D)
    v_ptr,  # (B, H, N, DV)
    bias_ptr,  # (B, H, M, N), stride 0 where broadcast
    len_ptr,  # (B,) visible keys
    out_ptr,  # (B, H, S, M, DV) contiguous
    lse_ptr,  # (B, H, S, M) contiguous
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, bias_batch, bias_head, bias_row,
    heads, splits, chunk, num_queries, num_keys, scale,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_LEN: tl.constexpr,
    ACC: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    split = (program % splits).to(tl.int32)
    bh = program // splits
    batch, head = bh // heads, bh % heads
    rows = tl.arange(0, BM)
    d, e = tl.arange(0, BD), tl.arange(0, BV)
    q = load_tile(q_ptr + (batch * q_batch + head * q_head) * UNIT, rows, d, q_row * UNIT, num_queries, D, BD)
    k_ptr += (batch * k_batch + head * k_head) * UNIT
    v_ptr += (batch * v_batch + head * v_head) * UNIT
    bias_ptr += batch * bias_batch + head * bias_head
    end = tl.minimum((split + 1) * chunk, num_keys)
    if HAS_LEN:
        end = tl.minimum(end, tl.load(len_ptr + batch))
    acc = tl.zeros([BM, BV], dtype=ACC)
    peak = tl.full([BM], float("-inf"), dtype=ACC)
    total = tl.zeros([BM], dtype=ACC)
    for first in range(split * chunk, end, BN):
        columns = first + tl.arange(0, BN)
        k = load_tile(k_ptr, columns, d, k_row * UNIT, end, D, BD)
        scores = product(q, tl.trans(k), UPCAST, PRECISION)
        scores = biased_scores(scores, bias_ptr, rows, columns, bias_row, num_queries, end, scale, HAS_BIAS, ACC)
        weights, rescale, peak, total = softmax_step(scores, peak, total)
        v = load_tile(v_ptr, columns, e, v_row * UNIT, end, DV, BV)
        if not UPCAST:
            weights = weights.to(v.dtype)
        acc = acc * rescale[:, None] + product(weights, v, UPCAST, PRECISION)
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    store_tile(out_ptr + program * num_queries * DV, acc, rows, e, DV, num_queries, DV, BV)
    tl.store(lse_ptr + program * num_queries + rows, natural_lse(peak, total), mask=rows < num_queries)


@triton.jit(do_not_specialize=["splits", "num_queries"])
def merge_kernel(
    partial_ptr,  # (B, H, S, M, DV) contiguous
    partial_lse_ptr,  # (B, H, S, M)
    out_ptr,  # (B, H, M, DV) contiguous
    lse_ptr,  # (B, H, M)
    splits, num_queries,
    DV: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    bh, row = program // num_queries, program % num_queries
    parts = tl.arange(0, BS)
    columns = tl.arange(0, BV)
    at = (bh * splits + parts) * num_queries + row
    lse = tl.load(partial_lse_ptr + at, mask=parts < splits, other=float("-inf")) * LOG2E
    peak = tl.max(lse, 0)
    weights = tl.exp2(lse - tl.where(peak == float("-inf"), 0.0, peak))
    total = tl.sum(weights, 0)
    divisor = tl.where(total == 0.0, 1.0, total)
    live = (parts < splits)[:, None] & (columns < DV)[None, :]
    partial = tl.load(partial_ptr + at[:, None] * DV + columns[None, :], mask=live, other=0.0)
    merged = tl.sum(partial * weights[:, None], 0) / divisor
    tl.store(out_ptr + program * DV + columns, merged.to(out_ptr.dtype.element_ty), mask=columns < DV)
    tl.store(lse_ptr + program, tl.where(total == 0.0, float("-inf"), (peak + tl.log2(divisor)) * LN2))


@triton.jit(do_not_specialize=_SIZES)
def few_query_backward_kernel(
    q_ptr,  # (B, H, M, D)
    k_ptr,  # (B, H, N, D)
    v_ptr,  # (B, H, N, DV)
    grad_ptr,  # (B, H, M, DV)
    bias_ptr,
    len_ptr,
    lse_ptr,  # (B, H, M)
    delta_ptr,  # (B, H, M)
    dq_ptr,  # (B, H, S, M, D) accumulator dtype
    dk_ptr,  # (B, H, N, D) contiguous
    dv_ptr,  # (B, H, N, DV) contiguous
    dbias_ptr,  # (B, H, M, N) contiguous
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, g_batch, g_head, g_row,
    bias_batch, bias_head, bias_row,
    heads, splits, chunk, num_queries, num_keys, scale,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_LEN: tl.constexpr, BIAS_GRAD: tl.constexpr,
    ACC: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    split = (program % splits).to(tl.int32)
    bh = program // splits
    batch, head = bh // heads, bh % heads
    rows = tl.arange(0, BM)
    d, e = tl.arange(0, BD), tl.arange(0, BV)
    q = load_tile(q_ptr + (batch * q_batch + head * q_head) * UNIT, rows, d, q_row * UNIT, num_queries, D, BD)
    grad = load_tile(grad_ptr + (batch * g_batch + head * g_head) * UNIT, rows, e, g_row * UNIT, num_queries, DV, BV)
    k_ptr += (batch * k_batch + head * k_head) * UNIT
    v_ptr += (batch * v_batch + head * v_head) * UNIT
    dk_ptr += bh * num_keys * D
    dv_ptr += bh * num_keys * DV
    bias_ptr += batch * bias_batch + head * bias_head
    lse = load_base2_lse(lse_ptr + bh * num_queries, rows, num_queries)
    delta = tl.load(delta_ptr + bh * num_queries + rows, mask=rows < num_queries, other=0.0)
    last = tl.minimum((split + 1) * chunk, num_keys)  # gradients of hidden keys are written too, as zeros
    end = last
    if HAS_LEN:
        end = tl.minimum(end, tl.load(len_ptr + batch))
    dq = tl.zeros([BM, BD], dtype=ACC)
    for first in range(split * chunk, last, BN):
        columns = first + tl.arange(0, BN)
        k = load_tile(k_ptr, columns, d, k_row * UNIT, end, D, BD)
        v = load_tile(v_ptr, columns, e, v_row * UNIT, end, DV, BV)
        scores = product(q, tl.trans(k), UPCAST, PRECISION)
        scores = biased_scores(scores, bias_ptr, rows, columns, bias_row, num_queries, end, scale, HAS_BIAS, ACC)
        weights = tl.exp2(scores - lse[:, None])
        slope = weights * (product(grad, tl.trans(v), UPCAST, PRECISION) - delta[:, None])
        if BIAS_GRAD:
            at = (bh * num_queries + rows)[:, None] * num_keys + columns[None, :]
            tl.store(dbias_ptr + at, slope, mask=(rows < num_queries)[:, None] & (columns < last)[None, :])
        if not UPCAST:
            weights = weights.to(q.dtype)
            slope = slope.to(q.dtype)
        dq += product(slope, k, UPCAST, PRECISION)
        dk = product(tl.trans(slope), q, UPCAST, PRECISION) * scale
        dv = product(tl.trans(weights), grad, UPCAST, PRECISION)
        store_tile(dk_ptr, dk, columns, d, D, last, D, BD)
        store_tile(dv_ptr, dv, columns, e, DV, last, DV, BV)
    store_tile(dq_ptr + program * num_queries * D, dq * scale, rows, d, D, num_queries, D, BD)


def pick_splits(batch_heads: int, num_keys: int) -> int:
    """Number of parts of the keys, from the sizes alone: enough programs for the device, at least 256 keys each."""
    wanted = -(-_PROGRAMS // max(batch_heads, 1))
    return max(1, min(wanted, num_keys // _MIN_CHUNK, MAX_SPLITS))


def default_config(direction: str, queries: int, head_dim: int, dtype: torch.dtype) -> Config:
    """Keys of a tile, warps and stages by rule; ``queries`` and ``head_dim`` are those of the tile. The more bytes
    the resident queries (and in the backward their gradients) take, the fewer keys fit beside them; float32 dots
    split every operand.
    """
    resident = queries * head_dim * dtype.itemsize * (4 if dtype.itemsize > 2 else 1)
    resident *= 1 if direction == "forward" else 2
    keys = 64 if resident <= 16384 else 32 if resident <= 32768 else 16
    if direction == "backward" and head_dim > 128:
        keys = min(keys, 32)
    wide = head_dim * dtype.itemsize >= 256
    return Config(queries, keys, 8 if wide else 4, 3 if direction == "forward" and not wide else 2)


def _constants(q: Tensor, v: Tensor, bias: Tensor | None, kv_len: Tensor | None, direction: str) -> dict[str, object]:
    dim, value_dim = q.shape[3], v.shape[3]
    block_d, block_v = (max(next_power_of_2(d), 16) for d in (dim, value_dim))
    block_m = max(next_power_of_2(q.shape[2]), 16)
    default = default_config(direction, block_m, max(block_d, block_v), q.dtype)
    config = pick_config(f"few_query_{direction}", default, head_dim=dim, dtype=q.dtype)
    return {
        "D": dim, "BD": block_d, "DV": value_dim, "BV": block_v, "BM": block_m, "BN": config.block_n,
        "HAS_BIAS": bias is not None, "HAS_LEN": kv_len is not None, "ACC": acc_type(q.dtype), **dot_options(q.dtype),
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip


def _bias_strides(bias: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if bias is None else tuple(0 if bias.shape[i] == 1 else bias.stride(i) for i in range(3))


@on_their_device
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    kv_len: Tensor | None,
    *,
    scale: float,
    splits: int | None,
) -> tuple[Tensor, Tensor]:
    """out (B, H, M, DV) and natural-log lse (B, H, M), both contiguous."""
    q, k, v = (unit_last_stride(t) for t in (q, k, v))
    bias = None if bias is None else unit_last_stride(bias)
    batch, heads, num_queries, _ = q.shape
    num_keys, value_dim = k.shape[2], v.shape[3]
    out = torch.empty(batch, heads, num_queries, value_dim, device=q.device, dtype=q.dtype)
    lse = torch.empty(batch, heads, num_queries, device=q.device, dtype=accumulator(q.dtype))
    if out.numel() == 0 or num_keys == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    splits = min(splits or pick_splits(batch * heads, num_keys), num_keys)
    partial, partial_lse = out, lse
    if splits > 1:
        partial = torch.empty(batch, heads, splits, num_queries, value_dim, device=q.device, dtype=lse.dtype)
        partial_lse = torch.empty(batch, heads, splits, num_queries, device=q.device, dtype=lse.dtype)
    strides, unit = strides_in_units(q, k, v)
    kv_len = None if kv_len is None else kv_len.contiguous()
    constants = _constants(q, v, bias, kv_len, "forward")
    few_query_forward_kernel[(batch * heads * splits,)](
        q, k, v, q if bias is None else bias, q if kv_len is None else kv_len, partial, partial_lse,
        *strides, *_bias_strides(bias), heads, splits, triton.cdiv(num_keys, splits), num_queries, num_keys, scale,
        **constants, UNIT=unit,
    )  # fmt: skip
    if splits > 1:
        merge_kernel[(batch * heads * num_queries,)](
            partial, partial_lse, out, lse, splits, num_queries,
            DV=value_dim, BV=constants["BV"], BS=next_power_of_2(splits), num_warps=4,
        )  # fmt: skip
    return out, lse


@on_their_device
def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    kv_len: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    splits: int | None,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v (contiguous) and, where asked for, of the biased scores (B, H, M, N)."""
    grad, q, k, v = (unit_last_stride(t) for t in (grad, q, k, v))
    bias = None if bias is None else unit_last_stride(bias)
    kv_len = None if kv_len is None else kv_len.contiguous()
    batch, heads, num_queries, dim = q.shape
    num_keys = k.shape[2]
    dk, dv = (torch.empty(t.shape, device=t.device, dtype=t.dtype) for t in (k, v))
    wide = accumulator(q.dtype)
    slopes = torch.empty(batch, heads, num_queries, num_keys, device=q.device, dtype=wide) if bias_grad else None
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q), dk.zero_(), dv.zero_(), None if slopes is None else slopes.zero_()
    splits = min(splits or pick_splits(batch * heads, num_keys), num_keys)
    dq = torch.empty(batch, heads, splits, num_queries, dim, device=q.device, dtype=wide)
    delta = row_dot(out, grad)
    strides, unit = strides_in_units(q, k, v, grad)
    few_query_backward_kernel[(batch * heads * splits,)](
        q, k, v, grad, q if bias is None else bias, q if kv_len is None else kv_len, lse, delta, dq, dk, dv,
        dq if slopes is None else slopes, *strides, *_bias_strides(bias),
        heads, splits, triton.cdiv(num_keys, splits), num_queries, num_keys, scale,
        **_constants(q, v, bias, kv_len, "backward"), BIAS_GRAD=bias_grad, UNIT=unit,
    )  # fmt: skip
    return dq.sum(2).to(q.dtype), dk, dv, slopes
