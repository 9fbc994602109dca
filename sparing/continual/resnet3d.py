"""CoSlow and CoI3D: 3-D ResNets on live video.

Feichtenhofer et al., *SlowFast* (ICCV 2019) for the slow pathway, Carreira and Zisserman, *I3D* (CVPR 2017) in its
ResNet form; made continual by Hedegaard and Iosifidis (ECCV 2022). Temporal taps sit in the first convolution of a
bottleneck (and the stem of I3D); I3D's pool after res2 is a real temporal stride of 2. Clips (N, 3, T, H, W) to (N,
classes, T'); frames (streams, 3, H, W) to (streams, classes). Keys: ``0`` stem, ``1``..``4`` stages, ``5`` head, as
the published CoSlow and CoI3D.
"""

import re
from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from sparing.continual.container import Branches, Part, Sequential, named_sequential
from sparing.continual.conv import Conv3d
from sparing.continual.per_frame import Flatten, Linear
from sparing.continual.pool import AvgPool3d, MaxPool3d
from sparing.continual.x3d import Scores
from sparing.zoo.registry import register_model

# arch -> stem temporal kernel, kernels per stage (repeated along its blocks), pool after res2
ARCHITECTURES: dict[str, tuple[int, tuple[tuple[int, ...], ...], tuple[int, int, int]]] = {
    "slow": (1, ((1,), (1,), (3,), (3,)), (1, 1, 1)),
    "i3d": (5, ((3,), (3, 1), (3, 1), (1, 3)), (2, 1, 1)),
}


