"""Which channels of a network are dropped together, read from its exported graph.

A channel that one layer produces is read by others: dropping it takes a row of the producer, its entries of the norms
behind it and a column of every consumer; a residual sum ties the channels of all its branches. :func:`channel_groups`
walks the graph of ``torch.export`` and follows each layer's output channels through norms, activations, pools, sums and
reshapes. Where an operation mixes channels in a way that is not known here (attention, layer norm over them,
concatenation, the network's output), the channels are left alone: what is not understood is not pruned.

Structured pruning by dependency follows Hedegaard et al., *Structured Pruning Adapters*, and Fang et al., *DepGraph*
(CVPR 2023).
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparing.continual.adapted import Adapted, covered, kept_part, places, stored_weight

__all__ = ["ChannelGroup", "channel_groups", "check_kept", "count_weights", "eval_mode", "prune_group", "resize_as"]

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_ELEMENTWISE = {
    *("relu", "relu6", "gelu", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "hardtanh", "leaky_relu", "elu"),
    *("mish", "dropout", "feature_dropout", "clone", "contiguous", "detach", "alias", "to", "_to_copy", "abs", "neg"),
    *("clamp", "pow", "sqrt"),
}
_POOLS = ("avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool", "upsample_nearest", "upsample_bilinear")
_BINARY = ("add", "sub", "mul", "div", "maximum", "minimum")
_MEANS = ("mean", "sum", "amax", "amin")
_RESHAPES = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view")


@dataclass
class ChannelGroup:
    """``size`` channels that are dropped together.

    ``producers`` have them as outputs, ``depthwise`` layers and ``norms`` pass them on, ``consumers`` read them: (name,
    consecutive inputs that one channel makes, more than 1 behind a flattening).
    """

    size: int
    producers: list[str] = field(default_factory=list)
    depthwise: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    consumers: list[tuple[str, int]] = field(default_factory=list)


class _Label(NamedTuple):
    """Of a tensor: axis ``axis`` carries the channels of ``space``, each as ``repeat`` consecutive entries."""

    space: int
    axis: int
    repeat: int


class _Spaces:
    """Union-find over channel spaces."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.groups: list[ChannelGroup] = []
        self.blocked: list[bool] = []

    def new(self, size: int, *, blocked: bool = False) -> int:
        self.parent.append(len(self.parent))
        self.groups.append(ChannelGroup(size))
        self.blocked.append(blocked)
        return len(self.parent) - 1

    def root(self, space: int) -> int:
        while self.parent[space] != space:
            space = self.parent[space]
        return space

    def of(self, space: int) -> ChannelGroup:
        return self.groups[self.root(space)]

    def block(self, space: int) -> None:
        self.blocked[self.root(space)] = True

    def join(self, one: int, two: int) -> None:
        one, two = self.root(one), self.root(two)
        if one == two:
            return
        if self.groups[one].size != self.groups[two].size:
            self.blocked[one] = self.blocked[two] = True
            return
        self.parent[two] = one
        self.blocked[one] = self.blocked[one] or self.blocked[two]
        for name in ("producers", "depthwise", "norms", "consumers"):
            getattr(self.groups[one], name).extend(getattr(self.groups[two], name))


