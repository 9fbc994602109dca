"""``torch.nn.attention.varlen``: FlashAttention over packed sequences (CUDA, 16-bit)."""

from typing import Any

import torch
from torch import Tensor

from sparing.kernels.dispatch import needs_grad


def varlen_reasons(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **kwargs: Any
) -> list[str]:
    """Why torch's varlen attention cannot serve a packed call."""
    reasons = []
    if q.dtype not in (torch.bfloat16, torch.float16):
        reasons.append(f"dtype {str(q.dtype).removeprefix('torch.')} is not served; bfloat16 and float16 are")
    if q.shape[2] != v.shape[2]:
        reasons.append(f"value_dim {v.shape[2]} differs from head_dim {q.shape[2]}")
    if q.shape[2] % 8 or q.shape[2] > 256:
        reasons.append(f"head_dim {q.shape[2]} is no multiple of 8 up to 256")
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
) -> Any:
    """Packed attention by FlashAttention. Queries without keys: the output is set to 0 here, whatever the kernel
    left.
    """
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    window = (-1, 0) if causal else (-1, -1)
    # Rows that no segment uses (a fixed capacity): the kernel writes neither their output nor their gradients.
    spare = [torch.arange(t.shape[0], device=t.device) >= cu[-1] for t, cu in ((q, cu_q), (k, cu_k))]
    if needs_grad(q, k, v):
        q, k, v = (t.masked_fill(rows.view(-1, 1, 1), 0.0) for t, rows in ((q, spare[0]), (k, spare[1]), (v, spare[1])))
    out, lse = varlen_attn(
        q, k, v, cu_q, cu_k, max_q, max_k, return_aux=AuxRequest(lse=True), scale=scale, window_size=window
    )
    lse = lse.detach()
    # kernels write +inf or -inf as the normaliser of a row that sees nothing; both mean empty
    empty = torch.isinf(lse) | spare[0]
    out = out.masked_fill(empty.transpose(0, 1).unsqueeze(-1), 0.0)
    return (out, lse.masked_fill(empty, float("-inf"))) if return_lse else out
