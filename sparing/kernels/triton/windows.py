"""Where the problems of window and tiny attention lie in memory, and what their scores are.

A problem is one window of a map, found by address arithmetic (roll and partition are never carried out), or one batch
element of (B, H, M, D) tensors.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparing.kernels.triton.config import next_power_of_2
from sparing.kernels.triton.tiles import LOG2E, acc_type, dot_options, unit_last_stride


@triton.jit
def corner(problem, map_h, map_w, WH: tl.constexpr, WW: tl.constexpr):
    """(sample, first row, first column) of a window on the rolled map."""
    across = map_w // WW
    windows = across * (map_h // WH)
    inside = problem % windows
    return problem // windows, (inside // across) * WH, (inside % across) * WW


@triton.jit
def place(
    problem, head, tokens, batch_stride, mid_stride, row_stride, map_h, map_w,
    D: tl.constexpr, WINDOW: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Offsets (int64) of the tokens of a problem: in a window of an unrolled map, or in a (B, H, M, D) tensor."""
    if WINDOW:
        sample, y, x = corner(problem, map_h, map_w, WH, WW)
        y += tokens // WW + SH
        x += tokens % WW + SW
        y = tl.where(y >= map_h, y - map_h, y).to(tl.int64)
        x = tl.where(x >= map_w, x - map_w, x).to(tl.int64)
        offsets = (sample * batch_stride + y * mid_stride + x * row_stride) * UNIT + head * D
    else:
        offsets = (problem * batch_stride + head * mid_stride + tokens.to(tl.int64) * row_stride) * UNIT
    return offsets


