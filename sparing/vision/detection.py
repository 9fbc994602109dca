"""Any timm backbone or twin under torchvision's detectors: FasterRCNN, MaskRCNN, RetinaNet, FCOS.

torchvision's detectors want a module that gives maps of equal width by name and has ``out_channels``;
``timm_fpn`` makes one: hierarchical models get a feature pyramid (Lin et al. 2017), plain ViTs the simple pyramid of
ViTDet. Detectors pad batches to multiples of 32 pixels of any height and width, so fixed input sizes are lifted
first. A detector is described by a :class:`DetectorConfig`, which is saved with its weights.
"""

import copy
import inspect
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.layers import Format
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

import sparing
from sparing.vision.simple_pyramid import SimplePyramid
from sparing.vision.stvit_r import STViTR
from sparing.zoo.twins import STATUSES, Twin
from sparing.zoo.weights import fill, read_state

__all__ = [
    "DETECTORS",
    "DetectorConfig",
    "PyramidBackbone",
    "backbone_twin",
    "build_detector",
    "load_detector",
    "save_detector",
    "timm_fpn",
]

DETECTORS = {"faster_rcnn": FasterRCNN, "mask_rcnn": MaskRCNN, "retinanet": RetinaNet, "fcos": FCOS}
_ONE_STAGE = ("retinanet", "fcos")
_TORCHVISION_MASK_CHANNELS = 256
# what other fields of a DetectorConfig set, and modules, which are no JSON values
_NOT_ARGUMENTS = {
    "self", "backbone", "num_classes", "kwargs", "min_size", "max_size", "head", "anchor_generator", "proposal_matcher",
    "rpn_anchor_generator", "rpn_head", "box_roi_pool", "box_head", "box_predictor", "mask_roi_pool", "mask_head",
    "mask_predictor",
}  # fmt: skip


class PyramidBackbone(nn.Module):
    """``body`` (maps of several strides, or one) and ``fpn`` -> ``OrderedDict`` of maps of ``out_channels``.

    Levels are named '0', '1', ... from the finest, as torchvision's box pooling expects, then 'pool' or 'p6', 'p7'.
    """

    def __init__(
        self, body: nn.Module, channels: Sequence[int], *, out_channels: int, levels: Sequence[int], extra: str
    ) -> None:
        super().__init__()
        self.body, self.out_channels, self.levels = body, out_channels, tuple(levels)
        self.plain = len(channels) == 1
        blocks = {
            "pool": LastLevelMaxPool,
            "p6p7": lambda: LastLevelP6P7(out_channels, out_channels),
            "none": lambda: None,
        }
        if extra not in blocks:
            raise ValueError(f"extra={extra!r}, accepted are {', '.join(map(repr, blocks))}")
        if not self.levels or not set(self.levels) <= set(range(4 if self.plain else len(channels))):
            raise ValueError(f"levels={self.levels}, this backbone has {4 if self.plain else len(channels)}")
        if self.plain:
            self.fpn: nn.Module = SimplePyramid(channels[0], out_channels)
            self.extra = blocks[extra]()
        else:
            widths = [channels[level] for level in self.levels]
            self.fpn = FeaturePyramidNetwork(widths, out_channels, extra_blocks=blocks[extra]())

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        """(batch, channels, height, width) -> maps by name, finest first."""
        maps = self.body(images)
        if not self.plain:
            return self.fpn(OrderedDict((str(place), maps[level]) for place, level in enumerate(self.levels)))
        pyramid = self.fpn(maps[-1])
        taken, names = [pyramid[level] for level in self.levels], [str(place) for place in range(len(self.levels))]
        if self.extra is not None:
            taken, names = self.extra(taken, [maps[-1]] * len(taken), names)
        return OrderedDict(zip(names, taken))