class Bottleneck(Branches, nn.Module):
    """``conv_a`` (k_t x 1 x 1), ``conv_b`` (1 x 3 x 3, spatial stride), ``conv_c`` (1 x 1 x 1), added to the
    shortcut.
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        dim_inner: int,
        *,
        temporal_kernel: int,
        spatial_stride: int,
        groups: int = 1,
        temporal_fill: str = "zeros",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        stride = (1, spatial_stride, spatial_stride)
        self.branch2 = named_sequential(
            conv_a=Conv3d(
                dim_in,
                dim_inner,
                (temporal_kernel, 1, 1),
                padding=(temporal_kernel // 2, 0, 0),
                bias=False,
                temporal_fill=temporal_fill,
            ),
            norm_a=nn.BatchNorm3d(dim_inner, eps=eps),
            act_a=nn.ReLU(),
            conv_b=Conv3d(dim_inner, dim_inner, (1, 3, 3), stride=stride, padding=(0, 1, 1), groups=groups, bias=False),
            norm_b=nn.BatchNorm3d(dim_inner, eps=eps),
            act_b=nn.ReLU(),
            conv_c=Conv3d(dim_inner, dim_out, 1, bias=False),
            norm_c=nn.BatchNorm3d(dim_out, eps=eps),
        )
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


class CoResNet(Sequential):
    """A 3-D ResNet that steps.

    Args:
        arch: 'slow' or 'i3d'.
        image_size: height and width of the frames.
        temporal_window_size: W, frames that the head pools (before the stride of I3D).
        stage_depths: blocks of the four stages.
        width: channels of the stem; stages have 1, 2, 4 and 8 times as many inner channels and 4 times that at
            their output.
        stage_temporal_kernels: per stage, kernels repeated along its blocks; None = the architecture's.
    """

    def __init__(
        self,
        *,
        arch: str = "slow",
        image_size: int = 256,
        temporal_window_size: int = 8,
        num_classes: int = 400,
        in_channels: int = 3,
        stage_depths: tuple[int, ...] = (3, 4, 6, 3),
        width: int = 64,
        num_groups: int = 1,
        stem_temporal_kernel: int | None = None,
        stage_temporal_kernels: tuple[tuple[int, ...], ...] | None = None,
        pool1: tuple[int, int, int] | None = None,
        dropout: float = 0.5,
        head_activation: str = "softmax",
        temporal_fill: str = "zeros",
        batch_norm_eps: float = 1e-5,
    ) -> None:
        if arch not in ARCHITECTURES:
            raise ValueError(f"arch must be one of {sorted(ARCHITECTURES)}, got {arch!r}")
        stem_default, kernels_default, pool_default = ARCHITECTURES[arch]
        stem_kernel = stem_default if stem_temporal_kernel is None else stem_temporal_kernel
        kernels = kernels_default if stage_temporal_kernels is None else stage_temporal_kernels
        pool1 = pool_default if pool1 is None else pool1
        eps = batch_norm_eps
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        parts["0"] = named_sequential(
            conv=Conv3d(
                in_channels,
                width,
                (stem_kernel, 7, 7),
                stride=(1, 2, 2),
                padding=(stem_kernel // 2, 3, 3),
                bias=False,
                temporal_fill=temporal_fill,
            ),
            norm=nn.BatchNorm3d(width, eps=eps),
            relu=nn.ReLU(),
            pool=MaxPool3d((1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
        )
        dim_in = width
        for stage, depth in enumerate(stage_depths):
            inner = width * 2**stage
            blocks: OrderedDict[str, nn.Module] = OrderedDict()
            for i in range(depth):
                blocks[f"pathway0_res{i}"] = Bottleneck(
                    dim_in if i == 0 else 4 * inner,
                    4 * inner,
                    inner,
                    temporal_kernel=kernels[stage][i % len(kernels[stage])],
                    spatial_stride=(1, 2, 2, 2)[stage] if i == 0 else 1,
                    groups=num_groups,
                    temporal_fill=temporal_fill,
                    eps=eps,
                )
            parts[str(stage + 1)] = Sequential(blocks)
            if stage == 0 and pool1 != (1, 1, 1):
                parts["pool1"] = MaxPool3d(pool1, stride=pool1)
            dim_in = 4 * inner
        cells = image_size // 32
        parts["5"] = named_sequential(
            pool=AvgPool3d((max(temporal_window_size // pool1[0], 1), cells, cells), stride=1),
            flatten=Flatten(),
            dropout=nn.Dropout(dropout),
            projection=Linear(dim_in, num_classes),
            scores=Scores(head_activation),
        )
        super().__init__(parts)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self[-1].projection.weight, std=0.01)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """pytorchvideo's Slow and I3D keys, SlowFast's ``s1``..``s5``, and CoSlow's own (with container segments) to
    ours.
    """
    state_dict = state_dict.get("model_state", state_dict)
    clean = {}
    for key, value in state_dict.items():
        key = re.sub(r"^(?:blocks|module)\.", "", key)
        key = re.sub(r"^s(\d)\.", lambda m: f"{int(m[1]) - 1}.", key)
        key = key.replace("head.", "5.") if key.startswith("head.") else key
        key = re.sub(r"^0\.pathway0_stem\.", "0.", key)
        key = re.sub(r"^0\.bn\.", "0.norm.", key)
        key = re.sub(r"^(\d)\.(?:res_blocks|res_module)\.(\d+)\.", r"\1.pathway0_res\2.", key)
        key = re.sub(r"(pathway0_res\d+)(?:\.\d+)+\.", r"\1.", key)
        key = key.replace("branch1_conv.", "branch1.").replace("branch1_norm.", "branch1_bn.")
        key = re.sub(r"branch2\.([abc])\.", r"branch2.conv_\1.", key)
        key = re.sub(r"branch2\.([abc])_bn\.", r"branch2.norm_\1.", key)
        # pytorchvideo's I3D counts its pool as a block of its own, which moves the stages behind it by one.
        clean[re.sub(r"^(\d)\.proj\.", r"\1.projection.", key)] = value
    numbers = {int(key.split(".")[0]) for key in clean if key.split(".")[0].isdigit()}
    if 6 in numbers:
        clean = {re.sub(r"^([3-6])\.", lambda m: f"{int(m[1]) - 1}.", key): value for key, value in clean.items()}
    return clean


@register_model
def co_slow_r50(pretrained: bool = False, **kwargs: Any) -> CoResNet:
    """Slow 8x8, ResNet-50, 256 pixels."""
    return CoResNet(**{"arch": "slow", "image_size": 256, "temporal_window_size": 8, **kwargs})


@register_model
def co_i3d_r50(pretrained: bool = False, **kwargs: Any) -> CoResNet:
    """I3D 8x8, ResNet-50, 224 pixels; speaks every second frame."""
    return CoResNet(**{"arch": "i3d", "image_size": 224, "temporal_window_size": 8, **kwargs})
