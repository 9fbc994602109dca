"""STViT: a few semantic tokens instead of all image tokens, on any timm ViT.

"Making Vision Transformers Efficient from a Token Sparsification View" (Chang et al., CVPR 2023). The layers of the
host keep their number and weights and fall into three segments:

* base module: blocks ``0 .. base_depth - 1`` on all image tokens X, unchanged;
* semantic token generation module (STGM): in the next ``generation_depth`` blocks the queries are M cluster centers and
  the keys are the image tokens. Their first queries P are pooled from the grid (eq. 3 to 5), the second layer adds
  learned global centers G;
* semantic layers: the remaining blocks, unchanged, on M tokens.

Shapes: images ``(batch, channels, height, width)``, image tokens X ``(batch, N, dim)``, semantic tokens S ``(batch, M,
dim)`` in raster order of an s_h x s_w grid. Prefix tokens (class, registers, distillation) bypass the pooling and lead
both streams when they are kept. No source of STViT on a plain ViT was published; the departures that spec and code make
are named where they happen.
"""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from timm.layers import PatchDropout
from timm.models import checkpoint
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from sparing.vision.semantic_pooling import POOLINGS, axis_cells, make_pooling
from sparing.vision.semantic_trace import SemanticTrace, gathered_regions, trace
from sparing.vision.split_attention import cross_block
from sparing.vision.vit_contracts import (
    check_images,
    check_output_format,
    pack_intermediates,
    refuse_masks,
    take_indices,
)
from sparing.vision.vit_hosts import (
    check_same_class,
    check_vit,
    drop_prefix_tokens,
    model_name,
)
from sparing.vision.vit_twin import ViTTwin
from sparing.zoo.twins import Status

__all__ = ["NumTokens", "SemanticTokenViT", "SemanticTokenViTDistilled", "as_pair", "center_grid"]

NumTokens = int | tuple[int, int] | Literal["all"] | None


