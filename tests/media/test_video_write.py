"""Videos written and read back; cameras and addresses told from files; wrong shapes refused by name."""

import pytest
import torch
from PIL import Image

from sparing.media.video import is_live, read_frames, read_live, video_rate, write_gif, write_video


def test_a_written_video_is_read_back(tmp_path):
    ramp = torch.linspace(0, 255, 32).round().byte()
    frames = torch.stack([ramp.roll(4 * i).expand(3, 24, 32) for i in range(7)])
    path = write_video(frames, tmp_path / "deep" / "a.mp4", rate=12)
    back = torch.stack(list(read_frames(path)))
    assert back.shape == frames.shape
    assert (back.float() - frames.float()).abs().mean() < 6
    assert video_rate(path) == pytest.approx(12)
    every = torch.stack(list(read_frames(path, every=3)))
    assert torch.equal(every, back[::3])


def test_wrong_frames_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"uint8 \(T, 3, H, W\), got torch.float32"):
        write_video(torch.zeros(2, 3, 8, 8), tmp_path / "a.mp4", rate=5)
    with pytest.raises(ValueError, match="must be even, got 7 x 8"):
        write_video(torch.zeros(2, 3, 7, 8, dtype=torch.uint8), tmp_path / "a.mp4", rate=5)
    assert not (tmp_path / "a.mp4").exists()


def test_what_is_live_and_a_camera_that_is_not_there():
    assert is_live("0")
    assert is_live("rtsp://camera/1")
    assert not is_live("film.mp4")
    with pytest.raises((FileNotFoundError, ValueError), match="99"):
        next(read_live("99"))


def test_a_gif_comes_back(tmp_path):
    frames = torch.zeros(3, 3, 6, 10, dtype=torch.uint8)
    for i in range(3):
        frames[i, i] = 200
    with Image.open(write_gif(frames, tmp_path / "deep" / "a.gif", rate=10)) as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"], gif.info["loop"]) == (3, (10, 6), 100, 0)
        for i in range(3):
            gif.seek(i)
            assert gif.convert("RGB").getpixel((4, 4)) == tuple(frames[i, :, 4, 4].tolist())
    for rate, message in ((51, "at most 50"), (0, "at least one")):
        with pytest.raises(ValueError, match=message):
            write_gif(frames, tmp_path / "a.gif", rate=rate)
