"""Pooling that steps in time: space is pooled frame by frame, the last R-1 pooled frames are kept.

Missing frames are 0 for averages (and count in the divisor, ``count_include_pad=True``) or do not count at all
(``count_include_pad=False``), and -inf for maxima. The whole window is reduced anew at each step: the frames are
small after spatial pooling, and a re-reduced window cannot drift, which a running sum does.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.continual.module import Continual, emits_now
from sparing.continual.timing import (
    Span,
    Tick,
    admit,
    admit_chunk,
    first_emission,
    frames_seen,
    is_lockstep,
    keep,
    kernel_span,
)

_AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_MAXIMUM = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_ADAPTIVE_AVERAGE = {2: F.adaptive_avg_pool1d, 3: F.adaptive_avg_pool2d}
_ADAPTIVE_MAXIMUM = {2: F.adaptive_max_pool1d, 3: F.adaptive_max_pool2d}
# Over time and space together, for clips.
_WHOLE_AVERAGE = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
_WHOLE_MAXIMUM = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}


class TemporalPool(Continual):
    """What all pools share: a window of pooled frames. Subclasses pool space and reduce time."""

    leaf = "frames"
    fill = 0.0

    def _pool_space(self, x: Tensor) -> Tensor:
        """(streams, C, ...) to pooled (streams, C, ...)."""
        raise NotImplementedError(type(self).__name__)

    def _reduce(self, windows: Tensor, counts: Tensor | int | None) -> Tensor:
        """(..., taps) to (...); ``counts`` are the real frames of each window where they matter."""
        raise NotImplementedError(type(self).__name__)

    def _time(self) -> tuple[int, int]:
        """Number of taps and their dilation."""
        raise NotImplementedError(type(self).__name__)

    counts_padding = True

    def _memory(
        self, streams: int, frame_shape: tuple[int, ...], make: Callable[..., Tensor]
    ) -> tuple[dict, tuple[int, ...]]:
        try:
            out_shape = tuple(self._pool_space(torch.empty((1, *frame_shape), device="meta")).shape[1:])
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"frames {frame_shape} do not fit: {error}") from error
        kept = self.span().receptive_field - 1
        if kept == 0:
            return {}, out_shape
        return {self.leaf: make((streams, out_shape[0], kept, *out_shape[1:]), fill=self.fill)}, out_shape

    def _step(self, x: Tensor, memory: dict, tick: Tick) -> tuple[Tensor | None, dict]:
        span = self.span()
        silent = is_lockstep(tick) and not emits_now(tick, span)
        if not memory:
            return (None if silent else self._pool_space(x)), memory
        frame = admit(self._pool_space(x), tick, self.fill).unsqueeze(2)
        window = torch.cat([memory[self.leaf], frame], 2)
        new = {self.leaf: keep(window[:, :, 1:], memory[self.leaf], tick)}
        if silent:
            return None, new
        counts = None if self.counts_padding else self._real_frames(frames_seen(tick), window)
        return self._reduce(window[:, :, :: self._time()[1]].movedim(2, -1), counts), new

    def _real_frames(self, newest: int | Tensor, like: Tensor) -> Tensor:
        """How many taps of the window that ends at frame ``newest`` exist; broadcastable to (streams, C, ...)."""
        taps, dilation = self._time()
        ages = torch.arange(taps, device=like.device) * dilation
        if not isinstance(newest, Tensor):
            return (ages <= newest).sum()
        return (ages <= newest[:, None]).sum(1).view(-1, *[1] * (like.ndim - 2))

    def _steps(self, x: Tensor | None, memory: dict, tick: Tick, end: bool) -> tuple[Tensor | None, dict]:
        span = self.span()
        frames = 0 if x is None else x.shape[2]
        ending = span.padding if end else 0
        pieces = []
        if x is not None:
            pooled = (
                self._pool_space(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], frames)).transpose(1, 2)
            )
            pieces.append(admit_chunk(pooled, tick, self.fill))
        if memory:
            pieces.insert(0, memory[self.leaf])
        if not pieces:
            return None, memory
        if ending:
            last = pieces[-1][:, :, -1:].expand(-1, -1, ending, *[-1] * (pieces[-1].ndim - 3))
            pieces.append(torch.full_like(last, self.fill))
        window = torch.cat(pieces, 2) if len(pieces) > 1 else pieces[0]
        new = {self.leaf: window[:, :, frames : frames + span.receptive_field - 1]} if memory else memory
        offset = first_emission(tick, span) if is_lockstep(tick) else 0
        if offset >= frames + ending:
            return None, new
        windows = window[:, :, offset:].unfold(2, span.receptive_field, span.stride)[..., :: self._time()[1]]
        counts = None
        if not self.counts_padding:
            counts = self._chunk_counts(windows, tick, offset, frames, end)
        return self._reduce(windows, counts), new

    def _chunk_counts(self, windows: Tensor, tick: Tick, offset: int, frames: int, end: bool) -> Tensor:
        span = self.span()
        taps, dilation = self._time()
        seen = frames_seen(tick)
        newest = offset + torch.arange(windows.shape[2], device=windows.device) * span.stride
        behind = torch.arange(taps, device=windows.device) * dilation
        if isinstance(tick.clock, Tensor):
            # Frames before the layer's first are not real, whatever their place in the chunk.
            since = (tick.clock - tick.delay)[:, None, None] + newest[:, None] - behind
            return (since >= 0).sum(-1).clamp(min=1).view(windows.shape[0], 1, -1, *[1] * (windows.ndim - 4))
        at = seen + newest[:, None] - behind
        real = (at >= 0) & (at < seen + frames) if end else at >= 0
        return real.sum(-1).view(1, 1, -1, *[1] * (windows.ndim - 4))


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    value = tuple(value) if isinstance(value, (tuple, list)) else (value,) * dims
    if len(value) != dims:
        raise ValueError(f"expected {dims} numbers (time first), got {value}")
    return value


class _AvgPool(TemporalPool, nn.Module):
    """Average pooling over time and space, time first; clip mode equals torch's ``AvgPool{1,2,3}d``.

    Args:
        kernel_size, stride, padding: as torch's, one number or one per dimension.
        count_include_pad: whether missing frames count in the divisor.
        dilation: frames between the taps, in time only (an extension: torch has none).

    Raises:
        ValueError: for ``ceil_mode`` or ``divisor_override`` (not defined on a stream), and padding above R - 1.
    """

    dims = 1

    def __init__(
        self,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] | None = None,
        padding: int | tuple[int, ...] = 0,
        *,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        if ceil_mode or divisor_override is not None:
            raise ValueError(
                f"{type(self).__name__} on a stream takes neither ceil_mode nor divisor_override, got "
                f"ceil_mode={ceil_mode}, divisor_override={divisor_override}"
            )
        self.kernel_size = _tuple(kernel_size, self.dims)
        self.stride = self.kernel_size if stride is None else _tuple(stride, self.dims)
        self.padding = _tuple(padding, self.dims)
        self.dilation = dilation
        self.counts_padding = count_include_pad
        self.span()

    def _span(self) -> Span:
        return kernel_span(
            self.kernel_size[0],
            dilation=self.dilation,
            stride=self.stride[0],
            padding=self.padding[0],
            name=type(self).__name__,
        )

    def _time(self) -> tuple[int, int]:
        return self.kernel_size[0], self.dilation

    def _pool_space(self, x: Tensor) -> Tensor:
        if self.dims == 1 or (all(k == 1 for k in self.kernel_size[1:]) and all(s == 1 for s in self.stride[1:])):
            return x
        return _AVERAGE[self.dims - 1](
            x, self.kernel_size[1:], self.stride[1:], self.padding[1:], count_include_pad=self.counts_padding
        )

    def _reduce(self, windows: Tensor, counts: Tensor | int | None) -> Tensor:
        return windows.mean(-1) if counts is None else windows.sum(-1) / counts

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, ...) to (N, C, T', ...)."""
        if self.dilation == 1 and 2 * self.padding[0] <= self.kernel_size[0]:  # torch refuses wider padding
            return _AVERAGE[self.dims](
                x, self.kernel_size, self.stride, self.padding, count_include_pad=self.counts_padding
            )
        memory, _ = self._memory(
            x.shape[0], (x.shape[1], *x.shape[3:]), lambda s, fill=0.0, dtype=None: x.new_full(s, fill)
        )
        y, _ = self._steps(x, memory, Tick(0), True)
        if y is None:
            raise ValueError(
                f"the clip has {x.shape[2]} frames, too few for receptive field {self.span().receptive_field}"
            )
        return y

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, dilation={self.dilation}"


