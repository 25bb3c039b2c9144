"""What may be in a study's file: its tables as dataclasses, checked.

The options of runs, traces and evaluations are checked by the commands that read them, not here.
"""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import options
from config import SELF, Config, validate
from errors import UserError
from eval.benchmarks import label
from eval.study.jobs import LISTS, flags
from files import Json, read_text, reason, resolved
from model.presets import PRESETS

TABLES = dict.fromkeys(("study", "eval", "common", "model", "traces", "run", "arm"), dict)
TABLES |= {"claim": list}
# options of a run that the study itself sets
OWN = ("seed", "name", "runs", "resume", "model", "config")
REHEARSAL = Path(__file__).with_name("rehearsal.toml")


@dataclasses.dataclass
class Settings:
    """[study]. gpus: of one run. plugin: of all runs, traces and evaluations."""

    seeds: list
    gpus: int = 1
    plugin: str = ""


@dataclasses.dataclass
class Model:
    """[model.NAME]: a model, and the runs that it goes through first."""

    model: str
    chain: list | tuple = ()


@dataclasses.dataclass
class Arm:
    """[arm.NAME]: a model and a chain of runs. eval: options of its own.

    paper: {task: the paper's number in %}, or "collapsed".
    """

    model: str
    chain: list
    eval: dict | None = None
    paper: dict | str | None = None

    def paper_number(self, task: str | None) -> Any:
        """A number in %, "collapsed", or None where the paper has none."""
        return self.paper.get(task) if isinstance(self.paper, dict) else self.paper


@dataclasses.dataclass
class Claim:
    """[[claim]]: the arm `better` is better than `worse`. task: empty for the first one."""

    text: str
    better: str
    worse: str
    task: str = ""


class StudyFile:
    """All tables of a study's file. eval, common, and each of runs and traces: options by name."""

    def __init__(self, tables: dict) -> None:
        for name in tables:
            if name not in TABLES:
                raise UserError(f"unknown table [{name}]; there are {', '.join(TABLES)}")
        for name, kind in TABLES.items():
            if not isinstance(tables.setdefault(name, kind()), kind):
                form = "[[claim]]s are a list" if kind is list else f"[{name}] is one table"
                raise UserError(f"{name}: {form}")
        for kind in ("run", "traces"):
            for name, given in tables[kind].items():
                _need_table(f"[{kind}.{name}]", given)
        self.eval, self.common = tables["eval"], tables["common"]
        self.runs = {name: _begun(tables["run"], name) for name in tables["run"]}
        self.traces: dict[str, dict] = tables["traces"]
        self.settings = _table(Settings, "[study]", tables["study"])
        self.models = _tables(Model, "model", tables)
        self.arms = _tables(Arm, "arm", tables)
        self.claims = [_table(Claim, "[claim]", claim) for claim in tables["claim"]]
        if self.settings.plugin:
            files = [str(resolved(file)) for file in self.settings.plugin.split(",")]
            for given in (self.common, self.eval, *self.traces.values()):
                given["plugin"] = ",".join(files)
        self._check()

    def _check(self) -> None:
        """Refuse values that no study can have."""
        seeds = self.settings.seeds
        numbers = all(type(seed) is int and seed >= 0 for seed in seeds)
        if not seeds or not numbers or len(set(seeds)) < len(seeds):
            raise UserError("[study] seeds: different whole numbers, as in [0, 1, 2]")
        if self.settings.gpus < 1:
            raise UserError("[study] gpus: a whole number, the GPUs of one run")
        for name, arm in self.arms.items():
            numbers = arm.paper.values() if isinstance(arm.paper, dict) else [arm.paper]
            if arm.paper in ("collapsed", None) or all(type(n) in (int, float) for n in numbers):
                continue
            heading = f"[arm.{name}] paper"
            raise UserError(f'{heading}: a table of tasks with numbers, or "collapsed"')

    def evaluation(self, arm: Arm) -> dict:
        """The options of an arm's evaluations."""
        return self.eval | (arm.eval or {})

    def run_options(self, name: str) -> dict:
        """A run's own options and those of [common] that it reads, checked as train.py does."""
        own, common = self.runs[name], self.common
        try:
            for key in own | common:
                if key in OWN:
                    raise UserError(f"{key} is given by the study itself")
            read = _readable(common | own)
            given = {key: value for key, value in common.items() if key in read} | own
            cfg = options.parse(Config, flags(given))
            validate(cfg)
        except UserError as e:
            raise UserError(f"[run.{name}]: {e}") from None
        return {"mode": cfg.mode} | given

    def check_names(self, chosen: list) -> None:
        """Refuse arms that are not in the file, and claims on a task that nobody reports."""
        sides = [side for claim in self.claims for side in (claim.better, claim.worse)]
        for name in [*chosen, *sides]:
            if name not in self.arms:
                raise UserError(f"no arm {name!r}; there are {', '.join(self.arms)}")
        tasks = {""}
        for name, arm in self.arms.items():
            tasks.update(arm.paper if isinstance(arm.paper, dict) else ())
            if name in chosen:
                tasks.update(map(label, str(self.evaluation(arm).get("tasks")).split(",")))
        for claim in self.claims:
            if claim.task not in tasks:
                words = "neither a task of [eval] nor of an arm's paper"
                raise UserError(f"[[claim]] task {claim.task!r}: {words}")

    def shorten(self) -> None:
        """Make it the same study in miniature (rehearsal.toml).

        It shows in minutes whether a file starts, before it costs days. What checkpoints, data and
        prompts of its own would say is not asked.
        """
        short = tomllib.loads(REHEARSAL.read_text())
        for name, run in self.runs.items():
            own = self.common | run
            new = own | short["run_options"]
            for key, value in own.items():
                # models and traces of the study, and functions of the user's own, are tried out
                is_own = key in LISTS and ".py" in str(value)
                if str(value).startswith("@") or is_own or value in SELF:
                    new[key] = value
            read = _readable(new)
            self.runs[name] = {key: value for key, value in new.items() if key in read}
        for model in self.models.values():
            if model.model not in PRESETS:
                model.model = _rehearsed(model.model)
        for arm in self.arms.values():
            arm.model, arm.eval = _rehearsed(arm.model), None
        self.eval, self.common = short["eval"], {}
        self.traces = dict.fromkeys(self.traces, short["traces"])
        self.models["rehearsed"] = Model(**short["model"]["rehearsed"])
        self.runs |= short["run"]
        self.settings.seeds = self.settings.seeds[:1]


