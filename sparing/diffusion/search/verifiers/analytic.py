"""Verifiers in closed form, of flat vectors: for tests, tutorials and mixtures whose denoiser is known."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparing.diffusion.search.verifiers.base import Verifier

__all__ = ["Linear", "LogDensity"]


class Linear(Verifier):
    """``x . direction``, samples flattened.

    Args:
        direction: ``(D,)``, or of a sample's shape.
        space: 'sample', 'latent' or 'x0'.
    """

    name, differentiable = "linear", True

    def __init__(self, direction: Tensor | Sequence[float], *, space: str = "sample") -> None:
        self.direction = torch.as_tensor(direction).flatten()
        self.space = space

    def measure(self, samples: Any, prompts: Sequence[Any]) -> Tensor:
        flat = _flat(samples, self.name)
        if flat.shape[1] != len(self.direction):
            raise ValueError(f"verifier {self.name!r} has {len(self.direction)} weights for {flat.shape[1]} numbers")
        return flat @ self.direction.to(flat)


class LogDensity(Verifier):
    """``log p(x)`` of a density.

    Args:
        log_prob: ``(B, D) -> (B,)``, or an object with such a method, e.g. a ``torch.distributions`` mixture.
        space: 'sample', 'latent' or 'x0'.
    """

    name, differentiable = "log_density", True

    def __init__(self, log_prob: Callable[[Tensor], Tensor] | Any, *, space: str = "sample") -> None:
        self.log_prob: Callable[[Tensor], Tensor] = getattr(log_prob, "log_prob", log_prob)
        self.space = space

    def measure(self, samples: Any, prompts: Sequence[Any]) -> Tensor:
        return self.log_prob(_flat(samples, self.name))


def _flat(samples: Any, name: str) -> Tensor:
    if not isinstance(samples, Tensor) or not samples.is_floating_point():
        raise ValueError(f"verifier {name!r} takes tensors of floats, got {type(samples).__name__}")
    return (samples if samples.dtype == torch.float64 else samples.float()).flatten(1)
