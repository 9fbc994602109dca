"""A small plain ViT for 28 x 28 grey images, the host of the demo, and its STViT twin.

DeiT's shape at a size that trains on two CPU cores: 7 x 7 patches of 4 x 4 pixels, width 96, 8 blocks, no class
token, the
mean over the tokens is classified. The twin keeps two blocks on the 49 patch tokens, generates 3 x 3 semantic tokens
in the next
two and ends with four blocks on those (CVPR 2023, the segments of its supplement's table 1 scaled to 8 blocks).
"""

from typing import Any

from timm.models.vision_transformer import VisionTransformer

from sparing.vision.stvit import SemanticTokenViT
from sparing.zoo.registry import register_model

__all__ = [
    "FASHION_CLASSES",
    "FASHION_MEAN",
    "FASHION_STD",
    "stvit_vit_micro_patch4_28",
    "vit_micro_patch4_28",
]

# names of the ten labels, in the order of the data set (github.com/zalandoresearch/fashion-mnist)
FASHION_CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
# over the pixels of the 60,000 training images, scaled to [0, 1]
FASHION_MEAN, FASHION_STD = (0.2860,), (0.3530,)


@register_model(timm=True)
def vit_micro_patch4_28(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT, patch 4, 28 x 28, width 96, depth 8, 3 heads, 10 classes."""
    shape = {
        "img_size": 28,
        "patch_size": 4,
        "in_chans": 1,
        "num_classes": 10,
        "embed_dim": 96,
        "depth": 8,
        "num_heads": 3,
        "class_token": False,
        "global_pool": "avg",
    }
    model = VisionTransformer(**(shape | kwargs))
    side = model.patch_embed.img_size
    model.pretrained_cfg = model.default_cfg = {
        "architecture": "vit_micro_patch4_28",
        "input_size": (shape["in_chans"], *side),
        "mean": FASHION_MEAN,
        "std": FASHION_STD,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "num_classes": model.num_classes,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "label_names": FASHION_CLASSES,
        "license": "apache-2.0",
    }
    return model


@register_model(timm=True)
def stvit_vit_micro_patch4_28(
    pretrained: bool = False, *, num_tokens: int | tuple[int, int] | str = 9, base_depth: int = 2, **kwargs: Any
) -> SemanticTokenViT:
    """STViT twin of ``vit_micro_patch4_28``: base of 2 blocks, generation of 2, 3 x 3 semantic tokens, 58% fewer
    FLOPs."""
    host = vit_micro_patch4_28(**kwargs)
    return SemanticTokenViT.from_host(host, num_tokens=num_tokens, base_depth=base_depth)
