"""Make a synthetic action set: one emoji on a canvas that does one of ten things, in short clips and in long streams.

    python -m sparing.recipes.emoji_motions --emoji DIR/google.tar --out DATA/emoji_motions

``--emoji`` is a tar of KEY.png (RGBA) and KEY.json, such as the Noto emoji (Apache-2.0). The classes are motions, which
no single frame shows: left, right, up, down (through the border and in again on the other side), turn (clockwise), grow
and shrink (over and over), blink, shake, still. Written are ``out/train/CLASS/*.mp4`` and ``out/test/CLASS/*.mp4`` (one
motion each) and ``out/streams/*.mp4`` with ``out/streams.csv`` (path, label, start_s, end_s): long videos in which
the emoji goes from one motion to the next where it stands. Emoji, canvas, size, place and speed are drawn anew for
every video; emoji of test clips and streams never appear in training. Video i is a function of the seed and i alone.
"""

import argparse
import csv
import math
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparing.media.video import write_video
from sparing.recipes.emoji_scenes import read_emoji
from sparing.training import progress, uniforms

__all__ = ["MOTIONS", "emoji_motions", "make_video"]

MOTIONS = ("blink", "down", "grow", "left", "right", "shake", "shrink", "still", "turn", "up")
RATE = 12  # frames per second
SEGMENT = (24, 48)  # frames of one motion in a stream
_HEADING = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
_TEST_SHARE = 5  # every fifth emoji belongs to the test clips and streams
_STREAM = 31


@dataclass(frozen=True)
class _Pose:
    """Place in canvas widths, turn in degrees, size as a factor, and whether it is seen."""

    x: float
    y: float
    angle: float = 0.0
    scale: float = 1.0
    seen: bool = True


def _moves(motion: str, pose: _Pose, frames: int, draw: Iterator[float]) -> list[_Pose]:
    """Poses of ``frames`` frames of one motion that begins at ``pose``."""
    speed, phase, period = next(draw), next(draw), next(draw)
    poses = []
    for t in range(frames):
        if motion in _HEADING:
            step = (0.016 + 0.024 * speed) * (t + 1)
            dx, dy = _HEADING[motion]
            poses.append(replace(pose, x=(pose.x + dx * step) % 1, y=(pose.y + dy * step) % 1))
        elif motion == "turn":
            poses.append(replace(pose, angle=pose.angle + (6 + 9 * speed) * (t + 1)))
        elif motion in ("grow", "shrink"):
            length = 14 + 8 * period
            at = (t / length + phase) % 1
            poses.append(replace(pose, scale=0.6 * 2.6 ** (at if motion == "grow" else 1 - at)))
        elif motion == "blink":
            poses.append(replace(pose, seen=(t / (5 + 4 * period) + phase) % 1 < 0.5))
        elif motion == "shake":
            swing = (0.05 + 0.05 * speed) * math.sin(2 * math.pi * (t / (4 + 2 * period) + phase))
            poses.append(replace(pose, x=(pose.x + swing) % 1))
        else:
            poses.append(pose)
    return poses


def make_video(
    sprites: Sequence[Image.Image], motions: Sequence[tuple[str, int]], *, size: int, seed: int, index: int
) -> Tensor:
    """One video, uint8 (T, 3, size, size): the motions one after another, each for its number of frames.

    Args:
        sprites: RGBA pictures, of which one is drawn.
        motions: (one of ``MOTIONS``, frames).
        size: height and width, pixels.
        seed, index: of every random draw.

    Raises:
        ValueError: a motion that is none of ``MOTIONS``.
    """
    if unknown := sorted({motion for motion, _ in motions} - set(MOTIONS)):
        raise ValueError(f"unknown motions {', '.join(unknown)}; there are {', '.join(MOTIONS)}")
    draw = iter(uniforms(seed, 0, [index], count=16 + 3 * len(motions), stream=_STREAM)[0].tolist())
    low, high = (np.array([next(draw) for _ in range(3)]) * 155 + 50 for _ in range(2))
    ramp = np.linspace(0, 1, size)[:, None] if next(draw) < 0.5 else np.linspace(0, 1, size)[None, :]
    canvas = low + (high - low) * np.broadcast_to(ramp, (size, size))[..., None]
    picture = sprites[int(len(sprites) * next(draw))]
    side = size * (0.3 + 0.2 * next(draw))
    pose = _Pose(0.25 + 0.5 * next(draw), 0.25 + 0.5 * next(draw), angle=30 * next(draw) - 15)
    colours = np.array(picture.convert("RGBA"), dtype=np.float32)
    colours[..., :3] *= colours[..., 3:] / 255  # premultiplied, so that borders blend without a rim
    grain = np.random.default_rng([seed, index, _STREAM])
    frames = []
    for motion, count in motions:
        poses = _moves(motion, pose, count, draw)
        for now in poses:
            picture_now = canvas
            if now.seen:
                layer = _place(colours, now, side * now.scale, size)
                picture_now = canvas * (1 - layer[..., 3:] / 255) + layer[..., :3]
            noisy = picture_now + 3 * grain.standard_normal((size, size, 1))
            frames.append(np.clip(noisy.round(), 0, 255).astype(np.uint8))
        last = poses[-1]
        moved = motion in _HEADING
        pose = replace(pose, x=last.x if moved else pose.x, y=last.y if moved else pose.y, angle=last.angle)
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()


