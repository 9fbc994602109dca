"""Prompts are encoded once: while a search runs, ``pipe.encode_prompt`` remembers every row that it was asked for.

Passing embeddings to a pipeline would need a table of argument names, which differ from one to the next. A pipeline
calls its own ``encode_prompt`` anyway; it is given the rows again, from memory.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["encoding_once"]


@contextlib.contextmanager
def encoding_once(pipe: Any) -> Iterator[None]:
    """Within the block, no row of prompts is encoded twice; the pipeline is as before afterwards."""
    original = getattr(pipe, "encode_prompt", None)
    if original is None or "encode_prompt" in vars(pipe):
        yield
        return
    vars(pipe)["encode_prompt"] = _remembering(original)
    try:
        yield
    finally:
        vars(pipe).pop("encode_prompt", None)


def _remembering(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)
    rows: dict[Any, Any] = {}
    whole: dict[Any, Any] = {}  # the last batch as a whole: a round's batches ask for the same one again and again

    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        per_row = {name: value for name, value in bound.arguments.items() if _is_texts(value)}
        counts = {len(value) for value in per_row.values()}
        shared = {name: value for name, value in bound.arguments.items() if name not in per_row}
        if len(counts) != 1 or not all(_is_plain(value) for value in shared.values()):
            return original(*args, **kwargs)
        count = counts.pop()
        keys = [
            repr(({name: value[i] for name, value in per_row.items()}, sorted(shared.items(), key=str)))
            for i in range(count)
        ]
        if tuple(keys) in whole:
            return whole[tuple(keys)]
        for i, key in enumerate(keys):
            if key not in rows:
                bound.arguments.update({name: [value[i]] for name, value in per_row.items()})
                rows[key] = original(*bound.args, **bound.kwargs)
        found = _stacked([rows[key] for key in keys])
        if found is None:  # rows of unequal length: the pipeline pads a batch as it likes
            found = original(*args, **kwargs)
        whole.clear()
        whole[tuple(keys)] = found
        return found

    return encode_prompt


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(entry, str) for entry in value)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool | torch.device | torch.dtype)


def _stacked(results: list[Any]) -> Any:
    """Encodings of single rows as those of a batch; None when that cannot be done."""
    if isinstance(results[0], Tensor):
        return _stacked_tensors(results)
    if not isinstance(results[0], tuple | list):
        return None
    parts: list[Any] = []
    for entries in zip(*results):
        if all(entry is None for entry in entries):
            parts.append(None)
        elif all(isinstance(entry, Tensor) for entry in entries):
            stacked = _stacked_tensors(list(entries))
            if stacked is None:
                return None
            parts.append(stacked)
        else:
            return None
    return tuple(parts)


def _stacked_tensors(tensors: list[Tensor]) -> Tensor | None:
    first = tensors[0]
    if any(tensor.shape != first.shape for tensor in tensors):
        return None
    if first.shape[:1] != (1,):  # no batch axis (positions of text tokens): one for all, if it is the same for all
        return first if all(torch.equal(tensor, first) for tensor in tensors) else None
    return torch.cat(tensors)
