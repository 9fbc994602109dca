"""Random search (best of N) and successive halving: independent noises, the best one wins. Source: Ma et al. 2025."""

import warnings
from collections.abc import Generator, Sequence
from itertools import pairwise
from typing import Any

from sparing.diffusion.search.protocol import Continue, Outcome, Proposal, SearchState
from sparing.diffusion.search.settings import check_lists, check_numbers, check_whole

__all__ = ["Halving", "Random"]

_BLURRED = 0.8  # share of the noisiest level above which x0_hat is a blur: the first fifth of the range


class Random:
    """Best of ``n`` noises; NFE = n T. With ``keep``, all are first run by the search's draft sampler (fewer steps, a
    cache, a twin) and the ``keep`` best of these are run in full from the same noises: NFE = n T_draft + keep T.

    Raises:
        ValueError: ``n`` below 1, ``keep`` outside 1..n, no whole numbers; in ``run``, ``keep`` in a search without a
            draft sampler.
    """

    name = "random"

    def __init__(self, n: int = 8, *, keep: int | None = None) -> None:
        check_whole(n=n, **({} if keep is None else {"keep": keep}))
        if n < 1:
            raise ValueError(f"random search needs at least one candidate, got n = {n}")
        if keep is not None and not 1 <= keep <= n:
            raise ValueError(f"keep must be between 1 and n = {n}, got {keep}")
        self.n, self.keep = n, keep

    def config(self) -> dict[str, Any]:
        return {"name": self.name, "n": self.n, "keep": self.keep}

    def run(self, state: SearchState) -> Generator[list[Proposal], list[Outcome], int | None]:
        noises = state.first_noises("random", self.n)
        if self.keep is None:
            yield [
                Proposal(noise, 0, state.num_steps, stage="random", round=0, index=k) for k, noise in enumerate(noises)
            ]
            return None
        if state.draft_steps is None:
            raise ValueError("keep ranks drafts first, and this search has no draft sampler; give it one, or keep=None")
        drafts = yield [
            Proposal(noise, 0, state.draft_steps, stage="draft", round=0, index=k, via="draft")
            for k, noise in enumerate(noises)
        ]
        best = state.score(drafts).argsort(descending=True, stable=True)[: self.keep].tolist()
        full = yield [
            Proposal(noises[k], 0, state.num_steps, parent=drafts[k].id, stage="random", round=1, index=k) for k in best
        ]
        return state.best(full).id


class Halving:
    """Best of N with early pruning: run to each stop, score the x0_hat there (free), keep the best.

    NFE = sum over stops of n_before (stop - stop_before). Early stops judge blurs, which verifiers are not trained on:
    one in the first fifth of the noise range is warned of.

    Args:
        n: candidates at the beginning.
        stops: rising indices of the schedule, the last is T; numbers below 1 are shares of T.
        keeps: how many go on after each stop, falling; the last is 1.

    Raises:
        ValueError: lengths that differ, keeps that do not fall; in ``run``, stops that do not rise to T, cut a
            second-order solver at an odd index, or a scheduler that cannot be stopped.
    """

    name = "halving"

    def __init__(
        self, n: int = 16, *, stops: Sequence[float] = (0.4, 0.7, 1.0), keeps: Sequence[int] = (8, 4, 1)
    ) -> None:
        check_whole(n=n)
        check_lists(check_numbers, stops=stops)
        check_lists(check_whole, keeps=keeps)
        counts = [n, *keeps]
        if len(stops) != len(keeps) or not keeps:
            raise ValueError(f"stops and keeps must be as many, got {len(stops)} and {len(keeps)}")
        if any(later > earlier for earlier, later in pairwise(counts)) or min(counts) < 1:
            raise ValueError(f"keeps must fall from n = {n} and stay above 0, got {list(keeps)}")
        self.n, self.stops, self.keeps = n, tuple(stops), tuple(keeps)

    def config(self) -> dict[str, Any]:
        return {"name": self.name, "n": self.n, "stops": list(self.stops), "keeps": list(self.keeps)}

    def run(self, state: SearchState) -> Generator[list[Proposal], list[Outcome], int | None]:
        stops = indices(self.stops, state)
        if stops[-1] != state.num_steps or any(b <= a for a, b in pairwise([0, *stops])):
            raise ValueError(f"stops must rise to the end {state.num_steps}, got {stops}")
        _warn_of_blurs(stops, state)
        proposals = [
            Proposal(noise, 0, stops[0], stage="halving", round=0, index=k)
            for k, noise in enumerate(state.first_noises("halving", self.n))
        ]
        for j, (stop, keep) in enumerate(zip(stops, self.keeps)):
            outcomes = yield proposals
            order = state.score(outcomes).argsort(descending=True, stable=True)[:keep].tolist()
            if stop == state.num_steps:
                return outcomes[order[0]].id
            survivors = sorted(order)
            proposals = [
                Proposal(
                    Continue(outcomes[i].id),
                    stop,
                    stops[j + 1],
                    parent=outcomes[i].id,
                    stage="halving",
                    round=j + 1,
                    index=proposals[i].index,
                )
                for i in survivors
            ]
        return None


def _warn_of_blurs(stops: Sequence[int], state: SearchState) -> None:
    if state.levels is None:
        return
    vp = state.family == "vp"  # its b hardly moves for half of the schedule: take sigma = b / a there
    noise = [b / max(a, 1e-3) if vp else b for a, b in state.levels]
    early = [stop for stop in stops if noise[stop] > _BLURRED * max(noise) + 1e-9]
    if early:
        warnings.warn(
            f"after {', '.join(map(str, early))} of {state.num_steps} entries the noise is above {_BLURRED:.0%} of "
            "what it was at first: scores of so early an estimate say little; stop later",
            stacklevel=3,
        )


def indices(marks: Sequence[float], state: SearchState) -> list[int]:
    """Stops as indices: a float up to 1 is a share of T, rounded to an even index for second-order solvers.

    Raises:
        ValueError: the scheduler cannot be stopped, or an index that is none or splits a second-order step.
    """
    if not state.resumable:
        raise ValueError(f"{state.scheduler} cannot be stopped and continued; use an algorithm of whole runs (random)")
    found = []
    for mark in marks:
        if isinstance(mark, float) and mark < 1:
            index = round(mark * state.num_steps / state.order) * state.order
        else:
            index = state.num_steps if isinstance(mark, float) and mark == 1 else int(mark)
            if index != mark and mark != 1:
                raise ValueError(f"{mark} is neither an index of the schedule nor a share of it, which is at most 1.0")
        if state.order == 2 and index % 2 and index != state.num_steps:
            raise ValueError(f"{state.scheduler} is of second order: stop it at even indices only, not at {index}")
        found.append(index)
    return found
