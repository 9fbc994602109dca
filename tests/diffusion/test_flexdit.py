"""The class-conditional FlexDiT: its blocks, densities, costs and errors (specification, section 9)."""

import json

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusion.conftest import LAYOUT, build_flexdit, build_host, inputs
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

import sparing
from sparing.diffusion.blocks import FlexDiTBlock, depth_layout
from sparing.diffusion.density import DensityTable
from sparing.diffusion.flexdit import FlexDiTTransformer2DModel
from sparing.diffusion.flexdit_hosts import published_split

PLAIN = {"num_pooling": 0, "num_sdtm": 0, "num_dense_top": 10}


# -- blocks


def _explicit_pooling_block(block: FlexDiTBlock, x: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
    """The published form: an all-ones N x N map, softmaxed, times V of every token."""
    a1, b1, g1, a2, b2, g2 = block.norm1.linear(conditioning).chunk(6, dim=1)
    norm = nn.LayerNorm(x.shape[-1], elementwise_affine=False, eps=1e-6)
    value = block.attn1.to_v(norm(x) * (1 + b1[:, None]) + a1[:, None])
    uniform = torch.ones(x.shape[1], x.shape[1], dtype=x.dtype).softmax(-1)
    x = x + g1[:, None] * block.attn1.to_out[0](uniform @ value)
    return x + g2[:, None] * block.ff(norm(x) * (1 + b2[:, None]) + a2[:, None])


def test_one_token_pooling_equals_explicit_uniform_attention():
    block = build_flexdit().transformer_blocks[0]
    x, conditioning = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(3)), torch.randn(2, 32)
    assert block.kind == "pooling"
    torch.testing.assert_close(
        block(x, conditioning), _explicit_pooling_block(block, x, conditioning), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_the_whole_model_runs_in_half_precision(dtype, tolerance):
    model, batch = build_flexdit(), inputs()
    want = model(*batch, density=4).sample
    got = model.to(dtype)(batch[0].to(dtype), *batch[1:], density=4).sample
    assert got.dtype == dtype
    # Relative to the output's spread: the number of digits of the type over ten blocks.
    assert ((got.float() - want).abs().mean() / want.std()) < tolerance


def test_the_layout_names_every_number_when_it_does_not_add_up():
    with pytest.raises(
        ValueError, match=r"num_pooling 1 .*num_sdtm 2 \* sum.*\[1, 3, 1, 1\].*num_dense_top 1.*= 14.*num_layers 10"
    ):
        depth_layout(10, num_pooling=1, num_sdtm=2, sdtm_group=[1, 3, 1, 1], num_dense_top=1)
    with pytest.raises(ValueError, match="at least one merge and one recover"):
        depth_layout(5, num_pooling=0, num_sdtm=1, sdtm_group=[1, 3, 0, 1], num_dense_top=0)
    with pytest.raises(ValueError, match="four counts"):
        depth_layout(5, num_pooling=0, num_sdtm=1, sdtm_group=[1, 3, 1], num_dense_top=0)
    with pytest.raises(ValueError, match="num_pooling must not be negative, got -1"):
        depth_layout(5, num_pooling=-1, num_sdtm=1, sdtm_group=[1, 3, 1, 1], num_dense_top=0)


def test_several_merge_and_recover_blocks_attend_to_the_modules_input():
    model = build_flexdit(num_pooling=0, num_sdtm=1, sdtm_group=[2, 1, 2, 1], num_dense_top=4)
    seen = []
    for block in model.transformer_blocks[:6]:
        block.register_forward_hook(lambda b, args, out: seen.append((b.kind, args[0].shape[1], args[4], out.shape[1])))
    model(*inputs(), density=3)
    kinds, before, dense, after = zip(*seen, strict=True)
    assert kinds == ("merge", "merge", "sparse", "recover", "recover", "dense")
    assert before == (64, 9, 9, 9, 64, 64)
    assert after == (9, 9, 9, 64, 64, 64)
    assert dense[0] is None
    assert dense[1] is dense[3] is dense[4]  # the same kept tokens, not the recovered ones
    assert dense[1].shape[1] == 64


def test_published_splits():
    assert published_split(28, 16) == {"num_pooling": 1, "num_sdtm": 4, "sdtm_group": [1, 3, 1, 1], "num_dense_top": 3}
    assert published_split(28, 32)["num_pooling"] == 2
    for layers in (12, 24, 28):
        for side in (16, 32):
            assert len(depth_layout(layers, **published_split(layers, side))) == layers
    with pytest.raises(ValueError, match=r"no published split for 13 layers \(known: \[12, 24, 28\]\)"):
        published_split(13, 16)


def test_drop_path_drops_whole_branches_in_training_only():
    model = build_flexdit(drop_path=1.0 - 1e-9)
    batch = inputs()
    evaluated = model(*batch, density=4).sample
    torch.testing.assert_close(evaluated, build_flexdit()(*batch, density=4).sample)
    model.train()
    model.time_class_embed.eval()
    tokens = model.transformer_blocks[-1]
    x, conditioning = torch.randn(2, 64, 32), torch.randn(2, 32)
    torch.testing.assert_close(tokens(x, conditioning), x)


# -- densities


def test_a_batch_of_mixed_timesteps_equals_its_samples_one_by_one_in_order():
    model = build_flexdit(density_table=[(0, 6, 6), (300, 4, 4), (700, 3, 3)])
    latents, _, labels = inputs(batch=6)
    timesteps = torch.tensor([950, 10, 400, 800, 20, 350])
    together = model(latents, timesteps, labels).sample
    alone = torch.cat([model(latents[i : i + 1], timesteps[i : i + 1], labels[i : i + 1]).sample for i in range(6)])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=2e-5)
    assert (together - model(latents, timesteps, labels, density=3).sample).abs().max() > 1e-3


