"""Runs the cases: check every peer, time those that are right, state each time against the floor and the best peer."""

import gc
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparing import kernels
from sparing.kernels import dispatch
from sparing.kernels.bench import report
from sparing.kernels.bench.cases import Case, Inputs, cases
from sparing.kernels.bench.peers import library_peers
from sparing.kernels.bench.timing import Ceilings, graph_us, interleaved, measure_ceilings

__all__ = ["BenchResult", "run"]

# Relative norm error that a peer may have against the float32 reference (specification of the kernels, tolerances).
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 8e-3, torch.float16: 2e-3}  # float32: tf32 products are allowed
ROTATE_BYTES, MAX_SETS = 100 << 20, 32
HOPELESS = 50.0  # peers this many times slower than the best are measured once and left at that


@dataclass(frozen=True)
class BenchResult:
    """``data``: what the JSON holds. ``failures``: peers that gave wrong results. ``regressions``: against an older
    JSON."""

    data: dict[str, Any]
    failures: list[str]
    regressions: list[str]

    def __str__(self) -> str:
        return report.markdown(self.data)


def run(
    *,
    suite: str = "smoke",
    ops: Sequence[str] | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    compare: str | Path | None = None,
    warm: bool = False,
    say: Callable[[str], None] = print,
) -> BenchResult:
    """Measure a suite.

    Args:
        suite: ``'smoke'``, ``'paper'`` (sizes of published models) or ``'full'`` (that and sweeps).
        ops: only these ops.
        out: folder for ``kernels.json``, ``kernels.md`` and ``kernels.png``.
        device: ``'auto'`` (CUDA where there is one), ``'cpu'`` or ``'cuda'``.
        compare: an older ``kernels.json``; slow-downs beyond 7% and noise are listed.
        warm: only check the peers, which compiles every kernel, and time nothing.
        say: receives a line per finding, the device's ceilings first.

    Raises:
        ValueError: an unknown suite or op, or no such device.
    """
    chosen = cases(suite, ops)
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', and PyTorch finds no CUDA device here")
    if where.type == "cpu" and suite != "smoke":
        raise ValueError(f"suite {suite!r} needs a GPU; a CPU runs 'smoke', as a sanity check")
    before = None if compare is None else report.read(compare)
    ceilings = measure_ceilings(where)
    data: dict[str, Any] = {
        "device": _device_name(where),
        "versions": _versions(),
        "suite": suite,
        "ceilings": ceilings.as_dict(),
        "rows": [],
    }
    say(report.ceilings_line(data))
    failures: list[str] = []
    began = time.perf_counter()
    for case in chosen:
        for direction in ("fw", "fw+bw") if case.backward else ("fw",):
            rows = _measure(case, direction, where, ceilings, warm=warm)
            data["rows"] += rows
            failures += [f"{r['op']} {r['case']} {r['backend']}: {r['reason_if_skipped']}" for r in rows if r["wrong"]]
            say(report.row_line(rows))
    data["seconds"] = time.perf_counter() - began
    found = [] if before is None else report.regressions(before, data)
    if out is not None:
        report.write(data, Path(out))
    return BenchResult(data, failures, found)


def _measure(
    case: Case, direction: str, device: torch.device, ceilings: Ceilings, *, warm: bool
) -> list[dict[str, Any]]:
    peers: dict[str, Callable[..., Any]] = {
        **{name: partial(getattr(kernels, case.op), backend=name) for name in dispatch.BACKENDS},
        **library_peers(case.op),
        **case.peers,
    }
    if device.type == "cpu":  # Triton would be interpreted here, Inductor needs a compiler; neither says anything
        peers = {name: call for name, call in peers.items() if name not in ("triton", "inductor", "flex")}
    first = _inputs(case, device, 0)
    floor = _floor(case, direction, ceilings)
    rows: dict[str, dict[str, Any]] = {}
    right: dict[str, Callable[..., Any]] = {}
    wanted = _reference(case, device)
    for name, call in peers.items():
        rows[name] = row = _row(case, direction, name, floor)
        try:
            step = _step(call, direction)
            got = case.take(call(*_inputs(case, device, 0).args, **first.kwargs))
            row["error"] = _error(got, wanted)
            limit = case.tolerance or TOLERANCE[case.dtype]
            if not row["error"] <= limit:
                row["wrong"], row["reason_if_skipped"] = True, f"error {row['error']:.1e} above {limit:.1e}"
                continue
            step(first)
            right[name] = step
        except kernels.BackendUnsupported as refusal:
            row["reason_if_skipped"] = "; ".join(refusal.reasons)
            if f"has no {name} implementation" in row["reason_if_skipped"]:
                del rows[name]
        except (RuntimeError, ValueError, TypeError, NotImplementedError, ImportError) as error:  # a peer's own failure
            row["reason_if_skipped"] = (
                f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
            )
        _free(device)
    del wanted
    if not warm:
        _time(right, rows, case, device, floor, graph=direction == "fw" and floor < 20)
    _compare_peers(rows, _auto(case, first))
    return list(rows.values())


