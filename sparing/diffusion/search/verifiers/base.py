"""What a verifier is: a function of samples whose value a search makes large (spec: Ma et al. 2025, section 3).

A verifier is a tree. Its leaves score samples; what stands above them (sums, rank ensembles, floors, in ``ensemble``)
only combines the leaves' scores. The two halves are apart on purpose: a driver keeps the **raw** scores of the leaves,
which mean the same in every round, and combines them anew over whatever pool of candidates is being compared. A rank,
for instance, is only defined within one pool and must never be stored.

    raw = verifier.raw(samples, prompts)      # {part.name: part.score(samples, prompts) for part in verifier.parts}
    scores = verifier.combine(raw)            # (B,), higher is better
    scores = verifier(samples, prompts)       # both at once, the pool being this batch
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sparing.diffusion.search.verifiers.ensemble import WeightedSum

__all__ = ["SPACES", "Verifier", "View", "as_verifier", "checked_scores", "renamed"]

# What a verifier may ask to see: decoded samples, final latents, the predicted clean latents at the last step run; and,
# at noise levels of its choice, (early estimate, finished sample) decoded, or errors of the pipeline's own network.
SPACES = ("sample", "latent", "x0", "path", "denoising")
_AT_LEVELS = ("path", "denoising")


@dataclass(frozen=True)
class View:
    """What a verifier sees: a space and, in 'path' and 'denoising', the noise levels looked at."""

    space: str
    levels: tuple[float, ...] = ()


class Verifier:
    """Scores samples; higher is better. Subclasses implement :meth:`measure`.

    Attributes:
        name: key of its scores in the log.
        cost: seconds or NFE a sample takes, when somebody knows; only shown.
        space: what it wants to see: 'sample', 'latent', 'x0', 'path' (``(B, 2, ...)``: what x0_hat at ``levels[0]``
            decodes to, and the finished sample) or 'denoising' (``(B, levels)``: mean squared errors of the noise that
            the pipeline predicts in the re-noised result).
        levels: of 'path' (one) and 'denoising': noise levels: sigma of flow and VE, sqrt(1 - alpha_bar) of VP.
        needs_text: refuses candidates without a prompt.
        differentiable: its scores carry gradients to samples that require them.
        pooled: its combined scores are defined within one pool of candidates only (rank ensembles).
        batch_size: most samples scored at once; None: as many as are given.
    """

    name: str = ""
    cost: float | None = None
    space: str = "sample"
    levels: tuple[float, ...] = ()
    needs_text: bool = False
    differentiable: bool = False
    batch_size: int | None = None

    def measure(self, samples: Any, prompts: Sequence[Any]) -> Any:
        """Scores of a batch of at most ``batch_size``; called without gradients unless samples require them.

        Args:
            samples: tensor ``(B, 3, H, W)`` in [0, 1] (video ``(B, F, 3, H, W)``, audio ``(B, C, S)``, latents as the
                pipeline has them), or a list of B PIL images.
            prompts: B prompts or class labels; None where there is none.

        Returns:
            B numbers: a tensor, an array or a list; NaN for a sample that cannot be scored.
        """
        raise NotImplementedError(f"{type(self).__name__} has no measure method")

    def score(self, samples: Any, prompts: Sequence[Any] | str | None = None) -> Tensor:
        """Scores ``(B,)`` of a batch, float32 (float64 where :meth:`measure` gives that).

        Args:
            samples: see :meth:`measure`.
            prompts: B prompts, one for all, or None.

        Raises:
            ValueError: a wrong number of scores, a prompt missing, or samples that it cannot read.
        """
        count = len(samples)
        texts = _per_sample(self.name, prompts, count)
        if self.needs_text and any(not isinstance(text, str) or not text.strip() for text in texts):
            raise ValueError(f"verifier {self.name!r} needs a text prompt for every sample, and there is none")
        if count == 0:
            return torch.zeros(0)
        graph = (
            self.differentiable and isinstance(samples, Tensor) and samples.requires_grad and torch.is_grad_enabled()
        )
        if isinstance(samples, Tensor) and not graph:
            samples = samples.detach()
        step = self.batch_size or count
        ours = type(self).measure.__module__.startswith("sparing.") and not isinstance(self, _Function)
        parts = []
        with torch.set_grad_enabled(graph), _full_precision(samples):
            for start in range(0, count, step):
                chunk = slice(start, start + step)
                part = samples[chunk]
                if isinstance(part, Tensor) and not ours:
                    part = part.clone()  # others' code may normalise in place; the samples are everybody's
                parts.append(checked_scores(self.measure(part, texts[chunk]), name=self.name, count=len(part)))
            return torch.cat(parts)

    @property
    def view(self) -> View:
        """What it wants to see, with the levels.

        Raises:
            ValueError: levels without a space that has any, or the other way round.
        """
        levels = tuple(self.levels)
        if (self.space in _AT_LEVELS) != bool(levels) or (self.space == "path" and len(levels) != 1):
            raise ValueError(
                f"verifier {self.name!r}: levels go with the spaces path (one) and denoising (one or more), got "
                f"{self.space!r} with {levels}"
            )
        return View(self.space, levels)

    @property
    def pooled(self) -> bool:
        """Whether combined scores are defined within one pool of candidates only."""
        return False

    @property
    def parts(self) -> "tuple[Verifier, ...]":
        """The leaves of the tree, which look at samples, each once; names are unique ('clip', 'clip#2')."""
        return (self,)

    def raw(self, samples: Any, prompts: Sequence[Any] | str | None = None) -> dict[str, Tensor]:
        """Scores of every part, name -> ``(B,)``.

        Args:
            samples: see :meth:`measure`; or a mapping of spaces to such batches, of which each part takes its own.
            prompts: B prompts, one for all, or None.
        """
        found = {}
        for part in self.parts:
            batch = samples
            if isinstance(samples, Mapping):
                if part.space not in samples:
                    raise ValueError(f"verifier {part.name!r} wants {part.space!r}, there is {', '.join(samples)}")
                batch = samples[part.space]
            found[part.name] = part.score(batch, prompts)
        return found

    def combine(self, raw: Mapping[str, Any]) -> Tensor:
        """Scores ``(B,)`` of a pool from the parts' raw scores.

        Args:
            raw: name -> B numbers, as :meth:`raw` gives them; the pool may be gathered from many batches.
        """
        missing = [part.name for part in self.parts if part.name not in raw]
        if missing:
            raise ValueError(f"scores of {', '.join(missing)} are missing; given: {', '.join(raw) or 'none'}")
        return self._combined({id(part.leaf): torch.as_tensor(raw[part.name]) for part in self.parts})

    def _combined(self, values: Mapping[int, Tensor]) -> Tensor:
        """Scores of a pool from the leaves' scores, by the leaves' identity."""
        return values[id(self)]

    @property
    def leaf(self) -> "Verifier":
        """What a part stands for: itself, or the leaf that it renames."""
        return self

    @property
    def spaces(self) -> frozenset[str]:
        """What the parts want to see."""
        return frozenset(part.space for part in self.parts)

    def __call__(self, samples: Any, prompts: Sequence[Any] | str | None = None) -> Tensor:
        """Scores ``(B,)`` of a batch, the batch being the pool; :meth:`raw` and :meth:`combine` in one."""
        return self.combine(self.raw(samples, prompts))

    def __neg__(self) -> "WeightedSum":
        return _sum([(-1.0, self)])

    def __mul__(self, factor: float) -> "WeightedSum":
        return _sum([(_number(factor), self)])

    __rmul__ = __mul__

    def __truediv__(self, factor: float) -> "WeightedSum":
        return _sum([(1.0 / _number(factor), self)])

    def __add__(self, other: "Verifier") -> "WeightedSum":
        return _sum([(1.0, self), (1.0, as_verifier(other))])

    def __sub__(self, other: "Verifier") -> "WeightedSum":
        return _sum([(1.0, self), (-1.0, as_verifier(other))])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


class _Function(Verifier):
    """Any callable as a leaf; attributes that it carries (``name``, ``space``, ``needs_text``, ...) are taken over."""

    def __init__(self, function: Callable[..., Any], *, source: Any = None, name: str | None = None) -> None:
        source = function if source is None else source
        own = getattr(source, "name", None) or getattr(source, "__name__", None) or type(source).__name__
        self.name = name or str(own)
        self.function, self.source = function, source
        for attribute in _TAKEN_OVER:
            if hasattr(source, attribute):
                setattr(self, attribute, getattr(source, attribute))
        if self.space not in SPACES:
            raise ValueError(f"verifier {self.name!r} has space {self.space!r}; possible: {', '.join(SPACES)}")
        _ = self.view  # levels that do not go with the space are refused here

    def measure(self, samples: Any, prompts: Sequence[Any]) -> Any:
        if hasattr(self, "sample_rate"):
            self.source.sample_rate = self.sample_rate
        return self.function(samples, prompts)

    @property
    def leaf(self) -> Verifier:
        """A leaf under another name stands for that leaf."""
        return self.source if isinstance(self.source, Verifier) else self


_TAKEN_OVER = ("cost", "space", "levels", "needs_text", "differentiable", "batch_size", "sample_rate")


def renamed(leaf: Verifier, name: str) -> Verifier:
    """The same leaf under another name, for a tree in which two are called the same."""
    return leaf if leaf.name == name else _Function(leaf.measure, source=leaf, name=name)


def as_verifier(verifier: Any, *, name: str | None = None) -> Verifier:
    """A verifier of anything that can be one: itself, an object with ``score(samples, prompts)``, a callable
    ``f(samples, prompts)``, or a list of such (a rank ensemble).

    Raises:
        TypeError: it cannot be called.
    """
    if isinstance(verifier, Verifier):
        return verifier
    if isinstance(verifier, type):
        raise TypeError(f"verifier {verifier.__name__} is a class: create one, {verifier.__name__}(...)")
    if isinstance(verifier, list | tuple):
        from sparing.diffusion.search.verifiers.ensemble import RankEnsemble

        members = [as_verifier(member) for member in verifier]
        return members[0] if len(members) == 1 else RankEnsemble(members)
    if callable(getattr(verifier, "score", None)):
        return _Function(verifier.score, source=verifier, name=name)
    if not callable(verifier):
        raise TypeError(
            "a verifier is a callable f(samples, prompts) or has score(samples, prompts), got "
            f"{type(verifier).__name__}"
        )
    return _Function(verifier, name=name)


def checked_scores(scores: Any, *, name: str, count: int) -> Tensor:
    """Scores ``(count,)`` from what a verifier returned: ``(B,)`` or ``(B, 1)``, tensor, array or list.

    float64 is kept; everything else becomes float32. NaN stays: what it means is the driver's to say.

    Raises:
        ValueError: no numbers, or not ``count`` of them.
    """
    try:
        if isinstance(scores, list | tuple):
            scores = [math.nan if value is None else float(value) for value in scores]
        tensor = torch.as_tensor(scores)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"verifier {name!r} returned {type(scores).__name__}, which holds no scores") from error
    if tensor.ndim == 2 and tensor.shape[1] == 1:
        tensor = tensor[:, 0]
    if tensor.ndim == 0 and count == 1:
        tensor = tensor[None]
    if tensor.ndim != 1:
        raise ValueError(f"verifier {name!r} returned scores of shape {tuple(tensor.shape)} for {count} samples")
    if len(tensor) != count:
        raise ValueError(f"verifier {name!r} returned {len(tensor)} scores for {count} samples")
    if tensor.is_complex():
        raise ValueError(f"verifier {name!r} returned complex scores")
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _per_sample(name: str, prompts: Sequence[Any] | str | None, count: int) -> list[Any]:
    if prompts is None or isinstance(prompts, str | int):
        return [prompts] * count
    if len(prompts) != count:
        raise ValueError(f"verifier {name!r} got {len(prompts)} prompts for {count} samples")
    return list(prompts)


def _full_precision(samples: Any) -> torch.autocast:
    """Autocast off: scoring is float32 whatever the caller's program is under."""
    device = samples.device.type if isinstance(samples, Tensor) else "cpu"
    return torch.autocast(device_type=device, enabled=False)


def _sum(terms: "list[tuple[float, Verifier]]") -> "WeightedSum":
    from sparing.diffusion.search.verifiers.ensemble import WeightedSum

    return WeightedSum(terms)


def _number(factor: Any) -> float:
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not math.isfinite(cast(float, factor)):
        raise TypeError(f"a verifier can be scaled by a finite number, got {factor!r}")
    return float(factor)