def test_a_guidance_batch_is_one_run_at_one_density(monkeypatch):
    model = build_flexdit(density_table=[(0, 6, 6), (300, 4, 4)])
    sides = []
    original = model._forward_at
    monkeypatch.setattr(model, "_forward_at", lambda *args: sides.append(args[-1]) or original(*args))
    latents, _, labels = inputs(batch=4)
    model(torch.cat([latents, latents]), torch.full((8,), 500), torch.cat([labels, torch.full((4,), 10)]))
    assert sides == [(4, 4)]


def test_the_knob_turns_at_run_time_and_is_stored():
    model, batch = build_flexdit(), inputs()
    model.set_density(3)
    assert model.config.density_table == [[0, 3, 3]]
    torch.testing.assert_close(model(*batch).sample, model(*batch, density="3x3").sample)
    model.set_density([(0, 6), (500, 2)])
    assert model.precompute_densities(torch.tensor([999, 400, 0])) == [(2, 2), (6, 6), (6, 6)]
    model.set_timestep_density(999)
    torch.testing.assert_close(model(*batch).sample, model(*batch, density=2).sample)
    model.set_timestep_density(None)
    assert not torch.equal(model(*batch).sample, model(*batch, density=2).sample)


def test_the_default_density_is_that_of_the_released_code():
    assert build_flexdit(sample_size=32).density_table == DensityTable.constant(8)
    assert build_flexdit(sample_size=16).density_table == DensityTable.constant(4)


def test_rectangular_latents_run_at_explicit_and_scheduled_densities():
    model = build_flexdit(density_table=[(0, 4, 4), (500, 2, 2)])
    latents, timesteps, labels = inputs(height=12, width=24)
    assert model(latents, timesteps, labels, density=(3, 5)).sample.shape == (2, 8, 12, 24)
    # The table's share of each side: 4 of 8 on a 6x12 grid is 3x6.
    assert model.precompute_densities([0, 999], grid=(6, 12)) == [(3, 6), (2, 3)]
    near, far = timesteps.clone().fill_(0), timesteps.clone().fill_(999)
    torch.testing.assert_close(model(latents, near, labels).sample, model(latents, near, labels, density=(3, 6)).sample)
    torch.testing.assert_close(model(latents, far, labels).sample, model(latents, far, labels, density=(2, 3)).sample)
    transposed = model(latents.mT, timesteps, labels, density=(5, 3)).sample
    assert transposed.shape == (2, 8, 24, 12)


