"""ToMe (spec E1, G18): matching against a plain reading of the paper, and twins of current timm ViTs."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import ParallelScalingBlock
from torch import nn

from sparing.vision.tome import TokenMergingViT, match_tokens, merge_schedule
from vision.small_hosts import HOSTS, WIDTH, images_for, small_host


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def groups_by_loops(metric, r, protected):
    """The paper's steps, one token at a time: list of groups of original positions, in output order."""
    count = metric.shape[0]
    cosine = F.normalize(metric.double(), dim=-1) @ F.normalize(metric.double(), dim=-1).T
    a, b = range(0, count, 2), range(1, count, 2)
    best = {}
    for i in a:
        choices = [(cosine[i, j].item(), j) for j in b if j >= protected]
        if i >= protected and choices:
            best[i] = max(choices)
    r = min(r, (count - protected) // 2)
    going = sorted(best, key=lambda i: -best[i][0])[:r]
    kept = [i for i in a if i not in going]
    if not protected:
        kept.sort(key=lambda i: -best[i][0])
    groups = {j: [j] for j in b}
    for i in going:
        groups[best[i][1]].append(i)
    order = list(range(min(protected, count)))
    order += [i for i in kept if i >= protected] + [j for j in b if j >= protected]
    return [sorted(groups.get(i, [i])) for i in order]


@pytest.mark.parametrize("tokens", [2, 3, 7, 12, 37])
@pytest.mark.parametrize("protected", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("r", [1, 4, 100])
def test_matching_is_the_papers_for_any_number_of_prefix_tokens(tokens, protected, r):
    if protected >= tokens:
        return
    metric, x = draw(2, tokens, 8), draw(2, tokens, 3, seed=1)
    size = torch.rand(2, tokens, 1, generator=torch.Generator().manual_seed(2)) + 0.5
    merge = match_tokens(metric, r, protected=protected)
    if min(r, (tokens - protected) // 2) <= 0:
        assert merge is None
        return
    merged, sizes = merge.mean(x, size)
    for b in range(2):
        groups = groups_by_loops(metric[b], r, protected)
        assert merged.shape[1] == len(groups) == tokens - min(r, (tokens - protected) // 2)
        for position, group in enumerate(groups):
            weight = size[b, group]
            torch.testing.assert_close(merged[b, position], (x[b, group] * weight).sum(0) / weight.sum())
            torch.testing.assert_close(sizes[b, position, 0], weight.sum())
            assert (merge.destination()[b, group] == position).all()
    torch.testing.assert_close(merge.unmerge(merged)[:, :protected], x[:, :protected])


def test_a_distillation_token_without_a_class_token_is_the_second_token_and_the_first_may_merge():
    metric, x = draw(1, 11, 8, seed=4), draw(1, 11, 3, seed=1)
    merged_first = set()
    for r in range(1, 8):
        merge = match_tokens(metric, r, protected=2, first_is_free=True)
        count = min(r, 5)  # one token is protected: (11 - 1) // 2
        cosine = F.normalize(metric[0].double(), dim=-1) @ F.normalize(metric[0].double(), dim=-1).T
        cosine[:, 1] = float("-inf")
        best = {i: max((cosine[i, j].item(), j) for j in range(1, 11, 2)) for i in range(0, 11, 2)}
        order = sorted(best, key=lambda i: -best[i][0])
        going, kept = order[:count], order[count:]
        groups = {j: [j] + [i for i in going if best[i][1] == j] for j in range(1, 11, 2)}
        expected = [[kept[0]], groups[1], *([i] for i in kept[1:]), *(groups[j] for j in range(3, 11, 2))]
        merged, _ = merge.mean(x, torch.ones(1, 11, 1))
        torch.testing.assert_close(merged[0], torch.stack([x[0, group].mean(0) for group in expected]))
        assert groups[1] == [1]
        merged_first.add(0 in going)
    assert merged_first == {False, True}


def test_similarity_is_float32_and_ignores_length():
    metric = draw(1, 20, 16)
    scaled = metric * torch.rand(1, 20, 1, generator=torch.Generator().manual_seed(3)).add(0.1) * 1e3
    a, b = match_tokens(metric, 5), match_tokens(scaled, 5)
    assert torch.equal(a.destination(), b.destination())
    half = draw(4, 200, 16, seed=1).bfloat16()
    assert torch.equal(match_tokens(half, 60).destination(), match_tokens(half.float(), 60).destination())


def test_a_half_precision_mean_counts_beyond_256():
    x = torch.ones(1, 700, 4, dtype=torch.bfloat16)
    size = torch.ones(1, 700, 1)
    while x.shape[1] > 2:
        merge = match_tokens(draw(1, x.shape[1], 4), x.shape[1])
        x, size = merge.mean(x, size)
    assert size.sum() == 700
    assert x.dtype == torch.bfloat16
    assert x.eq(1).all()


def test_deterministic_algorithms_give_the_same_merge():
    x = draw(2, 31, 4)
    merge = match_tokens(draw(2, 31, 8, seed=1), 9, protected=2)
    expected = merge.sum(x)
    torch.use_deterministic_algorithms(True)
    try:
        torch.testing.assert_close(merge.sum(x), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("r", "rates"),
    [
        (3, [3] * 5),
        ([4, 0, 2], [4, 0, 2, 0, 0]),
        ((4, 0.0), [4] * 5),
        ((4, 1.0), [0, 2, 4, 6, 8]),
        ((4, -1.0), [8, 6, 4, 2, 0]),
        ((5, 0.3), [3, 4, 5, 6, 7]),
    ],
)
def test_schedules(r, rates):
    assert merge_schedule(r, 5) == rates


@pytest.mark.parametrize(
    ("r", "message"),
    [
        (-1, "negative"),
        ([1] * 6, "lists 6 blocks, the host has 5"),
        ((4, 2.0), "2.0"),
        ((12, 1), r"write \(12, 1\.0\) for a rate and its inflection, or \[12, 1\]"),
        ("x", "'x'"),
    ],
)
def test_schedules_that_cannot_be_are_refused(r, message):
    with pytest.raises(ValueError, match=message):
        merge_schedule(r, 5)


def test_a_tuple_of_two_ints_reads_two_ways_for_two_blocks_too():
    with pytest.raises(ValueError, match=r"write \(12, 1\.0\) for a rate"):
        merge_schedule((12, 1), 2)
    assert merge_schedule([12, 1], 2) == [12, 1]
    assert merge_schedule((12, 1.0), 2) == [0, 24]


@pytest.mark.parametrize("key", HOSTS)
def test_without_merging_the_twin_computes_what_its_host_computes(key):
    host = small_host(key)
    twin = TokenMergingViT.from_host(host, r=0).eval()
    images = images_for(host)
    assert twin.status == "exact"
    torch.testing.assert_close(twin(images), host(images), atol=1e-5, rtol=0)
    torch.testing.assert_close(twin.forward_features(images), host.forward_features(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("key", ["deit", "deit_distilled", "dinov2_reg4", "norms", "siglip"])
def test_blocks_merge_between_attention_and_mlp(key, proportional):
    host = small_host(key)
    twin = TokenMergingViT.from_host(host, r=[5, 4], proportional_attention=proportional).eval()
    images, protected = images_for(host), host.num_prefix_tokens
    tokens, size = twin.norm_pre(twin._pos_embed(twin.patch_embed(images))), None
    for block, r in zip(host.blocks, [5, 4, 0, 0, 0, 0], strict=True):
        attn, stream = block.attn, block.norm1(tokens)
        q, k, v = attn.qkv(stream).unflatten(2, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(q), attn.k_norm(k)
        logits = q @ k.transpose(-1, -2) * attn.scale
        if proportional and size is not None:
            logits = logits + size.log()[:, None, None, :, 0]
        out = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        tokens = tokens + block.ls1(attn.proj(attn.norm(out)))
        merge = match_tokens(k.mean(1), r, protected=protected)
        if merge is not None:
            tokens, size = merge.mean(tokens, torch.ones_like(tokens[..., :1]) if size is None else size)
        tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
    found = twin.merged_features(images)
    torch.testing.assert_close(found.tokens, twin.norm(tokens), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.size, size)


@pytest.mark.parametrize("key", ["deit", "deit_distilled", "dinov2_reg4", "siglip", "so150m", "so150m_map", "prr"])
def test_features_have_the_hosts_shape_and_heads_weigh_by_size(key):
    host = small_host(key)
    twin = TokenMergingViT.from_host(host, r=4).eval()
    images = images_for(host)
    features, merged = twin.forward_features(images), twin.merged_features(images)
    assert features.shape == host.forward_features(images).shape
    torch.testing.assert_close(twin.forward_head(features), twin(images), atol=1e-5, rtol=1e-5)
    kept = host.num_prefix_tokens + 49 - 24
    assert merged.tokens.shape == (2, kept, WIDTH)
    torch.testing.assert_close(merged.source().sum(-1, keepdim=True).float(), merged.size)
    assert merged.source().sum(1).eq(1).all()  # every original token is in exactly one group
    prefix = host.num_prefix_tokens
    assert merged.size[:, :prefix].eq(1).all()
    assert torch.equal(merged.destination[:, :prefix], torch.arange(prefix).expand(2, prefix))
    if key == "so150m":
        mean = (merged.tokens * merged.size)[:, prefix:].sum(1) / 49
        torch.testing.assert_close(twin(images), twin.head(twin.fc_norm(mean)), atol=1e-5, rtol=1e-5)


def test_equal_tokens_merge_without_a_trace():
    host = small_host("so150m", pos_embed="none", reg_tokens=0)
    twin = TokenMergingViT.from_host(host, r=[8]).eval()
    constant = torch.full((1, 3, 112, 112), 0.3)
    torch.testing.assert_close(twin(constant), host(constant), atol=1e-5, rtol=1e-5)
    plain = TokenMergingViT.from_host(host, r=[8], proportional_attention=False).eval()
    torch.testing.assert_close(plain(constant), host(constant), atol=1e-5, rtol=1e-5)


def test_intermediates_keep_the_hosts_shapes():
    host = small_host("dinov2_reg4")
    twin = TokenMergingViT.from_host(host, r=4).eval()
    images = images_for(host)
    for arguments in ({}, {"return_prefix_tokens": True, "norm": True}, {"output_fmt": "NLC", "stop_early": True}):
        found = twin.forward_intermediates(images, [0, 3], intermediates_only=True, **arguments)
        expected = host.forward_intermediates(images, [0, 3], intermediates_only=True, **arguments)
        flat = [t for item in found for t in (item if isinstance(item, tuple) else (item,))]
        assert [t.shape for t in flat] == [
            t.shape for item in expected for t in (item if isinstance(item, tuple) else (item,))
        ]
    last, maps = twin.forward_intermediates(images, 1, norm=True, output_fmt="NLC")
    torch.testing.assert_close(last, twin.forward_features(images))
    torch.testing.assert_close(maps[0], last[:, 5:])


def test_the_rate_is_a_knob_at_run_time():
    twin = TokenMergingViT.from_host(small_host("deit"), r=0).eval()
    images = images_for(twin)
    exact = twin(images)
    twin.rates = (3, 1.0)
    assert (twin.status, twin.rates, twin.knobs["r"]) == ("training-free", [0, 1, 2, 3, 4, 6], [0, 1, 2, 3, 4, 6])
    assert twin.merged_features(images).tokens.shape[1] == 50 - 16
    assert not torch.allclose(twin(images), exact, atol=1e-4)
    twin.rates = 0
    torch.testing.assert_close(twin(images), exact)


def test_more_merges_than_tokens_stop_at_the_protected_ones():
    twin = TokenMergingViT.from_host(small_host("dinov2_reg4"), r=1000).eval()
    assert twin.merged_features(images_for(twin)).tokens.shape[1] == 5 + 1


def test_gradient_checkpointing_gives_equal_gradients():
    twin = TokenMergingViT.from_host(small_host("deit"), r=4)
    images = images_for(twin)
    found = []
    for enabled in (False, True):
        twin.zero_grad()
        twin.set_grad_checkpointing(enabled)
        twin(images).square().sum().backward()
        found.append({n: p.grad.clone() for n, p in twin.named_parameters()})
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs(dtype):
    twin = TokenMergingViT.from_host(small_host("dinov2_reg4"), r=4).eval()
    images = images_for(twin)
    full = twin(images)
    out = twin.to(dtype)(images.to(dtype))
    assert out.dtype == dtype
    merged = twin.merged_features(images.to(dtype))
    assert (merged.tokens.dtype, merged.size.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(out.float(), full, atol=0.3, rtol=0.3)


def test_unsupported_hosts_are_refused_by_name():
    blocks = {"depth": 2, "embed_dim": 48, "num_heads": 3, "block_fn": ParallelScalingBlock}
    host = timm.create_model("vit_small_patch16_224", **blocks)
    with pytest.raises(NotImplementedError, match="vit_small_patch16_224 is a ParallelScalingBlock"):
        TokenMergingViT.from_host(host)
    with pytest.raises(TypeError, match="Linear"):
        TokenMergingViT.from_host(nn.Linear(2, 2))
    assert TokenMergingViT.why_not(small_host("norms")) == []
