"""Train or fine-tune an image classifier, host or twin, with labels.

    python -m sparing.recipes.train_vision --model vit_micro_patch4_28 --data DIR --out runs/host --epochs 6
    accelerate launch -m sparing.recipes.train_vision --model stvit_deit_small_patch16_224 --host_pretrained \
        --data IMAGENET --out runs/stvit --epochs 30 --lr 5e-5 --mixup 0.8 --cutmix 1.0 --rand_augment 2 --ema_decay
        0.9999

``--data`` is a folder with one folder a class, a folder of gzipped idx files, ``torchvision/NAME@ROOT``, or
WebDataset tars
(:func:`sparing.training.open_images`). A run that was stopped goes on when the same command is given again. The folder
``--out`` then holds the model (``sparing.load`` for a twin, ``timm.create_model('local-dir:OUT')`` for a timm host) and
metrics.json.
"""

import sys
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import sparing
from sparing.training import (
    Batch,
    BatchSource,
    FitSettings,
    ImageSettings,
    MixBatch,
    fit,
    image_batches,
    save_weights,
    write_json,
)
from sparing.training.loop import finished_run, run_identity
from sparing.zoo.fingerprints import network_fingerprint

__all__ = ["TrainSettings", "accuracy", "save_model", "train"]


@dataclass(frozen=True)
class TrainSettings:
    """The loss, and how images of a batch are mixed."""

    label_smoothing: float = field(default=0.1, metadata={"help": "share of the target spread over all classes"})
    mixup: float = field(default=0.0, metadata={"help": "alpha of mixup, 0 = off"})
    cutmix: float = field(default=0.0, metadata={"help": "alpha of cutmix, 0 = off"})


