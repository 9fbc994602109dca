"""The toy-scale table of docs/results.md: host, STViT, ToMe, a plain ViT and a CNN at STViT's FLOPs, on Fashion-MNIST.

    python benchmarks/fashion_table.py train --data DIR --seed 0 [--row host]    # one seed, or one row of it; resumes
    python benchmarks/fashion_table.py evaluate --data DIR --seed 0              # untrained and training-free rows
    python benchmarks/fashion_table.py report                                    # table, curves, docs/results.md
    python benchmarks/fashion_table.py ship --seed 0                             # fp16 files into sparing/zoo/weights

The scheme, equal for every trained row: START epochs from scratch, then EXTRA epochs with a lower rate. STViT has no
start of its own: it takes the host's weights at the end of the start and trains EXTRA epochs. Every accuracy is that
of the
weights stored in fp16 and read back. Runs lie in runs/fashion (not committed), their numbers, one line a run, in
benchmarks/results/fashion.jsonl.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import sparing
from sparing.recipes.demo import equal_cost_rate
from sparing.recipes.train_vision import TrainSettings, accuracy, train
from sparing.training import FitSettings, ImageSettings, atomic_file, image_batches, open_images, write_json
from sparing.vision.micro import vit_micro_patch4_28
from sparing.zoo.profile import Profile
from sparing.zoo.weights import SHIPPED

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "fashion"
SHIPPED_NAMES = {"host": "vit_micro_patch4_28.demo_fashion", "stvit": "stvit_vit_micro_patch4_28.demo_fashion"}
SAMPLES_A_CLASS = 40
RESULTS = ROOT / "benchmarks" / "results" / "fashion.jsonl"

START = FitSettings(
    epochs=3, batch_size=64, optimizer="muon", lr=2e-3, matrix_lr=0.02, weight_decay=0.05, warmup=0.05, final_lr=0.1
)
EXTRA = FitSettings(
    epochs=2,
    batch_size=64,
    optimizer="muon",
    lr=6e-4,
    matrix_lr=0.006,
    weight_decay=0.05,
    warmup=0.05,
    final_lr=0.0,
    fresh_lr_multiplier=3.0,
)
TRAIN = TrainSettings(label_smoothing=0.0)
IMAGES = ImageSettings(max_shift=0, flip=True)


class SmallCNN(nn.Sequential):
    """Five 3 x 3 convolutions with batch norm, two poolings, a mean and a linear head."""

    def __init__(self, num_classes: int = 10) -> None:
        def convolution(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

        super().__init__(
            *convolution(1, 32),
            *convolution(32, 32),
            nn.MaxPool2d(2),
            *convolution(32, 64),
            *convolution(64, 64),
            nn.MaxPool2d(2),
            *convolution(64, 56),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(56, num_classes),
        )
        self.num_classes = num_classes
        self.num_features = 56
        self.pretrained_cfg = {**vit_micro_patch4_28().pretrained_cfg, "architecture": "small_cnn"}


def plain_at_equal_flops() -> VisionTransformer:
    """A plain ViT with 7 x 7 patches (16 tokens), as wide as STViT's FLOPs allow."""
    return vit_micro_patch4_28(patch_size=7, embed_dim=111, num_heads=3)


def stvit_of(host: nn.Module) -> nn.Module:
    """The twin of the table: base of 2 blocks, generation of 2, 9 semantic tokens."""
    return sparing.twin(host, "stvit", num_tokens=9, base_depth=2)


def tome_of(host: nn.Module) -> nn.Module:
    """ToMe at the rate whose FLOPs are nearest to STViT's."""
    return sparing.twin(host, "tome", r=equal_cost_rate(host, count(stvit_of(host)).macs))


def count(model: nn.Module) -> Profile:
    return sparing.profile(model, torch.zeros(1, 1, 28, 28), measure=False)


