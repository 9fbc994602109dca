"""Stages of Swin twins: ordinary stages, and the dumbbell stage of STViT-R with its options."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparing.vision.dumbbell import BLOCKS_PER_UNIT, DumbbellOptions, GenerationBlock, RecoveryBlock, SemanticBlock
from sparing.vision.semantic_windows import MaskMode
from sparing.vision.swin import PatchMerging, SwinArchitecture

__all__ = ["Stage", "UnitOptions", "dumbbell_depth_reason", "dumbbell_stage", "ordinary_stage"]


class Stage(nn.Module):
    """Blocks of one stage and the patch merging after them; ``semantic_token2`` is G of the first dumbbell unit."""

    def __init__(
        self, blocks: Iterable[nn.Module], downsample: PatchMerging | None, centers: Tensor | None = None
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.semantic_token2 = None if centers is None else nn.Parameter(centers)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Image map (B, H, W, C) -> the same shape, before merging."""
        semantic: Tensor | None = None
        for index, block in enumerate(self.blocks):
            if isinstance(block, GenerationBlock):
                centers = self.semantic_token2 if index == 2 else None
                semantic = self.run(block, x, None if block.order == 1 else semantic, centers)
            elif isinstance(block, SemanticBlock):
                semantic = self.run(block, semantic)
            elif isinstance(block, RecoveryBlock):
                x = self.run(block, x, semantic)
            else:
                x = self.run(block, x)
        return x

    def run(self, block: nn.Module, *inputs: Tensor | None) -> Tensor:
        """One block, its activations recomputed in the backward pass under gradient checkpointing."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)  # type: ignore[no-any-return]
        return block(*inputs)  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class UnitOptions:
    """Options of the dumbbell stage as the published code names them; the last four are off in the published weights.

    Args:
        sample_window_size: side of each window's set of semantic tokens.
        scope: 'global' (classifier) or 'window' (dense).
        mask_mode: 'exact', 'reference' or 'none'.
        shortcut: whether generation 1 adds its centres (dense form and paper: yes; published classifier: no).
        key_windows: sides of the key windows of generation 1, generation 2 (image positions) and recovery (semantic
            tokens); None for those published, scaled to the window (10 of 14, or 14, 21 and 27).
        use_global: learnable global centres G in the first unit, for one image size.
        use_conv_pos: a depthwise convolution of the centres inside their window as their position.
        relative_pos: relative position bias in the semantic blocks, for one image size.
    """

    sample_window_size: int = 3
    scope: Literal["global", "window"] = "global"
    mask_mode: MaskMode = "exact"
    shortcut: bool = True
    key_windows: Sequence[int] | None = None
    use_global: bool = False
    use_conv_pos: bool = False
    relative_pos: bool = False

    def for_window(self, window: int) -> DumbbellOptions:
        """The same for a stage with windows of side ``window``."""
        samples = self.sample_window_size
        if self.key_windows is None:
            first = window + round(window * 3 / 7) if self.scope == "global" else 2 * window
            sides: Sequence[int] = (first, 3 * window, 9 * samples)
        else:
            sides = self.key_windows
        if len(sides) != 3:
            raise ValueError(f"key_windows={list(sides)}: three sides are needed: generation 1, generation 2, recovery")
        return DumbbellOptions(
            window=window,
            samples=samples,
            scope=self.scope,
            mask_mode=self.mask_mode,
            residual_centers=self.shortcut,
            key_windows=(sides[0], sides[1], sides[2]),
        )


def dumbbell_depth_reason(depth: int) -> str:
    """Why a stage of ``depth`` blocks cannot be cut into dumbbell units; empty when it can."""
    if depth % BLOCKS_PER_UNIT == 0:
        return ""
    return (
        f"stage 2 has {depth} blocks; a dumbbell unit takes six, so its depth must be a multiple of {BLOCKS_PER_UNIT}"
    )


def ordinary_stage(architecture: SwinArchitecture, stage: int, **factory: Any) -> Stage:
    """A Swin stage: odd blocks are shifted by half a window."""
    blocks = [
        architecture.make_window_block(stage, index, shifted=index % 2 == 1, **factory)
        for index in range(architecture.depths[stage])
    ]
    return Stage(blocks, architecture.make_merging(stage, **factory))


def dumbbell_stage(architecture: SwinArchitecture, stage: int, units: UnitOptions, **factory: Any) -> Stage:
    """A chain of dumbbell units, with G when ``use_global``.

    Raises:
        ValueError: depth, image size or options do not fit, with the numbers.
    """
    if reason := dumbbell_depth_reason(architecture.depths[stage]):
        raise ValueError(reason)
    if units.use_global and units.scope == "window":
        raise ValueError("use_global needs scope='global': its centres belong to one fixed image size")
    options = units.for_window(architecture.windows[stage])
    rows, columns = (-(-side // options.window) * options.samples for side in architecture.map_size(stage))
    if units.relative_pos and rows != columns:
        raise ValueError(f"relative_pos needs a square semantic map, this image size gives {rows}x{columns}")
    relative_sides = {3: options.samples, 4: rows} if units.relative_pos else {}
    dim = architecture.dim(stage)
    blocks: list[nn.Module] = []
    for index in range(architecture.depths[stage]):
        role = index % BLOCKS_PER_UNIT
        if role == 0:
            blocks.append(architecture.make_window_block(stage, index, shifted=False, scaled=False, **factory))
            continue
        arguments = {
            **architecture.block_arguments(stage, index),
            "attn_drop": architecture.attn_drop_rate,
            "layer_scale": architecture.layer_scale_init,
            "relative_side": relative_sides.get(role),
            **factory,
        }
        if role == 1:
            blocks.append(GenerationBlock(dim, options, order=1, conv_pos=units.use_conv_pos, **arguments))
        elif role == 2:
            blocks.append(GenerationBlock(dim, options, order=2, **arguments))
        elif role == 5:
            blocks.append(RecoveryBlock(dim, options, **arguments))
        else:
            blocks.append(SemanticBlock(dim, options, local=role == 3, **arguments))
    centers = trunc_normal_(torch.empty(1, rows * columns, dim, **factory), std=0.02) if units.use_global else None
    return Stage(blocks, architecture.make_merging(stage, **factory), centers)
