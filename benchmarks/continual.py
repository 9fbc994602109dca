"""Continual networks against the continual-inference package and against clip recompute, interleaved in one run on
one machine.

    uv run --with continual-inference python benchmarks/continual.py --threads 1 --json JSON --plot PNG
    uv run --with continual-inference python benchmarks/continual.py --threads 0 --json JSON --plot PNG

Without the package its column is left out and said to be. Rows: the convolution stack A of the specification at one
stream and at 64 live streams that join and leave (ours: a ``StreamBatch``, with and without folded batch norms, and
in channels-last order, beside its bare convolutions; the package steps one phase a network, so independent streams are
64 networks stepped one by one, and, for comparison only, one batch in lock-step, which cannot serve streams that come
and go); the two-block encoder (d 1024, window 64); CoX3D-S per step against X3D-S per clip; memory per stream.
``--threads 0`` uses all cores. Times are medians over interleaved rounds, with the interquartile range beside them.
"""

import argparse
import copy
import importlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparing import continual as co
from sparing.continual import x3d
from sparing.continual.folding import fold_batch_norm

LAST = torch.channels_last_3d
Variant = tuple[str, Callable[[], Any], int]  # name, one call, steps of one stream that the call stands for


def stack_a() -> co.Sequential:
    """Conv-BN-ReLU, residual conv, ReLU, strided conv-BN-ReLU, sliding pool of 8 frames, linear; frames (3, 32, 32)."""
    torch.manual_seed(0)
    return co.Sequential(
        co.Conv3d(3, 16, 3, padding=1),
        nn.BatchNorm3d(16),
        nn.ReLU(),
        co.Residual(co.Conv3d(16, 16, 3, padding=1)),
        nn.ReLU(),
        co.Conv3d(16, 32, 3, padding=1, stride=(1, 2, 2)),
        nn.BatchNorm3d(32),
        nn.ReLU(),
        co.AvgPool3d((8, 16, 16), stride=1),
        co.Flatten(),
        co.Linear(32, 10),
    ).eval()


def peer_stack_a(peer: Any) -> nn.Module:
    """The same stack of the package's layers."""
    torch.manual_seed(0)
    return peer.Sequential(
        peer.Conv3d(3, 16, 3, padding=1),
        nn.BatchNorm3d(16),
        nn.ReLU(),
        peer.Residual(peer.Conv3d(16, 16, 3, padding=1)),
        nn.ReLU(),
        peer.Conv3d(16, 32, 3, padding=1, stride=(1, 2, 2)),
        nn.BatchNorm3d(32),
        nn.ReLU(),
        peer.AdaptiveAvgPool3d((1, 1, 1), kernel_size=8),
        peer.Lambda(lambda x: x.flatten(1)),
        nn.Linear(32, 10),
    ).eval()


def stepper(network: Any, x: torch.Tensor, *, lockstep: bool) -> Callable[[], Any]:
    """Steps of warm streams."""
    stream = co.Stream(network, streams=x.shape[0], frame_shape=tuple(x.shape[1:]), lockstep=lockstep)
    for _ in range(network.plan().warm_after + 4):
        stream(x)
    return lambda: stream(x)


def batch_stepper(network: Any, x: torch.Tensor, *, churn: int = 1) -> Callable[[], Any]:
    """Steps of as many independent streams as ``x`` has rows; ``churn`` of them leave and others join every step."""
    batch = co.StreamBatch(network, seats=x.shape[0], frame_shape=tuple(x.shape[1:]))
    names = [str(i) for i in range(x.shape[0])]
    for name in names:
        batch.join(name)
    born = [len(names)]

    def call() -> None:
        for _ in range(churn):
            batch.leave(names.pop(0))
            names.append(str(born[0]))
            batch.join(names[-1])
            born[0] += 1
        batch.step(dict(zip(names, x)))

    for _ in range(network.plan().warm_after + 4):
        call()
    return call


