"""FlexDiT and plain DiT: forwards at every density, module outputs, guidance, DDIM, schedules, loss, initialisation,
key maps.
"""

import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from golden.harness import Case, CaseFile, Expected
from sparing.diffusion import flexdit_keys as keys
from sparing.diffusion.density import DensityTable
from sparing.diffusion.flexdit import FlexDiTTransformer2DModel
from sparing.diffusion.losses import DiffusionProcess, training_losses
from sparing.diffusion.pipelines import guided
from sparing.diffusion.respaced import RespacedScheduler
from sparing.kernels import grid_pool

_LOSSES = {"loss_mse": "mse", "loss_vb": "vb", "loss_total": "loss"}
# outputs of one file that one run gives together: role -> kind of case
_KINDS = {
    "forward": "forward",
    "module_output": "module_output",
    "block_output": "module_output",
    "guided_output": "guided",
    "ddim_timestep_map": "ddim_timestep_map",
    "ddim_trajectory": "ddim_trajectory",
    "density_schedule": "density_schedule",
    "loss_noised": "loss",
    "loss_mse": "loss",
    "loss_vb": "loss",
    "loss_total": "loss",
    "flexinit_forward": "flexinit_forward",
    "flexinit_parameter": "flexinit_parameter",
}


def cases(case_file: CaseFile) -> Iterable[Case]:
    spec, tensors = case_file.spec, case_file.tensors
    prefix = spec["weights_prefix"]
    weights = {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
    base = f"{case_file.folder}/{case_file.name}"
    if spec["model"] == "dit_diffusers_checkpoint":
        yield from _checkpoint_cases(case_file, weights, base)
        return
    inputs = {entry["role"]: tensors[name] for name, entry in spec["inputs"].items()}
    for name, entry in spec["outputs"].items():
        options = {"role": entry["role"], "args": entry["args"], "name": name}
        expected = _expected(name, tensors[name], entry)
        yield Case(f"{base}[{name}]", _KINDS[entry["role"]], spec["config"], weights, inputs, expected, options)


def _expected(name: str, tensor: Tensor, entry: dict[str, Any]) -> dict[str, Expected]:
    """One expectation, or one a row (a step or a sample) where the description gives each its own tolerance."""
    if "atol_per_step" not in entry and "rtol_per_sample" not in entry:
        return {name: Expected(tensor, atol=entry["atol"], rtol=entry["rtol"])}
    atol = entry.get("atol_per_step", [entry["atol"]] * len(tensor))
    rtol = entry.get("rtol_per_sample", [entry["rtol"]] * len(tensor))
    return {f"{name}[{i}]": Expected(row, atol=atol[i], rtol=rtol[i]) for i, row in enumerate(tensor)}


def _result(case: Case, tensor: Tensor) -> dict[str, Tensor]:
    """``tensor`` under the case's one name, or row by row."""
    name = case.options["name"]
    return {name: tensor} if name in case.expected else {f"{name}[{i}]": row for i, row in enumerate(tensor)}


def _layout(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_pooling": config["num_poolingformer"],
        "num_sdtm": config["num_dumbbell"],
        "sdtm_group": config["dumbbell_group"],
        "num_dense_top": config["num_normal_block"],
    }


def _build(case: Case, **overrides: Any) -> FlexDiTTransformer2DModel:
    config = case.config
    for name, supported in (
        ("norm_affine", False),
        ("mlp_activation", "gelu_tanh"),
        ("long_shortcut", False),
        ("attn_relat_pos", None),
    ):
        assert config.get(name, supported) == supported, f"{name} {config[name]!r} is not supported"
    assert config["timestep_max_period"] == 10000.0
    shape = {
        "num_attention_heads": config["num_heads"],
        "attention_head_dim": config["hidden_size"] // config["num_heads"],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "num_layers": config["depth"],
        "sample_size": config["input_size"],
        "patch_size": config["patch_size"],
        "num_embeds_ada_norm": config["num_classes"],
        "class_dropout_prob": config["class_dropout_prob"],
        "attention_bias": config["qkv_bias"],
        "mlp_ratio": config["mlp_ratio"],
        "frequency_embedding_size": config["frequency_embedding_size"],
        "timestep_freq_shift": config["timestep_freq_shift"],
        "norm_eps": config["norm_eps"],
        "attention_norm_eps": config["norm_eps"],
        "output_norm_eps": config["norm_eps"],
        "num_train_timesteps": config.get("num_train_timesteps", 1000),
    }
    plain = {"num_pooling": 0, "num_sdtm": 0, "num_dense_top": config["depth"]}
    layout = _layout(config) if "num_poolingformer" in config else plain
    model = FlexDiTTransformer2DModel(**{**shape, **layout, **overrides})
    own = keys.from_reference(case.weights)[0] if "num_poolingformer" in config else keys.from_original(case.weights)
    table = case.weights["pos_embed"]
    assert torch.equal(model.pos_embed.pos_embed, table), "the position table differs from the reference's"
    model.load_state_dict(own, strict=True)
    return model.eval()


def _from_host(case: Case) -> FlexDiTTransformer2DModel:
    """The same network by the public way in; it must agree with the one built key by key."""
    return FlexDiTTransformer2DModel.from_host(
        case.weights,
        num_attention_heads=case.config["num_heads"],
        class_dropout_prob=case.config["class_dropout_prob"],
    ).eval()


@torch.no_grad()
def forward(case: Case) -> dict[str, Tensor]:
    args = case.options["args"]
    if "variant" in args:
        overrides = {} if args["variant"] == "original" else _timing(case.config[args["variant"]])
        model, density = _build(case, **overrides), "all"
    else:
        model, density = _build(case), args["density"]
        public = _from_host(case).state_dict()
        assert all(torch.equal(tensor, public[name]) for name, tensor in model.state_dict().items())
    inputs = case.inputs
    out = model(inputs["latents"], inputs["timesteps"], inputs["labels"], density=density).sample
    return _result(case, out)


def _timing(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "timestep_freq_shift": settings["timestep_freq_shift"],
        "attention_norm_eps": settings["norm1_eps"],
        "norm_eps": settings["norm3_eps"],
        "output_norm_eps": settings["norm_out_eps"],
    }


@torch.no_grad()
def module_output(case: Case) -> dict[str, Tensor]:
    args = case.options["args"]
    model = _build(case)
    blocks = model.transformer_blocks
    name = args.get("module") or f"blocks.{args['block']}"
    density = args.get("density", "all")
    caught: dict[str, Tensor] = {}

    def keep(module, inputs, output):
        caught["out"] = output

    outer = {
        "x_embedder": model.pos_embed.proj,
        "t_embedder": model.time_class_embed.timestep_embedder,
        "y_embedder": model.time_class_embed.class_embedder,
        "final_layer": model.proj_out_2,
    }
    if name in outer:
        outer[name].register_forward_hook(keep)
    elif name.endswith(".pooled_in"):
        first = blocks[_block_index(case.config, name.removesuffix(".pooled_in") + ".token_merge_blocks.0")]

        def pool(module, inputs, output):
            caught["out"] = grid_pool(inputs[0], tuple(case.config["grid_size"]), tuple(density))

        first.register_forward_hook(pool)
    elif name.endswith(".attn"):
        blocks[_block_index(case.config, name.removesuffix(".attn"))].attn1.register_forward_hook(keep)
    else:
        blocks[_block_index(case.config, name)].register_forward_hook(keep)
    inputs = case.inputs
    model(inputs["latents"], inputs["timesteps"], inputs["labels"], density=density)
    out = caught["out"]
    if name == "x_embedder":
        out = out.flatten(2).transpose(1, 2)
    want = case.expected[case.options["name"]].tensor
    start, end = args["batch"]
    return _result(case, out[start:end].expand_as(want))


def _block_index(config: dict[str, Any], name: str) -> int:
    """Depth index of a reference block, or of the last block of an SDTM named as a whole."""
    if name.startswith("blocks."):
        return int(name.split(".")[1])
    layout = _layout(config)
    prefixes = keys._reference_prefixes(**layout)
    if name in prefixes:
        return prefixes.index(name)
    return max(i for i, prefix in enumerate(prefixes) if prefix.startswith(f"{name}."))


@torch.no_grad()
def guided_output(case: Case) -> dict[str, Tensor]:
    model, inputs = _build(case), case.inputs
    raw = model(
        inputs["guidance_latents"],
        inputs["guidance_timesteps"],
        inputs["guidance_labels"],
        density=case.config["guidance_density"],
    ).sample
    channels = case.options["args"]["guided_channels"]
    return _result(case, guided(raw, float(inputs["guidance_scale"]), guided_channels=channels))


def _scheduler(config: dict[str, Any]) -> RespacedScheduler:
    assert config["beta_schedule"] == "linear"
    assert not config["ddim_clip"]
    scheduler = RespacedScheduler(config["num_train_timesteps"], config["beta_start"], config["beta_end"])
    scheduler.set_timesteps(config["ddim_steps"])
    return scheduler


def _table(config: dict[str, Any]) -> DensityTable:
    assert config["dynamic_rounding"] == "half_up"
    return DensityTable.from_rates(
        tuple(config["grid_size"]),
        config["dynamic_r_min"],
        config["dynamic_r_max"],
        num_train_timesteps=config["num_train_timesteps"],
        hold=config["dynamic_hold"],
    )


def ddim_timestep_map(case: Case) -> dict[str, Tensor]:
    return _result(case, _scheduler(case.config).timesteps.flip(0))


def density_schedule(case: Case) -> dict[str, Tensor]:
    timesteps = _scheduler(case.config).timesteps
    want = case.expected[case.options["name"]].tensor
    sides = _table(case.config).sides(timesteps)
    rows = [[t, *side][: want.shape[1]] for t, side in zip(timesteps.tolist(), sides, strict=True)]
    return _result(case, torch.tensor(rows))


@torch.no_grad()
def ddim_trajectory(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    model, scheduler = _build(case), _scheduler(config)
    if case.options["args"]["mode"] == "dynamic":
        model.set_density(_table(config))
    else:
        model.set_density(config["ddim_const_density"])
    latents, labels, scale = inputs["ddim_start"], inputs["guidance_labels"], float(inputs["guidance_scale"])
    trajectory = []
    for t, side in zip(scheduler.timesteps, model.precompute_densities(scheduler.timesteps), strict=True):
        doubled = torch.cat([latents, latents])
        raw = model(doubled, t.expand(len(doubled)), labels, density=side).sample
        out = guided(raw, scale, guided_channels=config["guidance_channels_reference"])[: len(latents)]
        latents = scheduler.step(out, t, latents, eta=config["ddim_eta"]).prev_sample
        trajectory.append(latents)
    return _result(case, torch.stack(trajectory))


@torch.no_grad()
def loss(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    process = DiffusionProcess(config["num_train_timesteps"], config["beta_start"], config["beta_end"])
    clean, noise, timesteps = inputs["latents"], inputs["loss_noise"], inputs["timesteps"]
    noised = process.add_noise(clean, noise, timesteps)
    if case.options["role"] == "loss_noised":
        return _result(case, noised)
    output = _build(case)(noised, timesteps, inputs["labels"], density=config["loss_density"]).sample
    terms = training_losses(
        output,
        clean,
        noise=noise,
        noised=noised,
        timesteps=timesteps,
        process=process,
        min_snr_gamma=config["min_snr_gamma"],
    )
    return _result(case, terms[_LOSSES[case.options["role"]]])


def _flexinit(case: Case, weights: dict[str, Tensor], config: dict[str, Any]) -> FlexDiTTransformer2DModel:
    return FlexDiTTransformer2DModel.from_host(
        weights,
        num_attention_heads=config["num_heads"],
        sample_size=config["input_size"],
        class_dropout_prob=config["class_dropout_prob"],
        **_layout(config["flexinit"]),
    ).eval()


@torch.no_grad()
def flexinit_forward(case: Case) -> dict[str, Tensor]:
    model, inputs = _flexinit(case, case.weights, case.config), case.inputs
    density = case.options["args"]["density"]
    return _result(case, model(inputs["latents"], inputs["timesteps"], inputs["labels"], density=density).sample)


def flexinit_parameter(case: Case) -> dict[str, Tensor]:
    model = _flexinit(case, case.weights, case.config)
    state = keys.to_reference(dict(model.named_parameters()), model.layout, **_layout(case.config["flexinit"]))
    return _result(case, state[case.options["args"]["parameter"]])


# -- a diffusers-named checkpoint beside an original-named companion


@lru_cache(maxsize=4)
def _companion(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads(path.with_suffix(".json").read_text()), load_file(path.with_suffix(".safetensors"))


def _checkpoint_cases(case_file: CaseFile, weights: dict[str, Tensor], base: str) -> Iterable[Case]:
    spec, tensors = _companion(case_file.path.with_name(case_file.spec["config"]["companion_case"]))
    inputs = {entry["role"]: tensors[name] for name, entry in spec["inputs"].items()}
    options = {"companion": spec["config"], "config": case_file.spec["config"]}
    original = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
    to_original = {name: Expected(t) for name, t in original.items() if name != "pos_embed"}
    yield Case(f"{base}[to_original]", "to_original", spec["config"], weights, inputs, to_original, options)
    back = {name: Expected(t) for name, t in weights.items()}
    yield Case(f"{base}[to_diffusers]", "to_diffusers", spec["config"], original, inputs, back, options)
    for name, entry in spec["outputs"].items():
        stock = entry["role"] == "forward" and entry["args"]["variant"] == "diffusers_stock"
        if stock or entry["role"] == "flexinit_forward":
            kind = "diffusers_host" if stock else "flexinit_forward"
            expected = _expected(name, tensors[name], entry)
            own = {**options, "name": name, "args": entry["args"]}
            yield Case(f"{base}[{name}]", kind, spec["config"], weights, inputs, expected, own)


def to_original(case: Case) -> dict[str, Tensor]:
    return keys.to_original(keys.from_diffusers(case.weights))


def to_diffusers(case: Case) -> dict[str, Tensor]:
    return keys.to_diffusers(keys.from_original(case.weights))


@torch.no_grad()
def diffusers_host(case: Case) -> dict[str, Tensor]:
    """The stock class with these weights, and the open-knob twin of that live host: both give the stored output."""
    from diffusers import DiTTransformer2DModel

    config = {k: v for k, v in case.options["config"].items() if k not in ("class_name", "companion_case")}
    host = DiTTransformer2DModel(**config).eval()
    host.load_state_dict(case.weights, strict=True)
    plain = {"num_pooling": 0, "num_sdtm": 0, "num_dense_top": config["num_layers"]}
    twin = FlexDiTTransformer2DModel.from_host(host, **plain).eval()
    inputs = case.inputs
    arguments = {"timestep": inputs["timesteps"], "class_labels": inputs["labels"]}
    want = case.expected[case.options["name"]]
    dense = host(inputs["latents"], **arguments).sample
    assert (dense - want.tensor).abs().max() <= want.atol
    return _result(case, twin(inputs["latents"], **arguments).sample)


BUILDERS = {
    "forward": forward,
    "module_output": module_output,
    "guided": guided_output,
    "ddim_timestep_map": ddim_timestep_map,
    "ddim_trajectory": ddim_trajectory,
    "density_schedule": density_schedule,
    "loss": loss,
    "flexinit_forward": flexinit_forward,
    "flexinit_parameter": flexinit_parameter,
    "to_original": to_original,
    "to_diffusers": to_diffusers,
    "diffusers_host": diffusers_host,
}
