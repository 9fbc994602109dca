"""Golden cases of structured pruning adapters."""

import torch
from torch import Tensor, nn

from golden.harness import Case
from sparing.continual import adapters

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _run(module, case: Case, *call: Tensor) -> dict[str, Tensor]:
    """Output in both modes (they must agree), the fused layer's state, and that the fused layer gives the same
    output.
    """
    module.load_state_dict(case.weights)

    def output(network):
        out = network(*call)
        return out[0] if isinstance(out, tuple) else out

    with torch.no_grad():
        training, evaluated = output(module.train()), output(module.eval())
        fused = module.fuse().eval()
        torch.testing.assert_close(training, evaluated, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(output(fused), evaluated, atol=1e-6, rtol=1e-5)
    return {"output": evaluated} | {f"fused/{key}": value for key, value in fused.state_dict().items()}


def _linear(c: dict) -> nn.Linear:
    return nn.Linear(c["in_features"], c["out_features"], bias=c["bias"])


def _conv(c: dict) -> nn.Module:
    return CONVS[c["dims"] - 1](
        c["in_channels"],
        c["out_channels"],
        tuple(c["kernel_size"]),
        stride=tuple(c["stride"]),
        padding=tuple(c["padding"]),
        groups=c["groups"],
        bias=c["bias"],
    )


def splora_linear(case: Case) -> dict[str, Tensor]:
    return _run(adapters.SPLoRALinear(_linear(case.config), rank=case.config["rank"]), case, case.inputs["input"])


def splora_conv(case: Case) -> dict[str, Tensor]:
    module = adapters.SPLoRAConv(_conv(case.config), rank=case.config["rank_argument"])
    assert module.adapter.rows.shape[1] == case.config["rank"]
    return _run(module, case, case.inputs["input"])


def sppara_conv(case: Case) -> dict[str, Tensor]:
    return _run(adapters.SPPaRAConv(_conv(case.config)), case, case.inputs["input"])


def splora_mha(case: Case) -> dict[str, Tensor]:
    c = case.config
    plain = nn.MultiheadAttention(c["embed_dim"], c["num_heads"], bias=c["bias"], batch_first=c["batch_first"])
    return _run(adapters.SPLoRAMultiheadAttention(plain, rank=c["rank"]), case, *[case.inputs["input"]] * 3)


def splopa_linear(case: Case) -> dict[str, Tensor]:
    c = case.config
    module = adapters.SPLoPALinear(
        _linear(c),
        block_shape=tuple(c["block_shape"]),
        num_prototypes=c["num_prototypes"],
        prototype_rank=c["prototype_rank"],
    )
    return _run(module, case, case.inputs["input"])


def splora_linear_pruned(case: Case) -> dict[str, Tensor]:
    module = adapters.SPLoRALinear(_linear(case.config), rank=case.config["rank"])
    module.load_state_dict(case.weights)
    whole = module.adapted_weight()
    out_kept, in_kept = case.inputs["out_mask"].bool(), case.inputs["in_mask"].bool()
    module.prune(out_kept=out_kept, in_kept=in_kept)
    torch.testing.assert_close(module.fuse().weight, whole[out_kept][:, in_kept], atol=1e-6, rtol=1e-5)
    return {
        "output": module.eval()(case.inputs["input"]),
        "pruned_weight": module.stored_weight,
        "pruned_bias": module.bias,
        "pruned_adapter_rows": module.adapter.rows,
        "pruned_adapter_cols": module.adapter.cols,
    }


BUILDERS = {
    "splora_linear": splora_linear,
    "splora_conv": splora_conv,
    "sppara_conv": sppara_conv,
    "splora_mha": splora_mha,
    "splopa_linear": splopa_linear,
    "splora_linear_pruned": splora_linear_pruned,
}
