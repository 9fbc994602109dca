"""The adapter between a search and any diffusers pipeline: rows of latents in, latents, x0_hat and samples out."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparing.diffusion.search import history as solver_history
from sparing.diffusion.search.call import Call
from sparing.diffusion.search.encoding import encoding_once
from sparing.diffusion.search.levels import Levels, probe
from sparing.diffusion.search.samples import Kind, read_output, sample_rate_of
from sparing.diffusion.search.seeds import generator
from sparing.diffusion.search.window import (
    StopProbe,
    StopWindow,
    Window,
    draws_noise,
    plain_scheduler,
    refuse_split,
    windowed,
)

__all__ = ["Output", "Sampler"]

# Parts of a pipeline that are not its denoiser, by the beginning of their names.
_OTHER_PARTS = (
    "vae",
    "vqvae",
    "vqmodel",
    "text_encoder",
    "image_encoder",
    "vocoder",
    "safety_checker",
    "language_model",
)
_OUTPUT_TYPES = ("pt", "np", "pil")


@dataclass
class Output:
    """Of one batch.

    Args:
        latents: ``(batch, ...)`` at ``stop``.
        x0_hat: ``(batch, ...)`` of the last executed step, None where the scheduler's levels are unknown.
        samples: decoded, None where nobody wanted them.
        history: solver state a row, for going on.
        forwards: rows through the denoiser, all candidates together.
        generate, decode: seconds.
    """

    latents: Tensor
    x0_hat: Tensor | None
    samples: Tensor | None
    history: list[dict[str, Any] | None]
    calls: int
    forwards: int
    generate: float
    decode: float


class Sampler:
    """A pipeline with the keyword arguments of one search. Use it inside ``with sampler.open():``.

    Attributes found by a probe (one row, stopped before or after its first evaluation, not counted in the NFE):
        shape: of one latent without batch axis; dtype, device: of the pipeline's latents.
        num_steps: entries of the scheduler's list.
        levels: of the scheduler, None where they cannot be found.
        start_scale: what the pipeline multiplies unit noise by.
        stochastic: steps add noise. order: of the solver. resumable: it can be stopped in the middle.

    Raises:
        TypeError, ValueError: a pipeline without scheduler; see :class:`Call`.
    """

    def __init__(
        self, pipe: Any, call: Call, *, around: Callable[[], AbstractContextManager[Any]] | None = None
    ) -> None:
        if not hasattr(getattr(pipe, "scheduler", None), "step"):
            raise TypeError(f"{type(pipe).__name__} has no scheduler with a step to search along")
        self.pipe, self.call, self.around = pipe, call, around or contextlib.nullcontext
        self.takes_latents = "latents" in call.parameters
        self.kind: Kind = "image"
        self.sample_rate = sample_rate_of(pipe)
        self._output_type = 0
        self.shape: tuple[int, ...] = ()

    @contextlib.contextmanager
    def open(self) -> Iterator["Sampler"]:
        """Progress bars silenced, prompts encoded once, the shape probed; all as before at the end."""
        pipe = self.pipe
        had_bar = "_progress_bar_config" in vars(pipe)
        bar = vars(pipe).get("_progress_bar_config")
        vars(pipe)["_progress_bar_config"] = {**(bar or {}), "disable": True}
        try:
            with encoding_once(pipe):
                self._probe()
                yield self
        finally:
            if had_bar:
                vars(pipe)["_progress_bar_config"] = bar
            else:
                vars(pipe).pop("_progress_bar_config", None)

    def _probe(self) -> None:
        window = Window(probe=True)
        with windowed(self.pipe, window), contextlib.suppress(StopProbe), torch.no_grad():
            scheduler = self.pipe.scheduler
            self.pipe(**self._arguments([0], None, [0]))
        _restore_offload(self.pipe)
        if window.seen is None or window.full is None:
            raise TypeError(
                f"{type(self.pipe).__name__} never called set_timesteps and step of its {type(scheduler).__name__}; "
                "it does not loop over a scheduler"
            )
        shape, self.dtype, self.device = window.seen
        self.shape = tuple(shape[1:])
        self.num_steps = len(window.full)
        plain = plain_scheduler(scheduler)
        self.scheduler_name = type(plain).__name__
        self.scheduler_config = dict(plain.config)
        self.resumable = refuse_split(plain) is None and not window.copied
        self.order = int(getattr(plain, "order", 1))
        self.start_scale = float(plain.init_noise_sigma) if window.scaled else 1.0
        eta = {name: self.call.kwargs[name] for name in ("eta", "s_churn") if name in self.call.kwargs}
        self.stochastic = draws_noise(plain, (1, *self.shape), **eta)
        try:
            self.levels: Levels | None = probe(plain)
        except ValueError:
            self.levels = None

    def run(
        self,
        latents: Tensor,
        prompts: Sequence[int],
        start: int,
        stop: int,
        *,
        seeds: Sequence[int],
        states: Sequence[Tensor | None] | None = None,
        histories: Sequence[dict[str, Any] | None] | None = None,
        exact: bool = False,
        decode: bool = True,
    ) -> Output:
        """Runs entries [start, stop) for a batch.

        Args:
            latents: ``(batch, *shape)``: unit noise at start 0, else the state where the rows stopped.
            prompts: index of the prompt of each row.
            seeds: of the random numbers along each row's path.
            states: generator states to go on with, in place of ``seeds``, where not None.
            histories: solver states of the rows.
            exact: evaluate the entry at ``stop`` too, for x0_hat there; the latents stay those at ``stop``.
            decode: give samples: of the end, or of x0_hat before it.
        """
        end = stop + 1 if exact else stop
        if end > self.num_steps:
            raise ValueError(f"entries [{start}, {end}) are beyond the schedule's {self.num_steps}")
        generators = [generator(seed) for seed in seeds]
        for stream, state in zip(generators, states or ()):
            if state is not None:
                stream.set_state(state)
        # unit noise is cast as the pipeline would; a state keeps the precision that the scheduler left it in
        latents = latents.to(device=self.device, dtype=self.dtype if start == 0 else latents.dtype)
        window = Window(
            start=start,
            stop=None if (start, end) == (0, self.num_steps) else end,
            latent=None if self.takes_latents else latents,
            generators=generators,
            history=solver_history.gather(histories) if histories else None,
            levels=self.levels,
            show_x0=stop < self.num_steps,
            exact=exact,
            abort=not decode,
        )
        began = time.perf_counter()
        output = None
        with (
            windowed(self.pipe, window),
            _counted(self.pipe, window) as rows,
            self.around(),
            torch.no_grad(),
            contextlib.suppress(StopWindow),
        ):
            output = self._call_pipeline(latents if self.takes_latents else None, prompts, seeds, window)
        if output is None:
            _restore_offload(self.pipe)
        if window.result is None:
            raise RuntimeError(
                f"{type(self.pipe).__name__} called step {window.calls} times, not the {end - start} of entries "
                f"[{start}, {end}); it may be {self.scheduler_name}'s list is not what it loops over"
            )
        samples = None
        if output is not None:
            samples, self.kind = read_output(output)
            if len(samples) != len(prompts):
                raise ValueError(f"{type(self.pipe).__name__} returned {len(samples)} samples for {len(prompts)} rows")
            if samples.is_cuda:
                torch.cuda.synchronize(samples.device)
        count = len(prompts)
        self.generators_after = [stream.get_state() for stream in generators] if self.stochastic else [None] * count
        return Output(
            latents=window.result[:count],
            x0_hat=None if window.x0_hat is None else window.x0_hat[:count],
            samples=samples,
            history=[solver_history.row(window.state_after, i) for i in range(count)],
            calls=window.calls,
            forwards=rows[0],
            generate=window.finished_at - began,
            decode=time.perf_counter() - window.finished_at,
        )

    def _call_pipeline(
        self, latents: Tensor | None, prompts: Sequence[int], seeds: Sequence[int], window: Window
    ) -> Any:
        while True:
            try:
                return self.pipe(**self._arguments(prompts, latents, seeds))
            except ValueError as error:
                # refused before anything ran: the next kind of output
                if window.calls or "output_type" not in str(error) or self._output_type + 1 == len(_OUTPUT_TYPES):
                    raise
                self._output_type += 1

    def _arguments(self, prompts: Sequence[int], latents: Tensor | None, seeds: Sequence[int]) -> dict[str, Any]:
        arguments = self.call.rows(prompts)
        accepted = self.call.parameters
        if latents is not None:
            arguments["latents"] = latents
        if "generator" in accepted:  # whatever else the pipeline draws is the candidate's own too
            streams = [generator(seed ^ 1) for seed in seeds]
            arguments["generator"] = streams
        if "output_type" in accepted:
            arguments["output_type"] = _OUTPUT_TYPES[self._output_type]
        return arguments


@contextlib.contextmanager
def _counted(pipe: Any, window: Window) -> Iterator[list[int]]:
    """Counts rows through the denoisers, and puts our latent into the first evaluation where ``scale_model_input`` did
    not (pipelines without ``latents=``)."""
    rows = [0]

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim > 1]
        rows[0] += len(tensors[0]) if tensors else 1
        if window.latent is None or window.placed:
            return None
        window.placed = True
        shape = window.latent.shape[1:]

        def ours(value: Any) -> Any:
            fits = isinstance(value, Tensor) and value.ndim > 1 and value.shape[1:] == shape
            return window.placed_like(value, 1.0) if fits else value

        return tuple(ours(value) for value in args), {name: ours(value) for name, value in kwargs.items()}

    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in _denoisers(pipe)]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def _denoisers(pipe: Any) -> list[nn.Module]:
    parts = getattr(pipe, "components", {})
    modules = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    named = [
        part
        for name, part in modules.items()
        if name.startswith(("transformer", "unet", "prior", "decoder", "denoiser"))
    ]
    return named or [part for name, part in modules.items() if not name.startswith(_OTHER_PARTS)]


def _restore_offload(pipe: Any) -> None:
    """What a pipeline does at its end when it offloads models; it did not get there."""
    if hasattr(pipe, "maybe_free_model_hooks"):
        pipe.maybe_free_model_hooks()
