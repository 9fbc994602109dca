"""Pruning adapters against fine-pruning on real transfer tasks: accuracy, learned parameters, 50 to 90% sparsity.

    python benchmarks/pruning_adapters.py run --cifar cifar10.zip --fsdd fsdd.zip      # everything; resumes
    python benchmarks/pruning_adapters.py run --task images --cifar cifar10.zip --seeds 1
    python benchmarks/pruning_adapters.py report                                      # tables, PNG, docs/results.md

**images**: a small ResNet trained on five classes of CIFAR-10 is adapted to the other five, of which 1,000 images
each are there for training; whole channels are pruned (SPLoRA, SPPaRA, fine-pruning). **speakers**: a small transformer
that tells spoken digits (Free Spoken Digit Dataset, log-mel spectrograms) is adapted to tell the six speakers; 32 x 32
blocks of its linear layers are pruned (SPLoPA, block fine-pruning). Every row of a task starts from the same source
network and gets the same batches, epochs, schedule, rates and criterion (magnitude of the adapted weights). Runs lie in
runs/pruning_adapters (not committed), their numbers, one line a run, in benchmarks/results/pruning_adapters.jsonl.
"""

import argparse
import io
import json
import os
import platform
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from sparing.recipes.adapt_pruned import PruneSettings, adapt_pruned, load_pruned
from sparing.recipes.spoken_digits import RATE, read_digits
from sparing.training import (
    FitSettings,
    MemoryBatches,
    TensorImages,
    load_checkpoint,
    save_checkpoint,
    shift_and_flip,
    write_json,
)
from sparing.vision.micro import vit_micro_patch4_28

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "pruning_adapters"  # a link to another disk is followed
RESULTS = ROOT / "benchmarks" / "results" / "pruning_adapters.jsonl"
DENSITIES = (0.5, 0.3, 0.1)
IMAGES_A_CLASS = 1000
MELS, FRAMES = 32, 48
LABELS = {
    "fine": "fine-pruning of channels",
    "splora": "SPLoRA, rank 8",
    "sppara": "SPPaRA",
    "fine_blocks": "fine-pruning of blocks",
    "splopa": "SPLoPA, 64 prototypes",
}
COLOURS = {
    "fine": "#222222",
    "splora": "#0072b2",
    "sppara": "#e69f00",
    "fine_blocks": "#222222",
    "splopa": "#009e73",
}


class SmallResNet(nn.Sequential):
    """A 3 x 3 stem and three residual blocks of 32, 64 and 128 channels, for 32 x 32 images; 0.3 M parameters."""

    def __init__(self, num_classes: int) -> None:
        def block(inputs: int, outputs: int) -> nn.Module:
            shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=2, bias=False), nn.BatchNorm2d(outputs))
            return BasicBlock(inputs, outputs, stride=2, downsample=shortcut)

        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.one, self.two, self.three = block(16, 32), block(32, 64), block(64, 128)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(128, num_classes)
        self.num_classes = num_classes


def spectrogram_transformer(num_classes: int) -> nn.Module:
    """A ViT whose patches are two frames of a log-mel spectrogram: 24 tokens, width 96, 4 blocks; 0.3 M parameters."""
    return vit_micro_patch4_28(
        img_size=(MELS, FRAMES), patch_size=(MELS, 2), depth=4, mlp_ratio=2, num_classes=num_classes
    )


class Task(NamedTuple):
    """What is transferred from where to where, and how long it may take."""

    build: Callable[[int], nn.Module]
    methods: tuple[str, ...]
    source: FitSettings
    target: FitSettings
    prune: dict[str, Any]
    flip: bool


COMMON: dict[str, Any] = {"batch_size": 64, "lr": 1e-3, "weight_decay": 0.01, "final_lr": 0.05}
TASKS = {
    "images": Task(
        SmallResNet,
        ("fine", "splora", "sppara"),
        FitSettings(epochs=6, fresh_lr_multiplier=1.0, **(COMMON | {"lr": 3e-3})),
        FitSettings(epochs=3, fresh_lr_multiplier=5.0, **COMMON),
        {"rank": 8, "warm_epochs": 1, "stages": 3, "least": 2},
        True,
    ),
    "speakers": Task(
        spectrogram_transformer,
        ("fine_blocks", "splopa"),
        FitSettings(epochs=24, fresh_lr_multiplier=1.0, **COMMON),
        FitSettings(epochs=6, fresh_lr_multiplier=5.0, **(COMMON | {"batch_size": 32})),
        {"warm_epochs": 2, "stages": 3, "block_size": 32, "num_prototypes": 64},
        False,
    ),
}


