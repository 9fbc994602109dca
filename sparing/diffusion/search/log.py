"""The record of a search in a folder, from which it goes on after a kill.

    candidates.jsonl          header, then a line a candidate (of several processes: merged by the first, by rounds)
    candidates.rank1.jsonl    of further processes
    states/*.safetensors      latents and solver state of candidates that stopped in the middle, a file a batch
    samples/                  kept samples: exact (.safetensors), images also as .png

States are on the disk before the lines that promise them. Random and zero-order search store none: a recipe and its
ancestors rebuild a noise. A damaged sample counts as none, a damaged line or state is an error that names the file.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sparing.diffusion.search import history as solver_history
from sparing.diffusion.search.protocol import recipe_from_json, recipe_to_json
from sparing.diffusion.search.result import Candidate
from sparing.jobs import AppendLog, read_log
from sparing.media.image import write_image
from sparing.training.checkpoint import atomic_file

__all__ = ["Midway", "SearchLog", "candidate_from_json", "candidate_to_json"]

_FIELDS = tuple(
    name
    for name in Candidate.__dataclass_fields__
    if name not in ("sample", "preview", "noise")  # these are no text
)
_NEEDED = tuple(field.name for field in fields(Candidate) if field.default is MISSING)
_WHOLE = ("id", "prompt", "round", "index", "start", "stop", "nfe", "forwards", "batch_size")
_MAY_DIFFER = ("version", "batch_size", "processes", "budget")  # a search goes on with a larger budget

Key = tuple[int, int]  # (prompt, id)


@dataclass
class Midway:
    """Where a candidate stopped before the end: tensors without batch axis, on the CPU, history of one row."""

    latent: Tensor
    x0_hat: Tensor | None
    generator: Tensor | None
    history: dict[str, Any] | None


def candidate_to_json(candidate: Candidate) -> dict[str, Any]:
    record = {name: getattr(candidate, name) for name in _FIELDS}
    record["recipe"] = recipe_to_json(candidate.recipe)
    record["seconds"] = round(candidate.seconds, 6)
    optional = {"error": None, "via": "full"}
    return {name: value for name, value in record.items() if name not in optional or value != optional[name]}


def candidate_from_json(record: Mapping[str, Any]) -> Candidate:
    """The inverse of :func:`candidate_to_json`.

    Raises:
        ValueError: the record is no candidate: something is missing, or of the wrong kind.
    """
    missing = [name for name in _NEEDED if name not in record]
    if missing:
        raise ValueError(f"it has no {', '.join(missing)}")
    wrong = [name for name in _WHOLE if not isinstance(record[name], int)]
    wrong += [name for name in ("score", "seconds") if not isinstance(record[name], int | float)]
    scores = record["scores"]
    if not isinstance(scores, Mapping) or not all(isinstance(score, int | float) for score in scores.values()):
        wrong.append("scores")
    if wrong:
        raise ValueError("; ".join(f"{name} cannot be {record[name]!r}" for name in wrong))
    try:
        recipe = recipe_from_json(record["recipe"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"recipe cannot be {record['recipe']!r}") from error
    known = {name: record[name] for name in _FIELDS if name in record}
    return Candidate(**{**known, "recipe": recipe})


def _candidates(records: Sequence[Mapping[str, Any]], path: Path, verifiers: Sequence[str]) -> dict[Key, Candidate]:
    """The candidates of a log, of which line 1 is the header.

    Raises:
        ValueError: a line is none, or has scores of other verifiers; file and line are named.
    """
    found = {}
    for number, record in enumerate(records, 2):
        try:
            candidate = candidate_from_json(record)
            if set(candidate.scores) != set(verifiers):
                theirs = ", ".join(candidate.scores) or "nobody"
                raise ValueError(f"it has scores of {theirs}, and this search asks {', '.join(verifiers)}")
        except ValueError as error:
            raise ValueError(f"line {number} of {path} is no candidate of this search: {error}") from error
        found[candidate.prompt, candidate.id] = candidate
    return found


class SearchLog:
    """Opens or begins the record in ``folder``; ``folder=None`` keeps everything in memory.

    Args:
        header: what the search is, ``verifiers`` among it. Fields that were changed since raise, by name, unless
            ``force``.
        rank, world: of this process. With several, each writes candidates.rankR.jsonl, and the first merges.

    Raises:
        ValueError: a log in the folder is of another search, or a line or a state is damaged; the file is named.
    """

    def __init__(
        self,
        folder: str | Path | None,
        header: Mapping[str, Any],
        *,
        rank: int = 0,
        world: int = 1,
        force: bool = False,
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self.known: dict[Key, Candidate] = {}
        self._midway: dict[Key, Midway] = {}
        self._where: dict[Key, Path] = {}
        self._logs: list[AppendLog] = []  # what a batch is written to, and what a round is merged into
        self._written: list[set[Key]] = []
        if self.folder is None:
            return
        names = [] if rank else ["candidates.jsonl"]
        if world > 1:
            names.insert(0, f"candidates.rank{rank}.jsonl")
        try:
            self._open(names, header, force=force)
        except BaseException:
            self.close()
            raise

    def _open(self, names: Sequence[str], header: Mapping[str, Any], *, force: bool) -> None:
        assert self.folder is not None
        verifiers = header["verifiers"]
        for name in names:
            log = AppendLog(self.folder / name, header, ignore=_MAY_DIFFER, force=force)
            self._logs.append(log)
            candidates = _candidates(log.records, log.path, verifiers)
            self._written.append(set(candidates))
            self.known |= candidates
        for path in sorted(self.folder.glob("candidates*.jsonl")):
            if path.name not in names:  # of further processes
                records = read_log(path, None if force else header, ignore=_MAY_DIFFER)[1:]
                self.known = {**_candidates(records, path, verifiers), **self.known}
        for path in sorted((self.folder / "states").glob("*.safetensors")):
            with _state_file(path) as file:
                for prompt, id in json.loads((file.metadata() or {}).get("candidates", "[]")):
                    self._where[prompt, id] = path

    def add(self, candidates: Sequence[Candidate], midway: Mapping[Key, Midway]) -> None:
        """Records one batch: states first, then its lines, one write."""
        if self.folder is not None and midway:
            self._write_midway(midway)
        self._midway.update(midway)
        self._write(0, candidates)

    def merge(self, candidates: Sequence[Candidate]) -> None:
        """A whole round of all processes, in order; only the first process writes."""
        if len(self._logs) > 1:
            self._write(1, candidates)
        self.known |= {(candidate.prompt, candidate.id): candidate for candidate in candidates}

    def _write(self, which: int, candidates: Sequence[Candidate]) -> None:
        if self._logs:
            written = self._written[which]
            new = [candidate for candidate in candidates if (candidate.prompt, candidate.id) not in written]
            self._logs[which].append([candidate_to_json(candidate) for candidate in new], keep=False)
            written |= {(candidate.prompt, candidate.id) for candidate in new}
        self.known |= {(candidate.prompt, candidate.id): candidate for candidate in candidates}

    def _write_midway(self, midway: Mapping[Key, Midway]) -> None:
        assert self.folder is not None
        tensors: dict[str, Tensor] = {}
        rest: dict[str, Any] = {}
        for (prompt, id), state in midway.items():
            name = f"{prompt}/{id}"
            tensors[f"{name}/latent"] = state.latent.contiguous()
            for part in ("x0_hat", "generator"):
                value = getattr(state, part)
                if value is not None:
                    tensors[f"{name}/{part}"] = value.contiguous()
            solver_tensors, numbers = solver_history.flatten(state.history)
            tensors |= {f"{name}/history/{key}": value.contiguous() for key, value in solver_tensors.items()}
            if numbers:
                rest[name] = numbers
        keys = list(midway)
        metadata = {"candidates": json.dumps(keys), "history": json.dumps(rest)}
        path = self.folder / "states" / f"p{keys[0][0]:04d}_c{keys[0][1]:06d}.safetensors"
        with atomic_file(path) as file:
            file.write(save(tensors, metadata=metadata))
        for key in keys:
            self._where[key] = path

    def midway(self, key: Key) -> Midway:
        """Where a candidate stopped.

        Raises:
            FileNotFoundError: its file is gone.
            ValueError: its file is damaged.
        """
        if key not in self._midway:
            path = self._where.get(key)
            if path is None:
                raise FileNotFoundError(
                    f"the latent of candidate {key[1]} (prompt {key[0]}) is in no file of {self.folder}/states, and "
                    "the search cannot go on from it; begin it anew in another folder"
                )
            self._midway[key] = _read_midway(path, key)
        return self._midway[key]

    def has_midway(self, key: Key) -> bool:
        return key in self._midway or key in self._where

    def hand_over(self, midway: Mapping[Key, Midway]) -> None:
        """States that came from another process."""
        self._midway.update(midway)

    def save_sample(self, key: Key, sample: Tensor, kind: str) -> str | None:
        """Writes a kept sample; its file's name below the folder."""
        if self.folder is None:
            return None
        stem = f"p{key[0]}_c{key[1]}"
        path = self.folder / "samples" / f"{stem}.safetensors"
        with atomic_file(path) as file:
            file.write(save({"sample": sample.contiguous()}))
        if kind != "image":
            return f"samples/{path.name}"
        pixels = (sample.nan_to_num(0).clamp(0, 1) * 255).round().byte()
        picture = path.with_suffix(".png")
        array = rearrange(pixels, "c h w -> h w c").numpy()
        write_image(Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array[..., :3]), picture)
        return f"samples/{picture.name}"

    def load_sample(self, key: Key) -> Tensor | None:
        """A kept sample, exactly; None when there is no such file, or a damaged one: it can be made again."""
        if self.folder is None:
            return None
        path = self.folder / "samples" / f"p{key[0]}_c{key[1]}.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor("sample")
        except SafetensorError:
            return None

    def close(self) -> None:
        for log in self._logs:
            log.close()


@contextlib.contextmanager
def _state_file(path: Path) -> Iterator[Any]:
    """A file of latents, open; what is wrong with it is a ValueError that names it."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({error}), and the search cannot go on from it; begin it anew in another folder"
        ) from error


def _read_midway(path: Path, key: Key) -> Midway:
    name = f"{key[0]}/{key[1]}/"
    with _state_file(path) as file:
        found = {k.removeprefix(name): file.get_tensor(k) for k in file.keys() if k.startswith(name)}  # noqa: SIM118
        numbers = json.loads((file.metadata() or {}).get("history", "{}")).get(name[:-1], {})
        prefix = "history/"
        solver = {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}
        return Midway(
            latent=found["latent"],
            x0_hat=found.get("x0_hat"),
            generator=None if "generator" not in found else found["generator"].to(torch.uint8),
            history=solver_history.unflatten(solver, numbers),
        )
