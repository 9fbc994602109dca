"""Dense and packed attention: masks, empty rows, sizes, gradients, and the two mask conventions."""

import pytest
import torch

from sparing.kernels import BackendUnsupported, attention, attention_weights, merge_attention, varlen_attention
from sparing.kernels.masks import causal_mask

BACKENDS = ("reference", "sdpa")


def _qkv(m=6, n=9, d=8, dv=8, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = ((2, 3, m, d), (2, 3, n, d), (2, 3, n, dv))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fully_masked_row_gives_zero_and_no_gradient(backend):
    q, k, v = _qkv()
    padded = torch.zeros(2, 9, dtype=torch.bool)
    padded[1] = True
    out = attention(q, k, v, key_padding_mask=padded, backend=backend)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(torch.equal(g[1], torch.zeros_like(g[1])) and torch.isfinite(g).all() for g in grads)


def test_the_lse_of_an_empty_row_is_minus_infinity_and_carries_no_gradient():
    q, k, v = _qkv(m=9, n=6)
    out, lse = attention(q, k, v, causal=True, return_lse=True)
    assert torch.isneginf(lse[:, :, :3]).all()
    assert torch.isfinite(lse[:, :, 3:]).all()
    assert not lse.requires_grad
    assert torch.equal(out[:, :, :3], torch.zeros_like(out[:, :, :3]))


def test_causal_is_aligned_bottom_right():
    assert causal_mask(2, 4, device=torch.device("cpu")).tolist() == [[True, True, True, False], [True] * 4]
    q, k, v = _qkv(m=2, n=4)
    weights = attention_weights(q, k, causal=True)
    assert torch.equal(weights[..., 0, 3], torch.zeros(2, 3, dtype=torch.float64))
    assert (weights[..., 1, 3] > 0).all()
    outs = [attention(q, k, v, causal=True, backend=backend) for backend in BACKENDS]
    torch.testing.assert_close(*outs)


def test_padding_and_lengths_are_two_words_for_the_same():
    q, k, v = _qkv()
    kv_len = torch.tensor([4, 9])
    padded = torch.arange(9) >= kv_len[:, None]  # True = padded, torch's convention
    by_len = attention(q, k, v, kv_len=kv_len)
    torch.testing.assert_close(by_len, attention(q, k, v, key_padding_mask=padded))
    torch.testing.assert_close(by_len[:1], attention(q[:1], k[:1, :, :4], v[:1, :, :4]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 9), (2, 3, 6, 9), (1, 3, 6, 9), (2, 1, 1, 9)])
def test_the_gradient_of_a_broadcast_bias_is_summed(backend, shape):
    q, k, v = _qkv()
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    full = bias.detach().expand(2, 3, 6, 9).clone().requires_grad_()
    small = torch.autograd.grad(attention(q, k, v, bias=bias, backend=backend).square().sum(), bias)[0]
    large = torch.autograd.grad(attention(q, k, v, bias=full, backend="reference").square().sum(), full)[0]
    torch.testing.assert_close(small, large.sum_to_size(shape))


def test_gradcheck_of_the_reference_with_bias_and_lengths():
    q, k, v = _qkv(m=3, n=4, d=4, dv=3)
    bias = torch.randn(1, 3, 1, 4, dtype=torch.float64, requires_grad=True)
    kv_len = torch.tensor([3, 0])
    assert torch.autograd.gradcheck(
        lambda *t: attention(*t[:3], bias=t[3], kv_len=kv_len, backend="reference"), (q, k, v, bias), fast_mode=True
    )


def test_weights_sum_to_one_and_reproduce_the_output():
    q, k, v = _qkv()
    weights = attention_weights(q, k, kv_len=torch.tensor([5, 0]))
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(3, 6, dtype=torch.float64))
    assert torch.equal(weights[1], torch.zeros_like(weights[1]))
    torch.testing.assert_close(weights @ v, attention(q, k, v, kv_len=torch.tensor([5, 0])))


def test_invariances_permuted_keys_appended_hidden_keys_and_samples_alone():
    q, k, v = _qkv()
    out = attention(q, k, v)
    order = torch.randperm(9)
    torch.testing.assert_close(out, attention(q, k[:, :, order], v[:, :, order]))
    more_k, more_v = torch.cat([k, k + 9], 2), torch.cat([v, v * 1e3], 2)
    torch.testing.assert_close(out, attention(q, more_k, more_v, kv_len=torch.tensor([9, 9])))
    torch.testing.assert_close(out[1:], attention(q[1:], k[1:], v[1:]))


