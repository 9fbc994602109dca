"""Whether a file can be written, asked before the long work whose result it shall hold."""

import tempfile
from collections.abc import Collection
from pathlib import Path

__all__ = ["check_output"]


def check_output(path: str | Path, *, suffixes: Collection[str] | None = None, make_folder: bool = True) -> Path:
    """The path of a file to be written later, checked now.

    Args:
        path: the file; an existing one will be replaced.
        suffixes: what its suffix may be, in small letters; None: anything.
        make_folder: make its folder where there is none, as the writers of media do.

    Raises:
        ValueError: another suffix, or the path is a folder.
        OSError: the folder is not there, cannot be made or takes no file.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"cannot write {str(path)!r}: it is a folder, give a file")
    if suffixes is not None and path.suffix.lower() not in suffixes:
        raise ValueError(f"cannot write {str(path)!r}: no format has the suffix {path.suffix!r}")
    try:
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        raise OSError(f"cannot write {str(path)!r}: {error.strerror} ({str(path.parent)!r})") from error