# -- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"density": 9}, "9x9 is above the dense grid of 8x8"),
        ({"density": 0}, "0x0 has a side below 1"),
        ({"density": 2.5}, r"2.5 as a share"),
        ({"class_labels": torch.tensor([0, 11])}, r"class label 11 is out of range.*0\.\.9.*null class 10"),
        ({"class_labels": torch.tensor([-1, 0])}, "class label -1 is out of range"),
        ({"timestep": torch.tensor([0, 1000])}, r"timestep 1000 is outside.*\[0, 1000\)"),
        ({"timestep": torch.tensor([-1, 5])}, "timestep -1 is outside"),
        ({"timestep": torch.tensor([1, 2, 3])}, r"timestep has shape \(3,\).*expected \(2,\)"),
        ({"timestep": None}, "both needed"),
        ({"hidden_states": torch.zeros(2, 3, 16, 16)}, r"\(2, 3, 16, 16\); expected \(batch, 4, H, W\)"),
        ({"hidden_states": torch.zeros(2, 4, 16)}, r"latents have shape \(2, 4, 16\)"),
        ({"hidden_states": torch.zeros(2, 4, 15, 16)}, "15x16 do not divide into patches of 2"),
    ],
)
def test_bad_input_is_refused_by_value(flexdit, change, message):
    latents, timesteps, labels = inputs()
    arguments = {"hidden_states": latents, "timestep": timesteps, "class_labels": labels, **change}
    with pytest.raises(ValueError, match=message):
        flexdit(**arguments)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"density_table": 9}, "9x9 is above the dense grid of 8x8"),
        ({"density_table": [(0, 4, 4), (700, 3, 3), (300, 2, 2)]}, "not sorted"),
        ({"num_dense_top": 2}, r"= 11 blocks, but the model has num_layers 10"),
        ({"sample_size": 15}, "sample_size 15 is not a multiple of patch_size 2"),
    ],
)
def test_a_wrong_configuration_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build_flexdit(**kwargs)


# -- costs


@pytest.mark.parametrize(
    ("sample", "layout", "side", "gmacs"),
    [
        (32, PLAIN | {"num_dense_top": 28}, 16, 118.62),
        (64, PLAIN | {"num_dense_top": 28}, 32, 524.54),
        (32, {"num_pooling": 1, "num_sdtm": 4, "sdtm_group": [1, 3, 1, 1], "num_dense_top": 3}, 8, 68.98),
        (32, {"num_pooling": 2, "num_sdtm": 4, "sdtm_group": [1, 3, 1, 1], "num_dense_top": 2}, 8, 68.15),
        (32, {"num_pooling": 1, "num_sdtm": 4, "sdtm_group": [1, 3, 1, 1], "num_dense_top": 3}, 16, 120.51),
        (64, {"num_pooling": 2, "num_sdtm": 4, "sdtm_group": [1, 3, 1, 1], "num_dense_top": 2}, 8, 233.53),
        (64, {"num_pooling": 2, "num_sdtm": 4, "sdtm_group": [1, 3, 1, 1], "num_dense_top": 2}, 20, 329.80),
    ],
)
def test_reference_flops_of_xl_2(sample, layout, side, gmacs):
    with torch.device("meta"):
        model = FlexDiTTransformer2DModel(num_layers=28, sample_size=sample, **layout)
    assert model.flops(side, count="reference") / 1e9 == pytest.approx(gmacs, abs=0.01)


def test_the_mean_over_a_schedule_weighs_its_timesteps():
    with torch.device("meta"):
        model = sparing.create_model("flexdit_xl_2_512", density_table="512_r0.90_0.96")
    # Over all 1000 timesteps; the specification's 237.74 averages 250 respaced steps.
    steps = [round(i * 999 / 249) for i in range(250)]
    sampled = sum(model.flops(side) for side in model.precompute_densities(steps)) / 250
    assert sampled / 1e9 == pytest.approx(237.74, abs=0.01)
    assert model.flops() / 1e9 == pytest.approx(237.74, abs=0.05)


@pytest.mark.parametrize("side", [3, 4, 8])
def test_executed_flops_equal_torchs_counter(side):
    model, batch = build_flexdit(), inputs(batch=1)
    counted = sparing.profile(model, *batch, None, True, side, measure=False).macs
    # A side that does not divide the grid is pooled by two thin products, which torch counts and the papers do not.
    assert model.flops(side, count="executed") == pytest.approx(counted, rel=1e-2 if side == 3 else 1e-6)
    assert model.flops(side, count="executed") < model.flops(side, count="reference")


def test_an_unknown_count_is_refused(flexdit):
    with pytest.raises(ValueError, match="'reference' or 'executed', got 'paper'"):
        flexdit.flops(4, count="paper")


