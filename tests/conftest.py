"""Test set-up: the Triton interpreter on, one torch thread a worker, golden cases as parameters."""

import os
import sys
from pathlib import Path

# Before torch or triton is imported: kernels run in the Triton interpreter on machines without a GPU.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("XFORMERS_MORE_DETAILS", "0")
if not Path("/proc/driver/nvidia").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--golden-dir",
        action="append",
        default=[],
        help="a further directory of golden cases, laid out as tests/golden/cases (repeatable)",
    )


def _directories(config) -> list[Path]:
    return [TESTS / "golden" / "cases", *(Path(d) for d in config.getoption("--golden-dir"))]


@pytest.fixture(scope="session")
def golden_directories(request) -> list[Path]:
    return _directories(request.config)


def pytest_generate_tests(metafunc):
    if "golden_case" in metafunc.fixturenames:
        from golden.harness import collect

        cases = collect(_directories(metafunc.config))
        metafunc.parametrize("golden_case", cases, ids=[case.id for case in cases])


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
