"""``sparing doctor``: versions, devices, and which backend of every op works here, and why the others do not."""

import typer

from sparing.cli.app import app
from sparing.cli.options import JsonFile, write_json


@app.command()
def doctor(json_file: JsonFile = None) -> None:
    """Say what is installed, what this machine has, and which kernels it can use."""
    from sparing.zoo.doctor import examine

    report = examine()
    if not write_json(report.to_dict(), json_file):
        typer.echo(str(report))