class AvgPool1d(_AvgPool):
    """Average over time; clips (N, C, T), frames (streams, C)."""

    dims = 1


class AvgPool2d(_AvgPool):
    """Average over time and one axis; clips (N, C, T, V), frames (streams, C, V)."""

    dims = 2


class AvgPool3d(_AvgPool):
    """Average over time and space; clips (N, C, T, H, W), frames (streams, C, H, W)."""

    dims = 3


class _MaxPool(TemporalPool, nn.Module):
    """Max pooling over time and space, time first; clip mode equals torch's ``MaxPool{1,2,3}d``, missing frames are
    -inf.

    Raises:
        ValueError: for ``ceil_mode`` or ``return_indices``, and padding above R - 1.
    """

    dims = 1
    leaf = "maxima"
    fill = float("-inf")

    def __init__(
        self,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] | None = None,
        padding: int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        *,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> None:
        super().__init__()
        if ceil_mode or return_indices:
            raise ValueError(f"{type(self).__name__} on a stream takes neither ceil_mode nor return_indices")
        self.kernel_size = _tuple(kernel_size, self.dims)
        self.stride = self.kernel_size if stride is None else _tuple(stride, self.dims)
        self.padding = _tuple(padding, self.dims)
        self.dilation = _tuple(dilation, self.dims)
        self.span()

    def _span(self) -> Span:
        return kernel_span(
            self.kernel_size[0],
            dilation=self.dilation[0],
            stride=self.stride[0],
            padding=self.padding[0],
            name=type(self).__name__,
        )

    def _time(self) -> tuple[int, int]:
        return self.kernel_size[0], self.dilation[0]

    def _pool_space(self, x: Tensor) -> Tensor:
        if self.dims == 1 or (all(k == 1 for k in self.kernel_size[1:]) and all(s == 1 for s in self.stride[1:])):
            return x
        return _MAXIMUM[self.dims - 1](x, self.kernel_size[1:], self.stride[1:], self.padding[1:], self.dilation[1:])

    def _reduce(self, windows: Tensor, counts: Tensor | int | None) -> Tensor:
        return windows.amax(-1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, ...) to (N, C, T', ...)."""
        return _MAXIMUM[self.dims](x, self.kernel_size, self.stride, self.padding, self.dilation)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, dilation={self.dilation}"


class MaxPool1d(_MaxPool):
    """Maximum over time; clips (N, C, T), frames (streams, C)."""

    dims = 1


class MaxPool2d(_MaxPool):
    """Maximum over time and one axis; clips (N, C, T, V), frames (streams, C, V)."""

    dims = 2


class MaxPool3d(_MaxPool):
    """Maximum over time and space; clips (N, C, T, H, W), frames (streams, C, H, W)."""

    dims = 3


class _AdaptivePool(TemporalPool, nn.Module):
    """Adaptive pooling to one output in time. On a stream a window of ``window`` frames slides.

    Clip mode pools the entire clip whatever its length, so a step equals the clip only when the clip has ``window``
    frames.

    Args:
        output_size: torch's, time first; the size in time must be 1.
        window: frames that a step pools.

    Raises:
        ValueError: output size in time other than 1, or a window that is not a whole number above 0.
    """

    dims = 2

    def __init__(self, output_size: int | tuple[int | None, ...] = 1, *, window: int) -> None:
        super().__init__()
        size = tuple(output_size) if isinstance(output_size, (tuple, list)) else (output_size,) * self.dims
        if len(size) != self.dims or size[0] != 1:
            raise ValueError(f"output_size must be (1, ...) with {self.dims} numbers (time first), got {output_size}")
        if not isinstance(window, int) or window < 1:
            raise ValueError(f"window must be a whole number of at least 1 frame, got {window}")
        self.output_size, self.window = size, window

    def _span(self) -> Span:
        return kernel_span(self.window)

    def _time(self) -> tuple[int, int]:
        return self.window, 1

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}, window={self.window}"


