"""Density tables, look-up and the training samplers (specification, sections 2.6, 3.3 and 9.9, 9.13, 9.17)."""

import json

import pytest
import torch
from diffusion.conftest import build_flexdit

from sparing.diffusion.density import (
    PUBLISHED_RATES,
    DensityTable,
    DensityTimestepSampler,
    parse_density,
    pruning_rate,
    sparse_side,
)

# First timestep at which each side applies, as published for the schedule of the paper's Eq. 5.
BOUNDARIES = {
    ("256_r0.61_0.86", 16): {0: 10, 363: 9, 574: 8, 761: 7, 925: 6},
    ("256_r0.44_0.61", 16): {0: 12, 442: 11, 821: 10},
    ("512_r0.61_0.86", 32): {0: 20, 306: 19, 418: 18, 523: 17, 623: 16, 717: 15, 805: 14, 887: 13, 963: 12},
    ("512_r0.90_0.96", 32): {0: 10, 399: 9, 619: 8, 814: 7, 985: 6},
}


@pytest.mark.parametrize(("name", "grid"), BOUNDARIES)
def test_published_tables_have_exactly_the_published_boundaries(name, grid):
    table = DensityTable.published(name, grid=(grid, grid))
    assert {t: (h, w) for t, h, w in table.entries} == {t: (s, s) for t, s in BOUNDARIES[name, grid].items()}


def test_published_rates_are_those_of_whole_square_grids():
    for grid, rate, side in [
        (16, 0.44, 12),
        (16, 0.61, 10),
        (32, 0.61, 20),
        (16, 0.86, 6),
        (32, 0.90, 10),
        (32, 0.96, 6),
    ]:
        assert sparse_side(grid, rate) == side
        assert 1 - side**2 / grid**2 == pytest.approx(rate, abs=0.005)


def test_the_rate_holds_then_rises_linearly():
    rate = [pruning_rate(t, r_min=0.2, r_max=0.8) for t in (0, 249.9, 250, 625, 1000)]
    assert rate == pytest.approx([0.2, 0.2, 0.2, 0.5, 0.8])


def test_rates_are_given_in_either_order():
    assert DensityTable.from_rates((16, 16), 0.61, 0.44) == DensityTable.from_rates((16, 16), 0.44, 0.61)


def test_a_rectangular_grid_scales_both_sides_by_the_same_share():
    table = DensityTable.from_rates((16, 24), 0.75, 0.75)
    assert table.entries == ((0, 8, 12),)


def test_max_stages_limits_the_graphs_and_never_prunes_more():
    table = DensityTable.published("512_r0.61_0.86", grid=(32, 32))
    four = table.with_max_stages(4)
    assert len(four.distinct_sides) == 4
    assert all(four.side(t)[0] >= table.side(t)[0] for t in range(1000))
    assert table.with_max_stages(1).entries == ((0, 20, 20),)


def test_a_table_survives_json():
    table = DensityTable.published("256_r0.61_0.86", grid=(16, 16))
    assert DensityTable.of(json.loads(json.dumps(table.to_list())), grid=(16, 16)) == table


def test_lookup_uses_the_original_timestep_also_when_it_is_fractional():
    table = DensityTable.stages([(0, 4), (500, 2, 3)])
    assert table.sides(torch.tensor([0.0, 499.5, 500.0, 999.0])) == [(4, 4), (4, 4), (2, 3), (2, 3)]
    assert table.ranges() == [(0, 500, 4, 4), (500, 1000, 2, 3)]


@pytest.mark.parametrize("timestep", [-1, 1000, 1e9])
def test_a_timestep_outside_the_table_is_refused_by_value(timestep):
    with pytest.raises(ValueError, match=rf"timestep {timestep} .*\[0, 1000\)"):
        DensityTable.constant(4).side(timestep)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "at least one entry"),
        ([(5, 4, 4)], r"start at timestep 0, got \(5, 4, 4\)"),
        ([(0, 4, 4), (700, 3, 3), (300, 2, 2)], r"not sorted.*\(300, 2, 2\) follows \(700, 3, 3\)"),
        ([(0, 4, 4), (0, 3, 3)], "not sorted"),
        ([(0, 4, 4), (1000, 3, 3)], r"\(1000, 3, 3\) starts outside"),
        ([(0, 4, 0)], r"\(0, 4, 0\).*below 1"),
    ],
)
def test_a_wrong_table_is_refused_naming_the_entry(entries, message):
    with pytest.raises(ValueError, match=message):
        DensityTable(tuple(entries))


