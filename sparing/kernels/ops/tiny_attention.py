"""Attention of very many very small problems: at most 64 queries over at most 64 keys each."""

from typing import Any

import torch
from torch import Tensor

from sparing.kernels.backends import sdpa
from sparing.kernels.dispatch import define_op, register_impl, run, triton_attention_reasons, triton_here
from sparing.kernels.masks import check_qkv
from sparing.kernels.ops.attention import check_masks, explicit_attention

MAX_TOKENS = 64


def tiny_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(scale * q k^T + bias) v`` for batches of small problems (FIT groups, attention over 8-16 frames).

    Args:
        q: (batch, heads, M, head_dim), M <= 64.
        k: (batch, heads, N, head_dim), N <= 64.
        v: (batch, heads, N, value_dim).
        bias: added to the scores, (1 | batch, 1 | heads, 1 | M, N); may require a gradient.
        scale: factor of the scores; ``head_dim ** -0.5`` when None.
        return_lse: also return the natural-log normaliser (batch, heads, M), not differentiable.
        backend: ``'auto'``, ``'triton'``, ``'sdpa'`` or ``'reference'``.

    Returns:
        (batch, heads, M, value_dim) in the dtype of ``q``; with ``return_lse`` also lse.

    Raises:
        ValueError: shapes that do not fit, or more than 64 queries or keys.
        BackendUnsupported: the named backend cannot serve this call.
    """
    check_qkv(q, k, v)
    check_masks(q, k, bias=bias, key_padding_mask=None, kv_len=None)
    if max(q.shape[2], k.shape[2]) > MAX_TOKENS:
        given = f"{q.shape[2]} and {k.shape[2]}"
        raise ValueError(f"tiny_attention serves at most {MAX_TOKENS} queries and keys, got {given}; use attention")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return run("tiny_attention", backend, q, k, v, bias, scale=scale, return_lse=return_lse)


def _reference(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, scale: float, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    out, lse = explicit_attention(q, k, v, bias=bias, visible=None, scale=scale)
    return (out, lse.detach()) if return_lse else out


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, scale: float, return_lse: bool) -> Tensor:
    return sdpa.masked_attention(q, k, v, bias=bias, visible=None, scale=scale)


def _sdpa_reasons(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, **kwargs: Any) -> list[str]:
    return sdpa.attention_reasons(q, k, v, bias=bias, **kwargs)


@torch.library.custom_op("sparing::tiny_attention_fwd", mutates_args=())
def tiny_attention_fwd(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """out and lse by the Triton kernel."""
    if triton_here(q.device):  # a program exported on CUDA and loaded where no kernel can run
        out, lse = _reference(q, k, v, bias, scale=scale, return_lse=True)
        return out.contiguous(), lse.contiguous()
    from sparing.kernels.triton import window_attention as kernels

    problems = kernels.Problems.of_batch(q, k, v)
    return kernels.forward(problems, q, k, v, bias, None, table=False, scale=scale)


@tiny_attention_fwd.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=wide)


@torch.library.custom_op("sparing::tiny_attention_bwd", mutates_args=())
def tiny_attention_bwd(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, bias_grad: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and, with ``bias_grad``, of the bias (else an empty tensor)."""
    from sparing.kernels.triton import window_attention as kernels

    problems = kernels.Problems.of_batch(q, k, v)
    dq, dk, dv, slopes = kernels.backward(
        problems, grad, q, k, v, bias, None, out, lse, table=False, scale=scale, bias_grad=bias_grad
    )
    if slopes is None or bias is None:
        return dq, dk, dv, q.new_empty(0)
    return dq, dk, dv, slopes.sum_to_size(bias.shape).to(bias.dtype).contiguous()


@tiny_attention_bwd.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Any, lse: Any, bias_grad: bool, scale: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = q.new_empty(0) if bias is None or not bias_grad else bias.new_empty(bias.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bias, scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, bias, out, lse)
    ctx.scale = scale


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    bias_grad = ctx.needs_input_grad[3]
    dq, dk, dv, dbias = tiny_attention_bwd(grad, *ctx.saved_tensors, bias_grad, ctx.scale)
    return dq, dk, dv, dbias if bias_grad else None, None


tiny_attention_fwd.register_autograd(_backward, setup_context=_setup_context)


def _triton(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, scale: float, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    out, lse = tiny_attention_fwd(q, k, v, bias, scale)
    return (out, lse) if return_lse else out


def _triton_reasons(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, **kwargs: Any) -> list[str]:
    return triton_attention_reasons(
        q, head_dim=max(q.shape[-1], v.shape[-1]), max_dim=64 if q.element_size() == 4 else 128
    )


def _order(q: Tensor, *args: Any, **kwargs: Any) -> tuple[str, ...]:
    return ("triton", "sdpa", "reference") if q.device.type == "cuda" else ("sdpa", "reference")


define_op(tiny_attention, order=_order, autocast=3)
register_impl("tiny_attention", "reference", _reference)
register_impl("tiny_attention", "sdpa", _sdpa, supports=_sdpa_reasons)
register_impl("tiny_attention", "triton", _triton, supports=_triton_reasons, here=triton_here)
