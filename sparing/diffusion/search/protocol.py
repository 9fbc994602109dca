"""What algorithms, verifiers and the driver of a noise search say to each other.

An algorithm is a generator without torch models: it yields lists of :class:`Proposal` and receives for each list the
:class:`Outcome` of every proposal, in order. A proposal says how its starting tensor is made (a *recipe*), and which
part [start, stop) of the schedule is run from there. The driver alone batches, samples, verifies and logs.

    def run(self, state):
        outcomes = yield [
            Proposal(Gaussian(state.seed("random", 0, k)), 0, state.num_steps, stage="random", round=0, index=k)
            for k in range(self.n)
        ]
        scores = state.score(outcomes)      # float64, NaN already turned into -inf

Candidates are numbered within one prompt's search: the k-th proposal ever yielded has id k. Indices count entries of
the scheduler's list: index 0 is pure noise, ``num_steps`` the finished sample; one entry costs one NFE (a second-order
scheduler such as Heun lists 2 n - 1 entries for n steps).
"""

import math
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sparing.diffusion.search.seeds import candidate_seed

__all__ = [
    "Algorithm",
    "Continue",
    "Gaussian",
    "Given",
    "Neighbour",
    "Outcome",
    "Proposal",
    "Recipe",
    "Renoise",
    "SearchState",
    "Verifier",
    "recipe_from_json",
    "recipe_to_json",
]


@dataclass(frozen=True)
class Gaussian:
    """Fresh noise N(0, I) from ``seed``."""

    seed: int


@dataclass(frozen=True)
class Neighbour:
    """A neighbour of the *noise* of candidate ``parent``; ``rule`` names a function of ``neighbours``.

    ``other`` is the second parent of rules that mix two noises.
    """

    parent: int
    rule: str
    radius: float
    seed: int
    other: int | None = None


@dataclass(frozen=True)
class Renoise:
    """The latent of ``parent`` at ``from_index`` (where it stopped), diffused to the noisier level ``to_index``.

    ``mode``: "marginal" (default, keeps the current eps) or "resample_x0" (x0_hat of the parent with fresh noise).
    """

    parent: int
    from_index: int
    to_index: int
    seed: int
    mode: str = "marginal"


@dataclass(frozen=True)
class Continue:
    """The latent of ``parent`` where it stopped, unchanged, with its solver history.

    ``reseed=False`` goes on with the parent's random numbers, so that split runs equal whole ones; ``reseed=True``
    gives this candidate its own, which copies of one particle need under a stochastic sampler.
    """

    parent: int
    reseed: bool = False


@dataclass(frozen=True)
class Given:
    """A noise that the caller handed in, by the hash of its bytes (``SearchState.given``)."""

    hash: str


Recipe = Gaussian | Neighbour | Renoise | Continue | Given

_RECIPES: dict[str, type] = {
    "gaussian": Gaussian,
    "neighbour": Neighbour,
    "renoise": Renoise,
    "continue": Continue,
    "tensor": Given,
}
_NAMES = {kind: name for name, kind in _RECIPES.items()}


def recipe_to_json(recipe: Recipe) -> dict[str, Any]:
    """``{"op": ..., fields}``; fields at None are left out."""
    return {"op": _NAMES[type(recipe)], **{k: v for k, v in asdict(recipe).items() if v is not None}}


def recipe_from_json(record: Mapping[str, Any]) -> Recipe:
    """The inverse of :func:`recipe_to_json`.

    Raises:
        ValueError: an unknown ``op``.
    """
    fields = dict(record)
    op = fields.pop("op", None)
    if op not in _RECIPES:
        raise ValueError(f"unknown recipe {op!r}; known are {', '.join(_RECIPES)}")
    return _RECIPES[op](**fields)


@dataclass(frozen=True)
class Proposal:
    """One candidate to run.

    Args:
        recipe: how its tensor at ``start`` is made.
        start, stop: entries [start, stop) of the schedule are run; ``stop == num_steps`` finishes the sample. A
            finished candidate is scored on its sample, another on the x0_hat of its last executed step (free).
        parent: id of the candidate it descends from, for the tree of the log.
        stage, round, index: name it, and enter its seeds.
        exact: before the end, score the denoised estimate AT ``stop`` instead: one more NFE.
        via: "full", or "draft" for the cheap sampler handed to the search (``start`` 0, ``stop`` ``draft_steps``).
    """

    recipe: Recipe
    start: int
    stop: int
    parent: int | None = None
    stage: str = ""
    round: int = 0
    index: int = 0
    exact: bool = False
    via: str = "full"


@dataclass(frozen=True)
class Outcome:
    """What became of a proposal: its id, and the raw score of every verifier by name (NaN where one failed)."""

    id: int
    raw: Mapping[str, float]


