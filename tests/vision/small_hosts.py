"""timm's own ViTs at sizes that a test can afford: classes and options of the real names, few and narrow blocks."""

from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

# key -> (timm name, what differs beside depth, width and image size)
HOSTS: dict[str, tuple[str, dict[str, Any]]] = {
    "deit": ("deit_tiny_patch16_224", {}),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {}),
    "vit_small": ("vit_small_patch16_224", {}),
    "clip": ("vit_base_patch16_clip_224", {}),
    "clip_quickgelu": ("vit_base_patch16_clip_quickgelu_224", {}),
    "siglip": ("vit_base_patch16_siglip_224", {}),
    "siglip_gap": ("vit_base_patch16_siglip_gap_224", {}),
    "dinov2": ("vit_small_patch14_dinov2", {}),
    "dinov2_reg4": ("vit_small_patch14_reg4_dinov2", {}),
    "dinov2_giant": ("vit_giant_patch14_dinov2", {}),
    "so150m": ("vit_so150m_patch16_reg4_gap_256", {}),
    "so150m_map": ("vit_so150m_patch16_reg4_map_256", {}),
    "so150m2": ("vit_so150m2_patch16_reg1_gap_256", {}),
    "norms": ("vit_small_patch16_224", {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True}),
    "prr": ("vit_small_patch16_224", {"global_pool": "prr"}),
    "dynamic": ("vit_small_patch16_224", {"dynamic_img_size": True}),
}
DEPTH, WIDTH, HEADS, GRID = 6, 48, 3, 7


def small_host(key: str = "deit", **overrides: Any) -> VisionTransformer:
    """The host ``key`` with 6 blocks of width 48 on 7 x 7 tokens; all parameters random, none of them trivial."""
    name, options = HOSTS[key]
    patch = 14 if "patch14" in name else 16
    sizes = {"depth": DEPTH, "embed_dim": WIDTH, "num_heads": HEADS, "img_size": GRID * patch, "num_classes": 10}
    host = timm.create_model(name, **{**sizes, **options, **overrides})
    return randomized(host).eval()


def randomized(model: torch.nn.Module, *, seed: int = 0) -> Any:
    """Norm scales around 1, biases and tokens around 0, LayerScale in [0.5, 1]: a wrong or dropped one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("gamma"):
                parameter.copy_(0.5 + 0.5 * torch.rand(parameter.shape, generator=generator))
            elif parameter.ndim == 1:
                parameter.copy_(noise * 0.1 + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
            else:
                parameter.copy_(noise * (0.3 if parameter.ndim == 3 else parameter[0].numel() ** -0.5))
    return model


def images_for(model: VisionTransformer, *, batch: int = 2, seed: int = 1) -> Tensor:
    """(batch, 3, height, width) of the size that ``model`` takes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *model.patch_embed.img_size, generator=generator)
