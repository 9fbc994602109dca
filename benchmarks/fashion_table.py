"""The toy-scale table of docs/results.md: host, STViT, ToMe, a plain ViT and a CNN at STViT's FLOPs, on Fashion-MNIST.

    python benchmarks/fashion_table.py train --data DIR --seed 0 [--row host]    # one seed, or one row of it; resumes
    python benchmarks/fashion_table.py evaluate --data DIR                       # untrained and training-free rows
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

import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import sparing
from sparing.recipes.train_vision import TrainSettings, accuracy, train
from sparing.training import FitSettings, ImageSettings, image_batches
from sparing.vision.micro import vit_micro_patch4_28

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "fashion"
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


FROM_SCRATCH: dict[str, Callable[[], nn.Module]] = {
    "host": vit_micro_patch4_28,
    "plain": plain_at_equal_flops,
    "cnn": SmallCNN,
}
TRAINED = ("host", "stvit", "plain", "cnn")


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


if __name__ == "__main__":
    main()
