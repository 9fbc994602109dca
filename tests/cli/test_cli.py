"""The command line: what it prints, its JSON, and one line with exit code 2 for every mistake of a user."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner
from zoo.conftest import toy_zoo  # noqa: F401  (a fixture)

import sparing
from sparing.cli import app
from sparing.cli.options import parse_twin
from sparing.zoo.weights import SHIPPED


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def fails(*arguments):
    """The one line on standard error of a command that a user got wrong."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture(scope="module")
def saved_classifier(tmp_path_factory):
    """A timm classifier of 32 x 32 images in timm's own folder layout."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("classifier")
    arguments = {"img_size": 32, "num_classes": 4, "dynamic_img_size": False}
    model = timm.create_model("test_vit", **arguments)
    cfg = {"input_size": [3, 32, 32], "crop_pct": 1.0, "mean": [0.5] * 3, "std": [0.5] * 3, "label_names": list("abcd")}
    config = {"architecture": "test_vit", "num_classes": 4, "pretrained_cfg": cfg}
    config["model_args"] = {"img_size": 32, "dynamic_img_size": False}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, colour in enumerate(("red", "green")):
        Image.new("RGB", (40, 36), colour).save(folder / f"{index}.png")
    return folder


LIGHT = """
import sys
from typer.testing import CliRunner
from sparing.cli import app
for arguments in (["--help"], ["models"], ["models", "--demo"], ["recipes"], ["compare", "--help"]):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, (arguments, result.output)
families = ("vision", "diffusion", "video_language", "audio", "continual")
loaded = [name for name in sys.modules if name.split(".")[0] in ("torch", "timm", "diffusers", "PIL", "numpy")]
loaded += [name for name in sys.modules if name.startswith(tuple(f"sparing.{family}" for family in families))]
print(loaded)
"""


def test_help_and_lists_load_neither_torch_nor_a_family():
    out = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True, timeout=120)
    assert out.stdout.strip() == "[]"


def test_models_lists_names_and_writes_cards(toy_zoo, tmp_path):  # noqa: F811
    result = run("models", "toy*", "--demo", "--json", tmp_path / "m.json")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()[:3]] == ["toy_host", "toy_host.demo", "toy_toy_host"]
    assert [card["name"] for card in json.loads((tmp_path / "m.json").read_text())] == sparing.list_models(demo=True)
    assert "no model matches 'zzz'" in run("models", "zzz").stdout
    assert "the zoo has toy" in fails("models", "--task", "nothing")


def test_json_on_standard_output_is_nothing_but_json(toy_zoo):  # noqa: F811
    assert json.loads(run("card", "toy_toy_host", "--json", "-").stdout)["license_weights"] == "cc-by-nc-4.0"


def test_card_prints_the_card_and_names_the_closest(toy_zoo):  # noqa: F811
    assert "derived_from     toy_host" in run("card", "toy_toy_host").stdout
    assert "closest: toy_host" in fails("card", "toy_hots")


def test_methods_prints_every_method_with_its_reasons(toy_zoo):  # noqa: F811
    assert "toy: applies (training-free)" in run("methods", "toy_host").stdout
    rows = json.loads(run("methods", "timm/test_vit", "--json", "-").stdout)
    toy = next(row for row in rows if row["method"] == "toy")
    assert (toy["applies"], toy["reasons"]) == (False, ["needs a ToyHost, got VisionTransformer"])


def test_compare_measures_models_and_twins_and_prints_their_status(toy_zoo, tmp_path):  # noqa: F811
    plot, numbers = tmp_path / "c.png", tmp_path / "c.json"
    result = run(
        "compare", "toy_host", "--twin", "toy:strength=0.25", "--repeats", 2, "--json", numbers, "--plot", plot
    )
    assert result.exit_code == 0, result.output
    assert "training-free" in result.stdout
    assert "random weights" in result.stdout
    rows = json.loads(numbers.read_text())["rows"]
    assert [row["name"] for row in rows] == ["toy_host", "toy:strength=0.25"]
    assert rows[1]["knobs"] == {"strength": 0.25}
    assert rows[1]["output_error"] == 0.0  # the twin has its host's weights, even if these are random
    assert plot.stat().st_size > 1000


def test_compare_refuses_what_a_model_cannot_do(toy_zoo, tmp_path):  # noqa: F811
    args = ["compare", "timm/deit_tiny_patch16_224"]
    assert "takes 224 x 224 images only, got 200 x 200" in fails(*args, "--image-size", 200)
    assert "has no weights of its own" in fails("compare", "toy_toy_host", "--pretrained")
    assert "toy does not apply to this VisionTransformer" in fails("compare", "timm/test_vit", "--twin", "toy")
    assert "is no KNOB=VALUE" in fails("compare", "toy_host", "--twin", "toy:strength")
    assert "--dtype 'float8'" in fails("compare", "toy_host", "--dtype", "float8")
    assert "--device" in fails("compare", "toy_host", "--device", "gpu")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tome", ("tome", {})),
        ("tome:r=8", ("tome", {"r": 8})),
        ("stvit:num_tokens=4x6,keep-prefix=true", ("stvit", {"num_tokens": (4, 6), "keep_prefix": True})),
        ("m:density=0.5,exit=null", ("m", {"density": 0.5, "exit": None})),
    ],
)
def test_twins_on_the_command_line(text, expected):
    assert parse_twin(text) == expected


def test_classify_reads_folders_and_prints_labels_and_status(saved_classifier, pictures, tmp_path):
    result = run("classify", pictures, "--weights", saved_classifier, "--topk", 2, "--json", tmp_path / "c.json")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert len(lines) == 3
    assert lines[-1] == "status: host"
    stored = json.loads((tmp_path / "c.json").read_text())
    first = stored["predictions"][0]
    model = sparing.create_model(str(saved_classifier))
    pixels = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 32, 32)  # red, normalised by 0.5
    chances = model(pixels).detach().softmax(1)[0]
    assert first["labels"][0] == "abcd"[int(chances.argmax())]
    assert first["probabilities"][0] == pytest.approx(float(chances.max()), rel=1e-5)


def test_the_default_model_names_clothes_on_shipped_pictures(tmp_path):
    from sparing.training import read_idx
    from sparing.vision.micro import FASHION_CLASSES

    images = read_idx(SHIPPED / "samples" / "fashion-images-idx3-ubyte.gz")[:20]
    labels = read_idx(SHIPPED / "samples" / "fashion-labels-idx1-ubyte.gz")[:20]
    for index, image in enumerate(images):
        Image.fromarray(image.numpy()).save(tmp_path / f"{index:02}.png")
    result = run("classify", tmp_path, "--topk", 1, "--json", "-")
    assert result.exit_code == 0, result.output
    named = [prediction["labels"][0] for prediction in json.loads(result.stdout)["predictions"]]
    right = sum(name == FASHION_CLASSES[label] for name, label in zip(named, labels.tolist(), strict=True))
    assert right >= 16  # the model is right on nine of ten
    assert json.loads(result.stdout)["status"] == "trained"
    colour = tmp_path / "colour.png"
    Image.new("RGB", (28, 28)).save(colour)
    assert "a colour image, a grey image is needed" in fails("classify", colour)


def test_classify_holds_a_model_against_its_host(saved_classifier, pictures):
    result = run("classify", pictures, "--weights", saved_classifier, "--host", saved_classifier)
    assert "same top class as the host on 100.0%; feature cosine to the host 1.0000" in result.stdout


def test_classify_makes_a_twin_and_says_how_far_it_agrees(saved_classifier, pictures):
    result = run("classify", pictures, "--weights", saved_classifier, "--twin", "tome:r=1")
    assert result.exit_code == 0, result.output
    assert "status: training-free; same top class as the host on " in result.stdout
    exact = run("classify", pictures, "--weights", saved_classifier, "--twin", "tome:r=0")
    assert "status: exact; same top class as the host on 100.0%; feature cosine to the host 1.0000" in exact.stdout


def test_a_bad_file_among_good_ones_is_listed_and_the_rest_goes_on(saved_classifier, pictures):
    (pictures / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    Image.new("L", (8, 8)).save(pictures / "grey.png")
    result = run("classify", pictures, pictures / "gone.png", "--weights", saved_classifier, "--batch", 1)
    assert result.exit_code == 2
    assert len(result.stdout.splitlines()) == 3
    errors = result.stderr.splitlines()
    assert len(errors) == 3
    assert [word in line for word, line in zip(("broken.jpg", "grey.png", "gone.png"), errors)] == [True] * 3
    assert run("classify", pictures / "grey.png", "--weights", saved_classifier, "--convert").exit_code == 0


def test_classify_is_never_random(saved_classifier, pictures, tmp_path, toy_zoo):  # noqa: F811
    weights = saved_classifier / "model.safetensors"
    assert "name the model they belong to" in fails("classify", pictures, "--weights", weights)
    assert "has no weights of its own" in fails("classify", pictures, "--model", "toy_toy_host")
    assert "is a whole saved model" in fails(
        "classify", pictures, "--weights", saved_classifier, "--model", "timm/test_vit"
    )
    assert "no such file or folder" in fails("classify", pictures, "--weights", tmp_path / "none")


def test_recipes_are_listed_and_copied_without_overwriting(tmp_path, monkeypatch):
    from sparing.recipes import catalog

    (tmp_path / "cook_fish.py").write_text('"""Cook a\nfish.\n\nMore."""\n\ndef main(): ...\n')
    (tmp_path / "helper.py").write_text("def cut(): ...\n")
    monkeypatch.setattr(catalog, "_HERE", tmp_path)
    assert [line.split("  ") for line in run("recipes", "list").stdout.splitlines()[:-1]] == [
        ["cook_fish", "Cook a fish."]
    ]
    assert run("recipes").stdout == run("recipes", "list").stdout
    assert json.loads(run("recipes", "list", "--json", "-").stdout) == [
        {"name": "cook_fish", "summary": "Cook a fish."}
    ]
    assert run("recipes", "copy", "cook_fish", tmp_path / "mine").exit_code == 0
    assert (tmp_path / "mine" / "cook_fish.py").read_text() == (tmp_path / "cook_fish.py").read_text()
    assert "is there already" in fails("recipes", "copy", "cook_fish", tmp_path / "mine")
    assert "closest: cook_fish" in fails("recipes", "copy", "cook_fsh", tmp_path)


def test_doctor_names_versions_and_every_backend_with_its_reason(tmp_path):
    result = run("doctor", "--json", tmp_path / "d.json")
    assert f"sparing             {sparing.__version__}" in result.stdout
    report = json.loads((tmp_path / "d.json").read_text())
    attention = {row[2]: row[3] for row in report["kernels"]["ops"] if row[0] == "attention" and row[1] == "cpu"}
    assert attention["reference"] == []
    assert any("CUDA" in reason for reason in attention["xformers"])


def test_doctor_says_which_package_does_not_load_beside_this_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchaudio", None)  # an import of it fails now
    lines = {line.split()[0]: line for line in run("doctor").stdout.splitlines() if line}
    assert "DOES NOT LOAD with torch" in lines["torchaudio"]
    assert "LOAD" not in lines["torchvision"]


def test_debugging_lets_the_traceback_through(monkeypatch):
    monkeypatch.setenv("SPARING_DEBUG", "1")
    result = run("card", "no_such_model")
    assert isinstance(result.exception, ValueError)


def test_version():
    assert run("--version").stdout.strip() == sparing.__version__
