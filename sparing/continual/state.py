"""The memory of live streams as plain data: preallocated tensors, one row per stream.

A :class:`StreamState` is a pytree: torch's tree functions, ``torch.compile``, ``torch.export`` and CUDA graphs take
it as it is. Nothing of it lives in the network, so one network serves any number of states. All memories have the
stream axis first, which makes joining, leaving, moving and saving streams row operations that know nothing of the
layers.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

# What an empty memory holds, by leaf name; everything else starts at zero. Maxima of nothing are -inf.
EMPTY = {"maxima": float("-inf"), "row_max": float("-inf")}


class StreamState(NamedTuple):
    """Memory of a number of streams.

    Args:
        clock: (streams,) int64, frames consumed by each stream, on the device; a Python int in lock-step mode.
        memory: nested dict by module name; leaves (streams, ...).
        frame: (streams, 0, *frame_shape), zero bytes: it carries stream count, frame shape, dtype and device.
    """

    clock: Any
    memory: dict[str, Any]
    frame: Tensor

    @property
    def streams(self) -> int:
        return self.frame.shape[0]

    @property
    def frame_shape(self) -> tuple[int, ...]:
        return tuple(self.frame.shape[2:])

    @property
    def lockstep(self) -> bool:
        return not isinstance(self.clock, Tensor)


def map_memory(function: Callable[..., Tensor], *memories: dict[str, Any], named: bool = False) -> dict[str, Any]:
    """Apply ``function`` leaf by leaf to memories of equal structure; with ``named`` the leaf's name comes first."""
    first = memories[0]
    result: dict[str, Any] = {}
    for key, value in first.items():
        if isinstance(value, dict):
            result[key] = map_memory(function, *(memory[key] for memory in memories), named=named)
        else:
            leaves = (memory[key] for memory in memories)
            result[key] = function(key, *leaves) if named else function(*leaves)
    return result


