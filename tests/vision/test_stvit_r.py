"""STViT-R on Swin: the published arithmetic under every option, any image size, weights of hosts and of published
files.
"""

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import sparing
from sparing.kernels import use_backend
from sparing.vision.dumbbell import RecoveryBlock
from sparing.vision.semantic_windows import WindowGrid, pool_centers
from sparing.vision.stvit_r import STViTR, load_reference
from vision.stvit_r_oracle import classifier_stage, dense_stage

SMALL = {"embed_dim": 8, "depths": (1, 1, 6, 1), "num_heads": (1, 2, 4, 4), "mlp_ratio": 2.0, "num_classes": 5}


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights far from their initialisation, so that no branch is silent."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
            if "running_var" in name:
                value.copy_(1 + 0.3 * noise.abs())
            elif name.endswith("norm1.bias"):
                value.copy_(noise)  # what a padded key is made of: large, so that a wrong padding shows
            elif value.ndim == 1:
                value.copy_((0.1 if name.endswith("bias") else 1.0) + 0.2 * noise)
            else:
                value.copy_(noise * 1.5 / value[0].numel() ** 0.5)
    return model.eval()


def random(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def run_unit(model: STViTR, x: torch.Tensor, unit: int) -> torch.Tensor:
    stage = model.layers[2]
    blocks = stage.blocks[6 * unit + 1 : 6 * unit + 6]
    semantic = blocks[0](x)
    semantic = blocks[1](x, semantic, stage.semantic_token2 if unit == 0 else None)
    semantic = blocks[3](blocks[2](semantic))
    return blocks[4](x, semantic)


OPTIONS = [
    {},
    {"use_global": True},
    {"shortcut": True},
    {"use_conv_pos": True},
    {"relative_pos": True},
    {"sample_window_size": 4},
    {"sample_window_size": 4, "use_global": True, "shortcut": True, "use_conv_pos": True, "relative_pos": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "published")
@torch.no_grad()
def test_classifier_units_equal_the_written_out_reference_under_every_option(options):
    model = randomise(STViTR(**{**SMALL, "depths": (1, 1, 12, 1)}, **options).double())
    config = {
        "heads": 4, "samples": 3, "shortcut": False, "use_global": False, "use_conv_pos": False, "relative_pos": False,
        **options, **({"samples": 4} if "sample_window_size" in options else {}),
    }  # fmt: skip
    x = random(2, 14, 14, 32, dtype=torch.float64)
    for unit in (0, 1):
        expected = classifier_stage(model.state_dict(), x, unit=unit, config=config)
        torch.testing.assert_close(run_unit(model, x, unit), expected, atol=1e-9, rtol=0)


# maps with no pad, one pad, both pads, less than one window; and one larger than the recovery window (gathered form)
MAPS = [(14, 14), (14, 9), (9, 14), (8, 10), (3, 5), (7, 7), (16, 36)]


@pytest.mark.parametrize("mode", ["reference", "exact", "none"])
@pytest.mark.parametrize("size", MAPS, ids=str)
@torch.no_grad()
def test_dense_units_equal_unfold_then_project_in_every_mask_mode(size, mode):
    windows = (14, 21, 9) if size == (16, 36) else (14, 21, 27)
    model = STViTR(**SMALL, dense=True, mask_mode=mode, key_windows=windows, use_conv_pos=True).double()
    randomise(model)
    config = {
        "heads": 4, "samples": 3, "shortcut": True, "use_conv_pos": True, "mask_mode": mode, "key_windows": windows,
    }  # fmt: skip
    x = random(2, *size, 32, dtype=torch.float64)
    expected = dense_stage(model.state_dict(), x, unit=0, config=config)
    # 1e-6: the written-out -1000 is exact in float64, the mask here leaves masked keys out altogether
    torch.testing.assert_close(run_unit(model, x, 0), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", ["reference", "exact", "none"])
@pytest.mark.parametrize("size", MAPS, ids=str)
@torch.no_grad()
def test_recovery_over_the_whole_semantic_map_equals_recovery_over_gathered_windows(size, mode):
    model = randomise(STViTR(**SMALL, dense=True, mask_mode=mode, key_windows=(14, 21, 9)).double())
    block = model.layers[2].blocks[5]
    assert isinstance(block, RecoveryBlock)
    x = random(2, *size, 32, dtype=torch.float64)
    grid = WindowGrid(*size, window=7, samples=3)
    semantic = random(2, *grid.semantic_size, 32, seed=1, dtype=torch.float64)
    queries, keys = block.project_queries(x), block.project_keys(semantic)
    whole, gathered = block._attend_map(queries, keys, grid), block._attend_windows(queries, keys, grid)
    # 1e-6: the bias log(count) is made in float32
    torch.testing.assert_close(whole, gathered, atol=1e-6, rtol=0)


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 7])
def test_centres_are_adaptive_max_pools_of_each_window(samples):
    grid = WindowGrid(14, 21, window=7, samples=samples)
    x = random(2, 14, 21, 5)
    windows = x.view(2, 2, 7, 3, 7, 5).permute(0, 1, 3, 5, 2, 4).flatten(0, 2)
    pooled = torch.nn.functional.adaptive_max_pool2d(windows, samples)
    expected = pooled.view(2, 2, 3, 5, samples, samples).permute(0, 1, 4, 2, 5, 3).flatten(1, 2).flatten(2, 3)
    torch.testing.assert_close(pool_centers(x, grid), expected, atol=0, rtol=0)


# ---- G8: sizes and cost ----------------------------------------------------------------------------------------------


def gmacs(model: nn.Module, *shape: int) -> float:
    image = torch.empty(*shape, device="meta")
    with torch.no_grad(), use_backend("reference"), FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize(("size", "params", "limit"), [("small", 49_625_518, 5.80), ("base", 87_812_336, 10.23)])
def test_g8_classifier_parameters_and_flops(size, params, limit):
    name = f"stvit_r_swin_{size}_patch4_window7_224"
    model = sparing.create_model(name, device="meta").eval()
    assert sum(p.numel() for p in model.parameters()) == params
    assert limit * 0.95 < gmacs(model, 1, 3, 224, 224) <= limit


@pytest.mark.parametrize(("size", "params", "limit"), [("small", 48_857_862, 131), ("base", 86_789_128, 226)])
def test_g8_dense_parameters_and_flops_at_800x1280(size, params, limit):
    model = sparing.create_model(f"stvit_r_swin_{size}_patch4_window7_224", dense=True, device="meta").eval()
    assert sum(p.numel() for p in model.parameters()) == params
    assert limit * 0.97 < gmacs(model, 1, 3, 800, 1280) <= limit


# ---- G9, G10: any size, any batch, any dtype -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 224), (121, 152)], ids=str)
@torch.no_grad()
def test_g9_dense_maps_halve_with_ceil_and_do_not_depend_on_the_batch(size):
    model = randomise(STViTR(**SMALL, dense=True).double())  # float64: what is left is not rounding
    images = random(3, 3, *size, dtype=torch.float64)
    maps = model(images)
    height, width = -(-size[0] // 4), -(-size[1] // 4)
    for level, features in enumerate(maps):
        assert features.shape == (3, 8 * 2**level, height, width)
        height, width = -(-height // 2), -(-width // 2)
    for level, alone in enumerate(model(images[1:2])):
        torch.testing.assert_close(alone, maps[level][1:2], atol=1e-10, rtol=0)


@pytest.mark.parametrize("size", [(3, 5), (8, 10), (14, 14)], ids=str)
@torch.no_grad()
def test_g10_exact_masks_hide_what_padding_holds(size, monkeypatch):
    model = randomise(STViTR(**SMALL, dense=True, mask_mode="exact", key_windows=(14, 21, 9)))
    x = random(1, *size, 32)
    before = run_unit(model, x, 0)
    for block in model.layers[2].blocks:
        if hasattr(block, "padding_keys"):
            monkeypatch.setattr(block, "padding_keys", lambda: 100 * random(64, seed=7))
    torch.testing.assert_close(run_unit(model, x, 0), before, atol=0, rtol=0)
    other = randomise(STViTR(**SMALL, dense=True, mask_mode="none", key_windows=(14, 21, 9)))
    unmasked = run_unit(other, x, 0)
    for block in other.layers[2].blocks:
        if hasattr(block, "padding_keys"):
            monkeypatch.setattr(block, "padding_keys", lambda: 100 * random(64, seed=7))
    assert (run_unit(other, x, 0) - unmasked).abs().max() > 1e-2  # the noise does reach what is not masked


@pytest.mark.parametrize("mode", ["reference", "exact"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_g10_half_precision_has_no_nan_and_stays_near_float32(mode, dtype):
    model = randomise(STViTR(**SMALL, dense=True, mask_mode=mode))
    image = random(1, 3, 120, 152)
    full = model(image)
    for half, reference in zip(model.to(dtype)(image.to(dtype)), full):
        assert half.dtype == dtype
        assert torch.isfinite(half).all()
        # 0.15: relative to unit-variance features, a few bf16 roundings (2**-8) through 9 random blocks
        assert (half.float() - reference).norm() < 0.15 * reference.norm()


# ---- G11: published checkpoints --------------------------------------------------------------------------------------


def published(form: str, tmp_path):
    """A file as published: constants among the weights; classification with its yacs configuration, detection with
    heads.
    """
    source = randomise(STViTR(**SMALL, dense=form == "dense"), seed=3)
    state = {name: value.clone() for name, value in source.state_dict().items() if "num_batches" not in name}
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
    path = tmp_path / f"{form}.pth"
    if form == "dense":
        state = {f"backbone.{name}": value for name, value in state.items()}
        torch.save({"state_dict": {**state, "rpn_head.weight": torch.zeros(1)}, "meta": {"epoch": 36}}, path)
    else:
        state["layers.1.blocks.0.attn_mask"] = torch.zeros(4, 49, 49)
        torch.save({"model": state, "epoch": 299, "max_accuracy": 82.65}, path)
    return source, path


@pytest.mark.parametrize("file_form", ["classifier", "dense"])
@pytest.mark.parametrize("model_form", ["classifier", "dense"])
def test_g11_published_files_load_into_both_forms(file_form, model_form, tmp_path):
    source, path = published(file_form, tmp_path)
    model = load_reference(STViTR(**SMALL, dense=model_form == "dense"), path)
    own, theirs = model.state_dict(), source.state_dict()
    shared = [name for name in own if name in theirs and "num_batches" not in name]
    assert len(shared) > 100
    assert all(torch.equal(own[name], theirs[name]) for name in shared)
    assert model.status == ("trained" if file_form == model_form else "converted, not trained")


def test_g11_a_pickled_training_configuration_is_read_without_running_it(tmp_path):
    import sys
    import types

    source, path = published("classifier", tmp_path)
    module = types.ModuleType("yacs.config")
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    sys.modules["yacs"], sys.modules["yacs.config"] = types.ModuleType("yacs"), module
    try:
        content = {**torch.load(path, weights_only=True), "config": module.CfgNode(MODEL=module.CfgNode(NAME="swin"))}
        torch.save(content, path)
    finally:
        del sys.modules["yacs"], sys.modules["yacs.config"]
    model = load_reference(STViTR(**SMALL), path)
    assert torch.equal(model.head.weight, source.head.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layers.2.blocks.1.attn.q.weight"), "missing: layers.2.blocks.1.attn.q.weight"),
        (lambda s: s.update({"layers.2.blocks.9.norm1.bias": torch.zeros(3)}), "unexpected: layers.2.blocks.9"),
        (lambda s: s.update({"head.weight": torch.zeros(7, 64)}), "another shape: head.weight"),
        (lambda s: s.pop("patch_embed.proj.0.bn.running_mean"), "missing: patch_embed.proj.0.bn.running_mean"),
    ],
)
def test_g11_a_checkpoint_that_does_not_fit_is_refused_by_name(change, message):
    state = STViTR(**SMALL).state_dict()
    change(state)
    with pytest.raises(ValueError, match=message):
        load_reference(STViTR(**SMALL), state)


# ---- G12: from a timm host -------------------------------------------------------------------------------------------


def swin_host(**kwargs) -> nn.Module:
    sizes = {"embed_dim": 16, "depths": (2, 2, 6, 2), "num_heads": (1, 2, 4, 8), "num_classes": 7}
    return randomise(timm.models.SwinTransformer(**{**sizes, **kwargs}))


@torch.no_grad()
def test_g12_stages_before_the_units_are_bit_equal_to_timm():
    host = swin_host()
    before = {name: value.clone() for name, value in host.state_dict().items()}
    twin = STViTR.from_host(host).eval()
    image = random(2, 3, 224, 224)
    x, y = host.patch_embed(image), twin.patch_embed(image)
    assert torch.equal(x, y)
    for stage in (0, 1):
        x = host.layers[stage](x)
        y = twin.layers[stage](y)
        assert torch.equal(x, y)
        y = twin.layers[stage].downsample(y)
    x = host.layers[2].downsample(x)
    assert torch.equal(host.layers[2].blocks[0](x), twin.layers[2].blocks[0](y))
    assert all(torch.equal(before[name], value) for name, value in host.state_dict().items())


def test_g12_cross_blocks_take_the_rows_of_qkv_and_layer_scale_starts_at_one():
    host = swin_host()
    twin = STViTR.from_host(host)
    for index in range(1, 6):
        block, source = twin.layers[2].blocks[index], host.layers[2].blocks[index]
        q, kv = source.attn.qkv.weight.split([64, 128])
        assert torch.equal(block.attn.q.weight, q)
        assert torch.equal(block.attn.kv.weight, kv)
        assert torch.equal(block.mlp.fc2.weight, source.mlp.fc2.weight)
        assert (block.layer_scale_1 == 1).all()
        assert (block.layer_scale_2 == 1).all()
    assert torch.equal(twin.head.weight, host.head.fc.weight)
    assert twin.status == "converted, not trained"


@pytest.mark.parametrize("size", [224, 96])
@torch.no_grad()
def test_with_all_tokens_kept_the_twin_computes_what_its_host_computes(size):
    host = swin_host(img_size=size)
    twin = STViTR.from_host(host, sample_window_size="all").eval()
    assert twin.status == "exact"
    image = random(2, 3, size, size)
    assert torch.equal(twin(image), host(image))


@torch.no_grad()
def test_our_window_blocks_compute_what_timm_blocks_compute():
    host = swin_host()
    ours = STViTR.from_host(host, sample_window_size="all", window_blocks="sparing").eval()
    image = random(1, 3, 224, 224)
    torch.testing.assert_close(ours(image), host(image), atol=2e-4, rtol=1e-4)  # float32 through ten blocks


@torch.no_grad()
def test_a_saved_twin_comes_back_without_its_host(tmp_path):
    for dense in (False, True):
        twin = randomise(STViTR.from_host(swin_host(), dense=dense, mask_mode="reference"))
        twin.save_pretrained(tmp_path / str(dense))
        back = sparing.load(tmp_path / str(dense))
        image = random(1, 3, 224, 224)
        first, second = (m(image)[-1] if dense else m(image) for m in (twin, back))
        assert torch.equal(first, second)
        assert back.knobs == twin.knobs
        assert back.status == twin.status


# ---- contracts -------------------------------------------------------------------------------------------------------


def test_timm_creates_the_registered_names_and_features_only_is_the_dense_form():
    import sparing.vision.stvit_r  # noqa: F401

    model = timm.create_model("stvit_r_swin_tiny_patch4_window7_224", features_only=True, out_indices=(1, 3))
    assert model.feature_info.channels() == [192, 768]
    assert model.feature_info.reduction() == [8, 32]
    model = timm.create_model("stvit_r_swin_tiny_patch4_window7_224", num_classes=3)
    assert model.get_classifier().out_features == 3


@torch.no_grad()
def test_intermediates_are_maps_or_tokens_of_every_stage():
    model = randomise(STViTR(**SMALL))
    image = random(1, 3, 224, 224)
    last, maps = model.forward_intermediates(image, output_fmt="NCHW")
    assert [tuple(m.shape) for m in maps] == [(1, 8, 56, 56), (1, 16, 28, 28), (1, 32, 14, 14), (1, 64, 7, 7)]
    tokens = model.forward_intermediates(image, indices=[2], output_fmt="NLC", intermediates_only=True)
    assert torch.equal(tokens[0], maps[2].flatten(2).transpose(1, 2))
    assert torch.equal(model.forward_head(last), model(image))
    model.reset_classifier(11)
    assert model(image).shape == (1, 11)


def test_checkpointed_and_plain_backward_give_equal_gradients():
    gradients = []
    for checkpointed in (False, True):
        model = randomise(STViTR(**SMALL, dense=True)).eval()
        model.set_grad_checkpointing(checkpointed)
        sum(m.square().mean() for m in model(random(1, 3, 64, 96))).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, plain in gradients[0].items():
        assert plain is not None, name
        torch.testing.assert_close(gradients[1][name], plain, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_compiled_in_one_graph_equals_eager():
    model = randomise(STViTR(**SMALL, dense=True, mask_mode="reference"))
    image = random(1, 3, 64, 96)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(image)
    torch.testing.assert_close(compiled, model(image), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", [{"dense": True}, {}, {"dense": True, "window_blocks": "timm"}], ids=str)
@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "grad"])
def test_exported_graphs_hold_aten_nodes_only_and_equal_eager(form, gradients):
    model = randomise(STViTR(**SMALL, **form))
    image = random(1, 3, 64, 96) if form else random(1, 3, 224, 224)
    with torch.set_grad_enabled(gradients):
        program = torch.export.export(model, (image,))
        exported, eager = program.module()(image), model(image)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(name.startswith(("aten.", "<built-in function getitem>")) for name in called), called
    torch.testing.assert_close(exported, eager, atol=1e-5, rtol=1e-5)
    if gradients:
        maps = list(exported) if form else [exported]
        sum(m.square().mean() for m in maps).backward()
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("form", [{"dense": True}, {}], ids=str)
def test_onnx_export_is_equal_in_onnxruntime(form, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = randomise(STViTR(**SMALL, **form))
    image = random(1, 3, 64, 96) if form else random(1, 3, 224, 224)
    with torch.no_grad():
        torch.onnx.export(model, (image,), dynamo=True, verbose=False).save(tmp_path / "model.onnx")
        eager = model(image)
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    found = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    expected = eager if form else [eager]
    assert len(found) == len(expected)
    for out, want in zip(found, expected):
        torch.testing.assert_close(torch.from_numpy(out), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depths": (2, 2, 8, 2)}, "stage 2 has 8 blocks.*multiple of 6"),
        ({"sample_window_size": 8}, "8 semantic tokens a side do not fit a window of side 7"),
        ({"num_heads": (3, 2, 4, 4)}, "width 8 of stage 0 is no multiple of its 3 heads"),
        ({"mask_mode": "none!"}, "mask_mode='none!', accepted are"),
        ({"scope": "local"}, "scope='local', accepted are"),
        ({"out_indices": (4,), "dense": True}, "out_indices=.4,., accepted are levels 0 to 3"),
        ({"dense": True, "use_global": True}, "use_global needs scope='global'"),
        ({"dense": True, "key_windows": (5, 21, 27)}, "key windows .5, 21, 27. must cover"),
        ({"attn_drop_rate": 0.1}, "attn_drop_rate needs window_blocks='timm'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_with_their_numbers(arguments, message):
    with pytest.raises(ValueError, match=message):
        STViTR(**{**SMALL, **arguments})


def test_images_that_do_not_fit_are_refused_with_their_numbers():
    with pytest.raises(ValueError, match=r"31x40 pixels is too small.*at least 32"):
        STViTR(**SMALL, dense=True)(torch.zeros(1, 3, 31, 40))
    with pytest.raises(ValueError, match=r"expected images .batch, 3, height, width., got .1, 4, 64, 64."):
        STViTR(**SMALL, dense=True)(torch.zeros(1, 4, 64, 64))
    with pytest.raises(ValueError, match=r"map of the dumbbell stage is 16x16, not whole windows of 7"):
        STViTR(**SMALL)(torch.zeros(1, 3, 256, 256))
    with pytest.raises(ValueError, match=r"36 global centres were built for another image size.*12x12"):
        STViTR(**SMALL, use_global=True)(torch.zeros(1, 3, 448, 448))


@torch.no_grad()
def test_weights_of_the_hosts_own_computation_load_into_the_twin():
    host = swin_host()
    whole = STViTR.from_host(host, dense=True, sample_window_size="all")
    for level in range(4):  # trained since
        getattr(whole, f"norm{level}").weight.normal_()
    twin = STViTR.from_host(swin_host(), dense=True)
    twin.load_host_weights(whole.state_dict())
    expected = STViTR.from_host(host, dense=True)
    for level in range(4):
        getattr(expected, f"norm{level}").load_state_dict(getattr(whole, f"norm{level}").state_dict())
    state = expected.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in twin.state_dict().items())


@pytest.mark.parametrize(
    ("size", "where"), [("tiny", "no weights of this size were published"), ("small", "csncsn/STViT-R on the hub")]
)
@pytest.mark.parametrize("create", [sparing.create_model, timm.create_model], ids=["sparing", "timm"])
def test_pretrained_says_why_there_are_no_weights_and_what_to_do(create, size, where):
    with pytest.raises(ValueError, match=r"no weights of its own.*host_pretrained=True") as raised:
        create(f"stvit_r_swin_{size}_patch4_window7_224", pretrained=True)
    assert where in str(raised.value)
    assert ("load_reference" in str(raised.value)) == (size == "small")


def test_hosts_that_do_not_fit_are_refused_with_the_reason():
    with pytest.raises(TypeError, match="VisionTransformer is not timm's SwinTransformer"):
        STViTR.from_host(timm.create_model("vit_tiny_patch16_224"))
    odd = swin_host(depths=(1, 1, 4, 1))
    assert "stage 2 has 4 blocks" in STViTR.why_not(odd)[0]
    with pytest.raises(ValueError, match="stage 2 has 4 blocks"):
        STViTR.from_host(odd)
