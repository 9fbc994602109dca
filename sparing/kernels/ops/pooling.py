"""Pooling of tokens: into segments of any shape, and between two rectangular grids.

``segment_pool`` is the weighted mean of the tokens that share a segment id; ``grid_pool`` is an adaptive pool on the
token layout ``(batch, height * width, dim)``, so that no permutation to images and back is needed; ``grid_unpool`` is
its nearest-neighbour companion. Means are computed in float32 (float64 for float64 inputs) and nothing here adds
floats in an undefined order: the pools are products with small selection matrices, so that two runs give the same
bits, forward and backward.

No Triton kernel: at the published sizes the pools read their input once already where the grid divides, and no
measurement shows that a kernel would win the 1.3x that the design asks for.
"""

from typing import Any, Literal

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from sparing.kernels.dispatch import define_op, register_impl, run

__all__ = ["grid_pool", "grid_unpool", "segment_pool"]

Grid = tuple[int, int]


def segment_pool(
    x: Tensor,
    segment: Tensor,
    weight: Tensor | None,
    num_segments: int,
    *,
    return_weight: bool = False,
    backend: str = "auto",
) -> Any:
    """Weighted mean of the tokens of each segment: ``out[b, g] = sum_l w[b, l] x[b, l] / sum_l w[b, l]`` over
    ``segment[b, l] == g``.

    Args:
        x: ``(batch, tokens, dim)``.
        segment: ``(batch, tokens)`` integer ids in ``0 .. num_segments - 1``; a token with any other id (-1 by
            custom) is in no segment.
        weight: ``(batch, tokens)`` non-negative weights; ``None`` means 1.
        num_segments: how many segments each sample has.
        return_weight: also give the sum of the weights of each segment.
        backend: ``'auto'`` or ``'reference'``, the only one.

    Returns:
        ``(batch, num_segments, dim)`` in the dtype of ``x``; 0 for a segment without weight. With ``return_weight`` a
        pair whose second entry is ``(batch, num_segments)`` in float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that do not fit, a segment tensor that is not of integers, or a negative ``num_segments``.

    Complexity: ``2 * batch * tokens * num_segments * dim`` FLOPs in one batched product.
    """
    if x.ndim != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (batch, tokens, dim)")
    if segment.shape != x.shape[:2]:
        raise ValueError(f"segment has shape {tuple(segment.shape)}; expected (batch, tokens) = {tuple(x.shape[:2])}")
    if segment.is_floating_point() or segment.dtype == torch.bool:
        raise ValueError(f"segment has dtype {segment.dtype}; expected integer ids")
    if weight is not None and weight.shape != x.shape[:2]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected (batch, tokens) = {tuple(x.shape[:2])}")
    if num_segments < 0:
        raise ValueError(f"num_segments is {num_segments}; expected 0 or more")
    return run("segment_pool", backend, x, segment, weight, num_segments, return_weight=return_weight)


