"""STViT's computation: spec G1 (golden), G3, G5, G15 and the rules for prefix tokens and open knobs."""

import copy

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock
from torch import nn

from sparing.vision.semantic_trace import trace
from sparing.vision.split_attention import cross_block
from sparing.vision.stvit import SemanticTokenViT
from vision.small_hosts import HOSTS, WIDTH, images_for, randomized, small_host

STANDARD = [key for key in HOSTS if key != "dynamic"]


def twin_of(host, **knobs):
    """A twin whose new parameters are random too."""
    twin = SemanticTokenViT.from_host(host, **{"num_tokens": 9, **knobs}).eval()
    fresh = {k: v for k, v in twin.state_dict().items() if k.startswith(("center_pooling", "global_centers"))}
    holder = nn.ParameterDict({k.replace(".", "/"): nn.Parameter(v) for k, v in fresh.items()})
    twin.load_state_dict({k.replace("/", "."): v for k, v in randomized(holder).items()}, strict=False)
    return twin


@pytest.mark.parametrize("key", HOSTS)
def test_all_tokens_compute_what_the_host_computes(key):
    host = small_host(key)
    twin = SemanticTokenViT.from_host(host, num_tokens="all").eval()
    images = images_for(host)
    assert twin.status == "exact"
    torch.testing.assert_close(twin(images), host(images), atol=1e-5, rtol=0)
    torch.testing.assert_close(twin.forward_features(images), host.forward_features(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("key", STANDARD)
def test_the_cross_block_with_one_stream_is_timms_block(key):
    host = small_host(key)
    tokens = host.forward_intermediates(images_for(host), indices=[1], output_fmt="NLC", intermediates_only=True)[0]
    for block in host.blocks[2:4]:
        torch.testing.assert_close(cross_block(block, tokens, tokens), block(tokens), atol=2e-6, rtol=2e-6)


def test_the_cross_block_honours_the_gate():
    host = small_host("deit")
    attn = host.blocks[0].attn
    attn.gate = nn.Linear(WIDTH, attn.attn_dim)
    tokens = torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(cross_block(host.blocks[0], tokens, tokens), host.blocks[0](tokens), atol=2e-6, rtol=0)
    attn.gate.bias.data -= 100.0  # a closed gate lets nothing through
    out = cross_block(host.blocks[0], tokens, torch.randn(2, 9, WIDTH))
    residual = tokens + attn.proj.bias
    torch.testing.assert_close(out, residual + host.blocks[0].mlp(host.blocks[0].norm2(residual)), atol=2e-6, rtol=0)


def test_the_cross_block_uses_a_qkv_layer_that_was_wrapped():
    class LowRank(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.extra = base, nn.Linear(WIDTH, 3 * WIDTH)

        def forward(self, x):
            return self.base(x) + self.extra(x)

    block = small_host("deit").blocks[0]
    block.attn.qkv = LowRank(block.attn.qkv)
    tokens = torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(cross_block(block, tokens, tokens), block(tokens), atol=2e-6, rtol=0)


@pytest.mark.parametrize("key", STANDARD)
@pytest.mark.parametrize("base_depth", [1, 3])
def test_the_base_module_equals_timms_layers(key, base_depth):
    host = small_host(key)
    images = images_for(host)
    keep = True if host.num_prefix_tokens else None
    twin = twin_of(host, base_depth=base_depth, keep_prefix=keep)
    indices = list(range(base_depth))
    expected = host.forward_intermediates(images, indices=indices, intermediates_only=True)
    found = twin.forward_intermediates(images, indices=indices, intermediates_only=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tokens", [1, 4, 9, (2, 5), None])
def test_the_base_module_equals_timms_for_every_token_count(tokens):
    host = small_host("deit")
    images = images_for(host)
    twin = SemanticTokenViT.from_host(host, num_tokens=tokens)
    expected = host.forward_intermediates(images, indices=[1], intermediates_only=True)[0]
    found = twin.forward_intermediates(images, indices=[1], intermediates_only=True)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("key", "keep"), [("deit", True), ("deit", False), ("dinov2_reg4", True), ("siglip", None)])
@pytest.mark.parametrize("generation_depth", [1, 2, 3])
def test_the_generation_is_the_papers_equations(key, keep, generation_depth):
    host = small_host(key)
    twin = twin_of(host, keep_prefix=keep, base_depth=2, generation_depth=generation_depth)
    images = images_for(host)
    x = twin.forward_intermediates(images, [1], output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True)[0]
    image, prefix = x if isinstance(x, tuple) else (x, x[:, :0])
    semantic = twin.center_pooling(image, (7, 7))
    blocks = twin.blocks[2:]
    out = cross_block(blocks[0], torch.cat([prefix, semantic], 1), torch.cat([prefix, image], 1))
    for step in range(1, generation_depth):
        prefix, semantic = out.split([prefix.shape[1], 9], dim=1)
        query = semantic + twin.global_centers if step == 1 else semantic
        out = cross_block(blocks[step], torch.cat([prefix, query], 1), torch.cat([prefix, semantic, image], 1))
    for block in blocks[generation_depth:]:
        out = block(out)
    torch.testing.assert_close(twin.forward_features(images), twin.norm(out), atol=1e-5, rtol=1e-5)
    assert (twin.global_centers is None) == (generation_depth == 1)


@pytest.mark.parametrize("pooling", ["weighted", "avg", "max"])
@pytest.mark.parametrize("inter_window", [False, True])
def test_the_trace_is_the_forward_pass(pooling, inter_window):
    host = small_host("dinov2_reg4")
    twin = twin_of(host, pooling=pooling, inter_window=inter_window)
    images = images_for(host)
    steps = trace(twin, images)
    torch.testing.assert_close(twin.norm(steps.tokens), twin.forward_features(images), atol=1e-5, rtol=1e-5)
    assert [m.shape for m in twin.attention_maps(images)] == [(2, 3, 14, 54), (2, 3, 14, 63)]
    assert (steps.pool_weights is None) == (pooling != "weighted")
    for maps in steps.attention:
        torch.testing.assert_close(maps.sum(-1), torch.ones(2, 3, 14))
    value = steps.attention[0] @ _values(twin, steps.base)
    first = twin.blocks[2]
    query = torch.cat([steps.base[:, :5], steps.centers], 1)
    z = query + first.ls1(first.attn.proj(value.transpose(1, 2).flatten(2)))
    z = z + first.ls2(first.mlp(first.norm2(z)))
    torch.testing.assert_close(z[:, 5:], steps.semantic[0], atol=1e-5, rtol=1e-5)
    regions = twin.gathered_regions(images)
    assert regions.shape == (2, 9, 7, 7)
    torch.testing.assert_close(regions.sum((2, 3)), torch.ones(2, 9))


def _values(twin, tokens):
    block = twin.blocks[2]
    return block.attn.qkv(block.norm1(tokens)).unflatten(2, (3, 3, 16))[:, :, 2].transpose(1, 2)


@pytest.mark.parametrize(
    ("key", "overrides", "kept"),
    [
        ("deit", {}, 1),
        ("deit", {"global_pool": "avg"}, 0),
        ("deit", {"global_pool": ""}, 1),
        ("deit_distilled", {}, 2),
        ("dinov2_reg4", {}, 5),
        ("so150m", {}, 0),
        ("so150m_map", {}, 0),
        ("siglip", {}, 0),
        ("prr", {}, 1),
    ],
)
def test_prefix_tokens_stay_when_the_head_reads_them(key, overrides, kept):
    twin = SemanticTokenViT.from_host(small_host(key, **overrides), num_tokens=9)
    assert twin.num_prefix_tokens == kept
    assert twin.knobs["keep_prefix"] is (kept > 0)
    assert twin.forward_features(images_for(twin)).shape == (2, kept + 9, WIDTH)


@pytest.mark.parametrize(("key", "embeds"), [("deit", True), ("deit3", False), ("dinov2_reg4", False)])
def test_dropping_prefix_tokens_keeps_the_positions_of_the_image_tokens(key, embeds):
    host = small_host(key)
    twin = twin_of(host, keep_prefix=False)
    images = images_for(host)
    assert host.no_embed_class is not embeds
    expected = host.patch_embed(images) + host.pos_embed[:, host.num_prefix_tokens if embeds else 0 :]
    torch.testing.assert_close(twin.embed(images), expected)
    tokens = twin.forward_features(images)
    assert tokens.shape == (2, 9, WIDTH)
    torch.testing.assert_close(twin(images), twin.head(tokens.mean(1)), atol=1e-5, rtol=1e-5)


def test_dropping_what_the_head_reads_one_by_one_is_refused():
    for key in ("deit_distilled", "prr"):
        with pytest.raises(ValueError, match="reads its prefix tokens"):
            SemanticTokenViT.from_host(small_host(key), num_tokens=9, keep_prefix=False)
    with pytest.raises(ValueError, match="base_depth 99 and generation_depth 2 do not fit"):
        SemanticTokenViT.from_host(small_host("deit"), num_tokens="all", base_depth=99)
    with pytest.raises(ValueError, match="num_tokens='all' is the host's own computation"):
        SemanticTokenViT.from_host(small_host("deit"), num_tokens="all", keep_prefix=False)


def test_defaults_are_a_third_of_the_layers_and_four_centers_for_fourteen_tokens():
    def knobs(**options):
        host = timm.create_model("vit_tiny_patch16_224", **options, device="meta")
        return SemanticTokenViT(host).knobs

    assert (knobs()["base_depth"], knobs()["num_tokens"]) == (4, [4, 4])
    assert knobs(depth=24)["base_depth"] == 8
    assert knobs(img_size=(384, 224))["num_tokens"] == [7, 4]


def test_layer_scale_is_kept_and_never_inserted():
    plain, scaled = small_host("deit"), small_host("deit3")
    assert not [n for n in SemanticTokenViT.from_host(plain, num_tokens=9).state_dict() if "ls1" in n]
    twin = SemanticTokenViT.from_host(scaled, num_tokens=9)
    for name, tensor in scaled.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[name], tensor)


def test_drop_path_and_dropout_act_in_the_generation_when_training():
    host = small_host("deit", drop_path_rate=0.5, attn_drop_rate=0.3, depth=3)
    twin = twin_of(host, base_depth=0).train()
    images = images_for(host)
    assert not torch.allclose(twin(images), twin(images))
    for block in twin.blocks:
        block.drop_path1 = block.drop_path2 = DropPath(1.0 - 1e-9)
    tokens = twin.embed(images)
    expected = twin.center_pooling(tokens[:, 1:], (7, 7)) + twin.global_centers
    torch.testing.assert_close(twin.forward_features(images)[:, 1:], twin.norm(expected), atol=1e-5, rtol=1e-5)


def test_the_cross_block_honours_the_dropouts_of_attention():
    block = small_host("deit", attn_drop_rate=0.5).blocks[0].train()
    query, keys = torch.randn(2, 5, WIDTH), torch.randn(2, 9, WIDTH)
    assert not torch.allclose(cross_block(block, query, keys), cross_block(block, query, keys))
    torch.testing.assert_close(cross_block(block.eval(), query, keys), cross_block(block, query, keys))
    block.attn.proj_drop = nn.Dropout(1.0).train()
    torch.testing.assert_close(cross_block(block, query, keys), query + block.mlp(block.norm2(query)))


def test_the_host_stays_as_it_was_and_shares_nothing():
    host = small_host("clip").train()
    before = copy.deepcopy(host.state_dict())
    twin = SemanticTokenViT.from_host(host, num_tokens=9, keep_prefix=False)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert host.training
    assert twin.training
    assert host.global_pool == "token"
    assert host.num_prefix_tokens == 1
    assert {p.data_ptr() for p in host.parameters()}.isdisjoint(p.data_ptr() for p in twin.parameters())
    for name, tensor in host.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"num_tokens": 10}, "num_tokens 10 is not a perfect square"),
        ({"num_tokens": 64}, "8x8 semantic tokens do not fit a grid of 7x7"),
        ({"num_tokens": (3, 8)}, "3x8 semantic tokens do not fit a grid of 7x7"),
        ({"num_tokens": 0}, "num_tokens 0 is not a perfect square"),
        ({"num_tokens": "some"}, "'some': a square number"),
        ({"base_depth": 4, "generation_depth": 2}, r"base_depth 4 \+ generation_depth 2 .* host's 6"),
        ({"base_depth": -1}, "base_depth -1"),
        ({"generation_depth": 0}, "generation_depth 0"),
        ({"pooling": "mean"}, "pooling 'mean' is unknown"),
    ],
)
def test_knobs_that_do_not_fit_are_refused_with_their_numbers(knobs, message):
    with pytest.raises(ValueError, match=message):
        SemanticTokenViT.from_host(small_host("deit"), **knobs)


