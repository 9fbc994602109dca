"""Many live streams in one fixed batch: joining, leaving, stalling, timing out, saved and restored one by one.

A seat is a row of a preallocated state. Every stream keeps its own phase; a stream without a frame in a step is left
as it is, so outputs are those of the network run on the stream alone. Shapes never change: one compiled graph, or one
captured CUDA graph, serves all steps, and no step reads anything back from the device (which streams speak is known
on the host from the plan).

On a CPU the seats are stepped in tiles of a few, through the whole network, because the memories and activations of a
tile stay in the caches where those of all seats do not. Streams take the lowest free seat, so most tiles are full or
empty: a full one needs no selection between old and new memories, an empty one is not stepped at all, and one whose
streams are all old enough for a layer steps through it without masks. An empty seat in a tile is stepped with the
others, for what is computed there is thrown away when somebody sits down; where most streams of a tile stall, those
that do not are stepped by themselves. What each tile is, the host knows without asking the device.
"""

import heapq
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparing.continual import rings
from sparing.continual import state as states
from sparing.continual.module import Continual
from sparing.continual.state import StreamState

# Memory of the streams that are stepped together on a CPU (with their activations a few times this passes the caches
# layer by layer), and the fewest seats over which the cost of calling the layers is spread.
TILE_BYTES = 6 << 20
SMALLEST_TILE = 4


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
        timeout_s: streams without a frame for longer leave at the next step (None: never); one whose frame comes with
            that very step begins anew.
        compile: ``torch.compile`` the step (True, or a backend's name).
        cuda_graph: capture the step and replay it; None = on CUDA devices unless compiled.
        tile: seats that are stepped together; None = all of them on a device or when compiled, on a CPU as many
            as have ``TILE_BYTES`` of memory, at least ``SMALLEST_TILE``.
        clock: seconds, for time-outs.

    Raises:
        ValueError: frames that the network cannot step on or of another dtype than it, or wrong numbers.
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
        tile: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not isinstance(network, Continual):
            raise TypeError(f"{type(network).__name__} does not run on streams: sparing.continual.convert makes it")
        if timeout_s is not None and timeout_s <= 0:
            raise ValueError(f"timeout_s must be positive or None, got {timeout_s}")
        if tile is not None and tile < 1:
            raise ValueError(f"tile must be at least 1 seat or None, got {tile}")
        self.network, self.seats, self.timeout_s = network, seats, timeout_s
        parameter = next(iter(network.parameters()), None)
        if dtype is not None and parameter is not None and dtype != parameter.dtype:
            raise ValueError(f"dtype {dtype} does not fit a network in {parameter.dtype}: convert the network first")
        with torch.inference_mode(False):  # batches outlive it, and their memories are written in place
            whole = network.init_state(seats, frame_shape, dtype=dtype, device=device)
            self._x = whole.frame.new_zeros((seats, *frame_shape))
            self._active = torch.zeros(seats, dtype=torch.bool, device=whole.frame.device)
        self.plan = network.plan()
        self.frame_shape = whole.frame_shape
        self._clock = clock
        self._seat_of: dict[str, int] = {}
        self._free = list(range(seats))
        self._seated = [False] * seats
        self._seen = [0] * seats
        self._last = [0.0] * seats
        frame = whole.frame
        self._graph: Any = None
        # Where pointers must stay (graphs) or shapes (compiled steps), new memories are copied over the old ones;
        # elsewhere layers may keep them as they like.
        self._fixed = bool(compile) or frame.is_cuda
        self._wants_graph = frame.is_cuda and not compile if cuda_graph is None else cuda_graph
        if self._wants_graph and not frame.is_cuda:
            raise ValueError(f"cuda_graph needs a CUDA device, the state is on {frame.device}")
        self._advance: Callable[..., Any] = network.step
        if compile:
            backend = {} if compile is True else {"backend": compile}
            self._advance = torch.compile(network.step, fullgraph=True, **backend)
        if tile is None:
            size = max(SMALLEST_TILE, TILE_BYTES * seats // max(states.state_bytes(whole), 1))
            tiles = -(-seats // size)  # of one size as near as can be
            tile = seats if compile or frame.is_cuda else -(-seats // tiles)
        elif tile < seats and self._wants_graph:
            raise ValueError(f"a CUDA graph steps all {seats} seats together, got tile {tile}")
        self.tile = tile
        starts = range(0, seats, tile)
        with torch.inference_mode(False):
            self._tiles = [whole] if tile >= seats else [states.gather(whole, _rows(s, tile, seats)) for s in starts]
            self._like = states.gather(whole, [0])
        self._turn = [0] * len(self._tiles)  # steps that each tile made

    @property
    def state(self) -> StreamState:
        """Memory of all seats; empty seats hold anything. With compiled steps or graphs the memories themselves, else a
        copy.
        """
        if self._fixed:
            return states.concatenate(self._tiles)
        parts = zip(self._tiles, self._turn)
        return states.concatenate(
            [rings.in_order(states.gather(part, range(part.streams)), self._like, turn) for part, turn in parts]
        )

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
        seat = heapq.heappop(self._free)
        self._seat_of[name], self._seated[seat] = seat, True
        self._empty(seat)
        self._last[seat] = self._clock()

    def leave(self, name: str) -> None:
        """Free the seat of a stream."""
        seat = self._seat(name)
        del self._seat_of[name]
        self._seated[seat] = False
        heapq.heappush(self._free, seat)

    def reset(self, name: str) -> None:
        """Begin a stream anew (a cut, another camera); others are untouched."""
        self._empty(self._seat(name))

    def _empty(self, seat: int) -> None:
        self._seen[seat] = 0
        tile, row = divmod(seat, self.tile)
        with torch.inference_mode():
            states.reset(self._tiles[tile], [row], inplace=True)

    def _take(self, seat: int) -> StreamState:
        tile, row = divmod(seat, self.tile)
        return rings.in_order(states.gather(self._tiles[tile], [row]), self._like, self._turn[tile])

    def _put(self, seat: int, part: StreamState) -> None:
        tile, row = divmod(seat, self.tile)
        self._write(tile, [row], part, self._turn[tile])

    def _write(self, tile: int, rows: list[int], streams: StreamState, was: int) -> None:
        """Put streams into rows of a tile; their histories are in order, or rings before step ``was``."""
        kept = rings.as_kept(streams, self._like, self._tiles[tile], self._turn[tile], was=was)
        with torch.inference_mode():  # the memories may come from a step under it
            states.scatter(self._tiles[tile], rows, kept, inplace=True)

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

    def _heard(self, seat: int) -> None:
        """A frame came: the stream stays; after a silence longer than ``timeout_s`` it begins anew."""
        now = self._clock()
        if self.timeout_s is not None and now - self._last[seat] > self.timeout_s:
            self._empty(seat)
        self._last[seat] = now

    @torch.no_grad()
    def step(self, frames: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One frame of some of the streams; the others stall.

        Args:
            frames: name -> (C, ...). Nothing is consumed when any of them is wrong.

        Returns:
            name -> output (C', ...) of the streams that speak in this step.

        Raises:
            ValueError: an unknown stream, or a frame that is no tensor or of another shape or dtype; the message names
                the stream.
        """
        if not isinstance(frames, Mapping):
            raise ValueError(f"frames are given by stream, {{name: frame}}, got {type(frames).__name__}")
        seats, given = [], []
        for name, frame in frames.items():
            seats.append(self._seat(name))
            if not isinstance(frame, Tensor):
                raise ValueError(f"stream {name!r}: a frame is a tensor, got {type(frame).__name__}")
            if tuple(frame.shape) != self.frame_shape or frame.dtype != self._x.dtype:
                raise ValueError(
                    f"stream {name!r}: frames are {self._x.dtype} {self.frame_shape}, "
                    f"got {frame.dtype} {tuple(frame.shape)}"
                )
            given.append(frame.to(self._x.device, non_blocking=True))
        for seat in seats:
            self._heard(seat)
        self.time_out()
        if not given:
            return {}
        index = torch.tensor(seats).to(self._x.device, non_blocking=True)
        self._x.index_copy_(0, index, torch.stack(given))
        self._active.zero_().index_fill_(0, index, True)
        y = self._run(seats)
        spoken = {}
        for name, seat in zip(frames, seats):
            since = self._seen[seat] - self.plan.first_output_step
            if since >= 0 and since % self.plan.period == 0:
                tile, row = divmod(seat, self.tile)
                spoken[name] = y[tile][row]
            self._seen[seat] += 1
        return spoken

    def _run(self, seats: list[int]) -> dict[int, Tensor]:
        """Step the tiles that hold some of ``seats``: their outputs (tile, C', ...) by tile."""
        if self._wants_graph:
            if self._graph is None:
                self._capture()
            self._graph.replay()
            return {0: self._y.clone()}
        speaking: dict[int, set[int]] = {}
        for seat in seats:
            tile, row = divmod(seat, self.tile)
            speaking.setdefault(tile, set()).add(row)
        return {tile: self._run_tile(tile, rows) for tile, rows in speaking.items()}

    def _run_tile(self, tile: int, given: set[int]) -> Tensor:
        """Step a tile whose rows ``given`` have a frame: y (tile, C', ...)."""
        state, start, turn = self._tiles[tile], tile * self.tile, self._turn[tile]
        x = self._x[start : start + state.streams]
        if self._fixed:
            active = self._active[start : start + state.streams]
            y, _, self._tiles[tile] = self._advance(x, state, active=active, inplace=True)
            return y.clone() if self._advance is not self.network.step else y
        ages = {row: self._seen[start + row] for row in range(state.streams) if self._seated[start + row]}
        silent = [row for row in ages if row not in given]
        youngest = min(ages[row] for row in given)
        if len(given) <= max(len(silent), state.streams // 4):  # few: only they are stepped, and the tile stays
            rows = sorted(given)
            y, new = self.network.step_together(x[rows], states.gather(state, rows), turn=turn, youngest=youngest)
            self._write(tile, rows, new, turn + 1)
            return y.new_zeros((state.streams, *y.shape[1:])).index_copy_(0, torch.tensor(rows), y)
        kept = states.gather(state, silent) if silent else None
        y, new = self.network.step_together(x, state, turn=turn, youngest=youngest)
        self._tiles[tile], self._turn[tile] = new, turn + 1
        if kept is not None:
            self._write(tile, silent, kept, turn)
        # What is answered must not change later: a network that hands its input on (a delay of nothing) answers with
        # the buffer of the next frames, and rows of the memories are written in place.
        ours = {x.untyped_storage().data_ptr(), *(t.untyped_storage().data_ptr() for _, t in states.leaves(new.memory))}
        return y.clone() if y.untyped_storage().data_ptr() in ours else y

    def _capture(self) -> None:
        """Record one step; warm-up runs have no active stream, so that no memory moves."""
        active = self._active.clone()
        self._active.zero_()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.network.step(self._x, self._tiles[0], active=self._active, inplace=True)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, _, _ = self.network.step(self._x, self._tiles[0], active=self._active, inplace=True)
        assert y is not None
        self._y: Tensor = y
        self._graph = graph
        self._active.copy_(active)

    @torch.no_grad()
    def prime(self, name: str, frames: Tensor) -> Tensor | None:
        """Feed a stream several past frames (C, T, ...) in one call; gives its outputs (C', T') or None."""
        seat = self._seat(name)
        if not isinstance(frames, Tensor):
            raise ValueError(f"stream {name!r}: frames are a tensor (C, T, ...), got {type(frames).__name__}")
        self._heard(seat)
        part = self._take(seat)
        y, valid, part = self.network.steps(frames.unsqueeze(0), part)
        self._put(seat, part)
        self._seen[seat] += frames.shape[1]
        return None if y is None or not bool(valid.any()) else y[0][:, valid[0]]

    def save(self, name: str, path: str | Path) -> None:
        """Write the state of one stream to a safetensors file."""
        states.save_state(self._take(self._seat(name)), path)

    def restore(self, name: str, path: str | Path) -> None:
        """Seat a stream (if it is not yet) and give it a saved state.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the state of another network, frame size or dtype, or of streams in lock-step; or no seat is
                free. Who is seated stays as it was.
        """
        part = states.load_state(path, self._like)
        if part.streams != 1:
            raise ValueError(f"{path} holds {part.streams} streams, expected one")
        if part.lockstep:
            raise ValueError(f"{path} holds a lock-step state; streams have clocks of their own (lockstep=False)")
        if name not in self._seat_of:
            self.join(name)
        seat = self._seat(name)
        self._put(seat, part)
        self._seen[seat], self._last[seat] = int(part.clock[0]), self._clock()


def _rows(start: int, tile: int, seats: int) -> list[int]:
    return list(range(start, min(start + tile, seats)))
