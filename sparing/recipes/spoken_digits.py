"""String spoken digits together with pauses: continuous recordings with a known truth, from single takes.

    python -m sparing.recipes.spoken_digits --archive DIR/fsdd.zip --out DATA/digits

``--archive`` is the Free Spoken Digit Dataset (8 kHz mono, 6 speakers, 50 takes of each digit a speaker; CC-BY-SA
4.0) as zip or folder: files named DIGIT_SPEAKER_TAKE.wav. Its own split is kept: takes 0-4 are held out for testing,
5-49 train. A recording is one speaker's takes in random order, each with a gain of its own, on a floor of noise, with
pauses between them. ``out/manifest.csv`` (path, label, split, start_s, end_s) labels every span of every recording,
pauses as 'none'. Each held-out take occurs once; training takes occur ``--passes`` times, every time in another order.
Recording i of a split is a function of the takes, the seed and i.
"""

import argparse
import csv
import io
import re
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparing.media.audio import read_audio, write_audio
from sparing.training import progress, uniforms

__all__ = ["LABELS", "RATE", "Take", "make_recording", "read_digits", "spoken_digits"]

RATE = 8000
TEST_TAKES = 5  # the data set's own split: takes 0..4 of each digit and speaker are held out
LABELS = (*"0123456789", "none")
_NAME = re.compile(r"(\d)_([a-z]+)_(\d+)\.wav$")
_STREAM = 21
_PEAK = 0.9


@dataclass(frozen=True)
class Take:
    """One recorded digit: ``samples`` (count,) float32 in [-1, 1] at 8 kHz."""

    digit: int
    speaker: str
    number: int
    samples: Tensor

    @property
    def held_out(self) -> bool:
        """Whether it belongs to the test split."""
        return self.number < TEST_TAKES


def read_digits(archive: str | Path, *, held_out: bool | None = None) -> list[Take]:
    """Takes in the order of speaker, digit, number.

    Args:
        archive: the data set's zip, or a folder with the wav files anywhere below it.
        held_out: only the test split (True) or only the training split (False).

    Raises:
        FileNotFoundError: no such zip or folder.
        ValueError: no files of that naming, a damaged file, or one at another rate.
    """
    archive = Path(archive)
    takes = []
    for name, file in _files(archive):
        found = _NAME.search(name)
        if found is None:
            continue
        digit, speaker, number = int(found[1]), found[2], int(found[3])
        if held_out is not None and held_out != (number < TEST_TAKES):
            continue
        takes.append(Take(digit, speaker, number, _samples(file, name)))
    if not takes:
        raise ValueError(f"{str(archive)!r} holds no files named DIGIT_SPEAKER_TAKE.wav")
    return sorted(takes, key=lambda take: (take.speaker, take.digit, take.number))


def _files(archive: Path) -> Iterator[tuple[str, Path | bytes]]:
    if archive.is_dir():
        for path in archive.rglob("*.wav"):
            yield path.name, path
    elif archive.is_file():
        try:
            with zipfile.ZipFile(archive) as content:
                for name in content.namelist():
                    if name.endswith(".wav"):
                        yield name, content.read(name)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{str(archive)!r} is no zip file ({error})") from error
    else:
        raise FileNotFoundError(f"no zip or folder {str(archive)!r}")


def _samples(file: Path | bytes, name: str) -> Tensor:
    if isinstance(file, Path):
        samples, rate = read_audio(file)
    else:
        import soundfile

        try:
            data, rate = soundfile.read(io.BytesIO(file), dtype="float32", always_2d=True)
        except soundfile.SoundFileError as error:
            raise ValueError(f"{name!r} cannot be read as audio: {error}") from error
        samples = torch.from_numpy(data).mean(1)
    if rate != RATE:
        raise ValueError(f"{name!r} has {rate} Hz, the data set has {RATE}")
    return samples


