"""Delays: what a shortcut waits for while the branch beside it looks into the future."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparing.continual.module import Continual, emits_now
from sparing.continual.timing import Span, Tick, admit, admit_chunk, first_emission, is_lockstep, keep


class Delay(Continual, nn.Module):
    """Output ``i`` is input ``i + lead``, said ``steps`` steps after it arrived (R = steps + 1, clip mode crops the
    lead).

    Args:
        steps: frames to wait; the memory holds as many.
        lead: first inputs that are dropped (a shrinking residual).
        flush: held frames that are still said when the stream ends (default: all).

    Raises:
        ValueError: for negative numbers, or more frames to flush than are held.
    """

    def __init__(self, steps: int, *, lead: int = 0, flush: int | None = None) -> None:
        super().__init__()
        flush = steps if flush is None else flush
        if steps < 0 or lead < 0 or not 0 <= flush <= steps:
            raise ValueError(
                f"a delay needs steps >= 0, lead >= 0 and 0 <= flush <= steps, got {steps}, {lead}, {flush}"
            )
        self.steps_held, self.lead, self.end = steps, lead, flush

    def _span(self) -> Span:
        wait = self.steps_held + self.lead
        return Span(self.steps_held + 1, 1, 0, self.steps_held, wait)

    def _memory(
        self, streams: int, frame_shape: tuple[int, ...], make: Callable[..., Tensor]
    ) -> tuple[dict, tuple[int, ...]]:
        if self.steps_held == 0:
            return {}, frame_shape
        return {"held": make((streams, frame_shape[0], self.steps_held, *frame_shape[1:]))}, frame_shape

    def _step(self, x: Tensor, memory: dict, tick: Tick) -> tuple[Tensor | None, dict]:
        silent = is_lockstep(tick) and not emits_now(tick, self.span())
        if not memory:
            return (None if silent else x), memory
        held = memory["held"]
        # A memory of one frame is a copy too: callers reuse the buffer that the frame came in.
        shifted = torch.cat([held[:, :, 1:], admit(x, tick).unsqueeze(2)], 2)
        new = {"held": keep(shifted, held, tick)}
        if silent:
            return None, new
        return (held[:, :, 0].clone() if tick.inplace else held[:, :, 0]), new  # in place, what was held is overwritten

    def _steps(self, x: Tensor | None, memory: dict, tick: Tick, end: bool) -> tuple[Tensor | None, dict]:
        frames = 0 if x is None else x.shape[2]
        ending = self.end if end else 0
        if not memory:
            window = x
        else:
            window = memory["held"] if x is None else torch.cat([memory["held"], admit_chunk(x, tick)], 2)
        offset = first_emission(tick, self.span()) if is_lockstep(tick) else 0
        new = {"held": window[:, :, frames : frames + self.steps_held]} if memory and window is not None else memory
        if window is None or offset >= frames + ending:
            return None, new
        return window[:, :, offset : frames + ending], new

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, ...) to (N, C, T - lead - (steps - flush), ...)."""
        return x[:, :, self.lead : x.shape[2] - (self.steps_held - self.end)]

    def extra_repr(self) -> str:
        return f"{self.steps_held}, lead={self.lead}, flush={self.end}"


class Skip(Delay):
    """Drop the first ``steps`` outputs of a stream, then pass through: delay 0, but the first output comes at step
    ``steps``.
    """

    def __init__(self, steps: int) -> None:
        super().__init__(0, lead=steps)
