"""A study: arms that are chains of training runs, over seeds, evaluated alike, in one report.

    python -m eval.study recipes/study/mini.toml [--seeds 0,1,2] [--arms inst,inst_rl] [--out DIR]

A file has `[study]` (seeds), `[eval]` (options of `python -m eval`), `[common]` (options of every
run), `[run.NAME]` (options of train.py, on top of those of the run that it is `like`),
`[model.NAME]` (starting points that are made first), `[traces.NAME]` (what a teacher generates),
`[arm.NAME]` (a model and a chain of runs) and `[[claim]]` (arms to be compared). Every job is a
command in a process of its own, one per GPU (`gpus` of [study] of them, if it says so), else one
per processor. The same command goes on with what was interrupted and skips what is done.
--rehearse runs all of it in miniature: whether a file starts.
"""

from errors import RunFailed, UserError, as_command, say  # isort: skip

import contextlib
import dataclasses
import sys
from pathlib import Path

import options
from eval.study import plan as study_plan
from eval.study import report as study_report
from eval.study.disk import disk_line
from eval.study.jobs import Job
from eval.study.plan import ArmJobs
from eval.study.results import Outcome
from eval.study.scheduler import failure_file, is_done, places, run_jobs
from files import made, reason, resolved
from locks import Busy, lock
from options import REQUIRED, option


@dataclasses.dataclass(frozen=True)
class StudyOptions:
    """Every option of the command."""

    file: str = option(REQUIRED, "a TOML file, as in recipes/study", positional=True)
    out: str = option("", "folder of runs, evaluations and the report; empty: studies/NAME")
    seeds: tuple[int, ...] = option(
        (), "instead of the file's, with commas between them", minimum=0
    )
    arms: tuple[str, ...] = option((), "these arms only, with commas between them")
    at_once: int = option(
        0, "jobs at the same time; 0: one per GPU, or per processor where there is none", minimum=0
    )
    rehearse: bool = option(
        False, "a tiny model instead of every checkpoint, a toy task instead of all data, two steps"
    )
    plugin: str = option(
        "", "Python files with commas between them, for all runs, traces and evaluations"
    )
    report: bool = option(False, "run nothing, write the report of what is there")


def outcome(out: Path, jobs: ArmJobs) -> Outcome:
    """What one arm with one seed has left behind."""
    needed = [*jobs.chain, *jobs.traces, jobs.evals]
    every = [*needed, *filter(None, (jobs.start_evals, jobs.kl))]
    done: dict[Job | None, Path] = {job: job.output(out) for job in every if is_done(out, job)}
    files = [failure_file(out, job) for job in needed]
    failures = [file.read_text() for file in files if file.exists()]
    return Outcome(
        runs=[out / "runs" / job.name for job in jobs.chain if job in done],
        traces=[done[job].parent for job in jobs.traces if job in done],
        evals=done.get(jobs.evals),
        start_evals=done.get(jobs.start_evals),
        kl=done.get(jobs.kl),
        failure=failures[0] if failures else "",
    )


def run(args: StudyOptions) -> None:
    """Run a study, or write the report of what is there of it."""
    study = study_plan.read(args.file, args.seeds, args.arms, args.rehearse, args.plugin)
    name = study.title + ("-rehearsal" if args.rehearse else "")
    out = resolved(args.out or f"studies/{name}")

    def report() -> str:
        outcomes = {key: outcome(out, jobs) for key, jobs in study.arm_jobs.items()}
        return study_report.write(out, study, outcomes)

    if args.report:
        if not (out / "logs").is_dir():
            raise UserError(f"--report: there is no study in {out}")
        return say(report())
    study.check_test_sets()
    free = places(study.gpus, args.at_once)
    with contextlib.ExitStack() as stack:
        try:
            for folder in ("runs", "traces", "evals", "kl", "logs", "done"):
                stack.enter_context(made(out / folder))
            stack.enter_context(lock(out / ".lock"))
        except Busy as e:
            words = "wait for its end, or look at it with --report"
            raise UserError(f"{out} is in use by {e}; {words}") from None
        except OSError as e:
            raise UserError(f"--out {out} cannot be made ({reason(e)})") from None
        say(disk_line(study, out, len(free)))
        failed = run_jobs(study, out, free, report)
        say(report())
    if failed:
        fixable = [failure for failure in failed if failure.code == 2]
        kind, first = (UserError, fixable[0]) if fixable else (RunFailed, failed[0])
        raise kind(
            f"{len(failed)} of the jobs are not done, the first: {first.reason} "
            f"({out}/logs has their words; the same command tries them again)"
        )


def main(argv: list[str]) -> int:
    return as_command("eval.study", lambda: run(options.parse(StudyOptions, argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
