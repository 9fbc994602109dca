"""Compiled steps of one test do not count against the recompilation limit of the next: they share one function."""

import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
