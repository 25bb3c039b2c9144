"""The exercises of docs/forking.md: each is written beside the project, or into a copy, and run."""

import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

import train
from tests import gates
from tests.conftest import ROOT
from tests.distributed_workers import main_of_a_copy, run

SMALL = ["--steps=2", "--batch_size=4", "--eval_examples=2", "--eval_tokens=4", "--name=fork"]
FOR_MODE = {
    "sft": [],
    "kd": ["--teacher=random:tiny-teacher"],
    "grpo": ["--model=tiny-teacher", "--grpo_samples=2", "--sample_tokens=4"],
}
# What of a run shows that the change took part in it.
SIGNS = {
    "A divergence": '"train/renyi"',
    "A part of the reward": '"rollout/reward_brief"',
    "A task with problems of its own": '"eval/doubles/accuracy"',
    "A fork: an extra metric": '"train/probability"',
}


class Exercise(NamedTuple):
    name: str
    kind: str  # "python", a file of its own, or "diff"
    path: str
    lines: list[str]
    command: list[str]


def exercises() -> list[Exercise]:
    text = (ROOT / "docs/forking.md").read_text()
    pattern = r"^## ([^\n]+)\n.*?```(python|diff) (\S+)\n(.*?)```.*?```sh\n(.*?)```"
    found = re.findall(pattern, text, re.S | re.M)
    return [Exercise(n, k, p, body.splitlines(), shlex.split(sh)) for n, k, p, body, sh in found]


EXERCISES = exercises()


def test_there_are_seven_of_at_most_ten_lines_and_one_is_a_fork():
    assert len(EXERCISES) == 7
    assert [exercise.kind for exercise in EXERCISES] == ["python"] * 6 + ["diff"]
    for exercise in EXERCISES:
        added = [line for line in exercise.lines if line.strip(" +") and line[0] != "-"]
        assert len(added) <= 10, exercise.name


def apply(diff: list[str], path: Path) -> None:
    """Replace each run of `-` lines by the `+` lines behind it; without any, append."""
    text, removed, added = path.read_text(), [], []
    for line in [*diff, "-"]:
        if line.startswith("-") and (added or line == "-"):
            new = "".join(f"{a}\n" for a in added)
            old = "".join(f"{r}\n" for r in removed)
            assert text.count(old) == 1 or not old, f"{path} has not: {old}"
            text = text.replace(old, new) if old else text + new
            removed, added = [], []
        (removed if line.startswith("-") else added).append(line[1:])
    path.write_text(text)


def copy_project(copy: Path) -> None:
    """Copy the project's code."""
    for name in gates.source_files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy / name)


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.name)
def test_an_exercise_runs(exercise, tmp_path):
    main = train.main
    if exercise.kind == "diff":
        main = main_of_a_copy
        copy_project(tmp_path)
        apply(exercise.lines, tmp_path / exercise.path)
    else:
        (tmp_path / exercise.path).write_text("\n".join(exercise.lines))
    mode = exercise.command[exercise.command.index("--mode") + 1]
    assert exercise.command[:2] == ["python", "train.py"]
    argv = [*exercise.command[2:], *SMALL, *FOR_MODE[mode]]
    result = run(*argv, cwd=tmp_path, main=main)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "runs/fork"
    assert (folder / "checkpoints/step-2/model.safetensors").is_file()
    assert SIGNS.get(exercise.name, "") in (folder / "metrics.jsonl").read_text()
