"""The adaptive layer norm ops: reference, Triton kernels in the interpreter, gradients, compilers."""

import pytest
import torch
from torch import Tensor

from sparing.kernels import BackendUnsupported, explain, gate_residual, gate_residual_ln_modulate, ln_modulate
from sparing.kernels.dispatch import interpreting

needs_kernel = pytest.mark.skipif(
    not (interpreting() or torch.cuda.is_available()), reason="Triton needs CUDA or the interpreter"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# float32 sums of a few dozen terms in another order; the interpreter truncates to bfloat16 where a GPU rounds.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 1e-3}


def _inputs(
    batch: int,
    tokens: int,
    dim: int,
    *,
    per_token: bool = False,
    affine: bool = False,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """x, y, gate, shift, scale and, if asked, weight, bias: leaves on the test device."""
    generator = torch.Generator().manual_seed(batch + 3 * tokens + 7 * dim)
    rows = tokens if per_token else 1
    shapes = [(batch, tokens, dim)] * 2 + [(batch, rows, dim)] * 3 + [(dim,)] * (2 if affine else 0)
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    return [value.to(DEVICE, dtype).requires_grad_() for value in values]


def _error(result: Tensor, wanted: Tensor) -> float:
    return ((result - wanted).norm() / wanted.norm().clamp(min=1e-12)).item()


def _run(op, arguments: list[Tensor], backend: str) -> list[Tensor]:
    """Outputs and gradients of a fixed scalar of them."""
    outputs = op(*arguments, backend=backend)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    weights = [torch.linspace(-1, 2, out.numel(), device=out.device, dtype=out.dtype).view_as(out) for out in outputs]
    loss = sum((out * weight).sum() for out, weight in zip(outputs, weights))
    return [*outputs, *torch.autograd.grad(loss, arguments)]


def _arguments(op, inputs: list[Tensor]) -> list[Tensor]:
    if op is gate_residual:
        return inputs[:3]
    return [inputs[0], *inputs[3:]] if op is ln_modulate else inputs


OPS = (gate_residual, ln_modulate, gate_residual_ln_modulate)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
def test_the_reference_equals_torch_layer_norm(op, affine):
    inputs = _inputs(2, 5, 12, affine=affine, dtype=torch.float64)
    x, y, gate, shift, scale = inputs[:5]
    weight, bias = inputs[5:] if affine else (None, None)
    x1 = x if op is ln_modulate else x + gate * y
    h = torch.nn.functional.layer_norm(x1, (12,), weight, bias, 1e-6) * (1 + scale) + shift
    wanted = {gate_residual: [x1], ln_modulate: [h], gate_residual_ln_modulate: [x1, h]}[op]
    result = op(*_arguments(op, inputs), backend="reference")
    for got, want in zip(result if isinstance(result, tuple) else [result], wanted):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@needs_kernel
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 5, 37), {}),
        ((1, 1, 16), {"affine": True}),
        ((3, 21, 80), {"per_token": True}),
        ((2, 7, 130), {"affine": True, "per_token": True}),
    ],
    ids=["odd", "one token", "per token", "per token affine"],
)
def test_the_kernels_equal_the_reference_forward_and_backward(op, dtype, shape, options):
    inputs = _inputs(*shape, **options, dtype=dtype)
    arguments = _arguments(op, inputs)
    wanted = _run(op, [a.detach().double().requires_grad_() for a in arguments], "reference")
    for got, want in zip(_run(op, arguments, "triton"), wanted):
        assert got.dtype == dtype
        assert _error(got.double(), want) <= TOLERANCE[dtype] * 2


@needs_kernel
def test_a_large_mean_does_not_cost_the_variance_its_digits():
    x, _, _, shift, scale = _inputs(1, 3, 48)
    x = (x.detach() + 1024.0).requires_grad_()
    wanted = ln_modulate(x.double(), shift.double(), scale.double(), backend="reference")
    for backend in ("reference", "triton"):
        # the rounding of the mean itself costs 5e-5; a one-pass variance costs 1e-1 here
        assert _error(ln_modulate(x, shift, scale, backend=backend).double(), wanted) < 2e-4


@needs_kernel
def test_strided_inputs_between_nan_guards_are_read_in_place_and_every_output_is_written():
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        x, y, gate, shift, scale = _inputs(2, 5, 20)
        guarded = []
        for tensor in (x, y):
            buffer = torch.full((2, 9, 33), float("nan"), device=DEVICE)
            buffer[:, 2:7, 5:25] = tensor.detach()
            guarded.append(buffer[:, 2:7, 5:25].requires_grad_())
        wanted = _run(gate_residual_ln_modulate, [x, y, gate, shift, scale], "reference")
        got = _run(gate_residual_ln_modulate, [*guarded, gate, shift, scale], "triton")
        assert max(_error(a, b) for a, b in zip(got, wanted)) < 2e-6
    finally:
        torch.use_deterministic_algorithms(False)


