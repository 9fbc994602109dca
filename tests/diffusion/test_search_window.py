"""The windowed scheduler: any pipeline, any part of its schedule, nothing of the user's changed."""

import inspect

import pytest
import tiny_pipelines
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from sparing.diffusion.respaced import RespacedScheduler
from sparing.diffusion.search.call import Call
from sparing.diffusion.search.sampler import Sampler
from sparing.diffusion.search.seeds import gaussian
from sparing.diffusion.search.window import Window, windowed

STEPS = 6


def sampler_of(pipe, kwargs, steps=STEPS):
    return Sampler(pipe, Call(pipe, {**kwargs, "num_inference_steps": steps}))


def noises(sampler, count):
    return torch.stack([gaussian(sampler.shape, seed) for seed in range(count)])


def in_two(sampler, cut, count=2):
    """(latents of a whole run, of one that was stopped at ``cut`` and went on)."""
    z, seeds = noises(sampler, count), list(range(count))
    whole = sampler.run(z, [0] * count, 0, sampler.num_steps, seeds=seeds)
    half = sampler.run(z, [0] * count, 0, cut, seeds=seeds)
    streams = sampler.generators_after
    histories = None if half.history[0] is None else half.history
    rest = sampler.run(
        half.latents, [0] * count, cut, sampler.num_steps, seeds=seeds, states=streams, histories=histories
    )
    return whole, rest


@pytest.mark.parametrize("name", tiny_pipelines.ALL)
def test_a_split_run_equals_the_whole_one_on_every_pipeline(name):
    sampler = sampler_of(*tiny_pipelines.build(name))
    with sampler.open():
        whole, rest = in_two(sampler, 2)
    assert torch.equal(whole.latents, rest.latents)
    assert torch.equal(whole.samples, rest.samples)
    assert whole.calls == STEPS
    assert whole.samples.ndim == {"image": 4, "video": 5, "audio": 3}[sampler.kind]


@pytest.mark.parametrize("name", ["flux", "sd", "sd-euler", "pixart", "wan", "ltx"])
def test_the_windowed_run_equals_the_plain_run(name):
    pipe, kwargs = tiny_pipelines.build(name)
    sampler = sampler_of(pipe, kwargs)
    with sampler.open():
        z = noises(sampler, 2)
        windowed_run = sampler.run(z, [0, 0], 0, STEPS, seeds=[0, 1])
    arguments = Call(pipe, {**kwargs, "num_inference_steps": STEPS}).rows([0, 0])
    plain = pipe(**arguments, latents=z.clone(), output_type="pt")[0]
    assert torch.equal(windowed_run.samples, plain)


@pytest.mark.parametrize("name", ["dit", "ddim"])
def test_noise_put_in_place_equals_the_pipelines_own_draw(name):
    """These pipelines take no latents; their own draw from the same generators is the same noise."""
    pipe, kwargs = tiny_pipelines.build(name)
    sampler = sampler_of(pipe, kwargs)
    with sampler.open():
        ours = sampler.run(noises(sampler, 3), [0] * 3, 0, STEPS, seeds=[7, 8, 9])
    arguments = Call(pipe, {**kwargs, "num_inference_steps": STEPS}).rows([0] * 3)
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    plain = pipe(**arguments, generator=generators, output_type="pt")[0]
    assert torch.equal(ours.samples, plain)


