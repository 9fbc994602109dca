"""One step of attention over a ring of past tokens, for many streams at once.

Softmax does not care in which slot a key lies, so the ring is never rolled or unrolled: a token is written at ``head
% CP``, and a slot is visible by its age ``(head - 1 - slot) mod CP``. All state stays on the device and is updated in
place.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparing.kernels.backends.sdpa import masked_attention
from sparing.kernels.dispatch import define_op, register_impl, run, triton_attention_reasons, triton_here
from sparing.kernels.ops.attention import explicit_attention


@dataclass
class RingCache:
    """Keys and values of the last tokens of each stream.

    Attributes:
        k: (streams, CP, heads, head_dim) key ring, slot order; CP >= window + tokens_per_step - 1.
        v: (streams, CP, heads, value_dim) value ring.
        head: (streams,) int32, the slot that is written next.
        length: (streams,) int32, tokens held, at most CP.
        window: a query sees at most this many tokens, its own among them.
    """

    k: Tensor
    v: Tensor
    head: Tensor
    length: Tensor
    window: int

    @classmethod
    def empty(
        cls,
        streams: int,
        window: int,
        *,
        heads: int,
        head_dim: int,
        value_dim: int | None = None,
        tokens_per_step: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "RingCache":
        """A cache of zeros with the smallest capacity that serves steps of ``tokens_per_step`` tokens."""
        capacity = window + tokens_per_step - 1
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        return cls(
            k=torch.zeros(streams, capacity, heads, head_dim, **options),
            v=torch.zeros(streams, capacity, heads, head_dim if value_dim is None else value_dim, **options),
            head=torch.zeros(streams, device=device, dtype=torch.int32),
            length=torch.zeros(streams, device=device, dtype=torch.int32),
            window=window,
        )

    @property
    def capacity(self) -> int:
        """Number of slots CP."""
        return self.k.shape[1]

    def clear(self) -> None:
        """Empty every stream, in place (the contents of slots are kept, nothing sees them)."""
        self.head.zero_()
        self.length.zero_()


def ring_attention_step(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    cache: RingCache,
    *,
    active: Tensor | None = None,
    reset: Tensor | None = None,
    age_bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Append T tokens to each active stream and attend from each over the last ``window`` tokens, itself included.

    The same as T steps of one token. Forward only: the outputs carry no gradient. The cache is updated in place.

    Args:
        q: (streams, T, heads, head_dim) queries.
        k_new: (streams, T, heads, head_dim) keys to append.
        v_new: (streams, T, heads, value_dim) values to append.
        cache: the ring, in the dtype of the inputs (inside autocast the inputs are cast to the cache's).
        active: (streams,) bool; the state of other streams is untouched, their out is 0 and lse -inf.
        reset: (streams,) bool; these streams are emptied first, also when they are not active.
        age_bias: (heads, window) added to the score of a token by its age (0 = the query's own).
        scale: factor of the scores; ``head_dim ** -0.5`` when None.
        return_lse: also return the natural-log normaliser (streams, T, heads).
        backend: ``'auto'``, ``'triton'``, ``'sdpa'`` or ``'reference'``.

    Returns:
        (streams, T, heads, value_dim) in the dtype of ``q``; with ``return_lse`` also lse, float32 (float64 for
        float64).

    Raises:
        ValueError: shapes that do not fit, or T tokens too many for the capacity.
        TypeError: dtypes that do not fit.
        BackendUnsupported: the named backend cannot serve this call.
    """
    _check(q, k_new, v_new, cache, active=active, reset=reset, age_bias=age_bias)
    dtype = q.dtype
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.no_grad():
        q, k_new, v_new = (t.to(cache.k.dtype) for t in (q, k_new, v_new))
        found = run(
            "ring_attention_step", backend, q, k_new, v_new, cache,
            active=active, reset=reset, age_bias=age_bias, scale=scale, return_lse=return_lse,
        )  # fmt: skip
    return (found[0].to(dtype), found[1]) if return_lse else found.to(dtype)


