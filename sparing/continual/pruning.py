"""What to prune and when: importance of channels and blocks, the choice of those that go, the schedule.

Criteria of Hedegaard et al., *Structured Pruning Adapters*, all on the **adapted** weight: magnitude (``sum |w|^p``),
gradient (``sum |g|^p``), Taylor (``sum |w g|``; Molchanov et al. 2019), relevance (LRP of Yeom et al. 2021, in the form
it takes in networks of ReLUs: activation times the gradient of the true class), and random ones to compare with. A
channel's score is the mean over the members of its group: rows of producers, entries of batch norm's gamma, columns of
consumers (magnitude group importance, p = 2, of Fang et al., *DepGraph*, CVPR 2023).
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparing.continual.adapted import covered, stored_weight, wide
from sparing.continual.adapters import BlockLinear, SPLoPALinear, fuse
from sparing.continual.block_adapters import block_sums
from sparing.continual.channel_groups import ChannelGroup, check_kept, count_weights, prune_group

__all__ = [
    "CRITERIA",
    "SCHEDULES",
    "block_importance",
    "channel_importance",
    "check_criterion",
    "check_scope",
    "choose_blocks",
    "choose_channels",
    "density_schedule",
    "prune_blocks",
    "prune_channels",
]

CRITERIA = ("magnitude", "gradient", "taylor", "relevance", "random")
SCHEDULES = ("geometric", "linear", "cubic")

# One call for each batch: run the given network, return (scalar loss, score of the true class summed over the batch).
Backward = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]


def density_schedule(density: float, *, stages: int, shape: str = "geometric") -> list[float]:
    """Share of the weights that is left after each of ``stages`` prunings; the last is ``density``.

    'geometric' drops the same share of what is left each time, 'linear' the same number of weights, 'cubic' most of
    them early (Zhu and Gupta 2017).

    Raises:
        ValueError: numbers out of range, or an unknown shape.
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density is the share of weights that is kept, in (0, 1], got {density}")
    if stages < 1:
        raise ValueError(f"stages must be at least 1, got {stages}")
    if shape not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {shape!r}")
    done = [(stage + 1) / stages for stage in range(stages)]
    if shape == "geometric":
        return [density**t for t in done]
    if shape == "linear":
        return [1 - (1 - density) * t for t in done]
    return [density + (1 - density) * (1 - t) ** 3 for t in done]


def check_criterion(criterion: str, *, blocks: bool = False) -> None:
    """Raises ValueError for an unknown criterion, or one that does not rank ``blocks``."""
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}")
    if blocks and criterion == "relevance":
        raise ValueError("criterion 'relevance' ranks channels, not blocks; use magnitude, gradient, taylor or random")


def check_scope(scope: str) -> None:
    """Raises ValueError for an unknown scope of :func:`choose_channels`."""
    if scope not in ("global", "group"):
        raise ValueError(f"scope must be 'global' or 'group', got {scope!r}")


