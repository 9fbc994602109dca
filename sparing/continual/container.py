"""Containers with the exact algebra of delays: chains, residuals and parallel branches.

A chain adds delays times the strides before them; branches wait for the slowest. Networks with named parts are chains
or branches themselves: they list their parts and keep the checkpoint's own names. Plain torch modules that treat
every frame alike (norms in eval mode, activations, dropout) need no wrapper.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparing.continual.delay import Delay
from sparing.continual.module import Continual, MisfitError
from sparing.continual.per_frame import is_per_frame, on_frame
from sparing.continual.timing import (
    PER_FRAME,
    Span,
    Tick,
    after,
    branch_delay,
    parallel_span,
    sequence_span,
)

Part = tuple[str, nn.Module]


def span_of(module: nn.Module) -> Span:
    """Temporal behaviour of a part: its own, or that of a per-frame module."""
    return module.span() if isinstance(module, Continual) else PER_FRAME


def check_part(name: str, module: nn.Module) -> None:
    """Raise TypeError for a module that is neither continual nor known to treat every frame alike."""
    if not isinstance(module, Continual) and not is_per_frame(module):
        raise TypeError(
            f"{name}: {type(module).__name__} is not known to treat every frame alike. Use its continual layer "
            "(sparing.continual.convert), or wrap it in PerFrame if its clip output at t depends on frame t only"
        )


def _writes_its_input(module: nn.Module) -> bool:
    """Whether a part, or what it begins with, works in place."""
    if isinstance(module, Chain):
        return any(_writes_its_input(first) for _, first in module.parts()[:1])
    if isinstance(module, Branches):
        return any(_writes_its_input(first) for branch in module.branches() for _, first in branch[:1])
    return bool(getattr(module, "inplace", False))


def _memory_at(
    name: str, module: Continual, streams: int, frame_shape: tuple[int, ...], make: Callable[..., Tensor]
) -> tuple[dict, tuple[int, ...]]:
    """Memory of the part ``name``; an error says the path of the layer that does not fit its frames."""
    try:
        return module._memory(streams, frame_shape, make)
    except MisfitError as error:
        raise MisfitError(f"{name}.{error.path}", error.kind, error.why) from error
    except (ValueError, RuntimeError) as error:
        raise MisfitError(name, type(module).__name__, str(error)) from error


class Chain(Continual):
    """Mixin of modules whose ``parts()`` run one after another."""

    def parts(self) -> list[Part]:
        """(name, module) in order."""
        raise NotImplementedError(type(self).__name__)

    def _span(self) -> Span:
        return sequence_span(span_of(module) for _, module in self.parts())

    def _memory(
        self, streams: int, frame_shape: tuple[int, ...], make: Callable[..., Tensor]
    ) -> tuple[dict, tuple[int, ...]]:
        memories = {}
        for name, module in self.parts():
            if isinstance(module, Continual):
                memory, frame_shape = _memory_at(name, module, streams, frame_shape, make)
                if memory:
                    memories[name] = memory
        return memories, frame_shape

    def _step(self, x: Tensor, memory: dict, tick: Tick) -> tuple[Tensor | None, dict]:
        new = dict(memory)
        y: Tensor | None = x
        before: nn.Module | None = None
        for name, module in self.parts():
            assert y is not None
            if isinstance(before, Delay) and _writes_its_input(module):
                y = y.clone()  # a view of the memory
            before = module
            if isinstance(module, Continual):
                y, part = module._step(y, memory.get(name, {}), tick)
                if part:
                    new[name] = part
                if y is None:
                    return None, new
                tick = after(tick, module.span())
            else:
                y = on_frame(module, y)
        return y, new

    def _steps(self, x: Tensor | None, memory: dict, tick: Tick, end: bool) -> tuple[Tensor | None, dict]:
        new = dict(memory)
        for name, module in self.parts():
            if isinstance(module, Continual):
                x, part = module._steps(x, memory.get(name, {}), tick, end)
                if part:
                    new[name] = part
                tick = after(tick, module.span())
            elif x is not None:
                x = module(x)
        return x, new


class Sequential(Chain, nn.Sequential):  # type: ignore[misc]
    """``nn.Sequential`` that steps; keys and clip-mode forward are torch's.

    Raises:
        TypeError: for a part that is neither continual nor per-frame, naming its place.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        for name, module in self.parts():
            check_part(name, module)

    def parts(self) -> list[Part]:
        return list(self._modules.items())  # type: ignore[arg-type]


