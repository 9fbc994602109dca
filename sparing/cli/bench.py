"""``sparing bench kernels``: measure the kernels on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from sparing.cli.app import app
from sparing.cli.options import JsonFile, write_json

benches = typer.Typer(help="Measure on this machine.", no_args_is_help=True)
app.add_typer(benches, name="bench")


@benches.command()
def kernels(
    op: Annotated[list[str] | None, typer.Option(help="Only this op; repeatable.")] = None,
    suite: Annotated[str, typer.Option(help="smoke, paper (published sizes) or full (and sweeps).")] = "smoke",
    out: Annotated[Path | None, typer.Option(help="Folder for kernels.json, kernels.md, kernels.png.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    compare: Annotated[Path | None, typer.Option(help="An older kernels.json: fail on what became slower.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Check every backend of every op, then time those that are right; exit code 1 on a wrong or a slower one."""
    from sparing.kernels.bench import run

    to_stdout = str(json_file) == "-"
    say = (lambda line: typer.echo(line, err=True)) if to_stdout else typer.echo
    result = run(suite=suite, ops=op, out=out, device=device, compare=compare, say=say)
    write_json(result.data, json_file)
    for line in [f"WRONG {line}" for line in result.failures] + [f"SLOWER {line}" for line in result.regressions]:
        typer.echo(line, err=True)
    if result.failures or result.regressions:
        raise typer.Exit(1)
