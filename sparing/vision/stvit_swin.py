"""STViT on Swin, without recovery: from the middle of stage 2 on only the semantic tokens go on.

Chang et al., "Making Vision Transformers Efficient from A Token Sparsification View", CVPR 2023, section 3.2 with
Swin. No code of this form was published, and the paper leaves open which layers come before the generation and how
stage 3 reads the semantic map. Ours:

* stage 2 keeps ``base_depth`` ordinary blocks, the next two generate 3x3 tokens a window as STViT-R does
  (``dumbbell.py``), the others alternate between the tokens of one window and all of them;
* patch merging works on the semantic map (6x6 -> 3x3 at 224 pixels), zero-padded where it is odd;
* stage 3 runs on what comes out; a map no larger than a window is one window of its own size.

The paper's cost figures belong to its own layout and are not claimed; count this one with ``sparing.profile``.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from sparing.vision.dumbbell import GenerationBlock, SemanticBlock
from sparing.vision.stvit_r import DUMBBELL_STAGE, STViTR, initialise
from sparing.vision.swin import SwinArchitecture, SwinBlock, swin_unsupported
from sparing.vision.swin_stages import Stage, UnitOptions

__all__ = ["STViTSwin"]

GENERATION_DEPTH = 2


class _SemanticStage(Stage):
    """Ordinary blocks, generation, semantic blocks: image map in, semantic map out."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, rows*s, columns*s, C)"""
        semantic: Tensor | None = None
        for block in self.blocks:
            if isinstance(block, GenerationBlock):
                semantic = self.run(block, x, None if block.order == 1 else semantic)
            elif isinstance(block, SemanticBlock):
                semantic = self.run(block, semantic)
            else:
                x = self.run(block, x)
        assert semantic is not None
        return semantic


class STViTSwin(STViTR):
    """STViT twin of a Swin classifier; weights and names as in :class:`~sparing.vision.stvit_r.STViTR`.

    Args:
        base_depth: ordinary blocks of stage 2 before the generation; None: 2 of 6, 10 of 18 (half of a deep stage and
            one more).
        sample_window_size: side of each window's set of semantic tokens; 'all' keeps Swin as it is.
        scope: 'global' (image sides whole windows) or 'window' (any size), as in STViT-R.
        shortcut, mask_mode, key_windows, use_conv_pos: as in STViT-R.
        arguments: see STViTR; ``dense=True`` is refused.

    Raises:
        ValueError: no semantic block is left, or sizes that do not fit; the numbers are named.
    """

    method: ClassVar[str] = "stvit_swin"

    def __init__(
        self,
        *,
        base_depth: int | None = None,
        sample_window_size: int | Literal["all"] = 3,
        scope: Literal["global", "window"] = "global",
        shortcut: bool = True,
        mask_mode: Literal["exact", "reference", "none"] = "exact",
        key_windows: Sequence[int] | None = None,
        use_conv_pos: bool = False,
        device: Any = None,
        dtype: Any = None,
        **arguments: Any,
    ) -> None:
        if arguments.get("dense"):
            raise ValueError("STViT without recovery keeps no map of the image's grid: use STViT-R for dense=True")
        super().__init__(sample_window_size="all", device=device, dtype=dtype, **arguments)
        depth = self.architecture.depths[DUMBBELL_STAGE]
        base = (2 if depth <= 6 else depth // 2 + 1) if base_depth is None else base_depth
        options = {
            "sample_window_size": sample_window_size,
            "scope": scope,
            "shortcut": shortcut,
            "mask_mode": mask_mode,
            "key_windows": None if key_windows is None else list(key_windows),
            "use_conv_pos": use_conv_pos,
        }
        self._knobs = {**options, "base_depth": base}
        if sample_window_size == "all":
            return
        if base < 1 or base + GENERATION_DEPTH >= depth:
            raise ValueError(
                f"base_depth {base} + {GENERATION_DEPTH} generation blocks leave no semantic block of stage 2's "
                f"{depth}; 1 to {depth - GENERATION_DEPTH - 1} are accepted"
            )
        self.status = "converted, not trained"
        factory = {"device": device, "dtype": dtype}
        units = UnitOptions(**options)  # type: ignore[arg-type]
        self.layers[DUMBBELL_STAGE] = _semantic_stage(self.architecture, units, base, **factory).apply(initialise)
        self.layers[3] = _last_stage(self.architecture, **factory).apply(initialise)
        stride = self.architecture.patch_size * 4 * self.architecture.windows[DUMBBELL_STAGE] / units.sample_window_size
        for stage, reduction in ((DUMBBELL_STAGE, stride), (3, 2 * stride)):
            self.feature_info[stage]["reduction"] = reduction

    @classmethod
    def why_not(cls, host: nn.Module) -> list[str]:
        reasons = swin_unsupported(host)
        needed = GENERATION_DEPTH + 2
        if not reasons and (depth := len(host.layers[DUMBBELL_STAGE].blocks)) < needed:
            reasons = [f"stage 2 has {depth} blocks, {needed} are needed"]
        return reasons

    def forward_intermediates(self, x: Tensor, *args: Any, full_resolution: bool = False, **kwargs: Any) -> Any:
        """As STViTR's; maps of stages 2 and 3 are semantic. ``full_resolution`` insists on the image's grid.

        Raises:
            ValueError: ``full_resolution`` for a stage that has semantic tokens only.
        """
        if full_resolution and self._knobs["sample_window_size"] != "all":
            raise ValueError("stages 2 and 3 hold semantic tokens, not the image's grid: STViT-R restores it")
        return super().forward_intermediates(x, *args, **kwargs)


def _semantic_stage(architecture: SwinArchitecture, units: UnitOptions, base: int, **factory: Any) -> Stage:
    stage, dim = DUMBBELL_STAGE, architecture.dim(DUMBBELL_STAGE)
    options = units.for_window(architecture.windows[stage])
    blocks: list[nn.Module] = []
    for index in range(architecture.depths[stage]):
        step = index - base
        if step < 0:
            blocks.append(architecture.make_window_block(stage, index, shifted=index % 2 == 1, **factory))
            continue
        arguments = {
            **architecture.block_arguments(stage, index),
            "attn_drop": architecture.attn_drop_rate,
            "layer_scale": architecture.layer_scale_init,
            **factory,
        }
        if step == 0:
            blocks.append(GenerationBlock(dim, options, order=1, conv_pos=units.use_conv_pos, **arguments))
        elif step == 1:
            blocks.append(GenerationBlock(dim, options, order=2, **arguments))
        else:
            blocks.append(SemanticBlock(dim, options, local=step % 2 == 0, **arguments))
    return _SemanticStage(blocks, architecture.make_merging(stage, **factory))


def _last_stage(architecture: SwinArchitecture, **factory: Any) -> Stage:
    """Stage 3 by our window blocks: timm's pad a map smaller than a window, and the padding is attended to."""
    window = architecture.windows[3]
    blocks = [
        SwinBlock(
            architecture.dim(3),
            window=window,
            shift=window // 2 if index % 2 else 0,
            clip_window=True,
            layer_scale=architecture.layer_scale_init if architecture.use_layer_scale else None,
            **architecture.block_arguments(3, index),
            **factory,
        )
        for index in range(architecture.depths[3])
    ]
    return Stage(blocks, None)
