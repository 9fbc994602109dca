"""``python -m sparing.kernels.tune OP``: measure launch configurations on this GPU and keep the fastest.

At most 12 candidates around the default rule are tried on the cases of the benchmark's ``paper`` suite; one that
needs more than the device has, that spills registers or that gives another result is left out. The winner of each
size class goes to the user's cache, where :func:`sparing.kernels.triton.config.pick_config` finds it. Speed changes,
results do not beyond rounding.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparing import kernels
from sparing.kernels.bench.cases import Case, cases
from sparing.kernels.bench.timing import interleaved
from sparing.kernels.triton import config as table
from sparing.kernels.triton.config import Config

__all__ = ["KERNELS", "candidates", "search", "tune"]

# op -> the kernels that its forward launches with a configuration of the table
KERNELS = {
    "block_sparse_attention": ("block_sparse_forward",),
    "codebook_argmin": ("codebook_argmin",),
    "cosine_exit": ("cosine_exit",),
    "ln_modulate": ("adaln_forward",),
    "gate_residual_ln_modulate": ("adaln_forward",),
}
MOST = 12
# Kernels whose tile columns are the row of the tensor or the block of a map: only rows, warps and stages are free.
_FIXED_COLUMNS = ("adaln_forward", "block_sparse_forward")
_FIXED_ROWS = ("block_sparse_forward",)


def candidates(kernel: str, default: Config) -> list[Config]:
    """The default, then neighbours: half and twice the tile, the warps, more or fewer stages; at most 12."""
    found = [default]
    for warps in (4, 8, 16):
        for stages in (1, 2, 3, 4):
            found.append(replace(default, num_warps=warps, num_stages=stages))
    if kernel not in _FIXED_ROWS:
        found[1:1] = [replace(default, block_m=max(1, rows)) for rows in (default.block_m * 2, default.block_m // 2)]
    if kernel not in _FIXED_COLUMNS:
        found[1:1] = [replace(default, block_n=max(16, n)) for n in (default.block_n * 2, default.block_n // 2)]
    near = sorted(dict.fromkeys(found[1:]), key=lambda c: _distance(c, default))
    return [default, *(c for c in near if c != default)][:MOST]


def search(
    tried: list[Config], attempt: Callable[[Config], Any], clock: Callable[[list[Config]], dict[Config, float]]
) -> tuple[Config, float]:
    """The fastest of the candidates that run and give the first one's result.

    Args:
        tried: candidates; the first is the default and has to run.
        attempt: one call under a configuration; an exception leaves the candidate out.
        clock: microseconds of each.
    """
    wanted = attempt(tried[0])
    usable = [tried[0]]
    for candidate in tried[1:]:
        try:
            got = attempt(candidate)
        except Exception as error:  # out of shared memory or registers, or a tile the compiler refuses
            print(f"  {candidate}: {type(error).__name__}", file=sys.stderr)
            continue
        if _same(got, wanted):
            usable.append(candidate)
    times = clock(usable)
    best = min(usable, key=times.__getitem__)
    return best, times[best]


def tune(op: str) -> dict[str, dict[str, Any]]:
    """Tune one op on this GPU and write the user's table; gives the entries found.

    Raises:
        ValueError: an op without a table, or no CUDA device.
    """
    if op not in KERNELS:
        raise ValueError(f"{op!r} has no table of configurations; tunable are {', '.join(sorted(KERNELS))}")
    if not torch.cuda.is_available():
        raise ValueError("tuning measures on a GPU, and PyTorch finds no CUDA device here")
    device, found = torch.device("cuda"), dict[str, dict[str, Any]]()
    for case in cases("paper", [op]):
        for kernel in KERNELS[op]:
            key, best, microseconds = _tune_case(case, kernel, device)
            if key not in found or microseconds > found[key]["time_us"]:  # the largest case of a class decides
                found[key] = {**asdict(best), "time_us": microseconds}
            print(f"{case.name}: {key} {best} {microseconds:.1f} us")
    path = table.user_table()
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text())["configs"] if path.exists() else {}
    entry = {"arch": "sm90", "device": torch.cuda.get_device_name(device), "triton": _triton_version()}
    path.write_text(json.dumps({**entry, "configs": before | found}, indent=1) + "\n")
    print(f"written: {path}")
    return found


def _tune_case(case: Case, kernel: str, device: torch.device) -> tuple[str, Config, float]:
    inputs = case.make(device, case.dtype, torch.Generator(device).manual_seed(0))
    noted: list[tuple[str, Config]] = []
    pick = table.pick_config

    def call() -> Any:
        with torch.no_grad():
            return getattr(kernels, case.op)(*inputs.args, **inputs.kwargs, backend="triton")

    dim = inputs.args[0].shape[-1]
    module = importlib.import_module(_module(case.op))

    def note(name: str, default: Config, *, head_dim: int, dtype: torch.dtype) -> Config:
        noted.append((name, default))
        return pick(name, default, head_dim=head_dim, dtype=dtype)

    module.pick_config = note  # type: ignore[attr-defined]
    try:
        call()
    finally:
        module.pick_config = pick  # type: ignore[attr-defined]
    default = next(config for name, config in noted if name == kernel)

    def attempt(config: Config) -> Any:
        with table.forced(kernel, config):
            return call()

    def clock(usable: list[Config]) -> dict[Config, float]:
        timings = interleaved({str(config): [partial(attempt, config)] for config in usable}, device)
        return {config: timings[str(config)].median_us for config in usable}

    best, microseconds = search(candidates(kernel, default), attempt, clock)
    return table.key(kernel, dim, case.dtype), best, microseconds


def _module(op: str) -> str:
    name = "adaln" if op in ("ln_modulate", "gate_residual_ln_modulate") else op.replace("_argmin", "")
    return f"sparing.kernels.triton.{name}"


def _distance(config: Config, default: Config) -> int:
    """How many fields differ, then how far the warps and stages are."""
    a, b = asdict(config), asdict(default)
    return 10 * sum(a[name] != b[name] for name in a) + abs(a["num_warps"] - b["num_warps"]) // 4


def _same(got: Any, wanted: Any) -> bool:
    if isinstance(wanted, Tensor):
        if not wanted.is_floating_point():
            return True  # an index may differ where two values are equally good; the values are compared
        return torch.allclose(got.float(), wanted.float(), rtol=2e-2, atol=2e-2)
    return all(_same(g, w) for g, w in zip(got, wanted))


def _triton_version() -> str:
    import triton

    return triton.__version__


def main(arguments: list[str] | None = None) -> int:
    """Tune the ops named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m sparing.kernels.tune", description=__doc__)
    parser.add_argument("op", nargs="+", help=f"one of {', '.join(sorted(KERNELS))}")
    try:
        for op in parser.parse_args(arguments).op:
            tune(op)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
