"""When a layer on a stream speaks: receptive fields, delays and phases, and how they compose.

Hedegaard & Iosifidis, *Continual 3D Convolutional Neural Networks for Real-time Processing of Videos* (ECCV 2022),
section 3, and the library paper of continual inference networks (2022): an operator with kernel ``k``, dilation
``D``, stride ``s`` and padding ``p`` in time has the receptive field ``R = D(k-1)+1``; its i-th offline output is
emitted by the step that consumes frame ``delay + i s`` with ``delay = R-1-p``. Everything here is arithmetic on whole
numbers of frames; no tensor of the network is touched.

Two clocks are served by the same code. In *lock-step* all streams share their phase and the clock is a Python int, so
layers that have nothing to say are skipped. In the *ragged* mode the clock is a tensor ``(streams,)`` on the device
and layers work under masks, so that streams join, stall and leave on their own without a device sync.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """The temporal behaviour of a module, in steps of its own input.

    Args:
        receptive_field: frames that one output looks at.
        stride: input frames per output.
        padding: frames of padding at each end of the clip in clip mode.
        delay: ``receptive_field - 1 - padding`` for convolutions, pools and what is made of them; the
            single-output attention counts only the tokens between its query and now.
        first_output: the step (from 0) that emits the first output. It differs from ``delay`` for attention and
            ``Skip``.
    """

    receptive_field: int = 1
    stride: int = 1
    padding: int = 0
    delay: int = 0
    first_output: int = 0


PER_FRAME = Span()


def kernel_span(kernel: int, *, dilation: int = 1, stride: int = 1, padding: int = 0, name: str = "layer") -> Span:
    """Span of one temporal kernel. Raises ValueError when the padding would place an output before the first frame."""
    field = dilation * (kernel - 1) + 1
    if not 0 <= padding <= field - 1:
        raise ValueError(
            f"{name}: temporal padding {padding} is outside 0..{field - 1} (receptive field {field} - 1); "
            "an output would precede the first frame"
        )
    delay = field - 1 - padding
    return Span(field, stride, padding, delay, delay)


def sequence_span(spans: Iterable[Span]) -> Span:
    """Span of modules one after another: ``S = prod s``, ``P = p1 + p2 s1 + ...``, ``R = s R + R_i - s`` from the
    last back.
    """
    spans = list(spans)
    stride, padding, delay, first = 1, 0, 0, 0
    for span in spans:
        padding += span.padding * stride
        delay += span.delay * stride
        first += span.first_output * stride
        stride *= span.stride
    field = 1
    for span in reversed(spans):
        field = span.stride * field + span.receptive_field - span.stride
    return Span(field, stride, padding, delay, first)


def parallel_span(spans: Iterable[Span]) -> Span:
    """Span of branches that see the same input and are joined. Raises ValueError when their strides differ."""
    spans = list(spans)
    strides = sorted({span.stride for span in spans})
    if len(strides) != 1:
        raise ValueError(f"parallel branches need one total temporal stride, got {strides}")
    field = max(span.receptive_field for span in spans)
    slowest = spans[0]
    for span in spans[1:]:
        slowest = span if span.first_output > slowest.first_output else slowest
    return Span(field, strides[0], max(span.padding for span in spans), slowest.delay, slowest.first_output)


def branch_delay(slow: Span, fast: Span, *, name: str = "branch") -> int:
    """Output steps by which ``fast`` must wait for ``slow``. ValueError when they never share a step."""
    gap = slow.first_output - fast.first_output
    if gap % fast.stride:
        raise ValueError(
            f"{name} speaks {gap} frames before the slowest branch, which its stride {fast.stride} does not divide: "
            "the branches cannot be aligned by delaying outputs. Change a padding, or pass align='input' to delay "
            "the branch's input instead"
        )
    return gap // fast.stride


class Tick(NamedTuple):
    """What a layer knows of the present moment.

    ``clock``: frames that the stream consumed before this call, an int (lock-step) or a tensor (streams,). ``delay``
    and ``stride``: the first-output step and total stride of everything before the layer, so frame ``t`` of the
    stream reaches it exactly when ``t >= delay`` and ``(t - delay) % stride == 0``. ``active``: streams that have a
    frame (None: all). ``inplace``: whether preallocated memories may be written. ``youngest``: frames that every stream
    is known, on the host, to have consumed before this call; where it has passed a layer's delay nothing need be
    masked for want of frames (phases of a stride still are). ``turn``: steps that all streams made together in memories
    that the caller owns (None: not so); histories may then be rings, see :mod:`sparing.continual.rings`.
    """

    clock: int | Tensor
    delay: int = 0
    stride: int = 1
    active: Tensor | None = None
    inplace: bool = False
    youngest: int = 0
    turn: int | None = None


def after(tick: Tick, span: Span) -> Tick:
    """The tick behind a module of this span."""
    return tick._replace(delay=tick.delay + tick.stride * span.first_output, stride=tick.stride * span.stride)


def is_lockstep(tick: Tick) -> bool:
    return not isinstance(tick.clock, Tensor)


def is_live(tick: Tick) -> bool | Tensor:
    """Whether a frame reaches the layer in this step: bool, or (streams,) bool."""
    since = tick.clock - tick.delay
    if tick.stride == 1:
        return since >= 0
    if is_lockstep(tick):
        return since >= 0 and since % tick.stride == 0
    return (since >= 0) & (since % tick.stride == 0)


def frames_seen(tick: Tick) -> int | Tensor:
    """Frames that reached the layer before this call: int, or (streams,) of the clock's dtype."""
    if not isinstance(tick.clock, Tensor):
        return -(-max(tick.clock - tick.delay, 0) // tick.stride)
    since = (tick.clock - tick.delay).clamp(min=0)
    return since if tick.stride == 1 else (since + tick.stride - 1) // tick.stride


def surely_seen(tick: Tick) -> int:
    """Frames that reached the layer before this call in every stream, as far as the host knows."""
    return -(-max(tick.youngest - tick.delay, 0) // tick.stride)


def all_began(tick: Tick) -> bool:
    """Whether the host knows that no stream is still before its first frame at this layer."""
    return tick.youngest >= tick.delay


def first_emission(tick: Tick, span: Span) -> int:
    """Lock-step chunks: offset, in frames of the layer's input chunk, of its first output in this call."""
    seen = frames_seen(tick)
    at = max(seen, span.first_output)
    return at + (span.first_output - at) % span.stride - seen


def admit(x: Tensor, tick: Tick, fill: float = 0.0) -> Tensor:
    """Frames that do not exist yet count as ``fill``. x: (streams, C, ...) for a step; no-op in lock-step."""
    if is_lockstep(tick) or (tick.stride == 1 and all_began(tick)):
        return x
    return torch.where(_per_stream(is_live(tick), x), x, fill)


def admit_chunk(x: Tensor, tick: Tick, fill: float = 0.0) -> Tensor:
    """The same for a chunk (streams, C, T, ...) of ragged streams; only the stride 1 before the layer is possible."""
    if not isinstance(tick.clock, Tensor) or tick.delay == 0:
        return x
    live = tick.clock[:, None] + torch.arange(x.shape[2], device=x.device) >= tick.delay
    return torch.where(live.view(x.shape[0], 1, x.shape[2], *[1] * (x.ndim - 3)), x, fill)


def keep(new: Tensor, old: Tensor, tick: Tick) -> Tensor:
    """A memory behind a stride moves on only when a frame arrives. Elsewhere frames of fill do no harm: see
    :func:`admit`.
    """
    if is_lockstep(tick) or tick.stride == 1:
        return new
    return torch.where(_per_stream(is_live(tick), new), new, old)


def keep_unless_live(new: Tensor, old: Tensor, tick: Tick) -> Tensor:
    """As :func:`keep`, for memories that a frame of fill would change (recurrent states)."""
    if is_lockstep(tick) or (tick.stride == 1 and all_began(tick)):
        return new
    return torch.where(_per_stream(is_live(tick), new), new, old)


def _per_stream(mask: Tensor, like: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (like.ndim - 1))
