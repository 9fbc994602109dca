"""A small class-conditional DiT in pixel space for 28 x 28 grey images, and FlexDiTs made from it.

DiT's shape at a size that trains on two CPU cores: 7 x 7 patches of 4 x 4 pixels, width 64, 12 blocks, 4 heads, learned
variances, ten classes. The FlexDiT keeps the split published for 12 layers (one pooling block, two
sparse-dense modules, one dense block) and runs its sparse blocks on 3 x 3 tokens; ``_low`` has no dense block inside
the modules, which saves more than half of the dense FLOPs. Trained by ``benchmarks/flexdit_quality.py``.
"""

from typing import Any

from sparing.diffusion.flexdit import FlexDiTTransformer2DModel
from sparing.zoo.registry import register_model

__all__ = [
    "MICRO_SHAPE",
    "SPLITS",
    "dit_micro_patch4_28",
    "flexdit_dit_micro_patch4_28",
    "flexdit_dit_micro_patch4_28_low",
]

MICRO_SHAPE: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "in_channels": 1,
    "out_channels": 2,
    "num_layers": 12,
    "sample_size": 28,
    "patch_size": 4,
    "num_embeds_ada_norm": 10,
}
# block splits of 12 layers
SPLITS: dict[str, dict[str, Any]] = {
    "dense": {"num_pooling": 0, "num_sdtm": 0, "sdtm_group": [1, 2, 1, 1], "num_dense_top": 12},
    "published": {"num_pooling": 1, "num_sdtm": 2, "sdtm_group": [1, 2, 1, 1], "num_dense_top": 1},
    "low": {"num_pooling": 1, "num_sdtm": 2, "sdtm_group": [1, 3, 1, 0], "num_dense_top": 1},
}


def _build(split: str, **kwargs: Any) -> FlexDiTTransformer2DModel:
    return FlexDiTTransformer2DModel(**{**MICRO_SHAPE, **SPLITS[split], "density_table": 3, **kwargs})


@register_model
def dit_micro_patch4_28(pretrained: bool = False, **kwargs: Any) -> FlexDiTTransformer2DModel:
    """The dense DiT: every block on all 49 tokens."""
    return _build("dense", **kwargs)


@register_model
def flexdit_dit_micro_patch4_28(pretrained: bool = False, **kwargs: Any) -> FlexDiTTransformer2DModel:
    """FlexDiT with the published split of 12 layers, 9 sparse tokens: 58% of the dense FLOPs."""
    return _build("published", **kwargs)


@register_model
def flexdit_dit_micro_patch4_28_low(pretrained: bool = False, **kwargs: Any) -> FlexDiTTransformer2DModel:
    """FlexDiT without dense blocks inside its modules, 9 sparse tokens: 44% of the dense FLOPs."""
    return _build("low", **kwargs)
