"""STViT without recovery on Swin: the host's own computation with open knobs, semantic maps from stage 2 on."""

import pytest
import timm
import torch
from torch import nn

import sparing
from sparing.vision.stvit_swin import STViTSwin
from sparing.vision.swin import SwinBlock


def swin(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"embed_dim": 8, "depths": (1, 2, 6, 2), "num_heads": (1, 2, 4, 4), "mlp_ratio": 2.0, "num_classes": 5}
    return timm.models.SwinTransformer(**{**sizes, **kwargs}).eval()


@torch.no_grad()
def test_with_all_tokens_kept_the_twin_computes_what_its_host_computes():
    host, image = swin(), torch.rand(1, 3, 224, 224)
    twin = STViTSwin.from_host(host, sample_window_size="all")
    assert twin.status == "exact"
    assert torch.equal(twin(image), host(image))


@torch.no_grad()
def test_the_twin_is_the_host_up_to_the_generation_and_a_semantic_map_after_it():
    host, image = swin(), torch.rand(2, 3, 224, 224)
    twin = STViTSwin.from_host(host)
    assert twin.knobs["base_depth"] == 2
    assert twin.status == "converted, not trained"
    seen = {}
    for model, stage in ((host, host.layers[2]), (twin, twin.layers[2])):
        handle = stage.blocks[1].register_forward_hook(lambda m, i, o, key=model: seen.__setitem__(key, o))
        model(image)
        handle.remove()
    assert torch.equal(seen[host], seen[twin])
    _, maps = twin.forward_intermediates(image)
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 56, 56), (16, 28, 28), (32, 6, 6), (64, 3, 3)]
    third = twin.layers[2].blocks[2]
    assert torch.equal(third.attn.q.weight, host.layers[2].blocks[2].attn.qkv.weight[:32])
    assert (third.layer_scale_1 == 1).all()


@torch.no_grad()
def test_an_images_logits_do_not_depend_on_its_batch_and_any_size_runs_with_windows():
    twin = STViTSwin.from_host(swin(), scope="window").double()
    images = torch.rand(3, 3, 120, 152, dtype=torch.float64)
    torch.testing.assert_close(twin(images[1:2]), twin(images)[1:2], atol=1e-10, rtol=0)


@torch.no_grad()
def test_a_map_smaller_than_a_window_is_a_window_of_its_own_size():
    torch.manual_seed(0)
    block = SwinBlock(8, num_heads=2, window=7, shift=3, clip_window=True).eval()
    x = torch.randn(2, 3, 4, 8)
    qkv = block.attn.qkv(block.norm1(x)).view(2, 12, 3, 2, 4).permute(2, 0, 3, 1, 4)
    table = block.attn.relative_position_bias_table
    bias = torch.empty(2, 12, 12)
    for a in range(12):
        for b in range(12):
            bias[:, a, b] = table[(a // 4 - b // 4 + 6) * 13 + a % 4 - b % 4 + 6]
    weights = (qkv[0] @ qkv[1].transpose(-1, -2) / 2 + bias).softmax(-1)
    y = x + block.attn.proj((weights @ qkv[2]).transpose(1, 2).reshape(2, 3, 4, 8))
    torch.testing.assert_close(block(x), y + block.mlp(block.norm2(y)), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_saved_twin_comes_back_without_its_host(tmp_path):
    twin = STViTSwin.from_host(swin(), base_depth=3, use_conv_pos=True)
    twin.save_pretrained(tmp_path / "t")
    back, image = sparing.load(tmp_path / "t"), torch.rand(1, 3, 224, 224)
    assert torch.equal(back(image), twin(image))
    assert back.knobs == twin.knobs


def test_what_does_not_fit_is_refused_with_its_numbers():
    with pytest.raises(ValueError, match=r"base_depth 4 \+ 2 generation blocks leave no semantic block of stage 2's 6"):
        STViTSwin.from_host(swin(), base_depth=4)
    with pytest.raises(ValueError, match="use STViT-R for dense=True"):
        STViTSwin.from_host(swin(), dense=True)
    with pytest.raises(ValueError, match="stages 2 and 3 hold semantic tokens"):
        STViTSwin.from_host(swin()).forward_intermediates(torch.rand(1, 3, 224, 224), full_resolution=True)
    with pytest.raises(ValueError, match="16x16, not whole windows of 7"):
        STViTSwin.from_host(swin())(torch.rand(1, 3, 256, 256))
    assert "3 blocks, 4 are needed" in STViTSwin.why_not(swin(depths=(1, 1, 3, 1)))[0]
