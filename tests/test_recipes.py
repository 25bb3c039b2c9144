"""Recipes, studies and sweeps as shipped: valid, with the paper's numbers as the paper has them.

The command lines of sweeps are written as wandb writes them.
"""

import itertools
import tomllib

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

import eval.__main__
import eval.traces
import options
import train
from config import validate
from eval.study.schema import read_file
from tests.conftest import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
STUDIES = sorted(
    p for p in (ROOT / "recipes" / "study").glob("*.toml") if p.stem != "mini"
)  # mini is run whole, in test_study.py
# tests/test_sweeps.py draws trials of all sweeps, also of those at random
SWEEPS = sorted(
    p for p in (ROOT / "sweeps").glob("*.yaml") if "method: random" not in p.read_text()
)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipes_are_valid_and_explain_themselves(path):
    argv = ["--config", str(path)]
    validate(options.parse(train.Config, argv))
    given, _ = options.read_layers(train.Config, argv)
    assert set(given) == set(tomllib.loads(path.read_text()))
    assert f"--config recipes/{path.name}" in path.read_text()


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_starts_with_a_tiny_body_in_place_of_the_checkpoints(path, tmp_path):
    recipe = tomllib.loads(path.read_text())
    model, batch = (
        ("tiny-teacher", recipe["grpo_samples"]) if recipe["mode"] == "grpo" else ("tiny", 2)
    )  # `tiny` is a distilled one in grpo
    argv = [
        "--config",
        str(path),
        f"--model={model}",
        "--data=word_problems:8",
        "--steps=2",
        f"--batch_size={batch}",
        "--eval_examples=2",
        "--eval_tokens=4",
        "--micro_batch_tokens=512",
        "--dtype=float32",
        "--device=cpu",
        "--compile=false",
        f"--runs={tmp_path}",
        "--name=r",
    ]
    argv += ["--sample_tokens=6"] if {"grpo_samples", "kd_prefix"} & recipe.keys() else []
    argv += ["--teacher=random:tiny-teacher"] if recipe["mode"] == "kd" else []
    argv += ["--chat_template_kwargs="] if "chat_template_kwargs" in recipe else []  # the model's
    # --epochs is not read once --steps is given
    trimmed = tmp_path / "recipe.toml"
    trimmed.write_text(
        "\n".join(line for line in path.read_text().splitlines() if not line.startswith("epochs"))
    )
    argv[1] = str(trimmed)
    assert train.main(argv) == 0
    assert (tmp_path / "r" / "checkpoints" / "step-2" / "model.safetensors").is_file()


@pytest.fixture(params=STUDIES, ids=lambda p: p.stem)
def study(request):
    tables = tomllib.loads(request.param.read_text())
    return tables | {
        "run": read_file(request.param, []).runs,
        "like": {run.get("like") for run in tables.get("run", {}).values()},
        "file": request.param.name,
        "text": request.param.read_text(),
    }


def arguments(given):
    return [f"--{key}={value}" for key, value in given.items()]


def run_config(study, name):
    """A run's own options and those of [common] that it reads, as a config."""
    common, own = study["common"], study["run"][name]
    every = options.parse(train.Config, arguments(common | own), conditions=False)
    read = options.resolved(every)
    given = {k: v for k, v in (common | own).items() if k in own or k in read}
    return options.parse(train.Config, arguments(given))


def test_studies_are_complete(study):
    """Every option is one, every run passes train.py's check, and every name leads somewhere."""
    assert set(study) <= {
        "study",
        "eval",
        "common",
        "model",
        "traces",
        "run",
        "arm",
        "claim",
        "like",
        "file",
        "text",
    }
    assert (
        f"eval.study recipes/study/{study['file']} " in study["text"]
        and max(map(len, study["text"].splitlines())) <= 160
    )
    runs, arms, traces = study.get("run", {}), study["arm"], study.get("traces", {})
    for name in runs:
        cfg = run_config(study, name)
        validate(cfg)
        assert (cfg.data and not cfg.data.startswith("@")) or cfg.data[1:] in traces
        assert cfg.model == "tiny", "the model is the arm's"
    for name, chosen in traces.items():
        chosen = {k: v for k, v in chosen.items() if k != "teacher"}
        eval.traces.parse([traces[name]["teacher"], "--out=x", *arguments(chosen)])
    for arm in arms.values():
        assert set(arm) <= {"model", "chain", "eval", "paper"} and set(arm["chain"]) <= set(runs)
        args = eval.__main__.parse([arm["model"], *arguments(study["eval"] | arm.get("eval", {}))])
        assert arm.get("paper", "collapsed") == "collapsed" or set(arm["paper"]) <= set(args.tasks)
    in_chains = {name for arm in arms.values() for name in arm["chain"]}
    models = [name for model in study.get("model", {}).values() for name in model["chain"]]
    assert in_chains.union(models) <= set(runs) <= in_chains.union(models, study["like"])
    assert len(set(map(str, arms.values()))) == len(arms)
    for claim in study.get("claim", []):
        better, worse = (arms[claim[side]]["paper"] for side in ("better", "worse"))
        assert set(claim) == {"text", "better", "worse", "task"}
        assert worse == "collapsed" or better[claim["task"]] > worse.get(claim["task"], 100), claim