def test_partial_attentions_merge_to_the_whole_and_an_empty_one_weighs_nothing():
    q, k, v = _qkv()
    parts = [attention(q, k[:, :, s], v[:, :, s], return_lse=True) for s in (slice(0, 2), slice(2, 9), slice(0, 0))]
    out, lse = merge_attention([o for o, _ in parts], [s for _, s in parts])
    whole, whole_lse = attention(q, k, v, return_lse=True)
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(lse, whole_lse)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "m", "n"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_zero_sizes(backend, batch, m, n):
    q, k, v = torch.ones(batch, 2, m, 8, requires_grad=True), torch.ones(batch, 2, n, 8), torch.ones(batch, 2, n, 4)
    out = attention(q, k, v, backend=backend)
    assert torch.equal(out, torch.zeros(batch, 2, m, 4))
    assert torch.equal(torch.autograd.grad(out.sum(), q)[0], torch.zeros_like(q))


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_of_a_fused_projection_need_no_copy(backend):
    qkv = torch.randn(2, 5, 3, 4, 8)
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    out = attention(q, k, v, backend=backend)
    torch.testing.assert_close(out, attention(q.contiguous(), k.contiguous(), v.contiguous()), rtol=1e-5, atol=1e-6)


def test_dropout_drops_weights_and_keeps_the_mean():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 64, 8)
    v = torch.ones(1, 1, 64, 1)
    outs = torch.stack([attention(q, k, v, dropout_p=0.5, backend="reference") for _ in range(400)])
    assert outs.std() > 0.05
    assert abs(outs.mean() - 1) < 0.05


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_casts_the_inputs_and_leaves_the_arithmetic_alone(autocast):
    q, k, v = (t.detach().float() for t in _qkv())
    with torch.autocast("cpu", dtype=autocast):
        for backend in BACKENDS:
            assert attention(q, k, v, backend=backend).dtype == autocast
        exact, lse = attention(q, k, v, return_lse=True)
    wanted = attention(*(t.to(autocast).double() for t in (q, k, v)))
    assert lse.dtype == torch.float32
    assert (exact.double() - wanted).norm() / wanted.norm() < 5e-3  # one rounding of the output, none inside


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"bias": torch.zeros(2, 3, 6, 8)},
            ValueError,
            r"bias must be \(1 or 2, 1 or 3, 1 or 6, 9\), got \(2, 3, 6, 8\)",
        ),
        ({"bias": torch.zeros(1, 1, 1, 9, dtype=torch.bool)}, TypeError, "floating point, got torch.bool"),
        ({"key_padding_mask": torch.zeros(2, 9)}, TypeError, "True = padded"),
        ({"kv_len": torch.zeros(3, dtype=torch.int32)}, ValueError, r"kv_len must be \(2,\)"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p must be in"),
    ],
)
def test_bad_arguments_are_named_with_what_is_accepted(change, error, message):
    with pytest.raises(error, match=message):
        attention(*_qkv(), **change)


def test_inputs_that_disagree_are_named():
    q, k, v = _qkv()
    with pytest.raises(ValueError, match=r"\(batch, heads, tokens, head_dim\)"):
        attention(q[0], k[0], v[0])
    with pytest.raises(TypeError, match="share one dtype"):
        attention(q.float(), k, v)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_segments_equal_attention_one_by_one(backend):
    torch.manual_seed(0)
    lengths_q, lengths_k = [3, 0, 2, 1], [2, 4, 0, 3]
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).int() for n in (lengths_q, lengths_k))
    q, k, v = torch.randn(6, 2, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 5)
    out = varlen_attention(q, k, v, cu_q, cu_k, 5, 4, causal=True, backend=backend)
    for i in range(4):
        rows, columns = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        one = attention(*(t.transpose(0, 1)[None] for t in (q[rows], k[columns], v[columns])), causal=True)
        torch.testing.assert_close(out[rows], one[0].transpose(0, 1), rtol=1e-5, atol=1e-6)


def test_packed_attention_without_queries_or_keys():
    none, some = torch.zeros(3, dtype=torch.int32), torch.tensor([0, 2, 2], dtype=torch.int32)
    q, k = torch.ones(2, 1, 4), torch.ones(0, 1, 4)
    out, lse = varlen_attention(q, k, k, some, none, 2, 2, return_lse=True)
    assert torch.equal(out, torch.zeros(2, 1, 4))
    assert torch.equal(lse, torch.full((1, 2), float("-inf")))
    assert varlen_attention(k, q, q, none, some, 2, 2).shape == (0, 1, 4)


def test_library_backends_say_why_they_refuse():
    q, k, v = (t.detach() for t in _qkv())
    cu = torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(BackendUnsupported, match=r"needs CUDA.*float64 is not served"):
        varlen_attention(*(torch.ones(2, 1, 8, dtype=torch.float64),) * 3, cu, cu, 2, 2, backend="varlen")
    with pytest.raises(BackendUnsupported, match=r"pad the last dim to 16"):
        attention(q, k, v, bias=torch.zeros(1, 1, 1, 9), backend="xformers")
    with pytest.raises(BackendUnsupported, match="no backward on CPU"):
        attention(*(t.float().requires_grad_() for t in (q, k, v)), backend="flex")
