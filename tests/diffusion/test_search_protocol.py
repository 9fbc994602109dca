"""Seeds, recipes and pools of the noise search."""

import math

import pytest
import torch

from sparing.diffusion.search import protocol, seeds
from sparing.diffusion.search.protocol import Outcome, SearchState

RECIPES = [
    protocol.Gaussian(3),
    protocol.Neighbour(1, "mix", 0.3, 5),
    protocol.Neighbour(1, "cross", 0.3, 5, other=2),
    protocol.Renoise(2, 8, 3, 9),
    protocol.Continue(4, reseed=True),
    protocol.Given("ab"),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: type(r).__name__)
def test_recipes_come_back_from_json(recipe):
    assert protocol.recipe_from_json(protocol.recipe_to_json(recipe)) == recipe


def test_an_unknown_recipe_is_named():
    with pytest.raises(ValueError, match=r"'cubist'; known are gaussian"):
        protocol.recipe_from_json({"op": "cubist"})


def test_seeds_are_the_published_ones():
    assert seeds.candidate_seed(0, "a red cube", "random", 0, 1) == 4426524825257522784
    assert seeds.candidate_seed(0, "café", "paths", 1, 5) == 2695300040205692055
    assert seeds.sde_seed(0, "a", "random", 0, 0) != seeds.candidate_seed(0, "a", "random", 0, 0)


def test_noise_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    noise = seeds.gaussian((4, 4), 7)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(noise, torch.randn(4, 4, generator=torch.Generator().manual_seed(7)))


def test_scores_of_a_pool():
    state = SearchState(num_steps=4)
    pool = [Outcome(0, {"v": 1.0}), Outcome(1, {"v": math.nan}), Outcome(2, {"v": 3.0}), Outcome(3, {"v": 3.0})]
    with pytest.warns(UserWarning, match=r"candidates \[1\] are NaN"):
        assert state.score(pool).tolist() == [1.0, -math.inf, 3.0, 3.0]
    with pytest.warns(UserWarning, match="NaN"):
        assert state.best(pool).id == 2
    with pytest.raises(ValueError, match="every one of 1 scores is NaN"):
        state.score(pool[1:2])
