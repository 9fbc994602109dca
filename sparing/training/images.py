"""From a model and the name of a data set to batches at the model's own size and normalisation."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from sparing.training.augment import eval_transform, shift_and_flip, train_transform
from sparing.training.batches import FileBatches, MemoryBatches
from sparing.training.readers import TensorImages, open_images

__all__ = ["ImageSettings", "image_batches"]


@dataclass(frozen=True)
class ImageSettings:
    """How training images are varied and read."""

    rand_augment: int = field(default=0, metadata={"help": "operations of RandAugment on image files, 0 = off"})
    smallest_crop: float = field(default=0.35, metadata={"help": "share of an image file that a random crop keeps"})
    max_shift: int = field(default=2, metadata={"help": "pixels that images in memory are moved by at most"})
    flip: bool = field(default=True, metadata={"help": "mirror half of the training images"})
    num_workers: int = field(default=0, metadata={"help": "processes that decode image files"})


def image_batches(
    model: nn.Module,
    data: str,
    *,
    split: str = "train",
    augment: bool = False,
    labelled: bool = True,
    settings: ImageSettings | None = None,
    seed: int = 0,
) -> MemoryBatches | FileBatches:
    """Batches for a model with timm's ``pretrained_cfg`` (input size, mean, std, crop fraction).

    Args:
        model: decides size, channels and normalisation.
        data: see :func:`sparing.training.open_images`.
        split: 'train' or 'test'.
        augment: vary the images as ``settings`` says; else resize and crop as for evaluation.
        labelled: whether labels are needed.
        settings: see there.
        seed: of the augmentation.

    Raises:
        ValueError: the model states no input size, or images in memory have another size.
    """
    settings = settings or ImageSettings()
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    config = config if isinstance(config, dict) else config.to_dict()
    if "input_size" not in config:
        raise ValueError(f"this {type(model).__name__} has no pretrained_cfg with input_size, mean and std (timm's)")
    channels, height, width = config["input_size"]
    mean, std = config["mean"], config["std"]
    images = open_images(data, split=split, channels=channels, labelled=labelled)
    if isinstance(images, TensorImages):
        if images.images.shape[-2:] != (height, width):
            raise ValueError(
                f"{data} holds images of {' x '.join(map(str, images.images.shape[-2:]))}, "
                f"the model takes {height} x {width}"
            )
        vary = partial(shift_and_flip, seed=seed, max_shift=settings.max_shift, flip=settings.flip)
        return MemoryBatches(images, mean=mean, std=std, augment=vary if augment else None)
    if augment:
        transform = train_transform(
            (height, width),
            mean=mean,
            std=std,
            scale=(settings.smallest_crop, 1.0),
            rand_augment=settings.rand_augment,
            flip=settings.flip,
        )
    else:
        transform = eval_transform((height, width), mean=mean, std=std, crop_fraction=config.get("crop_pct") or 1.0)
    return FileBatches(images, transform, seed=seed, num_workers=settings.num_workers)
