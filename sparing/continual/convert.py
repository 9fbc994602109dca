"""A clip network to its continual twin, with the same weights under the same keys.

``convert`` walks ``nn.Sequential`` s, torchvision's video ResNets and S3D, and ``nn.TransformerEncoder`` s. What
cannot be told from the modules alone must be said: the window that replaces a pool over the whole clip, and the
window of attention. A module that has no continual form is refused with its path and a way out; nothing is converted
halfway.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from sparing.continual import pool as pools
from sparing.continual.attention import SingleOutputAttention
from sparing.continual.container import Branches, Chain, Part, Sequential
from sparing.continual.conv import Conv1d, Conv2d, Conv3d
from sparing.continual.encoder import TransformerEncoder
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
from sparing.continual.state import state_bytes

Converter = Callable[[nn.Module, "Place"], nn.Module]


@dataclass(frozen=True)
class Place:
    """Where a module stands, and what the user said about the conversion."""

    path: str
    pool_window: int | None
    sequence_len: int | None
    per_frame: bool
    converters: Mapping[type, Converter]
    flattened: bool = False  # frames are (C,) from here on
    # What modules became, by module and form of the frames: one that stands in several places is one in the twin too.
    # (The module is kept beside its twin, so that its id stays its own.)
    done: dict[tuple[int, bool], tuple[nn.Module, nn.Module]] = field(default_factory=dict)

    def inside(self, name: str, *, flattened: bool | None = None) -> "Place":
        path = f"{self.path}.{name}" if self.path else name
        return replace(self, path=path, flattened=self.flattened if flattened is None else flattened)

    def refuse(self, module: nn.Module, why: str) -> ValueError:
        return ValueError(f"{self.path or 'the network'} ({type(module).__name__}): {why}")


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


def check_plain(module: nn.Module, place: Place | None = None) -> None:
    """Refuse what a copy of the layers would lose: weights that are computed or do not exist yet, hooks, and a
    forward of one's own. Types that the user converts are the user's.

    Raises:
        ValueError: with the path and the fix.
    """
    place = place or Place("", None, None, False, {})
    if any(kind in place.converters for kind in type(module).__mro__):
        return
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
        raise place.refuse(module, "has no weights yet: run the clip network on one clip first")
    if is_parametrized(module):
        names = sorted(module.parametrizations)  # type: ignore[arg-type]
        raise place.refuse(
            module,
            f"computes its {', '.join(names)} by a parametrization: fuse it first with "
            f"torch.nn.utils.parametrize.remove_parametrizations(module, {names[0]!r})",
        )
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    if hooks:
        hook = getattr(hooks[0], "__name__", type(hooks[0]).__name__)
        remove = _REMOVE.get(hook, "the handle that registering it returned, or make it a module of the network")
        raise place.refuse(module, f"has a forward hook ({hook}), which no step would call: remove it with {remove}")
    if "forward" in vars(module):
        raise place.refuse(module, f"has a forward that was set on the module: {_OWN_WAY}")
    for name, child in _children(module):
        check_plain(child, place.inside(name))


# Hooks of torch that compute a weight, and what takes them off.
_REMOVE = {
    "WeightNorm": "torch.nn.utils.remove_weight_norm(module)",
    "SpectralNorm": "torch.nn.utils.remove_spectral_norm(module)",
}
_OWN_WAY = "pass converters={its type: function}, or wrap it in PerFrame if its output at a frame depends on it only"
# Methods in which a layer's forward is spread over its class.
_FORWARD = ("forward", "_conv_forward", "__call__")


def _same_forward(module: nn.Module, kind: type) -> bool:
    """Whether a subclass computes what ``kind`` does: it may be built otherwise, but not run otherwise."""
    return all(getattr(type(module), name, None) is getattr(kind, name, None) for name in _FORWARD)


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
            if not _same_forward(module, kind):
                raise place.refuse(module, f"has a forward of its own, not that of {kind.__name__}: {_OWN_WAY}")
            return _CONVERTERS[kind](module, place)
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
        raise place.refuse(
            module,
            "has no running statistics, so those of the batch would mix streams: build it with "
            "track_running_stats=True and train it",
        )
    if is_per_frame(module):
        if not any(_same_forward(module, kind) for kind in type(module).__mro__[:-1] if kind in ALIKE):
            raise place.refuse(module, f"has a forward of its own, not that of a torch layer: {_OWN_WAY}")
        return module
    raise place.refuse(module, f"has no continual form; {_OWN_WAY}")


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


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every child by its name, one that stands in two places twice (``named_children`` leaves it out)."""
    return [(name, child) for name, child in module._modules.items() if child is not None]


