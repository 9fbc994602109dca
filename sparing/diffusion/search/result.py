"""What a search returns."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sparing.diffusion.search.protocol import Outcome, Recipe

__all__ = ["Candidate", "SearchResult"]


@dataclass
class Candidate:
    """One candidate as logged.

    Args:
        id: number within its prompt's search.
        prompt: index of the prompt.
        parent: id of the candidate it descends from.
        score: within the pool it was proposed in; raw scores of every verifier in ``scores``.
        nfe, forwards: solver evaluations, and rows through the denoiser (guidance doubles them).
        seconds: its share of the batch's time (generation, decoding, verification).
        kept: its sample is in ``file``.
        sample: decoded sample without batch axis, where kept in memory: image ``(3, H, W)`` in [0, 1], video
            ``(frames, 3, H, W)``, audio ``(channels, samples)``; None otherwise.
        preview: small uint8 stand-in of ``sample`` for contact sheets, or None.
    """

    id: int
    prompt: int
    stage: str
    round: int
    index: int
    parent: int | None
    recipe: Recipe
    start: int
    stop: int
    score: float
    scores: dict[str, float]
    nfe: int
    forwards: int
    seconds: float
    batch_size: int
    kept: bool = False
    file: str | None = None
    via: str = "full"
    error: str | None = None
    sample: Tensor | None = field(default=None, repr=False, compare=False)
    preview: Tensor | None = field(default=None, repr=False, compare=False)
    noise: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def outcome(self) -> Outcome:
        return Outcome(self.id, self.scores)


@dataclass
class SearchResult:
    """The outcome of one prompt's search.

    Args:
        candidates: all, by id.
        best: the winner, with ``sample``, ``score``, ``noise``, ``id``.
        num_steps: entries of the schedule; candidates with ``stop == num_steps`` are finished samples.
        nfe, forwards, seconds: totals of this search; ``seconds_by_part`` splits the seconds.
        rerun_nfe: evaluations beside the search, for shown samples that had not been kept (after a resumption).
        report: held-out scores {verifier: {"first": ..., "best": ...}} of the first finished candidate and of the
            winner.
        kind: "image", "video" or "audio".
        sample_rate: of audio, in Hz.
    """

    candidates: list[Candidate]
    best: Candidate
    prompt: Any
    num_steps: int
    nfe: int
    forwards: int
    seconds: float
    seconds_by_part: dict[str, float]
    verifier: str
    algorithm: str
    kind: str = "image"
    sample_rate: int | None = None
    rerun_nfe: int = 0
    report: dict[str, dict[str, float]] = field(default_factory=dict)
    rank: Callable[[Sequence[Outcome]], Tensor] | None = field(default=None, repr=False)

    @property
    def finished(self) -> list[Candidate]:
        """Candidates that were run to the end by the full sampler, by id."""
        return [c for c in self.candidates if c.stop == self.num_steps and c.via == "full"]

    def best_of_prefix(self) -> list[tuple[int, float]]:
        """(NFE spent, best score so far) after every finished candidate, in order: non-decreasing."""
        curve, spent, best = [], 0, -math.inf
        for candidate in self.candidates:
            spent += candidate.nfe
            if candidate.stop == self.num_steps and candidate.via == "full":
                best = max(best, candidate.score)
                curve.append((spent, best))
        return curve

    def best_of_n(self, n: int) -> float:
        """Expected best score of ``n`` of the finished candidates: mean over all subsets, not only the prefix.

        sum_k s_(k) C(k - 1, n - 1) / C(N, n) with ascending order statistics s_(k). NaN counts as -inf, and so does the
        mean when a whole subset does.

        Raises:
            ValueError: ``n`` is below 1 or above the number of finished candidates.
        """
        scores = sorted(-math.inf if math.isnan(candidate.score) else candidate.score for candidate in self.finished)
        if not 1 <= n <= len(scores):
            raise ValueError(f"best_of_n takes 1 to {len(scores)} (the finished candidates), not {n}")
        if scores[n - 1] == -math.inf:  # its weight may be too small for a float, and -inf times 0 is NaN
            return -math.inf
        total = math.comb(len(scores), n)
        return sum(score * (math.comb(k, n - 1) / total) for k, score in enumerate(scores) if k >= n - 1)

    def plot(self, path: str | Path) -> Path:
        """Score against NFE as .svg or .png."""
        from sparing.diffusion.search.report import plot

        return plot(self, path)

    def sheet(self, path: str | Path) -> Path:
        """Contact sheet: a row a round, captions, the winner framed."""
        from sparing.diffusion.search.report import sheet

        return sheet(self, path)
