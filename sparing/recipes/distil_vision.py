"""Distil a host into its twin from unlabelled images.

    python -m sparing.recipes.distil_vision --host timm/vit_small_patch14_dinov2.lvd142m --images DIR --out runs/twin
    accelerate launch -m sparing.recipes.distil_vision --preset h100_hour \
        --host timm/vit_base_patch16_siglip_224.webli --images DIR --out runs/twin --num_workers 14

The twin starts from the host's weights and learns to say what the host says: the KL divergence between their class
probabilities (hosts with a head) and the cosine between their pooled features, on the same augmented images. No label
is
read. A part of the images is held out; agreement on it, before and after, goes into metrics.json beside the twin that
``sparing.load(OUT)`` brings back. A run that was stopped goes on when the same command is given again.

``--preset h100_hour`` is sized for about one hour on one H100 (docs/training.md has the estimate behind it).
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
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
    epoch_order,
    fit,
    image_batches,
    write_json,
)
from sparing.training.loop import finished_run, run_identity
from sparing.zoo.compare import feature_cosine, pooled_features, top1_agreement
from sparing.zoo.fingerprints import network_fingerprint

__all__ = ["PRESETS", "DistilSettings", "distill", "held_out_agreement"]

# Flags that stand in for their defaults; any of them may still be given. h100_hour: about ten million images in bf16.
PRESETS: dict[str, dict[str, Any]] = {
    "h100_hour": {
        "precision": "bf16",
        "batch_size": 512,
        "lr": 1e-4,
        "warmup": 0.05,
        "weight_decay": 0.02,
        "ema_decay": 0.9995,
        "images_budget": 10_000_000,
    },
}


@dataclass(frozen=True)
class DistilSettings:
    """The loss, and what is held out."""

    logit_weight: float = field(default=1.0, metadata={"help": "on the KL divergence between class probabilities"})
    feature_weight: float = field(default=1.0, metadata={"help": "on 1 - cosine of pooled features"})
    temperature: float = field(default=1.0, metadata={"help": "softens both class probabilities"})
    hold_out: float = field(default=0.05, metadata={"help": "share of the images kept for measuring, at most 2,000"})


class _WithFeatures(nn.Module):
    """Logits (None without a head) and pooled features in one forward, as DDP needs it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor | None, Tensor]:
        model: Any = self.model
        tokens = model.forward_features(images)
        logits = model.forward_head(tokens) if model.num_classes else None
        return logits, model.forward_head(tokens, pre_logits=True)


class _Part:
    """The samples of ``source`` at ``places``; their indices, hence their random draws, stay those of the source."""

    def __init__(self, source: BatchSource, places: Tensor) -> None:
        self.source, self.places, self.num_classes = source, places, source.num_classes

    def __len__(self) -> int:
        return len(self.places)

    def batches(self, order: Tensor, *, batch_size: int, epoch: int) -> Any:
        return self.source.batches(self.places[order], batch_size=batch_size, epoch=epoch)


