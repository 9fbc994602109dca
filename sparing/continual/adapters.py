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

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.continual.adapted import (
    CONV,
    NEAR_ZERO,
    Adapted,
    AdaptedConv,
    AdaptedLinear,
    LowRank,
    filled,
    kept_part,
    rank_of,
)
from sparing.continual.block_adapters import BlockLinear, Prototypes, SPLoPALinear

__all__ = [
    "METHODS",
    "Adapted",
    "BlockLinear",
    "Prototypes",
    "SPLoPALinear",
    "SPLoRAConv",
    "SPLoRALinear",
    "SPLoRAMultiheadAttention",
    "SPPaRAConv",
    "adapt",
    "fuse",
    "learned_parameters",
]

METHODS = ("splora", "sppara", "splopa", "fine", "fine_blocks")


class SPLoRALinear(AdaptedLinear):
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
        self.weight = kept_part(kept_part(self.weight, 0, out_kept), 1, in_kept)
        self.bias = None if self.bias is None else kept_part(self.bias, 0, out_kept)
        self.adapter.prune(out_kept, in_kept)


class SPLoRAConv(AdaptedConv):
    """A frozen ``nn.Conv{1,2,3}d`` with a low-rank addition at its centre tap; kernel sizes odd and equal."""

    def __init__(self, conv: nn.Module, *, rank: float = 16) -> None:
        super().__init__()
        self._set(conv)
        out_channels, in_channels = self.weight.shape[:2]
        self.adapter = LowRank(in_channels, out_channels, rank_of(rank, out_channels))

    def addition(self) -> Tensor:
        return self._at_centre(self.adapter())

    def _prune(self, out_kept: Tensor | None, in_kept: Tensor | None) -> None:
        self.adapter.prune(self._rows_kept(out_kept, in_kept), self._prune_host(out_kept, in_kept))


class SPPaRAConv(AdaptedConv):
    """A frozen ``nn.Conv{1,2,3}d`` with a parallel 1x1 addition (out, in/g) at its centre tap."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self._set(conv)
        self.adapter = nn.Parameter(torch.empty(self.weight.shape[:2]))
        nn.init.uniform_(self.adapter, -NEAR_ZERO, NEAR_ZERO)

    def addition(self) -> Tensor:
        return self._at_centre(self.adapter)

    def _prune(self, out_kept: Tensor | None, in_kept: Tensor | None) -> None:
        rows = self._rows_kept(out_kept, in_kept)
        self.adapter = kept_part(kept_part(self.adapter, 0, rows), 1, self._prune_host(out_kept, in_kept))


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
            plain = filled(nn.Linear(self.embed_dim, self.embed_dim, bias=False), weight, None)
            self.add_module(f"{name}_proj", SPLoRALinear(plain, rank=rank))  # type: ignore[arg-type]
        bias = attention.in_proj_bias
        self.in_proj_bias = None if bias is None else nn.Parameter(bias.detach().clone())
        out = attention.out_proj
        copied = filled(nn.Linear(self.embed_dim, self.embed_dim, bias=out.bias is not None), out.weight, out.bias)
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


def adapt(
    module: nn.Module,
    *,
    method: str = "splora",
    rank: float = 16,
    skip: Iterable[str] = (),
    block_shape: tuple[int, int] = (32, 32),
    num_prototypes: int = 64,
) -> nn.Module:
    """Put adapters on the convolutions and linear layers of a network, in place.

    Weights of adapted layers are frozen, and so is every other parameter of more than one axis (position tables,
    kernels that no adapter fits). Norms, biases and the layers of ``skip`` are learned.

    Args:
        method: 'splora'; 'sppara' (convolutions; linear layers get SPLoRA); 'splopa' (linear layers that
            ``block_shape`` divides; its prototypes are shared over this network); 'fine' freezes nothing, 'fine_blocks'
            likewise with layers whose blocks can be pruned: fine-pruning, to compare with.
        rank: of SPLoRA.
        skip: dotted names of layers, or of modules that hold them, to leave as they are (a new head, say).
        block_shape: of SPLoPA and 'fine_blocks'.
        num_prototypes: of SPLoPA.

    Returns:
        The same network.

    Raises:
        ValueError: an unknown method, a name in ``skip`` that is not there, or no layer that takes an adapter.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    skipped = tuple(skip)
    names = dict(module.named_modules())
    unknown = [name for name in skipped if name not in names]
    if unknown:
        raise ValueError(f"skip names {unknown}, which this {type(module).__name__} does not have")
    if method == "fine":
        return module
    shared = Prototypes(num_prototypes, block_shape) if method == "splopa" else None
    adapted = 0
    for name, child in names.items():
        if not name or _below(name, skipped):
            continue
        new = _adapter(child, method=method, rank=rank, block_shape=block_shape, prototypes=shared)
        if new is not None:
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, new)
            adapted += 1
    if not adapted:
        raise ValueError(f"no layer of this {type(module).__name__} takes an adapter of method {method!r}")
    if method != "fine_blocks":
        own = {id(p) for m in module.modules() if isinstance(m, Adapted) for p in m.parameters()}
        for name, parameter in module.named_parameters():
            if id(parameter) not in own and parameter.ndim > 1 and not _below(name, skipped):
                parameter.requires_grad_(False)
    return module


def _below(name: str, skipped: tuple[str, ...]) -> bool:
    return any(name == skip or name.startswith(f"{skip}.") for skip in skipped)


def _adapter(
    layer: Any, *, method: str, rank: float, block_shape: tuple[int, int], prototypes: Prototypes | None
) -> nn.Module | None:
    """The adapted layer; None for one that takes no adapter."""
    if type(layer) is nn.Linear:
        if method in ("splora", "sppara"):
            return SPLoRALinear(layer, rank=rank)
        if layer.out_features % block_shape[0] or layer.in_features % block_shape[1]:
            return None
        if method == "splopa":
            return SPLoPALinear(layer, block_shape=block_shape, prototypes=prototypes)
        return BlockLinear(layer, block_shape=block_shape)
    fits = type(layer) in CONV and len(set(layer.kernel_size)) == 1 and layer.kernel_size[0] % 2
    if fits and layer.padding_mode == "zeros" and not isinstance(layer.padding, str) and method in ("splora", "sppara"):
        return SPPaRAConv(layer) if method == "sppara" else SPLoRAConv(layer, rank=rank)
    return None


def fuse(module: nn.Module) -> nn.Module:
    """Replace every adapter of a network by its fused torch layer, in place, and return the network."""
    if isinstance(module, (Adapted, SPLoRAMultiheadAttention)):
        return module.fuse()
    for name, child in list(module.named_children()):
        setattr(module, name, fuse(child))
    return module


def learned_parameters(module: nn.Module) -> int:
    """Numbers that training changes in a network; of dropped blocks nothing is counted, shared ones count once."""
    total = sum(p.numel() for p in module.parameters() if p.requires_grad)
    for layer in module.modules():
        if isinstance(layer, (SPLoPALinear, BlockLinear)):
            total -= sum(p.numel() for p in layer.parameters() if p.requires_grad) - layer.learned_parameters()
    return total
