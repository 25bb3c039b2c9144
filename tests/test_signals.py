"""Signals to stop: what was trained is saved. And runs outside the main thread."""

import fcntl
import functools
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

import eval.__main__
import eval.chat
import eval.compare
import eval.divergence
import eval.study.__main__ as study
import eval.traces
import options
import signals
import toy_models
import train
from data import download
from errors import as_command
from eval.study import scheduler
from model import export, parallel
from model.checkpoint import build_model, save_model
from model.presets import PRESETS
from progress import Progress
from run import RunFolder
from signals import STOP_SIGNALS, handled
from tests import distributed_workers as ranks
from tests.conftest import ROOT
from tests.test_train import SMALL, command, timeless

pytestmark = pytest.mark.usefixtures("undrawn")
QUICK = [
    "--device=cpu",
    "--steps=6",
    "--batch_size=4",
    "--eval_examples=0",
    "--save_every=0",
    "--warmup=2",
    "--data=word_problems:20",
]
NAMES = [s.name for s in STOP_SIGNALS]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def sent_at(monkeypatch):
    """sent_at(step, signal): this process gets the signal while it computes that step, once."""
    rate = train.learning_rate

    def arm(at, number):
        waiting = [number]

        def learning_rate(step, *rest):
            if step == at and waiting:
                os.kill(os.getpid(), waiting.pop())
            return rate(step, *rest)

        monkeypatch.setattr(train, "learning_rate", learning_rate)

    return arm


def test_the_signals_are_those_of_terminals_and_schedulers():
    assert NAMES == ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"]


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_saves_and_the_run_goes_on_as_if_it_had_not_come(name, sent_at, tmp_path, capsys):
    before = [signal.getsignal(s) for s in STOP_SIGNALS]
    sft = ["--mode=sft", *QUICK, "--runs=elsewhere"]
    assert train.main([*sft, "--name=whole"]) == 0
    sent_at(2, getattr(signal, name))
    capsys.readouterr()
    assert train.main([*sft, "--name=cut"]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    command = "python train.py --runs elsewhere --name cut --resume"
    assert last == f"stopped by {name} after step 3; continue with {command}"
    assert (
        RunFolder("elsewhere/cut").steps() == [3]
        and [signal.getsignal(s) for s in STOP_SIGNALS] == before
    )
    assert train.main(command.split()[2:]) == 0
    assert timeless(tmp_path / "elsewhere/cut") == timeless(tmp_path / "elsewhere/whole") != []


EVALUATIONS = [
    ("validation loss", "--mode=sft", 1, 0),
    ("validation loss", "--mode=sft", 5, 2),
    ("validation", "--mode=sft", 13, 4),
    ("grading", "--mode=sft", 3, 0),
    ("teacher and student", "--mode=kd", 5, 2),
    ("validation", "--mode=grpo", 8, 2),
]
HALTS = [
    ("a step", "--mode=sft", 4),
    ("making a batch", "--mode=sft", 14),
    ("prompts", "--mode=grpo", 2),
    ("rollout", "--mode=grpo", 9),
    ("rewards", "--mode=grpo", 17),
    ("log-probs", "--mode=grpo", 5),
    ("a step", "--mode=grpo", 4),
    ("rollout", "--mode=kd", 9),
    ("log-probs", "--kd_signal=sampled", 5),
]
GRPO = ["--grpo_minibatches_per_rollout=2", "--grpo_samples=2", "--grpo_kl_coef=0.01"]
MODES = {
    "--mode=sft": ["--mode=sft", "--model=tiny"],
    "--mode=grpo": ["--mode=grpo", *GRPO, "--model=tiny-teacher"],
    "--mode=kd": ["--mode=kd", "--kd_prefix=student", "--kd_mix=0.8", "--teacher=random:tiny"],
    "--kd_signal=sampled": [
        "--kd_signal=sampled",
        "--kd_prefix=student",
        "--teacher=random:tiny",
        "--kd_divergence=reverse_kl",
        "--kd_temperature=1",
        "--sample_temperature=1",
    ],
}


@contextmanager
def signalled(monkeypatch, what, call):
    """Inside `with`, this process gets a signal at a part of what takes long: [parts so far]."""
    add, calls = Progress.add, [0]

    def interrupted(self, *done):
        if self.what == what:  # the thread that makes batches does not touch the count
            calls[0] += 1
        if calls[0] == call and self.what == what:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)  # the main thread gets it
        add(self, *done)

    with monkeypatch.context() as m:
        m.setattr(Progress, "add", interrupted)
        yield calls


