"""Data sets by one string: gzipped idx, a folder a class, a folder of images, torchvision's own, WebDataset tar files.

Every reader gives a map-style data set, so that sampling, augmentation and resuming go by sample index. Images come
as PIL
images, or, from idx files, all at once as one uint8 tensor.
"""

import gzip
import io
import os
import struct
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

__all__ = ["ImageSet", "TensorImages", "open_images", "read_idx"]

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")
_IDX_NAMES = {"train": "train", "test": "t10k"}


@dataclass(frozen=True)
class TensorImages:
    """Images that fit into memory: ``images`` (count, channels, height, width) uint8, ``labels`` (count,) int64."""

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class ImageSet:
    """Encoded images: ``read(i)`` gives a PIL image in ``mode`` and a label (-1 where there is none)."""

    read: Callable[[int], tuple[Image.Image, int]]
    count: int
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.count


def open_images(
    source: str, *, split: str = "train", channels: int = 3, labelled: bool = True
) -> TensorImages | ImageSet:
    """Open a data set.

    Args:
        source: one of

            - a folder with gzipped (or plain) idx files named as MNIST's (``train-images-idx3-ubyte.gz``, ...);
            - ``torchvision/NAME@ROOT``, a class of ``torchvision.datasets`` already on disk;
            - ``*.tar`` or ``shards-{000..009}.tar``: WebDataset files, local; ``KEY.cls`` or ``KEY.json['label']`` is
            the label;
            - a folder with one folder a class (below a folder named ``split`` where there is one);
            - with ``labelled=False`` any folder: every image below it.
        split: 'train' or 'test'; a folder of files may call the latter 'val' or 'validation'.
        channels: 1 (grey) or 3 (RGB): files of the other kind are converted.
        labelled: whether labels are needed.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: it holds no images, or no labels where they are needed.
    """
    if split not in _IDX_NAMES:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    if source.startswith("torchvision/"):
        return _torchvision(source, split=split, channels=channels)
    if source.endswith(".tar"):
        return _webdataset(source, channels=channels, labelled=labelled)
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {source!r}; give a folder of images, idx files, *.tar or torchvision/NAME@ROOT"
        )
    stem = folder / f"{_IDX_NAMES[split]}-images-idx3-ubyte"
    for suffix in (".gz", ""):
        if Path(f"{stem}{suffix}").exists():
            return _idx_pair(Path(f"{stem}{suffix}"), channels=channels)
    return _folder(folder, split=split, channels=channels, labelled=labelled)


def read_idx(path: str | Path) -> Tensor:
    """One idx file of unsigned bytes, gzipped or not, as a tensor of the shape in its header.

    Raises:
        ValueError: not such a file, or shorter or longer than its header says.
    """
    try:
        raw = Path(path).read_bytes()
        content = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (EOFError, gzip.BadGzipFile, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an idx file of unsigned bytes (header {content[:4].hex() or 'empty'})")
    rank = content[3]
    if len(content) < 4 + 4 * rank:
        raise ValueError(f"{path} ends inside its idx header")
    shape = struct.unpack(f">{rank}I", content[4 : 4 + 4 * rank])
    body = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * rank)
    if body.size != int(np.prod(shape, dtype=np.int64)):
        raise ValueError(f"{path} announces {shape} bytes and holds {body.size}")
    return torch.from_numpy(body.reshape(shape).copy())


def _idx_pair(images_path: Path, *, channels: int) -> TensorImages:
    images = read_idx(images_path)
    labels = read_idx(images_path.with_name(images_path.name.replace("images-idx3", "labels-idx1"))).long()
    if images.ndim != 3 or len(images) != len(labels):
        raise ValueError(f"{images_path}: images {tuple(images.shape)} do not go with {len(labels)} labels")
    return TensorImages(images[:, None].expand(-1, channels, -1, -1), labels)


def _decode(file: Any, *, name: str, channels: int) -> Image.Image:
    try:
        with Image.open(file) as image:
            return image.convert("RGB" if channels == 3 else "L")
    except FileNotFoundError:
        raise
    except (UnidentifiedImageError, OSError, SyntaxError, struct.error) as error:
        raise ValueError(f"{name} is not a readable image: {error}") from error


def _torchvision(source: str, *, split: str, channels: int) -> ImageSet:
    from torchvision import datasets

    name, _, root = source.removeprefix("torchvision/").partition("@")
    factory = getattr(datasets, name, None)
    if factory is None or not root:
        raise ValueError(f"{source!r}: expected torchvision/NAME@ROOT with a class of torchvision.datasets")
    try:
        data = factory(root, train=split == "train", download=False)
    except TypeError:
        data = factory(root, split=split, download=False)
    except RuntimeError as error:
        raise FileNotFoundError(f"{source!r}: {error}") from error

    def read(index: int) -> tuple[Image.Image, int]:
        image, label = data[index]
        return image.convert("RGB" if channels == 3 else "L"), int(label)

    return ImageSet(read, len(data), tuple(getattr(data, "classes", ())))


