"""Imports run downward only (DESIGN 'The house'); every import counts, also those inside functions."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sparing"
FAMILIES = {"vision", "diffusion", "video_language", "audio", "continual"}
GROUND = {"kernels", "zoo", "media", "training", "jobs", "metrics"}
EVERYWHERE = {"_compat", ""}  # the one room of upstream privates; the face itself (`import sparing` for its version)


def allowed(room: str) -> set[str]:
    """Rooms that a file of ``room`` may import from."""
    if room == "cli":
        return {"cli", "recipes"} | FAMILIES | GROUND | EVERYWHERE
    if room == "recipes":
        return {"recipes"} | FAMILIES | GROUND | EVERYWHERE
    if room in FAMILIES:
        return {room} | GROUND | EVERYWHERE
    if room == "zoo":
        return {"zoo", "kernels", "media"} | EVERYWHERE
    if room in GROUND:
        return {room} | EVERYWHERE
    if room == "":
        return {"zoo"}
    return {"_compat"} if room == "_compat" else set()


def room_of(module: str) -> str:
    """The room of a dotted module inside the package: '' is the face."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports_of(source: str, module: str, is_package: bool) -> list[tuple[int, str]]:
    """Line and absolute module of every import of ``sparing`` in ``source``, found anywhere in it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + (1 if is_package else 0)]
                base = ".".join([*parents, base] if base else parents)
            found += [(node.lineno, f"{base}.{alias.name}" if base == "sparing" else base) for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                found.append((node.lineno, node.args[0].value))
    return [(line, name) for line, name in found if name.split(".")[0] == "sparing"]


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    room = room_of(module)
    rooms = FAMILIES | GROUND | {"cli", "recipes", "_compat"}
    bad = []
    for line, name in imports_of(source, module, is_package):
        target = room_of(name)
        if target in rooms and target not in allowed(room):
            bad.append(f"{module} line {line} imports {name}")
    return bad


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_imports_run_downward(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    module = ".".join(parts[:-1] if is_package else parts)
    assert not violations(path.read_text(encoding="utf-8"), module, is_package)


@pytest.mark.parametrize(
    ("module", "source", "bad"),
    [
        ("sparing.vision.stvit", "from sparing.kernels import attention", False),
        ("sparing.vision.stvit", "def f():\n    from sparing.diffusion import flexdit", True),
        ("sparing.vision.stvit", "from ..audio import genau", True),
        ("sparing.vision.stvit", "from .tome import merge", False),
        ("sparing.vision.stvit", "import importlib\nimportlib.import_module('sparing.recipes.demo')", True),
        ("sparing.kernels.ops.attention", "from sparing.zoo import table", True),
        ("sparing.zoo.profile", "from sparing.kernels import attention", False),
        ("sparing.zoo.profile", "import sparing.training.seeds", True),
        ("sparing.training.resume", "from sparing.media import image", True),
        ("sparing.recipes.demo", "from sparing import vision", False),
        ("sparing.continual.layers", "from sparing import vision", True),
        ("sparing.audio.genau", "from sparing import cli", True),
        ("sparing.zoo.twins", "import sparing", False),
    ],
)
def test_the_rule_itself(module, source, bad):
    assert bool(violations(source, module)) is bad


def test_every_folder_of_the_package_is_a_known_room():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert folders | files <= FAMILIES | GROUND | {"cli", "recipes", "_compat"}


def private_names(source: str) -> list[str]:
    """Imports and attributes of other libraries that these call private (a leading underscore anywhere in the path)."""
    found, libraries = [], set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            libraries |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in libraries:
            found.append(f"{node.value.id}.{node.attr}")
    private = [
        name for name in found if any(part.startswith("_") and part[1] != "_" for part in name.split(".") if part)
    ]
    return [name for name in private if name.split(".")[0] != "sparing"]


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_private_names_of_other_libraries_stand_in_compat_only(path):
    assert path.name == "_compat.py" or private_names(path.read_text(encoding="utf-8")) == []


def test_the_rule_about_private_names_itself():
    assert private_names("import torch\ntorch._C") == ["torch._C"]
    assert private_names("def f():\n    from timm.models._features import X") == ["timm.models._features.X"]
    assert private_names("import torch\ntorch.__version__\nfrom sparing._compat import x\nself._x") == []
