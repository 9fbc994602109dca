"""Labelled clips of video and audio files: folders of classes or a manifest, checked when opened, sampled by index.

Read are a folder with one folder a class (below ``train`` and ``test`` where there are such; else every fifth file of a
class is held out), or a CSV manifest with the columns ``path,label`` and, where wanted, ``split`` (train or test) and
``start_s,end_s``: then the row labels a span of a longer recording. Video is read by PyAV, audio by soundfile.

What a clip is:

* of a file labelled as a whole, ``frames`` frames at a random place (testing: in the middle);
* of a span, the ``frames`` frames that *end* at a random moment of the span (testing: in its middle), plus ``lag``
  frames. So the label is what a stream should say at its newest frame, or ``lag`` frames after it happened, and what
  lies before is the recording's own past, as a stream would have seen it.

A frame of audio is a hop of samples (:mod:`sparing.continual.log_mel`). Files that cannot be read, and clips that are
longer than their file, are listed in :attr:`ClipSet.bad` with the reason, and the rest is used.
"""

import csv
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from sparing.continual import hops_of
from sparing.media.audio import read_audio
from sparing.media.video import read_frames, video_rate
from sparing.training import Batch, progress, uniforms

__all__ = ["ClipBatches", "ClipFormat", "ClipSet", "open_clips", "square"]

