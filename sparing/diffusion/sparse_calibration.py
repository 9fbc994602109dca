"""Calibration of block-sparse attention: how much may each layer drop before its output differs by more than a bound?

The pipeline runs dense, so that every layer sees the activations it is used to. At each self-attention of each step,
candidate thresholds are tried from the sparsest on and the relative L2 error of the attention output, of the worst
sample, is noted. A candidate that once exceeds the bound is out for that layer. What remains at the end is, per
layer, the sparsest candidate that held at every step of every prompt. :func:`measure_sparse` then says what it is
worth on prompts that calibration did not see.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparing.diffusion.sparse_attention import (
    BlockThreshold,
    SparseThresholds,
    apply_sparse,
    attached,
    attention_sites,
    sparse_attention,
)

__all__ = ["CANDIDATES", "calibrate_sparse", "measure_sparse"]

# From the sparsest to the densest: shares of predicted attention to keep, each with block means trusted always, or
# only where the rows of a block are alike (0.6 is SpargeAttn's own default).
CANDIDATES = tuple(
    BlockThreshold(sim_threshold=similarity, cdf=share)
    for share in (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
    for similarity in (-1.0, 0.3, 0.6)
)


def calibrate_sparse(
    pipe: Any,
    prompts: Sequence[Any],
    *,
    max_error: float,
    held_out: Sequence[Any] = (),
    seeds: Iterable[int] = (0,),
    candidates: Sequence[BlockThreshold] = CANDIDATES,
    block_q: int = 128,
    block_k: int = 64,
    dense_first: int = 1,
    dense_last: int = 1,
    dense_steps: float = 0.25,
    safety: float = 0.8,
    **call: Any,
) -> SparseThresholds:
    """Find per-layer thresholds whose attention output errs by at most ``max_error``, and report what they give.

    Args:
        pipe: a diffusers pipeline.
        prompts: each a prompt (str), a class label (int), or a dict of the pipeline's arguments.
        max_error: bound on the relative L2 error of a layer's attention output, worst sample, e.g. 0.05.
        held_out: prompts to measure on afterwards, with seeds that calibration did not use; default: ``prompts``
            themselves.
        seeds: one run per prompt and seed.
        candidates: thresholds to try.
        block_q: query rows of a block.
        block_k: key rows of a block.
        dense_first: repeated blocks from the first that stay dense.
        dense_last: repeated blocks from the last that stay dense.
        dense_steps: share of the steps, from the first, that stay dense.
        safety: a candidate is accepted at this share of the bound, because prompts to come are not these.
        **call: further arguments of the pipeline, e.g. ``num_inference_steps=20, height=512``.

    Returns:
        Thresholds with ``report``: ``layers`` (per layer: why dense, or threshold, mean density, worst error, errors
        by step), ``calibration_seconds`` and ``held_out`` (what :func:`measure_sparse` gives).

    Raises:
        ValueError: no prompts, no positive bound, or a pipeline without attention modules.
    """
    seeds = list(seeds)
    if not prompts or not seeds:
        raise ValueError("calibration needs at least one prompt and one seed")
    if not max_error > 0:
        raise ValueError(f"max_error is {max_error}; expected a positive bound on the relative error")
    sites = attention_sites(pipe, dense_first=dense_first, dense_last=dense_last)
    trials = {site.name: _Trials(candidates) for site in sites if site.dense is None}
    bound = safety * max_error

    def act(
        name: str, step: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, dense: Callable[[], Tensor]
    ) -> Tensor:
        out = dense()
        if name in trials and step >= progress.dense_until(dense_steps):
            trials[name].measure(step, q, k, v, scale, out, bound=bound, block_q=block_q, block_k=block_k)
        return out

    began = time.perf_counter()
    with torch.no_grad(), attached(pipe, act) as progress:
        for prompt in prompts:
            for seed in seeds:
                _generate(pipe, prompt, seed, call)
    layers = {site.name: trials[site.name].best() if site.name in trials else None for site in sites}
    thresholds = SparseThresholds(layers, block_q, block_k, dense_steps, max_error)
    report: dict[str, Any] = {
        "layers": {site.name: _layer_report(site.dense, trials.get(site.name)) for site in sites},
        "calibration_seconds": time.perf_counter() - began,
    }
    later = [max(seeds) + 1 + number for number in range(len(seeds))]
    report["held_out"] = measure_sparse(pipe, thresholds, held_out or prompts, seeds=later, **call)
    return replace(thresholds, report=report)


def measure_sparse(
    pipe: Any, thresholds: SparseThresholds, prompts: Sequence[Any], *, seeds: Iterable[int] = (0,), **call: Any
) -> dict[str, Any]:
    """What thresholds give on these prompts: density, errors, and time against the dense pipeline.

    Returns:
        ``density`` (mean share of blocks computed in the sparse layers and steps), ``attention_density`` (the same over
        all self-attention calls, dense ones counting 1), ``layer_error`` (worst relative L2 error of a layer's
        attention output on dense activations), ``within_bound`` (against ``thresholds.max_error``), ``output_error``
        (worst relative L2 error of the pipeline's output, sparse against dense), ``dense_seconds``, ``sparse_seconds``.
    """
    densities: list[Tensor] = []
    errors: list[Tensor] = []
    calls = [0]

    def act(
        name: str, step: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, dense: Callable[[], Tensor]
    ) -> Tensor:
        calls[0] += 1
        out = dense()
        threshold = thresholds.layers.get(name)
        if threshold is not None and step >= progress.dense_until(thresholds.dense_steps):
            block = {"block_q": thresholds.block_q, "block_k": thresholds.block_k}
            sparse, density = sparse_attention(q, k, v, threshold, scale=scale, **block)
            densities.append(density)
            errors.append(_relative_error(sparse, out))
        return out

    seconds: dict[str, float] = defaultdict(float)
    output_error = 0.0
    runs = [(prompt, seed) for prompt in prompts for seed in seeds]
    with torch.no_grad():
        for prompt, seed in runs:
            with attached(pipe, act) as progress:
                _generate(pipe, prompt, seed, call)
            dense_out, seconds_dense = _timed(pipe, prompt, seed, call)
            with apply_sparse(pipe, thresholds):
                sparse_out, seconds_sparse = _timed(pipe, prompt, seed, call)
            seconds["dense"] += seconds_dense
            seconds["sparse"] += seconds_sparse
            output_error = max(output_error, _relative_error(sparse_out, dense_out).item())
    density = torch.stack(densities).mean().item() if densities else 1.0
    worst = torch.stack(errors).max().item() if errors else 0.0
    share = len(densities) / max(calls[0], 1)
    return {
        "prompts": len(runs),
        "density": density,
        "attention_density": density * share + (1.0 - share),
        "layer_error": worst,
        "within_bound": None if thresholds.max_error is None else worst <= thresholds.max_error,
        "output_error": output_error,
        "dense_seconds": seconds["dense"],
        "sparse_seconds": seconds["sparse"],
    }


class _Trials:
    """The candidates of one layer that still hold, with what was measured of each."""

    def __init__(self, candidates: Sequence[BlockThreshold]) -> None:
        self.alive = list(candidates)
        self.density: dict[BlockThreshold, list[float]] = defaultdict(list)
        self.error: dict[BlockThreshold, dict[int, float]] = defaultdict(dict)

    def measure(
        self,
        step: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        dense: Tensor,
        *,
        bound: float,
        block_q: int,
        block_k: int,
    ) -> None:
        for candidate in list(self.alive):
            out, density = sparse_attention(q, k, v, candidate, block_q=block_q, block_k=block_k, scale=scale)
            error = _relative_error(out, dense).item()
            if not error <= bound:  # NaN is out too
                self.alive.remove(candidate)
                continue
            self.density[candidate].append(density.item())
            self.error[candidate][step] = max(error, self.error[candidate].get(step, 0.0))

    def best(self) -> BlockThreshold | None:
        """The sparsest that held everywhere; None where none did, or where none saves a block."""
        measured = [c for c in self.alive if self.density[c]]
        best = min(measured, key=self.mean_density, default=None)
        return None if best is None or self.mean_density(best) >= 1.0 else best

    def mean_density(self, candidate: BlockThreshold) -> float:
        return sum(self.density[candidate]) / len(self.density[candidate])


def _layer_report(dense: str | None, trials: _Trials | None) -> dict[str, Any]:
    best = None if trials is None else trials.best()
    if trials is None or best is None:
        return {"dense": dense or "no candidate holds the bound and saves a block"}
    errors = trials.error[best]
    return {
        "sim_threshold": best.sim_threshold,
        "cdf": best.cdf,
        "topk": best.topk,
        "density": trials.mean_density(best),
        "error": max(errors.values()),
        "error_by_step": {str(step): errors[step] for step in sorted(errors)},
    }


def _relative_error(out: Tensor, want: Tensor) -> Tensor:
    """``||out - want|| / ||want||`` of the worst sample, 0-d."""
    difference, size = ((t.float().flatten(1)).norm(dim=1) for t in (out - want, want))
    return (difference / size.clamp_min(1e-12)).max()


def _generate(pipe: Any, prompt: Any, seed: int, call: dict[str, Any]) -> Tensor:
    arguments: dict[str, Any] = {"output_type": "latent", **call}
    if isinstance(prompt, dict):
        arguments |= prompt
    elif isinstance(prompt, int):
        arguments["class_labels"] = [prompt]
    else:
        arguments["prompt"] = prompt
    generator = torch.Generator().manual_seed(seed)
    out = pipe(generator=generator, return_dict=False, **arguments)[0]
    return out if isinstance(out, Tensor) else torch.as_tensor(out)


def _timed(pipe: Any, prompt: Any, seed: int, call: dict[str, Any]) -> tuple[Tensor, float]:
    began = time.perf_counter()
    out = _generate(pipe, prompt, seed, call)
    if out.is_cuda:
        torch.cuda.synchronize(out.device)
    return out, time.perf_counter() - began
