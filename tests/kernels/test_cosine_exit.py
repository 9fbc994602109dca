"""The exit test: both readings of similarity, empty samples, survivors with and without a host read."""

import pytest
import torch
from torch import Tensor

from sparing.kernels import BackendUnsupported, cosine_exit, survivors
from sparing.kernels.dispatch import interpreting

needs_kernel = pytest.mark.skipif(
    not (interpreting() or torch.cuda.is_available()), reason="Triton needs CUDA or the interpreter"
)
BACKENDS = ["reference", pytest.param("triton", marks=needs_kernel)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _states(batch: int, tokens: int, dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch + tokens + dim)
    prev = torch.randn(batch, tokens, dim, generator=generator)
    change = torch.randn(batch, tokens, dim, generator=generator) * torch.linspace(0.1, 1.5, batch)[:, None, None]
    valid = torch.rand(batch, tokens, generator=generator) > 0.3
    return prev.to(DEVICE, dtype), (prev + change).to(DEVICE, dtype), valid.to(DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["mean", "flat"])
@pytest.mark.parametrize("shape", [(5, 21, 37), (1, 1, 1), (2, 70, 130)], ids=str)
def test_similarity_equals_torch_cosine_similarity_over_the_valid_tokens(backend, mode, shape):
    prev, cur, valid = _states(*shape)
    valid[-1] = True
    similarity, leaves = cosine_exit(prev, cur, valid, 0.9, mode, backend=backend)
    for sample in range(shape[0]):
        a, b = prev[sample][valid[sample]].double(), cur[sample][valid[sample]].double()
        if mode == "flat":
            a, b = a.reshape(1, -1), b.reshape(1, -1)
        wanted = torch.nn.functional.cosine_similarity(a, b, dim=1).mean() if len(a) else torch.tensor(0.0)
        assert similarity[sample].item() == pytest.approx(wanted.item(), abs=2e-6)
        assert leaves[sample].item() == (bool(valid[sample].any()) and similarity[sample].item() >= 0.9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["mean", "flat"])
def test_a_sample_without_valid_tokens_has_similarity_zero_and_never_exits(backend, mode):
    prev, cur, valid = _states(4, 6, 8)
    valid[2] = False
    prev[2], cur[2] = float("nan"), float("inf")  # what lies in padding is never read into the result
    similarity, leaves = cosine_exit(prev, cur, valid, -2.0, mode, backend=backend)
    assert similarity[2] == 0
    assert leaves.tolist() == [True, True, False, True]


@needs_kernel
@pytest.mark.parametrize("mode", ["mean", "flat"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_kernel_equals_the_reference_in_every_dtype(mode, dtype):
    prev, cur, valid = _states(4, 30, 48, dtype)
    got, wanted = (cosine_exit(prev, cur, valid, 0.8, mode, backend=b) for b in ("triton", "reference"))
    torch.testing.assert_close(got[0], wanted[0], rtol=2e-6, atol=2e-6)
    assert torch.equal(got[1], wanted[1])


@needs_kernel
def test_the_kernel_reads_strided_states_between_nan_guards_and_gives_the_same_bits_twice():
    prev, cur, valid = _states(3, 11, 20)
    buffers = [torch.full((3, 15, 29), float("nan"), device=DEVICE) for _ in range(2)]
    for buffer, states in zip(buffers, (prev, cur)):
        buffer[:, 2:13, 4:24] = states
    guarded = [buffer[:, 2:13, 4:24] for buffer in buffers]
    first, second = (cosine_exit(*guarded, valid, 0.8, backend="triton") for _ in range(2))
    assert torch.equal(first[0], second[0])
    torch.testing.assert_close(first[0], cosine_exit(prev, cur, valid, 0.8)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_thresholds_may_differ_by_sample_and_live_on_the_device(backend):
    prev, cur, valid = _states(3, 5, 8)
    similarity, _ = cosine_exit(prev, cur, valid, 0.5, backend=backend)
    limits = similarity + torch.tensor([0.0, 1e-3, -1e-3], device=DEVICE)
    assert cosine_exit(prev, cur, valid, limits, backend=backend)[1].tolist() == [True, False, True]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4, 8), (3, 0, 8)], ids=["no samples", "no tokens"])
def test_empty_states(backend, shape):
    prev, cur, valid = _states(*shape)
    similarity, leaves = cosine_exit(prev, cur, valid, 0.5, backend=backend)
    assert similarity.tolist() == [0.0] * shape[0]
    assert leaves.tolist() == [False] * shape[0]


def test_survivors_are_ascending_and_padded_to_a_capacity_without_a_host_read():
    exited = torch.tensor([True, False, False, True, False])
    index, count = survivors(exited)
    assert (index.tolist(), int(count)) == ([1, 2, 4], 3)
    assert survivors(exited, capacity=5)[0].tolist() == [1, 2, 4, -1, -1]
    assert survivors(exited, capacity=2)[0].tolist() == [1, 2]
    assert int(survivors(exited, capacity=2)[1]) == 3  # the count says that the capacity was too small
    assert survivors(torch.ones(2, dtype=torch.bool))[0].tolist() == []
    assert (index.dtype, count.dtype) == (torch.int32, torch.int32)


@needs_kernel
def test_the_custom_op_passes_opcheck():
    prev, cur, valid = _states(3, 5, 8)
    limit = torch.full((3,), 0.9, device=DEVICE)
    torch.library.opcheck(torch.ops.sparing.cosine_exit.default, (prev, cur, valid, limit, "mean", 1e-8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_to_one_graph_and_exports_with_dynamic_sizes(backend):
    class Exit(torch.nn.Module):
        def forward(self, prev, cur, valid):
            similarity, leaves = cosine_exit(prev, cur, valid, 0.9, backend=backend)
            return similarity, leaves, *survivors(leaves, capacity=4)

    inputs, other = _states(3, 5, 8), _states(6, 9, 8)
    compiled = torch.compile(Exit(), backend="aot_eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(*inputs), Exit()(*inputs))
    sizes = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("tokens", min=2)}
    exported = torch.export.export(Exit(), inputs, dynamic_shapes=(sizes, sizes, sizes)).module()
    torch.testing.assert_close(exported(*other), Exit()(*other))


def test_bad_arguments_are_named():
    prev, cur, valid = _states(3, 5, 8)
    with pytest.raises(ValueError, match="expected bool"):
        cosine_exit(prev, cur, valid.float(), 0.9)
    with pytest.raises(ValueError, match="mode is 'median'"):
        cosine_exit(prev, cur, valid, 0.9, "median")
    with pytest.raises(ValueError, match=r"cur \(3, 4, 8\)"):
        cosine_exit(prev, cur[:, :4], valid, 0.9)
    with pytest.raises(ValueError, match="capacity is -1"):
        survivors(valid[0], capacity=-1)


@needs_kernel
def test_the_kernel_refuses_in_words_what_it_cannot_read():
    prev, cur, valid = _states(3, 8, 8)
    with pytest.raises(BackendUnsupported, match=r"prev\.stride\(-1\) is 8"):
        cosine_exit(prev.transpose(1, 2), cur, valid, 0.9, backend="triton")
