"""Boolean masks of attention, True = may attend, and the checks that all attention ops share."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise when q (B, H, M, D), k (B, H, N, D), v (B, H, N, Dv) do not fit each other.

    Raises:
        ValueError: wrong rank or sizes that disagree.
        TypeError: dtypes that differ (outside autocast) or are not floating point.
    """
    if not (q.ndim == k.ndim == v.ndim == 4):
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        raise ValueError(f"q, k, v must be (batch, heads, tokens, head_dim); got shapes {shapes}")
    if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "q (B, H, M, D), k (B, H, N, D), v (B, H, N, Dv) disagree: "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.shape[3] == 0:
        raise ValueError(f"head_dim is 0: q has shape {tuple(q.shape)}")
    check_dtypes(q, k, v)


def check_dtypes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise TypeError unless the three share one supported floating dtype (autocast may still make them one)."""
    if q.dtype == k.dtype == v.dtype and q.dtype in FLOATS:
        return
    device_type = q.device.type
    castable = all(t.dtype in FLOATS and t.dtype != torch.float64 for t in (q, k, v))
    if castable and device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type):
        return
    raise TypeError(
        f"q, k, v must share one dtype of float32, bfloat16, float16, float64; got {q.dtype}, {k.dtype}, {v.dtype}"
    )


def causal_mask(num_queries: int, num_keys: int, *, device: torch.device) -> Tensor:
    """(M, N) bool, aligned bottom-right: query i sees keys ``j <= i + N - M``."""
    rows = torch.arange(num_queries, device=device).unsqueeze(1)
    return torch.arange(num_keys, device=device) <= rows + (num_keys - num_queries)


def key_mask(num_keys: int, *, key_padding_mask: Tensor | None, kv_len: Tensor | None) -> Tensor | None:
    """(B, 1, 1, N) bool from a padding mask (True = padded) and lengths (B,); None when neither is given."""
    visible = None
    if key_padding_mask is not None:
        visible = ~key_padding_mask.unsqueeze(1).unsqueeze(1)
    if kv_len is not None:
        within = (torch.arange(num_keys, device=kv_len.device) < kv_len.unsqueeze(1)).unsqueeze(1).unsqueeze(1)
        visible = within if visible is None else visible & within
    return visible


def visible_mask(
    q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None, kv_len: Tensor | None, causal: bool
) -> Tensor | None:
    """All masks together, broadcastable to (B, H, M, N); None when every query sees every key."""
    visible = key_mask(k.shape[2], key_padding_mask=key_padding_mask, kv_len=kv_len)
    if causal:
        lower = causal_mask(q.shape[2], k.shape[2], device=q.device)
        visible = lower if visible is None else visible & lower
    return visible