@pytest.mark.parametrize(("name", "count"), [("flexdit_xl_2_256", 683_099_168), ("flexdit_xl_2_512", 681_327_392)])
def test_parameter_counts_with_the_position_table(name, count):
    model = sparing.create_model(name, device="meta")
    assert model.parameter_count() == count
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("name", "dense", "sparse"),
    [
        ("flexdit_s_2_256", 6.06, 3.70),
        ("flexdit_b_2_256", 23.01, 14.37),  # published: 23.0 and 14.34
        ("flexdit_l_2_256", 80.70, 50.24),
        ("flexdit_xl_2_256", 118.62, 68.98),
    ],
)
def test_every_size_builds_without_memory(name, dense, sparse):
    model = sparing.create_model(name, device="meta")
    large = sparing.create_model(name.replace("256", "512"), device="meta")
    layout = {"num_pooling": 0, "num_sdtm": 0, "num_dense_top": model.config.num_layers}
    with torch.device("meta"):
        plain = FlexDiTTransformer2DModel.from_config({**model.config, **layout, "density_table": None})
    assert model.flops(8, count="reference") / 1e9 == pytest.approx(sparse, abs=0.01)
    assert plain.flops("all", count="reference") / 1e9 == pytest.approx(dense, abs=0.01)
    assert large.flops(8, count="reference") > 2 * model.flops(8, count="reference")
    assert {p.device.type for p in (*model.parameters(), *large.parameters())} == {"meta"}


# -- training


def test_gradient_reaches_every_parameter_after_two_steps_from_a_converted_model():
    model = FlexDiTTransformer2DModel.from_host(build_host(), **LAYOUT).train()
    latents, timesteps, labels = inputs(batch=4)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step in range(2):
        optimiser.zero_grad()
        model(latents, timesteps, labels, density=4).sample.square().mean().backward()
        silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        # A bias of K shifts all scores of a query alike: softmax does not see it. Its gradient is exactly zero in real
        # arithmetic.
        silent = [name for name in silent if not name.endswith("to_k.bias")]
        assert silent == [], (step, silent)
        optimiser.step()


def test_gradient_checkpointing_gives_the_same_gradients():
    plain, checkpointed = build_flexdit().train(), build_flexdit().train()
    checkpointed.enable_gradient_checkpointing()
    calls = []
    original = checkpointed._gradient_checkpointing_func
    checkpointed._gradient_checkpointing_func = lambda *args: calls.append(1) or original(*args)
    for model in (plain, checkpointed):
        model.time_class_embed.eval()  # no label dropout
        model(*inputs(), density=4).sample.square().mean().backward()
    assert len(calls) == 10
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-6, msg=name)


def test_training_mode_drops_labels_to_the_null_class_with_the_configured_probability():
    model = build_flexdit(class_dropout_prob=1.0).train()
    latents, timesteps, labels = inputs()
    null = torch.full_like(labels, 10)
    torch.testing.assert_close(model(latents, timesteps, labels).sample, model.eval()(latents, timesteps, null).sample)


def test_fresh_weights_follow_the_published_initialisation():
    model = FlexDiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, num_layers=10, sample_size=16, num_embeds_ada_norm=10, **LAYOUT
    )
    recover = next(b for b in model.transformer_blocks if b.kind == "recover")
    assert recover.merge_sparse.weight.abs().max() == 0
    assert torch.equal(recover.merge_dense.weight, torch.eye(32))
    assert model.transformer_blocks[1].norm1.linear.weight.abs().max() == 0
    assert model.proj_out_2.weight.abs().max() == 0
    bound = 0.5 * (6 / 64) ** 0.5  # xavier-uniform with gain 0.5 on 32 x 32
    query = model.transformer_blocks[1].attn1.to_q.weight
    assert 0.9 * bound < query.abs().max() <= bound
    assert model(*inputs()).sample.abs().max() == 0


# -- compile


def test_one_forward_compiles_as_one_graph_and_once_a_side():
    torch._dynamo.reset()
    layout = {"num_layers": 6, "num_sdtm": 1}
    model = build_flexdit(density_table=[(0, 6, 6), (300, 3, 3)], **layout)
    graphs = []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return aot_eager(graph, example_inputs)

    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=counting)
    latents, _, labels = inputs()
    timesteps = torch.tensor([950, 400, 100, 0])
    with torch.no_grad():
        for t, side in zip(timesteps, model.precompute_densities(timesteps), strict=True):
            batch = latents, t.expand(2), labels
            want = model(*batch, density=side).sample
            torch.testing.assert_close(compiled(*batch, density=side).sample, want, atol=2e-5, rtol=2e-5)
        assert len(graphs) == len(model.density_table.distinct_sides) == 2
        for density in ([3, 4], "3x5", 0.25):  # however it is written
            want = model(*batch, density=density).sample
            torch.testing.assert_close(compiled(*batch, density=density).sample, want, atol=2e-5, rtol=2e-5)


