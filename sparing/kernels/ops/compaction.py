"""Compaction: the tokens that are kept, packed into one ragged batch, and put back.

``compact`` turns a mask into indices; ``gather_rows`` packs the kept rows of any ``(batch, tokens, ...)`` tensor,
``scatter_rows`` puts packed rows back. How many rows are kept depends on the data, so there are two modes: ``sync``
gives buffers of the exact size at the price of one host read, a ``capacity`` gives buffers of a fixed size, padded
with index -1, without any (CUDA graphs, compile, export). Each direction's gradient is the other direction: both are
plain row copies, never an atomic addition.
"""

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from sparing.kernels.dispatch import define_op, register_impl, run

__all__ = ["Compaction", "compact", "gather_rows", "scatter_rows"]


@dataclass(frozen=True)
class Compaction:
    """Where the kept tokens of a batch are.

    Attributes:
        flat_index: ``(rows,)`` int32, ascending positions ``b * tokens + l`` of the kept tokens; -1 in the unused
            rows of a fixed capacity.
        cu_seqlens: ``(batch + 1,)`` int32, cumulative lengths from 0, as varlen attention takes them.
        lengths: ``(batch,)`` int32, kept tokens of each sample.
        inverse: ``(batch * tokens,)`` int32, packed row of each token, -1 where it was dropped.
        max_len_bound: an upper bound of ``lengths`` known without reading the device: the number of tokens.
        overflow: 0-d bool on the device: more tokens were to be kept than the capacity holds (the last ones were
            dropped).
    """

    flat_index: Tensor
    cu_seqlens: Tensor
    lengths: Tensor
    inverse: Tensor
    max_len_bound: int
    overflow: Tensor


def compact(keep: Tensor, *, sync: bool = True, capacity: int | None = None, backend: str = "auto") -> Compaction:
    """Indices of the kept tokens of a batch.

    Args:
        keep: ``(batch, tokens)`` bool, True = kept.
        sync: exact sizes; reads the number of kept tokens on the host once. Ignored when ``capacity`` is given.
        capacity: a fixed number of packed rows; no host read. Rows that stay unused carry index -1; tokens past the
            capacity are dropped and ``overflow`` says so. With ``sync=False`` and no capacity it is ``batch *
            tokens``, which cannot overflow.
        backend: ``'auto'`` or ``'reference'``, the only one.

    Raises:
        ValueError: ``keep`` is not a two-dimensional bool tensor, or the capacity is negative.
    """
    if keep.ndim != 2 or keep.dtype != torch.bool:
        raise ValueError(f"keep is {keep.dtype} of shape {tuple(keep.shape)}; expected bool of shape (batch, tokens)")
    if capacity is not None and capacity < 0:
        raise ValueError(f"capacity is {capacity}; expected 0 or more rows")
    return run("compact", backend, keep, sync=sync, capacity=capacity)


def _compact(keep: Tensor, *, sync: bool = True, capacity: int | None = None) -> Compaction:
    batch, tokens = keep.shape
    if capacity is None and not sync:
        capacity = batch * tokens
    flat = rearrange(keep, "b l -> (b l)")
    rank = flat.cumsum(0, dtype=torch.int32) - 1
    lengths = keep.sum(1, dtype=torch.int32)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    if capacity is None:
        flat_index = flat.nonzero().squeeze(1).to(torch.int32)
        inverse = torch.where(flat, rank, -1)
        return Compaction(
            flat_index, cu_seqlens, lengths, inverse, tokens, torch.zeros_like(flat, dtype=torch.bool).any()
        )
    overflow = cu_seqlens[-1] > capacity
    cu_seqlens = cu_seqlens.clamp(max=capacity)
    fits = flat & (rank < capacity)
    inverse = torch.where(fits, rank, -1)
    # Every token that does not fit writes to one spare slot behind the buffer, which is cut off.
    slot = torch.where(fits, rank, capacity).long()
    position = torch.arange(batch * tokens, dtype=torch.int32, device=keep.device)
    flat_index = position.new_full((capacity + 1,), -1).scatter(0, slot, position)[:capacity]
    return Compaction(flat_index, cu_seqlens, cu_seqlens.diff(), inverse, tokens, overflow)


