"""What a model costs: parameters, FLOPs, latency, throughput, peak memory.

FLOPs are counted by torch's counter, one multiply-add as two. The fused attention of the CPU is invisible to that
counter, so counting runs on a copy without memory (meta tensors) and with the math attention backend; ops of
``sparing.kernels`` bring their own formulas. A model that cannot run on meta tensors is counted in one real forward,
also with the math backend.
"""

import copy
import importlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sparing._compat import uncompiled
from sparing.zoo.inputs import batch_size, example_call, placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Costs of one forward on one batch. What was not measured is None.

    ``latency_s`` is the median of warm runs, ``latency_spread_s`` their interquartile range, ``throughput`` is in
    samples per second. ``peak_memory_bytes``: see :func:`peak_memory`; ``memory_method`` says how it was found, or
    why it was not.
    """

    name: str
    device: str
    dtype: str
    batch_size: int
    params: int
    flops: int
    latency_s: float | None = None
    latency_spread_s: float | None = None
    throughput: float | None = None
    peak_memory_bytes: int | None = None
    memory_method: str | None = None
    repeats: int = 0

    @property
    def macs(self) -> float:
        """Multiply-adds: the papers' "FLOPs"."""
        return self.flops / 2

    def to_dict(self) -> dict[str, Any]:
        """All numbers as plain JSON values."""
        return {**asdict(self), "macs": self.macs}

    def __str__(self) -> str:
        parts = [f"{self.params:,} parameters", f"{self.macs / 1e9:.4f} GMACs"]
        if self.latency_s is not None:
            parts.append(f"{self.latency_s * 1e3:.2f} ms (spread {(self.latency_spread_s or 0) * 1e3:.2f})")
            parts.append(f"{self.throughput:.1f} samples/s")
        if self.peak_memory_bytes is not None:
            parts.append(f"peak {self.peak_memory_bytes / 2**20:.1f} MiB")
        return f"{self.name} on {self.device}, {self.dtype}, batch {self.batch_size}: " + ", ".join(parts)


def profile(
    model: nn.Module,
    *inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    repeats: int = 20,
    warmup: int = 3,
    measure: bool = True,
) -> Profile:
    """Counts and measures one forward of ``model(*inputs, **kwargs)``, in evaluation mode and without gradients.

    Args:
        model: any module; its mode is restored.
        inputs: what the forward takes; with none, what :func:`sparing.zoo.inputs.example_call` makes.
        kwargs: keyword arguments of the forward.
        repeats: timed runs.
        warmup: runs before them.
        measure: False only counts parameters and FLOPs.

    Raises:
        ValueError: no inputs, and the model does not say what it takes; or ``repeats`` below 1.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be at least 1 and warmup at least 0, got {repeats} and {warmup}")
    call = dict(kwargs or {})
    if not inputs and not call:
        inputs, call = example_call(model)
    seconds: list[float] = []
    if measure:
        device, _ = placement(model, inputs)
        calls = [lambda: model(*inputs, **call)]
        seconds = measure_latency(calls, [model], device=device, repeats=repeats, warmup=warmup)[0]
    return assemble(type(model).__name__, model, inputs, call, seconds)


def assemble(
    name: str, model: nn.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any], seconds: Sequence[float]
) -> Profile:
    """The profile of a model whose forward took ``seconds``; with none, parameters and FLOPs only."""
    device, dtype = placement(model, inputs)
    samples = batch_size(inputs, kwargs)
    memory, method = peak_memory(model, *inputs, kwargs=kwargs) if seconds else (None, None)
    return Profile(
        name=name,
        device=device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        batch_size=samples,
        params=count_params(model),
        flops=count_flops(model, *inputs, kwargs=kwargs),
        latency_s=median(seconds) if seconds else None,
        latency_spread_s=spread(seconds) if seconds else None,
        throughput=samples / median(seconds) if seconds else None,
        peak_memory_bytes=memory,
        memory_method=method,
        repeats=len(seconds),
    )


def count_params(model: nn.Module) -> int:
    """Number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_flops(model: nn.Module, *inputs: Any, kwargs: Mapping[str, Any] | None = None) -> int:
    """FLOPs of one forward (one multiply-add = 2), by the rules in this module's docstring; the model's state is not
    touched.
    """
    call = dict(kwargs or {})
    model = uncompiled(model)  # compiled regions hide their operators
    try:
        return _count(_copy_without_memory(model), _to_meta(inputs), _to_meta(call))
    except (
        Exception
    ):  # whatever a model does that meta tensors cannot: data-dependent branches, constants kept outside buffers
        return _count(_copy_sharing_parameters(model), inputs, call)


