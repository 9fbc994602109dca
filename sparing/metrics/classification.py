"""How well a classifier does, and how near a twin stays to its host."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Agreement", "agreement", "top1"]


def top1(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of samples whose largest logit is their label, a scalar in [0, 1].

    Args:
        logits: (batch, classes).
        labels: (batch,) int64.
    """
    if logits.shape[:1] != labels.shape:
        raise ValueError(f"logits {tuple(logits.shape)} do not go with labels {tuple(labels.shape)}")
    return (logits.argmax(-1) == labels).float().mean()


@dataclass(frozen=True)
class Agreement:
    """Twin against host on the same images: ``top1`` share of equal top-1 classes (None for models without a head),
    ``feature_cosine`` mean cosine of pooled features.
    """

    top1: float | None
    feature_cosine: float


def agreement(
    features: Tensor, host_features: Tensor, logits: Tensor | None = None, host_logits: Tensor | None = None
) -> Agreement:
    """Measure agreement.

    Args:
        features: (batch, width) pooled features of the twin.
        host_features: (batch, width) those of the host.
        logits: (batch, classes) of the twin, None if it has no head.
        host_logits: likewise of the host.
    """
    if features.shape != host_features.shape:
        raise ValueError(f"features {tuple(features.shape)} do not go with {tuple(host_features.shape)} of the host")
    cosine = torch.nn.functional.cosine_similarity(features.float(), host_features.float(), dim=-1).mean()
    if logits is None or host_logits is None or logits.shape[-1] == 0:
        return Agreement(None, float(cosine))
    same = (logits.argmax(-1) == host_logits.argmax(-1)).float().mean()
    return Agreement(float(same), float(cosine))
