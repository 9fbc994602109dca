"""Golden cases of continual inference: layers, containers, attention, positions (networks and adapters: the modules
beside).
"""

import re
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from golden.adapters import continual_networks, continual_pruning
from golden.harness import Case, CaseFile, Expected
from sparing import continual as co
from sparing.continual import oadtr


def cases(case_file: CaseFile) -> Iterable[Case]:
    for name, described in case_file.spec["cases"].items():
        prefix = described.get("weights_prefix") or f"{name}/w/"
        weights = {}
        for key, tensor in case_file.tensors.items():
            if key.startswith(prefix):
                clean = key.removeprefix(prefix)
                for rename in described.get("weights_rename") or []:
                    clean = re.sub(rename["pattern"], rename["replace"], clean)
                weights[clean] = tensor
        yield Case(
            id=f"continual/{case_file.name}[{name}]",
            kind=described["model"],
            config=described["config"],
            weights=weights,
            inputs={entry["role"]: case_file.tensors[key] for key, entry in described["inputs"].items()},
            expected={
                entry["role"]: Expected(case_file.tensors[key], atol=entry["atol"], rtol=entry["rtol"])
                for key, entry in described["outputs"].items()
            },
            options={"plan": described.get("plan") or {}},
        )


# ---- running a network the ways that the roles ask for


def by_steps(network: co.Continual, x: Tensor, *, lockstep: bool = False) -> tuple[Tensor, Tensor]:
    """(outputs stacked on axis 2, valid per step) of frame-by-frame calls on x (N, C, T, ...)."""
    state = network.init_state(x.shape[0], (x.shape[1], *x.shape[3:]), lockstep=lockstep)
    said, spoke = [], []
    for t in range(x.shape[2]):
        y, valid, state = network.step(x[:, :, t], state)
        now = bool(valid) if lockstep else bool(valid.all())
        assert lockstep or bool((valid == valid[0]).all())
        spoke.append(now)
        if now:
            said.append(y)
    return torch.stack(said, 2), torch.tensor(spoke)


def by_chunks(network: co.Continual, x: Tensor, size: int, *, pad_end: bool, lockstep: bool = True) -> Tensor:
    """Outputs of chunked calls, then of the flush."""
    state = network.init_state(x.shape[0], (x.shape[1], *x.shape[3:]), lockstep=lockstep)
    said = []
    for chunk in x.split(size, 2):
        y, valid, state = network.steps(chunk, state)
        if y is not None and bool(valid.any()):
            said.append(y[:, :, valid[0]])
    if pad_end:
        y, valid, _ = network.flush(state)
        if y is not None:
            said.append(y[:, :, valid[0]])
    return torch.cat(said, 2)


def streamed(network: co.Continual, case: Case) -> dict[str, Tensor]:
    """Every stream role of a case, all ways of running compared with each other, and the plan."""
    network.eval()
    x = case.inputs["input"]
    check_plan(network, case)
    near = {"atol": max(1e-5, *(want.atol for want in case.expected.values())), "rtol": 1e-5}
    with torch.no_grad():
        out, valid = by_steps(network, x)
        lock, lock_valid = by_steps(network, x, lockstep=True)
        assert torch.equal(valid, lock_valid)
        torch.testing.assert_close(lock, out, **near)
        results = {"step_out": out, "step_valid": valid}
        whole = by_chunks(network, x, x.shape[2], pad_end=True)
        for size in (1, 2, 3, 5, x.shape[2]):
            for lockstep in (True, False):
                chunked = by_chunks(network, x, size, pad_end=False, lockstep=lockstep)
                torch.testing.assert_close(chunked, out, **near)
            torch.testing.assert_close(by_chunks(network, x, size, pad_end=True), whole, **near)
        results["steps_pad_end"] = whole
        return results


def check_plan(network: co.Continual, case: Case) -> None:
    plan, want = network.plan(), case.options["plan"]
    have = {
        "delay": plan.delay,
        "receptive_field": plan.receptive_field,
        "temporal_stride": plan.period,
        "temporal_padding": plan.padding,
        "first_output_step": plan.first_output_step,
    }
    wrong = {key: (value, want[key]) for key, value in have.items() if want.get(key) is not None and value != want[key]}
    assert not wrong, f"{case.id}: plan (ours, expected) {wrong}"


