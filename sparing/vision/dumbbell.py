"""Dumbbell units: six blocks that condense a map into semantic tokens, mix those, and give the map back (STViT-R).

Chang et al., "Making Vision Transformers Efficient from A Token Sparsification View", CVPR 2023, section 3.3.

| block of a unit | queries | keys and values |
| --- | --- | --- |
| 0 ordinary window block | image X | its window |
| 1 generation 1 | centres P: max-pooled windows | P and a larger image window ('global'), or only that ('window') |
| 2 generation 2 | S1 (+ G) | S1 and all of X ('global'), or a still larger image window ('window') |
| 3, 4 semantic | S | S inside one window; all of S |
| 5 recovery | X of block 0 | all of S ('global'), or the semantic tokens around the window ('window') |

Maps are ``(batch, height, width, channels)``; semantic tokens form one raster map. 'global' is the published
classification form, 'window' the published dense form; both have the same weights.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import Tensor, nn

from sparing.kernels import attention, attention_weights, relative_position_index
from sparing.vision.semantic_windows import (
    MaskMode,
    WindowGrid,
    check_mask_mode,
    gather_inner_windows,
    gather_key_windows,
    image_padding,
    neighbourhood_bias,
    pad_with,
    pool_centers,
    semantic_padding,
)
from sparing.vision.swin import pad_to_multiple

__all__ = ["DumbbellOptions", "GenerationBlock", "RecoveryBlock", "SemanticBlock"]

BLOCKS_PER_UNIT = 6


@dataclass(frozen=True)
class DumbbellOptions:
    """What distinguishes the published forms of one and the same weights.

    Args:
        window: side of a window of the stage's map; samples: side of its set of semantic tokens.
        scope: 'global' (classification) or 'window' (dense), see the module's table.
        mask_mode: for 'window': 'exact' masks every padded key, 'reference' repeats the published code's mask (which
            its weights depend on), 'none' masks nothing.
        residual_centers: whether generation 1 adds its queries P (the paper and the dense form do, the published
            classifier not).
        key_windows: sides of the key windows of generation 1, generation 2 (image positions) and recovery (semantic
            tokens).
    """

    window: int = 7
    samples: int = 3
    scope: Literal["global", "window"] = "global"
    mask_mode: MaskMode = "exact"
    residual_centers: bool = True
    key_windows: tuple[int, int, int] = (10, 21, 27)

    def __post_init__(self) -> None:
        check_mask_mode(self.mask_mode)
        if self.scope not in ("global", "window"):
            raise ValueError(f"scope={self.scope!r}, accepted are 'global' and 'window'")
        if not 1 <= self.samples <= self.window:
            raise ValueError(f"{self.samples} semantic tokens a side do not fit a window of side {self.window}")
        first, second, recovery = self.key_windows
        if self.scope == "window" and (min(first, second) < self.window or recovery < self.samples):
            raise ValueError(
                f"key windows {self.key_windows} must cover the window of {self.window} positions "
                f"and its {self.samples} semantic tokens a side"
            )

    def grid(self, x: Tensor) -> WindowGrid:
        """Windows of a map ``x`` (B, H, W, C); 'global' needs whole windows."""
        grid = WindowGrid(x.shape[1], x.shape[2], self.window, self.samples)
        if self.scope == "global" and (grid.pad_bottom or grid.pad_right):
            raise ValueError(
                f"the map of the dumbbell stage is {grid.height}x{grid.width}, not whole windows of {self.window}: "
                f"with scope='global' give image sides that are multiples of {16 * self.window} pixels at stride 16, "
                "or use scope='window' (any size)"
            )
        return grid


class _CrossAttention(nn.Module):
    """Separate query and key/value projections; optionally a relative position bias over a square of
    ``relative_side``.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        qkv_bias: bool,
        attn_drop: float,
        proj_drop: float,
        relative_side: int | None,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.num_heads, self.attn_drop, self.relative_side = num_heads, attn_drop, relative_side
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        if relative_side is not None:
            self.relative_position_bias_table = nn.Parameter(
                torch.empty((2 * relative_side - 1) ** 2, num_heads, **factory)
            )
            trunc_normal_(self.relative_position_bias_table, std=0.02)

    def relative_bias(self) -> Tensor | None:
        """(1, heads, side**2, side**2), or None."""
        if self.relative_side is None:
            return None
        table = self.relative_position_bias_table
        return rearrange(table[relative_position_index(self.relative_side, device=table.device)], "q k h -> 1 h q k")

    def heads(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, heads, N, C/heads)"""
        return rearrange(tokens, "b n (h d) -> b h n d", h=self.num_heads)

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        *,
        bias: Tensor | None = None,
        padding: Tensor | None = None,
        weights: bool = False,
    ) -> Tensor:
        """Attention of projected tokens.

        Args:
            queries: (B, M, C), projected by ``q``.
            keys: (B, N, 2C), projected by ``kv``.
            padding: (B, N) bool, True = not to be attended.
            weights: return the attention map (B, heads, M, N) instead of the attended values (B, M, C) before ``proj``.
        """
        q = self.heads(queries)
        k, v = rearrange(keys, "b n (two h d) -> two b h n d", two=2, h=self.num_heads)
        if weights:
            return attention_weights(q, k, bias=bias, key_padding_mask=padding)
        dropout = self.attn_drop if self.training else 0.0
        out = attention(q, k, v, bias=bias, key_padding_mask=padding, dropout_p=dropout)
        return rearrange(out, "b h m d -> b m (h d)")


class _CrossBlock(nn.Module):
    """Parameters and residual arithmetic shared by blocks 1 to 5: one norm1 for queries and keys, LayerScale on both
    branches.
    """

    def __init__(
        self,
        dim: int,
        options: DumbbellOptions,
        *,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
        layer_scale: float = 1e-5,
        relative_side: int | None = None,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.options = options
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps, **factory)
        self.attn = _CrossAttention(
            dim,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            relative_side=relative_side,
            **factory,
        )
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **factory)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.layer_scale_1 = nn.Parameter(torch.full((dim,), layer_scale, **factory))
        self.layer_scale_2 = nn.Parameter(torch.full((dim,), layer_scale, **factory))

    def project_queries(self, x: Tensor) -> Tensor:
        return self.attn.q(self.norm1(x))

    def project_keys(self, x: Tensor) -> Tensor:
        return self.attn.kv(self.norm1(x))

    def padding_keys(self) -> Tensor:
        """(2C,) key and value of a token that was zero before norm1: norm1(0) is norm1's bias."""
        return self.attn.kv(self.norm1.bias)

    def add_attended(self, residual: Tensor | None, attended: Tensor) -> Tensor:
        scaled = self.layer_scale_1 * self.attn.proj_drop(self.attn.proj(attended))
        # without a residual the published classifier applies no drop-path either
        return scaled if residual is None else residual + self.drop_path(scaled)

    def add_mlp(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.layer_scale_2 * self.mlp(self.norm2(x)))


