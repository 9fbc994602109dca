"""The contract of a network that runs on live streams.

A :class:`Continual` module computes the same function in four ways:

* ``forward(x)``: clip mode, x (N, C, T, ...), exactly the torch layer that it extends;
* ``step(x, state)``: one frame of each stream, x (streams, C, ...);
* ``steps(x, state)``: a chunk of frames, x (streams, C, T, ...), without a Python loop over frames;
* ``flush(state)``: what the end padding still owes when a stream is over.

**What equals what.** ``step`` outputs are the first outputs of the offline network *run over the whole stream* (every
layer pads its own input only at the start of the stream); ``steps`` followed by ``flush`` is ``forward`` of the whole
stream including the end padding. With temporal padding a step is *not* ``forward(last frames)``: the clip network
sees zeros at the clip border in every layer where the stream has real frames. Without temporal padding it is equal to
``forward(last R frames)``.

Example with kernel 3, padding 1 and a stream of 6 frames: ``forward`` gives 6 outputs; output 0 needs frames -1
(zero), 0, 1, so the first step says nothing (delay 1) and step 1 says output 0; after step 5 output 4 has been said;
``flush`` says output 5, for which frame 6 is zero. A clip network on frames 3, 4, 5 would see zeros in place of frame
2 for its first output.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparing.continual import state as states
from sparing.continual.state import StreamState
from sparing.continual.timing import Span, Tick, first_emission


@dataclass(frozen=True)
class Plan:
    """When and at what cost a network speaks; frames and steps are those of the stream.

    ``period``: total temporal stride, frames between two outputs. ``equals_clip_of_last_frames``: whether a step
    equals ``forward`` of the last ``receptive_field`` frames (true without temporal padding). ``bytes_per_stream``:
    None without a frame shape. ``warm_after``: frames after which every memory of a stream is full.
    """

    receptive_field: int
    delay: int
    period: int
    padding: int
    first_output_step: int
    equals_clip_of_last_frames: bool
    bytes_per_stream: int | None = None

    @property
    def warm_after(self) -> int:
        return self.receptive_field + self.first_output_step


class MisfitError(ValueError):
    """Frames that a layer cannot step on: its path in the network, its type, and why."""

    def __init__(self, path: str, kind: str, why: str) -> None:
        super().__init__(f"{path} ({kind}): {why}")
        self.path, self.kind, self.why = path, kind, why


class Continual:
    """Mixin of every layer and network that steps. Subclasses give ``_span``, ``_memory``, ``_step`` and ``_steps``."""

    training: bool
    named_modules: Callable[..., Any]
    parameters: Callable[..., Any]

    def span(self) -> Span:
        """Temporal behaviour in steps of the module's own input (worked out once)."""
        span = self.__dict__.get("_known_span")
        if span is None:
            span = self.__dict__["_known_span"] = self._span()
        return span

    def _span(self) -> Span:
        raise NotImplementedError(type(self).__name__)

    def _memory(
        self, streams: int, frame_shape: tuple[int, ...], make: Callable[..., Tensor]
    ) -> tuple[dict, tuple[int, ...]]:
        """Empty memory for frames (streams, *frame_shape), and the shape of output frames. ``make(shape,
        dtype=None)`` allocates.
        """
        raise NotImplementedError(type(self).__name__)

    def _step(self, x: Tensor, memory: dict, tick: Tick) -> tuple[Tensor | None, dict]:
        """One frame (streams, C, ...). None where, in lock-step, nothing is said."""
        raise NotImplementedError(type(self).__name__)

    def _steps(self, x: Tensor | None, memory: dict, tick: Tick, end: bool) -> tuple[Tensor | None, dict]:
        """A chunk (streams, C, T, ...) or None for no frames; ``end`` appends the layer's end padding."""
        raise NotImplementedError(type(self).__name__)

    # ---- public

    def plan(self, frame_shape: tuple[int, ...] | None = None) -> Plan:
        """Receptive field, delay, period, padding and, given the shape of a frame (C, ...), the bytes of memory per
        stream.
        """
        span = self.span()
        size = None if frame_shape is None else states.state_bytes(self.init_state(1, frame_shape))
        return Plan(
            receptive_field=span.receptive_field,
            delay=span.delay,
            period=span.stride,
            padding=span.padding,
            first_output_step=span.first_output,
            equals_clip_of_last_frames=span.padding == 0,
            bytes_per_stream=size,
        )

    def init_state(
        self,
        streams: int,
        frame_shape: tuple[int, ...],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        lockstep: bool = False,
    ) -> StreamState:
        """Preallocate the memory of ``streams`` streams that have seen nothing.

        Args:
            frame_shape: shape of one frame without stream and time axes: (C,), (C, V), (C, H, W).
            lockstep: all streams share their phase; the clock is a Python int and silent layers are skipped.

        Raises:
            ValueError: frames that a layer cannot step on; the message names its path.
        """
        if streams < 1:
            raise ValueError(f"streams must be at least 1, got {streams}")
        self.span()  # known from here on, so that a compiled step need not work it out
        parameter = next(iter(self.parameters()), None)
        dtype = dtype or (parameter.dtype if parameter is not None else torch.get_default_dtype())
        device = device or (parameter.device if parameter is not None else "cpu")

        def make(shape: tuple[int, ...], dtype: torch.dtype = dtype, fill: float = 0.0) -> Tensor:
            return torch.full(shape, fill, dtype=dtype, device=device)

        memory, _ = self._memory(streams, tuple(frame_shape), make)
        clock: Any = 0 if lockstep else torch.zeros(streams, dtype=torch.int64, device=device)
        return StreamState(clock, memory, make((streams, 0, *frame_shape)))

    def step(
        self,
        x: Tensor,
        state: StreamState,
        *,
        active: Tensor | None = None,
        inplace: bool = False,
        allow_train: bool = False,
        youngest: int = 0,
    ) -> tuple[Tensor | None, Tensor | bool, StreamState]:
        """Consume one frame of every stream.

        Args:
            x: (streams, C, ...), one frame each.
            state: from :meth:`init_state` or an earlier call; untouched unless ``inplace``.
            active: (streams,) bool; streams where it is False are left as they are, bit for bit (None: all have a
                frame).
            inplace: write the new memories into the tensors of ``state`` (for CUDA graphs; not under autograd).
            allow_train: permit batch statistics, which make a step depend on its neighbours.
            youngest: frames that the caller knows every stream to have consumed before this one; masks for missing
                frames are left out where none can be missing. :class:`Stream` and ``StreamBatch`` know it. Streams
                that are younger get wrong outputs.

        Returns:
            ``(y, valid, state)``: y (streams, C', ...), zero where not valid; valid (streams,) bool. With a lock-step
            state valid is a Python bool, and y is None when it is False. Under autograd gradients flow through the
            returned state: detach it (``state.map_memory``) to truncate back-propagation.

        Raises:
            TypeError, ValueError: when x or active do not fit the state, with expected and received values.
            RuntimeError: in train mode with batch normalisation, unless ``allow_train``.
        """
        self._check(x, state, 1, allow_train)
        if active is not None and (active.dtype != torch.bool or tuple(active.shape) != (state.streams,)):
            raise ValueError(
                f"active must be a bool tensor of shape ({state.streams},), got {active.dtype} {tuple(active.shape)}"
            )
        if active is not None and state.lockstep:
            raise ValueError("active needs per-stream clocks: use init_state(lockstep=False)")
        y, memory = self._step(x, state.memory, Tick(state.clock, active=active, inplace=inplace, youngest=youngest))
        new = StreamState(state.clock + 1, memory, state.frame)
        span = self.span()
        valid: Tensor | bool
        if state.lockstep:
            valid = y is not None
        else:
            since = state.clock - span.first_output
            valid = since >= 0 if span.stride == 1 else (since >= 0) & (since % span.stride == 0)
            if active is not None:
                valid = valid & active
                new = states.merge(active, new, state)
            if youngest < span.first_output or span.stride > 1 or active is not None:
                y = torch.where(valid.view(-1, *[1] * (y.ndim - 1)), y, 0)  # type: ignore[union-attr]
        return y, valid, states.write(state, new) if inplace else new

    def step_together(
        self, x: Tensor, state: StreamState, *, turn: int, youngest: int = 0
    ) -> tuple[Tensor, StreamState]:
        """:meth:`step` for a batch that owns its memories and knows on the host which streams speak: nothing is masked
        that need not be, and ``state`` is used up.

        Args:
            x: (streams, C, ...), one frame each, of streams with clocks of their own.
            turn: steps that these memories made together before this one.
            youngest: see :meth:`step`.

        Returns:
            y (streams, C', ...), with anything where a stream does not speak, and the state after, whose histories may
            be rings (:mod:`sparing.continual.rings`): what reads it otherwise must put them in order.
        """
        self._check(x, state, 1, False)
        y, memory = self._step(x, state.memory, Tick(state.clock, youngest=youngest, turn=turn))
        assert y is not None, "streams with clocks of their own always have an output"
        return y, StreamState(state.clock + 1, memory, state.frame)

    def steps(
        self, x: Tensor, state: StreamState, *, pad_end: bool = False, allow_train: bool = False
    ) -> tuple[Tensor | None, Tensor, StreamState]:
        """Consume a chunk of frames of every stream, vectorised over time; also the fast way to prime a stream.

        Args:
            x: (streams, C, T, ...).
            pad_end: the streams end here: append the outputs of the end padding; the returned state is empty.

        Returns:
            ``(y, valid, state)``: y (streams, C', T', ...), valid (streams, T'). The outputs of stream s are
            ``y[s][:, valid[s]]``, in order. y is None when no stream says anything.
        """
        self._check(x, state, 2, allow_train)
        if state.lockstep:
            y, memory = self._steps(x, state.memory, Tick(state.clock), pad_end)
            new = StreamState(state.clock + x.shape[2], memory, state.frame)
            count = 0 if y is None else y.shape[2]
            valid = torch.ones(state.streams, count, dtype=torch.bool, device=x.device)
            return y, valid, states.empty_like(state) if pad_end else new
        span = self.span()
        if span.stride > 1 or pad_end:
            return self._by_phase(x, state, pad_end)
        y, memory = self._steps(x, state.memory, Tick(state.clock), False)
        valid = state.clock[:, None] + torch.arange(x.shape[2], device=x.device) >= span.first_output
        assert y is not None
        y = torch.where(valid.view(valid.shape[0], 1, valid.shape[1], *[1] * (y.ndim - 3)), y, 0)
        return y, valid, StreamState(state.clock + x.shape[2], memory, state.frame)

    def flush(self, state: StreamState) -> tuple[Tensor | None, Tensor, StreamState]:
        """End all streams: ``(y, valid, empty state)`` with the outputs that the end padding still gives, as
        :meth:`steps`.
        """
        if state.lockstep:
            y, _ = self._steps(None, state.memory, Tick(state.clock), True)
            count = 0 if y is None else y.shape[2]
            valid = torch.ones(state.streams, count, dtype=torch.bool, device=state.frame.device)
            return y, valid, states.empty_like(state)
        return self._by_phase(None, state, True)

    def _by_phase(self, x: Tensor | None, state: StreamState, end: bool) -> tuple[Tensor | None, Tensor, StreamState]:
        """Streams of one clock are in lock-step with each other: run them group by group (one device sync a call)."""
        groups: dict[int, list[int]] = {}
        for slot, clock in enumerate(state.clock.tolist()):
            groups.setdefault(clock, []).append(slot)
        said: list[tuple[list[int], Tensor]] = []
        new = state
        for clock, slots in groups.items():
            part = states.gather(state, slots)
            index = torch.tensor(slots, device=state.frame.device)
            y, memory = self._steps(None if x is None else x[index], part.memory, Tick(clock), end)
            frames = 0 if x is None else x.shape[2]
            new = states.scatter(new, index, StreamState(part.clock + frames, memory, part.frame))
            if y is not None:
                said.append((slots, y))
        longest = max((y.shape[2] for _, y in said), default=0)
        valid = torch.zeros(state.streams, longest, dtype=torch.bool, device=state.frame.device)
        if longest == 0:
            return None, valid, states.empty_like(state) if end else new
        like = said[0][1]
        out = like.new_zeros((state.streams, like.shape[1], longest, *like.shape[3:]))
        for slots, y in said:
            out[slots, :, : y.shape[2]] = y
            valid[slots, : y.shape[2]] = True
        return out, valid, states.empty_like(state) if end else new

    def _check(self, x: Tensor, state: StreamState, time_axes: int, allow_train: bool) -> None:
        if not isinstance(state, StreamState):
            raise TypeError(f"state must be a StreamState from init_state, got {type(state).__name__}")
        want = (state.streams, *state.frame_shape)
        shape = tuple(x.shape)
        if time_axes == 2:
            if x.ndim != len(want) + 1:
                raise ValueError(
                    f"steps takes a chunk (streams, C, T, ...) = {want[:2] + ('T',) + want[2:]}, got {shape}"
                )
            if x.shape[2] == 0:
                raise ValueError(f"a chunk needs at least one frame, got {shape}")
            shape = shape[:2] + shape[3:]
        if shape != want:
            hint = "; a chunk with a time axis goes to steps()" if x.ndim == len(want) + 1 else ""
            raise ValueError(f"frames must have shape {want} (streams, channels, ...), got {shape}{hint}")
        if x.dtype != state.frame.dtype or x.device != state.frame.device:
            raise TypeError(f"frames must be {state.frame.dtype} on {state.frame.device}, got {x.dtype} on {x.device}")
        if self.training and not allow_train:
            for name, module in self.named_modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
                    raise RuntimeError(
                        f"{name or type(module).__name__} would use batch statistics, which differ between "
                        "clip and step: call eval() first, or pass allow_train=True"
                    )


