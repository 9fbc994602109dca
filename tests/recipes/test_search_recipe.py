"""``search``: recipe and command on a tiny pixel-space FlexDiT; its files, its resumption, its one-line errors."""

import json

import pytest
from diffusion.conftest import build_flexdit
from PIL import Image
from typer.testing import CliRunner

from sparing.cli.app import app
from sparing.diffusion.search.algorithms import Halving, Random
from sparing.recipes import search as recipe

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
        (["--draft", "model=a,cache=1"], "not both"),
        (["--call", "colour=3"], "takes no colour"),
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
