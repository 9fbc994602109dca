"""Geometry of dumbbell units: cluster centres of every window, key windows around it, and which keys are padding.

A map ``(H, W)`` is cut into ``rows x columns`` windows of ``window`` positions a side (padded right and bottom); each
window owns ``samples x samples`` semantic tokens, and all of them form ONE raster map ``(rows * samples, columns *
samples)``. A window attends to a key window larger than itself and centred on it. Keys and values are projected once
per token and only then
gathered: norm1 and the projections act token by token, so they commute with the gather (specification B4), and the
    images of a
zero-padded token are the constants ``kv(norm1(0)) = kv(norm1.bias)``.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

__all__ = ["MaskMode", "WindowGrid", "gather_key_windows", "image_padding", "pool_centers", "semantic_padding"]

MaskMode = Literal["exact", "reference", "none"]


@dataclass(frozen=True)
class WindowGrid:
    """Windows of ``window`` positions over an ``height x width`` map, each owning ``samples x samples`` semantic
    tokens.
    """

    height: int
    width: int
    window: int
    samples: int

    @property
    def rows(self) -> int:
        return -(-self.height // self.window)

    @property
    def columns(self) -> int:
        return -(-self.width // self.window)

    @property
    def pad_bottom(self) -> int:
        return self.rows * self.window - self.height

    @property
    def pad_right(self) -> int:
        return self.columns * self.window - self.width

    @property
    def semantic_size(self) -> tuple[int, int]:
        return self.rows * self.samples, self.columns * self.samples

    def to_windows(self, semantic: Tensor) -> Tensor:
        """Semantic map ``(B, rows*s, columns*s, C)`` -> ``(B*windows, s*s, C)``, image first, windows in raster
        order.
        """
        return rearrange(semantic, "b (h i) (w j) c -> (b h w) (i j) c", i=self.samples, j=self.samples)

    def to_map(self, windows: Tensor) -> Tensor:
        """Inverse of :meth:`to_windows`."""
        return rearrange(
            windows, "(b h w) (i j) c -> b (h i) (w j) c", h=self.rows, w=self.columns, i=self.samples, j=self.samples
        )


def check_mask_mode(mask_mode: str) -> None:
    """Raise ValueError unless ``mask_mode`` is a known one."""
    if mask_mode not in get_args(MaskMode):
        raise ValueError(f"mask_mode={mask_mode!r}, accepted are {', '.join(map(repr, get_args(MaskMode)))}")


def pool_centers(x: Tensor, grid: WindowGrid) -> Tensor:
    """Adaptive max pooling of every window: the initial cluster centres P.

    The maximum is taken along rows, then along columns, over the bins ``floor(i*w/s) .. ceil((i+1)*w/s)``, which
    keeps channels last; zeros of the padding take part, as in the reference.

    Args:
        x: (B, rows*window, columns*window, C), padded.

    Returns:
        (B, rows*samples, columns*samples, C)
    """
    window, samples = grid.window, grid.samples
    bins = [(i * window // samples, -(-(i + 1) * window // samples)) for i in range(samples)]
    cells = rearrange(x, "b (h i) (w j) c -> b h i w j c", i=window, j=window)
    cells = torch.stack([cells[:, :, start:end].amax(2) for start, end in bins], 2)
    cells = torch.stack([cells[:, :, :, :, start:end].amax(4) for start, end in bins], 4)
    return rearrange(cells, "b h i w j c -> b (h i) (w j) c")


def pad_with(x: Tensor, pads: tuple[int, int, int, int], value: Tensor) -> Tensor:
    """Pad a map ``(B, H, W, C)`` by ``(left, right, top, bottom)`` with the vector ``value`` (C,)."""
    if not any(pads):
        return x
    left, right, top, bottom = pads
    outside = F.pad(x.new_zeros(x.shape[1], x.shape[2], 1), (0, 0, left, right, top, bottom), value=1.0)
    return F.pad(x, (0, 0, left, right, top, bottom)) + outside * value


def key_pads(grid: WindowGrid, kernel: int, *, semantic: bool) -> tuple[int, int, int, int]:
    """``(left, right, top, bottom)`` padding of the unpadded image map, or of the semantic map, for key windows of
    ``kernel``.
    """
    cell = grid.samples if semantic else grid.window
    low, high = (kernel - cell) // 2, -(-(kernel - cell) // 2)
    right, bottom = (0, 0) if semantic else (grid.pad_right, grid.pad_bottom)
    return low, high + right, low, high + bottom


def _unfold(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Sliding windows of a map ``(B, H, W, C)`` -> ``(B*windows, kernel*kernel, C)``."""
    return rearrange(x.unfold(1, kernel, stride).unfold(2, kernel, stride), "b h w c i j -> (b h w) (i j) c")


def gather_key_windows(
    keys: Tensor, grid: WindowGrid, kernel: int, padding: Tensor, *, semantic: bool = False
) -> Tensor:
    """Key windows of ``kernel`` positions a side, centred on each window.

    Args:
        keys: projected map of the image (B, H, W, C), or of the semantic tokens (B, rows*s, columns*s, C).
        padding: (C,) what a padded position holds.
        semantic: whether ``keys`` is the semantic map (stride ``samples``) or the image map (stride ``window``).

    Returns:
        (B * windows, kernel**2, C), image first, windows and keys in raster order.
    """
    padded = pad_with(keys, key_pads(grid, kernel, semantic=semantic), padding)
    return _unfold(padded, kernel, grid.samples if semantic else grid.window)


