"""Search over paths: take half-denoised latents back to more noise in several ways, denoise, keep the best.

Source: Ma et al. 2025.
"""

from collections.abc import Generator, Sequence
from typing import Any

from sparing.diffusion.search.algorithms.random import indices
from sparing.diffusion.search.levels import Levels
from sparing.diffusion.search.protocol import Outcome, Proposal, Renoise, SearchState

__all__ = ["Paths"]


class Paths:
    """N latents, M branches each, round after round until the end of the schedule.

    NFE = N i_0 + sum over rounds N M (landing - from), and with ``exact`` N M more a round that lands before the end.

    Args:
        num_paths, branches: N and M.
        start: level (flow and ve sigma, vp sqrt(1 - alpha_bar)) down to which all N are run first.
        forward, backward: each round adds ``forward`` to the level and then removes ``backward``.
        exact: score the denoised estimate AT the landing level (one NFE) instead of the last executed step's.
        ladder: (from index, landing index) of every round instead of levels; with it ``start`` is an index.
        renoise: 'marginal' keeps the present eps, 'resample_x0' diffuses x0_hat with fresh noise.

    Raises:
        ValueError: counts below 1 or backward <= forward; in ``run``, levels off the schedule, moves below its steps,
            or a scheduler whose levels are unknown.
    """

    name = "paths"

    def __init__(
        self,
        num_paths: int = 4,
        branches: int = 4,
        *,
        start: float = 0.5,
        forward: float = 0.2,
        backward: float = 0.35,
        exact: bool = False,
        ladder: Sequence[Sequence[int]] | None = None,
        renoise: str = "marginal",
    ) -> None:
        if num_paths < 1 or branches < 1:
            raise ValueError(f"num_paths and branches must be at least 1, got {num_paths} and {branches}")
        if ladder is None and not 0 < forward < backward:
            raise ValueError(f"each round must make progress: backward > forward > 0, got {backward} and {forward}")
        if renoise not in ("marginal", "resample_x0"):
            raise ValueError(f"renoise must be marginal or resample_x0, got {renoise!r}")
        self.num_paths, self.branches, self.start = num_paths, branches, start
        self.forward, self.backward, self.exact, self.renoise = forward, backward, exact, renoise
        self.ladder = None if ladder is None else [(int(back), int(land)) for back, land in ladder]

    def config(self) -> dict[str, Any]:
        names = ("name", "num_paths", "branches", "start", "forward", "backward", "exact", "renoise")
        ladder = None if self.ladder is None else [list(rung) for rung in self.ladder]
        return {**{name: getattr(self, name) for name in names}, "ladder": ladder}

    def run(self, state: SearchState) -> Generator[list[Proposal], list[Outcome], int | None]:
        current, rungs = self._rungs(state)
        slots = yield [
            Proposal(noise, 0, current, stage="paths", round=0, index=n)
            for n, noise in enumerate(state.first_noises("paths", self.num_paths))
        ]
        for r, (back, land) in enumerate(rungs):
            rows = [(slots[n], n * self.branches + m) for n in range(len(slots)) for m in range(self.branches)]
            landed = yield [
                Proposal(
                    Renoise(slot.id, current, back, state.seed("paths", r + 1, row), self.renoise),
                    back,
                    land,
                    parent=slot.id,
                    stage="paths",
                    round=r + 1,
                    index=row,
                    exact=self.exact and land < state.num_steps,
                )
                for slot, row in rows
            ]
            order = state.score(landed).argsort(descending=True, stable=True)[: self.num_paths]
            slots, current = [landed[row] for row in order.tolist()], land
        return slots[0].id

    def _rungs(self, state: SearchState) -> tuple[int, list[tuple[int, int]]]:
        """Where the first phase stops, and (from, landing) of every round."""
        if state.levels is None or state.family is None:
            raise ValueError(f"paths re-noises, and the noise levels of {state.scheduler} are unknown")
        end = state.num_steps
        if self.ladder is not None:
            current = first = int(self.start)
            for back, land in self.ladder:
                if not 0 <= back < current < land <= end:
                    raise ValueError(
                        f"a round must go back from {current} and land later, before {end}; got {back, land}"
                    )
                current = land
            indices([first, *(index for rung in self.ladder for index in rung)], state)
            return first, self.ladder
        levels = Levels(state.levels, state.family)  # type: ignore[arg-type]
        first = current = levels.index_of(self.start, every=state.order)
        if not 0 < current < end:
            raise ValueError(f"start level {self.start:g} leaves nothing to run before or after it")
        rungs = []
        while current < end:
            noisier = levels.level(current) + self.forward
            back = levels.index_of(noisier, every=state.order)
            cleaner = levels.level(back) - self.backward
            land = end if cleaner <= 0 else levels.index_of(cleaner, every=state.order)
            land = min(max(land, current + state.order), end)  # backward > forward: at least one entry further
            if not back < current < land:
                raise ValueError(
                    f"on this schedule of {end} steps a round from level {levels.level(current):g} to {noisier:g} and "
                    f"down to {max(cleaner, 0):g} makes no progress (indices {current}, {back}, {land}); use larger "
                    "moves or more steps"
                )
            rungs.append((back, land))
            current = land
        indices([first, *(index for rung in rungs for index in rung)], state)
        return first, rungs
