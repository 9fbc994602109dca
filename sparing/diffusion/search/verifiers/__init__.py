"""Verifiers: what a noise search maximises. Names resolve on first use."""

import importlib
from typing import Any

# public name -> module (below sparing.diffusion.search.verifiers) that defines it
_HOMES = {
    "Aesthetic": "rewards",
    "AestheticHead": "rewards",
    "Brightness": "image_stats",
    "CLIPClassLogit": "clip",
    "CLIPEncoder": "clip",
    "CLIPScore": "clip",
    "Cached": "ensemble",
    "ClassifierLogit": "classifier",
    "ClipRatio": "audio",
    "Colorfulness": "image_stats",
    "Compressibility": "image_stats",
    "Constrained": "ensemble",
    "Contrast": "image_stats",
    "DenoisingError": "self_supervised",
    "Encoder": "classifier",
    "Entropy": "image_stats",
    "FIDGreedy": "fid",
    "FeatureKNN": "classifier",
    "InceptionClassProb": "classifier",
    "Linear": "analytic",
    "LogDensity": "analytic",
    "LoudnessTarget": "audio",
    "MinMaxEnsemble": "ensemble",
    "OnFrames": "video",
    "PromptReward": "rewards",
    "RankEnsemble": "ensemble",
    "SelfConsistency": "self_supervised",
    "Sharpness": "image_stats",
    "SpectralFlatness": "audio",
    "TemporalSmoothness": "video",
    "VLMGrader": "rewards",
    "Verifier": "base",
    "WeightedSum": "ensemble",
    "ZEnsemble": "ensemble",
    "VERIFIERS": "names",
    "as_verifier": "base",
    "checked_scores": "base",
    "feature_statistics": "fid",
    "frechet_distance": "fid",
    "make_verifier": "names",
    "make_verifiers": "names",
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
