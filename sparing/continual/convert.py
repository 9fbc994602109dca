"""A clip network to its continual twin, with the same weights under the same keys.

``convert`` walks ``nn.Sequential`` s, torchvision's video ResNets and S3D, and ``nn.TransformerEncoder`` s. What
cannot be told from the modules alone must be said: the window that replaces a pool over the whole clip, and the
window of attention. A module that has no continual form is refused with its path and a way out; nothing is converted
halfway.
"""

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparing.continual import pool as pools
from sparing.continual.attention_twins import attention_twin, encoder_twin
from sparing.continual.container import Branches, Chain, Part, Sequential
from sparing.continual.conv import Conv1d, Conv2d, Conv3d
from sparing.continual.module import Continual
from sparing.continual.per_frame import (
    ALIKE,
    GLU,
    Flatten,
    LayerNorm,
    Linear,
    LogSoftmax,
    PerFrame,
    Softmax,
    is_per_frame,
)
from sparing.continual.place import OWN_WAY, Converter, Place, check_plain, children, same_forward


def convert(
    module: nn.Module,
    *,
    time_dim: int = 2,
    pool_window: int | None = None,
    sequence_len: int | None = None,
    per_frame: bool = False,
    converters: Mapping[type, Converter] | None = None,
) -> Any:
    """The continual twin of a clip network; the network itself is left untouched.

    Clips keep their time axis: where the clip network ends in (N, classes), the twin gives (N, classes, T').

    Args:
        module: ``nn.Sequential``, a single layer, a torchvision ``VideoResNet`` or ``S3D``, or an
            ``nn.TransformerEncoder``.
        time_dim: the axis of time in the network's clips; only 2, (N, C, T, ...), can be converted.
        pool_window: frames that replace "the whole clip" in adaptive pools (counted where the pool stands, behind
            strides).
        sequence_len: window of attention in transformers, whose twin takes tokens channels-first (N, E, T).
        per_frame: apply layers whose statistics run over time (GroupNorm, InstanceNorm) to each frame alone,
            which is another function than the clip network's.
        converters: further types and how to convert them: ``(module, place) -> continual module``.

    Raises:
        ValueError: a layer without continual form; the message names its path and what to do.
        TypeError: no module at all.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a clip network, an nn.Module, got {type(module).__name__}")
    if time_dim != 2:
        raise ValueError(
            f"time must be axis 2 of the clips, (N, C, T, ...), got time_dim={time_dim}: permute the input"
        )
    place = Place("", pool_window, sequence_len, per_frame, dict(converters or {}))
    check_plain(module, place)
    twin = _convert(copy.deepcopy(module), place)
    _take_modes(twin.train(module.training), module)
    return twin if isinstance(twin, Continual) else Sequential(OrderedDict(layer=twin)).train(module.training)


def _take_modes(twin: nn.Module, module: nn.Module) -> None:
    """Every part in the mode of the layer that it came from: a frozen batch norm stays frozen."""
    parts = dict(twin.named_modules(remove_duplicate=False))
    for name, layer in module.named_modules(remove_duplicate=False):
        if name in parts:
            parts[name].training = layer.training


def _convert(module: nn.Module, place: Place) -> nn.Module:
    """The twin of a module at its place. A module that is met again is the same twin again, with the same weights;
    memories belong to places (containers keep them by name), so each place has its own.
    """
    key = (id(module), place.flattened)
    if key not in place.done:
        place.done[key] = module, _converted(module, place)
    return place.done[key][1]


def _converted(module: nn.Module, place: Place) -> nn.Module:
    for kind in type(module).__mro__:
        if kind in place.converters:
            return place.converters[kind](module, place)
    if isinstance(module, Continual):
        return module
    name = type(module).__name__
    if name in _TORCHVISION and type(module).__module__.startswith("torchvision.models.video"):
        return _TORCHVISION[name](module, place)
    for kind in type(module).__mro__:
        if kind in _CONVERTERS:
            if not same_forward(module, kind):
                raise place.refuse(module, f"has a forward of its own, not that of {kind.__name__}: {OWN_WAY}")
            return _CONVERTERS[kind](module, place)
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
        raise place.refuse(
            module,
            "has no running statistics, so those of the batch would mix streams: build it with "
            "track_running_stats=True and train it",
        )
    if is_per_frame(module):
        if not any(same_forward(module, kind) for kind in type(module).__mro__[:-1] if kind in ALIKE):
            raise place.refuse(module, f"has a forward of its own, not that of a torch layer: {OWN_WAY}")
        return module
    raise place.refuse(module, f"has no continual form; {OWN_WAY}")


def _conv(kind: Any) -> Converter:
    def build(conv: Any, place: Place) -> nn.Module:
        try:
            twin = kind(
                conv.in_channels,
                conv.out_channels,
                conv.kernel_size,
                stride=conv.stride,
                padding=conv.padding,
                dilation=conv.dilation,
                groups=conv.groups,
                bias=conv.bias is not None,
                padding_mode=conv.padding_mode,
                device="meta",
            )
        except ValueError as error:
            raise place.refuse(conv, str(error)) from error
        twin.weight, twin.bias = conv.weight, conv.bias
        return twin

    return build


def _pool(kind: Any) -> Converter:
    def build(pool: Any, place: Place) -> nn.Module:
        options = {"ceil_mode": pool.ceil_mode}
        if hasattr(pool, "count_include_pad"):
            options |= {
                "count_include_pad": pool.count_include_pad,
                "divisor_override": getattr(pool, "divisor_override", None),
            }
        else:
            options |= {"dilation": pool.dilation, "return_indices": pool.return_indices}
        try:
            return kind(pool.kernel_size, stride=pool.stride, padding=pool.padding, **options)
        except ValueError as error:
            raise place.refuse(pool, str(error)) from error

    return build


def _adaptive(kind: Any) -> Converter:
    def build(pool: Any, place: Place) -> nn.Module:
        if place.pool_window is None:
            raise place.refuse(pool, "pools the whole clip: pass pool_window=, the frames that a step pools instead")
        if getattr(pool, "return_indices", False):
            raise place.refuse(
                pool, "returns indices, which are places in the clip: build it with return_indices=False"
            )
        try:
            return kind(pool.output_size, window=place.pool_window)
        except ValueError as error:
            raise place.refuse(pool, str(error)) from error

    return build


def _linear(linear: Any, place: Place) -> nn.Module:
    if not place.flattened:
        raise place.refuse(
            linear, "acts on the last axis of the clip; put nn.Flatten(1) before it, or use continual.Linear"
        )
    twin = Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    twin.weight, twin.bias = linear.weight, linear.bias
    return twin


def _layer_norm(norm: Any, place: Place) -> nn.Module:
    if not place.flattened:
        raise place.refuse(
            norm, "acts on the last axes of the clip, time among them; use continual.LayerNorm over channels"
        )
    twin = LayerNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=norm.weight is not None)
    twin.weight, twin.bias = norm.weight, norm.bias
    return twin


def _flatten(flatten: Any, place: Place) -> nn.Module:
    if flatten.start_dim != 1 or flatten.end_dim != -1:
        raise place.refuse(
            flatten, f"flattens axes {flatten.start_dim}..{flatten.end_dim}; only nn.Flatten(1) is known"
        )
    return Flatten()


def _over_channels(kind: type[nn.Module]) -> Converter:
    """Layers along one axis, which must be the channels. Behind a Flatten clips were (N, C), where that is the last."""

    def build(layer: Any, place: Place) -> nn.Module:
        if layer.dim != 1 and not (place.flattened and layer.dim == -1):
            raise place.refuse(layer, f"runs over axis {layer.dim}; only the channel axis 1 is known on a stream")
        return kind()

    return build


def _over_time(module: nn.Module, place: Place) -> nn.Module:
    if not place.per_frame:
        raise place.refuse(
            module,
            "takes its statistics over time, so clip and step would differ; use batch norm, or pass per_frame=True "
            "to apply it to each frame alone (another function)",
        )
    if isinstance(module, nn.InstanceNorm1d):
        raise place.refuse(
            module, "takes its statistics over time alone, and a frame has one value a channel: use another"
        )
    return PerFrame(module)


def _recurrent(layer: Any, place: Place) -> nn.Module:
    name = type(layer).__name__
    raise place.refuse(
        layer,
        f"runs over (T, N, C) or (N, T, C): use continual.{name} in its place, which takes clips (N, C, T) and has the "
        "same state dict",
    )


def _sequential(sequence: nn.Module, place: Place) -> nn.Module:
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    flattened, width = place.flattened, None
    for name, child in children(sequence):
        if isinstance(child, nn.Linear) and flattened and width not in (None, child.in_features):
            raise place.inside(name).refuse(
                child,
                f"takes {child.in_features} features, a frame has {width}: flattening time into features has no "
                "continual form; pool over time (nn.AdaptiveAvgPool1d(1) with pool_window=), or use a Conv1d whose "
                "kernel is the clip",
            )
        width = _width(child, width)
        parts[name] = _convert(child, place.inside(name, flattened=flattened))
        flattened = flattened or _flattens(parts[name])
    return Sequential(parts)


def _width(module: nn.Module, before: int | None) -> int | None:
    """Numbers in a frame behind a clip module, where they are known: frames of one-dimensional layers are (C,)."""
    if isinstance(module, nn.Conv1d):
        return module.out_channels
    if isinstance(module, nn.Linear):
        return module.out_features
    same = (nn.Flatten, nn.AvgPool1d, nn.MaxPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d)
    return before if isinstance(module, same) or is_per_frame(module) else None


def _flattens(module: nn.Module) -> bool:
    """Whether frames are (C,) behind a twin because it flattens them, itself or in a chain."""
    if isinstance(module, Chain):
        return any(_flattens(part) for _, part in module.parts())
    return isinstance(module, Flatten)


# ---- torchvision's video networks, under their own keys


class CoVideoBlock(Branches, nn.Module):
    """torchvision's ``BasicBlock`` and ``Bottleneck`` of video ResNets. Their shortcuts are delayed at the input: the
    temporal stride puts the outputs of the two branches on different steps.
    """

    def __init__(self, block: Any, place: Place) -> None:
        super().__init__()
        if type(block.relu) is not nn.ReLU:
            raise place.inside("relu").refuse(block.relu, "stands where torchvision's block has its ReLU")
        self.count = 3 if hasattr(block, "conv3") else 2
        for i in range(1, self.count + 1):
            self.add_module(f"conv{i}", _convert(getattr(block, f"conv{i}"), place.inside(f"conv{i}")))
        self.downsample = None
        if block.downsample is not None:
            self.downsample = _convert(block.downsample, place.inside("downsample"))
        self.relu = nn.ReLU()
        self._align(align="input")

    def branches(self) -> list[list[Part]]:
        main = [(f"conv{i}", self._modules[f"conv{i}"]) for i in range(1, self.count + 1)]
        return [main, [] if self.downsample is None else [("downsample", self.downsample)]]  # type: ignore[list-item]

    def join(self, outputs: list[Tensor]) -> Tensor:
        return self.relu(outputs[0] + outputs[1])


class CoVideoResNet(Chain, nn.Module):
    """torchvision's ``VideoResNet`` (r3d_18, mc3_18, r2plus1d_18) on a stream."""

    names = ("stem", "layer1", "layer2", "layer3", "layer4", "avgpool", "flatten", "fc")

    def __init__(self, network: Any, place: Place) -> None:
        super().__init__()
        for name in self.names:
            child = nn.Flatten() if name == "flatten" else getattr(network, name)
            self.add_module(name, _convert(child, place.inside(name, flattened=name == "fc")))

    def parts(self) -> list[Part]:
        return [(name, self._modules[name]) for name in self.names]  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        """Clips (N, C, T, H, W) to (N, classes, 1)."""
        for _, module in self.parts():
            x = module(x)
        return x


