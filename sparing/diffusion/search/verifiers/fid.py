"""The paper's FID oracle: a set-level verifier that picks, slot by slot, the candidate whose addition lowers FID most.

FID = |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017). The trace of the root is the sum of root
eigenvalues of S1^(1/2) S2 S1^(1/2), by ``eigh`` in float64, S1^(1/2) of the fixed statistics computed once. The exact
greedy order of Ma et al. 2025 is not stated there; here slots are filled in the order of the searches.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparing.diffusion.search.verifiers.base import Verifier
from sparing.diffusion.search.verifiers.classifier import Encoder
from sparing.diffusion.search.verifiers.images import as_images

__all__ = ["FIDGreedy", "feature_statistics", "frechet_distance"]


def feature_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``(D,)`` and covariance ``(D, D)`` (over N - 1) of features ``(N, D)``, float64."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"statistics need features (N, D) of at least 2 samples, got {tuple(features.shape)}")
    values = features.double()
    return values.mean(dim=0), torch.cov(values.T)


def _root(matrix: Tensor) -> Tensor:
    """Symmetric square root of a positive semi-definite matrix ``(D, D)``."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    """Squared Frechet distance of two Gaussians, float64."""
    target = _Target(mean, covariance)
    return float(target.distance(other_mean.double()[None], other_covariance.double()[None])[0])


class _Target:
    """Fixed statistics and the root of their covariance."""

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(f"statistics are (D,) and (D, D), got {tuple(mean.shape)} and {tuple(covariance.shape)}")
        self.mean, self.covariance = mean.double(), covariance.double()
        self.root = _root(self.covariance)

    def distance(self, means: Tensor, covariances: Tensor) -> Tensor:
        """Distances ``(B,)`` of B Gaussians, means ``(B, D)`` and covariances ``(B, D, D)``."""
        inner = self.root @ covariances @ self.root
        roots = torch.linalg.eigvalsh((inner + inner.mT) / 2).clamp(min=0).sqrt().sum(dim=-1)
        traces = covariances.diagonal(dim1=-2, dim2=-1).sum(dim=-1) + self.covariance.trace()
        return (means - self.mean).square().sum(dim=-1) + traces - 2 * roots


class FIDGreedy(Verifier):
    """Minus the FID of the set chosen so far with the candidate added.

    ``score`` looks and does not touch; :meth:`accept` adds the winner of a slot. Only running sums are kept.

    Args:
        encoder: see :class:`sparing.diffusion.search.verifiers.classifier.Encoder`.
        mean, covariance: ``(D,)`` and ``(D, D)`` of the real data (:func:`feature_statistics`).
        batch_size: candidates whose ``(D, D)`` covariances are in memory at once.
    """

    name = "fid_greedy"

    def __init__(self, encoder: Any, mean: Tensor, covariance: Tensor, *, batch_size: int = 4) -> None:
        self.encoder = encoder if isinstance(encoder, Encoder) else Encoder(encoder)
        self.target, self.batch_size = _Target(mean, covariance), batch_size
        self.count = 0
        self.sum = torch.zeros_like(self.target.mean)
        self.outer = torch.zeros_like(self.target.covariance)

    def measure(self, samples: Any, prompts: Sequence[Any]) -> Tensor:
        features = self._features(samples)
        count = self.count + 1
        means = (self.sum + features) / count
        outer = self.outer + features[:, :, None] * features[:, None, :]
        covariances = (outer - count * means[:, :, None] * means[:, None, :]) / max(count - 1, 1)
        return -self.target.distance(means, covariances)

    def accept(self, samples: Any) -> None:
        """Adds samples to the set."""
        features = self._features(samples)
        self.count += len(features)
        self.sum += features.sum(dim=0)
        self.outer += features.T @ features

    def choose(self, samples: Any) -> int:
        """Index of the candidate that lowers FID most (of equals the first), added to the set."""
        best = int(self.score(samples).argmax())
        self.accept(samples[best : best + 1])
        return best

    def _features(self, samples: Any) -> Tensor:
        with torch.no_grad():
            features = self.encoder(as_images(samples, name=self.name)).double().to(self.target.mean.device)
        if features.shape[1] != len(self.target.mean):
            raise ValueError(
                f"verifier {self.name!r}: features have {features.shape[1]} entries, the statistics "
                f"{len(self.target.mean)}"
            )
        return features
