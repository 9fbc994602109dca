"""Accuracy against cost on Fashion-MNIST: the shipped host, and its STViT, STViT-R and ToMe twins, one small budget.

    python benchmarks/accuracy_cost.py train --data DIR [--seed 0] [--row NAME ...]   # resumes; one JSON line a row
    python benchmarks/accuracy_cost.py report                          # the table in docs/results.md and its plot

Every row begins with the weights of ``vit_micro_patch4_28.demo_fashion`` (8 layers, 49 tokens) and is trained for one
epoch of the 60,000 images with the same settings, the host itself too; ToMe needs no training and is scored without
that epoch, at one rate also with it. STViT and STViT-R keep the first two layers; STViT-R makes one dumbbell unit of
the other six, whose last layer gives all 49 tokens back: it pays for a map that a classifier does not need, and is here
to show what that costs. The last weights are scored on the 10,000 test images, never the best ones. Runs lie in --out
(not committed).
"""

import argparse
import datetime
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

import sparing
from sparing.recipes.train_vision import TrainSettings, accuracy, train
from sparing.training import FitSettings, ImageSettings, image_batches

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "accuracy_cost.jsonl"
PAGE, PLOT = ROOT / "docs" / "results.md", ROOT / "docs" / "accuracy_cost.png"
HOST = "vit_micro_patch4_28.demo_fashion"
IMAGES = ImageSettings(max_shift=0, flip=True)


def budget(seed: int) -> FitSettings:
    """One epoch, equal for all rows."""
    return FitSettings(
        epochs=1,
        batch_size=64,
        optimizer="muon",
        lr=6e-4,
        matrix_lr=0.006,
        warmup=0.05,
        fresh_lr_multiplier=3.0,
        seed=seed,
        checkpoint_every=200,
    )


def _stvit(num_tokens: int) -> Callable[[nn.Module], nn.Module]:
    return lambda host: sparing.twin(host, "stvit", num_tokens=num_tokens, base_depth=2)


def _stvit_r(num_tokens: int) -> Callable[[nn.Module], nn.Module]:
    return lambda host: sparing.twin(host, "stvit_r_vit", num_tokens=num_tokens, base_depth=2)


def _tome(rate: int) -> Callable[[nn.Module], nn.Module]:
    return lambda host: sparing.twin(host, "tome", r=rate)


ROWS: dict[str, tuple[str, Callable[[nn.Module], nn.Module]]] = {  # name -> (curve of the plot, twin of the host)
    "host": ("host", lambda host: host),
    "STViT, 9 tokens": ("STViT", _stvit(9)),
    "STViT-R, 9 tokens": ("STViT-R", _stvit_r(9)),
    "ToMe, r = 5": ("ToMe", _tome(5)),
    "STViT, 4 tokens": ("STViT", _stvit(4)),
    "STViT, 16 tokens": ("STViT", _stvit(16)),
    "STViT-R, 4 tokens": ("STViT-R", _stvit_r(4)),
    "ToMe, r = 3": ("ToMe", _tome(3)),
    "ToMe, r = 8": ("ToMe", _tome(8)),
}
AS_TAKEN = ("host", "ToMe, r = 3", "ToMe, r = 5", "ToMe, r = 8")  # scored before training
NOT_TRAINED = ("ToMe, r = 3", "ToMe, r = 8")


def score(model: nn.Module, data: str) -> float:
    return accuracy(model.eval(), image_batches(model, data, split="test", settings=IMAGES))


