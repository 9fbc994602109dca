"""Verifiers that look at the way of a run, and those that ask the pipeline's own network."""

import math

import pytest
import tiny_pipelines
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler
from test_search_driver import STEPS, search

from sparing.diffusion.search import NoiseSearch
from sparing.diffusion.search.algorithms import SMC, Halving, Paths, Random, ZeroOrder
from sparing.diffusion.search.call import Call
from sparing.diffusion.search.probing import denoising_errors, looks_of, run_watched, watched_cut
from sparing.diffusion.search.sampler import Sampler
from sparing.diffusion.search.seeds import gaussian
from sparing.diffusion.search.verifiers import DenoisingError, SelfConsistency, Sharpness, make_verifier
from sparing.diffusion.search.verifiers.base import Verifier, as_verifier


def pixels(images):
    return images.flatten(1) - 0.4


def sampler_of(pipe, kwargs, steps=STEPS):
    return Sampler(pipe, Call(pipe, {**kwargs, "num_inference_steps": steps}))


@pytest.mark.parametrize("name", tiny_pipelines.ALL)
def test_a_watched_run_is_the_uncut_run_and_shows_the_pipelines_own_estimate(name):
    sampler = sampler_of(*tiny_pipelines.build(name))
    with sampler.open():
        level = sampler.levels.level(2)
        cut = watched_cut(sampler, level)
        z = torch.stack([gaussian(sampler.shape, seed) for seed in range(2)])
        plain = sampler.run(z, [0, 0], 0, STEPS, seeds=[0, 1])
        stopped = sampler.run(z, [0, 0], 0, cut, seeds=[0, 1])
        output, early = run_watched(sampler, z, [0, 0], 0, STEPS, level=level, seeds=[0, 1])
    assert cut == 3
    assert torch.equal(output.samples, plain.samples)
    assert torch.equal(output.latents, plain.latents)
    assert torch.equal(early, stopped.samples)
    assert early.shape == output.samples.shape
    assert (output.calls, output.forwards) == (plain.calls, plain.forwards)


def test_self_consistency_is_the_cosine_in_closed_form_and_costs_no_evaluation():
    result = search("dit", Random(3), SelfConsistency(pixels, level=0.5), keep="all")
    pipe, kwargs = tiny_pipelines.build("dit")
    sampler = sampler_of(pipe, kwargs)
    with sampler.open():
        cut = watched_cut(sampler, 0.5)
        for candidate in result.candidates:
            noise = gaussian(sampler.shape, candidate.recipe.seed)[None]
            early = sampler.run(noise, [0], 0, cut, seeds=[0]).samples
            a, b = pixels(early)[0], pixels(candidate.sample[None])[0]
            assert candidate.score == pytest.approx(float(a @ b / (a.norm() * b.norm())), abs=1e-5)
    assert result.nfe == 3 * STEPS
    assert len({candidate.score for candidate in result.candidates}) == 3


@pytest.mark.parametrize("name", ["wan", "audioldm"])
def test_self_consistency_of_videos_and_sounds(name):
    def encode(samples):
        return samples.flatten(1)

    result = search(name, Random(2), SelfConsistency(encode, level=tiny_level(name)))
    assert all(-1 <= candidate.score <= 1 for candidate in result.candidates)


def tiny_level(name):
    sampler = sampler_of(*tiny_pipelines.build(name))
    with sampler.open():
        return sampler.levels.level(3)


def test_video_cosines_are_averaged_over_frames():
    torch.manual_seed(0)
    pairs = torch.rand(3, 2, 4, 3, 8, 8)
    scores = SelfConsistency(pixels).score(pairs)
    frames = torch.stack([SelfConsistency(pixels).score(pairs[:, :, i]) for i in range(4)])
    torch.testing.assert_close(scores, frames.mean(0))


