"""Train a clip network on labelled video or audio, and leave it as a continual network that runs on live streams.

    python -m sparing.recipes.train_clip --model co_spotter_micro --data DATA/digits/manifest.csv --out runs/digits \
        --epochs 12 --batch_size 64 --lag 12
    python -m sparing.recipes.train_clip --model torchvision/r3d_18 --data VIDEOS --out runs/r3d --size 112 \
        --clip_frames 16
    sparing stream recording.wav --model runs/digits

``--model`` is a continual network of the zoo that takes video or samples, or a video network of torchvision
(``torchvision/r3d_18``, ``mc3_18``, ``r2plus1d_18``, ``s3d``); ``--options`` is JSON for its entry point. ``--data``
is a folder with one folder a class or a CSV manifest (:mod:`sparing.recipes.clip_data`). Training is ordinary clip
training; nothing in it knows of streams, except that ``--online`` lets squeeze-excitation see what a stream sees. A
run that was stopped goes on when the same command is given again. ``--out`` then holds the model (``sparing.load``,
``sparing stream``), metrics.json and, where files were left out, bad_files.json with the reasons.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import sparing
from sparing.continual import RecyclingPositionalEncoding
from sparing.continual.twin import ContinualTwin
from sparing.recipes.clip_data import ClipBatches, ClipFormat, ClipSet, open_clips
from sparing.training import Batch, BatchSource, FitSettings, fit, shift_and_flip, uniforms, write_json
from sparing.training.loop import finished_run, run_identity
from sparing.zoo.fingerprints import network_fingerprint

__all__ = ["ClipSettings", "clip_accuracy", "clip_format", "normalise", "train_clip"]

# What the published video networks were trained with.
MEAN, STD = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)
_VARY_STREAM, _POSITION_STREAM = 23, 24


@dataclass(frozen=True)
class ClipSettings:
    """What a clip is, how it is varied, and the loss."""

    clip_frames: int = field(default=0, metadata={"help": "frames (audio: hops) of a clip, 0 = the model's own"})
    size: int = field(default=0, metadata={"help": "height and width of video frames, 0 = the model's own"})
    every: int = field(default=1, metadata={"help": "take each n-th frame of a video"})
    lag: int = field(default=0, metadata={"help": "frames between what a span's label means and the clip's end"})
    online: bool = field(default=False, metadata={"help": "squeeze-excitation as on a stream (CoX3D)"})
    label_smoothing: float = field(default=0.0, metadata={"help": "share of the target spread over all classes"})
    max_shift: int = field(default=0, metadata={"help": "pixels that a video clip is moved by at most"})
    flip: bool = field(default=False, metadata={"help": "mirror half of the video clips (left becomes right)"})
    jitter: float = field(default=0.0, metadata={"help": "brightness and contrast of a video clip vary by this share"})
    gain_db: float = field(default=0.0, metadata={"help": "loudness of an audio clip varies by this many dB"})
    noise_db: float = field(default=0.0, metadata={"help": "add noise this many dB or more below full scale, 0 = none"})
    cache_mb: int = field(default=2048, metadata={"help": "decoded files kept in memory, MB"})


def check_settings(settings: ClipSettings) -> None:
    """Raise ValueError for numbers that mean nothing."""
    least = {"clip_frames": 0, "size": 0, "every": 1, "label_smoothing": 0, "max_shift": 0, "cache_mb": 0}
    for name, lowest in least.items():
        if not getattr(settings, name) >= lowest:
            raise ValueError(f"--{name} must be at least {lowest}, got {getattr(settings, name)}")
    if settings.label_smoothing > 1:
        raise ValueError(f"--label_smoothing must be at most 1, got {settings.label_smoothing}")


def parse_options(text: str) -> dict[str, Any]:
    """``--options``: JSON of arguments by name. Raises ValueError for anything else."""
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f'--options must be JSON, like {{"num_layers": 2}}, got {text!r}: {error}') from error
    if not isinstance(options, dict):
        raise ValueError(f"--options must be a JSON object of arguments by name, got {text!r}")
    return options


def clip_format(model: Any, settings: ClipSettings) -> ClipFormat:
    """What ``model`` takes, by its ``pretrained_cfg`` and what ``settings`` say instead.

    Raises:
        ValueError: the model says neither that it takes video nor that it takes samples, a size is not known, or a
            setting is out of range.
    """
    check_settings(settings)
    config = getattr(model, "pretrained_cfg", None) or {}
    kind = config.get("kind")
    frames = settings.clip_frames or config.get("clip_frames", 0)
    if kind == "audio":
        return ClipFormat("audio", frames, rate=config["sample_rate"], hop=config["hop"])
    if kind != "video":
        raise ValueError("this network takes neither video nor samples (but features, skeletons?): choose another")
    size = settings.size or config.get("image_size", 0)
    if not (size and frames):
        raise ValueError(f"a clip's frames and size are not known ({frames} and {size}): give --clip_frames and --size")
    return ClipFormat("video", frames, size=size, every=settings.every)


def normalise(clips: Tensor, config: dict[str, Any]) -> Tensor:
    """uint8 video (N, 3, T, H, W) or (3, H, W) to float32 with the network's mean and deviation; samples stay."""
    if clips.dtype != torch.uint8:
        return clips
    shape = (-1, *[1] * (3 if clips.ndim == 5 else 2))
    mean, std = (torch.tensor(config.get(key) or known).view(shape) for key, known in (("mean", MEAN), ("std", STD)))
    return (clips / 255 - mean) / std


