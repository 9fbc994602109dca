"""Generation: our pipeline, stock DiTPipeline, our respaced scheduler and stock ones (specification, sections 4 and
9.7).
"""

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
)
from diffusers.hooks import FirstBlockCacheConfig
from diffusion.conftest import build_flexdit, build_host, inputs, randomise

from sparing.diffusion import FlexDiTPipeline, RespacedScheduler, guided
from sparing.diffusion.flexdit import FlexDiTTransformer2DModel

TABLE = [(0, 6, 6), (300, 4, 4), (700, 3, 3)]


def _vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(8,),
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    )
    return randomise(vae, std=0.2).eval()


def _pipeline(transformer=None, scheduler=None, vae=None, **kwargs) -> FlexDiTPipeline:
    pipeline = FlexDiTPipeline(
        transformer or build_flexdit(density_table=TABLE), scheduler or RespacedScheduler(), vae=vae, **kwargs
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- guidance


def test_guidance_touches_only_the_guided_channels_and_makes_the_halves_equal():
    output = torch.randn(6, 8, 2, 2, generator=_seeded())
    for channels in (3, 4):
        mixed = guided(output, 4.0, guided_channels=channels)
        conditional, null = output[:3, :channels], output[3:, :channels]
        torch.testing.assert_close(mixed[:3, :channels], null + 4.0 * (conditional - null))
        assert torch.equal(mixed[:3, :channels], mixed[3:, :channels])
        assert torch.equal(mixed[:, channels:], output[:, channels:])


# -- our scheduler


def test_respaced_timesteps_are_evenly_spaced_over_the_whole_process():
    scheduler = RespacedScheduler()
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == [999, 749, 500, 250, 0]
    scheduler.set_timesteps(250)
    assert scheduler.timesteps.tolist() == [round(i * 999 / 249) for i in range(250)][::-1]
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [999]
    for count in (0, 1001):
        with pytest.raises(ValueError, match=rf"must be in 1\.\.1000, got {count}"):
            scheduler.set_timesteps(count)
    with pytest.raises(ValueError, match="'ddim' or 'ddpm', got 'euler'"):
        RespacedScheduler(sampler="euler")


def test_with_the_true_noise_every_ddim_step_lands_on_the_process():
    scheduler = RespacedScheduler()
    scheduler.set_timesteps(6)
    clean, noise = torch.randn(2, 1, 4, 4, generator=_seeded()), torch.randn(2, 1, 4, 4, generator=_seeded(1))
    latents = scheduler.add_noise(clean, noise, scheduler.timesteps[:1].expand(2))
    for t, after in zip(scheduler.timesteps, [*scheduler.timesteps[1:], None]):
        out = scheduler.step(noise, t, latents)
        torch.testing.assert_close(out.pred_original_sample, clean, atol=1e-3, rtol=1e-3)
        want = clean if after is None else scheduler.add_noise(clean, noise, after.expand(2))
        torch.testing.assert_close(out.prev_sample, want, atol=1e-3, rtol=1e-3)
        latents = out.prev_sample


def test_the_ancestral_sampler_equals_diffusers_ddpm_on_the_same_timesteps():
    # DDPM with 'linspace' visits the same timesteps and steps to the next visited one, as the published sampler does.
    # Its learned-range upper bound is the TRAINING beta, the published one's that of the respaced process: equal at the
    # lower bound.
    ours = RespacedScheduler(sampler="ddpm")
    stock = DDPMScheduler(
        beta_schedule="linear", variance_type="learned_range", timestep_spacing="linspace", clip_sample=False
    )
    ours.set_timesteps(5)
    stock.set_timesteps(5)
    assert torch.equal(ours.timesteps, stock.timesteps)
    noise_estimate = torch.randn(2, 4, 4, 4, generator=_seeded(3))
    output = torch.cat([noise_estimate, -torch.ones_like(noise_estimate)], dim=1)
    a = b = torch.randn(2, 4, 4, 4, generator=_seeded(4))
    generators = _seeded(5), _seeded(5)
    for t in ours.timesteps:
        a = ours.step(output, t, a, generator=generators[0]).prev_sample
        b = stock.step(output, t, b, generator=generators[1]).prev_sample
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_eta_one_adds_noise_and_a_foreign_timestep_is_refused():
    scheduler = RespacedScheduler()
    scheduler.set_timesteps(5)
    x = torch.zeros(1, 1, 2, 2)
    first = scheduler.step(x, 999, x, eta=1.0, generator=_seeded()).prev_sample
    assert first.abs().max() > 0.1
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match=r"timestep 998 is not among.*\[999, 749"):
        scheduler.step(x, 998, x)


