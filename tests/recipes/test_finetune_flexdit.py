"""The FlexDiT recipe: one density a step, resume to the bit, latents and images, errors in one line."""

import json

import pytest
import torch
from diffusers import AutoencoderKL
from diffusion.conftest import build_flexdit, build_host
from PIL import Image
from safetensors.torch import save_file

from sparing.diffusion.flexdit import FlexDiTTransformer2DModel
from sparing.recipes import finetune_flexdit as recipe
from sparing.recipes.finetune_flexdit import FlexDiTSettings, LatentBatches, default_fit_settings, finetune

LAYOUT = {"num_layers": 6, "num_sdtm": 1, "sample_size": 8}
TABLE = [(0, 3), (400, 2)]


def _model(**kwargs) -> FlexDiTTransformer2DModel:
    return build_flexdit(**{**LAYOUT, "density_table": TABLE, **kwargs})


def _latents(count: int = 24) -> LatentBatches:
    generator = torch.Generator().manual_seed(0)
    return LatentBatches(torch.randn(count, 4, 8, 8, generator=generator), torch.arange(count) % 10)


def _settings(**changes):
    return default_fit_settings(**{"epochs": 2, "batch_size": 8, "lr": 1e-3, "ema_decay": 0.9, **changes})


def test_training_writes_a_trained_model_and_lowers_the_loss(tmp_path):
    settings = _settings(epochs=8, ema_decay=0.0)
    metrics = finetune(_model(), _latents(), out=tmp_path, fit_settings=settings)
    losses = [record["loss"] for record in metrics["history"]]
    assert sum(losses[-2:]) < sum(losses[:2])
    saved = FlexDiTTransformer2DModel.from_pretrained(tmp_path)
    assert saved.status == "trained"
    assert saved.density_table.entries == ((0, 3, 3), (400, 2, 2))
    assert json.loads((tmp_path / "metrics.json").read_text())["samples"] == 24
    assert not (tmp_path / "checkpoint.pt").exists()


def test_every_step_trains_one_density_at_timesteps_of_its_bucket(tmp_path):
    model, seen = _model(), []
    original = model._by_density
    model._by_density = lambda run, *, timestep, grid, density: (
        seen.append((density, timestep.tolist())) or original(run, timestep=timestep, grid=grid, density=density)
    )
    finetune(model, _latents(), out=tmp_path, fit_settings=_settings(epochs=10, ema_decay=0.0))
    warm, trained = seen[:3], seen[3:]
    assert {side for side, _ in warm} == {
        (2, 2)
    }  # a tenth of 30 steps at the middle density, timesteps over the whole range
    assert max(t for _, times in warm for t in times) > 400 > min(t for _, times in warm for t in times)
    assert {side for side, _ in trained} == {(3, 3), (2, 2)}
    for side, times in trained:
        assert all((t < 400) == (side == (3, 3)) for t in times)


def test_an_interrupted_run_continues_to_the_same_weights(tmp_path):
    class Stopped(Exception):
        pass

    def stop(step):
        if step == 4:
            raise Stopped

    settings = _settings(checkpoint_every=1)
    finetune(_model(), _latents(), out=tmp_path / "whole", fit_settings=settings)
    with pytest.raises(Stopped):
        finetune(_model(), _latents(), out=tmp_path / "parts", fit_settings=settings, on_step=stop)
    finetune(_model(), _latents(), out=tmp_path / "parts", fit_settings=settings)
    whole, parts = (FlexDiTTransformer2DModel.from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(parts.state_dict()[name], tensor) for name, tensor in whole.state_dict().items())


def test_the_published_recipe_is_the_default():
    settings = default_fit_settings()
    wanted = {"lr": 1e-4, "weight_decay": 0.0, "warmup": 0.0, "final_lr": 1.0, "clip_grad": 0.0, "ema_decay": 0.9999}
    assert {name: getattr(settings, name) for name in wanted} == wanted
    assert FlexDiTSettings().min_snr_gamma == 5.0


def test_a_teacher_pulls_towards_its_own_noise(tmp_path):
    plain = {"num_pooling": 0, "num_sdtm": 0, "num_dense_top": 6}
    teacher = build_flexdit(seed=5, **{**LAYOUT, **plain})
    settings = FlexDiTSettings(teacher_weight=1.0)
    fit_settings = _settings(epochs=1, ema_decay=0.0)
    with_teacher = finetune(
        _model(), _latents(), out=tmp_path / "a", fit_settings=fit_settings, settings=settings, teacher=teacher
    )
    without = finetune(_model(), _latents(), out=tmp_path / "b", fit_settings=fit_settings)
    assert with_teacher["history"][0]["loss"] > without["history"][0]["loss"]
    with pytest.raises(ValueError, match=r"teacher_weight 1\.0 needs a teacher"):
        finetune(_model(), _latents(), out=tmp_path / "c", settings=settings)


