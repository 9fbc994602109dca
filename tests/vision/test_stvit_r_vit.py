"""STViT-R on plain ViTs: the host's own computation with open knobs, the dense map everywhere else."""

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import sparing
from sparing.kernels import use_backend
from sparing.vision.simple_pyramid import SimplePyramid
from sparing.vision.split_attention import cross_block
from sparing.vision.stvit_r_vit import DumbbellViT


def vit(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 16, "depth": 12, "num_heads": 2, "num_classes": 5}
    return timm.models.VisionTransformer(**{**sizes, **kwargs}).eval()


@pytest.mark.parametrize("kwargs", [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}], ids=str)
@torch.no_grad()
def test_with_all_tokens_kept_the_twin_computes_what_its_host_computes(kwargs):
    host, image = vit(**kwargs), torch.rand(2, 3, 64, 64)
    twin = DumbbellViT.from_host(host, num_tokens="all")
    assert twin.status == "exact"
    assert torch.equal(twin(image), host(image))


@torch.no_grad()
def test_a_unit_is_the_hosts_layers_with_other_streams():
    host, image = vit(), torch.rand(2, 3, 64, 64)
    twin = DumbbellViT.from_host(host, num_tokens=16)
    twin.global_centers.normal_()
    x = host.blocks[0](twin.embed(image))
    for unit in (0, 1):
        blocks = host.blocks[6 * unit : 6 * unit + 6]
        x = x if unit == 0 else blocks[0](x)
        s = cross_block(blocks[1], twin.center_pooling[unit](x[:, 1:], (8, 8)), x)
        s = cross_block(blocks[2], s + twin.global_centers if unit == 0 else s, torch.cat([s, x], 1))
        x = cross_block(blocks[5], x, blocks[4](blocks[3](s)))
    torch.testing.assert_close(twin.forward_features(image), host.norm(x), atol=1e-5, rtol=0)


@torch.no_grad()
def test_layers_before_base_depth_are_the_hosts_and_the_unit_stands_behind_them(tmp_path):
    host, image = vit(depth=8), torch.rand(2, 3, 64, 64)
    twin = DumbbellViT.from_host(host, num_tokens=16, base_depth=2)
    twin.global_centers.normal_()
    x = twin.embed(image)
    for block in host.blocks[:3]:
        x = block(x)
    s = cross_block(host.blocks[3], twin.center_pooling[0](x[:, 1:], (8, 8)), x)
    s = cross_block(host.blocks[4], s + twin.global_centers, torch.cat([s, x], 1))
    s = host.blocks[6](host.blocks[5](s))
    expected = host.norm(cross_block(host.blocks[7], x, s))
    torch.testing.assert_close(twin.forward_features(image), expected, atol=1e-5, rtol=0)
    maps = twin.forward_intermediates(image, intermediates_only=True)
    assert [m.shape[-1] for m in maps] == [8, 8, 8, 4, 4, 4, 4, 8]
    twin.save_pretrained(tmp_path / "t")
    assert torch.equal(sparing.load(tmp_path / "t")(image), twin(image))
    twin.prune_intermediate_layers([2])
    assert len(twin.center_pooling) == 0


@torch.no_grad()
def test_intermediates_have_the_image_grid_outside_and_the_semantic_grid_inside_units():
    twin = DumbbellViT.from_host(vit(), num_tokens=(2, 3))
    image = torch.rand(1, 3, 64, 64)
    last, maps = twin.forward_intermediates(image, norm=True)
    assert [tuple(m.shape[2:]) for m in maps] == [(8, 8), *[(2, 3)] * 4, (8, 8)] * 2
    assert torch.equal(maps[-1].flatten(2).transpose(1, 2), last[:, 1:])
    tokens = twin.forward_intermediates(image, indices=[3], output_fmt="NLC", intermediates_only=True)
    assert tokens[0].shape == (1, 6, 16)
    assert [info["reduction"] for info in twin.feature_info[:6]] == [8, 32, 32, 32, 32, 8]


@pytest.mark.parametrize(("tokens", "gmacs"), [(16, 7.27), (36, 8.45)])
def test_flops_of_vit_base_are_those_of_the_specification(tokens, gmacs):
    with torch.device("meta"):
        host = timm.create_model("vit_base_patch16_224").eval()
        twin = DumbbellViT.from_host(host, num_tokens=tokens)
    with torch.no_grad(), use_backend("reference"), FlopCounterMode(display=False) as counter:
        twin(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, rel=0.01)


@torch.no_grad()
def test_a_saved_twin_comes_back_without_its_host(tmp_path):
    twin = DumbbellViT.from_host(vit(), num_tokens=4, pooling="max")
    twin.global_centers.normal_()
    twin.save_pretrained(tmp_path / "t")
    back, image = sparing.load(tmp_path / "t"), torch.rand(1, 3, 64, 64)
    assert torch.equal(back(image), twin(image))
    assert back.knobs == {"num_tokens": [2, 2], "pooling": "max", "base_depth": 0}


def test_checkpointed_and_plain_backward_give_equal_gradients():
    gradients = []
    for checkpointed in (False, True):
        twin = DumbbellViT.from_host(vit(depth=6), num_tokens=4)
        torch.nn.init.zeros_(twin.global_centers)
        twin.set_grad_checkpointing(checkpointed)
        torch.manual_seed(1)
        twin(torch.rand(1, 3, 64, 64)).square().sum().backward()
        gradients.append(twin.blocks[1].attn.qkv.weight.grad)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)
    assert gradients[0].abs().sum() > 0


def test_what_does_not_fit_is_refused_with_its_numbers():
    with pytest.raises(ValueError, match=r"8 blocks; a dumbbell unit takes six"):
        DumbbellViT.from_host(vit(depth=8))
    with pytest.raises(ValueError, match=r"behind base_depth=1 must be a multiple of 6, e.g. base_depth=2"):
        DumbbellViT.from_host(vit(depth=8), base_depth=1)
    with pytest.raises(ValueError, match=r"base_depth 12: .* has 12 blocks"):
        DumbbellViT.from_host(vit(), num_tokens="all", base_depth=12)
    assert "5 blocks, a dumbbell unit takes six" in DumbbellViT.why_not(vit(depth=5))[0]
    with pytest.raises(ValueError, match="7 is not a perfect square"):
        DumbbellViT.from_host(vit(), num_tokens=7)
    with pytest.raises(ValueError, match="9x9 semantic tokens do not fit a grid of 8x8"):
        DumbbellViT.from_host(vit(), num_tokens=81)
    with pytest.raises(ValueError, match="pooling 'mean' is unknown"):
        DumbbellViT.from_host(vit(), pooling="mean")
    with pytest.raises(TypeError, match="takes a timm VisionTransformer, got SwinTransformer"):
        DumbbellViT.from_host(timm.models.SwinTransformer(embed_dim=8, num_heads=(1, 2, 4, 8)))
    with pytest.raises(ValueError, match="30 channels are no multiple of 4"):
        SimplePyramid(30)


def test_the_simple_pyramid_has_four_strides():
    maps = SimplePyramid(16, 8)(torch.rand(1, 16, 6, 10))
    assert [tuple(m.shape) for m in maps] == [(1, 8, 24, 40), (1, 8, 12, 20), (1, 8, 6, 10), (1, 8, 3, 5)]
