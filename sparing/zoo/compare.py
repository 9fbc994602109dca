"""Models side by side in one run: what each costs, and how far its output is from the first one's."""

import json
import platform
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn

import sparing
from sparing.zoo.hosts import is_saved_name
from sparing.zoo.inputs import example_call, placement
from sparing.zoo.profile import (
    Profile,
    assemble,
    device_name,
    evaluation,
    measure_latency,
    spread,
)
from sparing.zoo.registry import create_model
from sparing.zoo.table import MODELS


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model of a comparison; ratios and distances are to the first.

    ``flops_ratio`` is this model's FLOPs over the first one's; ``speedup`` the first one's time over this model's,
    the median over rounds of times taken in the same round, ``speedup_spread`` its interquartile range.
    ``output_error`` is ``||y - y_first|| / ||y_first||`` over the batch; ``top1_agreement`` the share of samples
    whose largest logit is the same one; ``feature_cosine`` the mean cosine of the pooled features. Distances are None
    where shapes differ or a model has no such output. ``status`` is a twin's, ``'host'`` for anything that is not a
    twin.
    """

    name: str
    status: str
    knobs: dict[str, Any] | None
    profile: Profile
    flops_ratio: float
    params_ratio: float
    speedup: float | None
    speedup_spread: float | None
    output_error: float | None
    top1_agreement: float | None
    feature_cosine: float | None


_HEADS = (
    *("model", "status", "GMACs", "x", "params M", "ms", "spread", "samples/s", "speed-up", "peak MiB"),
    *("output error", "top-1 same", "feature cos"),
)


@dataclass(frozen=True, slots=True, repr=False)
class Comparison:
    """Rows in the order given, and what they were measured on (``inputs`` says whether random or real)."""

    rows: tuple[Row, ...]
    inputs: str
    environment: dict[str, str]

    def table(self) -> str:
        """The comparison as an aligned text table, one model a line, with its status; empty columns are left out."""
        rows = [self._cells(row) for row in self.rows]
        filled = [i for i in range(len(_HEADS)) if any(cells[i] != "-" for cells in rows)]
        lines = [[cells[i] for i in filled] for cells in (_HEADS, *rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        first = self.rows[0].profile
        where = f"{first.device}, {first.dtype}, batch {first.batch_size}"
        rounds = f"{first.repeats} interleaved rounds" if first.repeats else "not timed"
        note = f"{where}, {rounds}; inputs: {self.inputs}"
        return "\n".join([*(_aligned(line, widths) for line in lines), note])

    @staticmethod
    def _cells(row: Row) -> tuple[str, ...]:
        def number(value: float | None, form: str, scale: float = 1.0) -> str:
            return "-" if value is None else format(value * scale, form)

        cost = row.profile
        return (
            row.name,
            row.status,
            number(cost.macs, ".4f", 1e-9),
            number(row.flops_ratio, ".3f"),
            number(cost.params, ".2f", 1e-6),
            number(cost.latency_s, ".2f", 1e3),
            number(cost.latency_spread_s, ".2f", 1e3),
            number(cost.throughput, ".1f"),
            number(row.speedup, ".2f"),
            number(cost.peak_memory_bytes, ".1f", 2**-20),
            number(row.output_error, ".2e"),
            number(row.top1_agreement, ".1%"),
            number(row.feature_cosine, ".4f"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        rows = [{**asdict(row), "profile": row.profile.to_dict()} for row in self.rows]
        return {"inputs": self.inputs, "environment": self.environment, "rows": rows}

    def to_json(self, path: str | Path | None = None) -> str:
        """The comparison as JSON text, also written to ``path`` if given."""
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def plot(self, path: str | Path) -> Path:
        """Draws FLOPs and time of every model as a share of the first one's, and writes the picture (the suffix says
        its kind).
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 1.2 + 0.7 * len(self.rows)), layout="constrained")
        axes = figure.subplots()
        places = range(len(self.rows))
        axes.barh([p - 0.2 for p in places], [row.flops_ratio for row in self.rows], height=0.36, label="FLOPs")
        timed = [(p, 1 / row.speedup) for p, row in zip(places, self.rows) if row.speedup]
        if timed:
            axes.barh([p + 0.2 for p, _ in timed], [share for _, share in timed], height=0.36, label="time")
        axes.set_yticks(list(places), [f"{row.name}\n({row.status})" for row in self.rows], fontsize=8)
        axes.invert_yaxis()
        axes.axvline(1.0, color="grey", linewidth=0.8)
        axes.set_xlabel(f"share of {self.rows[0].name}")
        axes.legend(fontsize=8)
        figure.savefig(path, dpi=150)
        return Path(path)

    def __repr__(self) -> str:
        return self.table()


