"""The adaLN, exit-test and codebook kernels compile for sm_90 without a GPU and keep within its resources."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from kernels.launches_other import LAUNCHES

HERE = Path(__file__).parent
SHARED_BYTES, REGISTERS = 232_448, 65_536  # of one sm_90 multiprocessor


def _compile(names: list[str]) -> list[dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / "offline_sm90.py"), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _check(records: list[dict]) -> None:
    for record in records:
        what = f"{record['case']} {record['kernel']}: {record}"
        assert record["shared"] <= SHARED_BYTES, what
        assert record["registers"] * record["threads"] <= REGISTERS, what
        assert record["stack"] == 0, what
        assert record["float_atomics"] == 0, what
        if record["kernel"] != "cosine_finish_kernel":  # it reads four numbers a block of tokens
            assert record["wide_loads"] > 0, what
        if record["kernel"] == "codebook_argmin_kernel":
            assert record["wgmma"] > 0, what
            assert record["async_copies"] > 0, what


def test_one_configuration_of_each_kernel_fits_an_sm90():
    records = _compile([name for name in LAUNCHES if name.endswith("/default")])
    assert {record["kernel"] for record in records} == {
        "adaln_forward_kernel", "adaln_backward_kernel", "cosine_partial_kernel", "cosine_finish_kernel",
        "code_offset_kernel", "codebook_argmin_kernel",
    }  # fmt: skip
    _check(records)


@pytest.mark.slow
def test_every_configuration_fits_an_sm90():
    _check(_compile(list(LAUNCHES)))


SWEEP = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from triton.runtime.jit import JITFunction
import offline_sm90
from sparing.kernels.triton import adaln, codebook, cosine_exit

variants = {}
def note(self, *args, grid, warmup, **kwargs):
    variants.setdefault(self.fn.__name__, set()).add(str(offline_sm90.describe(self, args, kwargs)))
JITFunction.run = note
for tokens in range(101, 151):
    x, m, s = torch.empty(2, tokens, 1152), torch.empty(2, 1, 1152), torch.empty(2, tokens)
    adaln.adaln_forward(x, x, m, m, m, None, None, x, x, s, s, eps=1e-6)
    adaln.adaln_backward(x, x, m, m, None, None, s, s, x, x)
    cosine_exit.cosine_exit_forward(x, x, s > 0, torch.empty(2), "mean", 1e-8)
    codebook.codebook_argmin_forward(x[0], x[1, :64], "l2", "tf32x3", 1e-12, interpreted=False)
print(json.dumps({name: len(found) for name, found in variants.items()}))
"""


def test_fifty_token_counts_make_at_most_three_variants_of_a_kernel():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SWEEP, str(HERE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert len(counts) == 6
    assert max(counts.values()) <= 3, counts


@pytest.mark.parametrize("name", ["adaln", "codebook", "cosine_exit"])
def test_the_sources_hold_no_atomics_and_no_autotuner(name):
    source = (HERE.parents[1] / "sparing" / "kernels" / "triton" / f"{name}.py").read_text()
    assert "atomic" not in source.replace("No atomics", "")
    assert "autotune" not in source
