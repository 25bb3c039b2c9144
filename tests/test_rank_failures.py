"""One of several ranks fails in any way: all end in time, the first cause last, and a requeue goes
on as if nothing had been."""

import contextlib
import datetime
import os
import re
import resource
import signal
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import train
from errors import UserError, as_command
from eval import __main__ as evaluate
from eval import sampling
from model import parallel, watch
from tests import test_rank_kills as torchrun_kills
from tests.distributed_workers import free_port, run, start_ranks
from tests.test_train import SMALL, timeless

# What is waited for at the longest, in a real run and here: a rank that is silent (its machine is
# gone, or it is stopped), and one that lives but comes to no sum (torch's 30 minutes for gloo, 10
# for NCCL).
SILENCE, PATIENCE = 8.0, 15.0
ENDED = 20.0  # seconds after the failure, or after it was noticed, in which all ranks have ended
WHOLE = 600.0  # seconds of a whole run on a busy machine; all but a few are its start
ARGV = ["--mode=sft", "--model=tiny", *SMALL, "--eval_examples=0", "--name=r"]


def out_of_memory():
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
    torch.zeros(1 << 28)  # a gigabyte


def fail(error):
    raise error


MISSING = "--model nowhere: there is no such folder"

# name -> (what the rank does, what the last line says, how long nobody can know)
WAYS = {
    "raise": (lambda: fail(ValueError("odd")), "ValueError: odd", 0),
    "exit": (lambda: os._exit(3), "is gone", 0),
    "kill": (lambda: os.kill(os.getpid(), signal.SIGKILL), "is gone", 0),
    "memory": (out_of_memory, "RuntimeError: .*allocat|DefaultCPUAllocator|not enough memory", 0),
    "hang": (lambda: time.sleep(1e4), "imed out|is gone", PATIENCE),
    "stop": (lambda: os.kill(os.getpid(), signal.SIGSTOP), "gave no sign of life", SILENCE),
    "slow": (lambda: time.sleep(3), "", 0),
    "bad row": (lambda: fail(UserError("rows.jsonl:7: no answer")), "rows.jsonl:7: no answer", 0),
    "no model": (lambda: fail(UserError(MISSING)), MISSING, 0),
    "full disk": (lambda: fail(OSError(28, "No space left on device", "x")), "No space left", 0),
}


@contextlib.contextmanager
def impatient():
    """What is waited for at the longest is shorter."""
    join = dist.init_process_group

    def patiently(*args, **more):
        return join(*args, **more | {"timeout": datetime.timedelta(seconds=PATIENCE)})

    with (
        mock.patch.object(dist, "init_process_group", patiently),
        mock.patch.object(watch, "SILENCE", SILENCE),
    ):
        yield


class Failing:
    """train.main, of whose ranks one fails at its third step, or as it loads; for processes.

    It does so once, however often torchrun starts them again.
    """

    def __init__(self, way, victim):
        self.way, self.victim = way, victim

    def fails(self):
        if parallel.rank() == self.victim and not Path("failed").exists():
            Path("failed").touch()
            WAYS[self.way][0]()

    def __call__(self, argv):
        steps = []
        load, before = train.load_models, train.clip_gradients

        def clip(*args):
            steps.append(args)
            if len(steps) == 3 and self.way != "no model":
                self.fails()
            return before(*args)

        def loads(*args):
            if self.way == "no model":
                self.fails()
            return load(*args)

        with (
            mock.patch.object(train, "clip_gradients", clip),
            mock.patch.object(train, "load_models", loads),
            impatient(),
        ):
            return train.main(argv)


class Looping:
    """Ranks that do nothing but sums, of which one fails; for processes.

    They start within a second, so that failures of every kind and place can be tried.
    """

    def __init__(self, way, victim):
        self.way, self.victim = way, victim

    def __call__(self, argv):
        return as_command("loop", self.run, speaks=parallel.is_first_to_say)

    def run(self):
        watch.PERIOD, watch.GRACE = 0.2, 4.0
        with impatient(), parallel.telling():
            parallel.init("cpu")
            for step in range(20):
                if step == 3 and parallel.rank() == self.victim:
                    Path("failed").touch()
                    WAYS[self.way][0]()
                parallel.all_reduce_sum([step])