def compare(
    models: Sequence[nn.Module] | Sequence[str] | Mapping[str, nn.Module],
    *,
    inputs: Tensor | Sequence[Any] | None = None,
    batch: int = 1,
    image_size: int | None = None,
    kwargs: Mapping[str, Any] | None = None,
    repeats: int = 20,
    warmup: int = 3,
    measure: bool = True,
    cost_only: Collection[str] = (),
) -> Comparison:
    """Measures models interleaved in one run and compares costs and outputs to the first.

    Args:
        models: the first is what the others are held against. Live modules, a mapping from the names to print to live
            modules, or names (see :func:`create_all`; those without weights are compared by cost only).
        inputs: a tensor, or the tuple of positional arguments of every forward; with none (and no ``kwargs``), random
            ones that suit the first model (:func:`sparing.zoo.inputs.example_call`). Agreement on random input says
            little about images.
        batch: number of random samples when no inputs are given; ``image_size`` their side.
        kwargs: keyword arguments of every forward.
        repeats: interleaved rounds; ``warmup`` of them before.
        measure: False counts parameters and FLOPs and compares outputs, but takes no times.
        cost_only: names of models whose outputs are not compared, because their weights are random.

    Raises:
        ValueError: no models, or a bad number of repeats.
    """
    if not models:
        raise ValueError("compare needs at least one model")
    named: dict[str, nn.Module] = {}
    if isinstance(models, Mapping):
        named = dict(models)
    elif all(isinstance(model, str) for model in models):
        named, cost_only = create_all(cast(Sequence[str], models))
    else:
        for model in cast(Sequence[nn.Module], models):
            named[_unique(type(model).__name__, named)] = model
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be at least 1 and warmup at least 0, got {repeats} and {warmup}")
    names, modules = list(named), list(named.values())
    drawn = inputs is None and kwargs is None
    arguments: tuple[Any, ...]
    call = dict(kwargs or {})
    if inputs is None and kwargs is None:
        arguments, call = example_call(modules[0], batch=batch, image_size=image_size)
    else:
        arguments = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs or ())
    device, _ = placement(modules[0], arguments)
    outputs = [
        (None, None) if name in cost_only else _outputs(module, arguments, call) for name, module in named.items()
    ]
    seconds: list[list[float]] = [[] for _ in modules]
    if measure:
        calls = [lambda module=module: module(*arguments, **call) for module in modules]  # type: ignore[misc]
        seconds = measure_latency(calls, modules, device=device, repeats=repeats, warmup=warmup)
    profiles = [
        assemble(name, module, arguments, call, times)
        for name, module, times in zip(names, modules, seconds, strict=True)
    ]
    rows = [
        _row(module, cost, times, output, profiles[0], seconds[0], outputs[0])
        for module, cost, times, output in zip(modules, profiles, seconds, outputs, strict=True)
    ]
    environment = {"sparing": sparing.__version__, "torch": torch.__version__, "machine": platform.machine()}
    environment |= {"threads": str(torch.get_num_threads()), "device": device_name(device)}
    return Comparison(tuple(rows), "random" if drawn else "given", environment)


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    """One table line: names to the left, numbers to the right."""
    padded = [cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(cells, widths))]
    return "  ".join(padded).rstrip()


def create_all(
    names: Sequence[str],
    *,
    pretrained: bool = False,
    device: "str | torch.device | None" = None,
    dtype: torch.dtype | None = None,
) -> tuple[dict[str, nn.Module], set[str]]:
    """Creates models by name for a comparison.

    Args:
        names: what ``create_model`` takes. A tag (``NAME.TAG``), a folder and a hub id always bring their weights.
        pretrained: published weights for the others too.
        device: where to; ``dtype`` likewise.

    Returns:
        Models by name (a repeated name gets a number), and the names among them whose weights are random: their
        outputs say nothing.
    """
    models: dict[str, nn.Module] = {}
    random: set[str] = set()
    for name in names:
        saved = is_saved_name(name)
        weights = not saved and (pretrained or (name in MODELS and MODELS[name].source is not None))
        unique = _unique(name, models)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # random weights are the same ones in every run
            models[unique] = create_model(name, pretrained=weights, dtype=dtype).to(device=device)
        if not (weights or saved):
            random.add(unique)
    return models, random


