"""Noise search: spend compute on choosing the noise of any diffusers pipeline. Names resolve on first use."""

import importlib
from typing import Any

# public name -> module (below sparing.diffusion.search) that defines it
_HOMES = {
    "Budget": "ledger",
    "Candidate": "result",
    "Continue": "protocol",
    "Draft": "driver",
    "Gaussian": "protocol",
    "Given": "protocol",
    "Neighbour": "protocol",
    "NoiseSearch": "driver",
    "Outcome": "protocol",
    "Proposal": "protocol",
    "Renoise": "protocol",
    "SearchResult": "result",
    "SearchState": "protocol",
    "candidate_seed": "seeds",
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