@pytest.mark.parametrize("what,mode,call", HALTS, ids=[f"{w} {m}" for w, m, _ in HALTS])
def test_a_signal_in_a_step_leaves_it_and_the_run_goes_on_to_the_bit(
    what, mode, call, monkeypatch, capsys, tmp_path
):
    """The half step is dropped; what was trained before is saved as if it had ended there."""
    monkeypatch.setattr("data.dataset.CHUNK", 4)
    (tmp_path / "e.py").write_text(
        "def e(example, completion):\n    return completion.count('e')\n"
    )
    argv = [*MODES[mode], "--device=cpu", "--steps=4", "--batch_size=8", "--data=word_problems:20"]
    argv += ["--eval_examples=0", "--save_every=0", "--micro_batch_tokens=200", "--warmup=0"]
    if mode != "--mode=sft":
        argv += ["--sample_tokens=12", "--sample_batch=3"]
    if mode == "--mode=grpo":
        argv += ["--grpo_reward=e.py:e"]
    assert train.main([*argv, "--name=whole"]) == 0
    capsys.readouterr()
    with signalled(monkeypatch, what, call) as calls:
        assert train.main([*argv, "--name=cut"]) == 0
    said, (step,) = capsys.readouterr().out, RunFolder("runs/cut").steps()
    assert f"stopped by SIGTERM after step {step}; continue with" in said
    lines = timeless("runs/cut")
    assert len(lines) == step < 4 and calls[0] in (call, call + 1)  # nothing more was computed
    assert train.main(["--name=cut", "--resume"]) == 0
    assert timeless("runs/cut") == timeless("runs/whole") and len(timeless("runs/cut")) == 4
    weights = [
        RunFolder(f"runs/{n}").step_folder(4) / "model.safetensors" for n in ("cut", "whole")
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize(
    "what,mode,call,at", EVALUATIONS, ids=[f"{w} {m} {a}" for w, m, _, a in EVALUATIONS]
)
def test_a_signal_in_an_evaluation_leaves_it_to_the_run_that_goes_on(
    what, mode, call, at, monkeypatch, capsys, tmp_path
):
    argv = [*MODES[mode], "--device=cpu", "--steps=4", "--batch_size=8", "--data=word_problems:20"]
    argv += ["--micro_batch_tokens=200", "--warmup=0", "--eval_examples=8", "--eval_tokens=5"]
    argv += ["--eval_every=2", "--save=best"]
    if mode != "--mode=sft":
        argv.append("--sample_tokens=12")
    assert train.main([*argv, "--name=whole"]) == 0
    capsys.readouterr()
    with signalled(monkeypatch, what, call) as calls:
        assert train.main([*argv, "--name=cut"]) == 0
    assert calls[0] == call  # nothing more was computed
    assert f"stopped by SIGTERM after step {at}; continue with" in capsys.readouterr().out
    lines = timeless("runs/cut")
    assert RunFolder("runs/cut").steps()[-1] == at == max([0, *(line["step"] for line in lines)])
    with signalled(monkeypatch, what, 1):  # and at once again
        assert train.main(["--name=cut", "--resume"]) == 0
    assert f"(resumed at step {at})" in capsys.readouterr().out
    assert timeless("runs/cut") == lines
    assert train.main(["--name=cut", "--resume"]) == 0
    assert timeless("runs/cut") == timeless("runs/whole")
    for name in ("model.safetensors", "trainer/state.json"):
        found = [RunFolder(f"runs/{n}").step_folder(4) / name for n in ("cut", "whole")]
        if at < 4 or name != "trainer/state.json":  # the best of that evaluation came later
            assert found[0].read_bytes() == found[1].read_bytes()


def test_a_signal_while_a_cache_is_filled_keeps_what_there_is(monkeypatch, capsys):
    argv = ["--mode=kd", "--teacher=random:tiny", "--kd_signal=topk", "--data=word_problems:60"]
    argv += ["--device=cpu", "--steps=1", "--eval_examples=0", "--micro_batch_tokens=400"]
    assert train.main([*argv, "--kd_cache=whole", "--name=whole"]) == 0
    capsys.readouterr()
    with signalled(monkeypatch, "the cache cut", 3) as calls:
        assert train.main([*argv, "--kd_cache=cut", "--name=cut"]) == 1
    said = capsys.readouterr().err.strip()
    assert "\n" not in said and "positions are kept in cut; the same command goes on" in said
    assert calls == [3] and not Path("runs/cut").exists()
    with signalled(monkeypatch, "the cache cut", 10**9) as calls:
        assert train.main([*argv, "--kd_cache=cut", "--name=cut"]) == 0
    with signalled(monkeypatch, "the cache again", 10**9) as whole:
        assert train.main([*argv, "--kd_cache=again", "--name=again"]) == 0
    assert calls[0] == whole[0] - 3
    found = [{p.name: p.read_bytes() for p in Path(n).iterdir()} for n in ("cut", "whole")]
    assert found[0] == found[1]
    assert timeless("runs/cut") == timeless("runs/whole")


def halted_on_rank_0(argv, what, call):
    """train.main, of which rank 0 alone gets a signal in the midst of a step or an evaluation."""
    add, calls = Progress.add, [0]

    def interrupted(self, *done):
        calls[0] += self.what == what
        if self.what == what and calls[0] == call and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        add(self, *done)

    Progress.add = interrupted
    code = train.main(argv)
    Path(f"parts-{os.environ['RANK']}").write_text(str(calls[0]))
    return code


@pytest.mark.slow
@pytest.mark.parametrize(
    "what,mode,call,more",
    [
        ("a step", "--mode=sft", 6, []),
        ("rollout", "--mode=grpo", 6, []),
        ("making a batch", "--mode=sft", 19, []),
        ("validation loss", "--mode=sft", 3, ["--eval_examples=8"]),
        ("validation", "--mode=sft", 6, ["--eval_examples=8", "--shard=on"]),
        ("validation loss", "--mode=sft", 2, ["--eval_examples=8", "--shard=on"]),
        ("a step", "--mode=sft", 6, ["--shard=on"]),
        ("log-probs", "--mode=grpo", 2, ["--shard=on", "--shard_frozen=on"]),
        ("rollout", "--mode=grpo", 6, ["--shard=on", "--shard_rollouts=on"]),
    ],
)
def test_a_signal_on_one_of_two_ranks_ends_the_step_of_both(what, mode, call, more, tmp_path):
    (tmp_path / "e.py").write_text(
        "def e(example, completion):\n    return completion.count('e')\n"
    )
    argv = [*MODES[mode], "--steps=4", "--batch_size=16", "--data=word_problems:20", "--warmup=0"]
    argv += ["--eval_examples=0", "--save_every=0", "--micro_batch_tokens=200", *more]
    argv += ["--eval_tokens=5", "--eval_every=2"] * ("--eval_examples=8" in more)
    if mode == "--mode=grpo":
        argv += ["--sample_tokens=12", "--sample_batch=3", "--grpo_reward=e.py:e"]
    halted = functools.partial(halted_on_rank_0, what=what, call=call)
    for name, main in (("whole", train.main), ("cut", halted)):
        ended = ranks.run(*argv, f"--name={name}", cwd=tmp_path, ranks=2, main=main)
        assert ended.returncode == 0, ended.stderr
    assert int(Path("parts-0").read_text()) in (call, call + 1)  # nothing more was computed
    step = RunFolder("runs/cut").steps()[-1]
    assert f"stopped by SIGTERM after step {step}; continue with" in ended.stdout and step < 4
    ended = ranks.run("--name=cut", "--resume", cwd=tmp_path, ranks=2)
    assert ended.returncode == 0, ended.stderr
    assert timeless("runs/cut") == timeless("runs/whole")
    assert max(line["step"] for line in timeless("runs/cut")) == 4


def test_a_second_ctrl_c_leaves_at_once_and_the_run_goes_on(monkeypatch, capsys):
    sft = ["--mode=sft", *QUICK, "--save_every=2"]
    rate = train.learning_rate

    def learning_rate(step, *rest):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)  # no first Ctrl-C
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return rate(step, *rest)

    with monkeypatch.context() as m:
        m.setattr(train, "learning_rate", learning_rate)
        assert train.main([*sft, "--name=r"]) == 130
    said = capsys.readouterr()
    assert said.out.endswith("left at once; continue with python train.py --name r --resume\n")
    assert said.err == "train.py: interrupted\n" and RunFolder("runs/r").steps() == [2, 4]
    assert train.main(["--name=r", "--resume"]) == 0 and RunFolder("runs/r").steps() == [4, 6]