# -- our pipeline


def test_a_pixel_space_model_needs_no_vae_and_gives_every_output_type():
    model = build_flexdit(in_channels=1, out_channels=2)
    pipeline = _pipeline(model)
    arguments = {"class_labels": [1, 7], "num_inference_steps": 2}
    array = pipeline(**arguments, generator=_seeded(), output_type="np").images
    assert array.shape == (2, 16, 16, 1)
    assert 0 <= array.min() <= array.max() <= 1
    tensor = pipeline(**arguments, generator=_seeded(), output_type="pt").images
    np.testing.assert_array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    latent = pipeline(**arguments, generator=_seeded(), output_type="latent", return_dict=False)[0]
    torch.testing.assert_close((latent / 2 + 0.5).clamp(0, 1), tensor)
    pictures = pipeline(**arguments, generator=_seeded()).images
    assert [p.size for p in pictures] == [(16, 16)] * 2
    assert np.abs(np.asarray(pictures[1]) / 255 - array[1, :, :, 0]).max() < 1 / 255


def test_the_null_class_is_the_models_own_and_the_schedule_is_looked_up_before_the_loop(monkeypatch):
    pipeline = _pipeline()
    seen = []
    original = pipeline.transformer._forward_at

    def spy(latents, timestep, labels, grid, side):
        seen.append((int(timestep[0]), labels.tolist(), side))
        return original(latents, timestep, labels, grid, side)

    monkeypatch.setattr(pipeline.transformer, "_forward_at", spy)
    pipeline([3, 4], num_inference_steps=4, output_type="latent", generator=_seeded())
    assert seen == [
        (999, [3, 4, 10, 10], (3, 3)),
        (666, [3, 4, 10, 10], (4, 4)),
        (333, [3, 4, 10, 10], (4, 4)),
        (0, [3, 4, 10, 10], (6, 6)),
    ]


def test_without_guidance_the_batch_is_not_doubled_and_density_can_be_fixed(monkeypatch):
    pipeline = _pipeline()
    seen = []
    original = pipeline.transformer._forward_at
    monkeypatch.setattr(pipeline.transformer, "_forward_at", lambda *a: seen.append((len(a[0]), a[-1])) or original(*a))
    pipeline([3, 4, 5], guidance_scale=1.0, num_inference_steps=2, density="2x5", output_type="latent")
    assert seen == [(3, (2, 5))] * 2


def test_given_latents_make_generation_deterministic_and_rectangular_sizes_work():
    pipeline = _pipeline()
    latents = torch.randn(1, 4, 12, 20, generator=_seeded())
    arguments = {"class_labels": [2], "num_inference_steps": 2, "output_type": "latent", "height": 12, "width": 20}
    a, b = (pipeline(**arguments, latents=latents).images for _ in range(2))
    assert torch.equal(a, b)
    assert a.shape == (1, 4, 12, 20)
    with pytest.raises(ValueError, match=r"latents have shape \(1, 4, 12, 20\); expected \(1, 4, 16, 16\)"):
        pipeline([2], latents=latents)


def test_callbacks_see_and_change_latents_and_can_stop():
    pipeline = _pipeline()
    steps = []

    def callback(pipe, step, timestep, values):
        steps.append((step, int(timestep)))
        if step == 1:
            pipe._interrupt = True
        return {"latents": torch.zeros_like(values["latents"])}

    out = pipeline([0], num_inference_steps=5, output_type="latent", callback_on_step_end=callback).images
    assert steps == [(0, 999), (1, 749)]
    assert out.abs().max() == 0
    with pytest.raises(ValueError, match="'prompt'"):
        pipeline([0], callback_on_step_end_tensor_inputs=["prompt"])


