"""The windowed scheduler: any diffusers pipeline runs any part [start, stop) of its schedule, from any latent.

Every pipeline calls ``scheduler.set_timesteps``, loops over ``scheduler.timesteps`` and calls ``step``. So a copy of
the scheduler that shows only a slice of its list, and keeps what passes through ``step``, is all that a search needs;
no pipeline is subclassed or edited, and ``latents=`` and callbacks, which many lack, are not relied on.

The copy is ``deepcopy`` with another class, never ``from_config``: pipelines edit the config in place, and defaulted
keys would be dropped, so that a rebuilt scheduler differs.
"""

import contextlib
import copy
import functools
import inspect
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import repeat
from torch import Tensor

from sparing.diffusion.search import history as solver_history
from sparing.diffusion.search.levels import Levels, predict_x0
from sparing.diffusion.search.seeds import generator

__all__ = ["StopProbe", "StopWindow", "Window", "draws_noise", "plain_scheduler", "refuse_split", "windowed"]

# Solvers whose state cannot be carried over a cut, and some that can, for the message.
_NOT_RESUMABLE = (
    "PNDMScheduler",
    "IPNDMScheduler",
    "LMSDiscreteScheduler",
    "DPMSolverSDEScheduler",
    "SASolverScheduler",
    "ScoreSdeVeScheduler",
    "VQDiffusionScheduler",
    "AmusedScheduler",
)
_USABLE = (
    "DDIM, DDPM, EulerDiscrete, EulerAncestralDiscrete, HeunDiscrete (even cuts), DPMSolverMultistep, UniPCMultistep, "
    "LCM, FlowMatchEulerDiscrete, FlowMatchHeunDiscrete (even cuts)"
)


class StopProbe(Exception):
    """Ends a pipeline's run as soon as the shape of its latent is known."""


class StopWindow(Exception):
    """Ends a pipeline's run after the window's last step: nobody wants the decoded sample."""


@dataclass
class Window:
    """What one run is to do, and what it found.

    Args:
        start, stop: entries [start, stop) of the list are run; ``stop=None`` means to its end.
        latent: ``(batch, ...)`` to start from, put in place by the window (pipelines without ``latents=``); None where
            the pipeline was given it.
        generators: one a row, for stochastic steps.
        history: solver state of the rows where they were stopped (``sparing.diffusion.search.history``).
        levels: gives x0_hat where ``step`` does not.
        show_x0: the pipeline gets x0_hat for its last step's result, and decodes that.
        exact: the last entry is only evaluated: its x0_hat is that of the latent before it, which is the result.
        abort: raise :class:`StopWindow` after the last step.
        probe: raise :class:`StopProbe` at the first use.

    Found: ``full`` (whole list), ``calls`` of step, ``result`` and ``x0_hat`` ``(rows, ...)``, ``state_after`` (solver
    state), ``finished_at`` (seconds of ``perf_counter``), ``seen`` (shape, dtype and device at the first use).
    """

    start: int = 0
    stop: int | None = None
    latent: Tensor | None = None
    generators: list[torch.Generator] | None = None
    history: dict[str, Any] | None = None
    levels: Levels | None = None
    show_x0: bool = False
    exact: bool = False
    abort: bool = False
    probe: bool = False
    full: Tensor | None = None
    calls: int = 0
    result: Tensor | None = None
    x0_hat: Tensor | None = None
    state_after: dict[str, Any] | None = None
    finished_at: float = 0.0
    seen: tuple[torch.Size, torch.dtype, torch.device] | None = None
    scaled: bool = False  # the pipeline asked for init_noise_sigma
    placed: bool = False  # the denoiser or scale_model_input has seen our latent
    copied: bool = False  # the pipeline steps a copy of its scheduler, for another latent
    spare: list[torch.Generator] = field(default_factory=list)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Window":
        """Of pipelines that copy their scheduler for a second latent: the same slice, nothing put in place or kept."""
        self.copied = True
        return Window(start=self.start, stop=self.stop)

    def look(self, sample: Tensor) -> None:
        if self.seen is None:
            self.seen = (sample.shape, sample.dtype, sample.device)
        if self.probe:
            raise StopProbe

    def placed_like(self, sample: Tensor, scale: float) -> Tensor:
        """Our latent in place of ``sample``: same dtype and device, repeated to its rows (guidance doubles them)."""
        assert self.latent is not None
        times, rest = divmod(len(sample), len(self.latent))
        if rest or sample.shape[1:] != self.latent.shape[1:]:
            raise ValueError(
                f"the pipeline steps a latent of shape {tuple(sample.shape)}, the search has {tuple(self.latent.shape)}"
            )
        ours = repeat(self.latent.to(sample.device), "b ... -> (n b) ...", n=times)
        if self.start == 0 and self.scaled:
            ours = ours * scale
        return ours.to(sample.dtype)

    def generators_for(self, rows: int) -> list[torch.Generator]:
        """Ours for the first rows, and spare ones for those that guidance adds (their draws are thrown away)."""
        assert self.generators is not None
        while len(self.generators) + len(self.spare) < rows:
            self.spare.append(generator(len(self.spare)))
        return [*self.generators, *self.spare][:rows]


