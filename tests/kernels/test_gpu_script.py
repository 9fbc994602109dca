"""``benchmarks/gpu.sh`` on a machine without a GPU: it says so, still leaves its archive, and names wrong arguments."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    python3 = Path(sys.executable).parent  # the script calls whatever python3 is first
    environment = {**os.environ, "PATH": f"{python3}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], capture_output=True, text=True, check=False, env=environment
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--out DIR is required"),
        (("--out", "x", "--wheels", "no/such/folder"), "is no folder"),
        (("--out", "x", "--seconds", "soon"), "no number of seconds"),
        (("--fast",), "unknown argument --fast"),
        (("--out",), "--out needs a value"),
    ],
    ids=["no out", "no wheels", "no number", "unknown", "no value"],
)
def test_wrong_arguments_are_named(arguments, message):
    done = _run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_fails_at_once_and_leaves_an_archive_that_says_why(tmp_path):
    done = _run("--out", str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    (archive,) = tmp_path.iterdir()
    assert archive.name == "sparing-gpu.tar.gz"
    assert archive.stat().st_size <= 16 << 20
    with tarfile.open(archive) as found:
        assert {"./summary.txt", "./machine.log"} <= set(found.getnames())
        log = found.extractfile("./machine.log")
        assert log is not None
        assert "PyTorch finds no CUDA device" in log.read().decode()
        summary = found.extractfile("./summary.txt")
        assert summary is not None
        assert "kernels: not started" in summary.read().decode()