class _AdaptiveAvgPool(_AdaptivePool):
    def _pool_space(self, x: Tensor) -> Tensor:
        return x if self.dims == 1 else _ADAPTIVE_AVERAGE[self.dims](x, self.output_size[1:])

    def _reduce(self, windows: Tensor, counts: Tensor | int | None) -> Tensor:
        return windows.mean(-1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, ...) to (N, C, 1, ...)."""
        return _WHOLE_AVERAGE[self.dims](x, self.output_size)


class _AdaptiveMaxPool(_AdaptivePool):
    leaf = "maxima"
    fill = float("-inf")

    def _pool_space(self, x: Tensor) -> Tensor:
        return x if self.dims == 1 else _ADAPTIVE_MAXIMUM[self.dims](x, self.output_size[1:])

    def _reduce(self, windows: Tensor, counts: Tensor | int | None) -> Tensor:
        return windows.amax(-1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, ...) to (N, C, 1, ...)."""
        return _WHOLE_MAXIMUM[self.dims](x, self.output_size)


class AdaptiveAvgPool1d(_AdaptiveAvgPool):
    """Sliding mean over time; clips (N, C, T), frames (streams, C)."""

    dims = 1


class AdaptiveAvgPool2d(_AdaptiveAvgPool):
    """Sliding mean over time and one axis; clips (N, C, T, V), frames (streams, C, V)."""

    dims = 2


class AdaptiveAvgPool3d(_AdaptiveAvgPool):
    """Sliding mean over time and space; clips (N, C, T, H, W), frames (streams, C, H, W)."""

    dims = 3


class AdaptiveMaxPool1d(_AdaptiveMaxPool):
    """Sliding maximum over time; clips (N, C, T), frames (streams, C)."""

    dims = 1


class AdaptiveMaxPool2d(_AdaptiveMaxPool):
    """Sliding maximum over time and one axis; clips (N, C, T, V), frames (streams, C, V)."""

    dims = 2


class AdaptiveMaxPool3d(_AdaptiveMaxPool):
    """Sliding maximum over time and space; clips (N, C, T, H, W), frames (streams, C, H, W)."""

    dims = 3
