"""Feynman-Kac steering by sequential Monte Carlo (Singhal et al. 2025)."""

from collections.abc import Generator, Sequence
from typing import Any, Literal

import torch

from sparing.diffusion.search.algorithms.random import indices
from sparing.diffusion.search.protocol import Continue, Outcome, Proposal, Renoise, SearchState
from sparing.diffusion.search.resampling import Potential, Steering, uniform
from sparing.diffusion.search.settings import check_lists, check_numbers, check_whole

__all__ = ["SMC"]


class SMC:
    """K particles, weighted at checks by the reward of their x0_hat, resampled when the weights grow uneven.

    NFE = K T (a copy that is jittered by j entries costs j more). Copies part only under a stochastic sampler (DDPM,
    DDIM with eta, Euler-ancestral, stochastic flow); on a deterministic one set ``jitter``.

    Args:
        particles: K.
        checks: rising indices, or shares of T; the last is T.
        lam: lambda of the tilt exp(lambda r); a sequence, one a check, tempers it.
        potential: 'diff', 'max' or 'sum' (``sparing.diffusion.search.resampling``).
        ess_threshold: resample below this share of K.
        select: 'argmax' of the final reward, or 'sample': a draw from the final weights, less prone to hacking.
        jitter: entries of the schedule by which copies (all but the first child of an ancestor) are re-noised.

    Raises:
        ValueError: numbers or names out of range; in ``run``, a deterministic sampler without jitter, rank ensembles
            (their numbers mean nothing outside a pool), checks that do not rise to T.
    """

    name = "smc"

    def __init__(
        self,
        particles: int = 8,
        *,
        checks: Sequence[float] = (0.4, 0.6, 0.8, 1.0),
        lam: float | Sequence[float] = 1.0,
        potential: Potential = "diff",
        ess_threshold: float = 0.5,
        select: Literal["argmax", "sample"] = "argmax",
        jitter: int = 0,
    ) -> None:
        check_whole(particles=particles, jitter=jitter)
        check_numbers(ess_threshold=ess_threshold)
        check_lists(check_numbers, checks=checks)
        if isinstance(lam, Sequence):
            check_lists(check_numbers, lam=lam)
        else:
            check_numbers(lam=lam)
        lambdas = [float(lam)] * len(checks) if isinstance(lam, int | float) else [float(value) for value in lam]
        if particles < 2 or jitter < 0:
            raise ValueError(f"particles must be at least 2 and jitter at least 0, got {particles} and {jitter}")
        if len(lambdas) != len(checks):
            raise ValueError(f"lam has {len(lambdas)} numbers for {len(checks)} checks")
        if select not in ("argmax", "sample"):
            raise ValueError(f"select must be argmax or sample, got {select!r}")
        Steering(potential, lambdas, ess_threshold=ess_threshold)
        self.particles, self.checks, self.lambdas = particles, tuple(checks), lambdas
        self.potential, self.ess_threshold, self.select, self.jitter = potential, ess_threshold, select, jitter

    def config(self) -> dict[str, Any]:
        names = ("name", "particles", "lambdas", "potential", "ess_threshold", "select", "jitter")
        return {**{name: getattr(self, name) for name in names}, "checks": list(self.checks)}

    def run(self, state: SearchState) -> Generator[list[Proposal], list[Outcome], int | None]:
        if state.pooled:
            raise ValueError("SMC needs absolute rewards; scores of a rank ensemble mean something in one pool only")
        if not state.stochastic and not self.jitter:
            raise ValueError(
                f"particles cannot separate under a deterministic sampler ({state.scheduler or 'this one'}): take a "
                "stochastic one (DDPM, DDIM with eta > 0, Euler-ancestral) or set jitter"
            )
        stops = indices(self.checks, state)
        if stops[-1] != state.num_steps or any(b <= a for a, b in zip([0, *stops], stops)):
            raise ValueError(f"checks must rise to the end {state.num_steps}, got {stops}")
        steering = Steering(self.potential, self.lambdas, ess_threshold=self.ess_threshold)
        proposals = [
            Proposal(noise, 0, stops[0], stage="smc", round=0, index=k)
            for k, noise in enumerate(state.first_noises("smc", self.particles))
        ]
        for check, stop in enumerate(stops):
            outcomes = yield proposals
            rewards = state.score(outcomes)
            steering.update(rewards)
            u = uniform(state.seed("resample", check, 0))
            if stop == state.num_steps:
                if self.select == "argmax":
                    return outcomes[int(rewards.argmax())].id
                assert steering.log_weights is not None
                return outcomes[_draw(steering.log_weights, u)].id
            ancestors = steering.resample(u).tolist()
            proposals = [
                self._child(state, outcomes[a].id, copy=a in ancestors[:k], check=check + 1, slot=k, stops=stops)
                for k, a in enumerate(ancestors)
            ]
        return None

    def _child(
        self, state: SearchState, parent: int, *, copy: bool, check: int, slot: int, stops: Sequence[int]
    ) -> Proposal:
        start, recipe = stops[check - 1], Continue(parent, reseed=True)
        name: dict[str, Any] = {"parent": parent, "stage": "smc", "round": check, "index": slot}
        if copy and self.jitter:
            back = max(start - self.jitter * state.order, 0)
            moved = Renoise(parent, start, back, state.seed("smc", check, slot))
            return Proposal(moved, back, stops[check], **name)
        return Proposal(recipe, start, stops[check], **name)


def _draw(log_weights: torch.Tensor, u: float) -> int:
    """One index drawn from the weights by the uniform ``u``."""
    cumulative = log_weights.softmax(0).cumsum(0)
    return min(int((cumulative < u).sum()), len(log_weights) - 1)
