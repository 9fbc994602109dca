"""The demo on the shipped weights: its numbers are those of the files, its picture shows something, its twins are
named."""

import json

import pytest
import torch
from PIL import Image

import sparing
from sparing.recipes.demo import HOST, TWIN, accuracy_of, equal_cost_rate, run_demo, sample_images
from sparing.recipes.demo_picture import pick_examples
from sparing.zoo.weights import SHIPPED


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out, said = tmp_path_factory.mktemp("demo"), []
    return run_demo(out, repeats=2, real_size=False, say=said.append), out, "\n".join(said)


def test_every_twin_stands_beside_its_host_with_status_accuracy_and_cost(demo):
    result, out, said = demo
    assert list(result["accuracy"]) == ["host ViT", "STViT", "ToMe r=7"]
    rows = {row["name"]: row for row in result["small"]["rows"]}
    assert [row["status"] for row in rows.values()] == ["host", "trained", "training-free"]
    for name, row in rows.items():
        line = next(line for line in said.splitlines() if line.startswith(name))
        assert row["status"] in line
        assert f"{result['accuracy'][name]:.1%}" in line
    assert rows["STViT"]["flops_ratio"] <= 0.5
    assert rows["ToMe r=7"]["flops_ratio"] == pytest.approx(rows["STViT"]["flops_ratio"], rel=0.05)
    assert json.loads((out / "demo.json").read_text())["accuracy"] == result["accuracy"]


def test_it_ends_with_the_training_free_command_and_then_distill(demo):
    last = [line.strip() for line in demo[2].splitlines() if line.strip().startswith("sparing ")]
    assert "--twin tome" in last[0]
    assert last[1].startswith("sparing distill ")
    assert len(last) == 2


def test_the_picture_is_an_image_with_colours(demo):
    with Image.open(demo[1] / "semantic_tokens.png") as image:
        pixels = torch.tensor(list(image.convert("RGB").resize((200, 100)).getdata())).float()
    assert (pixels.amax(1) - pixels.amin(1) > 60).float().mean() > 0.02


def test_shipped_files_are_small_half_precision_and_as_good_as_their_cards_say():
    images, labels = sample_images()
    assert images.shape == (400, 1, 28, 28)
    assert labels.bincount().tolist() == [40] * 10
    scores = {}
    for name in (HOST, TWIN):
        assert (SHIPPED / f"{name}.safetensors").stat().st_size < 2_000_000
        stated = sparing.model_card(name).measured["top1_fashion_mnist_test_percent"] / 100
        scores[name] = stated
        # 400 of the 10,000 images: three standard errors are 4.3 points
        assert accuracy_of(sparing.create_model(name, pretrained=True), images, labels) == pytest.approx(
            stated, abs=0.043
        )
    assert scores[HOST] >= 0.89
    assert scores[HOST] - scores[TWIN] <= 0.007


def test_the_rate_of_token_merging_is_the_nearest_in_cost():
    host = sparing.create_model(HOST)
    macs = {rate: sparing.profile(sparing.twin(host, "tome", r=rate), measure=False).macs for rate in (4, 5, 6)}
    for rate, cost in macs.items():
        assert equal_cost_rate(host, cost) == rate
    assert equal_cost_rate(host, macs[5] * 1.02) == 5
    assert equal_cost_rate(host, 1e12) == 0


def test_examples_are_recognised_ones_of_median_confidence():
    probabilities = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.2, 0.8], [0.8, 0.2]])
    labels = torch.tensor([0, 0, 0, 1, 1])
    assert pick_examples(probabilities, labels, [0, 1]) == [2, 3]
