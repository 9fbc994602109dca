"""Training learns, resumes exactly, writes what can be loaded, and says what does not fit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import sparing
from sparing.recipes import train_vision
from sparing.recipes.train_vision import TrainSettings, train
from sparing.training import FitSettings, ImageSettings, load_checkpoint
from sparing.zoo.weights import read_state

STILL = ImageSettings(max_shift=1, flip=True)


def test_a_vit_learns_and_its_saved_weights_give_the_stated_accuracy(tmp_path, idx_folder, tiny_vit):
    settings = FitSettings(epochs=6, batch_size=8, lr=3e-3, optimizer="muon")
    metrics = train(tiny_vit(), str(idx_folder), out=tmp_path / "run", fit_settings=settings, image_settings=STILL)
    assert metrics["test_accuracy"] >= 0.9
    assert [row["epoch"] for row in metrics["history"]] == [1, 2, 3, 4, 5, 6]
    stored = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert stored["test_accuracy"] == metrics["test_accuracy"]
    again = tiny_vit()
    again.load_state_dict(read_state(tmp_path / "run"))
    testing = train_vision.image_batches(again, str(idx_folder), split="test")
    assert train_vision.accuracy(again, testing) == metrics["test_accuracy"]
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_finished_run_is_not_trained_again_nor_overwritten_by_another(tmp_path, idx_folder, tiny_vit, capsys):
    def run(epochs=1, scale=1.0, **options):
        model = tiny_vit()
        with torch.no_grad():
            model.head.weight.mul_(scale)
        settings = FitSettings(epochs=epochs, batch_size=8)
        return train(model, str(idx_folder), out=tmp_path, fit_settings=settings, **options)

    first = run()
    weights, steps = (tmp_path / "model.safetensors").read_bytes(), []
    assert run(on_step=steps.append) == json.loads(json.dumps(first))
    assert steps == []
    assert "nothing was trained" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"result of another run .epochs: 1 before, 2 now"):
        run(epochs=2)
    with pytest.raises(ValueError, match=r"result of another run .start: "):
        run(scale=2.0)
    assert (tmp_path / "model.safetensors").read_bytes() == weights


def test_a_twin_is_fine_tuned_and_comes_back_by_load(tmp_path, idx_folder, tiny_vit):
    twin = sparing.twin(tiny_vit(), "stvit", num_tokens=4, base_depth=1)
    settings = FitSettings(epochs=1, batch_size=8)
    train(twin, str(idx_folder), out=tmp_path, fit_settings=settings, fresh={"global_centers"})
    loaded = sparing.load(tmp_path)
    assert loaded.status == "trained"
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in twin.state_dict().items())


@pytest.mark.parametrize("extras", [{}, {"mixup": 0.4, "cutmix": 0.5}])
def test_a_stopped_run_ends_with_the_same_file(tmp_path, idx_folder, tiny_vit, extras):
    def run(folder, on_step=None):
        settings = FitSettings(epochs=2, batch_size=8, ema_decay=0.9, checkpoint_every=4)
        model = tiny_vit(drop_path_rate=0.2)
        train(
            model,
            str(idx_folder),
            out=tmp_path / folder,
            fit_settings=settings,
            settings=TrainSettings(**extras),
            on_step=on_step,
        )
        return (tmp_path / folder / "model.safetensors").read_bytes()

    def stop(step):
        if step == 7:
            raise KeyboardInterrupt

    straight = run("straight")
    with pytest.raises(KeyboardInterrupt):
        run("stopped", on_step=stop)
    assert load_checkpoint(tmp_path / "stopped" / "checkpoint.pt")["step"] == 6
    assert run("stopped") == straight


def test_too_many_classes_and_other_image_sizes_are_named(tmp_path, idx_folder, tiny_vit):
    with pytest.raises(ValueError, match=r"has 2 classes, the model has 1: create it with num_classes=2"):
        train(tiny_vit(num_classes=1), str(idx_folder), out=tmp_path)
    with pytest.raises(ValueError, match=r"images of 28 x 28, the model takes 32 x 32"):
        train(tiny_vit(img_size=32), str(idx_folder), out=tmp_path)
    with pytest.raises(ValueError, match="has no pretrained_cfg"):
        train(torch.nn.Linear(2, 2), str(idx_folder), out=tmp_path)


def test_the_command_reports_errors_in_one_line(tmp_path, capsys):
    code = train_vision.main(["--model", "vit_micro_patch4_29", "--data", "nowhere", "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert code == 2
    assert "closest: vit_micro_patch4_28" in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_a_killed_process_goes_on_where_it_was(tmp_path, idx_folder):
    def command(out: Path, epochs: int = 3) -> list[str]:
        return [
            *(sys.executable, "-m", "sparing.recipes.train_vision", "--model", "vit_micro_patch4_28.demo_fashion"),
            *("--data", str(idx_folder), "--out", str(out), "--epochs", str(epochs)),
            *("--batch_size", "4", "--checkpoint_every", "3"),
        ]

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command(tmp_path / "straight"), check=True, env=environment, capture_output=True)
    process = subprocess.Popen(command(tmp_path / "killed"), env=environment, stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.exists()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    finished = subprocess.run(command(tmp_path / "killed"), check=True, env=environment, capture_output=True, text=True)
    assert finished.stderr.count("epoch") == 0  # no progress bar off a terminal
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("straight", "killed"))
    assert one == two


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(tmp_path, idx_folder):
    def command(out: Path, batch_size: int) -> list[str]:
        return [
            *("sparing.recipes.train_vision", "--model", "vit_micro_patch4_28.demo_fashion"),
            *("--data", str(idx_folder), "--out", str(out), "--epochs", "2", "--batch_size", str(batch_size)),
        ]

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    two = [*launch, *command(tmp_path / "two", 4)]
    printed = subprocess.run(two, check=True, env=environment, capture_output=True, text=True).stdout
    assert printed.count("test accuracy") == 1
    subprocess.run(
        [sys.executable, "-m", *command(tmp_path / "one", 8)], check=True, env=environment, capture_output=True
    )
    one, both = (read_state(tmp_path / name) for name in ("one", "two"))
    for name, value in one.items():
        # gradients are summed in another order, and twelve steps of Adam at 1e-3 turn on their signs
        torch.testing.assert_close(both[name], value, atol=2e-3, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    accuracies = [
        json.loads((tmp_path / name / "metrics.json").read_text())["test_accuracy"] for name in ("one", "two")
    ]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.1)
