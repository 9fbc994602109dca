"""Checkpoints: names of the original DiT, diffusers, the reference FlexDiT and ours (specification, sections 5 and
9.4-9.6).
"""

import argparse

import pytest
import torch
from diffusion.conftest import LAYOUT, build_flexdit, build_host
from safetensors.torch import save_file

from sparing.diffusion import flexdit_keys as keys
from sparing.diffusion.flexdit import FlexDiTTransformer2DModel


@pytest.fixture
def diffusers_state(host):
    return host.state_dict()


@pytest.fixture
def original_state(diffusers_state):
    return keys.to_original(keys.from_diffusers(diffusers_state))


def _own(model):
    return dict(model.named_parameters())


def test_original_to_diffusers_and_back_is_bit_equal(original_state):
    as_diffusers = keys.to_diffusers(keys.from_original(original_state))
    build_host().load_state_dict(as_diffusers, strict=True)
    back = keys.to_original(keys.from_diffusers(as_diffusers))
    assert set(back) == set(original_state)
    assert all(torch.equal(back[name], tensor) for name, tensor in original_state.items())
    assert original_state["blocks.3.attn.qkv.weight"].shape == (96, 32)


def test_original_and_diffusers_names_give_identical_flexdits(original_state, diffusers_state):
    shape = {"num_attention_heads": 4, "sample_size": 16}
    a = FlexDiTTransformer2DModel.from_dit(original_state, **shape, **LAYOUT)
    b = FlexDiTTransformer2DModel.from_dit(diffusers_state, **shape, **LAYOUT)
    assert all(torch.equal(_own(b)[name], tensor) for name, tensor in _own(a).items())
    assert a.config.timestep_freq_shift == 0


def test_each_block_type_takes_its_part_of_the_dense_block(original_state):
    model = FlexDiTTransformer2DModel.from_dit(original_state, num_attention_heads=4, sample_size=16, **LAYOUT)
    pooling, merge, _, recover = model.transformer_blocks[:4]
    query, key, value = original_state["blocks.0.attn.qkv.weight"].chunk(3)
    assert torch.equal(pooling.attn1.to_v.weight, value)
    query, key, value = original_state["blocks.1.attn.qkv.bias"].chunk(3)
    for linear, want in ((merge.attn1.to_q, query), (merge.attn1.to_k, key), (merge.attn1.to_v, value)):
        assert torch.equal(linear.bias, want)
    assert recover.merge_sparse.weight.abs().max() == 0 == recover.merge_dense.bias.abs().max()
    assert torch.equal(recover.merge_dense.weight, torch.eye(32))
    assert torch.equal(recover.ff.net[2].weight, original_state["blocks.3.mlp.fc2.weight"])


@pytest.mark.parametrize("wrap", [lambda s: {"model": {"x": torch.zeros(1)}, "ema": s}, lambda s: {"model": s}, dict])
def test_a_reference_flexdit_loads_with_its_layout_inferred(wrap):
    model = build_flexdit()
    state = keys.to_reference(_own(model), model.layout, **LAYOUT)
    assert "dumbbell_blocks.1.token_merge_blocks.0.attn.kv.weight" in state
    loaded = FlexDiTTransformer2DModel.from_host(wrap(state), num_attention_heads=4, sample_size=16).eval()
    assert {k: loaded.knobs[k] for k in LAYOUT} == LAYOUT
    assert loaded.status == "trained"
    assert all(torch.equal(_own(loaded)[name], tensor) for name, tensor in _own(model).items())
    with pytest.raises(ValueError, match=r"cannot be loaded as \{'num_sdtm': 1\}"):
        FlexDiTTransformer2DModel.from_host(wrap(state), num_attention_heads=4, sample_size=16, num_sdtm=1)


def test_a_model_without_attention_biases_keeps_none():
    model = build_flexdit(attention_bias=False)
    state = keys.to_reference(_own(model), model.layout, **LAYOUT)
    assert not any(name.endswith(("attn.qkv.bias", "attn.kv.bias", "attn.v.bias")) for name in state)
    loaded = FlexDiTTransformer2DModel.from_host(state, num_attention_heads=4, sample_size=16)
    assert loaded.config.attention_bias is False
    assert all(torch.equal(_own(loaded)[name], tensor) for name, tensor in _own(model).items())


def test_sample_size_and_heads_come_from_the_position_table_and_published_widths(original_state):
    with pytest.raises(ValueError, match=r"attention heads cannot be read.*width 32"):
        FlexDiTTransformer2DModel.from_dit(original_state, sample_size=16, **LAYOUT)
    with pytest.raises(ValueError, match="no position table: pass sample_size"):
        FlexDiTTransformer2DModel.from_dit(original_state, num_attention_heads=4, **LAYOUT)
    with_table = {**original_state, "pos_embed": torch.zeros(1, 64, 32)}
    model = FlexDiTTransformer2DModel.from_dit(with_table, num_attention_heads=4, **LAYOUT)
    assert (model.config.sample_size, model.config.num_embeds_ada_norm, model.config.out_channels) == (16, 10, 8)


# -- refused


def _convert(state, **kwargs):
    return FlexDiTTransformer2DModel.from_dit(state, num_attention_heads=4, sample_size=16, **{**LAYOUT, **kwargs})