def _sequential(sequence: nn.Module, place: Place) -> nn.Module:
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    flattened, width = place.flattened, None
    for name, child in _children(sequence):
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


def _encoder(encoder: Any, place: Place) -> nn.Module:
    _check_window(encoder, place)
    if not len(encoder.layers):
        raise place.refuse(encoder, "has no layers")
    places = [place.inside(f"layers.{i}") for i in range(len(encoder.layers))]
    settings = [_encoder_settings(layer, at) for layer, at in zip(encoder.layers, places)]
    for layer, at, mine in zip(encoder.layers, places, settings):
        differ = [
            f"{name} {mine[name]} (first layer: {value})" for name, value in settings[0].items() if mine[name] != value
        ]
        if differ:
            raise at.refuse(layer, f"is built otherwise than the first layer: {', '.join(differ)}")
    if encoder.norm is not None:
        if type(encoder.norm) is not nn.LayerNorm:
            raise place.refuse(encoder, f"ends in {type(encoder.norm).__name__}; a LayerNorm is known")
        _check_norm(encoder.norm, place.inside("norm"))
    with torch.device("meta"):
        twin = TransformerEncoder(
            sequence_len=place.sequence_len,  # type: ignore[arg-type]
            num_layers=len(encoder.layers),
            final_norm=encoder.norm is not None,
            dropout=encoder.layers[0].dropout.p,
            **settings[0],
        )
    if twin.norm is not None:
        twin.norm.eps = encoder.norm.eps
    return _with_weights_of(encoder, twin)


def _encoder_settings(layer: Any, place: Place) -> dict[str, Any]:
    """The constructor's arguments of one layer's twin. ValueError for a layer that has none."""
    if type(layer) is not nn.TransformerEncoderLayer:
        raise place.refuse(layer, "is not torch's TransformerEncoderLayer")
    names = {F.relu: "relu", F.gelu: "gelu", nn.ReLU: "relu", nn.GELU: "gelu"}
    activation = names.get(layer.activation) or names.get(type(layer.activation))  # type: ignore[call-overload]
    if activation is None or getattr(layer.activation, "approximate", "none") != "none":
        raise place.refuse(layer, f"has activation {layer.activation}; relu and exact gelu are known")
    if layer.linear1.bias is None or layer.self_attn.in_proj_weight is None:
        raise place.refuse(layer, "has no bias, or separate widths of keys and values; torch's defaults are known")
    if layer.self_attn.bias_k is not None or layer.self_attn.add_zero_attn:
        raise place.refuse(layer, "has bias_kv or add_zero_attn, which are not known on a stream")
    for name in ("norm1", "norm2"):
        _check_norm(getattr(layer, name), place.inside(name))
    if layer.norm1.eps != layer.norm2.eps:
        raise place.refuse(layer, f"has two norms of different eps, {layer.norm1.eps} and {layer.norm2.eps}")
    return {
        "d_model": layer.self_attn.embed_dim,
        "num_heads": layer.self_attn.num_heads,
        "dim_feedforward": layer.linear1.out_features,
        "activation": activation,
        "norm_first": layer.norm_first,
        "layer_norm_eps": layer.norm1.eps,
    }


