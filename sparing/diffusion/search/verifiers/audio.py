"""Verifiers of audio ``(B, C, S)``, amplitudes in [-1, 1]; no weights."""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor

from sparing.diffusion.search.verifiers.base import Verifier
from sparing.diffusion.search.verifiers.images import flat_mean

__all__ = ["ClipRatio", "LoudnessTarget", "SpectralFlatness"]

_SILENCE = 1e-10  # power; -100 dB


def _as_audio(samples: Any, *, name: str) -> Tensor:
    """``(B, C, S)`` float32; one channel may be left out."""
    if not isinstance(samples, Tensor) or samples.ndim not in (2, 3) or not samples.is_floating_point():
        given = tuple(samples.shape) if isinstance(samples, Tensor) else type(samples).__name__
        raise ValueError(f"verifier {name!r} takes audio (B, C, S) of floats, got {given}")
    if samples.shape[-1] == 0:
        raise ValueError(f"verifier {name!r} takes audio (B, C, S), got no samples: {tuple(samples.shape)}")
    audio = samples if samples.dtype == torch.float64 else samples.float()
    return audio if audio.ndim == 3 else audio[:, None]


class LoudnessTarget(Verifier):
    """Minus the distance in dB of the root mean square (dB full scale; a square wave at 1 is 0) from ``target``.

    Args:
        target: dBFS.
    """

    name, differentiable = "loudness", True

    def __init__(self, target: float = -20.0) -> None:
        if target > 0:
            raise ValueError(f"target is in dB below full scale, at most 0, got {target}")
        self.target = target

    def measure(self, samples: Any, prompts: Sequence[Any]) -> Tensor:
        power = flat_mean(_as_audio(samples, name=self.name).square())
        return -(10 * power.clamp(min=_SILENCE).log10() - self.target).abs()


class ClipRatio(Verifier):
    """Minus the share of samples that clip.

    Args:
        threshold: amplitude from which a sample counts as clipped.
    """

    name = "clip_ratio"

    def __init__(self, threshold: float = 0.999) -> None:
        if threshold <= 0:
            raise ValueError(f"threshold is an amplitude above 0, got {threshold}")
        self.threshold = threshold

    def measure(self, samples: Any, prompts: Sequence[Any]) -> Tensor:
        return -flat_mean((_as_audio(samples, name=self.name).abs() >= self.threshold).float())


class SpectralFlatness(Verifier):
    """Geometric over arithmetic mean of the power spectrum, averaged over frames: 1 is white noise, 0 a pure tone.

    Use ``-SpectralFlatness()`` to search away from noise.

    Args:
        n_fft: samples a frame (Hann window, half overlapping).
    """

    name, differentiable = "spectral_flatness", True

    def __init__(self, n_fft: int = 1024) -> None:
        if n_fft < 4:
            raise ValueError(f"n_fft is at least 4 samples, got {n_fft}")
        self.n_fft = n_fft

    def measure(self, samples: Any, prompts: Sequence[Any]) -> Tensor:
        audio = _as_audio(samples, name=self.name)
        size = min(self.n_fft, audio.shape[-1])
        if size < 4:
            raise ValueError(f"verifier {self.name!r} needs at least 4 samples of audio, got {audio.shape[-1]}")
        waves = rearrange(audio, "b c s -> (b c) s")
        window = torch.hann_window(size, dtype=audio.dtype, device=audio.device)
        spectrum = torch.stft(waves, size, size // 2, window=window, center=False, return_complex=True)
        power = spectrum.abs().square()[:, 1:] + _SILENCE  # without the mean
        flatness = power.log().mean(dim=1).exp() / power.mean(dim=1)
        return reduce(flatness, "(b c) t -> b", "mean", c=audio.shape[1])
