"""The benchmarks on a CPU: each runs through in its small form, and notices what is wrong.

Those that need Triton's interpreter, and those that measure processes, are run as a user runs them.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is installed on Linux alone")

import toy_models
from bench import (
    assemblers,
    attention,
    ceilings,
    decode,
    generate,
    gpu,
    grpo_step,
    kd_vs_sft,
    measure,
    paths,
    processes,
    real_logits,
    rollouts,
    sandbox,
    teacher_cache,
    train_step,
)
from kernels import backend
from model.checkpoint import build_model, save_model
from model.presets import PRESETS
from tests import test_rounding
from tests.conftest import ROOT, wait_until


@pytest.fixture(autouse=True)
def by_the_device():
    yield
    backend.use("auto")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Random weights of a student and a teacher in the shape of Qwen2.5, with a tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tokenizer = toy_models.toy_tokenizer()
    for seed, name in enumerate(("tiny", "tiny-teacher")):
        model = build_model(PRESETS[name], None, device="cpu", seed=seed)
        (folder / name).mkdir()
        save_model(model, folder / name, tokenizer, [0])
    return folder


def command(module, *options):
    """Runs a benchmark in a process of its own; its standard output."""
    done = subprocess.run(
        [sys.executable, "-m", f"bench.{module}", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("module", [attention, decode, ceilings, train_step])
def test_without_a_gpu_there_is_one_line(module, capsys):
    with pytest.raises(SystemExit) as end:
        module.main([])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and not out and len(err.splitlines()) == 1 and "GPU" in err


# --- the kernels' benchmarks ---------------------------------------------------------------------


def test_attention_runs_through(tmp_path, capsys):
    assert attention.main(["--dry", "--json", str(tmp_path / "a.json")]) == 0
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["right"] and {row["E"] for row in record["checks"]} == {64, 128, 256}
    ran = {(row["shape"], row["way"]) for row in record["speeds"] if row["forward_ms"]}
    assert {("2 x 24", "srlm table"), ("2 x 24", "sdpa math"), ("GSM8K 300", "srlm table")} <= ran
    assert all(row["apart"] < 1e-5 for row in record["speeds"] if row["forward_ms"])


def test_decode_runs_through(tmp_path, capsys):
    assert decode.main(["--dry", "--json", str(tmp_path / "d.json")]) == 0
    record = json.loads((tmp_path / "d.json").read_text())
    assert record["right"] and all(row["microseconds_a_layer"] for row in record["decode"])
    assert record["engine"][0]["way"] == "srlm" and record["engine"][0]["tokens_per_s"] > 0


@pytest.mark.slow  # tests/triton_interpreter has every kernel
def test_head_runs_on_a_bare_cpu(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    last = command("head", "--dry", "--only-check").splitlines()[-1]
    record = json.loads(last)
    assert record["right"] and len(record["checks"]) == 14


@pytest.mark.slow
@pytest.mark.parametrize("options", [["head"], ["head", "--tune"], ["attention_sweep"]], ids=str)
def test_what_is_interpreted_runs_through(options, tmp_path):
    path = tmp_path / "record.json"
    module, *more = options
    output = "--json" if module == "attention_sweep" else "--out"
    command(module, "--dry", output, str(path), *more)
    record = json.loads(path.read_text())
    rows = [row for part in record.values() if isinstance(part, list) for row in part]
    assert record["right"] and len(rows) > 5 and not [row for row in rows if "failed" in row]


def test_a_wrong_result_is_noticed(tmp_path, capsys, monkeypatch):
    right = attention.PackedAttention.__call__
    monkeypatch.setattr(
        attention.PackedAttention, "__call__", lambda self, *args: right(self, *args) * 1.02
    )
    assert attention.main(["--dry", "--only-check"]) == 1
    monkeypatch.setattr(
        decode, "decode_attention", lambda *args: decode.decode_reference(*args) * 1.02
    )
    assert decode.main(["--dry", "--only-check"]) == 1
    numbers = iter(range(9))
    assert measure.unequal_repeats(lambda: (torch.tensor(next(numbers) // 3),), 5) == 3


def test_gsm8k_lengths_fill_the_tokens_and_keep_the_mean():
    lengths = attention.gsm8k_lengths(32768)
    assert sum(lengths) == 32768
    assert 170 < sum(lengths) / len(lengths) < 190
    assert 300 < max(lengths) <= 472


# --- what a GPU machine is asked -----------------------------------------------------------------


def test_ceilings_and_paths_run_through(tmp_path, capsys):
    out = ["--dry", "--out", str(tmp_path / "record.json")]
    assert ceilings.main(out) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    assert len(record["products"]) == 15 and all(row["ms"] for row in record["products"])
    for name in ("chunks", "offsets", "step"):
        assert paths.main([name, *out]) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    assert [row["path"] for row in record["checks"]] == ["step 1", "step 2"]


def test_a_wrong_path_is_noticed(tmp_path, capsys, monkeypatch):
    right = paths.gradients

    def wrong(tensors, chunk_rows):
        return [x * (1 if chunk_rows is None else 1.02) for x in right(tensors, chunk_rows)]

    monkeypatch.setattr(paths, "gradients", wrong)
    for name in ("chunks", "offsets"):
        assert paths.main([name, "--dry", "--out", str(tmp_path / "record.json")]) == 1


def test_steps_and_rollouts_run_through(tmp_path, capsys):
    out = ["--dry", "--out", str(tmp_path / "record.json")]
    assert train_step.main(out) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    assert len(record["records"]) == 10 and all(row["ms"] for row in record["records"])
    assert rollouts.main(["engine", *out]) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    assert [row["model"] for row in record["rollouts"]] == ["eager"] * 2 + ["compiled"] * 2
    assert rollouts.main(["grpo", *out]) == 0


def test_a_gpu_step_that_hangs_or_fails_costs_one_line(tmp_path, capsys, monkeypatch):
    """The record is complete after every step, and later steps run."""

    def steps(folder, assemblers):
        hanging = "import subprocess; subprocess.run(['sleep', '60'])"
        (tmp_path / "hangs.py").write_text(hanging)
        (tmp_path / "fails.py").write_text("raise SystemExit('no such kernel')")
        (tmp_path / "works.py").write_text("print('{\"right\": true}')")
        return [
            gpu.Step("hangs", "hangs", [], 0.5),
            gpu.Step("fails", "fails", [], 300),
            gpu.Step("fails under another ptxas", "fails", [], 300, required=False),
            gpu.Step("works", "works", ["--only-check"], 300),
        ]

    monkeypatch.setattr(gpu, "gate", steps)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert gpu.main(["gate", "--dry", "--folder", str(tmp_path)]) == 1
    rows = json.loads((tmp_path / "gate.json").read_text())["steps"]
    assert [row["right"] for row in rows] == [False, False, False, True]
    assert rows[0]["failed"].startswith("not done in") and rows[0]["seconds"] < 59
    assert "no such kernel" in rows[1]["failed"]
    assert rows[3]["record"] == {"right": True}
    part = ["gate", "--dry", "--folder", str(tmp_path), "--only"]
    assert gpu.main([*part, "another"]) == 0 and gpu.main([*part, "hangs", "--minutes", "0"]) == 1


def test_gpu_parts_name_what_exists(tmp_path):
    """Every step's options are those of its command; a ptxas is one more round of checks."""
    modules = {"gate": gpu.gate, "speed": gpu.speed, "train": gpu.train}
    names = []
    for part in modules.values():
        for step in part(tmp_path, {"13.5": "/a/ptxas"}):
            names.append(step.name)
            assert (
                step.module == "pytest" or (ROOT / f"{step.module.replace('.', '/')}.py").exists()
            )
            if step.module == "bench.decode" and "--json" in step.options:
                assert names[-1] == step.name
    assert len(names) == len(set(names)) and "check head, ptxas 13.5" in names


