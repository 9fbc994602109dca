"""The static table: every name of the zoo, the module that holds it, and what its card says.

It imports nothing, so listing models and printing cards loads neither torch nor a family. ``tests/zoo/test_table.py``
checks it against what the modules register. A family adds its names by calls of :func:`_add` at the end of this file,
its methods to ``METHODS``, and (denoisers, whose folders name a class instead of a method) its classes to
``CLASSES``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any, Literal

Loader = Literal["verified", "keys only", "untested"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What is known of one name before anything is imported.

    ``license_weights``, ``license_data`` and ``derived_from`` are those of the host for a twin that starts from its
    host. ``source`` says where weights of this very model come from: ``'shipped'`` (a file of this name in
    ``sparing/zoo/weights``), ``'hf:OWNER/REPO/FILE'``, or None when there are none. ``loader`` is 'verified' when
    published weights were loaded here and gave the published outputs, 'keys only' when nobody could load the real
    file here but names and shapes are covered by tests, 'untested' otherwise.
    """

    module: str
    task: str
    method: str | None = None
    host: str | None = None
    params: int | None = None
    license_code: str = "apache-2.0"
    license_weights: str | None = None
    license_data: str | None = None
    derived_from: str | None = None
    source: str | None = None
    loader: Loader = "untested"
    demo: bool = False
    notes: str = ""
    measured: Mapping[str, Any] = field(default_factory=dict)


MODELS: dict[str, Entry] = {}

# method -> 'module:Class'; the class meets the contract of sparing.zoo.twins.Twin
METHODS: dict[str, str] = {}

# diffusers-style class name (`_class_name` in config.json) -> 'module:Class'
CLASSES: dict[str, str] = {}

# method -> the paper that a card names
PAPERS: dict[str, str] = {
    "stvit": "Chang et al., Making Vision Transformers Efficient from A Token Sparsification View, CVPR 2023 "
    "(arXiv:2303.08685)",
    "tome": "Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023 (arXiv:2210.09461)",
    "fmvit": "Tan et al., FMViT: A multiple-frequency mixing Vision Transformer, 2023 (arXiv:2311.05707); "
    "no code was published, ours is FMViT-style",
}


def _add(module: str, task: str, method: str | None, rows: Mapping[str, Mapping[str, Any]], **shared: Any) -> None:
    """Adds ``rows`` (name -> further fields of Entry) that share a module, a task, a method and the fields in
    ``shared``.
    """
    for name, row in rows.items():
        if name in MODELS:
            raise ValueError(f"{name!r} stands twice in the table")
        MODELS[name] = Entry(module=module, task=task, method=method, **{**shared, **row})


def find_entry(name: str) -> Entry:
    """The entry of a name.

    Raises:
        ValueError: the name is unknown; the message names the closest ones.
    """
    if name in MODELS:
        return MODELS[name]
    raise ValueError(
        f"unknown model {name!r}; {closest(name, MODELS) or 'see sparing.list_models()'}; "
        "hosts are named timm/NAME, torchvision/NAME, open_clip/NAME"
    )


def closest(name: str, known: Iterable[str], *, most: int = 4) -> str:
    """``'closest: a, b'`` for an unknown name, or ``''`` when nothing comes near; beginnings count as much as whole
    names.
    """

    def likeness(candidate: str) -> float:
        whole = SequenceMatcher(None, name, candidate)
        beginning = SequenceMatcher(None, name, candidate[: len(name)])
        return max(whole.ratio(), beginning.ratio() - 0.02)

    near = sorted(((likeness(candidate), candidate) for candidate in known), key=lambda pair: (-pair[0], pair[1]))
    names = [candidate for score, candidate in near[:most] if score >= 0.55]
    return f"closest: {', '.join(names)}" if names else ""


# -- vision: the small host of the demo, trained by benchmarks/fashion_table.py
_add(
    "sparing.vision.micro",
    "image-classification",
    None,
    {"vit_micro_patch4_28.demo_fashion": {"params": 902_218}},
    license_data="mit",
    demo=True,
    notes="Fashion-MNIST, 28 x 28 grey",
)