SCHEDULERS = {
    "ddim": (DDIMScheduler, {}, 2),
    "ddpm": (DDPMScheduler, {}, 2),
    "euler-linspace": (EulerDiscreteScheduler, {"timestep_spacing": "linspace"}, 3),
    "euler-leading": (EulerDiscreteScheduler, {"timestep_spacing": "leading"}, 3),
    "euler-ancestral": (EulerAncestralDiscreteScheduler, {}, 2),
    "heun": (HeunDiscreteScheduler, {}, 4),
    "dpm++": (DPMSolverMultistepScheduler, {}, 3),
    "dpm++1": (DPMSolverMultistepScheduler, {"solver_order": 1}, 3),
    "dpm++3": (DPMSolverMultistepScheduler, {"solver_order": 3}, 3),
    "sde-dpm++": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, 3),
    "unipc": (UniPCMultistepScheduler, {}, 3),
    "deis": (DEISMultistepScheduler, {}, 3),
    "lcm": (LCMScheduler, {}, 3),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_go_on_where_they_stopped(name):
    kind, config, cut = SCHEDULERS[name]
    torch.manual_seed(0)
    sampler = sampler_of(*tiny_pipelines.stable_diffusion(kind(**config)))
    with sampler.open():
        whole, rest = in_two(sampler, cut)
        assert sampler.order == (2 if name == "heun" else 1)
        assert sampler.num_steps == (2 * STEPS - 1 if name == "heun" else STEPS)
        assert sampler.stochastic == (name in ("ddpm", "euler-ancestral", "sde-dpm++", "lcm"))
    assert torch.equal(whole.latents, rest.latents)


