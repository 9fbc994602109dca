"""Block pruning of linear layers: SPLoPA, which learns placed prototypes on frozen weights, and block fine-pruning.

Hedegaard et al., *Structured Pruning Adapters*: ``W' = W + sum_i P_i (x) prototype_i``, positions P_i (out/p, in/q) and
prototypes of p x q, rank 1, which layers may share. Pruning drops whole blocks of W'; a dropped block stays zero while
the rest goes on learning. :class:`BlockLinear` is block fine-pruning: the same blocks, every kept weight learned.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sparing.continual.adapted import NEAR_ZERO, Adapted, AdaptedLinear, take_layer, wide

BlockShape = tuple[int, int]


def check_blocks(linear: nn.Linear, block_shape: BlockShape) -> BlockShape:
    """The grid (rows, columns) of blocks. Raises ValueError when they do not divide the weight."""
    (out_features, in_features), (p, q) = linear.weight.shape, block_shape
    if p < 1 or q < 1 or out_features % p or in_features % q:
        raise ValueError(f"blocks {block_shape} do not divide the weight ({out_features}, {in_features})")
    return out_features // p, in_features // q


def spread(kept: Tensor, block_shape: BlockShape) -> Tensor:
    """(rows, columns) of blocks to (rows * p, columns * q) of weights."""
    return kept.repeat_interleave(block_shape[0], 0).repeat_interleave(block_shape[1], 1)


class KeptBlocks(nn.Module):
    """Mixin: a bool buffer ``kept`` (rows, columns) of blocks, stored only where a block was dropped.

    An unpruned layer has the published keys and no more.
    """

    kept: Tensor

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not bool(self.kept.all()):
            destination[f"{prefix}kept"] = self.kept

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        stored = state_dict.pop(f"{prefix}kept", None)
        if stored is not None and stored.shape != self.kept.shape:
            raise ValueError(f"{prefix}kept has {tuple(stored.shape)} blocks, the layer {tuple(self.kept.shape)}")
        if stored is not None:
            self.kept.copy_(stored.bool())
        elif any(key.startswith(prefix) for key in state_dict):  # this layer's tensors, of which no block was dropped
            self.kept.fill_(True)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def drop(self, kept: Tensor) -> None:
        """Drop the blocks that ``kept`` drops, besides those already gone."""
        if kept.dtype != torch.bool or kept.shape != self.kept.shape:
            raise ValueError(f"kept must be bool {tuple(self.kept.shape)}, got {kept.dtype} {tuple(kept.shape)}")
        self.kept.logical_and_(kept.to(self.kept.device))


class Prototypes(nn.Module):
    """Block prototypes ``cols[i] @ rows[i]`` (p, q). Share one instance between layers to share them over a network."""

    def __init__(self, count: int, block_shape: tuple[int, int], *, rank: int = 1) -> None:
        super().__init__()
        for name, number in (("count", count), ("rank", rank), ("block_shape", min(block_shape))):
            if number < 1:
                raise ValueError(f"{name} of prototypes must be at least 1, got {number}")
        self.rows = nn.Parameter(torch.empty(count, rank, block_shape[1]))
        self.cols = nn.Parameter(torch.empty(count, block_shape[0], rank))
        nn.init.kaiming_uniform_(self.rows, a=math.sqrt(5))
        nn.init.uniform_(self.cols, -NEAR_ZERO, NEAR_ZERO)

    def forward(self) -> Tensor:
        return self.cols @ self.rows


class _Blocks(KeptBlocks):
    def __init__(self, prototypes: Prototypes, grid: tuple[int, int]) -> None:
        super().__init__()
        self.prototypes = prototypes
        self.pos_weights = nn.Parameter(torch.empty(prototypes.rows.shape[0], *grid))
        nn.init.uniform_(self.pos_weights, -1.0, 1.0)
        self.register_buffer("kept", torch.ones(grid, dtype=torch.bool), persistent=False)


class SPLoPALinear(AdaptedLinear):
    """A frozen ``nn.Linear`` with a sum of block prototypes placed on the grid of its blocks.

    Args:
        linear: the layer; its weight is copied and frozen, its bias stays trainable.
        block_shape: (p, q), which divides (out, in).
        prototypes: shared ones of that block shape; None makes ``num_prototypes`` of this layer's own.
    """

    def __init__(
        self,
        linear: nn.Linear,
        *,
        block_shape: BlockShape = (32, 32),
        num_prototypes: int = 64,
        prototype_rank: int = 1,
        prototypes: Prototypes | None = None,
    ) -> None:
        super().__init__()
        self._set(linear)
        grid = check_blocks(linear, block_shape)
        if prototypes is None:
            prototypes = Prototypes(num_prototypes, block_shape, rank=prototype_rank)
        if (prototypes.cols.shape[1], prototypes.rows.shape[2]) != tuple(block_shape):
            raise ValueError(f"the shared prototypes are not {block_shape}")
        self.block_shape = block_shape
        self.adapter = _Blocks(prototypes, grid).to(linear.weight).train(self.training)

    @property
    def kept(self) -> Tensor:
        """(out / p, in / q) bool: the blocks that are left."""
        return self.adapter.kept

    def addition(self) -> Tensor:
        positions = self.adapter.pos_weights * self.adapter.kept  # a dropped block learns nothing
        placed = torch.einsum("i r s, i p q -> r p s q", positions, self.adapter.prototypes())
        return placed.reshape(self.stored_weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.adapted_weight(), self.bias)

    def block_importance(self, *, p: int = 2) -> Tensor:
        """Sum of ``|w|^p`` over each block of the adapted weight, (out / p, in / q), in float32."""
        return block_sums(wide(self.adapted_weight()).abs().pow(p), self.block_shape)

    def learned_parameters(self) -> int:
        """Numbers that training changes: prototypes (shared ones too), positions of kept blocks, bias."""
        dropped = self.adapter.kept.numel() - int(self.adapter.kept.sum())
        return super().learned_parameters() - dropped * self.adapter.pos_weights.shape[0]

    def _prune(self, out_kept: Tensor | None, in_kept: Tensor | None) -> None:
        raise ValueError("SPLoPA prunes whole blocks: use prune_blocks")

    def prune_blocks(self, kept: Tensor) -> None:
        """Zero the blocks that ``kept`` (out / p, in / q) bool drops, in the weight and in the positions, in place.

        They stay zero: their positions get no gradient.

        Raises:
            ValueError: another shape or type.
        """
        self.adapter.drop(kept)
        with torch.no_grad():
            self.stored_weight.mul_(spread(self.kept, self.block_shape))
            self.adapter.pos_weights.mul_(self.kept)


class BlockLinear(KeptBlocks, Adapted):
    """Block fine-pruning: an ``nn.Linear`` all of whose kept blocks are learned; nothing is added or frozen."""

    def __init__(self, linear: nn.Linear, *, block_shape: BlockShape = (32, 32)) -> None:
        super().__init__()
        if type(linear) is not nn.Linear:
            raise TypeError(f"expected an nn.Linear, got {type(linear).__name__}")
        take_layer(self, linear)
        self.stored_weight.requires_grad_(True)
        self.block_shape = block_shape
        kept = torch.ones(check_blocks(linear, block_shape), dtype=torch.bool, device=linear.weight.device)
        self.register_buffer("kept", kept, persistent=False)

    def adapted_weight(self) -> Tensor:
        return self.stored_weight * spread(self.kept, self.block_shape)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.adapted_weight(), self.bias)

    def _plain(self, weight: Tensor) -> nn.Module:
        return AdaptedLinear._plain(self, weight)  # type: ignore[arg-type]

    def _prune(self, out_kept: Tensor | None, in_kept: Tensor | None) -> None:
        raise ValueError("BlockLinear prunes whole blocks: use prune_blocks")

    def learned_parameters(self) -> int:
        """Weights of the kept blocks, and the bias."""
        p, q = self.block_shape
        return int(self.kept.sum()) * p * q + (0 if self.bias is None else self.bias.numel())

    def prune_blocks(self, kept: Tensor) -> None:
        """Zero the blocks that ``kept`` drops, in place; they stay zero."""
        self.drop(kept)
        with torch.no_grad():
            self.stored_weight.mul_(spread(self.kept, self.block_shape))


def block_sums(values: Tensor, block_shape: BlockShape) -> Tensor:
    """(out, in) summed over blocks, (out / p, in / q)."""
    return rearrange(values, "(r p) (s q) -> r p s q", p=block_shape[0], q=block_shape[1]).sum((1, 3))
