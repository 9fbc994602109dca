"""Hosts by prefix, by folder and by hub id."""

from fnmatch import fnmatch

import huggingface_hub
import pytest
import timm
import torch

import sparing
from sparing.zoo import hosts


def test_a_timm_host_is_timms_own_model():
    model = sparing.create_model("timm/vit_tiny_patch16_224", device="meta", num_classes=7)
    assert type(model) is timm.models.VisionTransformer
    assert model.head.out_features == 7


def test_a_torchvision_host_and_an_open_clip_host_are_built():
    assert type(sparing.create_model("torchvision/resnet18", device="meta")).__name__ == "ResNet"
    clip = sparing.create_model("open_clip/ViT-S-32-alt", device="meta")
    assert clip.visual.conv1.weight.is_meta


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/deit_smal_patch16_224", "timm has no model 'deit_smal_patch16_224'; closest: deit_small_patch16_224"),
        ("torchvision/resnt18", "torchvision has no model 'resnt18'; closest: resnet18"),
        ("open_clip/ViT-B-17", "open_clip has no model 'ViT-B-17'; closest: ViT-B-1"),
    ],
)
def test_an_unknown_host_names_the_closest(name, message):
    with pytest.raises(ValueError, match=message):
        sparing.create_model(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/vit_tiny_patch16_224.no_such_tag", "timm has no weights of"),
        ("open_clip/ViT-B-32:no_such_tag", "open_clip has no weights 'no_such_tag'"),
    ],
)
def test_weights_that_do_not_exist_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        sparing.create_model(name, pretrained=True)


def test_weights_that_cannot_be_fetched_give_one_line(monkeypatch):
    def unreachable(*_args, **_kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(timm.models._builder, "load_pretrained", unreachable)
    with pytest.raises(ConnectionError, match=r"the weights of timm/vit_tiny_patch16_224 are not in the local cache"):
        sparing.create_model("timm/vit_tiny_patch16_224", pretrained=True)


def test_a_twin_whose_hosts_weights_cannot_be_fetched_gives_one_line(monkeypatch):
    def unreachable(*_args, **_kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(timm.models._builder, "load_pretrained", unreachable)
    with pytest.raises(ConnectionError, match="the weights of timm/deit_tiny_patch16_224 are not in the local cache"):
        sparing.create_model("tome_deit_tiny_patch16_224", host_pretrained=True)


def test_a_folder_in_timms_layout_gives_the_model_with_its_preprocessing(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3)
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.1, 0.2, 0.3)}
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    back = sparing.create_model(str(tmp_path))
    assert not back.training
    assert tuple(back.pretrained_cfg["mean"]) == (0.1, 0.2, 0.3)
    assert all(torch.equal(value, back.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.fixture
def tiny_dit(tmp_path):
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, num_layers=1, sample_size=4, num_embeds_ada_norm=10
    )
    model.save_pretrained(tmp_path / "pipeline" / "transformer")
    (tmp_path / "pipeline" / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    return model, tmp_path / "pipeline"


@pytest.mark.parametrize("folder", ["", "transformer"])
def test_a_diffusers_folder_gives_its_transformer(tiny_dit, folder):
    model, path = tiny_dit
    back = sparing.create_model(str(path / folder))
    assert type(back) is type(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters(), strict=True))


def test_a_hub_id_is_downloaded_and_read_like_a_folder(tiny_dit, monkeypatch):
    model, path = tiny_dit
    wanted = []

    def fetch(repo, allow_patterns):
        wanted.extend(allow_patterns)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert type(sparing.create_model("someone/tiny-dit")) is type(model)
    files = ["transformer/config.json", "transformer/a-00001-of-2.safetensors", "text_encoder/model.safetensors"]
    assert [any(fnmatch(file, pattern) for pattern in wanted) for file in files] == [True, True, False]


def test_a_name_of_the_zoo_wins_over_a_folder_of_that_name(toy_zoo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy_host").mkdir()
    assert isinstance(sparing.create_model("toy_host"), toy_zoo.ToyHost)


def test_a_saved_model_takes_no_arguments_and_a_foreign_class_is_refused(tiny_dit):
    _, path = tiny_dit
    with pytest.raises(ValueError, match="takes no further arguments, got num_classes"):
        sparing.create_model(str(path), num_classes=3)
    (path / "transformer" / "config.json").write_text('{"_class_name": "NoSuchTransformer"}')
    with pytest.raises(ValueError, match=r"'NoSuchTransformer' in .* is no model of sparing or of this diffusers"):
        sparing.create_model(str(path))


def test_a_pipeline_without_a_transformer_says_so(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ValueError, match="has no transformer"):
        sparing.create_model(str(tmp_path))


def test_an_unreachable_hub_gives_one_line():
    with pytest.raises(ConnectionError, match="'nobody/nothing' is not in the local cache"):
        sparing.create_model("nobody/nothing")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        sparing.create_model("./nothing/here")


@pytest.mark.parametrize(("name", "is_host"), [("timm/x", True), ("a/b", True), (".", True), ("stvit_x", False)])
def test_what_counts_as_a_host_name(name, is_host):
    assert hosts.is_host_name(name) is is_host


def test_the_card_of_a_timm_host_repeats_what_timm_says():
    card = sparing.model_card("timm/deit_tiny_patch16_224")
    assert (card.params, card.license_weights, card.method) == (5_717_416, "apache-2.0", None)
    assert card.source == "hf:timm/deit_tiny_patch16_224.fb_in1k"
    with pytest.raises(ValueError, match="timm has no model"):
        sparing.model_card("timm/deit_tny_patch16_224")


def test_the_card_of_a_saved_twin_says_method_status_and_licence(tmp_path):
    twin = sparing.twin(timm.create_model("test_vit"), "tome", r=2)
    twin.save_pretrained(tmp_path / "twin")
    card = sparing.model_card(str(tmp_path / "twin"))
    assert (card.method, card.training, card.host) == ("tome", "training-free", "test_vit")
    assert card.license_weights == "apache-2.0"
    assert card.params == sum(p.numel() for p in twin.parameters())
