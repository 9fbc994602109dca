"""Bad input from end to end: one clear line, exit code 2, nothing run and nothing half-written."""

import io
import pickle

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from sparing.cli import app

HOST = "timm/test_vit"  # 160 x 160 images, 10 x 10 patches


def fails(*arguments):
    """The one line on standard error of a command that a user got wrong."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "test_vit.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), path)
    return path


@pytest.fixture
def colour(tmp_path):
    path = tmp_path / "colour.png"
    Image.new("RGB", (20, 20), "red").save(path)
    return path


@pytest.mark.parametrize("command", ["card", "methods", "compare"])
def test_an_unknown_model(command):
    assert "closest: stvit_deit_small_patch16_224" in fails(command, "stvit_deit_smal_patch16_224")


def test_a_wrong_image_size_for_a_static_host():
    assert "takes 224 x 224 images only, got 192 x 192" in fails(
        "compare", "timm/deit_tiny_patch16_224", "--image-size", 192
    )


def test_a_grey_image_for_a_colour_model(weights, tmp_path):
    Image.new("L", (20, 20)).save(tmp_path / "grey.png")
    line = fails("classify", tmp_path / "grey.png", "--model", HOST, "--weights", weights)
    assert "a grey image, a colour image is needed; conversion has to be asked for" in line


def test_a_truncated_jpeg(weights, tmp_path):
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 80).convert("RGB").save(buffer, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    assert "cut.jpg' is damaged or truncated" in fails(
        "classify", tmp_path / "cut.jpg", "--model", HOST, "--weights", weights
    )


def test_a_folder_with_no_images(weights, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    assert "holds no image" in fails("classify", tmp_path, "--model", HOST, "--weights", weights)


def test_a_missing_image(weights, tmp_path):
    assert "no such image" in fails("classify", tmp_path / "gone.png", "--model", HOST, "--weights", weights)


def test_a_checkpoint_of_another_model(tmp_path, colour):
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "other.safetensors")
    line = fails("classify", colour, "--model", HOST, "--weights", tmp_path / "other.safetensors")
    missing, unexpected = line.partition("missing: ")[2].split("; unexpected: ")
    assert missing.startswith("cls_token, ")
    assert unexpected.startswith("bn1.")
    assert [len(part.partition(" and ")[0].split(", ")) for part in (missing, unexpected)] == [5, 5]


RAN = []


def run() -> None:
    RAN.append("code of the file")


class RunsOnLoad:
    def __reduce__(self):
        return (run, ())


def test_a_pickle_file_with_code_in_it(tmp_path, colour):
    (tmp_path / "w.pt").write_bytes(pickle.dumps({"weight": RunsOnLoad()}))
    assert "is refused" in fails("classify", colour, "--model", HOST, "--weights", tmp_path / "w.pt")
    torch.save({"weight": RunsOnLoad()}, tmp_path / "w.pt")
    assert "it holds pickled code" in fails("classify", colour, "--model", HOST, "--weights", tmp_path / "w.pt")
    assert RAN == []


def test_a_safetensors_file_with_a_lying_header(weights, tmp_path, colour):
    content = weights.read_bytes()
    (tmp_path / "w.safetensors").write_bytes((2**40).to_bytes(8, "little") + content[8:])
    line = fails("classify", colour, "--model", HOST, "--weights", tmp_path / "w.safetensors")
    assert "its header does not fit its content" in line


def test_a_token_grid_larger_than_the_map():
    line = fails("compare", HOST, "--twin", "stvit:num_tokens=12x12", "--count-only")
    assert "12" in line
    assert "10" in line


@pytest.mark.parametrize("knob", ["stvit:num_tokens=-1", "stvit:base_depth=6", "stvit:nonsense=1", "tome:r=-3"])
def test_a_knob_out_of_range_or_unknown(knob):
    fails("compare", HOST, "--twin", knob, "--count-only")


def test_nothing_is_written_when_a_command_fails(weights, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    written = ("--json", out / "c.json", "--plot", out / "c.png")
    fails("compare", HOST, "--twin", "stvit:num_tokens=12x12", *written)
    fails("classify", tmp_path / "none", "--model", HOST, "--weights", weights, "--json", out / "c.json")
    assert list(out.iterdir()) == []
