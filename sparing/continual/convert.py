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
from sparing.continual.per_frame import ALIKE, Flatten, LayerNorm, Linear, PerFrame, Softmax, is_per_frame
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
    """
    if time_dim != 2:
        raise ValueError(
            f"time must be axis 2 of the clips, (N, C, T, ...), got time_dim={time_dim}: permute the input"
        )
    place = Place("", pool_window, sequence_len, per_frame, dict(converters or {}))
    check_plain(module, place)
    twin = _convert(copy.deepcopy(module), place)
    if not isinstance(twin, Continual):
        twin = Sequential(OrderedDict(layer=twin))
    return twin.train(module.training)


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


def _softmax(softmax: Any, place: Place) -> nn.Module:
    if softmax.dim != 1:
        raise place.refuse(softmax, f"runs over axis {softmax.dim}; only the channel axis 1 is known on a stream")
    return Softmax()


def _over_time(module: nn.Module, place: Place) -> nn.Module:
    if not place.per_frame:
        raise place.refuse(
            module,
            "takes its statistics over time, so clip and step would differ; use batch norm, or pass per_frame=True "
            "to apply it to each frame alone (another function)",
        )
    return PerFrame(module)


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every child by its name, one that stands in two places twice (``named_children`` leaves it out)."""
    return [(name, child) for name, child in module._modules.items() if child is not None]


def _sequential(sequence: nn.Module, place: Place) -> nn.Module:
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    flattened = place.flattened
    for name, child in _children(sequence):
        parts[name] = _convert(child, place.inside(name, flattened=flattened))
        flattened = flattened or isinstance(parts[name], Flatten)
    return Sequential(parts)


def _encoder(encoder: Any, place: Place) -> nn.Module:
    first = encoder.layers[0]
    if place.sequence_len is None:
        raise place.refuse(encoder, "attends over the whole clip: pass sequence_len=, the window of tokens of a step")
    names = {F.relu: "relu", F.gelu: "gelu", nn.ReLU: "relu", nn.GELU: "gelu"}
    activation = names.get(first.activation) or names.get(type(first.activation))  # type: ignore[call-overload]
    if activation is None or getattr(first.activation, "approximate", "none") != "none":
        raise place.refuse(encoder, f"has activation {first.activation}; relu and exact gelu are known")
    if first.linear1.bias is None or first.self_attn.in_proj_weight is None:
        raise place.refuse(encoder, "has layers without bias or with separate widths of keys and values")
    if encoder.norm is not None and type(encoder.norm) is not nn.LayerNorm:
        raise place.refuse(encoder, f"ends in {type(encoder.norm).__name__}; a LayerNorm is known")
    twin = TransformerEncoder(
        first.self_attn.embed_dim,
        first.self_attn.num_heads,
        dim_feedforward=first.linear1.out_features,
        num_layers=len(encoder.layers),
        sequence_len=place.sequence_len,
        activation=activation,
        norm_first=first.norm_first,
        final_norm=encoder.norm is not None,
        layer_norm_eps=first.norm1.eps,
        dropout=first.dropout.p,
    )
    twin.load_state_dict(encoder.state_dict())
    return twin.to(first.linear1.weight.device, first.linear1.weight.dtype)


def _attention(attention: Any, place: Place) -> nn.Module:
    if place.sequence_len is None:
        raise place.refuse(attention, "attends over the whole clip: pass sequence_len=, the window of tokens of a step")
    if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
        raise place.refuse(attention, "has separate widths, bias_kv or add_zero_attn, which are not known on a stream")
    twin = SingleOutputAttention(
        attention.embed_dim,
        attention.num_heads,
        sequence_len=place.sequence_len,
        bias=attention.in_proj_bias is not None,
    )
    twin.load_state_dict(attention.state_dict())
    return twin.to(attention.in_proj_weight.device, attention.in_proj_weight.dtype)


# ---- torchvision's video networks, under their own keys


class CoVideoBlock(Branches, nn.Module):
    """torchvision's ``BasicBlock`` and ``Bottleneck`` of video ResNets. Their shortcuts are delayed at the input: the
    temporal stride puts the outputs of the two branches on different steps.
    """

    def __init__(self, block: Any, place: Place) -> None:
        super().__init__()
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
    nn.AdaptiveAvgPool2d: _adaptive(pools.AdaptiveAvgPool2d),
    nn.AdaptiveAvgPool3d: _adaptive(pools.AdaptiveAvgPool3d),
    nn.AdaptiveMaxPool2d: _adaptive(pools.AdaptiveMaxPool2d),
    nn.AdaptiveMaxPool3d: _adaptive(pools.AdaptiveMaxPool3d),
    nn.Linear: _linear,
    nn.LayerNorm: _layer_norm,
    nn.Flatten: _flatten,
    nn.Softmax: _softmax,
    nn.LogSoftmax: _over_time,
    nn.GroupNorm: _over_time,
    nn.modules.instancenorm._InstanceNorm: _over_time,
    nn.GLU: _over_time,
    nn.Sequential: _sequential,
    nn.TransformerEncoder: _encoder,
    nn.MultiheadAttention: _attention,
}


def explain(network: Continual, frame_shape: tuple[int, ...] | None = None) -> str:
    """A table of every layer with time: receptive field, delay, stride, padding, bytes of memory per stream; then the
    whole.

    Args:
        frame_shape: (C, ...) of one frame; without it the bytes are left out.
    """
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