def leaves(memory: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """(dotted name, tensor) of every memory, in order."""
    for key, value in memory.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def state_bytes(state: StreamState) -> int:
    """Bytes of memory of all streams together, the clock not counted."""
    return sum(tensor.numel() * tensor.element_size() for _, tensor in leaves(state.memory))


def _rows(slots: Tensor | list[int] | int, streams: int, device: torch.device) -> Tensor:
    """Slots as a bool mask (streams,) when they are one, else as int64 indices. Raises IndexError or ValueError for
    slots that are not there.
    """
    if isinstance(slots, Tensor) and slots.dtype == torch.bool:
        if slots.shape != (streams,):
            raise ValueError(f"a slot mask must have shape ({streams},), got {tuple(slots.shape)}")
        return slots
    if not isinstance(slots, Tensor):
        wanted = [slots] if isinstance(slots, int) else list(slots)
        wrong = [slot for slot in wanted if not 0 <= slot < streams]
        if wrong:
            raise IndexError(f"slots {wrong} are outside 0..{streams - 1}")
        slots = torch.tensor(wanted, dtype=torch.int64)
    return slots.to(device=device, dtype=torch.int64)


def merge(mask: Tensor, new: StreamState, old: StreamState) -> StreamState:
    """Rows of ``new`` where ``mask`` (streams,), rows of ``old`` elsewhere."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return a if a is b else torch.where(mask.view(-1, *[1] * (a.ndim - 1)), a, b)

    return StreamState(pick(new.clock, old.clock), map_memory(pick, new.memory, old.memory), old.frame)


def write(target: StreamState, source: StreamState) -> StreamState:
    """Copy ``source`` into the tensors of ``target`` (data pointers stay) and return ``target``."""

    def copy(into: Tensor, value: Tensor) -> Tensor:
        return into if into is value else into.copy_(value)

    map_memory(copy, target.memory, source.memory)
    if isinstance(target.clock, Tensor):
        copy(target.clock, source.clock)
        return target
    return StreamState(source.clock, target.memory, target.frame)


def empty_like(state: StreamState) -> StreamState:
    """The state of as many streams that have seen nothing."""
    clock = 0 if state.lockstep else torch.zeros_like(state.clock)
    fresh = map_memory(lambda name, t: torch.full_like(t, EMPTY.get(name, 0)), state.memory, named=True)
    return StreamState(clock, fresh, state.frame)


def reset(state: StreamState, slots: Tensor | list[int] | int, *, inplace: bool = False) -> StreamState:
    """Empty the streams at ``slots`` (bool mask or indices); the others are untouched, bit for bit.

    Raises:
        ValueError: for a lock-step state, whose streams share one clock, unless every slot is named.
    """
    rows = _rows(slots, state.streams, state.frame.device)
    if state.lockstep:
        mask = rows if rows.dtype == torch.bool else rows.new_zeros(state.streams).index_fill(0, rows, 1).bool()
        if not bool(mask.all()):
            raise ValueError(
                "a lock-step state shares one clock: reset all its streams, or use init_state(lockstep=False)"
            )
        fresh = empty_like(state)
        return write(state, fresh) if inplace else fresh

    def blank(name: str, tensor: Tensor) -> Tensor:
        value = EMPTY.get(name, 0)
        if rows.dtype == torch.bool:
            mask = rows.view(-1, *[1] * (tensor.ndim - 1))
            return tensor.masked_fill_(mask, value) if inplace else tensor.masked_fill(mask, value)
        return tensor.index_fill_(0, rows, value) if inplace else tensor.index_fill(0, rows, value)

    return StreamState(blank("clock", state.clock), map_memory(blank, state.memory, named=True), state.frame)


def gather(state: StreamState, order: Tensor | Sequence[int]) -> StreamState:
    """The streams at ``order``, in that order: compaction, growth by repetition, or a single stream."""
    device = state.frame.device
    index = order if isinstance(order, Tensor) else torch.tensor(list(order), dtype=torch.int64, device=device)
    clock = state.clock if state.lockstep else state.clock.index_select(0, index)
    memory = map_memory(lambda t: _as_laid_out(t.index_select(0, index), t), state.memory)
    return StreamState(clock, memory, state.frame.index_select(0, index))


def _as_laid_out(rows: Tensor, like: Tensor) -> Tensor:
    """``rows`` in the memory order of ``like``, where that is channels-last."""
    last = torch.channels_last_3d
    return rows.contiguous(memory_format=last) if like.ndim == 5 and like.is_contiguous(memory_format=last) else rows


def concatenate(parts: list[StreamState]) -> StreamState:
    """The streams of several states of one network, in order, as one state."""
    if len(parts) == 1:
        return parts[0]
    memory = map_memory(lambda *tensors: torch.cat(tensors), *(part.memory for part in parts))
    clock = parts[0].clock if parts[0].lockstep else torch.cat([part.clock for part in parts])
    return StreamState(clock, memory, torch.cat([part.frame for part in parts]))


def scatter(state: StreamState, order: Tensor | list[int], rows: StreamState, *, inplace: bool = False) -> StreamState:
    """Put the streams of ``rows`` into the slots ``order`` of ``state``; inverse of :func:`gather`.

    Raises:
        ValueError: when the structure of the two states differs (they belong to different networks or frame sizes).
    """
    check_same_structure(rows, state, rows_may_differ=True)
    index = order if isinstance(order, Tensor) else torch.tensor(order, dtype=torch.int64, device=state.frame.device)

    def put(into: Tensor, value: Tensor) -> Tensor:
        value = value.to(into.dtype)
        return into.index_copy_(0, index, value) if inplace else into.index_copy(0, index, value)

    if state.lockstep or rows.lockstep:
        raise ValueError("scatter needs per-stream clocks: use init_state(lockstep=False)")
    clock = put(state.clock, rows.clock)
    return StreamState(clock, map_memory(put, state.memory, rows.memory), state.frame)


def check_same_structure(given: StreamState, expected: StreamState, *, rows_may_differ: bool = False) -> None:
    """Raise TypeError or ValueError when ``given`` is not a state of the same network at the same frame size and
    dtype.
    """
    if not isinstance(given, StreamState):
        raise TypeError(f"expected a StreamState as init_state returns it, got {type(given).__name__}")
    have = {name: tuple(t.shape[1:]) + (t.dtype,) for name, t in leaves(given.memory)}
    want = {name: tuple(t.shape[1:]) + (t.dtype,) for name, t in leaves(expected.memory)}
    have["frame"] = given.frame_shape + (given.frame.dtype,)
    want["frame"] = expected.frame_shape + (expected.frame.dtype,)
    if have != want:
        name = next(key for key in [*want, *have] if have.get(key) != want.get(key))
        raise ValueError(f"the state belongs to another network: {name} is {have.get(name)}, expected {want.get(name)}")
    if not rows_may_differ and given.streams != expected.streams:
        raise ValueError(f"the state holds {given.streams} streams, expected {expected.streams}")


def fingerprint(state: StreamState) -> str:
    """A hash of the structure (names, shapes, dtypes) that a saved stream must share with the network that restores
    it.
    """
    lines = [f"{name} {tuple(t.shape[1:])} {t.dtype}" for name, t in leaves(state.memory)]
    lines.append(f"frame {state.frame_shape} {state.frame.dtype}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def save_state(state: StreamState, path: str | Path, *, metadata: dict[str, str] | None = None) -> None:
    """Write the streams of ``state`` to a safetensors file.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: the path is a folder, or cannot be written.
    """
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder: give the name of a file")
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"no folder {Path(path).parent} to save {path} in")
    tensors = {f"memory.{name}": t.contiguous().clone() for name, t in leaves(state.memory)}
    clock = state.clock if isinstance(state.clock, Tensor) else torch.full((state.streams,), state.clock)
    tensors["clock"] = clock.clone()
    lockstep = str(int(state.lockstep))
    described = {**(metadata or {}), "fingerprint": fingerprint(state), "lockstep": lockstep}
    try:
        save_file(tensors, path, metadata=described)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be written: {error}") from error


def load_state(path: str | Path, like: StreamState) -> StreamState:
    """Read streams that :func:`save_state` wrote for the same network; ``like`` is any state of it (stream count may
    differ).

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds the state of another network, frame size or dtype; or it is a folder, truncated or
            no saved stream at all.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"no saved stream at {path}")
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder, not a saved stream")
    try:
        with safe_open(path, framework="pt", device=str(like.frame.device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file, not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no saved stream, or a truncated one: {error}") from error
    if "fingerprint" not in metadata or "clock" not in tensors:
        raise ValueError(f"{path} is no saved stream: it holds other tensors")
    if metadata["fingerprint"] != fingerprint(like):
        raise ValueError(f"{path} holds the state of another network, frame size or dtype (structure hashes differ)")

    def rebuild(memory: dict[str, Any], prefix: str) -> dict[str, Any]:
        return {
            key: rebuild(value, f"{prefix}{key}.") if isinstance(value, dict) else tensors[f"{prefix}{key}"]
            for key, value in memory.items()
        }

    clock: Any = tensors["clock"]
    streams = clock.shape[0]
    if metadata.get("lockstep") == "1":
        clock = int(clock[0])
    return StreamState(clock, rebuild(like.memory, "memory."), like.frame.new_empty((streams, 0, *like.frame_shape)))
