"""Dense attention with bias, padding and causal masks.

``out = softmax(scale * q k^T + bias, hidden keys at -inf) v``; a row that sees no key gives ``out = 0``, ``lse =
-inf`` and no gradient. There is no Triton kernel here: on Hopper nothing written in Triton beats the library kernels
on dense attention.
"""

import torch
from torch import Tensor

from sparing.kernels.backends import flex, sdpa, xformers
from sparing.kernels.dispatch import define_op, register_impl, run
from sparing.kernels.masks import check_qkv, visible_mask


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    kv_len: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention.

    Args:
        q: (batch, heads, M, head_dim) queries.
        k: (batch, heads, N, head_dim) keys.
        v: (batch, heads, N, value_dim) values.
        bias: added to the scores, (1 | batch, 1 | heads, 1 | M, N); may require a gradient.
        key_padding_mask: (batch, N) bool, True = padded (torch's ``nn.MultiheadAttention`` convention).
        kv_len: (batch,) integers, keys from this position on are hidden.
        causal: query i sees keys ``j <= i + N - M`` (aligned bottom-right).
        scale: factor of the scores; ``head_dim ** -0.5`` when None.
        return_lse: also return the natural-log normaliser of each row, not differentiable.
        dropout_p: probability of dropping an attention weight.
        backend: ``'auto'``, ``'sdpa'``, ``'flex'``, ``'xformers'`` or ``'reference'``.

    Returns:
        (batch, heads, M, value_dim) in the dtype of ``q``; with ``return_lse`` also lse (batch, heads, M), float32
        (float64 for float64 inputs).

    Raises:
        ValueError: shapes that do not fit.
        TypeError: dtypes that do not fit.
        BackendUnsupported: the named backend cannot serve this call.
    """
    check_qkv(q, k, v)
    check_masks(q, k, bias=bias, key_padding_mask=key_padding_mask, kv_len=kv_len)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    return run(
        "attention", backend, q, k, v, bias=bias, key_padding_mask=key_padding_mask, kv_len=kv_len, causal=causal,
        scale=q.shape[-1] ** -0.5 if scale is None else scale, return_lse=return_lse, dropout_p=dropout_p,
    )  # fmt: skip


def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    kv_len: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The attention map itself: (batch, heads, M, N), rows sum to 1 (a row that sees nothing is 0). Arguments as in
    :func:`attention`; for looking at maps and for methods that read them, never for the product with v."""
    check_qkv(q, k, k)
    check_masks(q, k, bias=bias, key_padding_mask=key_padding_mask, kv_len=kv_len)
    visible = visible_mask(q, k, key_padding_mask=key_padding_mask, kv_len=kv_len, causal=causal)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    weights, total, _ = _exponentials(q, k, bias=bias, visible=visible, scale=scale)
    return (weights / total.masked_fill(total == 0, 1.0)).to(q.dtype)


def check_masks(
    q: Tensor, k: Tensor, *, bias: Tensor | None, key_padding_mask: Tensor | None, kv_len: Tensor | None
) -> None:
    """Raise when a bias or mask does not fit q (B, H, M, D) and k (B, H, N, D).

    Raises:
        ValueError: a wrong shape.
        TypeError: a bias or mask of the wrong kind.
    """
    batch, heads, num_queries, num_keys = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    if bias is not None:
        fits = bias.ndim == 4 and bias.shape[3] == num_keys
        fits = fits and all(b == 1 or b == s for b, s in zip(bias.shape[:3], (batch, heads, num_queries)))
        if not fits:
            raise ValueError(
                f"bias must be (1 or {batch}, 1 or {heads}, 1 or {num_queries}, {num_keys}), got {tuple(bias.shape)}"
            )
        if not bias.is_floating_point():
            raise TypeError(
                f"bias is added to the scores and must be floating point, got {bias.dtype}; hide keys by masks"
            )
    if key_padding_mask is not None:
        if tuple(key_padding_mask.shape) != (batch, num_keys):
            raise ValueError(f"key_padding_mask must be ({batch}, {num_keys}), got {tuple(key_padding_mask.shape)}")
        if key_padding_mask.dtype != torch.bool:
            raise TypeError(f"key_padding_mask must be bool with True = padded, got {key_padding_mask.dtype}")
    if kv_len is not None:
        if tuple(kv_len.shape) != (batch,):
            raise ValueError(f"kv_len must be ({batch},), got {tuple(kv_len.shape)}")
        if kv_len.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"kv_len must be int32 or int64, got {kv_len.dtype}")


def explicit_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None,
    visible: Tensor | None,
    scale: float,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The formula in plain arithmetic, in float32 (float64 for float64 inputs): every attention op's reference.

    ``visible`` is bool and broadcastable to (..., M, N), True = may attend. Returns out in the dtype of ``q`` and a
    differentiable lse (public ops detach theirs).
    """
    weights, total, peak = _exponentials(q, k, bias=bias, visible=visible, scale=scale)
    nothing = total == 0
    total = total.masked_fill(nothing, 1.0)
    if dropout_p > 0.0:
        weights = torch.nn.functional.dropout(weights, p=dropout_p)
    out = torch.matmul(weights, v.to(weights.dtype)) / total
    lse = (peak + total.log()).masked_fill(nothing, float("-inf")).squeeze(-1)
    return out.to(q.dtype), lse


def _exponentials(
    q: Tensor, k: Tensor, *, bias: Tensor | None, visible: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """exp(score - peak) (..., M, N), its row sums (0 where nothing is visible), row peaks with -inf as 0."""
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = torch.matmul(q.to(accumulate), k.to(accumulate).transpose(-2, -1)) * scale
    if bias is not None:
        scores = scores + bias.to(accumulate)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    if scores.shape[-1] == 0:
        peak = scores.new_zeros((*scores.shape[:-1], 1))
    else:
        peak = scores.detach().amax(-1, keepdim=True)
        peak = peak.masked_fill(peak == float("-inf"), 0.0)
    weights = torch.exp(scores - peak)
    return weights, weights.sum(-1, keepdim=True), peak


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    kv_len: Tensor | None,
    causal: bool,
    scale: float,
    return_lse: bool,
    dropout_p: float,
) -> Tensor | tuple[Tensor, Tensor]:
    visible = visible_mask(q, k, key_padding_mask=key_padding_mask, kv_len=kv_len, causal=causal)
    out, lse = explicit_attention(q, k, v, bias=bias, visible=visible, scale=scale, dropout_p=dropout_p)
    return (out, lse.detach()) if return_lse else out


def _order(q: Tensor, *args: object, **kwargs: object) -> tuple[str, ...]:
    return ("sdpa", "flex", "xformers", "reference") if q.device.type == "cuda" else ("sdpa", "reference")


def _scores(q: Tensor, k: Tensor, *args: object, **kwargs: object) -> int:
    return q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]


define_op(attention, order=_order, autocast=3, scores=_scores)
register_impl("attention", "reference", _reference)
register_impl("attention", "sdpa", sdpa.attention, supports=sdpa.attention_reasons)
register_impl("attention", "flex", flex.attention, supports=flex.attention_reasons, here=flex.here, deterministic=False)
register_impl(
    "attention",
    "xformers",
    xformers.attention,
    supports=xformers.attention_reasons,
    here=xformers.here,
    deterministic=False,
)
