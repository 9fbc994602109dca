"""The driver of the noise search: any pipeline, its budget, its verifiers, and nothing of the user's changed."""

import inspect
import json
import math
import warnings

import numpy as np
import pytest
import tiny_pipelines
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)

from sparing.diffusion.search import Budget, Draft, Given, NoiseSearch, Proposal
from sparing.diffusion.search.algorithms import (
    ALGORITHMS,
    PRESETS,
    SMC,
    Evolutionary,
    Halving,
    Paths,
    Random,
    ZeroOrder,
)
from sparing.diffusion.search.drafts import fewer_steps
from sparing.diffusion.search.levels import probe
from sparing.diffusion.search.protocol import SearchState
from sparing.diffusion.search.verifiers.base import Verifier
from sparing.diffusion.search.verifiers.ensemble import RankEnsemble
from sparing.diffusion.search.verifiers.image_stats import Brightness, Contrast

STEPS = 6


def level(samples, prompts):
    """Mean of each sample, whatever its kind."""
    return samples.flatten(1).mean(1)


def algorithms():
    return [
        Random(5),
        ZeroOrder(2, 3),
        Halving(6, stops=(2, 4, 6), keeps=(3, 2, 1)),
        Paths(2, 2, start=4, ladder=[(2, 6)]),
        SMC(4, jitter=1),
        Evolutionary(4, children=3, jump=1, starts=(0, 0.5), elites=2),
    ]


NFE = {
    "random": 5 * STEPS,
    "zero_order": STEPS * (1 + 2 * 3),
    "halving": 6 * 2 + 3 * 2 + 2 * 2,
    "paths": 2 * 4 + 2 * 2 * (6 - 2),
    "evolutionary": 4 * STEPS + 3 * STEPS + 3 * (STEPS - 3),
}


def search(name="dit", algorithm=None, verifier=level, scheduler=None, **options):
    pipe, kwargs = tiny_pipelines.build(name)
    if scheduler is not None:
        pipe.scheduler = scheduler
    call = {name: options.pop(name) for name in ("num_inference_steps", "latents") if name in options}
    return NoiseSearch(pipe, verifier, algorithm or Random(4), **options)(
        **{**kwargs, "num_inference_steps": STEPS, **call}
    )


@pytest.mark.parametrize("name", tiny_pipelines.ALL)
def test_random_search_runs_on_every_pipeline_and_leaves_it_alone(name):
    pipe, kwargs = tiny_pipelines.build(name)
    scheduler, config, before = pipe.scheduler, dict(pipe.config), torch.get_rng_state()
    result = NoiseSearch(pipe, level, Random(3))(**kwargs, num_inference_steps=STEPS)
    assert pipe.scheduler is scheduler
    assert dict(pipe.config) == config
    assert "encode_prompt" not in vars(pipe)
    assert torch.equal(before, torch.get_rng_state())
    assert result.nfe == 3 * STEPS
    assert result.best.score == max(candidate.score for candidate in result.candidates)
    assert result.best.score == pytest.approx(float(result.best.sample.mean()), abs=1e-6)
    assert len({candidate.score for candidate in result.candidates}) == 3


def test_only_the_winner_of_a_batch_reaches_the_disk(tmp_path):
    def rising(samples, prompts):
        return torch.arange(float(len(samples)))

    result = search("dit", Random(6), rising, batch_size=6, out_dir=tmp_path, keep="best")
    assert [candidate.kept for candidate in result.candidates] == [False] * 5 + [True]
    assert {path.stem for path in (tmp_path / "samples").iterdir()} == {"p0_c5"}


@pytest.mark.parametrize("algorithm", algorithms(), ids=lambda a: a.name)
def test_every_algorithm_counts_what_it_costs_and_never_gets_worse(algorithm):
    result = search("dit", algorithm, scheduler=DDIMScheduler())
    if algorithm.name in NFE:
        assert result.nfe == NFE[algorithm.name]
    assert result.nfe == sum(candidate.nfe for candidate in result.candidates)
    assert result.forwards == 2 * result.nfe  # guidance
    curve = [score for _, score in result.best_of_prefix()]
    assert curve == sorted(curve)
    assert result.best.score == max(candidate.score for candidate in result.finished)
    again = search("dit", algorithm, scheduler=DDIMScheduler())
    assert [c.score for c in again.candidates] == [c.score for c in result.candidates]


