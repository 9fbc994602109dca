"""Recipes under two processes (gloo): one report, weights like those of one process, sharding refused by name."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusion.conftest import build_host
from safetensors.torch import load_file, save_file
from torch import nn

from sparing.training import FitSettings, MemoryBatches, TensorImages, fit

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}


def both(command, out):
    """(printed by two processes, printed by one with twice the batch)."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    printed = []
    for start, name, batch in ((launch, "two", "4"), ([sys.executable, "-m"], "one", "8")):
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


def test_sharded_training_is_refused_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda _: DistributedType.FSDP))
    data = MemoryBatches(
        TensorImages(torch.zeros(8, 1, 2, 2, dtype=torch.uint8), torch.zeros(8).long()), mean=[0], std=[1]
    )
    with pytest.raises(ValueError, match=r"FSDP is not supported.*data parallel"):
        fit(nn.Linear(4, 1), lambda *_: torch.zeros(()), data, settings=FitSettings(batch_size=2), out=tmp_path)