def _folder(folder: Path, *, split: str, channels: int, labelled: bool) -> ImageSet:
    aliases = ("train",) if split == "train" else ("test", "val", "validation")
    root = next((folder / alias for alias in aliases if (folder / alias).is_dir()), folder)
    if root == folder and split == "test" and labelled and (folder / "train").is_dir():
        raise ValueError(f"{folder} has a folder 'train' but none of {aliases} for split 'test'")
    files = sorted(
        Path(directory, name)
        for directory, _, names in os.walk(root, followlinks=True)
        for name in names
        if name.lower().endswith(_IMAGE_SUFFIXES)
    )
    if not files:
        raise ValueError(f"{root} holds no images ({', '.join(_IMAGE_SUFFIXES)})")
    classes: tuple[str, ...] = ()
    labels: Sequence[int] = [-1] * len(files)
    if labelled:
        loose = [file for file in files if file.parent == root]
        if loose:
            raise ValueError(f"{loose[0]} lies outside a class folder; training with labels needs {root}/CLASS/IMAGE")
        names = [file.relative_to(root).parts[0] for file in files]
        classes = tuple(sorted(set(names)))
        labels = [classes.index(name) for name in names]

    def read(index: int) -> tuple[Image.Image, int]:
        return _decode(files[index], name=str(files[index]), channels=channels), labels[index]

    return ImageSet(read, len(files), classes)


def _expand(pattern: str) -> list[Path]:
    """``a-{000..012}.tar`` to its files; a name without braces may hold ``*``."""
    head, brace, rest = pattern.partition("{")
    if brace:
        span, _, tail = rest.partition("}")
        first, dots, last = span.partition("..")
        if not (dots and first.isdigit() and last.isdigit()):
            raise ValueError(f"{pattern!r}: braces must hold FIRST..LAST")
        return [Path(f"{head}{number:0{len(first)}d}{tail}") for number in range(int(first), int(last) + 1)]
    path = Path(pattern)
    return sorted(path.parent.glob(path.name)) if "*" in path.name else [path]


def _webdataset(pattern: str, *, channels: int, labelled: bool) -> ImageSet:
    """Index local shards once by their headers; samples are then read in any order, as seeded sampling needs."""
    shards = _expand(pattern)
    missing = [shard for shard in shards if not shard.is_file()]
    if missing or not shards:
        raise FileNotFoundError(f"no file {missing[0] if missing else pattern}")
    samples: list[tuple[Path, int, int, str, int]] = []
    for shard in shards:
        groups: dict[str, dict[str, tarfile.TarInfo]] = {}
        try:
            with tarfile.open(shard, "r:") as archive:
                for member in archive:
                    if member.isfile():
                        folder, _, name = member.name.rpartition("/")
                        key, _, suffix = name.partition(".")
                        groups.setdefault(f"{folder}/{key}", {})[f".{suffix.lower()}"] = member
                for key, parts in groups.items():
                    image = next((parts[suffix] for suffix in _IMAGE_SUFFIXES if suffix in parts), None)
                    if image is not None:
                        label = _label(archive, parts, where=f"{shard}:{key}") if labelled else -1
                        samples.append((shard, image.offset_data, image.size, f"{shard}:{image.name}", label))
        except tarfile.ReadError as error:
            raise ValueError(f"{shard} is not a whole tar file: {error}") from error
    if not samples:
        raise ValueError(f"{pattern} holds no images ({', '.join(_IMAGE_SUFFIXES)})")

    def read(index: int) -> tuple[Image.Image, int]:
        shard, offset, size, name, label = samples[index]
        with open(shard, "rb") as file:
            file.seek(offset)
            return _decode(io.BytesIO(file.read(size)), name=name, channels=channels), label

    width = 1 + max(sample[4] for sample in samples)
    return ImageSet(read, len(samples), tuple(str(number) for number in range(width)))


def _label(archive: tarfile.TarFile, parts: dict[str, tarfile.TarInfo], *, where: str) -> int:
    import json

    try:
        if ".cls" in parts:
            return int(archive.extractfile(parts[".cls"]).read())  # type: ignore[union-attr]
        return int(json.loads(archive.extractfile(parts[".json"]).read())["label"])  # type: ignore[union-attr]
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{where} has no label: KEY.cls or KEY.json with an integer 'label' is needed") from error
