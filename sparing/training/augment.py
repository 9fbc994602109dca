"""Augmentation: for image files transforms of torchvision.transforms.v2, for batches in memory tensor arithmetic."""

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from sparing.training.seeding import seeded, uniforms

__all__ = ["MixBatch", "eval_transform", "shift_and_flip", "train_transform"]

_SHIFT_STREAM, _MIX_STREAM = 2, 3


def shift_and_flip(
    images: Tensor, *, seed: int, epoch: int, indices: Tensor, max_shift: int = 2, flip: bool = True
) -> Tensor:
    """Move each image by up to ``max_shift`` pixels (zeros come in) and mirror half of them, all samples at once.

    Args:
        images: (batch, channels, height, width), any dtype.
        indices: (batch,) places of the samples in the data set; with ``seed`` and ``epoch`` they fix each draw.
    """
    height, width = images.shape[-2:]
    draws = uniforms(seed, epoch, indices, count=3, stream=_SHIFT_STREAM).to(images.device)
    offsets = (draws[:, :2] * (2 * max_shift + 1)).floor().long()
    rows = torch.arange(height, device=images.device) + offsets[:, :1]
    columns = torch.arange(width, device=images.device).expand(len(images), -1)
    if flip:
        columns = torch.where(draws[:, 2:] < 0.5, columns, width - 1 - columns)
    columns = columns + offsets[:, 1:]
    padded = torch.nn.functional.pad(images, (max_shift,) * 4)
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    return rearrange(padded[batch, :, rows[:, :, None], columns[:, None, :]], "b h w c -> b c h w")


def train_transform(
    size: tuple[int, int],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    scale: tuple[float, float] = (0.35, 1.0),
    rand_augment: int = 0,
    flip: bool = True,
) -> v2.Compose:
    """PIL image -> normalised (channels, height, width): random crop, mirror, ``rand_augment`` operations of
    RandAugment."""
    steps: list[Callable] = [
        v2.RandomResizedCrop(size, scale=scale, interpolation=InterpolationMode.BICUBIC, antialias=True)
    ]
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    if rand_augment:
        steps.append(v2.RandAugment(num_ops=rand_augment, magnitude=9))
    return v2.Compose([*steps, *_to_normalised(mean, std)])


def eval_transform(
    size: tuple[int, int], *, mean: Sequence[float], std: Sequence[float], crop_fraction: float = 1.0
) -> v2.Compose:
    """PIL image -> normalised (channels, height, width): resize the shorter side, centre crop."""
    resized = [round(side / crop_fraction) for side in size]
    resize = v2.Resize(min(resized) if size[0] == size[1] else resized, InterpolationMode.BICUBIC, antialias=True)
    return v2.Compose([resize, v2.CenterCrop(size), *_to_normalised(mean, std)])


def _to_normalised(mean: Sequence[float], std: Sequence[float]) -> list[Callable]:
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]


class MixBatch:
    """Mixup and CutMix of torchvision.transforms.v2 on a batch, seeded by its first sample.

    Args:
        num_classes: width of the soft targets.
        mixup: alpha of Mixup's Beta distribution, 0 = off.
        cutmix: alpha of CutMix's, 0 = off. With both on, each batch takes one of them at random.

    Call with images (batch, channels, height, width) and labels (batch,); returns mixed images and (batch,
    num_classes).
    """

    def __init__(self, num_classes: int, *, mixup: float = 0.0, cutmix: float = 0.0) -> None:
        choices: list[Callable] = []
        if mixup > 0:
            choices.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
        if cutmix > 0:
            choices.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))
        if not choices:
            raise ValueError(f"nothing to mix: mixup={mixup}, cutmix={cutmix}; one of them must be above 0")
        self.choice = v2.RandomChoice(choices)

    def __call__(
        self, images: Tensor, labels: Tensor, *, seed: int, epoch: int, indices: Tensor
    ) -> tuple[Tensor, Tensor]:
        with seeded(seed, epoch, int(indices[0]), stream=_MIX_STREAM):
            return self.choice(images, labels)