def distill(
    host: nn.Module | str,
    images: str,
    *,
    out: str | Path,
    method: str = "stvit",
    knobs: Mapping[str, Any] | None = None,
    fit_settings: FitSettings | None = None,
    settings: DistilSettings | None = None,
    image_settings: ImageSettings | None = None,
    on_step: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Make the twin of ``host`` and train it to agree with the host; write it to ``out``.

    Args:
        host: a live model with timm's ``forward_features`` and ``forward_head``, or a name (its published weights).
        images: see :func:`sparing.training.open_images`; labels are not read.
        out: folder for the twin, metrics.json and, until the end, the checkpoint.
        method: of the twin.
        knobs: of the twin, e.g. ``{'num_tokens': 16}``.
        fit_settings: duration, rates, seed.
        settings: the loss.
        image_settings: augmentation.
        on_step: called with the number of optimizer steps done.

    Returns:
        What metrics.json holds: agreement before and after, history, settings.

    Raises:
        TypeError: the host has no features to compare.
        ValueError: the method does not apply to the host, or the images do not fit it.
    """
    fit_settings, settings, out = fit_settings or FitSettings(), settings or DistilSettings(), Path(out)
    started = time.perf_counter()
    name = host if isinstance(host, str) else type(host).__name__
    if isinstance(host, str):
        host = _host(host)
    if not (hasattr(host, "forward_features") and hasattr(host, "forward_head")):
        raise TypeError(f"distilling needs timm's forward_features and forward_head; {type(host).__name__} lacks them")
    if not 0.0 < settings.hold_out < 1.0:
        raise ValueError(f"hold_out is a share of the images between 0 and 1, got {settings.hold_out}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fit_settings.seed)
        twin = sparing.twin(host, method, **(knobs or {}))
    host.requires_grad_(False).eval()
    fresh = {f"model.{key}" for key in dict(twin.named_parameters()).keys() - dict(host.named_parameters()).keys()}

    plain = image_batches(host, images, labelled=False, settings=image_settings)
    varied = image_batches(host, images, labelled=False, augment=True, settings=image_settings, seed=fit_settings.seed)
    places = epoch_order(len(plain), seed=fit_settings.seed, epoch=0)
    held = min(max(int(settings.hold_out * len(plain)), 1), 2000)
    training, held_out = _Part(varied, places[held:].sort().values), _Part(plain, places[:held].sort().values)
    if not len(training):
        raise ValueError(f"{images} holds {len(plain)} images: too few to hold any out and train on the rest")

    identity = {
        **run_identity(varied, settings, image_settings or ImageSettings()),
        "host": name,
        "weights": network_fingerprint(host),
        "method": method,
        "knobs": twin.knobs,
    }
    if (finished := finished_run(out, fit_settings, identity)) is not None:
        return finished
    teacher = _WithFeatures(host)
    device = Accelerator().device
    host.to(device)

    def loss_of(module: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            host_logits, host_features = teacher(batch.images)
        logits, features = module(batch.images)
        cosine = nn.functional.cosine_similarity(features.float(), host_features.float(), dim=-1)
        loss = settings.feature_weight * (1.0 - cosine).mean()
        if logits is not None and settings.logit_weight:
            divergence = nn.functional.kl_div(
                (logits.float() / settings.temperature).log_softmax(-1),
                (host_logits.float() / settings.temperature).log_softmax(-1),
                reduction="batchmean",
                log_target=True,
            )
            loss = loss + settings.logit_weight * settings.temperature**2 * divergence
        return loss

    def evaluate(module: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        return held_out_agreement(module.model, host, held_out)  # type: ignore[arg-type]

    before = held_out_agreement(twin.to(device), host, held_out)
    best, history = fit(
        _WithFeatures(twin),
        loss_of,
        training,
        settings=fit_settings,
        out=out,
        fresh=fresh,
        evaluate=evaluate,
        on_step=on_step,
        identity=identity,
    )
    trained: Any = best.model
    if trained.status == "converted, not trained":
        trained.status = "trained"
    metrics = {
        "host": name,
        "method": method,
        "knobs": trained.knobs,
        "images": len(plain),
        "held_out": held,
        "before": before,
        "after": {key: history[-1][key] for key in before},
        "history": history,
        "fit": asdict(fit_settings),
        "identity": identity,
        "distil": asdict(settings),
        "augmentation": asdict(image_settings or ImageSettings()),
        "versions": {"sparing": sparing.__version__, "torch": torch.__version__},
        "device": str(device),
        "wall_seconds": time.perf_counter() - started,
    }
    if Accelerator().is_main_process:
        trained.save_pretrained(out)
        write_json(out / "metrics.json", metrics)
        (out / "checkpoint.pt").unlink(missing_ok=True)
    return metrics


@torch.inference_mode()
def held_out_agreement(
    twin: nn.Module, host: nn.Module, data: BatchSource, *, batch_size: int = 100
) -> dict[str, float]:
    """``feature_cosine`` and, where both have heads, ``top1_agreement`` of twin and host over all samples."""
    device = next(host.parameters()).device
    modes = twin.training, host.training
    twin.eval()
    host.eval()
    features, logits = [], []
    for batch in data.batches(torch.arange(len(data)), batch_size=batch_size, epoch=0):
        images = batch.images.to(device)
        features.append([pooled_features(model, images) for model in (twin, host)])
        logits.append([model(images) if model.num_classes else None for model in (twin, host)])
    twin.train(modes[0])
    host.train(modes[1])
    found = {
        "feature_cosine": feature_cosine(*(_together(part) for part in zip(*features, strict=True))),
        "top1_agreement": top1_agreement(*(_together(part) for part in zip(*logits, strict=True))),
    }
    return {key: value for key, value in found.items() if value is not None}


def _together(parts: Any) -> Tensor | None:
    return None if any(part is None for part in parts) else torch.cat(list(parts))


@dataclass(frozen=True)
class Arguments:
    """Which host, which images, into which folder."""

    host: str = field(metadata={"help": "timm/NAME, a name of the zoo, or a saved folder"})
    images: str = field(metadata={"help": "images without labels: any folder, idx files, WebDataset tars"})
    out: str = field(metadata={"help": "folder of the run; the same folder resumes"})
    host_weights: str = field(default="", metadata={"help": "file or folder with weights of your own for the host"})
    method: str = field(default="stvit", metadata={"help": "method of the twin"})
    knobs: str = field(default="{}", metadata={"help": 'knobs of the twin as JSON, e.g. {"num_tokens": 16}'})
    images_budget: int = field(default=0, metadata={"help": "images to see in all; sets the epochs, 0 = off"})
    preset: str = field(default="", metadata={"help": f"other defaults: {', '.join(PRESETS)}"})


def main(arguments: list[str] | None = None) -> int:
    """Command line; see ``--help``."""
    from dataclasses import replace

    from transformers import HfArgumentParser

    parser = HfArgumentParser([Arguments, FitSettings, DistilSettings, ImageSettings], description=__doc__)
    preset = _preset_of(sys.argv[1:] if arguments is None else arguments)
    try:
        if preset:
            if preset not in PRESETS:
                raise ValueError(f"unknown preset {preset!r}; there are {', '.join(PRESETS)}")
            parser.set_defaults(**PRESETS[preset])
        wanted, fit_settings, settings, image_settings = parser.parse_args_into_dataclasses(arguments)
        try:
            knobs = json.loads(wanted.knobs)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"--knobs takes a JSON object such as '{{\"num_tokens\": 16}}', got {wanted.knobs!r}"
            ) from error
        if not isinstance(knobs, dict):
            raise ValueError(f"--knobs takes a JSON object, got {wanted.knobs!r}")
        host = _host(wanted.host, wanted.host_weights)
        if wanted.images_budget:
            count = len(image_batches(host, wanted.images, labelled=False))
            fit_settings = replace(fit_settings, epochs=max(1, round(wanted.images_budget / count)))
        metrics = distill(
            host,
            wanted.images,
            out=wanted.out,
            method=wanted.method,
            knobs=knobs,
            fit_settings=fit_settings,
            settings=settings,
            image_settings=image_settings,
        )
    except (ValueError, TypeError, OSError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if Accelerator().is_main_process:
        for key, value in metrics["after"].items():
            print(f"{key.replace('_', ' ')} with the host: {metrics['before'][key]:.4f} before, {value:.4f} after")
        print(f"twin in {wanted.out}: sparing.load({wanted.out!r})")
    return 0


def _host(name: str, weights: str = "") -> nn.Module:
    if weights:
        return sparing.create_model(name, checkpoint_path=weights)
    return sparing.create_model(name, pretrained=not Path(name).is_dir())


def _preset_of(arguments: list[str]) -> str:
    for place, argument in enumerate(arguments):
        if argument.startswith("--preset="):
            return argument.removeprefix("--preset=")
        if argument == "--preset" and place + 1 < len(arguments):
            return arguments[place + 1]
    return ""


if __name__ == "__main__":
    sys.exit(main())