def test_class_names_stand_for_their_indices():
    pipeline = _pipeline(id2label={0: "shirt, blouse", 7: "sneaker"})
    arguments = {"num_inference_steps": 1, "output_type": "latent"}
    named = pipeline(["blouse", "sneaker"], generator=_seeded(), **arguments).images
    assert torch.equal(named, pipeline([0, 7], generator=_seeded(), **arguments).images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": [10]}, r"class 10 is out of range: the model has classes 0\.\.9"),
        ({"class_labels": [-1]}, "class -1 is out of range"),
        ({"class_labels": []}, "class_labels is empty"),
        ({"class_labels": [0], "output_type": "jpg"}, "'latent', got 'jpg'"),
        ({"class_labels": [0], "density": 9}, "9x9 is above the dense grid"),
    ],
)
def test_bad_requests_are_refused_by_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        _pipeline()(**{"num_inference_steps": 1, **arguments})


def test_a_dense_host_runs_in_our_pipeline_but_has_no_density():
    pipeline = _pipeline(build_host())
    assert pipeline([0], num_inference_steps=2, output_type="latent").images.shape == (1, 4, 16, 16)
    with pytest.raises(ValueError, match="DiTTransformer2DModel is dense: it has no density to set, got 4"):
        pipeline([0], num_inference_steps=2, density=4)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(),
        DDPMScheduler(),
        DDPMScheduler(variance_type="learned_range"),
        DPMSolverMultistepScheduler(),
        EulerDiscreteScheduler(),
        RespacedScheduler(sampler="ddpm"),
    ],
    ids=lambda s: f"{type(s).__name__}-{s.config.get('variance_type', '')}",
)
def test_stock_schedulers_run_with_guidance_and_stay_finite(scheduler):
    pipeline = _pipeline(scheduler=scheduler)
    out = pipeline([1, 2], num_inference_steps=3, output_type="latent", generator=_seeded()).images
    assert out.shape == (2, 4, 16, 16)
    assert torch.isfinite(out).all()


# -- stock DiTPipeline


