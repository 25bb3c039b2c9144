"""What takes long says how far it is, by time."""

import pytest

import progress
import train
from progress import Progress, watched
from tests.distributed_workers import run
from tests.test_train import SMALL


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_comes_every_ten_seconds_whatever_is_done(clock, capsys):
    at = Progress("reading", 200, "MB")
    said = {}
    for second in range(1, 41):
        clock[0] = 100.0 + second
        at.add(5)
        out = capsys.readouterr().out
        if out:
            said[second] = out
    assert said == {
        10: "reading: 50 of 200 MB, about 0m30s left\n",
        20: "reading: 100 of 200 MB, about 0m20s left\n",
        30: "reading: 150 of 200 MB, about 0m10s left\n",
        40: "reading: 200 of 200 MB, about 0m00s left\n",
    }


def test_tokens_are_counted_before_anything_is_finished(clock, capsys):
    at = Progress("rollout", 16, "samples")
    clock[0] += 20
    at.add(0, 4000)
    assert capsys.readouterr().out == "rollout: 0 of 16 samples, 4,000 tokens, 200 tok/s\n"
    clock[0] += 14380
    at.add(4, 1000)
    expected = "rollout: 4 of 16 samples, 5,000 tokens, 0 tok/s, about 12h00m00s left\n"
    assert capsys.readouterr().out == expected


def test_a_total_that_nobody_knows(clock, capsys):
    at = Progress("reading a.jsonl", 0, "rows")
    clock[0] += 20
    at.add(4000)
    assert capsys.readouterr().out == "reading a.jsonl: 4,000 rows\n"


def test_what_is_short_or_another_ranks_is_silent(clock, capsys):
    assert list(watched("a", iter("xyz"), "letters")) == ["x", "y", "z"]
    silent = Progress("a", 10, "letters", speaks=False)
    clock[0] += 99
    silent.add(5)
    assert capsys.readouterr().out == ""


def always(argv):
    progress.EVERY = -1.0
    return train.main(argv)


@pytest.mark.parametrize(
    "options,stages",
    [
        (
            ["--mode=grpo", "--model={teacher}", "--grpo_samples=2", "--sample_tokens=8"],
            [
                "reading ",
                "digests of ",
                "rollout: ",
                "validation: ",
                "validation loss: ",
                "a step: ",
            ],
        ),
        (
            ["--mode=kd", "--teacher={teacher}", "--kd_signal=topk", "--kd_cache=c"],
            [
                "reading mine.jsonl: 1 rows",
                "tokenising: ",
                "the cache c: ",
                "record of the data: ",
                "grading: ",
            ],
        ),
        (["--mode=kd", "--teacher={teacher}"], ["teacher and student: "]),
    ],
    ids=["grpo", "cache", "kd"],
)
def test_every_stage_that_may_take_long_has_a_line(options, stages, tmp_path, saved):
    argv = [*SMALL, *(option.format(teacher=saved) for option in options), "--steps=2"]
    if "--kd_cache=c" in argv:
        lines = [f'{{"question": "What is {i} + 1?", "answer": "{i + 1}"}}\n' for i in range(20)]
        (tmp_path / "mine.jsonl").write_text("".join(lines))
        argv.append("--data=mine.jsonl")
    result = run(*argv, cwd=tmp_path, main=always)
    assert result.returncode == 0, result.stderr
    for stage in stages:
        assert f"\n{stage}" in f"\n{result.stdout}", stage


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("saved")
    result = run("--mode=sft", *SMALL, "--steps=2", "--name=s", "--model=tiny-teacher", cwd=cwd)
    assert result.returncode == 0, result.stderr
    return cwd / "runs/s/checkpoints/step-2"
