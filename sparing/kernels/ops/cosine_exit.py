"""The exit test of early-exiting encoders: did this layer still change the tokens?

``cosine_exit`` compares the states before and after a layer by cosine and says on the device which samples are done;
``survivors`` lists those that are not. The formula is that of MuE (You Need Multiple Exiting, CVPR 2023, section
3.2), with both readings of "the similarity of two layers": the mean of the cosines of the tokens, or one cosine of
all valid tokens concatenated.
"""

from typing import Any, Literal

import torch
from einops import reduce
from torch import Tensor

from sparing.kernels.dispatch import define_op, register_impl, run, triton_here

__all__ = ["cosine_exit", "survivors"]

Mode = Literal["mean", "flat"]


def cosine_exit_reference(
    prev: Tensor, cur: Tensor, valid: Tensor, threshold: float | Tensor, mode: Mode = "mean", *, eps: float = 1e-8
) -> tuple[Tensor, Tensor]:
    """The definition of ``cosine_exit``, in float32 (float64 for float64 inputs)."""
    dtype = torch.float64 if prev.dtype == torch.float64 else torch.float32
    prev, cur = prev.detach().to(dtype), cur.detach().to(dtype)
    dot, prev_square, cur_square = (
        reduce(product, "b l c -> b l", "sum") for product in (prev * cur, prev * prev, cur * cur)
    )
    count = reduce(valid.to(dtype), "b l -> b", "sum")
    if mode == "mean":
        token = dot / (prev_square.sqrt().clamp(min=eps) * cur_square.sqrt().clamp(min=eps))
        similarity = reduce(torch.where(valid, token, 0.0), "b l -> b", "sum") / count.clamp(min=1)
    else:
        dot, prev_square, cur_square = (
            reduce(torch.where(valid, part, 0.0), "b l -> b", "sum") for part in (dot, prev_square, cur_square)
        )
        similarity = dot / (prev_square.sqrt().clamp(min=eps) * cur_square.sqrt().clamp(min=eps))
    return similarity, (similarity >= threshold) & (count > 0)


