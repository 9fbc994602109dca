"""State of a multistep solver in the middle of its schedule, by rows, so that survivors can go on as if never stopped.

DPM-Solver++, UniPC and DEIS keep earlier network outputs. A search stops a batch, keeps some rows and runs them in
other batches; what a row needs is gathered along the batch axis. Solvers of one step have an empty history.
"""

from collections.abc import Sequence
from typing import Any

import torch
from einops import repeat
from torch import Tensor

__all__ = ["flatten", "gather", "read", "restore", "row", "unflatten"]

_TENSOR_LISTS = ("model_outputs",)
_PLAIN_LISTS = ("timestep_list",)
_TENSORS = ("last_sample",)
_NUMBERS = ("lower_order_nums", "this_order")


def read(scheduler: Any) -> dict[str, Any] | None:
    """The solver's state, ``None`` when it keeps none. Tensors are ``(rows, ...)``."""
    if not isinstance(getattr(scheduler, "model_outputs", None), list):
        return None
    state: dict[str, Any] = {name: list(getattr(scheduler, name)) for name in _TENSOR_LISTS}
    for name in _PLAIN_LISTS:
        if hasattr(scheduler, name):
            state[name] = [None if value is None else float(value) for value in getattr(scheduler, name)]
    for name in (*_TENSORS, *_NUMBERS):
        if hasattr(scheduler, name):
            state[name] = getattr(scheduler, name)
    return state


def restore(scheduler: Any, state: dict[str, Any], *, rows: int) -> None:
    """Puts a state back; tensors are repeated to ``rows`` where guidance steps more rows than there are candidates."""

    def widened(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or len(tensor) == rows:
            return tensor
        return repeat(tensor, "b ... -> (n b) ...", n=rows // len(tensor))

    for name, value in state.items():
        if name in _TENSOR_LISTS:
            value = [widened(tensor) for tensor in value]
        elif name in _TENSORS:
            value = widened(value)
        elif name in _PLAIN_LISTS:
            integer = not scheduler.timesteps.is_floating_point()
            value = [v if v is None else torch.tensor(int(v) if integer else v) for v in value]
            value = [v if v is None else v.to(scheduler.timesteps.device) for v in value]
        setattr(scheduler, name, value)


def row(state: dict[str, Any] | None, index: int) -> dict[str, Any] | None:
    """The state of one row, tensors ``(1, ...)``."""
    if state is None:
        return None
    return {name: _map(value, lambda tensor: tensor[index : index + 1]) for name, value in state.items()}


def gather(states: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """States of single rows as one batch's; all stopped at the same entry."""
    first = states[0]
    if first is None:
        return None
    found: dict[str, Any] = {}
    for name, value in first.items():
        values = [state[name] for state in states if state is not None]
        if isinstance(value, Tensor):
            found[name] = torch.cat(values)
        elif isinstance(value, list):
            found[name] = [
                torch.cat([entry[k] for entry in values]) if isinstance(value[k], Tensor) else value[k]
                for k in range(len(value))
            ]
        else:
            found[name] = value
    return found


def flatten(state: dict[str, Any] | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by name, the rest as JSON): for a safetensors file."""
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for name, value in (state or {}).items():
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, list) and any(isinstance(entry, Tensor) for entry in value):
            rest[name] = len(value)
            tensors.update({f"{name}.{k}": entry for k, entry in enumerate(value) if isinstance(entry, Tensor)})
        else:
            rest[name] = value
    return tensors, rest


def unflatten(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any] | None:
    """The inverse of :func:`flatten`; None when there is nothing."""
    if not tensors and not rest:
        return None
    state: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if "." not in name}
    for name, value in rest.items():
        if name in _TENSOR_LISTS and isinstance(value, int):
            state[name] = [tensors.get(f"{name}.{k}") for k in range(value)]
        else:
            state[name] = value
    return state


def _map(value: Any, function: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, list):
        return [function(entry) if isinstance(entry, Tensor) else entry for entry in value]
    return value
