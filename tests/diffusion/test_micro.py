"""The shipped small DiT and its FlexDiTs: they load offline, stay small, and draw what they are asked for."""

import pytest
import torch
from typer.testing import CliRunner

import sparing
from sparing.cli.app import app
from sparing.diffusion import FlexDiTPipeline, RespacedScheduler
from sparing.zoo.weights import SHIPPED

NAMES = ["dit_micro_patch4_28", "flexdit_dit_micro_patch4_28", "flexdit_dit_micro_patch4_28_low"]


@pytest.mark.parametrize("name", NAMES)
def test_shipped_weights_draw_the_wanted_classes(name):
    """A classifier that had no part in their training (another network, other weights) tells the ten classes apart."""
    model = sparing.create_model(name, pretrained=True)
    pipe = FlexDiTPipeline(model, RespacedScheduler())
    pipe.set_progress_bar_config(disable=True)
    labels = list(range(10)) * 3
    images = pipe(
        labels,
        num_inference_steps=10,
        guidance_scale=1.5,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    judge = sparing.create_model("vit_micro_patch4_28", pretrained=True).eval()
    with torch.inference_mode():
        seen = judge((images - 0.2860) / 0.3530).argmax(-1)
    assert (seen == torch.tensor(labels)).float().mean() > 0.6  # chance: 0.1


@pytest.mark.parametrize("name", NAMES)
def test_files_are_small_and_cards_say_what_was_measured(name):
    path = SHIPPED / f"{name}.demo_fashion.safetensors"
    card = sparing.model_card(f"{name}.demo_fashion")
    model = sparing.create_model(name, device="meta")
    assert path.stat().st_size == card.measured["file_bytes"] < 2e6
    assert card.measured["reference_macs"] == model.flops(count="reference")
    assert card.params == sum(parameter.numel() for parameter in model.parameters())


def test_the_twins_save_what_their_cards_say():
    dense, twin, low = (sparing.create_model(name, device="meta").flops(count="reference") for name in NAMES)
    assert twin / dense == pytest.approx(0.580, abs=0.001)
    assert low / dense == pytest.approx(0.443, abs=0.001)


def test_generate_takes_their_names(tmp_path):
    out = tmp_path / "sheet.png"
    options = ["--model", NAMES[1], "--class", "7", "--class", "9", "--steps", "3", "--out", str(out)]
    result = CliRunner().invoke(app, ["generate", *options])
    assert result.exit_code == 0, result.output
    assert "(model: trained)" in result.output
    assert out.exists()
