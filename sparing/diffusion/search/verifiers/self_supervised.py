"""Verifiers that need neither a label nor a prompt: how early a sample was settled, how well its own model denoises it.

Ma et al. 2025, section 4.3, found that agreement between an early estimate and the finished sample goes along with
classifier logits, and saves small searches a verifier with labels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from sparing.diffusion.search.verifiers.base import Verifier
from sparing.diffusion.search.verifiers.classifier import Encoder
from sparing.diffusion.search.verifiers.images import as_images

__all__ = ["DenoisingError", "SelfConsistency"]


class SelfConsistency(Verifier):
    """Cosine of the features of what x0_hat at ``level`` decodes to and of the finished sample.

    The run is cut behind that level, which takes no evaluation more; schedulers that cannot be stopped, and algorithms
    that score unfinished samples, are refused by name. Of videos the mean over frames.

    Args:
        encoder: see :class:`Encoder`: a model, the name of one with weights (``'timm/vit_small_patch14_dinov2'``), or
            for audio a callable ``(B, C, S) -> (B, D)``.
        level: noise level of the early estimate; the nearest entry of the schedule is taken.
        device: where to put a model; None: where it is.

    Raises:
        ValueError: ``level`` is not positive.
    """

    name, space = "self_consistency", "path"

    def __init__(self, encoder: Any, *, level: float = 0.4, device: str | torch.device | None = None) -> None:
        self.encoder = encoder if isinstance(encoder, Encoder) else Encoder(encoder)
        self.levels = _checked((level,), self.name)
        if device is not None and isinstance(self.encoder.model, nn.Module):
            self.encoder.model.to(device)

    def measure(self, samples: Tensor, prompts: Sequence[Any]) -> Tensor:
        """``samples`` ``(B, 2, ...)``: early estimates and finished samples."""
        frames = 1
        if samples.ndim == 6:
            frames = samples.shape[2]
            samples = rearrange(samples, "b n f c h w -> (b f) n c h w")
        both = rearrange(samples, "b n ... -> (b n) ...")
        if both.ndim == 4:
            both = as_images(both, name=self.name)
        features = self.encoder(both).unflatten(0, (-1, 2))
        cosines = nn.functional.cosine_similarity(features[:, 0], features[:, 1], dim=-1)
        return reduce(cosines, "(b f) -> b", "mean", f=frames)


class DenoisingError(Verifier):
    """Minus the mean squared error of the noise that the pipeline itself predicts in its re-noised result.

    Small where the model finds the sample likely. Every level costs one evaluation a candidate, which the search counts
    in its NFE and its budget; guidance acts as in the run. The noises are the same for every candidate.

    Args:
        levels: noise levels to look at: sigma of flow and VE, sqrt(1 - alpha_bar) of VP schedules; the nearest entries
            of the schedule are taken.

    Raises:
        ValueError: no level, or one that is not positive.
    """

    name, space = "denoising_error", "denoising"

    def __init__(self, levels: Sequence[float] | float = (0.3, 0.5, 0.7)) -> None:
        self.levels = _checked(levels if isinstance(levels, Sequence) else (levels,), self.name)
        self.cost = float(len(self.levels))

    def measure(self, samples: Tensor, prompts: Sequence[Any]) -> Tensor:
        """``samples`` ``(B, levels)``: mean squared errors."""
        return -samples.mean(dim=1)


def _checked(levels: Sequence[float], name: str) -> tuple[float, ...]:
    values = tuple(levels)
    if not values or any(isinstance(v, bool) or not isinstance(v, int | float) or not v > 0 for v in values):
        raise ValueError(f"verifier {name!r} looks at positive noise levels, got {values}")
    return tuple(float(value) for value in values)
