"""Running the jobs of a study: each as soon as what it needs is done, one per GPU or processor."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import torch

from errors import RunFailed, UserError, say
from eval.study.jobs import ROOT, Job
from eval.study.plan import Study
from files import replace_file
from progress import duration
from run import RunFolder, StopSignal
from toy_models import die_with_parent

PROGRESS = 30.0  # seconds between two lines on what is running
REPORT = 600.0  # seconds between two reports of what is done so far


class Failure(NamedTuple):
    """How a job has failed. code: its exit code, 2 where the user can fix it. reason: one line."""

    code: int
    reason: str


def places(gpus: int, at_once: int) -> list[dict[str, str]]:
    """The environment of each job that may run at the same time.

    It names the job's own GPUs, or one thread of a processor: how many run together must not change
    what they compute. gpus: of one job. at_once: jobs at most; 0: as many as there is room for.
    """
    if not torch.cuda.is_available():
        threads = os.environ.get("OMP_NUM_THREADS") or "1"
        fitting = max(1, len(os.sched_getaffinity(0)) // int(threads))
        return [{"OMP_NUM_THREADS": threads}] * (at_once or fitting)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    ids = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    if gpus > len(ids):
        raise UserError(f"[study] gpus = {gpus}, but there are {len(ids)}")
    groups = [",".join(ids[i : i + gpus]) for i in range(0, len(ids) - gpus + 1, gpus)]
    return [{"CUDA_VISIBLE_DEVICES": group} for group in groups][: at_once or None]


def log_of(out: Path, job: Job, rank: int = 0) -> Path:
    """What a rank of a job has printed: rank 0, which speaks for all, has the file of the job."""
    return out / "logs" / (f"{job.name}.rank-{rank}.txt" if rank else f"{job.name}.txt")


def last_words(out: Path, job: Job, rank: int = 0) -> str:
    """The last line that a rank of a job has printed; of rank 0 if it has printed none."""
    lines = log_of(out, job, rank).read_text(errors="replace").strip().splitlines()
    if rank and not lines:
        return last_words(out, job)
    return lines[-1] if lines else "no word"


def failure_file(out: Path, job: Job) -> Path:
    """The file that says why a job failed when it was tried last."""
    return out / "done" / f"{job.name}.failed"


def is_complete(out: Path, job: Job) -> bool:
    """Whether all of a job's output is there."""
    # a run that was told to stop exits with 0 too, but draws no curves
    curves = out / "runs" / job.name / "curves.png"
    return job.output(out).exists() and (job.kind != "train" or curves.exists())


def is_done(out: Path, job: Job) -> bool:
    """Whether a job has ended well, and its output is still there."""
    return (out / "done" / job.name).exists() and is_complete(out, job)


class Running:
    """The processes of a job: one, or one per rank for a run or an evaluation on several GPUs.

    They are not started by torchrun, which hides a failing rank's exit code and last line, and
    whose ranks live on when it is killed. These die with the study: the same command can go on.

    failing: the rank whose exit code is the job's, once one has failed.
    """

    def __init__(self, job: Job, out: Path, place: dict[str, str], gpus: int) -> None:
        self.place, self.began = place, time.monotonic()
        ranks = gpus if job.kind in ("train", "eval") else 1
        self.processes: list[subprocess.Popen] = []
        self.failing = 0
        command = [sys.executable, *job.command(out)]
        # in place of what a platform may have set for the study itself
        world = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
        world["MASTER_PORT"] = free_port()
        for rank in range(ranks):
            world |= {"RANK": rank, "LOCAL_RANK": rank}
            with open(log_of(out, job, rank), "a") as log:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=ROOT,
                    env=os.environ | place | {name: str(n) for name, n in world.items()},
                    start_new_session=True,
                    preexec_fn=die_with_parent,
                )
            self.processes.append(process)

    def poll(self) -> int | None:
        """None while it runs, then its exit code.

        Where a rank fails the code is that rank's, and the others are stopped.
        """
        codes = [process.poll() for process in self.processes]
        for rank, code in enumerate(codes):
            if code:
                self.failing = rank
                stop(self.processes, patience=5)
                return code
        return None if None in codes else 0


