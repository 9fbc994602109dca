"""Triton kernels of block-sparse attention: forward, gradient of q, gradients of k and v.

Each program owns one tile of rows and walks the index list of its block. The forward and the gradient of q walk the
kept key blocks of a query block, the gradients of k and v walk the query blocks that keep a key block: no atomics
anywhere. A block is walked in tiles, the largest power of two that divides it, up to the configured size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparing.kernels.triton.config import Config, pick_config
from sparing.kernels.triton.device import on_their_device
from sparing.kernels.triton.tiles import (
    LOG2E,
    acc_type,
    accumulator,
    dot_options,
    load_base2_lse,
    load_tile,
    natural_lse,
    power_of_two_tile,
    product,
    row_dot,
    softmax_step,
    split_dim,
    store_tile,
    strides_in_units,
    unit_last_stride,
)

_SIZES = ["q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row", "g_batch", "g_head"]
_SIZES += ["g_row", "map_batch", "map_head", "list_row", "heads", "num_queries", "num_keys"]


@triton.jit
def visible_scores(scores, rows, columns, num_queries, num_keys, CAUSAL: tl.constexpr):
    """Scores (rows, columns) with -inf outside the matrix and above the bottom-right diagonal."""
    live = (columns < num_keys)[None, :]
    if CAUSAL:
        live = live & (columns[None, :] <= rows[:, None] + (num_keys - num_queries))
    return tl.where(live, scores, float("-inf"))


@triton.jit(do_not_specialize=_SIZES)
def block_sparse_forward_kernel(
    q_ptr,  # (B, H, M, D)
    k_ptr,  # (B, H, N, D)
    v_ptr,  # (B, H, N, DV)
    num_ptr,  # (B | 1, H | 1, NQ) kept key blocks
    idx_ptr,  # (B | 1, H | 1, NQ, NK) their numbers
    out_ptr,  # (B, H, M, DV) contiguous
    lse_ptr,  # (B, H, M) contiguous
    q_batch, q_head, q_row,
    k_batch, k_head, k_row,
    v_batch, v_head, v_row,
    map_batch, map_head, list_row,
    heads, num_queries, num_keys, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(num_queries, BM)
    program = tl.program_id(0).to(tl.int64)
    bh = program // tiles
    batch, head = bh // heads, bh % heads
    tile = program % tiles
    rows = (tile * BM + tl.arange(0, BM)).to(tl.int32)
    d0, e0 = tl.arange(0, D0), tl.arange(0, V0)
    q_ptr += (batch * q_batch + head * q_head) * UNIT
    k_ptr += (batch * k_batch + head * k_head) * UNIT
    v_ptr += (batch * v_batch + head * v_head) * UNIT
    q0 = load_tile(q_ptr, rows, d0, q_row * UNIT, num_queries, D, D0)
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
        q1 = load_tile(q_ptr, rows, d1, q_row * UNIT, num_queries, D, D0 + D1)
    if V1 > 0:
        e1 = V0 + tl.arange(0, V1)
        acc1 = tl.zeros([BM, V1], dtype=ACC)
    acc0 = tl.zeros([BM, V0], dtype=ACC)
    peak = tl.full([BM], float("-inf"), dtype=ACC)
    total = tl.zeros([BM], dtype=ACC)
    block = tile * BM // BLOCK_Q
    list_at = batch * map_batch + head * map_head + block
    count = tl.load(num_ptr + list_at)
    idx_ptr += list_at * list_row
    for step in range(count * (BLOCK_K // BN)):
        first = tl.load(idx_ptr + step // (BLOCK_K // BN)) * BLOCK_K + (step % (BLOCK_K // BN)) * BN
        columns = first + tl.arange(0, BN)
        k0 = load_tile(k_ptr, columns, d0, k_row * UNIT, num_keys, D, D0)
        scores = product(q0, tl.trans(k0), UPCAST, PRECISION)
        if D1 > 0:
            k1 = load_tile(k_ptr, columns, d1, k_row * UNIT, num_keys, D, D0 + D1)
            scores += product(q1, tl.trans(k1), UPCAST, PRECISION)
        scores = visible_scores(scores * (scale * LOG2E), rows, columns, num_queries, num_keys, CAUSAL)
        weights, rescale, peak, total = softmax_step(scores, peak, total)
        v0 = load_tile(v_ptr, columns, e0, v_row * UNIT, num_keys, DV, V0)
        if not UPCAST:
            weights = weights.to(v0.dtype)
        acc0 = acc0 * rescale[:, None] + product(weights, v0, UPCAST, PRECISION)
        if V1 > 0:
            v1 = load_tile(v_ptr, columns, e1, v_row * UNIT, num_keys, DV, V0 + V1)
            acc1 = acc1 * rescale[:, None] + product(weights, v1, UPCAST, PRECISION)
    divisor = tl.where(total == 0.0, 1.0, total)[:, None]
    out_ptr += bh * num_queries * DV
    store_tile(out_ptr, acc0 / divisor, rows, e0, DV, num_queries, DV, V0)
    if V1 > 0:
        store_tile(out_ptr, acc1 / divisor, rows, e1, DV, num_queries, DV, V0 + V1)
    tl.store(lse_ptr + bh * num_queries + rows, natural_lse(peak, total), mask=rows < num_queries)


@triton.jit(do_not_specialize=_SIZES)
def block_sparse_dq_kernel(
    q_ptr,  # (B, H, M, D)
    k_ptr,  # (B, H, N, D)
    v_ptr,  # (B, H, N, DV)
    grad_ptr,  # (B, H, M, DV) gradient of out
    lse_ptr,  # (B, H, M) contiguous
    delta_ptr,  # (B, H, M) contiguous: row sums of out * grad
    num_ptr,  # (B | 1, H | 1, NQ)
    idx_ptr,  # (B | 1, H | 1, NQ, NK)
    dq_ptr,  # (B, H, M, D) contiguous
    q_batch, q_head, q_row,
    k_batch, k_head, k_row,
    v_batch, v_head, v_row,
    g_batch, g_head, g_row,
    map_batch, map_head, list_row,
    heads, num_queries, num_keys, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(num_queries, BM)
    program = tl.program_id(0).to(tl.int64)
    bh = program // tiles
    batch, head = bh // heads, bh % heads
    tile = program % tiles
    rows = (tile * BM + tl.arange(0, BM)).to(tl.int32)
    d0, e0 = tl.arange(0, D0), tl.arange(0, V0)
    q_ptr += (batch * q_batch + head * q_head) * UNIT
    k_ptr += (batch * k_batch + head * k_head) * UNIT
    v_ptr += (batch * v_batch + head * v_head) * UNIT
    grad_ptr += (batch * g_batch + head * g_head) * UNIT
    q0 = load_tile(q_ptr, rows, d0, q_row * UNIT, num_queries, D, D0)
    g0 = load_tile(grad_ptr, rows, e0, g_row * UNIT, num_queries, DV, V0)
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
        q1 = load_tile(q_ptr, rows, d1, q_row * UNIT, num_queries, D, D0 + D1)
        dq1 = tl.zeros([BM, D1], dtype=ACC)
    if V1 > 0:
        e1 = V0 + tl.arange(0, V1)
        g1 = load_tile(grad_ptr, rows, e1, g_row * UNIT, num_queries, DV, V0 + V1)
    dq0 = tl.zeros([BM, D0], dtype=ACC)
    lse = load_base2_lse(lse_ptr + bh * num_queries, rows, num_queries)
    delta = tl.load(delta_ptr + bh * num_queries + rows, mask=rows < num_queries, other=0.0)
    block = tile * BM // BLOCK_Q
    list_at = batch * map_batch + head * map_head + block
    count = tl.load(num_ptr + list_at)
    idx_ptr += list_at * list_row
    for step in range(count * (BLOCK_K // BN)):
        first = tl.load(idx_ptr + step // (BLOCK_K // BN)) * BLOCK_K + (step % (BLOCK_K // BN)) * BN
        columns = first + tl.arange(0, BN)
        k0 = load_tile(k_ptr, columns, d0, k_row * UNIT, num_keys, D, D0)
        v0 = load_tile(v_ptr, columns, e0, v_row * UNIT, num_keys, DV, V0)
        scores = product(q0, tl.trans(k0), UPCAST, PRECISION)
        slope = product(g0, tl.trans(v0), UPCAST, PRECISION)
        if D1 > 0:
            k1 = load_tile(k_ptr, columns, d1, k_row * UNIT, num_keys, D, D0 + D1)
            scores += product(q1, tl.trans(k1), UPCAST, PRECISION)
        if V1 > 0:
            v1 = load_tile(v_ptr, columns, e1, v_row * UNIT, num_keys, DV, V0 + V1)
            slope += product(g1, tl.trans(v1), UPCAST, PRECISION)
        scores = visible_scores(scores * (scale * LOG2E), rows, columns, num_queries, num_keys, CAUSAL)
        slope = tl.exp2(scores - lse[:, None]) * (slope - delta[:, None])
        if not UPCAST:
            slope = slope.to(k0.dtype)
        dq0 += product(slope, k0, UPCAST, PRECISION)
        if D1 > 0:
            dq1 += product(slope, k1, UPCAST, PRECISION)
    dq_ptr += bh * num_queries * D
    store_tile(dq_ptr, dq0 * scale, rows, d0, D, num_queries, D, D0)
    if D1 > 0:
        store_tile(dq_ptr, dq1 * scale, rows, d1, D, num_queries, D, D0 + D1)


@triton.jit(do_not_specialize=_SIZES)
def block_sparse_dkdv_kernel(
    q_ptr,  # (B, H, M, D)
    k_ptr,  # (B, H, N, D)
    v_ptr,  # (B, H, N, DV)
    grad_ptr,  # (B, H, M, DV) gradient of out
    lse_ptr,  # (B, H, M) contiguous
    delta_ptr,  # (B, H, M) contiguous
    num_ptr,  # (B | 1, H | 1, NK) query blocks that keep a key block
    idx_ptr,  # (B | 1, H | 1, NK, NQ) their numbers
    dk_ptr,  # (B, H, N, D) contiguous
    dv_ptr,  # (B, H, N, DV) contiguous
    q_batch, q_head, q_row,
    k_batch, k_head, k_row,
    v_batch, v_head, v_row,
    g_batch, g_head, g_row,
    map_batch, map_head, list_row,
    heads, num_queries, num_keys, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(num_keys, BN)
    program = tl.program_id(0).to(tl.int64)
    bh = program // tiles
    batch, head = bh // heads, bh % heads
    tile = program % tiles
    columns = (tile * BN + tl.arange(0, BN)).to(tl.int32)
    d0, e0 = tl.arange(0, D0), tl.arange(0, V0)
    q_ptr += (batch * q_batch + head * q_head) * UNIT
    k_ptr += (batch * k_batch + head * k_head) * UNIT
    v_ptr += (batch * v_batch + head * v_head) * UNIT
    grad_ptr += (batch * g_batch + head * g_head) * UNIT
    lse_ptr += bh * num_queries
    delta_ptr += bh * num_queries
    k0 = load_tile(k_ptr, columns, d0, k_row * UNIT, num_keys, D, D0)
    v0 = load_tile(v_ptr, columns, e0, v_row * UNIT, num_keys, DV, V0)
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
        k1 = load_tile(k_ptr, columns, d1, k_row * UNIT, num_keys, D, D0 + D1)
        dk1 = tl.zeros([BN, D1], dtype=ACC)
    if V1 > 0:
        e1 = V0 + tl.arange(0, V1)
        v1 = load_tile(v_ptr, columns, e1, v_row * UNIT, num_keys, DV, V0 + V1)
        dv1 = tl.zeros([BN, V1], dtype=ACC)
    dk0 = tl.zeros([BN, D0], dtype=ACC)
    dv0 = tl.zeros([BN, V0], dtype=ACC)
    block = tile * BN // BLOCK_K
    list_at = batch * map_batch + head * map_head + block
    count = tl.load(num_ptr + list_at)
    idx_ptr += list_at * list_row
    for step in range(count * (BLOCK_Q // BM)):
        first = tl.load(idx_ptr + step // (BLOCK_Q // BM)) * BLOCK_Q + (step % (BLOCK_Q // BM)) * BM
        rows = first + tl.arange(0, BM)
        q0 = load_tile(q_ptr, rows, d0, q_row * UNIT, num_queries, D, D0)
        g0 = load_tile(grad_ptr, rows, e0, g_row * UNIT, num_queries, DV, V0)
        lse = load_base2_lse(lse_ptr, rows, num_queries)
        delta = tl.load(delta_ptr + rows, mask=rows < num_queries, other=0.0)
        scores = product(q0, tl.trans(k0), UPCAST, PRECISION)
        slope = product(g0, tl.trans(v0), UPCAST, PRECISION)
        if D1 > 0:
            q1 = load_tile(q_ptr, rows, d1, q_row * UNIT, num_queries, D, D0 + D1)
            scores += product(q1, tl.trans(k1), UPCAST, PRECISION)
        if V1 > 0:
            g1 = load_tile(grad_ptr, rows, e1, g_row * UNIT, num_queries, DV, V0 + V1)
            slope += product(g1, tl.trans(v1), UPCAST, PRECISION)
        scores = visible_scores(scores * (scale * LOG2E), rows, columns, num_queries, num_keys, CAUSAL)
        weights = tl.exp2(scores - lse[:, None])
        slope = weights * (slope - delta[:, None])
        if not UPCAST:
            weights = weights.to(q0.dtype)
            slope = slope.to(q0.dtype)
        weights = tl.trans(weights)
        slope = tl.trans(slope)
        dv0 += product(weights, g0, UPCAST, PRECISION)
        dk0 += product(slope, q0, UPCAST, PRECISION)
        if V1 > 0:
            dv1 += product(weights, g1, UPCAST, PRECISION)
        if D1 > 0:
            dk1 += product(slope, q1, UPCAST, PRECISION)
    dk_ptr += bh * num_keys * D
    dv_ptr += bh * num_keys * DV
    store_tile(dk_ptr, dk0 * scale, columns, d0, D, num_keys, D, D0)
    store_tile(dv_ptr, dv0, columns, e0, DV, num_keys, DV, V0)
    if D1 > 0:
        store_tile(dk_ptr, dk1 * scale, columns, d1, D, num_keys, D, D0 + D1)
    if V1 > 0:
        store_tile(dv_ptr, dv1, columns, e1, DV, num_keys, DV, V0 + V1)


def default_config(direction: str, head_dim: int, dtype: torch.dtype) -> Config:
    """Tiles, warps and stages by rule: what compiles for sm_90 without spilling. float32 dots split every operand in
    three and hold it in registers, so float32 tiles are smaller.
    """
    if dtype.itemsize > 2:
        if direction == "forward":
            return Config(128, 64, 8, 3) if head_dim <= 64 else Config(32, 32, 8, 2)
        return Config(32, 32, 8, 2) if head_dim <= 64 else Config(16, 16, 4, 1)
    if direction == "forward":
        return Config(128, 64, 8, 3) if head_dim <= 128 else Config(64, 32, 4, 2)
    if head_dim > 128:
        return Config(32, 32, 4, 1)
    return Config(64, 64, 8 if head_dim > 64 else 4, 2)


def _constants(q: Tensor, v: Tensor, *, block_q: int, block_k: int, causal: bool, config: Config) -> dict[str, object]:
    d, dv = q.shape[3], v.shape[3]
    (d0, d1), (v0, v1) = split_dim(d), split_dim(dv)
    return {
        "D": d, "D0": d0, "D1": d1, "DV": dv, "V0": v0, "V1": v1, "BLOCK_Q": block_q, "BLOCK_K": block_k,
        "BM": power_of_two_tile(block_q, config.block_m), "BN": power_of_two_tile(block_k, config.block_n),
        "CAUSAL": causal, "ACC": acc_type(q.dtype), **dot_options(q.dtype),
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip


def _list_strides(count: Tensor, index: Tensor) -> tuple[int, int, int]:
    """Batch and head strides of the counts (0 where shared) and the length of an index row; both are contiguous."""
    batch = count.stride(0) if count.shape[0] > 1 else 0
    return batch, count.stride(1) if count.shape[1] > 1 else 0, index.shape[3]


@on_their_device
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num: Tensor,
    kv_idx: Tensor,
    *,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out (B, H, M, DV) and natural-log lse (B, H, M)."""
    q, k, v = (unit_last_stride(t) for t in (q, k, v))
    kv_num, kv_idx = kv_num.contiguous(), kv_idx.contiguous()
    batch, heads, num_queries, dim = q.shape
    out = torch.empty(batch, heads, num_queries, v.shape[3], device=q.device, dtype=q.dtype)
    lse = torch.empty(batch, heads, num_queries, device=q.device, dtype=accumulator(q.dtype))
    if out.numel() == 0 or k.shape[2] == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    config = pick_config("block_sparse_forward", default_config("forward", dim, q.dtype), head_dim=dim, dtype=q.dtype)
    constants = _constants(q, v, block_q=block_q, block_k=block_k, causal=causal, config=config)
    strides, unit = strides_in_units(q, k, v)
    block_sparse_forward_kernel[(batch * heads * triton.cdiv(num_queries, constants["BM"]),)](
        q, k, v, kv_num, kv_idx, out, lse, *strides,
        *_list_strides(kv_num, kv_idx), heads, num_queries, k.shape[2], scale, **constants, UNIT=unit,
    )  # fmt: skip
    return out, lse