def _check(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    cache: RingCache,
    *,
    active: Tensor | None,
    reset: Tensor | None,
    age_bias: Tensor | None,
) -> None:
    streams, capacity, heads, head_dim = cache.k.shape
    if q.ndim != 4 or q.shape != k_new.shape or q.shape[0] != streams or q.shape[2:] != (heads, head_dim):
        raise ValueError(
            f"q and k_new must be ({streams}, T, {heads}, {head_dim}) as the cache is; "
            f"got {tuple(q.shape)} and {tuple(k_new.shape)}"
        )
    if v_new.shape[:3] != q.shape[:3] or v_new.shape[3] != cache.v.shape[3]:
        raise ValueError(f"v_new must be {(*q.shape[:3], cache.v.shape[3])}, got {tuple(v_new.shape)}")
    if q.shape[1] + cache.window - 1 > capacity:
        raise ValueError(
            f"{q.shape[1]} tokens a step over a window of {cache.window} need capacity "
            f"{q.shape[1] + cache.window - 1}, the cache has {capacity}"
        )
    autocast = q.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(q.device.type)
    if not autocast and not (q.dtype == k_new.dtype == v_new.dtype == cache.k.dtype):
        dtypes = ", ".join(str(t.dtype) for t in (q, k_new, v_new, cache.k))
        raise TypeError(f"q, k_new, v_new and the cache must share one dtype; got {dtypes}")
    for name, flag in (("active", active), ("reset", reset)):
        if flag is not None and (tuple(flag.shape) != (streams,) or flag.dtype != torch.bool):
            raise ValueError(f"{name} must be bool of shape ({streams},), got {flag.dtype} {tuple(flag.shape)}")
    if age_bias is not None and tuple(age_bias.shape) != (heads, cache.window):
        raise ValueError(f"age_bias must be ({heads}, {cache.window}), got {tuple(age_bias.shape)}")


def _append(k_new: Tensor, v_new: Tensor, cache: RingCache, *, active: Tensor | None, reset: Tensor | None) -> Tensor:
    """Write the new tokens and advance the state, in place; gives the ages (streams, CP) of all slots afterwards."""
    streams, tokens = k_new.shape[:2]
    if reset is not None:
        cache.head.masked_fill_(reset, 0)
        cache.length.masked_fill_(reset, 0)
    slots = (cache.head.unsqueeze(1) + torch.arange(tokens, device=k_new.device)) % cache.capacity
    rows = torch.arange(streams, device=k_new.device).unsqueeze(1)
    advance: Tensor | int = tokens
    if active is not None:
        keep = active.view(-1, 1, 1, 1)
        k_new = torch.where(keep, k_new, cache.k[rows, slots])
        v_new = torch.where(keep, v_new, cache.v[rows, slots])
        advance = active.to(torch.int32) * tokens
    cache.k[rows, slots] = k_new
    cache.v[rows, slots] = v_new
    cache.head.add_(advance).remainder_(cache.capacity)
    cache.length.add_(advance).clamp_(max=cache.capacity)
    return (cache.head.unsqueeze(1) - 1 - torch.arange(cache.capacity, device=k_new.device)) % cache.capacity


