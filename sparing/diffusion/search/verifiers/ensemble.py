"""Verifiers made of verifiers: sums, ensembles of ranks or standardised scores, floors, a cache.

``RankEnsemble`` is the paper's (Ma et al. 2025: the unweighted mean of the candidates' ranks; 1 is the worst). It and
the two that standardise compare candidates of one pool; their scores mean nothing outside it (``pooled``).
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparing.diffusion.search.verifiers.base import Verifier, as_verifier, renamed

__all__ = [
    "Cached",
    "Constrained",
    "MinMaxEnsemble",
    "RankEnsemble",
    "WeightedSum",
    "ZEnsemble",
    "midranks",
    "minmax_scores",
    "z_scores",
]

# A candidate below a floor: far beneath scores in use, yet (in float64) still ordered by its distance to the floor.
_BELOW_FLOOR = 1e6


def midranks(scores: Tensor) -> Tensor:
    """Ranks within each row, 1 = worst; ties share the mean of their ranks. NaN ranks with minus infinity.

    Args:
        scores: ``(..., B)``.

    Returns:
        ``(..., B)`` float64.
    """
    values = torch.nan_to_num(scores.detach().double(), nan=-math.inf, posinf=math.inf, neginf=-math.inf).contiguous()
    ordered = values.sort(dim=-1).values
    below = torch.searchsorted(ordered, values, side="left")
    up_to = torch.searchsorted(ordered, values, side="right")
    return (below + up_to + 1).double() / 2


def z_scores(scores: Tensor) -> Tensor:
    """(score - mean) / population standard deviation within each row, float64; a constant row gives 0.

    Entries that are not finite are left out of mean and deviation; they become minus infinity (plus infinity stays).
    """
    values, finite = scores.detach().double(), torch.isfinite(scores)
    count = finite.sum(dim=-1, keepdim=True).clamp(min=1)
    kept = torch.where(finite, values, 0.0)
    mean = kept.sum(dim=-1, keepdim=True) / count
    deviation = torch.where(finite, values - mean, 0.0)
    spread = (deviation.square().sum(dim=-1, keepdim=True) / count).sqrt()
    spread = torch.where(_is_constant(kept, finite), 0.0, spread)
    return _with_infinities(torch.where(spread > 0, deviation / spread.clamp(min=1e-300), 0.0), values, finite)


def minmax_scores(scores: Tensor) -> Tensor:
    """(score - min) / (max - min) within each row, float64; a constant row gives 0. Not finite: as in z_scores."""
    values, finite = scores.detach().double(), torch.isfinite(scores)
    low = torch.where(finite, values, math.inf).amin(dim=-1, keepdim=True)
    high = torch.where(finite, values, -math.inf).amax(dim=-1, keepdim=True)
    span = high - low
    scaled = torch.where(finite & (span > 0), (values - low) / span.clamp(min=1e-300), 0.0)
    return _with_infinities(scaled, values, finite)


def _is_constant(kept: Tensor, finite: Tensor) -> Tensor:
    """Rows whose finite entries are all equal: rounding of the mean must not make a spread of them."""
    low = torch.where(finite, kept, math.inf).amin(dim=-1, keepdim=True)
    high = torch.where(finite, kept, -math.inf).amax(dim=-1, keepdim=True)
    return high <= low


def _with_infinities(standard: Tensor, values: Tensor, finite: Tensor) -> Tensor:
    return torch.where(finite, standard, torch.where(values == math.inf, math.inf, -math.inf))


class _Combined(Verifier):
    """What has members: parts and properties are theirs."""

    def __init__(self, members: Sequence[Verifier], name: str) -> None:
        if not members:
            raise ValueError(f"{type(self).__name__} needs at least one verifier")
        self.members = tuple(members)
        self.name = name
        self._parts = _unique_parts(self.members)
        self.needs_text = any(part.needs_text for part in self._parts)
        self.differentiable = not self.pooled and all(member.differentiable for member in self.members)
        costs = [part.cost for part in self._parts if part.cost is not None]
        self.cost = sum(costs) if len(costs) == len(self._parts) else None
        spaces = self.spaces
        self.space = next(iter(spaces)) if len(spaces) == 1 else "sample"

    @property
    def parts(self) -> tuple[Verifier, ...]:
        return self._parts

    @property
    def pooled(self) -> bool:
        return any(member.pooled for member in self.members)

    def score(self, samples: Any, prompts: Sequence[Any] | str | None = None) -> Tensor:
        """Scores ``(B,)``, this batch being the pool."""
        return self(samples, prompts)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name})"


def _unique_parts(members: Sequence[Verifier]) -> tuple[Verifier, ...]:
    """Leaves of all members; one that stands in two places is looked at once, two of one name are told apart."""
    leaves = {id(part.leaf): part.leaf for member in members for part in member.parts}
    named: dict[str, Verifier] = {}
    for leaf in leaves.values():
        name, count = leaf.name, 1
        while name in named:
            count += 1
            name = f"{leaf.name}#{count}"
        named[name] = renamed(leaf, name)
    return tuple(named.values())


class WeightedSum(_Combined):
    """``a + 2 * b - c``: what the arithmetic of verifiers makes."""

    def __init__(self, terms: Sequence[tuple[float, Verifier]]) -> None:
        flat: list[tuple[float, Verifier]] = []
        for weight, member in terms:
            if isinstance(member, WeightedSum):
                flat += [(weight * inner, part) for inner, part in zip(member.weights, member.members, strict=True)]
            else:
                flat.append((weight, member))
        self.weights: tuple[float, ...] = tuple(weight for weight, _ in flat)
        super().__init__([member for _, member in flat], _sum_name(flat))

    def _combined(self, values: Mapping[int, Tensor]) -> Tensor:
        parts = [weight * member._combined(values) for weight, member in zip(self.weights, self.members, strict=True)]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total


def _sum_name(terms: Sequence[tuple[float, Verifier]]) -> str:
    text = ""
    for weight, member in terms:
        sign = " - " if weight < 0 else " + "
        size = "" if abs(weight) == 1 else f"{abs(weight):g}*"
        text += f"{sign}{size}{member.name}"
    return text[3:] if text.startswith(" + ") else "-" + text[3:]


class _Ensemble(_Combined, ABC):
    """Weighted mean over members of scores made comparable within the pool."""

    def __init__(self, members: Sequence[Any], *, weights: Sequence[float] | None = None) -> None:
        verifiers = [as_verifier(member) for member in members]
        if weights is None:
            weights = [1.0] * len(verifiers)
        if len(weights) != len(verifiers):
            raise ValueError(f"{len(weights)} weights were given for {len(verifiers)} verifiers")
        if any(not math.isfinite(w) or w < 0 for w in weights) or (verifiers and sum(weights) <= 0):
            raise ValueError(
                f"weights must be at least 0, finite and not all 0, got {list(weights)}; to reward a low score use "
                "-verifier"
            )
        self.weights = tuple(float(weight) for weight in weights)
        super().__init__(verifiers, f"{self._word}({', '.join(member.name for member in verifiers)})")

    _word = "mean"

    @property
    def pooled(self) -> bool:
        return True

    def _combined(self, values: Mapping[int, Tensor]) -> Tensor:
        rows = torch.stack([member._combined(values).detach().double() for member in self.members])
        weights = torch.tensor(self.weights, dtype=torch.float64, device=rows.device)
        return self.combine_rows(rows, weights)

    @classmethod
    def combine_rows(cls, scores: Tensor, weights: Tensor | None = None) -> Tensor:
        """Ensemble scores ``(B,)`` of raw scores ``(V, B)``, one row a verifier.

        Args:
            scores: higher is better.
            weights: ``(V,)``; None: equal.
        """
        rows = cls._comparable(scores)
        if weights is None:
            return rows.mean(dim=0)
        rows, weights = rows[weights > 0], weights[weights > 0]  # a weight of 0 must not turn an infinity into NaN
        return (weights.to(rows)[:, None] * rows).sum(dim=0) / weights.to(rows).sum()

    @staticmethod
    @abstractmethod
    def _comparable(scores: Tensor) -> Tensor:
        """Raw scores ``(V, B)``, each row made comparable with the others."""


class RankEnsemble(_Ensemble):
    """Mean of ranks over the verifiers; a verifier that gives all the same score has no effect on the order.

    Args:
        members: verifiers or callables.
        weights: of the mean; None: equal, as in the paper.
    """

    _word = "rank"
    _comparable = staticmethod(midranks)


class ZEnsemble(_Ensemble):
    """Mean over verifiers of scores standardised within the pool (population deviation)."""

    _word = "z"
    _comparable = staticmethod(z_scores)


class MinMaxEnsemble(_Ensemble):
    """Mean over verifiers of scores scaled to [0, 1] within the pool."""

    _word = "minmax"
    _comparable = staticmethod(minmax_scores)


class Constrained(_Combined):
    """Scores by one verifier among candidates that reach a floor of another.

    Candidates below the floor come after all that reach it, the closest to the floor first (score
    ``-1e6 - (floor - b)``), so that a search started below the floor still has a direction.

    Args:
        verifier: what is maximised.
        floor: ``(other, least)``, e.g. ``(clip, 0.3)``.
    """

    def __init__(self, verifier: Any, *, floor: tuple[Any, float]) -> None:
        if not isinstance(floor, tuple | list) or len(floor) != 2:
            raise ValueError(f"floor is a pair (verifier, least score), got {floor!r}")
        first, second, self.least = as_verifier(verifier), as_verifier(floor[0]), float(floor[1])
        if not math.isfinite(self.least):
            raise ValueError(f"floor of {second.name!r} must be finite, got {self.least}")
        super().__init__([first, second], f"{first.name} where {second.name} >= {self.least:g}")
        self.differentiable = False

    def _combined(self, values: Mapping[int, Tensor]) -> Tensor:
        score, other = (member._combined(values).double() for member in self.members)
        return torch.where(other >= self.least, score, other - self.least - _BELOW_FLOOR)


class Cached(Verifier):
    """Remembers scores by the content of sample and prompt: a slow verifier never sees the same sample twice.

    A NaN (a grader that did not answer) is not remembered.

    Args:
        verifier: an absolute one; of an ensemble, cache the members.
        max_entries: oldest are forgotten beyond it.
    """

    def __init__(self, verifier: Any, *, max_entries: int = 100_000) -> None:
        self.verifier = as_verifier(verifier)
        if self.verifier.pooled:
            raise ValueError(
                f"{self.verifier.name!r} scores a pool, not a sample, and cannot be cached; cache its members"
            )
        if max_entries < 1:
            raise ValueError(f"max_entries must be at least 1, got {max_entries}")
        self.name, self.cost, self.space = self.verifier.name, self.verifier.cost, self.verifier.space
        self.levels = self.verifier.levels
        self.needs_text, self.max_entries = self.verifier.needs_text, max_entries
        if hasattr(self.verifier, "sample_rate"):
            self.sample_rate = self.verifier.sample_rate
        if len(self.verifier.spaces) > 1:
            raise ValueError(f"{self.name!r} looks at {', '.join(sorted(self.verifier.spaces))}; cache its members")
        self._known: dict[bytes, float] = {}

    def __len__(self) -> int:
        return len(self._known)

    def measure(self, samples: Any, prompts: Sequence[Any]) -> Tensor:
        if hasattr(self, "sample_rate"):
            self.verifier.sample_rate = self.sample_rate  # type: ignore[attr-defined]
        keys = [_fingerprint(sample, prompt) for sample, prompt in zip(samples, prompts, strict=True)]
        known = {key: self._known[key] for key in keys if key in self._known}
        unknown = [i for i, key in enumerate(keys) if key not in known and key not in keys[:i]]
        if unknown:
            batch = samples[torch.tensor(unknown)] if isinstance(samples, Tensor) else [samples[i] for i in unknown]
            fresh = self.verifier(batch, [prompts[i] for i in unknown])
            known.update(zip((keys[i] for i in unknown), fresh.tolist(), strict=True))
            fresh_keys = [keys[i] for i in unknown]
            self._known.update((key, known[key]) for key in fresh_keys if not math.isnan(known[key]))
            for old in list(self._known)[: max(0, len(self._known) - self.max_entries)]:
                del self._known[old]
        return torch.tensor([known[key] for key in keys], dtype=torch.float64)


def _fingerprint(sample: Any, prompt: Any) -> bytes:
    digest = hashlib.blake2b(repr(prompt).encode(), digest_size=16)
    if isinstance(sample, Tensor):
        array = sample.detach().cpu().contiguous()
        digest.update(f"{array.dtype}{tuple(array.shape)}".encode())
        digest.update(array.view(torch.uint8).numpy().tobytes() if array.ndim else repr(array.item()).encode())
    elif hasattr(sample, "tobytes"):  # PIL images and arrays
        digest.update(f"{getattr(sample, 'mode', '')}{getattr(sample, 'size', '')}".encode())
        digest.update(sample.tobytes())
    else:
        raise TypeError(f"samples of type {type(sample).__name__} cannot be told apart by content; do not cache them")
    return digest.digest()
