"""One prompt's search as it runs: its algorithm, its candidates, and the tensor that each proposal starts from."""

from collections import OrderedDict
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.diffusion.search import levels as levels_of
from sparing.diffusion.search.ledger import Ledger
from sparing.diffusion.search.levels import Levels
from sparing.diffusion.search.log import Midway, SearchLog
from sparing.diffusion.search.neighbours import neighbour
from sparing.diffusion.search.protocol import (
    Algorithm,
    Continue,
    Gaussian,
    Given,
    Neighbour,
    Outcome,
    Proposal,
    Recipe,
    Renoise,
    SearchState,
)
from sparing.diffusion.search.result import Candidate
from sparing.diffusion.search.seeds import gaussian, sde_seed

__all__ = ["PromptSearch", "Start", "Task"]

_NOISES = 16  # rebuilt noises that are remembered: pivots and their like


@dataclass(frozen=True)
class Task:
    """A proposal with its number."""

    prompt: int
    id: int
    proposal: Proposal
    scoring: int = 0  # evaluations that its score takes

    @property
    def key(self) -> tuple[int, int]:
        return self.prompt, self.id

    @property
    def cost(self) -> int:
        return self.proposal.stop - self.proposal.start + int(self.proposal.exact) + self.scoring

    @property
    def kind(self) -> tuple[str, int, int, bool, bool]:
        """Tasks of one kind can share a batch."""
        proposal = self.proposal
        return proposal.via, proposal.start, proposal.stop, proposal.exact, isinstance(proposal.recipe, Continue)


@dataclass
class Start:
    """What a row begins with: ``latent`` without batch axis."""

    latent: Tensor
    seed: int
    generator: Tensor | None = None
    history: dict | None = None