def gather_rows(x: Tensor, compaction: Compaction, *, backend: str = "auto") -> Tensor:
    """Kept rows of ``x: (batch, tokens, ...)``, packed: ``(rows, ...)``. Unused rows of a fixed capacity are 0.

    Args:
        x: values per token.
        compaction: what ``compact`` returned.
        backend: ``'auto'`` or ``'reference'``, the only one.

    Raises:
        ValueError: ``x`` does not have the batch and token counts of the compaction.
    """
    batch, tokens = compaction.lengths.shape[0], compaction.max_len_bound
    if x.ndim < 2 or x.shape[0] != batch or x.shape[1] != tokens:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; expected ({batch}, {tokens}, ...) as the mask that was compacted"
        )
    return run("gather_rows", backend, x, compaction)


def _gather_rows(x: Tensor, compaction: Compaction) -> Tensor:
    return _CopyRows.apply(x.flatten(0, 1), compaction.flat_index, compaction.inverse)


def scatter_rows(
    packed: Tensor, compaction: Compaction, into: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Packed rows put back to ``(batch, tokens, ...)``; dropped tokens keep the value they have in ``into``
    (``None``: 0).

    Args:
        packed: ``(rows, ...)``, rows as ``gather_rows`` gives them.
        compaction: what ``compact`` returned.
        into: ``(batch, tokens, ...)``, read and not modified.
        backend: ``'auto'`` or ``'reference'``, the only one.

    Raises:
        ValueError: row counts, or the shape or dtype of ``into``, that do not fit.
    """
    if packed.ndim < 1 or packed.shape[0] != compaction.flat_index.shape[0]:
        raise ValueError(f"packed has shape {tuple(packed.shape)}; expected {compaction.flat_index.shape[0]} rows")
    shape = (compaction.lengths.shape[0], compaction.max_len_bound, *packed.shape[1:])
    if into is not None and (into.shape != shape or into.dtype != packed.dtype):
        raise ValueError(
            f"into is {into.dtype} of shape {tuple(into.shape)}; expected {packed.dtype} of shape {tuple(shape)}"
        )
    return run("scatter_rows", backend, packed, compaction, into)


def _scatter_rows(packed: Tensor, compaction: Compaction, into: Tensor | None = None) -> Tensor:
    batch, tokens = compaction.lengths.shape[0], compaction.max_len_bound
    placed = _CopyRows.apply(packed, compaction.inverse, compaction.flat_index).unflatten(0, (batch, tokens))
    if into is None:
        return placed
    kept = (compaction.inverse >= 0).view(batch, tokens, *(1,) * (placed.ndim - 2))
    return torch.where(kept, placed, into)


def _copy_rows(rows: Tensor, index: Tensor) -> Tensor:
    """``out[i] = rows[index[i]]``, 0 where the index is -1."""
    trailing = (1,) * (rows.ndim - 1)
    if not torch.compiler.is_compiling() and rows.shape[0] == 0:
        return rows.new_zeros((index.shape[0], *rows.shape[1:]))
    copied = rows.index_select(0, index.clamp(min=0))
    return copied.masked_fill((index < 0).view(-1, *trailing), 0)


class _CopyRows(torch.autograd.Function):
    """Row copies whose gradient is the copy by the inverse index: each row has at most one destination."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return _copy_rows(rows, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _copy_rows(grad, ctx.saved_tensors[0]), None, None


for _public, _reference in ((compact, _compact), (gather_rows, _gather_rows), (scatter_rows, _scatter_rows)):
    define_op(_public, order=lambda *args, **kwargs: ("reference",))
    register_impl(_public.__name__, "reference", _reference)