def test_a_signal_as_the_toy_teacher_ends_is_not_lost(monkeypatch, capsys, tmp_path):
    """Its training is complete, and the command stops all the same."""

    def train_teacher(recipe, folder, device):
        folder.step_folder(recipe["steps"]).mkdir(parents=True)
        return "SIGTERM"

    monkeypatch.setattr(toy_models, "_train", train_teacher)
    assert train.main(["--mode=kd", *QUICK, "--name=k"]) == 1
    assert "stopped by SIGTERM, the toy teacher is ready" in capsys.readouterr().err


def test_what_is_ignored_stays_so_as_under_nohup(sent_at):
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        sent_at(2, signal.SIGHUP)
        assert train.main(["--mode=sft", *QUICK, "--name=r"]) == 0
        assert (
            RunFolder("runs/r").steps() == [6] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        )
    finally:
        signal.signal(signal.SIGHUP, old)


@pytest.mark.slow
def test_a_signal_while_the_toy_teacher_trains(monkeypatch, capfd):
    """It is passed on to the process that trains the teacher; the same command goes on with it."""
    for name, value in {"steps": 200, "batch_size": 2, "eval_examples": 0}.items():
        monkeypatch.setitem(toy_models.TEACHER, name, value)
    kd = ["--mode=kd", *QUICK, "--name=k"]
    stop = threading.Thread(target=signal_after_first_step, args=(signal.SIGUSR1,))
    stop.start()
    assert train.main(kd) == 1
    stop.join()
    err = capfd.readouterr().err
    assert "stopped before the toy teacher was ready; the same command goes on" in err
    assert err.count("\n") == 1
    assert train.main(kd) == 0 and RunFolder("runs/k").steps() == [6]


