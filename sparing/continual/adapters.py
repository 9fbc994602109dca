"""Structured pruning adapters: learn a task on a frozen, pruned network with a few weights that fuse away.

Hedegaard, Alok, Jose and Iosifidis, *Structured Pruning Adapters* (Pattern Recognition 2024). A frozen weight W gets
a small learned addition of the same shape:

* SPLoRA: ``W + C R`` with C (out, r) and R (r, in); in convolutions at the centre tap;
* SPPaRA: ``W + A`` at the centre tap, A (out, in);
* SPLoPA: ``W + sum_i P_i (x) prototype_i`` of block prototypes shared over a layer or a network.

Dropping an output channel drops a row of W and of C, dropping an input channel a column of W and of R, and both
commute with fusing. Each adapter is a plain torch layer with a parametrised weight: ``fuse`` returns that layer with
the sum, ``unfuse`` the one with W. Keys: ``weight``, ``bias``, ``adapter.rows``, ``adapter.cols`` (SPLoRA),
``adapter`` (SPPaRA), ``adapter.prototypes.rows|cols``, ``adapter.pos_weights`` (SPLoPA).
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CONV: dict[type, Any] = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
_NEAR_ZERO = 1e-4


class LowRank(nn.Module):
    """``cols[0] @ rows[0]``: rows (1, r, in), cols (1, out, r).

    Rows are Kaiming-uniform on the three-axis tensor, which is U(+-1/sqrt(r * in)), and columns nearly zero, as
    published.
    """

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.empty(1, rank, in_features))
        self.cols = nn.Parameter(torch.empty(1, out_features, rank))
        nn.init.kaiming_uniform_(self.rows, a=math.sqrt(5))
        nn.init.uniform_(self.cols, -_NEAR_ZERO, _NEAR_ZERO)

    def forward(self) -> Tensor:
        return self.cols[0] @ self.rows[0]

    def prune(self, out_kept: Tensor | None, in_kept: Tensor | None) -> None:
        self.rows = _kept(self.rows, 2, in_kept)
        self.cols = _kept(self.cols, 1, out_kept)


def _kept(parameter: Tensor, axis: int, kept: Tensor | None) -> nn.Parameter:
    if kept is None:
        return parameter  # type: ignore[return-value]
    index = kept.nonzero().flatten() if kept.dtype == torch.bool else kept
    return nn.Parameter(parameter.detach().index_select(axis, index).clone(), requires_grad=parameter.requires_grad)


def rank_of(rank: float, out_features: int) -> int:
    """A rank below 1 is a share of the output channels. Raises ValueError for ranks that are not positive."""
    chosen = round(out_features * rank) if rank < 1 else int(rank)
    if chosen < 1:
        raise ValueError(f"rank must be at least 1, or a share of {out_features} outputs that makes one; got {rank}")
    return chosen


class Adapted(nn.Module):
    """Mixin of adapted layers: a frozen ``weight``, a trainable ``bias``, and ``addition()`` of the weight's shape."""

    weight: Tensor
    bias: Tensor | None

    def addition(self) -> Tensor:
        """What is added to the weight, in its shape."""
        raise NotImplementedError(type(self).__name__)

    def adapted_weight(self) -> Tensor:
        """The weight that the layer computes with."""
        return self.weight + self.addition()

    def fuse(self) -> nn.Module:
        """The plain torch layer with the adapted weight: same outputs, no adapter."""
        return self._plain(self.adapted_weight())

    def unfuse(self) -> nn.Module:
        """The plain torch layer with the frozen weight, as it was before the adapter."""
        return self._plain(self.weight)

    def _plain(self, weight: Tensor) -> nn.Module:
        raise NotImplementedError(type(self).__name__)

    def prune(self, *, out_kept: Tensor | None = None, in_kept: Tensor | None = None) -> None:
        """Keep only some channels, in place. Masks are bool or indices; None keeps all.

        Raises:
            ValueError: a mask of another length, or one that keeps nothing.
        """
        for name, kept, size in (("out_kept", out_kept, self.weight.shape[0]), ("in_kept", in_kept, self._inputs())):
            if kept is not None and kept.dtype == torch.bool and kept.shape != (size,):
                raise ValueError(f"{name} must have {size} entries, got {tuple(kept.shape)}")
            if kept is not None and not (kept.any() if kept.dtype == torch.bool else kept.numel()):
                raise ValueError(f"{name} keeps none of {size} channels")
        self._prune(out_kept, in_kept)

    def _inputs(self) -> int:
        return self.weight.shape[1]

    def _prune(self, out_kept: Tensor | None, in_kept: Tensor | None) -> None:
        raise NotImplementedError(type(self).__name__)

    def learned_parameters(self) -> int:
        """Numbers that training changes."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


def _take(layer: Any, source: Any) -> None:
    """Copy weight (frozen) and bias of a torch layer."""
    layer.weight = nn.Parameter(source.weight.detach().clone(), requires_grad=False)
    layer.bias = None if source.bias is None else nn.Parameter(source.bias.detach().clone())


class _AdaptedLinear(Adapted):
    def _set(self, linear: nn.Linear) -> None:
        if type(linear) is not nn.Linear:
            raise TypeError(f"expected an nn.Linear, got {type(linear).__name__}")
        _take(self, linear)

    def _plain(self, weight: Tensor) -> nn.Module:
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=self.bias is not None, device=weight.device)
        return _filled(plain, weight, self.bias)


def _filled(plain: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    plain.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().clone())
    return plain


class SPLoRALinear(_AdaptedLinear):
    """A frozen ``nn.Linear`` with a low-rank addition.

    Args:
        linear: the layer; its weight is copied and frozen, its bias stays trainable.
        rank: of the addition; below 1 a share of the outputs.
    """

    def __init__(self, linear: nn.Linear, *, rank: float = 16) -> None:
        super().__init__()
        self._set(linear)
        out_features, in_features = self.weight.shape
        self.adapter = LowRank(in_features, out_features, rank_of(rank, out_features))

    def addition(self) -> Tensor:
        return self.adapter()

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.linear(x, self.adapted_weight(), self.bias)
        low = F.linear(F.linear(x, self.adapter.rows[0]), self.adapter.cols[0])
        return F.linear(x, self.weight, self.bias) + low

    def _prune(self, out_kept: Tensor | None, in_kept: Tensor | None) -> None:
        self.weight = _kept(_kept(self.weight, 0, out_kept), 1, in_kept)
        self.bias = None if self.bias is None else _kept(self.bias, 0, out_kept)
        self.adapter.prune(out_kept, in_kept)


class _AdaptedConv(Adapted):
    def _set(self, conv: Any) -> None:
        if type(conv) not in _CONV:
            raise TypeError(f"expected an nn.Conv1d, nn.Conv2d or nn.Conv3d, got {type(conv).__name__}")
        sizes = set(conv.kernel_size)
        if len(sizes) != 1 or conv.kernel_size[0] % 2 == 0:
            raise ValueError(
                f"adapters sit at the centre tap: kernel sizes must be odd and equal, got {conv.kernel_size}"
            )
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise ValueError(f"padding must be zeros in numbers, got {conv.padding_mode!r} and {conv.padding!r}")
        _take(self, conv)
        self.kind, self.kernel_size = type(conv), conv.kernel_size
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups

    def _at_centre(self, tap: Tensor) -> Tensor:
        """(out, in/g) to the shape of the weight, zero beside the centre."""
        reach = [self.kernel_size[0] // 2] * (2 * len(self.kernel_size))
        return F.pad(tap.view(*tap.shape, *[1] * len(self.kernel_size)), reach)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.adapted_weight()
        return _CONV[self.kind](x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

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
        return _filled(plain, weight, self.bias)

    def _inputs(self) -> int:
        return self.weight.shape[1] * self.groups

    def _prune_host(self, out_kept: Tensor | None, in_kept: Tensor | None) -> None:
        if self.groups != 1:
            raise ValueError(
                f"channels of a grouped convolution (groups={self.groups}) are pruned by whole groups only"
            )
        self.weight = _kept(_kept(self.weight, 0, out_kept), 1, in_kept)
        self.bias = None if self.bias is None else _kept(self.bias, 0, out_kept)


class SPLoRAConv(_AdaptedConv):
    """A frozen ``nn.Conv{1,2,3}d`` with a low-rank addition at its centre tap; kernel sizes odd and equal."""

    def __init__(self, conv: nn.Module, *, rank: float = 16) -> None:
        super().__init__()
        self._set(conv)
        out_channels, in_channels = self.weight.shape[:2]
        self.adapter = LowRank(in_channels, out_channels, rank_of(rank, out_channels))

    def addition(self) -> Tensor:
        return self._at_centre(self.adapter())

    def _prune(self, out_kept: Tensor | None, in_kept: Tensor | None) -> None:
        self._prune_host(out_kept, in_kept)
        self.adapter.prune(out_kept, in_kept)


class SPPaRAConv(_AdaptedConv):
    """A frozen ``nn.Conv{1,2,3}d`` with a parallel 1x1 addition (out, in/g) at its centre tap."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self._set(conv)
        self.adapter = nn.Parameter(torch.empty(self.weight.shape[:2]))
        nn.init.uniform_(self.adapter, -_NEAR_ZERO, _NEAR_ZERO)

    def addition(self) -> Tensor:
        return self._at_centre(self.adapter)

    def _prune(self, out_kept: Tensor | None, in_kept: Tensor | None) -> None:
        self._prune_host(out_kept, in_kept)
        self.adapter = _kept(_kept(self.adapter, 0, out_kept), 1, in_kept)


