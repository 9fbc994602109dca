"""Adaptive layer norm of diffusion transformers (DiT, "Scalable Diffusion Models with Transformers", section 3.2,
adaLN-Zero).

Three ops on tokens ``x: (batch, tokens, dim)`` with per-sample ``(batch, 1, dim)`` or per-token ``(batch, tokens,
dim)`` modulation:

* ``ln_modulate``: ``LN(x) * (1 + scale) + shift``
* ``gate_residual``: ``x + gate * y``
* ``gate_residual_ln_modulate``: ``x1 = x + gate * y`` and ``h = LN(x1) * (1 + scale) + shift``, reading x and y once

Statistics are float32 (float64 for float64 inputs) and two-pass, mean first and then the centred variance: the
one-pass form loses every digit when the mean is large. The fused op normalises x1 before it is rounded to a 16-bit
type.
"""

from typing import Any

import torch
from einops import reduce
from torch import Tensor

from sparing.kernels.dispatch import define_op, register_impl, run, triton_here

# Wider rows spill registers in the backward kernel on sm_90 (offline compile); published models end at 3072.
_MAX_DIM = 4096

__all__ = ["gate_residual", "gate_residual_ln_modulate", "ln_modulate"]


def _compute_dtype(*tensors: Tensor | None) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of the result, as type promotion gives it, and that of the arithmetic."""
    result = tensors[0].dtype  # type: ignore[union-attr]
    for tensor in tensors[1:]:
        if tensor is not None:
            result = torch.promote_types(result, tensor.dtype)
    return result, torch.float64 if result == torch.float64 else torch.float32


def _normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``(x - mean) * rstd`` over the last axis, with mean and rstd ``(batch, tokens)``."""
    mean = reduce(x, "b l c -> b l 1", "mean")
    centred = x - mean
    rstd = torch.rsqrt(reduce(centred.square(), "b l c -> b l 1", "mean") + eps)
    return centred * rstd, mean[..., 0], rstd[..., 0]


