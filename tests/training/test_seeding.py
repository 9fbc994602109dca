"""Draws depend on seed, epoch and sample index, and on nothing else."""

import pytest
import torch

from sparing.training import epoch_order, sample_keys, seeded, uniforms


def test_a_sample_draws_the_same_numbers_in_every_batch():
    alone = uniforms(3, 1, [17], count=4)
    together = uniforms(3, 1, torch.tensor([5, 17, 40]), count=4)
    assert torch.equal(alone[0], together[1])


@pytest.mark.parametrize("other", [{"seed": 4}, {"epoch": 2}, {"index": 18}, {"stream": 1}])
def test_each_number_changes_the_draws(other):
    def draw(seed=3, epoch=1, index=17, stream=0):
        return uniforms(seed, epoch, [index], count=8, stream=stream)

    assert (draw() - draw(**other)).abs().min() > 1e-6


def test_draws_are_uniform_and_uncorrelated():
    draws = uniforms(0, 0, torch.arange(50_000), count=2).double()
    assert draws.min() >= 0.0
    assert draws.max() < 1.0
    # standard errors at 50,000 samples: mean 0.0013, variance 0.0004, correlation 0.0045
    assert (draws.mean(0) - 0.5).abs().max() < 0.006
    assert (draws.var(0) - 1 / 12).abs().max() < 0.002
    assert torch.corrcoef(draws.T)[0, 1].abs() < 0.02
    assert torch.corrcoef(torch.stack([draws[:-1, 0], draws[1:, 0]]))[0, 1].abs() < 0.02


def test_keys_do_not_collide():
    keys = [key for epoch in range(4) for key in sample_keys(0, epoch, torch.arange(5_000))]
    assert len(set(keys)) == len(keys)


def test_negative_numbers_are_refused():
    with pytest.raises(ValueError, match="start at 0"):
        sample_keys(0, 0, [-1])


@pytest.mark.parametrize(("num_samples", "world_size"), [(10, 1), (10, 3), (3, 8)])
def test_ranks_share_out_every_sample(num_samples, world_size):
    parts = [epoch_order(num_samples, seed=1, epoch=2, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({len(part) for part in parts}) == 1
    assert set(torch.cat(parts).tolist()) == set(range(num_samples))


def test_epochs_have_different_orders():
    assert not torch.equal(epoch_order(100, seed=0, epoch=0), epoch_order(100, seed=0, epoch=1))
    assert torch.equal(epoch_order(100, seed=0, epoch=0, shuffle=False), torch.arange(100))


def test_an_empty_data_set_is_refused():
    with pytest.raises(ValueError, match="no samples"):
        epoch_order(0, seed=0, epoch=0)


def test_seeded_leaves_the_global_generator_as_it_was():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeded(0, 0, 0):
        torch.rand(100)
    assert torch.equal(torch.rand(3), expected)
