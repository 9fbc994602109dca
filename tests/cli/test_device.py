"""A device that does not exist, or is not here, is one line and exit code 2 in every command that takes one."""

import pytest
from typer.testing import CliRunner

from sparing.cli.app import app

COMMANDS = {
    "generate": ["--model", "dit_micro_patch4_28", "--class", "1", "--steps", "1"],
    "search": [
        "--model",
        "dit_micro_patch4_28",
        "--class",
        "1",
        "--verifier",
        "sharpness",
        "--algorithm",
        "random:n=1",
    ],
    "detect": ["picture.png", "--weights", "folder"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("device", "words"), [("gpu", "cpu, cuda, cuda:N or mps is needed"), ("mps", "no such device")]
)
def test_devices_that_are_not_there(command, device, words, tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    out = [] if command == "detect" else ["--out", str(tmp_path / "out.png")]
    result = CliRunner().invoke(app, [command, *COMMANDS[command], "--device", device, *out])
    assert result.exit_code == 2
    assert words in result.output + getattr(result, "stderr", "")
    assert not (tmp_path / "out.png").exists()
