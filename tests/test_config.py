"""The command line as people, TOML files and wandb write it."""

import dataclasses
import json
import re
import typing

import pytest

import options
import train
from config import validate
from errors import UserError
from eval.__main__ import EvalOptions
from options import option


@dataclasses.dataclass(frozen=True)
class Example:
    mode: typing.Literal["sft", "kd"] = option("kd", "")
    lr: float = option(1e-3, "")
    steps: int = option(10, "")
    compile: bool = option(False, "")
    data: str = option("x", "", fixed=True)
    kd_temperature: float = option(1.0, "", read_when={"mode": ("kd",)})
    kd_divergence: str = option(
        "jsd", "", read_when={"mode": ("kd",)}, choices=("jsd", "forward_kl")
    )
    kd_beta: float = option(0.5, "", read_when={"mode": ("kd",), "kd_divergence": ("jsd",)})
    batch: int = option(
        1, "", default_when={"mode": {"sft": 2}, "kd_divergence": {"forward_kl": 3}}
    )
    micro: int = option(1, "", default_when={"batch": {3: 4}})


def parse(*argv, base=None):
    return options.parse(Example, argv, base)


@pytest.mark.parametrize(
    "argv,name,value",
    [
        (["--lr", "1e-5"], "lr", 1e-5),
        (["--lr=1e-5"], "lr", 1e-5),
        (["lr=1e-5"], "lr", 1e-5),  # as wandb's ${args_no_hyphens} is written
        (["--lr=None", "--compile", "None"], "lr", 1e-3),
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
        (["--lr"], ["lr", "expected one argument"]),
        (["lrr=1"], ["lrr=1"]),
        (["--mode=sft", "--kd_temperature=2"], ["kd_temperature", "mode=sft"]),
        (
            ["--kd_divergence=forward_kl", "--kd_beta=0.1"],
            ["kd_beta", "kd_divergence=forward_kl", "jsd"],
        ),
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


@pytest.mark.parametrize(
    "text",
    ["lr = [1]", "lr = {a = 1}", "lr ==", "[kd]\nlr = 1", "lrr = 1", 'lr = "x"', "lr = true"],
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path, text):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(UserError) as e:
        parse("--config", str(path))
    assert "bad.toml" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "name,content,words",
    [
        ("c.yaml", "lr: 1e-5\n", ["YAML is not read", "lr = 1e-5"]),
        ("c.YML", "lr: 1e-5\n", ["YAML is not read"]),
        ("c.toml", "lr: 1e-5\nsteps: 3\n", ["looks like YAML", "lr = 1e-5"]),
        ("config", "_wandb:\n    value: 1\nlr:\n    value: 0.1\n", ["looks like YAML"]),
        ("c.toml", '{"lr": 1}', ["looks like JSON", ".json"]),
        ("c.py", "lr = 1e-5", ["Python is not read"]),
        ("c.toml", "data = 'ä'".encode("utf-16"), ["save it as UTF-8"]),
        ("c.json", '{"data": "ä"}'.encode("utf-16-le"), ["save it as UTF-8"]),
        ("c.toml", "data = 'ä'".encode("latin-1"), ["not UTF-8", "line 1"]),
        (
            "c.json",
            '{"lr": {"value": 0.001, "desc": null}, "steps": {"value": 3}}',
            ["lr is written as wandb writes it", "lr = 0.001", "config.json"],
        ),
        ("c.json", '{"lr": 1, "lr": 2}', ["'lr' is there twice"]),
        ("c.json", '{"lr": ' + "[" * 100000, ["nested too deeply"]),
        ("c.toml", "lr = " + "[" * 100000, ["not valid TOML"]),
        ("c.json", "", ["is empty"]),
        (
            "c.toml",
            "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
            ["git lfs pull"],
        ),
        ("c.toml", "<!DOCTYPE html><html>", ["web page"]),
    ],
)
def test_files_of_another_form_are_one_line_that_leads_on(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as e:
        parse("--config", str(tmp_path / name))
    assert f"--config {tmp_path / name}" in str(e.value) and "\n" not in str(e.value)
    for word in words:
        assert word in str(e.value)


@pytest.mark.parametrize(
    "name,content",
    [("c.toml", b""), ("c", b""), ("c.toml", b"\n# nothing\n"), ("c.toml", b"\xef\xbb\xbf")],
)
def test_a_toml_file_without_a_line_sets_nothing(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    argv = ["--config", str(tmp_path / name), "--lr=2"]
    assert options.parse(Example, argv) == Example(lr=2.0)
    assert options.read_layers(Example, argv) == [{}, {"lr": 2.0}]


def test_a_folder_as_a_file_names_the_file_in_it(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        parse("--config", str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=f"name the file: {tmp_path}/config.json"):
        parse("--config", str(tmp_path))


@pytest.mark.parametrize(
    "name,text",
    [("a.toml", 'data = "ü"\r\nlr = 1e-5\r\n'), ("a.json", '{"data": "ü", "lr": 1e-5}')],
)
def test_a_byte_order_mark_is_not_part_of_a_file(name, text, tmp_path):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    got = parse("--config", str(tmp_path / name))
    assert (got.data, got.lr) == ("ü", 1e-5)


def test_a_json_file_that_is_no_object_is_one_line_that_names_it(tmp_path):
    path = tmp_path / "list.json"
    path.write_text('["lr", 1]')
    with pytest.raises(UserError, match="list.json.*list"):
        parse("--config", str(path))


def test_a_resumed_run_is_checked_with_its_own_options_and_keeps_some():
    base = {"kd_divergence": "forward_kl", "steps": 5, "data": "x"}
    argv = ["--kd_divergence=forward_kl", "--kd_beta=0.3"]
    assert options.parse(Example, argv, conditions=False).kd_beta == 0.3
    with pytest.raises(UserError, match="kd_beta is not read"):
        parse("--kd_beta=0.3", base=base)
    assert parse("--steps=6", "--data=x", base=base).steps == 6
    with pytest.raises(UserError, match="--data y: the run was begun with 'x'"):
        parse("--data=y", base=base)


def test_resolved_holds_what_is_read_and_is_valid_again(tmp_path):
    got = parse("--mode=sft", "--lr=5")
    values = options.resolved(got)
    assert "lr" in values and not any(k.startswith("kd_") for k in values)
    assert "kd_beta" not in options.resolved(parse("--kd_divergence=forward_kl"))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    assert parse("--config", str(path)) == got


def test_a_default_follows_other_options_and_is_overridden_by_what_is_given(tmp_path, capsys):
    """default < default that goes with another option < stored < file < command line."""
    chosen, by_mode = ["--kd_divergence=forward_kl"], parse("--mode=sft")
    by_both = parse("--mode=sft", base={"kd_divergence": "forward_kl"})
    assert (parse().batch, by_mode.batch, parse(*chosen).batch, by_both.batch) == (1, 2, 3, 3)
    assert (parse(*chosen).micro, by_mode.micro) == (4, 1), (
        "it follows a value that is itself a default"
    )
    file = tmp_path / "a.toml"
    file.write_text("batch = 7\n")
    assert (
        parse(*chosen, base={"batch": 6}).batch == 6
        and parse(base={"kd_divergence": "forward_kl"}).batch == 3
    )
    assert parse(*chosen, "--config", str(file), base={"batch": 6}).batch == 7
    assert parse(*chosen, "--config", str(file), "--batch=8", base={"batch": 6}).batch == 8
    file.write_text('kd_divergence = "forward_kl"\n')
    assert (
        parse("--config", str(file)).batch == 3
        and parse("--config", str(file), "--kd_divergence=jsd").batch == 1
    )
    assert options.resolved(parse(*chosen))["batch"] == 3
    with pytest.raises(SystemExit):
        parse("--help")
    line = next(line for line in capsys.readouterr().out.splitlines() if "--batch" in line)
    assert "[default 1; 2 with --mode sft; 3 with --kd_divergence forward_kl]" in line
    assert Example(kd_divergence="forward_kl").batch == 1, (
        "a config that is built directly holds the plain defaults"
    )


def test_defaults_look_at_options_before_them_and_at_values_that_there_are():
    seen = {}
    for f in dataclasses.fields(train.Config):
        for key, own_defaults in f.metadata["rules"].default_when.items():
            others = (key,) if isinstance(key, str) else key
            assert set(others) <= seen.keys(), f"{f.name} looks at {key}, which is declared later"
            if callable(own_defaults):
                continue
            for n, other in enumerate(others):
                choices = typing.get_args(seen[other].type) or seen[other].metadata["rules"].choices
                values = {v if isinstance(key, str) else v[n] for v in own_defaults}
                assert values <= set(choices)
            assert all(type(value) is type(f.default) for value in own_defaults.values())
        seen[f.name] = f


@pytest.mark.parametrize(
    "argv,values",
    [
        ("--mode=kd", (1e-2, 0.3, 500, 64, 100)),
        ("--mode=grpo", (3e-4, 0.0, 200, 64, 50)),
        ("--mode=kd --model=Qwen/Qwen2.5-0.5B", (2e-5, 0.0, 0, 512, 250)),
        ("--mode=grpo --model=qwen2.5-0.5b", (1e-6, 0.0, 0, 512, 50)),
        ("--mode=sft --model=folder", (2e-5, 0.0, 0, 512, 250)),
        ("--mode=sft --model=toy", (1e-2, 0.3, 500, 64, 100)),
        ("--mode=sft --model=run", (1e-2, 0.3, 500, 64, 100)),
        ("--mode=sft --model=run/checkpoints/step-3/adapter", (1e-2, 0.3, 500, 64, 100)),
        ("--mode=sft --model=folder --defaults=toy --lr=1", (1.0, 0.3, 500, 64, 100)),
    ],
)
def test_a_pretrained_model_brings_defaults_of_its_own(argv, values, tmp_path, monkeypatch):
    """Toy models are known by their vocabulary, as presets, as folders and in a run's folder."""
    monkeypatch.chdir(tmp_path)
    for folder, vocab in (("folder", 151936), ("toy", 512), ("run/checkpoints/step-3", 512)):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text(json.dumps({"vocab_size": vocab}))
    cfg = options.parse(train.Config, argv.split())
    names = ("lr", "weight_decay", "steps", "sample_tokens", "eval_every")
    assert tuple(getattr(cfg, name) for name in names) == values


def test_help_says_both_defaults(capsys):
    with pytest.raises(SystemExit):
        options.parse(train.Config, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert (
        "--lr FLOAT peak learning rate [default 0.01; 0.005 with --optimizer adamw; 0.0003 with "
        "--mode grpo; 2e-05 with" in text
    )
    assert "2e-05 with --defaults pretrained; 1e-06 with --mode grpo --defaults pretrained]" in text


@pytest.mark.parametrize("cls", [train.Config, EvalOptions])
def test_hints_name_options_that_are_there_and_no_option_is_a_hint(cls):
    for name, hint in cls.hints.items():
        assert name not in cls.__dataclass_fields__, name
        for word in re.findall(r"--(\w+)", hint):
            assert word in cls.__dataclass_fields__, hint


def test_epochs_imply_the_steps_wherever_they_are_given(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text("steps = 7\n")
    cfg = options.parse(train.Config, [f"--config={file}", "--epochs=3"])
    assert (cfg.steps, cfg.epochs) == (0, 3.0)
    with pytest.raises(UserError, match="epochs is not read with steps=5"):
        options.parse(train.Config, ["--epochs=3", "--steps=5"])
    assert options.parse(train.Config, ["--epochs=3"], {"steps": 9}).steps == 0


def test_what_a_file_says_in_vain_is_named_and_ignored_and_what_is_typed_is_refused(
    tmp_path, monkeypatch
):
    file = tmp_path / "a.toml"
    file.write_text('mode = "kd"\nkd_divergence = "jsd"\nkd_beta = 0.3\nepochs = 2\n')
    argv, notes = [f"--config={file}", "--kd_divergence=reverse_kl", "--steps=3"], []
    cfg = options.parse(train.Config, argv, notes=notes)
    assert (cfg.kd_beta, cfg.epochs, cfg.steps) == (0.5, 1.0, 3) and len(notes) == 1
    assert "kd_beta (read with --kd_divergence" in notes[0] and "epochs (read with" in notes[0]
    with pytest.raises(UserError, match="kd_beta is not read"):
        options.parse(train.Config, [*argv, "--kd_beta=0.1"], notes=notes)
    later = tmp_path / "b.toml"
    later.write_text('kd_divergence = "reverse_kl"\nsteps = 3\n')
    again, notes = [f"--config={file}", f"--config={later}", "--lr=1"], []
    cfg = options.parse(train.Config, again, notes=notes)
    assert (cfg.kd_beta, cfg.steps) == (0.5, 3) and "kd_beta" in notes[0] and "epochs" in notes[0]
    file.write_text('mode = "sft"\nkd_beta = 0.3\n')
    with pytest.raises(UserError, match="kd_beta is not read"):  # whatever is typed
        options.parse(train.Config, [f"--config={file}", "--lr=1"], notes=notes)
    monkeypatch.setenv("WANDB_SWEEP_ID", "x")  # a trial of a sweep over coupled options
    argv = ["--mode=kd", "--kd_divergence=reverse_kl", "--kd_beta=0.1"]
    assert options.parse(train.Config, argv, notes=notes).kd_beta == 0.5 and "kd_beta" in notes[-1]


@pytest.mark.parametrize(
    "argv,value",
    [
        ("--resume", True),
        ("--resume=False", False),
        ("--resume auto", "auto"),
        ("--resume=auto", "auto"),
    ],
)
def test_a_switch_with_one_more_value(argv, value):
    assert options.parse(train.Config, [*argv.split(), "--lr=1"]).resume == value


@pytest.mark.parametrize(
    "variant,baseline,low,high",
    [
        ("grpo", "std", 0.2, 0.2),
        ("token", "std", 0.2, 0.28),  # DAPO, section 4.1
        ("dr_grpo", "mean", 0.2, 0.2),  # Dr. GRPO, section 3.2: no division by the deviation
        ("gspo", "std", 3e-4, 4e-4),  # GSPO, section 5.1
        ("cispo", "std", 1.0, 0.2),  # MiniMax-M1, section 3.1: no lower bound
        ("gmpo", "std", 0.4, 0.4),  # GMPO, section 3: (e^-0.4, e^0.4)
        ("dppo", "mean", 0.15, 0.15),  # DPPO, section 4.1 and appendix C.1; of a probability
        ("mis", "std", 1e-3, 1e-3),
    ],
)
def test_a_variant_brings_what_its_paper_says(variant, baseline, low, high):
    def settings(*more, base=None):
        argv = ["--mode=grpo", f"--grpo_variant={variant}", *more]
        cfg = options.parse(train.Config, argv, base)
        validate(cfg)
        return cfg.grpo_advantage, cfg.grpo_clip_low, cfg.grpo_clip_high

    assert settings() == (baseline, low, high)
    assert settings("--grpo_advantage=leave_one_out", "--grpo_clip_low=0.1") == (
        "leave_one_out",
        0.1,
        high,
    )
    assert settings("--grpo_clip_high=0.5", base={"grpo_clip_high": 0.3, "grpo_clip_low": 0.4}) == (
        baseline,
        0.4,
        0.5,
    )


def test_the_kls_estimate_goes_with_its_place():
    def kl(*args):
        argv = ["--mode=grpo", "--grpo_kl_coef=0.1", *args]
        return options.parse(train.Config, argv).grpo_kl_estimator

    assert (
        kl(),
        kl("--grpo_kl_in=loss"),
        kl("--grpo_kl_in=reward"),
        kl("--grpo_kl_estimator=k2"),
    ) == ("k3", "k3", "k1", "k2")


@pytest.fixture(params=["stored", "file"])
def reuse(request, tmp_path):
    """reuse(values, *args) -> the config of a command line over the values of a run's config.json:
    those of a run that is resumed, or read by --config."""

    def parsed(values, *args):
        if request.param == "stored":
            return options.parse(train.Config, list(args), values)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(values))
        return options.parse(train.Config, ["--config", str(path), *args])

    return parsed


def stored_by(*args):
    return options.resolved(options.parse(train.Config, list(args)), without=("name", "resume"))


@pytest.mark.parametrize("old", ["token", "grpo", "gspo", "cispo", "dr_grpo", "gmpo"])
@pytest.mark.parametrize(
    "new,brings",
    [
        ("grpo", ("std", 0.2, 0.2)),
        ("token", ("std", 0.2, 0.28)),
        ("dr_grpo", ("mean", 0.2, 0.2)),
        ("gspo", ("std", 3e-4, 4e-4)),
        ("cispo", ("std", 1.0, 0.2)),
        ("dppo", ("mean", 0.15, 0.15)),
    ],
)
def test_a_variant_brings_its_settings_over_a_config_that_holds_anothers(old, new, brings, reuse):
    def settings(values, *args):
        cfg = reuse(values, *args)
        return cfg.grpo_advantage, cfg.grpo_clip_low, cfg.grpo_clip_high

    run = stored_by("--mode=grpo", f"--grpo_variant={old}")
    assert settings(run, f"--grpo_variant={new}") == brings
    assert settings(run, f"--grpo_variant={new}", "--grpo_clip_low=0.1") == (
        brings[0],
        0.1,
        brings[2],
    )
    chosen = stored_by(
        "--mode=grpo",
        f"--grpo_variant={old}",
        "--grpo_clip_high=0.5",
        "--grpo_advantage=leave_one_out",
    )
    assert settings(chosen, f"--grpo_variant={new}") == ("leave_one_out", brings[1], 0.5)
    assert settings(chosen, "--lr=1e-4")[1:] == (chosen["grpo_clip_low"], 0.5)


def test_a_variant_without_bounds_has_none_of_anothers(reuse):
    soft = ["--mode=grpo", "--grpo_variant=sapo"]
    assert "grpo_clip_low" not in options.resolved(reuse(stored_by("--mode=grpo"), *soft))
    assert reuse(stored_by(*soft), "--grpo_variant=token").grpo_clip_high == 0.28


def test_other_options_with_defaults_of_their_own_go_along_too(reuse):
    run = stored_by("--mode=grpo", "--grpo_kl_coef=0.1")
    assert (
        run["grpo_kl_estimator"] == "k3"
        and reuse(run, "--grpo_kl_in=reward").grpo_kl_estimator == "k1"
    )
    assert reuse(run | {"grpo_kl_estimator": "k2"}, "--grpo_kl_in=reward").grpo_kl_estimator == "k2"
    assert reuse(run, "--grpo_kl_in=loss").grpo_kl_estimator == "k3"


def test_a_mode_brings_its_defaults_over_a_file_that_holds_anothers(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(
            stored_by("--mode=sft", "--warmup=7", "--weight_decay=0.1") | {"data": "mine.jsonl"}
        )
    )
    sft = ["--config", str(path)]
    # weighting is one of sft's options that grpo does not read: refused as ever
    with pytest.raises(UserError, match="weighting is not read with mode=grpo"):
        options.parse(train.Config, [*sft, "--mode=grpo"])
    got = options.parse(train.Config, [*sft, "--mode=grpo"], conditions=False)
    assert (got.steps, got.batch_size, got.lr, got.schedule) == (200, 128, 3e-4, "linear")
    assert (got.warmup, got.weight_decay, got.data) == (7, 0.1, "mine.jsonl")
    assert options.parse(train.Config, [*sft, "--mode=kd"]).lr == 1e-2


def test_what_is_not_read_says_what_would_read_it():
    for argv, words in (
        (
            ["--mode=sft", "--kd_beta=0.5"],
            "only with --mode kd, and there with --kd_signal full or topk or student_topk or draws "
            "or sampled, or .*, and there with --kd_divergence .*jsd or",
        ),
        (
            ["--mode=sft", "--grpo_tis_cap=3"],
            "only with --mode grpo, and there with --grpo_tis .*_sequence$",
        ),
        (["--mode=kd", "--kd_beta=0.5"], "only with --kd_divergence .*skew_reverse_kl$"),
    ):
        with pytest.raises(UserError, match=words):
            options.parse(train.Config, argv)


def test_files_over_files_and_defaults_that_follow_defaults(tmp_path):
    one, two = tmp_path / "1.json", tmp_path / "2.toml"
    one.write_text(json.dumps({"kd_divergence": "forward_kl", "batch": 3, "micro": 4}))
    two.write_text('kd_divergence = "jsd"\n')
    got = parse(f"--config={one}", f"--config={two}")
    assert (got.batch, got.micro) == (1, 1), "micro follows batch, whose default changed"
    two.write_text('kd_divergence = "jsd"\nbatch = 3\n')
    got = parse(f"--config={one}", f"--config={two}")
    assert (got.batch, got.micro) == (3, 4), "what the later file says itself counts"
    one.write_text(json.dumps({"batch": 1}))
    assert parse(f"--config={one}", "--kd_divergence=forward_kl").batch == 1, (
        "a file that says nothing of the other option chose its value"
    )


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
def test_no_option_takes_what_is_not_finite(value, tmp_path):
    floats = [f.name for f in dataclasses.fields(train.Config) if f.type is float]
    assert "lr" in floats and "grpo_tis_cap" in floats and len(floats) > 15
    for name in floats:
        with pytest.raises(UserError, match=f"--{name}: .* is not a number that is finite"):
            options.parse(train.Config, [f"--{name}={value}"], conditions=False)
    (tmp_path / "c.toml").write_text(f"lr = {'inf' if '9' in value else value}\n")
    (tmp_path / "c.json").write_text('{"lr": -Infinity}')
    for name in ("c.toml", "c.json"):
        with pytest.raises(UserError, match=f"{name}: lr: .* is not a number that is finite"):
            options.parse(train.Config, ["--config", str(tmp_path / name)])


def test_a_stored_name_that_is_no_option_is_refused():
    """A run of a version with other names would else go on with defaults in their place."""
    with pytest.raises(UserError, match="config.json: clip is not an option"):
        options.parse(train.Config, [], {"mode": "sft", "clip": 0.5})


def test_two_dashes_or_white_space_alone_are_no_option():
    for argv in (["--", "sft"], ["--=sft"], ["\u2028"]):
        with pytest.raises(UserError, match="is not an option|is no option"):
            options.parse(train.Config, argv)


@pytest.mark.parametrize("word", ["", "-", "--", " "])
def test_a_word_that_is_nothing_is_one_line(word):
    with pytest.raises(UserError, match="is no(t an)? option"):
        options.parse(train.Config, ["--mode=sft", word, word])


@pytest.mark.parametrize("name", ["plugin", "config", "lr", "data"])
def test_two_dashes_are_no_value(name):
    with pytest.raises(UserError, match=f"--{name}=--: -- is no value"):
        options.parse(train.Config, ["--mode=sft", f"--{name}=--"])
