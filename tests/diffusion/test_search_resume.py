"""The log of a search: killed anywhere it goes on to the same end, alone and in several processes."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_pipelines
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from sparing.diffusion.search import NoiseSearch
from sparing.diffusion.search.algorithms import SMC, Evolutionary, Halving, Paths, Random, ZeroOrder
from sparing.diffusion.search.drafts import fewer_steps
from sparing.diffusion.search.identity import models_of
from sparing.diffusion.search.verifiers import Brightness, DenoisingError, SelfConsistency
from sparing.jobs import AppendLog, LogInUse, LogMismatch

STEPS = 6
SEARCHES = {
    "zero_order": (ZeroOrder(3, 4), DDIMScheduler),
    "paths": (Paths(2, 2, start=3, ladder=[(1, 4), (2, 6)]), DDIMScheduler),
    "halving": (Halving(6, stops=(2, 4, 6), keeps=(3, 2, 1)), DPMSolverMultistepScheduler),
    "smc": (SMC(4, checks=(2, 4, 6), lam=20.0, ess_threshold=0.9), DDPMScheduler),
    "evolutionary": (Evolutionary(4, children=3, jump=1, starts=(0, 0.5), elites=2), DDIMScheduler),
    "self_supervised": (Random(5), DDPMScheduler),
}


def level(samples, prompts):
    return samples.flatten(1).mean(1)


def verifier_of(name):
    if name != "self_supervised":
        return level
    return SelfConsistency(lambda images: images.flatten(1) - 0.4) + DenoisingError((0.4, 0.6))


def run(name, out_dir, *, steps=STEPS, batch_size=2, seed=0, **options):
    algorithm, scheduler = SEARCHES[name]
    pipe, kwargs = tiny_pipelines.build("dit")
    pipe.scheduler = scheduler()
    spent = []
    pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: spent.append(1), with_kwargs=True)
    search = NoiseSearch(
        pipe, verifier_of(name), algorithm, out_dir=out_dir, batch_size=batch_size, seed=seed, **options
    )
    return search(**kwargs, num_inference_steps=steps), len(spent)


def records(folder):
    lines = [json.loads(line) for line in (Path(folder) / "candidates.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds", None)
    return lines


@pytest.mark.parametrize("name", SEARCHES)
def test_killed_after_any_line_it_goes_on_to_the_same_end(name, tmp_path):
    whole, calls = run(name, tmp_path / "whole")
    log = (tmp_path / "whole" / "candidates.jsonl").read_text().splitlines(keepends=True)
    assert len(log) == 1 + len(whole.candidates)
    for lines in range(1, len(log) + 1):
        folder = tmp_path / f"after_{lines}"
        shutil.copytree(tmp_path / "whole", folder)
        torn = log[lines][:40] if lines < len(log) else ""
        (folder / "candidates.jsonl").write_text("".join(log[:lines]) + torn)
        again, calls_again = run(name, folder)
        assert again.best.id == whole.best.id
        assert again.best.score == whole.best.score
        assert torch.equal(again.best.sample, whole.best.sample)
        assert again.nfe == whole.nfe
        assert records(folder) == records(tmp_path / "whole")
        assert calls_again <= calls
        if lines == len(log):
            assert calls_again == 0


def test_nothing_known_is_run_twice_beyond_the_batch_in_flight(tmp_path):
    run("zero_order", tmp_path / "whole", batch_size=1)
    log = (tmp_path / "whole" / "candidates.jsonl").read_text().splitlines(keepends=True)
    for lines in (1, 4, 9, len(log)):
        folder = tmp_path / f"after_{lines}"
        folder.mkdir()
        (folder / "candidates.jsonl").write_text("".join(log[:lines]))
        result, calls = run("zero_order", folder, batch_size=1, keep="all" if lines == 1 else "best")
        left = len(log) - lines
        again = result.best.id < lines - 1  # its sample was not in this folder: the winner is run once more
        assert calls == STEPS * (left + again)


def test_a_log_of_another_search_names_what_differs(tmp_path):
    run("zero_order", tmp_path)
    before = (tmp_path / "candidates.jsonl").read_bytes()
    with pytest.raises(LogMismatch, match="num_inference_steps was 6 and is now 7"):
        run("zero_order", tmp_path, steps=7)
    with pytest.raises(LogMismatch, match="seed was 0 and is now 1"):
        run("zero_order", tmp_path, seed=1)
    with pytest.raises(LogMismatch, match=r"algorithm.name was 'zero_order' and is now 'paths'"):
        run("paths", tmp_path)
    assert (tmp_path / "candidates.jsonl").read_bytes() == before
    assert run("zero_order", tmp_path, batch_size=3)[0].best.score > 0  # other batches are the same search


def test_a_search_that_failed_or_runs_elsewhere_leaves_the_folder_usable(tmp_path):
    pipe, kwargs = tiny_pipelines.build("flux")
    search = NoiseSearch(pipe, level, Random(2), out_dir=tmp_path)
    for _ in range(2):  # the second says the same: the first kept nothing open
        with pytest.raises(ValueError, match="latents must be"):
            search(**kwargs, num_inference_steps=2, latents=torch.zeros(1, 2))
    search(**kwargs, num_inference_steps=2)
    header = json.loads((tmp_path / "candidates.jsonl").read_text().splitlines()[0])
    with AppendLog(tmp_path / "candidates.jsonl", header), pytest.raises(LogInUse, match="another process"):
        search(**kwargs, num_inference_steps=2)
    assert len(records(tmp_path)) == 3


def test_other_weights_or_settings_are_another_search(tmp_path):
    def begin(folder, verifier, change=None, draft=None, algorithm=None):
        pipe, kwargs = tiny_pipelines.build("dit")
        if change is not None:
            change(pipe)
        search = NoiseSearch(pipe, verifier, algorithm or Random(2), out_dir=tmp_path / folder, draft=draft)
        return search(**kwargs, num_inference_steps=STEPS)

    def nudge(pipe):
        with torch.no_grad():
            for parameter in pipe.transformer.parameters():
                parameter.mul_(1.001)

    begin("a", Brightness(0.1))
    begin("a", Brightness(0.1))
    with pytest.raises(LogMismatch, match=r"verifiers\.brightness\.target was 0\.1 and is now 0\.9"):
        begin("a", Brightness(0.9))
    with pytest.raises(LogMismatch, match=r"models\.transformer was"):
        begin("a", Brightness(0.1), nudge)
    with pytest.raises(LogMismatch, match=r"verifier was 'brightness' and is now '2\*brightness'"):
        begin("a", 2 * Brightness(0.1))

    begin("b", DenoisingError(0.4))
    with pytest.raises(LogMismatch, match="levels"):
        begin("b", DenoisingError((0.4, 0.6)))

    def one(samples, prompts):
        return samples.flatten(1).mean(1)

    def two(samples, prompts):
        return samples.flatten(1).std(1)

    two.__name__, two.__qualname__ = one.__name__, one.__qualname__
    begin("c", one)
    with pytest.raises(LogMismatch, match=r"verifiers\.one\.function\.code"):
        begin("c", two)

    with_draft = {"algorithm": Random(3, keep=1)}
    begin("d", level, draft=fewer_steps(2), **with_draft)
    begin("d", level, draft=fewer_steps(2), **with_draft)
    with pytest.raises(LogMismatch, match=r"draft\.call\.num_inference_steps was 2 and is now 3"):
        begin("d", level, draft=fewer_steps(3), **with_draft)


def test_a_compiled_network_is_the_same_and_packed_weights_are_known_by_name():
    pipe, kwargs = tiny_pipelines.build("dit")
    known = models_of(pipe)
    pipe(**kwargs, num_inference_steps=1)
    inner = pipe.transformer
    vars(pipe)["transformer"] = torch.compile(inner, backend="eager")
    assert models_of(pipe) == known
    vars(pipe)["transformer"] = inner

    class Packed(torch.nn.Parameter):
        """As a quantiser's: it does not say its values."""

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is torch.Tensor.flatten:
                raise NotImplementedError("packed")
            return super().__torch_function__(function, types, args, kwargs or {})

    layer = inner.transformer_blocks[0].ff.net[2]
    layer.weight = Packed(layer.weight.data, requires_grad=False)
    assert models_of(pipe).keys() == known.keys()


