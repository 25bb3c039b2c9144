"""A run by the kernels, through every caller of theirs, against the same run in PyTorch."""

import json
import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 chooses the interpreter", allow_module_level=True)

import train
from kernels import backend


@pytest.fixture(autouse=True)
def put_back():
    yield
    backend.use("auto")


@pytest.mark.parametrize(
    "options",
    [
        ["--mode=kd", "--kd_ce=0.3"],
        ["--mode=kd", "--kd_signal=topk", "--kd_topk=5", "--kd_ce=0.3"],
        ["--mode=sft"],
    ],
)
def test_a_run_by_kernel_is_the_one_without(options, tmp_path):
    found = []
    for kernels in ("triton", "torch"):
        argv = [
            *options,
            "--model=tiny",
            "--data=word_problems:4",
            "--steps=1",
            "--batch_size=1",
            "--eval_examples=1",
            "--eval_tokens=1",
            "--micro_batch_tokens=256",
            f"--kernels={kernels}",
            f"--runs={tmp_path}",
            f"--name={kernels}",
        ]
        assert (
            train.main(argv + (["--teacher=random:tiny-teacher"] if "--mode=kd" in options else []))
            == 0
        )
        lines = [
            json.loads(line)
            for line in (tmp_path / kernels / "metrics.jsonl").read_text().splitlines()
        ]
        found.append({key: value for line in lines for key, value in line.items()})
    for key in ("train/loss", "train/grad_norm", "eval/word_problems/loss"):
        assert found[0][key] == pytest.approx(found[1][key], rel=1e-4), key
