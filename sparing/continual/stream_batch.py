"""Many live streams in one fixed batch: joining, leaving, stalling, timing out, saved and restored one by one.

A seat is a row of a preallocated state. Every stream keeps its own phase; a stream without a frame in a step is left
as it is, so outputs are those of the network run on the stream alone. Shapes never change: one compiled graph, or one
captured CUDA graph, serves all steps, and no step reads anything back from the device (which streams speak is known
on the host from the plan).
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparing.continual import state as states
from sparing.continual.module import Continual


class StreamBatch:
    """Seats for live streams before one network.

    Example:
        >>> batch = StreamBatch(network, seats=64, frame_shape=(3, 160, 160))
        >>> batch.join("gate 4")
        >>> scores = batch.step({"gate 4": frame})     # {} until the network has seen enough

    Args:
        network: any continual network, in eval mode.
        seats: streams at most.
        frame_shape: (C, ...) of one frame.
        timeout_s: streams without a frame for longer leave at the next step (None: never).
        compile: ``torch.compile`` the step (True, or a backend's name).
        cuda_graph: capture the step and replay it; None = on CUDA devices unless compiled.
        clock: seconds, for time-outs.
    """

    def __init__(
        self,
        network: Continual,
        *,
        seats: int,
        frame_shape: tuple[int, ...],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        timeout_s: float | None = None,
        compile: bool | str = False,
        cuda_graph: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if timeout_s is not None and timeout_s <= 0:
            raise ValueError(f"timeout_s must be positive or None, got {timeout_s}")
        self.network, self.seats, self.timeout_s = network, seats, timeout_s
        self.state = network.init_state(seats, frame_shape, dtype=dtype, device=device)
        self.plan = network.plan()
        self._clock = clock
        self._seat_of: dict[str, int] = {}
        self._free = list(range(seats))[::-1]
        self._seen = [0] * seats
        self._last = [0.0] * seats
        frame = self.state.frame
        self._x = frame.new_zeros((seats, *frame_shape))
        self._active = torch.zeros(seats, dtype=torch.bool, device=frame.device)
        self._graph: Any = None
        self._wants_graph = frame.is_cuda and not compile if cuda_graph is None else cuda_graph
        if self._wants_graph and not frame.is_cuda:
            raise ValueError(f"cuda_graph needs a CUDA device, the state is on {frame.device}")
        self._advance: Callable[..., Any] = network.step
        if compile:
            backend = {} if compile is True else {"backend": compile}
            self._advance = torch.compile(network.step, fullgraph=True, **backend)

    @property
    def streams(self) -> list[str]:
        """Names of the seated streams."""
        return list(self._seat_of)

    def join(self, name: str) -> None:
        """Seat a new stream, which has seen nothing.

        Raises:
            ValueError: the name is seated already, or every seat is taken.
        """
        if name in self._seat_of:
            raise ValueError(f"stream {name!r} is seated already")
        if not self._free:
            raise ValueError(f"all {self.seats} seats are taken; {name!r} cannot join until a stream leaves")
        seat = self._free.pop()
        self._seat_of[name] = seat
        self._empty(seat)
        self._last[seat] = self._clock()

    def leave(self, name: str) -> None:
        """Free the seat of a stream."""
        self._free.append(self._seat(name))
        del self._seat_of[name]

    def reset(self, name: str) -> None:
        """Begin a stream anew (a cut, another camera); others are untouched."""
        self._empty(self._seat(name))

    def _empty(self, seat: int) -> None:
        self._seen[seat] = 0
        self.state = states.reset(self.state, [seat], inplace=True)

    def _seat(self, name: str) -> int:
        if name not in self._seat_of:
            raise ValueError(f"no stream {name!r}; seated are {', '.join(map(repr, self._seat_of)) or 'none'}")
        return self._seat_of[name]

    def time_out(self) -> list[str]:
        """Let streams go that gave no frame for longer than ``timeout_s``; returns their names."""
        if self.timeout_s is None:
            return []
        now = self._clock()
        gone = [name for name, seat in self._seat_of.items() if now - self._last[seat] > self.timeout_s]
        for name in gone:
            self.leave(name)
        return gone

    @torch.no_grad()
    def step(self, frames: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One frame of some of the streams; the others stall.

        Args:
            frames: name -> (C, ...). Nothing is consumed when any of them is wrong.

        Returns:
            name -> output (C', ...) of the streams that speak in this step.

        Raises:
            ValueError: an unknown stream, or a frame of another shape or dtype; the message names the stream.
        """
        seats, given = [], []
        for name, frame in frames.items():
            seats.append(self._seat(name))
            if tuple(frame.shape) != self.state.frame_shape or frame.dtype != self._x.dtype:
                raise ValueError(
                    f"stream {name!r}: frames are {self._x.dtype} {self.state.frame_shape}, "
                    f"got {frame.dtype} {tuple(frame.shape)}"
                )
            given.append(frame.to(self._x.device, non_blocking=True))
        now = self._clock()
        for seat in seats:
            self._last[seat] = now
        self.time_out()
        if not given:
            return {}
        index = torch.tensor(seats).to(self._x.device, non_blocking=True)
        self._x.index_copy_(0, index, torch.stack(given))
        self._active.zero_().index_fill_(0, index, True)
        y = self._run()
        spoken = {}
        for name, seat in zip(frames, seats):
            since = self._seen[seat] - self.plan.first_output_step
            if since >= 0 and since % self.plan.period == 0:
                spoken[name] = y[seat]
            self._seen[seat] += 1
        return spoken

    def _run(self) -> Tensor:
        if not self._wants_graph:
            y, _, self.state = self._advance(self._x, self.state, active=self._active, inplace=True)
            return y.clone() if self._advance is not self.network.step else y
        if self._graph is None:
            self._capture()
        self._graph.replay()
        return self._y.clone()

    def _capture(self) -> None:
        """Record one step; warm-up runs have no active stream, so that no memory moves."""
        active = self._active.clone()
        self._active.zero_()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.network.step(self._x, self.state, active=self._active, inplace=True)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, _, _ = self.network.step(self._x, self.state, active=self._active, inplace=True)
        assert y is not None
        self._y: Tensor = y
        self._graph = graph
        self._active.copy_(active)

    @torch.no_grad()
    def prime(self, name: str, frames: Tensor) -> Tensor | None:
        """Feed a stream several past frames (C, T, ...) in one call; gives its outputs (C', T') or None."""
        seat = self._seat(name)
        part = states.gather(self.state, [seat])
        y, valid, part = self.network.steps(frames.unsqueeze(0), part)
        self.state = states.scatter(self.state, [seat], part, inplace=True)
        self._seen[seat] += frames.shape[1]
        self._last[seat] = self._clock()
        return None if y is None or not bool(valid.any()) else y[0][:, valid[0]]

    def save(self, name: str, path: str | Path) -> None:
        """Write the state of one stream to a safetensors file."""
        states.save_state(states.gather(self.state, [self._seat(name)]), path)

    def restore(self, name: str, path: str | Path) -> None:
        """Seat a stream (if it is not yet) and give it a saved state.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the state of another network, frame size or dtype; or no seat is free.
        """
        part = states.load_state(path, self.state)
        if part.streams != 1:
            raise ValueError(f"{path} holds {part.streams} streams, expected one")
        if name not in self._seat_of:
            self.join(name)
        seat = self._seat(name)
        self.state = states.scatter(self.state, [seat], part, inplace=True)
        self._seen[seat] = int(part.clock[0])