class _Intermediates(nn.Module):
    """A timm model as a list of NCHW maps, by ``forward_intermediates``."""

    def __init__(self, model: nn.Module, indices: list[int]) -> None:
        super().__init__()
        self.model, self.indices = model, indices
        size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
        self.own_size = tuple(size[-2:]) if size else None

    def forward(self, images: Tensor) -> list[Tensor]:
        if torch.compiler.is_compiling() or tuple(images.shape[-2:]) == self.own_size:
            return self._maps(images)
        try:
            return self._maps(images)
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, IndexError, RuntimeError) as error:
            own = "another size" if self.own_size is None else "x".join(map(str, self.own_size))
            raise ValueError(
                f"{type(self.model).__name__} was built for images of {own} and fails on "
                f"{'x'.join(map(str, images.shape[-2:]))} ({' '.join(str(error).split())}): build it with "
                "dynamic_img_size=True or strict_img_size=False where timm offers that, let the detector resize to its "
                "size (fixed_size=), or take another backbone"
            ) from error

    def _maps(self, images: Tensor) -> list[Tensor]:
        return self.model.forward_intermediates(
            images, indices=self.indices, output_fmt="NCHW", intermediates_only=True
        )


class _Channels(nn.Module):
    """A ``features_only`` model whose maps are NHWC, as NCHW."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> list[Tensor]:
        return [m.permute(0, 3, 1, 2).contiguous() for m in self.model(images)]


def timm_fpn(
    host_or_twin: nn.Module,
    *,
    out_channels: int = 256,
    levels: Sequence[int] = (0, 1, 2, 3),
    extra: str = "pool",
    freeze_batch_norm: bool = True,
) -> PyramidBackbone:
    """A torchvision detection backbone from any timm backbone or twin; the model given is copied and stays as it was.

    Args:
        host_or_twin: a dense STViT-R, a timm ``features_only`` model, a hierarchical timm model (Swin, ConvNeXt,
            ResNet), or a plain ViT or its STViT-R twin (simple pyramid). ViTs, Swins and Swin-V2s are freed of their
            image size; other models with a fixed one (BEiT, MaxViT, EVA, unless built with ``dynamic_img_size=True``)
            say so at the first image of another size.
        out_channels: width of every level.
        levels: which of the backbone's levels to use, 0 = finest (stride 4 for Swin).
        extra: 'pool' (max-pooled last level, for two-stage detectors), 'p6p7' (RetinaNet, FCOS), 'none'.
        freeze_batch_norm: BatchNorm of the backbone with fixed statistics (detection batches are too small for them).

    Raises:
        TypeError: the model gives no intermediate maps.
        ValueError: it keeps no full-resolution map, or lacks a level.
    """
    body, channels = _body(copy.deepcopy(host_or_twin))
    if freeze_batch_norm:
        _freeze_batch_norm(body)
    return PyramidBackbone(body, channels, out_channels=out_channels, levels=levels, extra=extra)


def _body(model: nn.Module) -> tuple[nn.Module, list[int]]:
    """The model as a module that gives NCHW maps, and their widths (one: a plain ViT)."""
    if isinstance(model, STViTR):
        if not model.dense:
            raise ValueError("this STViT-R is a classifier: build it with dense=True to have maps of any image size")
        return model, [model.feature_info[i]["num_chs"] for i in model.out_indices]
    info = getattr(model, "feature_info", None)
    if info is not None and hasattr(info, "channels"):  # timm's features_only
        nhwc = getattr(model, "output_fmt", Format.NCHW) == Format.NHWC
        return (_Channels(model) if nhwc else model), list(info.channels())
    if not hasattr(model, "forward_intermediates") or not info:
        raise TypeError(f"{type(model).__name__} gives no intermediate maps: a timm model or a twin is needed")
    _lift_image_size(model)
    if hasattr(model, "reset_classifier"):
        model.reset_classifier(0)
    strides = [entry["reduction"] for entry in info]
    if isinstance(model, VisionTransformer):
        if strides[-1] != model.patch_embed.patch_size[0]:
            raise ValueError(
                f"{type(model).__name__} ends with a map of stride {strides[-1]}, not the image's grid (stride "
                f"{model.patch_embed.patch_size[0]}): use its STViT-R twin, which restores the map"
            )
        return _Intermediates(model, [len(strides) - 1]), [info[-1]["num_chs"]]
    if len(set(strides)) == 1:  # one resolution throughout (XCiT, EVA, BEiT): plain like a ViT
        return _Intermediates(model, [len(strides) - 1]), [info[-1]["num_chs"]]
    return _Intermediates(model, list(range(len(strides)))), [entry["num_chs"] for entry in info]


def _lift_image_size(model: nn.Module) -> None:
    """Let timm ViTs and Swins take any height and width, in place (positions interpolated, masks made on the fly)."""
    if isinstance(model, VisionTransformer):
        embed = model.patch_embed
        embed.strict_img_size, embed.dynamic_img_pad = False, True
        embed.flatten, embed.output_fmt = False, Format.NHWC
        model.dynamic_img_size = True
    elif isinstance(model, SwinTransformer | SwinTransformerV2):
        model.patch_embed.strict_img_size, model.patch_embed.dynamic_img_pad = False, True
        for stage in model.layers:
            for block in stage.blocks:
                block.dynamic_mask, block.attn_mask = True, None
                if block.window_size[0] // 2 == block.target_shift_size[0]:
                    block.shift_size = block.target_shift_size  # dropped where the old map was a single window


def _freeze_batch_norm(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, eps=child.eps)
            state = {k: v for k, v in child.state_dict().items() if k != "num_batches_tracked"}
            frozen.load_state_dict(state)
            setattr(module, name, frozen.to(child.weight.device))
        else:
            _freeze_batch_norm(child)


# ---- detectors that can be saved ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DetectorConfig:
    """A detector as JSON values.

    Args:
        detector: 'faster_rcnn', 'mask_rcnn', 'retinanet' or 'fcos'.
        classes: names of the classes, without background.
        backbone: a name for ``sparing.create_model``; backbone_arguments: its keywords.
        twin: a method to make a twin of that backbone by, or None; knobs: its keywords.
        min_size, max_size: shorter and longest side in pixels that images are resized to.
        mask_channels: width of the mask head of 'mask_rcnn' (torchvision's own: 256).
        detector_arguments: further keywords of torchvision's class that are JSON values, e.g.
            ``{"box_batch_size_per_image": 64}``.
    """

    classes: Sequence[str]
    backbone: str
    detector: str = "mask_rcnn"
    backbone_arguments: dict[str, Any] = field(default_factory=dict)
    twin: str | None = None
    knobs: dict[str, Any] = field(default_factory=dict)
    out_channels: int = 256
    min_size: int = 800
    max_size: int = 1333
    mask_channels: int = _TORCHVISION_MASK_CHANNELS
    detector_arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.detector not in DETECTORS:
            raise ValueError(f"detector={self.detector!r}, accepted are {', '.join(map(repr, DETECTORS))}")
        if self.detector == "fcos" and self.out_channels % 32:
            raise ValueError(f"out_channels={self.out_channels}: FCOS normalises groups of 32 channels")
        accepted = _keywords(self.detector)
        if unknown := sorted(set(self.detector_arguments) - accepted):  # torchvision ignores them
            said = f"none of torchvision's {DETECTORS[self.detector].__name__}"
            raise ValueError(
                f"detector_arguments {', '.join(unknown)} are {said}: it takes {', '.join(sorted(accepted))}"
            )
        if self.mask_channels < 1:
            raise ValueError(f"mask_channels={self.mask_channels}, at least 1 is needed")
        if not self.classes:
            raise ValueError("a detector needs the names of its classes, got none")
        if not 32 <= self.min_size <= self.max_size:
            raise ValueError(f"sizes must satisfy 32 <= min_size <= max_size, got {self.min_size} and {self.max_size}")


def _keywords(detector: str) -> set[str]:
    """Keywords of a detector's class that ``detector_arguments`` may set."""
    classes = (DETECTORS[detector], *([FasterRCNN] if detector == "mask_rcnn" else []))
    return {name for kind in classes for name in inspect.signature(kind.__init__).parameters} - _NOT_ARGUMENTS


def build_detector(config: DetectorConfig, backbone: nn.Module | None = None) -> nn.Module:
    """The detector of a config, freshly initialised but for ``backbone`` (a live host or twin that replaces its
    name).

    Two-stage detectors and FCOS/RetinaNet differ as torchvision's own do: C2 to C5 and a pooled level, or C3 to C5,
    P6, P7. Class 0 is background for the two-stage ones and RetinaNet; labels of the data count from 1 for all.
    """
    if backbone is None:
        backbone = sparing.create_model(config.backbone, **config.backbone_arguments)
        if config.twin is not None:
            backbone = sparing.twin(backbone, config.twin, **config.knobs)
    one_stage = config.detector in _ONE_STAGE
    body = timm_fpn(
        backbone,
        out_channels=config.out_channels,
        levels=(1, 2, 3) if one_stage else (0, 1, 2, 3),
        extra="p6p7" if one_stage else "pool",
    )
    num_classes = len(config.classes) + 1
    arguments: dict[str, Any] = {"min_size": config.min_size, "max_size": config.max_size, **config.detector_arguments}
    model: nn.Module = DETECTORS[config.detector](body, num_classes=num_classes, **arguments)
    if config.detector == "mask_rcnn" and (width := config.mask_channels) != _TORCHVISION_MASK_CHANNELS:
        model.roi_heads.mask_head = MaskRCNNHeads(config.out_channels, (width,) * 4, 1)
        model.roi_heads.mask_predictor = MaskRCNNPredictor(width, width, num_classes)
    model.config = config  # type: ignore[assignment]
    return model


def backbone_twin(detector: nn.Module) -> Twin | None:
    """The twin beneath a detector of :func:`build_detector`, with its ``status``; None where a host is beneath."""
    body: Any = detector.backbone.body  # type: ignore[union-attr]
    return next((part for part in (body, getattr(body, "model", None)) if isinstance(part, Twin)), None)


def save_detector(model: nn.Module, directory: str | Path) -> Path:
    """Write config.json and model.safetensors of a detector that :func:`build_detector` made."""
    from safetensors.torch import save_file

    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    draft = folder / ".model.safetensors"
    save_file(state, draft, metadata={"format": "pt"})
    draft.replace(folder / "model.safetensors")
    draft = folder / ".config.json"
    twin = backbone_twin(model)
    written = {"sparing_version": sparing.__version__, "status": twin.status if twin else None}
    content = {**written, **asdict(model.config)}  # type: ignore[call-overload]
    draft.write_text(json.dumps(content, indent=2) + "\n")
    draft.replace(folder / "config.json")
    return folder


def load_detector(directory: str | Path, *, device: str | torch.device | None = None) -> nn.Module:
    """A detector written by :func:`save_detector`, in evaluation mode.

    Raises:
        FileNotFoundError: the folder or a file of it is missing.
        ValueError: it describes no detector, or the weights do not fit.
    """
    folder = Path(directory)
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no detector in {str(folder)!r}: it has no config.json")
    try:
        content = json.loads(path.read_text())
        content.pop("sparing_version", None)
        status = content.pop("status", None)
        config = DetectorConfig(**content)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} describes no detector ({error})") from error
    model = build_detector(config)
    fill(model, read_state(folder), origin=repr(str(folder)))
    if status in STATUSES and (twin := backbone_twin(model)) is not None:
        twin.status = status
    return model.to(device).eval()
