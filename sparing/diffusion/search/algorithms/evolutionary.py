"""Evolutionary search over noises and over latents in the middle of the schedule (EvoSearch, He et al. 2025)."""

from collections.abc import Generator, Sequence
from itertools import pairwise
from typing import Any

import torch

from sparing.diffusion.search.algorithms.random import indices
from sparing.diffusion.search.neighbours import check_radius
from sparing.diffusion.search.protocol import Continue, Neighbour, Outcome, Proposal, Renoise, SearchState
from sparing.diffusion.search.seeds import generator
from sparing.diffusion.search.settings import check_lists, check_numbers, check_whole

__all__ = ["Evolutionary"]


class Evolutionary:
    """A population per entry of the schedule; elites stay (free), the rest are mutated children of tournament winners.

    Generation g begins at step k_g and costs P_g new (T - k_g) NFE. At k = 0 a child is a neighbour of its parent's
    noise (``mix``); later it is the parent's latent ``jump`` entries further on, taken back to k_g with fresh noise.

    Args:
        starts: k_g of every generation after the first, not falling; indices, or shares of T.
        population: size of the first generation; ``children``: new ones in each later generation.
        elites: best individuals that stay parents whatever happens.
        tournament: contestants a parent is the best of.
        radius: of ``mix``. ``jump``: entries between a latent and the step that its children begin at.

    Raises:
        ValueError: numbers out of range; in ``run``, starts that fall or leave no room before the end.
    """

    name = "evolutionary"

    def __init__(
        self,
        population: int = 8,
        *,
        children: int = 8,
        starts: Sequence[float] = (0, 0.25, 0.5),
        elites: int = 3,
        tournament: int = 3,
        radius: float = 0.4,
        jump: int = 2,
    ) -> None:
        check_whole(population=population, children=children, elites=elites, tournament=tournament, jump=jump)
        check_lists(check_numbers, starts=starts)
        check_numbers(radius=radius)
        if min(population, children, elites, tournament, jump) < 1 or elites > population:
            raise ValueError(
                f"population, children, elites, tournament and jump must be at least 1 and elites at most population, "
                f"got {population}, {children}, {elites}, {tournament}, {jump}"
            )
        check_radius("mix", radius)
        self.population, self.children, self.starts, self.elites = population, children, tuple(starts), elites
        self.tournament, self.radius, self.jump = tournament, radius, jump

    def config(self) -> dict[str, Any]:
        names = ("name", "population", "children", "elites", "tournament", "radius", "jump")
        return {**{name: getattr(self, name) for name in names}, "starts": list(self.starts)}

    def run(self, state: SearchState) -> Generator[list[Proposal], list[Outcome], int | None]:
        starts, jump = indices(self.starts, state), self.jump * state.order
        if any(b < a for a, b in pairwise(starts)) or any(k and k + jump >= state.num_steps for k in starts):
            raise ValueError(f"starts must not fall and leave {jump} entries before {state.num_steps}, got {starts}")
        if any(starts) and state.levels is None:
            raise ValueError(f"mutation in mid-schedule re-noises, and the levels of {state.scheduler} are unknown")
        marks = sorted({k + jump for k in starts if k})  # where later generations need latents
        first = [Proposal(noise, 0, 0) for noise in state.first_noises("evolutionary", self.population)]
        people = yield from self._finish(state, first, marks, 0)
        everything = list(people)
        for g, start in enumerate(starts, 1):
            scores = state.score([person["end"] for person in people])
            order = scores.argsort(descending=True, stable=True).tolist()
            draws = generator(state.seed("tournament", g, 0))
            born = []
            for i in range(self.children):
                contestants = torch.randint(len(people), (self.tournament,), generator=draws).tolist()
                parent = people[min(contestants, key=order.index)]
                seed = state.seed("evolutionary", g, i)
                recipe: Neighbour | Renoise
                if start == 0:
                    recipe = Neighbour(parent["noise"].id, "mix", self.radius, seed)
                else:
                    recipe = Renoise(parent[start + jump].id, start + jump, start, seed)
                born.append(Proposal(recipe, start, start, parent=recipe.parent))
            children = yield from self._finish(state, born, marks, g)
            everything += children
            people = [people[i] for i in order[: self.elites]] + children
        return state.best([person["end"] for person in everything]).id

    @staticmethod
    def _finish(
        state: SearchState, born: list[Proposal], marks: Sequence[int], round: int
    ) -> Generator[list[Proposal], list[Outcome], list[dict[Any, Outcome]]]:
        """Runs individuals to the end in segments; each becomes {mark: its candidate stopped there, "noise", "end"}."""
        people: list[dict[Any, Outcome]] = [{} for _ in born]
        recipes: list[Any] = [proposal.recipe for proposal in born]
        parents, start = [proposal.parent for proposal in born], born[0].start
        for stop in [mark for mark in marks if mark > start] + [state.num_steps]:
            outcomes = yield [
                Proposal(recipe, start, stop, parent=parent, stage="evolutionary", round=round, index=i)
                for i, (recipe, parent) in enumerate(zip(recipes, parents))
            ]
            for person, outcome in zip(people, outcomes):
                person.setdefault("noise", outcome)
                person[stop] = outcome
            recipes = [Continue(outcome.id) for outcome in outcomes]
            parents, start = [outcome.id for outcome in outcomes], stop
        for person in people:
            person["end"] = person[state.num_steps]
        return people
