"""Names to models: creation, listing, errors that name the closest."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import sparing
from sparing.zoo import registry, weights
from sparing.zoo.registry import register_model, registered


def test_creating_by_name_passes_arguments_on(toy_zoo):
    model = sparing.create_model("toy_host", classes=5)
    assert isinstance(model, toy_zoo.ToyHost)
    assert model.head.out_features == 5


def test_an_unknown_name_names_the_closest(toy_zoo):
    with pytest.raises(ValueError, match=r"unknown model 'toy_hots'; closest: toy_host"):
        sparing.create_model("toy_hots")
    with pytest.raises(ValueError, match=r"unknown model 'toy_hots'"):
        sparing.model_card("toy_hots")


def test_meta_builds_without_memory_and_dtype_is_kept(toy_zoo):
    model = sparing.create_model("toy_host", device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


def test_pretrained_without_weights_raises_and_is_never_random(toy_zoo):
    with pytest.raises(ValueError, match=r"'toy_toy_host' has no weights of its own"):
        sparing.create_model("toy_toy_host", pretrained=True)
    with pytest.raises(FileNotFoundError, match=r"toy_host.demo"):
        sparing.create_model("toy_host.demo", pretrained=True)


@pytest.mark.parametrize("name", ["toy_host.demo", "toy_host"])
def test_shipped_weights_are_loaded_by_tag_and_by_bare_name(toy_zoo, tmp_path, monkeypatch, name):
    monkeypatch.setattr(weights, "SHIPPED", tmp_path)
    source = toy_zoo.ToyHost()
    state = {f"published.{key}": value.half() for key, value in weights.untied_state(source).items()}
    save_file(state, tmp_path / "toy_host.demo.safetensors")
    model = sparing.create_model(name, pretrained=True)
    assert not model.training
    assert model.head.weight.dtype == torch.float32
    torch.testing.assert_close(model.head.weight, source.head.weight.half().float(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("before", "after"), [("converted, not trained", "trained"), ("training-free", "training-free")]
)
def test_published_weights_make_a_converted_twin_trained(toy_zoo, tmp_path, monkeypatch, before, after):
    monkeypatch.setattr(weights, "SHIPPED", tmp_path)
    monkeypatch.setitem(registry.MODELS, "toy_toy_host", replace(registry.MODELS["toy_toy_host"], source="shipped"))
    save_file(weights.untied_state(toy_zoo.ToyTwin()), tmp_path / "toy_toy_host.safetensors")
    original = toy_zoo.ToyTwin.__init__

    def build(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.status = before

    monkeypatch.setattr(toy_zoo.ToyTwin, "__init__", build)
    assert sparing.create_model("toy_toy_host", pretrained=True).status == after


def test_checkpoint_path_loads_through_the_familys_filter(toy_zoo, tmp_path):
    source = toy_zoo.ToyHost()
    save_file({f"published.{k}": v for k, v in weights.untied_state(source).items()}, tmp_path / "w.safetensors")
    model = sparing.create_model("toy_host", checkpoint_path=tmp_path / "w.safetensors")
    torch.testing.assert_close(model.third.weight, source.third.weight, rtol=0, atol=0)


def test_sources_of_weights_exclude_each_other(toy_zoo):
    with pytest.raises(ValueError, match="exclude each other"):
        sparing.create_model("toy_host", pretrained=True, checkpoint_path="x")
    with pytest.raises(ValueError, match="exclude each other"):
        sparing.create_model("toy_toy_host", pretrained=True, host_pretrained=True)
    with pytest.raises(ValueError, match="meta"):
        sparing.create_model("toy_host", checkpoint_path="x", device="meta")


def test_host_pretrained_reaches_a_twins_entry_point_and_is_refused_elsewhere(toy_zoo):
    assert sparing.create_model("toy_toy_host", host_pretrained=True).started_from_host
    assert not sparing.create_model("toy_toy_host").started_from_host
    with pytest.raises(ValueError, match="no twin of a published host"):
        sparing.create_model("toy_host", host_pretrained=True)
    with pytest.raises(ValueError, match="is a host itself"):
        sparing.create_model("timm/vit_tiny_patch16_224", host_pretrained=True)


def test_listing_by_pattern_task_weights_and_licence(toy_zoo):
    assert sparing.list_models() == ["toy_host", "toy_toy_host"]
    assert sparing.list_models(demo=True) == ["toy_host", "toy_host.demo", "toy_toy_host"]
    assert sparing.list_models("toy_toy*") == ["toy_toy_host"]
    assert sparing.list_models("y_toy", demo=True) == ["toy_toy_host"]
    assert sparing.list_models(pretrained=True, demo=True) == ["toy_host.demo"]
    assert sparing.list_models(commercial=True, demo=True) == ["toy_host", "toy_host.demo"]
    assert sparing.list_models(commercial=False, demo=True) == ["toy_toy_host"]
    assert sparing.list_models(method="toy") == ["toy_toy_host"]
    with pytest.raises(ValueError, match=r"unknown task 'x'; the zoo has toy"):
        sparing.list_models(task="x")


def test_a_card_inherits_from_the_table(toy_zoo):
    card = sparing.model_card("toy_toy_host")
    assert (card.derived_from, card.license_weights, card.commercial()) == ("toy_host", "cc-by-nc-4.0", False)
    assert "source           none of its own" in str(card)
    assert "license_data     not known" in str(card)
    assert card.to_dict()["loader"] == "untested"


def test_registering_with_timm_makes_the_name_timms_too(toy_zoo, monkeypatch):
    import timm

    @register_model(timm=True)
    def toy_for_timm(pretrained=False, **kwargs):
        return toy_zoo.ToyHost(**kwargs)

    assert timm.create_model("toy_for_timm", classes=4).head.out_features == 4
    with pytest.raises(ValueError, match="unknown model 'toy_for_timm'"):
        timm.create_model("toy_for_timm", pretrained=True)
    assert "toy_for_timm" in registered(__name__)
