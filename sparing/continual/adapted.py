"""What every pruning adapter is made of: a torch layer with a frozen weight, an addition, channels that can be dropped.

Hedegaard, Alok, Jose and Iosifidis, *Structured Pruning Adapters* (Pattern Recognition 2024). The adapters themselves
are in :mod:`sparing.continual.adapters` (SPLoRA, SPPaRA) and :mod:`sparing.continual.block_adapters` (SPLoPA).
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONV: dict[type, Any] = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
NEAR_ZERO = 1e-4  # half the range of the first values of columns, prototypes and parallel additions, as published


class LowRank(nn.Module):
    """``cols[0] @ rows[0]``: rows (1, r, in), cols (1, out, r).

    Rows are Kaiming-uniform on the three-axis tensor, which is U(+-1/sqrt(r * in)), and columns nearly zero, as
    published. They have the device and dtype of ``like``, the weight that they are added to.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, *, like: Tensor | None = None) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.empty(1, rank, in_features))
        self.cols = nn.Parameter(torch.empty(1, out_features, rank))
        nn.init.kaiming_uniform_(self.rows, a=math.sqrt(5))
        nn.init.uniform_(self.cols, -NEAR_ZERO, NEAR_ZERO)
        if like is not None:  # drawn on the CPU, so that a seed means the same numbers everywhere
            self.to(like)

    def forward(self) -> Tensor:
        return self.cols[0] @ self.rows[0]

    def prune(self, out_kept: Tensor | None, in_kept: Tensor | None) -> None:
        self.rows = kept_part(self.rows, 2, in_kept)
        self.cols = kept_part(self.cols, 1, out_kept)


def kept_part(parameter: Tensor, axis: int, kept: Tensor | None) -> nn.Parameter:
    """The entries of one axis that a bool mask or indices keep, as a parameter of its own; None keeps all."""
    if kept is None:
        return parameter  # type: ignore[return-value]
    index = (kept.nonzero().flatten() if kept.dtype == torch.bool else kept).to(parameter.device)
    return nn.Parameter(parameter.detach().index_select(axis, index), requires_grad=parameter.requires_grad)


def rank_of(rank: float, out_features: int) -> int:
    """A rank below 1 is a share of the output channels.

    Raises:
        ValueError: a rank that is not positive, or above 1 and no whole number.
    """
    if not math.isfinite(rank) or (rank > 1 and rank != int(rank)):
        raise ValueError(f"rank must be a whole number, or below 1 a share of the outputs; got {rank}")
    chosen = round(out_features * rank) if rank < 1 else int(rank)
    if chosen < 1:
        raise ValueError(f"rank must be at least 1, or a share of {out_features} outputs that makes one; got {rank}")
    return chosen


def places(module: nn.Module) -> dict[str, nn.Module]:
    """Every place of a network by its dotted name: a module that is used in two places is there twice."""
    return dict(module.named_modules(remove_duplicate=False))


def below(name: str, tops: Iterable[str]) -> bool:
    """Whether a dotted name is one of ``tops``, or lies inside one."""
    return any(name == top or name.startswith(f"{top}.") for top in tops)


def covered(module: nn.Module, names: Iterable[str]) -> set[int]:
    """``id`` of every module that ``names`` name or that lies inside one of them; one in several places counts in all.

    Raises:
        ValueError: a name that no module has.
    """
    tops, have = tuple(names), places(module)
    if unknown := [name for name in tops if not name or name not in have]:
        raise ValueError(f"skip names {unknown}, which this {type(module).__name__} does not have")
    return {id(child) for name, child in have.items() if below(name, tops)}


def stored_weight(layer: Any) -> Tensor:
    """The parameter behind ``weight`` of a plain or an adapted layer."""
    return layer.stored_weight if isinstance(layer, Adapted) else layer.weight


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least, for sums and squares of weights of half precision; without gradient."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


