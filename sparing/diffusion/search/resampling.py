"""Weights of particles: potentials, effective sample size, systematic resampling (Singhal et al. 2025; Chopin 2004).

Everything is float64 arithmetic on vectors of K numbers. Between resamplings log-weights ACCUMULATE over checks (the
published code of Feynman-Kac steering drops them when the effective sample size stays above its threshold), and for
every potential the product over a particle's life is exp(lambda r(x_0)): 'max' and 'sum' are corrected at the last
check.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from sparing.diffusion.search.seeds import generator

__all__ = ["POTENTIALS", "Potential", "Steering", "effective_sample_size", "systematic", "uniform"]

Potential = Literal["diff", "max", "sum"]
POTENTIALS: tuple[Potential, ...] = ("diff", "max", "sum")


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """1 / sum of squared normalised weights: K when all are equal, 1 when one particle holds everything; 0-d."""
    return 1 / log_weights.softmax(0).square().sum()


def systematic(log_weights: Tensor, u: float) -> Tensor:
    """Ancestors ``(K,)`` of K children by one uniform: child j takes the first i with W_0 + .. + W_i >= (u + j) / K.

    Args:
        log_weights: ``(K,)``, not normalised.
        u: in [0, 1).
    """
    count = len(log_weights)
    cumulative = log_weights.double().softmax(0).cumsum(0)
    cumulative[-1] = 1.0  # rounding must not leave the last positions without an ancestor
    positions = (u + torch.arange(count, dtype=torch.float64)) / count
    return torch.searchsorted(cumulative, positions)


def uniform(seed: int) -> float:
    """One draw from [0, 1) by ``seed``."""
    return float(torch.rand((), generator=generator(seed), dtype=torch.float64))


class Steering:
    """Log-weights of K particles over the checks of one run.

    Args:
        potential: increment at check k from rewards r: 'diff' lambda_k r_k - lambda_(k-1) r_(k-1), zero before the
            first; 'max' lambda_k times the running maximum; 'sum' lambda_k times the running sum. 'max' and 'sum' take
            at the last check lambda r minus all earlier increments of the particle instead.
        lambdas: one number a check; rising numbers temper the target.
        ess_threshold: resample when the effective sample size is below this share of K.

    Raises:
        ValueError: an unknown potential, no checks, or a share outside [0, 1].
    """

    def __init__(self, potential: Potential, lambdas: Sequence[float], *, ess_threshold: float = 0.5) -> None:
        if potential not in POTENTIALS:
            raise ValueError(f"potential must be one of {', '.join(POTENTIALS)}, got {potential!r}")
        if not lambdas:
            raise ValueError("steering needs at least one check")
        if not 0 <= ess_threshold <= 1:
            raise ValueError(f"ess_threshold is a share of the particles in [0, 1], got {ess_threshold}")
        self.potential, self.lambdas, self.ess_threshold = potential, tuple(lambdas), ess_threshold
        self.check = 0
        self.log_weights: Tensor | None = None
        self._memory: Tensor | None = None  # what the potential remembers of each particle
        self._spent: Tensor | None = None  # sum of each particle's increments since its beginning

    def update(self, rewards: Tensor) -> Tensor:
        """Adds the increments of this check; returns the log-weights ``(K,)``, accumulated since the last resampling.

        Raises:
            ValueError: more checks than ``lambdas``.
        """
        if self.check >= len(self.lambdas):
            raise ValueError(f"all {len(self.lambdas)} checks are done")
        rewards, strength = rewards.double(), self.lambdas[self.check]
        if self._memory is None or self._spent is None or self.log_weights is None:
            self.log_weights, self._spent = torch.zeros_like(rewards), torch.zeros_like(rewards)
            self._memory = torch.zeros_like(rewards) if self.potential != "max" else rewards
        if self.potential == "diff":
            memory, increment = strength * rewards, strength * rewards - self._memory
        else:
            memory = torch.maximum(self._memory, rewards) if self.potential == "max" else self._memory + rewards
            last = self.check + 1 == len(self.lambdas)
            increment = strength * rewards - self._spent if last else strength * memory
        increment = torch.where(increment.isfinite(), increment, -torch.inf)  # a failed reward (-inf) stays hopeless
        self._memory, self._spent = memory, self._spent + increment
        self.log_weights = self.log_weights + increment
        self.check += 1
        return self.log_weights

    @property
    def effective_sample_size(self) -> Tensor:
        """Of the present log-weights; 0-d."""
        assert self.log_weights is not None, "call update first"
        return effective_sample_size(self.log_weights)

    def resample(self, u: float) -> Tensor:
        """Ancestors ``(K,)``: the identity while the effective sample size holds; otherwise weights begin anew."""
        assert self.log_weights is not None, "call update first"
        assert self._memory is not None
        assert self._spent is not None
        count = len(self.log_weights)
        if self.effective_sample_size >= self.ess_threshold * count:
            return torch.arange(count)
        ancestors = systematic(self.log_weights, u)
        self.log_weights = torch.zeros_like(self.log_weights)
        self._memory, self._spent = self._memory[ancestors], self._spent[ancestors]
        return ancestors