def test_the_winner_can_be_made_again_from_its_noise():
    pipe, kwargs = tiny_pipelines.build("sd")
    result = NoiseSearch(pipe, level, ZeroOrder(2, 2))(**kwargs, num_inference_steps=STEPS)
    plain = pipe(**kwargs, num_inference_steps=STEPS, latents=result.best.noise[None], output_type="pt").images[0]
    torch.testing.assert_close(plain, result.best.sample, atol=1e-5, rtol=0)


def test_batch_sizes_change_nothing_but_rounding():
    runs = {size: search("dit", Random(8), batch_size=size) for size in (1, 3, 8)}
    one = runs[1]
    for other in (runs[3], runs[8]):
        assert [c.recipe for c in other.candidates] == [c.recipe for c in one.candidates]
        assert other.best.id == one.best.id
        assert torch.equal(other.best.noise, one.best.noise)
        for a, b in zip(one.candidates, other.candidates):
            assert a.score == pytest.approx(b.score, abs=1e-5)
    assert {c.batch_size for c in runs[3].candidates} == {3, 2}
    assert {c.batch_size for c in search("dit", Random(3), batch_size=3, strict=True).candidates} == {1}


def test_prompts_of_a_list_are_searched_as_if_alone():
    pipe, _ = tiny_pipelines.build("dit")
    kwargs = {"num_inference_steps": STEPS, "guidance_scale": 1.5}
    both = NoiseSearch(pipe, level, ZeroOrder(2, 2))([3, 1], **kwargs)
    alone = NoiseSearch(pipe, level, ZeroOrder(2, 2))([1], **kwargs)
    assert [result.prompt for result in both] == [3, 1]
    assert both[1].best.id == alone.best.id
    assert both[1].best.score == pytest.approx(alone.best.score, abs=1e-5)
    assert both[0].nfe == alone.nfe


def test_second_order_solvers_count_every_evaluation():
    result = search("sd", Random(2), scheduler=HeunDiscreteScheduler())
    assert result.num_steps == 2 * STEPS - 1
    assert result.nfe == 2 * (2 * STEPS - 1)


def test_a_budget_is_never_exceeded():
    result = search("dit", Random(8), budget="20nfe")
    assert (result.nfe, len(result.candidates)) == (18, 3)
    assert len(search("dit", ZeroOrder(4, 4), budget=Budget(candidates=6)).candidates) == 6
    quick = search("dit", Random(64), budget="0.001s", batch_size=2)
    assert 2 <= len(quick.candidates) < 64  # looked at before each batch


@pytest.mark.parametrize("budget", [{"nfe": 0}, {"seconds": 0}, {"candidates": -1}])
def test_budgets_that_allow_nothing_are_refused(budget):
    with pytest.raises(ValueError, match="budget must allow at least one candidate"):
        Budget(**budget)


