"""Noise levels of any scheduler: x = a x_0 + b eps at every entry of its list, found by asking, not by a table.

``add_noise`` (``scale_noise`` of flow schedulers) of a one and of a zero gives a and b. The three families are told
apart by their numbers: flow a + b = 1, vp a^2 + b^2 = 1, ve a = 1 (Stable Diffusion under EulerDiscrete is ve, under
DDIM vp, for one and the same network). Shifts and Karras spacings need nothing special: what is probed is what is
stepped on.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sparing._compat import forget_position

__all__ = ["Family", "Levels", "classify", "coefficients", "predict_x0", "probe", "renoise", "renoise_coefficients"]

Family = Literal["flow", "vp", "ve"]

# How far probed numbers may be from the family's rule: tables of schedulers are float32, sigmas reach a few hundred.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Levels:
    """(a_i, b_i) for i = 0..T, from pure noise to the finished sample, as host numbers.

    A level is measured by b in all three families: flow s, vp sqrt(1 - alpha_bar), ve sigma.
    """

    pairs: tuple[tuple[float, float], ...]
    family: Family

    @property
    def num_steps(self) -> int:
        return len(self.pairs) - 1

    def level(self, index: int) -> float:
        """Noise level at ``index``: flow and ve sigma, vp b = sqrt(1 - alpha_bar)."""
        return self.pairs[index][1]

    def index_of(self, level: float, *, first: int = 0, every: int = 1) -> int:
        """The index whose level is nearest to ``level`` (the noisier of two equally near ones).

        Args:
            first, every: look at entries first, first + every, ... only: second-order solvers are cut at even ones.

        Raises:
            ValueError: ``level`` below 0 or above the noisiest level.
        """
        noisiest = max(b for _, b in self.pairs)
        if not 0 <= level <= noisiest * (1 + 1e-6):
            raise ValueError(f"level {level:g} is off the schedule's range 0..{noisiest:g}")
        return min(range(first, len(self.pairs), every), key=lambda i: (abs(self.pairs[i][1] - level), i))


def coefficients(family: Family, level: float) -> tuple[float, float]:
    """(a, b) at a level: flow sigma, vp alpha_bar, ve sigma.

    Raises:
        ValueError: an unknown family.
    """
    if family == "flow":
        return 1 - level, level
    if family == "vp":
        return math.sqrt(level), math.sqrt(1 - level)
    if family == "ve":
        return 1.0, level
    raise ValueError(f"family must be flow, vp or ve, got {family!r}")


def classify(pairs: Sequence[tuple[float, float]], *, prefer: Family | None = None) -> Family | None:
    """The family whose rule all pairs obey, None when there is none; ``prefer`` decides where two are obeyed."""
    rules: dict[Family, bool] = {
        "flow": all(abs(a + b - 1) < _TOLERANCE for a, b in pairs),
        "vp": all(abs(a * a + b * b - 1) < _TOLERANCE for a, b in pairs),
        "ve": all(abs(a - 1) < _TOLERANCE for a, b in pairs),
    }
    fitting = [family for family, obeyed in rules.items() if obeyed]
    if prefer in fitting:
        return prefer
    return fitting[0] if fitting else None


def probe(scheduler: Any) -> Levels:
    """Levels of a scheduler whose ``set_timesteps`` was called; it is left untouched.

    A fresh copy answers for every index: after a step ``add_noise`` ignores its timestep in favour of the step index,
    and FlowMatchHeun latches onto the first index that it is asked for. What they latch onto are numbers, so the copies
    may share their tables.

    Raises:
        ValueError: the scheduler has neither ``add_noise``, ``scale_noise`` nor sigmas to read, or its levels obey no
            family's rule; it is named.
    """
    name = type(scheduler).__name__.removeprefix("Windowed")
    flow = hasattr(scheduler, "scale_noise")
    if flow or hasattr(scheduler, "add_noise"):
        fresh = forget_position(copy.deepcopy(scheduler))
        pairs = [_ask(fresh, timestep, flow) for timestep in scheduler.timesteps]
    else:
        pairs = _from_sigmas(scheduler, name)
    family = classify(pairs, prefer="flow" if flow else "vp")
    if family is None:
        raise ValueError(f"the noise levels of {name} are neither flow, vp nor ve; search without re-noising instead")
    return Levels((*pairs, (1.0, 0.0)), family)


def _ask(scheduler: Any, timestep: Tensor, flow: bool) -> tuple[float, float]:
    fresh = copy.copy(scheduler)
    clean, noise = torch.eye(2, dtype=torch.float64).split(1, dim=1)  # a one without noise, the noise of a one
    when = timestep.reshape(1).cpu()
    noised = fresh.scale_noise(clean, when, noise) if flow else fresh.add_noise(clean, noise, when)
    a, b = noised.flatten().tolist()
    return a, b


def _from_sigmas(scheduler: Any, name: str) -> list[tuple[float, float]]:
    sigmas, count = getattr(scheduler, "sigmas", None), len(scheduler.timesteps)
    if not isinstance(sigmas, Tensor) or len(sigmas) < count:
        raise ValueError(
            f"{name} has no add_noise, scale_noise or sigmas, so its noise levels are unknown; use an algorithm that "
            "does not re-noise, or another scheduler"
        )
    values = [float(sigma) for sigma in sigmas[:count]]
    family: Family = "flow" if max(values) <= 1 + 1e-6 else "ve"
    return [coefficients(family, value) for value in values]


def renoise_coefficients(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    """alpha = a2/a1 and beta = sqrt(b2^2 - alpha^2 b1^2): alpha x_1 + beta xi has the law of x_0 diffused to level 2.

    (``add_noise`` on x_1 would be wrong: it takes its input for clean.)

    Args:
        first, second: (a, b) of the present and of the noisier level.

    Raises:
        ValueError: nothing to re-noise at a1 = 0, or a level 2 that is cleaner.
    """
    (a1, b1), (a2, b2) = first, second
    if a1 <= 1e-9:
        raise ValueError("the present level is pure noise (a = 0): there is nothing to re-noise")
    alpha = a2 / a1
    variance = b2**2 - alpha**2 * b1**2
    if alpha > 1 + 1e-9 or variance < -1e-9 * max(1.0, b2**2):
        raise ValueError(f"cannot re-noise to a cleaner level: from (a, b) = ({a1:g}, {b1:g}) to ({a2:g}, {b2:g})")
    return alpha, math.sqrt(max(variance, 0.0))


def renoise(latent: Tensor, draw: Tensor, first: tuple[float, float], second: tuple[float, float]) -> Tensor:
    """``latent`` at level ``first`` taken to the noisier level ``second`` with ``draw`` ~ N(0, I) of its shape."""
    alpha, beta = renoise_coefficients(first, second)
    return alpha * latent + beta * draw


def predict_x0(output: Tensor, sample: Tensor, pair: tuple[float, float], *, prediction: str, family: Family) -> Tensor:
    """x_0 that a network output stands for at ``sample`` = a x_0 + b eps.

    Args:
        output: ``(batch, C, ...)``, or with twice the channels when the second half is a variance.
        sample: ``(batch, C, ...)``, not yet scaled for the network.
        pair: (a, b).
        prediction: 'epsilon', 'v_prediction', 'sample', or 'velocity' (also 'flow_prediction').

    Raises:
        ValueError: an unknown prediction.
    """
    a, b = pair
    if sample.ndim > 1 and output.shape[1] == 2 * sample.shape[1]:
        output = output[:, : sample.shape[1]]
    if prediction in ("velocity", "flow_prediction"):
        return sample - b * output
    if prediction == "epsilon":
        return (sample - b * output) / a
    if prediction == "sample":
        return output
    if prediction == "v_prediction":
        if family == "ve":
            return -b / math.sqrt(b * b + 1) * output + sample / (b * b + 1)
        return a * sample - b * output
    raise ValueError(f"prediction must be epsilon, v_prediction, sample or velocity, got {prediction!r}")
