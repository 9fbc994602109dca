"""Noise search: spend compute on choosing the noise, on any diffusers pipeline, with any scoring function.

    search = NoiseSearch(pipe, verifier, Random(n=16), out_dir="runs/cube")
    result = search("a red cube on grass", num_inference_steps=30, guidance_scale=3.5)
    result.best.sample, result.best.score, result.nfe, result.plot("curve.svg"), result.sheet("sheet.png")

After Ma et al., "Inference-Time Scaling for Diffusion Models beyond Scaling Denoising Steps" (2025). The driver alone
batches, samples, verifies and logs; it knows no algorithm and no model.
"""

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sparing import __version__
from sparing.diffusion.search.batches import BatchRunner, Keeper
from sparing.diffusion.search.call import Call
from sparing.diffusion.search.identity import describe, models_of, settings_of
from sparing.diffusion.search.ledger import Budget
from sparing.diffusion.search.log import SearchLog
from sparing.diffusion.search.plan import PromptSearch, Task
from sparing.diffusion.search.processes import gather, rank_and_world
from sparing.diffusion.search.protocol import Algorithm, SearchState
from sparing.diffusion.search.reporting import held_out, warn_of_hacking
from sparing.diffusion.search.result import Candidate, SearchResult
from sparing.diffusion.search.sampler import Sampler
from sparing.diffusion.search.scoring import Scorer
from sparing.diffusion.search.verifiers.base import as_verifier

__all__ = ["Draft", "NoiseSearch"]

_FORMAT = 2


@dataclass(frozen=True)
class Draft:
    """A cheap sampler that ranks noises before the pipeline itself runs them.

    Args:
        kwargs: replace the call's own, e.g. ``{"num_inference_steps": 8}``.
        pipe: another pipeline over the same latents (one with a twin, say); None: the search's own.
        around: makes a context manager that is entered while drafts are run, e.g. one that switches a cache on.
    """

    kwargs: Mapping[str, Any] = field(default_factory=dict)
    pipe: Any = None
    around: Callable[[], AbstractContextManager[Any]] | None = None


