"""torch's ``scaled_dot_product_attention`` as a backend: it picks among flash, memory-efficient, cuDNN and math
kernels itself.

It returns no normaliser, wants one mask in the dtype of q, and aligns ``is_causal`` top-left. Rows that see nothing
give 0 with finite gradients on CPU (measured); the CUDA kernels are not trusted with such rows: there the mask of an
empty row is opened and the row's output set to 0, which also makes its gradients exactly 0.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sparing.kernels.dispatch import needs_grad
from sparing.kernels.masks import visible_mask


def attention_reasons(
    q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, return_lse: bool = False, **kwargs: object
) -> list[str]:
    """Why SDPA cannot serve a dense attention call."""
    reasons = []
    if q.shape[1] == 0:
        reasons.append("there are no heads, on which it stops the process")
    if return_lse:
        reasons.append("scaled_dot_product_attention returns no lse")
    if q.device.type == "cuda" and torch.are_deterministic_algorithms_enabled() and needs_grad(q, k, v, bias=bias):
        reasons.append("its backward is not deterministic, and torch.use_deterministic_algorithms(True) is set")
    return reasons


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    kv_len: Tensor | None,
    causal: bool,
    scale: float,
    return_lse: bool = False,
    dropout_p: float = 0.0,
) -> Tensor:
    """Dense attention by SDPA; arguments as in :func:`sparing.kernels.attention`."""
    plain = bias is None and key_padding_mask is None and kv_len is None
    if plain and not (causal and q.shape[2] != k.shape[2]):
        return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, dropout_p=dropout_p)
    visible = visible_mask(q, k, key_padding_mask=key_padding_mask, kv_len=kv_len, causal=causal)
    return masked_attention(q, k, v, bias=bias, visible=visible, scale=scale, dropout_p=dropout_p)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None,
    visible: Tensor | None,
    scale: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """SDPA with an additive bias and a bool mask (True = may attend), both broadcastable to (B, H, M, N)."""
    sees = None
    if q.device.type == "cuda" and (visible is not None or bias is not None):
        sees, visible = _open_empty_rows(bias, visible)
    mask = visible
    if bias is not None:
        mask = _narrowed(bias, q.dtype)
        if visible is not None:
            mask = mask.masked_fill(~visible, float("-inf"))
        if sees is not None:  # a row of the bias may be -inf throughout
            mask = mask.masked_fill(~sees, 0.0)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, dropout_p=dropout_p)
    return out if sees is None else torch.where(sees, out, out.new_zeros(()))


def _narrowed(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """``bias`` in ``dtype``; finite values stay finite (-1e9 would become -inf in float16), -inf stays -inf."""
    if bias.dtype == dtype:
        return bias
    limit = torch.finfo(dtype).max
    return torch.where(bias.isinf(), bias, bias.clamp(-limit, limit)).to(dtype)


def _open_empty_rows(bias: Tensor | None, visible: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(…, M | 1, 1) bool of the rows that see a key, and ``visible`` with the other rows opened."""
    open_ = visible
    if bias is not None:
        finite = bias != float("-inf")
        open_ = finite if visible is None else finite & visible
    assert open_ is not None
    sees = open_.any(-1, keepdim=True)
    return sees, None if visible is None else visible | ~sees
