"""FlexAttention as a backend: one cached compile on CUDA, the uncompiled emulation (small inputs, no backward) on
CPU.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from sparing.kernels.dispatch import needs_grad


def here(device: torch.device) -> list[str]:
    """Why FlexAttention cannot run on ``device``."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return ["needs sm80"]
    return [] if device.type in ("cuda", "cpu") else [f"has no {device.type} kernel"]


@cache
def _flex() -> Any:
    """The compiled function: compiled once, never per call (a compile per call would retrace every block mask)."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=None)


def call_flex(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, **options: Any) -> Any:
    """flex_attention with its auxiliary outputs normalised: out, or (out, natural-log lse)."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    if q.device.type == "cpu":  # it refuses tensors that require a gradient even under no_grad
        q, k, v = q.detach(), k.detach(), v.detach()
    flex = _flex() if q.device.type == "cuda" and not torch.compiler.is_compiling() else flex_attention
    if not return_lse:
        return flex(q, k, v, **options)
    out, aux = flex(q, k, v, return_aux=AuxRequest(lse=True), **options)
    return out, aux.lse.detach()


def common_reasons(q: Tensor, k: Tensor, v: Tensor, **tensors: Any) -> list[str]:
    """Reasons that hold for every op served by FlexAttention."""
    reasons = []
    if q.device.type == "cpu" and needs_grad(q, k, v, **tensors):
        reasons.append("FlexAttention has no backward on CPU")
    if q.dtype == torch.float64:
        reasons.append("dtype float64 is not served; float32, bfloat16 and float16 are")
    if 0 in (*q.shape, *k.shape, *v.shape):
        reasons.append("an input has size 0")
    return reasons


def attention_reasons(q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float = 0.0, **tensors: Any) -> list[str]:
    """Why FlexAttention cannot serve a dense attention call."""
    reasons = common_reasons(q, k, v, **tensors)
    if dropout_p > 0.0:
        reasons.append(f"dropout_p {dropout_p} is served by sdpa and reference only")
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
    return_lse: bool,
    dropout_p: float = 0.0,
) -> Any:
    """Dense attention whose bias and masks are a ``score_mod``: nothing of size M x N is written on CUDA."""
    offset = k.shape[2] - q.shape[2]
    full_bias = None if bias is None else bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if full_bias is not None:
            score = score + full_bias[b, h, i, j]
        if key_padding_mask is not None:
            score = torch.where(key_padding_mask[b, j], float("-inf"), score)
        if kv_len is not None:
            score = torch.where(j < kv_len[b], score, float("-inf"))
        if causal:
            score = torch.where(j <= i + offset, score, float("-inf"))
        return score

    return call_flex(q, k, v, return_lse=return_lse, score_mod=score_mod, scale=scale)
