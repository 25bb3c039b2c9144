"""A run's folder: who may have it, what survives a kill, what may change on resume."""

import contextlib
import fcntl
import json
import math
import shutil
import signal
from unittest import mock

import pytest

import prepare
import run as runs
import toy_models
import train
from curves import result_rows, summary
from errors import RunFailed, UserError
from files import replace_file
from model.checkpoint import build_model, save_model
from model.presets import PRESETS
from run import RunFolder, StopSignal, cut_back, environment, open_run, read_metrics, run_of
from signals import Interrupt
from tests.test_train import SMALL

SFT = ["--mode=sft", "--device=cpu", *SMALL, "--steps=2", "--name=r"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def started(monkeypatch):
    """The configurations that would have been run."""
    configs = []
    monkeypatch.setattr(train, "launch", lambda cfg, **_: configs.append(cfg))
    return configs


def refused(capsys, *args):
    assert train.main(list(args)) == 2
    err = capsys.readouterr().err
    assert err.startswith("train.py: ") and err.count("\n") == 1
    return err


def interrupted(*_, **__):
    raise KeyboardInterrupt


# --- killed early, locked ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "again", [["--name=r", "--resume"], SFT], ids=["resumed", "the same command"]
)
def test_a_run_that_was_killed_while_loading_weights_goes_on_with_its_own_settings(
    again, tmp_path, monkeypatch, capsys
):
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as m:
        m.setattr("model.load.build_model", interrupted)
        assert train.main(SFT) == 130
    config = json.loads((tmp_path / "runs/r/config.json").read_text())
    assert config["mode"] == "sft" and config["steps"] == 2 and "resume" not in config
    assert train.main(again) == 0  # the lock is free again
    assert json.loads((tmp_path / "runs/r/config.json").read_text()) == config and RunFolder(
        tmp_path / "runs/r"
    ).steps() == [2]
    assert signal.getsignal(signal.SIGTERM) == handler
    capsys.readouterr()
    assert "exists" in refused(capsys, *SFT)


def test_a_run_without_its_config_is_not_resumed_with_the_defaults(tmp_path, capsys, started):
    (tmp_path / "runs/r/checkpoints").mkdir(parents=True)
    assert "runs/r has no config.json" in refused(capsys, "--name=r", "--resume")
    (tmp_path / "runs/r/config.json").write_text('{"mode": "sf')
    assert "runs/r/config.json: not valid JSON" in refused(capsys, "--name=r", "--resume")
    assert not started


