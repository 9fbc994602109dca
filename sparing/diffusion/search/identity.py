"""What makes two searches the same: fingerprints of networks, and the settings of verifiers and drafts, as JSON.

A log is only gone on with by the search that wrote it. Class names are not enough: the same pipeline with other weights
and the same verifier with another target give other scores.
"""

import functools
import hashlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from sparing._compat import uncompiled

__all__ = ["describe", "fingerprint", "models_of", "settings_of"]

_SAMPLED = 64  # tensors of a network of which values are read
_DEPTH = 5


def _hash(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def fingerprint(network: nn.Module) -> str:
    """Hash of a network's configuration, the names and shapes of its weights, and of one number of each of up to 64 of
    them. A fine-tune changes all weights, so this tells it apart; it is no proof against one that changes a few.
    Compiled or not, a network is the same; buffers are left out, some are only made by the first forward.
    """
    network = uncompiled(network)
    config = getattr(network, "config", None)
    entries = dict(config) if isinstance(config, Mapping) else {}
    shown = sorted((key, repr(value)) for key, value in entries.items() if not key.startswith("_"))
    state = list(network.named_parameters())
    names = repr([(name, tuple(value.shape)) for name, value in state])
    plain = [value for _, value in state if type(value) in (Tensor, nn.Parameter) and value.numel()]
    real = [value for value in plain if value.device.type != "meta"]  # offloaded, or packed by a quantiser: names only
    stride = max(1, -(-len(real) // _SAMPLED))
    chosen = [value.detach().flatten()[value.numel() // 2].float() for value in real[::stride]]
    numbers = torch.stack([number.to(chosen[0].device) for number in chosen]).cpu().numpy().tobytes() if chosen else b""
    return _hash(type(network).__name__.encode(), repr(shown).encode(), names.encode(), numbers)


def models_of(pipe: Any) -> dict[str, str]:
    """Fingerprints of a pipeline's networks."""
    parts = getattr(pipe, "components", {})
    return {name: fingerprint(part) for name, part in sorted(parts.items()) if isinstance(part, nn.Module)}


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
        return {"class": type(thing).__qualname__, "weights": fingerprint(thing)}
    if isinstance(thing, Tensor):
        data = thing.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return {"shape": list(thing.shape), "hash": _hash(data)}
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
    return _hash(code.co_code, repr(simple).encode(), repr(code.co_names).encode(), "".join(inner).encode())
