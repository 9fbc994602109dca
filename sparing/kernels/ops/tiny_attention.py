"""Attention of very many very small problems: at most 64 queries over at most 64 keys each."""

from typing import Any

from torch import Tensor

from sparing.kernels.backends import sdpa
from sparing.kernels.dispatch import define_op, register_impl, run
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


def _order(q: Tensor, *args: Any, **kwargs: Any) -> tuple[str, ...]:
    return ("triton", "sdpa", "reference") if q.device.type == "cuda" else ("sdpa", "reference")


define_op(tiny_attention, order=_order, autocast=3)
register_impl("tiny_attention", "reference", _reference)
register_impl("tiny_attention", "sdpa", _sdpa, supports=_sdpa_reasons)
