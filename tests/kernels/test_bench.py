"""The benchmark harness: it checks before it times, writes what it measured, fails on what became slower or wrong."""

import json
from dataclasses import replace

import pytest
import torch

from sparing import kernels
from sparing.kernels.bench import cases as bench_cases
from sparing.kernels.bench import harness, regressions, run
from sparing.kernels.bench.__main__ import main
from sparing.kernels.bench.cases import SUITES, cases
from sparing.kernels.bench.peers import library_peers
from sparing.kernels.bench.timing import Ceilings
from sparing.kernels.triton import config as table
from sparing.kernels.triton.config import Config
from sparing.kernels.tune import MOST, candidates, search, tune


@pytest.fixture
def small_device(monkeypatch):
    """Ceilings of a made-up device: measuring this one's takes a second."""
    ceilings = Ceilings({"float32": 0.05, "bfloat16": 0.05}, 0.01, 2.0, 0.0)
    monkeypatch.setattr(harness, "measure_ceilings", lambda device: ceilings)


def test_a_run_prints_the_ceilings_first_and_writes_json_markdown_and_bars(small_device, tmp_path):
    said: list[str] = []
    result = run(ops=["few_query_attention", "gather_rows"], out=tmp_path, device="cpu", say=said.append)
    assert said[0].startswith("CPU")
    assert "TFLOP/s" in said[0]
    assert "TB/s" in said[0]
    data = json.loads((tmp_path / "kernels.json").read_text())
    assert not result.failures
    assert {"device", "versions", "ceilings", "rows"} <= set(data)
    timed = [row for row in data["rows"] if row["median_us"]]
    assert {row["backend"] for row in timed} == {"reference", "sdpa"}
    wanted = {
        "op", "case", "dtype", "direction", "backend", "median_us", "p10", "p90", "roofline", "ratio_vs_best_peer",
        "peak_mb", "graph_us", "error", "reason_if_skipped",
    }  # fmt: skip
    assert all(wanted <= set(row) for row in data["rows"])
    assert sum(row["auto"] for row in timed) == 2
    assert "| few_query_attention |" in (tmp_path / "kernels.md").read_text()
    assert (tmp_path / "kernels.png").read_bytes()[:4] == b"\x89PNG"


def test_library_kernels_are_peers_one_by_one_and_say_why_they_do_not_serve(small_device):
    result = run(ops=["few_query_attention"], device="cpu", say=lambda line: None)
    reasons = {row["backend"]: row["reason_if_skipped"] for row in result.data["rows"]}
    for name in ("sdpa:flash", "sdpa:mem-efficient", "sdpa:cudnn", "xformers:split-k"):
        assert "needs CUDA, tensors are on cpu" in reasons[name]
    assert not library_peers("gather_rows")
    assert "xformers:split-k" not in library_peers("attention")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sdpa:flash", "sdpa:mem-efficient", "sdpa:cudnn", "xformers:split-k"])
def test_library_kernels_compute_the_op_on_a_device(name):
    q, k, v = (torch.randn(2, 4, n, 64, device="cuda", dtype=torch.bfloat16) for n in (16, 512, 512))
    out = library_peers("few_query_attention")[name](q, k, v)
    want = kernels.attention(q.float(), k.float(), v.float(), backend="reference")
    assert (out.float() - want).norm() / want.norm() < 8e-3


def test_a_wrong_peer_is_reported_and_never_timed(small_device, monkeypatch):
    case = next(c for c in cases("smoke") if c.op == "gather_rows")
    wrong = replace(case, peers={"off by one": lambda x, packing: torch.zeros(packing.flat_index.shape[0], x.shape[2])})
    monkeypatch.setattr(harness, "cases", lambda suite, ops: [wrong])
    result = run(device="cpu", say=lambda line: None)
    (row,) = [row for row in result.data["rows"] if row["backend"] == "off by one"]
    assert row["median_us"] is None
    assert "error" in row["reason_if_skipped"]
    assert len(result.failures) == 1


def _data(median: float, noise: float = 0.0, device: str = "one") -> dict:
    row = {
        "op": "a",
        "case": "b",
        "dtype": "c",
        "direction": "fw",
        "backend": "triton",
        "median_us": median,
        "noise": noise,
    }
    return {"device": device, "rows": [row], "ceilings": {}}


def test_a_slow_down_beyond_seven_percent_and_noise_is_a_regression():
    assert regressions(_data(100), _data(106)) == []
    assert regressions(_data(100), _data(109)) == ["a b c fw triton: 100.0 -> 109.0 us (+9%)"]
    assert regressions(_data(100), _data(109, noise=0.05)) == []
    assert regressions(_data(100), _data(50)) == []
    with pytest.raises(ValueError, match="cannot compare runs on one and two"):
        regressions(_data(100), _data(100, device="two"))