def test_the_command_line_converts_a_host_folder_and_trains_on_a_latents_file(tmp_path, capsys):
    build_host(num_layers=6, sample_size=8).save_pretrained(tmp_path / "dit")
    data = _latents()
    save_file({"latents": data.latents, "labels": data.labels}, tmp_path / "latents.safetensors")
    arguments = ["--host", str(tmp_path / "dit"), "--data", str(tmp_path / "latents.safetensors")]
    arguments += ["--out", str(tmp_path / "out"), "--split", "1,1,1,1,1,1,1", "--density_table", "[[0,3],[400,2]]"]
    assert recipe.main([*arguments, "--epochs", "1", "--batch_size", "8", "--teacher_weight", "0.5"]) == 0
    assert "model in" in capsys.readouterr().out
    model = FlexDiTTransformer2DModel.from_pretrained(tmp_path / "out")
    assert model.knobs["density_table"] == [[0, 3, 3], [400, 2, 2]]
    assert model.config.timestep_freq_shift == 1  # the host's own timing
    for change, message in (
        (["--split", "1,1,1"], "must give P,K"),
        (["--split", "1,2,1,1,1,1,1"], "num_layers 6"),
        (["--density_table", "9"], "9x9 is above the dense grid of 4x4"),
        (["--data", str(tmp_path / "absent.safetensors")], "not a readable safetensors file"),
        (["--data", str(tmp_path)], "works on latents of 4 channels"),
        (["--host", str(tmp_path / "absent.pt")], "does not exist"),
    ):
        assert recipe.main([*arguments, *change]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("error: ")
        assert error.count("\n") == 1


def test_images_of_a_folder_train_a_pixel_space_model_and_wrong_data_is_refused(tmp_path):
    for label in range(2):
        (tmp_path / "data" / str(label)).mkdir(parents=True)
        for i in range(4):
            Image.new("L", (8, 8), 40 * i).save(tmp_path / "data" / str(label) / f"{i}.png")
    model = _model(in_channels=1, out_channels=2)
    metrics = finetune(model, str(tmp_path / "data"), out=tmp_path / "out", fit_settings=_settings(batch_size=4))
    assert metrics["samples"] == 8
    with pytest.raises(ValueError, match=r"has class 1, the model has classes 0\.\.0"):
        finetune(_model(in_channels=1, num_embeds_ada_norm=1), str(tmp_path / "data"), out=tmp_path / "x")
    save_file({"latents": torch.zeros(3, 4, 4, 4), "labels": torch.zeros(3)}, tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match=r"latents \(3, 4, 4, 4\).*takes \(count, 4, 8, 8\)"):
        finetune(_model(), str(tmp_path / "small.safetensors"), out=tmp_path / "x")


def _stopped(out, *, settings=None, data=None, step=4):
    """A run that ended after ``step`` steps."""

    def stop(done):
        if done == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(
            _model(),
            data or _latents(),
            out=out,
            fit_settings=_settings(checkpoint_every=1),
            settings=settings,
            on_step=stop,
        )


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ({"density_table": 4}, {}, r"density_table: \[\[0, 3, 3\], \[400, 2, 2\]\] before, \[\[0, 4, 4\]\] now"),
        ({}, {"mode": "mixed"}, "mode: bucket before, mixed now"),
        ({}, {"min_snr_gamma": 0.0}, r"min_snr_gamma: 5\.0 before, 0\.0 now"),
        ({}, {"warm_share": 1.0}, "warm_share"),
        ({"timestep_freq_shift": 1}, {}, "timestep_freq_shift"),
        ({"num_pooling": 2, "sdtm_group": [1, 1, 1, 0]}, {}, "num_pooling: 1 before, 2 now; sdtm_group"),
    ],
)
def test_resuming_with_another_recipe_is_refused_with_the_fields_that_differ(tmp_path, model, settings, message):
    _stopped(tmp_path)
    with pytest.raises(ValueError, match=message):
        finetune(
            _model(**model),
            _latents(),
            out=tmp_path,
            fit_settings=_settings(checkpoint_every=1),
            settings=FlexDiTSettings(**settings),
        )


