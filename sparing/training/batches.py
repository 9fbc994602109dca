"""From a data set and an order of sample indices to batches of normalised tensors."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sparing.training.readers import ImageSet, TensorImages
from sparing.training.seeding import seeded

__all__ = ["Batch", "BatchSource", "FileBatches", "MemoryBatches", "fingerprint"]

_TRANSFORM_STREAM = 5
_FINGERPRINT_SAMPLES = 256
_FINGERPRINT_FILES = 16


class Batch(NamedTuple):
    """``images`` (batch, channels, height, width) float, ``labels`` and ``indices`` (batch,) int64."""

    images: Tensor
    labels: Tensor
    indices: Tensor
    epoch: int


class BatchSource(Protocol):
    """What a training loop needs of its data; ``num_classes`` is 0 where there are no labels."""

    num_classes: int

    def __len__(self) -> int: ...

    def batches(self, order: Tensor, *, batch_size: int, epoch: int) -> Iterator[Batch]:
        """Batches of the samples in ``order``; the last may be smaller."""


def fingerprint(samples: Tensor, labels: Tensor) -> str:
    """A short text that other data of the same shape very probably do not have: of all labels, and of samples at even
    distances.
    """
    stride = max(1, len(samples) // _FINGERPRINT_SAMPLES)
    digest = hashlib.sha256(str((tuple(samples.shape), samples.dtype)).encode())
    for tensor in (samples[::stride], labels):
        digest.update(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class MemoryBatches:
    """Batches of a data set in memory; augmentation works on the whole batch.

    Args:
        data: the images.
        mean: per channel, of images scaled to [0, 1].
        std: likewise.
        augment: called as ``augment(images, epoch=, indices=)`` on the uint8 batch, None = no augmentation.

    Raises:
        ValueError: there is no image.
    """

    def __init__(
        self,
        data: TensorImages,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Callable[..., Tensor] | None = None,
    ) -> None:
        if not len(data):
            raise ValueError("the data hold no images")
        self.data = data
        self.augment = augment
        self.fingerprint = fingerprint(data.images, data.labels)
        self.num_classes = int(data.labels.max()) + 1
        self.scale = 1.0 / (255.0 * torch.tensor(std)[:, None, None])
        self.offset = torch.tensor(mean)[:, None, None] / torch.tensor(std)[:, None, None]

    def __len__(self) -> int:
        return len(self.data)

    def batches(self, order: Tensor, *, batch_size: int, epoch: int) -> Iterator[Batch]:
        for indices in order.split(batch_size):
            images = self.data.images[indices]
            if self.augment is not None:
                images = self.augment(images, epoch=epoch, indices=indices)
            yield Batch(images * self.scale - self.offset, self.data.labels[indices], indices, epoch)


class _Transformed(Dataset):
    def __init__(self, data: ImageSet, transform: Callable, seed: int) -> None:
        self.data, self.transform, self.seed = data, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int]:
        epoch, index = key
        image, label = self.data.read(index)
        with seeded(self.seed, epoch, index, stream=_TRANSFORM_STREAM):
            return self.transform(image), label, index


class FileBatches:
    """Batches of encoded images, decoded and transformed one by one in ``num_workers`` processes.

    Args:
        data: the images.
        transform: PIL image to (channels, height, width); its random draws are seeded by (seed, epoch, sample index).
        seed: of the run.
        num_workers: 0 works in this process.
    """

    def __init__(self, data: ImageSet, transform: Callable, *, seed: int = 0, num_workers: int = 0) -> None:
        self.dataset = _Transformed(data, transform, seed)
        self.num_workers = num_workers
        self.num_classes = len(data.class_names)

    @cached_property
    def fingerprint(self) -> str:
        """Of the names of classes and a few decoded images at even distances."""
        data = self.dataset.data
        digest = hashlib.sha256(str((len(data), data.class_names)).encode())
        for index in range(0, len(data), max(1, len(data) // _FINGERPRINT_FILES)):
            image, label = data.read(index)
            digest.update(f"{image.size}{label}".encode() + image.tobytes())
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.dataset.data)

    def batches(self, order: Tensor, *, batch_size: int, epoch: int) -> Iterator[Batch]:
        keys = [[(epoch, int(index)) for index in indices] for indices in order.split(batch_size)]
        loader = DataLoader(
            self.dataset,
            batch_sampler=keys,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context="fork" if self.num_workers else None,
        )
        for images, labels, indices in loader:
            yield Batch(images, labels, indices, epoch)