def vary(
    clips: Tensor, *, settings: ClipSettings, config: dict[str, Any], seed: int, epoch: int, indices: Tensor
) -> Tensor:
    """Augmented and normalised clips; every draw is a function of seed, epoch and sample."""
    draws = uniforms(seed, epoch, indices, count=3, stream=_VARY_STREAM)
    signed = 2 * draws - 1
    if clips.dtype == torch.uint8:
        if settings.max_shift or settings.flip:
            flat = clips.flatten(1, 2)
            moved = shift_and_flip(
                flat, seed=seed, epoch=epoch, indices=indices, max_shift=settings.max_shift, flip=settings.flip
            )
            clips = moved.view_as(clips)
        light, contrast = (settings.jitter * signed[:, i].view(-1, 1, 1, 1, 1) for i in (0, 1))
        return normalise(clips, config) * (1 + contrast) + light
    clips = clips * 10 ** (settings.gain_db * signed[:, 0] / 20).view(-1, 1, 1)
    if settings.noise_db:
        level = 10 ** (-(abs(settings.noise_db) + 20 * draws[:, 1]) / 20)
        generator = torch.Generator().manual_seed(int(draws[0, 2] * 2**24) + int(indices[0]))
        clips = clips + level.view(-1, 1, 1) * torch.randn(clips.shape, generator=generator)
    return clips


