"""Triton kernels of window attention and of tiny attention: the same kernels, addressed differently.

A problem is one window of a map (WINDOW: rolled and partitioned by address arithmetic, nothing is copied) or one
batch element. Problems of up to 64 x 64 scores are one tile; larger windows (12 x 12) are walked in tiles of 64. The
backward of one-tile problems is a single pass. The gradient of a bias that all problems share is summed in registers
over the problems of a program and written as float32 partials, which a second sum finishes: no atomics, the same bits
every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparing.kernels.triton.device import on_their_device
from sparing.kernels.triton.tiles import (
    LOG2E,
    accumulator,
    natural_lse,
    product,
    softmax_step,
    strides_in_units,
    unit_last_stride,
)
from sparing.kernels.triton.windows import (
    Problems,
    bias_argument,
    finished_scores,
    load_at,
    place,
    region_argument,
    store_at,
)

__all__ = ["Problems", "backward", "forward"]

_TENSORS = ("q", "k", "v", "g", "o", "dq", "dk", "dv", "first", "second", "bias")
_SIZES = [f"{name}_{part}" for name in _TENSORS for part in ("batch", "mid", "row")]
_SIZES += ["problems", "groups", "heads", "num_queries", "num_keys", "map_h", "map_w"]
_PROGRAMS = 1024  # programs that share the summing of a bias gradient: about 8 for each of 132 processors


@triton.jit(do_not_specialize=_SIZES)
def window_forward_kernel(
    q_ptr, k_ptr, v_ptr,  # maps (B, h, w, heads * D), or (B, H, M, D), (B, H, N, D), (B, H, N, DV)
    bias_ptr,  # ((2 WH - 1)(2 WW - 1), heads), or a bias with unit last stride
    region_ptr,  # (h, w) int32
    out_ptr,  # like q, contiguous
    lse_ptr,  # (problems, heads, M)
    q_batch, q_mid, q_row, k_batch, k_mid, k_row, v_batch, v_mid, v_row, o_batch, o_mid, o_row,
    bias_batch, bias_mid, bias_row,
    heads, num_queries, num_keys, map_h, map_w, scale,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WINDOW: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    BIAS: tl.constexpr, REGION: tl.constexpr,
    ACC: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, KEY_TILES: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(num_queries, BM)
    program = tl.program_id(0).to(tl.int64)
    head = program % heads  # neighbouring programs read neighbouring channels
    tile = (program // heads) % tiles
    problem = program // heads // tiles
    rows = (tile * BM + tl.arange(0, BM)).to(tl.int32)
    q_at = place(problem, head, rows, q_batch, q_mid, q_row, map_h, map_w, D, WINDOW, WH, WW, SH, SW, UNIT)
    q = load_at(q_ptr, q_at, rows < num_queries, D, BD)
    acc = tl.zeros([BM, BV], dtype=ACC)
    peak = tl.full([BM], float("-inf"), dtype=ACC)
    total = tl.zeros([BM], dtype=ACC)
    for step in range(KEY_TILES):
        columns = step * BN + tl.arange(0, BN)
        k_at = place(problem, head, columns, k_batch, k_mid, k_row, map_h, map_w, D, WINDOW, WH, WW, SH, SW, UNIT)
        v_at = place(problem, head, columns, v_batch, v_mid, v_row, map_h, map_w, DV, WINDOW, WH, WW, SH, SW, UNIT)
        k = load_at(k_ptr, k_at, columns < num_keys, D, BD)
        v = load_at(v_ptr, v_at, columns < num_keys, DV, BV)
        scores = finished_scores(
            product(q, tl.trans(k), UPCAST, PRECISION), bias_ptr, region_ptr, problem, head, rows, columns,
            bias_batch, bias_mid, bias_row, heads, num_queries, num_keys, map_h, map_w, scale,
            BIAS, REGION, WH, WW, SH, SW, ACC,
        )  # fmt: skip
        weights, rescale, peak, total = softmax_step(scores, peak, total)
        if not UPCAST:
            weights = weights.to(v.dtype)
        acc = acc * rescale[:, None] + product(weights, v, UPCAST, PRECISION)
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    o_at = place(problem, head, rows, o_batch, o_mid, o_row, map_h, map_w, DV, WINDOW, WH, WW, SH, SW, UNIT)
    store_at(out_ptr, acc, o_at, rows < num_queries, DV, BV)
    lse_at = (problem * heads + head) * num_queries + rows
    tl.store(lse_ptr + lse_at, natural_lse(peak, total), mask=rows < num_queries)


@triton.jit
def tile_slopes(
    q, k, v, grad, delta, bias_ptr, region_ptr, lse_ptr, problem, head, rows, columns,
    bias_batch, bias_mid, bias_row, heads, num_queries, num_keys, map_h, map_w, scale,
    BIAS: tl.constexpr, REGION: tl.constexpr,
    WH: tl.constexpr, WW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    ACC: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, WHOLE_ROWS: tl.constexpr,
):  # fmt: skip
    """(weights, gradient of the biased scores) of one tile. WHOLE_ROWS: the tile holds all keys, delta is computed
    here.
    """
    scores = finished_scores(
        product(q, tl.trans(k), UPCAST, PRECISION), bias_ptr, region_ptr, problem, head, rows, columns,
        bias_batch, bias_mid, bias_row, heads, num_queries, num_keys, map_h, map_w, scale,
        BIAS, REGION, WH, WW, SH, SW, ACC,
    )  # fmt: skip
    lse_at = (problem * heads + head) * num_queries + rows
    lse = tl.load(lse_ptr + lse_at, mask=rows < num_queries, other=float("-inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
    weights = tl.exp2(scores - lse[:, None])
    slope = product(grad, tl.trans(v), UPCAST, PRECISION)
    if WHOLE_ROWS:
        delta = tl.sum(weights * slope, 1)
    return weights, weights * (slope - delta[:, None])


@triton.jit(do_not_specialize=_SIZES)
def window_backward_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, bias_ptr, region_ptr, lse_ptr,
    dq_ptr, dk_ptr, dv_ptr,  # contiguous, like q, k, v
    dbias_ptr,  # BIAS_GRAD 1: (groups, heads, M, N) partials; 2: (problems, heads, M, N)
    q_batch, q_mid, q_row, k_batch, k_mid, k_row, v_batch, v_mid, v_row, g_batch, g_mid, g_row,
    dq_batch, dq_mid, dq_row, dk_batch, dk_mid, dk_row, dv_batch, dv_mid, dv_row,
    bias_batch, bias_mid, bias_row,
    problems, groups, heads, num_queries, num_keys, map_h, map_w, scale,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WINDOW: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    BIAS: tl.constexpr, REGION: tl.constexpr, BIAS_GRAD: tl.constexpr,
    ACC: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """All gradients of problems of one tile; a program takes problems group, group + groups, ... of one head."""
    program = tl.program_id(0).to(tl.int64)
    head = program % heads
    group = program // heads
    rows, columns = tl.arange(0, BM), tl.arange(0, BN)
    live_q, live_k = rows < num_queries, columns < num_keys
    summed = tl.zeros([BM, BN], dtype=ACC)
    pair_at = rows[:, None] * num_keys + columns[None, :]
    pair_live = live_q[:, None] & live_k[None, :]
    for problem in range(group, problems, groups):
        q_at = place(problem, head, rows, q_batch, q_mid, q_row, map_h, map_w, D, WINDOW, WH, WW, SH, SW, UNIT)
        k_at = place(problem, head, columns, k_batch, k_mid, k_row, map_h, map_w, D, WINDOW, WH, WW, SH, SW, UNIT)
        v_at = place(problem, head, columns, v_batch, v_mid, v_row, map_h, map_w, DV, WINDOW, WH, WW, SH, SW, UNIT)
        g_at = place(problem, head, rows, g_batch, g_mid, g_row, map_h, map_w, DV, WINDOW, WH, WW, SH, SW, UNIT)
        q = load_at(q_ptr, q_at, live_q, D, BD)
        k = load_at(k_ptr, k_at, live_k, D, BD)
        v = load_at(v_ptr, v_at, live_k, DV, BV)
        grad = load_at(grad_ptr, g_at, live_q, DV, BV)
        weights, slope = tile_slopes(
            q, k, v, grad, 0.0, bias_ptr, region_ptr, lse_ptr, problem, head, rows, columns,
            bias_batch, bias_mid, bias_row, heads, num_queries, num_keys, map_h, map_w, scale,
            BIAS, REGION, WH, WW, SH, SW, ACC, UPCAST, PRECISION, True,
        )  # fmt: skip
        if BIAS_GRAD == 1:
            summed += slope
        if BIAS_GRAD == 2:
            one_at = (problem * heads + head) * num_queries * num_keys
            tl.store(dbias_ptr + one_at + pair_at, slope, mask=pair_live)
        if not UPCAST:
            weights = weights.to(q.dtype)
            slope = slope.to(q.dtype)
        dq = product(slope, k, UPCAST, PRECISION) * scale
        dk = product(tl.trans(slope), q, UPCAST, PRECISION) * scale
        dv = product(tl.trans(weights), grad, UPCAST, PRECISION)
        dq_at = place(problem, head, rows, dq_batch, dq_mid, dq_row, map_h, map_w, D, WINDOW, WH, WW, SH, SW, UNIT)
        dk_at = place(problem, head, columns, dk_batch, dk_mid, dk_row, map_h, map_w, D, WINDOW, WH, WW, SH, SW, UNIT)
        dv_at = place(problem, head, columns, dv_batch, dv_mid, dv_row, map_h, map_w, DV, WINDOW, WH, WW, SH, SW, UNIT)
        store_at(dq_ptr, dq, dq_at, live_q, D, BD)
        store_at(dk_ptr, dk, dk_at, live_k, D, BD)
        store_at(dv_ptr, dv, dv_at, live_k, DV, BV)
    if BIAS_GRAD == 1:
        tl.store(dbias_ptr + program * num_queries * num_keys + pair_at, summed, mask=pair_live)


@triton.jit(do_not_specialize=_SIZES)
def window_tiled_backward_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, out_ptr, bias_ptr, region_ptr, lse_ptr,
    first_ptr,  # PART 0: dq; 1: dk; 2: partials of the bias gradient (groups, heads, M, N)
    second_ptr,  # PART 1: dv
    q_batch, q_mid, q_row, k_batch, k_mid, k_row, v_batch, v_mid, v_row, g_batch, g_mid, g_row,
    o_batch, o_mid, o_row, first_batch, first_mid, first_row, second_batch, second_mid, second_row,
    bias_batch, bias_mid, bias_row,
    problems, groups, heads, num_queries, num_keys, map_h, map_w, scale,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WINDOW: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    BIAS: tl.constexpr, REGION: tl.constexpr, PART: tl.constexpr,
    ACC: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One gradient of larger windows. A program owns a tile of rows (PART 0), of columns (1) or of pairs (2), and
    walks the other tiles, or for pairs the problems of its group.
    """
    row_tiles, column_tiles = tl.cdiv(num_queries, BM), tl.cdiv(num_keys, BN)
    program = tl.program_id(0).to(tl.int64)
    head = program % heads
    rest = program // heads
    if PART == 2:
        pair = rest % (row_tiles * column_tiles)
        group = rest // (row_tiles * column_tiles)
        own_row, own_column, steps = (
            pair // column_tiles,
            pair % column_tiles,
            (problems - group + groups - 1) // groups,
        )
    elif PART == 1:
        own_row, own_column, steps, group = 0, rest % column_tiles, row_tiles, rest // column_tiles
    else:
        own_row, own_column, steps, group = rest % row_tiles, 0, column_tiles, rest // row_tiles
    first = tl.zeros([BN if PART == 1 else BM, BN if PART == 2 else BD], dtype=ACC)
    second = tl.zeros([BN, BV], dtype=ACC)
    for step in range(steps):
        problem, row_tile, column_tile = group, own_row, own_column
        if PART == 0:
            column_tile = step
        if PART == 1:
            row_tile = step
        if PART == 2:
            problem = group + step * groups
        rows = (row_tile * BM + tl.arange(0, BM)).to(tl.int32)
        columns = (column_tile * BN + tl.arange(0, BN)).to(tl.int32)
        live_q, live_k = rows < num_queries, columns < num_keys
        q_at = place(problem, head, rows, q_batch, q_mid, q_row, map_h, map_w, D, WINDOW, WH, WW, SH, SW, UNIT)
        k_at = place(problem, head, columns, k_batch, k_mid, k_row, map_h, map_w, D, WINDOW, WH, WW, SH, SW, UNIT)
        v_at = place(problem, head, columns, v_batch, v_mid, v_row, map_h, map_w, DV, WINDOW, WH, WW, SH, SW, UNIT)
        g_at = place(problem, head, rows, g_batch, g_mid, g_row, map_h, map_w, DV, WINDOW, WH, WW, SH, SW, UNIT)
        o_at = place(problem, head, rows, o_batch, o_mid, o_row, map_h, map_w, DV, WINDOW, WH, WW, SH, SW, UNIT)
        q = load_at(q_ptr, q_at, live_q, D, BD)
        k = load_at(k_ptr, k_at, live_k, D, BD)
        v = load_at(v_ptr, v_at, live_k, DV, BV)
        grad = load_at(grad_ptr, g_at, live_q, DV, BV)
        delta = tl.sum(load_at(out_ptr, o_at, live_q, DV, BV).to(ACC) * grad.to(ACC), 1)
        weights, slope = tile_slopes(
            q, k, v, grad, delta, bias_ptr, region_ptr, lse_ptr, problem, head, rows, columns,
            bias_batch, bias_mid, bias_row, heads, num_queries, num_keys, map_h, map_w, scale,
            BIAS, REGION, WH, WW, SH, SW, ACC, UPCAST, PRECISION, False,
        )  # fmt: skip
        if PART == 2:
            first += slope
        else:
            if not UPCAST:
                weights = weights.to(q.dtype)
                slope = slope.to(q.dtype)
            if PART == 0:
                first += product(slope, k, UPCAST, PRECISION) * scale
            else:
                first += product(tl.trans(slope), q, UPCAST, PRECISION) * scale
                second += product(tl.trans(weights), grad, UPCAST, PRECISION)
    rows = (own_row * BM + tl.arange(0, BM)).to(tl.int32)
    columns = (own_column * BN + tl.arange(0, BN)).to(tl.int32)
    if PART == 0:
        at = place(group, head, rows, first_batch, first_mid, first_row, map_h, map_w, D, WINDOW, WH, WW, SH, SW, UNIT)
        store_at(first_ptr, first, at, rows < num_queries, D, BD)
    if PART == 1:
        at = place(
            group, head, columns, first_batch, first_mid, first_row, map_h, map_w, D, WINDOW, WH, WW, SH, SW, UNIT
        )
        store_at(first_ptr, first, at, columns < num_keys, D, BD)
        at = place(
            group, head, columns, second_batch, second_mid, second_row, map_h, map_w, DV, WINDOW, WH, WW, SH, SW, UNIT
        )
        store_at(second_ptr, second, at, columns < num_keys, DV, BV)
    if PART == 2:
        live = (rows < num_queries)[:, None] & (columns < num_keys)[None, :]
        start = first_ptr + (group * heads + head) * num_queries * num_keys
        tl.store(start + rows[:, None] * num_keys + columns[None, :], first, mask=live)


