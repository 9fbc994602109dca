"""Adapting while pruning: the density is reached, the fused file is what was measured, a stopped run ends the same."""

import json
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from recipes.pruning_task import DATA, FIT, TWO_STAGES, convolutions, linear, run
from torch import nn

from sparing.recipes import adapt_pruned as recipe
from sparing.recipes.adapt_pruned import adapt_pruned, load_pruned
from sparing.recipes.train_vision import accuracy, save_model
from sparing.training import MemoryBatches, TensorImages, load_checkpoint
from sparing.vision.micro import vit_micro_patch4_28


@pytest.mark.parametrize(
    ("method", "build"),
    [
        ("splora", convolutions),
        ("sppara", convolutions),
        ("fine", convolutions),
        ("splopa", linear),
        ("fine_blocks", linear),
    ],
)
def test_every_method_ends_in_a_plain_smaller_network_that_loads(tmp_path, method, build):
    settings = replace(TWO_STAGES, method=method, block_size=4, num_prototypes=3)
    metrics = run(tmp_path, settings, build)
    assert metrics["density"] <= 0.4
    assert metrics["test_accuracy"] >= 0.9
    assert [round(stage["density"], 2) <= want for stage, want in zip(metrics["stages"], (0.64, 0.4), strict=True)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "metrics.json", "model.safetensors"]
    loaded = load_pruned(tmp_path, network=build())
    assert {type(module) for module in loaded.modules()} == {type(module) for module in build().modules()}
    assert accuracy(loaded, DATA[1]) == metrics["test_accuracy"]
    weights = [
        m.weight for name, m in loaded.named_modules() if hasattr(m, "weight") and m.weight.ndim > 1 and name != "head"
    ]
    left = sum(int((w != 0).sum()) if "b" in method[3:] or method == "splopa" else w.numel() for w in weights)
    assert left == metrics["weights"]
    if build is convolutions:
        assert loaded.head.in_features == 16 * loaded.two[0].out_channels < 128


def test_adapters_learn_less_than_fine_pruning_and_leave_the_source_weights(tmp_path):
    host = convolutions()
    splora = run(tmp_path / "splora", replace(TWO_STAGES, rank=1))
    fine = run(tmp_path / "fine", replace(TWO_STAGES, method="fine"))
    assert splora["learned_parameters"] < fine["learned_parameters"]
    off_centre = load_pruned(tmp_path / "splora", network=convolutions()).one[0].weight[:, 0, 0, 0]
    assert set(off_centre.tolist()) <= set(host.one[0].weight[:, 0, 0, 0].tolist())


@pytest.mark.parametrize(
    ("method", "build", "criterion"), [("splora", convolutions, "taylor"), ("splopa", linear, "gradient")]
)
@pytest.mark.parametrize("stopped_at", [3, 13])  # in the second stage's middle it has its kept channels from a file
def test_a_stopped_run_ends_with_the_same_file(tmp_path, method, build, criterion, stopped_at):
    settings = replace(
        TWO_STAGES, method=method, criterion=criterion, block_size=4, num_prototypes=3, criterion_batches=2
    )
    count = 0

    def stop(step):
        nonlocal count
        count += 1
        if count == stopped_at:
            raise KeyboardInterrupt

    run(tmp_path / "straight", settings, build)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", settings, build, on_step=stop)
    stage = tmp_path / "stopped" / f"stage_{int(stopped_at > 5)}"
    assert load_checkpoint(stage / "checkpoint.pt")["step"] > 0
    run(tmp_path / "stopped", settings, build)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("straight", "stopped"))
    assert one == two


def test_a_folder_of_another_run_is_refused(tmp_path):
    def stop(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, TWO_STAGES, on_step=stop)
    with pytest.raises(ValueError, match=r"holds another run \(density: 0.4 before, 0.3 now\)"):
        run(tmp_path, replace(TWO_STAGES, density=0.3))


