"""The zoo's FlexDiT names: the published DiT sizes (DiT paper, table 1) at 256 and 512 pixels, patch 2, 1000 ImageNet
classes.

No FlexDiT weights are published. ``host_pretrained=True`` starts from the dense model's (DiT-XL/2 only) and gives a
twin that is 'converted, not trained': fine-tune it with ``sparing.recipes.finetune_flexdit``.
"""

from typing import Any

from sparing.diffusion.flexdit import FlexDiTTransformer2DModel
from sparing.diffusion.flexdit_hosts import published_split
from sparing.zoo.registry import register_model

__all__: list[str] = []

# name -> layers, heads, head width (width 384, 768, 1024, 1152)
_SIZES = {"s": (12, 6, 64), "b": (12, 12, 64), "l": (24, 16, 64), "xl": (28, 16, 72)}
_HOSTS = {("xl", 256): "facebook/DiT-XL-2-256", ("xl", 512): "facebook/DiT-XL-2-512"}


def _build(size: str, pixels: int, *, host_pretrained: bool = False, **kwargs: Any) -> FlexDiTTransformer2DModel:
    layers, heads, head_dim = _SIZES[size]
    latent = pixels // 8
    if host_pretrained:
        if (size, pixels) not in _HOSTS:
            raise ValueError(f"no published DiT-{size.upper()}/2 at {pixels} px; there are {sorted(_HOSTS.values())}")
        return FlexDiTTransformer2DModel.from_host(_HOSTS[size, pixels], **kwargs)
    split = published_split(layers, latent // 2)
    shape = {
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "sample_size": latent,
    }
    return FlexDiTTransformer2DModel(**{**shape, **split, **kwargs})


@register_model
def flexdit_s_2_256(pretrained: bool = False, **kwargs: Any) -> FlexDiTTransformer2DModel:
    """FlexDiT-S/2 at 256 pixels (latents of 32)."""
    return _build("s", 256, **kwargs)


@register_model
def flexdit_s_2_512(pretrained: bool = False, **kwargs: Any) -> FlexDiTTransformer2DModel:
    """FlexDiT-S/2 at 512 pixels (latents of 64)."""
    return _build("s", 512, **kwargs)


@register_model
def flexdit_b_2_256(pretrained: bool = False, **kwargs: Any) -> FlexDiTTransformer2DModel:
    """FlexDiT-B/2 at 256 pixels (latents of 32)."""
    return _build("b", 256, **kwargs)


@register_model
def flexdit_b_2_512(pretrained: bool = False, **kwargs: Any) -> FlexDiTTransformer2DModel:
    """FlexDiT-B/2 at 512 pixels (latents of 64)."""
    return _build("b", 512, **kwargs)


@register_model
def flexdit_l_2_256(pretrained: bool = False, **kwargs: Any) -> FlexDiTTransformer2DModel:
    """FlexDiT-L/2 at 256 pixels (latents of 32)."""
    return _build("l", 256, **kwargs)


@register_model
def flexdit_l_2_512(pretrained: bool = False, **kwargs: Any) -> FlexDiTTransformer2DModel:
    """FlexDiT-L/2 at 512 pixels (latents of 64)."""
    return _build("l", 512, **kwargs)


@register_model
def flexdit_xl_2_256(pretrained: bool = False, **kwargs: Any) -> FlexDiTTransformer2DModel:
    """FlexDiT-XL/2 at 256 pixels (latents of 32)."""
    return _build("xl", 256, **kwargs)


@register_model
def flexdit_xl_2_512(pretrained: bool = False, **kwargs: Any) -> FlexDiTTransformer2DModel:
    """FlexDiT-XL/2 at 512 pixels (latents of 64)."""
    return _build("xl", 512, **kwargs)