@pytest.mark.parametrize("config", [{}, {"use_dynamic_shifting": True}, {"shift": 3.0}, {"stochastic_sampling": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flow_schedulers_go_on_where_they_stopped(config, dtype):
    torch.manual_seed(0)
    pipe, kwargs = tiny_pipelines.flux(FlowMatchEulerDiscreteScheduler(**config))
    pipe.to(dtype)
    kwargs = {name: value.to(dtype) if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()}
    sampler = sampler_of(pipe, kwargs)
    with sampler.open():
        whole, rest = in_two(sampler, 3)
        assert sampler.stochastic == ("stochastic_sampling" in config)
    assert whole.latents.dtype == dtype
    assert torch.equal(whole.latents, rest.latents)


def test_flow_heun_goes_on_at_even_entries():
    torch.manual_seed(0)
    pipe, kwargs = tiny_pipelines.ltx(FlowMatchHeunDiscreteScheduler())
    pipe.scheduler.set_timesteps(STEPS)
    sampler = sampler_of(*tiny_pipelines.flux(FlowMatchEulerDiscreteScheduler()))
    with sampler.open():
        whole, rest = in_two(sampler, 4)
    assert torch.equal(whole.latents, rest.latents)


def test_our_own_scheduler_is_searched_along():
    torch.manual_seed(0)
    sampler = sampler_of(*tiny_pipelines.dit(RespacedScheduler()))
    with sampler.open():
        whole, rest = in_two(sampler, 2)
    assert torch.equal(whole.latents, rest.latents)


def test_stochastic_candidates_are_the_same_alone_and_in_a_batch():
    """DiTPipeline hands its scheduler no generator: without the window's, rows would share one stream."""
    torch.manual_seed(0)
    sampler = sampler_of(*tiny_pipelines.dit(DDPMScheduler()))
    with sampler.open():
        z = noises(sampler, 3)
        together = sampler.run(z, [0] * 3, 0, STEPS, seeds=[4, 5, 6])
        alone = sampler.run(z[1:2], [0], 0, STEPS, seeds=[5])
    assert sampler.stochastic
    size = float(together.latents.abs().max())  # rounding of other batch sizes, seven steps of a random network
    torch.testing.assert_close(together.latents[1:2], alone.latents, atol=2e-5 * size, rtol=0)


def test_pndm_is_refused_in_parts_and_runs_whole():
    torch.manual_seed(0)
    sampler = sampler_of(*tiny_pipelines.stable_diffusion(PNDMScheduler(skip_prk_steps=True)))
    with sampler.open():
        z = noises(sampler, 1)
        assert not sampler.resumable
        assert sampler.run(z, [0], 0, sampler.num_steps, seeds=[0]).calls == sampler.num_steps
        with pytest.raises(ValueError, match=r"PNDMScheduler cannot be stopped .* usable schedulers: DDIM, DDPM"):
            sampler.run(z, [0], 0, 2, seeds=[0])


def test_the_estimate_before_the_end_is_what_the_pipeline_decodes():
    sampler = sampler_of(*tiny_pipelines.build("flux"))
    with sampler.open():
        z = noises(sampler, 2)
        half = sampler.run(z, [0, 0], 0, 3, seeds=[0, 1])
        exact = sampler.run(z, [0, 0], 0, 3, seeds=[0, 1], exact=True)
        next_one = sampler.run(half.latents, [0, 0], 3, 4, seeds=[0, 1])
        sigma = sampler.levels.pairs
    assert (half.calls, exact.calls) == (3, 4)
    assert torch.equal(half.latents, exact.latents)
    assert torch.equal(exact.x0_hat, next_one.x0_hat)
    assert not torch.equal(half.samples, exact.samples)
    # a flow step is linear: x at the next level lies between x and x0_hat
    share = sigma[4][1] / sigma[3][1]
    expected = share * half.latents + (1 - share) * next_one.x0_hat
    torch.testing.assert_close(next_one.latents, expected, atol=1e-5, rtol=0)


def test_latents_alone_spare_the_decoder():
    pipe, kwargs = tiny_pipelines.build("dit")
    sampler = sampler_of(pipe, kwargs)
    calls = []
    pipe.vae.decoder.register_forward_hook(lambda *_: calls.append(1))
    with sampler.open():
        out = sampler.run(noises(sampler, 2), [0, 0], 0, 3, seeds=[0, 1], decode=False)
    assert out.samples is None
    assert not calls


def test_signatures_show_through_and_everything_is_as_before_after_an_error():
    pipe, kwargs = tiny_pipelines.build("sd")
    pipe(**kwargs, output_type="latent")  # pipelines keep what they were called with as attributes
    scheduler, config, names = pipe.scheduler, dict(pipe.config), set(vars(pipe))
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="stop here"), windowed(pipe, Window(start=1, stop=3)):  # noqa: PT012
        assert isinstance(pipe.scheduler, DDIMScheduler)
        assert type(pipe.scheduler).__name__ == "WindowedDDIMScheduler"
        assert "eta" in inspect.signature(pipe.scheduler.step).parameters
        raise RuntimeError("stop here")
    sampler = sampler_of(pipe, kwargs)
    with pytest.raises(ZeroDivisionError), sampler.open():  # noqa: PT012
        pipe.unet.register_forward_pre_hook(lambda *_: 1 / 0)
        sampler.run(noises(sampler, 1), [0], 0, STEPS, seeds=[0])
    assert pipe.scheduler is scheduler
    assert dict(pipe.config) == config
    assert set(vars(pipe)) == names
    assert torch.equal(state, torch.get_rng_state())
    assert len(pipe.unet._forward_pre_hooks) == 1  # the test's own


def test_prompts_are_encoded_once(tmp_path):
    torch.manual_seed(0)
    pipe = tiny_pipelines.prompted(tmp_path)
    encoded = []
    pipe.text_encoder.register_forward_pre_hook(lambda _, args: encoded.append(len(args[0])))
    sampler = Sampler(pipe, Call(pipe, {"prompt": ["ab", "c"], "num_inference_steps": 2, "negative_prompt": "d"}))
    with sampler.open():
        z = noises(sampler, 4)
        first = sampler.run(z, [0, 0, 1, 1], 0, 2, seeds=[0, 1, 2, 3])
        sampler.run(z[:3], [0, 1, 1], 0, 2, seeds=[0, 1, 2])
    assert encoded == [1, 1, 1, 1]  # two prompts, each with the negative one
    assert "encode_prompt" not in vars(pipe)
    plain = pipe(["ab", "ab", "c", "c"], negative_prompt=["d"] * 4, num_inference_steps=2, latents=z, output_type="pt")
    torch.testing.assert_close(first.samples, plain.images, atol=1e-5, rtol=0)  # rows encoded alone round otherwise


def test_a_pipeline_without_a_scheduler_is_refused():
    class Bare:
        def __call__(self, prompt=None):
            return prompt

    with pytest.raises(TypeError, match="Bare has no scheduler"):
        Sampler(Bare(), Call(Bare(), {"prompt": "x"}))
