"""Every Triton launch of the attention family, compiled for sm_90 on a machine without a GPU, within the device's
resources.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernels.launches import LAUNCHES

HERE = Path(__file__).parent
SHARED_MEMORY = 232448  # bytes a block may use on sm_90
REGISTERS = 65536  # of a processor
DEFAULTS = [name for name in LAUNCHES if name.endswith("/default")]
# products of at least 64 rows that decide the time: these must use Hopper's own instruction
MATMUL_BOUND = ("block_sparse_forward_kernel", "block_sparse_dq_kernel", "block_sparse_dkdv_kernel")


def _compile(names: list[str]) -> list[dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent.parent), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / "offline_sm90.py"), *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _check(records: list[dict], names: list[str]) -> None:
    assert {record["case"] for record in records} == set(names)
    problems = []
    for record in records:
        name = f"{record['case']}: {record['kernel']}"
        if record["shared"] > SHARED_MEMORY:
            problems.append(f"{name} takes {record['shared']} bytes of shared memory")
        if record["stack"]:
            problems.append(f"{name} spills: {record['stack']} bytes of stack")
        if record["registers"] * record["threads"] > REGISTERS:
            problems.append(f"{name} takes {record['registers']} registers in {record['threads']} threads")
        if record["float_atomics"]:
            problems.append(f"{name} has float atomics")
        if not record["wide_loads"] and record["kernel"] != "ring_advance_kernel":
            problems.append(f"{name} has no 128-bit loads")
        sixteen_bit_default = "bf16/default" in record["case"]
        if (
            record["kernel"] in MATMUL_BOUND
            and sixteen_bit_default
            and not (record["wgmma"] and record["async_copies"])
        ):
            problems.append(f"{name} has {record['wgmma']} wgmma and {record['async_copies']} async copies")
    assert not problems, "\n".join(problems)


def test_one_configuration_of_each_kernel_fits_sm90():
    _check(_compile(DEFAULTS), DEFAULTS)


@pytest.mark.slow
def test_every_configuration_fits_sm90():
    others = [name for name in LAUNCHES if name not in DEFAULTS]
    _check(_compile(others), others)


def test_no_kernel_has_an_atomic_or_an_autotune_decorator():
    for path in sorted((HERE.parent.parent / "sparing" / "kernels" / "triton").glob("*.py")):
        text = path.read_text()
        assert "tl.atomic" not in text, path.name
        assert "@triton.autotune" not in text, path.name


def test_a_sweep_of_lengths_makes_at_most_three_variants_of_a_kernel():
    code = (
        "import json, sys\n"
        f"sys.path.insert(0, {str(HERE)!r})\n"
        "import offline_sm90, launches\n"
        "print(json.dumps(offline_sm90.count_variants(launches.length_sweeps())))\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent.parent), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    variants = json.loads(done.stdout.splitlines()[-1])
    ops = ("few_query: few_query", "window: window", "tiny: window")
    assert {f"{op}_{direction}_kernel" for op in ops for direction in ("forward", "backward")} <= set(variants)
    assert max(variants.values()) <= 3, variants
