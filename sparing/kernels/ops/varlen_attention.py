"""Attention of packed sequences of unequal lengths: segment i of the queries sees segment i of the keys and nothing
else.
"""

from typing import Any

import torch
from torch import Tensor

from sparing.kernels.backends import sdpa, varlen, xformers
from sparing.kernels.dispatch import cuda_here, define_op, register_impl, run
from sparing.kernels.masks import check_dtypes
from sparing.kernels.ops.attention import explicit_attention


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Packed attention.

    Args:
        q: (total queries, heads, head_dim). k: (total keys, heads, head_dim). v: (total keys, heads, value_dim).
        cu_q: (segments + 1,) int32 cumulative lengths: segment i is rows ``cu_q[i]:cu_q[i+1]``. Empty segments are
        allowed. cu_k: (segments + 1,) int32, the same for keys. max_q: upper bound of the query lengths, a host
        number: an exact one costs a synchronisation, a bound is enough. max_k: upper bound of the key lengths.
        causal: within a segment of m queries and n keys, query i sees keys ``j <= i + n - m``. scale: factor of the
        scores; ``head_dim ** -0.5`` when None. return_lse: also return the natural-log normaliser (heads, total
        queries), not differentiable. backend: ``'auto'``, ``'varlen'``, ``'xformers'``, ``'sdpa'`` or
        ``'reference'``.

    Returns:
        (total queries, heads, value_dim) in the dtype of ``q``; with ``return_lse`` also lse. Queries whose segment
        has no keys give 0 and -inf.

    Raises:
        ValueError: shapes that do not fit.
        BackendUnsupported: the named backend cannot serve this call.
    """
    _check(q, k, v, cu_q, cu_k, max_q, max_k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return run(
        "varlen_attention",
        backend,
        q,
        k,
        v,
        cu_q,
        cu_k,
        max_q,
        max_k,
        causal=causal,
        scale=scale,
        return_lse=return_lse,
    )


def _check(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> None:
    fits = q.ndim == k.ndim == v.ndim == 3 and q.shape[1:] == k.shape[1:] and k.shape[:2] == v.shape[:2]
    if not fits:
        raise ValueError(
            "q (Tq, H, D), k (Tk, H, D), v (Tk, H, Dv) disagree: "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    check_dtypes(q, k, v)
    if cu_q.ndim != 1 or cu_q.shape != cu_k.shape or cu_q.dtype != torch.int32 or cu_k.dtype != torch.int32:
        raise ValueError(
            "cu_q and cu_k must be int32 of one shape (segments + 1,); "
            f"got {cu_q.dtype} {tuple(cu_q.shape)} and {cu_k.dtype} {tuple(cu_k.shape)}"
        )
    if max_q < 0 or max_k < 0:
        raise ValueError(f"max_q and max_k are lengths, got {max_q} and {max_k}")
    if q.device.type == "cpu" and type(cu_q) is Tensor and not torch.compiler.is_compiling() and cu_q.shape[0] > 1:
        longest = [int(cu.diff().max()) for cu in (cu_q, cu_k)]  # on CUDA this would synchronise: there it is trusted
        if longest[0] > max_q or longest[1] > max_k:
            raise ValueError(
                f"max_q {max_q} and max_k {max_k} are below the longest segments, {longest[0]} and {longest[1]}"
            )


def _padded(
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
    explicit: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Pad every segment to the longest, attend densely, pack again: no loop over segments, no host synchronisation."""
    lengths_q, lengths_k = cu_q.diff(), cu_k.diff()
    place_q = torch.arange(max_q, device=q.device)
    place_k = torch.arange(max_k, device=q.device)
    rows_q = (cu_q[:-1, None] + place_q).clamp(max=max(q.shape[0] - 1, 0))
    rows_k = (cu_k[:-1, None] + place_k).clamp(max=max(k.shape[0] - 1, 0))
    if q.shape[0] == 0 or k.shape[0] == 0:  # nothing to gather from: every segment is empty on that side
        rows_q, rows_k = rows_q[:, :0] if q.shape[0] == 0 else rows_q, rows_k[:, :0] if k.shape[0] == 0 else rows_k
        place_q, place_k = place_q[: rows_q.shape[1]], place_k[: rows_k.shape[1]]
    visible = (place_k < lengths_k.unsqueeze(1)).unsqueeze(1).unsqueeze(1)
    if causal:
        offset = (lengths_k - lengths_q).view(-1, 1, 1, 1)
        visible = visible & (place_k <= place_q.unsqueeze(1) + offset)
    # Rows behind a segment's end belong to its neighbour: zeroed, since a hidden NaN would still reach the sums.
    beyond = (place_k >= lengths_k.unsqueeze(1)).view(*rows_k.shape, 1, 1)
    padded = [t.transpose(1, 2) for t in (q[rows_q], *(t[rows_k].masked_fill(beyond, 0.0) for t in (k, v)))]
    if explicit:
        out, lse = explicit_attention(*padded, bias=None, visible=visible, scale=scale)
    else:
        out, lse = sdpa.masked_attention(*padded, bias=None, visible=visible, scale=scale), None
    # packed row t lies in the last segment that starts at or before it
    total = torch.arange(q.shape[0], device=q.device, dtype=torch.int32)
    segment = torch.searchsorted(cu_q[1:].contiguous(), total, right=True).clamp(max=max(cu_q.shape[0] - 2, 0))
    inside = (total - cu_q[segment]).clamp(max=max(max_q - 1, 0))
    spare = (total >= cu_q[-1]).view(-1, 1, 1)  # rows of a fixed capacity that no segment uses
    packed = out.transpose(1, 2)[segment, inside].masked_fill(spare, 0.0)
    if not return_lse:
        return packed
    assert lse is not None
    normaliser = lse.transpose(1, 2)[segment, inside].masked_fill(spare[..., 0], float("-inf"))
    return packed, normaliser.transpose(0, 1).detach()


def _reference(*args: Any, **kwargs: Any) -> Any:
    return _padded(*args, **kwargs, explicit=True)


def _sdpa(*args: Any, **kwargs: Any) -> Any:
    return _padded(*args, **kwargs, explicit=False)


def _sdpa_reasons(q: Tensor, k: Tensor, v: Tensor, *args: Any, return_lse: bool, **kwargs: Any) -> list[str]:
    return sdpa.attention_reasons(q, k, v, return_lse=return_lse)


def _order(q: Tensor, *args: Any, **kwargs: Any) -> tuple[str, ...]:
    return ("varlen", "xformers", "sdpa", "reference") if q.device.type == "cuda" else ("sdpa", "reference")


define_op(varlen_attention, order=_order, autocast=3)
register_impl("varlen_attention", "reference", _reference)
register_impl("varlen_attention", "sdpa", _sdpa, supports=_sdpa_reasons)
register_impl(
    "varlen_attention",
    "varlen",
    varlen.varlen_attention,
    supports=varlen.varlen_reasons,
    here=cuda_here,
    deterministic=False,
)
register_impl(
    "varlen_attention",
    "xformers",
    xformers.varlen_attention,
    supports=xformers.varlen_reasons,
    here=xformers.here,
    deterministic=False,
    graph_safe=False,
)
