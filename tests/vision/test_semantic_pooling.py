"""Cells of a token map and the three poolings: spec G4 and the amended rule for cells that would be empty."""

import pytest
import torch
import torch.nn.functional as F

from sparing.vision.semantic_pooling import OffsetPooling, WeightedPooling, axis_cells, cut_cells, make_pooling

DIM = 8


def tokens_for(grid, *, dim=DIM, batch=2):
    return torch.randn(batch, grid[0] * grid[1], dim, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("size", "count", "cell", "before"), [(14, 4, 4, 1), (37, 4, 10, 1), (12, 4, 3, 0), (7, 3, 3, 1)]
)
def test_cells_are_padded_as_the_author_does(size, count, cell, before):
    cells = axis_cells(size, count)
    assert (cells.cell, cells.pad_before) == (cell, before)
    assert cells.pad_after == count * cell - size - before


def test_cells_given_in_numbers_replace_the_rule_and_must_hold_every_token():
    pooling = WeightedPooling(DIM, (4, 4))
    pooling.cell, pooling.pad = (5, 4), (2, 1)  # rows: 20 positions for 14 tokens, 2 padded before and 4 behind
    tokens = tokens_for((14, 14))
    centers, weights = pooling.pool(tokens, (14, 14))
    assert weights.shape == (2, 16, 20)
    rows = [slice(0, 3), slice(3, 8), slice(8, 13), slice(13, 14)]
    columns = [slice(0, 3), slice(3, 7), slice(7, 11), slice(11, 14)]
    grid = tokens.view(2, 14, 14, DIM)
    expected = torch.stack([grid[:, r, c].mean((1, 2)) for r in rows for c in columns], 1)
    torch.testing.assert_close(centers, expected, atol=1e-6, rtol=0)
    for cell, pad in ((3, 0), (4, 4), (6, 0)):
        with pytest.raises(ValueError, match=f"4 cells of {cell} with {pad} padded before do not cut 14 tokens"):
            axis_cells(14, 4, cell=cell, pad=pad)


@pytest.mark.parametrize(("size", "count"), [(16, 7), (14, 9), (14, 13), (18, 8)])
def test_a_cell_that_would_be_empty_makes_adaptive_bins(size, count):
    cells = axis_cells(size, count)
    assert cells.pad_before is None
    positions, valid = cells.positions(torch.device("cpu")), cells.valid(torch.device("cpu"))
    for i in range(count):
        start, stop = i * size // count, -(-(i + 1) * size // count)
        assert positions[i][valid[i]].tolist() == list(range(start, stop))


@pytest.mark.parametrize("size", [14, 16, 18, 24, 27, 32, 37])
def test_no_cell_is_empty_and_every_token_is_in_one_for_any_number_of_centers(size):
    for count in range(1, size + 1):
        cells = axis_cells(size, count)
        positions, valid = cells.positions(torch.device("cpu")), cells.valid(torch.device("cpu"))
        assert valid.any(1).all(), (size, count)
        assert set(positions[valid].tolist()) == set(range(size)), (size, count)


@pytest.mark.parametrize("size", [14, 16, 18, 24, 27, 32, 37])
def test_centers_are_finite_for_any_number_of_centers(size):
    tokens = tokens_for((size, 14), dim=4, batch=1)
    for count in range(1, size + 1):
        pool = WeightedPooling(4, (count, 4))
        pool.reset_parameters(from_scratch=True)
        centers, weights = pool.pool(tokens, (size, 14))
        assert centers.shape == (1, count * 4, 4)
        assert torch.isfinite(centers).all(), (size, count)
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, count * 4))


@pytest.mark.parametrize("grid", [(14, 14), (16, 16), (37, 37), (24, 18)])
@pytest.mark.parametrize("count", [2, 4, 6])
def test_with_zero_logits_a_center_is_the_mean_of_the_valid_tokens_of_its_cell(grid, count):
    tokens = tokens_for(grid)
    centers = WeightedPooling(DIM, (count, count))(tokens, grid)
    maps = tokens.unflatten(1, grid)
    rows, columns = axis_cells(grid[0], count), axis_cells(grid[1], count)

    def span(cells, i):
        start = i * cells.cell - cells.pad_before
        return slice(max(start, 0), start + cells.cell)

    for i in range(count):
        for j in range(count):
            mean = maps[:, span(rows, i), span(columns, j)].mean((1, 2))
            torch.testing.assert_close(centers[:, i * count + j], mean, atol=1e-6, rtol=0)


