"""``train_clip``: learns, goes on to the same weights after a stop, leaves bad files out, refuses in one line."""

import csv
import json

import numpy as np
import pytest
import soundfile
import torch

import sparing
from sparing.recipes import train_clip as recipe
from sparing.recipes.clip_data import ClipFormat, open_clips
from sparing.training import FitSettings

OPTIONS = {"num_mels": 12, "hop": 64, "n_fft": 128}
OPTIONS |= {"embed_dim": 16, "num_heads": 2, "mlp_dim": 32, "num_layers": 1, "sequence_len": 8}


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    """Recordings of a low or a high tone, half a second each, in a manifest of spans."""
    folder = tmp_path_factory.mktemp("tones")
    generator, rows = np.random.default_rng(0), []
    for index in range(12):
        label = ("low", "high")[index % 2]
        time = np.arange(4000) / 8000
        wave = 0.3 * np.sin(2 * np.pi * (300, 2000)[index % 2] * time) + 0.01 * generator.standard_normal(4000)
        soundfile.write(folder / f"{index}.wav", wave, 8000)
        rows.append({"path": f"{index}.wav", "label": label, "split": "train" if index < 8 else "test"})
    write(folder / "manifest.csv", rows)
    return folder / "manifest.csv"


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def model():
    torch.manual_seed(0)
    return recipe.build("co_spotter_micro", 2, options=OPTIONS)


def settings(epochs):
    return FitSettings(epochs=epochs, batch_size=4, lr=3e-3, seed=1)


def test_two_tones_are_learned_and_the_folder_runs_on_streams(tones, tmp_path):
    from sparing.recipes import stream

    metrics = recipe.train_clip(model(), tones, out=tmp_path / "run", fit_settings=settings(30))
    assert metrics["test_accuracy"] == 1.0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["classes"] == ["high", "low"]
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    network = stream.load_network(str(tmp_path / "run"))
    assert network.status == "trained"
    said = [row.top[0][0] for row in stream.watch([tones.parent / "10.wav"], network, topk=1)]
    assert said.count("low") > 0.8 * len(said)


def test_a_stopped_run_ends_with_the_same_weights(tones, tmp_path):
    recipe.train_clip(model(), tones, out=tmp_path / "whole", fit_settings=settings(2))

    def stop(step):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recipe.train_clip(model(), tones, out=tmp_path / "stopped", fit_settings=settings(2), on_step=stop)
    recipe.train_clip(model(), tones, out=tmp_path / "stopped", fit_settings=settings(2))
    whole, stopped = (sparing.load(tmp_path / name).state_dict() for name in ("whole", "stopped"))
    for key, value in whole.items():
        assert torch.equal(value, stopped[key]), key


def test_files_that_cannot_be_used_are_left_out_with_their_reason(tones, tmp_path):
    rows = list(csv.DictReader(tones.open()))
    for row in rows:
        row["path"] = str(tones.parent / row["path"])
    (tmp_path / "broken.wav").write_text("no sound")
    soundfile.write(tmp_path / "short.wav", np.zeros(80), 8000)
    for name in ("broken", "short"):
        rows.append({"path": str(tmp_path / f"{name}.wav"), "label": "low", "split": "train"})
    clips = open_clips(write(tmp_path / "manifest.csv", rows), ClipFormat("audio", 10, rate=8000, hop=64))
    assert len(clips) == 8
    assert {path.rpartition("/")[2].partition(".")[0] for path in clips.bad} == {"broken", "short"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--data": "absent.csv"}, "absent.csv"),
        ({"--model": "co_spotter_mikro"}, "co_spotter_micro"),
        ({"--model": "co_st_gcn", "--options": "{}"}, "neither video nor samples"),
        ({"--model": "torchvision/r3d_18", "--options": "{}"}, "--clip_frames"),
        ({"--options": "[1]"}, "--options must be a JSON object of arguments by name, got '[1]'"),
        ({"--options": "num_layers=2"}, "--options must be JSON"),
        ({"--clip_frames": "-3"}, "--clip_frames must be at least 0, got -3"),
        (
            {"--model": "torchvision/r3d_18", "--options": "{}", "--clip_frames": "-3"},
            "--clip_frames must be at least 0",
        ),
        ({"--every": "0"}, "--every must be at least 1, got 0"),
        ({"--label_smoothing": "1.5"}, "--label_smoothing must be at most 1"),
    ],
)
def test_wrong_words_give_one_line_and_exit_code_2(tones, tmp_path, capsys, change, words):
    given = {"--model": "co_spotter_micro", "--data": str(tones), "--options": json.dumps(OPTIONS)} | change
    assert recipe.main([*(word for pair in given.items() for word in pair), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("error: ")
    assert words in said[-1]
    assert not (tmp_path / "out").exists()
