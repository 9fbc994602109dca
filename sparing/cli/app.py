"""The application: its commands, and how errors leave it.

A user's mistake is one line on standard error and exit code 2. ``SPARING_DEBUG=1`` lets the traceback through
instead.
"""

import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

import sparing

# What public functions raise for bad input; RuntimeError stays a traceback, it is our own mistake.
_USER_ERRORS = (ValueError, TypeError, OSError, NotImplementedError, ImportError)


class OneLineErrors(TyperGroup):
    """Turns errors about what the user gave into one line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except _USER_ERRORS as error:
            if os.environ.get("SPARING_DEBUG"):
                raise
            fail(str(error) or type(error).__name__)


def fail(message: str) -> None:
    """Prints one line and leaves with exit code 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise typer.Exit(2)


app = typer.Typer(
    name="sparing",
    cls=OneLineErrors,
    help="Efficient twins of dense models: list, make, measure, use.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(sparing.__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Efficient twins of dense models: list, make, measure, use."""


from sparing.cli import bench, detect, doctor, generate, images, recipes, search, stream, zoo  # noqa: E402, F401  (they add commands)


def main() -> None:
    """Entry point of the ``sparing`` script."""
    app()
