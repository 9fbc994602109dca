"""Clocks: events on CUDA, the performance counter elsewhere; peers interleaved; the device's own ceilings."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

__all__ = ["Ceilings", "Timing", "graph_us", "interleaved", "measure_ceilings"]

WARM_SECONDS = 0.025
EXP_UNITS, EXP_CLOCK_HZ = 16, 1.755e9  # exponentials a multiprocessor and clock; datasheet boost clock of an H100


@dataclass(frozen=True)
class Ceilings:
    """What this device can do, measured now: matrix product in TFLOP/s, copy in TB/s (bytes read plus written), one
    empty launch in microseconds. ``exp_per_s`` is arithmetic from the datasheet; 0 = not used.
    """

    matmul_tflops: dict[str, float]
    copy_tb_per_s: float
    launch_us: float
    exp_per_s: float

    def floor_us(self, *, flops: float, moved: float, exps: float, dtype: torch.dtype) -> float:
        """The time below which nothing can go: the longest of product, memory and exponentials; at least one launch."""
        rate = self.matmul_tflops.get(str(dtype).removeprefix("torch."), max(self.matmul_tflops.values()))
        by_exp = exps / self.exp_per_s if self.exp_per_s else 0.0
        return max(self.launch_us, 1e6 * max(flops / rate / 1e12, moved / self.copy_tb_per_s / 1e12, by_exp))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Timing:
    """Microseconds. ``noise``: difference between the medians of two halves of the runs, as a share of the median."""

    median_us: float
    p10_us: float
    p90_us: float
    noise: float
    repeats: int


def measure_ceilings(device: torch.device) -> Ceilings:
    """Measure the device before anything else."""
    cuda = device.type == "cuda"
    side, elements = (8192, 2**29) if cuda else (512, 2**22)
    rates = {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        timing = interleaved({"matmul": [lambda a=a, b=b: a @ b]}, device, repeats=10)["matmul"]  # type: ignore[misc]
        rates[str(dtype).removeprefix("torch.")] = 2.0 * side**3 / timing.median_us / 1e6
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    copy = interleaved({"copy": [lambda: target.copy_(source)]}, device, repeats=10)["copy"].median_us
    one = torch.zeros(1, device=device)
    launches = 100

    def many() -> None:
        for _ in range(launches):
            one.add_(1)

    launch = interleaved({"launch": [many]}, device, repeats=10)["launch"].median_us / launches
    exps = 0.0
    if cuda:
        exps = torch.cuda.get_device_properties(device).multi_processor_count * EXP_UNITS * EXP_CLOCK_HZ
    return Ceilings(rates, 8.0 * elements / copy / 1e6, launch, exps)


def interleaved(
    peers: dict[str, Sequence[Callable[[], Any]]], device: torch.device, *, repeats: int = 50, seconds: float = 2.0
) -> dict[str, Timing]:
    """Time each peer, A, B, A, B, ...

    Args:
        peers: name -> the same call on several sets of inputs, taken in turn so that the cache holds none of them.
        device: where they run.
        repeats: runs of each peer, at least; fewer (but at least 5) when ``seconds`` are used up.
        seconds: budget of the whole.
    """
    for calls in peers.values():
        until = time.perf_counter() + WARM_SECONDS
        for number in range(1000):
            calls[number % len(calls)]()
            if number % 4 == 3:
                _synchronize(device)
                if time.perf_counter() > until:
                    break
    _synchronize(device)
    marks: dict[str, list[Any]] = {name: [] for name in peers}
    began = time.perf_counter()
    for number in range(repeats):
        for name, calls in peers.items():
            marks[name].append(_timed(calls[number % len(calls)], device))
        if number >= 5 and number % 5 == 0:
            _synchronize(device)
            if time.perf_counter() - began > seconds:
                break
    _synchronize(device)
    return {name: _summary([mark() for mark in found]) for name, found in marks.items()}


def graph_us(call: Callable[[], Any], device: torch.device) -> float | None:
    """Median microseconds of a call replayed from a CUDA graph; None where it cannot be captured."""
    if device.type != "cuda":
        return None
    try:
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            call()
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(10):
                call()
    except RuntimeError:
        torch.cuda.synchronize(device)
        return None
    return interleaved({"graph": [graph.replay]}, device, repeats=20)["graph"].median_us / 10


def _timed(call: Callable[[], Any], device: torch.device) -> Callable[[], float]:
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        return lambda: start.elapsed_time(end) * 1e3
    began = time.perf_counter()
    call()
    took = (time.perf_counter() - began) * 1e6
    return lambda: took


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summary(times: list[float]) -> Timing:
    median = statistics.median(times)
    ordered = sorted(times)
    half = len(times) // 2
    noise = abs(statistics.median(times[:half]) - statistics.median(times[half:])) / median if half else 0.0
    at = lambda share: ordered[min(len(ordered) - 1, int(share * len(ordered)))]  # noqa: E731
    return Timing(median, at(0.1), at(0.9), noise, len(times))