def convolutions_alone(network: nn.Module, streams: int, *, side: int = 32, tile: int = 16) -> Callable[[], Any]:
    """What no way of keeping memories can save: the convolutions of a step, on windows that lie ready."""
    calls = []
    for layer in network.modules():
        if isinstance(layer, co.Conv3d):
            shape = (tile, layer.in_channels, layer.kernel_size[0], side, side)
            windows = [torch.randn(shape).contiguous(memory_format=LAST) for _ in range(streams // tile)]
            padding = (0, *layer.padding[1:])
            calls += [(window, layer.weight, layer.bias, layer.stride, padding) for window in windows]

    def call() -> None:
        for arguments in calls:
            nn.functional.conv3d(*arguments)

    return call


def peer_stepper(network: Any, x: torch.Tensor, *, warm: int) -> Callable[[], Any]:
    for _ in range(warm):
        network.forward_step(x)
    return lambda: network.forward_step(x)


def one_by_one(peer: Any, streams: int, order: torch.memory_format = torch.preserve_format) -> Callable[[], Any]:
    """Steps of as many networks of the package as there are streams."""
    one = torch.randn(1, 3, 32, 32)
    networks = [peer_stack_a(peer).to(memory_format=order) for _ in range(streams)]
    steps = [peer_stepper(network, one, warm=14) for network in networks]

    def call() -> None:
        for step in steps:
            step()

    return call


def bytes_of_peer(network: nn.Module) -> int:
    """Bytes of the tensors that the package keeps as state (whatever is not a weight or a norm statistic)."""
    known = {id(t) for t in (*network.parameters(), *network.buffers())}
    total, seen = 0, set()
    for module in network.modules():
        pending = [value for value in vars(module).values() if not isinstance(value, (dict, nn.Module))]
        pending += [value for name, value in module._buffers.items() if "running" not in name and "batches" not in name]
        while pending:
            value = pending.pop()
            if isinstance(value, torch.Tensor) and id(value) not in seen:
                is_state = id(value) not in known or any(value is b for b in module._buffers.values())
                total += value.numel() * value.element_size() if is_state else 0
                seen.add(id(value))
            elif isinstance(value, (list, tuple)):
                pending.extend(value)
    return total


def measure(variants: list[Variant], *, rounds: int) -> dict[str, dict[str, float]]:
    """Median and interquartile range of seconds per step of one stream, every variant once a round.

    Each timed call follows an untimed one of the same variant: a step that comes after a whole clip finds cold caches
    and takes nearly twice as long, whichever it is.
    """
    times: dict[str, list[float]] = {name: [] for name, _, _ in variants}
    for _, call, _ in variants:
        call()
    for _ in range(rounds):
        for name, call, steps in variants:
            call()
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) / steps)
    result = {}
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
        result[name] = {"seconds_per_step": middle, "interquartile_s": high - low}
    return result


def convolution_rows(peer: Any, streams: int, *, rounds: int) -> dict[str, Any]:
    network, x = stack_a(), torch.randn(streams, 3, 32, 32)
    folded = fold_batch_norm(stack_a())
    clip = torch.randn(streams, 3, 16, 32, 32)
    variants: list[Variant] = []
    if streams > 1:
        last = copy.deepcopy(folded).to(memory_format=LAST)
        variants += [
            ("ours, 64 that come and go", batch_stepper(network, x), streams),
            ("ours, norms folded", batch_stepper(folded, x), streams),
            ("ours, folded, channels last", batch_stepper(last, x), streams),
            ("its convolutions alone", convolutions_alone(last, streams), streams),
        ]
    variants += [
        ("ours, own clocks", stepper(network, x, lockstep=False), streams),
        ("ours, lock-step", stepper(network, x, lockstep=True), streams),
        ("clip recompute (16 frames)", lambda: network(clip), streams),
    ]
    memory = {"ours": network.plan((3, 32, 32)).bytes_per_stream}
    if peer is not None:
        # independent streams cannot share a network of the package
        variants.append(("peer, independent streams", one_by_one(peer, streams), streams))
        if streams > 1:
            variants.append(("peer, independent, channels last", one_by_one(peer, streams, LAST), streams))
        batched = peer_stack_a(peer)
        variants.append(("peer, one lock-step batch", peer_stepper(batched, x, warm=14), streams))
        memory["peer"] = bytes_of_peer(batched) // streams
    return {"times": measure(variants, rounds=rounds), "bytes_per_stream": memory}


