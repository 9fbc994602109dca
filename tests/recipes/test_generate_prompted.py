"""``generate_prompted``: images, video and sound of prompts from whole pipelines, twins in them, and its commands."""

import json

import pytest
import soundfile
import torch
from diffusers import AutoencoderKL, DDIMScheduler, LattePipeline, LatteTransformer3DModel
from diffusion import tiny_pipelines
from diffusion.conftest import randomise
from PIL import Image
from transformers import T5Config, T5EncoderModel
from typer.testing import CliRunner

from sparing.cli.app import app
from sparing.diffusion import FlexDiTVideoTransformer3DModel
from sparing.media.video import read_frames
from sparing.recipes import generate_prompted as recipe
from sparing.recipes.generate_prompted import generate_prompted


def latte(folder):
    """LattePipeline with a real, tiny, random text encoder; and its FlexDiT."""
    host = randomise(
        LatteTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=8,
            num_layers=6,
            cross_attention_dim=24,
            attention_bias=True,
            sample_size=8,
            patch_size=2,
            activation_fn="gelu-approximate",
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            caption_channels=16,
            video_length=4,
        )
    )
    twin = FlexDiTVideoTransformer3DModel.from_host(
        host, num_pooling=1, num_sdtm=1, sdtm_group=[1, 1, 1, 1], num_dense_top=1, density_table=[(0, 3), (500, 2)]
    )
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4, sample_size=8)
    folder.mkdir(parents=True, exist_ok=True)
    pipe = LattePipeline(
        tokenizer=tiny_pipelines.toy_tokenizer(folder),
        text_encoder=randomise(T5EncoderModel(config)).eval(),
        vae=randomise(vae).eval(),
        transformer=host.eval(),
        scheduler=DDIMScheduler(),
    )
    return pipe, twin


SMALL = {"height": 8, "width": 8, "clean_caption": False, "mask_feature": False}


def test_a_video_of_prompts_by_the_pipelines_own_denoiser_and_by_a_twin(tmp_path):
    pipe, twin = latte(tmp_path / "tokens")
    dense = generate_prompted(pipe, ["a b", "c d"], out=tmp_path / "d.mp4", steps=2, frames=4, enlarge=2, **SMALL)
    assert dense["samples"].shape == (2, 4, 3, 8, 8)
    assert (dense["kind"], dense["status"]) == ("video", "dense")
    frames = torch.stack(list(read_frames(tmp_path / "d.mp4")))
    assert frames.shape == (4, 3, 16, 32)
    expected = torch.cat(list(dense["samples"]), dim=-1).repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert (frames / 255 - expected).abs().mean() < 0.15  # colours are halved and compressed

    sparse = generate_prompted(pipe, ["a b", "c d"], twin=twin, out=tmp_path / "s.gif", steps=2, frames=4, **SMALL)
    assert sparse["status"] == "converted, not trained"
    assert not torch.equal(sparse["samples"], dense["samples"])
    with Image.open(tmp_path / "s.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"]) == (4, (16, 8), 120)


def test_the_knob_is_turned_back_and_seeds_do_not_depend_on_the_batch(tmp_path):
    pipe, twin = latte(tmp_path)
    table = twin.density_table.to_list()
    first = generate_prompted(pipe, ["a", "b"], twin=twin, steps=2, frames=4, density="4", **SMALL)["samples"]
    assert twin.density_table.to_list() == table
    scheduled = generate_prompted(pipe, ["a", "b"], steps=2, frames=4, **SMALL)["samples"]
    assert not torch.equal(first, scheduled)
    together = generate_prompted(pipe, ["a", "b"], steps=2, frames=4, batch_size=2, **SMALL)["samples"]
    torch.testing.assert_close(together, scheduled, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="above the dense grid"):
        generate_prompted(pipe, ["a"], steps=2, density="9", frames=4, **SMALL)
    assert twin.density_table.to_list() == table


def test_images_of_prompts(tmp_path):
    pipe = tiny_pipelines.prompted(tmp_path)
    made = generate_prompted(pipe, ["a b", "b"], out=tmp_path / "x.png", steps=2, height=8, width=8)
    assert made["kind"] == "image"
    assert Image.open(tmp_path / "x.png").size == (2 * 10 + 2, 12)


def test_sound_of_prompts(tmp_path):
    pipe, kwargs = tiny_pipelines.build("audioldm")
    kwargs = {name: value for name, value in kwargs.items() if name != "prompt"}
    inputs = {**kwargs, "prompt_embeds": kwargs["prompt_embeds"]}

    def call(prompt, num_inference_steps=2, audio_length_in_s=None, generator=None, output_type="np"):
        return original(
            **{**inputs, "num_inference_steps": num_inference_steps, "generator": generator, "output_type": output_type}
        )

    original = pipe.__call__

    class Prompted:
        """The pipeline with its text encoded already."""

        components, vocoder = pipe.components, pipe.vocoder
        __call__ = staticmethod(call)

        def set_progress_bar_config(self, **_):
            return None

    made = generate_prompted(Prompted(), ["rain"], out=tmp_path / "x.wav", steps=2)
    sound, rate = soundfile.read(tmp_path / "x.wav")
    assert made["kind"] == "audio"
    assert rate == pipe.vocoder.config.sampling_rate
    assert sound.shape == (made["samples"].shape[-1],)


