"""Attention over the blocks of a :class:`~sparing.kernels.BlockMap` only.

A score is computed when its block is kept, and with ``causal`` when also ``j <= i + N - M``. A query row none of
whose keys is computed gives out 0, lse -inf and no gradient.
"""

from typing import Any

import torch
from torch import Tensor

from sparing.kernels.backends import flex, sdpa
from sparing.kernels.block_map import BlockMap
from sparing.kernels.dispatch import define_op, register_impl, run, triton_attention_reasons, triton_here
from sparing.kernels.masks import check_qkv
from sparing.kernels.ops.attention import explicit_attention


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: BlockMap,
    *,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Block-sparse attention, with gradients.

    Args:
        q: (batch, heads, M, head_dim).
        k: (batch, heads, N, head_dim).
        v: (batch, heads, N, value_dim).
        block_map: the blocks to compute; its batch and head dims may be 1 (shared).
        causal: also hide keys ``j > i + N - M``, inside blocks too.
        scale: factor of the scores; ``head_dim ** -0.5`` when None.
        return_lse: also return the natural-log normaliser (batch, heads, M), not differentiable.
        backend: ``'auto'``, ``'triton'``, ``'flex'``, ``'sdpa'`` or ``'reference'``.

    Returns:
        (batch, heads, M, value_dim) in the dtype of ``q``; with ``return_lse`` also lse.

    Raises:
        ValueError: shapes or a map that do not fit.
        BackendUnsupported: the named backend cannot serve this call.
    """
    check_qkv(q, k, v)
    block_map.check(q, k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return run("block_sparse_attention", backend, q, k, v, block_map, causal=causal, scale=scale, return_lse=return_lse)


def _reference(
    q: Tensor, k: Tensor, v: Tensor, block_map: BlockMap, *, causal: bool, scale: float, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    visible = block_map.elements(q.shape[2], k.shape[2], causal=causal)
    out, lse = explicit_attention(q, k, v, bias=None, visible=visible, scale=scale)
    return (out, lse.detach()) if return_lse else out


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, block_map: BlockMap, *, causal: bool, scale: float, return_lse: bool
) -> Tensor:
    visible = block_map.elements(q.shape[2], k.shape[2], causal=causal)
    return sdpa.masked_attention(q, k, v, bias=None, visible=visible, scale=scale)


def _sdpa_reasons(q: Tensor, k: Tensor, v: Tensor, block_map: BlockMap, **kwargs: Any) -> list[str]:
    return sdpa.attention_reasons(q, k, v, **kwargs)


def _flex(q: Tensor, k: Tensor, v: Tensor, block_map: BlockMap, *, causal: bool, scale: float, return_lse: bool) -> Any:
    block_mask = block_map.to_flex(q.shape[2], k.shape[2], causal=causal)
    return flex.call_flex(q, k, v, return_lse=return_lse, block_mask=block_mask, scale=scale)


def _flex_reasons(q: Tensor, k: Tensor, v: Tensor, block_map: BlockMap, **kwargs: Any) -> list[str]:
    reasons = flex.common_reasons(q, k, v)
    if q.device.type == "cuda" and (block_map.block_q % 64 or block_map.block_k % 64):
        reasons.append(f"blocks of {block_map.block_q} x {block_map.block_k} are no multiples of its 64 x 64 tiles")
    return reasons


@torch.library.custom_op("sparing::block_sparse_attention_fwd", mutates_args=())
def block_sparse_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num: Tensor,
    kv_idx: Tensor,
    q_num: Tensor,
    q_idx: Tensor,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out and lse by the Triton kernels; ``q_num`` and ``q_idx`` are there for the backward."""
    if triton_here(q.device):  # a program exported on CUDA and loaded where no kernel can run
        block_map = BlockMap.from_lists(kv_num, kv_idx, block_q=block_q, block_k=block_k)
        out, lse = _reference(q, k, v, block_map, causal=causal, scale=scale, return_lse=True)
        return out.contiguous(), lse.contiguous()
    from sparing.kernels.triton import block_sparse_attention as kernels

    return kernels.forward(q, k, v, kv_num, kv_idx, block_q=block_q, block_k=block_k, causal=causal, scale=scale)


@block_sparse_attention_fwd.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=wide)


@torch.library.custom_op("sparing::block_sparse_attention_bwd", mutates_args=())
def block_sparse_attention_bwd(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_num: Tensor,
    kv_idx: Tensor,
    q_num: Tensor,
    q_idx: Tensor,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v by the Triton kernels."""
    from sparing.kernels.triton import block_sparse_attention as kernels

    lists = (kv_num, kv_idx, q_num, q_idx)
    return kernels.backward(
        grad, q, k, v, out, lse, *lists, block_q=block_q, block_k=block_k, causal=causal, scale=scale
    )


@block_sparse_attention_bwd.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, block_q, block_k, causal, scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, out, lse)
    ctx.options = (block_q, block_k, causal, scale)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 8
    if grad is None:
        return (None, None, None, *nothing)
    q, k, v, kv_num, kv_idx, q_num, q_idx, out, lse = ctx.saved_tensors
    grads = block_sparse_attention_bwd(grad, q, k, v, out, lse, kv_num, kv_idx, q_num, q_idx, *ctx.options)
    return (*grads, *nothing)


block_sparse_attention_fwd.register_autograd(_backward, setup_context=_setup_context)


def _triton(
    q: Tensor, k: Tensor, v: Tensor, block_map: BlockMap, *, causal: bool, scale: float, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    lists = (block_map.kv_num, block_map.kv_idx, block_map.q_num, block_map.q_idx)
    out, lse = block_sparse_attention_fwd(q, k, v, *lists, block_map.block_q, block_map.block_k, causal, scale)
    return (out, lse) if return_lse else out


def _triton_reasons(q: Tensor, k: Tensor, v: Tensor, block_map: BlockMap, **kwargs: Any) -> list[str]:
    # float32 tiles of wider heads spill registers on sm90
    widest = 256 if q.element_size() == 2 else 128
    reasons = triton_attention_reasons(q, head_dim=max(q.shape[-1], v.shape[-1]), max_dim=widest)
    for name, block in (("block_q", block_map.block_q), ("block_k", block_map.block_k)):
        if block % 16:
            reasons.append(f"{name} {block} is no multiple of 16")
    return reasons


def _order(q: Tensor, *args: Any, **kwargs: Any) -> tuple[str, ...]:
    return ("triton", "flex", "sdpa", "reference") if q.device.type == "cuda" else ("sdpa", "reference")


def _scores(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> int:
    return q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]


define_op(block_sparse_attention, order=_order, autocast=3, scores=_scores)
register_impl("block_sparse_attention", "reference", _reference)
register_impl("block_sparse_attention", "sdpa", _sdpa, supports=_sdpa_reasons)
register_impl("block_sparse_attention", "flex", _flex, supports=_flex_reasons, here=flex.here, deterministic=False)
register_impl("block_sparse_attention", "triton", _triton, supports=_triton_reasons, here=triton_here)
