"""Detect objects in image files with a fine-tuned detector; draw boxes and masks.

    python -m sparing.recipes.detect PATH... --weights runs/det --out drawn

Every picture is written to ``--out`` under its own name with boxes, class names, scores and (Mask R-CNN) masks, the
numbers to ``--json``. Files that cannot be read are listed, the rest goes on, and the exit code is 2.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as image_functional
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from sparing.media.image import find_images, read_image, write_image
from sparing.training import progress
from sparing.vision.detection import backbone_twin, load_detector

__all__ = ["Detection", "detect", "draw"]

# Okabe and Ito's palette, told apart by most colour-blind readers
_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")


@dataclass(frozen=True)
class Detection:
    """One picture: boxes (left, top, right, bottom) in pixels, class names, scores; ``drawn`` is where it was drawn."""

    path: str
    boxes: list[list[float]]
    classes: list[str]
    scores: list[float]
    drawn: str | None


@torch.inference_mode()
def detect(
    detector: nn.Module, paths: Sequence[str | Path], *, out: str | Path | None = None, threshold: float = 0.5
) -> tuple[list[Detection], list[str]]:
    """Detections of every readable picture, and one line for each that is not.

    Args:
        detector: from :func:`sparing.vision.detection.load_detector`.
        paths: image files and folders.
        out: folder for drawn pictures, None to draw nothing.
        threshold: least score in [0, 1] that is reported.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must lie in [0, 1], got {threshold}")
    device = next(detector.parameters()).device
    config: Any = detector.config
    found, failures = [], []
    used: set[str] = set()
    for path in progress(find_images(paths), description="detect"):
        try:
            image = read_image(path, channels=3, convert=True)
        except (ValueError, OSError) as error:
            failures.append(str(error))
            continue
        picture = image_functional.pil_to_tensor(image)
        result = detector([image_functional.to_dtype(picture, torch.float32, scale=True).to(device)])[0]
        result = {name: value.cpu()[result["scores"].cpu() >= threshold] for name, value in result.items()}
        names = [config.classes[label - 1] for label in result["labels"].tolist()]
        drawn = None
        if out is not None:
            target = Path(out) / f"{path.stem}.png"
            number = 1
            while str(target) in used:  # two folders may hold files of one name
                number += 1
                target = Path(out) / f"{path.stem}_{number}.png"
            used.add(str(target))
            pixels = draw(picture, result, names)
            drawn = str(write_image(image_functional.to_pil_image(pixels), target))
        boxes = [[round(v, 1) for v in box] for box in result["boxes"].tolist()]
        scores = [round(score, 4) for score in result["scores"].tolist()]
        found.append(Detection(str(path), boxes, names, scores, drawn))
    return found, failures


def draw(picture: Tensor, result: dict[str, Tensor], names: Sequence[str]) -> Tensor:
    """Boxes, names, scores and masks on a picture (3, H, W) uint8; one colour a class."""
    if not len(result["boxes"]):
        return picture
    colours = [_COLOURS[int(label) % len(_COLOURS)] for label in result["labels"]]
    if "masks" in result:
        picture = draw_segmentation_masks(picture, result["masks"][:, 0] > 0.5, alpha=0.45, colors=colours)
    labels = [f"{name} {score:.2f}" for name, score in zip(names, result["scores"].tolist(), strict=True)]
    return draw_bounding_boxes(picture, result["boxes"], labels, colors=colours, width=2)


def main(arguments: list[str] | None = None) -> int:
    """Command line; see ``--help``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--weights", required=True, type=Path, help="folder of finetune_detection")
    parser.add_argument("--out", type=Path, default=Path("detected"))
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--device", default=None)
    parser.add_argument("--json", type=Path, default=None)
    wanted = parser.parse_args(arguments)
    try:
        detector = load_detector(wanted.weights, device=wanted.device)
        found, failures = detect(detector, wanted.paths, out=wanted.out, threshold=wanted.threshold)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return report(found, failures, json_file=wanted.json, detector=detector)


def report(found: Sequence[Detection], failures: Sequence[str], *, json_file: Path | None, detector: nn.Module) -> int:
    """Print what was found (also into ``json_file``), the status of a twin beneath, what failed; the exit code."""
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(item) for item in found], indent=2) + "\n")
    for item in found:
        objects = ", ".join(f"{name} {score:.2f}" for name, score in zip(item.classes, item.scores)) or "nothing"
        print(f"{item.path}: {objects}" + (f" -> {item.drawn}" if item.drawn else ""))
    if (twin := backbone_twin(detector)) is not None:
        print(f"backbone: {twin.method} twin, status: {twin.status}")
    for line in failures:
        print(f"error: {line}", file=sys.stderr)
    return 2 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
