"""Kernels: the attention, fusion, search and compaction ops that every family calls.

Each op is a function ``op(..., backend='auto')``: correct on any device through its ``reference``, served by the best
usable library or Triton kernel, and able to say which and why (:func:`explain`, :func:`report`). Importing this
package loads no op and no torch; a name is loaded when it is first used.
"""

import importlib
from typing import Any

# public name -> module (below sparing.kernels) that defines it
_HOMES = {
    "BackendUnsupported": "dispatch",
    "explain": "dispatch",
    "report": "dispatch",
    "use_backend": "dispatch",
    "attention": "ops.attention",
    "attention_weights": "ops.attention",
    "BlockMap": "block_map",
    "block_sparse_attention": "ops.block_sparse_attention",
    "predict_block_map": "ops.predict_block_map",
    "varlen_attention": "ops.varlen_attention",
    "few_query_attention": "ops.few_query_attention",
    "merge_attention": "ops.few_query_attention",
    "RingCache": "ops.ring_attention_step",
    "ring_attention_step": "ops.ring_attention_step",
    "tiny_attention": "ops.tiny_attention",
    "window_attention": "ops.window_attention",
    "relative_position_index": "ops.window_attention",
    "window_region": "ops.window_attention",
    "codebook_argmin": "ops.codebook",
    "codebook_stats": "ops.codebook",
    "compact": "ops.compaction",
    "Compaction": "ops.compaction",
    "cosine_exit": "ops.cosine_exit",
    "gate_residual": "ops.adaln",
    "gate_residual_ln_modulate": "ops.adaln",
    "gather_rows": "ops.compaction",
    "grid_pool": "ops.pooling",
    "grid_unpool": "ops.pooling",
    "ln_modulate": "ops.adaln",
    "scatter_rows": "ops.compaction",
    "segment_pool": "ops.pooling",
    "survivors": "ops.cosine_exit",
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


def load_all() -> None:
    """Import every op, so that the registry is complete (needed by name lookups and reports only)."""
    for home in sorted(set(_HOMES.values())):
        importlib.import_module(f"{__name__}.{home}")