def test_missing_extra_and_misshapen_keys_are_named(original_state):
    with pytest.raises(ValueError, match=r"1 missing, first 'transformer_blocks.4.norm1.linear.bias'"):
        _convert({k: v for k, v in original_state.items() if k != "blocks.4.adaLN_modulation.1.bias"})
    with pytest.raises(ValueError, match=r"1 unexpected keys.*'blocks.4.attn.rope.weight'"):
        _convert({**original_state, "blocks.4.attn.rope.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"'transformer_blocks.2.ff.net.2.bias' has shape \(31,\).*needs \(32,\)"):
        _convert({**original_state, "blocks.2.mlp.fc2.bias": torch.zeros(31)})
    with pytest.raises(ValueError, match=r"nothing in the checkpoint gives 'pos_embed.proj.weight'"):
        _convert({k: v for k, v in original_state.items() if not k.startswith("x_embedder")})


def test_a_wrong_depth_names_all_numbers(original_state):
    with pytest.raises(ValueError, match=r"num_pooling 1 \+ num_sdtm 1 .* = 6 blocks, but the model has num_layers 10"):
        _convert(original_state, num_sdtm=1)
    with pytest.raises(ValueError, match="no published split for 10 layers"):
        FlexDiTTransformer2DModel.from_dit(original_state, num_attention_heads=4, sample_size=16)


def test_unequal_embedder_copies_are_refused_naming_the_block(diffusers_state):
    name = "transformer_blocks.7.norm1.emb.timestep_embedder.linear_1.bias"
    with pytest.raises(ValueError, match=r"block 7 differs from block 0 in 'timestep_embedder.linear_1.bias'"):
        _convert({**diffusers_state, name: diffusers_state[name] + 1e-6})
    with pytest.raises(ValueError, match=f"missing key '{name}'"):
        _convert({k: v for k, v in diffusers_state.items() if k != name})


def test_relative_position_checkpoints_and_foreign_ones_are_refused(original_state):
    with pytest.raises(ValueError, match=r"relative_pos_embedder.*not supported"):
        _convert({**original_state, "relative_pos_embedder.table": torch.zeros(1)})
    with pytest.raises(ValueError, match="not a DiT or FlexDiT checkpoint"):
        _convert({"conv1.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"entry 'epoch' is not a tensor"):
        _convert({**original_state, "epoch": 3})
    with pytest.raises(ValueError, match="in our own names: use"):
        _convert(build_flexdit().state_dict())


def test_sdtms_that_differ_are_refused():
    state = {f"dumbbell_blocks.{k}.semantic_blocks.{j}.x": torch.zeros(1) for k, j in ((0, 0), (1, 0), (1, 1))}
    with pytest.raises(ValueError, match=r"SDTMs differ.*\[0, 1, 0, 0\], \[0, 2, 0, 0\]"):
        keys.infer_layout(state)


def test_weights_with_nan_are_refused_when_asked(original_state):
    bad = {**original_state, "blocks.5.mlp.fc1.bias": original_state["blocks.5.mlp.fc1.bias"] * float("nan")}
    _convert(bad)
    with pytest.raises(ValueError, match=r"NaN or infinity: first in 'transformer_blocks.5.ff.net.0.proj.bias'"):
        _convert(bad, check_finite=True)


def test_the_given_mapping_is_not_changed(original_state):
    before = dict(original_state)
    _convert(original_state)
    assert list(before) == list(original_state)
    assert all(before[k] is v for k, v in original_state.items())


# -- files


def test_training_checkpoints_and_safetensors_files_are_read_without_unpickling(original_state, tmp_path):
    table = {**original_state, "pos_embed": torch.zeros(1, 64, 32)}
    torch.save({"model": {}, "ema": table, "opt": {"state": {}}, "args": argparse.Namespace(lr=1)}, tmp_path / "a.pt")
    save_file({k: v.contiguous() for k, v in table.items()}, tmp_path / "a.safetensors")
    want = _own(_convert(original_state))
    for name in ("a.pt", "a.safetensors"):
        model = FlexDiTTransformer2DModel.from_dit(tmp_path / name, num_attention_heads=4, **LAYOUT)
        assert all(torch.equal(want[k], v) for k, v in _own(model).items())


def test_unreadable_files_give_one_line(tmp_path):
    for name, content in (("empty.pt", b""), ("text.safetensors", b"not a checkpoint"), ("a.zip", b"x")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name) as error:
            keys.read_checkpoint(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"absent\.pt does not exist"):
        FlexDiTTransformer2DModel.from_dit(tmp_path / "absent.pt", **LAYOUT)


class _Harmful:
    def __reduce__(self):
        return (eval, ("1/0",))


def test_a_pickle_with_code_is_refused(tmp_path):
    torch.save({"model": _Harmful()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt cannot be read"):
        keys.read_checkpoint(tmp_path / "evil.pt")


def test_an_unknown_timing_is_refused_for_weights_too(diffusers_state):
    with pytest.raises(ValueError, match="timing must be 'host' or 'original', got 'nonsense'"):
        FlexDiTTransformer2DModel.from_host(
            diffusers_state, num_attention_heads=4, sample_size=16, timing="nonsense", **LAYOUT
        )