class Prototypes(nn.Module):
    """Block prototypes ``cols[i] @ rows[i]`` (p, q). Share one instance between layers to share them over a network."""

    def __init__(self, count: int, block_shape: tuple[int, int], *, rank: int = 1) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.empty(count, rank, block_shape[1]))
        self.cols = nn.Parameter(torch.empty(count, block_shape[0], rank))
        nn.init.kaiming_uniform_(self.rows, a=math.sqrt(5))
        nn.init.uniform_(self.cols, -_NEAR_ZERO, _NEAR_ZERO)

    def forward(self) -> Tensor:
        return self.cols @ self.rows


class _Blocks(nn.Module):
    def __init__(self, prototypes: Prototypes, grid: tuple[int, int]) -> None:
        super().__init__()
        self.prototypes = prototypes
        self.pos_weights = nn.Parameter(torch.empty(prototypes.rows.shape[0], *grid))
        nn.init.uniform_(self.pos_weights, -1.0, 1.0)


class SPLoPALinear(_AdaptedLinear):
    """A frozen ``nn.Linear`` with a sum of block prototypes placed on the grid of its blocks.

    Args:
        block_shape: (p, q), which divides (out, in).
        prototypes: shared ones of that block shape; None makes ``num_prototypes`` of this layer's own.
    """

    def __init__(
        self,
        linear: nn.Linear,
        *,
        block_shape: tuple[int, int] = (32, 32),
        num_prototypes: int = 64,
        prototype_rank: int = 1,
        prototypes: Prototypes | None = None,
    ) -> None:
        super().__init__()
        self._set(linear)
        (out_features, in_features), (p, q) = self.weight.shape, block_shape
        if out_features % p or in_features % q:
            raise ValueError(f"blocks {block_shape} do not divide the weight ({out_features}, {in_features})")
        if prototypes is None:
            prototypes = Prototypes(num_prototypes, block_shape, rank=prototype_rank)
        if (prototypes.cols.shape[1], prototypes.rows.shape[2]) != (p, q):
            raise ValueError(f"the shared prototypes are not {block_shape}")
        self.block_shape = (p, q)
        self.adapter = _Blocks(prototypes, (out_features // p, in_features // q))

    def addition(self) -> Tensor:
        placed = torch.einsum("i r s, i p q -> r p s q", self.adapter.pos_weights, self.adapter.prototypes())
        return placed.reshape(self.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.adapted_weight(), self.bias)

    def block_importance(self, *, p: int = 2) -> Tensor:
        """Sum of ``|w|^p`` over each block of the adapted weight, (out / p, in / q)."""
        (rows, columns), (high, wide) = self.weight.shape, self.block_shape
        blocks = self.adapted_weight().abs().pow(p).view(rows // high, high, columns // wide, wide)
        return blocks.sum((1, 3))

    def _prune(self, out_kept: Tensor | None, in_kept: Tensor | None) -> None:
        raise ValueError("SPLoPA prunes whole blocks: use prune_blocks")

    def prune_blocks(self, kept: Tensor) -> None:
        """Zero the blocks that ``kept`` (out / p, in / q) bool drops, in the weight and in the positions, in place."""
        if kept.dtype != torch.bool or kept.shape != self.adapter.pos_weights.shape[1:]:
            raise ValueError(f"kept must be bool {tuple(self.adapter.pos_weights.shape[1:])}, got {tuple(kept.shape)}")
        p, q = self.block_shape
        with torch.no_grad():
            self.weight.mul_(kept.repeat_interleave(p, 0).repeat_interleave(q, 1))
            self.adapter.pos_weights.mul_(kept)


class SPLoRAMultiheadAttention(nn.Module):
    """``nn.MultiheadAttention`` whose q, k, v and output projections are SPLoRA linears; ``fuse`` gives a torch one
    back.

    Keys: ``{q,k,v,out}_proj.*`` and ``in_proj_bias`` (q, k, v).
    """

    def __init__(self, attention: nn.MultiheadAttention, *, rank: float = 16) -> None:
        super().__init__()
        if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
            raise ValueError("expected an nn.MultiheadAttention with one width, without bias_kv and add_zero_attn")
        self.embed_dim, self.num_heads = attention.embed_dim, attention.num_heads
        self.batch_first, self.dropout = attention.batch_first, attention.dropout
        for name, weight in zip("qkv", attention.in_proj_weight.detach().chunk(3)):
            plain = _filled(nn.Linear(self.embed_dim, self.embed_dim, bias=False), weight, None)
            self.add_module(f"{name}_proj", SPLoRALinear(plain, rank=rank))  # type: ignore[arg-type]
        bias = attention.in_proj_bias
        self.in_proj_bias = None if bias is None else nn.Parameter(bias.detach().clone())
        out = attention.out_proj
        copied = _filled(nn.Linear(self.embed_dim, self.embed_dim, bias=out.bias is not None), out.weight, out.bias)
        self.out_proj = SPLoRALinear(copied, rank=rank)  # type: ignore[arg-type]

    @property
    def in_proj_weight(self) -> Tensor:
        """Adapted weights of q, k and v stacked, (3 E, E)."""
        return torch.cat([self._modules[f"{name}_proj"].adapted_weight() for name in "qkv"])  # type: ignore[union-attr]

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        """As torch's; options are those of ``F.multi_head_attention_forward``."""
        if self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        out, weights = F.multi_head_attention_forward(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            self.in_proj_weight,
            self.in_proj_bias,
            None,
            None,
            False,
            self.dropout,
            self.out_proj.adapted_weight(),
            self.out_proj.bias,
            training=self.training,
            **options,
        )
        return (out.transpose(0, 1) if self.batch_first else out), weights

    def fuse(self) -> nn.MultiheadAttention:
        """The plain torch attention with the adapted weights."""
        plain = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            dropout=self.dropout,
            bias=self.in_proj_bias is not None,
            batch_first=self.batch_first,
        )
        with torch.no_grad():
            plain.in_proj_weight.copy_(self.in_proj_weight)
            plain.out_proj.weight.copy_(self.out_proj.adapted_weight())
            if self.in_proj_bias is not None:
                plain.in_proj_bias.copy_(self.in_proj_bias)
            if self.out_proj.bias is not None:
                plain.out_proj.bias.copy_(self.out_proj.bias)
        return plain


def adapt(module: nn.Module, *, method: str = "splora", rank: float = 16, skip: Iterable[str] = ()) -> nn.Module:
    """Put adapters on the convolutions and linear layers of a network, in place; every other weight is frozen but
    norms and biases.

    Args:
        method: 'splora', or 'sppara' (convolutions; linear layers get SPLoRA).
        rank: of SPLoRA.
        skip: dotted names of layers to leave as they are (a new head, say).

    Returns:
        The same network.
    """
    if method not in ("splora", "sppara"):
        raise ValueError(f"method must be 'splora' or 'sppara', got {method!r}")
    skipped = set(skip)
    for name, child in list(module.named_modules()):
        if name in skipped or not name:
            continue
        new: nn.Module | None = None
        if type(child) is nn.Linear:
            new = SPLoRALinear(child, rank=rank)
        elif type(child) in _CONV and len(set(child.kernel_size)) == 1 and child.kernel_size[0] % 2:  # type: ignore[arg-type,index,operator]
            new = SPPaRAConv(child) if method == "sppara" else SPLoRAConv(child, rank=rank)
        if new is not None:
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, new)
    return module


def fuse(module: nn.Module) -> nn.Module:
    """Replace every adapter of a network by its fused torch layer, in place, and return the network."""
    if isinstance(module, (Adapted, SPLoRAMultiheadAttention)):
        return module.fuse()
    for name, child in list(module.named_children()):
        setattr(module, name, fuse(child))
    return module