class SemanticTokenViT(ViTTwin):
    """STViT twin of a timm ViT; parameters keep timm's names, new ones are ``center_pooling.*`` and ``global_centers``.

    Made by ``from_host``. The constructor takes the host over as it is (no copy): its modules become the twin's.

    Args:
        host: a timm ``VisionTransformer`` (``VisionTransformerDistilled`` for the subclass below).
        num_tokens: semantic tokens: a square number, (rows, columns), None for round(4 * grid / 14) a side, or 'all' to
            keep every token (the host's own computation).
        base_depth: layers before the generation; None: a third of them.
        generation_depth: layers of the STGM; the paper's is 2.
        pooling: first centers: 'weighted' (paper), 'avg' or 'max'.
        keep_prefix: keep class, register and distillation tokens; None: keep them when the head reads them.
        inter_window: let centers move by what their neighbours look like (paper eq. 5; its form is ours).

    Raises:
        ValueError: numbers that do not fit the host; they are named.
    """

    method: ClassVar[str] = "stvit"
    training: ClassVar[Literal["none", "required"]] = "required"  # type: ignore[misc,assignment]
    own_parts: ClassVar[tuple[str, ...]] = ("center_pooling", "global_centers")

    def __init__(
        self,
        host: VisionTransformer,
        *,
        num_tokens: NumTokens = None,
        base_depth: int | None = None,
        generation_depth: int = 2,
        pooling: str = "weighted",
        keep_prefix: bool | None = None,
        inter_window: bool = False,
    ) -> None:
        check_vit(host, method="stvit")
        check_same_class(self, host)
        grid, depth = host.patch_embed.grid_size, len(host.blocks)
        keep = _keep_prefix(host, keep_prefix, everything=num_tokens == "all")
        centers = None if num_tokens == "all" else center_grid(num_tokens, grid)
        if pooling not in POOLINGS:
            raise ValueError(f"pooling {pooling!r} is unknown; {', '.join(POOLINGS)} are accepted")
        base = depth // 3 if base_depth is None else base_depth
        if centers is not None and (base < 0 or generation_depth < 1 or base + generation_depth >= depth):
            raise ValueError(
                f"base_depth {base} + generation_depth {generation_depth} leaves no semantic layer of the "
                f"host's {depth}; base_depth >= 0, generation_depth >= 1 and a sum below {depth} are accepted"
            )
        if centers is None and not (base >= 0 and generation_depth >= 1 and base + generation_depth < max(depth, 4)):
            raise ValueError(
                f"base_depth {base} and generation_depth {generation_depth} do not fit the host's {depth} layers, even "
                "where num_tokens='all' leaves them without effect"
            )
        if centers is not None and isinstance(host.patch_drop, PatchDropout) and host.patch_drop.prob > 0:
            raise ValueError(
                f"{model_name(host)} drops patches in training (patch_drop_rate {host.patch_drop.prob}); semantic "
                "tokens are pooled from the full grid: set host.patch_drop = nn.Identity()"
            )
        self.take_over(host)
        self.status: Status = "exact" if centers is None else "converted, not trained"
        self.semantic_grid = centers
        self.base_depth = depth if centers is None else base
        self.generation_depth = 0 if centers is None else generation_depth
        self._knobs = {
            "num_tokens": "all" if centers is None else list(centers),
            "base_depth": None if centers is None else base,
            "generation_depth": generation_depth,
            "pooling": pooling,
            "keep_prefix": keep,
            "inter_window": inter_window,
        }
        if not keep and self.num_prefix_tokens:
            drop_prefix_tokens(self)
        self.center_pooling: nn.Module | None = None
        self.global_centers: nn.Parameter | None = None
        if centers is not None:
            place = {"device": self.patch_embed.proj.weight.device, "dtype": self.patch_embed.proj.weight.dtype}
            self.center_pooling = make_pooling(pooling, self.embed_dim, centers, inter_window=inter_window).to(**place)
            self.center_pooling.train(self.training)
            if generation_depth > 1:  # G enters the second generation layer only
                self.global_centers = nn.Parameter(torch.empty(1, math.prod(centers), self.embed_dim, **place))
                nn.init.trunc_normal_(self.global_centers, std=0.02)
        self._update_feature_info()

    # --- The twin contract ---

    def twin_config(self) -> dict[str, Any]:
        """Knobs and the host's class and arguments.

        Raises:
            ValueError: the modules differ from what timm's constructor builds (the first difference is named), or
                pruning left no semantic layer.
        """
        if self.semantic_grid is not None and len(self.blocks) <= self.base_depth + self.generation_depth:
            raise ValueError(
                f"pruned to {len(self.blocks)} blocks, this twin has no semantic layer behind its base of "
                f"{self.base_depth} and generation of {self.generation_depth}: it runs, but cannot be saved"
            )
        return super().twin_config()

    def reset_semantic_parameters(self, *, from_scratch: bool = False) -> None:
        """Fresh pooling and global centers; the pooling starts as the plain mean unless ``from_scratch``."""
        if isinstance(self.center_pooling, nn.Module) and hasattr(self.center_pooling, "reset_parameters"):
            self.center_pooling.reset_parameters(from_scratch=from_scratch)
        if self.global_centers is not None:
            nn.init.trunc_normal_(self.global_centers, std=0.02)

    # --- Forward ---

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images (batch, channels, height, width) -> tokens after the last norm (batch, prefix + M, dim)."""
        refuse_masks(attn_mask, is_causal)
        grid = check_images(self, x)
        tokens, _ = self._blocks(self.embed(x), grid)
        return self.norm(tokens)

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
        full_resolution: bool = False,
    ) -> Any:
        """timm's contract. From block ``base_depth`` on the grid of a map is s_h x s_w instead of the image's.

        Args:
            x: images (batch, channels, height, width).
            indices: blocks to take: the last n for an int, all for None.
            return_prefix_tokens: pair each map with its prefix tokens.
            norm: apply the last norm to each.
            stop_early: do not run blocks behind the last one taken.
            output_fmt: 'NCHW' or 'NLC'.
            intermediates_only: return the list alone.
            output_dict: return a dict with timm's keys.
            attn_mask: not accepted.
            is_causal: not accepted.
            full_resolution: insist on maps of the image's own grid.

        Raises:
            ValueError: another format, a mask, or ``full_resolution`` for a block that has semantic tokens only.
        """
        check_output_format(output_fmt)
        refuse_masks(attn_mask, is_causal)
        take = take_indices(len(self.blocks), indices)
        last = max(take)
        if full_resolution and last >= self.base_depth:
            raise ValueError(
                f"block {last} holds {self.semantic_grid} semantic tokens, not the image's grid: full resolution ends "
                f"with block {self.base_depth - 1}; STViT-R restores it"
            )
        grid = check_images(self, x)
        tokens, taken = self._blocks(self.embed(x), grid, take=take, stop=last + 1 if stop_early else None)
        semantic = self.semantic_grid or grid
        return pack_intermediates(
            [self.norm(taken[i]) if norm else taken[i] for i in take],
            [grid if i < self.base_depth else semantic for i in take],
            None if intermediates_only else self.norm(tokens),
            num_prefix=self.num_prefix_tokens,
            output_fmt=output_fmt,
            return_prefix_tokens=return_prefix_tokens,
            output_dict=output_dict,
        )

    def trace(self, images: Tensor) -> SemanticTrace:
        """One forward pass step by step, with all its tensors; see ``SemanticTrace``."""
        return trace(self, images)

    def attention_maps(self, images: Tensor) -> list[Tensor]:
        """Attention of every generation layer: (batch, heads, prefix + M, keys), keys as ``SemanticTrace`` says."""
        return trace(self, images).attention

    def gathered_regions(self, images: Tensor) -> Tensor:
        """Which image tokens each semantic token gathers: (batch, M, rows, columns), each map summing to 1."""
        return gathered_regions(self, images)

    def embed(self, images: Tensor) -> Tensor:
        """Images -> tokens before the first block (batch, prefix + N, dim), by timm's own embedding."""
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(images))))

    def first_queries(self, tokens: Tensor, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """Queries of the first generation layer: prefix tokens, then the pooled centers P. Its keys are all tokens."""
        assert self.center_pooling is not None
        centers = self.center_pooling(image, grid)
        if not self.num_prefix_tokens:
            return centers
        return torch.cat([tokens[:, : self.num_prefix_tokens], centers], dim=1)

    def next_streams(self, semantic: Tensor, image: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Queries and keys of generation layer ``step`` > 0: S (+ G in the second layer), and [prefix, S, X] without G
        (eq. 2).
        """
        query = semantic
        if step == 1:
            assert self.global_centers is not None
            query = semantic + F.pad(self.global_centers, (0, 0, self.num_prefix_tokens, 0))
        return query, torch.cat([semantic, image], dim=1)

    def _blocks(
        self, tokens: Tensor, grid: tuple[int, int], *, take: Iterable[int] = (), stop: int | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Blocks ``0 .. stop - 1`` and the outputs of those in ``take``, without the last norm."""
        taken, wanted, image = {}, set(take), tokens
        saves = self.grad_checkpointing and torch.is_grad_enabled() and not torch.jit.is_scripting()
        for index, block in enumerate(self.blocks):
            if stop is not None and index >= stop:
                break
            step = index - self.base_depth
            run: Any = block
            streams: tuple[Tensor, ...] = (tokens,)
            if 0 <= step < self.generation_depth:
                run = partial(cross_block, block)
                if step == 0:
                    image = tokens[:, self.num_prefix_tokens :]
                    streams = (self.first_queries(tokens, image, grid), tokens)
                else:
                    streams = self.next_streams(tokens, image, step)
            tokens = checkpoint(run, *streams) if saves else run(*streams)
            if index in wanted:
                taken[index] = tokens
        return tokens, taken

    # --- timm's other contracts ---

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """timm's names and the global centers."""
        return super().no_weight_decay() | {"global_centers"}

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """timm's: new image or patch size. The number of semantic tokens stays.

        Raises:
            ValueError: the new grid is smaller than the semantic one.
        """
        new_patch = patch_size or self.patch_embed.patch_size
        new_size = img_size or self.patch_embed.img_size
        sizes = [s // p for s, p in zip(as_pair(new_size), as_pair(new_patch))]
        if self.semantic_grid is not None:
            for size, count in zip(sizes, self.semantic_grid):
                axis_cells(size, count)
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        self._update_feature_info()

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's: cut the blocks behind the last one taken; the generation's parameters go with its blocks."""
        take = super().prune_intermediate_layers(indices, prune_norm=prune_norm, prune_head=prune_head)
        if len(self.blocks) <= self.base_depth:
            self.center_pooling = None
        if len(self.blocks) <= self.base_depth + 1:
            self.global_centers = None
        return take

    def _update_feature_info(self) -> None:
        """Reduction of every block's map: the patch size before the generation, image size over semantic grid behind
        it.
        """
        patch = self.patch_embed.feat_ratio()
        reduction: float = patch
        if self.semantic_grid is not None:
            height, width = self.patch_embed.img_size
            reduction = max(height / self.semantic_grid[0], width / self.semantic_grid[1])
            reduction = int(reduction) if reduction == int(reduction) else reduction
        self.feature_info = [
            {
                "module": f"blocks.{i}",
                "num_chs": self.embed_dim,
                "reduction": patch if i < self.base_depth else reduction,
            }
            for i in range(len(self.blocks))
        ]


class SemanticTokenViTDistilled(SemanticTokenViT, VisionTransformerDistilled):
    """The STViT twin of a distilled DeiT: its two heads read the class and the distillation token, which are kept."""


SemanticTokenViT.distilled = SemanticTokenViTDistilled


def as_pair(value: Any) -> tuple[int, int]:
    """(rows, columns) of one number or of a pair."""
    return (value, value) if isinstance(value, int) else tuple(value)


def _keep_prefix(host: VisionTransformer, wanted: bool | None, *, everything: bool) -> bool:
    """Whether prefix tokens stay: as asked, else when the head reads them or hands all tokens out."""
    if not host.num_prefix_tokens:
        return False
    distilled = isinstance(host, VisionTransformerDistilled)
    refined = host.global_pool == "prr" and host.has_class_token
    if wanted is None:
        return everything or distilled or refined or host.global_pool in ("token", "")
    if not wanted and everything:
        raise ValueError(
            f"num_tokens='all' is the host's own computation, of which {model_name(host)}'s {host.num_prefix_tokens} "
            "prefix tokens are a part: keep_prefix=None or True is accepted"
        )
    if not wanted and (distilled or refined):
        raise ValueError(
            f"the head of {model_name(host)} reads its prefix tokens one by one: keep_prefix=None or True is accepted"
        )
    return wanted


def center_grid(num_tokens: NumTokens, grid: tuple[int, int]) -> tuple[int, int]:
    """(s_h, s_w) for ``num_tokens`` on a (rows, columns) grid.

    Raises:
        ValueError: not a square number, not a pair, or more centers than tokens along an axis.
    """
    if num_tokens is None:
        # The paper's 4 x 4 centers on 14 x 14 tokens, at the same density on other grids.
        rows, columns = (max(1, round(4 * size / 14)) for size in grid)
    elif isinstance(num_tokens, int) and not isinstance(num_tokens, bool):
        rows = columns = math.isqrt(max(num_tokens, 0))
        if num_tokens < 1 or rows * columns != num_tokens:
            raise ValueError(
                f"num_tokens {num_tokens} is not a perfect square; "
                "a square number, (rows, columns), None or 'all' is accepted"
            )
    elif isinstance(num_tokens, tuple | list) and len(num_tokens) == 2 and all(isinstance(n, int) for n in num_tokens):
        rows, columns = num_tokens
    else:
        raise ValueError(f"num_tokens {num_tokens!r}: a square number, (rows, columns), None or 'all' is accepted")
    if not (1 <= rows <= grid[0] and 1 <= columns <= grid[1]):
        raise ValueError(f"{rows}x{columns} semantic tokens do not fit a grid of {grid[0]}x{grid[1]} image tokens")
    return rows, columns
