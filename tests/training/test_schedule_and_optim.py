"""Learning rates over the steps, parameter groups, and what Muon gets."""

import math

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from sparing.training import build_optimizers, parameter_groups, set_learning_rates, warmup_cosine


def _vit() -> VisionTransformer:
    return VisionTransformer(img_size=8, patch_size=4, in_chans=1, num_classes=3, embed_dim=8, depth=2, num_heads=2)


def test_the_rate_rises_then_falls_along_a_cosine():
    rates = [warmup_cosine(step, total_steps=20, warmup_steps=4, final=0.1) for step in range(21)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == 1.0
    assert rates[12] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert rates[20] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)


@pytest.mark.parametrize(("step", "warmup"), [(0, 10), (-1, 2)])
def test_impossible_schedules_are_refused(step, warmup):
    with pytest.raises(ValueError):
        warmup_cosine(step, total_steps=10, warmup_steps=warmup)


def test_rates_are_relative_to_each_groups_peak():
    one, two = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [one], "lr": 1.0}, {"params": [two], "lr": 0.1}])
    for factor in (0.5, 0.25):
        set_learning_rates([optimizer], factor)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.025]


def test_vectors_and_exempt_names_are_not_decayed_and_fresh_ones_learn_faster():
    model = _vit()
    groups = parameter_groups(model, lr=1.0, weight_decay=0.3, fresh={"head.weight"}, fresh_lr_multiplier=5.0)
    found = {id(parameter): group for group in groups for parameter in group["params"]}
    parameters = dict(model.named_parameters())
    assert len(found) == len(parameters)
    assert found[id(parameters["blocks.0.mlp.fc1.weight"])]["weight_decay"] == 0.3
    for name in ("blocks.0.norm1.weight", "blocks.0.mlp.fc1.bias", "pos_embed", "cls_token"):
        assert found[id(parameters[name])]["weight_decay"] == 0.0, name
    assert found[id(parameters["head.weight"])]["lr"] == 5.0
    assert found[id(parameters["blocks.1.attn.qkv.weight"])]["lr"] == 1.0


def test_muon_gets_the_matrices_of_the_blocks_and_adamw_every_other_parameter_once():
    model = _vit()
    muon, adamw = build_optimizers(model, name="muon", lr=1e-3, fresh={"blocks.1.mlp.fc2.weight"})
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    first = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    rest = [names[id(p)] for group in adamw.param_groups for p in group["params"]]
    assert first == {
        f"blocks.{block}.{name}.weight"
        for block in range(2)
        for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    } - {"blocks.1.mlp.fc2.weight"}
    assert sorted(rest) == sorted(set(names.values()) - first)


def test_an_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match="'sgd'"):
        build_optimizers(_vit(), name="sgd", lr=1.0)
    with pytest.raises(ValueError, match="no weight matrices"):
        build_optimizers(torch.nn.Linear(2, 2), name="muon", lr=1.0)
