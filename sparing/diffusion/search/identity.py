"""What makes two searches the same: fingerprints of networks, and the settings of verifiers and drafts, as JSON.

A log is only gone on with by the search that wrote it. Class names are not enough: the same pipeline with other weights
and the same verifier with another target give other scores.
"""

import functools
import inspect
from collections.abc import Mapping
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from sparing.zoo.fingerprints import network_fingerprint, short_hash

__all__ = ["describe", "models_of", "settings_of"]

_DEPTH = 5


def models_of(pipe: Any) -> dict[str, str]:
    """Fingerprints of a pipeline's networks."""
    parts = getattr(pipe, "components", {})
    return {name: network_fingerprint(part) for name, part in sorted(parts.items()) if isinstance(part, nn.Module)}


def settings_of(thing: Any) -> dict[str, Any]:
    """An object's class and its constructor's arguments, as far as it keeps them under their names."""
    kind = type(thing)
    try:
        names = list(inspect.signature(kind).parameters)
    except ValueError:  # some types of C
        names = []
    kept = {name: describe(vars(thing)[name]) for name in names if name in getattr(thing, "__dict__", {})}
    return {"class": kind.__qualname__, **kept}


def describe(thing: Any, depth: int = 0) -> Any:
    """Anything as JSON that differs where it computes something else, as far as that can be seen from outside."""
    if thing is None or isinstance(thing, bool | int | float | str):
        return thing
    if isinstance(thing, Path | torch.dtype | torch.device):
        return str(thing)
    if depth > _DEPTH:
        return type(thing).__qualname__
    if isinstance(thing, nn.Module):
        return {"class": type(thing).__qualname__, "weights": network_fingerprint(thing)}
    if isinstance(thing, Tensor):
        data = thing.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return {"shape": list(thing.shape), "hash": short_hash(data)}
    if isinstance(thing, Mapping):
        return {str(key): describe(value, depth + 1) for key, value in thing.items()}
    if isinstance(thing, list | tuple | set | frozenset):
        entries = [describe(value, depth + 1) for value in thing]
        return sorted(entries, key=repr) if isinstance(thing, set | frozenset) else entries
    if isinstance(thing, functools.partial):
        return {"partial": describe(thing.func, depth + 1), "args": describe(thing.args, depth + 1)} | describe(
            thing.keywords, depth + 1
        )
    if isinstance(thing, MethodType):
        return {"method": thing.__name__, "of": describe(thing.__self__, depth + 1)}
    if isinstance(thing, FunctionType):
        return {"function": thing.__qualname__, "code": _code(thing.__code__)}
    if isinstance(thing, type):
        return thing.__qualname__
    return settings_of(thing)


def _code(code: CodeType) -> str:
    """Hash of what a function does; names of files and line numbers are left out."""
    flat = (sorted(const, key=repr) if isinstance(const, frozenset) else const for const in code.co_consts)
    simple = [repr(const) for const in flat if not isinstance(const, CodeType)]
    inner = [_code(const) for const in code.co_consts if isinstance(const, CodeType)]
    return short_hash(code.co_code, repr(simple).encode(), repr(code.co_names).encode(), "".join(inner).encode())
