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