def signal_after_first_step(number):
    """Send this process a signal once the toy teacher has trained a step."""
    for _ in range(600):
        if any(path.stat().st_size for path in Path("runs").glob("teacher-*/metrics.jsonl")):
            break
        time.sleep(0.1)
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "module,inner",
    [(eval.__main__, "evaluate"), (eval.traces, "run"), (eval.divergence, "run"), (study, "run")],
    ids=["eval", "traces", "divergence", "study"],
)
def test_evaluations_and_studies_end_in_one_line(module, inner, name, monkeypatch, capsys):
    before = [signal.getsignal(s) for s in STOP_SIGNALS]
    unwound = []

    def busy(*_):
        try:
            os.kill(os.getpid(), getattr(signal, name))
            time.sleep(30)
        finally:
            unwound.append(True)

    monkeypatch.setattr(module, inner, busy)
    parser = module if hasattr(module, "parse") else options
    monkeypatch.setattr(parser, "parse", lambda *_: None)
    assert module.main([]) == 130 and unwound
    assert capsys.readouterr().err.strip().endswith("interrupted; the same command goes on")
    assert [signal.getsignal(s) for s in STOP_SIGNALS] == before


COMMANDS = [eval.chat, eval.compare, eval.divergence, eval.traces, export, download, study]


