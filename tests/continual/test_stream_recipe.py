"""``sparing stream``: several files at once, each as if watched alone; files that cannot be read give one line."""

import json

import numpy as np
import pytest
import torch
from continual.test_networks import tiny_x3d
from typer.testing import CliRunner

from sparing.media.video import read_frames, write_video
from sparing.recipes import stream

pytest.importorskip("av")


def video(path, frames, seed):
    pictures = np.random.default_rng(seed).integers(0, 255, (frames, 3, 40, 48), dtype=np.uint8)
    return write_video(torch.from_numpy(pictures), path, rate=10)


def test_videos_of_different_length_are_watched_side_by_side(tmp_path):
    network = tiny_x3d()
    paths = [video(tmp_path / "a.mp4", 18, 0), video(tmp_path / "b.mp4", 12, 1)]
    both = list(stream.watch(paths, network, size=32, topk=5))
    delay = network.plan().first_output_step
    for index, (path, length) in enumerate(zip(paths, (18, 12))):
        mine = [row for row in both if row.stream.startswith(f"{index}:")]
        assert [row.frame for row in mine] == list(range(delay, length))
        frames = torch.stack([stream.prepare(frame, network.pretrained_cfg, 32) for frame in read_frames(path)], 1)[
            None
        ]
        with torch.no_grad():
            want = network(frames, se="stream")[0]
        for i, row in enumerate(mine):
            for label, score in row.top:
                assert abs(want[label, i].item() - score) < 1e-4


def test_unreadable_files_give_one_line_and_exit_code_2(tmp_path):
    from sparing.cli.app import app

    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("not a video")
    for name, words in (
        ("none.mp4", "no video file"),
        ("empty.mp4", "is empty"),
        ("text.mp4", "cannot be read as video"),
    ):
        found = CliRunner().invoke(app, ["stream", str(tmp_path / name), "--random-weights", "--model", "co_x3d_xs"])
        assert found.exit_code == 2
        assert words in found.output + getattr(found, "stderr", "")
    found = CliRunner().invoke(app, ["stream", str(tmp_path / "none.mp4")])
    assert found.exit_code == 2
    with pytest.raises(ValueError, match="does not run on streams"):
        stream.load_network("timm/vit_tiny_patch16_224", random_weights=True)


def test_the_recipe_writes_json_and_a_plot(tmp_path, monkeypatch, capsys):
    network = tiny_x3d()
    monkeypatch.setattr(stream, "load_network", lambda *args, **options: network)
    path = video(tmp_path / "a.mp4", 13, 0)
    stream.main([str(path), "--json", str(tmp_path / "s.json"), "--plot", str(tmp_path / "s.png"), "--random-weights"])
    rows = json.loads((tmp_path / "s.json").read_text())
    assert [row["frame"] for row in rows] == list(range(network.plan().first_output_step, 13))
    assert (tmp_path / "s.png").stat().st_size > 0
    assert "predictions in" in capsys.readouterr().out


def ending(frames, error):
    """A source that gives frames and then fails."""
    yield from frames
    raise error


def tiny(monkeypatch):
    network = tiny_x3d()
    monkeypatch.setattr(stream, "load_network", lambda *args, **options: network)
    return network


