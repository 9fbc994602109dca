"""Verifiers: what a noise search maximises. Names resolve on first use."""

import importlib
from typing import Any

# public name -> module (below sparing.diffusion.search.verifiers) that defines it
_HOMES = {
    "Cached": "ensemble",
    "Constrained": "ensemble",
    "MinMaxEnsemble": "ensemble",
    "RankEnsemble": "ensemble",
    "Verifier": "base",
    "WeightedSum": "ensemble",
    "ZEnsemble": "ensemble",
    "as_verifier": "base",
    "checked_scores": "base",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
