"""timm's contracts of an STViT twin (spec A4, G14, G16) and its cost (G2)."""

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay

from sparing.vision.stvit import SemanticTokenViT
from sparing.zoo.profile import profile
from vision.small_hosts import WIDTH, images_for, small_host


def twin_of(key="deit", *, host=None, **knobs):
    return SemanticTokenViT.from_host(host or small_host(key), **{"num_tokens": 9, **knobs}).eval()


@pytest.mark.parametrize("key", ["deit", "deit_distilled", "dinov2_reg4", "siglip", "so150m", "so150m_map", "prr"])
def test_features_then_head_is_the_forward_pass(key):
    twin = twin_of(key)
    images = images_for(twin)
    features = twin.forward_features(images)
    assert features.shape == (2, twin.num_prefix_tokens + 9, WIDTH)
    torch.testing.assert_close(twin.forward_head(features), twin(images))
    assert twin.forward_head(features, pre_logits=True).shape == (2, twin.num_features)
    assert twin.num_features == twin.embed_dim == WIDTH


@pytest.mark.parametrize("key", ["deit", "dinov2_reg4", "siglip"])
def test_intermediates_have_the_image_grid_before_and_the_semantic_grid_after_the_generation(key):
    twin = twin_of(key, num_tokens=(2, 3))
    images, prefix = images_for(twin), twin.num_prefix_tokens
    last, maps = twin.forward_intermediates(images, norm=True)
    assert [tuple(m.shape[1:]) for m in maps] == [(WIDTH, 7, 7)] * 2 + [(WIDTH, 2, 3)] * 4
    torch.testing.assert_close(last, twin.forward_features(images))
    torch.testing.assert_close(maps[-1].flatten(2).transpose(1, 2), last[:, prefix:])
    tokens = twin.forward_intermediates(images, [0, -1], output_fmt="NLC", intermediates_only=True)
    assert [t.shape[1] for t in tokens] == [49, 6]
    pairs = twin.forward_intermediates(images, 2, return_prefix_tokens=True, intermediates_only=True)
    if prefix:
        assert [(m.shape[2:], p.shape[1]) for m, p in pairs] == [((2, 3), prefix)] * 2
    as_dict = twin.forward_intermediates(images, output_dict=True, return_prefix_tokens=True, output_fmt="NLC")
    assert set(as_dict) == {"image_intermediates", "image_features"} | (
        {"image_intermediates_prefix"} if prefix else set()
    )
    early, taken = twin.forward_intermediates(images, [1, 0], stop_early=True, output_fmt="NLC")
    assert early.shape[1] == prefix + 49
    torch.testing.assert_close(taken[1], twin.forward_intermediates(images, [0], output_fmt="NLC")[1][0])


def test_full_resolution_after_the_generation_is_refused():
    twin = twin_of()
    images = images_for(twin)
    assert len(twin.forward_intermediates(images, [0, 1], full_resolution=True, intermediates_only=True)) == 2
    with pytest.raises(ValueError, match=r"block 5 holds \(3, 3\) semantic tokens.* ends with block 1"):
        twin.forward_intermediates(images, full_resolution=True)
    with pytest.raises(ValueError, match="'NHWC' is unknown; 'NCHW' and 'NLC'"):
        twin.forward_intermediates(images, output_fmt="NHWC")
    with pytest.raises(ValueError, match=r"block indices \[6\] are outside a model of 6 blocks"):
        twin.forward_intermediates(images, [6])
    with pytest.raises(ValueError, match="attn_mask and is_causal are not accepted"):
        twin.forward_features(images, attn_mask=torch.zeros(50, 50))


def test_feature_info_says_what_each_map_is_reduced_by():
    info = twin_of(num_tokens=(2, 3)).feature_info
    assert [f["reduction"] for f in info] == [16, 16, 56, 56, 56, 56]
    assert [f["module"] for f in info] == [f"blocks.{i}" for i in range(6)]
    wide = twin_of(host=small_host("deit", img_size=(224, 112)), num_tokens=(3, 2)).feature_info
    assert wide[-1]["reduction"] == pytest.approx(224 / 3)


@pytest.mark.parametrize(
    ("indices", "left"), [([0], set()), ([2], {"center_pooling"}), ([3], {"center_pooling", "global_centers"})]
)
def test_pruning_takes_the_generation_with_its_blocks(indices, left):
    twin = twin_of()
    images = images_for(twin)
    expected = twin.forward_intermediates(images, indices, intermediates_only=True)[0]
    twin.prune_intermediate_layers(indices, prune_norm=True)
    assert {
        n
        for n, p in (("center_pooling", twin.center_pooling), ("global_centers", twin.global_centers))
        if p is not None
    } == left
    torch.testing.assert_close(twin.forward_intermediates(images, indices, intermediates_only=True)[0], expected)


