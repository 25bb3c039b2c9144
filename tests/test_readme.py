"""The README's snippets are run, smaller; its commands name files that are not here: only read."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys

import pytest

import options
import train
from config import validate
from eval import __main__ as evaluation
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"\(`python mine\.py ([^`]*)`\).*?```python\n(.*?)```", README, re.S)
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()
]


def test_there_are_three_snippets_of_under_ten_lines():
    assert len(SNIPPETS) == 3
    assert all(
        len([line for line in code.splitlines() if line.strip()]) < 10 for _, code in SNIPPETS
    )


@pytest.mark.parametrize("args,code", SNIPPETS, ids=["divergence", "task", "preset"])
def test_make_it_yours(args, code, tmp_path):
    (tmp_path / "mine.py").write_text(code)
    small = [
        "--steps=2",
        "--batch_size=2",
        "--eval_examples=2",
        "--eval_tokens=4",
        "--device=cpu",
        "--name=m",
    ]
    small += ["--teacher=tiny-teacher"] if "kd" in args else []
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "mine.py", *shlex.split(args), *small],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "runs/m/checkpoints/step-2/model.safetensors").is_file()
    if "divergence" in args:
        assert '"train/renyi"' in (tmp_path / "runs/m/metrics.jsonl").read_text()


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_exists_and_parses(line):
    """make: there is such a target; train.py: the options are valid; wandb: the file is there."""
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
    elif "train.py" in words:
        argv = [
            w.replace("recipes/", f"{ROOT}/recipes/") for w in words[words.index("train.py") + 1 :]
        ]
        if argv != ["--help"]:
            validate(options.parse(train.Config, argv))
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2])
        if words[2] == "eval":
            evaluation.parse(words[3:])
    else:
        assert words[:2] == ["wandb", "sweep"] and (ROOT / words[2]).is_file()


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as e:
        train.main(["--help"])
    out = capsys.readouterr().out
    assert e.value.code == 0 and all(len(line) <= 100 for line in out.splitlines())
    assert all(f"--{name} " in out for name in train.Config.__dataclass_fields__)