# -- hosts


def test_without_sparse_layers_the_twin_equals_its_live_host(host):
    twin = FlexDiTTransformer2DModel.from_host(host, **PLAIN).eval()
    latents, timesteps, labels = inputs()
    want = host(latents, timestep=timesteps, class_labels=labels).sample
    torch.testing.assert_close(twin(latents, timesteps, labels).sample, want, atol=2e-5, rtol=2e-5)
    assert twin.status == "exact"
    assert (twin.config.timestep_freq_shift, twin.config.norm_eps) == (1, 1e-5)


def test_original_timing_is_a_choice_with_one_warning(host):
    with pytest.warns(UserWarning, match=r"published DiT weights were trained") as caught:
        twin = FlexDiTTransformer2DModel.from_host(host, timing="original", **PLAIN).eval()
    assert len(caught) == 1
    assert (twin.config.timestep_freq_shift, twin.config.norm_eps) == (0, 1e-6)
    latents, timesteps, labels = inputs()
    want = host(latents, timestep=timesteps, class_labels=labels).sample
    assert (twin(latents, timesteps, labels).sample - want).abs().max() > 1e-3
    with pytest.raises(ValueError, match="'host' or 'original', got 'diffusers'"):
        FlexDiTTransformer2DModel.from_host(host, timing="diffusers", **PLAIN)


def test_conversion_leaves_the_host_untouched_and_shares_no_memory(host):
    before = {name: tensor.clone() for name, tensor in host.state_dict().items()}
    twin = FlexDiTTransformer2DModel.from_host(host, **LAYOUT)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[name], tensor) for name, tensor in host.state_dict().items())
    assert twin.status == "converted, not trained"


def test_a_half_precision_host_gives_a_half_precision_twin(host):
    twin = FlexDiTTransformer2DModel.from_host(host.to(torch.bfloat16), **LAYOUT)
    assert {p.dtype for p in twin.parameters()} == {torch.bfloat16} == {b.dtype for b in twin.buffers()}


def test_the_method_is_offered_for_a_dit_and_for_nothing_else(host):
    assert FlexDiTTransformer2DModel.why_not(host) == []
    assert "not a diffusers DiTTransformer2DModel" in FlexDiTTransformer2DModel.why_not(nn.Linear(2, 2))[0]
    with pytest.raises(TypeError, match="Linear is not a diffusers DiTTransformer2DModel"):
        FlexDiTTransformer2DModel.from_host(nn.Linear(2, 2))
    gelu = build_host(activation_fn="geglu")
    with pytest.raises(ValueError, match="activation_fn is 'geglu', supported is 'gelu-approximate'"):
        FlexDiTTransformer2DModel.from_host(gelu, **LAYOUT)
    twin = sparing.twin(host, "flexdit", **LAYOUT)
    assert isinstance(twin, FlexDiTTransformer2DModel)
    assert twin.knobs == {**LAYOUT, "density_table": [[0, 4, 4]]}


def test_a_model_comes_back_bit_equal_by_from_pretrained_and_by_sparing_load(tmp_path):
    model = build_flexdit(density_table=[(0, 6, 6), (300, 4, 4), (700, 3, 3)])
    model.status = "trained"
    model.save_pretrained(tmp_path)
    batch = inputs(batch=4)
    for loaded in (FlexDiTTransformer2DModel.from_pretrained(tmp_path), sparing.load(tmp_path)):
        assert loaded.status == "trained"
        assert loaded.density_table == model.density_table
        assert loaded.knobs == model.knobs
        assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
        torch.testing.assert_close(loaded.eval()(*batch).sample, model(*batch).sample, atol=1e-5, rtol=1e-5)


def test_a_diffusers_folder_is_a_host(host, tmp_path):
    host.save_pretrained(tmp_path / "model")
    host.save_pretrained(tmp_path / "pipeline" / "transformer")
    live = FlexDiTTransformer2DModel.from_host(host, **LAYOUT).state_dict()
    for folder in ("model", "pipeline"):
        state = FlexDiTTransformer2DModel.from_host(tmp_path / folder, **LAYOUT).state_dict()
        assert all(torch.equal(live[name], tensor) for name, tensor in state.items())
    with pytest.raises(ValueError, match="neither a model's config"):
        FlexDiTTransformer2DModel.from_host(tmp_path, **LAYOUT)
    with pytest.raises(FileNotFoundError, match="neither a file, a diffusers folder nor a hub id"):
        FlexDiTTransformer2DModel.from_host(tmp_path / "absent", **LAYOUT)


