"""``sparing recipes``: the readable scripts that come with the package."""

from pathlib import Path
from typing import Annotated

import typer

from sparing.cli.app import app
from sparing.cli.options import JsonFile, write_json

recipes = typer.Typer(help="List the recipes, or copy one to change it.", invoke_without_command=True)
app.add_typer(recipes, name="recipes")


@recipes.callback()
def _recipes(context: typer.Context) -> None:
    """List the recipes, or copy one to change it."""
    if context.invoked_subcommand is None:
        list_all()


@recipes.command("list")
def list_all(json_file: JsonFile = None) -> None:
    """List the recipes."""
    from sparing.recipes.catalog import list_recipes

    found = list_recipes()
    if write_json([{"name": recipe.name, "summary": recipe.summary} for recipe in found], json_file):
        return
    width = max((len(recipe.name) for recipe in found), default=0)
    for recipe in found:
        print(f"{recipe.name:<{width}}  {recipe.summary}")
    print("run: python -m sparing.recipes.NAME --help (or accelerate launch -m ...); change: sparing recipes copy NAME")


@recipes.command()
def copy(
    name: Annotated[str, typer.Argument(help="A name from the list.")],
    directory: Annotated[Path, typer.Argument(help="Where to.")] = Path(),
) -> None:
    """Copy a recipe into a folder; a file that is there already is left alone."""
    from sparing.recipes.catalog import copy_recipe

    print(copy_recipe(name, directory))
