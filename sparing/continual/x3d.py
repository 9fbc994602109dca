"""CoX3D: X3D on live video, one frame at a time, with the clip network's weights as they are.

Feichtenhofer, *X3D* (CVPR 2020); Hedegaard and Iosifidis, *Continual 3D Convolutional Neural Networks* (ECCV 2022),
sections 3-4. The only temporal layers are the stem's 5x1x1 convolution, the depthwise 3x3x3 convolution of every
block, the pool of the head and, depending on its scope, squeeze-excitation. Clips (N, 3, T, H, W) to (N, classes,
T'); frames (streams, 3, H, W) to (streams, classes). State-dict keys are those of the published X3D checkpoints.

Squeeze-excitation scopes (``se_scope``):

* ``frame`` (default, all published results): the mean of the current frame; no memory. Not what the clip network
  does.
* ``clip``: the sliding mean of the last W frames, applied to the frame of W-1 steps ago; adds W-1 steps of delay
  per block.
* ``causal``: the mean of the last W frames (those there are), applied to the current frame; no delay.

``forward(x)`` pools squeeze-excitation over the whole clip as X3D does; ``forward(x, se='stream')`` uses the scope of
the stream, and equals what the steps say. Head windows longer than the clip ("pool extended to 64") cost nothing and
are worth 7 to 9 points.
"""

import math
import re
from typing import Any

from torch import Tensor, nn

from sparing.continual.container import Branches, Chain, Part, Sequential, named_sequential
from sparing.continual.conv import Conv3d
from sparing.continual.module import over_stream
from sparing.continual.per_frame import Flatten, Linear
from sparing.continual.pool import AdaptiveAvgPool3d, AvgPool3d
from sparing.continual.timing import Span
from sparing.zoo.registry import register_model

SE_SCOPES = ("frame", "clip", "causal")
# size -> clip frames, image size, depth factor
SIZES = {"xs": (4, 160, 2.2), "s": (13, 160, 2.2), "m": (16, 224, 2.2), "l": (16, 312, 5.0)}
_BASE_DEPTHS = (1, 2, 5, 3)
# What the shipped small network tells apart (sparing/recipes/emoji_motions.py).
MOTION_LABELS = ("blink", "down", "grow", "left", "right", "shake", "shrink", "still", "turn", "up")