class GenerationBlock(_CrossBlock):
    """Generation of semantic tokens. ``order`` 1 starts from pooled centres, ``order`` 2 refines what block 1 made."""

    def __init__(
        self, dim: int, options: DumbbellOptions, *, order: Literal[1, 2], conv_pos: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(dim, options, **kwargs)
        self.order = order
        factory = {name: kwargs[name] for name in ("device", "dtype") if name in kwargs}
        self.conv_pos = _CenterPositions(dim, **factory) if conv_pos and order == 1 else None

    def centers(self, x: Tensor) -> Tensor:
        """P of every window of the image map ``x`` (B, H, W, C), as one raster map."""
        grid = self.options.grid(x)
        pooled = pool_centers(pad_to_multiple(x, grid.window), grid)
        return pooled if self.conv_pos is None else grid.to_map(self.conv_pos(grid.to_windows(pooled), grid.samples))

    def forward(
        self, x: Tensor, semantic: Tensor | None = None, global_centers: Tensor | None = None, *, weights: bool = False
    ) -> Tensor:
        """
        Args:
            x: (B, H, W, C) image map, the output of block 0.
            semantic: (B, rows*s, columns*s, C) output of block 1, for order 2.
            global_centers: (1, rows*s*columns*s, C), G; added to the queries and the residual, not to the keys.
            weights: return the attention map instead, (B*windows or B, heads, queries, keys).

        Returns:
            (B, rows*s, columns*s, C) semantic map.
        """
        grid = self.options.grid(x)
        center = self.centers(x) if semantic is None else semantic
        query = center
        if global_centers is not None:
            if global_centers.shape[1] != center.shape[1] * center.shape[2]:
                raise ValueError(
                    f"{global_centers.shape[1]} global centres were built for another image size: "
                    f"this one has {center.shape[1]}x{center.shape[2]} semantic tokens"
                )
            query = center + global_centers.view(1, *center.shape[1:])
        queries, keys, padding = self._queries_and_keys(x, center, query, grid)
        attended = self.attn(queries, keys, padding=padding, weights=weights)
        if weights:
            return attended
        if attended.shape[0] == x.shape[0] and self._attends_everywhere:
            attended = attended.view(query.shape)
        else:
            attended = grid.to_map(attended)
        residual = query if self.order == 2 or self.options.residual_centers else None
        return self.add_mlp(self.add_attended(residual, attended))

    @property
    def _attends_everywhere(self) -> bool:
        return self.order == 2 and self.options.scope == "global"

    def _queries_and_keys(
        self, x: Tensor, center: Tensor, query: Tensor, grid: WindowGrid
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        queries, image = self.project_queries(query), self.project_keys(x)
        if self._attends_everywhere:
            flat = [rearrange(keys, "b h w c -> b (h w) c") for keys in (self.project_keys(center), image)]
            return rearrange(queries, "b h w c -> b (h w) c"), torch.cat(flat, 1), None
        queries = grid.to_windows(queries)
        if self.options.scope == "global":
            inner = gather_inner_windows(image, grid, self.options.key_windows[0])
            return queries, torch.cat([grid.to_windows(self.project_keys(center)), inner], 1), None
        kernel = self.options.key_windows[self.order - 1]
        padding = image_padding(grid, kernel, self.options.mask_mode, x.device)
        if padding is not None:
            padding = repeat(padding, "w n -> (b w) n", b=x.shape[0])
        return queries, gather_key_windows(image, grid, kernel, self.padding_keys()), padding


class _CenterPositions(nn.Module):
    """Conditional positions: P + depthwise 3x3 convolution of P inside each window's own map (``use_conv_pos``)."""

    def __init__(self, dim: int, **factory: Any) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory))

    def forward(self, centers: Tensor, samples: int) -> Tensor:
        """``centers``: (B*windows, s*s, C) -> the same shape."""
        maps = rearrange(centers, "b (i j) c -> b c i j", i=samples)
        return centers + rearrange(self.proj(maps), "b c i j -> b (i j) c")