def read_cifar(archive: Path) -> dict[str, TensorImages]:
    """Training and test images of the source (first five classes by name) and of the target (the other five)."""
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    with zipfile.ZipFile(archive) as content:
        names = sorted(name for name in content.namelist() if name.endswith(".jpg"))
        classes = sorted({name.split("/")[1] for name in names})
        for name in names:
            split, label = name.split("/")[0], classes.index(name.split("/")[1])
            pixels = np.asarray(Image.open(io.BytesIO(content.read(name))).convert("RGB"))
            part = f"{'source' if label < 5 else 'target'}_{split}"
            parts.setdefault(part, []).append((label % 5, torch.from_numpy(pixels.copy()).permute(2, 0, 1)))
    data = {
        part: TensorImages(torch.stack([x for _, x in found]), torch.tensor([label for label, _ in found]))
        for part, found in parts.items()
    }
    few = data["target_train"]  # the first images of each class
    places = torch.cat([(few.labels == label).nonzero().flatten()[:IMAGES_A_CLASS] for label in range(5)])
    data["target_train"] = TensorImages(few.images[places], few.labels[places])
    return data


def read_speakers(archive: Path) -> dict[str, TensorImages]:
    """Log-mel spectrograms (1, 32, 48) of single takes as bytes; digits for the source, speakers for the target."""
    from torchaudio.transforms import MelSpectrogram

    mel = MelSpectrogram(sample_rate=RATE, n_fft=256, hop_length=128, n_mels=MELS, power=2.0)
    data: dict[str, TensorImages] = {}
    for split, held_out in (("train", False), ("test", True)):
        takes = read_digits(archive, held_out=held_out)
        speakers = sorted({take.speaker for take in takes})
        pictures = []
        for take in takes:
            level = torch.log(mel(take.samples) + 1e-6)[:, :FRAMES]
            level = ((level + 14.0) / 22.0).clamp(0, 1)  # -14 (silence) .. 8 (loud) in nepers
            pictures.append(nn.functional.pad(level, (0, FRAMES - level.shape[1])))
        images = (255 * torch.stack(pictures)[:, None]).round().to(torch.uint8)
        data[f"source_{split}"] = TensorImages(images, torch.tensor([take.digit for take in takes]))
        data[f"target_{split}"] = TensorImages(images, torch.tensor([speakers.index(take.speaker) for take in takes]))
    return data


def batches(task: str, archive: str | None, part: str, seed: int) -> tuple[MemoryBatches, MemoryBatches]:
    """Training and test batches of 'source' or 'target'; what was decoded once is kept as tensors."""
    cache = RUNS / f"{task}.pt"
    if cache.exists():
        stored = load_checkpoint(cache)
    else:
        if not archive:
            raise SystemExit(f"task {task} needs --{'cifar' if task == 'images' else 'fsdd'} ARCHIVE")
        read = {"images": read_cifar, "speakers": read_speakers}[task](Path(archive))
        stored = {name: {"images": found.images, "labels": found.labels} for name, found in read.items()}
        save_checkpoint(cache, stored)
    training, testing = (TensorImages(**stored[f"{part}_{split}"]) for split in ("train", "test"))
    scale: dict[str, Any] = {"mean": [0.5] * training.images.shape[1], "std": [0.25] * training.images.shape[1]}
    vary = partial(shift_and_flip, seed=seed, max_shift=2, flip=TASKS[task].flip)
    return MemoryBatches(training, augment=vary, **scale), MemoryBatches(testing, **scale)


def source(name: str, archive: str | None) -> Path:
    """Train the source network once."""
    folder, task = RUNS / name / "source", TASKS[name]
    if not (folder / "metrics.json").exists():
        data = batches(name, archive, "source", 0)
        torch.manual_seed(0)
        network = task.build(data[0].num_classes)
        settings = PruneSettings(method="fine", density=1.0, stages=1)
        metrics = adapt_pruned(network, data, out=folder, settings=settings, fit_settings=task.source, head="head")
        print(f"{name}: source network {100 * metrics['test_accuracy']:.2f}%", flush=True)
    return folder