class CoInception(Branches, nn.Module):
    """torchvision's ``SepInceptionBlock3D``: four branches, concatenated."""

    def __init__(self, block: Any, place: Place) -> None:
        super().__init__()
        for i in range(4):
            self.add_module(f"branch{i}", _convert(getattr(block, f"branch{i}"), place.inside(f"branch{i}")))
        self._align()

    def branches(self) -> list[list[Part]]:
        return [[(f"branch{i}", self._modules[f"branch{i}"])] for i in range(4)]  # type: ignore[list-item]

    def join(self, outputs: list[Tensor]) -> Tensor:
        return torch.cat(outputs, 1)


class CoS3D(Chain, nn.Module):
    """torchvision's ``S3D`` on a stream: its last mean over the clip becomes a sliding one."""

    names = ("features", "avgpool", "classifier", "mean", "flatten")

    def __init__(self, network: Any, place: Place) -> None:
        super().__init__()
        for name in ("features", "avgpool", "classifier"):
            self.add_module(name, _convert(getattr(network, name), place.inside(name)))
        self.mean = _convert(nn.AdaptiveAvgPool3d(1), place.inside("mean"))
        self.flatten = Flatten()

    def parts(self) -> list[Part]:
        return [(name, self._modules[name]) for name in self.names]  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        """Clips (N, C, T, H, W) to (N, classes, 1)."""
        for _, module in self.parts():
            x = module(x)
        return x