def test_an_edited_log_is_not_believed(tmp_path):
    run("zero_order", tmp_path)
    path = tmp_path / "candidates.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], lines[3].replace('"index":', '"index":1'), *lines[4:]]))
    with pytest.raises(ValueError, match="what this search does not propose"):
        run("zero_order", tmp_path)
    path.write_text("".join([*lines[:2], "no json\n", *lines[2:]]))
    with pytest.raises(ValueError, match=r"line 3 of .* is not a JSON object"):
        run("zero_order", tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda _: {"a": 1}, "it has no id, prompt"),
        (lambda record: {**record, "score": "abc"}, "score cannot be 'abc'"),
        (lambda record: {**record, "scores": {"level": None}}, "scores cannot be {'level': None}"),
        (lambda record: {**record, "scores": {"other": 1.0}}, "it has scores of other, and this search asks level"),
        (lambda record: {**record, "recipe": {"op": "gaussian"}}, "recipe cannot be {'op': 'gaussian'}"),
        (lambda record: {**record, "id": [1]}, r"id cannot be \[1\]"),
    ],
)
def test_a_line_that_is_no_candidate_is_named(tmp_path, change, words):
    run("zero_order", tmp_path, budget="3candidates")
    path = tmp_path / "candidates.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], json.dumps(change(json.loads(lines[1]))), *lines[2:]]) + "\n")
    with pytest.raises(ValueError, match=rf"line 2 of .*candidates\.jsonl is no candidate of this search: {words}"):
        run("zero_order", tmp_path)