@pytest.mark.parametrize("name", tiny_pipelines.ALL)
def test_the_denoising_error_is_that_of_the_networks_noise(name):
    """By hand: re-noise, one window of the schedule, eps of its x0_hat."""
    sampler = sampler_of(*tiny_pipelines.build(name))
    with sampler.open():
        levels = [sampler.levels.level(i) for i in (2, 4)]
        clean = torch.stack([gaussian(sampler.shape, seed) for seed in range(3)]).to(sampler.dtype)
        errors, calls, _ = denoising_errors(sampler, clean, [0] * 3, levels)
        alone, _, _ = denoising_errors(sampler, clean[1:2], [0], levels)
        assert calls == 2
        for column, index in enumerate((2, 4)):
            a, b = sampler.levels.pairs[index]
            eps = gaussian(sampler.shape, column)
            noised = a * clean + b * eps
            x0_hat = sampler.run(noised, [0] * 3, index, index + 1, seeds=[0] * 3, decode=False).x0_hat
            guess = (noised - a * x0_hat) / b
            expected = (guess - eps).square().flatten(1).mean(1)
            torch.testing.assert_close(errors[:, column], expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(alone[0], errors[1], rtol=1e-4, atol=1e-5)
    assert bool((errors > 0).all())


def test_a_network_that_knows_the_data_prefers_it(monkeypatch):
    """With the exact denoiser of a point mass at m the error of a sample x is (a/b)^2 mean (x - m)^2."""
    pipe, kwargs = tiny_pipelines.build("ddim")
    mean = torch.full((3, 8, 8), 0.25)
    alphas = pipe.scheduler.alphas_cumprod

    def forward(sample, timestep, **_):
        alpha = alphas[int(torch.as_tensor(timestep).flatten()[0])]
        return type("Out", (), {"sample": (sample - alpha.sqrt() * mean) / (1 - alpha).sqrt()})()

    monkeypatch.setattr(pipe.unet, "forward", forward)
    pipe.scheduler.register_to_config(clip_sample=False)
    sampler = sampler_of(pipe, kwargs)
    with sampler.open():
        level = sampler.levels.level(3)
        a, b = sampler.levels.pairs[3]
        clean = torch.stack([mean, mean + 0.5, mean - 1.0])
        errors, _, _ = denoising_errors(sampler, clean, [0] * 3, [level])
    expected = (a / b) ** 2 * torch.tensor([0.0, 0.25, 1.0])
    torch.testing.assert_close(errors[:, 0], expected, atol=1e-4, rtol=1e-4)


def test_its_evaluations_are_counted_and_kept_within_the_budget():
    verifier = DenoisingError([0.4, 0.8])
    result = search("dit", Random(4), verifier)
    assert result.nfe == 4 * (STEPS + 2)
    assert all(candidate.nfe == STEPS + 2 for candidate in result.candidates)
    assert search("dit", Random(9), verifier, budget=f"{3 * (STEPS + 2) - 1}nfe").nfe == 2 * (STEPS + 2)
    with pytest.raises(ValueError, match=f"one takes {STEPS + 2} NFE"):
        search("dit", Random(2), verifier, budget=f"{STEPS + 1}nfe")


@pytest.mark.parametrize(
    "algorithm", [ZeroOrder(2, 2), Halving(4, stops=(2, 4, 6), keeps=(2, 2, 1)), Paths(2, 2, start=4, ladder=[(2, 6)])]
)
def test_every_algorithm_can_ask_the_network(algorithm):
    result = search("dit", algorithm, DenoisingError(0.5))
    assert math.isfinite(result.best.score)
    assert result.best.score < 0


def test_both_join_other_verifiers():
    verifier = SelfConsistency(pixels) + 0.1 * DenoisingError(0.5) + Sharpness()
    result = search("dit", Random(3), verifier)
    assert set(result.best.scores) == {"self_consistency", "denoising_error", "sharpness"}


def test_a_search_goes_on_and_batches_change_nothing(tmp_path):
    verifier = SelfConsistency(pixels) + DenoisingError(0.5)
    whole = search("sd", Random(5), verifier, batch_size=5)
    part = search("sd", Random(5), verifier, batch_size=2, out_dir=tmp_path)
    log = tmp_path / "candidates.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:3]))
    again = search("sd", Random(5), verifier, batch_size=2, out_dir=tmp_path)
    assert [c.score for c in again.candidates] == [c.score for c in part.candidates]
    assert again.nfe == part.nfe == whole.nfe
    assert [c.score for c in whole.candidates] == pytest.approx([c.score for c in part.candidates], abs=1e-4)


@pytest.mark.parametrize("level", [0.1, 0.45, 0.7, 0.9])
def test_second_order_solvers_are_asked_at_the_nearest_entry_they_can_run(level):
    sampler = sampler_of(*tiny_pipelines.build_with("wan", FlowMatchHeunDiscreteScheduler()), steps=10)
    with sampler.open():
        levels = [b for _, b in sampler.levels.pairs]
        asked = []
        run = sampler.run
        sampler.run = lambda *args, **kwargs: asked.append(args[2]) or run(*args, **kwargs)
        denoising_errors(sampler, torch.zeros(1, *sampler.shape), [0], [level])
        cut = watched_cut(sampler, level)
    even = range(0, len(levels) - 1, 2)
    assert abs(levels[asked[0]] - level) == min(abs(levels[i] - level) for i in even)
    odd = range(1, len(levels) - 2, 2)
    assert abs(levels[cut - 1] - level) == min(abs(levels[i] - level) for i in odd)


@pytest.mark.parametrize("name", ["sd", "sd-euler", "pixart", "audioldm", "flux", "wan"])
def test_bfloat16_pipelines_can_be_asked_and_renoised(name):
    pipe, kwargs = tiny_pipelines.build(name)
    pipe.to(torch.bfloat16)
    half = {
        key: v.bfloat16() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for key, v in kwargs.items()
    }
    call = {**half, "num_inference_steps": STEPS}
    result = NoiseSearch(pipe, DenoisingError(tiny_level(name)), Random(2))(**call)
    assert math.isfinite(result.best.score)
    paths = Paths(2, 2, start=4, ladder=[(2, 6)], renoise="resample_x0")
    assert math.isfinite(NoiseSearch(pipe, lambda s, _: s.flatten(1).mean(1), paths)(**call).best.score)


def test_a_second_order_solver_is_cut_between_its_pairs():
    result = search("sd", Random(2), SelfConsistency(pixels) + DenoisingError(0.5), scheduler=HeunDiscreteScheduler())
    assert math.isfinite(result.best.score)


def test_what_cannot_be_watched_is_refused_by_name():
    with pytest.raises(ValueError, match="PNDMScheduler cannot be stopped"):
        search("sd", Random(2), SelfConsistency(pixels), scheduler=PNDMScheduler())
    with pytest.raises(ValueError, match=r"finished runs that pass level 0\.4"):
        search("dit", Halving(4, stops=(2, 6), keeps=(2, 1)), SelfConsistency(pixels))
    with pytest.raises(ValueError, match="finished runs"):
        search("dit", SMC(4, jitter=1), SelfConsistency(pixels))
    with pytest.raises(ValueError, match="1 step is too few"):
        search("flux", Random(2), SelfConsistency(pixels), num_inference_steps=1)
    with pytest.raises(ValueError, match="off the schedule"):
        search("dit", Random(2), DenoisingError(7))
    with pytest.raises(ValueError, match="off the schedule"):
        search("dit", Random(2), SelfConsistency(pixels, level=7))


def test_arguments_are_checked():
    for levels in ([], [0.2, -1], [True], ["a"], 0):
        with pytest.raises(ValueError, match="positive noise levels"):
            DenoisingError(levels)
    with pytest.raises(ValueError, match="positive noise levels"):
        SelfConsistency(pixels, level=0)
    with pytest.raises(ValueError, match="watch one level"):
        looks_of((SelfConsistency(pixels, level=0.2), SelfConsistency(pixels, level=0.4)))
    with pytest.raises(ValueError, match="held-out verifiers see finished samples only"):
        search("dit", Random(2), report=[DenoisingError()])


def test_a_users_function_may_look_too():
    def drift(pairs, prompts):
        return -(pairs[:, 0] - pairs[:, 1]).flatten(1).norm(dim=1)

    drift.space, drift.levels = "path", (0.5,)
    assert search("dit", Random(2), drift).best.score < 0
    drift.levels = ()
    with pytest.raises(ValueError, match="levels go with the spaces"):
        as_verifier(drift)

    class Own(Verifier):
        name, space = "own", "denoising"

        def measure(self, samples, prompts):
            return samples.sum(1)

    with pytest.raises(ValueError, match="'own': levels go with the spaces"):
        search("dit", Random(2), Own())


def test_by_name():
    verifier = make_verifier("denoising_error:levels=[0.2,0.6]")
    assert verifier.levels == (0.2, 0.6)
    assert make_verifier("denoising_error:levels=0.5").levels == (0.5,)
    consistency = make_verifier("self_consistency:encoder=vit_micro_patch4_28.demo_fashion,level=0.3")
    assert consistency.levels == (0.3,)
    with pytest.raises(ValueError, match="needs encoder"):
        make_verifier("self_consistency")