# ---- layers


def conv(case: Case) -> dict[str, Tensor]:
    c = case.config
    layer = (co.Conv1d, co.Conv2d, co.Conv3d)[c["dims"] - 1]
    results: dict[str, Tensor] = {}
    plain = c["temporal_fill"] == "zeros" and c["stride"][0] == 1 and c["dilation"][0] == 1 and c["kernel_size"][0] > 1
    for formulation in ("history", "partial") if plain else ("history",):
        network = layer(
            c["in_channels"],
            c["out_channels"],
            tuple(c["kernel_size"]),
            stride=tuple(c["stride"]),
            padding=tuple(c["padding"]),
            dilation=tuple(c["dilation"]),
            groups=c["groups"],
            bias=c["bias"],
            temporal_fill=c["temporal_fill"],
            formulation=formulation,
        )
        network.load_state_dict(case.weights)
        now = streamed(network, case) | {"forward": network(case.inputs["input"])}
        if results:
            for name, tensor in now.items():
                torch.testing.assert_close(tensor, results[name], atol=1e-5, rtol=1e-5)
        results = now
    return results


def pool(case: Case) -> dict[str, Tensor]:
    c = case.config
    options = {"stride": tuple(c["stride"]), "padding": tuple(c["padding"])}
    if c["op"] == "avg":
        layer = (co.AvgPool1d, co.AvgPool2d, co.AvgPool3d)[c["dims"] - 1]
        options |= {"dilation": c["dilation"][0], "count_include_pad": c["count_include_pad"]}
    else:
        layer = (co.MaxPool1d, co.MaxPool2d, co.MaxPool3d)[c["dims"] - 1]
        options |= {"dilation": tuple(c["dilation"])}
    network = layer(tuple(c["kernel_size"]), **options)
    return streamed(network, case) | {"forward": network(case.inputs["input"])}


def adaptive_pool(case: Case) -> dict[str, Tensor]:
    c = case.config
    names = {("avg", 2): co.AdaptiveAvgPool2d, ("avg", 3): co.AdaptiveAvgPool3d}
    names |= {("max", 2): co.AdaptiveMaxPool2d, ("max", 3): co.AdaptiveMaxPool3d}
    network = names[c["op"], c["dims"]](tuple(c["output_size"]), window=c["window"])
    x, n = case.inputs["input"], c["window"]
    windows = torch.cat([network(x[:, :, i : i + n]) for i in range(x.shape[2] - n + 1)], 2)
    return streamed(network, case) | {"windows": windows}


# ---- containers: config.network is a tree


def build(node: dict, weights: dict[str, Tensor]) -> nn.Module:
    kind = node["type"]
    if kind == "sequential":
        return co.Sequential(*(build(part, weights) for part in node["modules"]))
    if kind == "broadcast_reduce":
        return co.BroadcastReduce(*(build(part, weights) for part in node["branches"]), reduce=node["reduce"])
    if kind == "residual":
        assert node["reduce"] == "sum"
        return co.Residual(build(node["module"], weights), shrink=node["shrink"])
    module = _leaf(node)
    if "state_prefix" in node:
        prefix = node["state_prefix"]
        module.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    return module


def _leaf(node: dict) -> nn.Module:
    kind = node["type"]
    options = {k: v for k, v in node.items() if k not in ("type", "state_prefix")}
    dims = int(kind[-2]) if kind[-1] == "d" and kind[-2].isdigit() else 0
    if kind.startswith("conv"):
        return (co.Conv1d, co.Conv2d, co.Conv3d)[dims - 1](**options)
    if kind.startswith("avg_pool"):
        return (co.AvgPool1d, co.AvgPool2d, co.AvgPool3d)[dims - 1](**options)
    if kind.startswith("max_pool"):
        return (co.MaxPool1d, co.MaxPool2d, co.MaxPool3d)[dims - 1](**options)
    if kind.startswith("batch_norm"):
        return (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](**options)
    if kind == "linear":
        return co.Linear(**options)
    if kind == "delay":
        return co.Delay(options["delay"])
    return {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}[kind]()