def _stock(transformer, vae) -> DiTPipeline:
    pipeline = DiTPipeline(transformer=transformer, vae=vae, scheduler=DDIMScheduler(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_stock_dit_pipeline_runs_saves_and_reloads_a_flexdit_and_ours_gives_the_same(tmp_path):
    model = build_flexdit(num_embeds_ada_norm=1000, density_table=TABLE)
    stock = _stock(model, _vae())
    arguments = {"class_labels": [3, 999], "num_inference_steps": 3}
    want = stock(**arguments, generator=_seeded(), output_type="np").images
    assert want.shape == (2, 16, 16, 3)

    stock.save_pretrained(tmp_path)
    again = DiTPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again.transformer) is FlexDiTTransformer2DModel
    assert again.transformer.density_table == model.density_table
    np.testing.assert_allclose(again(**arguments, generator=_seeded(), output_type="np").images, want, atol=1e-5)

    ours = _pipeline(model, stock.scheduler, _vae())
    np.testing.assert_allclose(ours(**arguments, generator=_seeded(), output_type="np").images, want, atol=1e-4)


def test_our_pipeline_saves_and_reloads_without_a_vae(tmp_path):
    pipeline = _pipeline()
    arguments = {"class_labels": [3], "num_inference_steps": 2, "output_type": "latent"}
    want = pipeline(**arguments, generator=_seeded()).images
    pipeline.save_pretrained(tmp_path)
    again = FlexDiTPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert isinstance(again.scheduler, RespacedScheduler)
    torch.testing.assert_close(again(**arguments, generator=_seeded()).images, want, atol=1e-5, rtol=1e-5)


def test_a_step_sequence_reads_no_timestep_from_the_model(monkeypatch):
    pipeline, batch = _pipeline(), inputs()
    looked_up = []
    table = pipeline.transformer.density_table
    monkeypatch.setattr(
        type(table), "sides", lambda self, t: looked_up.append(len(t)) or [self.side(float(x)) for x in t]
    )
    pipeline([0, 1], num_inference_steps=3, output_type="latent")
    assert looked_up == [3]  # once, for the whole schedule
    pipeline.transformer(*batch)
    assert looked_up == [3, 2]


def test_sampling_drops_no_label_and_gives_the_mode_of_every_module_back():
    model = build_flexdit(class_dropout_prob=0.9)
    wanted = _pipeline(model)([1, 2], num_inference_steps=2, generator=_seeded(), output_type="latent").images
    model.train()
    model.transformer_blocks[0].eval()
    images = _pipeline(model)([1, 2], num_inference_steps=2, generator=_seeded(), output_type="latent").images
    assert torch.equal(images, wanted)
    assert model.training
    assert model.time_class_embed.class_embedder.training
    assert not model.transformer_blocks[0].training


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_run_that_broke_off_leaves_nothing_in_the_first_block_cache(error):
    model = build_flexdit()
    model.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    pipeline = _pipeline(model)
    arguments = {"num_inference_steps": 6, "output_type": "latent"}

    def stop(pipe, step, timestep, tensors):
        if step == 2:
            raise error

    wanted = pipeline([1, 2], generator=_seeded(), **arguments).images
    with pytest.raises(error):
        pipeline([1, 2], generator=_seeded(), callback_on_step_end=stop, **arguments)
    assert torch.equal(pipeline([1, 2], generator=_seeded(), **arguments).images, wanted)
    with pytest.raises(error):
        pipeline([1, 2], generator=_seeded(), callback_on_step_end=stop, **arguments)
    assert pipeline([1], generator=_seeded(), **arguments).images.shape == (1, 4, 16, 16)


def test_the_names_of_classes_are_saved_with_the_pipeline(tmp_path):
    _pipeline(id2label={0: "cat, kitty", 7: "dog"}).save_pretrained(tmp_path)
    again = FlexDiTPipeline.from_pretrained(tmp_path)
    assert again.labels == {"cat": 0, "kitty": 0, "dog": 7}
    again.save_pretrained(tmp_path / "twice")
    assert FlexDiTPipeline.from_pretrained(tmp_path / "twice").label_indices(["kitty", "dog"]) == [0, 7]


@pytest.mark.parametrize(
    ("labels", "arguments", "message"),
    [
        ([1.7], {}, r"class 1\.7 is neither an index nor a name"),
        ([True], {}, "class True is neither"),
        ([None], {}, "class None is neither"),
        ([1], {"guidance_channels": 0}, r"guidance_channels must be in 1\.\.4, got 0"),
        ([1], {"guidance_channels": -1}, r"in 1\.\.4, got -1"),
        ([1], {"guidance_channels": 5}, r"in 1\.\.4, got 5"),
        ([1], {"guidance_scale": float("nan")}, "finite number, got nan"),
        ([1], {"height": 0}, "height and width must be at least 1, got 0 and None"),
        ([1], {"width": -4}, "got None and -4"),
    ],
)
def test_impossible_labels_and_guidance_are_refused_by_value(labels, arguments, message):
    with pytest.raises(ValueError, match=message):
        _pipeline()(labels, num_inference_steps=1, **arguments)
    assert _pipeline().label_indices(torch.tensor([1, 2])) == [1, 2]


def test_pixels_that_are_not_numbers_are_refused_and_raw_samples_are_given_as_they_are():
    pipeline = _pipeline()
    with pytest.raises(ValueError, match=r"NaN after guidance_scale 1e\+38"):
        pipeline([3], num_inference_steps=3, guidance_scale=1e38)
    raw = pipeline([3], num_inference_steps=3, guidance_scale=1e38, output_type="pt").images
    assert raw.isnan().any()


def test_a_transformer_that_was_compiled_in_place_of_itself_keeps_its_densities(monkeypatch):
    def run(pipeline, **kwargs):
        generator = torch.Generator().manual_seed(0)
        return pipeline([3], num_inference_steps=3, generator=generator, output_type="latent", **kwargs).images

    pipeline = _pipeline()
    scheduled, fixed = run(pipeline), run(pipeline, density=3)
    inner = pipeline.transformer
    pipeline.transformer = torch.compile(inner, backend="eager")
    asked = []
    monkeypatch.setattr(inner, "precompute_densities", lambda *a, **k: asked.append(1) or [(3, 3)] * 3)
    run(pipeline)
    assert asked == [1]
    torch.testing.assert_close(run(pipeline, density=3), fixed)
    monkeypatch.undo()
    torch.testing.assert_close(run(pipeline), scheduled)