@pytest.mark.parametrize("knobs", [{"generation_depth": 99}, {"base_depth": 5, "generation_depth": 2}])
def test_numbers_without_effect_are_refused_too_when_they_do_not_fit(knobs):
    with pytest.raises(ValueError, match=r"do not fit the host's 6 layers, even where num_tokens='all'"):
        SemanticTokenViT.from_host(small_host("deit", depth=6), num_tokens="all", **knobs)


@pytest.mark.parametrize("depth", [1, 2, 3, 6])
def test_all_tokens_can_be_kept_of_a_host_of_any_depth(depth):
    assert SemanticTokenViT.from_host(small_host("deit", depth=depth), num_tokens="all").status == "exact"


def test_images_that_do_not_fit_are_refused_with_their_numbers():
    twin = SemanticTokenViT.from_host(small_host("deit"), num_tokens=9)
    with pytest.raises(ValueError, match="fixed to images of 112x112, got 96x112"):
        twin(torch.randn(1, 3, 96, 112))
    with pytest.raises(ValueError, match="fixed to images of 112x112, got 112x96"):
        twin(torch.randn(1, 3, 112, 96))
    with pytest.raises(ValueError, match=r"takes images \(batch, 3, height, width\), got shape \(1, 1, 112, 112\)"):
        twin(torch.randn(1, 1, 112, 112))
    dynamic = SemanticTokenViT.from_host(small_host("dynamic"), num_tokens=9)
    with pytest.raises(ValueError, match="100x112 is not a multiple of the patch size 16x16"):
        dynamic(torch.randn(1, 3, 100, 112))
    with pytest.raises(ValueError, match="3 centers do not fit an axis of 2 tokens"):
        dynamic(torch.randn(1, 3, 32, 112))


