"""Held-out verifiers: what the winner is worth to judges that took no part in choosing it."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparing.diffusion.search.result import SearchResult
from sparing.diffusion.search.scoring import Scorer
from sparing.diffusion.search.verifiers.base import View

__all__ = ["held_out", "warn_of_hacking"]


def held_out(
    verifiers: Sequence[Any], samples: Sequence[Tensor], prompts: Sequence[Any], *, sample_rate: int | None = None
) -> dict[str, dict[str, float]]:
    """{name: {"first": score, "best": score}} of two samples without batch axis: the first candidate's, the winner's.

    A verifier that fails gives NaN and a warning.
    """
    found = {}
    for verifier in verifiers:
        scorer = Scorer(verifier, sample_rate=sample_rate)
        try:
            raw, _ = scorer.score({View("sample"): torch.stack(list(samples))}, prompts)
        except Exception as error:  # the search is done: a judge that fails must not lose it
            reason = f"{type(error).__name__}: {error}"
            warnings.warn(f"held-out verifier {verifier.name!r} failed and says nothing ({reason})", stacklevel=2)
            found[verifier.name] = {"first": math.nan, "best": math.nan}
            continue
        pool = {name: torch.tensor([row[name] for row in raw], dtype=torch.float64) for name in raw[0]}
        first, best = verifier.combine(pool).double().tolist()
        found[verifier.name] = {"first": first, "best": best}
    return found


def warn_of_hacking(results: Sequence[SearchResult]) -> bool:
    """Warns when the search's score rose while the held-out verifiers' mean rank fell, over all prompts together.

    Returns:
        whether it did.
    """
    rises, votes, falling = 0, 0, set()
    for result in results:
        finished = result.finished
        if not finished or result.best.score <= finished[0].score:
            continue
        rises += 1
        for name, scores in result.report.items():
            vote = (scores["best"] > scores["first"]) - (scores["best"] < scores["first"])
            votes += vote
            if vote < 0:
                falling.add(name)
    if rises and votes < 0:
        warnings.warn(
            f"the score of {results[0].verifier!r} rose and the held-out verifiers fell ({', '.join(sorted(falling))}; "
            f"{rises} of {len(results)} searches): the search may exploit its verifier. Search less, or by an ensemble",
            stacklevel=3,
        )
        return True
    return False
