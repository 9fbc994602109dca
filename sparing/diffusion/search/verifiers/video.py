"""Verifiers of video ``(B, F, 3, H, W)`` in [0, 1]: smoothness in time, and image verifiers on chosen frames."""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor

from sparing.diffusion.search.verifiers.base import Verifier, as_verifier
from sparing.diffusion.search.verifiers.images import as_images, flat_mean

__all__ = ["OnFrames", "TemporalSmoothness", "chosen_frames"]


def chosen_frames(count: int, wanted: int) -> list[int]:
    """Indices of ``wanted`` frames of ``count``, evenly from the first to the last: 3 is first, middle, last."""
    wanted = min(wanted, count)
    return [0] if wanted == 1 else [round(i * (count - 1) / (wanted - 1)) for i in range(wanted)]


def _as_video(samples: Any, *, name: str) -> Tensor:
    if not isinstance(samples, Tensor) or samples.ndim != 5:
        given = tuple(samples.shape) if isinstance(samples, Tensor) else type(samples).__name__
        raise ValueError(f"verifier {name!r} takes video (B, F, 3, H, W), got {given}")
    if samples.shape[1] == 0:
        raise ValueError(f"verifier {name!r} got video without frames: {tuple(samples.shape)}")
    return samples


class TemporalSmoothness(Verifier):
    """Minus the mean |difference| of neighbouring frames.

    A still video is the smoothest of all, so use a floor: below it, less motion is as bad as more above it.

    Args:
        motion_floor: mean |difference| that is wanted at least, in [0, 1].
    """

    name, differentiable = "temporal_smoothness", True

    def __init__(self, *, motion_floor: float = 0.0) -> None:
        if not 0 <= motion_floor <= 1:
            raise ValueError(f"motion_floor is in [0, 1], got {motion_floor}")
        self.motion_floor = motion_floor

    def measure(self, samples: Any, prompts: Sequence[Any]) -> Tensor:
        video = _as_video(samples, name=self.name)
        if video.shape[1] < 2:
            raise ValueError(f"verifier {self.name!r} needs at least 2 frames, got {video.shape[1]}")
        frames = as_images(rearrange(video, "b f c h w -> (b f) c h w"), name=self.name)
        frames = rearrange(frames, "(b f) c h w -> b f c h w", b=len(video))
        motion = flat_mean((frames[:, 1:] - frames[:, :-1]).abs())
        return -self.motion_floor - (motion - self.motion_floor).abs()


class OnFrames(Verifier):
    """An image verifier on some frames of a video, averaged. Images (no frame axis) are scored as they are.

    Args:
        verifier: of images; an ensemble of ranks scores pools, not samples: build it of OnFrames instead.
        frames: how many, evenly from the first to the last (3: first, middle, last); None: all.
    """

    def __init__(self, verifier: Any, *, frames: int | None = 3) -> None:
        self.verifier = as_verifier(verifier)
        if self.verifier.pooled:
            raise ValueError(f"{self.verifier.name!r} scores a pool: put OnFrames around its members")
        if frames is not None and frames < 1:
            raise ValueError(f"frames must be at least 1, got {frames}")
        if self.verifier.spaces != {"sample"}:
            raise ValueError(f"{self.verifier.name!r} looks at {', '.join(self.verifier.spaces)}, which has no frames")
        self.frames = frames
        self.name, self.cost, self.space = self.verifier.name, self.verifier.cost, self.verifier.space
        self.needs_text, self.differentiable = self.verifier.needs_text, self.verifier.differentiable

    def measure(self, samples: Any, prompts: Sequence[Any]) -> Tensor:
        if isinstance(samples, Tensor) and samples.ndim == 4:
            return self.verifier(samples, prompts)
        video = _as_video(samples, name=self.name)
        chosen = chosen_frames(video.shape[1], self.frames or video.shape[1])
        frames = rearrange(video[:, torch.tensor(chosen)], "b f c h w -> (b f) c h w")
        scores = self.verifier(frames, [prompt for prompt in prompts for _ in chosen])
        return reduce(scores, "(b f) -> b", "mean", f=len(chosen))