def _visible(
    ages: Tensor, before: Tensor, tokens: int, cache: RingCache, active: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(streams, T, CP) age of each slot as query j sees it, and whether it sees it; ``before`` = lengths before the
    step.
    """
    if tokens == 1:  # the common case in fewer operations
        age, held = ages.unsqueeze(1), cache.length.view(-1, 1, 1)
        seen = age < held.clamp(max=cache.window)
    else:
        later = torch.arange(tokens - 1, -1, -1, device=ages.device).unsqueeze(1)
        age = ages.unsqueeze(1) - later
        held = (before.view(-1, 1, 1) + tokens - later).clamp(max=cache.window)
        seen = (age >= 0) & (age < held)
    return age, seen if active is None else seen & active.view(-1, 1, 1)


def _step(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    cache: RingCache,
    *,
    active: Tensor | None,
    reset: Tensor | None,
    age_bias: Tensor | None,
    scale: float,
    return_lse: bool,
    explicit: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    before = cache.length if reset is None else cache.length.masked_fill(reset, 0)
    before = before.clone() if q.shape[1] > 1 else before
    ages = _append(k_new, v_new, cache, active=active, reset=reset)
    age, seen = _visible(ages, before, q.shape[1], cache, active)
    bias = None
    if age_bias is not None:
        bias = age_bias[:, age.clamp(0, cache.window - 1)].transpose(0, 1)  # (S, H, T, CP)
    heads_first = q.transpose(1, 2), cache.k.transpose(1, 2), cache.v.transpose(1, 2)
    visible = seen.unsqueeze(1)
    if explicit:
        out, lse = explicit_attention(*heads_first, bias=bias, visible=visible, scale=scale)
        out = out.transpose(1, 2)
        return (out, lse.transpose(1, 2)) if return_lse else out
    return masked_attention(*heads_first, bias=bias, visible=visible, scale=scale).transpose(1, 2)


def _reference(*args: Any, **kwargs: Any) -> Any:
    return _step(*args, **kwargs, explicit=True)


def _sdpa(*args: Any, **kwargs: Any) -> Any:
    return _step(*args, **kwargs, explicit=False)


def _sdpa_reasons(*args: Any, return_lse: bool = False, **kwargs: Any) -> list[str]:
    return ["scaled_dot_product_attention returns no lse"] if return_lse else []


@torch.library.custom_op("sparing::ring_attention_step", mutates_args={"k_cache", "v_cache", "head", "length"})
def ring_attention_step_op(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    head: Tensor,
    length: Tensor,
    active: Tensor | None,
    reset: Tensor | None,
    age_bias: Tensor | None,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out and lse by the Triton kernel; the cache is updated in place."""
    if triton_here(q.device):  # a program exported on CUDA and loaded where no kernel can run
        cache = RingCache(k_cache, v_cache, head, length, window)
        flags = {"active": active, "reset": reset, "age_bias": age_bias}
        out, lse = _reference(q, k_new, v_new, cache, **flags, scale=scale, return_lse=True)
        return out.contiguous(), lse.contiguous()
    from sparing.kernels.triton import ring_attention_step as kernels

    state = (k_cache, v_cache, head, length)
    return kernels.step(q, k_new, v_new, *state, active, reset, age_bias, window=window, scale=scale)


@ring_attention_step_op.register_fake
def _(q: Tensor, k_new: Tensor, v_new: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:3], v_new.shape[3]), q.new_empty(q.shape[:3], dtype=wide)


def _triton(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    cache: RingCache,
    *,
    active: Tensor | None,
    reset: Tensor | None,
    age_bias: Tensor | None,
    scale: float,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    state = (cache.k, cache.v, cache.head, cache.length)
    out, lse = ring_attention_step_op(q, k_new, v_new, *state, active, reset, age_bias, cache.window, scale)
    return (out, lse) if return_lse else out


def _triton_reasons(q: Tensor, k_new: Tensor, v_new: Tensor, cache: RingCache, **kwargs: Any) -> list[str]:
    reasons = triton_attention_reasons(q, head_dim=max(q.shape[-1], v_new.shape[-1]), max_dim=256)
    if q.shape[1] > 8:
        reasons.append(f"{q.shape[1]} tokens a step, at most 8")
    for name in ("k", "v", "head", "length"):
        if not getattr(cache, name).is_contiguous():
            reasons.append(f"the cache's {name} is not contiguous")
    return reasons


def _order(q: Tensor, *args: Any, **kwargs: Any) -> tuple[str, ...]:
    return ("triton", "sdpa", "reference") if q.device.type == "cuda" else ("sdpa", "reference")


define_op(ring_attention_step, order=_order)
register_impl("ring_attention_step", "reference", _reference)
register_impl("ring_attention_step", "sdpa", _sdpa, supports=_sdpa_reasons)
register_impl("ring_attention_step", "triton", _triton, supports=_triton_reasons, here=triton_here)
