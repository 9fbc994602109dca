"""``search``: recipe and command on a tiny pixel-space FlexDiT; its files, its resumption, its one-line errors."""

import json

import pytest
from diffusion import tiny_pipelines
from diffusion.conftest import build_flexdit
from PIL import Image
from typer.testing import CliRunner

from sparing.cli.app import app
from sparing.diffusion.search.algorithms import Halving, Random
from sparing.recipes import search as recipe

CLASSIFIER = "vit_micro_patch4_28.demo_fashion"
LAYOUT = {"num_layers": 6, "num_sdtm": 1, "sample_size": 8, "in_channels": 1, "out_channels": 2}


@pytest.fixture
def folder(tmp_path):
    build_flexdit(**LAYOUT).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def invoke(*arguments):
    return CliRunner().invoke(app, ["search", *map(str, arguments)])


def test_the_command_searches_writes_and_goes_on(folder, tmp_path):
    out = tmp_path / "run"
    options = ["--model", folder, "--class", 3, "--class", 5, "--verifier", "brightness:target=0.4", "--steps", 4]
    options += ["--algorithm", "zero_order:rounds=2,neighbours=2", "--report", "contrast", "--out", out]
    result = invoke(*options)
    assert result.exit_code == 0, result.output
    assert "which took no part" in result.output
    for number in range(2):
        assert Image.open(out / f"best_{number}.png").size == (8, 8)
        assert (out / f"sheet_{number}.png").exists()
        assert "<svg" in (out / f"curve_{number}.svg").read_text()
    written = json.loads((out / "results.json").read_text())
    assert [entry["prompt"] for entry in written] == [3, 5]
    assert all(entry["nfe"] == 4 * (1 + 2 * 2) for entry in written)
    log = (out / "candidates.jsonl").read_text()
    (out / "candidates.jsonl").write_text("".join(log.splitlines(keepends=True)[:4]))
    again = invoke(*options, "--json", "-")
    assert again.exit_code == 0, again.output
    found = json.loads(again.stdout)
    assert [entry["score"] for entry in found] == [entry["score"] for entry in written]


def test_a_budget_and_a_draft(folder, tmp_path):
    base = ["--model", folder, "--class", 1, "--verifier", "brightness", "--steps", 4]
    result = invoke(*base, "--algorithm", "random:n=50", "--budget", "13nfe", "--out", tmp_path / "a", "--json", "-")
    assert json.loads(result.stdout)[0]["nfe"] == 12
    more = invoke(*base, "--algorithm", "random:n=50", "--budget", "20nfe", "--out", tmp_path / "a", "--json", "-")
    assert json.loads(more.stdout)[0]["nfe"] == 20  # it goes on with a larger budget
    drafted = invoke(
        *base,
        "--algorithm",
        "random:n=6,keep=2",
        "--draft",
        "steps=2,density=2",
        "--out",
        tmp_path / "b",
        "--json",
        "-",
    )
    numbers = json.loads(drafted.stdout)[0]
    assert numbers["nfe"] == 6 * 2 + 2 * 4
    assert numbers["draft"]["draft_nfe"] == 12


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (["--verifier", "brigtness"], "closest: brightness"),
        (["--verifier", "classifier"], "needs model"),
        (["--algorithm", "randm"], "closest: random"),
        (["--algorithm", "random:m=3"], "it takes n, keep"),
        (["--algorithm", "random:n"], "'n' is no KEY=VALUE"),
        (["--preset", "flux"], "closest: flux.1-dev"),
        (["--class", "99"], "99"),
        (["--prompt", "a cat"], "either prompts or classes"),
        (["--budget", "3nfe"], "one takes 4 NFE, the budget is 3"),
        (["--budget", "much"], "write 400nfe"),
        (["--pipeline", "x"], "give either model"),
        (["--draft", "model=a,cache=1", "--algorithm", "random:n=2,keep=1"], "not both"),
        (["--call", "colour=3"], "takes no colour"),
        (["--call", "class_labels=[2]"], "class_labels is given twice"),
        (["--draft", "steps=2"], "algorithm random:n=N,keep=K uses it"),
        (["--draft", "steps=abc", "--algorithm", "random:n=2,keep=1"], "steps must be a whole number, got 'abc'"),
        (["--draft", f"model={CLASSIFIER}", "--algorithm", "random:n=2,keep=1"], "is no denoiser"),
        (["--preset", "sdxl", "--algorithm", "random"], "either preset 'sdxl' or algorithm 'random'"),
        (["--guidance-scale", "nan"], "guidance_scale must be a finite number"),
        (["--algorithm", "random:n=2.5"], "n must be a whole number, got 2.5"),
        (["--algorithm", "zero_order:rule=cross"], "one of rotate, mix, shell, shell_free, got 'cross'"),
        (["--algorithm", "smc:lambdas=2"], "it takes particles, checks, lam,"),
        (["--algorithm", "paths:start=3,ladder=[[1,4],[2,5]"], "do not match"),
    ],
)
def test_mistakes_are_one_line(folder, tmp_path, changed, words):
    options = ["--model", folder, "--class", 1, "--verifier", "brightness", "--steps", 4, "--out", tmp_path / "run"]
    if changed[0] == "--verifier":
        del options[4:6]
    result = invoke(*options, *changed)
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    assert words in result.output
    assert not list((tmp_path / "run").glob("*.json"))
    log = tmp_path / "run" / "candidates.jsonl"
    assert not log.exists() or log.read_text().count("\n") == 1
    right = invoke("--model", folder, "--class", 2, "--verifier", "contrast", "--steps", 2, "--out", tmp_path / "run")
    assert right.exit_code == 0, right.output  # what was left behind is in nobody's way