def _time(
    right: dict[str, Callable[..., Any]],
    rows: dict[str, dict[str, Any]],
    case: Case,
    device: torch.device,
    floor: float,
    *,
    graph: bool,
) -> None:
    size = sum(t.numel() * t.element_size() for t in _inputs(case, device, 0).tensors()) or 1
    number = max(1, min(MAX_SETS, ROTATE_BYTES // size + 1)) if device.type == "cuda" else 1
    sets = [_inputs(case, device, seed) for seed in range(number)]
    calls: dict[str, Sequence[Callable[[], Any]]] = {
        name: [partial(step, inputs) for inputs in sets] for name, step in right.items()
    }
    once = interleaved(calls, device, repeats=3) if len(calls) > 1 else {}
    best = min((timing.median_us for timing in once.values()), default=0.0)
    hopeless = {name for name, timing in once.items() if timing.median_us > HOPELESS * best}
    budget = 2.0 if device.type == "cuda" else 0.3
    full = interleaved({n: c for n, c in calls.items() if n not in hopeless}, device, seconds=budget)
    for name in calls:
        timing, row = full.get(name) or once[name], rows[name]
        row.update(median_us=timing.median_us, p10=timing.p10_us, p90=timing.p90_us, noise=timing.noise)
        row["roofline"] = floor / timing.median_us
        row["peak_mb"] = _peak(calls[name][0], device)
        if name in hopeless:
            row["reason_if_skipped"] = f"more than {HOPELESS:.0f} times slower than the best: few repeats"
        elif graph:
            with suppress(RuntimeError):
                row["graph_us"] = graph_us(calls[name][0], device)
        _free(device)


def _step(call: Callable[..., Any], direction: str) -> Callable[[Inputs], Any]:
    def forward(inputs: Inputs) -> Any:
        with torch.no_grad():
            return call(*inputs.args, **inputs.kwargs)

    def both(inputs: Inputs) -> Any:
        leaves = [leaf.requires_grad_() for leaf in inputs.leaves]
        out = call(*inputs.args, **inputs.kwargs)
        outs = [out] if isinstance(out, Tensor) else [o for o in out if o.requires_grad]
        return torch.autograd.grad(outs, leaves, [torch.ones_like(o) for o in outs])

    return forward if direction == "fw" else both


def _inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    return case.make(device, case.dtype, torch.Generator(device).manual_seed(seed))


def _reference(case: Case, device: torch.device) -> Any:
    """The op on the reference backend with float32 copies of the inputs, narrowed to what it can hold."""
    narrowed = case.narrow(_inputs(case, device, 0))

    def wide(value: Any) -> Any:
        if isinstance(value, kernels.RingCache):
            return kernels.RingCache(value.k.float(), value.v.float(), value.head, value.length, value.window)
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    args, kwargs = tuple(map(wide, narrowed.args)), {name: wide(value) for name, value in narrowed.kwargs.items()}
    with torch.no_grad():
        out = getattr(kernels, case.op)(*args, **kwargs, backend="reference")
    return out[1] if case.op == "codebook_argmin" else out


def _error(got: Any, wanted: Any) -> float:
    """Largest relative norm error of the floating outputs."""
    pairs = zip(got, wanted) if isinstance(wanted, tuple) else [(got, wanted)]
    errors = [
        ((g.float() - w.float()).norm() / w.float().norm().clamp_min(1e-12)).item()
        for g, w in pairs
        if w.is_floating_point()
    ]
    return max(errors) if all(e == e for e in errors) else float("inf")


def _floor(case: Case, direction: str, ceilings: Ceilings) -> float:
    # A backward of attention does 2.5 times the products of the forward; both read and write about twice as much again.
    products, moved = (3.5, 3.0) if direction == "fw+bw" else (1.0, 1.0)
    return ceilings.floor_us(
        flops=products * case.flops, moved=moved * case.bytes, exps=case.exps * (2.0 if products > 1 else 1.0),
        dtype=case.dtype,
    )  # fmt: skip


def _row(case: Case, direction: str, backend: str, floor: float) -> dict[str, Any]:
    empty = dict.fromkeys(("median_us", "p10", "p90", "noise", "roofline", "ratio_vs_best_peer", "peak_mb", "graph_us"))
    return {
        "op": case.op,
        "case": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "direction": direction,
        "backend": backend,
        "floor_us": floor,
        **empty,
        "error": None,
        "wrong": False,
        "auto": False,
        "reason_if_skipped": None,
    }


def _compare_peers(rows: dict[str, dict[str, Any]], auto: str | None) -> None:
    timed = {name: row["median_us"] for name, row in rows.items() if row["median_us"] is not None}
    for name, row in rows.items():
        row["auto"] = name == auto
        others = [median for other, median in timed.items() if other != name]
        if name in timed and others:
            row["ratio_vs_best_peer"] = min(others) / timed[name]


def _auto(case: Case, inputs: Inputs) -> str | None:
    """The backend that serves the case under ``'auto'``, read off a call: ops may hand their backends other
    arguments."""
    found: list[str] = []
    resolve = dispatch.resolve

    def noted(*args: Any) -> Any:
        implementation = resolve(*args)
        found.append(implementation.backend)
        return implementation

    dispatch.resolve = noted  # type: ignore[assignment]
    try:
        with torch.no_grad():
            getattr(kernels, case.op)(*inputs.args, **inputs.kwargs)
    finally:
        dispatch.resolve = resolve
    return found[0] if found else None


def _peak(call: Callable[[], Any], device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("sparing", "torch", "triton", "xformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
