"""Launch configurations of the Triton kernels: a small table, looked up by op and sizes. Nothing is timed in user code.

Lookup order: what ``python -m sparing.kernels.tune`` measured on this machine (the user's cache), the shipped table
``tuned/sm90.json`` (measured configurations, empty until a GPU has measured any), then the default rule below. A table
can change speed, never results beyond rounding. With ``torch.use_deterministic_algorithms(True)`` the default rule
alone decides, because a split count changes the order of sums.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

TUNED = Path(__file__).parent.parent / "tuned" / "sm90.json"


@dataclass(frozen=True)
class Config:
    """Tile sizes (rows of queries, rows of keys), warps and pipeline stages of one launch."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


_FORCED: dict[str, Config] = {}


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least ``n`` (1 for 0)."""
    return 1 << max(n - 1, 0).bit_length()


def user_table() -> Path:
    """Where configurations tuned on this machine are kept: ``$XDG_CACHE_HOME/sparing/tuned/sm90.json``."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_home) / "sparing" / "tuned" / TUNED.name


@cache
def _table() -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for path in (TUNED, user_table()):
        if path.exists():
            found |= json.loads(path.read_text())["configs"]
    return found


@contextmanager
def forced(kernel: str, config: Config) -> Iterator[None]:
    """Within this context the kernel takes this configuration; for tuning."""
    _FORCED[kernel] = config
    try:
        yield
    finally:
        del _FORCED[kernel]


def table_source() -> str:
    """What the table in use is, for reports."""
    return f"tuned/{TUNED.name}, {len(_table())} measured configurations; the default rule elsewhere"


def key(kernel: str, head_dim: int, dtype: torch.dtype) -> str:
    """Key of the tuned table: kernel, head dimension rounded up to a power of two, dtype."""
    return f"{kernel}/d{next_power_of_2(head_dim)}/{str(dtype).removeprefix('torch.')}"


def pick_config(kernel: str, default: Config, *, head_dim: int, dtype: torch.dtype) -> Config:
    """The measured configuration of this kernel and size class, else ``default``."""
    if kernel in _FORCED:
        return _FORCED[kernel]
    if torch.are_deterministic_algorithms_enabled():
        return default
    found = _table().get(key(kernel, head_dim, dtype))
    return default if found is None else Config(**{name: found[name] for name in asdict(default)})
