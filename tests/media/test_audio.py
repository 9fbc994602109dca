"""Audio files: what is written is read back, resampled and mixed to one channel; bad files give one line."""

import numpy as np
import pytest
import torch

from sparing.media.audio import audio_info, read_audio, write_audio

sf = pytest.importorskip("soundfile")


def tone(count, hertz, rate):
    return 0.5 * torch.sin(2 * torch.pi * hertz * torch.arange(count) / rate)


def test_samples_come_back_and_parts_of_them(tmp_path):
    samples = tone(4000, 440, 8000)
    path = write_audio(samples, tmp_path / "a" / "tone.wav", rate=8000)
    assert audio_info(path) == (4000, 8000, 1)
    back, rate = read_audio(path)
    assert rate == 8000
    torch.testing.assert_close(back, samples, rtol=0, atol=1 / 2**15)
    part, _ = read_audio(path, start=1000, samples=500)
    assert torch.equal(part, back[1000:1500])


def test_another_rate_and_two_channels_become_what_was_asked_for(tmp_path):
    left, right = tone(16000, 300, 16000), tone(16000, 700, 16000)
    sf.write(tmp_path / "stereo.wav", np.stack([left, right], 1), 16000)
    mono, rate = read_audio(tmp_path / "stereo.wav", rate=8000)
    assert (rate, len(mono)) == (8000, 8000)
    want = (tone(8000, 300, 8000) + tone(8000, 700, 8000)) / 2
    assert (mono - want)[100:-100].abs().max() < 0.01  # away from the borders of the resampling filter


def test_bad_files_and_bad_requests_name_what_is_wrong(tmp_path):
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("not audio")
    path = write_audio(tone(100, 440, 8000), tmp_path / "short.wav", rate=8000)
    with pytest.raises(FileNotFoundError, match="no audio file"):
        read_audio(tmp_path / "none.wav")
    with pytest.raises(ValueError, match="empty"):
        read_audio(tmp_path / "empty.wav")
    with pytest.raises(ValueError, match=r"text.wav.*cannot be read as audio"):
        read_audio(tmp_path / "text.wav")
    with pytest.raises(ValueError, match="holds 100 samples"):
        read_audio(path, start=50, samples=51)
    with pytest.raises(ValueError, match=r"\[-1, 1\], the largest is 2"):
        write_audio(torch.full((10,), 2.0), tmp_path / "loud.wav", rate=8000)
    with pytest.raises(ValueError, match=r"shape \(count,\)"):
        write_audio(torch.zeros(1, 2, 10), tmp_path / "two.wav", rate=8000)
    stereo = torch.stack([tone(800, 440, 8000), tone(800, 220, 8000)])
    written, rate = sf.read(write_audio(stereo, tmp_path / "stereo.wav", rate=8000))
    assert rate == 8000
    torch.testing.assert_close(torch.from_numpy(written.T).float(), stereo, atol=1e-4, rtol=0)