class NoiseSearch:
    """Searches for the noise whose sample a verifier scores highest.

    Args:
        pipe: any diffusers pipeline that loops over a scheduler; it is used as it is and left as it was.
        verifier: ``f(samples, prompts) -> B scores``, a verifier of ``sparing.diffusion.search.verifiers``, or a list
            of them (an ensemble of ranks).
        algorithm: of ``sparing.diffusion.search.algorithms``, or any object with ``name``, ``config()`` and
            ``run(state)``.
        seed: with the prompt, decides every noise.
        batch_size: rows a batch, or "auto": 8, doubled on a GPU while memory allows, halved where it does not.
        out_dir: folder of the log; a killed search goes on from it to the same result. None: nothing is written.
        budget: :class:`Budget`, or words: "400nfe", "90s", "12candidates".
        report: verifiers that take no part in the search, asked about its first candidate and its winner only.
        strict: rows are run one by one: results do not depend on batching, to the bit.
        keep: decoded samples that are kept: "best", "all" or how many of the best; the others are dropped.
        draft: a cheap sampler for algorithms that propose drafts.
        force: go on with a log although the search was changed.
        progress: a bar over NFE (never shown when standard error is no terminal).
        previews: small copies of all samples for the contact sheet.

    Raises:
        TypeError, ValueError: arguments of the wrong kind.
    """

    def __init__(
        self,
        pipe: Any,
        verifier: Any,
        algorithm: Algorithm,
        *,
        seed: int = 0,
        batch_size: int | Literal["auto"] = "auto",
        out_dir: str | Path | None = None,
        budget: Budget | str | None = None,
        report: Sequence[Any] | Any | None = None,
        strict: bool = False,
        keep: int | Literal["best", "all"] = "best",
        draft: Draft | None = None,
        force: bool = False,
        progress: bool = True,
        previews: bool = True,
    ) -> None:
        if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
            raise ValueError(f'batch_size must be "auto" or at least 1, got {batch_size!r}')
        if keep not in ("best", "all") and (not isinstance(keep, int) or keep < 1):
            raise ValueError(f'keep must be "best", "all" or at least 1, got {keep!r}')
        if isinstance(algorithm, type) or not (hasattr(algorithm, "run") and hasattr(algorithm, "config")):
            raise TypeError(f"an algorithm has name, config() and run(state); got {algorithm!r}")
        self.pipe, self.verifier, self.algorithm = pipe, as_verifier(verifier), algorithm
        self.seed, self.batch_size, self.strict, self.force = int(seed), batch_size, strict, force
        self.out_dir = None if out_dir is None else Path(out_dir)
        self.budget = Budget.parse(budget) if isinstance(budget, str) else budget or Budget()
        held = [] if report is None else list(report) if isinstance(report, list | tuple) else [report]
        self.report = [as_verifier(verifier) for verifier in held]
        for verifier in self.report:
            if verifier.spaces != {"sample"}:
                raise ValueError(
                    f"report: {verifier.name!r} looks at {', '.join(sorted(verifier.spaces))}; held-out verifiers see "
                    "finished samples only"
                )
        self.keep = keep if isinstance(keep, int) else {"best": 1, "all": None}[keep]
        self.draft, self.progress, self.previews = draft, progress, previews

    def __call__(self, prompt: Any = None, **kwargs: Any) -> Any:
        """Runs, or goes on with, the search.

        Args:
            prompt: the pipeline's first argument (a prompt, or class labels), one or a list: independent searches that
                share batches.
            kwargs: the pipeline's own, unchanged. ``latents`` are noises to begin with, one a row; the algorithm draws
                the others.

        Returns:
            :class:`SearchResult`, for a list of prompts a list of them.

        Raises:
            TypeError, ValueError: arguments that the pipeline does not take, a scheduler that cannot do what the
                algorithm asks, a budget below one candidate, a log of another search, verifiers that give no scores.
            OSError: the disk is full; the log is intact.
        """
        if prompt is not None:
            first = next(iter(Call(self.pipe, {}).parameters))
            if first in kwargs:
                raise TypeError(f"{first} is given twice")
            kwargs = {first: prompt, **kwargs}
        call = Call(self.pipe, kwargs)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_rng_kept(self.pipe))
            samplers = {"full": stack.enter_context(Sampler(self.pipe, call).open())}
            if self.draft is not None:
                samplers["draft"] = stack.enter_context(self._draft_sampler(kwargs, samplers["full"]))
            results = _Run(self, call, samplers).finish()
        if self.report:
            warn_of_hacking(results)
        return results if call.is_list else results[0]

    @contextlib.contextmanager
    def _draft_sampler(self, kwargs: Mapping[str, Any], full: Sampler) -> Any:
        assert self.draft is not None
        pipe = self.pipe if self.draft.pipe is None else self.draft.pipe
        sampler = Sampler(pipe, Call(pipe, {**kwargs, **self.draft.kwargs}), around=self.draft.around)
        with sampler.open():
            if sampler.shape != full.shape:
                raise ValueError(
                    f"the draft's latents have shape {sampler.shape}, those of the pipeline {full.shape}: the winners "
                    "could not be rerun with the same noise"
                )
            yield sampler

    def header(self, call: Call, samplers: Mapping[str, Sampler]) -> dict[str, Any]:
        """What makes this search this search; the first line of its log."""
        full = samplers["full"]
        # private entries are diffusers' bookkeeping, one of them a list in the random order of a set
        settings = {name: value for name, value in full.scheduler_config.items() if not name.startswith("_")}
        config = hashlib.blake2b(repr(sorted(settings.items())).encode(), digest_size=8)
        return {
            "format": _FORMAT,
            "version": __version__,
            "pipeline": type(self.pipe).__name__,
            "models": models_of(self.pipe),
            "scheduler": full.scheduler_name,
            "scheduler_config": config.hexdigest(),
            "call": call.described(),
            "call_hash": call.fingerprint(),
            "prompts": call.keys,
            "draft": self._described_draft(samplers.get("draft")),
            "verifiers": {
                part.name: {**settings_of(part.leaf), "levels": list(part.view.levels)} for part in self.verifier.parts
            },
            "verifier": self.verifier.name,
            "combined": None if len(self.verifier.parts) == 1 else describe(self.verifier),
            "algorithm": self.algorithm.config(),
            "seed": self.seed,
            "budget": {name: getattr(self.budget, name) for name in ("nfe", "candidates")},
            "device": full.device.type,
            "dtype": str(full.dtype).removeprefix("torch."),
            "latent_shape": list(full.shape),
            "num_steps": full.num_steps,
            "batch_size": 1 if self.strict else self.batch_size,
        }

    def _described_draft(self, draft: Sampler | None) -> dict[str, Any] | None:
        if draft is None or self.draft is None:
            return None
        return {
            "pipeline": type(draft.pipe).__name__,
            "models": models_of(draft.pipe),
            "call": draft.call.described(),
            # what the context manager was made with: a cache's threshold, say
            "around": [describe(cell.cell_contents) for cell in getattr(self.draft.around, "__closure__", None) or ()],
        }


