"""Which token grid a diffusion transformer runs at which timestep.

SparseDiT / FlexDiT ("Towards dynamic token density for diffusion transformers", arXiv 2412.06028, section 3.3 and Eq.
5):
few tokens suffice while the sample is mostly noise, more are needed near the data. The pruning rate is

    r(t) = r_min                                              for t < hold * T
    r(t) = r_min + (r_max - r_min) (t - hold T) / (T - hold T)  otherwise,

and a dense grid of S tokens a side becomes a sparse grid of ``max(1, floor(S sqrt(1 - r) + 1/2))`` tokens a side. (How
the authors round is not published; the published rates are exactly those of whole square grids, which this rule
reproduces.)

Here that schedule is an explicit table, ``[(t_start, side_h, side_w), ...]``, sorted by ``t_start``: an entry holds
from its ``t_start`` up to the next one. It is plain JSON, travels in ``config.json`` and is looked up on the host, so
no forward has to read a timestep back from the device. ``t`` is always the original training timestep, never the
sampler's step number.
"""

import itertools
import math
import operator
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from sparing.training.seeding import sample_keys

__all__ = ["PUBLISHED_RATES", "DensityTable", "DensityTimestepSampler", "parse_density", "pruning_rate", "sparse_side"]

Side = tuple[int, int]
Density = int | float | str | Sequence[int]

# Pruning rates (r_min, r_max) of the published result tables, by image resolution; 'xl' rows of SparseDiT's table 1.
PUBLISHED_RATES: dict[str, tuple[float, float]] = {
    "256_r0.44_0.61": (0.44, 0.61),
    "256_r0.61_0.86": (0.61, 0.86),
    "512_r0.61_0.86": (0.61, 0.86),
    "512_r0.90_0.96": (0.90, 0.96),
}


def pruning_rate(timestep: float, *, r_min: float, r_max: float, num_train_timesteps: int = 1000, hold: float = 0.25):
    """The share of tokens removed at ``timestep`` (Eq. 5): ``r_min`` up to ``hold * T``, then linear up to ``r_max`` at
    T.
    """
    start = hold * num_train_timesteps
    if timestep < start:
        return r_min
    return r_min + (r_max - r_min) * (timestep - start) / (num_train_timesteps - start)


def sparse_side(dense_side: int, rate: float) -> int:
    """Tokens along one side after pruning a dense side of ``dense_side`` tokens at ``rate``; rounds half up, at least
    1.
    """
    return max(1, math.floor(dense_side * math.sqrt(1.0 - rate) + 0.5))


def parse_density(density: Density, *, grid: Side) -> Side:
    """A density as a person writes it -> ``(side_h, side_w)``.

    Args:
        density: an int (tokens a side), a pair ``(side_h, side_w)``, ``'8'`` or ``'8x6'``, a float in (0, 1] (share of
            the tokens that is kept), or ``'all'`` (the dense grid).
        grid: the dense grid ``(S_h, S_w)`` in tokens.

    Raises:
        ValueError: when it is none of these, below 1 or above the grid.
    """
    given = density
    if isinstance(density, str):
        text = density.strip().lower()
        if text == "all":
            return grid
        try:
            density = [int(side) for side in text.split("x")] if "." not in text else float(text)
        except ValueError:
            raise ValueError(
                f"density {given!r} is not a side ('8'), a grid ('8x6'), a share ('0.25') or 'all'"
            ) from None
        if isinstance(density, list) and len(density) == 1:
            density = density[0]
    if isinstance(density, bool):
        raise ValueError(f"density {given!r} is not a side, a pair of sides, a share of the tokens or 'all'")
    if isinstance(density, float):
        if not 0.0 < density <= 1.0:
            raise ValueError(f"density {given!r} as a share of the tokens must be in (0, 1]")
        return sparse_side(grid[0], 1.0 - density), sparse_side(grid[1], 1.0 - density)
    whole = _whole(density)
    sides = (whole, whole) if whole is not None else _whole_numbers(density)
    if sides is None or len(sides) != 2:
        raise ValueError(f"density {given!r} must give one side or two, (side_h, side_w), in whole tokens")
    check_side((sides[0], sides[1]), grid=grid)
    return sides[0], sides[1]