_TORCHVISION: dict[str, Converter] = {
    "BasicBlock": CoVideoBlock,
    "Bottleneck": CoVideoBlock,
    "VideoResNet": CoVideoResNet,
    "SepInceptionBlock3D": CoInception,
    "S3D": CoS3D,
}

_CONVERTERS: dict[type, Converter] = {
    nn.Conv1d: _conv(Conv1d),
    nn.Conv2d: _conv(Conv2d),
    nn.Conv3d: _conv(Conv3d),
    nn.AvgPool1d: _pool(pools.AvgPool1d),
    nn.AvgPool2d: _pool(pools.AvgPool2d),
    nn.AvgPool3d: _pool(pools.AvgPool3d),
    nn.MaxPool1d: _pool(pools.MaxPool1d),
    nn.MaxPool2d: _pool(pools.MaxPool2d),
    nn.MaxPool3d: _pool(pools.MaxPool3d),
    nn.AdaptiveAvgPool1d: _adaptive(pools.AdaptiveAvgPool1d),
    nn.AdaptiveAvgPool2d: _adaptive(pools.AdaptiveAvgPool2d),
    nn.AdaptiveAvgPool3d: _adaptive(pools.AdaptiveAvgPool3d),
    nn.AdaptiveMaxPool1d: _adaptive(pools.AdaptiveMaxPool1d),
    nn.AdaptiveMaxPool2d: _adaptive(pools.AdaptiveMaxPool2d),
    nn.AdaptiveMaxPool3d: _adaptive(pools.AdaptiveMaxPool3d),
    nn.Linear: _linear,
    nn.LayerNorm: _layer_norm,
    nn.Flatten: _flatten,
    nn.Softmax: _over_channels(Softmax),
    nn.LogSoftmax: _over_channels(LogSoftmax),
    nn.GLU: _over_channels(GLU),
    nn.RNN: _recurrent,
    nn.GRU: _recurrent,
    nn.LSTM: _recurrent,
    nn.GroupNorm: _over_time,
    nn.modules.instancenorm._InstanceNorm: _over_time,
    nn.Sequential: _sequential,
    nn.TransformerEncoder: encoder_twin,
    nn.MultiheadAttention: attention_twin,
}