def test_results_that_could_not_be_written_are_refused_before_anything_is_read(tmp_path, monkeypatch):
    tiny(monkeypatch)
    path = str(video(tmp_path / "a.mp4", 3, 0))
    absent = str(tmp_path / "absent" / "x")
    for words, error in (
        (["--json", absent], "--json .*no folder"),
        (["--plot", absent + ".png"], "--plot .*no folder"),
        (["--json", str(tmp_path)], "--json .* is a folder"),
        (["--plot", str(tmp_path / "x.xyz")], "pictures are .*png.*not 'xyz'"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=error):
            stream.main([path, *words])


def test_a_source_that_fails_leaves_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    network = tiny(monkeypatch)
    paths = [video(tmp_path / "a.mp4", 12, 0), video(tmp_path / "b.mp4", 14, 1), video(tmp_path / "c.mp4", 2, 2)]
    whole = stream._video

    def breaks(source, *, every):
        frames, rate = whole(source, every=every)
        if source.endswith("a.mp4"):
            return ending([next(frames) for _ in range(10)], ValueError("the file is\nbroken here")), rate
        return frames, rate

    monkeypatch.setattr(stream, "_video", breaks)
    assert stream.main([*map(str, paths), "--json", str(tmp_path / "s.json")]) == 2
    said = capsys.readouterr()
    delay = network.plan().first_output_step
    assert said.err.splitlines() == [
        f"error: 2: c.mp4: ended after 2 frames; the network speaks from {delay + 1} on",
        "error: 0: a.mp4: the file is broken here",
    ]
    rows = json.loads((tmp_path / "s.json").read_text())
    frames = {name: [row["frame"] for row in rows if row["stream"] == name] for name in ("0: a.mp4", "1: b.mp4")}
    assert frames == {"0: a.mp4": list(range(delay, 10)), "1: b.mp4": list(range(delay, 14))}
    with pytest.raises(ValueError, match="broken here"):
        list(stream.watch(paths, network, size=32))


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (RuntimeError("a fault"), None)])
def test_what_was_said_is_written_when_the_run_is_cut_off(tmp_path, monkeypatch, capsys, error, code):
    tiny(monkeypatch)
    path = video(tmp_path / "a.mp4", 10, 0)
    monkeypatch.setattr(stream, "_video", lambda source, every: (ending(read_frames(source), error), 10.0))
    words = [str(path), "--json", str(tmp_path / "s.json"), "--plot", str(tmp_path / "s.png")]
    if code is None:
        with pytest.raises(RuntimeError, match="a fault"):
            stream.main(words)
    else:
        assert stream.main(words) == code
        assert capsys.readouterr().err == "stopped\n"
    assert json.loads((tmp_path / "s.json").read_text())[-1]["frame"] == 9
    assert (tmp_path / "s.png").stat().st_size > 0


def test_nan_scores_are_no_predictions(tmp_path, monkeypatch, capsys):
    network = tiny(monkeypatch)
    path = video(tmp_path / "a.mp4", 40, 0)
    prepare, count = stream.prepare, []

    def broken(frame, config, size):
        count.append(0)
        return prepare(frame, config, size) * (float("nan") if len(count) == 8 else 1)

    monkeypatch.setattr(stream, "prepare", broken)
    words = [str(path), "--json", str(tmp_path / "s.json"), "--plot", str(tmp_path / "s.png")]
    assert stream.main(words) == 0
    rows = json.loads((tmp_path / "s.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    spoiled = [row["frame"] for row in rows if row["top"] is None]
    assert spoiled
    assert 0 < len(spoiled) <= network.plan().receptive_field
    said = capsys.readouterr().out
    assert said.count("no prediction, the scores are NaN") == len(spoiled)
    assert "nan" not in said
    assert f"{len(rows) - len(spoiled)} predictions in" in said


def test_networks_without_video_or_sound_and_unused_options_are_refused_in_one_line(tmp_path):
    from sparing.cli.app import app

    path, folder = str(video(tmp_path / "a.mp4", 3, 0)), tmp_path / "net"
    folder.mkdir()
    for words, said in (
        (["--model", "co_oadtr_b1", "--random-weights"], "takes features (3072 numbers a step), not video or sound"),
        (["--model", "co_st_gcn", "--random-weights"], "takes skeletons (2 of 25 joints a frame), not video or sound"),
        (["--model", "co_x3d_mikro"], "unknown model 'co_x3d_mikro'; closest: co_x3d_micro"),
        (["--model", str(folder), "--window", "3"], "takes no --window"),
        (["--model", str(folder), "--checkpoint", "x.pt"], "takes no --checkpoint"),
        (["--model", str(folder), "--random-weights"], "takes no --random-weights"),
        (["--model", "co_spotter_micro", "--window", "3"], "co_spotter_micro takes no --window"),
        (["--model", "co_spotter_micro", "--every", "2"], "sound is taken whole, got every=2"),
        (["--model", "co_x3d_micro"], "ended after 3 frames; the network speaks from"),
    ):
        found = CliRunner().invoke(app, ["stream", path, *words])
        text = found.output + getattr(found, "stderr", "")
        assert found.exit_code == 2, words
        assert said in text
        assert "Traceback" not in text
