"""Convolutions that step in time: 1-, 2- and 3-D, time on axis 2, the first kernel dimension.

Two equal formulations (both cost ``k kh kw Cin/g Cout H' W'`` multiply-adds a frame, the clip's cost divided by its
length):

* *history*: the last ``R-1`` input frames are kept; the output is one convolution over the taps stacked on channels,
  ``y_t = b + sum_j W_j * x_{t - D(k-1-j)}``. The weight reshaped to (out, in/g * k, kh, kw) is a view of the clip
  weight.
* *partial*: the last ``R-1`` partial outputs are kept; one convolution of the frame with all taps adds to them and
  the oldest is said. The memory is ``R-1`` output frames, smaller when the layer strides in space.

A network in ``torch.channels_last_3d`` (``network.to(memory_format=torch.channels_last_3d)``) keeps its histories and
hands its frames on in that order; what it is given in another order is laid out anew once.

The reference implementation pads the frame with k-1 zeros on both sides and convolves that (k times the work, (k-1)^2
frames of state); this one does not.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.continual import rings
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
    surely_seen,
)

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
# The partial sums are taken when their frames are at least this many times smaller than the input's.
SMALLER = 4


class TemporalConv(Continual):
    """Mixin over ``nn.Conv{1,2,3}d``; same constructor, weights and clip-mode forward.

    Args (beside torch's):
        temporal_fill: 'zeros', or 'replicate': before its first frame the stream was that frame for ever, and the
            end padding repeats the last one. ``forward`` pads with zeros in either case.
        formulation: 'auto' (the smaller memory), 'history' or 'partial'.

    Raises:
        ValueError: padding above receptive field - 1, an unknown fill or formulation, or partial sums with a
            temporal stride, dilation or replicate fill (there is no saving in them).
    """

    temporal_fill: str
    formulation: str
    weight: Tensor
    bias: Tensor | None
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: Any
    dilation: tuple[int, ...]
    groups: int
    out_channels: int
    in_channels: int
    padding_mode: str

    def _set_temporal(self, temporal_fill: str, formulation: str) -> None:
        if temporal_fill not in ("zeros", "replicate"):
            raise ValueError(f"temporal_fill must be 'zeros' or 'replicate', got {temporal_fill!r}")
        if formulation not in ("auto", "history", "partial"):
            raise ValueError(f"formulation must be 'auto', 'history' or 'partial', got {formulation!r}")
        if isinstance(self.padding, str):
            raise ValueError(f"padding must be given in numbers, got {self.padding!r}")
        if self.padding_mode != "zeros":
            raise ValueError(
                f"padding_mode must be 'zeros', got {self.padding_mode!r}; time is filled by temporal_fill"
            )
        self.temporal_fill, self.formulation = temporal_fill, formulation
        if formulation == "partial" and not self._can_sum():
            raise ValueError("formulation 'partial' needs temporal stride 1, dilation 1 and temporal_fill 'zeros'")
        self.span()

    def _can_sum(self) -> bool:
        return (
            self.stride[0] == 1 and self.dilation[0] == 1 and self.temporal_fill == "zeros" and self.kernel_size[0] > 1
        )

    def _span(self) -> Span:
        return kernel_span(
            self.kernel_size[0],
            dilation=self.dilation[0],
            stride=self.stride[0],
            padding=self.padding[0],
            name=type(self).__name__,
        )

    def _out_shape(self, frame_shape: tuple[int, ...]) -> tuple[int, ...]:
        sizes = zip(frame_shape[1:], self.kernel_size[1:], self.stride[1:], self.padding[1:], self.dilation[1:])
        spatial = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)
        return (self.out_channels, *spatial)

    def _memory(
        self, streams: int, frame_shape: tuple[int, ...], make: Callable[..., Tensor]
    ) -> tuple[dict, tuple[int, ...]]:
        if len(frame_shape) != len(self.kernel_size) or frame_shape[0] != self.in_channels:
            axes = ("C", "H", "W") if len(self.kernel_size) == 3 else ("C", "V")[: len(self.kernel_size)]
            raise ValueError(
                f"{type(self).__name__} steps on frames ({', '.join(axes)}) with C = {self.in_channels}, "
                f"got {frame_shape}"
            )
        out_shape = self._out_shape(frame_shape)
        if min(out_shape) < 1:
            raise ValueError(
                f"frames {frame_shape} are too small for kernel {self.kernel_size} (time first) with padding "
                f"{self.padding} and dilation {self.dilation}"
            )
        kept = self.span().receptive_field - 1
        if kept == 0:
            return {}, out_shape
        in_size = torch.Size(frame_shape).numel()
        out_size = torch.Size(out_shape).numel()
        small = self.formulation == "auto" and SMALLER * out_size <= in_size and self._can_sum()
        if self.formulation == "partial" or small:
            # Running sums are float32 at any precision of the frames.
            return {"partial": make((streams, out_shape[0], kept, *out_shape[1:]), dtype=torch.float32)}, out_shape
        return {"history": self._laid_out(make((streams, frame_shape[0], kept, *frame_shape[1:])))}, out_shape

    def _step(self, x: Tensor, memory: dict, tick: Tick) -> tuple[Tensor | None, dict]:
        if "partial" in memory:
            return self._step_partial(x, memory["partial"], tick)
        x = admit(x, tick)
        if memory and self._turns(memory["history"], tick):
            return self._step_ring(x, memory["history"], tick.turn)  # type: ignore[arg-type]
        window = x.unsqueeze(2)
        new = memory
        if memory:
            old = self._replicated(memory["history"], window, tick)
            window = self._laid_out(torch.cat([old, window], 2))
            new = {"history": keep(window[:, :, 1:], memory["history"], tick)}
        if is_lockstep(tick) and not emits_now(tick, self.span()):
            return None, new
        return self._taps(window[:, :, :: self.dilation[0]] if self.dilation[0] > 1 else window, self.weight), new

    def _turns(self, history: Tensor, tick: Tick) -> bool:
        """Whether ``history`` is a ring, or turning the weights is possible and cheaper than moving the window
        (streams, C, R, ...).
        """
        if tick.turn is None or tick.stride > 1 or self.dilation[0] > 1 or self.temporal_fill != "zeros":
            return False
        taps = self.kernel_size[0]
        return history.shape[2] == taps or history[:, :, :1].numel() * taps > self.weight.numel()

    def _step_ring(self, x: Tensor, ring: Tensor, turn: int) -> tuple[Tensor, dict]:
        """A step on the last R frames in ring order: the frame takes the place of the oldest, the weights turn."""
        taps = self.kernel_size[0]
        if ring.shape[2] < taps:
            ring = self._laid_out(rings.to_ring(ring, turn))
        with torch.inference_mode():  # the ring may come from a step under it
            ring[:, :, turn % taps].copy_(x)
        return self._taps(ring, rings.turned(self.weight, turn)), {"history": ring}

    def _step_partial(self, x: Tensor, partial: Tensor, tick: Tick) -> tuple[Tensor | None, dict]:
        said = self._responses(admit(x, tick))
        now = partial[:, :, 0] + said[:, :, 0]
        shifted = torch.cat([partial[:, :, 1:] + said[:, :, 1:-1], said[:, :, -1:]], 2)
        new = {"partial": keep(shifted, partial, tick)}
        if is_lockstep(tick) and not emits_now(tick, self.span()):
            return None, new
        return self._with_bias(now).to(x.dtype), new

    def _steps(self, x: Tensor | None, memory: dict, tick: Tick, end: bool) -> tuple[Tensor | None, dict]:
        span = self.span()
        frames = 0 if x is None else x.shape[2]
        ending = span.padding if end else 0
        offset = first_emission(tick, span) if is_lockstep(tick) else 0
        if x is not None and self.temporal_fill == "zeros":
            x = admit_chunk(x, tick)
        if "partial" in memory:
            total = memory["partial"]
            if x is not None:
                padding = (span.receptive_field - 1, *self.padding[1:])
                total = _CONV[len(padding)](
                    x, self.weight, None, self.stride, padding, self.dilation, self.groups
                ).float()
                total = torch.cat(
                    [
                        total[:, :, : span.receptive_field - 1] + memory["partial"],
                        total[:, :, span.receptive_field - 1 :],
                    ],
                    2,
                )
            new = {"partial": total[:, :, frames : frames + span.receptive_field - 1]}
            if offset >= frames + ending:
                return None, new
            return self._with_bias(total[:, :, offset : frames + ending]).to(self.weight.dtype), new
        pieces = [] if x is None else [x]
        if memory:
            pieces = [memory["history"]] if x is None else list(self._replicated_chunk(memory["history"], x, tick))
        if not pieces:
            return None, memory
        if ending:
            last = pieces[-1][:, :, -1:].expand(-1, -1, ending, *[-1] * (pieces[-1].ndim - 3))
            pieces.append(last if self.temporal_fill == "replicate" else torch.zeros_like(last))
        window = torch.cat(pieces, 2) if len(pieces) > 1 else pieces[0]
        new = {"history": window[:, :, frames : frames + span.receptive_field - 1]} if memory else {}
        if offset >= frames + ending:
            return None, new
        padding = (0, *self.padding[1:])
        y = _CONV[len(padding)](
            window[:, :, offset:], self.weight, self.bias, self.stride, padding, self.dilation, self.groups
        )
        return y, new

    def _replicated(self, history: Tensor, frame: Tensor, tick: Tick) -> Tensor:
        """With replicate fill, a stream's first frame takes the place of everything before it. frame: (streams, C, 1,
        ...).
        """
        if self.temporal_fill == "zeros" or surely_seen(tick):
            return history
        seen = frames_seen(tick)
        if not isinstance(seen, Tensor):
            return frame.expand_as(history) if seen == 0 else history
        return torch.where((seen == 0).view(-1, *[1] * (history.ndim - 1)), frame, history)

    def _replicated_chunk(self, history: Tensor, x: Tensor, tick: Tick) -> tuple[Tensor, Tensor]:
        """The same for a chunk (streams, C, T, ...), whose first frames may come from before the layer's first."""
        if self.temporal_fill == "zeros" or not isinstance(tick.clock, Tensor):
            return self._replicated(history, x[:, :, :1], tick), x
        frames, rest = x.shape[2], [1] * (x.ndim - 3)
        begins = (tick.delay - tick.clock).clamp(0, frames - 1)
        first = x[torch.arange(x.shape[0], device=x.device), :, begins].unsqueeze(2)
        early = tick.clock[:, None] + torch.arange(frames, device=x.device) < tick.delay
        x = torch.where(early.view(x.shape[0], 1, frames, *rest), first, x)
        fresh = tick.clock <= tick.delay
        return torch.where(fresh.view(-1, 1, 1, *rest), first, history), x

    def _is_channels_last(self) -> bool:
        weight = self.weight  # of one channel or one tap it is in both orders
        return (
            weight.ndim == 5
            and not weight.is_contiguous()
            and weight.is_contiguous(memory_format=torch.channels_last_3d)
        )

    def _laid_out(self, window: Tensor) -> Tensor:
        """The window in the memory order of the weight; itself when it is."""
        return window.contiguous(memory_format=torch.channels_last_3d) if self._is_channels_last() else window

    def _taps(self, window: Tensor, weight: Tensor) -> Tensor:
        """Contract the k taps of window (streams, C, k, ...) with weight (out, C/g, k, ...): one convolution of one
        dimension less.
        """
        if window.shape[2] > 1 and (self.groups > 1 or self._is_channels_last()):
            # Depthwise kernels exist for windows, not for k channels a group: 3 to 8 times faster on CPU. With channels
            # last the taps are not beside the channels and would have to be copied there.
            stride, padding, dilation = (1, *self.stride[1:]), (0, *self.padding[1:]), (1, *self.dilation[1:])
            convolve = _CONV[len(stride)]
            return convolve(window, weight, self.bias, stride, padding, dilation, self.groups).squeeze(2)
        stacked = window.squeeze(2) if window.shape[2] == 1 else window.flatten(1, 2)
        return self._spatial(stacked, weight.flatten(1, 2), self.bias)

    def _responses(self, x: Tensor) -> Tensor:
        """All taps on one frame: (streams, out, k, ...), index i = what the frame adds to the output i steps from
        now.
        """
        kernel = self.kernel_size[0]
        weight = self.weight.flip(2).transpose(1, 2).flatten(0, 1)
        return self._spatial(x, weight, None).unflatten(1, (self.out_channels, kernel)).float()

    def _spatial(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if len(self.kernel_size) == 1:
            return F.conv1d(x.unsqueeze(-1), weight.unsqueeze(-1), bias, groups=self.groups).squeeze(-1)
        convolve = F.conv1d if len(self.kernel_size) == 2 else F.conv2d
        return convolve(x, weight, bias, self.stride[1:], self.padding[1:], self.dilation[1:], self.groups)

    def _with_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias.view(1, -1, *[1] * (y.ndim - 2))


class Conv1d(TemporalConv, nn.Conv1d):  # type: ignore[misc]
    """``nn.Conv1d`` over time; clips (N, C, T), frames (streams, C). See :class:`TemporalConv`."""

    def __init__(self, *args: Any, temporal_fill: str = "zeros", formulation: str = "auto", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._set_temporal(temporal_fill, formulation)


class Conv2d(TemporalConv, nn.Conv2d):  # type: ignore[misc]
    """``nn.Conv2d`` over time and one axis (joints); clips (N, C, T, V), frames (streams, C, V). See
    :class:`TemporalConv`.
    """

    def __init__(self, *args: Any, temporal_fill: str = "zeros", formulation: str = "auto", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._set_temporal(temporal_fill, formulation)


class Conv3d(TemporalConv, nn.Conv3d):  # type: ignore[misc]
    """``nn.Conv3d`` over time and space; clips (N, C, T, H, W), frames (N, C, H, W). See :class:`TemporalConv`."""

    def __init__(self, *args: Any, temporal_fill: str = "zeros", formulation: str = "auto", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._set_temporal(temporal_fill, formulation)
