"""A pipeline's output as tensors: images ``(batch, C, H, W)`` and videos ``(batch, frames, C, H, W)`` in [0, 1], audio
``(batch, channels, samples)``; float32, converted once.
"""

from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

__all__ = ["Kind", "preview", "read_output", "sample_rate_of"]

Kind = Literal["image", "video", "audio"]

_FIELDS: dict[str, Kind] = {"images": "image", "frames": "video", "audios": "audio"}
_PREVIEW = 128  # pixels of the longer side; audio: columns of the strip


def read_output(output: Any) -> tuple[Tensor, Kind]:
    """(samples with batch axis, kind) of what a pipeline returned.

    Raises:
        TypeError: nothing in it is a batch of samples.
    """
    for name, kind in _FIELDS.items():
        value = getattr(output, name, None)
        if value is not None:
            return _as_tensor(value, kind), kind
    first = next(iter(output.values())) if hasattr(output, "values") else output
    if isinstance(first, tuple | list) and first and isinstance(first[0], Tensor | np.ndarray):
        first = first[0] if isinstance(output, tuple) else first
    ndim = getattr(first, "ndim", None)
    kind = {2: "audio", 3: "audio", 4: "image", 5: "video"}.get(ndim, "image")  # type: ignore[arg-type,assignment]
    return _as_tensor(first, kind), kind


def _as_tensor(value: Any, kind: Kind) -> Tensor:
    if isinstance(value, list):
        value = [_as_array(entry) for entry in value]
        value = torch.stack(value) if isinstance(value[0], Tensor) else np.stack(value)
    if isinstance(value, np.ndarray):
        tensor = torch.from_numpy(np.ascontiguousarray(value))
        if kind != "audio" and tensor.shape[-1] in (1, 3, 4):
            tensor = rearrange(tensor, "... h w c -> ... c h w")
    elif isinstance(value, Tensor):
        tensor = value
    else:
        raise TypeError(f"the pipeline returned {type(value).__name__}, which is no batch of images, videos or audio")
    tensor = tensor.float() / 255 if tensor.dtype == torch.uint8 else tensor.float()
    if kind == "audio":
        return rearrange(tensor, "b s -> b 1 s") if tensor.ndim == 2 else tensor
    return tensor


def _as_array(entry: Any) -> Any:
    """A PIL image, an array, or a list of frames of either."""
    if isinstance(entry, list):
        return np.stack([np.asarray(frame) for frame in entry])
    if isinstance(entry, Tensor | np.ndarray):
        return entry
    array = np.asarray(entry)
    return array[..., None] if array.ndim == 2 else array


def sample_rate_of(pipe: Any) -> int | None:
    """Hz of an audio pipeline's output, where one of its parts says so."""
    for part in ("vocoder", "vae"):
        module = getattr(pipe, part, None)
        for holder in (getattr(module, "config", None), module):
            for name in ("sampling_rate", "sample_rate"):
                value = getattr(holder, name, None)
                if isinstance(value, int):
                    return value
    return None


def preview(samples: Tensor, kind: Kind) -> Tensor:
    """Small stand-ins on the CPU for the contact sheet: uint8 pictures, int8 audio."""
    if kind == "audio":
        step = max(1, samples.shape[-1] // 4096)
        return (samples[..., ::step].clamp(-1, 1) * 127).round().to(torch.int8).cpu()
    pixels = samples
    if kind == "video":
        last = pixels.shape[1] - 1
        pixels = pixels[:, sorted({0, last // 2, last})]
    frames = pixels.reshape(-1, *pixels.shape[-3:])
    scale = _PREVIEW / max(frames.shape[-2:])
    if scale < 1:
        frames = torch.nn.functional.interpolate(frames, scale_factor=scale, mode="area")
    small = (frames.nan_to_num(0).clamp(0, 1) * 255).round().byte().cpu()
    return small.reshape(*pixels.shape[:-3], *small.shape[-3:])