def _modulate(
    normalised: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if weight is not None:
        normalised = normalised * weight.to(dtype)
    if bias is not None:
        normalised = normalised + bias.to(dtype)
    return normalised * (1 + scale.to(dtype)) + shift.to(dtype)


def gate_residual_reference(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """The definition of ``gate_residual``."""
    result, compute = _compute_dtype(x, y, gate)
    return (x.to(compute) + gate.to(compute) * y.to(compute)).to(result)


def ln_modulate_reference(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of ``ln_modulate``: h, mean and rstd."""
    result, compute = _compute_dtype(x, shift, scale, weight, bias)
    normalised, mean, rstd = _normalise(x.to(compute), eps)
    return _modulate(normalised, shift, scale, weight, bias, compute).to(result), mean, rstd


def gate_residual_ln_modulate_reference(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition of ``gate_residual_ln_modulate``: x1, h, mean and rstd of x1."""
    residual, _ = _compute_dtype(x, y, gate)
    result, compute = _compute_dtype(x, y, gate, shift, scale, weight, bias)
    x1 = x.to(compute) + gate.to(compute) * y.to(compute)
    normalised, mean, rstd = _normalise(x1, eps)
    return x1.to(residual), _modulate(normalised, shift, scale, weight, bias, compute).to(result), mean, rstd


def gate_residual(x: Tensor, y: Tensor, gate: Tensor, *, backend: str = "auto") -> Tensor:
    """``x + gate * y``.

    Args:
        x: residual stream ``(batch, tokens, dim)``.
        y: output of the branch, same shape.
        gate: ``(batch, 1, dim)`` or ``(batch, tokens, dim)``; a batch of 1 is broadcast.
        backend: ``'auto'``, ``'triton'`` or ``'reference'``.

    Returns:
        ``(batch, tokens, dim)``, in the dtype that the inputs promote to.

    Raises:
        ValueError: shapes that do not fit.
        BackendUnsupported: the named backend cannot serve; the message says why.
    """
    _check_tokens(x, y=y)
    _check_modulation(x, gate=gate)
    return run("gate_residual", backend, x, y, gate)


def ln_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """``LayerNorm(x) * (1 + scale) + shift``.

    Args:
        x: ``(batch, tokens, dim)``.
        shift: ``(batch, 1, dim)`` or ``(batch, tokens, dim)``; a batch of 1 is broadcast.
        scale: likewise.
        weight: ``(dim,)``, the affine weight of the norm; ``None`` in DiT.
        bias: ``(dim,)``, its bias.
        eps: added to the variance.
        backend: ``'auto'``, ``'triton'`` or ``'reference'``.

    Returns:
        ``(batch, tokens, dim)``, in the dtype that the inputs promote to.

    Raises:
        ValueError: shapes that do not fit.
        BackendUnsupported: the named backend cannot serve; the message says why.
    """
    _check_tokens(x)
    _check_modulation(x, shift=shift, scale=scale)
    _check_affine(x, weight=weight, bias=bias)
    return run("ln_modulate", backend, x, shift, scale, weight, bias, eps=eps)[0]


def gate_residual_ln_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``x1 = x + gate * y`` and ``h = LayerNorm(x1) * (1 + scale) + shift`` in one pass.

    Args:
        x: residual stream ``(batch, tokens, dim)``.
        y: output of the branch, same shape.
        gate: ``(batch, 1, dim)`` or ``(batch, tokens, dim)``; a batch of 1 is broadcast.
        shift: likewise.
        scale: likewise.
        weight: ``(dim,)``, the affine weight of the norm; ``None`` in DiT.
        bias: ``(dim,)``, its bias.
        eps: added to the variance.
        backend: ``'auto'``, ``'triton'`` or ``'reference'``.

    Returns:
        ``(x1, h)``, each ``(batch, tokens, dim)``, in the dtypes that their inputs promote to. The norm sees x1
        before it is rounded.

    Raises:
        ValueError: shapes that do not fit.
        BackendUnsupported: the named backend cannot serve; the message says why.
    """
    _check_tokens(x, y=y)
    _check_modulation(x, gate=gate, shift=shift, scale=scale)
    _check_affine(x, weight=weight, bias=bias)
    x1, h, _, _ = run("gate_residual_ln_modulate", backend, x, y, gate, shift, scale, weight, bias, eps=eps)
    return x1, h


def _check_tokens(x: Tensor, **others: Tensor) -> None:
    if x.ndim != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (batch, tokens, dim)")
    for name, other in others.items():
        if other.shape != x.shape:
            raise ValueError(f"{name} has shape {tuple(other.shape)}; expected that of x, {tuple(x.shape)}")


def _check_modulation(x: Tensor, **modulations: Tensor) -> None:
    batch, tokens, dim = x.shape
    for name, value in modulations.items():
        fits = (
            value.ndim == 3 and value.shape[0] in (1, batch) and value.shape[1] in (1, tokens) and value.shape[2] == dim
        )
        if not fits:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; expected ({batch}, 1, {dim}) or ({batch}, {tokens}, {dim})"
            )


def _check_affine(x: Tensor, **affine: Tensor | None) -> None:
    for name, value in affine.items():
        if value is not None and value.shape != x.shape[2:]:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; expected ({x.shape[2]},)")


def _order(x: Tensor, *args: Any, **kwargs: Any) -> tuple[str, ...]:
    # Inductor fuses the reference formula into one pass itself, and sees through it.
    eager_cuda = x.device.type == "cuda" and not torch.compiler.is_compiling()
    return ("triton", "reference") if eager_cuda else ("reference",)


def _triton_supports(x: Tensor, *args: Tensor | None, **kwargs: Any) -> list[str]:
    reasons = []
    tensors = [t for t in (x, *args) if t is not None]
    kinds = {t.dtype for t in tensors}
    if not all(kind in (torch.float32, torch.bfloat16, torch.float16, torch.float64) for kind in kinds):
        reasons.append(f"dtypes {sorted(map(str, kinds))}; takes float32, bfloat16, float16 and float64")
    if torch.float64 in kinds and len(kinds) > 1:
        reasons.append(f"float64 mixed with {sorted(str(kind) for kind in kinds - {torch.float64})}")
    if x.shape[2] > _MAX_DIM:
        reasons.append(f"dim {x.shape[2]} > {_MAX_DIM}: a row does not fit the registers of one program")
    if any(t.shape == x.shape and t.ndim == 3 and t.stride(2) != 1 for t in tensors):
        reasons.append("the last stride of x, y or a per-token modulation is not 1")
    return reasons


# Both Triton kernels as one pair of custom ops: compilers see opaque nodes with known shapes. What a call does not
# ask for comes back empty. Where no kernel can run (an exported graph loaded on a plain CPU) the nodes compute the
# reference.


@torch.library.custom_op("sparing::adaln_fwd", mutates_args=())
def _adaln_fwd(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _adaln_fwd_fake(x, y, gate, shift, scale, weight, bias, eps)
    if triton_here(x.device):
        values = _composed(x, y, gate, shift, scale, weight, bias, eps)
        return tuple(out if value is None else value for out, value in zip(outputs, values))  # type: ignore[return-value]
    from sparing.kernels.triton.adaln import adaln_forward

    adaln_forward(x, y, gate, shift, scale, weight, bias, *outputs, eps=eps)
    return outputs


@_adaln_fwd.register_fake
def _adaln_fwd_fake(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    result, compute = _compute_dtype(x, y, gate, shift, scale, weight, bias)
    x1 = x.new_empty(0 if y is None else x.shape, dtype=_compute_dtype(x, y, gate)[0])
    h = x.new_empty(0 if shift is None else x.shape, dtype=result)
    mean = x.new_empty(0 if shift is None else x.shape[:2], dtype=compute)
    return x1, h, mean, torch.empty_like(mean)


@torch.library.custom_op("sparing::adaln_bwd", mutates_args=())
def _adaln_bwd(
    grad_x1: Tensor | None,
    grad_h: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
) -> list[Tensor]:
    if triton_here(x.device):
        inputs = (x, y, gate, scale if scale is None else torch.zeros_like(scale), scale, weight, bias)
        return _reference_gradients(grad_x1, grad_h, inputs, eps)
    from sparing.kernels.triton.adaln import adaln_backward

    return adaln_backward(x, y, gate, scale, weight, bias, mean, rstd, grad_x1, grad_h)


@_adaln_bwd.register_fake
def _adaln_bwd_fake(
    grad_x1: Tensor | None,
    grad_h: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
) -> list[Tensor]:
    of = (x, y, gate, scale, scale, weight, bias)
    return [x.new_empty(0) if t is None else x.new_empty(t.shape, dtype=t.dtype) for t in of]


def _composed(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The reference of whichever of the three ops the arguments describe: x1, h, mean, rstd."""
    if y is None or gate is None:
        return None, *ln_modulate_reference(x, shift, scale, weight, bias, eps)  # type: ignore[arg-type]
    if shift is None or scale is None:
        return gate_residual_reference(x, y, gate), None, None, None
    return gate_residual_ln_modulate_reference(x, y, gate, shift, scale, weight, bias, eps)


def _reference_gradients(
    grad_x1: Tensor | None, grad_h: Tensor | None, inputs: tuple[Tensor | None, ...], eps: float
) -> list[Tensor]:
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
        x1, h, _, _ = _composed(*leaves, eps)  # type: ignore[arg-type, call-arg]
        pairs = [(out, grad) for out, grad in ((x1, grad_x1), (h, grad_h)) if out is not None and grad is not None]
        wanted = [leaf for leaf in leaves if leaf is not None]
        found = iter(torch.autograd.grad([out for out, _ in pairs], wanted, [grad for _, grad in pairs]))
    return [inputs[0].new_empty(0) if leaf is None else next(found).contiguous() for leaf in leaves]  # type: ignore[union-attr]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, gate, shift, scale, weight, bias, eps = inputs
    ctx.save_for_backward(x, y, gate, scale, weight, bias, output[2], output[3])
    ctx.mark_non_differentiable(output[2], output[3])
    ctx.eps, ctx.shift_dtype = eps, None if shift is None else shift.dtype


def _backward(ctx: Any, grad_x1: Tensor | None, grad_h: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    x, y, gate, scale, weight, bias, mean, rstd = ctx.saved_tensors
    grad_x1 = None if y is None else torch.zeros_like(x) if grad_x1 is None else grad_x1.contiguous()
    grad_h = None if scale is None else torch.zeros_like(x) if grad_h is None else grad_h.contiguous()
    grads = _adaln_bwd(grad_x1, grad_h, x, y, gate, scale, weight, bias, mean, rstd, ctx.eps)
    present = (x, y, gate, scale, scale, weight, bias)
    return *(None if of is None else grad for of, grad in zip(present, grads)), None


_adaln_fwd.register_autograd(_backward, setup_context=_save)


def _as_one(batch: int, tokens: int, *modulations: Tensor) -> list[Tensor]:
    """Modulations of one dtype and one layout, ``(batch, 1 | tokens, dim)``; expansion and cast carry the gradient."""
    dtype = _compute_dtype(*modulations)[0]
    length = max(m.shape[1] for m in modulations)
    return [
        m.to(dtype).expand(batch, length, -1) for m in (m if m.stride(2) == 1 else m.contiguous() for m in modulations)
    ]


def _gate_residual_triton(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    (gate,) = _as_one(x.shape[0], x.shape[1], gate)
    return _adaln_fwd(x, y, gate, None, None, None, None, 0.0)[0]


def _ln_modulate_triton(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    shift, scale = _as_one(x.shape[0], x.shape[1], shift, scale)
    weight, bias = _affine(x, weight, bias)
    return _adaln_fwd(x, None, None, shift, scale, weight, bias, eps)[1:]


def _gate_residual_ln_modulate_triton(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (gate,) = _as_one(x.shape[0], x.shape[1], gate)
    shift, scale = _as_one(x.shape[0], x.shape[1], shift, scale)
    weight, bias = _affine(x, weight, bias)
    return _adaln_fwd(x, y, gate, shift, scale, weight, bias, eps)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Both or neither: the kernels take the pair."""
    if weight is None and bias is None:
        return None, None
    weight = x.new_ones(x.shape[2]) if weight is None else weight
    bias = torch.zeros_like(weight) if bias is None else bias
    dtype = torch.promote_types(weight.dtype, bias.dtype)
    return weight.to(dtype).contiguous(), bias.to(dtype).contiguous()


for _name, _public, _reference, _kernel in (
    ("gate_residual", gate_residual, gate_residual_reference, _gate_residual_triton),
    ("ln_modulate", ln_modulate, ln_modulate_reference, _ln_modulate_triton),
    (
        "gate_residual_ln_modulate",
        gate_residual_ln_modulate,
        gate_residual_ln_modulate_reference,
        _gate_residual_ln_modulate_triton,
    ),
):
    define_op(_public, order=_order)
    register_impl(_name, "triton", _kernel, supports=_triton_supports, here=triton_here)
    register_impl(_name, "reference", _reference)
