"""Detection data sets as one kind of sample: an RGB picture, and boxes, labels and (where there are any) masks.

Read are COCO json (``FOLDER/train.json`` and ``test.json`` beside ``images/``, or one json file), the Penn-Fudan
layout (a folder or its zip), and Pascal VOC by torchvision (``torchvision/VOCDetection@ROOT``). Annotations are
checked when the set is opened, so that a bad one is named before training starts.
"""

import io
import json
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from sparing.training import seeded

__all__ = ["DetectionBatch", "DetectionBatches", "DetectionSet", "open_detection"]

_STREAM = 12
TEST_EVERY = 5  # Penn-Fudan has no split of its own: every fifth image, in the order of names, is held out


@dataclass(frozen=True)
class DetectionSet:
    """``sample(i)`` gives a PIL image (RGB) and its target: boxes (n, 4) xyxy in pixels, labels (n,) from 1, masks
    (n, H, W) uint8 when ``has_masks``."""

    name: str
    classes: list[str]
    size: int
    has_masks: bool
    sample: Callable[[int], tuple[Image.Image, dict[str, Tensor]]]

    def __len__(self) -> int:
        return self.size


def open_detection(source: str | Path, *, split: str) -> DetectionSet:
    """The data set that ``source`` names; ``split`` is 'train' or 'test'.

    Raises:
        FileNotFoundError: a folder, json or image that is named is not there.
        ValueError: no known layout, an empty set, a mask without a box, a class id that is not declared, a bad box.
    """
    text = str(source)
    if text.startswith("torchvision/"):
        return _torchvision(text, split)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"no data set at {text!r}")
    if path.suffix == ".json":
        return _coco(path, path.parent / "images" if (path.parent / "images").is_dir() else path.parent)
    if path.suffix == ".zip":
        return _penn_fudan(zipfile.Path(path), text, split)
    if (path / f"{split}.json").is_file():
        return _coco(path / f"{split}.json", path / "images")
    return _penn_fudan(path, text, split)


# ---- COCO ------------------------------------------------------------------------------------------------------------


def _coco(path: Path, images: Path) -> DetectionSet:
    from pycocotools import mask as coco_mask

    try:
        content = json.loads(path.read_text())
        pictures, annotations, categories = (content[k] for k in ("images", "annotations", "categories"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} is no COCO instances file ({error!r})") from error
    if not pictures or not annotations:
        raise ValueError(f"{str(path)!r} is empty: {len(pictures)} images, {len(annotations)} annotations")
    label_of = {category["id"]: number + 1 for number, category in enumerate(categories)}
    by_image: dict[int, list[dict[str, Any]]] = {picture["id"]: [] for picture in pictures}
    flat: list[Any] = []
    for item in annotations:
        said = f"annotation {item.get('id')} of {str(path)!r}"
        if item.get("iscrowd"):
            continue
        if item.get("image_id") not in by_image:
            raise ValueError(f"{said} names image {item.get('image_id')}, which the file does not list")
        if item.get("category_id") not in label_of:
            raise ValueError(
                f"{said} has class id {item.get('category_id')}, outside the {len(label_of)} declared: "
                f"{sorted(label_of)}"
            )
        if "bbox" not in item:
            what = "a mask without a box" if item.get("segmentation") else "no box"
            raise ValueError(f"{said} has {what}: 'bbox' [left, top, width, height] is needed")
        if len(item["bbox"]) != 4 or min(item["bbox"][2:]) < 0:
            raise ValueError(
                f"{said} has the box {item['bbox']}: [left, top, width, height] with positive sides is needed"
            )
        if min(item["bbox"][2:]) == 0:  # COCO's own training set has two of these
            flat.append(item.get("id"))
            continue
        if not _is_mask(item.get("segmentation")):
            raise ValueError(
                f"{said} has a mask that is neither polygons of 3 or more points nor run lengths with size"
            )
        by_image[item["image_id"]].append(item)
    if flat:
        warnings.warn(
            f"{str(path)!r}: {len(flat)} boxes of zero width or height are left out (annotation {flat[0]} first)",
            stacklevel=3,
        )
    for picture in pictures:
        if not (images / picture["file_name"]).is_file():
            raise FileNotFoundError(
                f"{str(path)!r} names the image {picture['file_name']!r}, not there in {str(images)!r}"
            )
    kept = [picture for picture in pictures if by_image[picture["id"]]]
    has_masks = all(item.get("segmentation") for items in by_image.values() for item in items)

    def mask(item: dict[str, Any], height: int, width: int) -> np.ndarray:
        shape = item["segmentation"]
        if isinstance(shape, list):
            shape = coco_mask.merge(coco_mask.frPyObjects(shape, height, width))
        elif isinstance(shape["counts"], list):
            shape = coco_mask.frPyObjects(shape, height, width)
        return coco_mask.decode(shape)

    def sample(index: int) -> tuple[Image.Image, dict[str, Tensor]]:
        picture = kept[index]
        image = _rgb((images / picture["file_name"]).read_bytes(), str(images / picture["file_name"]))
        items = by_image[picture["id"]]
        boxes = torch.tensor([item["bbox"] for item in items], dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]
        target = {"boxes": boxes, "labels": torch.tensor([label_of[item["category_id"]] for item in items])}
        if has_masks:
            masks = np.stack([mask(item, image.height, image.width) for item in items])
            target["masks"] = torch.from_numpy(masks).to(torch.uint8)
        return image, target

    return DetectionSet(str(path), [category["name"] for category in categories], len(kept), has_masks, sample)


def _is_mask(shape: Any) -> bool:
    """Whether this is a COCO segmentation: polygons, run lengths, or none at all."""
    if isinstance(shape, dict):
        return {"counts", "size"} <= set(shape)
    return not shape or all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in shape)


