"""What some verifiers want to see beside the finished sample, made by any pipeline: an early estimate of it, and how
well the pipeline's own network denoises it.

Neither needs to know how a pipeline decodes. For the early estimate the run is cut in two behind the watched entry, and
the pipeline decodes its own x0_hat at the end of the first part; not one evaluation more than the whole run. For the
denoising error the result is re-noised to each level and the pipeline runs one entry from there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import reduce
from torch import Tensor

from sparing.diffusion.search.sampler import Output, Sampler
from sparing.diffusion.search.seeds import gaussian
from sparing.diffusion.search.verifiers.base import View

__all__ = ["Looks", "denoising_errors", "looks_of", "run_watched", "watched_cut"]

_PURE_NOISE = 1e-4  # below it, a x_0 of a level is lost in its noise: there is nothing to predict


@dataclass(frozen=True)
class Looks:
    """Views beyond the plain ones that a search's verifiers ask for.

    Args:
        watched: level of the early estimate, None where nobody asks.
        denoising: views of the denoising errors.
    """

    watched: float | None = None
    denoising: tuple[View, ...] = ()

    @property
    def nfe(self) -> int:
        """Evaluations that scoring one candidate takes."""
        return sum(len(view.levels) for view in self.denoising)


def looks_of(parts: Sequence[Any]) -> Looks:
    """Of a verifier's parts.

    Raises:
        ValueError: two parts watch different levels: a run is cut once.
    """
    watched = {part.view.levels[0]: part.name for part in parts if part.space == "path"}
    if len(watched) > 1:
        which = ", ".join(f"{name!r} level {level:g}" for level, name in watched.items())
        raise ValueError(f"the verifiers of one search watch one level of the path, got {which}")
    denoising = dict.fromkeys(part.view for part in parts if part.space == "denoising")
    return Looks(next(iter(watched), None), tuple(denoising))


def _index_of(sampler: Sampler, level: float, *, asker: str, first: int = 0) -> int:
    """The nearest entry that can be run from ``first`` on, in the solver's strides."""
    if sampler.levels is None:
        raise ValueError(f"{asker} needs the noise levels of {sampler.scheduler_name}, which are unknown")
    index = sampler.levels.index_of(level, first=first, every=sampler.order)
    return index if index < sampler.num_steps else index - sampler.order


def watched_cut(sampler: Sampler, level: float) -> int:
    """Index behind the entry whose noise level is nearest to ``level``; even for a second-order solver.

    Raises:
        ValueError: a scheduler that cannot be stopped or whose levels are unknown, a level off its schedule, or one
            entry only.
    """
    asker = "a verifier of the path"
    if not sampler.resumable:
        raise ValueError(f"{asker} stops the run on its way, and {sampler.scheduler_name} cannot be stopped")
    cut = _index_of(sampler, level, asker=asker, first=sampler.order - 1) + 1
    while cut >= sampler.num_steps:
        cut -= sampler.order
    if cut < 1:
        raise ValueError(f"{asker} compares an early estimate with the end: {sampler.num_steps} step is too few")
    return cut


def run_watched(
    sampler: Sampler,
    latents: Tensor,
    prompts: Sequence[int],
    start: int,
    stop: int,
    *,
    level: float,
    seeds: Sequence[int],
    **kwargs: Any,
) -> tuple[Output, Tensor]:
    """(the run's output, the samples ``(batch, ...)`` that its x0_hat at ``level`` decodes to).

    Args:
        level, others: see :class:`Looks` and :meth:`Sampler.run`; the result is that of the uncut run.

    Raises:
        ValueError: the run does not go past the watched level to the end of the schedule.
    """
    cut = watched_cut(sampler, level)
    if not start < cut < stop or stop < sampler.num_steps:
        raise ValueError(
            f"a verifier of the path scores finished runs that pass level {level:g} (entry {cut}), this one is "
            f"[{start}, {stop}) of {sampler.num_steps}; take an algorithm of whole runs (random, zero_order)"
        )
    first = sampler.run(latents, prompts, start, cut, seeds=seeds, decode=True, **kwargs)
    histories = None if first.history[0] is None else first.history
    second = sampler.run(
        first.latents, prompts, cut, stop, seeds=seeds, states=sampler.generators_after, histories=histories
    )
    assert first.samples is not None
    whole = replace(
        second,
        calls=first.calls + second.calls,
        forwards=first.forwards + second.forwards,
        generate=first.generate + second.generate,
        decode=first.decode + second.decode,
    )
    return whole, first.samples


def denoising_errors(
    sampler: Sampler, clean: Tensor, prompts: Sequence[int], levels: Sequence[float]
) -> tuple[Tensor, int, int]:
    """Mean squared errors ``(batch, levels)`` of the noise that the pipeline predicts in re-noised results.

    With x = a x_0 + b eps and the prediction x0_hat, eps_hat - eps = (a / b) (x_0 - x0_hat). The draws eps of a level
    are the same for every candidate, so that candidates differ by what they are and not by their draws.

    Args:
        clean: ``(batch, *shape)`` finished latents.
        levels: noise levels as :meth:`Levels.level` measures them.

    Returns:
        the errors, evaluations a candidate, rows through the denoiser.

    Raises:
        ValueError: levels unknown, off the schedule, or of pure noise.
    """
    calls, forwards, found = 0, 0, []
    for number, level in enumerate(levels):
        index = _index_of(sampler, level, asker="the denoising error")
        assert sampler.levels is not None
        a, b = sampler.levels.pairs[index]
        if a < _PURE_NOISE:
            raise ValueError(f"level {level:g} is pure noise on this schedule: there is nothing to denoise")
        draw = gaussian(sampler.shape, number).to(clean.device)
        noised = a * clean.float() + b * draw
        if index == 0:
            noised = noised / sampler.start_scale
        noised = noised.to(clean.dtype)
        output = sampler.run(noised, prompts, index, index + 1, seeds=[number] * len(prompts), decode=False)
        if output.x0_hat is None:
            raise ValueError(f"{sampler.scheduler_name} gives no estimate of the clean sample")
        error = (output.x0_hat.float() - clean.float()).square()
        found.append((a / b) ** 2 * reduce(error, "batch ... -> batch", "mean"))
        calls, forwards = calls + output.calls, forwards + output.forwards
    return torch.stack(found, dim=1), calls, forwards
