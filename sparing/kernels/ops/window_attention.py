"""Attention inside (shifted) windows of a feature map with a relative-position table (Swin Transformer, section 3.2).

The map is rolled by ``-shift``, cut into windows, each window attends within itself, and everything is put back.
Pairs whose region ids differ (tokens that were not neighbours before the roll) do not see each other: a true mask
here, where the paper's code adds -100; no row can be empty, since a token always sees itself. ``bias[h, i, j] =
table[index(i, j), h]`` with ``index = (dy + wh - 1)(2 ww - 1) + (dx + ww - 1)``, (dy, dx) = position of query i minus
position of key j.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from sparing.kernels.backends import sdpa
from sparing.kernels.dispatch import define_op, register_impl, run, triton_attention_reasons, triton_here
from sparing.kernels.masks import check_dtypes
from sparing.kernels.ops.attention import explicit_attention

Pair = int | tuple[int, int]


def window_attention(
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    rel_table: Tensor | None = None,
    *,
    window: Pair,
    heads: int,
    shift: Pair = 0,
    rel_bias: Tensor | None = None,
    region: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Window attention of a map, without permuted copies on the Triton backend.

    Args:
        qkv: (batch, h, w, 3 * channels) with the last dim ordered (3, heads, head_dim), or a tuple of three
            (batch, h, w, channels) maps; h and w are multiples of the window. Or windows already cut, (batch * windows,
            wh * ww, 3, heads, head_dim): then the output is (batch * windows, wh * ww, heads, head_dim).
        rel_table: ((2 wh - 1)(2 ww - 1), heads) relative-position table; may require a gradient. None = no bias.
        window: side of the windows, or (wh, ww).
        heads: number of heads; channels = heads * head_dim.
        shift: cyclic shift, or (rows, columns), below the window's sides.
        rel_bias: (heads, wh * ww, wh * ww) bias already gathered, instead of ``rel_table``.
        region: (h, w) ids on the rolled map; pairs of different id are hidden. None = the ids that the shift makes.
        scale: factor of the scores; ``head_dim ** -0.5`` when None.
        return_lse: also return the natural-log normaliser (batch * windows, heads, wh * ww), not differentiable.
        backend: ``'auto'``, ``'triton'``, ``'sdpa'`` or ``'reference'``.

    Returns:
        (batch, h, w, channels) in the dtype of the input, heads concatenated, no output projection; with
        ``return_lse`` also lse in the order of the rolled windows, row by row.

    Raises:
        ValueError: sizes that do not fit the window, the heads or the table.
        BackendUnsupported: the named backend cannot serve this call.
    """
    window_, shift_ = _pair(window), _pair(shift)
    if isinstance(qkv, Tensor) and qkv.ndim == 5:
        found = window_attention(
            _cut_windows_as_maps(qkv, window_, shift_), rel_table, window=window, heads=heads, shift=shift,
            rel_bias=rel_bias, region=region, scale=scale, return_lse=return_lse, backend=backend,
        )  # fmt: skip
        out, *lse = found if isinstance(found, tuple) else (found,)
        out = out.flatten(1, 2).unflatten(2, (heads, -1))
        return (out, lse[0]) if lse else out
    q, k, v = qkv.chunk(3, dim=-1) if isinstance(qkv, Tensor) else qkv
    _check(q, k, v, rel_table, rel_bias, region, window=window_, shift=shift_, heads=heads)
    scale = (q.shape[-1] // heads) ** -0.5 if scale is None else scale
    return run(
        "window_attention", backend, q, k, v, rel_table, rel_bias, region,
        window=window_, shift=shift_, heads=heads, scale=scale, return_lse=return_lse,
    )  # fmt: skip


def relative_position_index(window: Pair, *, device: torch.device | str | None = None) -> Tensor:
    """(wh * ww, wh * ww) int32: the row of the table for each pair of positions of a window, positions row by row."""
    rows, columns = _pair(window)
    y = torch.arange(rows, device=device, dtype=torch.int32).repeat_interleave(columns)
    x = torch.arange(columns, device=device, dtype=torch.int32).repeat(rows)
    dy, dx = y.unsqueeze(1) - y, x.unsqueeze(1) - x
    return (dy + rows - 1) * (2 * columns - 1) + dx + columns - 1


def window_region(
    height: int, width: int, *, window: Pair, shift: Pair, device: torch.device | str | None = None
) -> Tensor:
    """(h, w) int32 ids on the rolled map, 3 x 3 numbered from the slices ``0:-window, -window:-shift, -shift:`` of
    rows, then columns; all 0 without a shift.
    """
    (wh, ww), (sh, sw) = _pair(window), _pair(shift)

    def ids(size: int, side: int, step: int) -> Tensor:
        place = torch.arange(size, device=device)
        return ((place >= size - side).int() + (place >= size - step).int()) if step else torch.zeros_like(place).int()

    return ids(height, wh, sh).unsqueeze(1) * 3 + ids(width, ww, sw)


def _pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _cut_windows_as_maps(qkv: Tensor, window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """(windows, wh * ww, 3, heads, head_dim) as maps of one window each: (windows, wh, ww, 3 * channels)."""
    if qkv.shape[1] != window[0] * window[1] or qkv.shape[2] != 3 or max(shift) > 0:
        raise ValueError(
            f"windows already cut must be (batch * windows, {window[0] * window[1]}, 3, heads, head_dim) with shift 0; "
            f"got {tuple(qkv.shape)} with shift {shift}"
        )
    return qkv.flatten(2).unflatten(1, window)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_table: Tensor | None,
    rel_bias: Tensor | None,
    region: Tensor | None,
    *,
    window: tuple[int, int],
    shift: tuple[int, int],
    heads: int,
) -> None:
    if q.ndim != 4 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(
            "qkv must be (batch, h, w, 3 * channels) or three (batch, h, w, channels) maps; the parts are "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    check_dtypes(q, k, v)
    (wh, ww), (sh, sw) = window, shift
    if q.shape[1] % wh or q.shape[2] % ww:
        raise ValueError(f"a map of {q.shape[1]}x{q.shape[2]} is no multiple of the window {wh}x{ww}; pad it first")
    if not (0 <= sh < wh and 0 <= sw < ww):
        raise ValueError(f"shift must be at least 0 and below the window {window}, got {shift}")
    if q.shape[3] % heads:
        raise ValueError(f"{q.shape[3]} channels do not divide into {heads} heads")
    if rel_table is not None and rel_bias is not None:
        raise ValueError("give rel_table or rel_bias, not both")
    entries, tokens = (2 * wh - 1) * (2 * ww - 1), wh * ww
    if rel_table is not None and tuple(rel_table.shape) != (entries, heads):
        raise ValueError(f"rel_table must be ({entries}, {heads}), got {tuple(rel_table.shape)}")
    if rel_bias is not None and tuple(rel_bias.shape) != (heads, tokens, tokens):
        raise ValueError(f"rel_bias must be ({heads}, {tokens}, {tokens}), got {tuple(rel_bias.shape)}")
    if region is not None and tuple(region.shape) != tuple(q.shape[1:3]):
        raise ValueError(f"region must be {tuple(q.shape[1:3])}, got {tuple(region.shape)}")
    if region is not None and region.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"region holds ids, integers within int32; got {region.dtype}")


def _windows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_table: Tensor | None,
    rel_bias: Tensor | None,
    region: Tensor | None,
    *,
    window: tuple[int, int],
    shift: tuple[int, int],
    heads: int,
    scale: float,
    return_lse: bool,
    explicit: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Roll, partition, attend, reverse, by tensor operations.

    Where regions hide pairs, the mask differs from window to window but not from sample to sample: windows are then
    laid beside the heads, so that one (1, windows * heads, W, W) bias serves the whole batch.
    """
    height, width = q.shape[1:3]
    (wh, ww), (sh, sw) = window, shift
    shifted = sh > 0 or sw > 0
    if shifted and region is None:
        region = window_region(height, width, window=window, shift=shift, device=q.device)
    if rel_table is not None:
        index = relative_position_index(window, device=q.device).flatten().long()
        rel_bias = rearrange(rel_table[index], "(i j) heads -> heads i j", i=wh * ww)
    layout = "b (y wh) (x ww) (heads d) -> (b y x) heads (wh ww) d"
    back = "(b y x) heads (wh ww) d -> b (y wh) (x ww) (heads d)"
    bias, visible = None if rel_bias is None else rel_bias.unsqueeze(0), None
    if region is not None:
        layout = "b (y wh) (x ww) (heads d) -> b (y x heads) (wh ww) d"
        back = "b (y x heads) (wh ww) d -> b (y wh) (x ww) (heads d)"
        ids = rearrange(region, "(y wh) (x ww) -> (y x) 1 (wh ww)", wh=wh, ww=ww)
        visible = (ids.unsqueeze(-1) == ids.unsqueeze(-2)).expand(-1, heads, -1, -1).flatten(0, 1).unsqueeze(0)
        if bias is not None:
            bias = bias.expand(ids.shape[0], -1, -1, -1).flatten(0, 1).unsqueeze(0)
    sizes = {"wh": wh, "ww": ww, "heads": heads}
    parts = [torch.roll(t, (-sh, -sw), (1, 2)) if shifted else t for t in (q, k, v)]
    q, k, v = (rearrange(t, layout, **sizes) for t in parts)
    lse = None
    if explicit:
        out, lse = explicit_attention(q, k, v, bias=bias, visible=visible, scale=scale)
    else:
        out = sdpa.masked_attention(q, k, v, bias=bias, visible=visible, scale=scale)
    out = rearrange(out, back, y=height // wh, x=width // ww, **sizes)
    if shifted:
        out = torch.roll(out, (sh, sw), (1, 2))
    if not return_lse:
        return out
    assert lse is not None
    return out, lse.detach().reshape(-1, heads, wh * ww)


def _reference(*args: Any, **kwargs: Any) -> Any:
    return _windows(*args, **kwargs, explicit=True)


def _sdpa(*args: Any, **kwargs: Any) -> Any:
    return _windows(*args, **kwargs, explicit=False)


def _sdpa_reasons(
    q: Tensor, k: Tensor, v: Tensor, rel_table: Tensor | None, rel_bias: Tensor | None, *args: Any, **kwargs: Any
) -> list[str]:
    bias = rel_table if rel_bias is None else rel_bias
    return sdpa.attention_reasons(q, k, v, bias=bias, return_lse=kwargs.get("return_lse", False))


@torch.library.custom_op("sparing::window_attention_fwd", mutates_args=())
def window_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    region: Tensor | None,
    table: bool,
    heads: int,
    window: list[int],
    shift: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out and lse by the Triton kernel; ``bias`` is the relative table, or a gathered bias, as ``table`` says."""
    if triton_here(q.device):  # a program exported on CUDA and loaded where no kernel can run
        biases = (bias, None) if table else (None, bias)
        sides = {"window": (window[0], window[1]), "shift": (shift[0], shift[1]), "heads": heads}
        out, lse = _reference(q, k, v, *biases, region, **sides, scale=scale, return_lse=True)
        return out.contiguous(), lse.contiguous()
    from sparing.kernels.triton import window_attention as kernels

    problems = kernels.Problems.of_maps(q, heads, (window[0], window[1]), (shift[0], shift[1]))
    bias = bias if table or bias is None else bias.unsqueeze(0)
    return kernels.forward(problems, q, k, v, bias, region, table=table, scale=scale)


@window_attention_fwd.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, bias: Any, region: Any, table: bool, heads: int, window: list[int], *args: Any
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    tokens = window[0] * window[1]
    windows = q.shape[0] * (q.shape[1] // window[0]) * (q.shape[2] // window[1])
    return q.new_empty(q.shape), q.new_empty(windows, heads, tokens, dtype=wide)


@torch.library.custom_op("sparing::window_attention_bwd", mutates_args=())
def window_attention_bwd(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    region: Tensor | None,
    out: Tensor,
    lse: Tensor,
    bias_grad: bool,
    table: bool,
    heads: int,
    window: list[int],
    shift: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and, with ``bias_grad``, of the table or bias (else an empty tensor)."""
    from sparing.kernels.triton import window_attention as kernels

    sides = (window[0], window[1])
    problems = kernels.Problems.of_maps(q, heads, sides, (shift[0], shift[1]))
    given = bias if table or bias is None else bias.unsqueeze(0)
    dq, dk, dv, slopes = kernels.backward(
        problems, grad, q, k, v, given, region, out, lse, table=table, scale=scale, bias_grad=bias_grad
    )
    if slopes is None or bias is None:
        return dq, dk, dv, q.new_empty(0)
    dbias = table_gradient(slopes[0], sides) if table else slopes[0]
    return dq, dk, dv, dbias.to(bias.dtype).contiguous()


@window_attention_bwd.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, region: Any, out: Any, lse: Any,
    bias_grad: bool, *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dbias = q.new_empty(0) if bias is None or not bias_grad else bias.new_empty(bias.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


def table_gradient(slopes: Tensor, window: tuple[int, int]) -> Tensor:
    """Gradient of the table ((2 wh - 1)(2 ww - 1), heads) from that of the gathered bias (heads, W, W): each entry
    gathers the pairs of its offset, at most one a query, so nothing is scattered and the sum has one order.
    """
    wh, ww = window
    device = slopes.device
    dy = (torch.arange(2 * wh - 1, device=device) - (wh - 1)).repeat_interleave(2 * ww - 1).unsqueeze(1)
    dx = (torch.arange(2 * ww - 1, device=device) - (ww - 1)).repeat(2 * wh - 1).unsqueeze(1)
    query = torch.arange(wh * ww, device=device)
    y, x = query // ww - dy, query % ww - dx  # (entries, W): the key that lies at this offset from each query
    inside = (y >= 0) & (y < wh) & (x >= 0) & (x < ww)
    key = torch.where(inside, y * ww + x, 0)
    return (slopes[:, query, key] * inside).sum(-1).transpose(0, 1)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bias, region, *options = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, bias, region, out, lse)
    ctx.options = options


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    bias_grad = ctx.needs_input_grad[3]
    dq, dk, dv, dbias = window_attention_bwd(grad, *ctx.saved_tensors, bias_grad, *ctx.options)
    return dq, dk, dv, dbias if bias_grad else None, *(None,) * 6


window_attention_fwd.register_autograd(_backward, setup_context=_setup_context)


def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_table: Tensor | None,
    rel_bias: Tensor | None,
    region: Tensor | None,
    *,
    window: tuple[int, int],
    shift: tuple[int, int],
    heads: int,
    scale: float,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    bias, table = (rel_table, True) if rel_table is not None else (rel_bias, False)
    out, lse = window_attention_fwd(q, k, v, bias, region, table, heads, list(window), list(shift), scale)
    return (out, lse) if return_lse else out


def _triton_reasons(q: Tensor, k: Tensor, v: Tensor, *args: Any, heads: int, **kwargs: Any) -> list[str]:
    return triton_attention_reasons(q, head_dim=q.shape[-1] // heads, max_dim=64 if q.element_size() == 4 else 128)


def _order(q: Tensor, *args: Any, **kwargs: Any) -> tuple[str, ...]:
    return ("triton", "sdpa", "reference") if q.device.type == "cuda" else ("sdpa", "reference")


define_op(window_attention, order=_order, autocast=3)
register_impl("window_attention", "reference", _reference)
register_impl("window_attention", "sdpa", _sdpa, supports=_sdpa_reasons)
register_impl("window_attention", "triton", _triton, supports=_triton_reasons, here=triton_here)
