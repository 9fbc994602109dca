"""Golden cases of the kernel layer: the groups below divide the ops among themselves by the file's ``model``."""

from collections.abc import Callable, Iterable

from torch import Tensor

from golden.adapters import kernels_attention, kernels_other
from golden.harness import Case, CaseFile

GROUPS = (kernels_attention, kernels_other)

BUILDERS: dict[str, Callable[[Case], dict[str, Tensor]]] = {
    kind: builder for group in GROUPS for kind, builder in group.BUILDERS.items()
}


def cases(case_file: CaseFile) -> Iterable[Case]:
    model = case_file.spec["model"]
    if model not in BUILDERS:  # a kind that no group builds: the harness fails it by name
        yield Case(f"{case_file.folder}/{case_file.name}", model, {}, {}, {}, {})
    for group in GROUPS:
        if model in group.BUILDERS:
            yield from group.cases(case_file)