def run(name: str, options: argparse.Namespace, *, trained: bool) -> None:
    """One row, or go on where it was stopped; append its numbers."""
    key = {"row": name, "trained": trained, "seed": options.seed if trained else None}
    if any(all(record[k] == v for k, v in key.items()) for record in records()):
        return
    started = time.process_time()
    host = sparing.create_model(HOST, pretrained=True)
    torch.manual_seed(options.seed)
    model = ROWS[name][1](host)
    cost = sparing.profile(model, torch.zeros(1, 1, 28, 28), measure=False)
    record: dict[str, Any] = {**key, "macs": cost.macs, "params": cost.params}
    if trained:
        fresh = dict(model.named_parameters()).keys() - dict(host.named_parameters()).keys()
        folder = options.out / f"{name.replace(' ', '_').replace(',', '')}_seed{options.seed}"
        metrics = train(
            model,
            options.data,
            out=folder,
            fit_settings=budget(options.seed),
            settings=TrainSettings(label_smoothing=0.0),
            image_settings=IMAGES,
            fresh=fresh,
        )
        record.update(test_accuracy=metrics["test_accuracy"], fit=metrics["fit"], loss=metrics["history"][-1]["loss"])
    else:
        record["test_accuracy"] = score(model, options.data)
    record.update(
        cpu_seconds_of_last_call=time.process_time() - started,
        threads=torch.get_num_threads(),
        machine=f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        torch=torch.__version__,
        date=str(datetime.date.today()),
    )
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(f"{name} {'trained' if trained else 'not trained'}: {100 * record['test_accuracy']:.2f}%", flush=True)


def records() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def report() -> None:
    """Write the table into docs/results.md (between its markers) and the plot beside it; print the table."""
    found = records()
    base = next(record["macs"] for record in found if record["row"] == "host")
    lines = [
        "| model | MMACs | of host | as taken from the host, % | after one epoch, % | seeds |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    points: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    for name in sorted(ROWS, key=lambda row: (ROWS[row][0] != "host", ROWS[row][0], _macs(found, row))):
        cells = []
        for trained in (False, True):
            scores = [100 * r["test_accuracy"] for r in found if r["row"] == name and r["trained"] == trained]
            cells.append(f"{mean(scores):.2f}" + (f" ({_each(scores)})" if len(scores) > 1 else "") if scores else "-")
            if scores:
                points.setdefault((ROWS[name][0], trained), []).append((_macs(found, name) / 1e6, mean(scores)))
        seeds = sorted({r["seed"] for r in found if r["row"] == name and r["trained"]})
        if cells != ["-", "-"]:
            macs = _macs(found, name)
            lines.append(
                f"| {name} | {macs / 1e6:.2f} | {macs / base:.2f} | {cells[0]} | {cells[1]} "
                f"| {', '.join(map(str, seeds)) or '-'} |"
            )
    table = "\n".join(lines)
    print(table)
    before, begin, rest = PAGE.read_text().partition("<!-- accuracy_cost: begin -->\n")
    _, end, after = rest.partition("<!-- accuracy_cost: end -->")
    PAGE.write_text(f"{before}{begin}{table}\n{end}{after}")
    draw(points)


def _each(scores: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in scores)


def _macs(found: list[dict[str, Any]], name: str) -> float:
    return next((record["macs"] for record in found if record["row"] == name), 0.0)


def draw(points: dict[tuple[str, bool], list[tuple[float, float]]]) -> None:
    """Test accuracy over MMACs; hollow marks were not trained."""
    from matplotlib.figure import Figure

    colours = {"host": "#222222", "STViT": "#0072b2", "STViT-R": "#009e73", "ToMe": "#e69f00"}
    figure = Figure(figsize=(6.4, 4.0), dpi=120, layout="constrained")
    axis = figure.subplots()
    for (curve, trained), values in points.items():
        xs, ys = zip(*sorted(values))
        said = {"host": "host, one more epoch" if trained else "host as shipped"}.get(
            curve, f"{curve}, {'one epoch' if trained else 'not trained'}"
        )
        face = colours[curve] if trained else "white"
        axis.plot(xs, ys, "o-" if trained else "o:", color=colours[curve], mfc=face, ms=6, lw=1, label=said)
    axis.set(xlabel="MMACs an image", ylabel="test accuracy, %", xlim=(0, None))
    axis.legend(fontsize=8, loc="lower right")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title("Fashion-MNIST, one small host: says nothing about ImageNet", fontsize=10)
    figure.savefig(PLOT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "report"])
    parser.add_argument("--data", default="../shared/data/fashion_mnist", help="folder with the four gzipped idx files")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "accuracy_cost")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--row", choices=ROWS, nargs="+", default=list(ROWS), help="only these rows")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if options.what == "report":
        report()
        return
    for name in options.row:
        if name in AS_TAKEN:
            run(name, options, trained=False)
        if name not in NOT_TRAINED:
            run(name, options, trained=True)


if __name__ == "__main__":
    main()
