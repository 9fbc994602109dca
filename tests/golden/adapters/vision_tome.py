"""Golden cases of token merging: one subcase for each entry of ``config.cases``."""

from collections.abc import Iterable

import torch
from torch import Tensor

from golden.adapters import vision_described as described
from golden.harness import Case, CaseFile
from sparing.vision.tome import match_tokens


def cases(case_file: CaseFile) -> Iterable[Case]:
    outputs = described.outputs_by_role(case_file)
    for entry in case_file.spec["config"]["cases"]:
        names = [name for name, (_, args) in outputs.items() if args["case"] == entry["name"]]
        yield Case(
            f"{case_file.folder}/{case_file.name}[{entry['name']}]",
            case_file.spec["model"],
            entry,
            {},
            described.inputs(case_file),
            described.expected(case_file, names),
            {"roles": {name: outputs[name] for name in names}},
        )


def build(case: Case) -> dict[str, Tensor]:
    x, metric = case.inputs["tokens"], case.inputs["metric"]
    batch, tokens, _ = x.shape
    class_token, distill_token = case.config["class_token"], case.config["distill_token"]
    merge = match_tokens(
        metric,
        case.config["r"],
        protected=2 if distill_token else int(class_token),  # a distillation token is the second, whatever the first is
        first_is_free=distill_token and not class_token,
    )
    if merge is None:
        assert case.config["r_effective"] == 0
        return _unchanged(case)
    assert merge.merged.shape[1] == case.config["r_effective"]
    merged, size = merge.mean(x, x.new_ones(batch, tokens, 1))
    start = _start_sizes(case)
    merged_weighted, size_weighted = merge.mean(x, start)
    by_role = {
        "merged": merged,
        "size": size,
        "merged_weighted": merged_weighted,
        "size_weighted": size_weighted,
        "source": merge.sum(torch.eye(tokens).expand(batch, tokens, tokens)),
        "unmerged": merge.unmerge(merged),
    }
    return {name: by_role[role] for name, (role, _) in case.options["roles"].items()}


def _start_sizes(case: Case) -> Tensor:
    """Sizes (batch, tokens, 1) before the weighted merge, described as ``FIRST..LAST``, one a token."""
    x = case.inputs["tokens"]
    first, last = (int(part) for part in case.config["start_sizes_weighted"].split(".."))
    assert last - first + 1 == x.shape[1]
    return torch.arange(first, last + 1, dtype=x.dtype)[None, :, None].expand(x.shape[0], -1, 1)


def _unchanged(case: Case) -> dict[str, Tensor]:
    """Nothing merges: every token is its own group."""
    x = case.inputs["tokens"]
    batch, tokens, _ = x.shape
    sizes = {
        "size": x.new_ones(batch, tokens, 1),
        "size_weighted": _start_sizes(case),
        "source": torch.eye(tokens).expand(batch, tokens, tokens),
    }
    return {name: sizes.get(role, x) for name, (role, _) in case.options["roles"].items()}


BUILDERS = {"tome_bipartite_merge": build}