def _check_window(module: nn.Module, place: Place) -> None:
    if place.sequence_len is None:
        raise place.refuse(module, "attends over the whole clip: pass sequence_len=, the window of tokens of a step")
    if not isinstance(place.sequence_len, int) or place.sequence_len < 1:
        raise place.refuse(module, f"sequence_len must be a whole number of tokens, got {place.sequence_len}")


def _check_norm(norm: Any, place: Place) -> None:
    if norm.weight is None or norm.bias is None:
        raise place.refuse(norm, "has no weight or no bias; elementwise_affine=True and bias=True are known")


def _attention(attention: Any, place: Place) -> nn.Module:
    _check_window(attention, place)
    if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
        raise place.refuse(attention, "has separate widths, bias_kv or add_zero_attn, which are not known on a stream")
    with torch.device("meta"):
        twin = SingleOutputAttention(
            attention.embed_dim,
            attention.num_heads,
            sequence_len=place.sequence_len,  # type: ignore[arg-type]
            bias=attention.in_proj_bias is not None,
        )
    return _with_weights_of(attention, twin)


def _with_weights_of(module: nn.Module, twin: nn.Module) -> nn.Module:
    """``twin`` with the very parameters of ``module``, so that what is shared stays shared; their keys are the same."""
    assert set(twin.state_dict()) == set(module.state_dict())
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(owner), leaf, parameter)
    return twin


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
    nn.TransformerEncoder: _encoder,
    nn.MultiheadAttention: _attention,
}


def explain(network: Continual, frame_shape: tuple[int, ...] | None = None) -> str:
    """A table of every layer with time: receptive field, delay, stride, padding, bytes of memory per stream; then the
    whole.

    Args:
        frame_shape: (C, ...) of one frame; without it the bytes are left out.

    Raises:
        ValueError: frames that a layer cannot step on, with its path.
        TypeError: a network that does not run on streams.
    """
    if not isinstance(network, Continual):
        raise TypeError(f"{type(network).__name__} does not run on streams: convert it first")
    state = None if frame_shape is None else network.init_state(1, frame_shape)
    rows: list[tuple[str, ...]] = [("layer", "kind", "R", "delay", "stride", "padding", "bytes/stream")]
    for name, module in network.named_modules(remove_duplicate=False):  # type: ignore[attr-defined]
        if (
            not isinstance(module, Continual)
            or module is network
            or (module.span().receptive_field == 1 == module.span().stride)
        ):
            continue
        span, size = module.span(), ""
        if state is not None:
            size = str(_bytes_under(state.memory, name.split(".")))
        numbers = (span.receptive_field, span.delay, span.stride, span.padding)
        rows.append((name, type(module).__name__, *(str(n) for n in numbers), size))
    plan = network.plan()
    whole = (plan.receptive_field, plan.delay, plan.period, plan.padding)
    total = "" if state is None else str(state_bytes(state))
    rows.append(("whole", type(network).__name__, *(str(n) for n in whole), total))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    lines.append(f"first output at step {plan.first_output_step}, then every {plan.period}")
    if plan.equals_clip_of_last_frames:
        lines.append(f"a step equals the clip network on the last {plan.receptive_field} frames (no temporal padding)")
    else:
        lines.append(
            f"a step equals the network over the whole stream, not the clip network on the last {plan.receptive_field} "
            "frames: temporal padding shows the clip zeros where the stream has frames"
        )
    return "\n".join(lines)


def _bytes_under(memory: dict, path: list[str]) -> int:
    for key in path:
        if not isinstance(memory, dict) or key not in memory:
            return 0
        memory = memory[key]
    pending, total = [memory], 0
    while pending:
        for value in pending.pop().values():
            if isinstance(value, dict):
                pending.append(value)
            else:
                total += value.numel() * value.element_size()
    return total
