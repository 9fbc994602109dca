"""Verifiers that need no weights: sharpness, contrast, colour, entropy, JPEG size, brightness. Easy to hack, and so
good for trying a search out, for floors, and for showing what hacking looks like.
"""

import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparing.diffusion.search.verifiers.base import Verifier
from sparing.diffusion.search.verifiers.images import as_images, flat_mean, luma, to_pil

__all__ = ["Brightness", "Colorfulness", "Compressibility", "Contrast", "Entropy", "Sharpness"]


class Sharpness(Verifier):
    """Variance of the 3 x 3 Laplacian of luma, over the pixels that have all four neighbours."""

    name, differentiable = "sharpness", True

    def measure(self, samples: Any, prompts: Sequence[Any]) -> Tensor:
        grey = luma(as_images(samples, name=self.name))
        if min(grey.shape[1:]) < 3:
            raise ValueError(f"verifier 'sharpness' needs images of at least 3 x 3 pixels, got {tuple(grey.shape[1:])}")
        kernel = grey.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
        edges = nn.functional.conv2d(grey[:, None], kernel[None, None])
        return edges.flatten(1).var(dim=1, unbiased=False)


class Contrast(Verifier):
    """Standard deviation of luma."""

    name, differentiable = "contrast", True

    def measure(self, samples: Any, prompts: Sequence[Any]) -> Tensor:
        return luma(as_images(samples, name=self.name)).flatten(1).std(dim=1, unbiased=False)


class Colorfulness(Verifier):
    """sqrt(s_rg^2 + s_yb^2) + .3 sqrt(m_rg^2 + m_yb^2) of the opponent colours rg = R - G and yb = (R + G) / 2 - B.

    Hasler and Suesstrunk, "Measuring colourfulness in natural images", 2003; on images in [0, 1] (times 255 for the
    paper's scale). 0 for grey images.
    """

    name, differentiable = "colorfulness", True

    def measure(self, samples: Any, prompts: Sequence[Any]) -> Tensor:
        red, green, blue = as_images(samples, name=self.name).unbind(dim=1)
        opponents = torch.stack([red - green, (red + green) / 2 - blue], dim=1).flatten(2)
        # var + mean^2 under one root each; the tiny number keeps the gradient finite for grey images
        spread = (opponents.var(dim=2, unbiased=False).sum(dim=1) + 1e-20).sqrt()
        centre = (opponents.mean(dim=2).square().sum(dim=1) + 1e-20).sqrt()
        return spread + 0.3 * centre


class Entropy(Verifier):
    """Entropy of the 256-bin histogram of luma, in bits (0 to 8)."""

    name = "entropy"

    def measure(self, samples: Any, prompts: Sequence[Any]) -> Tensor:
        grey = luma(as_images(samples, name=self.name).clamp(0, 1)).flatten(1)
        bins = (grey * 255).round().long()
        counts = torch.zeros(len(bins), 256, device=bins.device).scatter_add_(1, bins, torch.ones_like(grey).float())
        share = counts / counts.sum(dim=1, keepdim=True)
        return -torch.xlogy(share, share).sum(dim=1) / torch.log(torch.tensor(2.0))


class Compressibility(Verifier):
    """Minus the kilobytes of the image as JPEG; ``-Compressibility()`` rewards detail instead.

    Args:
        quality: of the JPEG.
    """

    name = "compressibility"

    def __init__(self, *, quality: int = 95) -> None:
        if not 1 <= quality <= 100:
            raise ValueError(f"quality of a JPEG is 1 to 100, got {quality}")
        self.quality = quality

    def measure(self, samples: Any, prompts: Sequence[Any]) -> list[float]:
        return [-self._bytes(image) / 1000 for image in to_pil(samples, name=self.name)]

    def _bytes(self, image: Any) -> int:
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=self.quality)
        return buffer.tell()


class Brightness(Verifier):
    """Minus the distance of mean luma from ``target`` (1: the brighter the better).

    Args:
        target: in [0, 1].
    """

    name, differentiable = "brightness", True

    def __init__(self, target: float = 1.0) -> None:
        if not 0 <= target <= 1:
            raise ValueError(f"target of brightness is in [0, 1], got {target}")
        self.target = target

    def measure(self, samples: Any, prompts: Sequence[Any]) -> Tensor:
        return -(flat_mean(luma(as_images(samples, name=self.name))) - self.target).abs()
