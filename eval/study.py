"""A study: arms that are chains of training runs, over seeds, evaluated alike, in one report.

    python -m eval.study recipes/study/mini.toml [--seeds 0,1,2] [--arms instruct,instruct_rl] [--out studies/mini]

A file has `[study]` (seeds), `[eval]` (options of `python -m eval`), `[common]` (knobs of every run), `[run.NAME]` (knobs of train.py), `[model.NAME]` (starting
points that are made first), `[traces.NAME]` (what a teacher writes), `[arm.NAME]` (a model and a chain of runs) and `[[claim]]` (arms to be compared).
Every job is a command in a process of its own, one per GPU (of `gpus` GPUs, if [study] says so), else one per processor. The same command goes on with
what was interrupted and skips what is done. --rehearse runs all of it in miniature: whether a file starts.
"""

import argparse
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from data.confine import PR_PDEATHSIG, prctl
from errors import RunFailed, UserError, as_command
from eval import study_plan, study_report
from model.runs import replace_file

PROGRESS = 30.0  # seconds between lines on what is running


def parse(argv):
    parser = argparse.ArgumentParser(prog="eval.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: (_ for _ in ()).throw(UserError(message))
    parser.add_argument("file", help="a TOML file, as in recipes/study")
    parser.add_argument("--out", default="", help="folder of runs, evaluations and the report; empty: studies/NAME")
    parser.add_argument("--seeds", default="", help="instead of the file's, with commas between them")
    parser.add_argument("--arms", default="", help="these arms only, with commas between them")
    parser.add_argument("--at_once", "--at-once", type=int, default=0, help="jobs at the same time; 0: one per GPU, or per processor where there is none")
    parser.add_argument("--rehearse", action="store_true", help="two steps of a tiny body instead of every checkpoint, the embedded task instead of all data")
    parser.add_argument("--report", action="store_true", help="run nothing, write the report of what is there")
    args = parser.parse_args(argv)
    if args.at_once < 0:
        raise UserError("--at_once must not be negative")
    return args


# --- running -----------------------------------------------------------------------------------------------------------


def places(gpus, at_once):
    """The environment of each job that may run at the same time: its own GPUs, or one thread of the processor (how many run together must not
    change what they compute)."""
    visible = [g for g in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if g] or [str(i) for i in range(torch.cuda.device_count())]
    if torch.cuda.is_available():
        if gpus > len(visible):
            raise UserError(f"[study] gpus = {gpus}, but there are {len(visible)}")
        found = [{"CUDA_VISIBLE_DEVICES": ",".join(visible[i : i + gpus])} for i in range(0, len(visible) - gpus + 1, gpus)]
        return found[: at_once or None]
    threads = int(os.environ.get("OMP_NUM_THREADS") or 1)
    return [{"OMP_NUM_THREADS": str(threads)}] * (at_once or max(1, len(os.sched_getaffinity(0)) // threads))


def start(job, out, place, gpus):
    """The process of a job. It dies with this one, so that the study can be killed and begun again."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"] if gpus > 1 and job.kind == "train" else []
    with open(out / "logs" / f"{job.name}.txt", "a") as log:
        return subprocess.Popen(
            [sys.executable, *launcher, *map(str, job.command(out))], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env=os.environ | place, cwd=study_plan.ROOT, start_new_session=True, preexec_fn=lambda: prctl(PR_PDEATHSIG, signal.SIGKILL),
        )  # fmt: skip


def done(out, job):
    return (out / "done" / job.name).exists()


def last_words(out, job):
    lines = (out / "logs" / f"{job.name}.txt").read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no word"


def run_jobs(study, out, free):
    """Every job, as soon as what it needs is done and one of the places `free` is. Returns {job: why it failed}; what does not need a failed
    one is run all the same. A job that the user can mend ends the study (UserError)."""
    waiting, running, failed = [j for j in study.jobs if not done(out, j)], {}, {}
    total, began, shown = len(waiting), time.monotonic(), time.monotonic()
    say = lambda text: print(f"[{total - len(waiting) - len(running)}/{total} {(time.monotonic() - began) / 60:.0f}m] {text}", flush=True)
    try:
        while waiting or running:
            for job in [j for j in waiting if any(n in failed for n in j.needs)]:
                waiting.remove(job)
                failed[job] = next(failed[n] for n in job.needs if n in failed)
            while free and (job := next((j for j in waiting if all(done(out, n) for n in j.needs)), None)):
                waiting.remove(job)
                place = free.pop(0)
                running[job] = (start(job, out, place, study.gpus), place, time.monotonic())
            time.sleep(0.1)
            for job, (process, place, since) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[job]
                free.append(place)
                said = last_words(out, job)
                if process.returncode == 2:
                    raise UserError(f"{job.label}: {said}")
                if process.returncode or not whole(out, job):
                    failed[job] = f"{job.label}: {said}"
                    say(f"FAILED {failed[job]}")
                else:
                    replace_file(out / "done" / job.name, "")
                    say(f"{job.label}: {time.monotonic() - since:.0f} s")
            if running and time.monotonic() - shown > PROGRESS:
                shown = time.monotonic()
                say("; ".join(f"{job.label}: {last_words(out, job)[:60]}" for job in running))
    finally:
        stop([process for process, *_ in running.values()])
    return failed


def whole(out, job):
    """Whether a job that ended well has made what it was asked for: a run that was told to stop saves, and ends well too."""
    return (out / "runs" / job.name / "curves.png").exists() if job.kind == "train" else job.product(out).exists()


def stop(processes):
    """Runs that are told to stop save a checkpoint first."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


# --- the whole -----------------------------------------------------------------------------------------------------------


def outcome(out, arm, failed):
    """What an arm has left behind for one seed."""
    jobs = [*arm.chain, *arm.traces, arm.evals]  # an arm without its divergence is an arm all the same
    kept = lambda job, path: path if job and done(out, job) else None
    chain = tuple(out / "runs" / job.name for job in arm.chain if done(out, job))
    traces = tuple(job.product(out).parent for job in arm.traces if done(out, job))
    evals, kl = (kept(job, job and job.product(out)) for job in (arm.evals, arm.kl))
    return study_report.Outcome(chain, traces, evals, kl, next((failed[job] for job in jobs if job in failed), ""))


def run(args):
    study = study_plan.read(args.file, args.seeds, args.arms, args.rehearse)
    out = Path(args.out or Path("studies") / (study.title + ("-rehearsal" if args.rehearse else ""))).resolve()
    try:
        for name in ("runs", "traces", "evals", "kl", "logs", "done"):
            (out / name).mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w")
    except OSError as e:
        raise UserError(f"--out {out} cannot be made ({e.strerror})") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out} is in use by another process; wait for its end or choose another --out") from None
        failed = {} if args.report else run_jobs(study, out, places(study.gpus, args.at_once))
        outcomes = {key: outcome(out, arm, failed) for key, arm in study.made.items()}
        print(study_report.write(out, study.title, study.seeds, study.arms, outcomes, study.claims), flush=True)
    if failed:
        raise RunFailed(f"{len(failed)} jobs failed, the first: {next(iter(failed.values()))}; {out}/logs has their words, the same command tries them again")


def main(argv):
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return as_command("eval.study", lambda: run(parse(argv)))
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
