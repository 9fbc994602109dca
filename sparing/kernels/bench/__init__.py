"""Benchmarks of the kernel layer: ``python -m sparing.kernels.bench`` or ``sparing bench kernels``.

Every case runs its peers interleaved in one process on the same tensors, after each was checked against the reference
in float32; the first numbers measured are the device's own ceilings, and each time is stated as a share of the floor
they give.
"""

from sparing.kernels.bench.harness import BenchResult, run
from sparing.kernels.bench.report import regressions

__all__ = ["BenchResult", "regressions", "run"]
