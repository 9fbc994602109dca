"""``sparing distill``: a host, a folder of images, a twin that loads."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from typer.testing import CliRunner

import sparing
from sparing.cli import app


@pytest.fixture
def host(tmp_path):
    """A timm ViT of 32 x 32 images as a folder, with its preprocessing."""
    torch.manual_seed(0)
    arguments = {"img_size": 32, "patch_size": 8, "num_classes": 3, "dynamic_img_size": False}
    model = timm.create_model("test_vit", **arguments)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 32, 32)}
    timm.models.save_for_hf(
        model, tmp_path / "host", model_args={k: v for k, v in arguments.items() if k != "num_classes"}
    )
    return tmp_path / "host"


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    random = np.random.default_rng(0)
    for index in range(12):
        Image.fromarray(random.integers(0, 256, (36, 36, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_distilling_writes_a_twin_that_loads_and_classifies(host, images, tmp_path):
    out = tmp_path / "twin"
    common = ("--twin", "stvit:num_tokens=4,base_depth=2", "--epochs", 1, "--batch", 4, "--json", tmp_path / "m.json")
    result = run("distill", host, images, "--out", out, *common)
    assert result.exit_code == 0, result.output
    assert "feature_cosine on 1 held-out images" in result.stdout
    twin = sparing.load(out)
    assert (twin.status, twin.method, twin.knobs["num_tokens"]) == ("trained", "stvit", [2, 2])
    assert (
        json.loads((tmp_path / "m.json").read_text())["knobs"] == json.loads((out / "config.json").read_text())["knobs"]
    )
    assert "status: trained" in run("classify", images / "0.png", "--weights", out, "--topk", 1).stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": "nowhere"}, "nowhere"),
        ({"--twin": "stvit:num_tokens=99x99"}, "99"),
        ({"--twin": "nothing"}, "unknown method 'nothing'"),
    ],
)
def test_distilling_bad_input_is_one_line_and_writes_nothing(host, images, tmp_path, change, message):
    out = tmp_path / "twin"
    result = run("distill", host, change.get("images", images), "--out", out, "--twin", change.get("--twin", "stvit"))
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert message in result.stderr
    assert not (out / "config.json").exists()