class SemanticBlock(_CrossBlock):
    """Self-attention of the semantic tokens, inside each window (``local``) or over all of them."""

    def __init__(self, dim: int, options: DumbbellOptions, *, local: bool, **kwargs: Any) -> None:
        super().__init__(dim, options, **kwargs)
        self.local = local

    def forward(self, semantic: Tensor, *, weights: bool = False) -> Tensor:
        """``semantic``: (B, rows*s, columns*s, C) -> the same shape, or the attention map."""
        batch, height, width, _ = semantic.shape
        side = self.options.samples if self.local else max(height, width)
        if self.attn.relative_side is not None and (
            self.attn.relative_side != side or (not self.local and height != width)
        ):
            raise ValueError(
                f"relative_pos was built for {self.attn.relative_side}x{self.attn.relative_side} semantic tokens, "
                f"this map has {height}x{width}"
            )
        normed = self.norm1(semantic)
        pattern = "b (h i) (w j) c -> (b h w) (i j) c" if self.local else "b i j c -> b (i j) c"
        sizes = {"i": side, "j": side} if self.local else {}
        queries, keys = (rearrange(p(normed), pattern, **sizes) for p in (self.attn.q, self.attn.kv))
        attended = self.attn(queries, keys, bias=self.attn.relative_bias(), weights=weights)
        if weights:
            return attended
        if self.local:
            attended = rearrange(
                attended, "(b h w) (i j) c -> b (h i) (w j) c", b=batch, h=height // side, i=side, j=side
            )
        return self.add_mlp(self.add_attended(semantic, attended.reshape(semantic.shape)))