# Tables 2 and 3 of arXiv 2506.13404: OlympiadBench, MATH500, MINERVA, AMC23, GSM8K
PAPER = {
    "inst": (6.2, 31.4, 6.3, 5.0, 45.5),
    "base_kd": (3.3, 10.0, 1.8, 7.5, 18.7),
    "base_kd_lora": (2.2, 7.6, 2.5, 0.0, 9.7),
    "base_sft": (3.7, 9.2, 1.4, 5.0, 21.6),
    "base_sft_lora": (0.7, 1.2, 0.3, 2.5, 2.1),
    "base_rl": (5.2, 23.6, 4.4, 5.0, 34.2),
    "inst_kd": (3.7, 15.2, 3.3, 2.5, 42.3),
    "inst_kd_lora": (3.0, 16.6, 1.8, 10.0, 40.0),
    "inst_sft": (2.4, 12.2, 2.9, 5.0, 30.9),
    "inst_sft_lora": (3.7, 14.8, 2.9, 7.5, 31.4),
    "inst_rl": (7.6, 32.4, 8.5, 7.5, 54.0),
    "base_kd_rl": (3.3, 10.6, 2.2, 0.0, 29.6),
    "base_kd_lora_rl": (1.8, 4.4, 0.7, 5.0, 2.8),
    "base_sft_rl": "collapsed",
    "base_sft_lora_rl": (0.5, 1.0, 1.1, 0.0, 1.2),
    "inst_kd_rl": "collapsed",
    "inst_kd_lora_rl": (4.6, 19.4, 3.7, 5.0, 47.9),
    "inst_sft_rl": (3.1, 13.8, 4.8, 10.0, 45.5),
    "inst_sft_lora_rl": (2.2, 16.0, 3.7, 5.0, 44.3),
}


def test_the_papers_study_is_the_papers():
    """Its 18 trained arms, its numbers, and every value that it states.

    Each arm begins from the model, and has the runs, that its name says.
    """
    study = tomllib.loads((ROOT / "recipes" / "study" / "paper.toml").read_text())
    tasks = ("olympiadbench", "math500", "minerva_math", "amc23", "gsm8k")
    assert {name: arm["paper"] for name, arm in study["arm"].items() if "paper" in arm} == {
        name: row if row == "collapsed" else dict(zip(tasks, row, strict=True))
        for name, row in PAPER.items()
    }
    trained = {name: arm for name, arm in study["arm"].items() if arm["chain"]}
    assert len(trained) == 18 and set(trained) == set(PAPER) - {"inst"}
    for name, arm in study["arm"].items():
        start, *_ = name.split("_")
        assert (
            arm["model"]
            == {"base": "Qwen/Qwen2.5-0.5B", "inst": "Qwen/Qwen2.5-0.5B-Instruct"}[start]
        )
        assert not arm["chain"] or "_".join([start, *arm["chain"]]) == name
    assert set(study["eval"]["tasks"].split(",")) == set(tasks)
    assert [study["eval"][k] for k in ("temperature", "top_p", "max_tokens")] == [0.6, 0.95, 32768]
    runs = {name: run_config(study, name) for name in study["run"]}
    for name, cfg in runs.items():
        assert (cfg.mode, cfg.lora_rank > 0) == ("grpo" if name == "rl" else "sft", "lora" in name)
        assert ("gsm8k_distilled" if "kd" in name else "openai/gsm8k/") in cfg.data
        if name != "rl":
            assert (cfg.lr, cfg.epochs, cfg.micro_batch_tokens) == (
                1e-4 if cfg.lora_rank else 4e-5,
                4,
                8192,
            )
    single = tomllib.loads((ROOT / "recipes" / "grpo_gsm8k_0.5b_paper.toml").read_text())
    passing = {"model", "eval_every", "eval_examples", "save_every", "log_every"}
    assert {k: getattr(runs["rl"], k) for k in single if k not in passing} == {
        k: v for k, v in single.items() if k not in passing
    }


def test_the_small_study_has_the_papers_arms():
    study = tomllib.loads((ROOT / "recipes" / "study" / "mini.toml").read_text())
    arms = {
        name.replace("instruct", "inst"): arm
        for name, arm in study["arm"].items()
        if "paper" in arm
    }
    assert {name: arm["paper"] for name, arm in arms.items()} == {
        name: row if row == "collapsed" else {"gsm8k": row[-1]} for name, row in PAPER.items()
    }
    for name, arm in arms.items():
        assert (
            "_".join(
                [arm["model"].replace("@instruct", "inst").replace("@base", "base"), *arm["chain"]]
            )
            == name
        )


def combinations(sweep):
    """Every combination of the listed values and of both ends of every range."""
    choices = []
    for name, spec in sweep["parameters"].items():
        values = (
            [spec["value"]] if "value" in spec else spec.get("values") or [spec["min"], spec["max"]]
        )
        choices.append([(name, value) for value in values])
    return [dict(c) for c in itertools.product(*choices)]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_sweeps_parse_as_wandb_writes_them(path):
    sweep = yaml.safe_load(path.read_text())
    fixed = [part for part in sweep["command"] if part.startswith("--")]
    assert sweep["program"] == "train.py" and "${args}" in sweep["command"]
    for values in combinations(sweep):
        written = create_sweep_command_args(
            {"args": {name: {"value": value} for name, value in values.items()}}
        )
        for args in (written["args"], written["args_no_equals"]):
            argv = [part.replace("recipes/", f"{ROOT}/recipes/") for part in fixed] + args
            cfg = options.parse(train.Config, argv)
            validate(cfg)
            assert set(sweep["parameters"]) <= set(options.read_layers(train.Config, argv)[-1])
            assert all(getattr(cfg, name) == value for name, value in values.items())
