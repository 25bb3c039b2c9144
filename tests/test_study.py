"""The study runner: a file as jobs that are made once, and running them.

What is done is skipped, what was interrupted goes on, what failed is named; every file of the
project is rehearsed.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import eval.__main__
import eval.divergence
import eval.study.__main__ as study
import eval.traces
import train
from errors import UserError
from eval.study import jobs, scheduler, schema
from eval.study import plan as study_plan
from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("undrawn")
FILES = sorted((ROOT / "recipes" / "study").glob("*.toml"))
FILE = """
[study]
seeds = [0]
[eval]
tasks = "word_problems"
n = 2
max_tokens = 4
limit = 8
[common]
batch_size = 4
eval_examples = 2
eval_tokens = 2
kd_temperature = 1.0
[model.start]
model = "tiny"
chain = ["sft"]
[traces.own]
teacher = "@start"
data = "word_problems:4"
max_tokens = 4
keep = "ended"
[run.sft]
mode = "sft"
data = "word_problems:8"
steps = 2
[run.again]
like = "sft"
lr = 1e-3
[run.kd]
mode = "kd"
data = "word_problems:8"
teacher = "@start"
steps = 2
[run.rl]
mode = "grpo"
steps = 1
sample_tokens = 4
grpo_samples = 2
[arm.start]
model = "@start"
chain = []
[arm.sft]
model = "@start"
chain = ["again"]
[arm.sft_rl]
model = "@start"
chain = ["again", "rl"]
[arm.kd]
model = "@start"
chain = ["kd"]
[[claim]]
text = "one is better"
better = "sft"
worse = "kd"
"""


MODULES = {"eval": eval.__main__, "eval.traces": eval.traces, "eval.divergence": eval.divergence}


class Here:
    """A job's process, in this one: a test need not wait for imports."""

    broken = ()  # labels of the jobs that fail
    trouble = 1  # with this exit code
    failing = 0

    def __init__(self, job, out, place, gpus):
        first, *arguments = job.command(out)
        main = train.main
        if first == "-m":
            main = MODULES[arguments.pop(0)].main
        self.place, self.began, self.code, self.processes = place, 0.0, self.trouble, []
        made.append(job)
        with (
            open(scheduler.log_of(out, job), "a") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            if job.label in self.broken:
                print("nothing but trouble")
            else:
                self.code = main(arguments)

    def poll(self):
        return self.code


made = []


@pytest.fixture
def here(monkeypatch):
    made.clear()
    monkeypatch.setattr(scheduler, "Running", Here)
    monkeypatch.setattr(scheduler.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(Here, "broken", ())
    return made


def write(tmp_path, text=FILE):
    (tmp_path / "s.toml").write_text(text)
    return str(tmp_path / "s.toml")


def kinds(jobs):
    return sorted(job.kind for job in jobs)


# --- a file as jobs ----------------------------------------------------------------------------


def test_a_run_like_another_has_its_options_and_its_own_in_their_place(tmp_path):
    text = FILE.replace("lr = 1e-3", 'lr = 1e-3\n[run.third]\nlike = "again"\nsteps = 3')
    runs = schema.read_file(write(tmp_path, text), []).runs
    shared = {"mode": "sft", "data": "word_problems:8", "lr": 1e-3}
    assert runs["again"] == shared | {"steps": 2}
    assert runs["third"] == shared | {"steps": 3}


def test_jobs_are_made_once_each_behind_what_it_needs(tmp_path):
    plan = study_plan.read(write(tmp_path), seeds=(0, 1))
    # the starting model serves both seeds; each asks it with random numbers of its own
    assert kinds(plan.jobs) == ["eval"] * 8 + ["kl"] * 6 + ["train"] * 7
    assert [plan.arm_jobs["start", s].evals.options["seed"] for s in (0, 1)] == [0, 1]
    assert plan.arm_jobs["kd", 1].start_evals == plan.arm_jobs["start", 1].evals
    assert len({job.name for job in plan.jobs}) == len(plan.jobs)
    for i, job in enumerate(plan.jobs):
        assert all(need in plan.jobs[:i] for need in job.needs)
    seeds = [job.options["seed"] for job in plan.jobs if job.kind == "train"]
    assert seeds == sorted(seeds)
    sft, rl = plan.arm_jobs["sft_rl", 1].chain
    assert [sft.options["mode"], rl.options["mode"]] == ["sft", "grpo"]
    assert rl.options["model"] is sft
    assert sft is plan.arm_jobs["sft", 1].chain[0] and sft.name.startswith("sft-s1-")
    (kd,) = plan.arm_jobs["kd", 0].chain
    assert "kd_temperature" not in sft.options and kd.options["kd_temperature"] == 1.0


def name_of_rl(tmp_path, text):
    jobs.fingerprint.cache_clear()
    return study_plan.read(write(tmp_path, text)).arm_jobs["sft_rl", 0].chain[1].name


@pytest.mark.parametrize(
    "old,new",
    [
        ("lr = 1e-3", "lr = 2e-3"),
        ("sample_tokens = 4", "sample_tokens = 5"),
        ('chain = ["sft"]', 'chain = ["again"]'),
        ("batch_size = 4", "batch_size = 8"),
    ],
    ids=["the run before", "its own options", "the starting model", "common options"],
)
def test_a_name_changes_with_what_a_run_is_made_of(old, new, tmp_path):
    assert old in FILE
    assert name_of_rl(tmp_path, FILE.replace(old, new)) != name_of_rl(tmp_path, FILE)


def test_a_number_that_no_float_holds_has_a_name():
    assert jobs.Job("traces", {"n": 10**400}, "").name != jobs.Job("traces", {"n": 1}, "").name


def test_a_name_does_not_change_with_anything_else(tmp_path):
    name = name_of_rl(tmp_path, FILE)
    assert name == name_of_rl(tmp_path, FILE.replace("[study]", "[study]\n# a comment"))
    assert name == name_of_rl(tmp_path, FILE.replace("limit = 8", "limit = 4"))  # evaluations


def test_a_name_depends_on_what_a_file_holds(tmp_path):
    data, names = tmp_path / "data.jsonl", []
    for content in ("one", "two", "one"):
        data.write_text(content)
        names.append(name_of_rl(tmp_path, with_data(str(data))))
    assert names[0] == names[2] != names[1]


def test_an_evaluations_name_depends_on_what_its_options_file_holds(tmp_path):
    given, names = tmp_path / "eval.toml", []
    text = FILE.replace("limit = 8", f'limit = 8\nconfig = "{given}"')
    for content in ("top_p = 0.5", "top_p = 0.6", "top_p = 0.5"):
        given.write_text(content)
        jobs.fingerprint.cache_clear()
        names.append(study_plan.read(write(tmp_path, text)).arm_jobs["sft", 0].evals.name)
    assert names[0] == names[2] != names[1]


def with_data(data, text=FILE):
    """The file with other data for [run.again]."""
    table = '[run.again]\nlike = "sft"\n'
    assert table in text
    return text.replace(table, f'{table}data = "{data}"\n')


def test_traces_are_named_where_they_are_trained_on(tmp_path):
    plan = study_plan.read(write(tmp_path, with_data("@own")))
    (traces,) = plan.arm_jobs["sft", 0].traces
    assert traces.kind == "traces"
    assert traces.needs == [plan.arm_jobs["start", 0].evals.options["checkpoint"]]
    assert traces.output(tmp_path) == tmp_path / "traces" / traces.name / "traces.jsonl"


@pytest.mark.parametrize(
    "old,new,said",
    [
        ("lr = 1e-3", "lrr = 1e-3", "lrr"),
        ('like = "sft"', 'like = "sfft"', "[run.again] like: no [run.sfft]; there are sft"),
        ('like = "sft"', 'like = "again"', "[run.again] is like itself"),
        ('like = "sft"', 'like = ["sft"]', "[run.again] like: no [run.['sft']]"),
        ("lr = 1e-3", "kd_topk = 3", "[run.again]: kd_topk"),
        ("lr = 1e-3", "seed = 3", "seed is given by the study itself"),
        (
            'teacher = "@start"\nsteps',
            'teacher = "@stat"\nsteps',
            "teacher @stat: there is no [model.stat]",
        ),
        ('model = "tiny"', 'model = "@start"', "begins from itself"),
        ('chain = ["again", "rl"]', 'chain = ["again", "rll"]', "no [run.rll]"),
        ("limit = 8", "limitt = 8", "limitt"),
        ("chain = []", "", "[arm.start]: it needs chain"),
        ('tasks = "word_problems"', 'tasks = "word_problem"', "did you mean word_problems"),
        ('better = "sft"', 'better = "sftt"', "no arm 'sftt'"),
        ("[study]", "[studi]", "studi"),
        ("seeds = [0]", "seeds = ", "TOML"),
        ("seeds = [0]", "seeds = []", "[study] seeds"),
        ("[eval]", "[[eval]]", "[eval] is one table"),
        ("[model.start]", "[run]\nodd = 3\n[model.start]", "[run.odd]: a table"),
        ("[model.start]", "[traces]\nodd = 3\n[model.start]", "[traces.odd]: a table"),
        ('teacher = "@start"\ndata', "data", "[traces.own]: it needs teacher"),
        ("[[claim]]", "[claim]", "[[claim]]s"),
        ("seeds = [0]", 'seeds = "x"', "[study] seeds"),
        ("chain = []", "chian = []", "chian"),
        ("seeds = [0]", "", "[study]: it needs seeds"),
        ("seeds = [0]", 'seeds = [0]\ngpus = "2"', "[study] gpus"),
        ("seeds = [0]", "seeds = [0]\ngpus = 0", "[study] gpus"),
        ('data = "word_problems:4"', 'data = ["a", "b"]', "[traces.own]: data: one value"),
        ('model = "@start"\nchain = []', "model = 3\nchain = []", "[arm.start] model"),
        ("chain = []", 'chain = []\npaper = { gsm8k = "31.4" }', "[arm.start] paper"),
        ("chain = []", 'chain = []\npaper = "colapsed"', '"collapsed"'),
        ("chain = []", "chain = []\neval = 3", "[arm.start] eval"),
        ('worse = "kd"', 'worse = "kd"\ntask = "gsm8"', "gsm8"),
        ('text = "one is better"', "", "[claim]: it needs text"),
        ('text = "one is better"', "text = 3", "[claim] text"),
        ('model = "@start"\nchain = []', 'model = "tiny"\nchain = []', "random weights"),
        ('model = "@start"\nchain = ["kd"]', 'model = "@start"\nchain = "kd"', "[arm.kd] chain"),
        ("max_tokens = 4\nkeep", "max_tokenss = 4\nkeep", "[traces.own]"),
    ],
)
def test_wrong_files_are_one_line(old, new, said, tmp_path, capsys):
    assert old in FILE
    assert study.main([write(tmp_path, FILE.replace(old, new)), f"--out={tmp_path / 'o'}"]) == 2
    err = capsys.readouterr().err.strip()
    assert said in err and len(err.splitlines()) == 1 and not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "argv,said",
    [
        (["--arms=stfart"], "no arm 'stfart'"),
        (["--seeds=a"], "--seeds: 'a' is not a whole number"),
        (["--seeds=1.5"], "--seeds: '1.5' is not a whole number"),
        (["--report", "--out=nowhere"], "no study"),
        (["--at_once=-1"], "--at_once"),
        (["--outt=x"], "--outt"),
    ],
)
def test_wrong_options_are_one_line(argv, said, tmp_path, capsys):
    assert study.main([write(tmp_path), *argv]) == 2
    err = capsys.readouterr().err.strip()
    assert said in err and len(err.splitlines()) == 1


def test_test_sets_are_looked_for_before_anything_is_trained(tmp_path, here, capsys):
    text = FILE.replace(
        'tasks = "word_problems"', f'tasks = "word_problems,gsm8k"\ndata = "{tmp_path}/sets"'
    )
    argv = [write(tmp_path, text), f"--out={tmp_path / 'out'}", "--arms=start"]
    assert study.main(argv) == 2 and not here and not (tmp_path / "out").exists()
    err = capsys.readouterr().err.strip()
    assert "gsm8k" in err and "data.download" in err and len(err.splitlines()) == 1


# --- running -----------------------------------------------------------------------------------


def numbers(out):
    """The report without times."""

    def timeless(x):
        if isinstance(x, dict):
            return {k: timeless(v) for k, v in x.items() if k not in ("seconds", "device_hours")}
        return [timeless(v) for v in x] if isinstance(x, list) else x

    return timeless(json.loads((out / "report.json").read_text()))


def test_a_study_goes_on(tmp_path, here, capsys, monkeypatch):
    file, out = write(tmp_path), tmp_path / "out"
    with monkeypatch.context() as killed:  # before it dropped the optimizer's states
        killed.setattr("run.RunFolder.drop_trainer", lambda self: None)
        assert study.main([file, f"--out={out}", "--arms=sft"]) == 0
    assert len(list(out.glob("runs/*/checkpoints/*/trainer"))) == 2
    assert kinds(here) == ["eval", "eval", "kl", "train", "train"]
    assert study.main([file, f"--out={out}"]) == 0
    assert kinds(here) == ["eval"] * 4 + ["kl"] * 3 + ["train"] * 4
    assert len(list(out.glob("runs/*/checkpoints/*/trainer"))) == 2  # of the runs before
    before = numbers(out)
    assert study.main([file, f"--out={out}"]) == 0 and len(here) == 11 and numbers(out) == before
    assert (
        study.main([file, f"--out={out}", "--report"]) == 0
        and len(here) == 11
        and numbers(out) == before
    )
    run = study_plan.read(file).arm_jobs["sft", 0].chain[0]
    (out / "done" / run.name).unlink()  # killed behind its last checkpoint
    assert study.main([file, f"--out={out}"]) == 0 and len(here) == 12 and numbers(out) == before
    assert "--resume" in here[-1].command(out)
    shutil.rmtree(out / "runs" / run.name)  # gone: made again, and again the same
    assert study.main([file, f"--out={out}"]) == 0 and len(here) == 13 and numbers(out) == before
    assert "sft_rl" in capsys.readouterr().out and all(
        (out / f).exists() for f in ("report.md", "samples.md", "curves.png", "cost.png")
    )


@pytest.mark.parametrize("code, said", [(1, ": nothing"), (-9, ": killed, as .* before: nothing")])
def test_what_fails_is_named_and_the_rest_is_made(tmp_path, here, monkeypatch, capsys, code, said):
    file, out = write(tmp_path), tmp_path / "out"
    monkeypatch.setattr(Here, "trouble", code)
    monkeypatch.setattr(Here, "broken", ("sft, seed 0: again",))
    assert study.main([file, f"--out={out}"]) == 1
    err = capsys.readouterr().err.strip()
    assert re.search(f"{said} but trouble", err) and len(err.splitlines()) == 1
    assert kinds(here) == [
        "eval",
        "eval",
        "kl",
        "train",
        "train",
        "train",
    ]  # neither what goes on from it nor its evaluation
    assert "nothing but trouble" in (out / "report.md").read_text()
    monkeypatch.setattr(Here, "broken", ())
    assert study.main([file, f"--out={out}"]) == 0 and len(here) == 6 + 6
    assert "trouble" not in (out / "report.md").read_text()


def test_what_the_user_can_fix_is_said_when_the_rest_is_made(tmp_path, here, capsys):
    text = FILE.replace(
        'mode = "kd"\ndata = "word_problems:8"', 'mode = "kd"\ndata = "nowhere.jsonl"'
    )
    assert study.main([write(tmp_path, text), f"--out={tmp_path / 'out'}", "--arms=kd,sft"]) == 2
    err = capsys.readouterr().err.strip()
    assert "nowhere.jsonl" in err and "kd, seed 0: kd" in err and len(err.splitlines()) == 1
    report = {a["arm"]: a for a in numbers(tmp_path / "out")["arms"]}
    assert (
        report["sft"]["seeds"] == [0]
        and report["kd"]["seeds"] == []
        and "nowhere.jsonl" in report["kd"]["failed"]["0"]
    )


def test_a_report_is_written_while_jobs_are_running(tmp_path, here, monkeypatch):
    """Every REPORT seconds, where more is done since; it says what is there so far."""
    done_then, write_report = [], study.study_report.write

    def write_and_look(out, plan, outcomes):
        text = write_report(out, plan, outcomes)
        done_then.append((len(here), numbers(out)["arms"][0]["seeds"]))
        return text

    monkeypatch.setattr(study.study_report, "write", write_and_look)
    argv = [write(tmp_path), f"--out={tmp_path / 'out'}", "--arms=sft", "--at_once=1"]
    monkeypatch.setattr(scheduler, "REPORT", 0.0)
    assert study.main(argv) == 0
    jobs = [jobs for jobs, _ in done_then]
    assert jobs == [*range(1, 6), 5] and done_then[0][1] == [] and done_then[-1][1] == [0]
    done_then.clear()
    assert study.main(argv) == 0 and len(done_then) == 1  # nothing was left: at its end only


def test_a_run_that_was_told_to_stop_is_not_done(tmp_path, here):
    plan = study_plan.read(write(tmp_path))
    job, out = plan.arm_jobs["sft", 0].chain[0], tmp_path / "out"
    (out / "runs" / job.name / "checkpoints" / "step-1").mkdir(parents=True)
    (out / "done").mkdir()
    (out / "done" / job.name).touch()
    assert not scheduler.is_done(out, job)
    (out / "runs" / job.name / "curves.png").touch()
    assert scheduler.is_done(out, job)


def test_a_moved_study_goes_on(tmp_path, here):
    file, out, moved = write(tmp_path), tmp_path / "out", tmp_path / "moved"
    with pytest.MonkeyPatch.context() as killed:  # before a complete run's trainer is dropped
        killed.setattr("run.RunFolder.drop_trainer", lambda self: None)
        assert study.main([file, f"--out={out}", "--arms=kd"]) == 0
    before, job = numbers(out), study_plan.read(file).arm_jobs["kd", 0].chain[0]
    out.rename(moved)
    (moved / "done" / job.name).unlink()
    assert study.main([file, f"--out={moved}", "--arms=kd"]) == 0 and numbers(moved) == before
    assert (
        str(moved) in json.loads((moved / "runs" / job.name / "config.json").read_text())["teacher"]
    )


def test_a_model_and_its_traces_may_have_one_name(tmp_path):
    text = with_data("@start", FILE.replace("[traces.own]", "[traces.start]"))
    (traces,) = study_plan.read(write(tmp_path, text)).arm_jobs["sft", 0].traces
    assert traces.kind == "traces" and traces.needs[0].kind == "train"


def test_equal_numbers_are_equal_jobs(tmp_path, here):
    text = FILE.replace("[arm.start]\n", "[arm.start]\neval = { temperature = 1.0 }\n").replace(
        "[arm.sft]\n", "[arm.sft]\neval = { temperature = 1 }\n"
    )
    plan = study_plan.read(write(tmp_path, text))
    assert plan.arm_jobs["start", 0].evals == plan.arm_jobs["sft", 0].start_evals
    assert plan.arm_jobs["start", 0].evals != plan.arm_jobs["kd", 0].start_evals
    assert len({job.name for job in plan.jobs}) == len(plan.jobs)


class Program:
    """A job that runs a line of Python."""

    name, kind, label = "job", "train", "a job"

    def __init__(self, text):
        self.text = text

    def command(self, out):
        return ["-c", self.text]


def end_of(program, tmp_path):
    """Exit code and last words of two ranks that run a program."""
    (tmp_path / "logs").mkdir(exist_ok=True)
    job = Program(program)
    environment = {"OMP_NUM_THREADS": "1", "THERE": str(tmp_path / "rank 0 is there")}
    running = scheduler.Running(job, tmp_path, environment, 2)
    for _ in range(3000):
        code = running.poll()
        if code is not None:
            return code, scheduler.last_words(tmp_path, job, running.failing)
        time.sleep(0.1)
    return "still running", ""


AFTER_RANK_0 = """
import time
from os import environ
from pathlib import Path
there = Path(environ["THERE"])
def wait():
    while not there.exists():
        time.sleep(0.01)
"""


def test_the_ranks_of_a_job_find_each_other(tmp_path):
    program = (
        "from os import environ as e; e['RANK'] == '0' and print(e['WORLD_SIZE'], e['MASTER_PORT'])"
    )
    code, words = end_of(program, tmp_path)
    world, port = words.split()
    assert code == 0
    assert world == "2" and int(port) > 1023


def test_the_ranks_of_a_job_end_together(tmp_path):
    """Where one fails, the other is stopped, and its code and last words are the job's."""
    program = (
        AFTER_RANK_0
        + """
import signal, sys
if environ["RANK"] == "1":
    wait()
    print("rank 1 says why", file=sys.stderr)
    sys.exit(2)
signal.signal(signal.SIGTERM, lambda *_: sys.exit("rank 0 was stopped"))
print("rank 0 goes on", flush=True)
there.touch()
time.sleep(1e6)
"""
    )
    assert end_of(program, tmp_path) == (2, "rank 1 says why")
    assert "rank 0 was stopped" in scheduler.log_of(tmp_path, Program("")).read_text()


def test_a_rank_that_fails_without_a_word_leaves_it_to_the_first(tmp_path):
    program = (
        AFTER_RANK_0
        + """
if environ["RANK"] == "1":
    wait()
    raise SystemExit(2)
print("of rank 0", flush=True)
there.touch()
"""
    )
    assert end_of(program, tmp_path) == (2, "of rank 0")


def test_one_study_at_a_time_has_a_folder(tmp_path, here, capsys):
    import fcntl

    file, out = write(tmp_path), tmp_path / "out"
    out.mkdir()
    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert study.main([file, f"--out={out}"]) == 2
    assert "in use" in capsys.readouterr().err and not here


def test_places(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert scheduler.places(1, 0) == [{"CUDA_VISIBLE_DEVICES": str(i)} for i in range(4)]
    assert (
        scheduler.places(2, 0) == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
        and len(scheduler.places(1, 3)) == 3
    )
    assert scheduler.places(3, 0) == [{"CUDA_VISIBLE_DEVICES": "0,1,2"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert scheduler.places(1, 0) == [{"CUDA_VISIBLE_DEVICES": "5"}, {"CUDA_VISIBLE_DEVICES": "7"}]
    with pytest.raises(UserError, match="gpus = 3"):
        scheduler.places(3, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    assert (
        scheduler.places(1, 0) == [{"OMP_NUM_THREADS": "1"}] * 6
        and len(scheduler.places(1, 2)) == 2
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert scheduler.places(1, 0) == [{"OMP_NUM_THREADS": "4"}]


def few_arms(path):
    """Arms that have every run of the file among them, the shortest chains first."""
    plan, seen, chosen = study_plan.read(path), set(), []
    for name, arm in sorted(plan.arms.items(), key=lambda item: len(item[1].chain)):
        if not chosen or not seen.issuperset(arm.chain):
            seen.update(arm.chain)
            chosen.append(name)
    return ",".join(chosen)


def all_arms(path):
    return ",".join(study_plan.read(path).arms)


# Every run of one; every arm of all is slow.
REHEARSED = [
    pytest.param(p, few_arms, id=f"{p.stem}-every run") for p in FILES if p.stem == "comparison"
]
REHEARSED += [
    pytest.param(p, all_arms, marks=pytest.mark.slow, id=f"{p.stem}-every arm") for p in FILES
]


@pytest.mark.parametrize("path,arms", REHEARSED)
def test_every_study_starts(path, arms, tmp_path, here, capsys):
    """Two steps of every run, with a tiny body in place of the checkpoints."""
    arms = arms(path)
    assert (
        study.main([str(path), "--rehearse", f"--arms={arms}", f"--out={tmp_path / 'o'}"]) == 0
    ), capsys.readouterr().err
    plan = study_plan.read(path, arms=arms.split(","), rehearsal=True)
    report = numbers(tmp_path / "o")
    trained = [job for job in here if job.kind == "train"]
    assert {job.name for job in plan.jobs} == {job.name for job in here}
    runs = {run for arm in plan.arms.values() for run in arm.chain}
    assert runs >= {run for arm in study_plan.read(path).arms.values() for run in arm.chain}
    for job in trained:
        lines = (tmp_path / "o" / "runs" / job.name / "metrics.jsonl").read_text().splitlines()
        steps = 60 if job.label.endswith("rehearsed") else 2
        assert json.loads(lines[-1])["step"] == job.options["steps"] == steps
    assert report


# --- killed ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_study_killed_at_random_moments_ends_with_the_undisturbed_report(tmp_path):
    text = (
        FILE.replace("steps = 2", "steps = 40\nsave_every = 10")
        .replace("steps = 1\n", "steps = 12\nsave_every = 4\n")
        .replace("seeds = [0]", "seeds = [0, 1]")
    )
    text = with_data("@own", text).replace("max_tokens = 4\nkeep", "max_tokens = 64\nkeep")
    text = text.replace(
        'mode = "sft"\ndata = "word_problems:8"\nsteps = 40',
        'mode = "sft"\ndata = "word_problems:64"\nsteps = 80',
    )  # its texts come to an end
    file = write(tmp_path, text)

    def command(name):
        argv = [file, f"--out={tmp_path / name}", "--at_once=2"]
        return [sys.executable, "-m", "eval.study", *argv]

    began = time.monotonic()
    assert subprocess.run(command("undisturbed"), cwd=ROOT, capture_output=True).returncode == 0
    span, kills = time.monotonic() - began, 0
    parts = itertools.cycle((0.11, 0.24, 0.06, 0.31, 0.18))
    while True:
        process = subprocess.Popen(
            command("cut"), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            _, err = process.communicate(timeout=span * next(parts))
            assert process.returncode == 0, err
            assert numbers(tmp_path / "cut") == numbers(tmp_path / "undisturbed")
            if kills >= 5:
                break
            shutil.rmtree(tmp_path / "cut")  # it was done before: sooner, and from the beginning
            span, kills = span / 2, 0
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM if kills % 3 == 2 else signal.SIGKILL)
            process.communicate()
            kills += 1
            span *= 1.05  # on a machine that gets busier it comes to its end, too
            time.sleep(0.5)
    print(f"{kills} kills")


@pytest.mark.parametrize("signal,own", [("draws", True), ("topk", False)])
def test_each_seed_has_a_cache_of_its_own_draws(tmp_path, signal, own):
    def cache(seed):
        options = {"mode": "kd", "kd_signal": signal, "kd_cache": "c", "seed": seed}
        (word,) = [w for w in jobs.Job("train", options, "").command(tmp_path) if "--kd_cache" in w]
        return word

    assert (cache(0) != cache(1)) == own
    assert cache(0).startswith(f"--kd_cache={tmp_path}/caches/c")
