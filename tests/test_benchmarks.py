"""Benchmark scripts run by hand and on a GPU only: here each is imported, so that a renamed function shows."""

import importlib.util
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_benchmark_script_finds_all_that_it_imports_and_has_a_main(script, monkeypatch):
    monkeypatch.syspath_prepend(str(script.parent))  # as when it is run
    spec = importlib.util.spec_from_file_location(f"benchmark_{script.stem}", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert callable(module.main)
    assert module.__doc__
    assert "python benchmarks/" in module.__doc__