def test_a_density_reads_as_people_write_it():
    grid = (16, 24)
    assert parse_density(8, grid=grid) == (8, 8)
    assert parse_density("8", grid=grid) == (8, 8)
    assert parse_density("8x6", grid=grid) == (8, 6)
    assert parse_density([4, 5], grid=grid) == (4, 5)
    assert parse_density("all", grid=grid) == grid == parse_density(1.0, grid=grid)
    assert parse_density(0.25, grid=grid) == (8, 12) == parse_density("0.25", grid=grid)


@pytest.mark.parametrize(
    ("density", "message"),
    [
        (17, "17x17 is above the dense grid of 16x16"),
        ((4, 17), "4x17 is above"),
        (0, "0x0 has a side below 1"),
        (-3, "below 1"),
        (1.5, r"1.5 as a share of the tokens must be in \(0, 1\]"),
        ("many", "'many' is not a side"),
        ((1, 2, 3), "must give one side or two"),
        (True, "not a side"),
    ],
)
def test_a_density_off_the_grid_is_refused_by_value(density, message):
    with pytest.raises(ValueError, match=message):
        parse_density(density, grid=(16, 16))


def test_wrong_rates_and_names_are_refused():
    with pytest.raises(ValueError, match=r"r_max=1\.0"):
        DensityTable.from_rates((16, 16), 0.5, 1.0)
    with pytest.raises(ValueError, match="unknown published schedule 'x'"):
        DensityTable.published("x", grid=(16, 16))
    with pytest.raises(ValueError, match="20x20 is above the dense grid of 16x16"):
        DensityTable.of([(0, 20, 20)], grid=(16, 16))


# -- training samplers

TABLE = DensityTable.published("256_r0.61_0.86", grid=(16, 16))


def _chi_square(counts: torch.Tensor) -> float:
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


