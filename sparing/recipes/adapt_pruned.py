"""Adapt a trained classifier to a new task while pruning it: SPLoRA, SPPaRA, SPLoPA, or fine-pruning to compare with.

    python -m sparing.recipes.adapt_pruned --model runs/source --data DIR --out runs/task --method splora --density 0.3
    python -m sparing.recipes.adapt_pruned --model timm/resnet18 --pretrained --data DIR --out runs/task --method sppara

Hedegaard et al., *Structured Pruning Adapters* (Pattern Recognition 2024): the source network's weights are frozen, a
few weights added beside them are learned with a new head, and the network is pruned in stages (importance of the
adapted weights, prune, adapt). Channel methods ('splora', 'sppara', 'fine') drop whole channels, so tensors really get
smaller; block methods ('splopa', 'fine_blocks') zero blocks of linear layers. At the end adapters are fused: the folder
``--out`` holds a plain network (``load_pruned(OUT)``) and metrics.json. ``--data`` is read by
:func:`sparing.training.open_images`. A run that was stopped goes on when the same command is given again, to the same
bits.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

import sparing
from sparing.continual import adapters, pruning
from sparing.continual.channel_groups import ChannelGroup, channel_groups, count_weights, resize_as
from sparing.recipes.train_vision import accuracy
from sparing.training import (
    Batch,
    BatchSource,
    FitSettings,
    ImageSettings,
    atomic_file,
    epoch_order,
    fit,
    image_batches,
    load_checkpoint,
    save_checkpoint,
    write_json,
)
from sparing.training.loop import run_identity
from sparing.zoo.table import MODELS

__all__ = ["PruneSettings", "adapt_pruned", "load_pruned"]

_BLOCK_METHODS = ("splopa", "fine_blocks")


@dataclass(frozen=True)
class PruneSettings:
    """What is learned, what is pruned, and when."""

    method: str = field(default="splora", metadata={"help": "splora, sppara, splopa, fine or fine_blocks"})
    density: float = field(default=0.3, metadata={"help": "share of the weights (head aside) that is kept"})
    rank: float = field(default=16, metadata={"help": "of SPLoRA; below 1 a share of a layer's outputs"})
    stages: int = field(default=3, metadata={"help": "prunings on the way to the density"})
    warm_epochs: int = field(default=0, metadata={"help": "epochs before the first pruning"})
    stage_epochs: int = field(default=1, metadata={"help": "epochs after each pruning but the last"})
    schedule: str = field(default="geometric", metadata={"help": "geometric, linear or cubic"})
    criterion: str = field(default="magnitude", metadata={"help": "magnitude, gradient, taylor, relevance or random"})
    scope: str = field(default="global", metadata={"help": "global, or group: the same share of every channel group"})
    least: int = field(default=2, metadata={"help": "channels that every group keeps"})
    criterion_batches: int = field(default=8, metadata={"help": "batches that gradient criteria look at"})
    block_size: int = field(default=32, metadata={"help": "rows and columns of a block"})
    num_prototypes: int = field(default=64, metadata={"help": "of SPLoPA, shared over the network"})
    label_smoothing: float = field(default=0.0, metadata={"help": "share of the target spread over all classes"})


def adapt_pruned(
    network: nn.Module,
    data: str | tuple[BatchSource, BatchSource],
    *,
    out: str | Path,
    settings: PruneSettings | None = None,
    fit_settings: FitSettings | None = None,
    image_settings: ImageSettings | None = None,
    head: str | None = None,
    measure: bool = True,
    on_step: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Adapt and prune ``network`` in place and write the fused network to ``out``.

    Args:
        network: a trained classifier with a head for the new task, (batch, classes) logits.
        data: images (then the network needs timm's ``pretrained_cfg``), or training and test batches.
        out: folder of the run.
        settings: method, density, schedule.
        fit_settings: seed and rates; ``epochs`` are those after the last pruning, ``fresh_lr_multiplier`` applies to
            adapters and head.
        image_settings: augmentation of images.
        head: dotted name of the new head, which is neither frozen nor narrowed; None reads it from ``pretrained_cfg``.
        measure: take the test accuracy after every epoch for the history; that of the fused network is taken anyway.
        on_step: called with the number of optimizer steps done in the stage.

    Returns:
        What metrics.json holds.

    Raises:
        ValueError: a setting, density or method that does not go with this network, or the folder of another run.
    """
    settings, fit_settings, out = settings or PruneSettings(), fit_settings or FitSettings(), Path(out)
    started = time.perf_counter()
    training, testing = _batches(network, data, fit_settings, image_settings)
    head = head if head is not None else _head_of(network)
    if head not in dict(network.named_modules()):
        raise ValueError(f"head {head!r} is no module of this {type(network).__name__}")
    plan = _plan(settings, fit_settings)
    _same_run(out / "run.json", {"settings": asdict(settings), "fit": asdict(fit_settings), "samples": len(training)})
    example = next(training.batches(torch.arange(2), batch_size=2, epoch=0)).images
    blocks = settings.method in _BLOCK_METHODS
    groups = [] if blocks else channel_groups(network, (example.to(next(network.parameters()).device),), skip=(head,))
    if not blocks and not groups:
        raise ValueError(f"no channels of this {type(network).__name__} can be pruned; method splopa prunes blocks")
    before = {name for name, _ in network.named_parameters()}
    torch.manual_seed(fit_settings.seed)  # first values of the adapters
    adapters.adapt(
        network,
        method=settings.method,
        rank=settings.rank,
        skip=(head,),
        block_shape=(settings.block_size, settings.block_size),
        num_prototypes=settings.num_prototypes,
    )
    fresh = {name for name, _ in network.named_parameters() if name not in before or name.startswith(f"{head}.")}
    run = _Run(network, groups, training, head=head, dense=count_weights(network, skip=(head,)), settings=settings)
    rows = []
    for number, (density, epochs) in enumerate(plan):
        folder = out / f"stage_{number}"
        run.prune(folder / "kept.pt", density, seed=fit_settings.seed, batch_size=fit_settings.batch_size, turn=number)
        last = number == len(plan) - 1
        stage_fit = replace(
            fit_settings,
            epochs=epochs,
            seed=fit_settings.seed + 100 * number,
            final_lr=fit_settings.final_lr if last else 1.0,
        )
        history = run.adapt(folder, stage_fit, testing if measure else None, fresh=fresh, on_step=on_step)
        rows.append({"density": run.density, "history": history})
    learned, weights = adapters.learned_parameters(network), run.weights
    head_learned = sum(p.numel() for p in network.get_submodule(head).parameters())
    fused = adapters.fuse(network).eval()
    score = accuracy(fused, testing)
    profile = sparing.profile(fused, example[:1].to(next(fused.parameters()).device), measure=False)
    metrics = {
        "test_accuracy": score,
        "test_samples": len(testing),
        "weights": weights,
        "dense_weights": run.dense,
        "density": weights / run.dense,
        "learned_parameters": learned,
        "learned_of_head": head_learned,
        "macs": int(profile.macs),
        "stages": rows,
        "settings": asdict(settings),
        "fit": asdict(fit_settings),
        "versions": {"sparing": sparing.__version__, "torch": torch.__version__},
        "device": str(next(fused.parameters()).device),
        "wall_seconds": time.perf_counter() - started,
    }
    if Accelerator().is_main_process:
        _save(fused, out, metrics)
        for left in ("kept.pt", "network.pt", "checkpoint.pt"):
            for folder in out.glob("stage_*"):
                (folder / left).unlink(missing_ok=True)
        for folder in out.glob("stage_*"):
            folder.rmdir()
        (out / "run.json").unlink(missing_ok=True)
    return metrics