@runtime_checkable
class Verifier(Protocol):
    """Scores samples; higher is better.

    Further attributes are read when present:
        ``space``: "sample" (default: decoded, floats in [0, 1]; images ``(batch, 3, H, W)``, video ``(batch, frames, 3,
            H, W)``, audio ``(batch, channels, samples)``), "latent" (the latent where the candidate stopped, x0_hat
            before the end; nothing is decoded) or "x0" (x0_hat of the last executed step).
        ``needs_text`` (False): prompts must be text. ``differentiable`` (False). ``cost`` (None): seconds a sample.
        ``sample_rate``: an audio verifier that declares it (any value, None included) is told the rate before scoring.
        ``parts``: the leaf verifiers of a combination, flat, names unique; the driver scores each part once.
        ``combine(raw)``: ``dict[name, (pool,) tensor] -> (pool,) tensor``, the score of every member of one pool.
        ``pooled`` (False): combined scores mean something within their pool only (ranks).
    """

    name: str

    def score(self, samples: Any, prompts: Sequence[Any]) -> Tensor:
        """``samples`` of batch size B and their B prompts -> ``(B,)`` float."""
        ...


@dataclass(frozen=True)
class SearchState:
    """What an algorithm may know of the run it plans; nothing in here changes during the run.

    Args:
        num_steps: entries T of the scheduler's list.
        run_seed, prompt: enter every seed.
        levels: (a_i, b_i) of x = a x0 + b eps for i = 0..T (the last is (1, 0)); None when the scheduler cannot be
            probed.
        order: of the solver; with 2, cut at even indices only.
        stochastic: the sampler adds noise along the path, so that copies of one latent separate.
        resumable: the scheduler may be stopped and continued in the middle (PNDM may not).
        scheduler: its class name, for messages.
        combine, pooled: see :class:`Verifier`.
        given: hashes of noises that the caller handed in.
        draft_steps: entries of the draft sampler's list; None without one.
        family: "flow", "vp", "ve" or None.
    """

    num_steps: int
    run_seed: int = 0
    prompt: str | int | None = ""
    levels: tuple[tuple[float, float], ...] | None = None
    order: int = 1
    stochastic: bool = False
    resumable: bool = True
    scheduler: str = ""
    combine: Callable[[Mapping[str, Tensor]], Tensor] | None = None
    pooled: bool = False
    given: tuple[str, ...] = field(default=())
    draft_steps: int | None = None
    family: str | None = None

    def seed(self, stage: str, round: int, index: int) -> int:
        return candidate_seed(self.run_seed, self.prompt, stage, round, index)

    def first_noises(self, stage: str, count: int) -> list["Recipe"]:
        """``count`` noises to begin with: those that the caller handed in, and fresh ones of this stage.

        Raises:
            ValueError: more were handed in than the algorithm begins with.
        """
        if len(self.given) > count:
            raise ValueError(f"latents holds {len(self.given)} noises, and the algorithm begins with {count}")
        fresh = (Gaussian(self.seed(stage, 0, k)) for k in range(len(self.given), count))
        return [*(Given(key) for key in self.given), *fresh]

    def score(self, outcomes: Sequence[Outcome]) -> Tensor:
        """Scores of one pool, ``(pool,)`` float64; ensembles of ranks rank within exactly these outcomes. NaN = -inf.

        Raises:
            ValueError: every score is NaN.
        """
        raw = {
            name: torch.tensor([outcome.raw[name] for outcome in outcomes], dtype=torch.float64)
            for name in outcomes[0].raw
        }
        if self.combine is not None:
            scores = self.combine(raw).double()
        elif len(raw) == 1:
            scores = next(iter(raw.values()))
        else:
            raise ValueError(f"{len(raw)} raw scores ({', '.join(raw)}) and no way to combine them")
        bad = scores.isnan()
        if bool(bad.all()):
            raise ValueError(
                f"every one of {len(outcomes)} scores is NaN ({', '.join(raw)}); check the verifier on one sample"
            )
        if bool(bad.any()):
            ids = [outcome.id for outcome, is_bad in zip(outcomes, bad.tolist()) if is_bad]
            warnings.warn(f"scores of candidates {ids} are NaN and count as the worst", stacklevel=2)
        return torch.where(bad, -math.inf, scores)

    def best(self, outcomes: Sequence[Outcome]) -> Outcome:
        """The best of one pool; of equals the first."""
        scores = self.score(outcomes)
        return outcomes[int(scores.argmax())]


@runtime_checkable
class Algorithm(Protocol):
    """Plans a search; deterministic given the state and the outcomes."""

    name: str

    def config(self) -> dict[str, Any]:
        """JSON-able settings: they are written into the log's header and compared at resume."""
        ...

    def run(self, state: SearchState) -> Generator[list[Proposal], list[Outcome], int | None]:
        """Yields rounds of proposals; may return the id of the winner (None: best finished candidate of all)."""
        ...
