"""xformers as a backend, behind one adapter: imported on first use only (its import takes seconds and logs warnings).

On torch 2.11 + CUDA 13 its own compiled part does not load, and it reaches the same kernels as SDPA; what it adds is
the normaliser of the memory-efficient kernel and float32 packed attention.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from sparing._compat import quieten_xformers
from sparing.kernels.dispatch import INSTALLED, cuda_here, needs_grad


def here(device: torch.device) -> list[str]:
    """Why xformers cannot run on ``device``."""
    return ["xformers is not installed"] if not INSTALLED["xformers"] else cuda_here(device)


@cache
def _fmha() -> Any:
    quieten_xformers()
    from xformers.ops import fmha

    return fmha


def attention_reasons(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    kv_len: Tensor | None = None,
    causal: bool = False,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    **kwargs: Any,
) -> list[str]:
    """Why xformers cannot serve a dense attention call."""
    reasons = []
    if torch.compiler.is_compiling():
        reasons.append("cannot be traced by torch.compile")
    if q.dtype == torch.float64:
        reasons.append("dtype float64 is not served; float32, bfloat16 and float16 are")
    if dropout_p > 0.0:
        reasons.append(f"dropout_p {dropout_p} is served by sdpa and reference only")
    if key_padding_mask is not None or kv_len is not None or causal:
        reasons.append("masks that can empty a row are not served: its kernels are not tested on such rows")
    if bias is not None and bias.shape[:3] != q.shape[:3] and needs_grad(bias):
        reasons.append(f"no gradient for a bias of shape {tuple(bias.shape)} broadcast over {tuple(q.shape[:3])}")
    if bias is not None and bias.shape[3] % 8:
        reasons.append(
            f"bias has {bias.shape[3]} keys, not a multiple of 8; pad the last dim to {-(-bias.shape[3] // 8) * 8}"
        )
    if return_lse and needs_grad(q, k, v, bias=bias):
        reasons.append("its lse comes without a backward")
    if 0 in (*q.shape, *k.shape, *v.shape):
        reasons.append("an input has size 0")
    return reasons


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, scale: float, return_lse: bool, **kwargs: Any
) -> Any:
    """Dense attention by ``memory_efficient_attention`` (layout (B, M, H, D))."""
    fmha = _fmha()
    q_, k_, v_ = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    full = None if bias is None else bias.to(q.dtype).expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if return_lse:
        out, lse = fmha.memory_efficient_attention_forward_requires_grad(q_, k_, v_, attn_bias=full, scale=scale)
        return out.transpose(1, 2), lse[..., : q.shape[2]]
    return fmha.memory_efficient_attention(q_, k_, v_, attn_bias=full, scale=scale).transpose(1, 2)


def varlen_reasons(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **kwargs: Any
) -> list[str]:
    """Why xformers cannot serve a packed call."""
    reasons = []
    if torch.compiler.is_compiling():
        reasons.append("cannot be traced by torch.compile: it reads the lengths on the host")
    if q.dtype == torch.float64:
        reasons.append("dtype float64 is not served; float32, bfloat16 and float16 are")
    if kwargs.get("causal"):
        reasons.append("masks that can empty a row are not served: its kernels are not tested on such rows")
    if kwargs.get("return_lse"):
        reasons.append("gives no packed lse")
    if 0 in (q.shape[0], k.shape[0], max_q, max_k, cu_q.shape[0] - 1):
        reasons.append("there are no queries, keys or segments")
    return reasons


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    causal: bool,
    scale: float,
    return_lse: bool,
) -> Tensor:
    """Packed attention by a block-diagonal mask. The mask wants the lengths on the host: one synchronisation a call."""
    fmha = _fmha()
    mask = fmha.attn_bias.BlockDiagonalMask.from_seqlens(cu_q.diff().tolist(), cu_k.diff().tolist())
    out = fmha.memory_efficient_attention(*(t.unsqueeze(0) for t in (q, k, v)), attn_bias=mask, scale=scale)[0]
    total = torch.arange(q.shape[0], device=q.device, dtype=torch.int32)
    segment = torch.searchsorted(cu_q[1:].contiguous(), total, right=True)
    return out.masked_fill((cu_k.diff()[segment] == 0).view(-1, 1, 1), 0.0)


def split_k(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None) -> Tensor:
    """Dense attention by the Triton split-K operator, forward only; (B, H, M, D) and (B, H, N, D) -> (B, H, M, D)."""
    fmha = _fmha()
    streams = [x.transpose(1, 2) for x in (q, k, v)]
    return fmha.memory_efficient_attention_forward(*streams, scale=scale, op=fmha.triton_splitk.FwOp).transpose(1, 2)
