"""Recycling positional encoding: the token of step t carries row ``t mod N`` for ever.

Hedegaard et al., *Continual Transformers: Redundancy-Free Attention for Online Inference* (ICLR 2023), section 3.4. A
token is never encoded anew as it ages, so what attention remembers of it stays true. ``N = n`` (the window) is
allowed; with ``N = 2n - 1`` any two tokens of a window have a unique relative offset.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from sparing.continual.module import Continual
from sparing.continual.timing import PER_FRAME, Span, Tick, frames_seen


def cyclic_table(num_embeds: int, embed_dim: int, *, smooth: bool = True) -> Tensor:
    """The fixed table (num_embeds, embed_dim) whose rows go round without a seam, float32.

    Channel i is a wave of period ``c`` (longer for higher channels), folded at ``c`` so that row N continues into row
    0; rows are averaged over 5 neighbours when ``smooth``, and the column means of the plain waves subtracted.

    Raises:
        ValueError: odd ``embed_dim``, or fewer than one row.
    """
    if embed_dim % 2 or embed_dim < 2 or num_embeds < 1:
        raise ValueError(
            f"a cyclic table needs an even embed_dim and num_embeds >= 1, got {embed_dim} and {num_embeds}"
        )
    half = embed_dim // 2
    skips = np.linspace(num_embeds ** (1 / half), num_embeds, half).astype(int)
    columns = []
    for i in range(embed_dim):
        j = 3 * (i // 3) + 1
        period = int(skips[j]) if j < half else int(skips[-1])
        if num_embeds > period:
            grid = np.arange(0, math.ceil(num_embeds / period) * period + 0.01, 0.01)
        else:
            period = num_embeds
            grid = np.arange(0, num_embeds + 0.01, 0.01)
        phase = 0.0 if i <= half else 2 * math.pi * (half - i) / half
        angle = 2 * math.pi / period * np.abs(np.mod(grid, 2 * period) - period) + phase
        wave = np.cos(angle) if i % 2 else np.sin(angle)
        columns.append(wave[np.linspace(0, len(grid) - 1, num_embeds + 1).astype(int)][:num_embeds])
    plain = torch.from_numpy(np.stack(columns, 1)).float()
    rows = plain
    if smooth:
        rows = sum((plain.roll(shift, 0) for shift in (-2, -1, 0, 1, 2)), torch.zeros_like(plain)) / 5
    return rows - plain.mean(0)


class CyclicTable(nn.Module):
    """The fixed table as a persistent buffer ``pattern``."""

    pattern: Tensor

    def __init__(self, num_embeds: int, embed_dim: int) -> None:
        super().__init__()
        self.register_buffer("pattern", cyclic_table(num_embeds, embed_dim))


class RecyclingPositionalEncoding(Continual, nn.Module):
    """Add row ``t mod num_embeds`` to the token of step t.

    In clip mode the start row is a state that advances by ``forward_update_index_steps`` per call, so that training
    sees every phase; ``forward(x, start=0)`` fixes it. Keys: ``pe.weight`` (learned) or ``pe.pattern`` (cyclic).

    Args:
        embed_dim: token width.
        num_embeds: rows N of the table.
        learned: a trained table instead of the cyclic one.
    """

    start: Tensor

    def __init__(
        self, embed_dim: int, num_embeds: int, *, learned: bool = False, forward_update_index_steps: int = 1
    ) -> None:
        super().__init__()
        self.num_embeds, self.advance = num_embeds, forward_update_index_steps
        self.pe = nn.Embedding(num_embeds, embed_dim) if learned else CyclicTable(num_embeds, embed_dim)
        self.register_buffer("start", torch.zeros((), dtype=torch.int64), persistent=False)

    @property
    def table(self) -> Tensor:
        return self.pe.weight if isinstance(self.pe, nn.Embedding) else self.pe.pattern  # type: ignore[return-value]

    def _span(self) -> Span:
        return PER_FRAME

    def _memory(
        self, streams: int, frame_shape: tuple[int, ...], make: Callable[..., Tensor]
    ) -> tuple[dict, tuple[int, ...]]:
        return {}, frame_shape

    def _step(self, x: Tensor, memory: dict, tick: Tick) -> tuple[Tensor | None, dict]:
        return x + self.table[frames_seen(tick) % self.num_embeds].to(x.dtype), memory

    def _steps(self, x: Tensor | None, memory: dict, tick: Tick, end: bool) -> tuple[Tensor | None, dict]:
        if x is None:
            return None, memory
        place = torch.arange(x.shape[2], device=x.device)
        if isinstance(tick.clock, Tensor):
            rows = (tick.clock[:, None] - tick.delay + place).clamp(min=0) % self.num_embeds
            return x + self.table[rows].transpose(1, 2).to(x.dtype), memory
        rows = (frames_seen(tick) + place) % self.num_embeds
        return x + self.table[rows].T.to(x.dtype), memory

    def forward(self, x: Tensor, *, start: int | None = None) -> Tensor:
        """(N, E, T) to (N, E, T)."""
        first = self.start if start is None else start
        rows = (first + torch.arange(x.shape[2], device=x.device)) % self.num_embeds
        if start is None:
            self.start.add_(self.advance).remainder_(self.num_embeds)
        return x + self.table[rows].T.to(x.dtype)
