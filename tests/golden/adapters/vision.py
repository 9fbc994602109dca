"""Golden cases of the vision family: one module a group of kinds; a case file belongs to the group that builds its
``model``.
"""

from collections.abc import Callable, Iterable

from torch import Tensor

from golden.adapters import vision_stvit, vision_stvit_r, vision_tome
from golden.harness import Case, CaseFile

GROUPS = (vision_stvit, vision_stvit_r, vision_tome)

BUILDERS: dict[str, Callable[[Case], dict[str, Tensor]]] = {
    kind: builder for group in GROUPS for kind, builder in group.BUILDERS.items()
}


def cases(case_file: CaseFile) -> Iterable[Case]:
    kind = case_file.spec["model"]
    if kind not in BUILDERS:  # the harness fails it by name
        yield Case(f"{case_file.folder}/{case_file.name}", kind, {}, {}, {}, {})
    for group in GROUPS:
        if kind in group.BUILDERS:
            yield from group.cases(case_file)