def channel_groups(network: nn.Module, example: tuple[Tensor, ...], *, skip: Iterable[str] = ()) -> list[ChannelGroup]:
    """Groups of channels of a plain network (before adapters are put in; names stay valid after it).

    Args:
        network: exported in eval mode; left as it is.
        example: its inputs, batch of 2 or more so that the batch axis is not mistaken for another.
        skip: dotted names of layers, or of modules that hold them, whose outputs are kept whole.

    Returns:
        In the order of the graph; groups of one channel, and of networks' inputs and outputs, are not among them. A
        layer that is called several times ties what it reads; where one of its calls reads channels that cannot be
        dropped, all are left alone.

    Raises:
        ValueError: a name in ``skip`` that is not there, or a network that carries adapters.
    """
    spared = covered(network, skip)
    if carrying := [name or "(the network)" for name, layer in places(network).items() if isinstance(layer, Adapted)]:
        raise ValueError(f"{carrying[0]} carries an adapter: find the groups before adapters are put in, or fuse first")
    with eval_mode(network):
        program = torch.export.export(network, example, strict=False)
    walk = _Walk(network, program, spared)
    for node in program.graph.nodes:
        walk.visit(node)
    spaces = walk.spaces
    found = [
        spaces.groups[space]
        for space in range(len(spaces.parent))
        if spaces.parent[space] == space and not spaces.blocked[space]
    ]
    for group in found:
        for name in ("producers", "depthwise", "norms", "consumers"):
            setattr(group, name, list(dict.fromkeys(getattr(group, name))))
    return [group for group in found if group.producers and group.consumers and group.size > 1]


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """The network in eval mode; afterwards every part is in the mode that it was in."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class _Walk:
    def __init__(self, network: nn.Module, program: Any, spared: set[int]) -> None:
        signature = program.graph_signature
        self.names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.modules = dict(network.named_modules())
        self.spared = spared  # ids of modules
        self.spaces = _Spaces()
        self.labels: dict[Any, _Label] = {}
        self.outputs: dict[str, int] = {}
        self.inputs: dict[str, _Label] = {}
        seen: dict[int, str] = {}
        self.tied: set[str] = set()
        for name, tensor in (
            *network.named_parameters(remove_duplicate=False),
            *network.named_buffers(remove_duplicate=False),
        ):
            first = seen.setdefault(id(tensor), name)
            if first != name:
                self.tied |= {first.rpartition(".")[0], name.rpartition(".")[0]}

    def visit(self, node: Any) -> None:
        if node.op == "output":
            self.block(node.all_input_nodes)
        if node.op != "call_function":
            return
        name = getattr(getattr(node.target, "_schema", None), "name", str(node.target)).removeprefix("aten::")
        name = name.removesuffix("_") if not name.startswith("_") else name
        label = self.labels.get(node.args[0]) if node.args and not isinstance(node.args[0], (list, tuple)) else None
        if name in ("conv1d", "conv2d", "conv3d", "convolution", "linear"):
            self.layer(node, label)
        elif name in ("batch_norm", "_native_batch_norm_legit_no_training"):
            self.norm(node, label)
        elif name in _BINARY:
            self.binary(node)
        elif name == "cat":
            self.cat(node)
        elif label is None:
            self.block(node.all_input_nodes)
        elif name in _ELEMENTWISE or (label.axis == 1 and name.startswith(_POOLS) and isinstance(_value(node), Tensor)):
            self.labels[node] = label
        elif name in _MEANS:
            self.mean(node, label)
        elif name in _RESHAPES:
            self.reshape(node, label)
        elif name in ("permute", "transpose"):
            self.permute(node, label, name)
        elif name == "pad":
            untouched = 2 * (_value(node).ndim - label.axis) > len(node.args[1])
            self.keep_if(node, label, untouched)
        else:
            self.block(node.all_input_nodes)

    def block(self, nodes: Iterable[Any]) -> None:
        for node in nodes:
            if node in self.labels:
                self.spaces.block(self.labels[node].space)

    def keep_if(self, node: Any, label: _Label, keeps: bool) -> None:
        if keeps:
            self.labels[node] = label
        else:
            self.spaces.block(label.space)

    def layer(self, node: Any, label: _Label | None) -> None:
        name, _, leaf = self.names.get(node.args[1].name, "").rpartition(".")
        module: Any = self.modules.get(name)
        known = isinstance(module, _LAYERS) and leaf == "weight" and name not in self.tied
        axis = _value(node).ndim - 1 if isinstance(module, nn.Linear) else 1
        if not known:
            self.block(node.all_input_nodes)
            return
        groups = getattr(module, "groups", 1)
        self.read(name, label, size=module.weight.shape[1] * groups)
        if groups > 1 and groups == module.in_channels == module.out_channels and label is not None:
            self.keep_if(node, label, label.axis == 1 and label.repeat == 1 and id(module) not in self.spared)
            self.spaces.of(label.space).depthwise.append(name)
            return
        if label is not None:
            reads = _value(node.args[0]).ndim - 1 if isinstance(module, nn.Linear) else 1
            if groups != 1 or label.axis != reads:
                self.spaces.block(label.space)
            self.spaces.of(label.space).consumers.append((name, label.repeat))
        if name not in self.outputs:
            size = module.weight.shape[0]
            self.outputs[name] = self.spaces.new(size, blocked=groups != 1 or id(module) in self.spared)
            self.spaces.of(self.outputs[name]).producers.append(name)
        self.labels[node] = _Label(self.outputs[name], axis, 1)

    def read(self, name: str, label: _Label | None, *, size: int) -> None:
        """Tie what a layer reads now to what it read in its calls before: it has one width. None: the network's input
        or what became of it, whose channels stay.
        """
        if label is None:
            label = _Label(self.spaces.new(size, blocked=True), 1, 1)
        first = self.inputs.setdefault(name, label)
        if first.repeat != label.repeat:
            self.spaces.block(first.space)
            self.spaces.block(label.space)
        self.spaces.join(first.space, label.space)

    def norm(self, node: Any, label: _Label | None) -> None:
        source = next((arg.name for arg in node.args[1:5] if getattr(arg, "name", None) in self.names), "")
        name = self.names.get(source, "").rpartition(".")[0]
        module: Any = self.modules.get(name)
        if not isinstance(module, _NORMS) or name in self.tied:  # one without any tensor has no name in the graph
            self.block(node.all_input_nodes)
            return
        self.read(name, label, size=module.num_features)
        if label is not None:
            self.keep_if(node, label, label.axis == 1 and label.repeat == 1 and id(module) not in self.spared)
            self.spaces.of(label.space).norms.append(name)

    def binary(self, node: Any) -> None:
        operands = [arg for arg in node.args[:2] if hasattr(arg, "meta")]
        labelled = [arg for arg in operands if arg in self.labels]
        rank = _value(node).ndim
        from_end = {self.labels[arg].axis - _value(arg).ndim for arg in labelled}
        repeats = {self.labels[arg].repeat for arg in labelled}
        if not labelled:
            return
        if len(from_end) != 1 or len(repeats) != 1:
            self.block(labelled)
            return
        back = from_end.pop()
        for arg in operands:
            shape = _value(arg).shape
            if arg not in self.labels and len(shape) >= -back and shape[back] != 1:
                self.block(labelled)
                return
        first = self.labels[labelled[0]]
        for arg in labelled[1:]:
            self.spaces.join(first.space, self.labels[arg].space)
        self.labels[node] = _Label(first.space, rank + back, first.repeat)

    def cat(self, node: Any) -> None:
        parts = list(node.args[0])
        axis = (node.args[1] if len(node.args) > 1 else 0) % _value(node).ndim
        labels = [self.labels.get(part) for part in parts]
        first = labels[0]
        if first is None or any(
            label is None or label.axis != first.axis or label.repeat != first.repeat or label.axis == axis
            for label in labels
        ):
            self.block(parts)
            return
        for label in labels[1:]:
            self.spaces.join(first.space, label.space)  # type: ignore[union-attr]
        self.labels[node] = first

    def mean(self, node: Any, label: _Label) -> None:
        rank = _value(node.args[0]).ndim
        dims = node.args[1] if len(node.args) > 1 and isinstance(node.args[1], (list, tuple, int)) else range(rank)
        gone = {d % rank for d in ([dims] if isinstance(dims, int) else dims)}
        lost = 0 if _value(node).ndim == rank else sum(d < label.axis for d in gone)
        self.keep_if(node, label._replace(axis=label.axis - lost), label.axis not in gone)

    def reshape(self, node: Any, label: _Label) -> None:
        old, new = _value(node.args[0]).shape, _value(node).shape
        before, length, after = prod(old[: label.axis]), old[label.axis], prod(old[label.axis + 1 :])
        for axis, size in enumerate(new):
            times = size // length
            if prod(new[:axis]) == before and size == length * times and prod(new[axis + 1 :]) * times == after:
                self.labels[node] = _Label(label.space, axis, label.repeat * times)
                return
        self.spaces.block(label.space)

    def permute(self, node: Any, label: _Label, name: str) -> None:
        rank = _value(node).ndim
        if name == "permute":
            order = [d % rank for d in node.args[1]]
        else:
            order = list(range(rank))
            one, two = (d % rank for d in node.args[1:3])
            order[one], order[two] = order[two], order[one]
        self.labels[node] = label._replace(axis=order.index(label.axis))


def _value(node: Any) -> Any:
    return node.meta["val"]


def prune_group(network: nn.Module, group: ChannelGroup, kept: Tensor) -> None:
    """Drop channels of a group everywhere, in place: the tensors get smaller. Layers may carry adapters by now.

    Args:
        kept: (group.size,) bool.

    Raises:
        ValueError: a mask of another shape, or one that keeps nothing.
    """
    check_kept(group, kept)
    for name in group.producers:
        _shrink(network.get_submodule(name), out_kept=kept)
    for name in group.depthwise:
        _shrink(network.get_submodule(name), out_kept=kept, in_kept=kept)
    for name in group.norms:
        _shrink_norm(network.get_submodule(name), kept)
    for name, repeat in group.consumers:
        _shrink(network.get_submodule(name), in_kept=kept.repeat_interleave(repeat))
    group.size = int(kept.sum())


def check_kept(group: ChannelGroup, kept: Tensor) -> None:
    """Raises ValueError for a mask that is not bool (group.size,), or keeps nothing."""
    if kept.dtype != torch.bool or kept.shape != (group.size,):
        raise ValueError(f"kept must be bool ({group.size},), got {kept.dtype} {tuple(kept.shape)}")
    if not bool(kept.any()):
        raise ValueError(f"a group must keep one of its {group.size} channels at least ({', '.join(group.producers)})")


def _shrink(layer: Any, *, out_kept: Tensor | None = None, in_kept: Tensor | None = None) -> None:
    if isinstance(layer, Adapted):
        layer.prune(out_kept=out_kept, in_kept=in_kept)
        return
    depthwise = getattr(layer, "groups", 1) > 1
    layer.weight = kept_part(kept_part(layer.weight, 0, out_kept), 1, None if depthwise else in_kept)
    if out_kept is not None and layer.bias is not None:
        layer.bias = kept_part(layer.bias, 0, out_kept)
    _note_sizes(layer)


def _note_sizes(layer: Any) -> None:
    """Bring a layer's own account of its sizes in line with its tensors."""
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, _NORMS):
        layer.num_features = len(layer.running_mean if layer.weight is None else layer.weight)  # type: ignore[arg-type]
    else:
        if layer.groups > 1 and layer.weight.shape[1] == 1:
            layer.groups = len(layer.weight)
        layer.out_channels, layer.in_channels = layer.weight.shape[0], layer.weight.shape[1] * layer.groups