def test_resuming_on_other_data_of_the_same_size_is_refused(tmp_path):
    _stopped(tmp_path)
    data = _latents()
    for other in (
        LatentBatches(data.latents.flip(0), data.labels),
        LatentBatches(data.latents, data.labels.flip(0)),
    ):
        with pytest.raises(ValueError, match=r"another run .data: "):
            finetune(_model(), other, out=tmp_path, fit_settings=_settings(checkpoint_every=1))


def test_a_checkpoint_of_something_else_is_refused_in_words(tmp_path):
    torch.save({"a": 1}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="no checkpoint of this training loop"):
        finetune(_model(), _latents(), out=tmp_path, fit_settings=_settings())


def test_a_run_that_was_stopped_goes_on_with_the_model_that_it_had_begun_to_change(tmp_path):
    def stop(step):
        if (tmp_path / "checkpoint.pt").exists():
            raise KeyboardInterrupt

    model, steps = _model(), []
    with pytest.raises(KeyboardInterrupt):
        finetune(model, _latents(), out=tmp_path, fit_settings=_settings(), on_step=stop)
    finetune(model, _latents(), out=tmp_path, fit_settings=_settings(), on_step=steps.append)
    assert steps[0] > 1


def test_another_teacher_is_another_run(tmp_path):
    def run(scale):
        teacher = _model()
        with torch.no_grad():
            next(teacher.parameters()).mul_(scale)
        settings = FlexDiTSettings(teacher_weight=1.0)
        return finetune(
            _model(), _latents(), out=tmp_path, fit_settings=_settings(), settings=settings, teacher=teacher
        )

    run(1.0)
    with pytest.raises(ValueError, match=r"result of another run .teacher: "):
        run(2.0)


