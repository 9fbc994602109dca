"""The command line: ``sparing ...``. Thin: every command is one call of a public function, and no import is heavier
than it.
"""

from sparing.cli.app import app, main

__all__ = ["app", "main"]
