"""Video in, frame by frame, through PyAV (``pip install sparing[video]``); one line of error that names the file."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor


def read_frames(path: str | Path, *, every: int = 1) -> Iterator[Tensor]:
    """Frames of a video file in order, uint8 (3, H, W), decoded as they are asked for.

    Args:
        path: any container that PyAV reads.
        every: take each n-th frame, the first among them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: empty, truncated at its beginning, or no video; ``every`` below 1.
        ImportError: PyAV is not installed.
    """
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no video file {str(path)!r}")
    if path.stat().st_size == 0:
        raise ValueError(f"{str(path)!r} is empty")
    try:
        import av
    except ImportError as error:
        raise ImportError("reading video needs PyAV: pip install 'sparing[video]'") from error
    return _decode(av, path, every)


def _decode(av: object, path: Path, every: int) -> Iterator[Tensor]:
    try:
        with av.open(str(path)) as container:  # type: ignore[attr-defined]
            if not container.streams.video:
                raise ValueError(f"{str(path)!r} holds no video stream")
            for number, frame in enumerate(container.decode(video=0)):
                if number % every == 0:
                    yield torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
    except av.error.FFmpegError as error:  # type: ignore[attr-defined]
        raise ValueError(f"{str(path)!r} cannot be read as video: {error.strerror or error}") from error
