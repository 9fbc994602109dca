"""BlockMap: which key blocks each query block sees, as a dense mask and as the index lists that kernels walk."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparing.kernels.masks import causal_mask


@dataclass(frozen=True)
class BlockMap:
    """A block-sparse pattern over a score matrix of (M, N), made of blocks of ``block_q`` x ``block_k`` scores.

    Attributes:
        mask: (batch | 1, heads | 1, NQ, NK) bool, True = the block is computed.
        block_q: rows of a block; the last block may be ragged: NQ = ceil(M / block_q).
        block_k: columns of a block.
        kv_num: (..., NQ) int32, kept key blocks of each query block.
        kv_idx: (..., NQ, NK) int32, their numbers in ascending order, then zeros.
        q_num: (..., NK) int32, query blocks that keep each key block (for the gradients of k and v).
        q_idx: (..., NK, NQ) int32, their numbers in ascending order, then zeros.
    """

    mask: Tensor
    block_q: int
    block_k: int
    kv_num: Tensor
    kv_idx: Tensor
    q_num: Tensor
    q_idx: Tensor

    @classmethod
    def from_mask(cls, mask: Tensor, *, block_q: int, block_k: int) -> "BlockMap":
        """Build the index lists on the mask's device, by a stable sort, without a host synchronisation.

        Args:
            mask: (batch | 1, heads | 1, NQ, NK) bool, True = the block is computed.
            block_q: rows of a block.
            block_k: columns of a block.

        Raises:
            ValueError: a mask of another rank or dtype, or a block size below 1.
        """
        if mask.ndim != 4 or mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool (batch | 1, heads | 1, NQ, NK), got {mask.dtype} {tuple(mask.shape)}")
        if block_q < 1 or block_k < 1:
            raise ValueError(f"block sizes must be at least 1, got {block_q} and {block_k}")
        return cls(mask, block_q, block_k, *_lists(mask), *_lists(mask.transpose(-2, -1)))

    @classmethod
    def from_lists(cls, kv_num: Tensor, kv_idx: Tensor, *, block_q: int, block_k: int) -> "BlockMap":
        """The map whose lists are ``kv_num`` (.., NQ) and ``kv_idx`` (.., NQ, NK), without a host synchronisation."""
        columns = kv_idx.shape[-1]
        kept = torch.arange(columns, device=kv_idx.device) < kv_num.unsqueeze(-1)
        place = torch.where(kept, kv_idx, columns).long()  # one column more takes what is not kept
        mask = torch.zeros(*kv_idx.shape[:-1], columns + 1, dtype=torch.bool, device=kv_idx.device)
        return cls.from_mask(mask.scatter(-1, place, True)[..., :columns], block_q=block_q, block_k=block_k)

    @property
    def num_blocks(self) -> tuple[int, int]:
        """(NQ, NK)."""
        return self.mask.shape[2], self.mask.shape[3]

    def density(self) -> Tensor:
        """0-d share of the blocks that are computed, on the device."""
        return self.mask.float().mean()

    def elements(self, num_queries: int, num_keys: int, *, causal: bool = False) -> Tensor:
        """The mask of single scores, (batch | 1, heads | 1, M, N) bool, True = may attend."""
        rows = torch.arange(num_queries, device=self.mask.device) // self.block_q
        columns = torch.arange(num_keys, device=self.mask.device) // self.block_k
        visible = self.mask[:, :, rows][:, :, :, columns]
        return visible & causal_mask(num_queries, num_keys, device=self.mask.device) if causal else visible

    def check(self, q: Tensor, k: Tensor) -> None:
        """Raise ValueError when the map does not fit q (B, H, M, D) and k (B, H, N, D)."""
        need = (-(-q.shape[2] // self.block_q), -(-k.shape[2] // self.block_k))
        batch, heads = self.mask.shape[:2]
        fits = self.num_blocks == need and batch in (1, q.shape[0]) and heads in (1, q.shape[1])
        if not fits:
            raise ValueError(
                f"a block map for {tuple(q.shape)} queries and {tuple(k.shape)} keys in blocks of {self.block_q} x "
                f"{self.block_k} must be (1 or {q.shape[0]}, 1 or {q.shape[1]}, {need[0]}, {need[1]}), "
                f"got {tuple(self.mask.shape)}"
            )

    def to_flex(self, num_queries: int, num_keys: int, *, causal: bool = False) -> Any:
        """A FlexAttention ``BlockMask`` of the same pattern. Its ``mask_mod`` states the pattern too, because the
        uncompiled FlexAttention looks at nothing else; without ``causal`` the blocks are declared full, so kernels
        skip it.
        """
        from torch.nn.attention.flex_attention import BlockMask

        mask, block_q, block_k = self.mask, self.block_q, self.block_k
        batch, heads, offset = mask.shape[0], mask.shape[1], num_keys - num_queries

        def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            keep = mask[b if batch > 1 else 0, h if heads > 1 else 0, i // block_q, j // block_k]
            return keep & (j <= i + offset) if causal else keep

        none = torch.zeros_like(self.kv_num), self.kv_idx
        kept = self.kv_num, self.kv_idx
        partial, full = (kept, none) if causal else (none, kept)
        return BlockMask.from_kv_blocks(
            *partial, *full, BLOCK_SIZE=(block_q, block_k), mask_mod=mask_mod, seq_lengths=(num_queries, num_keys)
        )

    @classmethod
    def from_flex(cls, block_mask: Any) -> "BlockMap":
        """The pattern of a FlexAttention ``BlockMask``: its partial and full blocks together. What its ``mask_mod``
        hides inside partial blocks is not carried over (pass ``causal`` to the op where that is what it hides).
        """
        mask = _dense(block_mask.kv_num_blocks, block_mask.kv_indices)
        if block_mask.full_kv_num_blocks is not None:
            mask = mask | _dense(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
        block_q, block_k = block_mask.BLOCK_SIZE
        return cls.from_mask(mask, block_q=block_q, block_k=block_k)


def _lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and ascending indices (zeros behind them) of the True entries of the last dim."""
    count = mask.sum(-1, dtype=torch.int32)
    order = torch.argsort((~mask).to(torch.uint8), dim=-1, stable=True).to(torch.int32)
    behind = torch.arange(mask.shape[-1], device=mask.device) >= count.unsqueeze(-1)
    return count, order.masked_fill(behind, 0)


def _dense(count: Tensor, index: Tensor) -> Tensor:
    """The inverse of :func:`_lists`."""
    columns = index.shape[-1]
    listed = torch.arange(columns, device=index.device) < count.unsqueeze(-1)
    # entries that are not listed are sent to an extra column, which is cut off
    target = torch.where(listed, index.long(), columns)
    mask = torch.zeros(*index.shape[:-1], columns + 1, dtype=torch.bool, device=index.device)
    return mask.scatter(-1, target, True)[..., :columns]