def refuse_split(scheduler: Any) -> str | None:
    """Why this scheduler cannot be stopped and continued in the middle; None when it can."""
    for kind in type(scheduler).__mro__:
        if kind.__name__ in _NOT_RESUMABLE:
            name = kind.__name__
            return (
                f"{name} cannot be stopped and continued in the middle of its schedule; usable schedulers: {_USABLE}. "
                "Algorithms of whole runs (random, zero_order) work with any"
            )
    return None


@contextlib.contextmanager
def windowed(pipe: Any, window: Window) -> Iterator[Window]:
    """Swaps the pipeline's scheduler for a windowed copy; the original object is back afterwards, whatever happens."""
    original = pipe.scheduler
    whole = window.start == 0 and window.stop is None
    reason = None if whole or window.probe else refuse_split(original)
    if reason is not None:
        raise ValueError(reason)
    scheduler = copy.deepcopy(original)
    base: Any = type(scheduler)
    scheduler.__class__ = _windowed_class(base)
    vars(scheduler)["_window"] = window
    vars(pipe)["scheduler"] = scheduler  # not setattr: that would rewrite the pipeline's config
    try:
        yield window
    finally:
        vars(pipe)["scheduler"] = original


def plain_scheduler(scheduler: Any) -> Any:
    """A copy of a windowed scheduler in its own class, whole list in place: for probing levels and draws."""
    plain = copy.copy(scheduler)
    window = vars(plain).pop("_window")
    plain.__class__ = type(scheduler).__mro__[1]
    plain.timesteps = window.full
    return copy.deepcopy(plain)


def draws_noise(scheduler: Any, shape: tuple[int, ...], **step_kwargs: Any) -> bool:
    """Whether ``step`` adds noise: its results under two generators differ. Costs no NFE; the scheduler is a copy.

    Args:
        scheduler: plain, after ``set_timesteps``; it is used up.
        shape: of one latent with batch axis.
    """
    parameters = inspect.signature(scheduler.step).parameters
    if "generator" not in parameters or len(scheduler.timesteps) < 2:
        return False
    step_kwargs = {name: value for name, value in step_kwargs.items() if name in parameters}
    sample = torch.zeros(shape)
    results = []
    for seed in (0, 1):
        fresh = copy.deepcopy(scheduler)
        timestep = fresh.timesteps[0]
        learned = str(getattr(fresh.config, "variance_type", "")).startswith("learned")
        output = torch.zeros(shape[0], shape[1] * (2 if learned else 1), *shape[2:])
        fresh.scale_model_input(sample, timestep) if hasattr(fresh, "scale_model_input") else None
        out = fresh.step(output, timestep, sample, generator=generator(seed), **step_kwargs)
        results.append(out[0] if isinstance(out, tuple) else out.prev_sample)
    return not torch.equal(*results)


