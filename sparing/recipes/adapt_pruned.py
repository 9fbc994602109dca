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
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

import sparing
from sparing.continual import adapters, pruning
from sparing.continual.adapted import below
from sparing.continual.channel_groups import ChannelGroup, channel_groups, count_weights, eval_mode
from sparing.recipes.pruned_network import load_pruned, save_pruned
from sparing.recipes.train_vision import accuracy
from sparing.training import (
    Batch,
    BatchSource,
    FitSettings,
    ImageSettings,
    build_optimizers,
    epoch_order,
    fit,
    image_batches,
    load_checkpoint,
    save_checkpoint,
    write_json,
)
from sparing.training.loop import count_steps, differences, finished_run, run_identity
from sparing.zoo.fingerprints import network_fingerprint

__all__ = ["PruneSettings", "adapt_pruned", "load_pruned"]

_BLOCK_METHODS = ("splopa", "fine_blocks")
_GRADIENT_CRITERIA = ("gradient", "taylor", "relevance")
_RESULTS = ("model.safetensors", "config.json", "metrics.json")
_STAGE_FILES = ("kept.pt", "network.pt", "checkpoint.pt")


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

    def check(self) -> None:
        """Raises ValueError for a setting that cannot work."""
        adapters.check_method(self.method)
        pruning.check_criterion(self.criterion, blocks=self.method in _BLOCK_METHODS)
        pruning.check_scope(self.scope)
        pruning.density_schedule(self.density, stages=self.stages, shape=self.schedule)
        for name in ("stage_epochs", "criterion_batches", "least", "block_size", "num_prototypes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.warm_epochs < 0:
            raise ValueError(f"warm_epochs must be at least 0, got {self.warm_epochs}")
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing must lie in [0, 1], got {self.label_smoothing}")


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

    Everything is checked before the first file is written. Where ``out`` holds the result of this very run, nothing is
    trained and its metrics are returned; ``network`` is left as it was then.

    Args:
        network: a trained classifier with a head for the new task, (batch, classes) logits.
        data: images (then the network needs timm's ``pretrained_cfg``), or training and test batches.
        out: folder of the run.
        settings: method, density, schedule.
        fit_settings: seed and rates; ``epochs`` are those after the last pruning, ``fresh_lr_multiplier`` applies to
            adapters and head.
        image_settings: augmentation of images.
        head: dotted name of the new head, a layer or a module that holds some, which is neither frozen nor narrowed;
            None reads it from ``pretrained_cfg``.
        measure: take the test accuracy after every epoch for the history; that of the fused network is taken anyway.
        on_step: called with the number of optimizer steps done in the stage.

    Returns:
        What metrics.json holds, in every process.

    Raises:
        ValueError: a setting, density or method that does not go with this network, data that cannot be learned, or the
            folder of another run.
    """
    settings, fit_settings, out = settings or PruneSettings(), fit_settings or FitSettings(), Path(out)
    image_settings = image_settings or ImageSettings()
    started = time.perf_counter()
    settings.check()
    fit_settings.check()
    training, testing = _batches(network, data, fit_settings, image_settings)
    head = head if head is not None else _head_of(network)
    if not head or head not in dict(network.named_modules()):
        raise ValueError(f"head {head!r} is no module of this {type(network).__name__}")
    told = (settings, image_settings) if isinstance(data, str) else (settings,)
    identity = {**run_identity(training, *told), "head": head, "start": network_fingerprint(network)}
    accelerator = Accelerator()
    if (finished := finished_run(out, fit_settings, identity)) is not None:
        if accelerator.is_main_process:
            _clear(out)
        return finished
    whole = json.loads(json.dumps({**asdict(fit_settings), **identity}))
    _refuse_another_run(out / "run.json", whole)
    count_steps(training, fit_settings, accelerator)
    network.to(accelerator.device)
    example = _example(network, training, testing).to(accelerator.device)
    blocks = settings.method in _BLOCK_METHODS
    groups = [] if blocks else channel_groups(network, (example,), skip=(head,))
    if not blocks and not groups:
        raise ValueError(f"no channels of this {type(network).__name__} can be pruned; method splopa prunes blocks")
    before = {name for name, _ in network.named_parameters()}
    with torch.random.fork_rng():
        torch.manual_seed(fit_settings.seed)  # first values of the adapters
        adapters.adapt(
            network,
            method=settings.method,
            rank=settings.rank,
            skip=(head,),
            block_shape=(settings.block_size, settings.block_size),
            num_prototypes=settings.num_prototypes,
        )
    fresh = {name for name, _ in network.named_parameters() if name not in before or below(name, (head,))}
    build_optimizers(network, name=fit_settings.optimizer, lr=fit_settings.lr, fresh=fresh)  # refuses what fit would
    plan = _plan(settings, fit_settings)
    run = _Run(network, groups, training, head=head, settings=settings, identity=whole)
    run.check_reachable(plan[-1][0])
    accelerator.wait_for_everyone()  # no process looks for what another has begun to write
    if accelerator.is_main_process:
        write_json(out / "run.json", whole)
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
    fused = adapters.fuse(network).eval()
    metrics: dict[str, Any] = {}
    if accelerator.is_main_process:  # buffers, and with them the accuracy, may differ a little between processes
        profile = sparing.profile(fused, example[:1], measure=False)
        metrics = {
            "test_accuracy": accuracy(fused, testing),
            "test_samples": len(testing),
            "weights": weights,
            "dense_weights": run.dense,
            "density": weights / run.dense,
            "learned_parameters": learned,
            "learned_of_head": sum(p.numel() for p in fused.get_submodule(head).parameters()),
            "macs": int(profile.macs),
            "stages": rows,
            "settings": asdict(settings),
            "fit": asdict(fit_settings),
            "identity": identity,
            "versions": {"sparing": sparing.__version__, "torch": torch.__version__},
            "device": str(next(fused.parameters()).device),
            "wall_seconds": time.perf_counter() - started,
        }
        save_pruned(fused, out, metrics)
        _clear(out)
    return broadcast_object_list([metrics])[0]


class _Run:
    """A network with its groups while stage follows stage."""

    def __init__(
        self,
        network: nn.Module,
        groups: Sequence[ChannelGroup],
        training: BatchSource,
        *,
        head: str,
        settings: PruneSettings,
        identity: dict[str, Any],
    ) -> None:
        self.network, self.groups, self.training = network, groups, training
        self.head, self.settings, self.identity = head, settings, identity
        self.dense = self.weights

    @property
    def weights(self) -> int:
        return count_weights(self.network, skip=(self.head,))

    @property
    def density(self) -> float:
        return self.weights / self.dense

    def prune(self, file: Path, density: float, *, seed: int, batch_size: int, turn: int) -> None:
        """Prune to ``density`` of the dense weights; what was chosen is stored, and taken from there a second time.

        The first process chooses for all: a mask is a ranking, which the last bit of a score can turn.
        """
        if density >= 1.0:
            return
        chosen = None
        if Accelerator().is_main_process:
            if file.exists():
                chosen = load_checkpoint(file)["kept"]
            else:
                chosen = self._choose(density, seed=seed, batch_size=batch_size, turn=turn)
                save_checkpoint(file, {"kept": chosen})
        chosen = broadcast_object_list([chosen])[0]
        if isinstance(chosen, dict):
            pruning.prune_blocks(self.network, chosen)
        else:
            pruning.prune_channels(self.network, self.groups, chosen)

    def _choose(self, density: float, *, seed: int, batch_size: int, turn: int) -> Any:
        batches: list[Batch] = []
        if self.settings.criterion in _GRADIENT_CRITERIA:
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
        if self.settings.method in _BLOCK_METHODS:
            return self._best_blocks(pruning.block_importance(self.network, **look), density)
        return self._best_channels(pruning.channel_importance(self.network, self.groups, **look), density)

    def check_reachable(self, density: float) -> None:
        """Raises ValueError where no choice of blocks or channels, whatever their scores, leaves so few weights."""
        if density >= 1.0:
            return
        if self.settings.method in _BLOCK_METHODS:
            self._best_blocks(pruning.block_importance(self.network, criterion="random"), density)
        else:
            self._best_channels([torch.zeros(group.size) for group in self.groups], density)

    def _best_blocks(self, scores: dict[str, Tensor], density: float) -> dict[str, Tensor]:
        size = self.settings.block_size**2
        count = sum(score.numel() for score in scores.values())
        fixed, budget = self.dense - count * size, int(density * self.dense)
        if budget - fixed < size:
            raise ValueError(
                f"density {density:.3f} cannot be reached: {fixed:,} of {self.dense:,} weights lie outside blocks"
            )
        return pruning.choose_blocks(scores, density=(budget - fixed) / (count * size))

    def _best_channels(self, scores: list[Tensor], density: float) -> list[Tensor]:
        return pruning.choose_channels(
            self.network,
            self.groups,
            scores,
            weights=int(density * self.dense),
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
            identity=self.identity,
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
    image_settings: ImageSettings,
) -> tuple[BatchSource, BatchSource]:
    if isinstance(data, str):
        training = image_batches(network, data, augment=True, settings=image_settings, seed=fit_settings.seed)
        return training, image_batches(network, data, split="test", settings=image_settings)
    return data


@torch.no_grad()
def _example(network: nn.Module, training: BatchSource, testing: BatchSource) -> Tensor:
    """Two training samples. Raises ValueError for data of which the network cannot learn."""
    if len(training) < 2 or len(testing) < 1:
        raise ValueError(f"two training samples and a test sample are needed, got {len(training)} and {len(testing)}")
    if training.num_classes < 2:
        raise ValueError(f"the training data need labels of two classes at least, got {training.num_classes}")
    example = next(training.batches(torch.arange(2), batch_size=2, epoch=0)).images
    with eval_mode(network):
        logits = network(example.to(next(network.parameters()).device))
    if logits.ndim != 2 or logits.shape[1] < training.num_classes:
        raise ValueError(
            f"the data have {training.num_classes} classes, this {type(network).__name__} returns "
            f"{tuple(logits.shape)} for two samples: give it a head of as many classes"
        )
    return example


def _head_of(network: nn.Module) -> str:
    config: Any = getattr(network, "pretrained_cfg", None) or {}
    name = (config if isinstance(config, dict) else config.to_dict()).get("classifier")
    if not isinstance(name, str):
        raise ValueError(f"this {type(network).__name__} names no classifier in its pretrained_cfg: pass head=NAME")
    return name


def _plan(settings: PruneSettings, fit_settings: FitSettings) -> list[tuple[float, int]]:
    """(density, epochs) of each stage."""
    shares = pruning.density_schedule(settings.density, stages=settings.stages, shape=settings.schedule)
    warm = [(1.0, settings.warm_epochs)] if settings.warm_epochs > 0 else []
    if settings.density == 1.0:
        return [(1.0, settings.warm_epochs + fit_settings.epochs + settings.stage_epochs * (settings.stages - 1))]
    return [*warm, *((share, settings.stage_epochs) for share in shares[:-1]), (shares[-1], fit_settings.epochs)]


def _refuse_another_run(file: Path, now: dict[str, Any]) -> None:
    """Raises ValueError where the stages beside run.json are those of another run, or it is missing beside some."""
    if not file.exists():
        if strays := [path for name in _STAGE_FILES for path in file.parent.glob(f"stage_*/{name}")]:
            raise ValueError(f"{strays[0]} is of a run without {file.name}; use another folder or remove it")
        return
    try:
        changed = differences(before := dict(json.loads(file.read_text(encoding="utf-8"))), now)
    except (ValueError, TypeError):
        raise ValueError(f"{file} is not of this recipe; use another folder or remove it") from None
    if changed:
        hint = "; start is a hash of the weights that it began from" if before.get("start") != now["start"] else ""
        raise ValueError(
            f"{file.parent} holds another run ({'; '.join(changed)}{hint}); use another folder or remove it"
        )


def _clear(out: Path) -> None:
    """Remove what a run leaves on its way, the temporary files of a killed one too; files of others stay."""
    for name in ("run.json", *_RESULTS):
        for temporary in out.glob(f".{name}.*"):
            temporary.unlink()
    (out / "run.json").unlink(missing_ok=True)
    for folder in [path for path in out.glob("stage_*") if path.is_dir()]:
        for name in _STAGE_FILES:
            for left in (folder / name, *folder.glob(f".{name}.*")):
                left.unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()


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
