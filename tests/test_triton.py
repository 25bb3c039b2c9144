"""The Triton kernels without a GPU: interpreted, and compiled for GPUs that are not there.

Each in a process of its own, since the interpreter is chosen when Triton is imported.
"""

import json
import os
import re
import subprocess
import sys
import tempfile

import pytest
import torch

from kernels import backend
from kernels.attention import PackedAttention
from tests.conftest import ROOT

pytest.importorskip("triton", reason="Triton is installed on Linux alone")

from tests.compile_kernels import READ, SHARED_LIMIT


def run(*command: str, **environment: str) -> str:
    """The output of Python in a process of its own, which must succeed."""
    clean = os.environ | {"OMP_NUM_THREADS": "1"}
    clean.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=clean | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    return done.stdout


# Groups of the interpreter's tests (file, pytest's -k) and how many each has at the least, so that
# none is lost without notice. Workers of pytest-xdist take a group each.
INTERPRETED = [
    ("attention", "not decode and not presets", 27),
    pytest.param("attention", "presets and not decode", 5, marks=pytest.mark.slow),
    ("attention", "decode", 17),
    ("head", "divergence_equals or topk", 40),
    ("head", "not divergence_equals and not topk", 50),
    ("train", "by_kernel", 3),
    ("sampler", "not large and not kept and not equals_top", 30),
    ("sampler", "kept or equals_top", 31),
]


@pytest.mark.parametrize("name,select,at_least", INTERPRETED, ids=str)
def test_by_the_interpreter(name, select, at_least):
    printed = run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", select,
        f"tests/triton_interpreter/test_{name}.py", TRITON_INTERPRET="1",
    )  # fmt: skip
    assert "skipped" not in printed, printed[-5000:]
    passed = re.search(r"(\d+) passed", printed)
    assert passed and int(passed[1]) >= at_least, printed[-2000:]


# One test for all that is asked of a group of kernels, since workers compile it anew.
@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, 80])
@pytest.mark.parametrize("name,at_least", [("head", 32), ("attention", 18)])
def test_compiled_kernels(name, at_least, capability):
    """They keep to registers and shared memory, and use the tensor cores."""
    with tempfile.TemporaryDirectory() as cache:
        printed = run(
            "-m", "tests.compile_kernels", name, str(capability), TRITON_CACHE_DIR=cache
        )  # fmt: skip
    kernels = [json.loads(line) for line in printed.splitlines()]
    assert len(kernels) >= at_least
    # a configuration for 8.x serves Ada too, whose programs have 99 KB
    shared_limit = SHARED_LIMIT[90 if capability == 90 else 89]
    for k in kernels:
        assert k["capability"] == capability and k["shared"] <= shared_limit, k
        assert k["stack"] == 0, f"spills: {k}"
        # decoding counts the programs that are done: an integer, and no sum of numbers
        decodes = k["case"].startswith("decode_kernel")
        assert k["atomics"] == k["counters"] == decodes, f"an order that depends on timing: {k}"
        if k["case"].startswith("gradient"):
            assert k["registers"] <= 80, f"fewer than three programs fit: {k}"
    if name == "head":
        check_products(kernels, capability)
    else:
        check_attention(kernels, capability)


def check_products(kernels: list[dict], capability: int) -> None:
    products = [k for k in kernels if k["case"].startswith("logits")]
    assert products
    for k in products:
        if (
            k["case"].endswith("x2") and capability == 90
        ):  # two on a multiprocessor, whose registers suffice
            assert 2 * (k["shared"] + 1024) <= 228 << 10, k
        if capability == 90:
            assert k["wgmma"] >= 4 and k["tma"] >= 4 and k["mma"] == 0, k
            # ptxas before CUDA 13.3 is reported to miscompile these
            assert k["wgmma_from_registers"] == 0, k
        else:
            assert k["mma"] >= 32 and k["wgmma"] == 0, k


def check_attention(kernels: list[dict], capability: int) -> None:
    packed, split = [], []
    for k in kernels:
        kernel = k["case"].split()[0]
        if kernel in READ:
            packed.append(k)
        elif kernel == "decode_kernel":
            split.append(k)
    assert len(packed) == 9
    for k in packed:
        if capability == 90:
            assert k["wgmma"] >= 16 and k["mma"] == 0, k
            # ptxas before CUDA 13.3 is reported to miscompile products from registers
            assert k["wgmma_from_registers"] == 0, k
            # a softmax across warps would pass through shared memory, with 11 barriers a block
            assert k["loop_barriers"] <= 5 and k["loop_shuffles"] <= 8, k
            if k["case"] == "forward_kernel E=64":
                # four blocks of 64 × 64 at a time; scores as [keys, queries] took 674 for one
                assert 0 < k["loop"] <= 4 * 120, k
        else:
            assert k["mma"] >= 64 and k["wgmma"] == 0, k
    assert len(split) == 6
    for k in split:
        # never wgmma, whose first operand would be what the softmax left in registers
        assert k["mma"] >= 16 and k["wgmma"] == 0, k


def test_a_path_can_be_forced():
    x = torch.zeros(3, 8)
    assert not backend.triton_runs(x) and PackedAttention([3]).tiles is None  # a CPU
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="CUDA"):
            backend.use("triton")
    backend.use("torch")
    assert not backend.triton_runs(x) and not backend.triton_serves(x.device)
    backend.use("auto")
