"""A progress bar for long work: silent when standard error is not a terminal."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

__all__ = ["progress"]

Item = TypeVar("Item")


def progress(
    items: Iterable[Item], *, total: int | None = None, initial: int = 0, description: str = "", enabled: bool = True
) -> Iterator[Item]:
    """Yield ``items`` and show how many are done; ``enabled=False`` (ranks other than 0) shows nothing."""
    # disable=None: tqdm stays silent when its file is not a terminal
    yield from tqdm(
        items, total=total, initial=initial, desc=description, disable=None if enabled else True, leave=False
    )