class Branches(Continual):
    """Mixin of modules whose ``branches()`` see the same input and are joined; faster ones wait.

    Subclasses call :meth:`_align` once their parts exist; it makes the delays (which have no parameters).
    """

    _modules: dict[str, Any]
    add_module: Callable[..., None]

    def branches(self) -> list[list[Part]]:
        """Each branch as (name, module) parts in order; an empty list is the identity."""
        raise NotImplementedError(type(self).__name__)

    def join(self, outputs: list[Tensor]) -> Tensor:
        """Join branch outputs of one shape in time; x (N, C, ...), the same for frames and clips."""
        raise NotImplementedError(type(self).__name__)

    def _align(self, *, align: str = "output") -> None:
        if align not in ("output", "input"):
            raise ValueError(f"align must be 'output' or 'input', got {align!r}")
        spans = [sequence_span(span_of(module) for _, module in branch) for branch in self.branches()]
        whole = parallel_span(spans)
        slow = max(spans, key=lambda span: span.first_output)
        for index, span in enumerate(spans):
            gap = slow.first_output - span.first_output
            if gap == 0:
                continue
            name = f"branch {index} of {type(self).__name__}"
            steps = gap if align == "input" else branch_delay(slow, span, name=name)
            # Where the slow branch loses frames of a clip that this one keeps, they are the last ones.
            lost = [s.first_output - s.padding for s in (slow, span)]
            kept_back = max(lost[0] - lost[1], 0) if span.stride == 1 else 0
            self._modules[f"wait{index}"] = Delay(steps, flush=max(steps - kept_back, 0))
        self._where = align
        assert whole.first_output == slow.first_output

    def _timed(self) -> list[list[Part]]:
        """Branches with their delays in place."""
        timed = []
        for index, branch in enumerate(self.branches()):
            wait = self._modules.get(f"wait{index}")
            if wait is not None:
                pair = [(f"wait{index}", wait)]
                branch = [*pair, *branch] if self._where == "input" else [*branch, *pair]
            timed.append(branch)
        return timed

    def _span(self) -> Span:
        return parallel_span(sequence_span(span_of(module) for _, module in branch) for branch in self.branches())

    def _memory(
        self, streams: int, frame_shape: tuple[int, ...], make: Callable[..., Tensor]
    ) -> tuple[dict, tuple[int, ...]]:
        memories: dict[str, dict] = {}
        shapes = []
        for branch in self._timed():
            memory, shape = _Parts(branch)._memory(streams, frame_shape, make)
            memories.update(memory)
            shapes.append(shape)
        joined = self.join([torch.empty((1, *shape), device="meta") for shape in shapes])
        return memories, tuple(joined.shape[1:])

    def _step(self, x: Tensor, memory: dict, tick: Tick) -> tuple[Tensor | None, dict]:
        new = dict(memory)
        outputs = []
        for branch in self._timed():
            y, part = _Parts(branch)._step(x, _own(branch, memory), tick)
            new.update(part)
            outputs.append(y)
        if any(y is None for y in outputs):
            return None, new
        return self.join(outputs), new  # type: ignore[arg-type]

    def _steps(self, x: Tensor | None, memory: dict, tick: Tick, end: bool) -> tuple[Tensor | None, dict]:
        new = dict(memory)
        outputs = []
        for branch in self._timed():
            y, part = _Parts(branch)._steps(x, _own(branch, memory), tick, end)
            new.update(part)
            outputs.append(y)
        if any(y is None for y in outputs):
            return None, new
        return self.join(outputs), new  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Clip mode, (N, C, T, ...)."""
        outputs = []
        for branch in self.branches():
            y = x
            for _, module in branch:
                y = module(y)
            outputs.append(y)
        return self.join(outputs)


def _own(branch: list[Part], memory: dict) -> dict:
    """What of a joint memory belongs to one branch."""
    return {name: memory[name] for name, _ in branch if name in memory}


class _Parts(Chain):
    """A chain over parts that belong to another module."""

    def __init__(self, parts: list[Part]) -> None:
        self._parts = parts

    def parts(self) -> list[Part]:
        return self._parts


class BroadcastReduce(Branches, nn.Module):
    """Branches over one input, joined by 'sum', 'mean', 'prod', 'max' or 'concat' (axis 1). Keys are '0.', '1.', ...

    Args:
        align: 'output' delays the outputs of faster branches; 'input' delays their inputs, which also serves
            branches that a stride puts on other steps.

    Raises:
        ValueError: for an unknown reduce, other total strides, or branches that cannot be aligned.
    """

    def __init__(self, *branches: nn.Module, reduce: str = "sum", align: str = "output") -> None:
        super().__init__()
        if reduce not in _JOIN:
            raise ValueError(f"reduce must be one of {sorted(_JOIN)}, got {reduce!r}")
        for index, branch in enumerate(branches):
            check_part(str(index), branch)
            self.add_module(str(index), branch)
        self.count, self.reduce = len(branches), reduce
        self._align(align=align)

    def branches(self) -> list[list[Part]]:
        return [[(str(index), self._modules[str(index)])] for index in range(self.count)]  # type: ignore[list-item]

    def join(self, outputs: list[Tensor]) -> Tensor:
        return _JOIN[self.reduce](outputs)


def _sum(outputs: list[Tensor]) -> Tensor:
    total = outputs[0]
    for y in outputs[1:]:
        total = total + y
    return total


def _product(outputs: list[Tensor]) -> Tensor:
    total = outputs[0]
    for y in outputs[1:]:
        total = total * y
    return total


_JOIN: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "sum": _sum,
    "mean": lambda outputs: _sum(outputs) / len(outputs),
    "prod": _product,
    "max": lambda outputs: torch.stack(outputs).amax(0),
    "concat": lambda outputs: torch.cat(outputs, 1),
}


class Residual(Branches, nn.Module):
    """``module(x) + shortcut(x)``, the shortcut waiting for the module. Keys: 'module.', 'shortcut.'.

    Args:
        shortcut: a module, or None for the identity.
        shrink: for a module whose padding is below (R-1)/2, with ``a = (R-1)/2 - padding`` frames missing at each
            end, the part of x that is added: 'centered' ``x[a:-a]``, 'lagging' ``x[:-2a]``, 'leading' ``x[2a:]``.
            None: the module keeps the length.
        activation: applied to the sum.
        align: see :class:`BroadcastReduce`.

    Raises:
        ValueError: when the lengths do not fit without shrink, or an even receptive field has no centre.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        shortcut: nn.Module | None = None,
        shrink: str | None = None,
        activation: nn.Module | None = None,
        align: str = "output",
    ) -> None:
        super().__init__()
        check_part("module", module)
        self.module = module
        self.shortcut = shortcut
        self.activation = activation
        self.set_crop(shrink, align=align)

    def set_crop(self, shrink: str | None, *, align: str = "output") -> None:
        main = self.main_span()
        self.crop = residual_crop(main, shrink)
        beside = sequence_span(span_of(module) for _, module in self.branches()[1])
        lost = [span.first_output - span.padding for span in (main, beside)]
        if self.crop is None and main.stride == 1 and lost[0] != lost[1]:
            raise ValueError(
                f"the module loses {lost[0]} frames of a clip and the shortcut {lost[1]}: "
                "pad to 2 * padding = R - 1, or pass shrink="
            )
        self._align(align=align)

    def main_span(self) -> Span:
        return span_of(self.module)

    def branches(self) -> list[list[Part]]:
        shortcut = [] if self.shortcut is None else [("shortcut", self.shortcut)]
        if self.crop is not None:
            shortcut = [*shortcut, ("crop", self.crop)]
        return [[("module", self.module)], shortcut]

    def join(self, outputs: list[Tensor]) -> Tensor:
        total = outputs[0] + outputs[1]
        return total if self.activation is None else self.activation(total)