@pytest.mark.parametrize(
    ("changes", "build", "words"),
    [
        ({"density": 0.001}, convolutions, r"weights cannot be reached by dropping channels: with 1 channel\(s\)"),
        ({"method": "splopa", "density": 0.001, "block_size": 4}, linear, "lie outside blocks"),
        ({"method": "lora"}, convolutions, "splora, sppara, splopa, fine, fine_blocks, got 'lora'"),
        ({"method": "splopa"}, convolutions, "takes an adapter of method 'splopa'"),
        ({"stages": 0}, convolutions, "stages must be at least 1, got 0"),
        ({"stage_epochs": 0}, convolutions, "stage_epochs must be at least 1, got 0"),
        ({"criterion": "luck"}, convolutions, "got 'luck'"),
        ({"scope": "all"}, convolutions, "'global' or 'group', got 'all'"),
        ({"schedule": "sudden"}, convolutions, "got 'sudden'"),
        ({"least": 0}, convolutions, "least must be at least 1, got 0"),
        ({"warm_epochs": -1}, convolutions, "warm_epochs must be at least 0, got -1"),
        ({"label_smoothing": 1.5}, convolutions, r"label_smoothing must lie in \[0, 1\], got 1.5"),
        ({"method": "splopa", "criterion": "relevance", "block_size": 4}, linear, "ranks channels, not blocks"),
        ({"rank": 0}, convolutions, "rank must be at least 1"),
        ({"warm_epochs": 1, "density": 0.001}, convolutions, "weights cannot be reached"),
        ({}, lambda: nn.Sequential(nn.Flatten(), nn.Linear(144, 2)), "head 'head' is no module of this Sequential"),
    ],
)
def test_bad_settings_are_named_before_anything_is_written(tmp_path, changes, build, words):
    with pytest.raises(ValueError, match=words):
        run(tmp_path / "run", replace(TWO_STAGES, **changes), build)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"precision": "fp8"}, "got 'fp8'"),
        ({"batch_size": 64}, "40 samples on 1 processes make no step of 1 x 64"),
        ({"optimizer": "sgd"}, "'adamw' or 'muon', got 'sgd'"),
        ({"optimizer": "muon"}, "muon found no weight matrices"),
    ],
)
def test_bad_settings_of_the_training_are_named_before_anything_is_written(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        run(tmp_path / "run", TWO_STAGES, fit_settings=replace(FIT, **changes))
    assert not (tmp_path / "run").exists()


def test_a_sharded_launch_is_refused_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda _: DistributedType.FSDP))
    with pytest.raises(ValueError, match=r"FSDP is not supported.*data parallel"):
        run(tmp_path / "run", TWO_STAGES)
    assert not (tmp_path / "run").exists()


class Emptied:
    """The batches of another source, said to be fewer or of fewer classes."""

    def __init__(self, source, count, num_classes):
        self.source, self.count, self.num_classes = source, count, num_classes

    def __len__(self):
        return self.count

    def batches(self, order, **options):
        return self.source.batches(order, **options)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ((Emptied(DATA[0], 0, 2), DATA[1]), r"(make no step|got 0 and 20)"),
        ((Emptied(DATA[0], 1, 2), DATA[1]), r"(make no step|got 1 and 20)"),
        ((DATA[0], Emptied(DATA[1], 0, 2)), "a test sample are needed, got 40 and 0"),
        ((Emptied(DATA[0], 40, 1), DATA[1]), "two classes at least, got 1"),
        ((Emptied(DATA[0], 40, 0), DATA[1]), "two classes at least, got 0"),
        ((Emptied(DATA[0], 40, 3), DATA[1]), r"have 3 classes, this Sequential returns \(2, 2\) for two samples"),
    ],
)
def test_data_that_cannot_be_learned_are_named_before_anything_is_written(tmp_path, data, words):
    with pytest.raises(ValueError, match=words):
        run(tmp_path / "run", TWO_STAGES, data=data)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="hold no images"):
        MemoryBatches(TensorImages(torch.zeros(0, 1, 4, 4).byte(), torch.zeros(0).long()), mean=[0.5], std=[0.5])