# ---- Penn-Fudan ------------------------------------------------------------------------------------------------------


def _penn_fudan(root: Any, name: str, split: str) -> DetectionSet:
    """Layouts ``images/X.jpg`` + ``masks/X_mask.png`` and ``PNGImages`` + ``PedMasks``, possibly one folder deeper."""
    roots = [root, *(child for child in root.iterdir() if child.is_dir())]
    for folder in roots:
        for pictures, masks in (("images", "masks"), ("PNGImages", "PedMasks")):
            if (folder / pictures).is_dir() and (folder / masks).is_dir():
                return _penn_fudan_pairs(folder / pictures, folder / masks, name, split)
    raise ValueError(
        f"{name!r} has no known layout: {split}.json beside images/ (COCO), or images/ and masks/ (Penn-Fudan) are read"
    )


def _penn_fudan_pairs(pictures: Any, masks: Any, name: str, split: str) -> DetectionSet:
    stems = {p.name.rpartition(".")[0]: p for p in pictures.iterdir() if p.name.endswith((".jpg", ".png"))}
    pairs = []
    for path in sorted(masks.iterdir(), key=lambda p: p.name):
        stem = path.name.rpartition("_mask")[0]
        if not stem:
            continue
        if stem not in stems:
            raise FileNotFoundError(f"the mask {path.name!r} of {name!r} belongs to an image that is not there")
        pairs.append((stems[stem], path))
    chosen = [pair for i, pair in enumerate(pairs) if (i % TEST_EVERY == TEST_EVERY - 1) == (split == "test")]
    if not chosen:
        raise ValueError(f"{name!r} is empty: {len(pairs)} pictures with masks give no {split} samples")

    def sample(index: int) -> tuple[Image.Image, dict[str, Tensor]]:
        picture, mask_path = chosen[index]
        image = _rgb(picture.read_bytes(), picture.name)
        with Image.open(io.BytesIO(mask_path.read_bytes())) as opened:
            numbers = np.array(opened)
        ids = [number for number in np.unique(numbers) if number]
        found = np.stack([numbers == number for number in ids]) if ids else np.zeros((0, *numbers.shape), bool)
        boxes = []
        for one in found:
            rows, columns = np.flatnonzero(one.any(1)), np.flatnonzero(one.any(0))
            boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        return image, {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.ones(len(ids), dtype=torch.int64),
            "masks": torch.from_numpy(found).to(torch.uint8),
        }

    return DetectionSet(name, ["pedestrian"], len(chosen), True, sample)


