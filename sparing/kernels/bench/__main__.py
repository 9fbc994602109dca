"""``python -m sparing.kernels.bench``: measure the kernels; exit code 1 on a wrong peer or a regression."""

import argparse
import sys

from sparing.kernels.bench import run
from sparing.kernels.bench.cases import SUITES


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, print; 0, or 1 when a peer was wrong or slower than before."""
    parser = argparse.ArgumentParser(prog="python -m sparing.kernels.bench", description=__doc__)
    parser.add_argument("--op", action="append", help="only this op (repeatable)")
    parser.add_argument("--suite", choices=SUITES, default="smoke")
    parser.add_argument("--out", help="folder for kernels.json, kernels.md and kernels.png")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--compare", metavar="OLD.json", help="fail on what became slower since this run")
    parser.add_argument("--warm", action="store_true", help="check and compile, time nothing")
    given = parser.parse_args(arguments)
    try:
        result = run(
            suite=given.suite,
            ops=given.op,
            out=given.out,
            device=given.device,
            compare=given.compare,
            warm=given.warm,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in [f"WRONG {failure}" for failure in result.failures] + [f"SLOWER {line}" for line in result.regressions]:
        print(line, file=sys.stderr)
    return 1 if result.failures or result.regressions else 0


if __name__ == "__main__":
    raise SystemExit(main())