def test_bucket_mode_is_uniform_over_timesteps_and_every_batch_has_one_density():
    sampler = DensityTimestepSampler(TABLE, "bucket", seed=1)
    counts = torch.zeros(1000)
    for step in range(100_000 // 4):
        timesteps, side = sampler.sample(4, step=step)
        assert {TABLE.side(t) for t in timesteps.tolist()} == {side}
        counts += torch.bincount(timesteps, minlength=1000)
    # Draws of one batch share their bucket, so only the buckets' totals carry extra variance: test both levels apart.
    # 1000 cells, 5 of them tied by bucket: within buckets the statistic has 995 degrees of freedom; 5 sigma = 995 + 5 *
    # 44.6.
    within = sum(_chi_square(counts[start:end]) for start, end, _, _ in TABLE.ranges())
    assert within < 995 + 5 * (2 * 995) ** 0.5
    for start, end, _, _ in TABLE.ranges():
        share = (end - start) / 1000
        spread = (share * (1 - share) / 25_000) ** 0.5
        assert counts[start:end].sum() / counts.sum() == pytest.approx(share, abs=5 * spread)


def test_bucket_mode_agrees_across_ranks_on_the_density_and_differs_in_the_timesteps():
    samplers = [DensityTimestepSampler(TABLE, "bucket", rank=rank, world_size=4) for rank in range(4)]
    for step in range(50):
        drawn = [sampler.sample(16, step=step) for sampler in samplers]
        assert len({side for _, side in drawn}) == 1
        assert not torch.equal(drawn[0][0], drawn[1][0])


def test_a_draw_depends_only_on_seed_step_and_rank():
    first, again = (DensityTimestepSampler(TABLE, seed=3) for _ in range(2))
    first.sample(8, step=0)
    assert torch.equal(first.sample(8, step=7)[0], again.sample(8, step=7)[0])
    assert not torch.equal(first.sample(8, step=7)[0], first.sample(8, step=8)[0])
    assert not torch.equal(first.sample(8, step=7)[0], DensityTimestepSampler(TABLE, seed=4).sample(8, step=7)[0])


def test_piecewise_mode_keeps_each_rank_in_its_slice_at_one_density_and_covers_all_timesteps():
    seen = torch.zeros(1000)
    for rank in range(4):
        sampler = DensityTimestepSampler(TABLE, "piecewise", rank=rank, world_size=4)
        for step in range(400):
            timesteps, side = sampler.sample(32, step=step)
            assert timesteps.min() >= 250 * rank
            assert timesteps.max() < 250 * (rank + 1)
            assert {TABLE.side(t) for t in timesteps.tolist()} == {side}
            seen += torch.bincount(timesteps, minlength=1000)
    assert (seen > 0).all()
    assert seen.view(4, 250).sum(1).tolist() == [400 * 32] * 4


def test_mixed_mode_draws_every_sample_on_its_own():
    timesteps, side = DensityTimestepSampler(TABLE, "mixed").sample(64, step=0)
    assert side is None
    assert len({TABLE.side(t) for t in timesteps.tolist()}) > 1


def test_the_sampler_refuses_unknown_modes_and_ranks():
    with pytest.raises(ValueError, match="'bucketed'"):
        DensityTimestepSampler(TABLE, "bucketed")
    with pytest.raises(ValueError, match="rank 4"):
        DensityTimestepSampler(TABLE, rank=4, world_size=4)


def test_every_published_name_builds_at_its_own_grid():
    for name in PUBLISHED_RATES:
        side = {"256": 16, "512": 32}[name.split("_")[0]]
        assert DensityTable.published(name, grid=(side, side)).distinct_sides


@pytest.mark.parametrize(
    "density", [(2.7, 3.9), [3, 2.5], (True, 3), True, None, {}, {"a": 1}, (3,), (3, 3, 3), (3, "4"), torch.ones(2)]
)
def test_only_whole_sides_are_densities(density):
    with pytest.raises(ValueError, match="density"):
        parse_density(density, grid=(8, 8))
    assert parse_density(torch.tensor(3), grid=(8, 8)) == (3, 3)
    assert parse_density((torch.tensor(3), 4), grid=(8, 8)) == (3, 4)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ([(0,)], r"entry \(0,\) of a density table"),
        ([(0, 3, 2, 9)], r"entry \(0, 3, 2, 9\)"),
        ([(0, 3.7), (400.9, 2)], r"entry \(0, 3\.7\)"),
        ([(0, True)], r"entry \(0, True\)"),
        ([[0, 3], 5], "entry 5"),
        ([["a", 3]], r"entry \['a', 3\]"),
        ({"a": 1}, r"is a list of .*got {'a': 1}"),
        (None, "is a list of .*got None"),
        ([], "at least one entry"),
    ],
)
def test_malformed_tables_are_refused_by_their_entry(spec, message):
    with pytest.raises(ValueError, match=message):
        DensityTable.of(spec, grid=(8, 8))
    with pytest.raises(ValueError, match=message):
        build_flexdit().set_density(spec)


def test_a_published_schedule_is_a_function_of_the_share_of_the_timesteps():
    whole = DensityTable.published("256_r0.61_0.86", grid=(16, 16))
    half = DensityTable.of("256_r0.61_0.86", grid=(16, 16), num_train_timesteps=500)
    double = DensityTable.of("256_r0.61_0.86", grid=(16, 16), num_train_timesteps=2000)
    assert half.num_train_timesteps == 500
    assert [half.side(t) for t in range(500)] == [whole.side(2 * t) for t in range(500)]
    assert [double.side(2 * t) for t in range(1000)] == [whole.side(t) for t in range(1000)]


def test_a_table_of_another_number_of_timesteps_is_refused():
    table = DensityTable.stages([(0, 4), (800, 2)])
    with pytest.raises(ValueError, match="one of 1000 timesteps, the model has 500"):
        DensityTable.of(table, grid=(8, 8), num_train_timesteps=500)
    with pytest.raises(ValueError, match="one of 1000 timesteps, the model has 500"):
        build_flexdit(num_train_timesteps=500).set_density(table)