class _Run:
    """A network with its groups while stage follows stage."""

    def __init__(
        self,
        network: nn.Module,
        groups: Sequence[ChannelGroup],
        training: BatchSource,
        *,
        head: str,
        dense: int,
        settings: PruneSettings,
    ) -> None:
        self.network, self.groups, self.training = network, groups, training
        self.head, self.dense, self.settings = head, dense, settings

    @property
    def weights(self) -> int:
        return count_weights(self.network, skip=(self.head,))

    @property
    def density(self) -> float:
        return self.weights / self.dense

    def prune(self, file: Path, density: float, *, seed: int, batch_size: int, turn: int) -> None:
        """Prune to ``density`` of the dense weights; what was chosen is stored, and taken from there a second time."""
        if density >= 1.0:
            return
        if file.exists():
            chosen = load_checkpoint(file)["kept"]
        else:
            chosen = self._choose(density, seed=seed, batch_size=batch_size, turn=turn)
            if Accelerator().is_main_process:
                save_checkpoint(file, {"kept": chosen})
        if isinstance(chosen, dict):
            pruning.prune_blocks(self.network, chosen)
        else:
            pruning.prune_channels(self.network, self.groups, chosen)

    def _choose(self, density: float, *, seed: int, batch_size: int, turn: int) -> Any:
        batches: list[Batch] = []
        if self.settings.criterion in ("gradient", "taylor", "relevance"):
            order = epoch_order(len(self.training), seed=seed, epoch=turn)[
                : batch_size * self.settings.criterion_batches
            ]
            batches = list(self.training.batches(order, batch_size=batch_size, epoch=turn))
        look: dict[str, Any] = {
            "criterion": self.settings.criterion,
            "batches": batches,
            "backward": self._backward,
            "seed": seed + turn,
        }
        budget = int(density * self.dense)
        if self.settings.method in _BLOCK_METHODS:
            of_blocks = pruning.block_importance(self.network, **look)
            size = self.settings.block_size**2
            count = sum(score.numel() for score in of_blocks.values())
            fixed = self.dense - count * size
            if budget - fixed < size:
                raise ValueError(
                    f"density {density:.3f} cannot be reached: {fixed:,} of {self.dense:,} weights lie outside blocks"
                )
            return pruning.choose_blocks(of_blocks, density=(budget - fixed) / (count * size))
        scores = pruning.channel_importance(self.network, self.groups, **look)
        return pruning.choose_channels(
            self.network,
            self.groups,
            scores,
            weights=budget,
            scope=self.settings.scope,
            least=self.settings.least,
            skip=(self.head,),
        )

    def _backward(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        device = next(network.parameters()).device
        logits, labels = network(batch.images.to(device)).float(), batch.labels.to(device)
        return nn.functional.cross_entropy(logits, labels), logits.gather(1, labels[:, None]).sum()

    def adapt(
        self,
        folder: Path,
        fit_settings: FitSettings,
        testing: BatchSource | None,
        *,
        fresh: set[str],
        on_step: Callable[[int], None] | None,
    ) -> list[dict[str, Any]]:
        """Train one stage, or read what it ended with; its history."""
        done = folder / "network.pt"
        if done.exists():
            saved = load_checkpoint(done)
            self.network.load_state_dict(saved["network"])
            return saved["history"]

        def loss_of(module: nn.Module, batch: Batch) -> Tensor:
            smoothing = self.settings.label_smoothing
            return nn.functional.cross_entropy(module(batch.images).float(), batch.labels, label_smoothing=smoothing)

        def evaluate(module: nn.Module, accelerator: Accelerator) -> dict[str, float]:
            return {} if testing is None else {"test_accuracy": accuracy(module, testing, accelerator=accelerator)}

        best, history = fit(
            self.network,
            loss_of,
            self.training,
            settings=fit_settings,
            out=folder,
            fresh=fresh,
            evaluate=evaluate,
            on_step=on_step,
            identity=run_identity(self.training, self.settings),
        )
        if best is not self.network:  # the average of the weights
            self.network.load_state_dict(best.state_dict())
        if Accelerator().is_main_process:
            save_checkpoint(done, {"network": self.network.state_dict(), "history": history})
            (folder / "checkpoint.pt").unlink(missing_ok=True)
        return history


def _batches(
    network: nn.Module,
    data: str | tuple[BatchSource, BatchSource],
    fit_settings: FitSettings,
    image_settings: ImageSettings | None,
) -> tuple[BatchSource, BatchSource]:
    if isinstance(data, str):
        images = image_settings or ImageSettings()
        training = image_batches(network, data, augment=True, settings=images, seed=fit_settings.seed)
        return training, image_batches(network, data, split="test", settings=images)
    return data


def _head_of(network: nn.Module) -> str:
    config: Any = getattr(network, "pretrained_cfg", None) or {}
    name = (config if isinstance(config, dict) else config.to_dict()).get("classifier")
    if not isinstance(name, str):
        raise ValueError(f"this {type(network).__name__} names no classifier in its pretrained_cfg: pass head=NAME")
    return name


def _plan(settings: PruneSettings, fit_settings: FitSettings) -> list[tuple[float, int]]:
    """(density, epochs) of each stage."""
    shares = pruning.density_schedule(settings.density, stages=settings.stages, shape=settings.schedule)
    for name in ("stage_epochs", "criterion_batches", "least", "block_size", "num_prototypes"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(settings, name)}")
    warm = [(1.0, settings.warm_epochs)] if settings.warm_epochs > 0 else []
    if settings.density == 1.0:
        return [(1.0, settings.warm_epochs + fit_settings.epochs + settings.stage_epochs * (settings.stages - 1))]
    return [*warm, *((share, settings.stage_epochs) for share in shares[:-1]), (shares[-1], fit_settings.epochs)]


def _same_run(file: Path, now: dict[str, Any]) -> None:
    """Remember what the run is, or refuse to go on with another one's stages."""
    if file.exists():
        before = json.loads(file.read_text())
        changed = [
            f"{name}: {old} before, {now[part].get(name)} now"
            for part in ("settings", "fit")
            for name, old in before[part].items()
            if now[part].get(name) != old
        ]
        if before["samples"] != now["samples"]:
            changed.append(f"samples: {before['samples']} before, {now['samples']} now")
        if changed:
            raise ValueError(f"{file.parent} holds another run ({'; '.join(changed)}); use another folder or remove it")
    elif Accelerator().is_main_process:
        write_json(file, now)


def _save(fused: nn.Module, out: Path, metrics: dict[str, Any]) -> None:
    config: Any = getattr(fused, "pretrained_cfg", None) or {}
    config = dict(config if isinstance(config, dict) else config.to_dict())
    with atomic_file(out / "model.safetensors") as file:
        file.write(save({name: value.detach().cpu().contiguous() for name, value in fused.state_dict().items()}))
    card = {
        "pruned_host": config.get("architecture"),
        "num_classes": getattr(fused, "num_classes", None),
        "density": metrics["density"],
        "pretrained_cfg": {key: value for key, value in config.items() if value is not None},
    }
    write_json(out / "config.json", card)
    write_json(out / "metrics.json", metrics)


def load_pruned(folder: str | Path, *, network: nn.Module | None = None) -> nn.Module:
    """The fused network that :func:`adapt_pruned` wrote, in eval mode.

    Args:
        folder: ``out`` of the run.
        network: an unpruned network of the same build, cut to the stored sizes in place; None makes it by the name in
            config.json (hosts of the zoo and of timm at their usual image size).

    Raises:
        ValueError: no such files in the folder, or a network of another build.
    """
    folder = Path(folder)
    try:
        card = json.loads((folder / "config.json").read_text())
        state = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{str(folder)!r} holds no pruned network: {error}") from error
    if "pruned_host" not in card:
        raise ValueError(f"{str(folder)!r} holds no pruned network: its config.json names no pruned_host")
    if network is None:
        name = card["pruned_host"]
        if not name:
            raise ValueError(
                f"{str(folder)!r} does not say what network it was: pass network=, built as the source was"
            )
        network = sparing.create_model(name if name in MODELS else f"timm/{name}", num_classes=card["num_classes"])
    missing = sorted(network.state_dict().keys() - state.keys())
    if missing:
        raise ValueError(f"{str(folder)!r} lacks {', '.join(missing[:3])} of this {type(network).__name__}")
    resize_as(network, state).load_state_dict(state)
    return network.eval()


@dataclass(frozen=True)
class Arguments:
    """What to adapt, to what, into which folder."""

    model: str = field(metadata={"help": "the trained source: a saved folder, a name of the zoo, or timm/NAME"})
    data: str = field(metadata={"help": "training and test images of the new task, with labels"})
    out: str = field(metadata={"help": "folder of the run; the same folder resumes"})
    num_classes: int = field(default=0, metadata={"help": "of the new task; 0 = counted in the data"})
    pretrained: bool = field(default=False, metadata={"help": "start from the model's own published weights"})


def main(arguments: list[str] | None = None) -> int:
    """Command line; see ``--help``."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser([Arguments, PruneSettings, FitSettings, ImageSettings], description=__doc__)
    wanted, settings, fit_settings, image_settings = parser.parse_args_into_dataclasses(arguments)
    try:
        network: Any = sparing.create_model(wanted.model, pretrained=wanted.pretrained)
        classes = wanted.num_classes or image_batches(network, wanted.data).num_classes
        if not hasattr(network, "reset_classifier"):
            raise ValueError(f"{wanted.model} is no classifier with reset_classifier (timm's)")
        torch.manual_seed(fit_settings.seed)
        network.reset_classifier(classes)
        metrics = adapt_pruned(
            network,
            wanted.data,
            out=wanted.out,
            settings=settings,
            fit_settings=fit_settings,
            image_settings=image_settings,
        )
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if Accelerator().is_main_process:
        print(
            f"test accuracy {100 * metrics['test_accuracy']:.2f}% with {100 * metrics['density']:.1f}% of the weights, "
            f"{metrics['learned_parameters']:,} learned; model in {wanted.out}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
