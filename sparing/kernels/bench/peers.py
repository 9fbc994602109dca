"""Library kernels measured one by one: SDPA's choice among them is no evidence of which is best.

``sdpa:flash``, ``sdpa:mem-efficient`` and ``sdpa:cudnn`` are the op's own ``sdpa`` backend with that one kernel allowed
(``torch.nn.attention.sdpa_kernel``); ``xformers:split-k`` is xformers' Triton split-K operator, forward only. A peer
that cannot serve a case raises, and its row says why.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparing import kernels
from sparing.kernels.backends import xformers
from sparing.kernels.dispatch import cuda_here

__all__ = ["library_peers"]

SDPA_KERNELS = {
    "sdpa:flash": SDPBackend.FLASH_ATTENTION,
    "sdpa:mem-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa:cudnn": SDPBackend.CUDNN_ATTENTION,
}
DENSE_OPS = ("attention", "few_query_attention", "tiny_attention")


def library_peers(op: str) -> dict[str, Callable[..., Any]]:
    """Peers of an op beyond its backends, each called as the op is; empty for ops that are no dense attention."""
    if op not in DENSE_OPS:
        return {}
    peers: dict[str, Callable[..., Any]] = {name: partial(_one_kernel, op, name) for name in SDPA_KERNELS}
    if op == "few_query_attention":
        peers["xformers:split-k"] = _split_k
    return peers


def _one_kernel(op: str, name: str, *args: Tensor, **kwargs: Any) -> Any:
    if reasons := cuda_here(args[0].device):
        raise kernels.BackendUnsupported(op, name, reasons, [])
    with sdpa_kernel(SDPA_KERNELS[name]):
        return getattr(kernels, op)(*args, **kwargs, backend="sdpa")


def _split_k(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
    """xformers' split-K attention without bias or lengths. q: (B, H, M, D); k, v: (B, H, N, D) -> (B, H, M, D)."""
    reasons = xformers.here(q.device)
    given = [name for name in ("bias", "kv_len") if kwargs.get(name) is not None]
    if given:
        reasons.append(f"{' and '.join(given)}: not served without a layout of its own")
    if q.requires_grad or k.requires_grad or v.requires_grad:
        reasons.append("backward not implemented")
    if reasons:
        raise kernels.BackendUnsupported("few_query_attention", "xformers:split-k", reasons, [])
    return xformers.split_k(q, k, v, scale=kwargs.get("scale"))