def cosine_exit(
    prev: Tensor,
    cur: Tensor,
    valid: Tensor,
    threshold: float | Tensor,
    mode: Mode = "mean",
    *,
    eps: float = 1e-8,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Similarity of two layers' states and whether it reaches the exit threshold; no gradient.

    Args:
        prev: states before the layer, ``(batch, tokens, dim)``.
        cur: states after it, same shape.
        valid: ``(batch, tokens)`` bool, True = a real token.
        threshold: exit where the similarity is at least this; a number, or a tensor broadcastable to ``(batch,)`` on
            the device.
        mode: ``'mean'`` averages the cosines of the valid tokens, ``'flat'`` takes one cosine of the valid tokens
            concatenated.
        eps: norms are clamped below at this.
        backend: ``'auto'``, ``'triton'`` or ``'reference'``.

    Returns:
        similarity ``(batch,)`` in float32 (float64 for float64 inputs) and exit ``(batch,)`` bool. A sample without
        valid tokens has similarity 0 and does not exit.

    Raises:
        ValueError: shapes that do not fit, a mask that is not bool, or an unknown mode.
        BackendUnsupported: the named backend cannot serve; the message says why.
    """
    _check_states(prev, cur, valid, mode)
    return run("cosine_exit", backend, prev, cur, valid, threshold, mode, eps=eps)


def _check_states(prev: Tensor, cur: Tensor, valid: Tensor, mode: str) -> None:
    if prev.ndim != 3 or cur.shape != prev.shape:
        raise ValueError(
            f"prev {tuple(prev.shape)} and cur {tuple(cur.shape)}; expected equal shapes (batch, tokens, dim)"
        )
    if valid.dtype != torch.bool or valid.shape != prev.shape[:2]:
        raise ValueError(
            f"valid is {valid.dtype} of shape {tuple(valid.shape)}; expected bool of shape {tuple(prev.shape[:2])}"
        )
    if mode not in ("mean", "flat"):
        raise ValueError(f"mode is {mode!r}; expected 'mean' or 'flat'")


def survivors(exited: Tensor, *, capacity: int | None = None, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Samples that go on: ``(index, count)`` on the device.

    Args:
        exited: ``(batch,)`` bool.
        capacity: length of the index buffer. ``None`` gives exactly the survivors, at the price of one host read; a
            number gives a buffer of that length, padded with -1, without any.
        backend: ``'auto'`` or ``'reference'``, the only one.

    Returns:
        ``index`` int32, ascending, and ``count``, a 0-d int32 tensor (it may exceed a capacity that is too small).

    Raises:
        ValueError: ``exited`` is not a bool vector, or the capacity is negative.
    """
    if exited.ndim != 1 or exited.dtype != torch.bool:
        raise ValueError(f"exited is {exited.dtype} of shape {tuple(exited.shape)}; expected bool of shape (batch,)")
    if capacity is not None and capacity < 0:
        raise ValueError(f"capacity is {capacity}; expected 0 or more")
    return run("survivors", backend, exited, capacity=capacity)


def _survivors(exited: Tensor, *, capacity: int | None = None) -> tuple[Tensor, Tensor]:
    stay = ~exited
    count = stay.sum(dtype=torch.int32)
    if capacity is None:
        return stay.nonzero().squeeze(1).to(torch.int32), count
    rank = stay.cumsum(0, dtype=torch.int32) - 1
    slot = torch.where(stay & (rank < capacity), rank, capacity).long()
    position = torch.arange(exited.shape[0], dtype=torch.int32, device=exited.device)
    return position.new_full((capacity + 1,), -1).scatter(0, slot, position)[:capacity], count


@torch.library.custom_op("sparing::cosine_exit", mutates_args=())
def _cosine_exit(
    prev: Tensor, cur: Tensor, valid: Tensor, threshold: Tensor, mode: str, eps: float
) -> tuple[Tensor, Tensor]:
    if triton_here(prev.device):  # an exported graph loaded where no kernel can run
        return cosine_exit_reference(prev, cur, valid, threshold, mode, eps=eps)  # type: ignore[arg-type]
    from sparing.kernels.triton.cosine_exit import cosine_exit_forward

    return cosine_exit_forward(prev, cur, valid, threshold, mode, eps)


@_cosine_exit.register_fake
def _cosine_exit_fake(
    prev: Tensor, cur: Tensor, valid: Tensor, threshold: Tensor, mode: str, eps: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(threshold), torch.empty_like(threshold, dtype=torch.bool)


def _cosine_exit_triton(
    prev: Tensor, cur: Tensor, valid: Tensor, threshold: float | Tensor, mode: str = "mean", *, eps: float = 1e-8
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if prev.dtype == torch.float64 else torch.float32
    if isinstance(threshold, Tensor):
        limit = threshold.to(prev.device, dtype).expand(prev.shape[0]).contiguous()
    else:
        limit = torch.full((prev.shape[0],), threshold, dtype=dtype, device=prev.device)
    return _cosine_exit(prev.detach(), cur.detach(), valid, limit, mode, eps)


def _order(prev: Tensor, *args: Any, **kwargs: Any) -> tuple[str, ...]:
    return ("triton", "reference") if prev.device.type == "cuda" else ("reference",)


def _triton_supports(prev: Tensor, cur: Tensor, *args: Any, **kwargs: Any) -> list[str]:
    reasons = []
    if prev.dtype != cur.dtype:
        reasons.append(f"prev is {prev.dtype} and cur is {cur.dtype}; takes one dtype")
    if prev.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        reasons.append(f"dtype {prev.dtype}; takes float32, bfloat16, float16 and float64")
    for name, states in (("prev", prev), ("cur", cur)):
        if states.stride(2) != 1:
            reasons.append(f"{name}.stride(-1) is {states.stride(2)}; takes 1")
    return reasons


define_op(cosine_exit, order=_order)
register_impl("cosine_exit", "triton", _cosine_exit_triton, supports=_triton_supports, here=triton_here)
register_impl("cosine_exit", "reference", cosine_exit_reference)
define_op(survivors, order=lambda *args, **kwargs: ("reference",))
register_impl("survivors", "reference", _survivors)