class Adapted(nn.Module):
    """Mixin of adapted layers: a frozen stored weight, a trainable ``bias``, ``addition()`` of the weight's shape.

    The state dict and ``named_parameters`` hold the frozen tensor under ``weight``. The attribute ``weight`` is the
    adapted one, because networks that do not call their layers read it (the inference path of
    ``nn.TransformerEncoderLayer``, attentions that join their own biases) and must not lose the adapter.
    """

    bias: Tensor | None

    @property
    def weight(self) -> Tensor:
        """The weight that the layer computes with; the frozen one is ``stored_weight``."""
        if self._parameters.get("weight") is None:
            raise AttributeError("weight")
        return self.adapted_weight()

    @property
    def stored_weight(self) -> Tensor:
        """The parameter itself, without the adapter."""
        return self._parameters["weight"]  # type: ignore[return-value]

    def addition(self) -> Tensor:
        """What is added to the weight, in its shape."""
        raise NotImplementedError(type(self).__name__)

    def adapted_weight(self) -> Tensor:
        """The weight that the layer computes with."""
        return self.stored_weight + self.addition()

    def fuse(self) -> nn.Module:
        """The plain torch layer with the adapted weight: same outputs, no adapter."""
        return self._plain(self.adapted_weight())

    def unfuse(self) -> nn.Module:
        """The plain torch layer with the frozen weight, as it was before the adapter."""
        return self._plain(self.stored_weight)

    def _plain(self, weight: Tensor) -> nn.Module:
        raise NotImplementedError(type(self).__name__)

    def prune(self, *, out_kept: Tensor | None = None, in_kept: Tensor | None = None) -> None:
        """Keep only some channels, in place. Masks are bool or indices; None keeps all.

        Raises:
            ValueError: a mask of another length or type, indices out of range or given twice, or nothing kept.
        """
        rows = self.stored_weight.shape[0]
        for name, kept, size in (("out_kept", out_kept, rows), ("in_kept", in_kept, self._inputs())):
            if kept is not None:
                _check_kept(name, kept, size)
        self._prune(out_kept, in_kept)

    def _inputs(self) -> int:
        return self.stored_weight.shape[1]

    def _prune(self, out_kept: Tensor | None, in_kept: Tensor | None) -> None:
        raise NotImplementedError(type(self).__name__)

    def learned_parameters(self) -> int:
        """Numbers that training changes."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


def _check_kept(name: str, kept: Tensor, size: int) -> None:
    if kept.dtype == torch.bool:
        if kept.shape != (size,):
            raise ValueError(f"{name} must have {size} entries, got {tuple(kept.shape)}")
        if not kept.any():
            raise ValueError(f"{name} keeps none of {size} channels")
        return
    if kept.dtype not in (torch.int32, torch.int64) or kept.ndim != 1:
        raise ValueError(f"{name} must be a bool mask or indices, one axis; got {kept.dtype} {tuple(kept.shape)}")
    if not kept.numel():
        raise ValueError(f"{name} keeps none of {size} channels")
    if kept.min() < 0 or kept.max() >= size or len(kept.unique()) != len(kept):
        raise ValueError(f"{name} must be different indices in 0..{size - 1}, got {kept.tolist()}")


def is_plain(layer: nn.Module) -> bool:
    """Whether a torch layer computes with a weight and a bias of its own, and none made by a reparametrisation."""
    return set(layer._parameters) == {"weight", "bias"} and layer._parameters["weight"] is not None


def take_layer(layer: Any, source: Any) -> None:
    """Copy weight (frozen) and bias of a torch layer, and whether it is in train or eval mode.

    Raises:
        ValueError: a layer whose weight is made of other parameters.
    """
    if not is_plain(source):
        raise ValueError(
            f"the weight of this {type(source).__name__} is made of {', '.join(source._parameters)}: remove the "
            "reparametrisation (remove_weight_norm, remove_spectral_norm) first"
        )
    layer.train(source.training)
    layer.weight = nn.Parameter(source.weight.detach().clone(), requires_grad=False)
    layer.bias = None if source.bias is None else nn.Parameter(source.bias.detach().clone())


class AdaptedLinear(Adapted):
    def _set(self, linear: nn.Linear) -> None:
        if type(linear) is not nn.Linear:
            raise TypeError(f"expected an nn.Linear, got {type(linear).__name__}")
        take_layer(self, linear)

    def _plain(self, weight: Tensor) -> nn.Module:
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=self.bias is not None, device=weight.device)
        return filled(plain, weight, self.bias).train(self.training)


def filled(plain: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    plain.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().clone())
    return plain


class AdaptedConv(Adapted):
    def _set(self, conv: Any) -> None:
        if type(conv) not in CONV:
            raise TypeError(f"expected an nn.Conv1d, nn.Conv2d or nn.Conv3d, got {type(conv).__name__}")
        sizes = set(conv.kernel_size)
        if len(sizes) != 1 or conv.kernel_size[0] % 2 == 0:
            raise ValueError(
                f"adapters sit at the centre tap: kernel sizes must be odd and equal, got {conv.kernel_size}"
            )
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise ValueError(f"padding must be zeros in numbers, got {conv.padding_mode!r} and {conv.padding!r}")
        take_layer(self, conv)
        self.kind, self.kernel_size = type(conv), conv.kernel_size
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups

    def _at_centre(self, tap: Tensor) -> Tensor:
        """(out, in/g) to the shape of the weight, zero beside the centre."""
        reach = [self.kernel_size[0] // 2] * (2 * len(self.kernel_size))
        return F.pad(tap.view(*tap.shape, *[1] * len(self.kernel_size)), reach)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.adapted_weight()
        return CONV[self.kind](x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def _plain(self, weight: Tensor) -> nn.Module:
        plain = self.kind(
            weight.shape[1] * self.groups,
            weight.shape[0],
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            bias=self.bias is not None,
            device=weight.device,
        )
        return filled(plain, weight, self.bias).train(self.training)

    def _inputs(self) -> int:
        return self.stored_weight.shape[1] * self.groups

    def _rows_kept(self, out_kept: Tensor | None, in_kept: Tensor | None) -> Tensor | None:
        """What is kept of the output axis: in a depthwise convolution either mask says it."""
        return in_kept if self.groups != 1 and out_kept is None else out_kept

    def _prune_host(self, out_kept: Tensor | None, in_kept: Tensor | None) -> Tensor | None:
        """Prune weight and bias; what is kept of the weight's own input axis (None = all)."""
        if self.groups != 1:
            if self.groups != len(self.stored_weight) or self.stored_weight.shape[1] != 1:
                raise ValueError(
                    f"channels of a grouped convolution (groups={self.groups}) are pruned by whole groups only"
                )
            kept = out_kept if in_kept is None else in_kept
            if kept is None or (out_kept is not None and in_kept is not None and not torch.equal(out_kept, in_kept)):
                raise ValueError("a depthwise convolution keeps the same channels at its input and its output")
            self.register_parameter("weight", kept_part(self.stored_weight, 0, kept))
            self.bias = None if self.bias is None else kept_part(self.bias, 0, kept)
            self.groups = len(self.stored_weight)
            return None
        self.register_parameter("weight", kept_part(kept_part(self.stored_weight, 0, out_kept), 1, in_kept))
        self.bias = None if self.bias is None else kept_part(self.bias, 0, out_kept)
        return in_kept
