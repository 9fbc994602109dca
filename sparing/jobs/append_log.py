"""An append-only log of JSON lines: the first line says what the job is, every further one what was done.

A batch of lines is one write, flushed to the disk before ``append`` returns. Whatever kills the process, the file holds
whole lines and at most one torn last one, which the next opening drops. One process writes at a time: the file is
locked (``flock``) while it is open. A file that is no log of the kind is never written to.
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["AppendLog", "LogInUse", "LogMismatch", "differences", "read_log"]

_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class LogMismatch(ValueError):
    """The log is of another job."""


class LogInUse(ValueError):
    """Another process writes the log, or another object of this one."""


class AppendLog:
    """Opens ``path`` to go on with it, or begins it.

    Args:
        path: a .jsonl file.
        header: says what the job is; the first line.
        ignore: header fields that may differ from those of an earlier run (versions, say).
        force: go on although the header differs.

    ``records`` are the lines of earlier runs. A log of another job without a single record is begun anew. A file is
    taken for a log when it is empty or begins, torn or whole, with the name of the header's first field.

    Raises:
        LogInUse: it is open for writing already.
        LogMismatch: the file is of another job; the message names the fields that differ.
        ValueError: the file is no log, or a line in the middle is no JSON object.
        OSError: the disk is full, or the file cannot be written; what it held is intact.
    """

    def __init__(
        self, path: str | Path, header: Mapping[str, Any], *, ignore: Iterable[str] = (), force: bool = False
    ) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(self._file, self.path)
            _refuse_foreign(self.path, header)
            lines, self._size = _read(self.path)
            self.records: list[dict[str, Any]] = lines[1:]
            if lines and not self.records and _differences(lines, header, ignore):
                lines, self._size = [], 0  # another job that never did anything: nothing is lost
            if not force:
                _refuse_another(self.path, lines, header, ignore)
            os.ftruncate(self._file, self._size)  # a torn last line
            if not lines:
                self.append([dict(header)], keep=False)
        except BaseException:
            self.close()
            raise

    def append(self, records: Iterable[Mapping[str, Any]], *, keep: bool = True) -> None:
        """Writes the records as one block and waits until they are on the disk.

        Raises:
            OSError: nothing of the block is in the log then.
        """
        records = list(records)
        if not records:
            return
        block = "".join(_line(record) for record in records).encode()
        try:
            written = 0
            while written < len(block):
                written += os.pwrite(self._file, block[written:], self._size + written)
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, self._size)
            what = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error.strerror)
            raise OSError(
                error.errno,
                f"{what}: could not write to {self.path}; it is intact up to its {len(self.records)} records, and a "
                "later run goes on from there",
            ) from error
        self._size += len(block)
        if keep:
            self.records += [_restored(json.loads(line)) for line in block.decode().splitlines()]

    def close(self) -> None:
        if self._file >= 0:
            with contextlib.suppress(OSError):  # the file system may have no locks
                fcntl.flock(self._file, fcntl.LOCK_UN)  # else a forked child, which has the file too, holds the lock
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> "AppendLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _lock(file: int, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LogInUse(
            f"{path} is being written by another process: wait for it or stop it, or take another folder"
        ) from None
    except OSError as error:  # some network file systems have no locks
        warnings.warn(f"{path} cannot be locked ({error.strerror}): do not run the job twice at once", stacklevel=4)


def differences(logged: Any, present: Any, *, ignore: Iterable[str] = (), name: str = "") -> list[str]:
    """The fields in which two headers differ, in words; nested fields by dotted names."""
    if isinstance(logged, dict) and isinstance(present, dict):
        found = []
        for key in [*logged, *(key for key in present if key not in logged)]:
            if key not in ignore:
                inner = f"{name}.{key}" if name else key
                found += differences(logged.get(key), present.get(key), name=inner)
        return found
    same = logged == present or (logged != logged and present != present)
    return [] if same else [f"{name} was {logged!r} and is now {present!r}"]


def _differences(lines: list[dict[str, Any]], header: Mapping[str, Any], ignore: Iterable[str]) -> list[str]:
    return differences(lines[0], _restored(json.loads(_line(header))), ignore=ignore)


def _refuse_another(path: Path, lines: list[dict[str, Any]], header: Mapping[str, Any], ignore: Iterable[str]) -> None:
    found = _differences(lines, header, ignore) if len(lines) > 1 else []
    if found:
        raise LogMismatch(f"{path} is the log of another job; " + "; ".join(found))


def _refuse_foreign(path: Path, header: Mapping[str, Any]) -> None:
    """A file of somebody else's: its beginning is not that of our header, nor was it torn within that."""
    beginning = _line(header).partition(":")[0].encode()
    with path.open("rb") as file:
        found = file.read(len(beginning))
    if not beginning.startswith(found):
        raise ValueError(f"{path} is no log of this program and is left alone: move it, or take another folder")


def read_log(
    path: str | Path, header: Mapping[str, Any] | None = None, *, ignore: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """Header and records of a log that this process does not write; a torn last line is left out.

    Args:
        header: what the job is, where records of another one are refused; ``ignore``: fields that may differ.

    Raises:
        LogMismatch: it has records, of another job than ``header``; the message names the fields that differ.
        ValueError: a line in the middle is no JSON object.
    """
    lines = _read(Path(path))[0]
    if header is not None:
        _refuse_another(Path(path), lines, header, ignore)
    return lines


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """(whole lines as records, bytes they take)."""
    content = path.read_bytes() if path.exists() else b""
    records, size = [], 0
    lines = content.split(b"\n")
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is a torn line
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError
        except ValueError:
            if number == len(lines) - 1:
                break
            raise ValueError(f"line {number} of {path} is not a JSON object; the log was edited or damaged") from None
        records.append(_restored(record))
        size += len(line) + 1
    return records, size


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(_storable(record), separators=(",", ":"), allow_nan=False) + "\n"


def _storable(value: Any) -> Any:
    """JSON has no NaN and infinities: they become strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _storable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_storable(entry) for entry in value]
    return value


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _restored_number(key, entry) for key, entry in value.items()}
    return value


def _restored_number(key: str, value: Any) -> Any:
    """Fields called score or scores hold numbers; a prompt 'nan' stays a word."""
    if key == "score":
        return _NOT_FINITE.get(value, value) if isinstance(value, str) else value
    if key == "scores" and isinstance(value, dict):
        return {name: _NOT_FINITE.get(v, v) if isinstance(v, str) else v for name, v in value.items()}
    return value
