"""Audio in and out as mono float32 in [-1, 1], through soundfile (``pip install sparing[audio]``); one line of error
that names the file."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["AudioInfo", "audio_info", "read_audio", "write_audio"]


class AudioInfo(NamedTuple):
    """What the header of a file says: samples per channel, samples a second (Hz), channels."""

    samples: int
    rate: int
    channels: int


def audio_info(path: str | Path) -> AudioInfo:
    """Length and rate of a file, read from its header.

    Raises:
        FileNotFoundError: no such file.
        ValueError: empty, or no audio that soundfile reads.
        ImportError: soundfile is not installed.
    """
    sf, path = _soundfile(), _existing(path)
    try:
        info = sf.info(str(path))
    except sf.SoundFileError as error:
        raise ValueError(f"{str(path)!r} cannot be read as audio: {error}") from error
    return AudioInfo(info.frames, info.samplerate, info.channels)


def read_audio(path: str | Path, *, rate: int | None = None, start: int = 0, samples: int = -1) -> tuple[Tensor, int]:
    """Samples (count,) float32 of a file, its channels averaged, and their rate in Hz.

    Args:
        path: any file that soundfile reads (wav, flac, ogg, mp3).
        rate: resample to this rate (torchaudio's windowed sinc), None: keep the file's.
        start: first sample, at the file's rate.
        samples: how many at the file's rate, -1: to the end.

    Raises:
        FileNotFoundError, ImportError: as :func:`audio_info`.
        ValueError: as :func:`audio_info`, or the file ends before ``start + samples``.
    """
    info, sf = audio_info(path), _soundfile()
    if start < 0 or start + max(samples, 0) > info.samples:
        raise ValueError(f"{str(path)!r} holds {info.samples} samples; {samples} from sample {start} on were wanted")
    try:
        data, own = sf.read(str(path), start=start, frames=samples, dtype="float32", always_2d=True)
    except sf.SoundFileError as error:
        raise ValueError(f"{str(path)!r} cannot be read as audio: {error}") from error
    if samples >= 0 and len(data) != samples:
        raise ValueError(f"{str(path)!r} is truncated: its header announces {info.samples} samples")
    mono = torch.from_numpy(data).mean(1)
    if rate is None or rate == own:
        return mono, own
    from torchaudio.functional import resample

    return resample(mono, own, rate), rate


def write_audio(samples: Tensor, path: str | Path, *, rate: int) -> Path:
    """Write samples (count,) or (channels, count) in [-1, 1] as 16-bit PCM; folders are made.

    Raises:
        ValueError: another shape, or samples outside [-1, 1].
    """
    sf, path = _soundfile(), Path(path)
    if samples.ndim not in (1, 2) or not samples.numel():
        raise ValueError(f"samples must have shape (count,) or (channels, count), got {tuple(samples.shape)}")
    peak = float(samples.abs().max())
    if not peak <= 1.0:
        raise ValueError(f"samples must lie in [-1, 1], the largest is {peak:.3g}: scale them first")
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(str(path), samples.movedim(0, -1).contiguous().numpy(), rate, subtype="PCM_16")
    return path


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no audio file {str(path)!r}")
    if path.stat().st_size == 0:
        raise ValueError(f"{str(path)!r} is empty")
    return path


def _soundfile() -> Any:
    try:
        import soundfile
    except ImportError as error:
        raise ImportError("reading audio needs soundfile: pip install 'sparing[audio]'") from error
    return soundfile
