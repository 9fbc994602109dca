"""Compile Triton kernels for sm_90 without a GPU, and read what ptxas says of them. Run as a script, in a process of
its own without TRITON_INTERPRET; prints one JSON line per kernel launched.

The real launchers are called on CPU tensors; ``JITFunction.run`` is replaced by a function that compiles what would
have been launched: the signature from the arguments, and the divisibility by 16 that Triton infers of pointers and
sizes (without it no wide load appears and the result says nothing).
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1", torch.uint8: "*u8",
}  # fmt: skip
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGET = GPUTarget("cuda", 90, 32)


def describe(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict, dict, dict, dict]:
    """(signature, constexprs, attrs, options) of a launch, as the launcher of Triton 3.6 would infer them."""
    names = [parameter.name for parameter in kernel.params]
    options = {name: value for name, value in kwargs.items() if name not in names}
    given = dict(zip(names, args)) | {name: value for name, value in kwargs.items() if name in names}
    signature, constants, attrs = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        value = given.get(parameter.name, parameter.default)
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and isinstance(value, int) and value == 1):
            signature[parameter.name], constants[(position,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            if special and value.data_ptr() % 16 == 0:
                attrs[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                attrs[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    return signature, constants, attrs, options


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of stack) of the kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+)", text)
    return max(int(register) for register, _ in found), max(int(stack) for _, stack in found)


def compile_launch(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Compile one launch and report its resources and instructions."""
    signature, constants, attrs, options = describe(kernel, args, kwargs)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    compiled = triton.compile(source, target=TARGET, options=options)
    ptx = compiled.asm["ptx"]
    registers, stack = resources(compiled.asm["cubin"])
    return {
        "kernel": kernel.fn.__name__,
        "options": options,
        "shared": compiled.metadata.shared,
        "registers": registers,
        "stack": stack,
        "threads": 32 * options.get("num_warps", 4),
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": ptx.count("mma.sync"),
        "wide_loads": len(re.findall(r"ld\.global[.\w:]*\.v4|ld\.global[.\w:]*\.v2\.b64|cp\.async\.cg[.\w]*", ptx)),
        "async_copies": ptx.count("cp.async"),
        "float_atomics": len(re.findall(r"(?:atom|red)\.[\w.]*\.(?:f16|bf16|f32|f64)", ptx)),
    }


def compile_all(launches: dict[str, Any]) -> list[dict[str, Any]]:
    """Call each launcher with compilation in place of launching; one record per kernel launch."""
    records: list[dict[str, Any]] = []
    label = ""

    def capture(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        record = {"case": label, **compile_launch(self, args, kwargs)}
        records.append(record)
        print(json.dumps(record), flush=True)

    JITFunction.run = capture  # type: ignore[method-assign]
    for name, launch in launches.items():
        label = name
        launch()
    return records


def count_variants(launches: dict[str, Any]) -> dict[str, int]:
    """How many compiled variants of each kernel the launches would make: distinct (signature, constexprs, attrs,
    options).
    """
    variants: dict[str, set[str]] = {}

    def capture(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        variants.setdefault(f"{op}: {self.fn.__name__}", set()).add(repr(describe(self, args, kwargs)))

    JITFunction.run = capture  # type: ignore[method-assign]
    for name, launch in launches.items():
        op = name.split("/")[0]
        launch()
    return {name: len(found) for name, found in variants.items()}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    from launches import LAUNCHES
    from launches_other import LAUNCHES as OTHER

    LAUNCHES = {**LAUNCHES, **OTHER}
    wanted = sys.argv[1:] or list(LAUNCHES)
    compile_all({name: LAUNCHES[name] for name in wanted})
