"""A study: arms that are chains of training runs, over seeds, evaluated alike, in one report.

    python -m eval.study recipes/study/mini.toml [--seeds 0,1,2] [--arms inst,inst_rl] [--out studies/mini]

A file has `[study]` (seeds), `[eval]` (options of `python -m eval`), `[common]` (knobs of every run), `[run.NAME]` (knobs of train.py), `[model.NAME]` (starting
points that are made first), `[traces.NAME]` (what a teacher writes), `[arm.NAME]` (a model and a chain of runs) and `[[claim]]` (arms to be compared).
Every job is a command in a process of its own, one per GPU (of `gpus` GPUs, if [study] says so), else one per processor. The same command goes on with
what was interrupted and skips what is done. --rehearse runs all of it in miniature: whether a file starts.
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

from data.sandbox.confine import PR_PDEATHSIG, prctl
from errors import RunFailed, UserError, as_command, say
from eval.study import plan as study_plan
from eval.study import report as study_report
from files import reason, replace_file
from locks import Busy, lock
from model import parallel
from run import StopSignal, duration, handled, interrupt

PROGRESS, REPORT = 30.0, 600.0  # seconds between lines on what is running, and between reports


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="eval.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: (_ for _ in ()).throw(UserError(message))
    parser.add_argument("file", help="a TOML file, as in recipes/study")
    parser.add_argument(
        "--out", default="", help="folder of runs, evaluations and the report; empty: studies/NAME"
    )
    parser.add_argument(
        "--seeds", default="", help="instead of the file's, with commas between them"
    )
    parser.add_argument("--arms", default="", help="these arms only, with commas between them")
    parser.add_argument(
        "--at_once",
        "--at-once",
        type=int,
        default=0,
        help="jobs at the same time; 0: one per GPU, or per processor where there is none",
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="two steps of a tiny body instead of every checkpoint, the embedded task instead of all data",
    )
    parser.add_argument(
        "--report", action="store_true", help="run nothing, write the report of what is there"
    )
    args = parser.parse_args(argv)
    if args.at_once < 0:
        raise UserError("--at_once must not be negative")
    return args


# --- running -----------------------------------------------------------------------------------------------------------


def places(gpus, at_once):
    """The environment of each job that may run at the same time: its own GPUs, or one thread of the processor (how many run together must not
    change what they compute)."""
    visible = [g for g in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if g] or [
        str(i) for i in range(torch.cuda.device_count())
    ]
    if torch.cuda.is_available():
        if gpus > len(visible):
            raise UserError(f"[study] gpus = {gpus}, but there are {len(visible)}")
        found = [
            {"CUDA_VISIBLE_DEVICES": ",".join(visible[i : i + gpus])}
            for i in range(0, len(visible) - gpus + 1, gpus)
        ]
        return found[: at_once or None]
    threads = int(os.environ.get("OMP_NUM_THREADS") or 1)
    return [{"OMP_NUM_THREADS": str(threads)}] * (
        at_once or max(1, len(os.sched_getaffinity(0)) // threads)
    )


class Running:
    """A job's processes: one, or for a run or an evaluation on several GPUs one per rank. They die with this one, so that the study can be killed
    and begun again."""

    def __init__(self, job, out, place, gpus):
        self.place, self.since, self.processes = place, time.monotonic(), []
        ranks = gpus if job.kind in ("train", "eval") else 1
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        environment = {
            k: v for k, v in os.environ.items() if k not in parallel.VARIABLES
        }  # a job of one process is one
        for rank in range(ranks):
            world = (
                dict(
                    RANK=rank,
                    LOCAL_RANK=rank,
                    WORLD_SIZE=ranks,
                    LOCAL_WORLD_SIZE=ranks,
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=port,
                )
                if ranks > 1
                else {}
            )
            with open(
                log_of(out, job) if rank == 0 else out / "logs" / f"{job.name}.rank-{rank}.txt", "a"
            ) as log:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *map(str, job.command(out))],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        cwd=study_plan.ROOT,
                        env=environment | place | {k: str(v) for k, v in world.items()},
                        start_new_session=True,
                        preexec_fn=lambda: prctl(PR_PDEATHSIG, signal.SIGKILL),
                    )
                )

    def poll(self):
        """None while it runs, then its exit code: that of the first rank that failed, the others then being stopped."""
        codes = [process.poll() for process in self.processes]
        if wrong := [code for code in codes if code]:
            self.stop(5)
            return wrong[0]
        return None if None in codes else 0

    def terminate(self):
        for process in self.processes:
            process.terminate()

    def stop(self, patience):
        """A run that is told to stop saves a checkpoint first, after its step."""
        self.terminate()
        for process in self.processes:
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                process.kill()


def log_of(out, job):
    return out / "logs" / f"{job.name}.txt"


def failure(out, job):
    """Where it says why a job failed when it was tried last."""
    return out / "done" / f"{job.name}.failed"


def last_words(out, job):
    lines = log_of(out, job).read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no word"


def whole(out, job):
    """Whether what a job makes is there. (A run that was told to stop ends well too, without its curves.)"""
    ended = (out / "runs" / job.name / "curves.png").exists() if job.kind == "train" else True
    return ended and job.product(out).exists()


def done(out, job):
    return (out / "done" / job.name).exists() and whole(out, job)


def run_jobs(study, out, free, report):
    """Every job, as soon as what it needs is done and one of the places `free` is. What fails is written down, and what does not need it is made all
    the same. report(): called every REPORT seconds. Returns {job: (exit code, why it failed)}."""
    waiting, running, failed = [j for j in study.jobs if not done(out, j)], {}, {}
    total, began, shown, reported = (
        len(waiting),
        time.monotonic(),
        time.monotonic(),
        time.monotonic(),
    )
    tell = lambda text: say(
        f"[{total - len(waiting) - len(running)}/{total} {duration(time.monotonic() - began)}] {text}"
    )
    for job in waiting:
        failure(out, job).unlink(missing_ok=True)
    try:
        while waiting or running:
            for job in [j for j in waiting if any(n in failed for n in j.needs)]:
                waiting.remove(job)
                failed[job] = next(failed[n] for n in job.needs if n in failed)
                replace_file(failure(out, job), failed[job][1])
            while free and (
                job := next((j for j in waiting if all(done(out, n) for n in j.needs)), None)
            ):
                waiting.remove(job)
                running[job] = Running(job, out, free.pop(0), study.gpus)
            if waiting and not running:
                raise RunFailed(
                    f"{waiting[0].label}: what it needs was done, and is gone; the same command makes it again"
                )
            time.sleep(0.1)
            for job, process in [(j, p) for j, p in running.items() if p.poll() is not None]:
                code, seconds = running.pop(job).poll(), time.monotonic() - process.since
                free.append(process.place)
                if code == 0 and whole(out, job):
                    replace_file(out / "done" / job.name, "")
                    tell(f"{job.label}: {seconds:.0f} s")
                    continue
                failed[job] = code, f"{job.label}: {last_words(out, job)}"
                replace_file(failure(out, job), failed[job][1])
                tell(f"FAILED {failed[job][1]}")
            if running and time.monotonic() - shown > PROGRESS:
                shown = time.monotonic()
                tell("; ".join(f"{job.label}: {last_words(out, job)[:60]}" for job in running))
            if time.monotonic() - reported > REPORT:
                reported = time.monotonic()
                report()
    except OSError as e:
        raise RunFailed(f"{e.filename or out}: {e.strerror}; the same command goes on") from None
    finally:
        if running:
            say("stopping; runs save a checkpoint first")
        with StopSignal():  # a scheduler that asks twice does not cut this short
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.stop(600)
    return failed


# --- the whole -----------------------------------------------------------------------------------------------------------


def outcome(out, arm):
    """What an arm has left behind for one seed."""
    there = lambda job: job.product(out) if job and done(out, job) else None
    chain = tuple(out / "runs" / job.name for job in arm.chain if done(out, job))
    traces = tuple(job.product(out).parent for job in arm.traces if done(out, job))
    failures = [
        failure(out, job).read_text()
        for job in (*arm.chain, *arm.traces, arm.evals)
        if failure(out, job).exists()
    ]  # it can do without its divergence
    return study_report.Outcome(
        chain, traces, there(arm.evals), there(arm.before), there(arm.kl), "".join(failures[:1])
    )


def run(args):
    study = study_plan.read(args.file, args.seeds, args.arms, args.rehearse)
    out = Path(
        args.out or Path("studies") / (study.title + ("-rehearsal" if args.rehearse else ""))
    ).resolve()

    def report():
        outcomes = {key: outcome(out, arm) for key, arm in study.made.items()}
        return study_report.write(out, study.title, study.seeds, study.arms, outcomes, study.claims)

    if args.report:
        if not (out / "done").is_dir():
            raise UserError(f"--report: there is no study in {out}")
        return print(report(), flush=True)
    study.check_test_sets()
    places_free = places(study.gpus, args.at_once)
    try:
        for name in ("runs", "traces", "evals", "kl", "logs", "done"):
            (out / name).mkdir(parents=True, exist_ok=True)
        held = contextlib.ExitStack()
        held.enter_context(lock(out / ".lock"))
    except Busy as e:
        raise UserError(
            f"{out} is in use by {e}; wait for its end, or look at it with --report"
        ) from None
    except OSError as e:
        raise UserError(f"--out {out} cannot be made ({reason(e)})") from None
    with held:
        failed = run_jobs(study, out, places_free, report)
        say(report())
    if failed:
        mendable = [text for code, text in failed.values() if code == 2]
        kind, text = (
            (UserError, mendable[0]) if mendable else (RunFailed, next(iter(failed.values()))[1])
        )
        raise kind(
            f"{len(failed)} of the jobs are not done, the first: {text} ({out}/logs has their words; the same command tries them again)"
        )


def main(argv):
    with handled(interrupt):
        return as_command("eval.study", lambda: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