@needs_kernel
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_broadcast_batches_mixed_layouts_and_mixed_dtypes(backend):
    x, y, gate, shift, scale = _inputs(3, 4, 24, per_token=True)
    shift, scale, gate = shift[:1, :1], scale.bfloat16(), gate[:1]
    leaves = [t.detach().requires_grad_() for t in (x, y, gate, shift, scale)]
    expanded = [t.detach().float().expand(3, 4, 24).clone().requires_grad_() for t in leaves]
    got, want = (_run(gate_residual_ln_modulate, t, b) for t, b in ((leaves, backend), (expanded, "reference")))
    assert [t.dtype for t in got[:2]] == [torch.float32] * 2
    for leaf, grad, full in zip(leaves, got[2:], want[2:]):
        assert grad.dtype == leaf.dtype
        assert _error(grad.float(), full.sum_to_size(leaf.shape)) < (1e-2 if leaf.dtype == torch.bfloat16 else 2e-6)
    assert _error(got[1], want[1]) < 2e-6


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_kernel)])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_gradcheck_in_float64(op, backend):
    arguments = _arguments(op, _inputs(2, 3, 18, affine=True, dtype=torch.float64))
    arguments = arguments[:3] if op is gate_residual else arguments
    assert torch.autograd.gradcheck(lambda *t: op(*t, backend=backend), arguments, fast_mode=True)


@needs_kernel
@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)], ids=["no samples", "no tokens"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_empty_batches_give_empty_outputs_and_zero_gradients(shape, backend):
    inputs = _inputs(*shape)
    got = _run(gate_residual_ln_modulate, inputs, backend)
    assert [t.shape for t in got] == [inputs[0].shape] * 2 + [t.shape for t in inputs]
    assert all(t.abs().sum() == 0 for t in got)


@needs_kernel
def test_samples_do_not_touch_each_other_and_two_runs_give_the_same_bits():
    inputs = _inputs(3, 33, 20)
    first, second = (_run(gate_residual_ln_modulate, inputs, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    alone = _run(gate_residual_ln_modulate, [t.detach()[1:2].requires_grad_() for t in inputs], "triton")
    assert torch.equal(alone[0], first[0][1:2])
    assert torch.equal(alone[1], first[1][1:2])


@needs_kernel
def test_the_custom_ops_pass_opcheck():
    x, y, gate, shift, scale, weight, bias = _inputs(2, 3, 20, affine=True)
    forward = torch.ops.sparing.adaln_fwd.default
    torch.library.opcheck(forward, (x, y, gate, shift, scale, weight, bias, 1e-6))
    torch.library.opcheck(forward, (x, None, None, shift, scale, None, None, 1e-6))
    _, h, mean, rstd = (t.detach() for t in forward(x, y, gate, shift, scale, weight, bias, 1e-6))
    with torch.no_grad():
        plain = [t.detach() for t in (x, y, gate, scale, weight, bias)]
        torch.library.opcheck(torch.ops.sparing.adaln_bwd.default, (h, h, *plain, mean, rstd, 1e-6))


@pytest.mark.parametrize("backend", ["auto", pytest.param("triton", marks=needs_kernel)])
def test_compiles_to_one_graph_and_exports_with_dynamic_sizes(backend):
    class Block(torch.nn.Module):
        def forward(self, x, y, gate, shift, scale):
            x1, h = gate_residual_ln_modulate(x, y, gate, shift, scale, backend=backend)
            return gate_residual(x1, ln_modulate(h, shift, scale, backend=backend), gate, backend=backend)

    inputs = _inputs(2, 5, 20)
    wanted = Block()(*inputs)
    compiled = torch.compile(Block(), backend="aot_eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(*inputs), wanted)
    compiled(*inputs).sum().backward()
    batch, tokens = torch.export.Dim("batch", min=2), torch.export.Dim("tokens", min=2)
    long, short = {0: batch, 1: tokens}, {0: batch}
    detached = tuple(t.detach() for t in inputs)
    exported = torch.export.export(Block(), detached, dynamic_shapes=(long, long, short, short, short)).module()
    other = tuple(t.detach() for t in _inputs(3, 9, 20))
    torch.testing.assert_close(exported(*other), Block()(*other))


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_kernel)])
def test_autocast_leaves_the_statistics_in_float32(backend):
    inputs = _inputs(2, 5, 20)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        x1, h = gate_residual_ln_modulate(*inputs, backend=backend)
    wanted = gate_residual_ln_modulate(*inputs, backend="reference")
    torch.testing.assert_close((x1, h), wanted)


def test_wrong_shapes_are_named():
    x, y, gate, shift, scale = _inputs(2, 5, 20)
    with pytest.raises(ValueError, match=r"scale has shape \(2, 1, 19\)"):
        ln_modulate(x, shift, scale[..., :19])
    with pytest.raises(ValueError, match=r"y has shape \(2, 4, 20\)"):
        gate_residual(x, y[:, :4], gate)
    with pytest.raises(ValueError, match="weight has shape"):
        ln_modulate(x, shift, scale, torch.ones(3))


@needs_kernel
def test_the_kernel_refuses_in_words_what_it_cannot_read():
    x, _, _, shift, scale = _inputs(2, 20, 20)
    with pytest.raises(BackendUnsupported, match="last stride"):
        ln_modulate(x.transpose(1, 2), shift, scale, backend="triton")
    with pytest.raises(BackendUnsupported, match="float64 mixed"):
        ln_modulate(x, shift.double(), scale, backend="triton")


def test_auto_leaves_the_formula_to_the_compiler_and_to_the_reference_on_a_cpu():
    x, _, _, shift, scale = (t.detach().cpu() for t in _inputs(2, 5, 20))
    assert explain(ln_modulate, x, shift, scale).chosen == "reference"


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [384, 1152, 3072])
def test_published_sizes_on_a_gpu(dim):
    inputs = _inputs(8, 256, dim, dtype=torch.bfloat16)
    wanted = _run(gate_residual_ln_modulate, [t.detach().double().requires_grad_() for t in inputs], "reference")
    first, second = (_run(gate_residual_ln_modulate, inputs, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert max(_error(got.double(), want) for got, want in zip(first, wanted)) < 6e-3
