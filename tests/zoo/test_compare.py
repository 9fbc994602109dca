"""Side by side: ratios to the first, distances of outputs, statuses printed, JSON and a picture."""

import copy
import json

import pytest
import timm
import torch
from PIL import Image
from torch import nn

import sparing
from sparing.zoo.compare import feature_cosine, main_tensor, relative_error, top1_agreement


@pytest.fixture(scope="module")
def host():
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=5).eval()


def test_a_copy_agrees_with_its_original_in_everything(host):
    result = sparing.compare({"host": host, "copy": copy.deepcopy(host)}, repeats=2, warmup=0)
    row = result.rows[1]
    assert (row.flops_ratio, row.params_ratio, row.output_error, row.top1_agreement) == (1.0, 1.0, 0.0, 1.0)
    assert row.feature_cosine == pytest.approx(1.0)
    assert result.inputs == "random"
    assert result.rows[0].speedup == 1.0


def test_errors_and_ratios_are_relative_to_the_first(host):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.host = host

        def forward(self, x):
            return self.host(x[:, :, ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3)) * 0 + self.host(x) / 2

    images = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(1))
    result = sparing.compare({"host": host, "half": Half()}, inputs=images, repeats=1, warmup=0)
    assert result.rows[1].flops_ratio == 2.0
    assert result.rows[1].output_error == pytest.approx(0.5, rel=1e-5)
    assert result.rows[1].top1_agreement == 1.0
    assert result.rows[1].feature_cosine is None
    assert result.inputs == "given"


def test_the_table_prints_every_status_and_the_json_holds_every_number(toy_zoo, tmp_path):
    host = toy_zoo.ToyHost()
    twin = sparing.twin(host, "toy")
    result = sparing.compare([host, twin, twin], repeats=2, warmup=0)
    text = result.table()
    assert [row.name for row in result.rows] == ["ToyHost", "ToyTwin", "ToyTwin (2)"]
    assert "training-free" in text.splitlines()[2]
    assert repr(result) == text
    stored = json.loads(result.to_json(tmp_path / "c.json"))
    assert json.loads((tmp_path / "c.json").read_text()) == stored
    assert stored["rows"][1]["knobs"] == {"strength": 0.5}
    assert stored["rows"][1]["profile"]["macs"] == result.rows[1].profile.macs
    with Image.open(result.plot(tmp_path / "c.png")) as picture:
        assert picture.size[0] > 600


def test_counting_only_takes_no_times(toy_zoo):
    result = sparing.compare([toy_zoo.ToyHost()], measure=False)
    assert result.rows[0].speedup is None
    assert result.rows[0].profile.latency_s is None
    assert "samples/s" not in result.table()
    assert "not timed" in result.table()


def test_names_are_created(toy_zoo):
    result = sparing.compare(["toy_host", "toy_toy_host"], repeats=1, warmup=0)
    assert result.rows[1].output_error is None  # two random models: nothing to compare but cost
    assert [(row.name, row.status) for row in result.rows] == [("toy_host", "host"), ("toy_toy_host", "training-free")]


def test_nothing_to_compare_is_an_error():
    with pytest.raises(ValueError, match="at least one model"):
        sparing.compare([])


def test_distances_are_none_where_there_is_nothing_to_compare():
    a, b = torch.ones(2, 3), torch.ones(2, 4)
    assert relative_error(a, b) is None
    assert top1_agreement(a, b) is None
    assert feature_cosine(a, None) is None
    assert top1_agreement(torch.ones(2, 3, 4), torch.ones(2, 3, 4)) is None


def test_distances_by_hand():
    logits, reference = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[0.0, 2.0], [0.0, 4.0]])
    assert relative_error(logits, reference) == pytest.approx((1 + 9 + 16) ** 0.5 / 20**0.5)
    assert top1_agreement(logits, reference) == 0.5
    assert feature_cosine(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])) == 0.5


def test_the_main_tensor_of_librarys_outputs():
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    sample = torch.ones(1)
    assert main_tensor(Transformer2DModelOutput(sample=sample)) is sample
    assert main_tensor((None, {"logits": sample})) is sample
    assert main_tensor("text") is None