@pytest.mark.parametrize("kept", [0, 100])
def test_a_damaged_sample_is_made_again_and_a_damaged_state_is_named(tmp_path, kept):
    whole, _ = run("halving", tmp_path / "whole")
    for file in (tmp_path / "whole" / "samples").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:kept])
    again, calls = run("halving", tmp_path / "whole")
    torch.testing.assert_close(again.best.sample, whole.best.sample, atol=1e-5, rtol=0)  # alone, not in its batch
    assert calls > 0
    run("halving", tmp_path / "part", budget="13nfe")
    state = next((tmp_path / "part" / "states").iterdir())
    state.write_bytes(state.read_bytes()[:kept])
    for _ in range(2):  # the second says the same: the first kept nothing open
        with pytest.raises(ValueError, match=rf"{state.name} is damaged .* begin it anew in another folder"):
            run("halving", tmp_path / "part")


def test_logs_of_further_processes_are_of_the_same_search_or_refused(tmp_path):
    run("zero_order", tmp_path)
    (tmp_path / "candidates.jsonl").rename(tmp_path / "candidates.rank1.jsonl")
    _, calls = run("zero_order", tmp_path)
    assert calls == 0
    (tmp_path / "candidates.jsonl").unlink()
    with pytest.raises(
        LogMismatch, match=r"candidates\.rank1\.jsonl is the log of another job; .*seed was 0 and is now"
    ):
        run("zero_order", tmp_path, seed=1)


def test_a_full_disk_leaves_a_log_that_goes_on(tmp_path, monkeypatch):
    whole, _ = run("zero_order", tmp_path / "whole")
    real, writes = os.pwrite, []

    def fills_up(file, data, offset):
        writes.append(1)
        if len(writes) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, data, offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", fills_up)
        with pytest.raises(OSError, match="the disk is full"):
            run("zero_order", tmp_path / "full")
    assert len(records(tmp_path / "full")) == 1 + 5  # the pivot, then batches of two
    again, _ = run("zero_order", tmp_path / "full")
    assert again.best.score == whole.best.score
    assert records(tmp_path / "full") == records(tmp_path / "whole")


def _one_of_two(rank, folder, name):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=os.environ["SEARCH_TEST_PORT"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    result, _ = run(name, Path(folder) / "two", batch_size=1)
    torch.save({"best": result.best.id, "score": result.best.score, "nfe": result.nfe}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["zero_order", "smc", "self_supervised"])
def test_two_processes_find_what_one_finds(name, tmp_path, monkeypatch):
    monkeypatch.setenv("SEARCH_TEST_PORT", str(20000 + os.getpid() % 20000 + len(name)))
    one, _ = run(name, tmp_path / "one", batch_size=1)
    mp.spawn(_one_of_two, (str(tmp_path), name), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found == {"best": one.best.id, "score": one.best.score, "nfe": one.nfe}
    assert (tmp_path / "two" / "candidates.rank1.jsonl").exists()

    def without_samples(folder):
        return [{k: v for k, v in line.items() if k not in ("kept", "file")} for line in records(folder)]

    assert without_samples(tmp_path / "two") == without_samples(tmp_path / "one")


_KILLED = """
import sys
sys.path.insert(0, {tests!r})
import test_search_resume as here
import tiny_pipelines, time
real = tiny_pipelines.build
def slow(name):
    pipe, kwargs = real(name)
    pipe.transformer.register_forward_pre_hook(lambda *_: time.sleep(0.01))
    return pipe, kwargs
tiny_pipelines.build = slow
print("ready", flush=True)
here.run("paths", {folder!r})
"""


@pytest.mark.slow
def test_kill_9_at_twenty_moments_changes_nothing(tmp_path):
    whole, _ = run("paths", tmp_path / "whole")
    tests = str(Path(__file__).parent)
    draws = torch.Generator().manual_seed(0)
    for moment in range(20):
        folder = tmp_path / f"killed_{moment}"
        script = _KILLED.format(tests=tests, folder=str(folder))
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.05 + 1.2 * float(torch.rand((), generator=draws)))
        process.send_signal(signal.SIGKILL)
        process.wait()
        again, _ = run("paths", folder)
        assert (again.best.id, again.best.score, again.nfe) == (whole.best.id, whole.best.score, whole.nfe)
        assert records(folder) == records(tmp_path / "whole")
