"""Histories that do not move: streams that are stepped together keep their newest frames in rings.

A layer's history is the last ``R-1`` frames in order, and every step makes a window of ``R`` of them, moved by one.
When the host knows how many steps a batch of streams has made *together* (``Tick.turn``), a layer may keep the window
itself, ``R`` frames, and write frame ``t`` over the oldest, into slot ``turn % R``; nothing else is moved, and the
layer turns its weights instead. All streams of the batch share the slot, so one that stalls is written anew.

Such a memory has one frame more on axis 2 than the history that :meth:`Continual.init_state` makes, which is how it is
known here. Only a batch that owns its memories keeps them so; a stream that is taken out of it has its history in order
again.
"""

import torch
from torch import Tensor

from sparing.continual.state import StreamState, map_memory


def is_ring(memory: Tensor, like: Tensor) -> bool:
    """Whether ``memory`` is a ring; ``like`` is the leaf of that name as the network makes it, (streams, C, T, ...)."""
    return memory.ndim > 2 and memory.shape[2] == like.shape[2] + 1


def to_ring(history: Tensor, turn: int) -> Tensor:
    """The ring (streams, C, R, ...) of a history (streams, C, R-1, ...) whose newest frame came in step ``turn - 1``;
    the slot of step ``turn`` holds zeros.
    """
    ring = torch.cat([torch.zeros_like(history[:, :, :1]), history], 2)  # oldest first: what step `turn` overwrites
    return _in_order(ring, turn)


def from_ring(ring: Tensor, turn: int) -> Tensor:
    """The history (streams, C, R-1, ...), oldest first, of a ring before its step ``turn``."""
    return _in_order(ring, -turn)[:, :, 1:]


def turned(weight: Tensor, turn: int) -> Tensor:
    """Weights (out, in, R, ...) in the order of a ring whose newest frame came in step ``turn``."""
    return _in_order(weight, turn + 1)


def _in_order(frames: Tensor, by: int) -> Tensor:
    by %= frames.shape[2]
    return frames if by == 0 else torch.roll(frames, by, 2)


def in_order(rows: StreamState, like: StreamState, turn: int) -> StreamState:
    """Streams of a batch before its step ``turn``, with every history in order; ``like`` is any state of the network as
    ``init_state`` makes it.
    """

    def order(memory: Tensor, plain: Tensor) -> Tensor:
        return from_ring(memory, turn) if is_ring(memory, plain) else memory

    return rows._replace(memory=map_memory(order, rows.memory, like.memory))


def as_kept(rows: StreamState, like: StreamState, batch: StreamState, turn: int, *, was: int) -> StreamState:
    """Streams as the batch keeps them before its step ``turn``: every history in order or a ring before step ``was``
    becomes what the batch has there.
    """

    def keep(memory: Tensor, there: Tensor, plain: Tensor) -> Tensor:
        if not is_ring(memory, plain):
            return to_ring(memory, turn) if is_ring(there, plain) else memory
        return _in_order(memory, turn - was) if is_ring(there, plain) else from_ring(memory, was)

    return rows._replace(memory=map_memory(keep, rows.memory, batch.memory, like.memory))