def test_files_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    replace_file(path, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("files.flush", full)
    with pytest.raises(RunFailed, match="config.json.*No space"):
        replace_file(path, "new")
    assert path.read_text() == "old"


def test_a_run_belongs_to_one_process(tmp_path, capsys, monkeypatch):
    (tmp_path / "runs/r/checkpoints").mkdir(parents=True)
    (tmp_path / "runs/r/config.json").write_text(json.dumps({"mode": "sft", "steps": 2}))
    with open(tmp_path / "runs/r/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "runs/r is in use by another process" in refused(
            capsys, "--name=r", "--resume", "--device=cpu"
        )
        assert "runs/r is in use by another process" in refused(capsys, *SFT)
        sent = []  # by rank 0: another rank gets the same and leaves too, instead of waiting
        for rank, broadcast in (
            (0, lambda value: sent.append(value) or value),
            (1, lambda value: sent.pop(0)),
        ):
            monkeypatch.setattr("model.parallel.broadcast", broadcast)
            with (
                pytest.raises(UserError, match="in use"),
                open_run("runs", "r", "sft", True, 2, {}, rank),
            ):
                pass
        assert not sent
    assert not (tmp_path / "runs/r/metrics.jsonl").exists()


# --- what may change when a run is resumed -------------------------------------------------------


def stored(tmp_path, **config):
    (tmp_path / "elsewhere/j").mkdir(parents=True)
    (tmp_path / "elsewhere/j/config.json").write_text(json.dumps({"runs": "runs"} | config))
    return ["--name=j", "--resume", "--runs=elsewhere"]


@pytest.mark.parametrize(
    "config,args",
    [
        (dict(mode="kd", kd_divergence="jsd", kd_beta=0.5), ["--kd_beta=0.3"]),
        (dict(mode="sft", steps=0, epochs=0.2), ["--epochs=0.4"]),
        (
            dict(mode="sft", steps=5, lr=0.1, micro_batch_tokens=9),
            ["--steps=9", "--lr=0.2", "--log_every=2", "--micro_batch_tokens=99"],
        ),
        (
            dict(mode="sft", data="word_problems:9", eval_examples=5, batch_size=4),
            ["--eval_examples=3", "--batch_size=4"],
        ),
        (dict(mode="kd", wandb="online"), ["--wandb_project=p"]),
    ],
)
def test_new_values_fit_the_run_not_the_defaults(config, args, tmp_path, started):
    assert train.main([*stored(tmp_path, **config), *args]) == 0
    (cfg,) = started
    given = dict(a.removeprefix("--").split("=") for a in args)
    assert {k: str(getattr(cfg, k)) for k in given} == given
    assert (
        all(getattr(cfg, k) == v for k, v in config.items() if k not in given)
        and cfg.runs == "elsewhere"
    )


@pytest.mark.parametrize(
    "args",
    [
        "--batch_size=4",
        "--seed=1",
        "--data=d.jsonl",
        "--train_examples=7",
        "--eval_examples=7",
        "--mode=sft",
        "--model=small",
        "--tokenizer=t",
        "--template=plain",
        "--kd_prefix=student",
        "--system_prompt=x",
        "--prompt_suffix=x",
        "--weighting=sequence",
        "--max_length_policy=error",
        "--micro_batch_tokens=99",
    ],
)
def test_what_defines_model_and_stream_stays(args, tmp_path, started, capsys):
    base = train.Config(mode="kd", data="mine.jsonl", max_length_policy="drop")
    config = train.options.resolved(base, without=("name", "resume"))
    name = args.split("=")[0]
    assert (
        f"{name} " in (err := refused(capsys, *stored(tmp_path, **config), args))
        and "the run was begun with" in err
    )
    assert not started


# --- wrong settings are found before anything is made --------------------------------------------


def test_bad_data_and_taken_names_are_found_before_the_teacher_is_trained(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(prepare, "toy_model", interrupted)
    rows = [{"prompt": f"p{n}", "completion": "c " * n} for n in (3000, 3, 5)]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    kd = ["--mode=kd", "--device=cpu", "--name=k"]
    assert "nowhere.jsonl" in refused(capsys, *kd, "--data=nowhere.jsonl")
    assert "long.jsonl:1" in refused(
        capsys, *kd, "--data=long.jsonl", "--eval_examples=2", "--micro_batch_tokens=200"
    )
    assert "--grpo_reward beauty" in refused(
        capsys, "--mode=grpo", "--device=cpu", "--grpo_reward=beauty"
    )
    assert "--reference nowhere" in refused(
        capsys, "--mode=grpo", "--device=cpu", "--grpo_kl_coef=0.1", "--reference=nowhere"
    )
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs/k").mkdir(parents=True)
    (tmp_path / "runs/k/metrics.jsonl").write_text("")
    assert "run runs/k exists" in refused(capsys, *kd)
    assert train.main([*kd, "--name=new"]) == 130  # nothing else is wrong: the teacher's turn


def test_sigterm_after_the_teachers_run_is_not_swallowed(monkeypatch):
    """While the toy teacher trains SIGTERM is noted; then it ends the command, until the loop."""
    inside = []

    def loop(cfg, run, source, loss_fn, stop):
        inside.append(signal.getsignal(signal.SIGTERM) is stop)

    def build(*args, **more):
        inside.append(isinstance(signal.getsignal(signal.SIGTERM), Interrupt))
        return build_model(*args, **more)

    def train_teacher(recipe, folder, device):
        with StopSignal() as stop:
            inside.append(signal.getsignal(signal.SIGTERM) is stop)
        teacher = build_model(PRESETS["tiny-teacher"], None, device="cpu", seed=0)
        checkpoint = folder.step_folder(recipe["steps"])
        checkpoint.mkdir(parents=True)
        save_model(teacher, checkpoint, toy_models.toy_tokenizer(), [0])
        return ""

    monkeypatch.setattr(toy_models, "_train", train_teacher)
    monkeypatch.setattr(train, "train", loop)
    monkeypatch.setattr("model.load.build_model", build)
    before = signal.getsignal(signal.SIGTERM)
    assert train.main(["--mode=kd", "--device=cpu", *SMALL, "--steps=1"]) == 0
    assert inside == [True, True, True, True]
    assert signal.getsignal(signal.SIGTERM) == before


# --- each sitting of a run ------------------------------------------------------------------------


def begun(*args):
    return train.main([*SFT, "--warmup=0", *args])


def test_each_sitting_is_kept_and_what_changed_is_said(tmp_path, capsys):
    assert begun() == 0
    capsys.readouterr()
    assert train.main(["--name=r", "--resume", "--lr=1e-3", "--steps=4"]) == 0
    said = capsys.readouterr().out
    assert "other than in the sitting before: steps 2 -> 4, lr 0.01 -> 0.001" in said
    # cosine with a floor of 0.1: the last of 2 steps was to have 1e-3; the third of 4 has 3.25e-4
    assert "goes on at 0.000325, not at 0.001: the schedule is that of 4 steps in all" in said
    first, second = runs.read_lines(tmp_path / "runs/r/sittings.jsonl")
    assert (first["step"], second["step"]) == (0, 2) and first["options"]["lr"] == 1e-2
    assert first["weights"] == {"policy": "random"} and (first["steps"], second["steps"]) == (2, 4)
    assert {"command", "git_commit", "time", "host", "ranks"} <= first.keys()
    assert train.main(["--name=r", "--resume"]) == 0
    assert "sitting before" not in capsys.readouterr().out


def test_a_run_that_went_further_than_it_is_to_go_is_refused(tmp_path, capsys, monkeypatch):
    assert begun() == 0
    before = (tmp_path / "runs/r/config.json").read_text()
    for more in ([], ["--dry_run"]):
        error = refused(capsys, "--name=r", "--resume", "--steps=1", *more)
        assert "runs/r is at step 2 already, and was told to end at step 1; raise" in error
    assert (tmp_path / "runs/r/config.json").read_text() == before
    assert train.main(["--name=r", "--resume", "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "(resumed at step 2)" in said and "weights of step 2" in said
    shown = mock.Mock()  # not `print`: `--dry_run | head -1` is no error
    monkeypatch.setattr("data.show.say", shown)
    assert train.main(["--name=r", "--resume", "--dry_run"]) == 0 and shown.called
    assert "--- example" not in capsys.readouterr().out


def test_without_a_checkpoint_a_run_begins_again_and_keeps_its_lines(tmp_path, capsys):
    argv = [arg for arg in SFT if not arg.startswith("--save_every")]
    assert train.main([*argv, "--save=none"]) == 0 and not RunFolder("runs/r").steps()
    before = (tmp_path / "runs/r/metrics.jsonl").read_text()
    capsys.readouterr()
    assert train.main(["--name=r", "--resume", "--save=last"]) == 0
    assert "no checkpoint to go on from: step 0 again" in capsys.readouterr().out
    assert (tmp_path / "runs/r/metrics.before-1.jsonl").read_text() == before
    assert [m["step"] for m in read_metrics("runs/r")] == [0, 1, 2, 2]
    assert RunFolder("runs/r").steps() == [2]


def test_resume_auto_begins_a_run_goes_on_with_it_and_is_done(tmp_path, capsys, monkeypatch):
    assert refused(capsys, *SFT[:-1], "--resume=auto").endswith("needs the --name of a run\n")
    argv = [*SFT, "--steps=4", "--save_every=2", "--resume", "auto"]
    with monkeypatch.context() as m:
        m.setattr(train, "due", lambda step, every, last: 1 / (step < 3) and step == 2)
        with pytest.raises(ZeroDivisionError):
            train.main(argv)
    assert RunFolder("runs/r").steps() == [2]
    assert train.main(argv) == 0 and "resumed at step 2" in capsys.readouterr().out
    assert train.main(argv) == 0 and RunFolder("runs/r").steps() == [2, 4]


def test_what_a_kill_left_goes_where_nothing_is_saved_any_more():
    """It came as older checkpoints were to be removed after the last one."""
    assert train.main([*SFT, "--steps=4"]) == 0
    folder = RunFolder("runs/r")
    shutil.copytree(folder.step_folder(2), folder.step_folder(1))
    (folder.checkpoints / ".draft-old-step-0").mkdir()
    assert train.main(["--name=r", "--resume"]) == 0
    assert {path.name for path in folder.checkpoints.iterdir()} == {"step-2", "step-4"}


def test_save_best_keeps_the_checkpoint_of_the_best_evaluation(capsys, monkeypatch):
    scores = iter([0.9, 0.2, 0.7, 0.3, 0.1])  # at step 0 nothing is saved

    def evaluated(self, model):
        return {"eval/word_problems/accuracy": next(scores), "eval/word_problems/loss": 1.0}, []

    monkeypatch.setattr("validation.Validation.run", evaluated)
    assert begun("--steps=4", "--save=best", "--eval_every=1", "--max_checkpoints=1") == 0
    assert RunFolder("runs/r").steps() == [2, 4]
    assert "the best evaluation: 0.7000 at step 2; runs/r/checkpoints/step-2" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("kept,steps", [("last", [4]), ("none", [])])
def test_save_last_and_none_keep_no_more(kept, steps, capsys, monkeypatch):
    saved = []
    save = RunFolder.save
    monkeypatch.setattr(RunFolder, "save", lambda *a: saved.append(a[1]) or save(*a))
    argv = [word for word in SFT if not word.startswith("--save_every")]
    assert train.main([*argv, "--steps=4", f"--save={kept}"]) == 0
    assert saved == steps == RunFolder("runs/r").steps()
    disk = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("disk "))
    assert disk.startswith("disk       at most 0 bytes") == (kept == "none")


@pytest.mark.parametrize("evaluated", [0, 3])
def test_a_broken_model_is_no_result(evaluated, capsys):
    """Two of three steps have no finite gradient: fewer in a row than --max_skipped."""
    assert begun("--lr=1e30", "--steps=3", f"--eval_examples={evaluated}", "--save_every=0") == 1
    assert capsys.readouterr().err.endswith("; lower --lr or look at the data\n")
    assert not RunFolder("runs/r").steps()
    for line in open("runs/r/metrics.jsonl"):
        json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert "train/loss" not in read_metrics("runs/r")[-1]


@pytest.mark.parametrize("broken_at,words", [(0, "begins from are broken"), (2, "lower --lr")])
def test_a_validation_loss_that_is_not_finite_ends_the_run(broken_at, words, capsys, monkeypatch):
    losses = iter([math.nan if step == broken_at else 1.0 for step in (0, 2)])

    def evaluated(self, model):
        return {"eval/word_problems/loss": next(losses)}, []

    monkeypatch.setattr("validation.Validation.run", evaluated)
    assert begun("--save_every=0") == 1
    error = capsys.readouterr().err
    assert f"stopped at step {broken_at}: the loss on the validation examples is nan" in error
    assert words in error and not RunFolder("runs/r").steps()


def test_the_last_steps_of_a_good_run_are_not_skipped_in_silence(capsys, monkeypatch):
    verdicts = iter([(1.0, True), (1.0, False)])
    monkeypatch.setattr(train, "clip_gradients", lambda *_: next(verdicts))
    assert begun() == 1
    assert "the last 1 steps had no finite gradient" in capsys.readouterr().err


# --- what is read back ---------------------------------------------------------------------------


def test_a_damaged_line_stays_and_takes_no_other_with_it(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {step}, "train/loss": 1.5}}\n'.encode() for step in range(1, 9)]
    lines[3] = lines[3][:7] + b"\xff" + lines[3][8:]
    path.write_bytes(b"".join(lines) + b'{"step": 9, "tra')
    cut_back(path, 8)
    assert path.read_bytes() == b"".join(lines) and "1 damaged lines" in capsys.readouterr().out
    assert [m["step"] for m in read_metrics(tmp_path)] == [1, 2, 3, 5, 6, 7, 8]
    for step, kept in ((6, 6), (4, 4), (3, 4)):  # what may be of a later step stays, too
        cut_back(path, step)
        assert path.read_bytes() == b"".join(lines[:kept])


def test_time_left_counts_evaluations_and_checkpoints():
    clock = runs.Clock()
    clock.spent = {"step": [1.0, 3.0], "evaluation": [10.0]}
    assert clock.left(step=5, evaluation=2, checkpoint=7) == 30.0
    for every, last in ((3, 10), (5, 10), (0, 10), (20, 10)):
        for step in range(1, last + 1):
            due = [s for s in range(step, last + 1) if runs.due(s, every, last)]
            assert runs.still_due(step, every, last) == len(due)


def test_logs_are_cut_at_lines_not_at_other_separators(tmp_path):
    path = tmp_path / "samples.jsonl"
    lines = [
        json.dumps({"step": s, "text": "a\u2028b\u2029c\x85d\x1ce"}, ensure_ascii=False) + "\n"
        for s in (0, 0, 4, 8)
    ]
    path.write_text("".join(lines), encoding="utf-8")
    cut_back(path, 4)
    assert path.read_text(encoding="utf-8") == "".join(lines[:3])


def test_the_summary_reads_a_teachers_metrics_only_beside_its_checkpoint(tmp_path):
    for folder, accuracy in (("student", 0.25), (".", 0.99), ("t", 0.75)):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "metrics.jsonl").write_text(
            json.dumps({"step": 0, "eval/x/accuracy": accuracy}) + "\n"
        )
    (tmp_path / "t/checkpoints/step-5").mkdir(parents=True)
    (tmp_path / "models/Qwen").mkdir(parents=True)
    (tmp_path / "linked").symlink_to("t/checkpoints/step-5")
    for folder in ("myteacher", "models/Qwen", ".", "t/checkpoints", str(tmp_path / "models/Qwen")):
        assert (
            "99.0%" not in summary("student", result_rows("student", folder))
            and run_of(folder) is None
        )
    for folder in ("t/checkpoints/step-5", "linked", str(tmp_path / "t/checkpoints/step-5")):
        assert "75.0%" in summary("student", result_rows("student", folder))
    assert len(read_metrics("student")) == 1


def test_the_environment_is_known_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    found = environment()
    assert found["git_commit"] is None and found["git_dirty"] is None and found["packages"]["torch"]


def test_what_was_not_measured_is_no_number_in_the_summary(tmp_path):
    """Evaluated from step 4 on, tokens not counted."""
    (tmp_path / "r").mkdir()
    lines = [
        {"step": 4, "eval/w/accuracy": 0.25},
        {"step": 5, "train/loss": 1.0, "train/seconds": 2.0},
        {"step": 5, "eval/w/accuracy": 0.5},
    ]
    (tmp_path / "r" / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )
    text = summary(tmp_path / "r", result_rows(tmp_path / "r"))
    row = next(line for line in text.splitlines() if line.startswith("eval/w/accuracy"))
    assert (
        row.split() == ["eval/w/accuracy", "-", "50.0%"] and "an unknown number of tokens" in text
    )


def test_a_run_that_another_process_finished_meanwhile_is_no_new_one(tmp_path, monkeypatch):
    """Between the look at a folder and its lock the other one took it, trained, and let it go."""
    locked = runs.lock

    @contextlib.contextmanager
    def late(path):
        if (
            not (path.parent / "metrics.jsonl").exists()
            and len(list(tmp_path.glob("runs/*/metrics.jsonl"))) == 0
        ):
            replace_file(path.parent / "config.json", '{"steps": 9}')
            (path.parent / "metrics.jsonl").write_text('{"step": 9}\n')
        with locked(path):
            yield

    monkeypatch.setattr(runs, "lock", late)
    with (
        pytest.raises(UserError, match="run runs/r exists; continue it with --resume"),
        open_run("runs", "r", "sft", False, 2, {}, 0),
    ):
        pass
    assert (tmp_path / "runs/r/config.json").read_text() == '{"steps": 9}'
    with locked(tmp_path / "runs/r/.lock"):  # nobody holds it
        pass
    (tmp_path / "runs/r/metrics.jsonl").unlink()
    with open_run("runs", "", "sft", False, 2, {}, 0) as (
        folder,
        start,
    ):  # without a name: the next one that is free
        assert start is None and folder.path.name.endswith("-1")
        (other,) = tmp_path.glob("runs/*/metrics.jsonl")
        assert other.parent != folder.path and other.parent.name == folder.path.name.removesuffix(
            "-1"
        )
