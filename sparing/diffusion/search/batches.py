"""Runs batches of proposals: latents in, scored and logged candidates out; halves itself when memory runs out."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparing.diffusion.search.log import Key, Midway, SearchLog
from sparing.diffusion.search.plan import PromptSearch, Task, same_device
from sparing.diffusion.search.probing import denoising_errors, run_watched
from sparing.diffusion.search.result import Candidate
from sparing.diffusion.search.sampler import Output, Sampler
from sparing.diffusion.search.samples import preview
from sparing.diffusion.search.scoring import Scorer
from sparing.diffusion.search.verifiers.base import View

__all__ = ["BatchRunner", "Keeper", "batches_of"]

_FIRST_BATCH, _LARGEST_BATCH = 8, 64  # of batch_size="auto"
_ROOM = 0.7  # share of the free memory below which a batch may double


@dataclass
class Keeper:
    """Decoded samples that stay in memory: of every prompt the best ``keep`` (None: all), the first if wanted, and
    until one is finished the best of those that came furthest: what a search gives whose budget ends early.
    """

    keep: int | None
    first_too: bool = False
    samples: dict[Key, Tensor] = field(default_factory=dict)
    _best: dict[int, list[tuple[float, int]]] = field(default_factory=dict)  # prompt -> (score, id), best first
    _first: dict[int, int] = field(default_factory=dict)
    _early: dict[int, tuple[tuple[int, float], int]] = field(default_factory=dict)  # prompt -> (how far and good), id

    def offer(self, candidate: Candidate, sample: Tensor | None) -> bool:
        """Whether a finished candidate is kept; ``sample=None``: it was logged earlier and is on the disk or gone."""
        prompt, score = candidate.prompt, -math.inf if math.isnan(candidate.score) else candidate.score
        self._forget_early(prompt)
        ranking = self._best.setdefault(prompt, [])
        is_first = self._first.setdefault(prompt, candidate.id) == candidate.id and self.first_too
        wanted = self.keep is None or len(ranking) < self.keep or score > ranking[-1][0]
        if wanted:
            ranking.append((score, candidate.id))
            ranking.sort(key=lambda entry: (-entry[0], entry[1]))
            if self.keep is not None and len(ranking) > self.keep:
                _, dropped = ranking.pop()
                if not (self.first_too and dropped == self._first[prompt]):
                    self.samples.pop((prompt, dropped), None)
        if (wanted or is_first) and sample is not None:
            self.samples[prompt, candidate.id] = sample.detach().cpu().clone()
        return wanted or is_first

    def offer_early(self, candidate: Candidate, sample: Tensor) -> None:
        """An unfinished candidate, or a draft, with what it decodes to so far."""
        prompt, score = candidate.prompt, -math.inf if math.isnan(candidate.score) else candidate.score
        worth, known = (candidate.stop, score), self._early.get(prompt)
        if prompt in self._best or (known is not None and worth <= known[0]):
            return
        self._forget_early(prompt)
        self._early[prompt] = worth, candidate.id
        self.samples[prompt, candidate.id] = sample.detach().cpu().clone()

    def _forget_early(self, prompt: int) -> None:
        if prompt in self._early:
            self.samples.pop((prompt, self._early.pop(prompt)[1]), None)

    def first(self, prompt: int) -> int | None:
        """Id of the first finished candidate."""
        return self._first.get(prompt)


def batches_of(tasks: Sequence[Task], size: int) -> list[list[Task]]:
    """Tasks of one kind together, in order, at most ``size`` a batch; the same whatever of them is known already."""
    kinds: dict[tuple, list[Task]] = {}
    for task in tasks:
        kinds.setdefault(task.kind, []).append(task)
    return [group[i : i + size] for group in kinds.values() for i in range(0, len(group), size)]


class BatchRunner:
    """Everything that touches the device.

    Args:
        samplers: "full" and maybe "draft".
        batch_size: rows, or "auto": 8, doubled on a GPU while there is room. Halved when memory runs out.
    """

    def __init__(
        self,
        samplers: Mapping[str, Sampler],
        scorer: Scorer,
        log: SearchLog,
        keeper: Keeper,
        searches: Sequence[PromptSearch],
        *,
        batch_size: int | str,
        strict: bool,
        previews: bool = True,
    ) -> None:
        self.samplers, self.scorer, self.log, self.keeper, self.searches = samplers, scorer, log, keeper, searches
        self.auto = batch_size == "auto" and not strict
        self.size = 1 if strict else _FIRST_BATCH if batch_size == "auto" else int(batch_size)
        self.previews = previews

    def run(self, tasks: Sequence[Task], *, on_batch: Callable[[list[Candidate]], bool]) -> list[Candidate]:
        """Runs ``tasks``; known ones cost nothing.

        Args:
            on_batch: hears of every batch; False ends the round (time is up).
        """
        found: list[Candidate] = []
        waiting = batches_of(tasks, self.size)
        while waiting:
            batch = waiting.pop(0)
            known = [self.log.known.get(task.key) for task in batch]
            if all(candidate is not None for candidate in known):
                done = [candidate for candidate in known if candidate is not None]
                if batch[0].proposal.via == "full" and batch[0].proposal.stop == self.samplers["full"].num_steps:
                    for candidate in done:
                        self.keeper.offer(candidate, None)
                self.log.add(done, {})
            else:
                try:
                    done = self._batch(batch)
                except torch.OutOfMemoryError:
                    if len(batch) == 1:
                        raise
                    torch.cuda.empty_cache() if torch.cuda.is_available() else None
                    self.size, self.auto = max(1, len(batch) // 2), False
                    waiting = batches_of([task for group in [batch, *waiting] for task in group], self.size)
                    continue
                if self._may_grow(batch):
                    self.size = min(2 * self.size, _LARGEST_BATCH)
                    waiting = batches_of([task for group in waiting for task in group], self.size)
            found += done
            if not on_batch(done):
                break
        return found

    def _may_grow(self, batch: Sequence[Task]) -> bool:
        device = self.samplers["full"].device
        if not self.auto or device.type != "cuda" or len(batch) < self.size:
            return False
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device)
        return torch.cuda.max_memory_allocated(device) < _ROOM * (free + held) and self.size < _LARGEST_BATCH

    def generate(
        self, batch: Sequence[Task], *, decode: bool, watched: float | None = None
    ) -> tuple[Output, Tensor | None, list[Tensor | None]]:
        """Runs a batch of one kind.

        Args:
            watched: level at which the path is looked at.

        Returns:
            output, samples that x0_hat at ``watched`` decodes to, generator states afterwards.
        """
        first = batch[0].proposal
        sampler = self.samplers[first.via]
        starts = [self.searches[task.prompt].start_of(task) for task in batch]
        histories = [same_device(start.history, sampler.device) for start in starts]
        latents, prompts = torch.stack([start.latent for start in starts]), [task.prompt for task in batch]
        options: dict[str, Any] = {
            "seeds": [start.seed for start in starts],
            "states": [start.generator for start in starts],
            "histories": None if histories[0] is None else histories,
        }
        early = None
        if watched is None:
            output = sampler.run(latents, prompts, first.start, first.stop, exact=first.exact, decode=decode, **options)
        else:
            output, early = run_watched(sampler, latents, prompts, first.start, first.stop, level=watched, **options)
        return output, early, sampler.generators_after

    def _batch(self, batch: list[Task]) -> list[Candidate]:
        began = time.perf_counter()
        first = batch[0].proposal
        sampler = self.samplers[first.via]
        ends = first.stop == sampler.num_steps
        looks = self.scorer.looks
        output, early, streams = self.generate(batch, decode=ends or self.scorer.wants_samples, watched=looks.watched)
        before = time.perf_counter()
        clean = output.latents if ends else output.x0_hat
        views = {View("sample"): output.samples, View("latent"): clean, View("x0"): output.x0_hat}
        if early is not None and output.samples is not None:
            assert looks.watched is not None
            views[View("path", (looks.watched,))] = torch.stack([early, output.samples], dim=1)
        for view in looks.denoising if clean is not None else ():
            views[view], calls, forwards = denoising_errors(
                sampler, clean, [task.prompt for task in batch], view.levels
            )
            output.calls += calls
            output.forwards += forwards
        prompts = [sampler.call.prompts[task.prompt] for task in batch]
        raw, errors = self.scorer.score(views, prompts)
        now = time.perf_counter()
        parts = {"generate": output.generate, "decode": output.decode, "verify": now - before}
        candidates = []
        for i, task in enumerate(batch):
            proposal = task.proposal
            candidates.append(
                Candidate(
                    id=task.id,
                    prompt=task.prompt,
                    stage=proposal.stage,
                    round=proposal.round,
                    index=proposal.index,
                    parent=proposal.parent,
                    recipe=proposal.recipe,
                    start=proposal.start,
                    stop=proposal.stop,
                    score=float("nan"),
                    scores=raw[i],
                    nfe=output.calls,
                    forwards=output.forwards // len(batch),
                    seconds=(now - began) / len(batch),
                    batch_size=len(batch),
                    via=proposal.via,
                    error=errors[i],
                )
            )
        self._give_scores(candidates)
        known = {task.key for task in batch if task.key in self.log.known}
        if output.samples is not None:
            self._keep(candidates, output.samples, sampler, known, finished=ends and first.via == "full")
        midway = {} if ends else self._midway(batch, output, streams)
        candidates = [self.log.known.get((c.prompt, c.id), c) for c in candidates]
        self.log.add(candidates, midway)
        for task in batch:
            if task.key not in known:
                ledger = self.searches[task.prompt].ledger
                for name, seconds in parts.items():
                    ledger.parts[name] += seconds / len(batch)
        return candidates

    def _give_scores(self, candidates: Sequence[Candidate]) -> None:
        """Scores for log and progress: ensembles of ranks rank within all candidates of the prompt so far."""
        verifier = self.scorer.verifier
        for prompt in {candidate.prompt for candidate in candidates}:
            new = [candidate for candidate in candidates if candidate.prompt == prompt]
            so_far = self.searches[prompt].candidates
            pool = [c for c in so_far.values() if c.id < new[0].id] if verifier.pooled else []
            everyone = [*pool, *new]
            raw = {
                part.name: torch.tensor([c.scores[part.name] for c in everyone], dtype=torch.float64)
                for part in self.scorer.parts
            }
            for candidate, score in zip(new, verifier.combine(raw).double()[len(pool) :].tolist()):
                candidate.score = score

    def _keep(
        self, candidates: list[Candidate], samples: Tensor, sampler: Sampler, known: set[Key], *, finished: bool
    ) -> None:
        previews = preview(samples, sampler.kind) if self.previews else None
        offered = []
        for i, candidate in enumerate(candidates):
            if previews is not None:
                candidate.preview = previews[i]
            key = candidate.prompt, candidate.id
            if key in known:
                self.log.known[key].preview = candidate.preview
                if finished:
                    self.keeper.offer(self.log.known[key], None)
            elif not finished:
                self.keeper.offer_early(candidate, samples[i])
            elif self.keeper.offer(candidate, samples[i]):
                offered.append(candidate)
        for candidate in offered:  # those that a later one of the batch displaced never reach the disk
            key = candidate.prompt, candidate.id
            if key in self.keeper.samples:
                candidate.kept = True
                candidate.file = self.log.save_sample(key, self.keeper.samples[key], sampler.kind)

    def _midway(self, batch: Sequence[Task], output: Output, streams: Sequence[Tensor | None]) -> dict[Key, Midway]:
        return {
            task.key: self.searches[task.prompt].midway_of(
                i, output.latents, output.x0_hat, streams[i], output.history[i]
            )
            for i, task in enumerate(batch)
        }
