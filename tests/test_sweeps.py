"""Trials of the sweeps, drawn at random, started as wandb starts them."""

import json
import math
import os
import random
import subprocess
import sys

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

import options
import toy_models
import train
from config import validate
from eval.__main__ import EvalOptions
from run import read_metrics
from tests.conftest import ROOT
from tests.distributed_workers import start

SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))
FORMS = ("args", "args_no_equals", "args_no_hyphens", "args_no_boolean_flags")
TRIALS = 20
# what makes a trial short, in place of what the sweep's own command names
SHORT = {
    "data": "word_problems:64",
    "steps": 2,
    "eval_examples": 2,
    "eval_tokens": 4,
    "micro_batch_tokens": 2048,
    "wandb": "off",
    "device": "cpu",
    "dtype": "float32",
}


def drawn(parameters, rng):
    """One trial's values, as wandb's random search draws them."""
    values = {}
    for name, spec in parameters.items():
        if "value" in spec:
            values[name] = spec["value"]
        elif "values" in spec:
            values[name] = rng.choice(spec["values"])
        elif spec["distribution"] == "log_uniform_values":
            values[name] = math.exp(rng.uniform(math.log(spec["min"]), math.log(spec["max"])))
        else:
            values[name] = rng.uniform(spec["min"], spec["max"])
    return values


def written(values):
    return create_sweep_command_args({"args": {name: {"value": v} for name, v in values.items()}})


@pytest.fixture(params=SWEEPS, ids=lambda path: path.stem)
def trials(request, monkeypatch):
    """The options of a sweep's own command, and the values of some trials."""
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.chdir(ROOT)
    path = request.param
    sweep, rng = yaml.safe_load(path.read_text()), random.Random(path.stem)
    assert sweep["program"] == "train.py" and "${args}" in sweep["command"]
    assert f"wandb sweep sweeps/{path.name}" in path.read_text()
    fixed = [part for part in sweep["command"] if part.startswith("--")]
    return fixed, [drawn(sweep["parameters"], rng) for _ in range(TRIALS)]


def test_every_trial_is_read_as_it_was_drawn(trials):
    """What it does not read is noted, and all else has the value that was drawn."""
    fixed, every = trials
    for trial, values in enumerate(every):
        notes = []
        argv = [*fixed, *written(values)[FORMS[trial % len(FORMS)]]]
        cfg = options.parse(train.Config, argv, notes=notes)
        validate(cfg)
        read, noted = options.resolved(cfg), "".join(notes)
        given = options.read_layers(train.Config, argv)[-1]
        left_out = [name for name, value in values.items() if value in (None, False)]
        assert {*values} - {*left_out} <= {*given} <= {*values}
        for name, value in given.items():
            assert value == values[name]
            assert (f"{name} (read with" in noted) == (name not in read), name
            assert read.get(name, value) == value, name


MODELS = {
    "kd": {"teacher": "random:tiny-teacher", "model": "tiny"},
    "grpo": {"model": "tiny-teacher", "sample_tokens": 6},
}


@pytest.mark.slow
def test_no_trial_is_lost(trials, tmp_path, capsys):
    fixed, every = trials
    for trial, values in enumerate(every):
        short = SHORT | MODELS.get(values.get("mode", "kd"), {})
        short |= {"runs": str(tmp_path), "name": f"trial-{trial}"}
        short |= {"chat_template_kwargs": "", "batch_size": 16}
        argv = [*fixed, *written(values | short)[FORMS[trial % len(FORMS)]]]
        assert train.main(argv) == 0, (argv, capsys.readouterr().err)
        assert read_metrics(tmp_path / f"trial-{trial}")[-1]["step"] == 2


def first_use(argv):
    toy_models.TEACHER["steps"] = 4
    return train.main(argv)