@functools.lru_cache(maxsize=64)
def _windowed_class(base: type) -> type:
    """``base`` with the window in front: real parameters still show through ``inspect.signature``."""
    step_parameters = list(inspect.signature(base.step).parameters)  # type: ignore[attr-defined]
    members: dict[str, Any] = {"__doc__": f"{base.__name__} that runs a part of its schedule."}

    @functools.wraps(base.set_timesteps)  # type: ignore[attr-defined]
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        window: Window = self._window
        out = base.set_timesteps(self, *args, **kwargs)  # type: ignore[attr-defined]
        window.full = self.timesteps
        if window.start > 0 and hasattr(base, "set_begin_index"):
            base.set_begin_index(self, window.start)
        self.timesteps = window.full[window.start : window.stop]
        return out

    members["set_timesteps"] = set_timesteps

    if hasattr(base, "set_begin_index"):

        @functools.wraps(base.set_begin_index)
        def set_begin_index(self: Any, begin_index: int = 0) -> Any:
            return base.set_begin_index(self, self._window.start + begin_index)  # type: ignore[attr-defined]

        members["set_begin_index"] = set_begin_index

    if hasattr(base, "scale_model_input"):

        @functools.wraps(base.scale_model_input)
        def scale_model_input(self: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            window: Window = self._window
            window.look(sample)
            if window.latent is not None and not window.placed:
                sample, window.placed = window.placed_like(sample, _init_noise_sigma(self, base)), True
            return _with_whole_list(self, base.scale_model_input, sample, *args, **kwargs)  # type: ignore[attr-defined]

        members["scale_model_input"] = scale_model_input

    @functools.wraps(base.step)  # type: ignore[attr-defined]
    def step(self: Any, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        bound = dict(zip(step_parameters[4:], args), **kwargs)
        return _step(self, base, step_parameters, model_output, timestep, sample, bound)

    members["step"] = step

    def get_sigma(self: Any) -> Any:
        window = vars(self).get("_window")
        if window is None:
            return _init_noise_sigma(self, base)
        window.scaled = True
        return 1.0 if window.start > 0 else _init_noise_sigma(self, base)

    def set_sigma(self: Any, value: Any) -> None:
        vars(self)["init_noise_sigma"] = value

    members["init_noise_sigma"] = property(get_sigma, set_sigma)
    return type("Windowed" + base.__name__, (base,), members)


def _init_noise_sigma(scheduler: Any, base: type) -> Any:
    own = getattr(base, "init_noise_sigma", None)
    if isinstance(own, property):
        return own.__get__(scheduler)
    return vars(scheduler).get("init_noise_sigma", 1.0)


def _with_whole_list(scheduler: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls ``method`` with the whole list in place: solvers read its length and look timesteps up in it."""
    window = scheduler._window
    shown, scheduler.timesteps = scheduler.timesteps, window.full
    try:
        return method(scheduler, *args, **kwargs)
    finally:
        scheduler.timesteps = shown


def _step(
    scheduler: Any, base: Any, names: list[str], model_output: Any, timestep: Any, sample: Any, rest: dict[str, Any]
) -> Any:
    window: Window = scheduler._window
    window.look(sample)
    if window.calls == 0:
        if window.latent is not None:
            sample = window.placed_like(sample, _init_noise_sigma(scheduler, base))
            window.placed = True
        if window.history is not None:
            solver_history.restore(scheduler, window.history, rows=len(sample))
    if "generator" in names and window.generators is not None:
        rest["generator"] = window.generators_for(len(sample))
    as_output = rest.pop("return_dict", True)
    out = _with_whole_list(scheduler, base.step, model_output, timestep, sample, **rest)
    assert window.full is not None, "step before set_timesteps"
    index = window.start + window.calls
    window.calls += 1
    result = out[0] if isinstance(out, tuple) else out.prev_sample
    if index == (len(window.full) if window.stop is None else window.stop) - 1:
        _last_step(scheduler, window, index, model_output, sample, out, result)
        if window.show_x0 and window.x0_hat is not None:
            shown = window.x0_hat.to(result.dtype)
            out = (shown, *out[1:]) if isinstance(out, tuple) else type(out)(**{**out, "prev_sample": shown})
        if window.abort:
            raise StopWindow
    if as_output or isinstance(out, tuple):
        return out
    return out.to_tuple()


def _last_step(
    scheduler: Any, window: Window, index: int, model_output: Any, sample: Tensor, out: Any, result: Tensor
) -> None:
    """Keeps what the search wants of the window's last step."""
    window.result = sample if window.exact else result
    window.x0_hat = getattr(out, "pred_original_sample", None)
    if window.x0_hat is None:
        window.x0_hat = getattr(out, "denoised", None)
    if window.x0_hat is None and window.levels is not None:
        if getattr(scheduler.config, "algorithm_type", "").endswith("++") and getattr(scheduler, "model_outputs", None):
            window.x0_hat = scheduler.model_outputs[-1]  # these solvers turn the network's output into x_0 themselves
        else:
            flow = window.levels.family == "flow"
            prediction = "velocity" if flow else getattr(scheduler.config, "prediction_type", "epsilon")
            window.x0_hat = predict_x0(
                model_output.float(),
                sample.float(),
                window.levels.pairs[index],
                prediction=prediction,
                family=window.levels.family,
            )
    assert window.full is not None
    if window.stop is not None and window.stop < len(window.full) and not window.exact:
        window.state_after = solver_history.read(scheduler)
    if sample.is_cuda:
        torch.cuda.synchronize(sample.device)  # a border of the ledger: what follows is decoding
    window.finished_at = time.perf_counter()