def residual_crop(span: Span, shrink: str | None) -> Delay | None:
    """The delay of a shrinking shortcut beside a module of ``span``; None where nothing shrinks.

    Output i of the module pairs with ``x[i + lead]`` and is said at step ``i + R-1-p``, so x waits ``R-1-p - lead``
    steps whatever the padding (centred: always (R-1)/2), and ``p`` frames of it remain for the flush.
    """
    missing = span.receptive_field - 1 - 2 * span.padding
    if shrink is None:
        return None
    if shrink not in ("centered", "lagging", "leading"):
        raise ValueError(f"shrink must be None, 'centered', 'lagging' or 'leading', got {shrink!r}")
    if missing == 0:
        return None
    if missing < 0 or span.stride != 1:
        raise ValueError(
            f"a shrinking residual needs stride 1 and padding <= (R-1)/2, got stride {span.stride}, "
            f"padding {span.padding}, receptive field {span.receptive_field}"
        )
    if shrink == "centered" and missing % 2:
        raise ValueError(f"a centered residual needs an odd receptive field, got {span.receptive_field}")
    lead = {"centered": missing // 2, "lagging": 0, "leading": missing}[shrink]
    return Delay(span.first_output - lead, lead=lead, flush=span.padding)


class Conditional(Continual, nn.Module):
    """Run ``module`` on streams for which ``condition`` holds, the identity elsewhere.

    Args:
        condition: (streams,) bool from a frame (streams, C, ...); evaluated on the device.

    Raises:
        ValueError: when the module has memory in time (its frames would go missing): only per-frame modules can
            be skipped.
    """

    def __init__(self, condition: Callable[[Tensor], Tensor], module: nn.Module) -> None:
        super().__init__()
        check_part("module", module)
        if span_of(module) != PER_FRAME:
            raise ValueError(f"a conditional module must treat every frame alike, got {span_of(module)}")
        self.condition, self.module = condition, module

    def _span(self) -> Span:
        return PER_FRAME

    def _memory(
        self, streams: int, frame_shape: tuple[int, ...], make: Callable[..., Tensor]
    ) -> tuple[dict, tuple[int, ...]]:
        return {}, frame_shape

    def _step(self, x: Tensor, memory: dict, tick: Tick) -> tuple[Tensor | None, dict]:
        y, _ = _Parts([("module", self.module)])._step(x, {}, tick)
        assert y is not None
        return torch.where(self.condition(x).view(-1, *[1] * (x.ndim - 1)), y, x), memory

    def _steps(self, x: Tensor | None, memory: dict, tick: Tick, end: bool) -> tuple[Tensor | None, dict]:
        return (None if x is None else self.forward(x)), memory

    def forward(self, x: Tensor) -> Tensor:
        """Clip mode (N, C, T, ...): the condition is taken frame by frame."""
        frames = x.transpose(1, 2).flatten(0, 1)
        picked = self.condition(frames).view(x.shape[0], 1, x.shape[2], *[1] * (x.ndim - 3))
        return torch.where(picked, self.module(x), x)


def named_sequential(**parts: nn.Module) -> Sequential:
    """A :class:`Sequential` whose parts have names, in order."""
    return Sequential(OrderedDict(parts))
