"""Pools: against torch's adaptive pools on images, segment means, gradients, compilers."""

import pytest
import torch
from einops import rearrange
from torch import Tensor

from sparing.kernels import explain, grid_pool, grid_unpool, segment_pool

GRIDS = [((8, 6), (4, 3)), ((7, 7), (3, 3)), ((5, 9), (4, 2)), ((3, 2), (5, 4)), ((6, 4), (1, 1)), ((4, 5), (4, 5))]


def _tokens(grid: tuple[int, int], dim: int = 5, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, grid[0] * grid[1], dim, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize(("grid", "out_grid"), GRIDS)
def test_grid_pool_equals_torch_adaptive_pooling_of_the_image(grid, out_grid, mode):
    x = _tokens(grid, dtype=torch.float64)
    image = rearrange(x, "b (h w) c -> b c h w", h=grid[0])
    pool = torch.nn.functional.adaptive_avg_pool2d if mode == "avg" else torch.nn.functional.adaptive_max_pool2d
    wanted = rearrange(pool(image, out_grid), "b c h w -> b (h w) c")
    torch.testing.assert_close(grid_pool(x, grid, out_grid, mode), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("grid", "out_grid"), [(b, a) for a, b in GRIDS])
def test_grid_unpool_equals_nearest_interpolation_of_the_image(grid, out_grid):
    x = _tokens(grid)
    image = rearrange(x, "b (h w) c -> b c h w", h=grid[0])
    wanted = rearrange(torch.nn.functional.interpolate(image, out_grid, mode="nearest"), "b c h w -> b (h w) c")
    row = torch.arange(out_grid[0]) * grid[0] // out_grid[0]
    column = torch.arange(out_grid[1]) * grid[1] // out_grid[1]
    by_index = rearrange(image[:, :, row][..., column], "b c h w -> b (h w) c")
    result = grid_unpool(x, grid, out_grid)
    assert torch.equal(result, by_index)
    assert torch.equal(result, wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_segment_pool_is_the_weighted_mean_of_each_segment(dtype):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 11, 4, generator=generator).to(dtype)
    segment = torch.randint(-1, 4, (3, 11), generator=generator)
    segment[0][segment[0] == 2] = 1
    weight = torch.rand(3, 11, generator=generator) + 0.1
    mean, total = segment_pool(x, segment, weight, 4, return_weight=True)
    assert mean.dtype == dtype
    for sample in range(3):
        for group in range(4):
            member = segment[sample] == group
            w = weight[sample][member].double()
            wanted = (
                (w[:, None] * x[sample][member].double()).sum(0) / w.sum() if member.any() else torch.zeros(4).double()
            )
            torch.testing.assert_close(
                mean[sample, group].double(), wanted, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
            )
            assert total[sample, group].item() == pytest.approx(w.sum().item(), rel=1e-5, abs=1e-12)
    assert (mean[0, 2] == 0).all()
    torch.testing.assert_close(
        segment_pool(x.double(), segment, None, 4), segment_pool(x.double(), segment, torch.ones(3, 11), 4)
    )


def test_gradcheck_of_every_pool():
    x = _tokens((4, 6), dim=2, dtype=torch.float64).requires_grad_()
    weight = torch.rand(2, 24, dtype=torch.float64, requires_grad=True)
    segment = torch.arange(24).remainder(5).expand(2, 24).clone()
    for out_grid in ((2, 3), (3, 4)):
        for mode in ("avg", "max"):
            assert torch.autograd.gradcheck(lambda t: grid_pool(t, (4, 6), out_grid, mode), (x,), fast_mode=True)  # noqa: B023
    for out_grid in ((8, 12), (5, 7)):
        assert torch.autograd.gradcheck(lambda t: grid_unpool(t, (4, 6), out_grid), (x,), fast_mode=True)  # noqa: B023
    assert torch.autograd.gradcheck(lambda t, w: segment_pool(t, segment, w, 7), (x, weight), fast_mode=True)


@pytest.mark.parametrize("out_grid", [(2, 2), (3, 3)], ids=["divides", "ragged"])
def test_compiles_to_one_graph_and_exports_with_a_dynamic_batch(out_grid):
    class Pools(torch.nn.Module):
        def forward(self, x, segment):
            pooled = grid_pool(x, (4, 4), out_grid)
            sharp = grid_pool(x, (4, 4), out_grid, "max")
            return grid_unpool(pooled + sharp, out_grid, (4, 4)) + segment_pool(x, segment, None, 3).mean(
                1, keepdim=True
            )

    x, segment = _tokens((4, 4)).requires_grad_(), torch.arange(16).remainder(3).repeat(2, 1)
    compiled = torch.compile(Pools(), backend="aot_eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(x, segment), Pools()(x, segment))
    compiled(x, segment).sum().backward()
    size = {0: torch.export.Dim("batch", min=2)}
    exported = torch.export.export(Pools(), (x.detach(), segment), dynamic_shapes=(size, size)).module()
    other = (_tokens((4, 4), batch=5), segment[:1].repeat(5, 1))
    torch.testing.assert_close(exported(*other), Pools()(*other))


def test_autocast_keeps_the_means_in_float32():
    x = _tokens((4, 4)) + 100
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = grid_pool(x, (4, 4), (3, 3))
        mean = segment_pool(x, torch.zeros(2, 16, dtype=torch.long), None, 1)
    torch.testing.assert_close(pooled, grid_pool(x, (4, 4), (3, 3)))
    torch.testing.assert_close(mean[:, 0], x.mean(1))


def test_empty_batches_and_no_segments():
    assert grid_pool(torch.zeros(0, 6, 3), (2, 3), (1, 2)).shape == (0, 2, 3)
    assert grid_unpool(torch.zeros(0, 6, 3), (2, 3), (3, 4)).shape == (0, 12, 3)
    assert segment_pool(torch.zeros(2, 0, 3), torch.zeros(2, 0, dtype=torch.long), None, 4).abs().sum() == 0
    assert segment_pool(torch.zeros(2, 5, 3), torch.zeros(2, 5, dtype=torch.long), None, 0).shape == (2, 0, 3)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"holds 7 tokens; a grid of \(2, 3\) has 6"):
        grid_pool(torch.zeros(1, 7, 2), (2, 3), (1, 1))
    with pytest.raises(ValueError, match="mode is 'sum'"):
        grid_pool(torch.zeros(1, 6, 2), (2, 3), (1, 1), "sum")
    with pytest.raises(ValueError, match="every size must be at least 1"):
        grid_unpool(torch.zeros(1, 6, 2), (2, 3), (0, 1))
    with pytest.raises(ValueError, match="expected integer ids"):
        segment_pool(torch.zeros(1, 6, 2), torch.zeros(1, 6), None, 2)


def test_explain_lists_every_backend_with_its_reason():
    table = explain(grid_pool, torch.zeros(1, 6, 2), (2, 3), (1, 1))
    assert table.chosen == "reference"
    assert all(row.reasons for row in table.rows if row.backend != "reference")