def container(case: Case) -> dict[str, Tensor]:
    network = build(case.config["network"], case.weights).eval()
    return streamed(network, case) | {"forward": network(case.inputs["input"])}


# ---- attention, encoders, positions


def mha_single(case: Case) -> dict[str, Tensor]:
    c = case.config
    network = co.SingleOutputAttention(
        c["embed_dim"], c["num_heads"], sequence_len=c["sequence_len"], query_index=c["query_index"], bias=c["bias"]
    )
    network.load_state_dict(case.weights)
    results = streamed(network, case)
    torch.testing.assert_close(network(case.inputs["input"]), results["step_out"], atol=2e-5, rtol=1e-5)
    return results


def mha_retroactive(case: Case) -> dict[str, Tensor]:
    c = case.config
    sizes = {"sequence_len": c["sequence_len"], "bias": c["bias"]}
    network = co.RetroactiveAttention(c["embed_dim"], c["num_heads"], **sizes)
    network.load_state_dict(case.weights)
    results = streamed(network, case)
    rows = co.RetroactiveAttention(c["embed_dim"], c["num_heads"], update="incremental", **sizes)
    rows.load_state_dict(case.weights)
    with torch.no_grad():
        incremental, _ = by_steps(rows, case.inputs["input"])
    torch.testing.assert_close(incremental, results["step_out"], atol=1e-4, rtol=1e-4)
    return results | {"window_out": results["step_out"]}


def encoder(case: Case) -> dict[str, Tensor]:
    c = case.config
    network = co.TransformerEncoder(
        c["d_model"],
        c["nhead"],
        dim_feedforward=c["dim_feedforward"],
        num_layers=c["num_layers"],
        sequence_len=c["sequence_len"],
        activation=c["activation"],
        norm_first=c["norm_first"],
        final_norm=c["final_norm"],
        layer_norm_eps=c["layer_norm_eps"],
    )
    network.load_state_dict(co.encoder_filter_fn(case.weights, network))
    results = streamed(network, case)
    torch.testing.assert_close(network(case.inputs["input"]), results["step_out"], atol=2e-5, rtol=1e-5)
    return results


def recycling_positions(case: Case) -> dict[str, Tensor]:
    c = case.config
    network = co.RecyclingPositionalEncoding(
        c["embed_dim"],
        c["num_embeds"],
        learned=c["learned"],
        forward_update_index_steps=c["forward_update_index_steps"],
    )
    network.load_state_dict(case.weights)
    results = streamed(network, case)
    clip = case.inputs["input"][:, :, : c["clip_length"]]
    return results | {"forward_first": network(clip), "forward_second": network(clip)}


def cyclic_position_table(case: Case) -> dict[str, Tensor]:
    c = case.config
    return {"table": co.cyclic_table(c["num_embeds"], c["embed_dim"], smooth=c["smooth"])}


def cooadtr(case: Case) -> dict[str, Tensor]:
    c = case.config
    network = oadtr.CoOadTR(
        c["dim_feature"],
        c["num_classes"],
        embed_dim=c["embed_dim"],
        num_heads=c["num_heads"],
        mlp_dim=c["mlp_dim"],
        num_layers=c["num_layers"],
        sequence_len=c["sequence_len"],
        num_embeds=c["num_embeds"],
        activation=c["activation"],
        layer_norm_eps=c["layer_norm_eps"],
        in_proj_bias=c["in_proj_bias"],
    )
    network.load_state_dict(oadtr.checkpoint_filter_fn(case.weights, network))
    return streamed(network, case)


BUILDERS = {
    "continual_mha_single_output": mha_single,
    "continual_mha_retroactive": mha_retroactive,
    "continual_encoder": encoder,
    "recycling_positional_encoding": recycling_positions,
    "cyclic_position_table": cyclic_position_table,
    "cooadtr": cooadtr,
    **continual_pruning.BUILDERS,
    **{kind: partial(build_network, streamed=streamed) for kind, build_network in continual_networks.BUILDERS.items()},
    "continual_conv": conv,
    "continual_pool": pool,
    "continual_adaptive_pool": adaptive_pool,
    "continual_container": container,
}