def test_the_command_fails_on_a_regression_and_names_bad_arguments(small_device, tmp_path, capsys):
    arguments = ["--op", "gather_rows", "--device", "cpu", "--out", str(tmp_path)]
    assert main(arguments) == 0
    old = json.loads((tmp_path / "kernels.json").read_text())
    for row in old["rows"]:
        if row["median_us"]:
            row["median_us"] /= 1000
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert main([*arguments, "--compare", str(tmp_path / "old.json")]) == 1
    assert "SLOWER gather_rows" in capsys.readouterr().err
    assert main(["--op", "no_such_op"]) == 2
    assert "no case of no_such_op" in capsys.readouterr().err
    assert main(["--suite", "paper", "--device", "cpu"]) == 2
    (tmp_path / "other.json").write_text("[]")
    assert main([*arguments, "--compare", str(tmp_path / "other.json")]) == 2


def test_every_suite_names_each_case_once_and_covers_the_ops():
    for suite in SUITES:
        names = [(case.op, case.name, case.dtype) for case in cases(suite)]
        assert len(names) == len(set(names))
    ops = {case.op for case in cases("paper")}
    assert {
        "attention", "varlen_attention", "block_sparse_attention", "few_query_attention", "window_attention",
        "tiny_attention", "ring_attention_step", "ln_modulate", "gate_residual", "gate_residual_ln_modulate",
        "cosine_exit", "codebook_argmin", "gather_rows", "grid_pool",
    } <= ops  # fmt: skip
    assert ops == {case.op for case in cases("smoke")}
    with pytest.raises(ValueError, match="suite is 'quick'"):
        cases("quick")


def test_the_floor_is_the_longest_of_product_memory_and_exponentials():
    ceilings = Ceilings({"bfloat16": 100.0}, 1.0, 3.0, 1e12)
    floor = lambda **o: ceilings.floor_us(**{"flops": 0, "moved": 0, "exps": 0, "dtype": torch.bfloat16, **o})  # noqa: E731
    assert floor(flops=1e10) == pytest.approx(100)
    assert floor(moved=2e8) == pytest.approx(200)
    assert floor(exps=3e8) == pytest.approx(300)
    assert floor(moved=1) == 3.0


def test_tuning_tries_at_most_twelve_and_keeps_the_fastest_that_runs_and_agrees():
    default = Config(128, 128, 8, 3)
    tried = candidates("codebook_argmin", default)
    assert tried[0] == default
    assert len(tried) == len(set(tried)) == MOST
    broken, fast_but_wrong, best = tried[1], tried[2], tried[3]

    def attempt(config):
        if config == broken:
            raise RuntimeError("out of resource: shared memory")
        return torch.zeros(3) if config == fast_but_wrong else torch.ones(3)

    times = dict.fromkeys(tried, 10.0) | {fast_but_wrong: 1.0, best: 2.0, broken: 0.5}
    assert search(tried, attempt, lambda usable: {c: times[c] for c in usable}) == (best, 2.0)
    assert all(c.block_m == 128 and c.block_n == 64 for c in candidates("block_sparse_forward", Config(128, 64, 8, 3)))


def test_tuning_without_a_gpu_and_of_an_op_without_a_table_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="tunable are"):
        tune("gather_rows")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device"):
        tune("codebook_argmin")


def test_the_users_table_is_read_over_the_shipped_one(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    table._table.cache_clear()
    default, tuned = (
        Config(128, 128, 8, 3),
        {"block_m": 64, "block_n": 32, "num_warps": 4, "num_stages": 2, "time_us": 9.0},
    )
    path = table.user_table()
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"configs": {table.key("codebook_argmin", 256, torch.bfloat16): tuned}}))
    try:
        pick = lambda dim: table.pick_config("codebook_argmin", default, head_dim=dim, dtype=torch.bfloat16)  # noqa: E731
        assert pick(200) == Config(64, 32, 4, 2)
        assert pick(64) == default
        with table.forced("codebook_argmin", Config(1, 16, 1, 1)):
            assert pick(200) == Config(1, 16, 1, 1)
    finally:
        table._table.cache_clear()


def test_no_case_is_measured_on_zeros():
    generator = torch.Generator().manual_seed(0)
    for case in bench_cases.cases("smoke"):
        inputs = case.make(torch.device("cpu"), case.dtype, generator)
        floats = [t for t in inputs.tensors() if t.is_floating_point()]
        assert floats
        assert all(t.float().std() > 0.1 for t in floats)


def test_the_command_line_offers_the_same_run(small_device, tmp_path):
    from typer.testing import CliRunner

    from sparing.cli import app

    arguments = ["bench", "kernels", "--op", "gather_rows", "--device", "cpu", "--json", str(tmp_path / "out.json")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("CPU")
    assert json.loads((tmp_path / "out.json").read_text())["rows"]
    assert CliRunner().invoke(app, ["bench", "kernels", "--suite", "quick"]).exit_code == 2


def test_explain_answers_for_every_benchmarked_op():
    from sparing import kernels

    generator = torch.Generator().manual_seed(0)
    for case in cases("smoke"):
        inputs = case.make(torch.device("cpu"), case.dtype, generator)
        table_of = kernels.explain(case.op, *inputs.args, **inputs.kwargs)
        assert table_of.chosen in ("sdpa", "reference")
        assert all(row.reasons for row in table_of.rows if not row.supported)