class RecoveryBlock(_CrossBlock):
    """Image tokens query the semantic tokens: the full map comes back."""

    def forward(self, x: Tensor, semantic: Tensor, *, weights: bool = False) -> Tensor:
        """
        Args:
            x: (B, H, W, C) image map, the output of block 0 (also the residual).
            semantic: (B, rows*s, columns*s, C).
            weights: return the attention map: (B, heads, H*W, semantic) with scope 'global', else
                (B*windows, heads, window**2, recovery window**2).
        """
        grid = self.options.grid(x)
        queries, keys = self.project_queries(x), self.project_keys(semantic)
        kernel = self.options.key_windows[2]
        if self.options.scope == "window" and (weights or grid.semantic_size[0] * grid.semantic_size[1] > kernel**2):
            attended = self._attend_windows(queries, keys, grid, weights=weights)
        else:
            attended = self._attend_map(queries, keys, grid, weights=weights)
        return attended if weights else self.add_mlp(self.add_attended(x, attended))

    def _attend_map(self, queries: Tensor, keys: Tensor, grid: WindowGrid, *, weights: bool = False) -> Tensor:
        """Over the whole semantic map, neighbourhoods as a bias: cheaper while the map is no larger than one key
        window.
        """
        bias = None
        flat = rearrange(keys, "b h w c -> b (h w) c")
        if self.options.scope == "window":
            bias = neighbourhood_bias(grid, self.options.key_windows[2], self.options.mask_mode, keys.device)
        if bias is not None:
            flat = torch.cat([flat, self.padding_keys().expand(flat.shape[0], 1, -1)], 1)
            bias = bias.to(flat.dtype)[None, None]
        attended = self.attn(rearrange(queries, "b h w c -> b (h w) c"), flat, bias=bias, weights=weights)
        return attended if weights else attended.view(queries.shape)

    def _attend_windows(self, queries: Tensor, keys: Tensor, grid: WindowGrid, *, weights: bool = False) -> Tensor:
        """Each image window over the semantic tokens gathered around it."""
        batch, kernel, window = queries.shape[0], self.options.key_windows[2], grid.window
        if weights:  # queries of padded positions are part of the map that is asked for
            pads = (0, grid.pad_right, 0, grid.pad_bottom)
            queries = pad_with(queries, pads, self.attn.q(self.norm1.bias))
        windows = rearrange(pad_to_multiple(queries, window), "b (h i) (w j) c -> (b h w) (i j) c", i=window, j=window)
        padding = semantic_padding(grid, kernel, self.options.mask_mode, keys.device)
        if padding is not None:
            padding = repeat(padding, "w n -> (b w) n", b=batch)
        gathered = gather_key_windows(keys, grid, kernel, self.padding_keys(), semantic=True)
        attended = self.attn(windows, gathered, padding=padding, weights=weights)
        if weights:
            return attended
        full = rearrange(attended, "(b h w) (i j) c -> b (h i) (w j) c", b=batch, h=grid.rows, i=window, j=window)
        return F.pad(full, (0, 0, 0, -grid.pad_right, 0, -grid.pad_bottom))