def gather_inner_windows(keys: Tensor, grid: WindowGrid, kernel: int) -> Tensor:
    """Key windows that stay inside the map: the first and last touch its borders, the others lie evenly between.

    On the published 14x14 map with ``kernel`` 10 these are the offsets 0 and 4. Where ``(size - kernel)`` is no
    multiple of the number of gaps the windows grow by the remainder, so that no position is left out (ours; the
    reference knows 14x14 only).

    Returns:
        (B * windows, keys, C)
    """
    strides, sizes = [], []
    for size, count in ((grid.height, grid.rows), (grid.width, grid.columns)):
        stride = max(1, (size - min(kernel, size)) // (count - 1)) if count > 1 else 1
        strides.append(stride)
        sizes.append(size - stride * (count - 1))
    unfolded = keys.unfold(1, sizes[0], strides[0]).unfold(2, sizes[1], strides[1])
    return rearrange(unfolded, "b h w c i j -> (b h w) (i j) c")


def _padding(
    size: tuple[int, int],
    inside: tuple[int, int],
    pads: tuple[int, int, int, int],
    *,
    kernel: int,
    stride: int,
    corner: bool,
    device: torch.device,
) -> Tensor:
    """Which keys of every key window are padding: (windows, kernel**2), True = padding.

    Args:
        size: rows and columns of the map before ``pads``.
        inside: rows and columns that are real; the others are padding.
        corner: mark only positions beyond BOTH limits (the reference's slicing), and let a window in which every key
            is marked attend to all of them (a constant of -1000 over a whole row has no effect on its softmax).
    """
    row = torch.arange(size[0], device=device)[:, None] >= inside[0]
    column = torch.arange(size[1], device=device)[None, :] >= inside[1]
    marked = F.pad((row & column) if corner else (row | column), pads, value=True)
    windows = _unfold(marked[None, :, :, None], kernel, stride)[:, :, 0]
    return windows & ~windows.all(1, keepdim=True) if corner else windows


def _reference_limit(size: int, pad: int) -> int:
    """First index marked by ``mask[-pad:]``: with ``pad`` 0 that slice is the whole axis (specification B7.1)."""
    return max(0, size - pad) if pad else 0


def image_padding(grid: WindowGrid, kernel: int, mask_mode: MaskMode, device: torch.device) -> Tensor | None:
    """Padded keys of the image key windows: (windows, kernel**2) bool, True = not to be attended; None for no mask."""
    if mask_mode == "none":
        return None
    size = (grid.rows * grid.window, grid.columns * grid.window)
    left, right, top, bottom = key_pads(grid, kernel, semantic=False)
    around = (left, right - grid.pad_right, top, bottom - grid.pad_bottom)
    if mask_mode == "exact":
        inside = (grid.height, grid.width)
    else:
        inside = (_reference_limit(size[0], grid.pad_bottom), _reference_limit(size[1], grid.pad_right))
    corner = mask_mode == "reference"
    return _padding(size, inside, around, kernel=kernel, stride=grid.window, corner=corner, device=device)


def semantic_padding(grid: WindowGrid, kernel: int, mask_mode: MaskMode, device: torch.device) -> Tensor | None:
    """Padded keys of the semantic key windows: (windows, kernel**2) bool, True = not to be attended; None for no mask.

    The reference counts its pads in image positions but applies them to the semantic map; 'reference' repeats that.
    """
    if mask_mode == "none":
        return None
    size = grid.semantic_size
    if mask_mode == "exact":
        inside = size
    else:
        inside = (_reference_limit(size[0], grid.pad_bottom), _reference_limit(size[1], grid.pad_right))
    pads = key_pads(grid, kernel, semantic=True)
    corner = mask_mode == "reference"
    return _padding(size, inside, pads, kernel=kernel, stride=grid.samples, corner=corner, device=device)


def neighbourhood_bias(grid: WindowGrid, kernel: int, mask_mode: MaskMode, device: torch.device) -> Tensor | None:
    """The semantic key windows as one additive bias over the whole semantic map, one extra key standing for all
    padding.

    A window that sees n padded keys with the same key and value weighs them as one key with bias ``log(n)``; unseen
    and masked keys have bias -inf. So attention over the map plus that key equals attention over the gathered windows.

    Returns:
        (H*W, rows*s*columns*s + 1) float32: rows in raster order of the unpadded image map; or None when every
        position sees every semantic token and no padding.
    """
    rows, columns = grid.semantic_size
    low = (kernel - grid.samples) // 2
    reach = min(low, kernel - low - grid.samples)
    sees_all = reach >= max(rows, columns) - grid.samples
    if mask_mode == "exact" and sees_all:
        return None
    index = F.pad(
        torch.arange(rows * columns, device=device).view(rows, columns),
        key_pads(grid, kernel, semantic=True),
        value=rows * columns,
    )
    seen = _unfold(index[None, :, :, None], kernel, grid.samples)[:, :, 0]
    padding = semantic_padding(grid, kernel, mask_mode, device)
    weight = torch.ones(seen.shape, device=device) if padding is None else (~padding).float()
    count = torch.zeros(seen.shape[0], rows * columns + 1, device=device).scatter_add(1, seen, weight)
    windows = rearrange(count.log(), "(h w) n -> h w n", h=grid.rows, w=grid.columns)
    tokens = repeat(windows, "h w n -> (h i) (w j) n", i=grid.window, j=grid.window)
    return rearrange(tokens[: grid.height, : grid.width], "h w n -> (h w) n")