@on_their_device
def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_num: Tensor,
    kv_idx: Tensor,
    q_num: Tensor,
    q_idx: Tensor,
    *,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous."""
    grad, q, k, v = (unit_last_stride(t) for t in (grad, q, k, v))
    kv_num, kv_idx, q_num, q_idx = (t.contiguous() for t in (kv_num, kv_idx, q_num, q_idx))
    dq, dk, dv = (torch.empty(t.shape, device=t.device, dtype=t.dtype) for t in (q, k, v))
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    batch, heads, num_queries, dim = q.shape
    num_keys = k.shape[2]
    delta = row_dot(out, grad)
    config = pick_config("block_sparse_backward", default_config("backward", dim, q.dtype), head_dim=dim, dtype=q.dtype)
    constants = _constants(q, v, block_q=block_q, block_k=block_k, causal=causal, config=config)
    strides, unit = strides_in_units(q, k, v, grad)
    constants["UNIT"] = unit
    sizes = (heads, num_queries, num_keys, scale)
    block_sparse_dkdv_kernel[(batch * heads * triton.cdiv(num_keys, constants["BN"]),)](
        q, k, v, grad, lse, delta, q_num, q_idx, dk, dv, *strides, *_list_strides(q_num, q_idx), *sizes, **constants
    )
    block_sparse_dq_kernel[(batch * heads * triton.cdiv(num_queries, constants["BM"]),)](
        q, k, v, grad, lse, delta, kv_num, kv_idx, dq, *strides, *_list_strides(kv_num, kv_idx), *sizes, **constants
    )
    return dq, dk, dv