class _Run:
    """One call of a search."""

    def __init__(self, search: NoiseSearch, call: Call, samplers: dict[str, Sampler]) -> None:
        self.search, self.call, self.samplers = search, call, samplers
        self.full = samplers["full"]
        self.rank, self.world = rank_and_world()
        self.scorer = Scorer(search.verifier, sample_rate=self.full.sample_rate)
        self.log = self._open_log()
        draws = getattr(search.algorithm, "select", "argmax") == "sample"  # its winner need not be the best
        self.keeper = Keeper(None if draws else search.keep, first_too=bool(search.report))
        try:
            self.searches = self._begin()
        except BaseException:
            self.log.close()
            raise
        self.runner = BatchRunner(
            samplers,
            self.scorer,
            self.log,
            self.keeper,
            self.searches,
            batch_size=search.batch_size,
            strict=search.strict,
            previews=search.previews,
        )

    def _open_log(self) -> SearchLog:
        """One error for all processes: a rank that went on alone would wait for the others for ever."""
        error: Exception | None = None
        log: SearchLog | None = None
        header = self.search.header(self.call, self.samplers)
        try:
            log = SearchLog(self.search.out_dir, header, rank=self.rank, world=self.world, force=self.search.force)
        except (ValueError, OSError) as raised:
            error = raised
        failed = [entry for entry in gather(error) if entry is not None]
        if failed or log is None:
            if log is not None:
                log.close()
            raise failed[0]
        for known in gather(log.known) if self.world > 1 else []:
            log.known = {**known, **log.known}
        return log

    def _begin(self) -> list[PromptSearch]:
        full, search, verifier = self.full, self.search, self.search.verifier
        draft = self.samplers.get("draft")
        given = _given_noises(self.call.given, full.shape)
        found = []
        for index, key in enumerate(self.call.keys):
            state = SearchState(
                num_steps=full.num_steps,
                run_seed=search.seed,
                prompt=key,
                levels=None if full.levels is None else full.levels.pairs,
                order=full.order,
                stochastic=full.stochastic,
                resumable=full.resumable,
                scheduler=full.scheduler_name,
                combine=verifier.combine,
                pooled=verifier.pooled,
                given=tuple(given),
                draft_steps=None if draft is None else draft.num_steps,
                family=None if full.levels is None else full.levels.family,
            )
            found.append(
                PromptSearch(
                    search.algorithm,
                    state,
                    prompt=index,
                    shape=full.shape,
                    levels=full.levels,
                    log=self.log,
                    given=given,
                    start_scale=full.start_scale,
                    scoring=self.scorer.looks.nfe,
                )
            )
        return found

    def finish(self) -> list[SearchResult]:
        try:
            with tqdm(
                desc="noise search", unit="NFE", leave=False, disable=None if self._shows_progress else True, total=0
            ) as bar:
                while tasks := self._next_round():
                    bar.total = (bar.total or 0) + sum(task.cost for task in tasks)
                    self._round(tasks, bar)
            return [self._result(one) for one in self.searches]
        finally:
            self.log.close()

    @property
    def _shows_progress(self) -> bool:
        return self.search.progress and self.rank == 0

    # -- rounds

    def _next_round(self) -> list[Task]:
        """The next tasks of all prompts, as many as the budget allows."""
        tasks: list[Task] = []
        for one in self.searches:
            if one.done:
                continue
            proposed = one.next_round()
            while not one.done and not proposed:  # an algorithm may yield an empty round
                proposed = one.next_round()
            costs = [task.cost for task in proposed]
            ledger = one.ledger
            count = self.search.budget.affordable(costs, spent=ledger.nfe, candidates=ledger.candidates)
            if count < len(proposed):
                one.close()
            tasks += proposed[:count]
        return tasks

    def _round(self, tasks: list[Task], bar: Any) -> None:
        self._hand_over(tasks)
        for task in tasks:
            logged = self.log.known.get(task.key)
            if logged is not None and not self.searches[task.prompt].agrees(task, logged):
                raise ValueError(
                    f"the log says of candidate {task.id} (prompt {task.prompt}) what this search does not propose; it "
                    "is of another version or was edited. Begin anew in another folder"
                )
        if self._time_is_up():
            self._end_all()
            return
        mine = tasks[self.rank :: self.world]
        done: list[Candidate] = []

        def on_batch(batch: list[Candidate]) -> bool:
            done.extend(batch)
            for candidate in batch:
                if self.world == 1:
                    self.searches[candidate.prompt].take(candidate)
                bar.update(candidate.nfe)
            self._show_best(bar)
            return self.world > 1 or not self._time_is_up()

        self.runner.run(mine, on_batch=on_batch)
        if self.world > 1:
            everyone = {(c.prompt, c.id): c for share in gather(done) for c in share}
            ordered = [everyone[task.key] for task in tasks]
            self.log.merge(ordered)
            for candidate in ordered:
                self.searches[candidate.prompt].take(candidate)
        elif len(done) < len(tasks):
            self._end_all()

    def _hand_over(self, tasks: Sequence[Task]) -> None:
        """Latents that this round begins from, to the processes that do not have them."""
        if self.world == 1:
            return
        keys = [
            (one.prompt, id) for one in self.searches for id in one.needed([t for t in tasks if t.prompt == one.prompt])
        ]
        mine = {key: self.log.midway(key) for key in keys if self.log.has_midway(key)}
        for theirs in gather(mine):
            self.log.hand_over({key: state for key, state in theirs.items() if not self.log.has_midway(key)})

    def _time_is_up(self) -> bool:
        spent = sum(one.ledger.seconds for one in self.searches)
        up = not self.search.budget.seconds_left(spent)
        return gather(up)[0] if self.world > 1 else up

    def _end_all(self) -> None:
        for one in self.searches:
            one.close()

    def _show_best(self, bar: Any) -> None:
        if bar.disable:
            return
        finished = [candidate for one in self.searches for candidate in one.finished]
        if finished:
            best = max(finished, key=lambda candidate: (candidate.score, -candidate.id))
            bar.set_postfix_str(f"best {best.score:.4g} (#{best.id})")

    # -- the end

    def _result(self, one: PromptSearch) -> SearchResult:
        if not one.candidates:
            raise ValueError("the budget was spent before any candidate was run")
        best = self._best(one)
        sample = self._sample(one, best.id)
        first = self.keeper.first(one.prompt)
        report: dict[str, dict[str, float]] = {}
        if self.search.report and one.finished:
            first = one.finished[0].id if first is None or self.world > 1 else first
            pair = [self._sample(one, first), sample]
            prompts = [self.call.prompts[one.prompt]] * 2
            report = held_out(self.search.report, pair, prompts, sample_rate=self.full.sample_rate)
        best.sample, best.noise = sample, one.noise(best.id)
        for candidate in one.candidates.values():
            kept = self.keeper.samples.get((one.prompt, candidate.id))
            candidate.sample = candidate.sample if kept is None else kept
        if self.world > 1 and self.search.previews:
            self._share_previews(one)
        ledger = one.ledger
        return SearchResult(
            candidates=[one.candidates[id] for id in sorted(one.candidates)],
            best=best,
            prompt=self.call.prompts[one.prompt],
            num_steps=self.full.num_steps,
            nfe=ledger.nfe,
            rerun_nfe=ledger.rerun,
            forwards=ledger.forwards,
            seconds=ledger.seconds,
            seconds_by_part=ledger.parts,
            verifier=self.search.verifier.name,
            algorithm=self.search.algorithm.name,
            kind=self.full.kind,
            sample_rate=self.full.sample_rate,
            report=report,
            rank=one.state.score,
        )

    def _best(self, one: PromptSearch) -> Candidate:
        """The algorithm's winner; else the best finished candidate, all of them being one pool."""
        pool = one.finished
        if one.winner is not None:
            winner = one.candidates[one.winner]
        else:
            if not pool:
                last = max(candidate.stop for candidate in one.candidates.values())
                pool = [candidate for _, candidate in sorted(one.candidates.items()) if candidate.stop == last]
                warnings.warn(
                    f"the budget was spent before any candidate was finished; the best estimate after {last} of "
                    f"{self.full.num_steps} entries is returned",
                    stacklevel=2,
                )
            winner = pool[int(one.state.score([candidate.outcome for candidate in pool]).argmax())]
        if one.state.pooled and one.finished:
            scores = one.state.score([candidate.outcome for candidate in one.finished]).tolist()
            for candidate, score in zip(one.finished, scores):
                candidate.score = score
        return winner

    def _sample(self, one: PromptSearch, id: int) -> Tensor:
        """A candidate's decoded sample: from memory, from its file, or run once more (counted apart)."""
        key = one.prompt, id
        found = self.keeper.samples.get(key)
        if self.world > 1:
            found = next((sample for sample in gather(found) if sample is not None), None)
        if found is None:
            found = self.log.load_sample(key)
        if found is None:
            task = Task(one.prompt, id, one.proposal(id))
            output, _, _ = self.runner.generate([task], decode=True)
            assert output.samples is not None
            one.ledger.rerun += output.calls
            found = output.samples[0].detach().cpu()
        return found

    def _share_previews(self, one: PromptSearch) -> None:
        own = {id: c.preview for id, c in one.candidates.items() if c.preview is not None}
        for share in gather(own):
            for id, preview in share.items():
                one.candidates[id].preview = preview


@contextlib.contextmanager
def _rng_kept(pipe: Any) -> Any:
    """Global generators are as before afterwards, whatever the pipeline or a verifier drew from them."""
    device = getattr(pipe, "device", torch.device("cpu"))
    devices = [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


def _given_noises(latents: Any, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Noises that the caller handed in, by the hash of their bytes.

    Raises:
        ValueError: of another shape than the pipeline's latents.
    """
    if latents is None:
        return {}
    if not isinstance(latents, Tensor) or tuple(latents.shape[1:]) != shape:
        got = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise ValueError(f"latents must be a tensor of noises (n, {', '.join(map(str, shape))}), got {got}")
    rows = latents.detach().cpu().float().contiguous()
    return {hashlib.blake2b(row.numpy().tobytes(), digest_size=8).hexdigest(): row for row in rows}