def read_file(path: Path, seeds: list, plugin: str = "") -> StudyFile:
    """A study's file. seeds, plugin: instead of the file's, unless empty. Raises UserError."""
    try:
        tables = tomllib.loads(read_text(path))
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise UserError(f"not valid TOML ({reason(e)})") from None
    for name, value in (("seeds", seeds), ("plugin", plugin)):
        if value and isinstance(tables.setdefault("study", {}), dict):
            tables["study"][name] = value
    return StudyFile(tables)


def _readable(given: dict) -> dict:
    """Every option that a run with these options reads. Raises UserError for unknown ones."""
    return options.resolved(options.parse(Config, flags(given), conditions=False))


def _rehearsed(model: str) -> str:
    return model if model.startswith("@") else "@rehearsed"


def _begun(runs: dict[str, dict], name: str, inner: tuple = ()) -> dict:
    """A run's options on top of those of the run that it is `like`.

    inner: runs that are like this one. Raises UserError.
    """
    own = dict(runs[name])
    like = str(own.pop("like", ""))
    if not like:
        return own
    if like not in runs:
        raise UserError(f"[run.{name}] like: no [run.{like}]; there are {', '.join(runs)}")
    if like in (*inner, name):
        raise UserError(f"[run.{like}] is like itself")
    return _begun(runs, like, (*inner, name)) | own


def _need_table(heading: str, given: Any) -> None:
    if not isinstance(given, dict):
        raise UserError(f"{heading}: a table")


def _tables(cls: type, kind: str, tables: dict) -> Json:
    return {name: _table(cls, f"[{kind}.{name}]", given) for name, given in tables[kind].items()}


def _table(cls: type, heading: str, given: Any) -> Any:
    """A table as a dataclass. Raises UserError for unknown or missing keys and other types."""
    _need_table(heading, given)
    types: Json = {field.name: field.type for field in dataclasses.fields(cls)}
    for key, value in given.items():
        if key not in types:
            raise UserError(f"{heading}: unknown {key!r}; there are {', '.join(types)}")
        if not isinstance(value, types[key]):
            kind = getattr(types[key], "__name__", types[key])
            raise UserError(f"{heading} {key}: {value!r} is not of type {kind}")
    for key in types:
        if key not in given and not hasattr(cls, key):  # without a default
            raise UserError(f"{heading}: it needs {key}")
    return cls(**given)