def _place(colours: np.ndarray, pose: _Pose, side: float, size: int) -> np.ndarray:
    """The sprite (h, w, 4), premultiplied, turned and scaled, on a canvas whose borders are joined: (size, size, 4)."""
    small = max(2, round(side))
    sprite = [Image.fromarray(colours[..., c]).resize((small, small), Image.Resampling.LANCZOS) for c in range(4)]
    turn = math.radians(pose.angle)
    cos, sin, half = math.cos(turn) * small / side, math.sin(turn) * small / side, small / 2
    layer: np.ndarray = np.zeros((size, size, 4), dtype=np.float32)
    for wrap_x in (-1, 0, 1):
        for wrap_y in (-1, 0, 1):
            x, y = (pose.x + wrap_x) * size, (pose.y + wrap_y) * size
            if not (-side < x < size + side and -side < y < size + side):
                continue
            # output pixel -> sprite pixel: turned back about the centre
            matrix = (cos, sin, half - cos * x - sin * y, -sin, cos, half + sin * x - cos * y)
            parts = [
                np.asarray(channel.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR))
                for channel in sprite
            ]
            layer = np.maximum(layer, np.stack(parts, -1))
    return np.clip(layer, 0, 255)


def emoji_motions(
    emoji: str | Path,
    out: str | Path,
    *,
    train: int = 150,
    test: int = 30,
    streams: int = 10,
    frames: int = 24,
    stream_motions: int = 20,
    size: int = 32,
    seed: int = 0,
) -> Path:
    """Write the set.

    Args:
        emoji: tar of pictures, see :func:`sparing.recipes.emoji_scenes.read_emoji`.
        out: folder, made when it is not there.
        train, test: clips a class.
        streams: long videos.
        frames: of a clip.
        stream_motions: motions in a stream.
        size: height and width, pixels (even).
        seed: of every random draw.

    Returns:
        The folder.

    Raises:
        ValueError: counts or a size that make no set.
    """
    if min(train, test, streams, frames, stream_motions) < 1 or size < 16 or size % 2:
        raise ValueError("counts must be at least 1 and the size even and at least 16")
    out = Path(out)
    sprites = [picture for group in read_emoji(emoji).values() for picture in group]
    held_out = sprites[::_TEST_SHARE]
    learned = [picture for number, picture in enumerate(sprites) if number % _TEST_SHARE]
    for split, count, pictures in (("train", train, learned), ("test", test, held_out)):
        wanted = [(motion, number) for motion in MOTIONS for number in range(count)]
        split_seed = seed + zlib.crc32(split.encode())
        for index, (motion, number) in enumerate(progress(wanted, total=len(wanted), description=split)):
            video = make_video(pictures, [(motion, frames)], size=size, seed=split_seed, index=index)
            write_video(video, out / split / motion / f"{number:04d}.mp4", rate=RATE)
    rows = []
    stream_seed = seed + zlib.crc32(b"streams")
    for index in progress(range(streams), total=streams, description="streams"):
        motions = _sequence(stream_motions, seed=stream_seed, index=index)
        video = make_video(held_out, motions, size=size, seed=stream_seed, index=index)
        path, at = write_video(video, out / "streams" / f"{index:03d}.mp4", rate=RATE), 0
        for motion, count in motions:
            rows.append((str(path.relative_to(out)), motion, f"{at / RATE:.6f}", f"{(at + count) / RATE:.6f}"))
            at += count
    with open(out / "streams.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "label", "start_s", "end_s"))
        writer.writerows(rows)
    return out


def _sequence(count: int, *, seed: int, index: int) -> list[tuple[str, int]]:
    """Motions with their frames; no motion follows itself."""
    draws = uniforms(seed, 1, [index], count=2 * count, stream=_STREAM)[0].tolist()
    motions: list[tuple[str, int]] = []
    for pick, length in zip(draws[:count], draws[count:]):
        others = [motion for motion in MOTIONS if not motions or motion != motions[-1][0]]
        motions.append((others[int(len(others) * pick)], SEGMENT[0] + int((SEGMENT[1] - SEGMENT[0] + 1) * length)))
    return motions


def main(arguments: list[str] | None = None) -> int:
    """Command line; see ``--help``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emoji", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    counts = (("train", 150), ("test", 30), ("streams", 10), ("frames", 24), ("stream-motions", 20), ("size", 32))
    for name, default in (*counts, ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    wanted = parser.parse_args(arguments)
    try:
        print(emoji_motions(**vars(wanted)))
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