def _segment_pool(
    x: Tensor, segment: Tensor, weight: Tensor | None, num_segments: int, *, return_weight: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    accumulate = _statistics_dtype(x)
    member = rearrange(segment, "b l -> b 1 l") == rearrange(torch.arange(num_segments, device=x.device), "g -> 1 g 1")
    share = member.to(accumulate)
    if weight is not None:
        share = share * rearrange(weight.to(accumulate), "b l -> b 1 l")
    total = reduce(share, "b g l -> b g", "sum")
    summed = share @ x.to(accumulate)
    filled = rearrange(total != 0, "b g -> b g 1")
    mean = torch.where(filled, summed / torch.where(filled, total[..., None], 1.0), 0.0).to(x.dtype)
    return (mean, total) if return_weight else mean


def grid_pool(
    x: Tensor, grid: Grid, out_grid: Grid, mode: Literal["avg", "max"] = "avg", *, backend: str = "auto"
) -> Tensor:
    """Adaptive pool of tokens that lie on a grid: output bin ``i`` of ``n`` over ``m`` inputs covers ``floor(i*m/n)
    .. ceil((i+1)*m/n)``.

    Args:
        x: ``(batch, height * width, dim)``, row-major.
        grid: ``(height, width)`` of ``x``.
        out_grid: ``(height, width)`` of the output; larger than ``grid`` is allowed.
        mode: mean or maximum over each bin.
        backend: ``'auto'`` or ``'reference'``, the only one.

    Returns:
        ``(batch, out_height * out_width, dim)`` in the dtype of ``x``.

    Raises:
        ValueError: a token count that is not ``height * width``, sizes below 1, or an unknown mode.
    """
    _check_grid(x, grid, out_grid)
    if mode not in ("avg", "max"):
        raise ValueError(f"mode is {mode!r}; expected 'avg' or 'max'")
    return run("grid_pool", backend, x, grid, out_grid, mode)


def _grid_pool(x: Tensor, grid: Grid, out_grid: Grid, mode: str = "avg") -> Tensor:
    (height, width), (rows, columns) = grid, out_grid
    if height % rows == 0 and width % columns == 0:
        cells = rearrange(
            x, "b (oh kh ow kw) c -> b oh kh ow kw c", oh=rows, ow=columns, kh=height // rows, kw=width // columns
        )
        if mode == "max":
            return reduce(cells, "b oh kh ow kw c -> b (oh ow) c", "max")
        return reduce(cells.to(_statistics_dtype(x)), "b oh kh ow kw c -> b (oh ow) c", "mean").to(x.dtype)
    if mode == "avg":
        return _pool_mean(x, grid, out_grid)
    return _pool_max(x, grid, out_grid)


def grid_unpool(x: Tensor, grid: Grid, out_grid: Grid, *, backend: str = "auto") -> Tensor:
    """Nearest-neighbour enlargement of tokens on a grid: output row ``i`` of ``n`` reads input row ``floor(i * m /
    n)`` of ``m``.

    Args:
        x: ``(batch, height * width, dim)``, row-major.
        grid: ``(height, width)`` of ``x`` (the pooled grid).
        out_grid: ``(height, width)`` of the output.
        backend: ``'auto'`` or ``'reference'``, the only one.

    Returns:
        ``(batch, out_height * out_width, dim)``.

    Raises:
        ValueError: a token count that is not ``height * width``, or sizes below 1.
    """
    _check_grid(x, grid, out_grid)
    return run("grid_unpool", backend, x, grid, out_grid)


def _grid_unpool(x: Tensor, grid: Grid, out_grid: Grid) -> Tensor:
    (height, width), (rows, columns) = grid, out_grid
    if rows % height == 0 and columns % width == 0:
        return repeat(
            x, "b (h w) c -> b (h rh w rw) c", h=height, w=width, rh=rows // height, rw=columns // width
        ).contiguous()
    row = torch.arange(rows, device=x.device) * height // rows
    column = torch.arange(columns, device=x.device) * width // columns
    source = rearrange(rearrange(row, "i -> i 1") * width + column, "i j -> (i j)")
    return x[:, source]


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_grid(x: Tensor, grid: Grid, out_grid: Grid) -> None:
    if x.ndim != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (batch, height * width, dim)")
    if min(*grid, *out_grid) < 1:
        raise ValueError(f"grid {grid} -> {out_grid}: every size must be at least 1")
    if x.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"x holds {x.shape[1]} tokens; a grid of {grid} has {grid[0] * grid[1]}")


def _bins(size: int, bins: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First and one-past-last input of each adaptive bin, ``(bins,)`` each."""
    index = torch.arange(bins, device=device)
    return index * size // bins, ((index + 1) * size + bins - 1) // bins


def _membership(size: int, bins: int, device: torch.device) -> Tensor:
    """``(bins, size)`` bool: which inputs a bin covers."""
    first, last = _bins(size, bins, device)
    position = torch.arange(size, device=device)
    return (position >= first[:, None]) & (position < last[:, None])


def _pool_mean(x: Tensor, grid: Grid, out_grid: Grid) -> Tensor:
    # A bin is a rectangle, so the mean over it is the mean over its rows of the means over its columns.
    dtype = _statistics_dtype(x)
    rows, columns = (_membership(size, n, x.device).to(dtype) for size, n in zip(grid, out_grid))
    rows, columns = rows / rows.sum(1, keepdim=True), columns / columns.sum(1, keepdim=True)
    cells = rearrange(x.to(dtype), "b (h w) c -> b h w c", h=grid[0])
    narrowed = torch.einsum("ow, bhwc -> bhoc", columns, cells)
    pooled = torch.einsum("ph, bhoc -> bpoc", rows, narrowed)
    return rearrange(pooled, "b p o c -> b (p o) c").to(x.dtype)


def _pool_max(x: Tensor, grid: Grid, out_grid: Grid) -> Tensor:
    # Ragged bins are padded to the widest one; the padding repeats nothing, it is -inf.
    cells = rearrange(x, "b (h w) c -> b h w c", h=grid[0])
    for axis, (size, n) in enumerate(zip(grid, out_grid), start=1):
        first, last = _bins(size, n, x.device)
        widest = -(-size // n) + (1 if size % n else 0)
        position = first[:, None] + torch.arange(widest, device=x.device)
        inside = position < last[:, None]
        gathered = cells.index_select(axis, position.clamp(max=size - 1).flatten()).unflatten(axis, (n, widest))
        inside = inside.reshape((1,) * axis + (n, widest) + (1,) * (cells.ndim - axis - 1))
        cells = torch.where(inside, gathered, float("-inf")).amax(axis + 1)
    return rearrange(cells, "b p o c -> b (p o) c")


for _public, _reference in ((segment_pool, _segment_pool), (grid_pool, _grid_pool), (grid_unpool, _grid_unpool)):
    define_op(_public, order=lambda *args, **kwargs: ("reference",))
    register_impl(_public.__name__, "reference", _reference)
