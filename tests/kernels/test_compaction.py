"""Compaction: exact and fixed-capacity packing, and gradients that are copies."""

import pytest
import torch
from torch import Tensor

from sparing.kernels import compact, gather_rows, scatter_rows


def _keep(batch: int, tokens: int) -> Tensor:
    keep = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(batch + tokens)) > 0.4
    keep[0] = False
    keep[-1] = True
    return keep


def _x(batch: int, tokens: int, *trailing: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, tokens, *trailing, generator=torch.Generator().manual_seed(3)).to(dtype)


def test_packing_equals_boolean_indexing_and_every_index_agrees():
    keep, x = _keep(4, 9), _x(4, 9, 5)
    packing = compact(keep)
    assert torch.equal(gather_rows(x, packing), x[keep])
    assert torch.equal(packing.lengths.long(), keep.sum(1))
    assert packing.cu_seqlens.tolist() == [0, *keep.sum(1).cumsum(0).tolist()]
    assert torch.equal(packing.inverse[packing.flat_index.long()].long(), torch.arange(int(keep.sum())))
    assert (packing.inverse[~keep.flatten()] == -1).all()
    assert packing.max_len_bound == 9
    assert {t.dtype for t in (packing.flat_index, packing.cu_seqlens, packing.lengths, packing.inverse)} == {
        torch.int32
    }
    assert not packing.overflow


def test_scattering_returns_rows_to_their_places_and_leaves_the_rest():
    keep, x = _keep(4, 9), _x(4, 9, 5, 2)
    packing = compact(keep)
    update = torch.randn(int(keep.sum()), 5, 2)
    wanted = x.clone()
    wanted[keep] = update
    before = x.clone()
    assert torch.equal(scatter_rows(update, packing, x), wanted)
    assert torch.equal(x, before)
    assert torch.equal(scatter_rows(update, packing), torch.where(keep[..., None, None], wanted, 0.0))


@pytest.mark.parametrize("spare", [0, 5])
def test_a_capacity_pads_with_minus_one_and_rows_of_zero(spare):
    keep, x = _keep(3, 7), _x(3, 7, 4)
    exact = compact(keep)
    kept = len(exact.flat_index)
    padded = compact(keep, capacity=kept + spare)
    assert torch.equal(padded.flat_index[:kept], exact.flat_index)
    assert (padded.flat_index[kept:] == -1).all()
    assert torch.equal(padded.cu_seqlens, exact.cu_seqlens)
    assert torch.equal(padded.inverse, exact.inverse)
    packed = gather_rows(x, padded)
    assert torch.equal(packed[:kept], x[keep])
    assert packed[kept:].abs().sum() == 0
    assert torch.equal(scatter_rows(packed, padded, x), x)
    assert not padded.overflow
    assert len(compact(keep, sync=False).flat_index) == keep.numel()


def test_a_capacity_that_is_too_small_says_so_and_stays_consistent():
    keep = torch.tensor([[True, True, False], [True, True, True]])
    packing = compact(keep, capacity=3)
    assert packing.overflow
    assert packing.flat_index.tolist() == [0, 1, 3]
    assert packing.cu_seqlens.tolist() == [0, 2, 3]
    assert packing.lengths.tolist() == [2, 1]
    assert packing.inverse.tolist() == [0, 1, -1, 2, -1, -1]


@pytest.mark.parametrize("capacity", [None, 20])
def test_gradcheck_and_the_gradient_is_a_copy(capacity):
    keep = _keep(3, 5)
    packing = compact(keep, capacity=capacity)
    rows = len(packing.flat_index)
    x = _x(3, 5, 2, dtype=torch.float64).requires_grad_()
    update = torch.randn(rows, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: gather_rows(t, packing), (x,), fast_mode=True)
    assert torch.autograd.gradcheck(lambda u, t: scatter_rows(u, packing, t), (update, x), fast_mode=True)
    upstream = torch.randn(rows, 2, dtype=torch.float64)
    (grad,) = torch.autograd.grad(gather_rows(x, packing), x, upstream)
    assert torch.equal(grad[keep], upstream[: int(keep.sum())])
    assert grad[~keep].abs().sum() == 0


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)], ids=["no samples", "no tokens"])
@pytest.mark.parametrize("capacity", [None, 2])
def test_empty_masks(shape, capacity):
    packing = compact(torch.zeros(shape, dtype=torch.bool), capacity=capacity)
    x = torch.zeros(*shape, 3)
    packed = gather_rows(x, packing)
    assert packed.shape == (capacity or 0, 3)
    assert scatter_rows(packed, packing, x).shape == x.shape
    assert packing.cu_seqlens.tolist() == [0] * (shape[0] + 1)


def test_nothing_kept_scatters_nothing():
    packing = compact(torch.zeros(2, 3, dtype=torch.bool))
    x = _x(2, 3, 4)
    assert torch.equal(scatter_rows(gather_rows(x, packing), packing, x), x)


class _RoundTrip(torch.nn.Module):
    def __init__(self, capacity: int | None) -> None:
        super().__init__()
        self.capacity = capacity

    def forward(self, x, keep):
        packing = compact(keep, capacity=self.capacity)
        return scatter_rows(gather_rows(x, packing) * 2, packing, x)


@pytest.mark.parametrize("capacity", [None, 40])
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)  # for the nonzero of the exact mode
def test_compiles_to_one_graph_and_exports_with_dynamic_sizes(capacity):
    x, keep = _x(3, 5, 4).requires_grad_(), _keep(3, 5)
    module = _RoundTrip(capacity)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(x, keep), module(x, keep))
    compiled(x, keep).sum().backward()
    torch.testing.assert_close(x.grad, keep[..., None] * 1.0 + 1.0 + 0 * x)
    sizes = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("tokens", min=2)}
    exported = torch.export.export(module, (x.detach(), keep), dynamic_shapes=(sizes, sizes)).module()
    other = (_x(4, 8, 4), _keep(4, 8))
    torch.testing.assert_close(exported(*other), module(*other))


def test_bad_arguments_are_named():
    packing = compact(_keep(2, 3))
    with pytest.raises(ValueError, match="expected bool"):
        compact(torch.ones(2, 3))
    with pytest.raises(ValueError, match="capacity is -1"):
        compact(_keep(2, 3), capacity=-1)
    with pytest.raises(ValueError, match="expected \\(2, 3, "):
        gather_rows(torch.zeros(2, 4, 1), packing)
    with pytest.raises(ValueError, match="3 rows"):
        scatter_rows(torch.zeros(9, 1), packing)
    with pytest.raises(ValueError, match="into is"):
        scatter_rows(torch.zeros(3, 1), packing, torch.zeros(2, 3, 1, dtype=torch.float64))


@pytest.mark.gpu
def test_a_capacity_makes_no_host_read_on_a_gpu():
    keep, x = _keep(4, 300).cuda(), _x(4, 300, 64).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        packing = compact(keep, capacity=1200)
        scatter_rows(gather_rows(x, packing), packing, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