class _Probe:
    """A fused copy of a network with gradients of its weights, or the relevance of what some layers read.

    The copy computes in the network's own precision; gradients are summed and scores taken in float32 at least, since a
    square of a small fp16 weight is zero.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        criterion: str,
        power: float,
        batches: Sequence[Any],
        backward: Backward | None,
        readers: Iterable[str] = (),
    ) -> None:
        if not 0 < power < float("inf"):
            raise ValueError(f"power must be positive and finite, got {power}")
        self.criterion, self.power = criterion, power
        self.network = fuse(copy.deepcopy(network)).eval()
        self.relevance: dict[str, Tensor] = {}
        self.gradients: dict[nn.Parameter, Tensor] = {}
        if criterion == "magnitude":
            return
        if not batches or backward is None:
            raise ValueError(f"criterion {criterion!r} needs batches and a backward function")
        for parameter in self.network.parameters():
            parameter.requires_grad_(True).grad = None
        read: dict[str, list[Tensor]] = {}
        hooks = []
        if criterion == "relevance":
            for name in set(readers):
                layer = self.network.get_submodule(name)
                hooks.append(layer.register_forward_pre_hook(_keeper(read.setdefault(name, []))))
        with torch.enable_grad():
            for batch in batches:
                loss, truth = backward(self.network, batch)
                (truth if criterion == "relevance" else loss).backward()
                self._gather(read)
        for hook in hooks:
            hook.remove()
        if silent := sorted(read.keys() - self.relevance.keys()):
            raise ValueError(f"relevance: layer {silent[0]!r} was not called with a gradient by the backward function")

    def _gather(self, read: dict[str, list[Tensor]]) -> None:
        for name, tensors in read.items():
            axis = -1 if isinstance(self.network.get_submodule(name), nn.Linear) else 1
            for x in tensors:
                if x.grad is not None:
                    now = (wide(x) * wide(x.grad)).movedim(axis, -1).flatten(0, -2).sum(0)
                    self.relevance[name] = self.relevance.get(name, torch.zeros_like(now)) + now
            tensors.clear()
        for parameter in self.network.parameters():
            if parameter.grad is not None:
                before = self.gradients.get(parameter)
                self.gradients[parameter] = wide(parameter.grad) if before is None else before + wide(parameter.grad)
                parameter.grad = None

    def values(self, parameter: nn.Parameter) -> Tensor:
        """Importance of each number of a parameter."""
        weight = wide(parameter)
        if self.criterion == "magnitude":
            return weight.abs().pow(self.power)
        gradient = self.gradients.get(parameter, torch.zeros_like(weight))
        return gradient.abs().pow(self.power) if self.criterion == "gradient" else (weight * gradient).abs()


def _check_finite(score: Tensor, criterion: str, names: Iterable[str]) -> None:
    if not bool(torch.isfinite(score).all()):
        raise ValueError(
            f"{criterion} of {', '.join(names)} is NaN or infinite: the weights, or what the batches make of them, "
            "hold NaN or huge values"
        )


def _keeper(into: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].requires_grad:
            inputs[0].retain_grad()
            into.append(inputs[0])

    return keep


def channel_importance(
    network: nn.Module,
    groups: Sequence[ChannelGroup],
    *,
    criterion: str = "magnitude",
    power: float = 2,
    batches: Sequence[Any] = (),
    backward: Backward | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """One (size,) tensor for each group: the mean over its members, divided by the group's own mean.

    Args:
        network: plain or with adapters; it is copied and fused, and left as it is.
        groups: of :func:`~sparing.continual.channel_groups.channel_groups`.
        criterion: one of ``CRITERIA``.
        power: p of magnitude and gradient.
        batches: that gradient, Taylor and relevance look at.
        backward: how to run one; see ``Backward``.
        seed: of the random criterion.

    Raises:
        ValueError: unknown criterion, one that needs batches and has none, a power that is not positive, or scores that
            are not finite.
    """
    check_criterion(criterion)
    if criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        return [torch.rand(group.size, generator=generator) for group in groups]
    readers = [name for group in groups for name, _ in group.consumers]
    probe = _Probe(network, criterion=criterion, power=power, batches=batches, backward=backward, readers=readers)
    scores = []
    for group in groups:
        if criterion == "relevance":
            members = [probe.relevance[name].view(group.size, repeat).sum(1) for name, repeat in group.consumers]
        else:
            members = _weight_scores(probe, group)
        mean = torch.stack(members).mean(0).cpu()
        _check_finite(mean, criterion, group.producers)
        scores.append(mean / mean.abs().mean().clamp_min(torch.finfo(mean.dtype).tiny))
    return scores


def _weight_scores(probe: _Probe, group: ChannelGroup) -> list[Tensor]:
    modules: dict[str, Any] = dict(probe.network.named_modules())
    members = [probe.values(modules[name].weight).flatten(1).sum(1) for name in (*group.producers, *group.depthwise)]
    members += [probe.values(modules[name].weight) for name in group.norms if modules[name].weight is not None]
    for name, repeat in group.consumers:
        columns = probe.values(modules[name].weight).transpose(0, 1).flatten(1).sum(1)
        members.append(columns.view(group.size, repeat).sum(1))
    return members


def choose_channels(
    network: nn.Module,
    groups: Sequence[ChannelGroup],
    scores: Sequence[Tensor],
    *,
    weights: int,
    scope: str = "global",
    least: int = 1,
    skip: Sequence[str] = (),
) -> list[Tensor]:
    """Masks (size,) bool that keep the most important channels such that at most ``weights`` weights are left.

    Args:
        scope: 'global' ranks all channels together, 'group' keeps the same share of every group.
        least: channels that each group keeps at least.
        skip: names of layers, or of modules that hold them, whose weights are not counted.

    Raises:
        ValueError: even the smallest network of these groups has more weights (the number is named), no groups, scores
            of another shape or not finite, ``least`` below 1, or an unknown scope.
    """
    _check_choice(groups, scores, scope=scope, least=least)
    order = [score.argsort(descending=True, stable=True) for score in scores]
    # the place of each channel in the order of dropping, from 0 (goes first)
    if scope == "global":
        spared = [torch.zeros(group.size, dtype=torch.bool) for group in groups]
        for mask, best in zip(spared, order, strict=True):
            mask[best[:least]] = True
        flat = torch.cat(list(scores)).masked_fill(torch.cat(spared), float("inf"))
    else:
        ranks = [
            torch.empty(group.size).scatter_(0, best, torch.arange(group.size) / group.size)
            for group, best in zip(groups, order, strict=True)
        ]
        flat = torch.cat([(1 - rank).masked_fill(rank * len(rank) < least - 0.5, float("inf")) for rank in ranks])
    places = flat.argsort(stable=True)
    most = int((flat < float("inf")).sum())
    sizes = [group.size for group in groups]

    def masks(dropped: int) -> list[Tensor]:
        kept = torch.ones(len(flat), dtype=torch.bool)
        kept[places[:dropped]] = False
        return list(kept.split(sizes))

    def left(dropped: int) -> int:
        return _weights_left(network, groups, masks(dropped), skip)

    if left(most) > weights:
        raise ValueError(
            f"{weights:,} weights cannot be reached by dropping channels: with {least} channel(s) in each of "
            f"{len(groups)} groups {left(most):,} of {count_weights(network, skip=skip):,} are left"
        )
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if left(middle) <= weights else (middle + 1, high)
    return masks(low)


def _check_choice(groups: Sequence[ChannelGroup], scores: Sequence[Tensor], *, scope: str, least: int) -> None:
    check_scope(scope)
    if least < 1:
        raise ValueError(f"least must be at least 1, got {least}: a group cannot lose all of its channels")
    if not groups:
        raise ValueError("there are no groups of channels, so none can be dropped")
    shapes, sizes = [tuple(score.shape) for score in scores], [(group.size,) for group in groups]
    if shapes != sizes:
        raise ValueError(f"scores must be one tensor for each group, of shapes {sizes}, got {shapes}")
    for group, score in zip(groups, scores):
        _check_finite(score, "score", group.producers)


def _weights_left(
    network: nn.Module, groups: Sequence[ChannelGroup], masks: Sequence[Tensor], skip: Sequence[str]
) -> int:
    """Weights after pruning, from the sizes alone."""
    rows: dict[str, float] = {}
    columns: dict[str, float] = {}
    for group, mask in zip(groups, masks, strict=True):
        share = float(mask.sum()) / group.size
        for name in (*group.producers, *group.depthwise):
            rows[name] = share
        for name, _ in group.consumers:
            columns[name] = share
    total, spared = count_weights(network, skip=skip), covered(network, skip)
    for name in dict.fromkeys((*rows, *columns)):
        layer = network.get_submodule(name)
        if id(layer) not in spared:
            weights = stored_weight(layer).numel()
            total += round(weights * rows.get(name, 1.0) * columns.get(name, 1.0)) - weights
    return total


def block_importance(
    network: nn.Module,
    *,
    criterion: str = "magnitude",
    power: float = 2,
    batches: Sequence[Any] = (),
    backward: Backward | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """(out / p, in / q) for every layer with prunable blocks, by name; dropped blocks have -inf.

    Raises:
        ValueError: unknown criterion, 'relevance' (it scores what a layer reads, not its blocks), one that needs
            batches and has none, a power that is not positive, scores that are not finite, or a network without such
            layers.
    """
    layers = _block_layers(network)
    if not layers:
        raise ValueError(f"this {type(network).__name__} has no layer whose blocks can be pruned")
    check_criterion(criterion, blocks=True)
    if criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        scores = {name: torch.rand(layer.kept.shape, generator=generator) for name, layer in layers.items()}
    else:
        probe = _Probe(network, criterion=criterion, power=power, batches=batches, backward=backward)
        fused: dict[str, Any] = {name: probe.network.get_submodule(name) for name in layers}
        scores = {
            name: block_sums(probe.values(fused[name].weight), layer.block_shape).cpu()
            for name, layer in layers.items()
        }
    for name, layer in layers.items():
        _check_finite(scores[name], criterion, [name])
        scores[name] = scores[name].masked_fill(~layer.kept.cpu(), float("-inf"))
    return scores


def _block_layers(network: nn.Module) -> dict[str, SPLoPALinear | BlockLinear]:
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, (SPLoPALinear, BlockLinear))}


def choose_blocks(scores: Mapping[str, Tensor], *, density: float) -> dict[str, Tensor]:
    """Bool masks that keep the best ``density`` of all blocks, ranked together.

    Raises:
        ValueError: a density outside (0, 1], or one that keeps no block at all; no scores, or NaN among them.
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density is the share of blocks that is kept, in (0, 1], got {density}")
    if not scores:
        raise ValueError("there are no scores of blocks, so none can be chosen")
    if wrong := [name for name, score in scores.items() if bool(score.isnan().any())]:
        raise ValueError(f"the scores of {', '.join(wrong)} hold NaN")
    flat = torch.cat([score.flatten() for score in scores.values()])
    count = int(density * len(flat) + 1e-6)
    if count < 1:
        raise ValueError(f"density {density} keeps none of {len(flat)} blocks")
    kept = torch.zeros(len(flat), dtype=torch.bool)
    kept[flat.argsort(descending=True, stable=True)[:count]] = True
    parts = kept.split([score.numel() for score in scores.values()])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def prune_blocks(network: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Drop blocks in place.

    Args:
        network: adapted by 'splopa' or 'fine_blocks'.
        kept: for every layer with prunable blocks, by name, (out / p, in / q) bool.

    Raises:
        ValueError: a name too many or too few, or a mask of another shape or type; nothing is dropped then.
    """
    layers = _block_layers(network)
    if unknown := sorted(kept.keys() - layers.keys()):
        raise ValueError(f"kept names {unknown}, which are no layers with prunable blocks; those are {sorted(layers)}")
    if lacking := sorted(layers.keys() - kept.keys()):
        raise ValueError(f"kept lacks {lacking}; give True for every block of a layer that stays whole")
    for name, layer in layers.items():
        if kept[name].dtype != torch.bool or kept[name].shape != layer.kept.shape:
            raise ValueError(
                f"kept[{name!r}] must be bool {tuple(layer.kept.shape)}, got {kept[name].dtype} "
                f"{tuple(kept[name].shape)}"
            )
    for name, layer in layers.items():
        layer.prune_blocks(kept[name])


def prune_channels(network: nn.Module, groups: Sequence[ChannelGroup], kept: Sequence[Tensor]) -> None:
    """Drop channels in place: every tensor that they run through gets smaller.

    Raises:
        ValueError: not one mask for each group, or one of another shape or that keeps nothing; nothing is dropped then.
    """
    if len(groups) != len(kept):
        raise ValueError(f"kept must be one mask for each of {len(groups)} groups, got {len(kept)}")
    for group, mask in zip(groups, kept):
        check_kept(group, mask)
    for group, mask in zip(groups, kept, strict=True):
        prune_group(network, group, mask)