def test_the_classifier_is_got_and_reset_as_timms():
    twin = twin_of()
    assert twin.get_classifier() is twin.head
    twin.reset_classifier(4)
    assert twin(images_for(twin)).shape == (2, 4)
    twin.reset_classifier(0, "avg")
    torch.testing.assert_close(twin(images_for(twin)), twin.forward_features(images_for(twin))[:, 1:].mean(1))
    distilled = twin_of("deit_distilled")
    assert distilled.get_classifier() == (distilled.head, distilled.head_dist)
    distilled.set_distilled_training(True)
    logits, distillation = distilled.train()(images_for(distilled))
    assert logits.shape == distillation.shape == (2, 10)


def test_optimizer_groups_know_the_new_parameters():
    twin = twin_of("dinov2_reg4")
    assert {"global_centers", "pos_embed", "cls_token", "reg_token"} <= twin.no_weight_decay()
    groups = param_groups_layer_decay(twin, weight_decay=0.05, no_weight_decay_list=twin.no_weight_decay())
    assert sum(len(g["params"]) for g in groups) == len(list(twin.parameters()))
    scale = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert scale[id(twin.global_centers)] == (1.0, 0.0)
    assert scale[id(twin.center_pooling.conv.weight)] == (1.0, 0.05)
    assert scale[id(twin.blocks[0].mlp.fc1.weight)][0] < scale[id(twin.blocks[5].mlp.fc1.weight)][0] < 1.0


@pytest.mark.parametrize("key", ["deit", "dinov2_reg4"])
def test_gradient_checkpointing_gives_equal_gradients(key):
    twin = twin_of(key)
    images = images_for(twin)

    def gradients(enabled):
        twin.zero_grad()
        twin.set_grad_checkpointing(enabled)
        calls = []
        hooks = [b.norm2.register_forward_hook(lambda *_: calls.append(1)) for b in twin.blocks]
        twin(images).square().sum().backward()
        for hook in hooks:
            hook.remove()
        return {n: p.grad.clone() for n, p in twin.named_parameters()}, len(calls)

    plain, once = gradients(False)
    saved, twice = gradients(True)
    assert (once, twice) == (6, 12)
    for name, gradient in plain.items():
        torch.testing.assert_close(saved[name], gradient)


def test_a_dynamic_host_takes_other_image_sizes():
    twin = twin_of("dynamic")
    for size, grid in (((112, 112), (7, 7)), ((64, 160), (4, 10)), ((80, 48), (5, 3))):
        images = torch.randn(2, 3, *size)
        assert twin.forward_features(images).shape == (2, 10, WIDTH)
        maps = twin.forward_intermediates(images, [1, 5], intermediates_only=True)
        assert [tuple(m.shape[2:]) for m in maps] == [grid, (3, 3)]
        assert twin.gathered_regions(images).shape == (2, 9, *grid)


def test_set_input_size_keeps_the_tokens_and_refuses_a_grid_that_is_too_small():
    twin = twin_of()
    twin.set_input_size((128, 96))
    assert twin.forward_features(torch.randn(1, 3, 128, 96)).shape == (1, 10, WIDTH)
    assert [f["reduction"] for f in twin.feature_info][-1] == pytest.approx(128 / 3)
    with pytest.raises(ValueError, match="3 centers do not fit an axis of 2 tokens"):
        twin.set_input_size((128, 32))
    assert twin.patch_embed.grid_size == (8, 6)


@pytest.mark.parametrize(
    ("size", "host_gmacs", "gmacs"), [("tiny", 1.2537, 0.5228), ("small", 4.5989, 1.9079), ("base", 17.5638, 7.2650)]
)
def test_deit_with_16_tokens_costs_what_the_paper_says(size, host_gmacs, gmacs):
    host = timm.create_model(f"deit_{size}_patch16_224", device="meta")
    twin = SemanticTokenViT.from_host(host, num_tokens=16, base_depth=4, generation_depth=2, keep_prefix=False)
    images = torch.empty(1, 3, 224, 224, device="meta")
    dense, sparse = (profile(model, images, measure=False).macs / 1e9 for model in (host, twin))
    assert dense == pytest.approx(host_gmacs, rel=5e-3)
    assert sparse == pytest.approx(gmacs, rel=5e-3)
    assert 0.580 <= 1 - sparse / dense <= 0.588


@pytest.mark.parametrize(
    ("tokens", "base", "stgm", "gmacs"),
    [
        (36, 4, 2, 2.1967),
        (64, 4, 2, 2.6083),
        (16, 3, 2, 1.560),
        (16, 8, 2, 3.299),
        (16, 4, 3, 1.968),
        (16, 4, 4, 2.028),
    ],
)
def test_the_papers_ablations_cost_what_it_says(tokens, base, stgm, gmacs):
    host = timm.create_model("deit_small_patch16_224", device="meta")
    twin = SemanticTokenViT.from_host(
        host, num_tokens=tokens, base_depth=base, generation_depth=stgm, keep_prefix=False
    )
    macs = profile(twin, torch.empty(1, 3, 224, 224, device="meta"), measure=False).macs
    assert macs / 1e9 == pytest.approx(gmacs, rel=5e-3)
