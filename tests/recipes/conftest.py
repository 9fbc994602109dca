"""A tiny ViT and tiny data, so that recipes run in seconds."""

import gzip
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from sparing.vision.micro import vit_micro_patch4_28


def _pack(array: np.ndarray) -> bytes:
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes())


@pytest.fixture
def idx_folder(tmp_path):
    """48 training and 20 test images, 28 x 28 grey, in which the brighter half names the class (0 upper, 1 lower)."""
    folder = tmp_path / "idx"
    folder.mkdir()
    random = np.random.default_rng(0)
    for name, count in (("train", 48), ("t10k", 20)):
        labels = (np.arange(count) % 2).astype(np.uint8)
        images = random.integers(0, 60, (count, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[14 * label : 14 * label + 14] += 150
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(_pack(images))
        (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(_pack(labels))
    return folder


@pytest.fixture
def picture_folder(tmp_path):
    """12 colour images of different sizes without labels."""
    folder = tmp_path / "pictures" / "below"
    folder.mkdir(parents=True)
    random = np.random.default_rng(1)
    for number in range(12):
        pixels = random.integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder.parent


def _tiny_vit(**changes):
    torch.manual_seed(0)
    return vit_micro_patch4_28(**({"embed_dim": 24, "depth": 4, "num_heads": 2, "num_classes": 2} | changes))


@pytest.fixture
def tiny_vit():
    """Makes a ViT of width 24 and depth 4 with two classes, always with the same weights."""
    return _tiny_vit
