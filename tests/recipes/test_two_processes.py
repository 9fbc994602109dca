"""Recipes under two processes (gloo): one report, weights like those of one process, sharding refused by name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusion.conftest import build_host
from recipes.pruning_task import DATA, convolutions
from safetensors.torch import load_file, save_file
from torch import nn

from sparing.recipes.adapt_pruned import load_pruned
from sparing.recipes.train_vision import accuracy
from sparing.training import FitSettings, MemoryBatches, TensorImages, fit

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}


def both(command, out):
    """(printed by two processes, printed by one with twice the batch)."""
    printed = []
    for start, name, batch in ((LAUNCH, "two", "4"), ([sys.executable, "-m"], "one", "8")):
        done = subprocess.run(
            [*start, *command, "--out", str(out / name), "--batch_size", batch],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        printed.append(done.stdout)
    return printed


@pytest.mark.slow
def test_a_flexdit_is_fine_tuned_by_two_processes(tmp_path):
    build_host(num_layers=6, sample_size=8).save_pretrained(tmp_path / "host")
    generator = torch.Generator().manual_seed(0)
    latents = {"latents": torch.randn(32, 4, 8, 8, generator=generator), "labels": torch.arange(32) % 10}
    save_file(latents, tmp_path / "latents.safetensors")
    command = [
        *("sparing.recipes.finetune_flexdit", "--host", str(tmp_path / "host")),
        *("--data", str(tmp_path / "latents.safetensors"), "--split", "1,1,1,1,1,1,1"),
        *("--density_table", "[[0,3,3],[500,2,2]]", "--epochs", "2", "--lr", "1e-4", "--ema_decay", "0"),
    ]
    two, one = both(command, tmp_path)
    assert two.count("model in") == one.count("model in") == 1
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert [len(found["history"]) for found in metrics] == [2, 2]
    # other draws of noise a process, the same densities a step: the weights move alike in size, not in value
    host = load_file(tmp_path / "host" / "diffusion_pytorch_model.safetensors")
    trained = load_file(tmp_path / "two" / "diffusion_pytorch_model.safetensors")
    start = host["transformer_blocks.0.ff.net.2.weight"]
    moved = (trained["transformer_blocks.0.ff.net.2.weight"] - start).abs().max()
    assert 1e-5 < moved < 2e-3
    assert all(torch.isfinite(value).all() for value in trained.values())


@pytest.mark.slow
def test_a_clip_network_is_trained_by_two_processes(tmp_path):
    generator, lines = np.random.default_rng(0), ["path,label,split"]
    for index in range(20):
        time = np.arange(16000) / 8000
        wave = 0.3 * np.sin(2 * np.pi * (300, 2000)[index % 2] * time) + 0.01 * generator.standard_normal(16000)
        soundfile.write(tmp_path / f"{index}.wav", wave, 8000)
        lines.append(f"{index}.wav,{('low', 'high')[index % 2]},{'train' if index < 16 else 'test'}")
    (tmp_path / "manifest.csv").write_text("\n".join(lines) + "\n")
    command = [
        *("sparing.recipes.train_clip", "--model", "co_spotter_micro", "--data", str(tmp_path / "manifest.csv")),
        *("--epochs", "2", "--lr", "1e-4"),
    ]
    two, one = both(command, tmp_path)
    assert two.count("accuracy") == one.count("accuracy") == 1
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        if "running" not in name:  # batch statistics are those of each process: the normalised input differs a little
            torch.testing.assert_close(
                two[name], value, atol=1e-3, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.slow
def test_a_network_is_pruned_by_two_processes(tmp_path, idx_folder):
    command = [
        *("sparing.recipes.adapt_pruned", "--model", "vit_micro_patch4_28.demo_fashion", "--pretrained"),
        *("--data", str(idx_folder), "--method", "splopa", "--density", "0.5", "--stages", "1"),
        *("--epochs", "2", "--lr", "1e-4", "--block_size", "16"),
    ]
    two, one = both(command, tmp_path)
    assert two.count("test accuracy") == one.count("test accuracy") == 1
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert metrics[0]["weights"] == metrics[1]["weights"]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        assert torch.equal(two[name] == 0, value == 0), name  # blocks are chosen before the first step
        torch.testing.assert_close(two[name], value, atol=2e-3, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        *("config.json", "metrics.json", "model.safetensors")
    ]
    again = subprocess.run(
        [*LAUNCH, *command, "--out", str(tmp_path / "two"), "--batch_size", "4"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert again.stderr.count("nothing was trained") == 1, again.stderr[-3000:]


# batch norm: each process has statistics of its own, by which gradients, and so rankings, differ between them
PRUNING_WITH_NORMS = """
import sys
from dataclasses import replace
sys.path.insert(0, sys.argv[1])
from recipes.pruning_task import DATA, FIT, TWO_STAGES, convolutions, run

def stop(step):
    global steps
    steps += 1
    if steps == int(sys.argv[3]):
        raise KeyboardInterrupt

steps = 0
settings = replace(TWO_STAGES, criterion="gradient", criterion_batches=2, warm_epochs=1)
metrics = run(sys.argv[2], settings, fit_settings=replace(FIT, batch_size=4), on_step=stop)
print("returned", metrics["test_accuracy"], metrics["weights"])
"""


@pytest.mark.slow
def test_two_processes_drop_the_same_channels_and_go_on_where_they_stopped(tmp_path):
    (tmp_path / "script.py").write_text(PRUNING_WITH_NORMS)

    def launch(out, stop_at):
        paths = (str(tmp_path / "script.py"), str(Path(__file__).parents[1]), str(tmp_path / out), str(stop_at))
        return subprocess.run([*LAUNCH[:-1], *paths], env=ENVIRONMENT, capture_output=True, text=True)

    done = launch("straight", 0)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((tmp_path / "straight" / "metrics.json").read_text())
    assert done.stdout.count(f"returned {metrics['test_accuracy']} {metrics['weights']}\n") == 2
    loaded = load_pruned(tmp_path / "straight", network=convolutions())
    assert accuracy(loaded, DATA[1]) == metrics["test_accuracy"] >= 0.9
    assert launch("stopped", 13).returncode != 0  # in the second stage after the warm one
    assert (tmp_path / "stopped" / "stage_1" / "kept.pt").exists()
    assert not (tmp_path / "stopped" / "metrics.json").exists()
    assert launch("stopped", 0).returncode == 0
    again = load_pruned(tmp_path / "stopped", network=convolutions())
    assert [tuple(p.shape) for p in again.parameters()] == [tuple(p.shape) for p in loaded.parameters()]
    for name, value in loaded.state_dict().items():
        if "running" not in name:
            torch.testing.assert_close(again.state_dict()[name], value, atol=1e-3, rtol=0)


def test_sharded_training_is_refused_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda _: DistributedType.FSDP))
    data = MemoryBatches(
        TensorImages(torch.zeros(8, 1, 2, 2, dtype=torch.uint8), torch.zeros(8).long()), mean=[0], std=[1]
    )
    with pytest.raises(ValueError, match=r"FSDP is not supported.*data parallel"):
        fit(nn.Linear(4, 1), lambda *_: torch.zeros(()), data, settings=FitSettings(batch_size=2), out=tmp_path)