def make_recording(takes: Sequence[Take], *, seed: int, index: int) -> tuple[Tensor, list[tuple[str, float, float]]]:
    """Takes one after another with pauses of 0.15 to 0.8 s (1 s before the first), on a floor of noise.

    Gains vary by 4 dB either way, the floor lies 45 to 65 dB below full scale.

    Returns:
        Samples (count,) at 8 kHz, and the spans (label, start in s, end in s) that cover them without gap.
    """
    draws = uniforms(seed, 0, [index], count=2 * len(takes) + 2, stream=_STREAM)[0].tolist()
    pauses = [8000, *(int(RATE * (0.15 + 0.65 * draw)) for draw in draws[: len(takes)])]
    gains = [10 ** ((8 * draw - 4) / 20) for draw in draws[len(takes) : 2 * len(takes)]]
    parts, spans, at = [torch.zeros(pauses[0])], [("none", 0.0, pauses[0] / RATE)], pauses[0]
    for take, gain, pause in zip(takes, gains, pauses[1:]):
        parts += [gain * take.samples, torch.zeros(pause)]
        middle, end = at + len(take.samples), at + len(take.samples) + pause
        spans += [(str(take.digit), at / RATE, middle / RATE), ("none", middle / RATE, end / RATE)]
        at = end
    samples = torch.cat(parts)
    noise = np.random.default_rng([seed, index, _STREAM]).standard_normal(len(samples)).astype(np.float32)
    samples = samples + 10 ** (-(45 + 20 * draws[-1]) / 20) * torch.from_numpy(noise)
    return samples * min(1.0, _PEAK / float(samples.abs().max())), spans


def spoken_digits(archive: str | Path, out: str | Path, *, digits: int = 15, passes: int = 2, seed: int = 0) -> Path:
    """Write ``out/train/*.wav``, ``out/test/*.wav`` and ``out/manifest.csv``.

    Args:
        archive: see :func:`read_digits`.
        out: folder, made when it is not there.
        digits: takes in a training recording; a test recording holds all held-out takes of its speaker.
        passes: recordings in which each training take occurs.
        seed: of orders, pauses, gains and noise.

    Returns:
        The manifest.
    """
    if digits < 1 or passes < 1:
        raise ValueError(f"digits and passes must be at least 1, got {digits} and {passes}")
    out = Path(out)
    rows: list[tuple[str, str, str, str, str]] = []
    for split in ("train", "test"):
        takes = read_digits(archive, held_out=split == "test")
        split_seed = seed + zlib.crc32(split.encode())
        strings = [
            order[first : first + (digits if split == "train" else len(order))]
            for turn in range(passes if split == "train" else 1)
            for speaker in sorted({take.speaker for take in takes})
            for order in [_shuffled([t for t in takes if t.speaker == speaker], split_seed, turn)]
            for first in range(0, len(order), digits if split == "train" else len(order))
        ]
        for index, string in enumerate(progress(strings, total=len(strings), description=split)):
            samples, spans = make_recording(string, seed=split_seed, index=index)
            path = write_audio(samples, out / split / f"{index:04d}_{string[0].speaker}.wav", rate=RATE)
            where = str(path.relative_to(out))
            rows += [(where, label, split, f"{start:.6f}", f"{end:.6f}") for label, start, end in spans]
    with open(out / "manifest.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "label", "split", "start_s", "end_s"))
        writer.writerows(rows)
    return out / "manifest.csv"


def _shuffled(takes: list[Take], seed: int, turn: int) -> list[Take]:
    keys = uniforms(seed, turn + 1, range(len(takes)), count=1, stream=_STREAM)[:, 0]
    return [takes[int(place)] for place in keys.argsort(stable=True)]


def main(arguments: list[str] | None = None) -> int:
    """Command line; see ``--help``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    for name, default in (("digits", 15), ("passes", 2), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    wanted = parser.parse_args(arguments)
    try:
        print(spoken_digits(**vars(wanted)))
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
