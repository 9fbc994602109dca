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

A network that is not fused yet is stored by its ``state_dict``. Layers that share prototypes, or a layer in two places,
have one tensor under several keys: ``safetensors.torch.save_model`` and ``load_model`` keep it one, ``save_file``
refuses it. The network to load into is built and adapted likewise; one whose channels were pruned is first cut by
:func:`sparing.continual.channel_groups.resize_as`.
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
    covered,
    filled,
    is_plain,
    kept_part,
    places,
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
    "check_method",
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
        out_features, in_features = linear.weight.shape
        self.adapter = LowRank(in_features, out_features, rank_of(rank, out_features), like=linear.weight)
        self.adapter.train(self.training)

    def addition(self) -> Tensor:
        return self.adapter()

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.linear(x, self.adapted_weight(), self.bias)
        low = F.linear(F.linear(x, self.adapter.rows[0]), self.adapter.cols[0])
        return F.linear(x, self.stored_weight, self.bias) + low

    def _prune(self, out_kept: Tensor | None, in_kept: Tensor | None) -> None:
        self.register_parameter("weight", kept_part(kept_part(self.stored_weight, 0, out_kept), 1, in_kept))
        self.bias = None if self.bias is None else kept_part(self.bias, 0, out_kept)
        self.adapter.prune(out_kept, in_kept)


class SPLoRAConv(AdaptedConv):
    """A frozen ``nn.Conv{1,2,3}d`` with a low-rank addition at its centre tap; kernel sizes odd and equal."""

    def __init__(self, conv: nn.Module, *, rank: float = 16) -> None:
        super().__init__()
        self._set(conv)
        out_channels, in_channels = self.stored_weight.shape[:2]
        self.adapter = LowRank(in_channels, out_channels, rank_of(rank, out_channels), like=self.stored_weight)
        self.adapter.train(self.training)

    def addition(self) -> Tensor:
        return self._at_centre(self.adapter())

    def _prune(self, out_kept: Tensor | None, in_kept: Tensor | None) -> None:
        self.adapter.prune(self._rows_kept(out_kept, in_kept), self._prune_host(out_kept, in_kept))


class SPPaRAConv(AdaptedConv):
    """A frozen ``nn.Conv{1,2,3}d`` with a parallel 1x1 addition (out, in/g) at its centre tap."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self._set(conv)
        first = nn.init.uniform_(torch.empty(self.stored_weight.shape[:2]), -NEAR_ZERO, NEAR_ZERO)
        self.adapter = nn.Parameter(first.to(self.stored_weight))

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
        self.train(attention.training)
        for name, weight in zip("qkv", attention.in_proj_weight.detach().chunk(3)):
            plain = filled(nn.Linear(self.embed_dim, self.embed_dim, bias=False), weight, None)
            self.add_module(f"{name}_proj", SPLoRALinear(plain.train(self.training), rank=rank))  # type: ignore[arg-type]
        bias = attention.in_proj_bias
        self.in_proj_bias = None if bias is None else nn.Parameter(bias.detach().clone())
        out = attention.out_proj
        copied = filled(nn.Linear(self.embed_dim, self.embed_dim, bias=out.bias is not None), out.weight, out.bias)
        self.out_proj = SPLoRALinear(copied.train(self.training), rank=rank)  # type: ignore[arg-type]

    @property
    def in_proj_weight(self) -> Tensor:
        """Adapted weights of q, k and v stacked, (3 E, E)."""
        return torch.cat([self._modules[f"{name}_proj"].adapted_weight() for name in "qkv"])  # type: ignore[union-attr]

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        """As torch's, (tokens, width) without a batch too; options are those of ``F.multi_head_attention_forward``."""
        turned = self.batch_first and query.ndim == 3
        if turned:
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
        return (out.transpose(0, 1) if turned else out), weights

    def fuse(self) -> nn.MultiheadAttention:
        """The plain torch attention with the adapted weights."""
        plain = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            dropout=self.dropout,
            bias=self.in_proj_bias is not None,
            batch_first=self.batch_first,
            device=self.out_proj.stored_weight.device,
            dtype=self.out_proj.stored_weight.dtype,
        )
        with torch.no_grad():
            plain.in_proj_weight.copy_(self.in_proj_weight)
            plain.out_proj.weight.copy_(self.out_proj.adapted_weight())
            if self.in_proj_bias is not None:
                plain.in_proj_bias.copy_(self.in_proj_bias)
            if self.out_proj.bias is not None:
                plain.out_proj.bias.copy_(self.out_proj.bias)
        return plain.train(self.training)


def check_method(method: str) -> None:
    """Raises ValueError for an unknown method of :func:`adapt`."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")


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
        ValueError: an unknown method, a name in ``skip`` that is not there, a layer that carries an adapter already
            (skipped ones may), a single layer, or no layer that takes an adapter. The network is left as it was.
    """
    check_method(method)
    names, spared = places(module), covered(module, skip)
    for name, child in names.items():
        if isinstance(child, (Adapted, SPLoRAMultiheadAttention)) and id(child) not in spared:
            raise ValueError(f"{name or type(child).__name__!r} carries an adapter already: fuse it first, or skip it")
    if method == "fine":
        return module
    if type(module) in (nn.Linear, *CONV):
        raise ValueError(
            f"expected a network whose layers can be replaced in place, got a single {type(module).__name__}: "
            "wrap it by its adapter (SPLoRALinear, SPLoRAConv, ...)"
        )
    shared = Prototypes(num_prototypes, block_shape) if method == "splopa" else None
    made: dict[int, nn.Module | None] = {}
    for name, child in names.items():
        if id(child) in spared or id(child) in made:
            continue
        try:
            made[id(child)] = _adapter(child, method=method, rank=rank, block_shape=block_shape, prototypes=shared)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
    adapted = {name: new for name, child in names.items() if (new := made.get(id(child))) is not None}
    if not adapted:
        raise ValueError(f"no layer of this {type(module).__name__} takes an adapter of method {method!r}")
    for name, new in adapted.items():
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, new)
    if method != "fine_blocks":
        own = {id(p) for m in module.modules() if isinstance(m, Adapted) or id(m) in spared for p in m.parameters()}
        for parameter in module.parameters():
            if id(parameter) not in own and parameter.ndim > 1:
                parameter.requires_grad_(False)
    return module


def _adapter(
    layer: Any, *, method: str, rank: float, block_shape: tuple[int, int], prototypes: Prototypes | None
) -> nn.Module | None:
    """The adapted layer; None for one that takes no adapter."""
    if type(layer) in (nn.Linear, *CONV) and not is_plain(layer):
        return None
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
    """Replace every adapter of a network by its fused torch layer, in place, and return the network.

    An adapter in several places becomes one layer in the same places. A network without adapters stays as it is.
    """
    names = places(module)
    plain = {id(m): m.fuse() for m in names.values() if isinstance(m, (Adapted, SPLoRAMultiheadAttention))}
    if id(module) in plain:
        return plain[id(module)]
    for name, child in names.items():
        parent, _, leaf = name.rpartition(".")
        if id(child) in plain and type(holder := names[parent]) is not SPLoRAMultiheadAttention:
            setattr(holder, leaf, plain[id(child)])
    return module


def learned_parameters(module: nn.Module) -> int:
    """Numbers that training changes in a network; of dropped blocks nothing is counted, shared ones count once."""
    total = sum(p.numel() for p in module.parameters() if p.requires_grad)
    for layer in module.modules():
        if isinstance(layer, (SPLoPALinear, BlockLinear)):
            total -= sum(p.numel() for p in layer.parameters() if p.requires_grad) - layer.learned_parameters()
    return total
