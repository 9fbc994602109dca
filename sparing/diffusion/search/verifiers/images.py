"""Samples as the numbers that verifiers compute on: float32 in [0, 1], three channels; resized as encoders expect."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import reduce
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

__all__ = ["Preprocessing", "as_images", "flat_mean", "luma", "to_pil"]

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_SLACK = 1e-3  # decoders overshoot [0, 1] by rounding


def as_images(samples: Any, *, name: str) -> Tensor:
    """Images ``(B, 3, H, W)`` float32 in [0, 1] from a tensor of 1 or 3 channels or from PIL images of one size.

    Grey becomes three equal channels. Gradients pass.

    Args:
        name: the verifier that asks, for messages.

    Raises:
        ValueError: samples are no images, integers, or outside [0, 1].
    """
    if isinstance(samples, Sequence) and len(samples) and all(isinstance(sample, Image.Image) for sample in samples):
        sizes = {sample.size for sample in samples}
        if len(sizes) > 1:
            raise ValueError(f"verifier {name!r} scores images of one size at a time, got {sorted(sizes)}")
        samples = torch.stack([pil_to_tensor(sample.convert("RGB")) for sample in samples]).float() / 255
    if not isinstance(samples, Tensor):
        raise ValueError(f"verifier {name!r} takes image tensors or PIL images, got {type(samples).__name__}")
    if samples.ndim == 5:
        raise ValueError(
            f"verifier {name!r} takes images (B, 3, H, W), got video {tuple(samples.shape)}: wrap it in OnFrames(...)"
        )
    if samples.ndim != 4 or samples.shape[1] not in (1, 3):
        raise ValueError(f"verifier {name!r} takes images (B, 3, H, W), got {tuple(samples.shape)}")
    if not samples.is_floating_point():
        raise ValueError(f"verifier {name!r} takes floats in [0, 1], got {samples.dtype}: divide by 255")
    images = samples if samples.dtype == torch.float64 else samples.float()
    if images.numel():
        low, high = images.detach().aminmax()
        if low < -_SLACK or high > 1 + _SLACK:
            raise ValueError(f"verifier {name!r} takes images in [0, 1], got values from {low:.3g} to {high:.3g}")
    return images.expand(-1, 3, -1, -1)


def luma(images: Tensor) -> Tensor:
    """Brightness ``(B, H, W)`` of colour images ``(B, 3, H, W)``: .299 R + .587 G + .114 B."""
    return torch.einsum("bchw,c->bhw", images, images.new_tensor(_LUMA))


def to_pil(samples: Any, *, name: str) -> list[Image.Image]:
    """Samples as PIL images (RGB), rounded to 8 bits."""
    if isinstance(samples, Sequence) and all(isinstance(sample, Image.Image) for sample in samples):
        return [sample.convert("RGB") for sample in samples]
    pixels = (as_images(samples, name=name).detach().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in pixels]


class Preprocessing:
    """Resize, crop and normalise a batch, as an encoder was trained to see images.

    Args:
        size: ``(height, width)`` of the encoder's input; None leaves images as they are.
        mean, std: per channel; None: no normalisation.
        interpolation: 'bicubic' or 'bilinear' (with antialiasing).
        crop_pct: the shorter side becomes ``size / crop_pct`` before the centre crop (timm's habit).
        channels: 1 averages to luma.
    """

    def __init__(
        self,
        size: tuple[int, int] | None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        interpolation: str = "bicubic",
        crop_pct: float = 1.0,
        channels: int = 3,
    ) -> None:
        if channels not in (1, 3):
            raise ValueError(f"encoders take 1 or 3 channels, got {channels}")
        self.size, self.channels = size, channels
        self.mean, self.std = mean, std
        self.interpolation = interpolation if interpolation in ("bicubic", "bilinear") else "bicubic"
        self.crop_pct = crop_pct

    @classmethod
    def of(cls, model: nn.Module) -> "Preprocessing":
        """What a timm or ``sparing`` model's ``pretrained_cfg`` says; a model without one gets images as they are."""
        cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
        if cfg is None:
            return cls(None)
        from timm.data import resolve_data_config

        found = resolve_data_config(pretrained_cfg=cfg if isinstance(cfg, Mapping) else cfg.to_dict(), model=model)
        channels, height, width = found["input_size"]
        return cls(
            (height, width),
            mean=found["mean"],
            std=found["std"],
            interpolation=found["interpolation"],
            crop_pct=found["crop_pct"],
            channels=channels,
        )

    @classmethod
    def of_clip(cls, model: nn.Module) -> "Preprocessing":
        """What an open_clip model's image tower says (size, mean, std)."""
        from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

        visual: Any = model.visual
        size = visual.image_size if isinstance(visual.image_size, tuple | list) else (visual.image_size,) * 2
        cfg = getattr(visual, "preprocess_cfg", None) or {}
        mean, std = cfg.get("mean") or OPENAI_DATASET_MEAN, cfg.get("std") or OPENAI_DATASET_STD
        return cls((size[0], size[1]), mean=mean, std=std, interpolation=cfg.get("interpolation") or "bicubic")

    def __call__(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` in [0, 1] to what the encoder takes."""
        if self.size is not None and (images.shape[-2:] != self.size or self.crop_pct != 1.0):
            images = self._resized(images, self.size)
        if self.channels == 1:
            images = luma(images)[:, None]
        for numbers, apply in ((self.mean, torch.sub), (self.std, torch.div)):
            if numbers is not None:
                images = apply(images, images.new_tensor(numbers)[:, None, None])
        return images

    def _resized(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Shorter side to size (over crop_pct), then the centre of it, so that nothing is stretched."""
        height, width = images.shape[-2:]
        wanted = [int(side / self.crop_pct) for side in size]
        scale = max(wanted[0] / height, wanted[1] / width)
        between = (max(round(height * scale), size[0]), max(round(width * scale), size[1]))
        images = nn.functional.interpolate(
            images, size=between, mode=self.interpolation, antialias=True, align_corners=False
        )
        top, left = (between[0] - size[0]) // 2, (between[1] - size[1]) // 2
        return images[..., top : top + size[0], left : left + size[1]].clamp(0, 1)


def flat_mean(values: Tensor) -> Tensor:
    """Mean of everything but the batch: ``(B, ...)`` -> ``(B,)``."""
    return reduce(values, "b ... -> b", "mean")
