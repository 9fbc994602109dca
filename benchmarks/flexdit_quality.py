"""Quality of small FlexDiTs beside the dense DiT that they were made from, on Fashion-MNIST in pixel space.

    python benchmarks/flexdit_quality.py --data FOLDER --out runs/flexdit_quality
    python benchmarks/flexdit_quality.py --data FOLDER --out runs/smoke --smoke
    python benchmarks/flexdit_quality.py --data FOLDER --out runs/flexdit_quality --ship   # fp16 files into the zoo

Stages, each kept in ``--out`` and skipped when it is there already: a classifier; a dense DiT; from it, with the same
further budget each, the dense DiT trained on and one FlexDiT per variant; samples and scores. The Frechet and kernel
distances are taken in the feature space of THAT classifier against the test images ("classifier-FID",
"classifier-KID"): they are not Inception FIDs and compare only with each other. Class accuracy is the share of samples
that the classifier gives the class they were generated for. ``--out`` then holds results.json, table.md and one sheet
of samples a model.
"""

import argparse
import copy
import json
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

import sparing
from sparing.diffusion import FlexDiTPipeline, FlexDiTTransformer2DModel, RespacedScheduler
from sparing.diffusion import flexdit_keys as keys
from sparing.media.image import write_image
from sparing.recipes.finetune_flexdit import FlexDiTSettings, default_fit_settings, finetune
from sparing.recipes.train_vision import write_json
from sparing.training import MemoryBatches, TensorImages, open_images
from sparing.zoo.weights import SHIPPED

# name -> layout and density table; a depth of 12 blocks. 'b_split' is the split published for 12 layers.
_B_SPLIT = {"num_pooling": 1, "num_sdtm": 2, "sdtm_group": [1, 2, 1, 1], "num_dense_top": 1}
_LONG = {"num_pooling": 1, "num_sdtm": 1, "sdtm_group": [1, 8, 1, 0], "num_dense_top": 1}
_TWO_LONG = {"num_pooling": 1, "num_sdtm": 2, "sdtm_group": [1, 3, 1, 0], "num_dense_top": 1}
_ONE_LONG = {"num_pooling": 0, "num_sdtm": 1, "sdtm_group": [1, 9, 1, 0], "num_dense_top": 1}
_LONG_TOP = {"num_pooling": 1, "num_sdtm": 1, "sdtm_group": [1, 7, 1, 1], "num_dense_top": 1}
_LATE = {"num_pooling": 1, "num_sdtm": 1, "sdtm_group": [1, 9, 1, 0], "num_dense_top": 0}
_SHALLOW = {"num_pooling": 0, "num_sdtm": 0, "sdtm_group": [1, 2, 1, 1], "num_dense_top": 5}
_DENSE = {"num_pooling": 0, "num_sdtm": 0, "sdtm_group": [1, 2, 1, 1], "num_dense_top": 12}


def variants(side: int) -> dict[str, tuple[dict[str, Any], Any]]:
    """Name -> (layout, density table) at a dense grid of ``side`` tokens a side."""
    half, third = max(1, round(side * 0.55)), max(1, round(side * 0.37))
    return {
        "dense": (_DENSE, None),
        "shallow": (_SHALLOW, None),
        f"b_split_{half}x{half}": (_B_SPLIT, half),
        f"b_split_{third}x{third}": (_B_SPLIT, third),
        "b_split_schedule": (_B_SPLIT, [(0, half), (500, third)]),
        f"long_{third}x{third}": (_LONG, third),
        f"two_long_{third}x{third}": (_TWO_LONG, third),
        f"one_long_{half}x{half}": (_ONE_LONG, half),
        f"long_top_{third}x{third}": (_LONG_TOP, third),
        f"late_{half}x{half}": (_LATE, half),
    }