def test_the_host_class_of_diffusers_is_still_what_we_convert():
    assert issubclass(DiTTransformer2DModel, nn.Module)
    assert {"num_layers", "norm_eps"} <= set(build_host().config)


def test_a_twin_is_in_its_hosts_mode_and_in_eval_mode_from_weights_alone(host, tmp_path):
    host.save_pretrained(tmp_path)
    shape = {"num_attention_heads": 4, "sample_size": 16}
    assert not FlexDiTTransformer2DModel.from_host(host, **LAYOUT).training
    assert not sparing.twin(host, "flexdit", **LAYOUT).training
    assert not FlexDiTTransformer2DModel.from_host(tmp_path, **LAYOUT).training
    assert not FlexDiTTransformer2DModel.from_host(host.state_dict(), **shape, **LAYOUT).training
    assert FlexDiTTransformer2DModel.from_host(host.train(), **LAYOUT).training


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("missing", "proj_out_1.weight", r"1 missing, first 'proj_out_1\.weight'"),
        ("missing", "transformer_blocks.3.attn1.to_v.weight", r"1 missing, first 'transformer_blocks\.3\.attn1"),
        ("unexpected", "foo", "1 unexpected, first 'foo'"),
    ],
)
def test_a_diffusers_folder_without_exactly_its_weights_is_refused_by_name(host, tmp_path, name, change, message):
    host.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    if name == "missing":
        del state[change]
    else:
        state[change] = torch.zeros(3)
    save_file(state, file)
    with pytest.raises(ValueError, match=message):
        FlexDiTTransformer2DModel.from_host(tmp_path, **LAYOUT)


def test_a_folder_of_another_class_is_refused_and_a_legacy_one_is_read(host, tmp_path):
    host.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for changed, message in (
        ({**config, "_class_name": "PixArtTransformer2DModel"}, "class 'PixArtTransformer2DModel'; a DiTTransformer2D"),
        ({**config, "_class_name": "FlexDiTTransformer2DModel"}, "holds a FlexDiT already"),
        ({}, "class None"),
    ):
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            FlexDiTTransformer2DModel.from_host(tmp_path, **LAYOUT)
    path.write_text(json.dumps({**config, "_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero"}))
    state = FlexDiTTransformer2DModel.from_host(tmp_path, **LAYOUT).state_dict()
    live = FlexDiTTransformer2DModel.from_host(host, **LAYOUT).state_dict()
    assert all(torch.equal(live[name], tensor) for name, tensor in state.items())
    path.write_text(json.dumps(config))
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"junk")
    with pytest.raises((ValueError, OSError), match=r"diffusion_pytorch_model|cannot be read"):
        FlexDiTTransformer2DModel.from_host(tmp_path, **LAYOUT)


def test_the_config_alone_builds_a_model_with_its_table_and_status(flexdit, tmp_path):
    flexdit.set_density([(0, 5), (400, 3)])
    flexdit.status = "trained"
    again = FlexDiTTransformer2DModel.from_config(flexdit.config)
    assert again.density_table.entries == ((0, 5, 5), (400, 3, 3))
    assert again.status == "trained"
    again.save_pretrained(tmp_path)
    assert "_use_default_values" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize(("options", "most"), [({}, 8), ({"dynamic": False}, 5 + 3)])
def test_repeated_blocks_compile_within_dynamos_own_limit_at_several_grids(options, most):
    torch._dynamo.reset()
    model = build_flexdit()
    latents, timesteps, labels = inputs()
    densities = (6, 5, 3) if not options else (5, 3)
    graphs = []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph

    with torch.no_grad():
        wanted = [model(latents, timesteps, labels, density=density).sample for density in densities]
        model.compile_repeated_blocks(fullgraph=True, backend=counting, **options)
        for density, want in zip(densities, wanted, strict=True):
            sample = model(latents, timesteps, labels, density=density).sample
            torch.testing.assert_close(sample, want, atol=2e-5, rtol=2e-5)
    assert len(graphs) <= most
