"""``generate``: sheets of images, seeded per image, from folders of transformers and pipelines; and its command."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from diffusion.conftest import build_flexdit, build_host, randomise
from PIL import Image
from typer.testing import CliRunner

from sparing.cli.app import app
from sparing.diffusion import FlexDiTPipeline, FlexDiTTransformer2DModel, RespacedScheduler
from sparing.recipes import generate as recipe
from sparing.recipes.generate import generate

LAYOUT = {"num_layers": 6, "num_sdtm": 1, "sample_size": 8}


@pytest.fixture
def folder(tmp_path):
    """A pixel-space FlexDiT, saved."""
    model = build_flexdit(**LAYOUT, in_channels=1, out_channels=2, density_table=[(0, 3), (500, 2)])
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_an_image_depends_on_its_seed_and_not_on_the_batch(folder, tmp_path):
    out = tmp_path / "sheet.png"
    made = generate(folder, [3, 4, 5], out=out, steps=2, seed=1, enlarge=2)
    assert made["images"].shape == (3, 1, 8, 8)
    assert made["status"] == "converted, not trained"
    assert Image.open(out).size == (3 * 18 + 2, 20)
    alone = generate(folder, [3, 4, 5], steps=2, seed=1, batch_size=1)
    torch.testing.assert_close(alone["images"], made["images"], atol=1e-4, rtol=1e-4)
    other = generate(folder, [3, 4, 5], steps=2, seed=2)
    assert (other["images"] - made["images"]).abs().max() > 1e-3


def test_density_and_rows_a_class(folder, tmp_path):
    scheduled = generate(folder, [3], steps=2, per_class=2)["images"]
    fixed = generate(folder, [3], steps=2, per_class=2, density="all", out=tmp_path / "x.png")["images"]
    assert fixed.shape == (2, 1, 8, 8)
    assert (scheduled - fixed).abs().max() > 1e-4


def test_a_stock_pipeline_folder_and_a_latent_model_with_its_vae(tmp_path):
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4)
    host = build_host(num_layers=2, sample_size=8)
    DiTPipeline(transformer=host, vae=randomise(vae), scheduler=DDIMScheduler()).save_pretrained(tmp_path / "pipeline")
    made = generate(tmp_path / "pipeline", [1], steps=2)
    assert made["images"].shape == (1, 3, 8, 8)
    assert made["status"] == "dense"
    latent = build_flexdit(**LAYOUT)
    with pytest.raises(ValueError, match="latents of 4 channels: pass vae"):
        generate(latent, [1], steps=2)
    assert generate(latent, [1], steps=2, vae=tmp_path / "pipeline" / "vae")["images"].shape == (1, 3, 8, 8)


def test_the_commands_write_a_sheet_and_give_one_line_for_a_mistake(folder, tmp_path, capsys):
    out = tmp_path / "sheet.png"
    assert recipe.main(["--model", str(folder), "--classes", "1", "2", "--steps", "2", "--out", str(out)]) == 0
    assert "2 images" in capsys.readouterr().out
    assert recipe.main(["--model", str(folder), "--classes", "10", "--out", str(out)]) == 2
    assert "class 10 is out of range" in capsys.readouterr().err

    runner = CliRunner()
    arguments = ["generate", "--model", str(folder), "--class", "1", "--class", "7", "--steps", "2"]
    result = runner.invoke(app, [*arguments, "--density", "2", "--out", str(tmp_path / "b.png"), "--json", "-"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["status"] == "converted, not trained"
    assert Image.open(tmp_path / "b.png").size == (22, 12)
    for change, message in (
        (["--density", "9"], "9x9 is above the dense grid"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--model", str(tmp_path / "absent")], "absent"),
    ):
        result = runner.invoke(app, [*arguments, "--out", str(out), *change])
        assert result.exit_code == 2
        assert message in result.output


def test_a_saved_pipeline_of_ours_is_opened_as_it_is_and_an_unknown_class_refused(folder, tmp_path):
    model = FlexDiTTransformer2DModel.from_pretrained(folder)
    FlexDiTPipeline(model, RespacedScheduler(sampler="ddpm")).save_pretrained(tmp_path / "pipeline")
    opened = recipe.open_pipeline(tmp_path / "pipeline")
    assert (type(opened), opened.scheduler.config.sampler) == (FlexDiTPipeline, "ddpm")
    arguments = ["generate", "--model", str(tmp_path / "pipeline"), "--class", "1", "--steps", "2"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "x.png")])
    assert result.exit_code == 0, result.output
    index = tmp_path / "pipeline" / "model_index.json"
    for content, message in (
        ('{"_class_name": "OtherPipeline"}', "names the class 'OtherPipeline', which is no pipeline"),
        ('{"_class_name": "AutoencoderKL"}', "names the class 'AutoencoderKL', which is no pipeline"),
        ("{}", "names the class None"),
        ("{", "is not JSON"),
    ):
        index.write_text(content)
        with pytest.raises(ValueError, match=message):
            recipe.open_stored(tmp_path / "pipeline")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that is a cache in a folder; call it with (repository id, save) to put something there."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(name, save):
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        save(repository / "snapshots" / ("0" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)

    return put


def test_pipelines_of_the_hub_are_opened_ours_and_those_of_diffusers(hub, folder, tmp_path, capsys):
    ours = FlexDiTPipeline(FlexDiTTransformer2DModel.from_pretrained(folder), RespacedScheduler(sampler="ddpm"))
    hub("somebody/flexdit", ours.save_pretrained)
    plain = DiTPipeline(build_host(num_layers=1), _vae(), DDIMScheduler(), id2label={"1": "boot"})
    hub("somebody/dit", plain.save_pretrained)
    hub("somebody/transformer", FlexDiTTransformer2DModel.from_pretrained(folder).save_pretrained)
    assert type(recipe.open_pipeline("somebody/transformer").transformer) is FlexDiTTransformer2DModel
    assert type(recipe.open_stored("somebody/flexdit")) is FlexDiTPipeline
    assert type(recipe.open_stored("somebody/dit")) is DiTPipeline
    opened = recipe.open_pipeline("somebody/flexdit")
    assert (type(opened), opened.scheduler.config.sampler) == (FlexDiTPipeline, "ddpm")
    assert type(recipe.open_pipeline("somebody/dit").transformer) is type(plain.transformer)
    made = generate("somebody/flexdit", [1], steps=1)
    assert torch.equal(
        made["images"],
        generate(folder.parent / "hub" / "models--somebody--flexdit" / "snapshots" / ("0" * 40), [1], steps=1)[
            "images"
        ],
    )
    result = CliRunner().invoke(
        app, ["generate", "--model", "somebody/else", "--class", "1", "--out", str(tmp_path / "x.png")]
    )
    assert result.exit_code == 2
    assert "somebody/else" in result.output
    assert "Traceback" not in result.output


def test_damaged_weights_of_a_pipeline_are_named_in_one_error(folder, tmp_path):
    model = FlexDiTTransformer2DModel.from_pretrained(folder)
    FlexDiTPipeline(model, RespacedScheduler()).save_pretrained(tmp_path / "pipeline")
    weights = tmp_path / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises((ValueError, OSError), match="pipeline"):
        recipe.open_stored(tmp_path / "pipeline")


def _vae(**kwargs):
    return AutoencoderKL(**{"block_out_channels": (8,), "latent_channels": 4, "norm_num_groups": 4, **kwargs})


def test_mistakes_are_told_in_one_line_before_sampling(folder, tmp_path):
    _vae().save_pretrained(tmp_path / "vae")
    build_host(num_layers=1).save_pretrained(tmp_path / "dit")
    build_flexdit(**{**LAYOUT, "num_pooling": 0, "num_sdtm": 0, "num_dense_top": 6, "in_channels": 1}).save_pretrained(
        tmp_path / "dense"
    )
    build_flexdit(**LAYOUT, in_channels=1, class_dropout_prob=0.0).save_pretrained(tmp_path / "nonull")
    model = FlexDiTTransformer2DModel.from_pretrained(folder)
    FlexDiTPipeline(model, RespacedScheduler()).save_pretrained(tmp_path / "pipeline")
    (tmp_path / "file").write_text("x")
    (tmp_path / "sheet.png").mkdir()
    arguments = ["generate", "--model", str(folder), "--class", "1", "--steps", "2", "--out", str(tmp_path / "x.png")]
    for change, message in (
        (["--model", "vit_micro_patch4_28"], "is a VisionTransformer; generate takes class-conditional diffusion"),
        (["--vae", str(tmp_path / "vae")], "the model works on 1 channels, the decoder in"),
        (["--vae", str(tmp_path / "dit")], "holds a model of class 'DiTTransformer2DModel'; an AutoencoderKL"),
        (["--vae", str(tmp_path / "pipeline")], "is the folder of a pipeline; give that of its decoder"),
        (["--model", str(tmp_path / "pipeline"), "--vae", str(tmp_path / "vae")], "leave vae out"),
        (["--model", str(tmp_path / "dense"), "--density", "2"], "is dense: it has no density to set"),
        (["--model", str(tmp_path / "nonull")], "guidance needs a null class, and this model has none"),
        (["--guidance-scale", "inf"], "guidance_scale must be a finite number, got inf"),
        (["--guidance-scale", "nan"], "guidance_scale must be a finite number, got nan"),
        (["--class", "³"], "no class '³'"),
        (["--seed", "99999999999999999999"], "seed must lie within"),
        (["--out", str(tmp_path / "x.mp4")], "no format has the suffix '.mp4'"),
        (["--out", str(tmp_path / "sheet.png")], "it is a folder, give a file"),
        (["--out", str(tmp_path / "file" / "x.png")], f"cannot write '{tmp_path / 'file' / 'x.png'}': "),
        (["--json", str(tmp_path / "absent" / "x.json")], f"cannot write '{tmp_path / 'absent' / 'x.json'}': No such"),
        (["--vae", str(tmp_path / "absent")], "no such folder: "),
        (["--json", str(tmp_path)], "it is a folder, give a file"),
    ):
        result = CliRunner().invoke(app, [*arguments, *change])
        assert (result.exit_code, result.output.count("\n")) == (2, 1), (change, result.output)
        assert message in result.output
    assert not (tmp_path / "x.png").exists()
    no_guidance = ["--model", str(tmp_path / "nonull"), "--guidance-scale", "1"]
    assert CliRunner().invoke(app, [*arguments, *no_guidance]).exit_code == 0