def watched_to_the_end(processes, cwd, stopped):
    """(exit codes, seconds from the failure to the last rank's end, standard error)."""
    began, failed, took = time.monotonic(), cwd / "failed", 0.0
    waited = [process for rank, process in enumerate(processes) if rank != stopped]
    while any(process.is_alive() for process in waited) and time.monotonic() < began + WHOLE:
        time.sleep(0.05)
    if failed.exists():
        took = time.time() - failed.stat().st_mtime
    for process in processes:  # what is stopped is there until it is killed
        process.kill()
        process.join()
    return [process.exitcode for process in processes], took, (cwd / "stderr").read_text()


def assert_ended(way, victim, codes, took, error):
    """In time, with the exit code of the first cause, which is the last line."""
    _, words, unknown = WAYS[way]
    assert took < ENDED + unknown, took
    others = {code for rank, code in enumerate(codes) if rank != victim}
    assert others == {2 if way in ("bad row", "no model") else 1}, (codes, error)
    last = error.strip().rpartition("\n")[2]
    with pytest.raises(UserError, match=words):
        raise UserError(last)
    if way not in ("raise", "memory"):
        assert "Traceback" not in error and "frame #" not in error, error


QUICK = [("bad row", 2, 0), ("kill", 4, 0)]
LOOPS = [
    pytest.param(
        way, ranks, victim, marks=() if (way, ranks, victim) in QUICK else [pytest.mark.slow]
    )
    for way in WAYS
    if way != "no model"
    for ranks, victim in ((2, 1), (2, 0), (3, 1), (4, 3), (4, 0))
]