def test_weights_come_from_the_cell_alone_and_padding_is_outside_the_softmax():
    grid, count = (14, 14), 4
    pool = WeightedPooling(DIM, (count, count))
    pool.reset_parameters(from_scratch=True)
    torch.nn.init.normal_(pool.logit.weight)
    assert pool.norm.eps == 1e-5  # of the author's channels-first norm, unlike the 1e-6 of the host's norms
    tokens = tokens_for(grid)
    centers, weights = pool.pool(tokens, grid)
    padded = F.pad(tokens.unflatten(1, grid), (0, 0, 1, 1, 1, 1))
    cell = padded[:, 4:8, 8:12]  # row 1, column 2
    mask = torch.ones(4, 4, dtype=torch.bool)
    logits = pool.logit(pool.act(pool.norm(pool.conv(cell.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)))).squeeze(-1)
    expected = logits.flatten(1).softmax(-1)
    torch.testing.assert_close(weights[:, 6], expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(centers[:, 6], (expected[..., None] * cell.flatten(1, 2)).sum(1), atol=1e-6, rtol=1e-5)
    corner = weights[:, 0].unflatten(1, (4, 4))
    mask[0], mask[:, 0] = False, False
    assert corner[:, ~mask].abs().max() < 1e-20
    assert corner[:, mask].min() > 1e-4


def test_adaptive_and_uniform_axes_mix():
    grid = (16, 14)
    cells = cut_cells(tokens_for(grid), axis_cells(16, 7), axis_cells(14, 4))
    maps = tokens_for(grid).unflatten(1, grid)
    assert cells.shape == (2, 7, 4, 4, 4, DIM)
    torch.testing.assert_close(cells[:, 1, :3, 1, :4], maps[:, 2:5, 3:7])
    assert cells[:, :, :, 0, 0].abs().max() == 0


@pytest.mark.parametrize("kind", ["avg", "max"])
def test_plain_poolings_are_torchs_adaptive_ones(kind):
    tokens, grid = tokens_for((14, 10)), (14, 10)
    pooled = make_pooling(kind, DIM, (4, 3))(tokens, grid)
    pool = {"avg": F.adaptive_avg_pool2d, "max": F.adaptive_max_pool2d}[kind]
    torch.testing.assert_close(
        pooled, pool(tokens.transpose(1, 2).unflatten(2, grid), (4, 3)).flatten(2).transpose(1, 2)
    )


def test_the_inter_window_offset_starts_as_identity_and_then_moves_a_center_by_its_neighbours():
    torch.manual_seed(0)
    pool = make_pooling("weighted", DIM, (4, 4), inter_window=True)
    assert isinstance(pool, OffsetPooling)
    tokens = tokens_for((14, 14))
    torch.testing.assert_close(pool(tokens, (14, 14)), pool.pooling(tokens, (14, 14)))
    torch.nn.init.normal_(pool.offset.weight)
    before = pool(tokens, (14, 14))
    changed = tokens.clone()
    changed[:, 0] += 10.0  # a token of cell 0
    moved = (pool(changed, (14, 14)) - before).abs().amax((0, 2)) > 1e-4
    assert moved.nonzero().flatten().tolist() == [0, 1, 4, 5]  # cell 0 and the centers around it


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_finite_and_near(dtype):
    pool = WeightedPooling(DIM, (4, 4))
    pool.reset_parameters(from_scratch=True)
    tokens = tokens_for((14, 14))
    half = pool.to(dtype)(tokens.to(dtype), (14, 14))
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), pool.float()(tokens, (14, 14)), atol=3e-2, rtol=3e-2)


def test_errors_name_the_numbers():
    with pytest.raises(ValueError, match="15 centers do not fit an axis of 14"):
        axis_cells(14, 15)
    with pytest.raises(ValueError, match="'mean' is unknown; weighted, avg, max"):
        make_pooling("mean", DIM, (4, 4))
