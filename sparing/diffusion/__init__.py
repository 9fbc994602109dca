"""Diffusion: FlexDiT for class-conditional, text-to-image and video hosts; noise search. Names resolve on first use."""

import importlib
from typing import Any

from sparing._compat import quieten_xformers

quieten_xformers()  # before diffusers is imported

# public name -> module (below sparing.diffusion) that defines it
_HOMES = {
    "DensityTable": "density",
    "DensityTimestepSampler": "density",
    "DiffusionProcess": "losses",
    "FlexDiTPipeline": "pipelines",
    "FlexDiTPixArtTransformer2DModel": "flexdit_pixart",
    "FlexDiTTransformer2DModel": "flexdit",
    "FlexDiTVideoTransformer3DModel": "flexdit_video",
    "RespacedScheduler": "respaced",
    "SparseThresholds": "sparse_attention",
    "apply_sparse": "sparse_attention",
    "calibrate_sparse": "sparse_calibration",
    "guided": "pipelines",
    "measure_sparse": "sparse_calibration",
    "training_losses": "losses",
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