def encoder_rows(peer: Any, *, rounds: int, width: int = 1024, window: int = 64) -> dict[str, Any]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(width, 8, width, dropout=0.0, batch_first=True)
    plain = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    network = co.convert(plain, sequence_len=window)
    x, tokens = torch.randn(1, width), torch.randn(1, window, width)
    variants: list[Variant] = [
        ("ours", stepper(network, x, lockstep=True), 1),
        ("ours, own clocks", stepper(network, x, lockstep=False), 1),
        ("full window", lambda: plain(tokens), 1),
    ]
    memory = {"ours": network.plan((width,)).bytes_per_stream}
    if peer is not None:
        factory = peer.TransformerEncoderLayerFactory(width, 8, width, 0.0, sequence_len=window)
        theirs = peer.TransformerEncoder(factory, 2).eval()
        variants.append(("peer", peer_stepper(theirs, x, warm=2 * window), 1))
        memory["peer"] = bytes_of_peer(theirs)
    return {"times": measure(variants, rounds=rounds), "bytes_per_stream": memory}


def x3d_rows(*, rounds: int) -> dict[str, Any]:
    network = x3d.co_x3d_s().eval()
    x, clip = torch.randn(1, 3, 160, 160), torch.randn(1, 3, 13, 160, 160)
    variants: list[Variant] = [
        ("CoX3D-S step", stepper(network, x, lockstep=True), 1),
        ("X3D-S clip (13 frames)", lambda: network(clip), 1),
    ]
    memory = {"ours": network.plan((3, 160, 160)).bytes_per_stream}
    return {"times": measure(variants, rounds=rounds), "bytes_per_stream": memory}


def ratios(times: dict[str, dict[str, float]]) -> dict[str, float]:
    """How many times slower the others are than the first."""
    first, *others = times
    return {name: times[name]["seconds_per_step"] / times[first]["seconds_per_step"] for name in others}


def plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(report["rows"]), figsize=(4 * len(report["rows"]), 3.5))
    for axis, (name, row) in zip(axes, report["rows"].items()):
        names = list(row["times"])
        values = [1e3 * row["times"][key]["seconds_per_step"] for key in names]
        axis.barh(names, values)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("ms per step and stream")
        axis.tick_params(labelsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1, help="0: all cores")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    # This script has the package's name: its own folder must not answer the import.
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != Path(__file__).resolve().parent]
    try:
        peer = importlib.import_module("continual")
    except ImportError:
        peer = None
        print("continual-inference is not installed: its rows are left out")
    with torch.inference_mode():
        rows = {
            "stack A, 1 stream": convolution_rows(peer, 1, rounds=options.rounds),
            "stack A, 64 streams": convolution_rows(peer, 64, rounds=max(options.rounds // 4, 3)),
            "two-block encoder": encoder_rows(peer, rounds=max(options.rounds // 2, 3)),
            "CoX3D-S": x3d_rows(rounds=max(options.rounds // 4, 3)),
        }
    machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
    report = {"threads": torch.get_num_threads(), "machine": machine, "rows": rows}
    for name, row in rows.items():
        row["ratio_to_first"] = ratios(row["times"])
        print(name, row["bytes_per_stream"], "bytes per stream")
        for variant, value in row["times"].items():
            spread = 1e3 * value["interquartile_s"]
            ratio = row["ratio_to_first"].get(variant, 1.0)
            print(f"  {variant:32} {1e3 * value['seconds_per_step']:9.3f} ms +- {spread:.3f}  x{ratio:.2f}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if options.plot:
        plot(report, options.plot)


if __name__ == "__main__":
    main()