def round_width(width: float, multiplier: float, *, divisor: int = 8) -> int:
    """Width times multiplier to a multiple of 8, at least 8, never more than 10% below."""
    width *= multiplier
    rounded = max(divisor, int(width + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * width else rounded


class CausalMean(AdaptiveAvgPool3d):
    """Mean over space and the last ``window`` frames, those there are; speaks at once."""

    counts_padding = False

    def __init__(self, *, window: int) -> None:
        super().__init__((1, 1, 1), window=window)

    def _span(self) -> Span:
        return Span(self.window)

    def _reduce(self, windows: Tensor, counts: Tensor | int | None) -> Tensor:
        return windows.sum(-1) / counts


class SqueezeExcite(Branches, nn.Module):
    """``x * sigmoid(fc2(relu(fc1(mean))))`` with the mean of one of three scopes; see the module docstring."""

    def __init__(self, channels: int, squeezed: int, *, scope: str, window: int) -> None:
        super().__init__()
        if scope not in SE_SCOPES:
            raise ValueError(f"se_scope must be one of {', '.join(SE_SCOPES)}, got {scope!r}")
        pool = {"frame": AdaptiveAvgPool3d((1, 1, 1), window=1), "causal": CausalMean(window=window)}
        self.pool = pool.get(scope, AdaptiveAvgPool3d((1, 1, 1), window=window))
        self.fc1 = Conv3d(channels, squeezed, 1)
        self.fc2 = Conv3d(squeezed, channels, 1)
        self.relu, self.sigmoid = nn.ReLU(), nn.Sigmoid()
        self._align()

    def branches(self) -> list[list[Part]]:
        gate = [(name, self._modules[name]) for name in ("pool", "fc1", "relu", "fc2", "sigmoid")]
        return [gate, []]  # type: ignore[list-item]

    def join(self, outputs: list[Tensor]) -> Tensor:
        return outputs[0] * outputs[1]

    def forward(self, x: Tensor, se: str = "clip") -> Tensor:
        """Clip (N, C, T, H, W), gated by the mean of the whole clip, or by the scope of the stream."""
        if se == "stream":
            return over_stream(self, x)
        return x * self.sigmoid(self.fc2(self.relu(self.fc1(x.mean((2, 3, 4), keepdim=True)))))


class X3DBlock(Branches, nn.Module):
    """Bottleneck with a depthwise temporal convolution: ``relu(branch2(x) + shortcut(x))``."""

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        dim_inner: int,
        *,
        spatial_stride: int,
        groups: int,
        temporal_kernel: int = 3,
        se_dim: int | None = None,
        se_scope: str = "frame",
        se_window: int = 1,
        temporal_fill: str = "zeros",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        stride = (1, spatial_stride, spatial_stride)
        parts: dict[str, nn.Module] = {
            "a": Conv3d(dim_in, dim_inner, 1, bias=False),
            "a_bn": nn.BatchNorm3d(dim_inner, eps=eps),
            "a_relu": nn.ReLU(),
            "b": Conv3d(
                dim_inner,
                dim_inner,
                (temporal_kernel, 3, 3),
                stride=stride,
                padding=(temporal_kernel // 2, 1, 1),
                groups=groups,
                bias=False,
                temporal_fill=temporal_fill,
            ),
            "b_bn": nn.BatchNorm3d(dim_inner, eps=eps),
        }
        if se_dim is not None:
            parts["se"] = SqueezeExcite(dim_inner, se_dim, scope=se_scope, window=se_window)
        parts |= {
            "swish": nn.SiLU(),
            "c": Conv3d(dim_inner, dim_out, 1, bias=False),
            "c_bn": nn.BatchNorm3d(dim_out, eps=eps),
        }
        self.branch2 = named_sequential(**parts)
        self.projects = dim_in != dim_out or spatial_stride != 1
        if self.projects:
            self.branch1 = Conv3d(dim_in, dim_out, 1, stride=stride, bias=False)
            self.branch1_bn = nn.BatchNorm3d(dim_out, eps=eps)
        self.relu = nn.ReLU()
        self._align()

    def branches(self) -> list[list[Part]]:
        shortcut = [("branch1", self.branch1), ("branch1_bn", self.branch1_bn)] if self.projects else []
        return [[("branch2", self.branch2)], shortcut]  # type: ignore[list-item]

    def join(self, outputs: list[Tensor]) -> Tensor:
        return self.relu(outputs[0] + outputs[1])

    def forward(self, x: Tensor, se: str = "clip") -> Tensor:
        """Clip mode; ``se`` as :meth:`SqueezeExcite.forward`."""
        y = x
        for part in self.branch2:
            y = part(y, se) if isinstance(part, SqueezeExcite) else part(y)
        shortcut = self.branch1_bn(self.branch1(x)) if self.projects else x
        # A sliding squeeze-excitation ends W-1 frames early, and so does the sum.
        return self.join([y, shortcut[:, :, : y.shape[2]]])


class X3DStage(Sequential):
    """Blocks ``pathway0_res{i}``; the first has the spatial stride, every even one squeeze-excitation."""

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        dim_inner: int,
        num_blocks: int,
        *,
        spatial_stride: int = 2,
        groups: int | None = None,
        se_dim: int | None = None,
        se_blocks: tuple[int, ...] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        chosen = tuple(range(0, num_blocks, 2)) if se_blocks is None else se_blocks
        for i in range(num_blocks):
            block = X3DBlock(
                dim_in if i == 0 else dim_out,
                dim_out,
                dim_inner,
                spatial_stride=spatial_stride if i == 0 else 1,
                groups=dim_inner if groups is None else groups,
                se_dim=se_dim if i in chosen else None,
                **options,
            )
            self.add_module(f"pathway0_res{i}", block)

    def forward(self, x: Tensor, se: str = "clip") -> Tensor:
        for block in self:
            x = block(x, se)
        return x


class Scores(nn.ReLU):
    """Softmax or sigmoid over axis 1 when not training. (A per-frame activation without parameters.)"""

    def __init__(self, activation: str) -> None:
        super().__init__()
        if activation not in ("softmax", "sigmoid", "none"):
            raise ValueError(f"head_activation must be 'softmax', 'sigmoid' or 'none', got {activation!r}")
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.activation == "none":
            return x
        return x.softmax(1) if self.activation == "softmax" else x.sigmoid()

    def extra_repr(self) -> str:
        return self.activation


class CoX3D(Chain, nn.Module):
    """X3D that steps. Use the entry points ``co_x3d_xs`` .. ``co_x3d_l`` for the published sizes.

    Args:
        image_size: height and width of the frames.
        temporal_window_size: W, frames that the head (and a sliding squeeze-excitation) pools; 64 for the
            extended pool.
        depth_factor, width_factor, bottleneck_factor: X3D's expansions.
        se_scope: 'frame', 'clip' or 'causal'; see the module docstring.
        head_activation: applied when not training.
        temporal_fill: see :class:`sparing.continual.conv.TemporalConv`.
    """

    def __init__(
        self,
        *,
        image_size: int,
        temporal_window_size: int,
        num_classes: int = 400,
        in_channels: int = 3,
        conv1_dim: int = 12,
        conv5_dim: int = 2048,
        width_factor: float = 2.0,
        depth_factor: float = 2.2,
        bottleneck_factor: float = 2.25,
        se_ratio: float = 1 / 16,
        channelwise: bool = True,
        dropout: float = 0.5,
        head_activation: str = "softmax",
        se_scope: str = "frame",
        temporal_fill: str = "zeros",
        batch_norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        eps, window = batch_norm_eps, temporal_window_size
        self.image_size, self.num_classes = image_size, num_classes
        stem = round_width(conv1_dim, width_factor)
        stem_parts: dict[str, nn.Module] = {
            "conv_xy": Conv3d(in_channels, stem, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1), bias=False),
            "conv": Conv3d(
                stem, stem, (5, 1, 1), padding=(2, 0, 0), groups=stem, bias=False, temporal_fill=temporal_fill
            ),
            "bn": nn.BatchNorm3d(stem, eps=eps),
            "relu": nn.ReLU(),
        }
        self.s1 = named_sequential(pathway0_stem=named_sequential(**stem_parts))
        dim_in, base = stem, conv1_dim
        for stage, depth in enumerate(_BASE_DEPTHS, 2):
            dim_out = round_width(base, width_factor)
            inner = int(bottleneck_factor * dim_out)
            self.add_module(
                f"s{stage}",
                X3DStage(
                    dim_in,
                    dim_out,
                    inner,
                    math.ceil(depth * depth_factor - 1e-9),
                    groups=inner if channelwise else 1,
                    se_dim=round_width(inner, se_ratio),
                    se_scope=se_scope,
                    se_window=window,
                    temporal_fill=temporal_fill,
                    eps=eps,
                ),
            )
            dim_in, base = dim_out, round_width(base, 2.0)
        inner = int(bottleneck_factor * dim_in)
        cells = math.ceil(image_size / 32)
        head_parts: dict[str, nn.Module] = {
            "conv_5": Conv3d(dim_in, inner, 1, bias=False),
            "conv_5_bn": nn.BatchNorm3d(inner, eps=eps),
            "conv_5_relu": nn.ReLU(),
            "avg_pool": AvgPool3d((window, cells, cells), stride=1),
            "lin_5": Conv3d(inner, conv5_dim, 1, bias=False),
            "lin_5_relu": nn.ReLU(),
            "flatten": Flatten(),
            "dropout": nn.Dropout(dropout),
            "projection": Linear(conv5_dim, num_classes),
            "scores": Scores(head_activation),
        }
        self.head = named_sequential(**head_parts)
        # As the published networks were trained (Kinetics); what prepares frames for a stream reads it.
        self.pretrained_cfg = {
            "kind": "video",
            "image_size": image_size,
            "clip_frames": window,
            "mean": (0.45, 0.45, 0.45),
            "std": (0.225, 0.225, 0.225),
        }
        self._initialise()

    def _initialise(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm3d) and name.endswith("c_bn"):
                nn.init.zeros_(module.weight)
        projection: nn.Linear = self.head.projection  # type: ignore[assignment]
        nn.init.normal_(projection.weight, std=0.01)
        nn.init.zeros_(projection.bias)

    def parts(self) -> list[Part]:
        return [(name, self._modules[name]) for name in ("s1", "s2", "s3", "s4", "s5", "head")]  # type: ignore[misc]

    def _memory(self, streams: int, frame_shape: tuple[int, ...], make: Any) -> tuple[dict, tuple[int, ...]]:
        cells = math.ceil(self.image_size / 32)
        if len(frame_shape) != 3 or any(math.ceil(size / 32) != cells for size in frame_shape[1:]):
            raise ValueError(f"frames must be (C, {self.image_size}, {self.image_size}), got {frame_shape}")
        return super()._memory(streams, frame_shape, make)

    def forward(self, x: Tensor, *, se: str = "clip") -> Tensor:
        """Clip (N, C, T, H, W) to scores (N, classes, T - W + 1).

        Args:
            se: 'clip' pools squeeze-excitation over the whole clip (X3D); 'stream' as the steps do.
        """
        if se not in ("clip", "stream"):
            raise ValueError(f"se must be 'clip' or 'stream', got {se!r}")
        x = self.s1(x)
        for stage in (self.s2, self.s3, self.s4, self.s5):
            x = stage(x, se)
        return self.head(x)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Published X3D (``{'model_state': ...}``) and CoX3D keys (with numeric container segments) to ours."""
    state_dict = state_dict.get("model_state", state_dict)
    return {re.sub(r"(pathway0_res\d+)(?:\.\d+)+\.", r"\1.", key): value for key, value in state_dict.items()}


def _build(size: str, kwargs: dict[str, Any]) -> CoX3D:
    frames, image_size, depth = SIZES[size]
    return CoX3D(
        **{"image_size": image_size, "temporal_window_size": frames, "depth_factor": depth, **kwargs}  # type: ignore[arg-type]
    )


@register_model
def co_x3d_xs(pretrained: bool = False, **kwargs: Any) -> CoX3D:
    """X3D-XS: 4 frames at 160 pixels."""
    return _build("xs", kwargs)


@register_model
def co_x3d_s(pretrained: bool = False, **kwargs: Any) -> CoX3D:
    """X3D-S: 13 frames at 160 pixels."""
    return _build("s", kwargs)


@register_model
def co_x3d_m(pretrained: bool = False, **kwargs: Any) -> CoX3D:
    """X3D-M: 16 frames at 224 pixels."""
    return _build("m", kwargs)


@register_model
def co_x3d_l(pretrained: bool = False, **kwargs: Any) -> CoX3D:
    """X3D-L: 16 frames at 312 pixels."""
    return _build("l", kwargs)


@register_model
def co_x3d_micro(pretrained: bool = False, **kwargs: Any) -> CoX3D:
    """X3D's shape at a size that trains on one CPU core: 12 frames at 32 pixels, 5 blocks, half the width."""
    sizes = {
        "image_size": 32,
        "temporal_window_size": 12,
        "num_classes": len(MOTION_LABELS),
        "width_factor": 1.0,
        "depth_factor": 0.3,
        "conv5_dim": 256,
        "dropout": 0.2,
    }
    network = CoX3D(**{**sizes, **kwargs})  # type: ignore[arg-type]
    if network.num_classes == len(MOTION_LABELS):
        network.pretrained_cfg["label_names"] = MOTION_LABELS
    return network
