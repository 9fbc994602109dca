"""Verifiers as trees: what callables may return, arithmetic, ensembles over one pool, floors, the cache."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from sparing.diffusion.search.verifiers import (
    Cached,
    Constrained,
    MinMaxEnsemble,
    RankEnsemble,
    Verifier,
    ZEnsemble,
    as_verifier,
)
from sparing.diffusion.search.verifiers.ensemble import midranks, minmax_scores, z_scores

NAN, INF = math.nan, math.inf


def column(index, name=None, **attributes):
    """A verifier that reads one column of its samples and counts the samples it saw."""

    def score(samples, prompts):
        score.seen += len(samples)
        return samples[:, index]

    score.seen = 0
    score.name = name or f"column{index}"
    for key, value in attributes.items():
        setattr(score, key, value)
    return score


@pytest.mark.parametrize(
    "returned", [torch.tensor([1.0, 2.0]), torch.tensor([[1.0], [2.0]]), np.array([1.0, 2.0]), [1, 2], (1.0, 2.0)]
)
def test_any_kind_of_two_numbers_is_a_score_of_two_samples(returned):
    scores = as_verifier(lambda samples, prompts: returned)(torch.zeros(2, 3))
    assert scores.shape == (2,)
    assert scores.tolist() == [1.0, 2.0]


def test_half_precision_is_scored_in_float32_and_float64_is_kept():
    assert as_verifier(lambda s, p: s.half()[:, 0])(torch.zeros(2, 3)).dtype == torch.float32
    assert as_verifier(lambda s, p: s.double()[:, 0])(torch.zeros(2, 3)).dtype == torch.float64


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (torch.zeros(3), "verifier 'mine' returned 3 scores for 4 samples"),
        (torch.zeros(4, 2), r"verifier 'mine' returned scores of shape \(4, 2\) for 4 samples"),
        (torch.tensor(1.0), r"returned scores of shape \(\) for 4 samples"),
        (None, "verifier 'mine' returned NoneType"),
        (["good", "bad", "good", "bad"], "verifier 'mine' returned list"),
        (torch.zeros(4, dtype=torch.complex64), "complex"),
    ],
)
def test_what_is_no_score_is_refused_by_name(returned, words):
    with pytest.raises(ValueError, match=words):
        as_verifier(lambda samples, prompts: returned, name="mine")(torch.zeros(4, 3))


def test_a_missing_answer_is_nan_and_a_prompt_that_is_needed_is_asked_for():
    assert math.isnan(as_verifier(lambda s, p: [None, 1.0])(torch.zeros(2, 3))[0])
    text = as_verifier(column(0, "clip", needs_text=True))
    for prompts in (None, "", ["a", None], [3, 4], ["a", " "]):
        with pytest.raises(ValueError, match="verifier 'clip' needs a text prompt"):
            text(torch.zeros(2, 3), prompts)
    assert text(torch.zeros(2, 3), "a cube").shape == (2,)
    with pytest.raises(ValueError, match="'clip' got 3 prompts for 2 samples"):
        text(torch.zeros(2, 3), ["a", "b", "c"])


def test_an_object_with_a_score_method_is_a_verifier():
    class Mine:
        name, space, sample_rate = "mine", "latent", None

        def score(self, samples, prompts):
            return samples[:, 0] * (self.sample_rate or 1)

    mine = Mine()
    verifier = as_verifier(mine)
    assert (verifier.name, verifier.space) == ("mine", "latent")
    verifier.sample_rate = 5
    assert verifier(torch.ones(2, 1)).tolist() == [5, 5]


def test_what_cannot_score_is_refused():
    with pytest.raises(TypeError, match="got int"):
        as_verifier(3)
    with pytest.raises(TypeError, match="RankEnsemble is a class: create one"):
        as_verifier(RankEnsemble)
    with pytest.raises(ValueError, match="space 'pixels'; possible: sample, latent, x0"):
        as_verifier(column(0, space="pixels"))


def test_a_verifier_scores_in_chunks_of_its_own_batch_size_without_a_graph_and_without_autocast():
    sizes = []

    class Small(Verifier):
        name, batch_size = "small", 3

        def measure(self, samples, prompts):
            sizes.append((len(samples), list(prompts)))
            assert not torch.is_grad_enabled()
            assert (samples @ samples.T).dtype == torch.float32
            return samples.sum(dim=1)

    samples = torch.arange(14.0).reshape(7, 2).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = Small()(samples, list("abcdefg"))
    assert scores.tolist() == samples.sum(dim=1).tolist()
    assert sizes == [(3, list("abc")), (3, list("def")), (1, ["g"])]


def test_only_a_differentiable_verifier_carries_gradients():
    samples = torch.ones(2, 3, requires_grad=True)
    plain, smooth = as_verifier(column(0)), as_verifier(column(1, differentiable=True))
    assert not plain(samples).requires_grad
    (3 * smooth)(samples).sum().backward()
    assert samples.grad.tolist() == [[0, 3, 0], [0, 3, 0]]
    assert not RankEnsemble([smooth, smooth]).differentiable
    assert not (plain + smooth).differentiable


def test_arithmetic_reads_like_arithmetic_and_looks_at_every_leaf_once():
    functions = [column(i, name) for i, name in enumerate("abc")]
    a, b, c = map(as_verifier, functions)
    total = a + 2 * b - c / 2 - (a * 0.5 - b)
    assert total.name == "a + 2*b - 0.5*c - 0.5*a + b"
    samples = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    x, y, z = samples.unbind(dim=1)
    torch.testing.assert_close(total(samples), 0.5 * x + 3 * y - 0.5 * z)
    assert [f.seen for f in functions] == [5, 5, 5]
    torch.testing.assert_close((-a)(samples), -x)
    with pytest.raises(TypeError, match="finite number"):
        a * "2"


def test_raw_scores_of_many_batches_combine_as_one_pool():
    ensemble = RankEnsemble([column(0, "clip"), as_verifier(column(1, "clip")) + as_verifier(column(2, "other"))])
    samples = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    parts = [ensemble.raw(samples[:2]), ensemble.raw(samples[2:])]
    assert list(parts[0]) == ["clip", "clip#2", "other"]
    assert list(parts[0]) == [part.name for part in ensemble.parts]
    for part in ensemble.parts:  # what a driver does
        assert part.score(samples, [None] * 6).equal(ensemble.raw(samples)[part.name])
    pool = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    assert ensemble.combine(pool).equal(ensemble(samples))
    assert not ensemble.combine(parts[0]).equal(ensemble(samples)[:2])  # ranks are of a pool
    with pytest.raises(ValueError, match="scores of clip#2 are missing"):
        ensemble.combine({"clip": torch.zeros(2), "other": torch.zeros(2)})


def test_leaves_of_different_spaces_each_take_their_own():
    both = as_verifier(column(0, "seen")) + as_verifier(column(0, "hidden", space="latent"))
    assert both.spaces == {"sample", "latent"}
    batch = {"sample": torch.ones(2, 1), "latent": torch.full((2, 1), 5.0)}
    assert both(batch).tolist() == [6, 6]
    with pytest.raises(ValueError, match="'hidden' wants 'latent', there is sample"):
        both({"sample": torch.ones(2, 1)})


SCORES = torch.tensor([[0.3, 0.1, 0.3, 0.2], [5.0, 5.0, 5.0, 5.0], [1.0, 3.0, 2.0, 2.0]], dtype=torch.float64)


def test_ranks_are_midranks_and_a_constant_row_has_no_effect():
    assert midranks(SCORES).tolist() == [[3.5, 1, 3.5, 2], [2.5] * 4, [1, 4, 2.5, 2.5]]
    with_constant = RankEnsemble.combine_rows(SCORES)
    without = RankEnsemble.combine_rows(SCORES[[0, 2]])
    assert with_constant.argsort(descending=True, stable=True).equal(without.argsort(descending=True, stable=True))


def test_weights_are_normalised_and_zero_switches_off():
    weights = torch.tensor([1.0, 0.0, 3.0])
    torch.testing.assert_close(
        RankEnsemble.combine_rows(SCORES, weights), (midranks(SCORES)[0] + 3 * midranks(SCORES)[2]) / 4
    )
    broken = torch.tensor([[1.0, 2.0], [INF, -INF]])
    assert ZEnsemble.combine_rows(broken, torch.tensor([1.0, 0.0])).tolist() == [-1.0, 1.0]


def test_z_and_minmax_use_the_population_spread_and_give_zero_for_a_constant_row():
    row = SCORES[2]
    torch.testing.assert_close(z_scores(SCORES)[2], (row - row.mean()) / row.std(unbiased=False))
    assert z_scores(SCORES)[1].tolist() == [0.0] * 4
    assert z_scores(torch.full((7,), 0.1, dtype=torch.float64)).tolist() == [0.0] * 7  # whatever the mean rounds to
    assert minmax_scores(SCORES).tolist()[1:] == [[0.0] * 4, [0.0, 1.0, 0.5, 0.5]]
    assert MinMaxEnsemble([column(2), column(2)])(SCORES.T).tolist() == [0.0, 1.0, 0.5, 0.5]


@pytest.mark.parametrize("ensemble", [RankEnsemble, ZEnsemble, MinMaxEnsemble])
@pytest.mark.parametrize("broken", [NAN, -INF])
def test_a_broken_score_is_the_worst_of_its_row_and_leaves_the_others_alone(ensemble, broken):
    rows = torch.tensor([[1.0, broken, 3.0, 2.0]], dtype=torch.float64)
    scores = ensemble.combine_rows(rows)
    assert scores.argmin() == 1
    assert scores[[0, 2, 3]].argsort().tolist() == [0, 2, 1]
    assert not torch.isnan(scores).any()


def test_ensembles_are_pooled_and_weights_are_checked():
    a, b = column(0), column(1)
    assert RankEnsemble([a, b]).pooled
    assert (2 * ZEnsemble([a, b])).pooled
    assert not (as_verifier(a) + as_verifier(b)).pooled
    assert isinstance(as_verifier([a, b]), RankEnsemble)
    for weights, words in (([1.0], "1 weights were given for 2"), ([1, -1], "at least 0"), ([0, 0], "not all 0")):
        with pytest.raises(ValueError, match=words):
            RankEnsemble([a, b], weights=weights)
    with pytest.raises(ValueError, match="RankEnsemble needs at least one verifier"):
        RankEnsemble([])


def test_a_floor_puts_candidates_below_it_last_and_the_closest_of_them_first():
    constrained = Constrained(column(0, "beauty"), floor=(column(1, "clip"), 0.3))
    samples = torch.tensor([[9.0, 0.1], [1.0, 0.3], [2.0, 0.5], [8.0, 0.2999]], dtype=torch.float64)
    scores = constrained(samples)
    assert scores.argsort(descending=True).tolist() == [2, 1, 3, 0]
    assert scores[1:3].tolist() == [1.0, 2.0]
    assert constrained.name == "beauty where clip >= 0.3"
    with pytest.raises(ValueError, match="floor is a pair"):
        Constrained(column(0), floor=0.3)


def test_the_cache_knows_samples_by_content_and_prompt():
    slow = column(0, "slow")
    cached = Cached(slow)
    samples = torch.tensor([[1.0], [2.0], [1.0], [3.0]])
    assert cached(samples, "x").tolist() == [1, 2, 1, 3]
    assert slow.seen == 3  # the first again within the batch is no new one
    assert cached(samples.flip(0), "x").tolist() == [3, 1, 2, 1]
    assert slow.seen == 3
    cached(samples, "y")
    assert slow.seen == 6
    pictures = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "red")]
    bright = Cached(lambda images, prompts: [np.asarray(image).sum() for image in images])
    assert bright(pictures)[0] == bright(pictures)[2]
    assert len(bright) == 2


def test_the_cache_forgets_the_oldest_and_never_keeps_nan():
    answers = iter([NAN, 4.0])
    cached = Cached(lambda samples, prompts: [next(answers)])
    assert math.isnan(cached(torch.ones(1, 1))[0])
    assert cached(torch.ones(1, 1)).tolist() == [4.0]
    small = Cached(column(0), max_entries=2)
    small(torch.arange(5.0)[:, None])
    assert len(small) == 2
    with pytest.raises(ValueError, match="cache its members"):
        Cached([column(0), column(1)])
