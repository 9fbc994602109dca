"""Recurrent layers on streams: the hidden state is the memory. Clips (N, C, T), frames (streams, C); keys are
torch's.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.continual.module import Continual
from sparing.continual.timing import PER_FRAME, Span, Tick, is_lockstep, keep_unless_live


class _Recurrent(Continual):
    """Mixin over ``nn.RNN``, ``nn.GRU`` and ``nn.LSTM`` (unidirectional, no projection)."""

    hidden_size: int
    num_layers: int
    input_size: int
    states: tuple[str, ...] = ("hidden",)

    def _refuse(self) -> None:
        if self.bidirectional or getattr(self, "proj_size", 0):  # type: ignore[attr-defined]
            raise ValueError(f"{type(self).__name__} on a stream takes neither bidirectional nor proj_size")
        if not self.batch_first:  # type: ignore[attr-defined]
            raise ValueError(f"{type(self).__name__} is built with batch_first=True; its clips are (N, C, T)")

    def _span(self) -> Span:
        return PER_FRAME

    def _memory(
        self, streams: int, frame_shape: tuple[int, ...], make: Callable[..., Tensor]
    ) -> tuple[dict, tuple[int, ...]]:
        if frame_shape != (self.input_size,):
            raise ValueError(f"{type(self).__name__} steps on frames ({self.input_size},), got {frame_shape}")
        return {name: make((streams, self.num_layers, self.hidden_size)) for name in self.states}, (self.hidden_size,)

    def _gates(self, x: Tensor, h: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        w_x, w_h = getattr(self, f"weight_ih_l{layer}"), getattr(self, f"weight_hh_l{layer}")
        b_x, b_h = getattr(self, f"bias_ih_l{layer}", None), getattr(self, f"bias_hh_l{layer}", None)
        return F.linear(x, w_x, b_x), F.linear(h, w_h, b_h)

    def _cell(self, x: Tensor, state: tuple[Tensor, ...], layer: int) -> tuple[Tensor, ...]:
        """(streams, C) and the layer's states (streams, H) to its new states, the output first."""
        raise NotImplementedError(type(self).__name__)

    def _step(self, x: Tensor, memory: dict, tick: Tick) -> tuple[Tensor | None, dict]:
        columns: list[list[Tensor]] = [[] for _ in self.states]
        for layer in range(self.num_layers):
            new = self._cell(x, tuple(memory[name][:, layer] for name in self.states), layer)
            x = new[0]
            for column, value in zip(columns, new):
                column.append(value)
        # Memories keep their precision where autocast computes in another.
        stacked = {name: torch.stack(column, 1).to(memory[name]) for name, column in zip(self.states, columns)}
        return x, {name: keep_unless_live(value, memory[name], tick) for name, value in stacked.items()}

    def _steps(self, x: Tensor | None, memory: dict, tick: Tick, end: bool) -> tuple[Tensor | None, dict]:
        if x is None:
            return None, memory
        if not is_lockstep(tick) and tick.delay:
            raise ValueError("recurrent layers behind a delay are served in chunks only with lock-step states")
        initial = tuple(memory[name].transpose(0, 1).contiguous() for name in self.states)
        whole: Any = super().forward  # type: ignore[misc]
        y, last = whole(x.transpose(1, 2), initial if len(initial) > 1 else initial[0])
        values = last if len(initial) > 1 else (last,)
        new = {name: value.transpose(0, 1).to(memory[name]) for name, value in zip(self.states, values)}
        return y.transpose(1, 2), new

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Clip (N, C, T) to (N, H, T)."""
        y, _ = super().forward(x.transpose(1, 2))  # type: ignore[misc]
        return y.transpose(1, 2)


class RNN(_Recurrent, nn.RNN):  # type: ignore[misc]
    """``nn.RNN`` on a stream."""

    def __init__(self, *args: Any, batch_first: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, batch_first=batch_first, **kwargs)
        self._refuse()

    def _cell(self, x: Tensor, state: tuple[Tensor, ...], layer: int) -> tuple[Tensor, ...]:
        a, b = self._gates(x, state[0], layer)
        return ((a + b).tanh() if self.nonlinearity == "tanh" else (a + b).relu(),)


class GRU(_Recurrent, nn.GRU):  # type: ignore[misc]
    """``nn.GRU`` on a stream."""

    def __init__(self, *args: Any, batch_first: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, batch_first=batch_first, **kwargs)
        self._refuse()

    def _cell(self, x: Tensor, state: tuple[Tensor, ...], layer: int) -> tuple[Tensor, ...]:
        a, b = self._gates(x, state[0], layer)
        (r_x, z_x, n_x), (r_h, z_h, n_h) = a.chunk(3, 1), b.chunk(3, 1)
        reset, update = (r_x + r_h).sigmoid(), (z_x + z_h).sigmoid()
        candidate = (n_x + reset * n_h).tanh()
        return (candidate + update * (state[0] - candidate),)


class LSTM(_Recurrent, nn.LSTM):  # type: ignore[misc]
    """``nn.LSTM`` on a stream."""

    states = ("hidden", "cell")

    def __init__(self, *args: Any, batch_first: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, batch_first=batch_first, **kwargs)
        self._refuse()

    def _cell(self, x: Tensor, state: tuple[Tensor, ...], layer: int) -> tuple[Tensor, ...]:
        a, b = self._gates(x, state[0], layer)
        i, f, g, o = (a + b).chunk(4, 1)
        cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * cell.tanh(), cell
