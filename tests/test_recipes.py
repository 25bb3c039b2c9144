"""Recipes and sweeps as shipped: valid, and written the way wandb would write their command lines."""

import itertools
import tomllib

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

import config
import train
from tests.conftest import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipes_are_valid_and_explain_themselves(path):
    cfg, given = config.parse(train.Config, ["--config", str(path)])
    train.check(cfg)
    assert given == set(tomllib.loads(path.read_text()))
    assert f"--config recipes/{path.name}" in path.read_text()


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_starts_with_a_tiny_body_in_place_of_the_checkpoints(path, tmp_path):
    recipe = tomllib.loads(path.read_text())
    model, batch = ("tiny-teacher", recipe["grpo_samples"]) if recipe["mode"] == "grpo" else ("tiny", 2)  # `tiny` is a distilled one in grpo
    argv = ["--config", str(path), f"--model={model}", "--data=word_problems:8", "--steps=2", f"--batch_size={batch}", "--eval_examples=2",
            "--eval_tokens=4", "--micro_tokens=512", "--dtype=float32", "--device=cpu", "--compile=false", f"--runs={tmp_path}", "--name=r"]  # fmt: skip
    argv += ["--sample_tokens=6"] if recipe["mode"] == "grpo" else []
    argv += ["--teacher=tiny-teacher"] if recipe["mode"] == "kd" else []
    # --epochs is not read once --steps is given
    trimmed = tmp_path / "recipe.toml"
    trimmed.write_text("\n".join(line for line in path.read_text().splitlines() if not line.startswith("epochs")))
    argv[1] = str(trimmed)
    assert train.main(argv) == 0
    assert (tmp_path / "r" / "checkpoints" / "step-2" / "model.safetensors").is_file()


def combinations(sweep):
    """Every combination of the listed values and of both ends of every range."""
    choices = []
    for name, spec in sweep["parameters"].items():
        values = [spec["value"]] if "value" in spec else spec.get("values") or [spec["min"], spec["max"]]
        choices.append([(name, value) for value in values])
    return [dict(c) for c in itertools.product(*choices)]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_sweeps_parse_as_wandb_writes_them(path):
    sweep = yaml.safe_load(path.read_text())
    fixed = [part for part in sweep["command"] if part.startswith("--")]
    assert sweep["program"] == "train.py" and "${args}" in sweep["command"]
    for values in combinations(sweep):
        written = create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})
        for args in (written["args"], written["args_no_equals"]):
            cfg, given = config.parse(train.Config, [part.replace("recipes/", f"{ROOT}/recipes/") for part in fixed] + args)
            train.check(cfg)
            assert set(sweep["parameters"]) <= given and all(getattr(cfg, name) == value for name, value in values.items())
