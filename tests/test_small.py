"""What is small: a model that one thread computes, a file of which little is held out."""

import json

import pytest
import torch

import train
from kernels.cpu import SMALL_MODEL, choose_threads, default_threads


@pytest.fixture
def threads(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    default_threads.cache_clear()
    yield
    torch.set_num_threads(before)
    default_threads.cache_clear()


def test_a_larger_model_after_a_small_one_has_all_threads(threads):
    said = [choose_threads(size)[0] for size in (10, SMALL_MODEL, 10, SMALL_MODEL)]
    assert said == ["1", "2", "1", "2"] and torch.get_num_threads() == 2


@pytest.mark.parametrize(
    "parameters,given,environment,expected",
    [
        (SMALL_MODEL - 1, 0, None, "1 (for a model this small"),
        (SMALL_MODEL, 0, None, "2 (PyTorch's choice"),
        (SMALL_MODEL - 1, 2, None, "2 (--threads)"),
        (SMALL_MODEL, 1, "2", "1 (--threads)"),
        (SMALL_MODEL - 1, 0, "2", "2 (OMP_NUM_THREADS)"),
    ],
)
def test_one_thread_computes_a_small_model_unless_told(
    parameters, given, environment, expected, threads, monkeypatch
):
    if environment:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    said = choose_threads(parameters, given)
    assert said.startswith(expected) and torch.get_num_threads() == int(said[0])


def dry_run(capsys, *argv):
    assert train.main(["--dry_run", "--device=cpu", *argv]) == 0
    return capsys.readouterr().out


def test_the_start_block_says_how_many_threads(capsys, threads, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "\nthreads    1 (for a model" in dry_run(capsys, "--mode=sft")
    assert "\nthreads    2 (--threads)" in dry_run(capsys, "--mode=sft", "--threads=2")


def rows(path, count, repeated=1):
    lines = [{"question": f"What is {i} + 1?", "answer": f"{i + 1}"} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines * repeated))


@pytest.mark.parametrize(
    "count,options,trained,held",
    [
        (600, "", 540, 60),  # before: 400 of 600
        (5, "", 4, 1),
        (4100, "", 3700, 400),
        (600, "--defaults=pretrained", 540, 60),
        (2100, "--defaults=pretrained", 1900, 200),
        (600, "--eval_examples=300", 300, 300),
        (600, "--eval_examples=400", 200, 400),  # as many as the default: said is said
        (600, "--eval_examples=0", 600, 0),
    ],
)
def test_a_tenth_of_a_small_file_is_held_out(
    count, options, trained, held, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    rows(tmp_path / "mine.jsonl", count)
    out = dry_run(capsys, "--mode=sft", "--data=mine.jsonl", *options.split())
    assert f"{trained:,} examples trained on, {held:,} for validation" in out
    assert ("VALIDATION TAKES" in out) == (held >= trained)


def test_a_resumed_run_keeps_its_split(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows(tmp_path / "mine.jsonl", 450)
    argv = ["--mode=sft", "--data=mine.jsonl", "--batch_size=2", "--eval_tokens=1", "--steps=1"]
    assert train.main(["--device=cpu", *argv, "--name=r"]) == 0
    path = tmp_path / "runs/r/config.json"
    stored = json.loads(path.read_text())
    assert stored["eval_examples"] == 45
    again = ["--name=r", "--resume", "--steps=2"]
    assert "405 examples trained on, 45 for validation" in dry_run(capsys, *again)
    path.write_text(json.dumps(stored | {"eval_examples": 400}))  # as one of before had it
    assert "50 examples trained on, 400 for validation" in dry_run(capsys, *again)