@pytest.mark.slow
def test_two_agents_on_one_machine_share_the_first_teacher_and_nothing_else(tmp_path):
    """Their runs have names of their own; one trains the teacher while the other waits."""
    agents, places = [], [tmp_path / "0", tmp_path / "1"]
    for number, cwd in enumerate(places):
        cwd.mkdir()
        values = {"mode": "kd", "seed": number, "log_every": 1, "runs": str(tmp_path / "runs")}
        environment = {
            "WANDB_SWEEP_ID": "sweep",
            "WANDB_RUN_ID": f"trial{number}",
            "WANDB_MODE": "offline",
            "CUDA_VISIBLE_DEVICES": str(number),
        }
        argv = written(SHORT | values | {"wandb": "offline"})["args"]
        agents.append(start(*argv, cwd=cwd, main=first_use, **environment))
    for agent in agents:
        agent.join(900)
    errors = [(cwd / "stderr").read_text() for cwd in places]
    assert [agent.exitcode for agent in agents] == [0, 0], errors
    said = [(cwd / "stdout").read_text() for cwd in places]
    assert sum("training the toy teacher first" in text for text in said) == 1
    runs = sorted(path.parent for path in (tmp_path / "runs").glob("kd-*/metrics.jsonl"))
    assert len(runs) == 2 and len(list((tmp_path / "runs").glob("teacher-*/metrics.jsonl"))) == 1
    assert {(run / "wandb_id").read_text() for run in runs} == {"trial0", "trial1"}
    assert all(read_metrics(run)[-1]["step"] == 2 for run in runs)


SHORT_TEACHER = """
import runpy, sys, toy_models
toy_models.TEACHER["steps"] = 4
runpy.run_path(str(toy_models.ROOT / "train.py"), run_name="__main__")
"""


@pytest.mark.slow
def test_two_agents_of_two_ranks_each_on_one_machine(tmp_path):
    """torchrun in the place of the interpreter, as sweeps/kd_grid.yaml says; the real commands.

    Only the steps of the toy teacher, which no option names, are set by a script around train.py.
    """
    sweep = yaml.safe_load((ROOT / "sweeps/kd_grid.yaml").read_text())
    assert sweep["command"] == ["${env}", "${interpreter}", "${program}", "${args}"]
    (tmp_path / "short.py").write_text(SHORT_TEACHER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    rng, agents = random.Random(0), []
    for number in range(2):
        values = drawn(sweep["parameters"], rng) | SHORT | {"log_every": 1, "wandb": "offline"}
        argv = written(values)["args"]
        environment = {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "WANDB_SWEEP_ID": "sweep",
            "WANDB_RUN_ID": f"trial{number}",
        }
        agents.append(
            subprocess.Popen(
                [*torchrun, str(tmp_path / "short.py"), *argv],
                cwd=tmp_path,
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = [agent.communicate(timeout=1800) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert sum("training the toy teacher first" in out for out, _ in said) == 1
    runs = sorted(path.parent for path in tmp_path.glob("runs/kd-*/metrics.jsonl"))
    assert len(runs) == 2 and len(list(tmp_path.glob("runs/teacher-*/metrics.jsonl"))) == 1
    assert {(run / "wandb_id").read_text() for run in runs} == {"trial0", "trial1"}
    assert len(list(tmp_path.glob("runs/kd-*/wandb/offline-run-*-trial[01]"))) == 2, (
        "one of rank 0 each"
    )
    for run in runs:
        assert read_metrics(run)[-1]["step"] == 2
        assert json.loads((run / "environment.json").read_text())["ranks"] == 2


@pytest.mark.parametrize("form", FORMS)
def test_every_way_in_which_wandb_writes_a_trial_is_read(form):
    values = {
        "mode": "grpo",
        "lr": 1.5e-05,
        "grpo_reward": "accuracy,format:0.5",
        "grpo_clip_high": None,
        "grpo_mask_truncated": True,
        "lora_rslora": None,
        "lora_rank": 4,
        "compile": False,
        "teacher": None,
    }
    cfg = options.parse(train.Config, written(values)[form])
    default = options.parse(train.Config, ["--mode=grpo"])
    for name, value in values.items():
        expected = getattr(default, name) if value is None else value
        assert getattr(cfg, name) == expected, name


def test_lists_are_read_as_wandb_writes_them():
    for form in ("args", "args_no_equals"):
        argv = written({"tasks": ["gsm8k", "math500"], "n": 4, "k": [1, 4]})[form]
        args = options.parse(EvalOptions, ["a model", *argv])
        assert (args.tasks, args.n, args.k) == (("gsm8k", "math500"), 4, (1, 4))
        assert args.checkpoints == ("a model",)