def train(
    model: nn.Module,
    data: str,
    *,
    out: str | Path,
    fit_settings: FitSettings | None = None,
    settings: TrainSettings | None = None,
    image_settings: ImageSettings | None = None,
    fresh: Collection[str] = (),
    on_step: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Train ``model`` on ``data`` and write it to ``out``.

    Args:
        model: a classifier with ``pretrained_cfg`` (timm's: input size, mean, std) and (batch, classes) logits.
        data: see :func:`sparing.training.open_images`.
        out: folder for the model, metrics.json and, until the end, the checkpoint.
        fit_settings: duration, rates, seed.
        settings: loss and mixing.
        image_settings: augmentation.
        fresh: names of parameters that the host did not have; they train with a higher rate.
        on_step: called with the number of optimizer steps done.

    Returns:
        What metrics.json holds: settings, history, test accuracy of the saved file's weights.
    """
    fit_settings, settings, out = fit_settings or FitSettings(), settings or TrainSettings(), Path(out)
    image_settings = image_settings or ImageSettings()
    started = time.perf_counter()
    training = image_batches(model, data, augment=True, settings=image_settings, seed=fit_settings.seed)
    testing = image_batches(model, data, split="test", settings=image_settings)
    num_classes = int(model.num_classes)  # type: ignore[arg-type]
    if training.num_classes > num_classes:
        raise ValueError(
            f"{data} has {training.num_classes} classes, the model has {num_classes}: "
            f"create it with num_classes={training.num_classes}"
        )
    identity = run_identity(training, settings, image_settings)
    # where training begins from: not asked when a stopped run goes on, which may have changed the model in place
    whole = {**identity, "knobs": getattr(model, "knobs", None), "start": network_fingerprint(model)}
    if (finished := finished_run(out, fit_settings, whole)) is not None:
        return finished
    mix = None
    if settings.mixup or settings.cutmix:
        mix = MixBatch(num_classes, mixup=settings.mixup, cutmix=settings.cutmix)

    def loss_of(module: nn.Module, batch: Batch) -> Tensor:
        images, targets = batch.images, batch.labels
        if mix is not None:
            images, targets = mix(images, targets, seed=fit_settings.seed, epoch=batch.epoch, indices=batch.indices)
        return nn.functional.cross_entropy(module(images).float(), targets, label_smoothing=settings.label_smoothing)

    def evaluate(module: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        return {"test_accuracy": accuracy(module, testing, accelerator=accelerator)}

    best, history = fit(
        model,
        loss_of,
        training,
        settings=fit_settings,
        out=out,
        fresh=fresh,
        evaluate=evaluate,
        on_step=on_step,
        identity=identity,
    )
    if hasattr(best, "status"):
        best.status = "trained"
    metrics = {
        "data": data.rstrip("/").rpartition("/")[2],
        "test_accuracy": history[-1]["test_accuracy"],
        "test_samples": len(testing),
        "history": history,
        "fit": asdict(fit_settings),
        "identity": whole,
        "train": asdict(settings),
        "images": asdict(image_settings),
        "versions": {"sparing": sparing.__version__, "torch": torch.__version__},
        "device": str(next(best.parameters()).device),
        "wall_seconds": time.perf_counter() - started,
    }
    if Accelerator().is_main_process:
        save_model(best, out)
        write_json(out / "metrics.json", metrics)
        (out / "checkpoint.pt").unlink(missing_ok=True)
    return metrics


@torch.inference_mode()
def accuracy(
    model: nn.Module, data: BatchSource, *, batch_size: int = 500, accelerator: Accelerator | None = None
) -> float:
    """Top-1 accuracy over all samples, in [0, 1]; each rank takes its share of them."""
    device = next(model.parameters()).device
    rank, world_size = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    was_training = model.training
    model.eval()
    order = torch.arange(len(data))[rank::world_size]
    correct = torch.zeros((), dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
    for batch in data.batches(order, batch_size=batch_size, epoch=0):
        correct += (model(batch.images.to(device)).argmax(-1) == batch.labels.to(device)).sum()
    model.train(was_training)
    if accelerator is not None:
        correct = accelerator.reduce(correct)
    return correct.item() / len(data)


def save_model(model: nn.Module, out: Path) -> None:
    """A twin by its own ``save_pretrained``; a timm model as a folder that ``timm.create_model('local-dir:...')``
    reads."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(out)
        return
    config: Any = model.pretrained_cfg
    config = dict(config if isinstance(config, dict) else config.to_dict())
    save_weights(out / "model.safetensors", model)
    card = {
        "architecture": config.get("architecture"),
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "pretrained_cfg": {key: value for key, value in config.items() if value is not None},
    }
    write_json(out / "config.json", card)


@dataclass(frozen=True)
class Arguments:
    """What to train, on what, into which folder."""

    model: str = field(metadata={"help": "a name of the zoo, timm/NAME, or a saved folder"})
    data: str = field(metadata={"help": "training data with labels"})
    out: str = field(metadata={"help": "folder of the run; the same folder resumes"})
    num_classes: int = field(default=0, metadata={"help": "0 = as many as the model has"})
    pretrained: bool = field(default=False, metadata={"help": "start from the model's own published weights"})
    host_pretrained: bool = field(default=False, metadata={"help": "start a twin from its host's published weights"})


def main(arguments: list[str] | None = None) -> int:
    """Command line; see ``--help``."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser([Arguments, FitSettings, TrainSettings, ImageSettings], description=__doc__)
    wanted, fit_settings, settings, image_settings = parser.parse_args_into_dataclasses(arguments)
    try:
        extra: dict[str, Any] = {"num_classes": wanted.num_classes} if wanted.num_classes else {}
        if wanted.host_pretrained:
            extra["host_pretrained"] = True
        torch.manual_seed(fit_settings.seed)  # initial weights
        model = sparing.create_model(wanted.model, pretrained=wanted.pretrained, **extra)
        fresh: set[str] = set()
        if wanted.host_pretrained:
            host = sparing.create_model(str(sparing.model_card(wanted.model).host), device="meta")
            fresh = dict(model.named_parameters()).keys() - dict(host.named_parameters()).keys()
        metrics = train(
            model,
            wanted.data,
            out=wanted.out,
            fit_settings=fit_settings,
            settings=settings,
            image_settings=image_settings,
            fresh=fresh,
        )
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if Accelerator().is_main_process:
        share, count = 100 * metrics["test_accuracy"], metrics["test_samples"]
        print(f"test accuracy {share:.2f}% on {count} images; model in {wanted.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
