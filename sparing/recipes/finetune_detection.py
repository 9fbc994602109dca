"""Fine-tune a torchvision detector on a host or twin backbone; COCO mAP of boxes and masks on the held-out split.

    python -m sparing.recipes.emoji_scenes --emoji google.tar --out DATA
    python -m sparing.recipes.finetune_detection --data DATA --out runs/det \
        --backbone stvit_r_swin_tiny_patch4_window7_224 --backbone_arguments '{"dense": true}' --epochs 12

``--data``: COCO json, the Penn-Fudan layout or its zip, ``torchvision/VOCDetection@ROOT``
(``sparing.recipes.detection_data``). ``--twin METHOD --knobs JSON`` makes a twin of the backbone;
``--backbone_weights DIR_OR_FILE`` starts it from weights trained elsewhere, ``--start DIR`` the whole detector from
another run of this recipe. A run that was stopped goes on when the
same command is given again; several processes: ``accelerate launch -m sparing.recipes.finetune_detection``. The
folder ``--out`` then holds the detector (``sparing detect --weights OUT``) and metrics.json.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import sparing
from sparing.recipes.detection_data import DetectionBatches, open_detection
from sparing.training import FitSettings, fit, write_json
from sparing.training.loop import finished_run, run_identity
from sparing.vision.detection import (
    DETECTORS,
    DetectorConfig,
    backbone_twin,
    build_detector,
    load_detector,
    save_detector,
)
from sparing.zoo.fingerprints import network_fingerprint

__all__ = ["finetune_detection", "mean_average_precision"]


def finetune_detection(
    config: DetectorConfig,
    data: str,
    *,
    out: str | Path,
    fit_settings: FitSettings | None = None,
    backbone: nn.Module | None = None,
    start: str | Path | None = None,
    on_step: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Fine-tune the detector of ``config`` on ``data`` and write it to ``out``.

    Args:
        config: the detector; its classes must be those of the data.
        data: see :func:`sparing.recipes.detection_data.open_detection`.
        out: folder for the detector, metrics.json and, until the end, the checkpoint.
        fit_settings: duration, rates, seed.
        backbone: a live host or twin instead of the one that ``config`` names.
        start: folder of a trained detector to begin from: pyramid and heads, and without ``backbone`` the backbone
            too. Predictors for another number of classes, and whatever else has another shape, begin afresh.
        on_step: called with the number of optimizer steps done.

    Returns:
        What metrics.json holds: settings, history, mAP on the held-out split.

    Raises:
        ValueError: masks are needed and the data has none, other classes than the config's, or a ``start`` of which
            nothing fits.
    """
    fit_settings, out = fit_settings or FitSettings(epochs=12, batch_size=2, lr=1e-4), Path(out)
    training, testing = open_detection(data, split="train"), open_detection(data, split="test")
    if list(config.classes) != training.classes or training.classes != testing.classes:
        raise ValueError(f"the detector's classes are {list(config.classes)}, the data's {training.classes}")
    if config.detector == "mask_rcnn" and not training.has_masks:
        raise ValueError(f"mask_rcnn needs masks, {training.name} has boxes only: use faster_rcnn, retinanet or fcos")
    started = time.perf_counter()
    torch.manual_seed(fit_settings.seed)  # initial weights of the heads
    model = build_detector(config, backbone)
    if start is not None:
        _begin_from(model, start, but=("backbone.body.",) if backbone is not None else ())
    batches: Any = DetectionBatches(training, seed=fit_settings.seed)
    identity = {**run_identity(batches), **asdict(config)}
    # where training begins from: not asked when a stopped run goes on, which may have changed the model in place
    whole = {**identity, "start": network_fingerprint(model)}
    if (finished := finished_run(out, fit_settings, whole)) is not None:
        return finished
    held_out = DetectionBatches(testing)

    def loss_of(module: nn.Module, batch: Any) -> Tensor:
        losses: dict[str, Tensor] = module(list(batch.images), list(batch.labels))
        return torch.stack([value.float() for value in losses.values()]).sum()

    def evaluate(module: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        return mean_average_precision(module, held_out, accelerator=accelerator)

    best, history = fit(
        model,
        loss_of,
        batches,
        settings=fit_settings,
        out=out,
        evaluate=evaluate,
        on_step=on_step,
        identity=identity,
    )
    metrics = {
        "data": str(data).rstrip("/").rpartition("/")[2],
        "train_samples": len(training),
        "test_samples": len(testing),
        **{name: value for name, value in history[-1].items() if name.startswith(("box", "mask"))},
        "history": history,
        "detector": asdict(config),
        "fit": asdict(fit_settings),
        "identity": whole,
        "versions": {"sparing": sparing.__version__, "torch": torch.__version__},
        "device": str(next(best.parameters()).device),
        "wall_seconds": time.perf_counter() - started,
    }
    if Accelerator().is_main_process:
        best.config = config  # type: ignore[assignment]
        if (twin := backbone_twin(best)) is not None:
            twin.status = "trained"
        save_detector(best, out)
        write_json(out / "metrics.json", metrics)
        (out / "checkpoint.pt").unlink(missing_ok=True)
    return metrics


def _begin_from(model: nn.Module, folder: str | Path, *, but: tuple[str, ...]) -> None:
    """Copy the tensors of the detector in ``folder`` that fit ``model``, but for names under ``but``."""
    own = model.state_dict()
    found = {
        name: value
        for name, value in load_detector(folder).state_dict().items()
        if name in own and own[name].shape == value.shape and not name.startswith(but)
    }
    if not found:
        raise ValueError(f"nothing of the detector in {str(folder)!r} fits: no tensor has the same name and shape")
    model.load_state_dict(found, strict=False)


@torch.inference_mode()
def mean_average_precision(
    model: nn.Module, data: DetectionBatches, *, accelerator: Accelerator | None = None
) -> dict[str, float]:
    """COCO average precision on all samples: ``box_ap``, ``box_ap50``, ``box_ap75`` and, with masks, ``mask_...``.

    Predictions of every rank are gathered by torchmetrics; -1 (nothing to find) is kept as pycocotools gives it.
    """
    from torchmetrics.detection import MeanAveragePrecision

    device = next(model.parameters()).device
    rank, world_size = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    was_training = model.training
    model.eval()
    config: Any = model.config
    kinds = ("bbox", "segm") if config.detector == "mask_rcnn" else ("bbox",)
    metric = MeanAveragePrecision(iou_type=kinds, backend="pycocotools")
    for index in range(rank, len(data), world_size):
        image, target = data.load(index, None)
        found = {name: value.cpu() for name, value in model([image.to(device)])[0].items()}
        prediction = {name: found[name] for name in ("boxes", "scores", "labels")}
        wanted = {name: target[name] for name in ("boxes", "labels")}
        if "segm" in kinds:
            prediction["masks"] = found["masks"][:, 0] > 0.5
            wanted["masks"] = target["masks"].bool()
        metric.update([prediction], [wanted])
    result = metric.compute()
    model.train(was_training)
    named = {"box": "bbox_" if len(kinds) == 2 else "", "mask": "segm_"}
    return {
        f"{ours}_{name}": float(result[f"{theirs}{key}"])
        for ours, theirs in list(named.items())[: len(kinds)]
        for name, key in (("ap", "map"), ("ap50", "map_50"), ("ap75", "map_75"))
    }


@dataclass
class Arguments:
    """What to train, on what, and where to."""

    data: str = field(metadata={"help": "COCO json or its folder, Penn-Fudan folder or zip, torchvision/NAME@ROOT"})
    out: str = field(metadata={"help": "folder of the run; the same folder resumes a run that was stopped"})
    backbone: str = field(metadata={"help": "a name for sparing.create_model, e.g. timm/NAME"})
    backbone_arguments: str = field(default="{}", metadata={"help": "its keywords, as JSON"})
    backbone_weights: str = field(default="", metadata={"help": "weights to start the backbone from (file or folder)"})
    twin: str = field(default="", metadata={"help": "a method to make a twin of the backbone by"})
    knobs: str = field(default="{}", metadata={"help": "the twin's keywords, as JSON"})
    detector: str = field(default="mask_rcnn", metadata={"help": ", ".join(DETECTORS)})
    out_channels: int = field(default=256, metadata={"help": "width of the pyramid"})
    min_size: int = field(default=800, metadata={"help": "shorter side in pixels that images are resized to"})
    max_size: int = field(default=1333, metadata={"help": "longest side in pixels after that"})
    mask_channels: int = field(default=256, metadata={"help": "width of the mask head"})
    detector_arguments: str = field(default="{}", metadata={"help": "keywords of torchvision's class, as JSON"})
    start: str = field(default="", metadata={"help": "folder of a trained detector to begin from"})


def _backbone_with_weights(wanted: Arguments, config: DetectorConfig) -> nn.Module | None:
    """The backbone from ``--backbone_weights``: loaded into the host, before a twin is made of it."""
    if not wanted.backbone_weights:
        return None
    from sparing.zoo.weights import load_checkpoint

    model = sparing.create_model(config.backbone, **config.backbone_arguments)
    load_checkpoint(model, wanted.backbone_weights)
    return sparing.twin(model, config.twin, **config.knobs) if config.twin else model


def main(arguments: list[str] | None = None) -> int:
    """Command line; see ``--help``."""
    from transformers import HfArgumentParser

    defaults = {"epochs": 12, "batch_size": 2, "lr": 1e-4}
    parser = HfArgumentParser([Arguments, FitSettings], description=__doc__)
    parser.set_defaults(**defaults)
    wanted, fit_settings = parser.parse_args_into_dataclasses(arguments)
    try:
        config = DetectorConfig(
            classes=open_detection(wanted.data, split="train").classes,
            backbone=wanted.backbone,
            detector=wanted.detector,
            backbone_arguments=json.loads(wanted.backbone_arguments),
            twin=wanted.twin or None,
            knobs=json.loads(wanted.knobs),
            out_channels=wanted.out_channels,
            min_size=wanted.min_size,
            max_size=wanted.max_size,
            mask_channels=wanted.mask_channels,
            detector_arguments=json.loads(wanted.detector_arguments),
        )
        torch.manual_seed(fit_settings.seed)
        backbone = _backbone_with_weights(wanted, config)
        metrics = finetune_detection(
            config,
            wanted.data,
            out=wanted.out,
            fit_settings=fit_settings,
            backbone=backbone,
            start=wanted.start or None,
        )
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    scores = ", ".join(f"{n} {metrics[n]:.3f}" for n in ("box_ap", "box_ap50", "mask_ap", "mask_ap50") if n in metrics)
    print(f"{scores} on {metrics['test_samples']} images; detector in {wanted.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
