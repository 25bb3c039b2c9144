"""One of several ranks fails in any way: all end in time, the first cause last, and a requeue goes
on as if nothing had been."""

import datetime
import os
import resource
import signal
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import train
from errors import UserError
from model import parallel, watch
from tests.distributed_workers import run
from tests.test_train import SMALL, timeless

# What is waited for at the longest, in a real run and here: a rank that is silent (its machine is
# gone, or it is stopped), and one that lives but comes to no sum (torch's 30 minutes for gloo, 10
# for NCCL).
SILENCE, PATIENCE = 8.0, 15.0
ENDED = 120.0  # seconds for the whole run on a busy machine; all but a few are its start
ARGV = ["--mode=sft", "--model=tiny", *SMALL, "--eval_examples=0", "--name=r"]


def out_of_memory():
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
    torch.zeros(1 << 28)  # a gigabyte


def fail(error):
    raise error


# name -> (what the rank does, what the last line says)
WAYS = {
    "raise": (lambda: fail(ValueError("odd")), "ValueError: odd"),
    "exit": (lambda: os._exit(3), "is gone"),
    "kill": (lambda: os.kill(os.getpid(), signal.SIGKILL), "is gone"),
    "memory": (out_of_memory, "RuntimeError: .*allocat|DefaultCPUAllocator|not enough memory"),
    "hang": (lambda: time.sleep(1e4), "imed out|is gone"),
    "stop": (lambda: os.kill(os.getpid(), signal.SIGSTOP), "gave no sign of life"),
    "slow": (lambda: time.sleep(3), ""),
    "bad row": (lambda: fail(UserError("rows.jsonl:7: no answer")), "rows.jsonl:7: no answer"),
    "full disk": (lambda: fail(OSError(28, "No space left on device", "x")), "No space left"),
}


def failing(way):
    """train.main, of whose ranks the last one fails at its third step."""

    def main(argv):
        steps, before, join = [], train.clip_gradients, dist.init_process_group

        def clip(*args):
            steps.append(args)
            if len(steps) == 3 and parallel.rank() == dist.get_world_size() - 1:
                WAYS[way][0]()
            return before(*args)

        def patiently(*args, **more):
            return join(*args, **more | {"timeout": datetime.timedelta(seconds=PATIENCE)})

        with (
            mock.patch.object(train, "clip_gradients", clip),
            mock.patch.object(dist, "init_process_group", patiently),
            mock.patch.object(watch, "SILENCE", SILENCE),
        ):
            return train.main(argv)

    return main


class Way:
    """`failing`, to be handed to another process."""

    def __init__(self, way):
        self.way = way

    def __call__(self, argv):
        return failing(self.way)(argv)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(ranks): the metrics of a run that nothing disturbs."""
    found = {}

    def metrics(ranks):
        if ranks not in found:
            folder = tmp_path_factory.mktemp(f"whole-{ranks}")
            done = run(*ARGV, cwd=folder, ranks=ranks, timeout=ENDED)
            assert done.returncode == 0, done.stderr
            found[ranks] = timeless(folder / "runs/r")
        return found[ranks]

    return metrics


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_all_ranks_end_in_time_and_a_requeue_goes_on(ranks, way, tmp_path, whole, capsys):
    began = time.monotonic()
    patience = ENDED / 2 if way == "stop" else ENDED  # what is stopped is there until it is killed
    done = run(*ARGV, cwd=tmp_path, ranks=ranks, timeout=patience, main=Way(way))
    took = time.monotonic() - began
    last = done.stderr.strip().rpartition("\n")[2]
    with capsys.disabled():
        print(f"\n{ranks} ranks, {way}: exit code {done.returncode}, {took:.0f} s; {last[:160]}")
    assert took < ENDED
    if way == "slow":
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode and (way in ("exit", "kill") or done.returncode in (1, 2, -9))
        with pytest.raises(UserError, match=WAYS[way][1]):
            raise UserError(last)
    again = run(*ARGV, "--resume=auto", cwd=tmp_path, ranks=ranks, timeout=ENDED)
    assert again.returncode == 0, again.stderr
    assert timeless(tmp_path / "runs/r") == whole(ranks)
    left = {p.name for p in (tmp_path / "runs/r").rglob(".*")}
    assert not left, left
