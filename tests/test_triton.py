"""The Triton kernels without a GPU: run by the interpreter, and compiled for GPUs that are not there. Each in a process of its own."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kernels import backend
from kernels.attention import PackedAttention
from tests.conftest import ROOT

pytest.importorskip("triton", reason="Triton is installed on Linux alone")


def run(*command, **environment):
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "OMP_NUM_THREADS": "1"
    }
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=clean | environment,
        capture_output=True,
        text=True,
    )


def test_by_the_interpreter():
    """Two processes at a time: the interpreter takes one core."""
    files = sorted((ROOT / "tests/triton_interpreter").glob("test_*.py"))
    interpret = lambda file: run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file), TRITON_INTERPRET="1"
    )
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(interpret, files))
    for done in results:
        assert done.returncode == 0 and "skipped" not in done.stdout, (
            done.stdout[-5000:] + done.stderr[-2000:]
        )
    assert sum(int(re.search(r"(\d+) passed", done.stdout)[1]) for done in results) >= 125


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    done = run(
        "-m",
        "tests.compile_kernels",
        "head",
        "attention",
        TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_compiled_kernels_keep_to_registers_and_shared_memory(compiled):
    from tests.compile_kernels import SHARED_LIMIT

    assert {k["capability"] for k in compiled} == {80, 90} and len(compiled) >= 66
    for k in compiled:
        # an 8.x configuration serves Ada too, whose programs have 99 KB
        assert k["shared"] <= SHARED_LIMIT[90 if k["capability"] == 90 else 89], k
        assert not k["case"].startswith("gradient") or k["registers"] <= 80, (
            f"fewer than three programs fit: {k}"
        )
        assert k["stack"] == 0, f"spills: {k}"
        assert k["atomics"] == 0, f"an order that depends on timing: {k}"


def test_compiled_products_use_the_tensor_cores(compiled):
    for k in (k for k in compiled if k["case"].startswith("logits")):
        if k["capability"] == 90:
            assert k["wgmma"] >= 4 and k["tma"] >= 4 and k["mma"] == 0, k
            assert k["wgmma_from_registers"] == 0, (
                f"ptxas before CUDA 13.3 is reported to miscompile these: {k}"
            )
        else:
            assert k["mma"] >= 32 and k["wgmma"] == 0, k


def test_compiled_attention_uses_the_tensor_cores(compiled):
    attention = [
        k
        for k in compiled
        if k["case"].split()[0] in ("forward_kernel", "queries_kernel", "keys_kernel")
    ]
    assert len(attention) == 18
    for k in attention:
        if k["capability"] == 90:
            assert k["wgmma"] >= 16 and k["mma"] == 0, k
            assert (k["wgmma_from_registers"] == 0) == k["case"].endswith("flipped"), (
                f"what ptxas before 13.3 may miscompile: {k}"
            )
            assert (
                "E=64 flipped" not in k["case"] or k["registers"] * 32 * k["warps"] * 2 <= 65_536
            ), f"two programs do not fit: {k}"
        else:
            assert k["mma"] >= 64 and k["wgmma"] == 0, k
    decode = [k for k in compiled if k["case"].startswith("split_kernel")]
    assert len(decode) == 4 and all(k["mma"] >= 16 for k in decode), decode


def test_a_path_can_be_forced():
    x = torch.zeros(3, 8)
    assert not backend.triton_runs(x) and PackedAttention([3]).tiles is None  # a CPU
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="CUDA"):
            backend.use("triton")
    backend.use("torch")
    assert not backend.triton_runs(x) and not backend.triton_serves(x.device)
    backend.use("auto")