def test_settings_are_json_and_keep_their_brackets():
    name, settings = recipe.settings_of("halving:n=16,stops=[8,14,20],keeps=[8,4,1],tag=a")
    assert (name, settings) == ("halving", {"n": 16, "stops": [8, 14, 20], "keeps": [8, 4, 1], "tag": "a"})
    assert isinstance(recipe.make_algorithm("halving:n=16,stops=[8,14,20],keeps=[8,4,1]"), Halving)
    assert recipe.make_algorithm("random:n=3,keep=null").keep is None
    assert recipe.make_algorithm("paths:start=3,ladder=[[1,4],[2,5]]").ladder == [(1, 4), (2, 5)]
    assert isinstance(recipe.make_algorithm("random"), Random)


def test_help_names_algorithms_and_verifiers():
    text = invoke("--help").output
    assert "zero_order" in text
    from sparing.cli import search as command
    from sparing.diffusion.search.algorithms import ALGORITHMS
    from sparing.diffusion.search.verifiers.names import VERIFIERS

    assert set(command._ALGORITHMS.split(", ")) == set(ALGORITHMS)
    assert set(command._VERIFIERS.split(", ")) == set(VERIFIERS)


def test_the_scripts_own_command_line(folder, tmp_path, capsys):
    options = [
        "--model",
        folder,
        "--labels",
        "2",
        "--verifiers",
        "brightness",
        "--steps",
        "2",
        "--algorithm",
        "random:n=2",
    ]
    assert recipe.main([*options, "--out", str(tmp_path / "run")]) == 0
    assert "candidate" in capsys.readouterr().out
    assert recipe.main([*options[:3], "2", *options[4:], "--preset", "nothing", "--out", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err.startswith("error: no preset")


def test_an_unconditional_pipeline_is_searched_without_prompt_or_class(tmp_path):
    for name in ("ddpm", "consistency"):
        tiny_pipelines.build(name)[0].save_pretrained(tmp_path / name)
        options = ["--pipeline", tmp_path / name, "--verifier", "sharpness", "--steps", 3, "--algorithm", "random:n=3"]
        result = invoke(*options, "--out", tmp_path / f"{name}_run")
        assert result.exit_code == 0, result.output
        assert "no prompt: score" in result.output
        [found] = json.loads((tmp_path / f"{name}_run" / "results.json").read_text())
        assert (found["prompt"], found["nfe"]) == (None, 9)
        refused = invoke(*options, "--class", 3, "--out", tmp_path / "x")
        assert refused.exit_code == 2
        assert "takes neither prompts nor classes, and classes were given" in refused.output.splitlines()[-1]


def test_prompts_and_classes_go_to_the_pipelines_that_take_them(folder, tmp_path):
    (tmp_path / "toy").mkdir()
    tiny_pipelines.prompted(tmp_path / "toy").save_pretrained(tmp_path / "sd")
    tiny_pipelines.build("dit")[0].save_pretrained(tmp_path / "dit")
    index = tmp_path / "dit" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": {"3": "cat, tabby", "7": "dog"}}))
    text, classes = ["--pipeline", tmp_path / "sd"], ["--pipeline", tmp_path / "dit"]
    rest = ["--verifier", "sharpness", "--steps", 2, "--algorithm", "random:n=2", "--out", tmp_path / "run"]
    for options, words in (
        ([*text, "--class", 3], "StableDiffusionPipeline takes text prompts, and classes were given"),
        (text, "StableDiffusionPipeline takes text prompts, and none were given"),
        ([*classes, "--prompt", "a cat"], "DiTPipeline takes classes, and prompts were given"),
        (["--model", folder, "--prompt", "a"], "FlexDiTPipeline takes classes, and prompts were given"),
        ([*classes, "--class", 3000], "class 3000 is out of range: the model has classes 0..999"),
        ([*classes, "--class", "kat"], "no class 'kat'; closest: cat"),
        ([*classes, "--class", "\u00b2"], "no class '\u00b2'; give an index"),
    ):
        result = invoke(*options, *rest)
        assert result.exit_code == 2, result.output
        assert result.output.splitlines()[-1].startswith(f"error: {words}")
    assert not (tmp_path / "run").exists()
    result = invoke(*classes, "--class", "tabby", "--class", 7, *rest, "--json", "-")
    assert [entry["prompt"] for entry in json.loads(result.stdout)] == [3, 7]
    rest[-1] = tmp_path / "text"
    assert json.loads(invoke(*text, "--prompt", "ab", *rest, "--json", "-").stdout)[0]["prompt"] == "ab"


@pytest.mark.parametrize("value", ["-inf", "inf"])
def test_scores_that_are_not_finite_are_written_as_null_and_not_drawn(folder, tmp_path, value):
    (tmp_path / "mine.py").write_text(f"def fit(samples, prompts):\n    return [float('{value}')] * len(samples)\n")
    options = ["--model", folder, "--class", 1, "--verifier", f"{tmp_path}/mine.py:fit", "--steps", 2]
    with pytest.warns(UserWarning, match=r"curve_0\.svg is left out: nothing to plot"):
        result = invoke(*options, "--algorithm", "random:n=2", "--out", tmp_path / "run", "--json", "-")
    assert result.exit_code == 0, result.output

    def refuse(word):
        raise AssertionError(word)

    for text in (result.stdout, (tmp_path / "run" / "results.json").read_text()):
        [found] = json.loads(text, parse_constant=refuse)
        assert (found["score"], found["scores"], found["first_score"]) == (None, {"fit": None}, None)
    assert sorted(file.name for file in (tmp_path / "run").glob("*_0.*")) == ["best_0.png", "sheet_0.png"]


def test_results_are_written_before_the_pictures(folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr("sparing.diffusion.search.report.sheet", full)
    options = ["--model", folder, "--class", 1, "--class", 2, "--verifier", "contrast", "--steps", 2]
    assert invoke(*options, "--algorithm", "random:n=2", "--out", tmp_path).exit_code == 2
    assert len(json.loads((tmp_path / "results.json").read_text())) == 2
    assert {"best_0.png", "best_1.png"} <= {file.name for file in tmp_path.iterdir()}


@pytest.mark.parametrize("error", ["RuntimeError('no\\nkernel')", "KeyError('x')", "AssertionError"])
def test_a_verifier_that_always_fails_is_one_line_with_its_name(folder, tmp_path, capsys, error):
    (tmp_path / "mine.py").write_text(f"def fit(samples, prompts):\n    raise {error}\n")
    shared = ["--model", folder, "--steps", "2", "--algorithm", "random:n=2", "--out", str(tmp_path / "run")]
    result = invoke(*shared, "--class", 1, "--verifier", f"{tmp_path}/mine.py:fit")
    assert result.exit_code == 2, result.output
    assert result.output.strip().splitlines()[-1].startswith(f"error: 'fit' could not score: {error[:8]}")
    assert recipe.main([*shared, "--labels", "1", "--verifiers", f"{tmp_path}/mine.py:fit"]) == 2
    assert f"error: 'fit' could not score: {error[:8]}" in capsys.readouterr().err