def _unique(name: str, taken: Mapping[str, Any]) -> str:
    number, unique = 2, name
    while unique in taken:
        unique, number = f"{name} ({number})", number + 1
    return unique


def _row(
    module: nn.Module,
    cost: Profile,
    seconds: list[float],
    output: tuple[Tensor | None, Tensor | None],
    first_cost: Profile,
    first_seconds: list[float],
    first_output: tuple[Tensor | None, Tensor | None],
) -> Row:
    speedups = [reference / own for reference, own in zip(first_seconds, seconds, strict=True)]
    (answer, features), (first_answer, first_features) = output, first_output
    knobs = getattr(module, "knobs", None)
    return Row(
        name=cost.name,
        status=status_of(module),
        knobs=dict(knobs) if isinstance(knobs, Mapping) else None,
        profile=cost,
        flops_ratio=cost.flops / first_cost.flops if first_cost.flops else float("nan"),
        params_ratio=cost.params / first_cost.params if first_cost.params else float("nan"),
        speedup=median(speedups) if speedups else None,
        speedup_spread=spread(speedups) if speedups else None,
        output_error=relative_error(answer, first_answer),
        top1_agreement=top1_agreement(answer, first_answer),
        feature_cosine=feature_cosine(features, first_features),
    )


def status_of(model: nn.Module) -> str:
    """A twin's status, ``'host'`` for a model that is no twin."""
    return str(getattr(model, "status", "host"))


def _outputs(model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """The main output, and the pooled features where the model has timm's ``forward_features`` and ``forward_head``."""
    with evaluation(model), torch.inference_mode():
        answer = main_tensor(model(*inputs, **kwargs))
        return answer, pooled_features(model, *inputs) if len(inputs) == 1 and not kwargs else None


def pooled_features(model: nn.Module, images: Tensor) -> Tensor | None:
    """What the classifier of a timm-style model sees, ``(batch, features)``; None for models of another kind."""
    if not (hasattr(model, "forward_features") and hasattr(model, "forward_head")):
        return None
    host = cast(Any, model)
    features = host.forward_head(host.forward_features(images), pre_logits=True)
    return features if isinstance(features, Tensor) and features.ndim == 2 else None


def main_tensor(output: Any) -> Tensor | None:
    """The tensor that an output is about: itself, or the first tensor of a tuple, a list, a mapping or a library's
    output class.
    """
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    return next((tensor for tensor in map(main_tensor, values) if tensor is not None), None)


def relative_error(output: Tensor | None, reference: Tensor | None) -> float | None:
    """``||output - reference|| / ||reference||`` in float64; None where shapes differ or there is no floating-point
    output.
    """
    if output is None or reference is None or output.shape != reference.shape or not output.is_floating_point():
        return None
    output, reference = output.double().cpu(), reference.double().cpu()
    return float((output - reference).norm() / reference.norm().clamp_min(1e-30))


def top1_agreement(logits: Tensor | None, reference: Tensor | None) -> float | None:
    """Share of samples with the same largest logit; None unless both are ``(batch, classes)`` of one shape."""
    if (
        logits is None
        or reference is None
        or logits.shape != reference.shape
        or logits.ndim != 2
        or logits.shape[1] < 2
    ):
        return None
    return float((logits.argmax(dim=1).cpu() == reference.argmax(dim=1).cpu()).double().mean())


def feature_cosine(features: Tensor | None, reference: Tensor | None) -> float | None:
    """Mean cosine of two ``(batch, features)`` tensors; None where there are none of one shape."""
    if features is None or reference is None or features.shape != reference.shape:
        return None
    cosines = torch.nn.functional.cosine_similarity(features.double().cpu(), reference.double().cpu(), dim=1)
    return float(cosines.mean())
