"""Describing a live timm ViT and building it again."""

import json

import pytest
import timm
import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from sparing.vision.vit_hosts import _ratio, build_vit, describe_vit
from vision.small_hosts import HOSTS, images_for, small_host

# Real names of timm whose options differ; each is built on the meta device.
NAMES = [
    "deit_base_distilled_patch16_384",
    "vit_tiny_patch16_384",
    "vit_base_patch32_clip_448",
    "vit_large_patch14_clip_336",
    "vit_so400m_patch14_siglip_378",
    "vit_so400m_patch16_siglip_gap_512",
    "vit_giant_patch14_reg4_dinov2",
    "vit_so150m2_patch16_reg1_gap_448",
    "vit_intern300m_patch14_448",
    "vit_medium_patch16_reg4_gap_256",
    "vit_mediumd_patch16_reg4_gap_384",
    "vit_betwixt_patch16_reg4_gap_256",
    "vit_wee_patch16_reg1_gap_256",
    "flexivit_small",
    "eva_large_patch14_196",
    "test_vit",
    "test_vit2",
    "test_vit3",
    "test_vit4",
]


@pytest.mark.parametrize("key", HOSTS)
def test_a_rebuilt_host_computes_the_same(key):
    host = small_host(key)
    description = json.loads(json.dumps(describe_vit(host)))
    again = build_vit(description).eval()
    again.load_state_dict(host.state_dict())
    images = images_for(host)
    torch.testing.assert_close(again(images), host(images), atol=0, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_real_names_are_described(name):
    host = timm.create_model(name, device="meta")
    again = build_vit(describe_vit(host), device="meta")
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in host.state_dict().items()}
    assert repr(again) == repr(host)


def test_settings_that_leave_no_trace_in_the_parameters_are_seen():
    host = small_host(
        "deit", drop_path_rate=0.1, drop_rate=0.2, proj_drop_rate=0.3, attn_drop_rate=0.05, pos_drop_rate=0.02
    )
    again = build_vit(describe_vit(host))
    assert repr(again) == repr(host)
    host.blocks[3].norm1.eps = 1e-3
    with pytest.raises(ValueError, match=r"blocks\.3\.norm1\.eps is 0\.001, rebuilt as 1e-06"):
        describe_vit(host)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda vit: setattr(vit, "extra", nn.Linear(2, 2)), "module extra is in the model and not in the rebuilt one"),
        (lambda vit: setattr(vit.blocks[2], "mlp", nn.Linear(48, 48)), r"module blocks\.2\.mlp\.\w+ is in the rebuilt"),
        (lambda vit: setattr(vit.blocks[0].attn, "scale", 1.0), r"blocks\.[01]\.attn\.scale is 1\.0"),
        (lambda vit: setattr(vit, "head", nn.Linear(48, 3)), r"head\.out_features is 3, rebuilt as 10"),
        (lambda vit: setattr(vit, "patch_embed", nn.Conv2d(3, 48, 16, 16)), "Conv2d for patch_embed"),
    ],
)
def test_what_no_constructor_builds_is_refused_naming_the_difference(change, message):
    host = small_host("deit")
    change(host)
    with pytest.raises(ValueError, match=message):
        describe_vit(host)


def test_mixed_layer_classes_keep_their_names():
    host = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2, norm_layer=nn.LayerNorm, act_layer=nn.ReLU
    )
    description = describe_vit(host)
    assert description["arguments"]["norm_layer"] == {"name": "torch.LayerNorm", "eps": 1e-5}
    assert type(build_vit(description).norm) is nn.LayerNorm
    assert type(small_host("deit").norm) is LayerNorm


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("class", "ResNet", "unknown ViT class 'ResNet'"),
        ("mlp_layer", "os.system", "unknown mlp_layer"),
        ("act_layer", "os.system", "unknown layer 'os.system'"),
        ("act_layer", "torch.Module.__init__", "unknown layer"),
    ],
)
def test_a_description_from_a_file_can_name_layers_only(part, value, message):
    description = describe_vit(small_host("deit"))
    (description if part == "class" else description["arguments"])[part] = value
    with pytest.raises(ValueError, match=message):
        build_vit(description)


@pytest.mark.parametrize("width", [48, 96, 896, 1152])
def test_every_hidden_width_of_an_mlp_has_a_ratio_that_timm_turns_back_into_it(width):
    assert [int(width * _ratio(hidden, width)) for hidden in range(1, 6 * width)] == list(range(1, 6 * width))
