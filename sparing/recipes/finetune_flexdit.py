"""Fine-tune a FlexDiT that was made from a dense DiT, over all the densities of its table.

    accelerate launch -m sparing.recipes.finetune_flexdit --host facebook/DiT-XL-2-256 --data latents.safetensors \
        --out runs/flexdit --density_table 256_r0.61_0.86 --epochs 200 --batch_size 32
    python -m sparing.recipes.finetune_flexdit --host runs/dit --data FOLDER --out runs/flexdit --density_table 3

The recipe is SparseDiT's (arXiv 2412.06028; ``train.py`` of its code): min-SNR weighted noise error plus variational
term (:mod:`sparing.diffusion.losses`), AdamW at 1e-4, constant, without decay, averaged weights, label dropout 0.1.
What the authors did not publish is ours: every step trains one density, drawn so that the timesteps stay uniform
(:class:`sparing.diffusion.DensityTimestepSampler`), after a first tenth of the steps at the middle density.

``--data`` holds latents (a safetensors file with ``latents (count, C, H, W)``, scaled as the sampler's, and ``labels
(count,)``), or images for a pixel-space model or, with ``--vae``, for encoding on the fly
(:func:`sparing.training.open_images`). A run that was stopped goes on when the same command is given again.
"""

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import sparing
from sparing.diffusion.density import PUBLISHED_RATES, DensityTable, DensityTimestepSampler
from sparing.diffusion.flexdit import FlexDiTTransformer2DModel
from sparing.diffusion.flexdit_keys import check_finite
from sparing.diffusion.losses import DiffusionProcess, training_losses
from sparing.recipes.generate import open_vae
from sparing.recipes.train_vision import write_json
from sparing.training import (
    Batch,
    BatchSource,
    FileBatches,
    FitSettings,
    MemoryBatches,
    TensorImages,
    eval_transform,
    fit,
    load_checkpoint,
    open_images,
    shift_and_flip,
    train_transform,
)
from sparing.training.batches import fingerprint
from sparing.training.loop import finished_run, run_identity
from sparing.zoo.fingerprints import network_fingerprint

__all__ = ["FlexDiTSettings", "LatentBatches", "default_fit_settings", "finetune", "training_batches"]


