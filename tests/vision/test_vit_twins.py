"""Twins of every kind of timm ViT by both methods: forward, backward, save, load without the host; names (G5, G14)."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

import sparing
from sparing.vision.stvit import SemanticTokenViT
from sparing.vision.tome import TokenMergingViT
from sparing.vision.vit_twins import VIT_HOSTS
from vision.small_hosts import HOSTS, images_for, small_host

METHODS = {"stvit": (SemanticTokenViT, {"num_tokens": 9}), "tome": (TokenMergingViT, {"r": 5})}


def make(method, host):
    cls, knobs = METHODS[method]
    return cls.from_host(host, **knobs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("key", HOSTS)
def test_a_twin_runs_backward_to_every_parameter_and_comes_back_without_its_host(method, key, tmp_path):
    host = small_host(key)
    before = {name: tensor.clone() for name, tensor in host.state_dict().items()}
    twin = make(method, host).train()
    images = images_for(host)
    twin(images).square().mean().backward()
    # With zero logits the pooling's own convolution and norm get no gradient in the first step; the logit weight does.
    started = ("center_pooling.conv", "center_pooling.norm")
    lost = [n for n, p in twin.named_parameters() if p.grad is None or (not n.startswith(started) and not p.grad.any())]
    assert lost == [], lost
    for name, tensor in host.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    twin.eval().save_pretrained(tmp_path / "twin")
    del host
    again = sparing.load(tmp_path / "twin")
    assert type(again) is type(twin)
    assert again.knobs == twin.knobs
    assert again.status == twin.status
    torch.testing.assert_close(again(images), twin(images), atol=0, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_twin_remembers_preprocessing_licence_and_host(method, tmp_path):
    twin = make(method, small_host("clip"))
    twin.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["host"]["name"] == "vit_base_patch16_clip_224"
    assert config["license"]["weights"] == "apache-2.0"
    again = sparing.load(tmp_path)
    assert tuple(again.pretrained_cfg["mean"]) == tuple(twin.pretrained_cfg["mean"])
    assert again.license == twin.license
    assert again.twin_config() == twin.twin_config()


@pytest.mark.parametrize("method", METHODS)
def test_changes_of_a_live_twin_are_saved(method, tmp_path):
    twin = make(method, small_host("vit_small"))
    twin.reset_classifier(3)
    twin.set_input_size((128, 96))
    twin.save_pretrained(tmp_path)
    images = images_for(twin)
    assert images.shape[-2:] == (128, 96)
    torch.testing.assert_close(sparing.load(tmp_path)(images), twin.eval()(images))


@pytest.mark.parametrize("method", METHODS)
def test_a_pruned_twin_comes_back_without_its_host(method, tmp_path):
    twin = make(method, small_host("vit_small"))
    twin.prune_intermediate_layers([len(twin.blocks) - 2], prune_head=False)
    twin.save_pretrained(tmp_path)
    again, images = sparing.load(tmp_path), images_for(twin)
    assert len(again.blocks) == len(twin.blocks) < len(small_host("vit_small").blocks)
    torch.testing.assert_close(again(images), twin.eval()(images))


def test_a_twin_pruned_into_its_base_module_is_not_saved(tmp_path):
    twin = make("stvit", small_host("vit_small"))
    twin.prune_intermediate_layers([0], prune_head=False)
    with pytest.raises(ValueError, match="pruned to 1 blocks, this twin has no semantic layer"):
        twin.save_pretrained(tmp_path / "twin")
    assert not (tmp_path / "twin").exists()


@pytest.mark.parametrize("method", METHODS)
def test_a_host_with_modules_of_its_own_converts_and_says_why_it_cannot_be_saved(method, tmp_path):
    host = small_host("deit")
    host.blocks[0].mlp.act = nn.Hardtanh()
    twin = make(method, host)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.act is a Hardtanh|blocks\.1\.mlp\.act is a GELU"):
        twin.save_pretrained(tmp_path / "twin")
    assert not (tmp_path / "twin").exists()


def test_the_face_offers_both_methods():
    host = small_host("dinov2_reg4")
    answers = {answer.method: answer for answer in sparing.methods(host)}
    for method, training in (("stvit", "required"), ("tome", "none")):
        assert answers[method].applies
        assert answers[method].training == training
        assert type(sparing.twin(host, method, **METHODS[method][1])) is METHODS[method][0]


@pytest.mark.parametrize("method", METHODS)
def test_names_are_known_to_sparing_and_timm(method):
    name = f"{method}_deit_small_patch16_224"
    arguments = {"depth": 4, "num_classes": 7, **METHODS[method][1]}
    for create in (timm.create_model, sparing.create_model):
        twin = create(name, **arguments).eval()
        assert isinstance(twin, METHODS[method][0])
        assert twin.num_classes == 7
        assert twin.default_cfg["mean"] == timm.get_pretrained_cfg("deit_small_patch16_224").mean
        assert twin(torch.randn(1, 3, 224, 224)).shape == (1, 7)
    assert set(sparing.list_models(f"{method}_*")) >= {f"{method}_{host}" for host in VIT_HOSTS}
    with pytest.raises(ValueError, match="no weights"):
        timm.create_model(name, pretrained=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("host", [h for h in VIT_HOSTS if "distilled" in h or "siglip" in h or "reg4" in h])
def test_names_of_hosts_with_their_own_tokens_and_heads_run(method, host):
    twin = sparing.create_model(f"{method}_{host}", depth=4, embed_dim=48, num_heads=3, **METHODS[method][1]).eval()
    with torch.inference_mode():
        assert torch.isfinite(twin(images_for(twin, batch=1))).all()


def test_a_twin_class_of_another_timm_class_is_refused():
    with pytest.raises(TypeError, match=r"extends VisionTransformer, the host is a VisionTransformerDistilled"):
        SemanticTokenViT(small_host("deit_distilled"), num_tokens=9)


@pytest.mark.parametrize(("method", "shapes"), [("stvit", [(14, 14), (4, 4), (4, 4)]), ("tome", [(14, 14)] * 3)])
def test_features_only_gives_timms_extractor(method, shapes):
    name = f"{method}_vit_small_patch16_224"
    body = timm.create_model(name, depth=6, features_only=True, out_indices=(1, 3, 5)).eval()
    maps = body(torch.randn(1, 3, 224, 224))
    assert [tuple(m.shape[2:]) for m in maps] == shapes
    assert body.feature_info.reduction() == [224 // rows for rows, _ in shapes]
    assert body.feature_info.channels() == [384] * 3


@pytest.mark.slow
def test_importing_the_vision_family_is_what_registers_with_timm():
    code = (
        "import timm, sparing; assert not timm.is_model('stvit_deit_small_patch16_224');"
        "import sparing.vision; assert timm.is_model('stvit_deit_small_patch16_224')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("host", VIT_HOSTS)
def test_every_name_runs_at_its_real_size(method, host):
    twin = sparing.create_model(f"{method}_{host}").eval()
    with torch.inference_mode():
        out = twin(images_for(twin, batch=1))
    assert torch.isfinite(out).all()
