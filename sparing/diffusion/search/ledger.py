"""What a search spends, and what it may spend."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Budget", "Ledger"]


@dataclass(frozen=True)
class Budget:
    """Limits of one search; None: no limit. Never exceeded in NFE and candidates.

    With a list of prompts every prompt has these ``nfe`` and ``candidates``, so that its search is the same as alone;
    ``seconds`` are those of the whole call, looked at before each batch.

    Raises:
        ValueError: a limit that allows no candidate.
    """

    nfe: int | None = None
    seconds: float | None = None
    candidates: int | None = None

    def __post_init__(self) -> None:
        for name in ("nfe", "seconds", "candidates"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"budget must allow at least one candidate, got {name}={value}")

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """'400nfe', '90s', '12candidates', or several with commas.

        Raises:
            ValueError: anything else.
        """
        limits: dict[str, float] = {}
        units = {"nfe": "nfe", "s": "seconds", "sec": "seconds", "seconds": "seconds", "min": "minutes"}
        units |= {"candidates": "candidates", "candidate": "candidates", "c": "candidates"}
        for part in text.lower().replace(" ", "").split(","):
            match = re.fullmatch(r"(\d+(?:\.\d+)?)([a-z]+)", part)
            if match is None or match[2] not in units:
                raise ValueError(f"budget {text!r} is not understood; write 400nfe, 90s, 5min or 12candidates")
            limits[units[match[2]]] = float(match[1])
        if "minutes" in limits:
            limits["seconds"] = 60 * limits.pop("minutes")
        whole = {name: int(limits[name]) for name in ("nfe", "candidates") if name in limits}
        return cls(**whole, seconds=limits.get("seconds"))

    def affordable(self, costs: Sequence[int], *, spent: int, candidates: int) -> int:
        """How many of the next candidates, in order, fit.

        Args:
            costs: NFE of each. spent, candidates: so far.

        Raises:
            ValueError: not even the first candidate of all fits.
        """
        nfe = math.inf if self.nfe is None else self.nfe
        most = math.inf if self.candidates is None else self.candidates
        count = 0
        for cost in costs:
            if spent + cost > nfe or candidates + count + 1 > most:
                break
            spent, count = spent + cost, count + 1
        if costs and not count and not candidates:
            raise ValueError(
                f"budget must allow at least one candidate: one takes {costs[0]} NFE, the budget is {nfe:g}"
            )
        return count

    def seconds_left(self, spent: float) -> bool:
        return self.seconds is None or spent < self.seconds


@dataclass
class Ledger:
    """Sums of one prompt's search. NFE: solver evaluations (a guidance pair is one); forwards: rows denoised; rerun:
    NFE beside the search, for samples that were to be shown and had not been kept (of a search that is gone on with).
    """

    nfe: int = 0
    forwards: int = 0
    candidates: int = 0
    seconds: float = 0.0
    rerun: int = 0
    parts: dict[str, float] = field(default_factory=lambda: {"generate": 0.0, "decode": 0.0, "verify": 0.0})

    def add(self, *, nfe: int, forwards: int, seconds: float, parts: dict[str, float] | None = None) -> None:
        self.nfe += nfe
        self.forwards += forwards
        self.candidates += 1
        self.seconds += seconds
        for name, value in (parts or {}).items():
            self.parts[name] += value