@pytest.mark.parametrize("way,ranks,victim", LOOPS)
def test_ranks_that_sum_end_in_time(way, ranks, victim, tmp_path, capsys):
    processes = start_ranks(cwd=tmp_path, ranks=ranks, main=Looping(way, victim))
    ended = watched_to_the_end(processes, tmp_path, victim if way == "stop" else None)
    with capsys.disabled():
        print(
            f"\n{ranks} ranks, {way} of {victim}: {ended[0]}, {ended[1]:.1f} s\n{ended[2][-300:]}"
        )
    if way == "slow":
        assert ended[0] == [0] * ranks, ended
    else:
        assert_ended(way, victim, *ended)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(ranks): the metrics of a run that nothing disturbs."""
    found = {}

    def metrics(ranks):
        if ranks not in found:
            folder = tmp_path_factory.mktemp(f"whole-{ranks}")
            done = run(*ARGV, cwd=folder, ranks=ranks, timeout=WHOLE)
            assert done.returncode == 0, done.stderr
            found[ranks] = timeless(folder / "runs/r")
        return found[ranks]

    return metrics


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "ranks,victim", [(2, 1), (3, 2), (4, 3), (4, 0)], ids=["2", "3", "4", "the first of 4"]
)
def test_all_ranks_end_in_time_and_a_requeue_goes_on(ranks, victim, way, tmp_path, whole, capsys):
    processes = start_ranks(*ARGV, cwd=tmp_path, ranks=ranks, main=Failing(way, victim))
    codes, took, error = watched_to_the_end(processes, tmp_path, victim if way == "stop" else None)
    with capsys.disabled():
        print(f"\n{ranks} ranks, {way} of {victim}: {codes}, {took:.0f} s; {error[-120:]}")
    if way == "slow":
        assert codes == [0] * ranks, error
    else:
        assert_ended(way, victim, codes, took, error)
    again = run(*ARGV, "--resume=auto", cwd=tmp_path, ranks=ranks, timeout=WHOLE)
    assert again.returncode == 0, again.stderr
    assert timeless(tmp_path / "runs/r") == whole(ranks)
    left = {p.name for p in (tmp_path / "runs/r").rglob(".*")}
    assert not left, left


KILLED = 30.0  # seconds after which torchrun kills what does not end by its signal


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ranks,victim", [(2, 1), (3, 2), (4, 0)], ids=["2", "3", "4"])
def test_torchrun_starts_ranks_again_and_the_run_goes_on(
    ranks, victim, way, tmp_path, whole, capsys
):
    wanted, began = whole(ranks), time.monotonic()
    argv = [*ARGV, "--resume=auto"]
    agent = torchrun_kills.start(argv, tmp_path, 1, ranks, free_port(), Failing(way, victim))
    first, failed, ended = [], tmp_path / "failed", 0.0
    while agent.is_alive():
        time.sleep(0.05)
        if len(first) < ranks:
            first = torchrun_kills.pids(tmp_path, range(ranks))
        elif failed.exists() and not ended and not torchrun_kills.pids_alive(first):
            ended = time.time() - failed.stat().st_mtime
        assert time.monotonic() - began < WHOLE, (tmp_path / "stderr").read_text()
    agent.join()
    error = (tmp_path / "stderr").read_text()
    said = [line for line in error.splitlines() if line.startswith(("train.py: ", "rank "))]
    with capsys.disabled():
        print(f"\ntorchrun, {ranks} ranks, {way} of {victim}: {ended:.0f} s; {said[-1:]}")
    assert agent.exitcode == 0 and failed.exists(), error
    assert timeless(tmp_path / "runs/r") == wanted
    assert not list((tmp_path / "runs/r").rglob(".*"))
    if way == "slow":
        return
    _, words, unknown = WAYS[way]
    assert 0 < ended < ENDED + unknown + KILLED * (way in ("hang", "stop"))
    if way in ("kill", "exit"):  # torchrun knows, and ends the others before they do
        words = rf"\(exitcode: \S+ local_rank: {victim} "
        said = [line for line in error.splitlines() if "failed (exitcode" in line][:1]
    elif way in ("raise", "memory"):
        said = [error]
    assert re.search(words, said[-1]), error
    assert not re.search(r"rank \d+ and ", error), "those that torchrun has ended are no cause"


def dying(argv):
    """An evaluation, of whose ranks the last one is killed as it generates."""

    def killed(*_, **__):
        if parallel.rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return generate(*_, **__)

    generate = sampling.generate
    with mock.patch.object(sampling, "generate", killed):
        return evaluated(argv)


def evaluated(argv):
    return evaluate.main([word for word in argv if word != "--device=cpu"])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_an_evaluation_without_one_of_its_ranks_ends_in_one_line(ranks, tmp_path, capsys):
    assert run(*ARGV, cwd=tmp_path, timeout=WHOLE).returncode == 0
    argv = ["runs/r", "--tasks=word_problems", "--limit=12", "--n=2", "--max_tokens=8"]
    whole = run(*argv, "--out=whole", cwd=tmp_path, main=evaluated, timeout=WHOLE)
    assert whole.returncode == 0, whole.stderr
    more = {"cwd": tmp_path, "ranks": ranks, "timeout": WHOLE}
    done = run(*argv, "--out=out", main=dying, **more)
    lines = done.stderr.strip().splitlines()
    with capsys.disabled():
        print(f"\n{ranks} ranks evaluate: {lines}")
    assert done.returncode == -9 and len(lines) in range(1, ranks)
    assert all(line.startswith("eval: ") and " is gone " in line for line in lines), lines
    again = run(*argv, "--out=out", main=evaluated, **more)
    assert again.returncode == 0, again.stderr
    samples = [
        sorted(f.read_bytes() for f in (tmp_path / n).rglob("*.jsonl")) for n in ("out", "whole")
    ]
    assert samples[0] == samples[1]