class Stream:
    """A network with the state of its streams: feed frames, get outputs.

    Example:
        >>> stream = Stream(network, streams=4, frame_shape=(3, 160, 160))
        >>> scores, valid = stream(frames)          # frames (4, 3, 160, 160)
    """

    def __init__(self, network: Continual, *, streams: int = 1, frame_shape: tuple[int, ...], **options: Any) -> None:
        self.network = network
        self.state = network.init_state(streams, frame_shape, **options)
        self._warm_after = network.plan().warm_after

    @property
    def state(self) -> StreamState:
        """Memory of the streams; may be replaced, by a restored one for example."""
        return self._state

    @state.setter
    def state(self, state: StreamState) -> None:
        self._state = state
        self._youngest = 0  # frames that every stream is known to have consumed

    def __call__(self, x: Tensor, *, active: Tensor | None = None) -> tuple[Tensor | None, Tensor | bool]:
        """One frame of every stream: ``(y, valid)`` as :meth:`Continual.step`."""
        # One number before and one after, so that a compiled step is compiled twice and not once a frame.
        youngest = self._warm_after if self._youngest >= self._warm_after else 0
        y, valid, self._state = self.network.step(x, self._state, active=active, youngest=youngest)
        self._youngest += active is None
        return y, valid

    def chunk(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """A chunk of frames: ``(y, valid)`` as :meth:`Continual.steps`."""
        y, valid, self._state = self.network.steps(x, self._state)
        self._youngest += x.shape[2]
        return y, valid

    def flush(self) -> tuple[Tensor | None, Tensor]:
        """End all streams: ``(y, valid)`` of the end padding; the streams start anew afterwards."""
        y, valid, self.state = self.network.flush(self._state)
        return y, valid

    def reset(self, slots: Tensor | list[int] | int | None = None) -> None:
        """Empty some streams (default: all)."""
        everyone = list(range(self._state.streams))
        self.state = states.reset(self._state, everyone if slots is None else slots)


def emits_now(tick: Tick, span: Span) -> bool:
    """Lock-step: whether a layer of this span speaks at this frame."""
    return first_emission(tick, span) == 0


def over_stream(module: Continual, x: Tensor) -> Tensor:
    """What a module says over the whole stream x (N, C, T, ...), steps and flush together; differentiable.

    Raises:
        ValueError: when the stream is too short for it to say anything.
    """

    def make(shape: tuple[int, ...], dtype: torch.dtype | None = None, fill: float = 0.0) -> Tensor:
        return x.new_full(shape, fill, dtype=dtype or x.dtype)

    memory, _ = module._memory(x.shape[0], (x.shape[1], *x.shape[3:]), make)
    y, _ = module._steps(x, memory, Tick(0), True)
    if y is None:
        raise ValueError(f"the stream has {x.shape[2]} frames, too few for {type(module).__name__} to say anything")
    return y
