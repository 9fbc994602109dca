"""Attention of a few queries over many keys, split along the keys (split-K), and the merge of partial attentions.

Split s covers keys ``[s c, (s+1) c)`` with ``c = ceil(N / splits)``; it gives a normalised output and its
log-normaliser. With ``w = softmax_s(lse)`` the whole is ``out = sum_s w_s out_s``, ``lse = logsumexp_s``; an empty
split weighs nothing.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparing.kernels.backends import sdpa
from sparing.kernels.dispatch import define_op, register_impl, run, triton_attention_reasons, triton_here
from sparing.kernels.masks import check_qkv, key_mask
from sparing.kernels.ops.attention import check_masks, explicit_attention

MAX_QUERIES = 64
MAX_SPLITS = 64  # parts of the keys that the Triton merge holds at once


def few_query_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    kv_len: Tensor | None = None,
    scale: float | None = None,
    splits: int | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of at most 64 queries over any number of keys.

    Args:
        q: (batch, heads, M, head_dim), M <= 64. k: (batch, heads, N, head_dim). v: (batch, heads, N, value_dim).
        bias: added to the scores, (1 | batch, 1 | heads, 1 | M, N); may require a gradient. kv_len: (batch,)
        integers, keys from this position on are hidden; 0 makes a sample empty (out 0, lse -inf). scale: factor of
        the scores; ``head_dim ** -0.5`` when None. splits: number of parts of the keys; chosen from the shapes when
        None. It never changes the result beyond rounding. return_lse: also return the natural-log normaliser of each
        row, not differentiable. backend: ``'auto'``, ``'triton'``, ``'sdpa'`` or ``'reference'``.

    Returns:
        (batch, heads, M, value_dim) in the dtype of ``q``; with ``return_lse`` also lse (batch, heads, M).

    Raises:
        ValueError: shapes that do not fit, more than 64 queries, or ``splits`` below 1.
        BackendUnsupported: the named backend cannot serve this call.
    """
    check_qkv(q, k, v)
    check_masks(q, k, bias=bias, key_padding_mask=None, kv_len=kv_len)
    if q.shape[2] > MAX_QUERIES:
        raise ValueError(f"few_query_attention serves at most {MAX_QUERIES} queries, got {q.shape[2]}; use attention")
    if splits is not None and splits < 1:
        raise ValueError(f"splits must be at least 1, got {splits}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return run(
        "few_query_attention", backend, q, k, v,
        bias=bias, kv_len=kv_len, scale=scale, splits=splits, return_lse=return_lse,
    )  # fmt: skip


