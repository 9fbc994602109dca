"""One training loop as a function: accumulation, schedule, EMA, checkpoints, exact resume, one process or DDP."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from sparing.training.batches import Batch, BatchSource
from sparing.training.checkpoint import load_checkpoint, save_checkpoint
from sparing.training.optim import build_optimizers
from sparing.training.progress import progress
from sparing.training.schedule import set_learning_rates, warmup_cosine
from sparing.training.seeding import epoch_order, sample_keys

__all__ = ["FitSettings", "count_steps", "differences", "finished_run", "fit", "run_identity"]

_STEP_STREAM = 4
_SPEED_ONLY = ("num_workers", "cache_mb")


@dataclass(frozen=True)
class FitSettings:
    """How long and how to train; the same for training with labels and for distilling."""

    epochs: int = field(default=30, metadata={"help": "passes over the data"})
    batch_size: int = field(default=128, metadata={"help": "samples a process and forward pass"})
    accumulate: int = field(default=1, metadata={"help": "forward passes an optimizer step"})
    lr: float = field(default=1e-3, metadata={"help": "peak learning rate of AdamW"})
    matrix_lr: float = field(default=0.02, metadata={"help": "peak learning rate of Muon (optimizer muon)"})
    fresh_lr_multiplier: float = field(default=10.0, metadata={"help": "on lr, for parameters the host does not have"})
    weight_decay: float = field(default=0.05, metadata={"help": "of matrices and kernels"})
    optimizer: str = field(default="adamw", metadata={"help": "adamw or muon"})
    warmup: float = field(default=0.05, metadata={"help": "share of the steps in which the rate rises"})
    final_lr: float = field(default=0.0, metadata={"help": "learning rate at the end, as a share of the peak"})
    clip_grad: float = field(default=1.0, metadata={"help": "largest norm of the gradient, 0 = no limit"})
    ema_decay: float = field(default=0.0, metadata={"help": "decay of the averaged weights, 0 = no averaging"})
    seed: int = field(default=0, metadata={"help": "of every random draw"})
    precision: str = field(default="fp32", metadata={"help": "fp32, or bf16 on CUDA"})
    checkpoint_every: int = field(default=500, metadata={"help": "optimizer steps between checkpoints"})

    def check(self) -> None:
        """Raises ValueError for a setting that cannot work."""
        for name in ("epochs", "batch_size", "accumulate", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be 'fp32' or 'bf16', got {self.precision!r}")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")
        if not 0.0 <= self.warmup < 1.0:
            raise ValueError(f"warmup is a share of the steps in [0, 1), got {self.warmup}")
        if not (math.isfinite(self.lr) and self.lr >= 0.0):
            raise ValueError(f"lr must be a finite number, at least 0, got {self.lr}")


def fit(
    model: nn.Module,
    loss_of: Callable[[nn.Module, Batch], Tensor],
    data: BatchSource,
    *,
    settings: FitSettings,
    out: Path,
    fresh: Collection[str] = (),
    evaluate: Callable[[nn.Module, Accelerator], dict[str, float]] | None = None,
    on_step: Callable[[int], None] | None = None,
    identity: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Train ``model`` and return it, or its average, with the history.

    ``out/checkpoint.pt`` holds all state; a later call with the same arguments goes on from it and, in one process on
    the CPU, ends with the same weights to the bit as a call that was never interrupted. It is removed by the caller
    once what it led to has been written (see the recipes). A loss or weights that are not finite stop the run, and are
    never written over a good checkpoint.

    Args:
        model: trained in place.
        loss_of: scalar loss of a batch; it must call the module it is given (under DDP a wrapper).
        data: samples.
        settings: see there.
        out: folder of the run.
        fresh: names of parameters that train with ``fresh_lr_multiplier``.
        evaluate: called after each epoch with the model in eval mode; its numbers go into the history.
        on_step: called after each optimizer step with the number of steps done.
        identity: what else makes this run the one it is (loss, model, data), in JSON's kinds: a checkpoint with
            another identity is refused.

    Raises:
        ValueError: a setting that cannot work, a sharded launch (FSDP, DeepSpeed), a checkpoint of another run, or a
            loss that is not finite.
    """
    accelerator = Accelerator()
    steps_per_epoch = count_steps(data, settings, accelerator)
    # not Accelerator(mixed_precision=...), which would fix the precision of the whole process
    autocast = torch.autocast(accelerator.device.type, torch.bfloat16, enabled=settings.precision == "bf16")
    rank, world_size = accelerator.process_index, accelerator.num_processes
    total_steps = steps_per_epoch * settings.epochs
    model.to(accelerator.device)
    optimizers = build_optimizers(
        model,
        name=settings.optimizer,
        lr=settings.lr,
        matrix_lr=settings.matrix_lr,
        weight_decay=settings.weight_decay,
        fresh=fresh,
        fresh_lr_multiplier=settings.fresh_lr_multiplier,
    )
    ema = ModelEmaV3(model, decay=settings.ema_decay, use_warmup=True) if settings.ema_decay else None
    path = out / "checkpoint.pt"
    state = {
        "settings": asdict(settings),
        "samples": len(data),
        "world_size": world_size,
        "identity": json.loads(json.dumps(dict(identity or {}))),
    }
    history: list[dict[str, Any]] = []
    step, loss_sum, seconds = 0, torch.zeros((), device=accelerator.device), 0.0
    if path.exists():
        step, history, loss_sum, seconds = _restore(path, state, model, optimizers, ema, device=accelerator.device)
    wrapped, *optimizers = accelerator.prepare(model, *optimizers)

    def save() -> None:
        loss = accelerator.reduce(loss_sum, reduction="mean").item()
        _check_finite(loss, model, step=step, epoch=(step - 1) // steps_per_epoch + 1)
        if accelerator.is_main_process:
            own = {
                "model": model.state_dict(),
                "ema": ema.module.state_dict() if ema else None,
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": step,
                "history": history,
                "loss_sum": loss_sum.cpu(),
                "seconds": seconds,
            }
            save_checkpoint(path, state | own)

    with torch.random.fork_rng():
        while step < total_steps:
            epoch, done = divmod(step, steps_per_epoch)
            order = epoch_order(len(data), seed=settings.seed, epoch=epoch, rank=rank, world_size=world_size)
            first, last = (number * settings.accumulate * settings.batch_size for number in (done, steps_per_epoch))
            batches = data.batches(order[first:last], batch_size=settings.batch_size, epoch=epoch)
            wrapped.train()
            started = time.perf_counter()
            for _ in progress(
                range(done, steps_per_epoch),
                total=steps_per_epoch,
                initial=done,
                description=f"epoch {epoch + 1}/{settings.epochs}",
                enabled=accelerator.is_main_process,
            ):
                factor = warmup_cosine(
                    step,
                    total_steps=total_steps,
                    warmup_steps=int(settings.warmup * total_steps),
                    final=settings.final_lr,
                )
                set_learning_rates(optimizers, factor)
                for micro in range(settings.accumulate):
                    # dropout and stochastic depth draw from the global generator: make it a function of the step
                    key = sample_keys(settings.seed, epoch, [step * settings.accumulate + micro], stream=_STEP_STREAM)
                    torch.manual_seed(int(key[0] >> 1) + rank)
                    batch = next(batches)
                    batch = batch._replace(
                        images=batch.images.to(accelerator.device, non_blocking=True),
                        labels=batch.labels.to(accelerator.device, non_blocking=True),
                    )
                    last_pass = micro == settings.accumulate - 1
                    with contextlib.nullcontext() if last_pass else accelerator.no_sync(wrapped):
                        with autocast:
                            loss = loss_of(wrapped, batch) / settings.accumulate
                        accelerator.backward(loss)
                    loss_sum += loss.detach()
                if settings.clip_grad:
                    accelerator.clip_grad_norm_(wrapped.parameters(), settings.clip_grad)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                step += 1
                if ema:
                    ema.update(model, step=step)
                if on_step is not None:
                    on_step(step)
                if step % settings.checkpoint_every == 0 and step % steps_per_epoch:
                    seconds += time.perf_counter() - started
                    started = time.perf_counter()
                    save()
            seconds += time.perf_counter() - started
            mean_loss = accelerator.reduce(loss_sum, reduction="mean").item() / steps_per_epoch
            _check_finite(mean_loss, model, step=step, epoch=epoch + 1)
            record: dict[str, Any] = {"epoch": epoch + 1, "loss": mean_loss, "train_seconds": seconds}
            if evaluate is not None:
                record |= evaluate(ema.module if ema else model, accelerator)
            history.append(record)
            loss_sum.zero_()
            seconds = 0.0
            save()
    return (ema.module if ema else model), history


def count_steps(data: BatchSource, settings: FitSettings, accelerator: Accelerator) -> int:
    """Optimizer steps of an epoch.

    Raises:
        ValueError: what :func:`fit` refuses before its first step: a setting that cannot work, here or with so few
            samples, or a sharded launch.
    """
    settings.check()
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise ValueError(
            f"{kind.value} is not supported: the weights, their average and the checkpoint are whole in every process. "
            "Launch data parallel (accelerate launch --multi_gpu, torchrun)"
        )
    if settings.precision == "bf16" and accelerator.device.type != "cuda":
        raise ValueError(f"precision 'bf16' needs a CUDA device, this is {accelerator.device}; use 'fp32'")
    world_size = accelerator.num_processes
    steps = -(-len(data) // world_size) // settings.batch_size // settings.accumulate
    if steps == 0:
        raise ValueError(
            f"{len(data)} samples on {world_size} processes make no step of "
            f"{settings.accumulate} x {settings.batch_size}"
        )
    return steps


def _check_finite(loss: float, model: nn.Module, *, step: int, epoch: int) -> None:
    """Raises ValueError when the loss or a weight is not finite."""
    wrong = None if math.isfinite(loss) else f"the loss of epoch {epoch} is {loss}"
    if wrong is None:
        names, values = zip(*model.named_parameters())
        finite = torch.stack([torch.isfinite(value).all() for value in values]).tolist()  # one synchronisation
        wrong = next((f"weight {n!r} holds NaN or infinity" for n, good in zip(names, finite) if not good), None)
    if wrong is not None:
        raise ValueError(
            f"{wrong} (step {step}): the data or the weights that training began from hold NaN or huge values, or the "
            "learning rate is too high; an earlier checkpoint was kept"
        )


def run_identity(data: BatchSource, *settings: Any) -> dict[str, Any]:
    """The identity of a run (see :func:`fit`) by its data and by dataclasses of settings; what only changes its speed
    is left out.
    """
    fields = {name: value for part in settings for name, value in asdict(part).items() if name not in _SPEED_ONLY}
    return {**fields, "data": getattr(data, "fingerprint", None)}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two identities of runs differ in, each as one phrase."""
    return [
        f"{name}: {before.get(name)} before, {now.get(name)} now"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def finished_run(out: Path, settings: FitSettings, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The metrics of this very run, where ``out`` holds its result already (and says so on stderr); None where it
    holds none. A recipe asks before it trains, and keeps ``fit`` (the settings) and ``identity`` in its metrics.json.

    Raises:
        ValueError: ``out`` holds the result of another run, or something else in the place of its metrics.
    """
    path = out / "metrics.json"
    if not path.exists() or (out / "checkpoint.pt").exists():
        return None
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        before = {**metrics["fit"], **metrics["identity"]}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not of this recipe; use another folder") from None
    if changed := differences(before, json.loads(json.dumps({**asdict(settings), **identity}))):
        raise ValueError(f"{out} holds the result of another run ({'; '.join(changed)}); use another folder")
    if Accelerator().is_main_process:
        print(f"{out} holds the result of this very run: nothing was trained", file=sys.stderr)
    return dict(metrics)


def _restore(
    path: Path,
    expected: dict[str, Any],
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    ema: ModelEmaV3 | None,
    *,
    device: torch.device,
) -> tuple[int, list[dict[str, Any]], Tensor, float]:
    saved = load_checkpoint(path)
    needed = (*expected, "model", "ema", "optimizers", "step", "history", "loss_sum", "seconds")
    if lacking := [name for name in needed if name not in saved]:
        raise ValueError(
            f"{path} is no checkpoint of this training loop (it has no {lacking[0]!r}); use another folder or remove "
            "the file"
        )
    before, now = saved.get("settings", {}), expected["settings"]
    changed = [f"{name}: {before.get(name)} before, {now[name]} now" for name in now if before.get(name) != now[name]]
    changed += [
        f"{name}: {saved.get(name)} before, {expected[name]} now"
        for name in ("samples", "world_size")
        if saved.get(name) != expected[name]
    ]
    changed += differences(saved["identity"], expected["identity"])
    if changed:
        raise ValueError(f"{path} belongs to another run ({'; '.join(changed)}); use another folder or remove the file")
    try:
        model.load_state_dict(saved["model"])
        for optimizer, content in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(content)
        if ema:
            ema.module.load_state_dict(saved["ema"])
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path} belongs to another model ({reason}); use another folder or remove the file"
        ) from error
    return saved["step"], saved["history"], saved["loss_sum"].to(device), saved["seconds"]
