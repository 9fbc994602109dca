"""A diffusion whose denoiser is closed form (a Gaussian mixture), and a driver of algorithms over it: float64."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparing.diffusion.search.levels import coefficients, renoise
from sparing.diffusion.search.neighbours import neighbour
from sparing.diffusion.search.protocol import Continue, Gaussian, Neighbour, Outcome, Proposal, Renoise, SearchState


@dataclass
class Mixture:
    """sum_k w_k N(m_k, C_k): ``weights (K,)``, ``means (K, d)``, ``covs (K, d, d)``."""

    weights: Tensor
    means: Tensor
    covs: Tensor

    def _posterior(self, x: Tensor, a: float, b: float) -> tuple[Tensor, Tensor, Tensor]:
        """Log joint ``(..., K)``, residuals and S^-1 residuals ``(..., K, d)`` of points ``(..., d)``."""
        spread = a * a * self.covs + b * b * torch.eye(x.shape[-1], dtype=x.dtype)
        residual = x.unsqueeze(-2) - a * self.means
        solved = torch.einsum("kij,...kj->...ki", torch.linalg.inv(spread), residual)
        log = self.weights.log() - 0.5 * (
            (residual * solved).sum(-1) + torch.logdet(spread) + x.shape[-1] * math.log(2 * math.pi)
        )
        return log, residual, solved

    def log_prob(self, x: Tensor, a: float = 1.0, b: float = 0.0) -> Tensor:
        return self._posterior(x, a, b)[0].logsumexp(-1)

    def score(self, x: Tensor, a: float, b: float) -> Tensor:
        log, _, solved = self._posterior(x, a, b)
        return -torch.einsum("...k,...kd->...d", log.softmax(-1), solved)

    def denoise(self, x: Tensor, a: float, b: float) -> Tensor:
        """E[x_0 | x]."""
        log, _, solved = self._posterior(x, a, b)
        parts = self.means + a * torch.einsum("kij,...kj->...ki", self.covs, solved)
        return torch.einsum("...k,...kd->...d", log.softmax(-1), parts)


def grid(family: str, steps: int, options: dict) -> Tensor:
    """Levels from noisy to clean, ``(T + 1,)``, by the formulas of ``config.grids``."""
    i = torch.arange(steps, dtype=torch.float64)
    if family == "flow":
        return torch.cat([1 - i / steps, torch.zeros(1, dtype=torch.float64)])
    if family == "vp":
        train = options["num_train_timesteps"]
        betas = torch.linspace(options["beta_start"], options["beta_end"], train, dtype=torch.float64)
        visited = ((steps - 1 - i) * (train // steps)).long()
        return torch.cat([torch.cumprod(1 - betas, 0)[visited], torch.ones(1, dtype=torch.float64)])
    high, low = (options[name] ** (1 / options["rho"]) for name in ("sigma_max", "sigma_min"))
    levels = (high + i / max(steps - 1, 1) * (low - high)) ** options["rho"]
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)])


@dataclass
class Driver:
    """Resolves recipes, steps, scores and counts NFE, one proposal at a time or (``run``) an algorithm to its end.

    ``draws`` holds the tensor that stands for each seed; what is not in it is drawn from the seed.
    """

    mixture: Mixture
    family: str
    levels: Tensor
    verifier: Callable[[Tensor], Tensor]
    draws: dict[int, Tensor] = field(default_factory=dict)
    eta: float = 0.0
    noise: list[Tensor] = field(default_factory=list)  # of each candidate, where it has one
    started: list[Tensor] = field(default_factory=list)
    state: list[Tensor] = field(default_factory=list)  # where each candidate stopped
    clean: list[Tensor] = field(default_factory=list)  # what each was scored on
    scores: list[float] = field(default_factory=list)
    proposals: list[Proposal] = field(default_factory=list)
    nfe: int = 0

    def pair(self, index: int) -> tuple[float, float]:
        return coefficients(self.family, float(self.levels[index]))

    def search_state(self, **options) -> SearchState:
        pairs = tuple(self.pair(i) for i in range(len(self.levels)))
        return SearchState(len(pairs) - 1, levels=pairs, family=self.family, stochastic=self.eta > 0, **options)

    def draw(self, seed: int) -> Tensor:
        if seed in self.draws:
            return self.draws[seed]
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.mixture.means.shape[1], generator=generator, dtype=torch.float64)

    def walk(self, x: Tensor, start: int, stop: int) -> tuple[list[Tensor], list[Tensor]]:
        """States after, and denoised estimates at, every step from ``start`` to ``stop``."""
        states, estimates = [], []
        for i in range(start, stop):
            (a, b), (a2, b2) = self.pair(i), self.pair(i + 1)
            estimates.append(self.mixture.denoise(x, a, b))
            x = a2 * estimates[-1] + b2 * (x - a * estimates[-1]) / b
            states.append(x)
        self.nfe += stop - start
        return states, estimates

    def start(self, z: Tensor) -> Tensor:
        return z * self.levels[0] if self.family == "ve" else z

    def _begin(self, recipe) -> tuple[Tensor | None, Tensor]:
        if isinstance(recipe, Gaussian):
            z = self.draw(recipe.seed)
            return z, self.start(z)
        if isinstance(recipe, Neighbour):
            z = neighbour(self.noise[recipe.parent], self.draw(recipe.seed), rule=recipe.rule, radius=recipe.radius)
            return z, self.start(z)
        if isinstance(recipe, Continue):
            return self.noise[recipe.parent], self.state[recipe.parent]
        assert isinstance(recipe, Renoise)
        first, second = self.pair(recipe.from_index), self.pair(recipe.to_index)
        return None, renoise(self.state[recipe.parent], self.draw(recipe.seed), first, second)

    def evaluate(self, proposal: Proposal) -> Outcome:
        noise, x = self._begin(proposal.recipe)
        states, estimates = self.walk(x, proposal.start, proposal.stop)
        final = states[-1]
        if proposal.stop + 1 == len(self.levels):
            clean = final
        elif proposal.exact:
            clean = self.mixture.denoise(final, *self.pair(proposal.stop))
            self.nfe += 1
        else:
            clean = estimates[-1]
        for record, value in (
            (self.noise, noise),
            (self.started, x),
            (self.state, final),
            (self.clean, clean),
            (self.scores, float(self.verifier(clean))),
            (self.proposals, proposal),
        ):
            record.append(value)
        return Outcome(len(self.scores) - 1, {"v": self.scores[-1]})

    def run(self, algorithm, state: SearchState | None = None) -> tuple[int, list[list[int]]]:
        """The winner's id and the ids of every round."""
        search, rounds = algorithm.run(state or self.search_state()), []
        try:
            proposals = next(search)
            while True:
                outcomes = [self.evaluate(proposal) for proposal in proposals]
                rounds.append([outcome.id for outcome in outcomes])
                proposals = search.send(outcomes)
        except StopIteration as end:
            finished = [i for i, p in enumerate(self.proposals) if p.stop + 1 == len(self.levels)]
            best = end.value if end.value is not None else max(finished, key=lambda i: (self.scores[i], -i))
            return best, rounds
