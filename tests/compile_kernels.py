"""Compile a kernel for a GPU that is not there and read off what the assembler says: registers, stack, shared memory, instructions.

Run as a program in a process without TRITON_INTERPRET: `python -m tests.compile_kernels head` prints one JSON object per kernel and target.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin")
SHARED_LIMIT = {
    80: 163 << 10,
    89: 99 << 10,
    90: 227 << 10,
}  # bytes a program may have (CUDA C++ Programming Guide, technical specifications)


def compiled(fn, types, constants, capability, warps, stages):
    """types: {argument: Triton type} of what is not constant; integers and pointers are taken as multiples of 16 where marked `!`."""
    signature = {a: types[a].rstrip("!") if a in types else "constexpr" for a in fn.arg_names}
    assert not set(types) & set(constants) and set(types) | set(constants) == set(fn.arg_names), (
        set(fn.arg_names) ^ (set(types) | set(constants))
    )
    divisible = {
        (fn.arg_names.index(a),): [["tt.divisibility", 16]]
        for a, t in types.items()
        if t.endswith("!")
    }
    source = ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=divisible)
    kernel = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options=dict(num_warps=warps, num_stages=stages),
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        usage = subprocess.run(
            [os.path.join(TOOLS, "cuobjdump"), "-res-usage", f.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    ptx = kernel.asm["ptx"]
    products = re.findall(r"wgmma\.mma_async[^;]*;", ptx)
    return dict(
        registers=registers,
        stack=stack,
        shared=kernel.metadata.shared,
        warps=warps,
        capability=capability,
        wgmma=len(products),
        wgmma_from_registers=sum(p.count("{") > 1 for p in products),
        mma=len(re.findall(r"\bmma\.sync", ptx)),
        tma=ptx.count("cp.async.bulk.tensor"),
        atomics=len(re.findall(r"\b(?:atom|red)\.", ptx)),
    )


def main(argv):
    for name in argv:
        for case, arguments in importlib.import_module(f"tests.compile_{name}").cases():
            print(json.dumps({"case": case} | compiled(*arguments)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
