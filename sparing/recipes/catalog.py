"""What recipes there are, and a copy of one to change: ``sparing recipes``, ``sparing recipes copy NAME``."""

import ast
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sparing.zoo.table import closest

__all__ = ["Recipe", "copy_recipe", "list_recipes"]

_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Recipe:
    """A readable script of this folder: ``python -m sparing.recipes.NAME``, or under ``accelerate launch -m``."""

    name: str
    summary: str
    path: Path


def list_recipes() -> list[Recipe]:
    """All scripts of this folder (files with a ``main``), read without importing them."""
    recipes = []
    for path in sorted(_HERE.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            summary = (ast.get_docstring(tree) or "").partition("\n\n")[0]
            recipes.append(Recipe(path.stem, " ".join(summary.split()), path))
    return recipes


def copy_recipe(name: str, directory: str | Path = ".") -> Path:
    """Copies a recipe as ``DIRECTORY/NAME.py``, to be changed and run by ``python NAME.py``.

    Raises:
        ValueError: there is no such recipe (the closest are named).
        FileExistsError: the target is there already; it is left as it is.
    """
    recipes = {recipe.name: recipe for recipe in list_recipes()}
    if name not in recipes:
        raise ValueError(f"no recipe {name!r}; {closest(name, recipes) or 'there are ' + ', '.join(recipes)}")
    target = Path(directory) / f"{name}.py"
    if target.exists():
        raise FileExistsError(f"{str(target)!r} is there already and was left as it is")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=target.parent) as folder:
        draft = shutil.copyfile(recipes[name].path, Path(folder) / target.name)
        os.replace(draft, target)
    return target
