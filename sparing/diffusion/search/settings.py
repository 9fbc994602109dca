"""Numbers that somebody chose, by a call or on a command line: of the right kind, or an error that names the argument
and the value.
"""

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

__all__ = ["check_lists", "check_numbers", "check_whole"]


def check_whole(**given: Any) -> None:
    """Raises a ValueError for what is no whole number."""
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise ValueError(f"{name} must be a whole number, got {value!r}")


def check_numbers(**given: Any) -> None:
    """Raises a ValueError for what is no finite number."""
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value!r}")


def check_lists(check: Callable[..., None], **given: Any) -> None:
    """Raises a ValueError for what is no list, or has an entry that ``check`` refuses."""
    for name, values in given.items():
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise ValueError(f"{name} must be a list of numbers, got {values!r}")
        for i, value in enumerate(values):
            check(**{f"{name}[{i}]": value})