@pytest.mark.parametrize("block", [ResPostBlock, ParallelScalingBlock, ParallelThingsBlock])
def test_unsupported_blocks_are_refused_by_class_and_model(block):
    host = timm.create_model("vit_small_patch16_224", depth=3, embed_dim=48, num_heads=3, block_fn=block)
    with pytest.raises(NotImplementedError, match=f"vit_small_patch16_224 is a {block.__name__}"):
        SemanticTokenViT.from_host(host)
    assert block.__name__ in SemanticTokenViT.why_not(host)[0]


def test_other_hosts_are_refused_by_name():
    eva = timm.create_model("eva02_tiny_patch14_224", depth=2)
    with pytest.raises(NotImplementedError, match="eva02_tiny_patch14_224"):
        SemanticTokenViT.from_host(eva)
    with pytest.raises(TypeError, match="ResNet"):
        SemanticTokenViT.from_host(timm.create_model("resnet18"))
    with pytest.raises(TypeError, match=r"SemanticTokenViT .* has its own forward_features"):
        SemanticTokenViT.from_host(SemanticTokenViT.from_host(small_host("deit"), num_tokens=9))
    dropping = small_host("deit", patch_drop_rate=0.2)
    with pytest.raises(ValueError, match=r"patch_drop_rate 0\.2"):
        SemanticTokenViT.from_host(dropping, num_tokens=9)
    assert SemanticTokenViT.why_not(small_host("deit")) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_and_stays_near(dtype):
    host = small_host("dinov2_reg4")
    twin = twin_of(host)
    images = images_for(host)
    full = twin(images)
    half = SemanticTokenViT.from_host(host.to(dtype), num_tokens=9).eval()
    half.load_state_dict(twin.state_dict())
    out = half(images.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), full, atol=0.1, rtol=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(twin(images).float(), full, atol=0.1, rtol=0.1)


def test_one_image_alone_is_the_image_in_a_batch():
    twin = twin_of(small_host("clip"))
    images = images_for(twin, batch=3)
    torch.testing.assert_close(twin(images[1:2]), twin(images)[1:2], atol=1e-5, rtol=1e-5)


def test_a_host_that_was_compiled_in_place_gives_its_modules_and_not_its_compiled_call():
    host = small_host("deit")
    images = images_for(host)
    expected = SemanticTokenViT.from_host(host, num_tokens=9).eval()
    host.compile(backend="eager")
    for twin in (SemanticTokenViT.from_host(host, num_tokens=9).eval(), SemanticTokenViT(host, num_tokens=9).eval()):
        twin.load_state_dict(expected.state_dict())
        torch.testing.assert_close(twin(images), expected(images))