def test_a_head_may_be_a_module_that_holds_layers(tmp_path):
    def build():
        net = convolutions()
        net.head = nn.Sequential(nn.Linear(128, 6), nn.ReLU(), nn.Linear(6, 2))
        return net

    metrics = run(tmp_path, TWO_STAGES, build)
    net = load_pruned(tmp_path, network=build())
    assert (net.head[0].out_features, net.head[2].in_features) == (6, 6)
    assert net.head[0].in_features == 16 * net.two[0].out_channels < 128
    assert metrics["dense_weights"] == 8 * 9 + 64 * 9
    assert metrics["weights"] == net.one[0].weight.numel() + net.two[0].weight.numel() <= 0.4 * 648
    assert metrics["learned_of_head"] == sum(p.numel() for p in net.head.parameters())


@pytest.mark.parametrize("share", ["module", "weight"])
def test_shared_modules_and_weights_are_saved_and_loaded_right(tmp_path, share):
    def build():
        net = convolutions()
        net.three = nn.Conv2d(8, 8, 3, padding=1)
        net.four = net.three
        if share == "weight":
            net.four = nn.Conv2d(8, 8, 3, padding=1)
            net.four.weight = net.three.weight
        order = [net.one, net.two[:3], net.three, nn.ReLU(), net.four, nn.ReLU(), nn.Flatten()]
        whole = nn.Sequential(*order)
        whole.head = net.head
        return whole

    settings = replace(TWO_STAGES, method="fine" if share == "weight" else "splora", density=0.7, stages=1)
    metrics = run(tmp_path, settings, build)
    loaded = load_pruned(tmp_path, network=build())
    assert (loaded[2] is loaded[4]) is (share == "module")
    assert torch.equal(loaded[2].weight, loaded[4].weight)
    assert accuracy(loaded, DATA[1]) == metrics["test_accuracy"]
    assert loaded[0][0].out_channels < 8


def test_a_network_without_prunable_channels_is_named(tmp_path):
    net = nn.Sequential(nn.Flatten(), nn.LayerNorm(144))
    net.head = nn.Linear(144, 2)
    with pytest.raises(ValueError, match="no channels of this Sequential can be pruned"):
        adapt_pruned(net, DATA, out=tmp_path, fit_settings=FIT, head="head")
    with pytest.raises(ValueError, match="names no classifier in its pretrained_cfg: pass head=NAME"):
        adapt_pruned(net, DATA, out=tmp_path, fit_settings=FIT)


def test_files_that_are_no_pruned_network_are_named(tmp_path, idx_folder):
    with pytest.raises(ValueError, match="holds no pruned network"):
        load_pruned(tmp_path)
    save_model(vit_micro_patch4_28(embed_dim=12, depth=1), tmp_path)
    with pytest.raises(ValueError, match=r"config\.json names no pruned_host"):
        load_pruned(tmp_path)
    run(tmp_path / "run", replace(TWO_STAGES, stages=1))
    with pytest.raises(ValueError, match="pass network=, built as the source was"):
        load_pruned(tmp_path / "run")
    with pytest.raises(ValueError, match=r"has one\.0\.\w+, which this Sequential does not have|lacks body"):
        load_pruned(tmp_path / "run", network=linear())


def test_the_command_adapts_a_shipped_network_and_says_what_is_wrong(tmp_path, idx_folder, capsys):
    base = ["--model", "vit_micro_patch4_28.demo_fashion", "--data", str(idx_folder), "--out", str(tmp_path / "run")]
    base += ["--pretrained", "--method", "splopa", "--stages", "1", "--epochs", "1", "--batch_size", "16"]
    assert recipe.main([*base, "--density", "0.5"]) == 0
    assert "of the weights" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    loaded = load_pruned(tmp_path / "run")
    assert loaded.num_classes == 2
    assert accuracy(loaded, recipe.image_batches(loaded, str(idx_folder), split="test")) == metrics["test_accuracy"]
    assert recipe.main([*base, "--density", "1.5"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "in (0, 1], got 1.5" in error
