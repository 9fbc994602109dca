"""Raw scores of a batch: every part of a verifier sees what it asks for, and one bad sample harms no other."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparing.diffusion.search.probing import looks_of
from sparing.diffusion.search.verifiers.base import View

__all__ = ["Scorer"]


class Scorer:
    """The parts of a verifier, asked batch by batch.

    A part that raises is asked again sample by sample: those that raise get NaN, a warning and their reason in the log.
    One that has never given a score and raises on every sample of a batch is broken, and its error is the search's.

    Args:
        verifier: ``sparing.diffusion.search.verifiers.base.Verifier``.
    """

    def __init__(self, verifier: Any, *, sample_rate: int | None = None) -> None:
        self.verifier = verifier
        self.parts = verifier.parts
        self.looks = looks_of(self.parts)
        self._worked: set[str] = set()
        if sample_rate is not None:
            for part in self.parts:
                if hasattr(part, "sample_rate"):
                    part.sample_rate = sample_rate

    @property
    def wants_samples(self) -> bool:
        return any(part.space in ("sample", "path") for part in self.parts)

    def score(
        self, batch: Mapping[View, Tensor | None], prompts: Sequence[Any]
    ) -> tuple[list[dict[str, float]], list[str | None]]:
        """(raw scores by name, what went wrong) of each of B candidates.

        Args:
            batch: view -> ``(B, ...)``; None where the pipeline cannot give it.
            prompts: B prompts or class labels.

        Raises:
            ValueError: a wrong number of scores, or a space that there is none of.
        """
        raw: list[dict[str, float]] = [{} for _ in prompts]
        errors: list[str | None] = [None] * len(prompts)
        for part in self.parts:
            seen = batch.get(part.view)
            if seen is None:
                raise ValueError(
                    f"verifier {part.name!r} looks at {part.space!r}, which this pipeline's scheduler does not give"
                )
            for i, (value, error) in enumerate(zip(*self._of_part(part, seen, prompts))):
                raw[i][part.name] = value
                errors[i] = errors[i] or error
        return raw, errors

    def _of_part(self, part: Any, seen: Tensor, prompts: Sequence[Any]) -> tuple[list[float], list[str | None]]:
        try:
            values = part.score(seen, list(prompts)).tolist()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if str(error).startswith(f"verifier {part.name!r}"):  # its answer is wrong in kind: no sample's fault
                raise
            values, errors = self._one_by_one(part, seen, prompts)
            if part.name not in self._worked and all(e is not None for e in errors):
                raise
            return values, errors
        self._worked.add(part.name)
        return values, [None] * len(values)

    def _one_by_one(self, part: Any, seen: Tensor, prompts: Sequence[Any]) -> tuple[list[float], list[str | None]]:
        values, errors = [], list[str | None]()
        for i, prompt in enumerate(prompts):
            try:
                values.append(float(part.score(seen[i : i + 1], [prompt])[0]))
                errors.append(None)
                self._worked.add(part.name)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                reason = f"{part.name}: {type(error).__name__}: {error}"
                warnings.warn(f"a candidate could not be scored and counts as the worst ({reason})", stacklevel=2)
                values.append(math.nan)
                errors.append(reason)
        return values, errors