@dataclass(frozen=True)
class FlexDiTSettings:
    """Densities and loss."""

    mode: str = field(default="bucket", metadata={"help": "bucket, piecewise or mixed: how steps draw densities"})
    warm_share: float = field(default=0.1, metadata={"help": "share of the steps, at first, at the middle density"})
    min_snr_gamma: float = field(default=5.0, metadata={"help": "clamp of the loss weight's SNR, 0 = plain DiT loss"})
    teacher_weight: float = field(default=0.0, metadata={"help": "weight of the error to the dense host's noise"})
    flip: bool = field(default=True, metadata={"help": "mirror every second training image"})
    max_shift: int = field(default=0, metadata={"help": "pixels that images in memory are moved by at most"})
    num_workers: int = field(default=0, metadata={"help": "processes that decode image files"})

    def check(self) -> None:
        """Raises ValueError for a setting that cannot work."""
        if self.mode not in ("bucket", "piecewise", "mixed"):
            raise ValueError(f"mode must be 'bucket', 'piecewise' or 'mixed', got {self.mode!r}")
        if not 0.0 <= self.warm_share <= 1.0:
            raise ValueError(f"warm_share is a share of the steps in [0, 1], got {self.warm_share}")
        for name in ("min_snr_gamma", "teacher_weight"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0.0):
                raise ValueError(f"{name} must be a finite number, at least 0, got {value}")
        for name in ("max_shift", "num_workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


def default_fit_settings(**changes: Any) -> FitSettings:
    """The published recipe: constant 1e-4, no weight decay, no clipping, averaged weights."""
    published: dict[str, Any] = {
        "lr": 1e-4,
        "weight_decay": 0.0,
        "warmup": 0.0,
        "final_lr": 1.0,
        "clip_grad": 0.0,
        "ema_decay": 0.9999,
    }
    return FitSettings(**{**published, **changes})


class LatentBatches:
    """Batches of latents in memory."""

    def __init__(self, latents: Tensor, labels: Tensor) -> None:
        self.latents, self.labels = latents, labels.long()
        self.num_classes = int(labels.max()) + 1
        self.fingerprint = fingerprint(latents, self.labels)

    def __len__(self) -> int:
        return len(self.latents)

    def batches(self, order: Tensor, *, batch_size: int, epoch: int) -> Iterator[Batch]:
        for indices in order.split(batch_size):
            yield Batch(self.latents[indices].float(), self.labels[indices], indices, epoch)


def training_batches(
    model: FlexDiTTransformer2DModel,
    data: str,
    *,
    settings: FlexDiTSettings,
    seed: int = 0,
    vae_scale: int | None = None,
) -> BatchSource:
    """Clean samples in [-1, 1] (images) or as stored (latents), at the model's own size.

    Args:
        model: gives channels and size.
        data: see the module docstring.
        settings: augmentation.
        seed: of the augmentation.
        vae_scale: pixels a latent position, when images are encoded on the fly; None: they are not.

    Raises:
        ValueError: samples or labels that do not go with the model.
    """
    channels, side, classes = model.config.in_channels, model.config.sample_size, model.config.num_embeds_ada_norm
    if data.endswith(".safetensors"):
        if vae_scale is not None:
            raise ValueError(f"{data} holds latents: a vae encodes images, leave it out")
        return _latents(Path(data), expected=(channels, side, side), classes=classes)
    channels, side = (channels, side) if vae_scale is None else (3, side * vae_scale)
    if channels not in (1, 3):
        raise ValueError(
            f"this model works on latents of {channels} channels: give a .safetensors of latents, or a vae"
        )
    images = open_images(data, split="train", channels=channels)
    half = [0.5] * channels
    if isinstance(images, TensorImages):
        if images.images.shape[-2:] != (side, side):
            raise ValueError(
                f"{data} holds images of {tuple(images.images.shape[-2:])}, the model takes {side} x {side}"
            )
        _check_labels(data, int(images.labels.max()), classes)
        shift = partial(shift_and_flip, seed=seed, max_shift=settings.max_shift, flip=settings.flip)
        return MemoryBatches(images, mean=half, std=half, augment=shift)
    _check_labels(data, len(images.class_names) - 1, classes)
    if settings.flip:
        transform = train_transform((side, side), mean=half, std=half, scale=(1.0, 1.0), rand_augment=0, flip=True)
    else:
        transform = eval_transform((side, side), mean=half, std=half, crop_fraction=1.0)
    return FileBatches(images, transform, seed=seed, num_workers=settings.num_workers)


def _latents(path: Path, *, expected: tuple[int, int, int], classes: int) -> LatentBatches:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    if not {"latents", "labels"} <= set(tensors):
        raise ValueError(f"{path} holds {sorted(tensors)}; 'latents' and 'labels' are needed")
    latents, labels = tensors["latents"], tensors["labels"]
    if latents.ndim != 4 or tuple(latents.shape[1:]) != expected or labels.shape != latents.shape[:1]:
        raise ValueError(
            f"{path}: latents {tuple(latents.shape)} and labels {tuple(labels.shape)}; the model takes (count, "
            f"{', '.join(map(str, expected))}) and (count,)"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{path}: labels are {labels.dtype}; integers are needed")
    if not len(latents):
        raise ValueError(f"{path} holds no latents")
    _check_labels(str(path), int(labels.max()), classes, smallest=int(labels.min()))
    for start in range(0, len(latents), 1024):  # in parts: the file may fill most of the memory
        finite = torch.isfinite(latents[start : start + 1024]).flatten(1).all(1)
        if not bool(finite.all()):
            raise ValueError(f"{path}: latents of sample {start + int(finite.int().argmin())} hold NaN or infinity")
    return LatentBatches(latents, labels)


def _check_labels(data: str, largest: int, classes: int, *, smallest: int = 0) -> None:
    if largest >= classes or smallest < 0:
        wrong = largest if largest >= classes else smallest
        raise ValueError(f"{data} has class {wrong}, the model has classes 0..{classes - 1}")


def finetune(
    model: FlexDiTTransformer2DModel,
    data: str | BatchSource,
    *,
    out: str | Path,
    fit_settings: FitSettings | None = None,
    settings: FlexDiTSettings | None = None,
    teacher: nn.Module | None = None,
    vae: Any = None,
    on_step: Any = None,
) -> dict[str, Any]:
    """Train ``model`` in place and write it (its average, with ``ema_decay``) to ``out``.

    Args:
        model: a converted FlexDiT, or one without sparse layers (then this is plain DiT training).
        data: see the module docstring, or batches of clean samples.
        out: folder for the model, metrics.json and, until the end, the checkpoint.
        fit_settings: duration, rates, seed; the published ones when None.
        settings: densities and loss.
        teacher: the dense host, for ``teacher_weight`` above 0.
        vae: an ``AutoencoderKL`` that encodes images on the fly.
        on_step: called with the number of optimizer steps done.

    Returns:
        What metrics.json holds. Where ``out`` holds the result of this very run, nothing is trained.

    Raises:
        ValueError: data or settings that do not go with the model, or a folder with the result of another run.
    """
    fit_settings, settings, out = fit_settings or default_fit_settings(), settings or FlexDiTSettings(), Path(out)
    settings.check()
    _check_out(out)
    if settings.teacher_weight and teacher is None:
        raise ValueError(f"teacher_weight {settings.teacher_weight} needs a teacher (the dense host)")
    fit_settings.check()
    started = time.perf_counter()
    accelerator = Accelerator()
    if vae is not None and vae.config.latent_channels != model.config.in_channels:
        raise ValueError(
            f"the model works on {model.config.in_channels} channels, the vae makes {vae.config.latent_channels}"
        )
    if isinstance(data, str):
        scale = None if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        samples = training_batches(model, data, settings=settings, seed=fit_settings.seed, vae_scale=scale)
    else:
        samples = data
    for frozen in (teacher, vae):
        if frozen is not None:
            frozen.requires_grad_(False).eval().to(accelerator.device)
    losses = _Losses(model, samples, fit_settings, settings, accelerator=accelerator, teacher=teacher, vae=vae)
    losses.step = _steps_done(out / "checkpoint.pt")
    identity = _identity(model, samples, settings, teacher=teacher, vae=vae)
    # where training begins from: not asked when a stopped run goes on, which may have changed the model in place
    whole = {**identity, "start": network_fingerprint(model)}
    if (finished := finished_run(out, fit_settings, whole)) is not None:
        return finished

    def after(step: int) -> None:
        losses.step = step
        if on_step is not None:
            on_step(step)

    best, history = fit(model, losses, samples, settings=fit_settings, out=out, on_step=after, identity=identity)
    best.eval()
    if best.has_sparse_layers:  # type: ignore[truthy-function]
        best.status = "trained"
    metrics = {
        "history": history,
        "knobs": best.knobs,
        "fit": asdict(fit_settings),
        "flexdit": asdict(settings),
        "identity": whole,
        "samples": len(samples),
        "versions": {"sparing": sparing.__version__, "torch": torch.__version__},
        "device": str(accelerator.device),
        "wall_seconds": time.perf_counter() - started,
    }
    if accelerator.is_main_process:
        best.save_pretrained(out)  # type: ignore[operator]
        write_json(out / "metrics.json", metrics)
        (out / "checkpoint.pt").unlink(missing_ok=True)
    return metrics


def _check_out(out: Path) -> None:
    """Raises ValueError when ``out`` is, or lies below, a file."""
    file = next((path for path in (out, *out.parents) if path.exists() and not path.is_dir()), None)
    if file is not None:
        raise ValueError(f"{file} is a file; out is the folder of the run")


def _steps_done(checkpoint: Path) -> int:
    return int(load_checkpoint(checkpoint).get("step", 0)) if checkpoint.exists() else 0


def _identity(
    model: FlexDiTTransformer2DModel, samples: BatchSource, settings: FlexDiTSettings, **networks: nn.Module | None
) -> dict[str, Any]:
    """What a run must have in common with its checkpoint, besides the settings of the loop, as JSON. ``networks`` are
    those that it learns from.
    """
    shape = {name: value for name, value in model.config.items() if not name.startswith("_") and name != "status"}
    weights = {name: None if network is None else network_fingerprint(network) for name, network in networks.items()}
    run = {**shape, **run_identity(samples, settings), **weights}
    return json.loads(json.dumps(run))


class _Losses:
    """The loss of a batch. ``step`` decides its density; noise and timesteps come from the global generator, which the
    loop seeds by (seed, epoch, step)."""

    def __init__(
        self,
        model: FlexDiTTransformer2DModel,
        samples: BatchSource,
        fit_settings: FitSettings,
        settings: FlexDiTSettings,
        *,
        accelerator: Accelerator,
        teacher: nn.Module | None,
        vae: Any,
    ) -> None:
        self.settings, self.teacher, self.vae, self.step = settings, teacher, vae, 0
        table: DensityTable = model.density_table
        self.sampler = DensityTimestepSampler(
            table,
            settings.mode,  # type: ignore[arg-type]
            seed=fit_settings.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        self.process = DiffusionProcess(table.num_train_timesteps)
        micro_batches = -(-len(samples) // accelerator.num_processes) // fit_settings.batch_size
        self.warm_steps = int(settings.warm_share * (micro_batches // fit_settings.accumulate) * fit_settings.epochs)
        sides = table.distinct_sides
        self.middle = sides[len(sides) // 2]

    def __call__(self, module: nn.Module, batch: Batch) -> Tensor:
        clean, labels = batch.images, batch.labels
        if self.vae is not None:
            with torch.no_grad():
                clean = self.vae.encode(clean).latent_dist.sample() * self.vae.config.scaling_factor
        if self.step < self.warm_steps:
            low, high, side = 0, self.process.num_train_timesteps, self.middle
        else:
            low, high, side = self.sampler.bucket(self.step)  # type: ignore[assignment]
        timesteps = torch.randint(low, high, (len(clean),), device=clean.device)
        noise = torch.randn_like(clean)
        noised = self.process.add_noise(clean, noise, timesteps)
        output = module(noised, timesteps, labels, density=side, return_dict=False)[0]
        loss = training_losses(
            output,
            clean,
            noise=noise,
            noised=noised,
            timesteps=timesteps,
            process=self.process,
            min_snr_gamma=self.settings.min_snr_gamma or None,
        )["loss"].mean()
        if self.teacher is not None and self.settings.teacher_weight:
            channels = clean.shape[1]
            with torch.no_grad():
                target = self.teacher(noised, timestep=timesteps, class_labels=labels, return_dict=False)[0]
            error = (output[:, :channels] - target[:, :channels]).float().square().mean()
            loss = loss + 0.5 * self.settings.teacher_weight * error
        return loss


@dataclass(frozen=True)
class Arguments:
    """What to train, on what, into which folder."""

    host: str = field(metadata={"help": "a DiT: folder, hub id, .pt or .safetensors; or a FlexDiT's own folder"})
    data: str = field(metadata={"help": "latents (.safetensors), or images with labels"})
    out: str = field(metadata={"help": "folder of the run; the same folder resumes"})
    density_table: str = field(
        default="", metadata={"help": f"a side, 'HxW', JSON [[t, h, w], ...] or one of {', '.join(PUBLISHED_RATES)}"}
    )
    split: str = field(default="", metadata={"help": "'P,K,merge,sparse,recover,dense,T'; empty: the published split"})
    timing: str = field(default="host", metadata={"help": "host, or original (as the published DiT was trained)"})
    vae: str = field(default="", metadata={"help": "folder of an AutoencoderKL that encodes images on the fly"})


def main(arguments: list[str] | None = None) -> int:
    """Command line; see ``--help``."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser([Arguments, FitSettings, FlexDiTSettings], description=__doc__)
    published = default_fit_settings()
    parser.set_defaults(
        **{name: value for name, value in asdict(published).items() if value != asdict(FitSettings())[name]}
    )
    wanted, fit_settings, settings = parser.parse_args_into_dataclasses(arguments)
    try:
        fit_settings.check()
        settings.check()
        _check_out(Path(wanted.out))
        model = _open(wanted, with_teacher=settings.teacher_weight > 0)
        vae = open_vae(wanted.vae) if wanted.vae else None
        teacher = None
        if settings.teacher_weight:
            plain = {"num_pooling": 0, "num_sdtm": 0, "num_dense_top": model.config.num_layers}
            teacher = FlexDiTTransformer2DModel.from_host(wanted.host, timing=wanted.timing, check_finite=True, **plain)
        metrics = finetune(
            model,
            wanted.data,
            out=wanted.out,
            fit_settings=fit_settings,
            settings=settings,
            teacher=teacher,
            vae=vae,
        )
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if Accelerator().is_main_process:
        print(f"loss {metrics['history'][-1]['loss']:.4f}; model in {wanted.out}")
    return 0


def _open(wanted: Any, *, with_teacher: bool) -> FlexDiTTransformer2DModel:
    """The FlexDiT to train: converted from a host, or read from its own folder."""
    table = _parse_table(wanted.density_table)
    if _class_name(Path(wanted.host) / "config.json") == FlexDiTTransformer2DModel.__name__:
        given = [name for name, value in (("split", wanted.split), ("timing", wanted.timing != "host")) if value]
        if given:
            raise ValueError(
                f"{wanted.host} is a FlexDiT already, with its own layout and timing: leave out --{given[0]}"
            )
        if with_teacher:
            raise ValueError(f"{wanted.host} is a FlexDiT: teacher_weight needs its dense host as --host")
        model = FlexDiTTransformer2DModel.from_pretrained(wanted.host)
        check_finite(model.state_dict())
        if table != "":
            model.set_density(table)
        return model
    layout: dict[str, Any] = {}
    if wanted.split:
        parts = wanted.split.split(",")
        if len(parts) != 7 or not all(part.strip().isdecimal() for part in parts):
            raise ValueError(f"split {wanted.split!r} must give P,K,merge,sparse,recover,dense,T in whole numbers")
        numbers = [int(part) for part in parts]
        layout = {
            "num_pooling": numbers[0],
            "num_sdtm": numbers[1],
            "sdtm_group": numbers[2:6],
            "num_dense_top": numbers[6],
        }
    return FlexDiTTransformer2DModel.from_host(
        wanted.host, density_table=None if table == "" else table, timing=wanted.timing, check_finite=True, **layout
    )


def _parse_table(text: str) -> Any:
    """``--density_table``: a JSON list, or as :meth:`DensityTable.of` takes a text."""
    if not text.lstrip().startswith("["):
        return text
    try:
        return json.loads(text)
    except ValueError:
        raise ValueError(f"density_table {text!r} is no list [[t, side], ...] or [[t, h, w], ...] in JSON") from None


def _class_name(config: Path) -> str | None:
    """The class that a ``config.json`` names, where there is such a file and it names one."""
    if not config.is_file():
        return None
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{config} is not JSON") from None
    return content.get("_class_name") if isinstance(content, dict) else None


if __name__ == "__main__":
    sys.exit(main())