SUFFIXES = {
    "video": (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg"),
    "audio": (".wav", ".flac", ".ogg", ".mp3"),
}
TEST_EVERY = 5  # folders and manifests without a split: every fifth file is held out
_PLACE_STREAM = 22


@dataclass(frozen=True)
class ClipFormat:
    """What a network takes: ``frames`` of video at ``size`` x ``size`` pixels (each ``every``-th frame of the file), or
    ``frames`` hops of ``hop`` audio samples at ``rate`` Hz.
    """

    kind: Literal["video", "audio"]
    frames: int
    size: int = 0
    every: int = 1
    rate: int = 0
    hop: int = 0

    def read(self, path: Path) -> tuple[Tensor, float]:
        """A whole file, time first, and its frames per second: uint8 (T, 3, size, size) or float32 (T, hop)."""
        if self.kind == "audio":
            samples, _ = read_audio(path, rate=self.rate)
            return hops_of(samples, self.hop).T.contiguous(), self.rate / self.hop
        frames = [square(frame, self.size) for frame in read_frames(path, every=self.every)]
        if not frames:
            raise ValueError(f"{str(path)!r} holds no frame")
        return torch.stack(frames), video_rate(path) / self.every


def square(frame: Tensor, size: int) -> Tensor:
    """uint8 (3, H, W) to (3, size, size): shorter side to ``size``, centre crop."""
    if tuple(frame.shape[1:]) == (size, size):
        return frame
    return transforms.center_crop(transforms.resize(frame, [size], antialias=True), [size, size])


@dataclass(frozen=True)
class Clip:
    """One labelled file, or the span from ``start_s`` to ``end_s`` of it."""

    path: Path
    label: int
    start_s: float | None = None
    end_s: float | None = None


@dataclass
class ClipSet:
    """Clips whose files were found readable and long enough; ``bad``: path (and span) -> why it is left out.

    ``frames(clip)`` gives the decoded file, from memory while all of them fit into ``cache_bytes``.
    """

    format: ClipFormat
    class_names: tuple[str, ...]
    clips: list[Clip]
    cache_bytes: int
    lag: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    _cache: OrderedDict[Path, tuple[Tensor, float]] = field(default_factory=OrderedDict, repr=False)
    _held: int = 0

    def __len__(self) -> int:
        return len(self.clips)

    def frames(self, path: Path) -> tuple[Tensor, float]:
        """As :meth:`ClipFormat.read`; the file used longest ago gives way where memory is short."""
        if path in self._cache:
            self._cache.move_to_end(path)
            return self._cache[path]
        content = self.format.read(path)
        size = content[0].numel() * content[0].element_size()
        while self._cache and self._held + size > self.cache_bytes:
            _, (gone, _) = self._cache.popitem(last=False)
            self._held -= gone.numel() * gone.element_size()
        if size <= self.cache_bytes:
            self._cache[path] = content
            self._held += size
        return content

    def ends(self, clip: Clip) -> tuple[int, int]:
        """First and last place, in frames of the file, at which a clip may end (exclusive ends of the clip).

        Raises:
            ValueError: no clip fits.
        """
        frames, rate = self.frames(clip.path)
        need, total = self.format.frames, len(frames)
        if clip.start_s is None or clip.end_s is None:
            if total < need:
                raise ValueError(f"has {total} frames, a clip needs {need}")
            return need, total
        first, last = (round(moment * rate) for moment in (clip.start_s, clip.end_s))
        low, high = max(first + 1, 1) + self.lag, max(last, first + 1) + self.lag
        if clip.end_s <= clip.start_s or clip.start_s < 0 or last > total + 1:
            raise ValueError(f"is no span of the file, which lasts {total / rate:.3f} s")
        if high < need or low > total:
            where = "before" if high < need else "after"
            raise ValueError(f"lies {where} the first clip of {need} frames and lag {self.lag} could end")
        return max(low, need), min(high, total)


def open_clips(
    source: str | Path,
    form: ClipFormat,
    *,
    split: str = "train",
    class_names: Sequence[str] | None = None,
    lag: int = 0,
    cache_mb: int = 2048,
) -> ClipSet:
    """Open labelled clips and read every file once.

    Args:
        source: folder or manifest; see the module.
        form: what the network takes.
        split: 'train' or 'test'.
        class_names: of the training split, when the test split is opened.
        lag: frames between what is labelled and the end of the clip (spans only).
        cache_mb: decoded files kept in memory, MB.

    Raises:
        FileNotFoundError: no such source.
        ValueError: no files, a class without (usable) files, a manifest that cannot be read, a label that the
            training split does not have.
    """
    source = Path(source)
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if source.is_dir():
        rows, names = _folder(source, form, split)
    elif source.is_file():
        rows, names = _manifest(source, split)
    else:
        raise FileNotFoundError(f"no folder of classes and no manifest {str(source)!r}")
    names = sorted(names)
    if class_names is not None:
        if unknown := sorted(set(names) - set(class_names)):
            raise ValueError(f"{str(source)!r}, {split}: classes {', '.join(unknown)} are not among those trained")
        names = list(class_names)
    found = ClipSet(form, tuple(names), [], cache_mb * 2**20, lag)
    for path, label, start_s, end_s in progress(rows, total=len(rows), description=f"reading {split}"):
        clip = Clip(path, names.index(label), start_s, end_s)
        where = str(path) if start_s is None else f"{path} {start_s:g}-{end_s:g} s"
        if str(path) in found.bad:
            continue
        try:
            found.frames(path)
        except (ValueError, OSError) as error:
            found.bad[str(path)] = " ".join(str(error).split())
            continue
        try:
            found.ends(clip)
        except ValueError as error:
            found.bad[where] = str(error)
            continue
        found.clips.append(clip)
    have = {clip.label for clip in found.clips}
    if missing := [name for number, name in enumerate(names) if number not in have]:
        reasons = "; ".join(f"{path}: {why}" for path, why in list(found.bad.items())[:3])
        raise ValueError(
            f"{str(source)!r}, {split}: no usable file of class {', '.join(missing)}"
            + (f" ({reasons})" if reasons else "")
        )
    return found


Row = tuple[Path, str, float | None, float | None]


def _folder(folder: Path, form: ClipFormat, split: str) -> tuple[list[Row], list[str]]:
    has_splits = (folder / "train").is_dir()
    root = folder / split if has_splits else folder
    if not root.is_dir():
        raise ValueError(f"{str(folder)!r} has a folder 'train' but none named {split!r}")
    rows: list[Row] = []
    names = sorted(path.name for path in root.iterdir() if path.is_dir())
    for name in names:
        files = sorted(path for path in (root / name).rglob("*") if path.suffix.lower() in SUFFIXES[form.kind])
        if not files:
            kinds = ", ".join(SUFFIXES[form.kind])
            raise ValueError(f"class {name!r} has no {form.kind} files in {str(root / name)!r} ({kinds})")
        if not has_splits:
            files = [path for number, path in enumerate(files) if (number % TEST_EVERY == 0) == (split == "test")]
        rows += [(path, name, None, None) for path in files]
    if not rows:
        raise ValueError(f"{str(root)!r} holds no class folders with {form.kind} files")
    return rows, names


def _manifest(path: Path, split: str) -> tuple[list[Row], list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        lines = csv.DictReader(file)
        columns = set(lines.fieldnames or ())
        if not {"path", "label"} <= columns:
            have = ", ".join(sorted(columns)) or "none"
            raise ValueError(f"{str(path)!r} needs the columns path and label, has {have}")
        content = list(lines)
    files = list(dict.fromkeys(line["path"] for line in content))
    held_out = set(files[::TEST_EVERY])
    rows: list[Row] = []
    for number, line in enumerate(content, 2):
        own = line.get("split") or ("test" if line["path"] in held_out else "train")
        if own not in ("train", "test"):
            raise ValueError(f"{str(path)!r} line {number}: split must be train or test, got {own!r}")
        try:
            start, end = (float(line[key]) if line.get(key) else None for key in ("start_s", "end_s"))
        except ValueError as error:
            raise ValueError(f"{str(path)!r} line {number}: start_s and end_s must be seconds ({error})") from error
        if (start is None) != (end is None):
            raise ValueError(f"{str(path)!r} line {number}: start_s and end_s go together")
        if own == split:
            rows.append((path.parent / line["path"], line["label"], start, end))
    if not rows:
        raise ValueError(f"{str(path)!r} has no rows of split {split!r}")
    return rows, list({row[1] for row in rows})


class ClipBatches:
    """Batches of clips for :func:`sparing.training.fit`: ``Batch.images`` is (N, C, T, H, W) or (N, hop, T).

    Args:
        data: opened clips.
        seed: of the places of clips, None: the middle of what is possible.
        prepare: ``(clips, epoch=, indices=)`` on the batch: uint8 (N, 3, T, H, W) or float32 (N, hop, T) to floats.
    """

    def __init__(self, data: ClipSet, *, seed: int | None, prepare: Callable[..., Tensor]) -> None:
        self.data, self.seed, self.prepare = data, seed, prepare
        self.num_classes = len(data.class_names)

    def __len__(self) -> int:
        return len(self.data)

    def batches(self, order: Tensor, *, batch_size: int, epoch: int) -> Iterator[Batch]:
        for indices in order.split(batch_size):
            draws = [0.5] * len(indices)
            if self.seed is not None:
                draws = uniforms(self.seed, epoch, indices, count=1, stream=_PLACE_STREAM)[:, 0].tolist()
            chosen = [self.data.clips[index] for index in indices.tolist()]
            clips = torch.stack([self._cut(clip, draw) for clip, draw in zip(chosen, draws)])
            labels = torch.tensor([clip.label for clip in chosen])
            yield Batch(self.prepare(clips, epoch=epoch, indices=indices), labels, indices, epoch)

    def _cut(self, clip: Clip, draw: float) -> Tensor:
        first, last = self.data.ends(clip)
        end = first + int(draw * (last - first + 1))
        return self.data.frames(clip.path)[0][end - self.data.format.frames : end].transpose(0, 1)
