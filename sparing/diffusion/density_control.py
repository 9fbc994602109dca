"""The run-time knob of every FlexDiT: which sparse grid a forward runs at.

In order of precedence: the ``density`` argument of ``forward``; the density of a ``with model.at_density(...)`` around
it; the density set for coming calls by ``set_timestep_density``; the model's density table at the batch's timesteps. A
table with one grid never reads the timesteps; another one reads them on the host once a forward (one device
synchronisation on a GPU). ``precompute_densities(scheduler.timesteps)`` does that reading before the sampling loop
instead, so that a compiled forward holds no data-dependent control flow.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from sparing.diffusion.density import Density, DensityTable, parse_density

__all__ = ["DensityControlled", "default_table"]

Grid = tuple[int, int]


def default_table(grid: Grid) -> DensityTable:
    """The one fixed grid of the released code, 8x8 (at 256 and at 512 pixels), or half the dense grid where that is
    smaller.
    """
    return DensityTable.constant((min(8, max(1, grid[0] // 2)), min(8, max(1, grid[1] // 2))))


class DensityControlled:
    """Mixin of a denoiser whose ``config`` holds ``sample_size``, ``patch_size`` and ``density_table``."""

    config: Any
    register_to_config: Callable[..., Any]
    _table: DensityTable | None = None
    _timestep_side: Grid | None = None
    _call_density: Density | None = None

    @property
    def has_sparse_layers(self) -> bool:
        """Whether a density changes anything."""
        return True

    @property
    def base_grid(self) -> Grid:
        """The dense token grid of the configured sample size."""
        side = int(self.config.sample_size) // int(self.config.patch_size)
        return side, side

    @property
    def density_table(self) -> DensityTable:
        """The schedule of sparse grids that ``forward`` follows when no density is given."""
        if self._table is None or self._table.to_list() != self.config.density_table:
            self._table = DensityTable.of(
                self.config.density_table, grid=self.base_grid, num_train_timesteps=self.config.num_train_timesteps
            )
        return self._table

    def set_density(self, density: Any) -> None:
        """Turns the knob: a ``DensityTable``, its JSON list, one density (side, pair, share, ``'8x6'``, ``'all'``) or a
        published name.

        It is stored in the config, so ``save_pretrained`` keeps it.

        Raises:
            ValueError: when it is above the dense grid, below 1, unsorted or unknown.
        """
        table = DensityTable.of(density, grid=self.base_grid, num_train_timesteps=self.config.num_train_timesteps)
        self._store(density_table=table.to_list())
        self._table = table

    def _store(self, **values: Any) -> None:
        """Writes into the config, so that a saved model and ``from_config(model.config)`` have it.

        diffusers leaves out of a config given to ``from_config`` what its own list calls defaults, whatever it is now.
        """
        defaults = [name for name in self.config.get("_use_default_values", ()) if name not in values]
        self.register_to_config(**values, _use_default_values=defaults)

    def set_timestep_density(self, timestep: float | None) -> None:
        """Fixes the density of coming calls to that of ``timestep`` (a host number); None follows the timesteps
        again.
        """
        self._timestep_side = None if timestep is None else self.density_table.side(timestep)

    @contextlib.contextmanager
    def at_density(self, density: Density) -> Iterator[None]:
        """All calls inside run at one density, as if each were given it: in tokens of the grid that it runs on."""
        before, self._call_density = self._call_density, density
        try:
            yield
        finally:
            self._call_density = before

    def precompute_densities(self, timesteps: Tensor | Sequence[float], *, grid: Grid | None = None) -> list[Grid]:
        """The sparse grid of every step of a schedule, on the host: pass entry i as ``density`` of step i.

        Args:
            timesteps: as a scheduler gives them, ``scheduler.timesteps``.
            grid: dense grid of the latents when it is not that of ``config.sample_size``.
        """
        return [self._scaled(side, grid or self.base_grid) for side in self.density_table.sides(timesteps)]

    def _scaled(self, side: Grid, grid: Grid) -> Grid:
        """A table's grid on latents of another size: the same share of each side, rounded half up."""
        base = self.base_grid
        if grid == base:
            return side
        scaled = (max(1, (2 * s * g + b) // (2 * b)) for s, g, b in zip(side, grid, base, strict=True))
        return cast(Grid, tuple(scaled))

    def _by_density(
        self,
        run: Callable[[Grid, Tensor | None], Tensor],
        *,
        timestep: Tensor,
        grid: Grid,
        density: Density | None,
    ) -> Tensor:
        """Runs a batch, in as many groups as it has densities, and gives the samples back in order.

        Args:
            run: ``run(side, index)`` computes the samples ``index`` (None: all) at the sparse grid ``side``.
            timestep: ``(batch,)``.
            grid: dense token grid of this batch.
            density: explicit density of the whole batch, or None.
        """
        table = self.density_table
        density = self._call_density if density is None else density
        if density is not None:
            return run(parse_density(density, grid=grid), None)
        if self._timestep_side is not None:
            return run(self._scaled(self._timestep_side, grid), None)
        if table.is_constant:
            if timestep.device.type == "cpu" and not torch.compiler.is_compiling():
                table.sides(
                    timestep
                )  # raises on a timestep outside the table; on a device this would cost a synchronisation
            return run(self._scaled(table.entries[0][1:], grid), None)
        sides = table.sides(timestep)
        if len(set(sides)) == 1:
            return run(self._scaled(sides[0], grid), None)
        groups = [
            (side, torch.tensor([i for i, own in enumerate(sides) if own == side], device=timestep.device))
            for side in dict.fromkeys(sides)
        ]
        parts = torch.cat([run(self._scaled(side, grid), index) for side, index in groups])
        order = torch.cat([index for _, index in groups])
        return parts[torch.argsort(order)]
