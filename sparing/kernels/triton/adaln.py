"""Triton kernels of the adaptive layer norm: one forward and one backward for ``gate_residual``, ``ln_modulate`` and
both at once.

Forward: a program holds ``ROWS`` tokens of one sample in registers, so the statistics are two-pass without a second
read. Backward: a program walks a fixed range of tokens of one sample and keeps the gradients that reduce over tokens
in registers; it writes one partial row and the launcher adds the partials. No atomics: the same bits in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparing.kernels.triton.config import Config, next_power_of_2, pick_config
from sparing.kernels.triton.device import on_their_device

__all__ = ["adaln_backward", "adaln_forward", "default_config"]

# Backward programs aimed at: four waves of an H100's 132 multiprocessors. A constant, so that the split depends on
# shapes only.
BACKWARD_PROGRAMS = 528
# Elements of a forward or backward tile.
TILE_ELEMENTS = 4096


@triton.jit(do_not_specialize=["tokens"])
def adaln_forward_kernel(
    x_ptr,  # (B, L, C)
    y_ptr,  # (B, L, C), read if GATED
    gate_ptr,  # (B, 1|L, C), read if GATED
    shift_ptr,  # (B, 1|L, C), read if NORMED
    scale_ptr,  # (B, 1|L, C), read if NORMED
    weight_ptr,  # (C,), read if AFFINE
    bias_ptr,  # (C,), read if AFFINE
    x1_ptr,  # (B, L, C) contiguous, written if GATED
    h_ptr,  # (B, L, C) contiguous, written if NORMED
    mean_ptr,  # (B, L) contiguous, written if NORMED
    rstd_ptr,  # (B, L) contiguous, written if NORMED
    tokens,
    eps,
    x_stride_b,
    x_stride_l,
    y_stride_b,
    y_stride_l,
    gate_stride_b,
    gate_stride_l,
    shift_stride_b,
    shift_stride_l,
    scale_stride_b,
    scale_stride_l,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    GATED: tl.constexpr,
    NORMED: tl.constexpr,
    AFFINE: tl.constexpr,
    ACC: tl.constexpr,
):
    tiles = tl.cdiv(tokens, ROWS)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    live_row = row < tokens
    live_column = column < DIM
    live = live_row[:, None] & live_column[None, :]
    place = (sample * tokens + row)[:, None] * DIM + column[None, :]

    x = tl.load(x_ptr + sample * x_stride_b + row[:, None] * x_stride_l + column[None, :], mask=live, other=0.0).to(ACC)
    if GATED:
        y = tl.load(y_ptr + sample * y_stride_b + row[:, None] * y_stride_l + column[None, :], mask=live, other=0.0)
        gate = tl.load(
            gate_ptr + sample * gate_stride_b + row[:, None] * gate_stride_l + column[None, :], mask=live, other=0.0
        )
        x = x + gate.to(ACC) * y.to(ACC)
        tl.store(x1_ptr + place, x.to(x1_ptr.dtype.element_ty), mask=live)
    if NORMED:
        mean = tl.sum(x, axis=1) / DIM
        centred = tl.where(live, x - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / DIM + eps)
        normalised = centred * rstd[:, None]
        if AFFINE:
            weight = tl.load(weight_ptr + column, mask=live_column, other=0.0).to(ACC)
            bias = tl.load(bias_ptr + column, mask=live_column, other=0.0).to(ACC)
            normalised = normalised * weight[None, :] + bias[None, :]
        shift = tl.load(
            shift_ptr + sample * shift_stride_b + row[:, None] * shift_stride_l + column[None, :], mask=live, other=0.0
        )
        scale = tl.load(
            scale_ptr + sample * scale_stride_b + row[:, None] * scale_stride_l + column[None, :], mask=live, other=0.0
        )
        h = normalised * (1.0 + scale.to(ACC)) + shift.to(ACC)
        tl.store(h_ptr + place, h.to(h_ptr.dtype.element_ty), mask=live)
        tl.store(mean_ptr + sample * tokens + row, mean, mask=live_row)
        tl.store(rstd_ptr + sample * tokens + row, rstd, mask=live_row)


@triton.jit(do_not_specialize=["tokens", "tokens_per_program", "programs"])
def adaln_backward_kernel(
    x_ptr,  # (B, L, C), read if NORMED
    y_ptr,  # (B, L, C), read if GATED
    gate_ptr,  # (B, 1|L, C), read if GATED
    scale_ptr,  # (B, 1|L, C), read if NORMED
    weight_ptr,  # (C,), read if AFFINE
    bias_ptr,  # (C,), read if AFFINE
    mean_ptr,  # (B, L), read if NORMED
    rstd_ptr,  # (B, L), read if NORMED
    grad_x1_ptr,  # (B, L, C) contiguous, read if GATED
    grad_h_ptr,  # (B, L, C) contiguous, read if NORMED
    dx_ptr,  # (B, L, C) contiguous
    dy_ptr,  # (B, L, C) contiguous, written if GATED
    dgate_ptr,  # (B, programs, C) partials, or (B, L, C) if GATE_PER_TOKEN; written if GATED
    dshift_ptr,  # (B, programs, C) partials, or (B, L, C) if MODULATION_PER_TOKEN; written if NORMED
    dscale_ptr,  # likewise
    dweight_ptr,  # (B, programs, C) partials, written if AFFINE
    dbias_ptr,  # likewise
    tokens,
    tokens_per_program,
    programs,
    x_stride_b,
    x_stride_l,
    y_stride_b,
    y_stride_l,
    gate_stride_b,
    gate_stride_l,
    scale_stride_b,
    scale_stride_l,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    GATED: tl.constexpr,
    NORMED: tl.constexpr,
    AFFINE: tl.constexpr,
    GATE_PER_TOKEN: tl.constexpr,
    MODULATION_PER_TOKEN: tl.constexpr,
    ACC: tl.constexpr,
):
    sample = (tl.program_id(0) // programs).to(tl.int64)
    part = tl.program_id(0) % programs
    column = tl.arange(0, BLOCK)
    live_column = column < DIM
    gate_sum = tl.zeros([BLOCK], dtype=ACC)
    shift_sum = tl.zeros([BLOCK], dtype=ACC)
    scale_sum = tl.zeros([BLOCK], dtype=ACC)
    weight_sum = tl.zeros([BLOCK], dtype=ACC)
    bias_sum = tl.zeros([BLOCK], dtype=ACC)
    if AFFINE:
        weight = tl.load(weight_ptr + column, mask=live_column, other=0.0).to(ACC)
        bias = tl.load(bias_ptr + column, mask=live_column, other=0.0).to(ACC)
    end = tl.minimum((part + 1) * tokens_per_program, tokens)
    for start in range(part * tokens_per_program, end, ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        live_row = row < end
        live = live_row[:, None] & live_column[None, :]
        place = (sample * tokens + row)[:, None] * DIM + column[None, :]
        if GATED:
            y = tl.load(
                y_ptr + sample * y_stride_b + row[:, None] * y_stride_l + column[None, :], mask=live, other=0.0
            ).to(ACC)
            gate = tl.load(
                gate_ptr + sample * gate_stride_b + row[:, None] * gate_stride_l + column[None, :], mask=live, other=0.0
            ).to(ACC)
            grad = tl.load(grad_x1_ptr + place, mask=live, other=0.0).to(ACC)
        else:
            grad = tl.zeros([ROWS, BLOCK], dtype=ACC)
        if NORMED:
            x = tl.load(
                x_ptr + sample * x_stride_b + row[:, None] * x_stride_l + column[None, :], mask=live, other=0.0
            ).to(ACC)
            if GATED:
                x = x + gate * y
            mean = tl.load(mean_ptr + sample * tokens + row, mask=live_row, other=0.0)
            rstd = tl.load(rstd_ptr + sample * tokens + row, mask=live_row, other=0.0)
            unit = tl.where(live, (x - mean[:, None]) * rstd[:, None], 0.0)
            grad_h = tl.load(grad_h_ptr + place, mask=live, other=0.0).to(ACC)
            scale = tl.load(
                scale_ptr + sample * scale_stride_b + row[:, None] * scale_stride_l + column[None, :],
                mask=live,
                other=0.0,
            ).to(ACC)
            grad_norm = grad_h * (1.0 + scale)
            if AFFINE:
                grad_scale = grad_h * (unit * weight[None, :] + bias[None, :])
                weight_sum += tl.sum(grad_norm * unit, axis=0)
                bias_sum += tl.sum(grad_norm, axis=0)
                grad_norm = grad_norm * weight[None, :]
            else:
                grad_scale = grad_h * unit
            if MODULATION_PER_TOKEN:
                tl.store(dshift_ptr + place, grad_h.to(dshift_ptr.dtype.element_ty), mask=live)
                tl.store(dscale_ptr + place, grad_scale.to(dscale_ptr.dtype.element_ty), mask=live)
            else:
                shift_sum += tl.sum(grad_h, axis=0)
                scale_sum += tl.sum(grad_scale, axis=0)
            average = tl.sum(grad_norm, axis=1) / DIM
            along = tl.sum(grad_norm * unit, axis=1) / DIM
            grad += rstd[:, None] * (grad_norm - average[:, None] - unit * along[:, None])
        tl.store(dx_ptr + place, grad.to(dx_ptr.dtype.element_ty), mask=live)
        if GATED:
            tl.store(dy_ptr + place, (grad * gate).to(dy_ptr.dtype.element_ty), mask=live)
            if GATE_PER_TOKEN:
                tl.store(dgate_ptr + place, (grad * y).to(dgate_ptr.dtype.element_ty), mask=live)
            else:
                gate_sum += tl.sum(tl.where(live, grad * y, 0.0), axis=0)
    partial = (sample * programs + part) * DIM + column
    if GATED and not GATE_PER_TOKEN:
        tl.store(dgate_ptr + partial, gate_sum, mask=live_column)
    if NORMED and not MODULATION_PER_TOKEN:
        tl.store(dshift_ptr + partial, shift_sum, mask=live_column)
        tl.store(dscale_ptr + partial, scale_sum, mask=live_column)
    if AFFINE:
        tl.store(dweight_ptr + partial, weight_sum, mask=live_column)
        tl.store(dbias_ptr + partial, bias_sum, mask=live_column)


def default_config(dim: int) -> Config:
    """Rows (``block_m``) and columns (``block_n``) of a tile, for tokens of ``dim`` elements."""
    columns = max(16, next_power_of_2(dim))
    rows = max(1, min(16, TILE_ELEMENTS // columns))
    return Config(rows, columns, num_warps=min(16, max(4, columns * rows // 512)), num_stages=1)


def _strides(tensor: Tensor) -> tuple[int, int]:
    """Strides between samples and between tokens; 0 for the latter when one row serves the whole sample."""
    return tensor.stride(0), 0 if tensor.shape[1] == 1 else tensor.stride(1)


@on_their_device
def adaln_forward(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    x1: Tensor,
    h: Tensor,
    mean: Tensor,
    rstd: Tensor,
    *,
    eps: float,
) -> None:
    """Fill ``x1`` (when ``y`` and ``gate`` are given) and ``h``, ``mean``, ``rstd`` (when ``shift`` and ``scale`` are).

    x, y, x1, h: ``(batch, tokens, dim)``, the outputs contiguous; gate, shift, scale: ``(batch, 1 | tokens, dim)``;
    weight and bias ``(dim,)``, both or neither; mean, rstd: ``(batch, tokens)``. Every last stride is 1.
    """
    batch, tokens, dim = x.shape
    if x.numel() == 0:
        return
    config = pick_config("adaln_forward", default_config(dim), head_dim=dim, dtype=x.dtype)
    y_, gate_, shift_, scale_ = (x if t is None else t for t in (y, gate, shift, scale))
    adaln_forward_kernel[(batch * triton.cdiv(tokens, config.block_m),)](
        x,
        y_,
        gate_,
        shift_,
        scale_,
        x if weight is None else weight,
        x if bias is None else bias,
        x1,
        h,
        mean,
        rstd,
        tokens,
        eps,
        x.stride(0),
        x.stride(1),
        y_.stride(0),
        y_.stride(1),
        *_strides(gate_),
        *_strides(shift_),
        *_strides(scale_),
        DIM=dim,
        BLOCK=config.block_n,
        ROWS=config.block_m,
        GATED=y is not None,
        NORMED=shift is not None,
        AFFINE=weight is not None,
        ACC=tl.float64 if x.dtype == torch.float64 else tl.float32,
        num_warps=config.num_warps,
    )


def split_tokens(batch: int, tokens: int, rows: int) -> tuple[int, int]:
    """Backward programs per sample, and tokens of each: from the shapes alone, so that the sums keep their order."""
    tiles = triton.cdiv(tokens, rows)
    programs = max(1, min(tiles, BACKWARD_PROGRAMS // max(batch, 1)))
    tokens_per_program = max(1, triton.cdiv(tiles, programs)) * rows
    return max(1, triton.cdiv(tokens, tokens_per_program)), tokens_per_program


@on_their_device
def adaln_backward(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    grad_x1: Tensor | None,
    grad_h: Tensor | None,
) -> list[Tensor]:
    """Gradients for x, y, gate, shift, scale, weight, bias; empty where the forward had none.

    Arguments as the forward's; x1 is recomputed from x, y and gate, unrounded. ``grad_x1`` and ``grad_h`` are
    contiguous.
    """
    batch, tokens, dim = x.shape
    config = pick_config("adaln_backward", default_config(dim), head_dim=dim, dtype=x.dtype)
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    programs, tokens_per_program = split_tokens(batch, tokens, config.block_m)
    gate_per_token = gate is not None and gate.shape[1] != 1
    modulation_per_token = scale is not None and scale.shape[1] != 1

    def full(like: Tensor | None) -> Tensor:
        return x.new_empty(0) if like is None else x.new_empty(x.shape, dtype=like.dtype)

    def reduced(like: Tensor | None, per_token: bool) -> Tensor:
        if like is None or per_token:
            return full(like)
        return x.new_empty((batch, programs, dim), dtype=accumulate)

    grads = [full(x), full(y), reduced(gate, gate_per_token)]
    grads += [reduced(scale, modulation_per_token), reduced(scale, modulation_per_token)]
    grads += [reduced(weight, False), reduced(bias, False)]
    y_, gate_, scale_ = (x if t is None else t for t in (y, gate, scale))
    if x.numel() == 0:
        grads = [grad.zero_() for grad in grads]
    else:
        adaln_backward_kernel[(batch * programs,)](
            x,
            y_,
            gate_,
            scale_,
            x if weight is None else weight,
            x if bias is None else bias,
            mean,
            rstd,
            x if grad_x1 is None else grad_x1,
            x if grad_h is None else grad_h,
            *grads,
            tokens,
            tokens_per_program,
            programs,
            x.stride(0),
            x.stride(1),
            y_.stride(0),
            y_.stride(1),
            *_strides(gate_),
            *_strides(scale_),
            DIM=dim,
            BLOCK=config.block_n,
            ROWS=config.block_m,
            GATED=y is not None,
            NORMED=scale is not None,
            AFFINE=weight is not None,
            GATE_PER_TOKEN=gate_per_token,
            MODULATION_PER_TOKEN=modulation_per_token,
            ACC=tl.float64 if x.dtype == torch.float64 else tl.float32,
            num_warps=config.num_warps,
        )
    per_token = (True, True, gate_per_token, modulation_per_token, modulation_per_token)
    sources = (x, y, gate, scale, scale)
    summed = [
        grad if source is None or whole else grad.sum(1, keepdim=True).to(source.dtype)
        for grad, source, whole in zip(grads, sources, per_token)
    ]
    affine = [
        grad if source is None else grad.sum((0, 1)).to(source.dtype) for grad, source in zip(grads[5:], (weight, bias))
    ]
    return summed + affine