def shallow(state: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The weights of a DiT (original names) with ``count`` of its blocks, evenly spaced, the first and the last among
    them: what the same compute buys without sparse tokens.
    """
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    kept = [round(index * (depth - 1) / (count - 1)) for index in range(count)]
    found = {key: value for key, value in state.items() if not key.startswith("blocks.")}
    for new, old in enumerate(kept):
        prefix = f"blocks.{old}."
        for key, value in state.items():
            if key.startswith(prefix):
                found[f"blocks.{new}.{key.removeprefix(prefix)}"] = value
    return found


def build_classifier() -> nn.Sequential:
    """A small convolutional network; its last hidden layer (64 numbers) is the feature space."""

    def stage(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]

    body = [*stage(1, 32), *stage(32, 64), *stage(64, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def _scaled(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def train_classifier(path: Path, train: TensorImages, test: TensorImages, *, epochs: int) -> nn.Sequential:
    network = build_classifier()
    if path.exists():
        network.load_state_dict(load_file(path))
        return network.eval()
    torch.manual_seed(0)
    steps = epochs * (len(train) // 256)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=max(steps, 1))
    for _ in range(epochs):
        for indices in torch.randperm(len(train)).split(256)[: len(train) // 256]:
            loss = nn.functional.cross_entropy(network(_scaled(train.images[indices])), train.labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    save_file(network.eval().state_dict(), path)
    return network


@torch.inference_mode()
def features_and_classes(network: nn.Sequential, images: Tensor) -> tuple[Tensor, Tensor]:
    """``(count, 64)`` features and ``(count,)`` predicted classes of images in [-1, 1]."""
    found = [network[:-1](part) for part in images.split(1000)]
    features = torch.cat(found)
    return features.double(), network[-1](features).argmax(-1)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mean difference|^2 + tr(A + B - 2 (A B)^(1/2)) of two feature sets ``(count, dim)``, float64."""
    cov_a, cov_b = a.T.cov(), b.T.cov()
    cross = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Unbiased squared MMD with the cubic polynomial kernel (KID, Binkowski et al. 2018)."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    n, m = len(a), len(b)
    same_a, same_b = kernel(a, a), kernel(b, b)
    inner_a = (same_a.sum() - same_a.trace()) / (n * (n - 1))
    inner_b = (same_b.sum() - same_b.trace()) / (m * (m - 1))
    return float(inner_a + inner_b - 2 * kernel(a, b).mean())


def train_model(
    out: Path,
    model: FlexDiTTransformer2DModel,
    train: TensorImages,
    *,
    epochs: int,
    arguments: argparse.Namespace,
    teacher: nn.Module | None = None,
) -> FlexDiTTransformer2DModel:
    if not (out / "metrics.json").exists():
        data = MemoryBatches(train, mean=[0.5], std=[0.5])
        settings = default_fit_settings(
            epochs=epochs,
            batch_size=arguments.batch_size,
            lr=arguments.lr,
            warmup=0.05,
            final_lr=0.05,
            clip_grad=1.0,
            ema_decay=0.999,
            seed=arguments.train_seed,
            checkpoint_every=100,
        )
        weight = 0.0 if teacher is None else arguments.teacher_weight
        losses = FlexDiTSettings(flip=False, mode=arguments.mode, teacher_weight=weight)
        finetune(model, data, out=out, fit_settings=settings, settings=losses, teacher=teacher)
    return FlexDiTTransformer2DModel.from_pretrained(out).eval()


def load_start(name: str, shape: dict[str, Any]) -> FlexDiTTransformer2DModel:
    """The dense model that everything starts from.

    Raises:
        ValueError: it has another shape, or sparse layers.
    """
    model = sparing.create_model(name, pretrained=name in sparing.list_models(demo=True)).float()
    differs = [key for key, value in shape.items() if model.config[key] != value]
    if differs or model.has_sparse_layers:
        what = ", ".join(f"{key}={model.config[key]}" for key in differs) or "sparse layers"
        raise ValueError(f"--start {name} has {what}; this run trains {shape}")
    return model.eval()


def sample(
    path: Path, model: FlexDiTTransformer2DModel, *, count: int, seed: int, arguments: argparse.Namespace
) -> tuple[Tensor, Tensor, float]:
    """``(count, 1, H, W)`` images in [-1, 1], their classes, and images per second; every seed starts all models
    alike.
    """
    labels = torch.arange(count) % 10
    if path.exists():
        stored = load_file(path)
        return stored["images"].float() / 127.5 - 1, labels, float(stored["rate"])
    pipeline = FlexDiTPipeline(model, RespacedScheduler())
    pipeline.set_progress_bar_config(disable=True)
    generator, parts = torch.Generator().manual_seed(seed), []
    started = time.perf_counter()
    for chunk in labels.split(arguments.sample_batch):
        made = pipeline(
            chunk.tolist(),
            guidance_scale=arguments.guidance,
            num_inference_steps=arguments.steps,
            generator=generator,
            output_type="pt",
        )
        parts.append(made.images)
    rate = count / (time.perf_counter() - started)
    images = (torch.cat(parts) * 255).round().to(torch.uint8)
    save_file({"images": images, "rate": torch.tensor(rate)}, path)
    return images.float() / 127.5 - 1, labels, rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--patch", type=int, default=4, help="4: 7x7 tokens; 2: 14x14")
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=10, help="of the dense model")
    parser.add_argument(
        "--start", help="a trained dense DiT of this shape, a shipped name or folder, instead of --epochs"
    )
    parser.add_argument(
        "--teacher_weight",
        type=float,
        default=0.0,
        help="FlexDiTs also learn the dense model's noise that they start from",
    )
    parser.add_argument("--mode", default="bucket", help="bucket, piecewise or mixed: how steps draw densities")
    parser.add_argument("--finetune_epochs", type=int, default=6, help="further budget of every model")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--train_seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3, help="sets of samples")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--sample_batch", type=int, default=250)
    parser.add_argument("--only", nargs="*", help="variants to run; all when not given")
    parser.add_argument("--limit", type=int, default=0, help="training images to use, 0 = all")
    parser.add_argument("--smoke", action="store_true", help="sizes that run in a minute; its numbers mean nothing")
    parser.add_argument("--ship", action="store_true", help="write the models of --out into the zoo, train nothing")
    arguments = parser.parse_args()
    if arguments.ship:
        ship(arguments.out)
        return
    if arguments.smoke:
        small = {"width": 32, "epochs": 1, "finetune_epochs": 1, "samples": 40, "seeds": 2, "steps": 2, "limit": 512}
        vars(arguments).update(small)
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)

    train, test = (open_images(arguments.data, split=split, channels=1) for split in ("train", "test"))
    assert isinstance(train, TensorImages), "give a folder of idx files"
    assert isinstance(test, TensorImages), "give a folder of idx files"
    if arguments.limit:
        train = TensorImages(train.images[: arguments.limit], train.labels[: arguments.limit])
    classifier = train_classifier(out / "classifier.safetensors", train, test, epochs=1 if arguments.smoke else 8)
    real, predicted = features_and_classes(classifier, _scaled(test.images))
    results: dict[str, Any] = {
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items() if k != "data"},
        "classifier_test_accuracy": float((predicted == test.labels).float().mean()),
        "models": {},
    }

    shape = {
        "num_attention_heads": 4,
        "attention_head_dim": arguments.width // 4,
        "in_channels": 1,
        "out_channels": 2,
        "num_layers": 12,
        "sample_size": 28,
        "patch_size": arguments.patch,
        "num_embeds_ada_norm": 10,
    }
    torch.manual_seed(arguments.train_seed)
    if arguments.start:
        base = load_start(arguments.start, shape)
    else:
        fresh = FlexDiTTransformer2DModel(**shape, **_DENSE)
        base = train_model(out / "base", fresh, train, epochs=arguments.epochs, arguments=arguments)
    dense_macs = FlexDiTTransformer2DModel(**shape, **_DENSE).flops(count="reference")
    for name, (layout, table) in variants(28 // arguments.patch).items():
        if arguments.only and name not in arguments.only:
            continue
        state = keys.to_original(dict(base.named_parameters()))
        if layout is _SHALLOW:
            state = shallow(state, layout["num_dense_top"])
        start = FlexDiTTransformer2DModel.from_host(
            state, num_attention_heads=4, sample_size=28, density_table=table, **layout
        )
        teacher = copy.deepcopy(base) if arguments.teacher_weight and name != "dense" else None
        model = train_model(
            out / name, start, train, epochs=arguments.finetune_epochs, arguments=arguments, teacher=teacher
        )
        macs = model.flops(count="reference")
        scores: dict[str, list[float]] = {"fid": [], "kid": [], "accuracy": [], "images_per_second": []}
        for seed in range(arguments.seeds):
            drawn = f"{arguments.samples}x{arguments.steps}_guidance_{arguments.guidance:g}_seed_{seed}"
            path = out / name / f"samples_{drawn}.safetensors"
            images, labels, rate = sample(path, model, count=arguments.samples, seed=seed, arguments=arguments)
            features, classes = features_and_classes(classifier, images)
            scores["fid"].append(frechet_distance(features, real))
            scores["kid"].append(kernel_distance(features, real[: len(features)]))
            scores["accuracy"].append(float((classes == labels).float().mean()))
            scores["images_per_second"].append(rate)
            if seed == 0:
                grid = make_grid((images[:80] + 1) / 2, nrow=10, padding=1)
                write_image(to_pil_image(grid), out / f"sheet_{name}.png")
        results["models"][name] = {
            "gmacs": macs / 1e9,
            "share_of_dense": macs / dense_macs,
            "knobs": model.knobs,
            "status": model.status,
            **scores,
        }
        write_json(out / "results.json", results)
        (out / "table.md").write_text(table_of(results), encoding="utf-8")
    print((out / "table.md").read_text(encoding="utf-8"))


SHIPPED_NAMES = {
    "dense": "dit_micro_patch4_28.demo_fashion",
    "b_split_3x3": "flexdit_dit_micro_patch4_28.demo_fashion",
    "two_long_3x3": "flexdit_dit_micro_patch4_28_low.demo_fashion",
}


def ship(out: Path) -> None:
    """The finished models of ``out`` as float16 weights of the zoo, with their cards."""
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    settings, dense = results["settings"], results["models"]["dense"]
    for row, name in SHIPPED_NAMES.items():
        model = FlexDiTTransformer2DModel.from_pretrained(out / row).half()
        path = SHIPPED / f"{name}.safetensors"
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
        found = results["models"][row]
        measured = {
            "classifier_fid": round(mean(found["fid"]), 3),
            "classifier_fid_of_dense": round(mean(dense["fid"]), 3),
            "class_accuracy_percent": round(100 * mean(found["accuracy"]), 2),
            "reference_macs": round(1e9 * found["gmacs"]),
            "share_of_dense_macs": round(found["share_of_dense"], 3),
            "file_bytes": path.stat().st_size,
            "weights_dtype": "float16",
        }
        card = {
            "training": f"benchmarks/flexdit_quality.py --width {settings['width']} --epochs {settings['epochs']} "
            f"--finetune_epochs {settings['finetune_epochs']}: dense from scratch, then {row} from it",
            "license": {"code": "apache-2.0", "weights": "apache-2.0", "data": "mit"},
            "measured": measured,
        }
        write_json(SHIPPED / f"{name}.json", card)
    print(f"shipped {', '.join(SHIPPED_NAMES.values())}")


def table_of(results: dict[str, Any]) -> str:
    """Markdown: mean (spread over sample seeds) of each score, and its ratio to the dense model's."""
    settings = results["settings"]
    lines = [
        f"Fashion-MNIST, {settings['samples']} samples x {settings['seeds']} seeds, {settings['steps']} steps, "
        f"guidance "
        f"{settings['guidance']}; classifier accuracy on real test images {results['classifier_test_accuracy']:.4f}. "
        "Distances in that classifier's features; not Inception FID.",
        "",
        "| model | MMACs | of dense | classifier-FID | ratio | classifier-KID x1000 | class accuracy | images/s |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def spread(values: list[float], digits: int, factor: float = 1.0) -> str:
        values = [factor * value for value in values]
        around = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{mean(values):.{digits}f}{around}"

    dense = results["models"].get("dense")
    for name, row in results["models"].items():
        ratio = f"{mean(row['fid']) / mean(dense['fid']):.3f}" if dense else "-"
        lines.append(
            f"| {name} | {1000 * row['gmacs']:.2f} | {row['share_of_dense']:.3f} | {spread(row['fid'], 3)} | {ratio} | "
            f"{spread(row['kid'], 3, 1000)} | {spread(row['accuracy'], 4)} | {spread(row['images_per_second'], 1)} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