def run(name: str, method: str, density: float, seed: int, archive: str | None) -> None:
    """One row for one seed; its numbers are appended."""
    if any((r["task"], r["method"], r["target"], r["seed"]) == (name, method, density, seed) for r in records()):
        return
    task, began = TASKS[name], time.process_time()
    start = source(name, archive)
    data = batches(name, archive, "target", seed)
    network: Any = load_pruned(start, network=task.build(batches(name, archive, "source", 0)[0].num_classes))
    torch.manual_seed(seed)
    network.head = nn.Linear(network.head.in_features, data[0].num_classes)
    network.num_classes = data[0].num_classes
    metrics = adapt_pruned(
        network,
        data,
        out=RUNS / name / f"{method}_{density}_{seed}",
        settings=PruneSettings(method=method, density=density, **task.prune),
        fit_settings=FitSettings(**{**task.target.__dict__, "seed": seed}),
        head="head",
        measure=False,
    )
    record = {
        "task": name,
        "method": method,
        "target": density,
        "seed": seed,
        "source_accuracy": json.loads((start / "metrics.json").read_text())["test_accuracy"],
        **{key: metrics[key] for key in ("test_accuracy", "test_samples", "weights", "dense_weights", "density")},
        **{key: metrics[key] for key in ("learned_parameters", "learned_of_head", "macs", "settings", "fit")},
        "cpu_seconds": time.process_time() - began,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(
        f"{name} {method} {density} seed {seed}: {100 * record['test_accuracy']:.2f}%, "
        f"{record['learned_parameters']:,} learned, {record['cpu_seconds']:.0f} s",
        flush=True,
    )


def records() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def report() -> None:
    """Tables into docs/results.md (between its markers), a summary as JSON and a picture beside the runs."""
    found = records()
    tables, summary = [], []
    for name, task in TASKS.items():
        lines = [
            "| method | sparsity | weights left | learned parameters (head aside) | of fine-pruning | MMACs "
            "| test accuracy %: mean (each seed) | to fine-pruning |",
            "| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: |",
        ]
        for density in (1.0, *DENSITIES):
            base: dict[int, dict[str, Any]] = {}
            for method in task.methods:
                rows = [r for r in found if (r["task"], r["method"], r["target"]) == (name, method, density)]
                if not rows:
                    continue
                rows.sort(key=lambda r: r["seed"])
                base = base or {r["seed"]: r for r in rows}
                learned = mean(r["learned_parameters"] - r["learned_of_head"] for r in rows)
                of_base = learned / mean(r["learned_parameters"] - r["learned_of_head"] for r in base.values())
                gaps = [
                    100 * (r["test_accuracy"] - base[r["seed"]]["test_accuracy"]) for r in rows if r["seed"] in base
                ]
                scores = [100 * r["test_accuracy"] for r in rows]
                each = ", ".join(f"{score:.1f}" for score in scores)
                lines.append(
                    f"| {LABELS[method]} | {100 * (1 - density):.0f}% | {mean(r['weights'] for r in rows):,.0f} "
                    f"| {learned:,.0f} | {of_base:.2f} | {mean(r['macs'] for r in rows) / 1e6:.2f} "
                    f"| **{mean(scores):.1f}** ({each}) | {mean(gaps):+.1f} |"
                )
                summary.append(
                    {
                        "task": name,
                        "method": method,
                        "sparsity": round(1 - density, 2),
                        "accuracy": scores,
                        "learned_parameters": learned,
                        "weights": mean(r["weights"] for r in rows),
                        "macs": mean(r["macs"] for r in rows),
                    }
                )
        table = "\n".join(lines)
        tables.append(table)
        print(f"{name}\n{table}\n")
        page = ROOT / "docs" / "results.md"
        mark = f"<!-- pruning {name}: "
        if mark in page.read_text():
            before, begin, rest = page.read_text().partition(f"{mark}begin -->\n")
            _, end, after = rest.partition(f"{mark}end -->")
            page.write_text(f"{before}{begin}{table}\n{end}{after}")
    write_json(RESULTS.with_suffix(".json"), summary)
    draw(found)


def draw(found: list[dict[str, Any]]) -> None:
    """Accuracy over learned parameters, one panel a task; lines join the sparsities of a method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.2), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(TASKS))
    titles = {"images": "CIFAR-10, five classes to the other five", "speakers": "spoken digits to speakers"}
    for panel, (name, task) in zip(panels, TASKS.items(), strict=True):
        for method in task.methods:
            middle = []
            for density in (1.0, *DENSITIES):
                rows = [r for r in found if (r["task"], r["method"], r["target"]) == (name, method, density)]
                if not rows:
                    continue
                learned = [r["learned_parameters"] - r["learned_of_head"] for r in rows]
                scores = [100 * r["test_accuracy"] for r in rows]
                panel.plot(learned, scores, "o", ms=4, alpha=0.5, color=COLOURS[method])
                middle.append((mean(learned), mean(scores), density))
            if middle:
                panel.plot(
                    *zip(*[m[:2] for m in middle], strict=True), "-", color=COLOURS[method], label=LABELS[method]
                )
            for x, y, density in middle:
                panel.annotate(
                    f"{100 * (1 - density):.0f}%", (x, y), xytext=(3, -10), textcoords="offset points", fontsize=7
                )
        panel.set(xscale="log", xlabel="learned parameters, head aside", ylabel="test accuracy, %", title=titles[name])
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=8, loc="lower right")
    figure.suptitle("Labels: sparsity. Dots: seeds. Same source, budget and schedule in a panel.", fontsize=9)
    figure.savefig(RESULTS.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("--cifar", help="zip of CIFAR-10 as SPLIT/CLASS/NAME.jpg")
    parser.add_argument("--fsdd", help="zip or folder of the Free Spoken Digit Dataset")
    parser.add_argument("--task", choices=tuple(TASKS), help="only this one")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--dense", action="store_true", help="also the unpruned rows")
    wanted = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if wanted.what == "report":
        report()
        return
    for name in [wanted.task] if wanted.task else TASKS:
        archive = wanted.cifar if name == "images" else wanted.fsdd
        for seed in range(wanted.first_seed, wanted.first_seed + wanted.seeds):
            for density in (1.0, *DENSITIES) if wanted.dense else DENSITIES:
                for method in TASKS[name].methods:
                    run(name, method, density, seed, archive)


if __name__ == "__main__":
    main()