# ---- torchvision -----------------------------------------------------------------------------------------------------

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


def _torchvision(source: str, split: str) -> DetectionSet:
    name, _, root = source.removeprefix("torchvision/").partition("@")
    if name != "VOCDetection":
        raise ValueError(f"{source!r}: of torchvision's data sets VOCDetection@ROOT is read; COCO is read by its json")
    from torchvision.datasets import VOCDetection, wrap_dataset_for_transforms_v2

    try:
        raw = VOCDetection(root, image_set="train" if split == "train" else "val")
    except RuntimeError as error:
        raise FileNotFoundError(f"{source!r}: {error}") from error
    data = wrap_dataset_for_transforms_v2(raw, target_keys=("boxes", "labels"))

    def sample(index: int) -> tuple[Image.Image, dict[str, Tensor]]:
        image, target = data[index]
        boxes = target["boxes"].as_subclass(Tensor).float()
        return image.convert("RGB"), {"boxes": boxes, "labels": target["labels"].as_subclass(Tensor)}

    return DetectionSet(source, list(VOC_CLASSES), len(data), False, sample)


def _rgb(content: bytes, name: str) -> Image.Image:
    try:
        with Image.open(io.BytesIO(content)) as opened:
            return opened.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{name!r} is no readable image ({error})") from error


# ---- batches ---------------------------------------------------------------------------------------------------------


class _Items(list):
    """A list of tensors, or of dicts of tensors, that moves to a device as one tensor does."""

    def to(self, device: Any, **options: Any) -> "_Items":
        def move(item: Any) -> Any:
            return {k: v.to(device, **options) for k, v in item.items()} if isinstance(item, dict) else item.to(device)

        return _Items(move(item) for item in self)


@dataclass(frozen=True)
class DetectionBatch:
    """What the training loop hands on: pictures (3, H, W) in [0, 1] of any sizes, and their targets."""

    images: Any
    labels: Any
    indices: Tensor
    epoch: int

    def _replace(self, **changes: Any) -> "DetectionBatch":
        return DetectionBatch(**{**vars(self), **changes})


class _Source(Protocol):
    num_classes: int


class DetectionBatches:
    """Batches for ``sparing.training.fit``: augmentation is a function of seed, epoch and sample index."""

    def __init__(self, data: DetectionSet, *, seed: int = 0, flip: float = 0.5) -> None:
        self.data, self.seed, self.num_classes = data, seed, len(data.classes)
        self._transform = v2.Compose(
            [v2.ToImage(), v2.RandomHorizontalFlip(flip), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]
        )

    def __len__(self) -> int:
        return len(self.data)

    def load(self, index: int, epoch: int | None) -> tuple[Tensor, dict[str, Tensor]]:
        """One sample, augmented for ``epoch``, or as it is for None."""
        image, target = self.data.sample(index)
        if epoch is None:
            return v2.functional.to_dtype(v2.functional.pil_to_tensor(image), torch.float32, scale=True), target
        size = (image.height, image.width)
        marked: dict[str, Any] = dict(target)
        marked["boxes"] = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)  # type: ignore[call-arg]
        if "masks" in target:
            marked["masks"] = tv_tensors.Mask(target["masks"])
        with seeded(self.seed, epoch, index, stream=_STREAM):
            return self._transform(image, marked)  # type: ignore[no-any-return]

    def batches(self, order: Tensor, *, batch_size: int, epoch: int) -> Iterator[Any]:
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            samples = [self.load(int(index), epoch) for index in indices]
            yield DetectionBatch(_Items(s[0] for s in samples), _Items(s[1] for s in samples), indices, epoch)