@pytest.mark.parametrize("module", COMMANDS, ids=[m.__name__ for m in COMMANDS])
def test_a_command_of_one_process_is_refused_where_torchrun_started_several(
    module, monkeypatch, capsys
):
    monkeypatch.setattr(options, "parse", lambda *_: pytest.fail("it began"))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "r")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert module.main([]) == 2
    name = module.__name__.removesuffix(".__main__")
    words = f"{name}: this is a command of one process; start it with python -m {name}\n"
    assert capsys.readouterr().err == words


def waiting_rank(argv):
    """A command on two ranks: the first is busy, the second waits for it, in code of gloo."""
    signals.GRACE = 0.5

    def body():
        rank = parallel.init("cpu", patience=60)[0]
        Path(f"there-{rank}").touch()
        if rank == 0:
            time.sleep(30)
        parallel.gather(rank)

    return as_command("w", body, speaks=lambda *_: True)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_rank_that_waits_for_another_one_ends_too(name, tmp_path):
    first, second = ranks.start_ranks(cwd=tmp_path, ranks=2, main=waiting_rank)
    while len(list(tmp_path.glob("there-*"))) < 2:
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(second.pid, getattr(signal, name))
    second.join(10)
    first.kill()
    assert second.exitcode == 130
    assert (tmp_path / "stderr").read_text() == "w: interrupted; the same command goes on\n"


def unwinding(argv):
    """A command that takes its time to leave."""

    def body():
        try:
            Path("there").touch()
            time.sleep(30)
        finally:
            Path("leaving").touch()
            time.sleep(30)

    return as_command("u", body)


def test_a_second_ctrl_c_leaves_any_command_at_once_and_another_signal_does_not(tmp_path):
    process = ranks.start(cwd=tmp_path, main=unwinding)
    for file, number in (("there", signal.SIGTERM), ("leaving", signal.SIGTERM)):
        while not (tmp_path / file).exists():
            time.sleep(0.05)
        os.kill(process.pid, number)
    process.join(1)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(5)
    assert process.exitcode == 130
    assert (tmp_path / "stderr").read_text() == "u: interrupted; the same command goes on\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_an_evaluation_under_torchrun_keeps_what_was_answered_and_goes_on(name, tmp_path):
    """torchrun's own words come behind the line, and its exit code is 1."""
    model = build_model(PRESETS["tiny"], None, device="cpu", seed=0)
    (tmp_path / "model").mkdir()
    save_model(model, tmp_path / "model", toy_models.toy_tokenizer(), [0])
    argv = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "eval"]
    argv += ["model", "--tasks=word_problems", "--limit=24", "--max_tokens=300", "--batch_size=2"]

    def start(out):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *argv, "--group=2", f"--out={out}"]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    def kept(out):
        return {path: path.read_bytes() for path in sorted((tmp_path / out).glob("*/*part*"))}

    process = start("cut")
    while len(kept("cut")) < 2 or not all(kept("cut").values()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert said.count("eval: interrupted; the same command goes on\n") == 1
    assert "Error" not in said and "SignalException" in said.splitlines()[-1]
    assert all(kept("cut").values()) and not list((tmp_path / "cut").glob("*/.*lock"))
    before = kept("cut")
    answered = sum(len(text.splitlines()) for text in before.values())
    for out in ("cut", "whole"):
        assert start(out).wait(240) == 0
    rows = [next((tmp_path / out).glob("*/*.jsonl")).read_text() for out in ("cut", "whole")]
    assert rows[0] == rows[1] and 0 < answered < len(rows[0].splitlines()) == 24


def test_a_job_of_a_study_is_no_rank_of_what_its_platform_set(tmp_path, monkeypatch):
    for name, value in dict(
        WORLD_SIZE="2", RANK="1", MASTER_ADDR="nowhere", MASTER_PORT="1"
    ).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "logs").mkdir()

    class Stub:
        name, kind = "job", "train"

        def command(self, out):
            return ["-c", "from model import parallel; print(parallel.place())"]

    running = scheduler.Running(Stub(), tmp_path, {"OMP_NUM_THREADS": "1"}, 1)
    while running.poll() is None:
        time.sleep(0.05)
    place = parallel.Place(rank=0, world=1, local_rank=0, local_world=1, note="")
    assert scheduler.last_words(tmp_path, Stub()) == str(place)


