"""The simple pyramid of ViTDet: maps of four strides from the last map of a plain ViT.

Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", ECCV 2022, section 3: strides 1/4,
1/2, 1 and 2 of the patch (4, 8, 16 and 32 pixels for patch 16) by two transposed convolutions, one, none, and a max
pool; each then has 1x1 convolution, LayerNorm, 3x3 convolution, LayerNorm.
"""

from typing import Any

from timm.layers import LayerNorm2d
from torch import Tensor, nn

__all__ = ["SimplePyramid"]


class SimplePyramid(nn.Module):
    """One map (batch, dim, h, w) -> four (batch, out_channels, ...) of 4h, 2h, h and floor(h/2) rows.

    Args:
        dim: channels of the ViT's map, a multiple of 4.
        out_channels: of every level.
    """

    def __init__(self, dim: int, out_channels: int = 256, **factory: Any) -> None:
        super().__init__()
        if dim % 4:
            raise ValueError(f"the simple pyramid halves the width twice: {dim} channels are no multiple of 4")

        def double(width: int) -> nn.Module:
            return nn.ConvTranspose2d(width, width // 2, 2, stride=2, **factory)

        self.scales = nn.ModuleList(
            [
                nn.Sequential(double(dim), LayerNorm2d(dim // 2, **factory), nn.GELU(), double(dim // 2)),
                double(dim),
                nn.Identity(),
                nn.MaxPool2d(2),
            ]
        )
        self.levels = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, out_channels, 1, bias=False, **factory),
                LayerNorm2d(out_channels, **factory),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False, **factory),
                LayerNorm2d(out_channels, **factory),
            )
            for width in (dim // 4, dim // 2, dim, dim)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        return [level(scale(x)) for scale, level in zip(self.scales, self.levels)]