def _count(model: nn.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    importlib.import_module("sparing.kernels.flops")  # makes our custom ops known to counters made afterwards
    counter = FlopCounterMode(display=False)
    with evaluation(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(*inputs, **kwargs)
    return int(counter.get_total_flops())


def _copy_without_memory(model: nn.Module) -> nn.Module:
    """A deep copy whose parameters and buffers are meta tensors; nothing is allocated on the way."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def _copy_sharing_parameters(model: nn.Module) -> nn.Module:
    """A deep copy that shares the parameters but owns its buffers, so that a counting forward changes no state."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, Mapping):
        return {key: _to_meta(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_meta(item) for item in value)
    return value


def measure_latency(
    calls: Sequence[Callable[[], Any]],
    models: Sequence[nn.Module],
    *,
    device: torch.device,
    repeats: int,
    warmup: int = 3,
) -> list[list[float]]:
    """Seconds of every call in every round, interleaved A, B, A, B, so that drift of the machine meets all alike.

    Returns:
        One list of ``repeats`` seconds a call; element i of each list comes from the same round.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    with evaluation(*models), torch.inference_mode():
        for _ in range(warmup):
            for call in calls:
                call()
        _synchronize(device)
        for _ in range(repeats):
            for call, record in zip(calls, seconds, strict=True):
                start = time.perf_counter()
                call()
                _synchronize(device)
                record.append(time.perf_counter() - start)
    return seconds


def peak_memory(model: nn.Module, *inputs: Any, kwargs: Mapping[str, Any] | None = None) -> tuple[int | None, str]:
    """Peak memory in bytes of one forward, and how it was found.

    On CUDA: the allocator's own peak, weights and whatever else is alive on the device included. On the CPU:
    parameters, buffers and tensor inputs, plus the largest sum of tensor memory that operators allocated and nobody
    had freed yet, as torch's profiler records it operator by operator; scratch memory inside a library call is not
    seen. Elsewhere: None.
    """
    call = dict(kwargs or {})
    device, _ = placement(model, inputs)
    with evaluation(model), torch.inference_mode():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            model(*inputs, **call)
            torch.cuda.synchronize(device)
            return torch.cuda.max_memory_allocated(device), "peak of the CUDA allocator"
        if device.type != "cpu":
            return None, f"no counter for device type {device.type!r}"
        with _profiler() as recorded:
            model(*inputs, **call)
    held = [
        tensor
        for tensor in (*model.parameters(), *model.buffers(), *inputs, *call.values())
        if isinstance(tensor, Tensor)
    ]
    alive = peak = 0
    for event in sorted(recorded.events(), key=lambda event: event.time_range.end):
        alive += event.self_cpu_memory_usage
        peak = max(peak, alive)
    resident = sum(value.untyped_storage().nbytes() for value in held if isinstance(value, Tensor))
    return resident + peak, "weights and inputs, plus tensors alive between operators (torch profiler)"


@contextmanager
def _profiler() -> Iterator[Any]:
    """torch's memory profiler, its start-up complaints about a missing GPU driver kept off the terminal."""
    level = os.environ.get("KINETO_LOG_LEVEL")
    os.environ["KINETO_LOG_LEVEL"] = level or "5"
    activities = [torch.profiler.ProfilerActivity.CPU]
    try:
        with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as recorded:
            yield recorded
    finally:
        if level is None:
            del os.environ["KINETO_LOG_LEVEL"]


@contextmanager
def evaluation(*models: nn.Module) -> Iterator[None]:
    """Puts models into evaluation mode and restores the mode of every submodule afterwards."""
    training = [module for model in models for module in model.modules() if module.training]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def device_name(device: torch.device) -> str:
    """The device in words: its type, and the card's name on CUDA."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def spread(values: Sequence[float]) -> float:
    """Interquartile range."""
    quarters = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.75], dtype=torch.float64))
    return float(quarters[1] - quarters[0])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