@on_their_device
def forward(
    problems: Problems,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    region: Tensor | None,
    *,
    table: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out (contiguous, like q with the last dim of v) and lse (problems, heads, M)."""
    q, k, v = (unit_last_stride(t) for t in (q, k, v))
    out = torch.empty(*q.shape[:-1], v.shape[-1], device=q.device, dtype=q.dtype)
    lse_shape = (problems.count, problems.heads, problems.num_queries)
    lse = torch.empty(lse_shape, device=q.device, dtype=accumulator(q.dtype))
    if out.numel() == 0 or k.numel() == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    bias_, kind, bias_strides = bias_argument(bias, table, q)
    region_, region_kind = region_argument(region, problems.shift, q)
    strides, unit = strides_in_units(q, k, v, out)
    constants = problems.constants(q.dtype, bias=kind, region=region_kind, unit=unit)
    row_tiles = triton.cdiv(problems.num_queries, constants["BM"])
    window_forward_kernel[(problems.count * problems.heads * row_tiles,)](
        q, k, v, bias_, region_, out, lse, *strides, *bias_strides, *problems.sizes(scale), **constants,
        KEY_TILES=triton.cdiv(problems.num_keys, constants["BN"]),
    )  # fmt: skip
    return out, lse


@on_their_device
def backward(
    problems: Problems,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    region: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *,
    table: bool,
    scale: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v (contiguous) and, where asked for, of the scores: (problems, heads, M, N) for a bias that
    differs between problems, else summed over the problems, (1, heads, M, N).
    """
    grad, q, k, v = (unit_last_stride(t) for t in (grad, q, k, v))
    dq, dk, dv = (torch.empty(t.shape, device=t.device, dtype=t.dtype) for t in (q, k, v))
    m, n, heads = problems.num_queries, problems.num_keys, problems.heads
    if q.numel() == 0 or k.numel() == 0:
        empty = torch.zeros(1, heads, m, n, device=q.device, dtype=accumulator(q.dtype)) if bias_grad else None
        return dq.zero_(), dk.zero_(), dv.zero_(), empty
    bias_, kind, bias_strides = bias_argument(bias, table, q)
    region_, region_kind = region_argument(region, problems.shift, q)
    one_tile = max(m, n) <= problems.tile(q.dtype)
    shared = bias_grad and bias_strides[0] == 0
    groups = min(problems.count, triton.cdiv(_PROGRAMS, heads)) if shared else problems.count
    slopes = q  # any tensor, where no bias gradient is wanted
    if bias_grad:
        slopes = torch.empty(groups, heads, m, n, device=q.device, dtype=accumulator(q.dtype))
    inputs = (q, k, v, grad)
    if one_tile:
        strides, unit = strides_in_units(*inputs, dq, dk, dv)
        constants = problems.constants(q.dtype, bias=kind, region=region_kind, unit=unit)
        window_backward_kernel[(groups * heads,)](
            *inputs, bias_, region_, lse, dq, dk, dv, slopes, *strides, *bias_strides, problems.count, groups,
            *problems.sizes(scale), **constants, BIAS_GRAD=0 if not bias_grad else 1 if shared else 2,
        )  # fmt: skip
    else:
        _tiled_backward(
            problems, inputs, out, (bias_, kind, bias_strides), (region_, region_kind), lse, (dq, dk, dv),
            slopes if bias_grad else None, groups, scale=scale,
        )  # fmt: skip
    if not bias_grad:
        return dq, dk, dv, None
    return dq, dk, dv, slopes.sum(0, keepdim=True) if shared else slopes


def _tiled_backward(
    problems: Problems,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    out: Tensor,
    bias: tuple[Tensor, int, tuple[int, int, int]],
    region: tuple[Tensor, int],
    lse: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    slopes: Tensor | None,
    groups: int,
    *,
    scale: float,
) -> None:
    """Problems of several tiles: one launch for dq, one for dk and dv, one for the bias."""
    dq, dk, dv = grads
    strides, unit = strides_in_units(*inputs, out, dq, dk, dv)
    common, of_dq, of_dk, of_dv = strides[:15], strides[15:18], strides[18:21], strides[21:24]
    constants = problems.constants(inputs[0].dtype, bias=bias[1], region=region[1], unit=unit)
    row_tiles = triton.cdiv(problems.num_queries, constants["BM"])
    column_tiles = triton.cdiv(problems.num_keys, constants["BN"])
    parts = [
        (0, problems.count * row_tiles, problems.count, dq, dq, of_dq, of_dq),
        (1, problems.count * column_tiles, problems.count, dk, dv, of_dk, of_dv),
    ]
    if slopes is not None:
        parts.append((2, groups * row_tiles * column_tiles, groups, slopes, slopes, [0, 0, 0], [0, 0, 0]))
    for part, programs, groups_, first, second, first_strides, second_strides in parts:
        window_tiled_backward_kernel[(programs * problems.heads,)](
            *inputs, out, bias[0], region[0], lse, first, second, *common, *first_strides, *second_strides, *bias[2],
            problems.count, groups_, *problems.sizes(scale), **constants, PART=part,
        )  # fmt: skip
