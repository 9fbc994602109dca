"""Strings of digits: the split by takes, spans that cover a recording where the takes are, one line of error."""

import csv
import itertools
import zipfile

import pytest
import torch

from sparing.media.audio import read_audio, write_audio
from sparing.recipes import spoken_digits as digits

pytest.importorskip("soundfile")


def archive(folder, *, takes=7, speakers=("ann", "bob")):
    """A small archive: take n of digit d is a tone of 200 + 100 d Hz, longer for higher n."""
    for speaker in speakers:
        for digit in (3, 8):
            for number in range(takes):
                count = 400 + 40 * number
                tone = 0.4 * torch.sin(2 * torch.pi * (200 + 100 * digit) * torch.arange(count) / digits.RATE)
                write_audio(tone, folder / "recordings" / f"{digit}_{speaker}_{number}.wav", rate=digits.RATE)
    path = folder / "digits.zip"
    with zipfile.ZipFile(path, "w") as file:
        for wav in sorted((folder / "recordings").iterdir()):
            file.write(wav, f"recordings/{wav.name}")
    return path


def test_zip_and_folder_hold_the_same_takes_split_by_their_number(tmp_path):
    path = archive(tmp_path)
    every = digits.read_digits(path)
    assert [(t.speaker, t.digit, t.number) for t in every] == [
        (s, d, n) for s in ("ann", "bob") for d in (3, 8) for n in range(7)
    ]
    for one, other in zip(every, digits.read_digits(tmp_path / "recordings")):
        assert torch.equal(one.samples, other.samples)
    held_out = digits.read_digits(path, held_out=True)
    assert [t.number for t in held_out] == [0, 1, 2, 3, 4] * 4
    assert {t.number for t in digits.read_digits(path, held_out=False)} == {5, 6}


def test_spans_cover_the_recording_and_sound_is_where_they_say(tmp_path):
    takes = digits.read_digits(archive(tmp_path), held_out=True)[:5]
    samples, spans = digits.make_recording(takes, seed=3, index=2)
    again, _ = digits.make_recording(takes, seed=3, index=2)
    other, _ = digits.make_recording(takes, seed=3, index=3)
    assert torch.equal(samples, again)
    assert len(other) != len(samples)
    assert spans[0][1] == 0
    assert spans[-1][2] == len(samples) / digits.RATE
    assert all(one[2] == two[1] for one, two in itertools.pairwise(spans))
    assert [label for label, _, _ in spans if label != "none"] == [str(take.digit) for take in takes]
    for label, start, end in spans:
        part = samples[round(start * digits.RATE) : round(end * digits.RATE)]
        assert (part.square().mean().sqrt() > 0.1) == (label != "none")


def test_the_recipe_writes_recordings_and_a_manifest(tmp_path, capsys):
    out = tmp_path / "out"
    assert digits.main(["--archive", str(archive(tmp_path)), "--out", str(out), "--digits", "3", "--passes", "2"]) == 0
    with open(out / "manifest.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["split"] for row in rows} == {"train", "test"}
    spoken = [row for row in rows if row["label"] != "none"]
    assert sum(row["split"] == "test" for row in spoken) == 20  # every held-out take once
    assert sum(row["split"] == "train" for row in spoken) == 2 * 2 * 2 * 2  # two passes over two takes
    last = {row["path"]: float(row["end_s"]) for row in rows}
    for path, end in last.items():
        assert abs(len(read_audio(out / path)[0]) / digits.RATE - end) < 1e-6
    assert str(out / "manifest.csv") in capsys.readouterr().out


def test_what_is_no_archive_gives_one_line(tmp_path, capsys):
    (tmp_path / "x.zip").write_text("no zip")
    (tmp_path / "empty").mkdir()
    for name, words in (("none.zip", "no zip or folder"), ("x.zip", "no zip file"), ("empty", "no files named")):
        assert digits.main(["--archive", str(tmp_path / name), "--out", str(tmp_path / "o")]) == 2
        assert words in capsys.readouterr().err
    write_audio(torch.zeros(100), tmp_path / "fast" / "1_ann_0.wav", rate=16000)
    with pytest.raises(ValueError, match="16000 Hz"):
        digits.read_digits(tmp_path / "fast")