@pytest.mark.parametrize(
    ("algorithm", "budget", "options"),
    [
        (Halving(4, stops=(2, STEPS), keeps=(1, 1)), 8, {}),
        (Halving(4, stops=(2, STEPS), keeps=(2, 1)), 13, {}),
        (Random(4, keep=1), 8, {"draft": fewer_steps(2)}),
        (SMC(3, jitter=0, checks=(2, STEPS), select="sample"), 3 * STEPS, {"scheduler": DDPMScheduler()}),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_the_sample_that_is_shown_costs_nothing_more(algorithm, budget, options, seed):
    result = search("dit", algorithm, budget=f"{budget}nfe", seed=seed, **options)
    assert result.nfe == sum(candidate.nfe for candidate in result.candidates) <= budget
    assert result.rerun_nfe == 0
    assert result.best.sample is not None
    torch.testing.assert_close(float(result.best.sample.mean()), result.best.score, atol=1e-5, rtol=0)


def test_a_verifier_that_works_in_place_harms_nobody():
    def rough(samples, prompts):
        return samples.sub_(samples.mean()).flatten(1).std(1)

    class Own(Verifier):
        name = "own"

        def measure(self, samples, prompts):
            return samples.zero_().flatten(1).sum(1)

    result = search("dit", Random(3), [rough, Own(), level], keep="all")
    for candidate in result.candidates:
        assert candidate.scores["level"] == pytest.approx(float(candidate.sample.mean()), abs=1e-6)
    assert result.best.sample.abs().max() > 0


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_the_published_paths_run_with_their_own_steps(scheduler):
    found = PRESETS["sit-xl-256-paths"]
    timetable = scheduler()
    timetable.set_timesteps(found["call"]["num_inference_steps"])
    levels, order = probe(timetable), timetable.order
    state = SearchState(num_steps=levels.num_steps, levels=levels.pairs, family=levels.family, order=order)
    first, rungs = ALGORITHMS[found["algorithm"]](**found["kwargs"])._rungs(state)
    assert rungs[-1][1] == levels.num_steps
    for (back, land), current in zip(rungs, [first, *(land for _, land in rungs)]):
        assert back < current < land
        assert all(index % order == 0 for index in (back, current))


def test_a_budget_below_one_run_says_so():
    with pytest.raises(ValueError, match="one takes 6 NFE, the budget is 5"):
        search("dit", Random(4), budget="5nfe")
    with pytest.raises(ValueError, match="write 400nfe, 90s"):
        search("dit", Random(4), budget="a lot")


@pytest.mark.parametrize(
    "as_returned",
    [lambda s: s[:, None], lambda s: s.numpy(), lambda s: s.tolist(), lambda s: np.float32(s.numpy())],
    ids=["column", "numpy", "list", "float32"],
)
def test_scores_of_any_kind_are_taken(as_returned):
    plain = search("dit")
    assert search("dit", verifier=lambda s, p: as_returned(level(s, p))).best.score == pytest.approx(plain.best.score)


def test_a_wrong_number_of_scores_is_refused_by_name():
    def tired(samples, prompts):
        return level(samples, prompts)[:-1]

    with pytest.raises(ValueError, match="verifier 'tired' returned 3 scores for 4 samples"):
        search("dit", verifier=tired, batch_size=4)


def test_one_nan_counts_as_the_worst_and_all_nan_is_an_error():
    def picky(samples, prompts):
        scores = level(samples, prompts)
        return torch.where(scores == scores.max(), math.nan, scores)

    with pytest.warns(UserWarning, match="NaN and count as the worst"):
        result = search("dit", verifier=picky, batch_size=4)
    assert math.isfinite(result.best.score)
    with pytest.raises(ValueError, match="every one of 4 scores is NaN"):
        search("dit", verifier=lambda s, p: [math.nan] * len(s), batch_size=4)


def test_a_verifier_that_fails_on_one_candidate_loses_that_one_only(tmp_path):
    plain = search("dit", batch_size=4)
    bad = plain.best.score

    def fragile(samples, prompts):
        scores = level(samples, prompts)
        if bool((scores - bad).abs().min() < 1e-6):
            raise ZeroDivisionError("too good")
        return scores

    with pytest.warns(UserWarning, match="fragile: ZeroDivisionError: too good"):
        result = search("dit", verifier=fragile, batch_size=4, out_dir=tmp_path)
    assert result.best.id != plain.best.id
    assert result.candidates[plain.best.id].error == "fragile: ZeroDivisionError: too good"
    records = [json.loads(line) for line in (tmp_path / "candidates.jsonl").read_text().splitlines()[1:]]
    assert records[plain.best.id]["score"] == "nan"


def test_a_verifier_that_always_fails_is_an_error_of_its_own():
    def broken(samples, prompts):
        raise KeyError("no weights")

    with pytest.raises(KeyError, match="no weights"):
        search("dit", verifier=broken)


def test_after_an_exception_everything_is_as_before():
    pipe, kwargs = tiny_pipelines.build("sd")
    scheduler, state = pipe.scheduler, torch.get_rng_state()
    bar = getattr(pipe, "_progress_bar_config", None)

    def broken(samples, prompts):
        torch.rand(3)
        raise KeyError("no weights")

    with pytest.raises(KeyError):
        NoiseSearch(pipe, broken, Random(2))(**kwargs, num_inference_steps=STEPS)
    assert pipe.scheduler is scheduler
    assert torch.equal(state, torch.get_rng_state())
    assert getattr(pipe, "_progress_bar_config", None) == bar
    assert not pipe.unet._forward_pre_hooks


def test_running_out_of_memory_halves_the_batch_and_changes_nothing(monkeypatch):
    plain = search("dit", Random(8), batch_size=4)
    pipe, kwargs = tiny_pipelines.build("dit")
    rows, real = [], type(pipe).__call__

    def small_card(self, class_labels, **kwargs):
        rows.append(len(class_labels))
        if len(class_labels) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return real(self, class_labels, **kwargs)

    small_card.__signature__ = inspect.signature(real)
    monkeypatch.setattr(type(pipe), "__call__", small_card)
    result = NoiseSearch(pipe, level, Random(8), batch_size=8)(**kwargs, num_inference_steps=STEPS)
    assert rows == [1, 8, 4, 2, 2, 2, 2]  # the probe, then halved twice
    assert result.best.id == plain.best.id
    assert [c.id for c in result.candidates] == list(range(8))
    assert result.nfe == plain.nfe


def test_ranks_are_taken_over_all_candidates_at_the_end():
    ensemble = RankEnsemble([Brightness(0.5), Contrast()])
    result = search("dit", Random(6), verifier=ensemble, batch_size=2)
    raw = [[c.scores[name] for c in result.candidates] for name in ("brightness", "contrast")]
    ranks = [[sum(other < one for other in row) + 1 for one in row] for row in raw]
    mean = [sum(pair) / 2 for pair in zip(*ranks)]
    assert result.best.score == max(mean)
    assert [c.score for c in result.candidates] == mean
    with pytest.raises(ValueError, match="SMC needs absolute rewards"):
        search("dit", SMC(4, jitter=1), verifier=ensemble)


def test_a_scheduler_that_cannot_be_stopped_is_named():
    scheduler = PNDMScheduler(skip_prk_steps=True)
    assert search("sd", Random(2), scheduler=scheduler).best.score > 0
    for algorithm in (Halving(4, stops=(3, 6), keeps=(2, 1)), Paths(2, 2, start=4, ladder=[(2, 6)])):
        with pytest.raises(ValueError, match="PNDMScheduler cannot be stopped"):
            search("sd", algorithm, scheduler=PNDMScheduler(skip_prk_steps=True))


def test_particles_part_only_under_a_stochastic_sampler():
    with pytest.raises(ValueError, match="particles cannot separate under a deterministic sampler"):
        search("dit", SMC(4), scheduler=DDIMScheduler())
    result = search("dit", SMC(4, checks=(2, 4, 6), lam=50.0, ess_threshold=1.0), scheduler=DDPMScheduler())
    scores = [c.score for c in result.finished]
    assert len(set(scores)) == 4
    assert result.nfe == 4 * STEPS


def test_arguments_that_the_search_decides_are_refused():
    pipe, kwargs = tiny_pipelines.build("sd")
    one = NoiseSearch(pipe, level, Random(2))
    with pytest.raises(ValueError, match="output_type cannot be given"):
        one(**kwargs, output_type="pil")
    with pytest.raises(ValueError, match="generator cannot be given"):
        one(**kwargs, generator=torch.Generator())
    with pytest.raises(ValueError, match="num_images_per_prompt=2"):
        one(**kwargs, num_images_per_prompt=2)
    with pytest.raises(TypeError, match="DiTPipeline takes no steps"):
        NoiseSearch(tiny_pipelines.build("dit")[0], level, Random(2))([1], steps=3)
    with pytest.raises(TypeError, match="an algorithm has name"):
        NoiseSearch(pipe, level, Random)
    with pytest.raises(ValueError, match='batch_size must be "auto" or at least 1'):
        NoiseSearch(pipe, level, Random(2), batch_size=0)


def test_noises_that_are_handed_in_are_candidates():
    class Mine:
        name = "mine"

        def config(self):
            return {"name": self.name}

        def run(self, state):
            yield [Proposal(Given(key), 0, state.num_steps, index=i) for i, key in enumerate(state.given)]

    pipe, kwargs = tiny_pipelines.build("sd")
    shape = NoiseSearch(pipe, level, Random(1))(**kwargs, num_inference_steps=2).best.noise.shape
    noises = torch.randn(2, *shape, generator=torch.Generator().manual_seed(5))
    result = NoiseSearch(pipe, level, Mine())(**kwargs, num_inference_steps=STEPS, latents=noises)
    assert len(result.candidates) == 2
    assert torch.equal(result.best.noise, noises[result.best.id])
    with pytest.raises(ValueError, match="latents must be a tensor of noises"):
        NoiseSearch(pipe, level, Mine())(**kwargs, num_inference_steps=2, latents=noises[:, :1])


@pytest.mark.parametrize("algorithm", algorithms(), ids=lambda algorithm: algorithm.name)
def test_every_algorithm_begins_with_the_noises_that_are_handed_in(algorithm):
    pipe, kwargs = tiny_pipelines.build("sd")
    shape = NoiseSearch(pipe, level, Random(1))(**kwargs, num_inference_steps=2).best.noise.shape
    own = torch.randn(1, *shape, generator=torch.Generator().manual_seed(5))
    result = NoiseSearch(pipe, level, algorithm)(**kwargs, num_inference_steps=STEPS, latents=own)
    fresh = NoiseSearch(pipe, level, algorithm)(**kwargs, num_inference_steps=STEPS)
    assert isinstance(result.candidates[0].recipe, Given)
    assert not isinstance(fresh.candidates[0].recipe, Given)
    assert result.candidates[0].score != fresh.candidates[0].score
    many = torch.randn(99, *shape)
    with pytest.raises(ValueError, match="latents holds 99 noises"):
        NoiseSearch(pipe, level, algorithm)(**kwargs, num_inference_steps=STEPS, latents=many)


def test_drafts_are_ranked_and_only_the_winners_run_in_full():
    full = search("dit", Random(6))
    result = search("dit", Random(6, keep=2), draft=Draft(kwargs={"num_inference_steps": 3}))
    drafts = [c for c in result.candidates if c.via == "draft"]
    assert (len(drafts), len(result.finished)) == (6, 2)
    assert result.nfe == 6 * 3 + 2 * STEPS
    best_drafts = sorted(drafts, key=lambda c: -c.score)[:2]
    assert {c.parent for c in result.finished} == {c.id for c in best_drafts}
    for candidate in result.finished:  # the same noise in full
        assert candidate.score == pytest.approx(full.candidates[candidate.index].score, abs=1e-5)
    with pytest.raises(ValueError, match="no draft sampler"):
        search("dit", Random(6, keep=2))


def test_drafts_of_other_latents_are_refused():
    other, _ = tiny_pipelines.build("ddpm")
    with pytest.raises((ValueError, TypeError), match=r"takes no|the draft's latents have shape"):
        search("dit", Random(6, keep=2), draft=Draft(pipe=other))


def test_a_held_out_verifier_that_fails_loses_nothing():
    def broken(samples, prompts):
        raise KeyError("no weights")

    with pytest.warns(UserWarning, match="'broken' failed and says nothing.*no weights"):
        result = search("dit", Random(2), report=[broken, Contrast()])
    assert result.best.sample is not None
    assert math.isnan(result.report["broken"]["best"])
    assert math.isfinite(result.report["contrast"]["best"])


def test_held_out_verifiers_flag_a_bad_verifier_and_not_a_good_one():
    def dark(samples, prompts):
        return -level(samples, prompts)

    def also_bright(samples, prompts):
        return level(samples, prompts) * 2

    with pytest.warns(UserWarning, match="may exploit its verifier"):
        result = search("dit", Random(8), report=[dark])
    assert result.report["dark"]["best"] < result.report["dark"]["first"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*may exploit.*")
        search("dit", Random(8), report=[also_bright])