def free_port() -> int:
    """A port that nobody has, and below those that the system gives to whoever asks for any."""
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first = int(given.read_text().split()[0]) if given.exists() else 32768
    ports = range(first // 2, first) if first > 8192 else range(8192, 65536)
    while True:
        port = random.SystemRandom().choice(ports)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def stop(processes: list[subprocess.Popen], patience: float) -> None:
    """End processes, as a run does after a checkpoint; kill them after `patience` seconds."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()


def run_jobs(
    study: Study, out: Path, free: list[dict[str, str]], report: Callable[[], object]
) -> list[Failure]:
    """Run every job that is not done yet; returns the failures, the first of them first.

    What does not need a job that failed is run all the same. free: the places for jobs. report:
    called every REPORT seconds if more jobs have ended, to write what is there. Raises RunFailed
    if the disk refuses.
    """
    todo = [job for job in study.jobs if not is_done(out, job)]
    for job in todo:
        failure_file(out, job).unlink(missing_ok=True)
    order = TopologicalSorter({job: set(job.needs).intersection(todo) for job in todo})
    order.prepare()
    ready: list[Job] = []
    running: dict[Job, Running] = {}
    failed: dict[Job, Failure] = {}
    ended = ended_before = 0
    began = shown = reported = time.monotonic()

    def tell(text: str) -> None:
        say(f"[{ended}/{len(todo)} {duration(time.monotonic() - began)}] {text}")

    try:
        while True:
            # in the order of the file, one seed after the other
            ready = sorted([*ready, *order.get_ready()], key=todo.index)
            while ready and free:
                job = ready.pop(0)
                running[job] = Running(job, out, free.pop(0), study.gpus)
            if not running:
                break
            time.sleep(0.1)
            for job, process in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[job]
                free.append(process.place)
                ended += 1
                failure = _end(out, job, process, code)
                if failure:
                    failed[job] = failure
                    tell(f"FAILED {failure.reason}")
                else:
                    order.done(job)
                    tell(f"{job.label}: {time.monotonic() - process.began:.0f} s")
            if running and time.monotonic() - shown > PROGRESS:
                shown = time.monotonic()
                tell("; ".join(f"{job.label}: {last_words(out, job)[:60]}" for job in running))
            if ended > ended_before and time.monotonic() - reported > REPORT:
                report()
                ended_before, reported = ended, time.monotonic()
    except OSError as e:
        raise RunFailed(f"{e.filename or out}: {e.strerror}; the same command goes on") from None
    finally:
        if running:
            say("stopping; runs save a checkpoint first")
        with StopSignal():  # a cluster that asks twice does not cut this short
            stop([p for job in running.values() for p in job.processes], patience=600)
    _add_untried(out, todo, failed)
    return list(failed.values())


def _end(out: Path, job: Job, process: Running, code: int) -> Failure | None:
    """Note beside its output how a job has ended; returns how it failed, if it did."""
    if code == 0 and is_complete(out, job):
        replace_file(out / "done" / job.name, "")
        RunFolder(out / "runs" / job.name).drop_trainer()
        return None
    words = last_words(out, job, process.failing)
    if code == -signal.SIGKILL:
        words = f"killed, as the system does where memory ends; before: {words}"
    failure = Failure(code, f"{job.label}: {words}")
    replace_file(failure_file(out, job), failure.reason)
    return failure


def _add_untried(out: Path, todo: list[Job], failed: dict[Job, Failure]) -> None:
    """What needs a job that failed has failed too, for the same reason."""
    for job in todo:
        for need in job.needs:
            if need in failed and job not in failed:
                failed[job] = failed[need]
                replace_file(failure_file(out, job), failed[job].reason)
