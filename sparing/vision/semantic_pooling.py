"""Initial cluster centers of STViT: pooling an H x W map of tokens to an s_h x s_w map of centers.

"Making Vision Transformers Efficient from a Token Sparsification View", CVPR 2023, eq. 3 to 5. The map is cut into
cells, one a center; ``WeightedPooling`` (intra-window) predicts a softmax weight for each position of a cell from its
3x3 neighbourhood *inside* the cell and takes the weighted mean; ``OffsetPooling`` (inter-window) then moves the centers
by what their neighbours look like.

Cells along one axis of ``size`` tokens and ``count`` centers: ``cell = ceil(size / count)``, padding ``count * cell -
size`` split evenly before and after (14 tokens to 4 centers: cells of 4, one padded on each side: the author's case).
Where a cell would then hold padding only (7 of 16, 9..13 of 14), bins ``floor(i * size / count) .. ceil((i + 1) * size
/ count)`` are used instead, padded at their end.

Shapes: tokens ``(batch, rows * columns, dim)`` in raster order, centers ``(batch, s_h * s_w, dim)`` in raster order.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

__all__ = ["POOLINGS", "AxisCells", "OffsetPooling", "WeightedPooling", "axis_cells", "cut_cells", "make_pooling"]

Grid = tuple[int, int]
POOLINGS = ("weighted", "avg", "max")


@dataclass(frozen=True, slots=True)
class AxisCells:
    """How one axis of a token map is cut. ``pad_before`` is None when the cells are adaptive bins (may overlap)."""

    size: int
    count: int
    cell: int
    pad_before: int | None

    @property
    def pad_after(self) -> int:
        """Padding behind the last token (uniform cells only)."""
        return self.count * self.cell - self.size - (self.pad_before or 0)

    def positions(self, device: torch.device) -> Tensor:
        """(count, cell) token index along the axis of every position, outside ``[0, size)`` where padded."""
        center = torch.arange(self.count, device=device)[:, None]
        offset = torch.arange(self.cell, device=device)[None]
        if self.pad_before is not None:
            return center * self.cell + offset - self.pad_before
        start, stop = center * self.size // self.count, ((center + 1) * self.size + self.count - 1) // self.count
        return torch.where(start + offset < stop, start + offset, self.size)

    def valid(self, device: torch.device) -> Tensor:
        """(count, cell) bool, True where the position holds a token."""
        positions = self.positions(device)
        return (positions >= 0) & (positions < self.size)


def axis_cells(size: int, count: int, *, cell: int | None = None, pad: int | None = None) -> AxisCells:
    """The cells of one axis; ``cell`` and ``pad`` (before the first token) instead of those of the module's rule.

    Raises:
        ValueError: ``count`` is below 1 or above ``size``, or cells that leave tokens out or hold padding only.
    """
    if not 1 <= count <= size:
        raise ValueError(f"{count} centers do not fit an axis of {size} tokens; from 1 to {size} do")
    if cell is not None and pad is not None:
        if not (0 <= pad < cell and 0 <= count * cell - size - pad < cell):
            raise ValueError(
                f"{count} cells of {cell} with {pad} padded before do not cut {size} tokens: every token must lie in a "
                "cell and every cell must hold one"
            )
        return AxisCells(size, count, cell, pad)
    cell = math.ceil(size / count)
    before = (count * cell - size) // 2
    after = count * cell - size - before
    if after < cell:
        return AxisCells(size, count, cell, before)
    widest = max(-(-(i + 1) * size // count) - i * size // count for i in range(count))
    return AxisCells(size, count, widest, None)


def cut_cells(tokens: Tensor, rows: AxisCells, columns: AxisCells) -> Tensor:
    """Cells (batch, s_h, cell_h, s_w, cell_w, dim) of ``tokens`` (batch, rows * columns, dim); padded positions are
    zero.

    Uniform cells are a view of the padded map. Adaptive bins overlap and are gathered.
    """
    grid = rearrange(tokens, "b (h w) c -> b h w c", h=rows.size)
    if rows.pad_before is not None and columns.pad_before is not None:
        if rows.count * rows.cell != rows.size or columns.count * columns.cell != columns.size:
            grid = F.pad(grid, (0, 0, columns.pad_before, columns.pad_after, rows.pad_before, rows.pad_after))
        return rearrange(grid, "b (sh ch) (sw cw) c -> b sh ch sw cw c", sh=rows.count, sw=columns.count)
    grid = F.pad(grid, (0, 0, 0, 1, 0, 1))  # index ``size`` (and -1) reads a zero

    def source(axis: AxisCells) -> Tensor:
        positions = axis.positions(tokens.device)
        return torch.where(axis.valid(tokens.device), positions, axis.size).flatten()

    grid = grid.index_select(1, source(rows)).index_select(2, source(columns))
    return rearrange(grid, "b (sh ch) (sw cw) c -> b sh ch sw cw c", sh=rows.count, sw=columns.count)


class WeightedPooling(nn.Module):
    """Softmax-weighted mean of every cell (intra-window pooling).

    The weight of a position is the softmax, over its cell, of ``linear(GELU(LayerNorm(depthwise3x3(cell))))``; the
    convolution sees one cell, zero padded. New parameters: 12 dim + dim.

    Args:
        dim: token width.
        centers: s_h, s_w.
        mask_value: added to the logits of padded positions (the author's code: -100).
    """

    def __init__(self, dim: int, centers: Grid, *, mask_value: float = -100.0) -> None:
        super().__init__()
        self.centers = centers
        self.mask_value = mask_value
        self.cell: Grid | None = None  # sides of a cell and the padding before the first, to replace the module's rule
        self.pad: Grid | None = None
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.act = nn.GELU()
        self.logit = nn.Linear(dim, 1, bias=False)
        self.reset_parameters()

    def reset_parameters(self, *, from_scratch: bool = False) -> None:
        """Start values. With a pretrained host the logits start at zero: a center is the mean of its cell's tokens."""
        nn.init.trunc_normal_(self.conv.weight, std=0.02)
        nn.init.zeros_(self.conv.bias)
        if from_scratch:
            nn.init.trunc_normal_(self.logit.weight, std=0.02)
        else:
            nn.init.zeros_(self.logit.weight)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """tokens (batch, rows * columns, dim), grid (rows, columns) -> centers (batch, s_h * s_w, dim)."""
        return self.pool(tokens, grid)[0]

    def pool(self, tokens: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Centers (batch, s_h * s_w, dim) and the weights (batch, s_h * s_w, positions of the cell in raster order)."""
        unset = (None, None)
        rows, columns = (
            axis_cells(size, count, cell=cell, pad=pad)
            for size, count, cell, pad in zip(grid, self.centers, self.cell or unset, self.pad or unset)
        )
        cells = rearrange(cut_cells(tokens, rows, columns), "b sh ch sw cw c -> (b sh sw) ch cw c")
        logits = self.conv(rearrange(cells, "n ch cw c -> n c ch cw"))
        logits = self.logit(self.act(self.norm(rearrange(logits, "n c ch cw -> n (ch cw) c"))))
        logits = rearrange(logits, "(b m) p 1 -> b m p", m=rows.count * columns.count)
        if rows.count * rows.cell != rows.size or columns.count * columns.cell != columns.size:
            device = tokens.device
            valid = rows.valid(device)[:, None, :, None] & columns.valid(device)[None, :, None, :]
            mask = (~valid).to(logits.dtype) * self.mask_value
            logits = logits + rearrange(mask, "sh sw ch cw -> (sh sw) (ch cw)")
        weights = logits.softmax(-1, dtype=torch.float32).to(tokens.dtype)
        cells = rearrange(cells, "(b m) ch cw c -> b m (ch cw) c", m=rows.count * columns.count)
        return (weights[:, :, None] @ cells).squeeze(2).to(tokens.dtype), weights


class AdaptivePooling(nn.Module):
    """Adaptive average or maximum of every cell, without parameters (the Swin form of the paper takes the maximum)."""

    def __init__(self, centers: Grid, *, kind: Literal["avg", "max"]) -> None:
        super().__init__()
        self.centers = centers
        self.kind = kind

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """tokens (batch, rows * columns, dim), grid (rows, columns) -> centers (batch, s_h * s_w, dim)."""
        for size, count in zip(grid, self.centers):
            axis_cells(size, count)
        maps = rearrange(tokens, "b (h w) c -> b c h w", h=grid[0])
        pool = F.adaptive_avg_pool2d if self.kind == "avg" else F.adaptive_max_pool2d
        return rearrange(pool(maps, self.centers), "b c sh sw -> b (sh sw) c")


class OffsetPooling(nn.Module):
    """Inter-window offset: moves the pooled centers by a residual computed across cells (paper eq. 5).

    The published text leaves the form open; this one is ours: ``P + conv1x1(GELU(LayerNorm(depthwise3x3(P))))`` on the
    s_h x s_w map of centers, the last convolution zero at the start.
    """

    def __init__(self, dim: int, pooling: nn.Module, centers: Grid) -> None:
        super().__init__()
        self.pooling = pooling
        self.centers = centers
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.act = nn.GELU()
        self.offset = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self, *, from_scratch: bool = False) -> None:
        """The offset starts at zero; the pooling inside starts as it would alone."""
        nn.init.trunc_normal_(self.conv.weight, std=0.02)
        nn.init.zeros_(self.conv.bias)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)
        if isinstance(self.pooling, WeightedPooling):
            self.pooling.reset_parameters(from_scratch=from_scratch)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """tokens (batch, rows * columns, dim), grid (rows, columns) -> centers (batch, s_h * s_w, dim)."""
        centers = self.pooling(tokens, grid)
        maps = self.conv(rearrange(centers, "b (sh sw) c -> b c sh sw", sh=self.centers[0]))
        return centers + self.offset(self.act(self.norm(rearrange(maps, "b c sh sw -> b (sh sw) c"))))


def make_pooling(kind: str, dim: int, centers: Grid, *, inter_window: bool = False) -> nn.Module:
    """The pooling module named ``kind``.

    Raises:
        ValueError: ``kind`` is not one of ``POOLINGS``.
    """
    if kind not in POOLINGS:
        raise ValueError(f"pooling {kind!r} is unknown; {', '.join(POOLINGS)} are accepted")
    pooling: nn.Module
    if kind == "weighted":
        pooling = WeightedPooling(dim, centers)
    else:
        pooling = AdaptivePooling(centers, kind="avg" if kind == "avg" else "max")
    return OffsetPooling(dim, pooling, centers) if inter_window else pooling
