"""Compile kernels for a GPU that is not there and read what the assembler says of them.

Run as a program, in a process without TRITON_INTERPRET: `python -m tests.compile_kernels head 90`
prints one JSON object for each kernel of tests/compile_head.py and compute capability 9.0.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin")
# shared memory that a program may have, in bytes (CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability")
SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
# The kernels whose loop is read, for 9.0: disassembling one takes as long as compiling it.
READ = ("forward_kernel", "queries_kernel", "keys_kernel")


class Compilation(NamedTuple):
    """A kernel with the types and constants of one of its uses.

    types: the Triton type of every argument that is not constant. Integers and pointers marked
    with `!` are multiples of 16.
    """

    case: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    capability: int
    warps: int
    stages: int


def compiled(case: Compilation) -> dict[str, Any]:
    """Registers, stack, shared memory and the kinds of instructions of one compilation."""
    names = case.kernel.arg_names
    assert not set(case.types) & set(case.constants)
    assert set(case.types) | set(case.constants) == set(names)
    signature = {name: case.types.get(name, "constexpr").rstrip("!") for name in names}
    divisible = {}
    for name, kind in case.types.items():
        if kind.endswith("!"):
            divisible[(names.index(name),)] = [["tt.divisibility", 16]]
    kernel = triton.compile(
        ASTSource(fn=case.kernel, signature=signature, constexprs=case.constants, attrs=divisible),
        target=GPUTarget("cuda", case.capability, 32),
        options=dict(num_warps=case.warps, num_stages=case.stages),
    )
    registers, stack = _resources(kernel.asm["cubin"])
    loop = []
    if case.capability == 90 and case.case.startswith(READ):
        loop = _shortest_product_loop(_disassembled(kernel.asm["cubin"]))
    ptx = kernel.asm["ptx"]
    products = re.findall(r"wgmma\.mma_async[^;]*;", ptx)
    return dict(
        case=case.case,
        capability=case.capability,
        warps=case.warps,
        registers=registers,
        stack=stack,
        shared=kernel.metadata.shared,
        wgmma=len(products),
        wgmma_from_registers=sum(p.count("{") > 1 for p in products),
        mma=len(re.findall(r"\bmma\.sync", ptx)),
        tma=ptx.count("cp.async.bulk.tensor"),
        atomics=len(re.findall(r"\b(?:atom|red)\.", ptx)),
        counters=len(re.findall(r"\batom\.global\.gpu\.acq_rel\.add\.[su]32", ptx)),
        loop=len(loop),
        loop_shuffles=sum("SHFL" in line for line in loop),
        loop_barriers=sum("BAR.SYNC" in line for line in loop),
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [os.path.join(TOOLS, "cuobjdump"), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return int(found[1]), int(found[2])


def _disassembled(cubin: bytes) -> list[str]:
    """The machine's instructions, `/*address*/ text` a line."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [os.path.join(TOOLS, "cuobjdump"), "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.findall(r"/\*[0-9a-f]{4,}\*/ +[^;]+;", text)


def _shortest_product_loop(lines: list[str]) -> list[str]:
    """The shortest loop with products of tensor cores in it: what most blocks go through."""
    addresses = [int(line[2 : line.index("*", 2)], 16) for line in lines]
    loops = []
    for number, line in enumerate(lines):
        jump = re.search(r"BRA (?:\S+, )?`?\(?(?:\.L_x_\d+)?\)?(0x[0-9a-f]+)?", line)
        if jump and jump[1] and int(jump[1], 16) in addresses:
            body = lines[addresses.index(int(jump[1], 16)) : number + 1]
            if any("MMA" in part for part in body):
                loops.append(body)
    return min(loops, key=len, default=[])


def main(name: str, capability: str) -> None:
    for case in importlib.import_module(f"tests.compile_{name}").cases():
        if case.capability == int(capability):
            print(json.dumps(compiled(case)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
