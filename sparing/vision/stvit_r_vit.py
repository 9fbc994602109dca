"""STViT-R on plain ViTs: dumbbell units between full-resolution layers, so that a ViT keeps its dense map.

The unit of STViT-R (Chang et al., CVPR 2023, section 3.3) on any timm ViT; the paper has it on Swin only, this form
is ours. Six layers of the host make one unit and keep their weights:

| layer of a unit | queries | keys and values |
| --- | --- | --- |
| 0 the host's own | X | X |
| 1 generation 1 | P, pooled from the grid of X | X |
| 2 generation 2 | S1 (+ G in the first unit) | S1 and X |
| 3, 4 semantic | S | S |
| 5 recovery | X of layer 0 | S |

X holds image tokens and whatever prefix tokens the host has ``(batch, prefix + N, dim)``, S ``(batch, M, dim)``.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from timm.layers import PatchDropout
from timm.models import checkpoint
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from sparing.vision.dumbbell import BLOCKS_PER_UNIT
from sparing.vision.semantic_pooling import POOLINGS, make_pooling
from sparing.vision.split_attention import cross_block
from sparing.vision.stvit import NumTokens, as_pair, center_grid
from sparing.vision.vit_contracts import (
    check_images,
    check_output_format,
    pack_intermediates,
    refuse_masks,
    take_indices,
)
from sparing.vision.vit_hosts import check_vit, model_name
from sparing.vision.vit_twin import ViTTwin
from sparing.zoo.twins import Status

__all__ = ["DumbbellViT", "DumbbellViTDistilled"]


class DumbbellViT(ViTTwin):
    """STViT-R twin of a timm ViT; new parameters are ``center_pooling.UNIT.*`` and ``global_centers``.

    Made by ``from_host``. The constructor takes the host over as it is (no copy).

    Args:
        host: a timm ``VisionTransformer`` of at least 6 layers.
        num_tokens: semantic tokens: a square number, (rows, columns), None for round(4 * grid / 14) a side, or 'all'
            for the host's own computation.
        pooling: first centers of every unit: 'weighted', 'avg' or 'max'.
        base_depth: leading layers that stay the host's own; the layers behind them must be whole units.

    Raises:
        ValueError: numbers that do not fit the host; they are named.
    """

    method: ClassVar[str] = "stvit_r_vit"
    training: ClassVar[Literal["none", "required"]] = "required"  # type: ignore[misc,assignment]
    own_parts: ClassVar[tuple[str, ...]] = ("center_pooling", "global_centers")

    def __init__(
        self, host: VisionTransformer, *, num_tokens: NumTokens = None, pooling: str = "weighted", base_depth: int = 0
    ) -> None:
        check_vit(host, method=self.method)
        centers = None if num_tokens == "all" else center_grid(num_tokens, host.patch_embed.grid_size)
        if pooling not in POOLINGS:
            raise ValueError(f"pooling {pooling!r} is unknown; {', '.join(POOLINGS)} are accepted")
        if not 0 <= base_depth < len(host.blocks):
            raise ValueError(f"base_depth {base_depth}: {model_name(host)} has {len(host.blocks)} blocks")
        if centers is not None and (reason := _depth_reason(host, base_depth)):
            raise ValueError(reason)
        if centers is not None and isinstance(host.patch_drop, PatchDropout) and host.patch_drop.prob > 0:
            raise ValueError(
                f"{model_name(host)} drops patches in training (patch_drop_rate {host.patch_drop.prob}); centers are "
                "pooled from the full grid: set host.patch_drop = nn.Identity()"
            )
        self.take_over(host)
        self.status: Status = "exact" if centers is None else "converted, not trained"
        self.semantic_grid, self.base_depth = centers, base_depth
        self._knobs = {
            "num_tokens": "all" if centers is None else list(centers),
            "pooling": pooling,
            "base_depth": base_depth,
        }
        self.center_pooling: nn.ModuleList | None = None
        self.global_centers: nn.Parameter | None = None
        if centers is not None:
            place = {"device": self.patch_embed.proj.weight.device, "dtype": self.patch_embed.proj.weight.dtype}
            units = (len(self.blocks) - base_depth) // BLOCKS_PER_UNIT
            poolings = [make_pooling(pooling, self.embed_dim, centers).to(**place) for _ in range(units)]
            self.center_pooling = nn.ModuleList(poolings).train(self.training)
            self.global_centers = nn.Parameter(torch.empty(1, centers[0] * centers[1], self.embed_dim, **place))
            nn.init.trunc_normal_(self.global_centers, std=0.02)
        self._update_feature_info()

    # --- The twin contract ---

    @classmethod
    def why_not(cls, host: nn.Module) -> list[str]:
        if reasons := super().why_not(host):
            return reasons
        depth = len(host.blocks)  # type: ignore[arg-type]
        return [f"{model_name(host)} has {depth} blocks, a dumbbell unit takes six"] if depth < BLOCKS_PER_UNIT else []

    # --- Forward ---

    def embed(self, images: Tensor) -> Tensor:
        """Images -> tokens before the first block (batch, prefix + N, dim), by timm's own embedding."""
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(images))))  # type: ignore[no-any-return]

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images (batch, channels, height, width) -> all tokens after the last norm (batch, prefix + N, dim)."""
        refuse_masks(attn_mask, is_causal)
        grid = check_images(self, x)
        return self.norm(self._blocks(self.embed(x), grid)[0])  # type: ignore[no-any-return]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """timm's contract. Layers 0 and 5 of a unit give maps of the image's grid, layers 1 to 4 semantic maps."""
        check_output_format(output_fmt)
        refuse_masks(attn_mask, is_causal)
        take = take_indices(len(self.blocks), indices)
        grid = check_images(self, x)
        tokens, taken = self._blocks(self.embed(x), grid, take=take, stop=max(take) + 1 if stop_early else None)
        full = [self._is_full(i) for i in take]
        maps = [self.norm(taken[i]) if norm else taken[i] for i in take]
        return pack_intermediates(
            maps,
            [grid if whole else (self.semantic_grid or grid) for whole in full],
            None if intermediates_only else self.norm(tokens),
            num_prefix=self.num_prefix_tokens,
            output_fmt=output_fmt,
            return_prefix_tokens=return_prefix_tokens,
            output_dict=output_dict,
        )

    def _is_full(self, index: int) -> bool:
        return self.semantic_grid is None or self._role(index) in (0, BLOCKS_PER_UNIT - 1)

    def _role(self, index: int) -> int:
        """Place of a layer in its unit; 0, the host's own, before the first unit."""
        return max(0, index - self.base_depth) % BLOCKS_PER_UNIT

    def _blocks(
        self, image: Tensor, grid: tuple[int, int], *, take: Iterable[int] = (), stop: int | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """All layers (or the first ``stop``) -> X, and the outputs in ``take``, each behind the prefix tokens of X."""
        taken, wanted, prefix = {}, set(take), self.num_prefix_tokens
        saves = self.grad_checkpointing and torch.is_grad_enabled()
        semantic = image
        for index, block in enumerate(self.blocks):
            if stop is not None and index >= stop:
                break
            run: Any = partial(cross_block, block)
            role = self._role(index)
            streams: tuple[Tensor, ...]
            if self.semantic_grid is None or role == 0:
                run, streams = block, (image,)
            elif role == 1:
                assert self.center_pooling is not None
                pooling = self.center_pooling[(index - self.base_depth) // BLOCKS_PER_UNIT]
                streams = (pooling(image[:, prefix:], grid), image)
            elif role == 2:
                query = semantic + self.global_centers if index == self.base_depth + 2 else semantic
                streams = (query, torch.cat([semantic, image], dim=1))
            elif role == BLOCKS_PER_UNIT - 1:
                streams = (image, semantic)
            else:
                run, streams = block, (semantic,)
            out = checkpoint(run, *streams) if saves else run(*streams)
            if self._is_full(index):
                image = out
            else:
                semantic = out
            if index in wanted:
                taken[index] = out if self._is_full(index) else torch.cat([image[:, :prefix], out], dim=1)
        return image, taken

    # --- timm's other contracts ---

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"global_centers"}

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """timm's: new image or patch size; the number of semantic tokens stays."""
        if self.semantic_grid is not None:
            sides = zip(
                as_pair(img_size or self.patch_embed.img_size), as_pair(patch_size or self.patch_embed.patch_size)
            )
            center_grid(self.semantic_grid, tuple(side // patch for side, patch in sides))  # type: ignore[arg-type]
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        self._update_feature_info()

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's: cut the blocks behind the last one taken."""
        take: list[int] = super().prune_intermediate_layers(indices, prune_norm=prune_norm, prune_head=prune_head)
        if self.center_pooling is not None:
            begun = max(0, len(self.blocks) - self.base_depth - 1)  # layers behind the first of the first unit
            self.center_pooling = self.center_pooling[: -(-begun // BLOCKS_PER_UNIT)]
        return take

    def _update_feature_info(self) -> None:
        patch, reduction = self.patch_embed.feat_ratio(), 0.0
        if self.semantic_grid is not None:
            height, width = self.patch_embed.img_size
            reduction = max(height / self.semantic_grid[0], width / self.semantic_grid[1])
        self.feature_info = [
            {
                "module": f"blocks.{i}",
                "num_chs": self.embed_dim,
                "reduction": patch if self._is_full(i) else reduction,
            }
            for i in range(len(self.blocks))
        ]


class DumbbellViTDistilled(DumbbellViT, VisionTransformerDistilled):
    """The STViT-R twin of a distilled DeiT."""


DumbbellViT.distilled = DumbbellViTDistilled


def _depth_reason(host: VisionTransformer, base_depth: int) -> str:
    """Why the layers of a host behind ``base_depth`` cannot be cut into units; empty when they can."""
    depth = len(host.blocks)
    if (depth - base_depth) % BLOCKS_PER_UNIT == 0:
        return ""
    rest = depth % BLOCKS_PER_UNIT
    fits = f", e.g. base_depth={rest}" if depth > BLOCKS_PER_UNIT and rest else ""
    return (
        f"{model_name(host)} has {depth} blocks; a dumbbell unit takes six, so the depth behind "
        f"base_depth={base_depth} must be a multiple of {BLOCKS_PER_UNIT}{fits}"
    )