def test_a_finished_run_is_said_to_be_finished_and_never_overwritten(tmp_path, capsys):
    first = finetune(_model(), _latents(), out=tmp_path, fit_settings=_settings())
    weights = (tmp_path / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    steps = []
    again = finetune(_model(), _latents(), out=tmp_path, fit_settings=_settings(), on_step=steps.append)
    assert steps == []
    assert again["history"] == first["history"]
    assert "nothing was trained" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"result of another run .epochs: 2 before, 3 now"):
        finetune(_model(), _latents(), out=tmp_path, fit_settings=_settings(epochs=3))
    assert (tmp_path / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns == weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": "nan"}, "latents of sample 5 hold NaN or infinity"),
        ({"latents": "empty", "labels": "empty"}, "holds no latents"),
        ({"labels": "float"}, r"labels are torch\.float32; integers are needed"),
        ({"labels": "negative"}, r"has class -1, the model has classes 0\.\.9"),
        ({"latents": None}, r"holds \['labels'\]; 'latents' and 'labels' are needed"),
    ],
)
def test_bad_latents_files_are_refused_by_name(tmp_path, change, message):
    data = _latents()
    changes = {
        "nan": data.latents.index_fill(0, torch.tensor(5), float("nan")),
        "empty": data.latents[:0] if "latents" in change else data.labels[:0],
        "float": data.labels + 0.7,
        "negative": data.labels - 1,
        None: None,
    }
    tensors = {"latents": data.latents, "labels": data.labels} | {name: changes[what] for name, what in change.items()}
    if change.get("labels") == "empty":
        tensors["labels"] = data.labels[:0]
    save_file({name: value for name, value in tensors.items() if value is not None}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        finetune(_model(), str(tmp_path / "x.safetensors"), out=tmp_path / "out", fit_settings=_settings())


def test_a_host_with_nan_is_refused_before_training(tmp_path, capsys):
    data = _latents()
    save_file({"latents": data.latents, "labels": data.labels}, tmp_path / "latents.safetensors")
    host = build_host(num_layers=6, sample_size=8)
    with torch.no_grad():
        host.proj_out_1.weight.fill_(float("nan"))
    host.save_pretrained(tmp_path / "dit")
    arguments = ["--host", str(tmp_path / "dit"), "--data", str(tmp_path / "latents.safetensors")]
    arguments += ["--out", str(tmp_path / "out"), "--split", "1,1,1,1,1,1,1", "--batch_size", "8"]
    assert recipe.main(arguments) == 2
    assert "weights hold NaN or infinity: first in 'proj_out_1.weight'" in capsys.readouterr().err


def test_options_that_do_not_go_together_are_one_line(tmp_path, capsys):
    build_host(num_layers=6, sample_size=8).save_pretrained(tmp_path / "dit")
    build_host(num_layers=6, sample_size=8).save_pretrained(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{}")
    build_host(num_layers=6, sample_size=8).save_pretrained(tmp_path / "broken")
    (tmp_path / "broken" / "config.json").write_text("{")
    _model().save_pretrained(tmp_path / "own")
    _vae(latent_channels=4).save_pretrained(tmp_path / "vae")
    data = _latents()
    save_file({"latents": data.latents, "labels": data.labels}, tmp_path / "latents.safetensors")
    (tmp_path / "file").write_text("x")
    arguments = ["--host", str(tmp_path / "dit"), "--data", str(tmp_path / "latents.safetensors")]
    arguments += ["--out", str(tmp_path / "out"), "--epochs", "1", "--batch_size", "8"]
    split = ["--split", "1,1,1,1,1,1,1"]
    own = ["--host", str(tmp_path / "own")]
    for change, message in (
        ([*own, *split], "is a FlexDiT already, with its own layout and timing: leave out --split"),
        ([*own, "--timing", "original"], "leave out --timing"),
        ([*own, "--teacher_weight", "1"], "is a FlexDiT: teacher_weight needs its dense host"),
        ([*split, "--vae", str(tmp_path / "vae")], "holds latents: a vae encodes images, leave it out"),
        ([*split, "--vae", str(tmp_path / "dit")], "an AutoencoderKL is needed"),
        ([*split, "--host", str(tmp_path / "empty")], "class None"),
        ([*split, "--host", str(tmp_path / "broken")], "is not JSON"),
        ([*split, "--batch_size", "0"], "batch_size must be at least 1, got 0"),
        ([*split, "--accumulate", "0"], "accumulate must be at least 1, got 0"),
        ([*split, "--min_snr_gamma", "-1"], "min_snr_gamma must be a finite number, at least 0, got -1.0"),
        ([*split, "--warm_share", "2"], "warm_share is a share of the steps in [0, 1], got 2.0"),
        ([*split, "--teacher_weight", "-1"], "teacher_weight must be a finite number, at least 0, got -1.0"),
        ([*split, "--mode", "x"], "mode must be 'bucket', 'piecewise' or 'mixed', got 'x'"),
        ([*split, "--timing", "x"], "timing must be 'host' or 'original', got 'x'"),
        (["--split", "1,a,1,1,1,1,1"], "split '1,a,1,1,1,1,1' must give P,K"),
        ([*split, "--density_table", "[[0,3]"], "density_table '[[0,3]' is no list [[t, side], ...]"),
        ([*split, "--density_table", '[["a",3]]'], "entry ['a', 3] of a density table"),
        ([*split, "--density_table", "[[0,3.7]]"], "entry [0, 3.7] of a density table"),
        ([*split, "--density_table", "[3]"], "entry 3 of a density table"),
        ([*split, "--density_table", "[]"], "at least one entry"),
        ([*split, "--out", str(tmp_path / "file")], "is a file; out is the folder of the run"),
        ([*split, "--out", str(tmp_path / "file" / "x")], "is a file; out is the folder of the run"),
    ):
        assert recipe.main([*arguments, *change]) == 2
        error = capsys.readouterr().err
        assert message in error, change
        assert error.startswith("error: ")
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def _vae(**kwargs):
    shape = {"block_out_channels": (8,), "down_block_types": ("DownEncoderBlock2D",), "norm_num_groups": 4}
    return AutoencoderKL(**{**shape, "up_block_types": ("UpDecoderBlock2D",), **kwargs})


def test_a_vae_of_one_level_encodes_images_and_one_of_other_latents_is_refused(tmp_path):
    for label in range(2):
        (tmp_path / str(label)).mkdir()
        for i in range(4):
            Image.new("RGB", (8, 8), (40 * i, 0, 9)).save(tmp_path / str(label) / f"{i}.png")
    arguments = {"out": tmp_path / "out", "fit_settings": _settings(batch_size=4, epochs=1)}
    metrics = finetune(_model(), str(tmp_path), vae=_vae(latent_channels=4), **arguments)
    assert metrics["samples"] == 8
    with pytest.raises(ValueError, match="the model works on 4 channels, the vae makes 3"):
        finetune(_model(), str(tmp_path), vae=_vae(latent_channels=3), **{**arguments, "out": tmp_path / "x"})