def merge_attention(outs: Tensor | Sequence[Tensor], lses: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge attentions of the same queries over disjoint sets of keys into the attention over all of them.

    Args:
        outs: (batch, heads, S, M, value_dim), or a sequence of S tensors (batch, heads, M, value_dim).
        lses: (batch, heads, S, M), or a sequence of S tensors (batch, heads, M): natural-log normalisers, -inf = empty.

    Returns:
        out (batch, heads, M, value_dim) in the dtype of ``outs`` and lse (batch, heads, M); 0 and -inf where all are
        empty.

    Raises:
        ValueError: shapes that do not fit.
    """
    if len(outs) == 0 or len(lses) == 0:
        raise ValueError("there is nothing to merge: outs and lses are empty")
    outs = outs if isinstance(outs, Tensor) else torch.stack(list(outs), dim=2)
    lses = lses if isinstance(lses, Tensor) else torch.stack(list(lses), dim=2)
    if outs.shape[:-1] != lses.shape:
        raise ValueError(f"outs {tuple(outs.shape)} and lses {tuple(lses.shape)} disagree")
    peak = lses.detach().amax(-2, keepdim=True)
    peak = peak.masked_fill(peak == float("-inf"), 0.0)
    weights = torch.exp(lses - peak)
    total = weights.sum(-2, keepdim=True)
    nothing = total == 0
    weights = weights / total.masked_fill(nothing, 1.0)
    parts = outs.to(weights.dtype).masked_fill(
        (lses == float("-inf")).unsqueeze(-1), 0.0
    )  # whatever an empty part holds
    merged = (weights.unsqueeze(-1) * parts).sum(-3)
    lse = (peak + total.masked_fill(nothing, 1.0).log()).masked_fill(nothing, float("-inf")).squeeze(-2)
    return merged.to(outs.dtype), lse


def partial_attention(
    q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, kv_len: Tensor | None, scale: float, splits: int
) -> tuple[Tensor, Tensor]:
    """The attention of each split by explicit arithmetic: outs (B, H, S, M, Dv) and lses (B, H, S, M)."""
    num_keys = k.shape[2]
    chunk = max(-(-num_keys // splits), 1)
    missing = splits * chunk - num_keys
    in_range = torch.arange(splits * chunk, device=q.device) < num_keys
    visible = in_range.view(1, 1, splits, 1, chunk)
    hidden = key_mask(num_keys, key_padding_mask=None, kv_len=kv_len)
    if hidden is not None:
        visible = visible & pad(hidden, (0, missing)).view(-1, 1, splits, 1, chunk)
    k = pad(k, (0, 0, 0, missing)).unflatten(2, (splits, chunk))
    v = pad(v, (0, 0, 0, missing)).unflatten(2, (splits, chunk))
    if bias is not None:
        bias = pad(bias, (0, missing)).unflatten(3, (splits, chunk)).transpose(2, 3)
    return explicit_attention(q.unsqueeze(2), k, v, bias=bias, visible=visible, scale=scale)


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None,
    kv_len: Tensor | None,
    scale: float,
    splits: int | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    dtype, wide = q.dtype, torch.float64 if q.dtype == torch.float64 else torch.float32
    outs, lses = partial_attention(
        q.to(wide), k.to(wide), v.to(wide), bias=bias, kv_len=kv_len, scale=scale, splits=splits or 1
    )
    out, lse = merge_attention(outs, lses)
    return (out.to(dtype), lse.detach()) if return_lse else out.to(dtype)


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None,
    kv_len: Tensor | None,
    scale: float,
    splits: int | None,
    return_lse: bool,
) -> Tensor:
    return sdpa.attention(q, k, v, bias=bias, key_padding_mask=None, kv_len=kv_len, causal=False, scale=scale)


@torch.library.custom_op("sparing::few_query_attention_fwd", mutates_args=())
def few_query_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kv_len: Tensor | None, scale: float, splits: int | None
) -> tuple[Tensor, Tensor]:
    """out and lse by the Triton kernels."""
    if triton_here(q.device):  # a program exported on CUDA and loaded where no kernel can run
        options: dict[str, Any] = {"scale": scale, "splits": splits, "return_lse": True}
        out, lse = _reference(q, k, v, bias=bias, kv_len=kv_len, **options)
        return out.contiguous(), lse.contiguous()
    from sparing.kernels.triton import few_query_attention as kernels

    return kernels.forward(q, k, v, bias, kv_len, scale=scale, splits=splits)


@few_query_attention_fwd.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=wide)


@torch.library.custom_op("sparing::few_query_attention_bwd", mutates_args=())
def few_query_attention_bwd(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    kv_len: Tensor | None,
    out: Tensor,
    lse: Tensor,
    bias_grad: bool,
    scale: float,
    splits: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and, with ``bias_grad``, of the bias (else an empty tensor)."""
    from sparing.kernels.triton import few_query_attention as kernels

    dq, dk, dv, slopes = kernels.backward(
        grad, q, k, v, bias, kv_len, out, lse, scale=scale, splits=splits, bias_grad=bias_grad
    )
    if slopes is None or bias is None:
        return dq, dk, dv, q.new_empty(0)
    return dq, dk, dv, slopes.sum_to_size(bias.shape).to(bias.dtype).contiguous()


@few_query_attention_bwd.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kv_len: Any, out: Any, lse: Any,
    bias_grad: bool, *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dbias = q.new_empty(0) if bias is None or not bias_grad else bias.new_empty(bias.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bias, kv_len, *options = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, bias, kv_len, out, lse)
    ctx.options = options


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    bias_grad = ctx.needs_input_grad[3]
    dq, dk, dv, dbias = few_query_attention_bwd(grad, *ctx.saved_tensors, bias_grad, *ctx.options)
    return dq, dk, dv, dbias if bias_grad else None, None, None, None


few_query_attention_fwd.register_autograd(_backward, setup_context=_setup_context)


def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None,
    kv_len: Tensor | None,
    scale: float,
    splits: int | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    out, lse = few_query_attention_fwd(q, k, v, bias, kv_len, scale, splits)
    return (out, lse) if return_lse else out


def _triton_reasons(q: Tensor, k: Tensor, v: Tensor, *, splits: int | None = None, **kwargs: Any) -> list[str]:
    widest = max(q.shape[-1], v.shape[-1])
    reasons = triton_attention_reasons(q, head_dim=widest, max_dim=256)
    if q.element_size() == 4 and q.shape[2] * widest > 32 * 64:
        reasons.append(f"{q.shape[2]} float32 queries of head_dim {widest} do not fit the registers of a program")
    if splits is not None and splits > MAX_SPLITS:
        reasons.append(f"splits {splits} is above {MAX_SPLITS}")
    return reasons


def _order(
    q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, kv_len: Tensor | None, **kwargs: Any
) -> tuple[str, ...]:
    if q.device.type != "cuda":
        return ("sdpa", "reference")
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    idle = q.shape[0] * q.shape[1] < 2 * processors and k.shape[2] >= 2048
    masked = bias is not None or kv_len is not None  # SDPA's flash kernel refuses a mask
    return ("triton", "sdpa", "reference") if idle or masked else ("sdpa", "triton", "reference")


def _scores(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> int:
    return q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]


define_op(few_query_attention, order=_order, autocast=3, scores=_scores)
register_impl("few_query_attention", "reference", _reference)
register_impl("few_query_attention", "sdpa", _sdpa, supports=sdpa.attention_reasons)
register_impl("few_query_attention", "triton", _triton, supports=_triton_reasons, here=triton_here)