def test_a_whole_folder_by_both_commands_and_one_line_for_a_mistake(tmp_path, capsys):
    pipe, twin = latte(tmp_path / "tokens")
    pipe.save_pretrained(tmp_path / "latte")
    twin.save_pretrained(tmp_path / "twin")
    arguments = ["--pipeline", str(tmp_path / "latte"), "--twin", str(tmp_path / "twin"), "--prompts", "a b"]
    size = ["--steps", "2", "--frames", "4", "--height", "8", "--width", "8", "--out", str(tmp_path / "a.mp4")]
    assert recipe.main([*arguments, *size]) == 0
    assert "video of 1 prompts" in capsys.readouterr().out
    assert recipe.main([*arguments, *size, "--density", "9"]) == 2
    assert "above the dense grid" in capsys.readouterr().err

    runner = CliRunner()
    base = ["generate", "--model", str(tmp_path / "latte"), "--prompt", "a b", *size]
    result = runner.invoke(app, [*base, "--json", "-"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["kind"] == "video"
    for change, message in (
        (["--class", "1"], "either --class or --prompt"),
        (["--out", str(tmp_path / "a.png")], "makes video: give out with .mp4 or .gif"),
        (["--frames", "0"], "frames"),
        (["--density", "2"], "is dense: it has no density"),
        (["--per-class", "2"], "go with --class"),
        (["--model", str(tmp_path / "absent")], "absent"),
        (["--prompt", ""], "none that is empty"),
    ):
        result = runner.invoke(app, [*base, *change])
        assert result.exit_code == 2, result.output
        assert message in result.output.replace("\n", " ")


def test_what_does_not_go_together_is_refused(tmp_path):
    pipe, _ = tiny_pipelines.build("dit")
    with pytest.raises(ValueError, match="takes no prompt"):
        generate_prompted(pipe, ["a"])
    pipe, twin = latte(tmp_path)
    with pytest.raises(ValueError, match="takes no audio_length_in_s"):
        generate_prompted(pipe, ["a"], audio_length_in_s=3)
    with pytest.raises(ValueError, match="rate must be at least 1"):
        generate_prompted(pipe, ["a"], rate=0)
    other = FlexDiTVideoTransformer3DModel(**{**twin.config, "caption_channels": 7})
    with pytest.raises(ValueError, match="the twin has caption_channels=7"):
        generate_prompted(pipe, ["a"], twin=other)


def test_a_density_counts_tokens_of_the_sampled_grid(tmp_path, monkeypatch):
    pipe, twin = latte(tmp_path)
    seen = []
    original = FlexDiTVideoTransformer3DModel._forward_at

    def spy(self, latents, text, timestep, mask, grid, side, temporal):
        seen.append((grid, side))
        return original(self, latents, text, timestep, mask, grid, side, temporal)

    monkeypatch.setattr(FlexDiTVideoTransformer3DModel, "_forward_at", spy)
    large = {**SMALL, "height": 16, "width": 16, "steps": 1, "frames": 2}
    for density, side in (("3", (3, 3)), ("6x5", (6, 5)), ("all", (8, 8)), ("0.25", (4, 4)), (2, (2, 2))):
        seen.clear()
        generate_prompted(pipe, ["a"], twin=twin, density=density, **large)
        assert seen == [((8, 8), side)]
    seen.clear()
    generate_prompted(pipe, ["a"], density=[(0, 2), (500, 1)], **large)  # a schedule is one of the model's own grid
    assert seen == [((8, 8), (4, 4))]


def test_what_cannot_be_sampled_is_refused_before_sampling(tmp_path):
    pipe, twin = latte(tmp_path)
    good = {**SMALL, "frames": 4, "steps": 1}
    dense = FlexDiTVideoTransformer3DModel.from_host(
        pipe.transformer, num_pooling=0, num_sdtm=0, sdtm_group=[1, 1, 1, 1], num_dense_top=6
    )
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").write_text("x")
    for change, error, message in (
        ({"frames": 5}, ValueError, r"frames=5: this model makes 1\.\.4"),
        ({"frames": None}, ValueError, r"frames=16: this model makes 1\.\.4"),
        ({"height": -8}, ValueError, "height must be at least 1, got -8"),
        ({"width": 0}, ValueError, "width must be at least 1, got 0"),
        ({"guidance_scale": float("nan")}, ValueError, "guidance_scale must be a finite number, got nan"),
        ({"seed": 10**20}, ValueError, "seed must lie within"),
        ({"density": "2", "twin": dense}, ValueError, "is dense: it has no density to set, got '2'"),
        ({"out": tmp_path / "folder.mp4"}, ValueError, "it is a folder, give a file"),
        ({"out": tmp_path / "file" / "x.mp4"}, OSError, "file"),
    ):
        with pytest.raises(error, match=message):
            generate_prompted(pipe, ["a"], **{**good, **change})
