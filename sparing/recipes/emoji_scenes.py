"""Make a synthetic detection set: emoji pasted on plain or striped canvases, with true boxes and masks, as COCO json.

    python -m sparing.recipes.emoji_scenes --emoji DIR/google.tar --out DATA/emoji_scenes --train 400 --test 100

``--emoji`` is a tar of KEY.png (RGBA) and KEY.json (with ``group``), such as the Noto emoji (Apache-2.0). A class is
a group of emoji. An object's mask is its alpha above one half minus what later objects cover; objects of which less
than a quarter stays visible are left out of the scene. Scene i is a function of the seed and i alone. Emoji of the
test scenes never appear in the training scenes.
"""

import argparse
import io
import json
import sys
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sparing.media.image import write_image
from sparing.training import progress, uniforms, write_json

__all__ = ["GROUPS", "emoji_scenes"]

GROUPS = ("smileys & emotion", "animals & nature", "food & drink", "travel & places", "objects")  # emojibase's names
_MIN_VISIBLE = 0.25
_TEST_SHARE = 5  # every fifth emoji belongs to the test scenes


def read_emoji(path: str | Path, groups: Sequence[str] = GROUPS) -> dict[str, list[Image.Image]]:
    """RGBA images by group, in the order of the tar.

    Raises:
        FileNotFoundError: no such file; ValueError: not such a tar, or a group without emoji.
    """
    found: dict[str, list[Image.Image]] = {group: [] for group in groups}
    pictures: dict[str, bytes] = {}
    seen: set[str | None] = set()
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                key, _, kind = member.name.rpartition(".")
                file = archive.extractfile(member)
                if file is None:
                    continue
                if kind == "png":
                    pictures[key] = file.read()
                elif kind == "json" and key in pictures:
                    # written "smileys & emotion" or, as emojibase's keys, "smileys-emotion"
                    group = str(json.loads(file.read()).get("group")).replace("-", " & ")
                    seen.add(group)
                    if group in found:
                        found[group].append(Image.open(io.BytesIO(pictures.pop(key))).convert("RGBA"))
    except tarfile.TarError as error:
        raise ValueError(f"{str(path)!r} is no tar of emoji ({error})") from error
    if empty := [group for group, images in found.items() if len(images) < _TEST_SHARE]:
        raise ValueError(
            f"{str(path)!r} has fewer than {_TEST_SHARE} emoji of group {', '.join(empty)}; its groups are "
            f"{', '.join(sorted(map(str, seen))) or 'none'}"
        )
    return found


def make_scene(
    emoji: dict[str, list[Image.Image]], *, size: int, seed: int, index: int
) -> tuple[Image.Image, list[dict[str, Any]]]:
    """One scene: the picture (size x size, RGB) and its objects ``{"label": 1.., "mask": (size, size) bool}``."""
    draw = iter(uniforms(seed, 0, [index], count=256, stream=11)[0].tolist())
    low, high = (np.array([next(draw) for _ in range(3)]) * 155 + 50 for _ in range(2))
    ramp = np.linspace(0, 1, size)[:, None] if next(draw) < 0.5 else np.linspace(0, 1, size)[None, :]
    if next(draw) < 0.5:  # stripes
        ramp = (np.floor(ramp * (3 + int(6 * next(draw)))) % 2).astype(float)
    canvas = (low + (high - low) * np.broadcast_to(ramp, (size, size))[..., None]).astype(np.float64)
    objects: list[dict[str, Any]] = []
    groups = list(emoji)
    for _ in range(1 + int(6 * next(draw))):
        label = int(len(groups) * next(draw))
        images = emoji[groups[label]]
        picture = images[int(len(images) * next(draw))]
        side = max(16, int(size * (0.12 + 0.33 * next(draw))))
        picture = picture.resize((side, side), Image.Resampling.BICUBIC).rotate(
            40 * next(draw) - 20, Image.Resampling.BICUBIC
        )
        top, left = (int((size - side) * next(draw)) for _ in range(2))
        pixels = np.asarray(picture, dtype=np.float64)
        alpha = pixels[..., 3:] / 255
        region = (slice(top, top + side), slice(left, left + side))
        canvas[region] = canvas[region] * (1 - alpha) + pixels[..., :3] * alpha
        mask: np.ndarray = np.zeros((size, size), dtype=bool)
        mask[region] = alpha[..., 0] > 0.5
        for other in objects:
            other["mask"] &= ~mask
        objects.append({"label": label + 1, "mask": mask, "area": int(mask.sum())})
    kept = [o for o in objects if o["area"] and o["mask"].sum() >= max(16, _MIN_VISIBLE * o["area"])]
    return Image.fromarray(canvas.round().astype(np.uint8)), kept


def emoji_scenes(
    emoji: str | Path, out: str | Path, *, train: int = 400, test: int = 100, size: int = 256, seed: int = 0
) -> Path:
    """Write ``out/images``, ``out/train.json`` and ``out/test.json`` (COCO instances with RLE masks).

    Raises:
        ValueError: sizes or counts that make no set.
    """
    from pycocotools import mask as coco_mask

    if min(train, test) < 1 or size < 64:
        raise ValueError(f"at least one scene each and 64 pixels are needed, got {train}, {test} and {size}")
    out, every = Path(out), read_emoji(emoji)
    counts = {"train": train, "test": test}
    for split, count in counts.items():
        chosen = {
            group: [im for i, im in enumerate(images) if (i % _TEST_SHARE == 0) == (split == "test")]
            for group, images in every.items()
        }
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in progress(range(count), total=count, description=split):
            picture, objects = make_scene(chosen, size=size, seed=seed + zlib.crc32(split.encode()), index=index)
            name = f"{split}_{index:05d}.png"
            write_image(picture, out / "images" / name)
            images.append({"id": index + 1, "file_name": name, "height": size, "width": size})
            for item in objects:
                rle = coco_mask.encode(np.asfortranarray(item["mask"].astype(np.uint8)))
                box = [float(v) for v in coco_mask.toBbox(rle)]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index + 1,
                        "category_id": item["label"],
                        "bbox": box,
                        "area": float(item["mask"].sum()),
                        "iscrowd": 0,
                        "segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode()},
                    }
                )
        categories = [{"id": number + 1, "name": group} for number, group in enumerate(every)]
        write_json(out / f"{split}.json", {"images": images, "annotations": annotations, "categories": categories})
    return out


def main(arguments: list[str] | None = None) -> int:
    """Command line; see ``--help``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emoji", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    for name, default in (("train", 400), ("test", 100), ("size", 256), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    wanted = parser.parse_args(arguments)
    try:
        print(emoji_scenes(**vars(wanted)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