FROM_SCRATCH: dict[str, Callable[[], nn.Module]] = {
    "host": vit_micro_patch4_28,
    "plain": plain_at_equal_flops,
    "cnn": SmallCNN,
}
TRAINED = ("host", "stvit", "plain", "cnn")
FROM_HOST = {"stvit untrained": stvit_of, "tome": tome_of}
LABELS = {
    "host": "host: plain ViT, patch 4, 49 tokens",
    "stvit": "STViT, 9 semantic tokens, trained",
    "stvit untrained": "STViT, 9 semantic tokens, converted, not trained",
    "tome": "ToMe, training-free, r nearest in FLOPs",
    "plain": "plain ViT at STViT's FLOPs: patch 7, 16 tokens, width 111",
    "cnn": "small CNN at STViT's FLOPs",
}

SHORT = {
    "host": "host",
    "stvit": "STViT, trained",
    "stvit untrained": "STViT, not trained",
    "tome": "ToMe, training-free",
    "plain": "plain ViT at STViT's FLOPs",
    "cnn": "CNN at STViT's FLOPs",
}


def through_fp16(model: nn.Module, file: Path) -> int:
    """Store the weights in fp16, read them back into ``model``, return the bytes of the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    halves = {
        name: value.half() if value.is_floating_point() else value.clone() for name, value in model.state_dict().items()
    }
    save_file(halves, file)
    model.load_state_dict(
        {name: value.float() if value.is_floating_point() else value for name, value in load_file(file).items()}
    )
    model.eval()
    return file.stat().st_size


def run(row: str, seed: int, data: str) -> None:
    """Train one row for one seed, or go on where it was stopped; append its numbers."""
    if recorded(row, seed):
        print(f"{row} seed {seed}: done before")
        return
    folder, started = RUNS / f"seed{seed}" / row, time.process_time()
    start = RUNS / f"seed{seed}" / ("host" if row == "stvit" else row) / "start"
    torch.manual_seed(seed)
    fresh: set[str] = set()
    if row == "stvit":
        if not (start / "metrics.json").exists():
            raise SystemExit(f"the twin needs the host's start: run --row host --seed {seed} first")
        host = vit_micro_patch4_28()
        host.load_state_dict(load_file(start / "model.safetensors"))
        model = stvit_of(host)
        fresh = dict(model.named_parameters()).keys() - dict(host.named_parameters()).keys()
    else:
        model = FROM_SCRATCH[row]()
        stage(model, start, START, seed=seed, data=data)
    last = stage(model, folder / "extra", EXTRA, seed=seed + 1000, data=data, fresh=fresh)
    size = through_fp16(model, folder / "fp16.safetensors")
    record = {
        "row": row,
        "seed": seed,
        "status": getattr(model, "status", "host"),
        "test_accuracy": evaluate(model, data),
        "file_bytes": size,
        "curve": curve(folder),
        "cpu_seconds_of_last_call": time.process_time() - started,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "torch": torch.__version__,
        "start": json.loads((start / "metrics.json").read_text())["fit"],
        "extra": last["fit"],
        "train": last["train"],
    }
    append(record)


def stage(
    model: nn.Module, folder: Path, settings: FitSettings, *, seed: int, data: str, fresh: Collection[str] = ()
) -> dict:
    """One stage of the scheme; when its folder is complete, only its weights are read."""
    if (folder / "metrics.json").exists():
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return json.loads((folder / "metrics.json").read_text())
    if isinstance(model, SmallCNN):  # no blocks for Muon to work on
        settings = replace(settings, optimizer="adamw")
    print(f"{folder.relative_to(RUNS)}: {settings.epochs} epochs", flush=True)
    fit_settings = replace(settings, seed=seed)
    return train(model, data, out=folder, fit_settings=fit_settings, settings=TRAIN, image_settings=IMAGES, fresh=fresh)


def curve(folder: Path) -> list[dict]:
    stages = [folder / name / "metrics.json" for name in ("start", "extra")]
    return [point for path in stages if path.exists() for point in json.loads(path.read_text())["history"]]


def derive(seed: int, data: str) -> None:
    """The rows that need no training, from the stored fp16 host of a seed."""
    file = RUNS / f"seed{seed}" / "host" / "fp16.safetensors"
    if not file.exists():
        raise SystemExit(f"the host of seed {seed} is not trained: run train --row host --seed {seed} first")
    for row, make in FROM_HOST.items():
        if recorded(row, seed):
            continue
        host = vit_micro_patch4_28()
        host.load_state_dict({name: value.float() for name, value in load_file(file).items()})
        torch.manual_seed(seed)
        twin = make(host)
        append(
            {
                "row": row,
                "seed": seed,
                "test_accuracy": evaluate(twin, data),
                "knobs": twin.knobs,
                "status": twin.status,
            }
        )


def report() -> None:
    """Write the table into docs/results.md (between its markers) and the curves beside it; print the table."""
    host = vit_micro_patch4_28()
    shapes = {
        "host": host,
        "stvit": stvit_of(host),
        "plain": plain_at_equal_flops(),
        "cnn": SmallCNN(),
        "tome": tome_of(host),
    }
    shapes["stvit untrained"] = shapes["stvit"]
    costs = {row: count(model) for row, model in shapes.items()}
    found = {row: sorted((r for r in records() if r["row"] == row), key=lambda r: r["seed"]) for row in LABELS}
    lines = [
        "| model | MMACs | of host | parameters | test accuracy %: mean (each seed) | to host | fp16, MB "
        "| CPU minutes |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    hosts = {record["seed"]: record["test_accuracy"] for record in found["host"]}
    for row, label in LABELS.items():
        runs = found[row]
        if not runs:
            continue
        scores = [100 * record["test_accuracy"] for record in runs]
        gaps = [100 * (record["test_accuracy"] - hosts[record["seed"]]) for record in runs if record["seed"] in hosts]
        size = f"{runs[0]['file_bytes'] / 1e6:.2f}" if "file_bytes" in runs[0] else "-"
        minutes = [record["cpu_seconds_of_last_call"] / 60 for record in runs if "cpu_seconds_of_last_call" in record]
        spent = f"{mean(minutes):.1f}" if minutes else "none"
        cost = costs[row]
        each = ", ".join(f"{score:.2f}" for score in scores)
        lines.append(
            f"| {label} | {cost.macs / 1e6:.2f} | {cost.macs / costs['host'].macs:.2f} | {cost.params:,} "
            f"| **{mean(scores):.2f}** ({each}) | {mean(gaps):+.2f} | {size} | {spent} |"
        )
    table = "\n".join(lines)
    print(table)
    page = ROOT / "docs" / "results.md"
    before, begin, rest = page.read_text().partition("<!-- fashion: begin -->\n")
    _, end, after = rest.partition("<!-- fashion: end -->")
    page.write_text(f"{before}{begin}{table}\n{end}{after}")
    draw(found, costs)


def draw(found: dict[str, list[dict]], costs: dict) -> None:
    """docs/fashion_table.png: test accuracy over epochs, and over FLOPs."""
    from matplotlib.figure import Figure

    colours = {
        "host": "#222222",
        "stvit": "#0072b2",
        "stvit untrained": "#56b4e9",
        "tome": "#e69f00",
        "plain": "#009e73",
        "cnn": "#cc79a7",
    }
    figure = Figure(figsize=(10.5, 4.2), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for row, runs in found.items():
        for number, record in enumerate(runs):
            curve_points = record.get("curve", [])
            first = START.epochs if row == "stvit" else 0
            epochs = [first + place + 1 for place in range(len(curve_points))]
            label = SHORT[row] if number == 0 else None
            left.plot(
                epochs,
                [100 * p["test_accuracy"] for p in curve_points],
                "o-",
                color=colours[row],
                ms=3,
                lw=1,
                alpha=0.8,
            )
            right.plot(
                costs[row].macs / 1e6,
                100 * record["test_accuracy"],
                "o",
                color=colours[row],
                label=label,
                ms=6,
                alpha=0.8,
            )
    left.axvline(START.epochs + 0.5, color="#bbbbbb", lw=1, ls=":")
    left.text(START.epochs + 0.45, 80.3, "start ", ha="right", fontsize=8, color="#777777")
    left.text(START.epochs + 0.55, 80.3, " extra", ha="left", fontsize=8, color="#777777")
    left.set(xlabel="epoch", ylabel="test accuracy, %", ylim=(78, 94), title="while training (fp32 weights)")
    left.set_xticks(range(1, START.epochs + EXTRA.epochs + 1))
    right.set(xlabel="MMACs an image", xlim=(0, 52), title="stored fp16 weights, every seed")
    right.legend(fontsize=8, loc="lower right")
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Fashion-MNIST, toy scale: checks the mechanism, says nothing about ImageNet", fontsize=10)
    figure.savefig(ROOT / "docs" / "fashion_table.png")


def ship(seed: int, data: str) -> None:
    """Host and twin of a seed as shipped weights with their cards, and sample images for the demo."""
    import gzip
    import shutil
    import struct

    test = open_images(data, split="test", channels=1)
    for row, name in SHIPPED_NAMES.items():
        record = recorded(row, seed)
        if record is None:
            raise SystemExit(f"no {row} of seed {seed}: run train first")
        shutil.copyfile(RUNS / f"seed{seed}" / row / "fp16.safetensors", SHIPPED / f"{name}.safetensors")
        measured = {
            "top1_fashion_mnist_test_percent": round(100 * record["test_accuracy"], 2),
            "test_images": len(test),
            "macs": int(count({"host": vit_micro_patch4_28(), "stvit": stvit_of(vit_micro_patch4_28())}[row]).macs),
            "file_bytes": record["file_bytes"],
            "weights_dtype": "float16",
        }
        card = {
            "training": f"benchmarks/fashion_table.py train --row {row} --seed {seed}: "
            + f"{START.epochs} epochs from scratch{'' if row == 'host' else ' as the host'}, {EXTRA.epochs} more",
            "license": {"code": "apache-2.0", "weights": "apache-2.0", "data": "mit"},
            "measured": measured,
            "settings": {key: record[key] for key in ("start", "extra", "train")},
        }
        write_json(SHIPPED / f"{name}.json", card)
    # the first SAMPLES_A_CLASS test images of each class, in the order of the test set
    chosen = sorted(
        place for label in range(10) for place in (test.labels == label).nonzero().flatten()[:SAMPLES_A_CLASS].tolist()
    )
    for kind, array in (("images-idx3", test.images[chosen, 0]), ("labels-idx1", test.labels[chosen].to(torch.uint8))):
        header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
        content = gzip.compress(header + array.contiguous().numpy().tobytes(), 9, mtime=0)
        with atomic_file(SHIPPED / "samples" / f"fashion-{kind}-ubyte.gz") as file:
            file.write(content)
    print(f"shipped {', '.join(SHIPPED_NAMES.values())} and {len(chosen)} images")


def evaluate(model: nn.Module, data: str) -> float:
    return accuracy(model.eval(), image_batches(model, data, split="test", settings=IMAGES))


def append(record: dict) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(f"{record['row']} seed {record['seed']}: {100 * record['test_accuracy']:.2f}%", flush=True)


def records() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def recorded(row: str, seed: int) -> dict | None:
    return next((record for record in records() if record["row"] == row and record["seed"] == seed), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "evaluate", "report", "ship"])
    parser.add_argument("--data", default="../shared/data/fashion_mnist", help="folder with the four gzipped idx files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--row", choices=TRAINED, help="only this row; default: all, one after the other")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if arguments.what == "train":
        for row in [arguments.row] if arguments.row else TRAINED:
            run(row, arguments.seed, arguments.data)
    elif arguments.what == "evaluate":
        derive(arguments.seed, arguments.data)
    elif arguments.what == "report":
        report()
    else:
        ship(arguments.seed, arguments.data)


if __name__ == "__main__":
    main()
