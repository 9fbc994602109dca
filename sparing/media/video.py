"""Video in, frame by frame, through PyAV (``pip install sparing[video]``): files, cameras, network streams; and out.

Errors are one line that names the source.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

__all__ = ["is_live", "read_frames", "read_live", "video_rate", "write_gif", "write_video"]

_CAMERA_FORMATS = {"linux": "v4l2", "darwin": "avfoundation"}


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
    path = _existing(path)
    return _decode(_pyav(), str(path), _checked(every))


def is_live(source: str | Path) -> bool:
    """Whether a name means a camera (``0``, ``/dev/video0``) or a network address (``rtsp://...``) and not a file."""
    text = str(source)
    return not Path(source).is_file() and (text.isdigit() or "://" in text or text.startswith("/dev/"))


def read_live(source: str | int, *, every: int = 1, timeout_s: float = 10.0) -> Iterator[Tensor]:
    """Frames of a camera or a network stream as they come, uint8 (3, H, W).

    Args:
        source: number of a camera (Linux: /dev/videoN through v4l2; macOS: avfoundation), a device such as
            ``/dev/video0``, or an address that FFmpeg opens: ``rtsp://``, ``http://``, ``udp://``, ...
        every: take each n-th frame.
        timeout_s: longest wait for an address to answer.

    Raises:
        FileNotFoundError: no such camera, or nothing answers at the address.
        ValueError: cameras by number are not offered on this platform; or what answers is no video.
        ImportError: PyAV is not installed.
    """
    av, text = _pyav(), str(source)
    if "://" in text:
        return _opened(av, text, None, _checked(every), timeout_s, f"nothing that plays answers at {text!r}")
    form = _CAMERA_FORMATS.get(sys.platform)
    if form is None:
        raise ValueError(f"cameras are opened on Linux and macOS only, not on {sys.platform}: give an address")
    device = f"/dev/video{text}" if text.isdigit() and sys.platform == "linux" else text
    return _opened(av, device, form, _checked(every), timeout_s, f"no camera {device!r} on this machine")


def video_rate(path: str | Path) -> float:
    """Frames per second that a video file states.

    Raises:
        FileNotFoundError, ValueError, ImportError: as :func:`read_frames`, or the file states no rate.
    """
    path, av = _existing(path), _pyav()
    try:
        with av.open(str(path)) as container:
            rate = container.streams.video[0].average_rate if container.streams.video else None
    except av.error.FFmpegError as error:
        raise ValueError(f"{str(path)!r} cannot be read as video: {error.strerror or error}") from error
    if not rate:
        raise ValueError(f"{str(path)!r} states no frame rate")
    return float(rate)


def _checked(every: int) -> int:
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    return every


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no video file {str(path)!r}")
    if path.stat().st_size == 0:
        raise ValueError(f"{str(path)!r} is empty")
    return path


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError("reading video needs PyAV: pip install 'sparing[video]'") from error
    return av


def _decode(av: Any, path: str, every: int) -> Iterator[Tensor]:
    try:
        with av.open(path) as container:
            yield from _frames_of(container, path, every)
    except av.error.FFmpegError as error:
        raise ValueError(f"{path!r} cannot be read as video: {error.strerror or error}") from error


def _opened(av: Any, source: str, form: str | None, every: int, timeout_s: float, absent: str) -> Iterator[Tensor]:
    """Opens at once, so that a source that is not there is said before anything is stepped."""
    try:
        container = av.open(source, format=form, timeout=timeout_s)
    except (av.error.FFmpegError, ValueError) as error:
        raise FileNotFoundError(f"{absent} ({getattr(error, 'strerror', None) or error})") from error

    def frames() -> Iterator[Tensor]:
        try:
            with container:
                yield from _frames_of(container, source, every)
        except av.error.FFmpegError as error:
            raise ValueError(f"{source!r} stopped: {error.strerror or error}") from error

    return frames()


def _frames_of(container: Any, name: str, every: int) -> Iterator[Tensor]:
    if not container.streams.video:
        raise ValueError(f"{name!r} holds no video stream")
    for number, frame in enumerate(container.decode(video=0)):
        if number % every == 0:
            yield torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)


def write_video(frames: Tensor, path: str | Path, *, rate: int) -> Path:
    """Write uint8 (T, 3, H, W) as MPEG-4 at high quality; folders are made.

    Args:
        rate: frames per second.

    Raises:
        ValueError: another shape or dtype, or odd sides (the codec halves the colours' resolution).
    """
    _checked_frames(frames, rate)
    height, width = frames.shape[2:]
    if height % 2 or width % 2:
        raise ValueError(f"height and width must be even, got {height} x {width}")
    av, path = _pyav(), Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        track = container.add_stream("mpeg4", rate=rate, options={"qmin": "1", "qmax": "3"})
        track.width, track.height, track.pix_fmt = width, height, "yuv420p"
        track.bit_rate = 50 * height * width * rate
        for frame in frames.permute(0, 2, 3, 1).contiguous().numpy():
            container.mux(track.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(track.encode())
    return path


def write_gif(frames: Tensor, path: str | Path, *, rate: int) -> Path:
    """Write uint8 (T, 3, H, W) as an endless GIF, 256 colours a frame; folders are made.

    Args:
        rate: frames per second, at most 50 (a GIF counts in hundredths of a second, and viewers slow shorter frames).

    Raises:
        ValueError: another shape or dtype, or a rate above 50.
    """
    _checked_frames(frames, rate)
    if rate > 50:
        raise ValueError(f"a GIF plays at most 50 frames per second, got {rate}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [Image.fromarray(frame) for frame in frames.permute(0, 2, 3, 1).contiguous().cpu().numpy()]
    first, *rest = pictures
    first.save(path, save_all=True, append_images=rest, duration=round(1000 / rate), loop=0)
    return path


def _checked_frames(frames: Tensor, rate: int) -> None:
    if frames.ndim != 4 or frames.shape[1] != 3 or frames.dtype != torch.uint8 or not len(frames):
        raise ValueError(f"frames must be uint8 (T, 3, H, W), got {frames.dtype} {tuple(frames.shape)}")
    if rate < 1:
        raise ValueError(f"rate must be at least one frame per second, got {rate}")