def test_assemblers_are_found_wherever_a_wheel_is_unpacked(tmp_path, monkeypatch):
    def place(folder, version):
        ptxas = tmp_path / folder / "ptxas"
        ptxas.parent.mkdir(parents=True)
        ptxas.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V1'\n")
        ptxas.chmod(0o755)
        return str(ptxas)

    used = place("used", "12.8")
    unpacked = place("wheel/nvidia/cu13/bin", "13.5")
    place("same/nvidia/cuda_nvcc/bin", "12.8")
    monkeypatch.setenv("TRITON_PTXAS_PATH", used)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "wheel"), str(tmp_path / "same")])
    monkeypatch.setenv("PATH", os.path.dirname(place("path", "13.0")))
    found = assemblers.other_assemblers()
    assert found["13.0"] == str(tmp_path / "path/ptxas") and found["13.5"] == unpacked
    assert "12.8" not in found, "the one in use"


def test_gpu_runs_a_part(tmp_path, capsys):
    options = ["gate", "--dry", "--only", "ceilings", "--folder", str(tmp_path)]
    assert gpu.main(options) == 0
    record = json.loads((tmp_path / "gate.json").read_text())
    assert [row["step"] for row in record["steps"]] == ["ceilings"]
    assert (tmp_path / "ceilings.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("part", gpu.PARTS)
def test_gpu_runs_all_parts(part, tmp_path, capsys):
    assert gpu.main([part, "--dry", "--folder", str(tmp_path)]) == 0


# --- on a CPU ------------------------------------------------------------------------------------


def test_grpo_step_and_generation_run_through(capsys):
    threads = torch.get_num_threads()
    try:
        assert grpo_step.main(["--dry", "--repeats", "1", "--threads", "1"]) == 0
        assert "its products; peak" in capsys.readouterr().out
        assert generate.main(["--dry", "--repeats", "1"]) == 0
        assert "ragged, refilled" in capsys.readouterr().out
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_processes_in_turn_run_through():
    lines = command("kd_step", "--dry", "--repeats", "1", "--threads", "1").splitlines()
    losses = {re.search(r"\d\.\d{5}", line).group() for line in lines[2:5]}
    assert len(lines) == 7 and len(losses) == 1  # three ways, one loss
    small = ["--vocab=300", "--width=16", "--rows=8", "--repeats=1", "--threads=1"]
    assert "linear_logprob" in command("head_sizes", *small)


def test_kd_step_needs_data(capsys):
    with pytest.raises(SystemExit) as end:
        grpo_step.main([])
    assert end.value.code == 2 and "--data and --tokenizer are needed" in capsys.readouterr().err


def test_real_logits(checkpoints, tmp_path, capsys):
    """What the kernels keep is near fp64, whole bf16 logits are not, and linear_kl is nearest."""
    data = tmp_path / "problems.jsonl"
    row = {"question": "Tom has 3 apples and buys 4. How many?", "answer": "3 + 4 = 7\n#### 7"}
    data.write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    options = ["--model", str(checkpoints / "tiny"), "--data", str(data)]
    assert real_logits.main(options) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(lines) == 9
    for tile, whole, linear in zip(*[iter(lines)] * 3, strict=True):
        assert (tile[1], whole[1], linear[1]) == ("tile", "whole", "linear_kl")
        at_rows = [float(line[-2]) for line in (tile, whole, linear)]
        assert at_rows[0] < 1 and at_rows[1] > 3 * at_rows[0] and at_rows[2] < 0.1 * at_rows[0]
    assert real_logits.main(["--model", "tiny", "--data", str(data)]) == 2
    assert "name a checkpoint" in capsys.readouterr().err


def test_what_the_kernels_keep_is_what_the_other_restatement_keeps():
    logits_NV = 5 * torch.randn(3, 1009, generator=torch.Generator().manual_seed(0))
    logits_NV[0, 700] = -1e5  # counts as the lowest fp16 below its tile's largest
    want = test_rounding.kept(logits_NV.clamp(min=-65_000), torch.float16, "tile")[:, :1009]
    got = real_logits.by_tiles(logits_NV)
    assert torch.equal(got[1:], want[1:]) and torch.equal(got[0, :640], want[0, :640])
    largest = logits_NV[0, 640:768].max()
    assert got[0, 700] == largest - 65504


def test_teacher_cache(checkpoints, capsys):
    folders = [str(checkpoints / name) for name in ("tiny", "tiny-teacher")]
    assert (
        teacher_cache.main(
            [*folders, "--data", "word_problems:4", "--k", "1,8", "--draws", "2,12,200"]
        )
        == 0
    )
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    topk, draws = [
        [float(line[-1]) for line in lines if kind in line[0]] for kind in ("top", "draws")
    ]
    # all ids: fp16's rounding alone
    assert len(lines) == 6 and topk[0] > topk[2] and topk[2] < 1
    assert draws[0] > draws[1] > draws[2] > topk[2]


def test_sandbox(capsys):
    assert sandbox.main(["--count", "4", "--workers", "1"]) == 0
    assert "4 passed" in capsys.readouterr().out


def test_intervals_of_seeds():
    assert kd_vs_sft.interval([0.5, 0.7]) == "+60.0% [-67.1%, +187.1%]"


def test_a_process_over_its_limit_leaves_no_children():
    for seconds in (0.5, 5, 50):  # until it comes to its `echo`
        outcome = processes.run_limited(["sh", "-c", "sleep 600 & echo $!; wait"], seconds)
        assert outcome.code is None and outcome.seconds < 599
        if outcome.stdout:
            break
    wait_until(lambda: not is_running(int(outcome.stdout)))  # when the kernel gets to it


def is_running(pid):
    """Whether a process has work left: one that ended may still wait to be reaped."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
