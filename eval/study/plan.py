"""A study's file as jobs that are made once each.

[model.NAME] and [arm.NAME] are chains of [run.NAME]s. "@NAME" as a model, teacher or reference
stands for what [model.NAME] makes, as data for what [traces.NAME] makes.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import eval.__main__
import eval.traces
from data.tasks import TASKS
from errors import UserError
from eval.benchmarks import find, is_file
from eval.study.jobs import REFERRING, Job, flags
from eval.study.schema import Arm, Claim, StudyFile, read_file
from files import read_head, without
from model.presets import PRESETS


@dataclasses.dataclass(frozen=True)
class ArmJobs:
    """The jobs of one arm for one seed. start: the model that its chain of runs begins from.

    start_evals: the evaluation of the start; None if it has random weights. kl: the divergence from
    it; None if there is nothing to compare with.
    """

    chain: list[Job]
    evals: Job
    start_evals: Job | None = None
    kl: Job | None = None

    @property
    def traces(self) -> list[Job]:
        """What the runs of the chain are trained on."""
        return [need for run in self.chain for need in run.needs if need.kind == "traces"]


@dataclasses.dataclass(frozen=True)
class Study:
    """A study's file as jobs.

    gpus: of one run. arms: by name. arm_jobs: {(arm, seed): ArmJobs}. jobs: every job once, after
    those that it needs, one seed after the other.
    """

    title: str
    seeds: list[int]
    gpus: int
    arms: dict[str, Arm]
    claims: list[Claim]
    arm_jobs: dict[tuple[str, int], ArmJobs]
    jobs: list[Job]

    def check_test_sets(self) -> None:
        """Refuse a study whose evaluations would find no test set, before anything is trained."""
        wanted = set()
        for job in self.jobs:
            if job.kind == "eval":
                args = _evaluation(job.options)
                wanted.update((task, args.data) for task in args.tasks)
        for task, folder in sorted(wanted):
            if is_file(task):
                read_head(Path(task))
            elif not (task in TASKS and TASKS[task].make):  # a toy task needs no file
                find(task, folder)


def read(
    path: str | Path,
    seeds: Sequence[int] = (),
    arms: Sequence[str] = (),
    rehearsal: bool = False,
    plugin: str = "",
) -> Study:
    """The study of a TOML file, every option in it checked.

    seeds, arms, plugin: instead of all that the file has, unless empty (seeds may be others).
    rehearsal: the same study in miniature (StudyFile.shorten).
    Raises UserError, which names the file and the table.
    """
    try:
        file = read_file(Path(path), list(seeds), plugin)
        chosen = list(arms or file.arms)
        if not chosen:
            raise UserError("there is no [arm.NAME]")
        file.check_names(chosen)
        if rehearsal:
            file.shorten()
        return _Planner(file).study(Path(path).stem, chosen)
    except UserError as e:
        said = str(e)
        raise UserError(said if said.startswith(f"{path} ") else f"{path}: {said}") from None


def _evaluation(given: dict) -> Any:
    """The parsed options of an evaluation, whatever its checkpoint is. Raises UserError."""
    try:
        return eval.__main__.parse(["checkpoint", *flags(without(given, {"checkpoint"}))])
    except UserError as e:
        raise UserError(f"[eval]: {e}") from None


class _Planner:
    """Turns the tables of a file into jobs.

    jobs: {name: Job}, in an order in which they may run. models: {NAME: what [model.NAME] stands
    for}, None while that is being found out. checked: the options of runs, as they are written.
    """

    def __init__(self, file: StudyFile) -> None:
        self.file = file
        self.jobs: dict[str, Job] = {}
        self.models: dict[str, Job | str | None] = {}
        self.checked: dict[str, dict] = {}

    def study(self, title: str, chosen: list[str]) -> Study:
        settings = self.file.settings
        arms = {name: self.file.arms[name] for name in chosen}
        arm_jobs = {(name, seed): self.arm(name, seed) for seed in settings.seeds for name in arms}
        jobs = list(self.jobs.values())
        for name in self.file.runs:  # also those that no arm asks for
            self.run_options(name)
        for name in self.file.traces:
            self.traces(name)
        claims = [claim for claim in self.file.claims if {claim.better, claim.worse} <= set(arms)]
        return Study(title, settings.seeds, settings.gpus, arms, claims, arm_jobs, jobs)

    def add(self, kind: str, options: dict, label: str) -> Job:
        """The job with these options: a new one, or that which an arm before has asked for."""
        job = Job(kind, options, label)
        return self.jobs.setdefault(job.name, job)

    def arm(self, name: str, seed: int) -> ArmJobs:
        arm, label = self.file.arms[name], f"{name}, seed {seed}"
        start = self.resolve(arm.model)
        chain = self.chain(arm.chain, start, seed, label)
        given = {"seed": seed} | self.file.evaluation(arm)
        _evaluation(given)
        start_evals = None
        if start not in PRESETS:  # those have random weights
            words = f"{arm.model}, before, seed {seed}: evaluation"
            start_evals = self.add("eval", {"checkpoint": start} | given, words)
            if not chain:
                return ArmJobs([], start_evals)
        elif not chain:
            raise UserError(f"[arm.{name}]: {start} has random weights; give it a chain of runs")
        evals = self.add("eval", {"checkpoint": chain[-1]} | given, f"{label}: evaluation")
        if start_evals is None or given.get("prompt") == "few_shot":  # not as the arm was trained
            return ArmJobs(chain, evals, start_evals)
        sides = dict(checkpoint=chain[-1], reference=start, evals=evals)
        sides["reference_evals"] = start_evals
        return ArmJobs(chain, evals, start_evals, self.add("kl", sides, f"{label}: divergence"))

    def chain(self, names: list | tuple, start: Job | str, seed: int, label: str) -> list[Job]:
        """Runs that each begin from the model that the one before has trained."""
        made = []
        for name in map(str, names):
            if name not in self.file.runs:
                raise UserError(f"{label}: no [run.{name}]; there are {', '.join(self.file.runs)}")
            given = self.run_options(name) | {"model": made[-1] if made else start, "seed": seed}
            made.append(self.add("train", given, f"{label}: {name}"))
        return made

    def run_options(self, name: str) -> dict:
        """The options of a run, with jobs for what "@NAME" stands for."""
        if name not in self.checked:
            self.checked[name] = self.file.run_options(name)
        given = dict(self.checked[name])
        for key in REFERRING:
            if key in given:
                given[key] = self.resolve(str(given[key]), key)
        return given

    def resolve(self, value: str, key: str = "model") -> Job | str:
        """What a value stands for: "@NAME" for a job, or for the path or hub id of [model.NAME]."""
        if not value.startswith("@"):
            return value
        kind = "traces" if key == "data" else "model"
        known = self.file.traces if key == "data" else self.file.models
        name = value[1:]
        if name not in known:
            names = ", ".join(f"@{name}" for name in known) or "none"
            raise UserError(f"{key} {value}: there is no [{kind}.{name}]; there are {names}")
        return self.traces(name) if key == "data" else self.model(name)

    def model(self, name: str) -> Job | str:
        if name not in self.models:
            self.models[name] = None
            model = self.file.models[name]
            start = self.resolve(model.model)
            self.models[name] = [start, *self.chain(model.chain, start, 0, f"model {name}")][-1]
        found = self.models[name]
        if found is None:
            raise UserError(f"[model.{name}] begins from itself")
        return found

    def traces(self, name: str) -> Job:
        given = dict(self.file.traces[name])
        try:
            teacher = self.resolve(str(given.pop("teacher")), "teacher")
            eval.traces.parse(["teacher", *flags(given), "--out=traces"])
        except KeyError:
            raise UserError(f"[traces.{name}]: it needs teacher") from None
        except UserError as e:
            raise UserError(f"[traces.{name}]: {e}") from None
        return self.add("traces", {"teacher": teacher} | given, f"traces {name}")