class PromptSearch:
    """Holds an algorithm's generator between rounds."""

    def __init__(
        self,
        algorithm: Algorithm,
        state: SearchState,
        *,
        prompt: int,
        shape: Sequence[int],
        levels: Levels | None,
        log: SearchLog,
        given: Mapping[str, Tensor],
        start_scale: float = 1.0,
        scoring: int = 0,
    ) -> None:
        self.state, self.prompt, self.shape, self.levels, self.log = state, prompt, tuple(shape), levels, log
        self.given, self.start_scale, self.scoring = given, start_scale, scoring
        self.candidates: dict[int, Candidate] = {}
        self.ledger = Ledger()
        self.winner: int | None = None
        self.done = False
        self._proposed: dict[int, Proposal] = {}
        self._noises: OrderedDict[int, Tensor] = OrderedDict()
        self._plan: Generator[list[Proposal], list[Outcome], int | None] = algorithm.run(state)
        self._asked: list[Task] = []
        self._begun = False

    def next_round(self) -> list[Task]:
        """The next proposals, numbered; empty when the algorithm is through."""
        try:
            if self._begun:
                proposals = self._plan.send([self.candidates[task.id].outcome for task in self._asked])
            else:
                self._begun, proposals = True, next(self._plan)
        except StopIteration as end:
            self.done, self.winner = True, end.value
            return []
        first = len(self._proposed)
        self._asked = [Task(self.prompt, first + k, self._checked(p), self.scoring) for k, p in enumerate(proposals)]
        self._proposed.update({task.id: task.proposal for task in self._asked})
        return self._asked

    def close(self) -> None:
        """Ends the search before the algorithm is through (the budget is spent)."""
        self._plan.close()
        self.done = True

    def _checked(self, proposal: Proposal) -> Proposal:
        limit = self.state.draft_steps if proposal.via == "draft" else self.state.num_steps
        if limit is None:
            raise ValueError("the algorithm proposes drafts and the search has no draft sampler; give it draft=")
        if not 0 <= proposal.start < proposal.stop <= limit:
            raise ValueError(f"a proposal of [{proposal.start}, {proposal.stop}) does not fit a schedule of {limit}")
        if (proposal.start or proposal.stop < limit) and not self.state.resumable:
            raise ValueError(
                f"{self.state.scheduler} cannot be stopped and continued in the middle of its schedule; take an "
                "algorithm of whole runs (random, zero_order) or another scheduler"
            )
        return proposal

    # -- where a row begins

    def start_of(self, task: Task) -> Start:
        """The tensor that ``task`` begins with, on the CPU."""
        proposal, recipe = task.proposal, task.proposal.recipe
        own = sde_seed(self.state.run_seed, self.state.prompt, proposal.stage, proposal.round, proposal.index)
        if isinstance(recipe, Continue):
            parent = self.log.midway((self.prompt, recipe.parent))
            stream = None if recipe.reseed else parent.generator
            return Start(parent.latent, own, stream, parent.history)
        if isinstance(recipe, Renoise):
            latent = self._renoised(recipe)
            return Start(latent / self.start_scale if proposal.start == 0 else latent, own)
        if proposal.start != 0:
            raise ValueError(f"fresh noise belongs to entry 0 of the schedule, not to {proposal.start}")
        return Start(self.noise(task.id), own)

    def _renoised(self, recipe: Renoise) -> Tensor:
        if self.levels is None:
            raise ValueError(f"the noise levels of {self.state.scheduler} are unknown, so nothing can be re-noised")
        parent = self.log.midway((self.prompt, recipe.parent))
        draw = gaussian(self.shape, recipe.seed)
        first, second = self.levels.pairs[recipe.from_index], self.levels.pairs[recipe.to_index]
        if recipe.mode == "resample_x0":
            if parent.x0_hat is None:
                raise ValueError(f"{self.state.scheduler} gives no x0_hat to resample")
            return (second[0] * parent.x0_hat.float() + second[1] * draw).to(parent.latent.dtype)
        moved = levels_of.renoise(parent.latent.float(), draw, first, second)
        return moved.to(parent.latent.dtype)

    def noise(self, id: int) -> Tensor:
        """The noise that candidate ``id`` descends from, ``shape``, float32: rebuilt from its recipe and ancestors."""
        if id in self._noises:
            self._noises.move_to_end(id)
            return self._noises[id]
        found = self._noise_of(self._proposed[id].recipe)
        self._noises[id] = found
        if len(self._noises) > _NOISES:
            self._noises.popitem(last=False)
        return found

    def _noise_of(self, recipe: Recipe) -> Tensor:
        if isinstance(recipe, Gaussian):
            return gaussian(self.shape, recipe.seed)
        if isinstance(recipe, Given):
            if recipe.hash not in self.given:
                raise ValueError(f"no noise of hash {recipe.hash} was handed in; known are {', '.join(self.given)}")
            return self.given[recipe.hash]
        if isinstance(recipe, Neighbour):
            other = None if recipe.other is None else self.noise(recipe.other)
            draw = gaussian(self.shape, recipe.seed)
            return neighbour(self.noise(recipe.parent), draw, rule=recipe.rule, radius=recipe.radius, other=other)
        return self.noise(recipe.parent)

    # -- what became of them

    def proposal(self, id: int) -> Proposal:
        return self._proposed[id]

    def take(self, candidate: Candidate) -> None:
        self.candidates[candidate.id] = candidate
        self.ledger.add(nfe=candidate.nfe, forwards=candidate.forwards, seconds=candidate.seconds)

    def agrees(self, task: Task, candidate: Candidate) -> bool:
        """Whether a logged candidate is what the algorithm proposes now."""
        proposal = task.proposal
        names = ("recipe", "start", "stop", "parent", "stage", "round", "index", "via")
        return all(getattr(candidate, name) == getattr(proposal, name) for name in names)

    @property
    def finished(self) -> list[Candidate]:
        end = self.state.num_steps
        done = (self.candidates[id] for id in sorted(self.candidates))
        return [candidate for candidate in done if candidate.stop == end and candidate.via == "full"]

    def needed(self, tasks: Sequence[Task]) -> set[int]:
        """Ids of candidates whose latents ``tasks`` begin from."""
        recipes = (task.proposal.recipe for task in tasks)
        return {recipe.parent for recipe in recipes if isinstance(recipe, Continue | Renoise)}

    def midway_of(
        self, row: int, latents: Tensor, x0_hat: Tensor | None, stream: Tensor | None, history: dict | None
    ) -> Midway:
        clean = None if x0_hat is None else x0_hat[row].detach().cpu().clone()
        on_host = None if history is None else _on_host(history)
        return Midway(latents[row].detach().cpu().clone(), clean, stream, on_host)


def _on_host(history: dict) -> dict:
    def moved(value: object) -> object:
        if isinstance(value, Tensor):
            return value.detach().cpu().clone()
        return [moved(entry) for entry in value] if isinstance(value, list) else value

    return {name: moved(value) for name, value in history.items()}


def same_device(history: dict | None, device: torch.device) -> dict | None:
    """A stored solver state on the sampler's device."""
    if history is None:
        return None

    def moved(value: object) -> object:
        if isinstance(value, Tensor):
            return value.to(device)
        return [moved(entry) for entry in value] if isinstance(value, list) else value

    return {name: moved(value) for name, value in history.items()}
