"""The command line as people, TOML files and wandb write it."""

import dataclasses
import json

import pytest

import config
from config import knob
from errors import UserError


@dataclasses.dataclass(frozen=True)
class Example:
    mode: str = knob("kd", "", choices=("sft", "kd"))
    lr: float = knob(1e-3, "")
    steps: int = knob(10, "")
    compile: bool = knob(False, "")
    data: str = knob("x", "")
    kd_temperature: float = knob(1.0, "", only={"mode": ("kd",)})
    kd_divergence: str = knob("jsd", "", only={"mode": ("kd",)}, choices=("jsd", "forward_kl"))
    kd_beta: float = knob(0.5, "", only={"mode": ("kd",), "kd_divergence": ("jsd",)})


def parse(*argv, base=None):
    return config.parse(Example, argv, base)[0]


@pytest.mark.parametrize(
    "argv,name,value",
    [
        (["--lr", "1e-5"], "lr", 1e-5),
        (["--lr=1e-5"], "lr", 1e-5),
        (["--kd_temperature=2"], "kd_temperature", 2.0),
        (["--kd-temperature", "2"], "kd_temperature", 2.0),
        (["--compile"], "compile", True),
        (["--compile", "--lr", "1"], "compile", True),
        (["--compile=False"], "compile", False),
        (["--compile", "false"], "compile", False),
        (["--compile=True"], "compile", True),
        (["--steps=1e3"], "steps", 1000),
        (["--data=a=b"], "data", "a=b"),
        (["--data", "--odd"], "data", "--odd"),
    ],
)
def test_spellings(argv, name, value):
    assert getattr(parse(*argv), name) == value


@pytest.mark.parametrize(
    "argv,words",
    [
        (["--lrr", "1"], ["lrr", "lr"]),
        (["--kd_temprature=2"], ["kd_temprature", "kd_temperature"]),
        (["--zzzz=2"], ["zzzz", "--help"]),
        (["--lr", "fast"], ["lr", "fast", "a number"]),
        (["--steps", "1.5"], ["steps", "1.5", "whole"]),
        (["--compile=maybe"], ["compile", "maybe"]),
        (["--mode=kdd"], ["mode", "kdd", "did you mean kd"]),
        (["--lr"], ["lr", "needs a value"]),
        (["lr=1"], ["lr=1"]),
        (["--mode=sft", "--kd_temperature=2"], ["kd_temperature", "mode=sft"]),
        (["--kd_divergence=forward_kl", "--kd_beta=0.1"], ["kd_beta", "kd_divergence=forward_kl", "jsd"]),
        (["--config", "nowhere.toml"], ["nowhere.toml"]),
        (["--config"], ["--config"]),
    ],
)
def test_errors_name_the_key_and_the_nearest_valid_one(argv, words):
    with pytest.raises(UserError) as e:
        parse(*argv)
    assert "\n" not in str(e.value)
    for word in words:
        assert word in str(e.value)


def test_precedence_and_files(tmp_path):
    toml, js = tmp_path / "a.toml", tmp_path / "b.json"
    toml.write_text('lr = 1e-5\nsteps = 7\ndata = "file"\n')
    js.write_text(json.dumps({"steps": 8}))
    got = parse("--steps=9", "--config", str(toml))
    assert (got.lr, got.steps, got.data) == (1e-5, 9, "file")
    assert parse("--config", str(toml), f"--config={js}").steps == 8
    assert parse("--lr=2", base={"lr": 3.0, "steps": 5}).steps == 5


@pytest.mark.parametrize("text", ["lr = [1]", "lr = {a = 1}", "lr ==", "[kd]\nlr = 1", 'lrr = 1', 'lr = "x"', "lr = true"])
def test_a_bad_file_is_one_line_that_names_it(tmp_path, text):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(UserError) as e:
        parse("--config", str(path))
    assert "bad.toml" in str(e.value) and "\n" not in str(e.value)


def test_a_json_file_that_is_no_object_is_one_line_that_names_it(tmp_path):
    path = tmp_path / "list.json"
    path.write_text('["lr", 1]')
    with pytest.raises(UserError, match="list.json.*list"):
        parse("--config", str(path))


def test_a_resumed_run_is_judged_by_its_own_knobs_and_keeps_some():
    base = {"kd_divergence": "forward_kl", "steps": 5, "data": "x"}
    assert config.parse(Example, ["--kd_divergence=forward_kl", "--kd_beta=0.3"], together=False)[0].kd_beta == 0.3
    with pytest.raises(UserError, match="kd_beta is not read"):
        parse("--kd_beta=0.3", base=base)
    assert config.parse(Example, ["--steps=6", "--data=x"], base, kept=["data"])[0].steps == 6
    with pytest.raises(UserError, match="--steps 6: the run was begun with 5"):
        config.parse(Example, ["--steps=6"], base, kept=["data", "steps"])


def test_resolved_holds_what_is_read_and_is_valid_again(tmp_path):
    got = parse("--mode=sft", "--lr=5")
    values = config.resolved(got)
    assert "lr" in values and not any(k.startswith("kd_") for k in values)
    assert "kd_beta" not in config.resolved(parse("--kd_divergence=forward_kl"))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    assert parse("--config", str(path)) == got