def _whole(value: Any) -> int | None:
    """An integer of any library as an int; None for anything else, ``True`` included."""
    if isinstance(value, (bool, float, str, tuple, list)):  # a compiled forward cannot ask them for an index
        return None
    if isinstance(value, int):
        return value
    try:
        return operator.index(value)
    except TypeError:
        return None


def _whole_numbers(values: Any) -> tuple[int, ...] | None:
    """A sequence of integers; None for anything else."""
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        return None
    numbers = [_whole(value) for value in values]
    return None if None in numbers else tuple(numbers)  # type: ignore[arg-type]


def check_side(side: Side, *, grid: Side) -> None:
    """Raises ValueError unless ``1 <= side <= grid`` along both axes."""
    if side[0] < 1 or side[1] < 1:
        raise ValueError(f"density {side[0]}x{side[1]} has a side below 1")
    if side[0] > grid[0] or side[1] > grid[1]:
        raise ValueError(f"density {side[0]}x{side[1]} is above the dense grid of {grid[0]}x{grid[1]} tokens")


@dataclass(frozen=True)
class DensityTable:
    """The sides to run at each timestep.

    Args:
        entries: ``((t_start, side_h, side_w), ...)``, the first ``t_start`` 0, strictly increasing, all below
            ``num_train_timesteps``.
        num_train_timesteps: T of the diffusion process; timesteps lie in [0, T).

    Raises:
        ValueError: naming the entry that is wrong.
    """

    entries: tuple[tuple[int, int, int], ...]
    num_train_timesteps: int = 1000
    _starts: list[int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        entries = tuple(_entry(entry, lengths=(3,)) for entry in self.entries)
        if not entries:
            raise ValueError("a density table needs at least one entry (t_start, side_h, side_w)")
        if entries[0][0] != 0:
            raise ValueError(f"the first entry of a density table must start at timestep 0, got {entries[0]}")
        for before, entry in itertools.pairwise(entries):
            if entry[0] <= before[0]:
                raise ValueError(f"density table is not sorted by timestep: {entry} follows {before}")
        for entry in entries:
            if entry[0] >= self.num_train_timesteps:
                raise ValueError(f"entry {entry} starts outside the timesteps [0, {self.num_train_timesteps})")
            if entry[1] < 1 or entry[2] < 1:
                raise ValueError(f"entry {entry} of the density table has a side below 1")
        object.__setattr__(self, "entries", entries)
        object.__setattr__(self, "_starts", [entry[0] for entry in entries])

    # -- builders

    @classmethod
    def constant(cls, side: int | Side, *, num_train_timesteps: int = 1000) -> "DensityTable":
        """One grid at every timestep: what the released code and its logs do (8x8)."""
        side_h, side_w = (side, side) if isinstance(side, int) else side
        return cls(((0, side_h, side_w),), num_train_timesteps)

    @classmethod
    def from_rates(
        cls,
        grid: Side,
        r_min: float,
        r_max: float,
        *,
        num_train_timesteps: int = 1000,
        hold: float = 0.25,
        max_stages: int | None = None,
    ) -> "DensityTable":
        """The published schedule: pruning rate ``r_min`` up to ``hold * T``, then linear to ``r_max``, in whole sides.

        Args:
            grid: dense grid (S_h, S_w) in tokens.
            r_min, r_max: pruning rates in [0, 1); given in either order, the lower one is used near the data.
            max_stages: merge neighbouring entries down to this many (fewer distinct sides = fewer compiled graphs). A
                merged stage keeps the denser of its sides, so quality is never below the unmerged schedule's.
        """
        low, high = sorted((r_min, r_max))
        if not 0.0 <= low <= high < 1.0:
            raise ValueError(f"pruning rates must lie in [0, 1), got r_min={r_min}, r_max={r_max}")
        if not 0.0 <= hold < 1.0:
            raise ValueError(f"hold must lie in [0, 1), got {hold}")
        entries: list[tuple[int, int, int]] = []
        for t in range(num_train_timesteps):
            rate = pruning_rate(t, r_min=low, r_max=high, num_train_timesteps=num_train_timesteps, hold=hold)
            side = sparse_side(grid[0], rate), sparse_side(grid[1], rate)
            if not entries or entries[-1][1:] != side:
                entries.append((t, *side))
        table = cls(tuple(entries), num_train_timesteps)
        return table if max_stages is None else table.with_max_stages(max_stages)

    @classmethod
    def stages(cls, entries: Iterable[Sequence[int]], *, num_train_timesteps: int = 1000) -> "DensityTable":
        """A schedule of one's own: ``[(t_start, side), ...]`` or ``[(t_start, side_h, side_w), ...]``."""
        if isinstance(entries, (str, bytes, Mapping)) or not isinstance(entries, Iterable):
            raise ValueError(
                f"a density table is a list of (t_start, side) or (t_start, side_h, side_w), got {entries!r}"
            )
        return cls(tuple(_entry(entry, lengths=(2, 3)) for entry in entries), num_train_timesteps)

    @classmethod
    def published(
        cls, name: str, *, grid: Side, num_train_timesteps: int = 1000, max_stages: int | None = None
    ) -> "DensityTable":
        """The schedule of a row of the published tables, e.g. ``'512_r0.90_0.96'``; names in ``PUBLISHED_RATES``. It is
        a function of t / T, and so holds for every ``num_train_timesteps``.
        """
        if name not in PUBLISHED_RATES:
            raise ValueError(f"unknown published schedule {name!r}; have {sorted(PUBLISHED_RATES)}")
        r_min, r_max = PUBLISHED_RATES[name]
        return cls.from_rates(grid, r_min, r_max, num_train_timesteps=num_train_timesteps, max_stages=max_stages)

    def with_max_stages(self, count: int) -> "DensityTable":
        """At most ``count`` entries: repeatedly joins the two neighbours whose joined stage adds the fewest
        token-timesteps.
        """
        if count < 1:
            raise ValueError(f"max_stages must be at least 1, got {count}")
        stages = [[start, end, side_h, side_w] for start, end, side_h, side_w in self.ranges()]
        while len(stages) > count:

            def added(i: int) -> int:
                (s0, e0, h0, w0), (s1, e1, h1, w1) = stages[i], stages[i + 1]
                joined = max(h0, h1) * max(w0, w1) * (e1 - s0)
                return joined - h0 * w0 * (e0 - s0) - h1 * w1 * (e1 - s1)

            i = min(range(len(stages) - 1), key=added)
            (s0, _, h0, w0), (_, e1, h1, w1) = stages[i], stages[i + 1]
            stages[i : i + 2] = [[s0, e1, max(h0, h1), max(w0, w1)]]
        return DensityTable(tuple((s, h, w) for s, _, h, w in stages), self.num_train_timesteps)

    # -- look-up, on the host

    def index(self, timestep: float) -> int:
        """Index of the entry that holds at ``timestep``; ValueError outside [0, T)."""
        if not 0 <= timestep < self.num_train_timesteps:
            raise ValueError(
                f"timestep {timestep} is outside the density table's timesteps [0, {self.num_train_timesteps})"
            )
        return bisect_right(self._starts, timestep) - 1

    def side(self, timestep: float) -> Side:
        """The sparse grid ``(side_h, side_w)`` at ``timestep``."""
        return self.entries[self.index(timestep)][1:]

    def sides(self, timesteps: Tensor | Sequence[float]) -> list[Side]:
        """The sparse grid at each of a scheduler's ``timesteps``, on the host: read once, before the sampling loop."""
        values = timesteps.tolist() if isinstance(timesteps, Tensor) else list(timesteps)
        return [self.side(t) for t in values]

    @property
    def distinct_sides(self) -> list[Side]:
        """The different grids, densest first: one compiled graph each."""
        return sorted({entry[1:] for entry in self.entries}, key=lambda s: (-s[0] * s[1], s))

    @property
    def is_constant(self) -> bool:
        return len(self.distinct_sides) == 1

    def ranges(self) -> list[tuple[int, int, int, int]]:
        """``(t_start, t_end, side_h, side_w)`` of each entry, ``t_end`` exclusive."""
        ends = [*self._starts[1:], self.num_train_timesteps]
        return [(start, end, h, w) for (start, h, w), end in zip(self.entries, ends, strict=True)]

    def check_grid(self, grid: Side) -> None:
        """Raises ValueError when an entry is above the dense ``grid``."""
        for _, side_h, side_w in self.entries:
            check_side((side_h, side_w), grid=grid)

    def to_list(self) -> list[list[int]]:
        """JSON form, as stored in ``config.json``."""
        return [list(entry) for entry in self.entries]

    @classmethod
    def of(cls, spec: Any, *, grid: Side, num_train_timesteps: int = 1000) -> "DensityTable":
        """Whatever a person passes as ``density_table``: a table, a JSON list, one density (see ``parse_density``) or a
        published name.

        Raises:
            ValueError: none of these, a table of another number of timesteps, or a side above the grid.
        """
        if isinstance(spec, DensityTable):
            if spec.num_train_timesteps != num_train_timesteps:
                raise ValueError(
                    f"the density table is one of {spec.num_train_timesteps} timesteps, the model has "
                    f"{num_train_timesteps}"
                )
            table = spec
        elif isinstance(spec, str) and spec in PUBLISHED_RATES:
            table = cls.published(spec, grid=grid, num_train_timesteps=num_train_timesteps)
        elif isinstance(spec, (int, float, str)) or len(_whole_numbers(spec) or ()) == 2:
            table = cls.constant(parse_density(spec, grid=grid), num_train_timesteps=num_train_timesteps)
        else:
            table = cls.stages(spec, num_train_timesteps=num_train_timesteps)
        table.check_grid(grid)
        return table


def _entry(entry: Any, *, lengths: tuple[int, ...]) -> tuple[int, int, int]:
    """``(t_start, side_h, side_w)`` of an entry that may give one side for both."""
    numbers = _whole_numbers(entry)
    if numbers is None or len(numbers) not in lengths:
        raise ValueError(f"entry {entry!r} of a density table is not (t_start, side_h, side_w) in whole numbers")
    return numbers[0], numbers[1], numbers[-1]


class DensityTimestepSampler:
    """Draws training timesteps so that one forward sees one token count.

    Modes:
        ``'bucket'``: one entry of the table a step, drawn with probability (its number of timesteps) / T and the same
            on all ranks (seeded by seed and step), then t uniform inside it. The marginal over t is exactly uniform and
            ranks are balanced.
        ``'piecewise'`` (the paper's words: each GPU is assigned its own range of timesteps): rank k of G draws from the
            k-th of G equal slices of [0, T); a slice that crosses an entry's boundary is split by a draw per step.
            Uniform only over the group; ranks at noisy timesteps are cheaper.
        ``'mixed'``: t uniform per sample; the model groups the batch by density itself. Slow, for validation.

    Args:
        table: the density table.
        mode: as above.
        seed: seed of all draws; a draw depends on (seed, step, rank) and nothing else, so a resumed run draws the same.
        rank, world_size: of this process.
    """

    def __init__(
        self,
        table: DensityTable,
        mode: Literal["bucket", "piecewise", "mixed"] = "bucket",
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if mode not in ("bucket", "piecewise", "mixed"):
            raise ValueError(f"mode must be 'bucket', 'piecewise' or 'mixed', got {mode!r}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not within a world of {world_size}")
        self.table, self.mode, self.seed, self.rank, self.world_size = table, mode, seed, rank, world_size

    def _slice(self) -> tuple[int, int]:
        if self.mode != "piecewise":
            return 0, self.table.num_train_timesteps
        total = self.table.num_train_timesteps
        return total * self.rank // self.world_size, total * (self.rank + 1) // self.world_size

    def bucket(self, step: int) -> tuple[int, int, Side | None]:
        """``(start, end, side)``: the timesteps [start, end) that ``step`` draws from and their common grid (None in
        mode 'mixed').
        """
        low, high = self._slice()
        if self.mode == "mixed":
            return low, high, None
        # One uniform timestep decides the entry: it falls into an entry with probability proportional to its length.
        shared_rank = self.rank if self.mode == "piecewise" else 0
        pick = int(torch.randint(low, high, (1,), generator=_generator(self.seed, step, 2 * shared_rank)).item())
        start, end, *side = self.table.ranges()[self.table.index(pick)]
        return max(low, start), min(high, end), (side[0], side[1])

    def sample(self, batch_size: int, *, step: int) -> tuple[Tensor, Side | None]:
        """``batch_size`` timesteps (int64, on the CPU) and their common grid; the grid is None in mode 'mixed'."""
        low, high, side = self.bucket(step)
        generator = _generator(self.seed, step, 2 * self.rank + 1)
        return torch.randint(low, high, (batch_size,), generator=generator), side


def _generator(seed: int, step: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(sample_keys(seed, step, [0], stream=stream)[0] >> 1))