def _shrink_norm(norm: Any, kept: Tensor) -> None:
    for name in ("weight", "bias"):
        if getattr(norm, name) is not None:
            setattr(norm, name, kept_part(getattr(norm, name), 0, kept))
    for name in ("running_mean", "running_var"):  # None in a norm that normalises by the batch in eval mode too
        if getattr(norm, name) is not None:
            setattr(norm, name, getattr(norm, name)[kept.to(getattr(norm, name).device)])
    norm.num_features = int(kept.sum())


def count_weights(network: nn.Module, *, skip: Sequence[str] = ()) -> int:
    """Weights (not biases) of the convolutions and linear layers; a dropped block of a linear layer counts as gone.

    Args:
        network: plain or with adapters.
        skip: dotted names of layers, or of modules that hold them, that are not counted.

    Raises:
        ValueError: a name in ``skip`` that is not there.
    """
    total, spared = 0, covered(network, skip)
    for layer in network.modules():
        if id(layer) not in spared and isinstance(layer, (*_LAYERS, Adapted)):
            kept = getattr(layer, "kept", None)
            weights = stored_weight(layer).numel()
            total += weights if kept is None else weights * int(kept.sum()) // kept.numel()
    return total


def resize_as(network: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Cut the layers of a network, plain or with adapters, to the shapes that ``state`` has, in place; values are
    loaded afterwards.

    Raises:
        ValueError: a tensor of ``state`` that this network does not have, or one that is larger or of another rank.
    """
    modules = places(network)
    for name, layer in modules.items():
        if isinstance(layer, Adapted) and f"{name}.weight" in state:
            _shrink_adapted(layer, state[f"{name}.weight"].shape)
    for key, tensor in state.items():
        name, _, leaf = key.rpartition(".")
        module: Any = modules.get(name)
        have = (
            stored_weight(module) if isinstance(module, Adapted) and leaf == "weight" else getattr(module, leaf, None)
        )
        if not isinstance(have, Tensor):
            raise ValueError(f"the file has {key}, which this {type(network).__name__} does not have")
        if have.shape == tensor.shape:
            continue
        fits = have.ndim == tensor.ndim and all(new <= old for new, old in zip(tensor.shape, have.shape))
        if not fits or not isinstance(module, (*_LAYERS, *_NORMS)):
            raise ValueError(f"{key} is {tuple(tensor.shape)} in the file, {tuple(have.shape)} in the network")
        smaller = torch.empty(tensor.shape, dtype=have.dtype, device=have.device)
        if isinstance(have, nn.Parameter):
            smaller = nn.Parameter(smaller, requires_grad=have.requires_grad)
        setattr(module, leaf, smaller)
        if leaf in ("weight", "running_mean"):
            _note_sizes(module)
    return network


def _shrink_adapted(layer: Any, shape: torch.Size) -> None:
    """Keep the first channels of an adapted layer, as many as ``shape`` of its weight has, where it has fewer."""
    have, groups = stored_weight(layer).shape, getattr(layer, "groups", 1)
    if len(shape) == len(have) and shape != have and all(new <= old for new, old in zip(shape, have)):
        rows = torch.arange(shape[0])
        layer.prune(out_kept=rows, in_kept=rows if groups > 1 else torch.arange(shape[1]))