def train_clip(
    model: ContinualTwin,
    data: str | Path,
    *,
    out: str | Path,
    fit_settings: FitSettings | None = None,
    settings: ClipSettings | None = None,
    opened: tuple[ClipSet, ClipSet] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Train ``model`` in clip form and write it to ``out``.

    Args:
        model: from :meth:`ContinualTwin.named`, with as many classes as the data have.
        data: folder or manifest.
        out: folder for the model, metrics.json, bad_files.json and, until the end, the checkpoint.
        fit_settings: duration, rates, seed.
        settings: clips, variation, loss.
        opened: training and test clips, when they are open already.
        on_step: called with the number of optimizer steps done.

    Returns:
        What metrics.json holds: settings, history, accuracy on test clips.

    Raises:
        ValueError: data that cannot be used (see :func:`open_clips`), or another number of classes.
    """
    fit_settings, settings, out = fit_settings or FitSettings(), settings or ClipSettings(), Path(out)
    started = time.perf_counter()
    training, testing = opened or open_both(data, clip_format(model, settings), settings)
    if bad := training.bad | testing.bad:
        write_json(out / "bad_files.json", bad)
        print(f"{len(bad)} files or spans are left out, see {out / 'bad_files.json'}", file=sys.stderr)
    config, seed = model.pretrained_cfg, fit_settings.seed
    config["label_names"], config["lag_frames"] = list(training.class_names), settings.lag
    change = partial(vary, settings=settings, config=config, seed=seed)
    batches = ClipBatches(training, seed=seed, prepare=change)
    identity = {**run_identity(batches, settings), "classes": list(training.class_names)}
    # where training begins from: not asked when a stopped run goes on, which may have changed the model in place
    whole = {**identity, "start": network_fingerprint(model)}
    if (finished := finished_run(out, fit_settings, whole)) is not None:
        return finished
    tests = ClipBatches(testing, seed=None, prepare=lambda clips, **_: normalise(clips, config))
    options = {"se": "stream"} if settings.online else {}

    def loss_of(module: nn.Module, batch: Batch) -> Tensor:
        draw = float(uniforms(seed, batch.epoch, batch.indices[:1], count=1, stream=_POSITION_STREAM))
        _set_positions(module, draw)
        scores = module(batch.images, **options).float().mean(-1)
        if scores.shape[1] != len(training.class_names):
            raise ValueError(f"the model has {scores.shape[1]} classes, the data have {len(training.class_names)}")
        return nn.functional.cross_entropy(scores, batch.labels, label_smoothing=settings.label_smoothing)

    def evaluate(module: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        return {"test_accuracy": clip_accuracy(module, tests, accelerator=accelerator, **options)}

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
    best.status = "trained"  # type: ignore[assignment]
    metrics = {
        "data": str(data).rstrip("/").rpartition("/")[2],
        "classes": list(training.class_names),
        "test_accuracy": history[-1]["test_accuracy"],
        "training_clips": len(training),
        "test_clips": len(testing),
        "left_out": len(bad),
        "history": history,
        "fit": asdict(fit_settings),
        "identity": whole,
        "clip": asdict(settings),
        "versions": {"sparing": sparing.__version__, "torch": torch.__version__},
        "device": str(next(best.parameters()).device),
        "wall_seconds": time.perf_counter() - started,
    }
    if Accelerator().is_main_process:
        best.save_pretrained(out)  # type: ignore[operator]
        write_json(out / "metrics.json", metrics)
        (out / "checkpoint.pt").unlink(missing_ok=True)
    return metrics


def open_both(data: str | Path, form: ClipFormat, settings: ClipSettings) -> tuple[ClipSet, ClipSet]:
    """The training and the test clips of ``data``."""
    training = open_clips(data, form, lag=settings.lag, cache_mb=settings.cache_mb)
    names = training.class_names
    return training, open_clips(
        data, form, split="test", class_names=names, lag=settings.lag, cache_mb=settings.cache_mb
    )


def _set_positions(module: nn.Module, draw: float) -> None:
    """Positions of clips start at a row that the batch decides, so that a resumed run sees the same."""
    for part in module.modules():
        if isinstance(part, RecyclingPositionalEncoding):
            part.start.fill_(int(draw * part.num_embeds))


@torch.inference_mode()
def clip_accuracy(
    model: nn.Module,
    data: BatchSource,
    *,
    batch_size: int = 200,
    accelerator: Accelerator | None = None,
    **options: Any,
) -> float:
    """Top-1 accuracy on clips, in [0, 1]; positions start at row 0; each rank takes its share."""
    device = next(model.parameters()).device
    rank, world_size = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    was_training = model.training
    model.eval()
    correct = torch.zeros((), device=device)
    for batch in data.batches(torch.arange(len(data))[rank::world_size], batch_size=batch_size, epoch=0):
        _set_positions(model, 0.0)
        scores = model(batch.images.to(device), **options).mean(-1)
        correct += (scores.argmax(1) == batch.labels.to(device)).sum()
    model.train(was_training)
    if accelerator is not None:
        correct = accelerator.reduce(correct)
    return correct.item() / len(data)


def build(name: str, num_classes: int, *, options: dict[str, Any], clip_frames: int = 0) -> ContinualTwin:
    """The network to train, with ``num_classes`` classes; torchvision's pool over the whole clip gets its length."""
    if not name.startswith("torchvision/"):
        return ContinualTwin.named(name, num_classes=num_classes, **options)
    if not clip_frames:
        raise ValueError(f"{name} takes clips of any length: give --clip_frames")
    knobs: dict[str, Any] = {"pool_window": 1}
    with torch.device("meta"):
        period = ContinualTwin.named(name, knobs=knobs, num_classes=num_classes, **options).plan().period
    knobs = {"pool_window": max(clip_frames // period, 1)}
    twin = ContinualTwin.named(name, knobs=knobs, num_classes=num_classes, **options)
    twin.pretrained_cfg = {"kind": "video", "clip_frames": clip_frames, "mean": MEAN, "std": STD}
    return twin


@dataclass(frozen=True)
class Arguments:
    """What to train, on what, into which folder."""

    model: str = field(metadata={"help": "a continual network of the zoo, or torchvision/NAME"})
    data: str = field(metadata={"help": "folder with a folder a class, or a manifest"})
    out: str = field(metadata={"help": "folder of the run; the same folder resumes"})
    options: str = field(default="{}", metadata={"help": "JSON of arguments for the network's entry point"})


def main(arguments: list[str] | None = None) -> int:
    """Command line; see ``--help``."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser([Arguments, FitSettings, ClipSettings], description=__doc__)
    wanted, fit_settings, settings = parser.parse_args_into_dataclasses(arguments)
    try:
        options = parse_options(wanted.options)
        check_settings(settings)
        probe = build(wanted.model, 2, options=options, clip_frames=settings.clip_frames)
        if settings.size and "image_size" in probe.pretrained_cfg:
            options["image_size"] = settings.size
        if settings.size:
            probe.pretrained_cfg["image_size"] = settings.size
        opened = open_both(wanted.data, clip_format(probe, settings), settings)
        torch.manual_seed(fit_settings.seed)  # initial weights
        model = build(wanted.model, len(opened[0].class_names), options=options, clip_frames=settings.clip_frames)
        model.pretrained_cfg |= {"image_size": settings.size} if settings.size else {}
        metrics = train_clip(
            model, wanted.data, out=wanted.out, fit_settings=fit_settings, settings=settings, opened=opened
        )
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if Accelerator().is_main_process:
        share, count = 100 * metrics["test_accuracy"], metrics["test_clips"]
        print(f"test accuracy {share:.2f}% on {count} clips; model in {wanted.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