@triton.jit
def load_at(ptr, offsets, live, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """(tokens, BLOCK) tile of rows that start at ``offsets``; 0 where not live."""
    columns = tl.arange(0, BLOCK)
    mask = live[:, None]
    if BLOCK > WIDTH:
        mask = mask & (columns < WIDTH)[None, :]
    return tl.load(ptr + offsets[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_at(ptr, tile, offsets, live, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse of :func:`load_at`, in the dtype of ``ptr``."""
    columns = tl.arange(0, BLOCK)
    mask = live[:, None]
    if BLOCK > WIDTH:
        mask = mask & (columns < WIDTH)[None, :]
    tl.store(ptr + offsets[:, None] + columns[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def region_ids(
    region_ptr, problem, tokens, live, map_h, map_w,
    REGION: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
):  # fmt: skip
    """Region id of each token, comparable within a window: 1 = made by the shift, 2 = read from a map of ids.

    A shift divides only the last window of a row or column of windows: at its last SH rows or SW columns.
    """
    _, first_y, first_x = corner(problem, map_h, map_w, WH, WW)
    y, x = tokens // WW, tokens % WW
    if REGION == 2:
        ids = tl.load(region_ptr + (first_y + y) * map_w + first_x + x, mask=live, other=0)
    else:
        below = (first_y == map_h - WH).to(tl.int32) * (y >= WH - SH).to(tl.int32)
        right = (first_x == map_w - WW).to(tl.int32) * (x >= WW - SW).to(tl.int32)
        ids = 2 * below + right
    return ids


@triton.jit
def finished_scores(
    scores, bias_ptr, region_ptr, problem, head, rows, columns,
    bias_batch, bias_mid, bias_row, heads, num_queries, num_keys, map_h, map_w, scale,
    BIAS: tl.constexpr, REGION: tl.constexpr,
    WH: tl.constexpr, WW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """q k^T in base 2: scaled, with bias (1 = relative table, 2 = tensor), hidden pairs at -inf."""
    scores = scores * (scale * LOG2E)
    live = (rows < num_queries)[:, None] & (columns < num_keys)[None, :]
    if BIAS == 1:
        dy = (rows // WW)[:, None] - (columns // WW)[None, :] + WH - 1
        dx = (rows % WW)[:, None] - (columns % WW)[None, :] + WW - 1
        at = (dy * (2 * WW - 1) + dx) * heads + head
        scores += tl.load(bias_ptr + at, mask=live, other=0.0).to(ACC) * LOG2E
    if BIAS == 2:
        start = bias_ptr + problem * bias_batch + head * bias_mid
        at = rows.to(tl.int64)[:, None] * bias_row + columns[None, :]
        scores += tl.load(start + at, mask=live, other=0.0).to(ACC) * LOG2E
    if REGION > 0:
        mine = region_ids(region_ptr, problem, rows, rows < num_queries, map_h, map_w, REGION, WH, WW, SH, SW)
        theirs = region_ids(region_ptr, problem, columns, columns < num_keys, map_h, map_w, REGION, WH, WW, SH, SW)
        live = live & (mine[:, None] == theirs[None, :])
    return tl.where(live, scores, float("-inf"))


@dataclass(frozen=True)
class Problems:
    """How tensors hold the problems. ``window`` and ``shift`` of maps (B, h, w, heads * D); no window = (B, H, M,
    D).
    """

    count: int
    heads: int
    num_queries: int
    num_keys: int
    head_dim: int
    value_dim: int
    window: tuple[int, int] | None = None
    shift: tuple[int, int] = (0, 0)
    map_size: tuple[int, int] = (0, 0)

    @classmethod
    def of_maps(cls, q: Tensor, heads: int, window: tuple[int, int], shift: tuple[int, int]) -> "Problems":
        """Windows of a map (B, h, w, heads * D)."""
        batch, height, width, channels = q.shape
        tokens, dim = window[0] * window[1], channels // heads
        return cls(batch * height * width // tokens, heads, tokens, tokens, dim, dim, window, shift, (height, width))

    @classmethod
    def of_batch(cls, q: Tensor, k: Tensor, v: Tensor) -> "Problems":
        """Problems laid out as (B, H, M, D), (B, H, N, D), (B, H, N, DV)."""
        return cls(q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])

    def tile(self, dtype: torch.dtype) -> int:
        """Side of a score tile: all tokens of a small problem; 16 where wide or float32 rows would spill registers."""
        width = max(next_power_of_2(max(self.head_dim, self.value_dim)), 16)
        largest = 64 if dtype.itemsize == 2 and width <= 64 else 16
        return max(next_power_of_2(min(max(self.num_queries, self.num_keys), largest)), 16)

    def constants(self, dtype: torch.dtype, *, bias: int, region: int, unit: int) -> dict[str, Any]:
        """The compile-time arguments that all kernels take."""
        tile = self.tile(dtype)
        (wh, ww), (sh, sw) = self.window or (1, 1), self.shift
        light = dtype.itemsize == 2 and max(self.head_dim, self.value_dim) <= 64
        warps = {16: 1, 32: 4, 64: 8}[tile] if light else 4
        return {
            "D": self.head_dim, "BD": max(next_power_of_2(self.head_dim), 16),
            "DV": self.value_dim, "BV": max(next_power_of_2(self.value_dim), 16),
            "BM": tile, "BN": tile, "WINDOW": self.window is not None,
            "WH": wh, "WW": ww, "SH": sh, "SW": sw, "BIAS": bias, "REGION": region, "ACC": acc_type(dtype),
            "UNIT": unit, **dot_options(dtype), "num_warps": warps, "num_stages": 2 if light else 1,
        }  # fmt: skip

    def sizes(self, scale: float) -> tuple[Any, ...]:
        """The run-time sizes that all kernels end with."""
        return (self.heads, self.num_queries, self.num_keys, *self.map_size, scale)


def bias_argument(bias: Tensor | None, table: bool, dummy: Tensor) -> tuple[Tensor, int, tuple[int, int, int]]:
    """The pointer (some tensor where there is no bias), its kind, and its batch, head and row strides (0 =
    broadcast).
    """
    if bias is None:
        return dummy, 0, (0, 0, 0)
    if table:
        return bias.contiguous(), 1, (0, 0, 0)
    bias = unit_last_stride(bias)
    return bias, 2, tuple(0 if bias.shape[i] == 1 else bias.stride(i) for i in range(3))  # type: ignore[return-value]


def region_argument(region: Tensor | None, shift: tuple[int, int], dummy: Tensor) -> tuple[Tensor, int]:
    if region is not None:
        return region.to(torch.int32).contiguous(), 2
    return dummy, 1 if max(shift) > 0 else 0