# --- nobody reads any more -----------------------------------------------------------------------


def test_a_terminal_that_closes_ends_no_run_before_it_is_saved(tmp_path):
    argv, options = command(
        "--mode=sft", *QUICK, "--steps=9999", "--log_every=1", "--name=t", cwd=tmp_path
    )
    master, slave = pty.openpty()

    def attach():  # the terminal that this session hangs on
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        argv, **options, stdin=slave, stdout=slave, stderr=slave, preexec_fn=attach
    )
    os.close(slave)
    seen = b""
    while b"step    4/9999" not in seen:
        seen += os.read(master, 4096)
    os.close(master)
    assert process.wait(600) == 0
    (step,) = RunFolder(tmp_path / "runs/t").steps()
    assert 4 <= step < 9999


def test_a_pipe_that_nobody_reads_ends_no_run(tmp_path):
    argv, options = command(
        "--mode=sft", *QUICK, "--steps=30", "--log_every=1", "--name=p", cwd=tmp_path
    )
    process = subprocess.Popen(argv, **options, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(600) == 0
    assert RunFolder(tmp_path / "runs/p").steps() == [30]


# --- in a thread ---------------------------------------------------------------------------------


def in_a_thread(function, *args):
    found = []

    def body():
        found.append(function(*args))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    return found[0]  # IndexError: it raised


def test_runs_in_threads_save_resume_and_follow_each_other(tmp_path):
    sft = ["--mode=sft", *SMALL, "--device=cpu"]
    assert train.main([*sft, "--name=whole"]) == 0
    assert in_a_thread(train.main, [*sft, "--name=a"]) == 0
    assert timeless("runs/a") == timeless("runs/whole")
    for step in (4, 6):  # a resumed run, in another thread
        folder = RunFolder("runs/a").step_folder(step)
        (folder if step == 6 else folder.with_name("none")).exists() and folder.rename(
            tmp_path / f"gone-{step}"
        )
    assert RunFolder("runs/a").steps() == [4]
    assert in_a_thread(train.main, ["--name=a", "--resume"]) == 0
    assert timeless("runs/a") == timeless("runs/whole") and RunFolder("runs/a").steps() == [4, 6]
    grpo = [
        "--mode=grpo",
        "--device=cpu",
        "--model=tiny-teacher",
        "--steps=1",
        "--batch_size=4",
        "--grpo_samples=2",
        "--sample_tokens=8",
        "--eval_examples=0",
    ]
    for _ in range(2):
        assert in_a_thread(train.main, [*grpo, "--data=word_problems:20"]) == 0
    assert not parallel.active()


def test_handlers_are_the_main_threads_alone():
    def inside():
        with handled(lambda *_: None):
            return [signal.getsignal(s) for s in STOP_SIGNALS]

    before = [signal.getsignal(s) for s in STOP_SIGNALS]
    assert (
        in_a_thread(inside) == before
        and inside() != before
        and [signal.getsignal(s) for s in STOP_SIGNALS] == before
    )


def test_a_study_in_a_thread(monkeypatch):
    monkeypatch.setattr(study, "run", lambda args: None)
    monkeypatch.setattr(options, "parse", lambda *_: None)
    assert in_a_thread(study.main, []) == 0
