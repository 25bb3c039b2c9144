"""A study's file as jobs: the commands that make its starting models, traces, runs, evaluations and divergences, each of them once.

`[model.NAME]` and `[arm.NAME]` are chains of `[run.NAME]`s; "@NAME" for a model, teacher, reference or data stands for what [model.NAME] or
[traces.NAME] makes. Jobs that ask for the same thing are the same job, so what arms share is made once.
"""

import dataclasses
import functools
import hashlib
import json
import re
import tomllib
from pathlib import Path

import eval.__main__
import eval.traces
import options
from config import Config, validate
from data.tasks import TASKS
from data.teacher_cache import weights_digest
from errors import UserError
from eval.benchmarks import find
from files import read_json, read_text, reason, replace_file
from model.transformer import PRESETS
from run import RunFolder

TABLES = ("study", "eval", "common", "model", "traces", "run", "arm", "claim")
KEYS = {
    "study": ("seeds", "gpus"),
    "model": ("model", "chain"),
    "arm": ("model", "chain", "eval", "paper"),
    "claim": ("text", "better", "worse", "task"),
}
REFERRING = ("model", "teacher", "reference", "data")  # what "@NAME" may be given for
HELD = (*REFERRING, "checkpoint", "grpo_reward")  # what may name files
OWN = ("seed", "name", "runs", "resume", "model", "config")  # what the study itself gives to a run
ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A command: kind is train, traces, eval or kl; options are (name, value) pairs, and a value that is a Job stands for what that one leaves.
    Jobs of the same name are the same job."""

    kind: str
    options: tuple
    label: str

    def __eq__(self, other):
        return self.name == other.name

    def __hash__(self):
        return hash(self.name)

    @property
    def needs(self):
        return [value for _, value in self.options if isinstance(value, Job)]

    @functools.cached_property
    def name(self):
        """Another one for everything else that is asked for: 1 is 1.0, and local files and weights count by what they hold."""
        means = lambda k, v: (
            v.name
            if isinstance(v, Job)
            else contents(str(v))
            if k in HELD
            else float(v)
            if type(v) is int
            else v
        )
        key = [self.kind, sorted((k, means(k, v)) for k, v in self.options)]
        what = "{mode}-s{seed}".format(**dict(self.options)) if self.kind == "train" else self.kind
        return f"{what}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:8]}"

    def product(self, out):
        """What other jobs take from this one."""
        if self.kind == "train":
            run = RunFolder(out / "runs" / self.name)
            return run.step_folder((run.steps() or [0])[-1])
        return (
            out
            / {
                "traces": f"traces/{self.name}/traces.jsonl",
                "eval": f"evals/{self.name}",
                "kl": f"kl/{self.name}.json",
            }[self.kind]
        )

    def command(self, out):
        given = {k: str(v.product(out)) if isinstance(v, Job) else v for k, v in self.options}
        if self.kind == "train":
            run = out / "runs" / self.name
            given |= (
                {"kd_cache": str(out / "caches" / given["kd_cache"])}
                if given.get("kd_cache")
                else {}
            )
            stored = run / "config.json"
            if stored.exists():  # the folder may have been moved since
                places = {k: given[k] for k in (*REFERRING, "kd_cache") if k in given}
                replace_file(stored, json.dumps(read_json(stored) | places, indent=2) + "\n")
            return [
                ROOT / "train.py",
                *(["--resume"] if stored.exists() else flags(given)),
                f"--runs={run.parent}",
                f"--name={run.name}",
            ]
        if self.kind == "kl":
            evals = ["--evals", given["evals"], given["reference_evals"]]
            return [
                "-m",
                "eval.divergence",
                given["checkpoint"],
                given["reference"],
                *evals,
                f"--out={self.product(out)}",
            ]
        module, subject = {"traces": ("eval.traces", "teacher"), "eval": ("eval", "checkpoint")}[
            self.kind
        ]
        folder = self.product(out).parent if self.kind == "traces" else self.product(out)
        return ["-m", module, given.pop(subject), *flags(given), f"--out={folder}"]


@functools.cache
def contents(value):
    """A file's or a checkpoint folder's digest; any other value as it is."""
    path, _, function = value.rpartition(":") if ".py:" in value else (value, "", "")
    if len(path) < 1000 and Path(path).is_file():
        return hashlib.sha256(Path(path).read_bytes()).hexdigest() + function
    return (
        weights_digest(path)
        if len(path) < 1000 and any(Path(path).glob("*.safetensors"))
        else value
    )


@dataclasses.dataclass(frozen=True)
class Arm:
    """One arm for one seed. before: the evaluation of what its chain begins from."""

    chain: tuple
    evals: Job
    before: Job | None
    kl: Job | None

    @property
    def traces(self):
        return [need for job in self.chain for need in job.needs if need.kind == "traces"]


@dataclasses.dataclass(frozen=True)
class Study:
    """arms: {name: its table}; made: {(arm, seed): Arm}; gpus: of one run."""

    title: str
    seeds: list
    gpus: int
    arms: dict
    claims: list
    made: dict

    @property
    def jobs(self):
        """Every job once, what it needs before it, whole seeds one after the other."""
        found = {}

        def visit(job):
            if job not in found:
                for need in job.needs:
                    visit(need)
                found[job] = job

        for arm in self.made.values():
            for job in filter(None, (*arm.chain, arm.evals, arm.before, arm.kl)):
                visit(job)
        return list(found)

    def check_test_sets(self):
        """Refuse a study whose evaluations would find no test set, before anything is trained."""
        for chosen in {
            job.options[1:] for job in self.jobs if job.kind == "eval"
        }:  # the first is the checkpoint
            args = eval.__main__.parse(["checkpoint", *flags(dict(chosen))])
            for task in args.tasks:
                if not (task in TASKS and TASKS[task].make):
                    find(task, args.data)


def flags(given):
    return [f"--{k}" if v is True else f"--{k}={v}" for k, v in given.items()]


def read(path, seeds="", arms="", rehearsal=False):
    """The Study of a TOML file, every knob and option checked. seeds, arms: those of the file that are wanted, with commas between them
    (seeds may be others). rehearsal: the same study in miniature (see `miniature`). Raises UserError naming file and table."""
    try:
        content = tomllib.loads(read_text(Path(path)))
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise UserError(f"{path}: not valid TOML ({reason(e)})") from None
    if extra := set(content) - set(TABLES):
        raise UserError(f"{path}: unknown table [{min(extra)}]; there are {', '.join(TABLES)}")
    try:
        content = {name: content.get(name, [] if name == "claim" else {}) for name in TABLES}
        if not re.fullmatch(r"(\d+(,\d+)*)?", seeds):
            raise UserError(
                f"--seeds {seeds}: write whole numbers with commas between them, as in 0,1,2"
            )
        check_tables(content, [int(s) for s in seeds.split(",") if seeds])
        chosen = [a for a in arms.split(",") if a] or list(content["arm"])
        if missing := [
            a
            for a in [*chosen, *(c[side] for c in content["claim"] for side in ("better", "worse"))]
            if a not in content["arm"]
        ]:
            raise UserError(f"no arm {missing[0]!r}; there are {', '.join(content['arm'])}")
        return _Plan(miniature(content) if rehearsal else content).study(Path(path).stem, chosen)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None


def check_tables(content, seeds):
    """Refuse what no study has, and values of another kind. seeds: instead of the file's, unless empty."""

    def need(ok, where, what):
        if not ok:
            raise UserError(f"{where}: {what}")

    text, texts = (
        lambda v: isinstance(v, str),
        lambda v: isinstance(v, list) and all(isinstance(x, str) for x in v),
    )
    for name, table in content.items():
        need(
            isinstance(table, list) == (name == "claim"),
            name,
            "[[claim]]s are a list" if name == "claim" else f"[{name}] is one table",
        )
    study = content["study"] = {"gpus": 1} | content["study"] | ({"seeds": seeds} if seeds else {})
    need(
        type(study["gpus"]) is int and study["gpus"] > 0,
        "[study] gpus",
        "a whole number, the GPUs of one run",
    )
    whole = (
        isinstance(study.get("seeds"), list)
        and study["seeds"]
        and all(type(s) is int and s >= 0 for s in study["seeds"])
    )
    need(
        whole and len(set(study["seeds"])) == len(study["seeds"]),
        "[study] seeds",
        "different whole numbers, as in [0, 1, 2]",
    )
    rows = [
        ("study", "", study),
        *(
            (kind, name, table)
            for kind in ("model", "arm", "run", "traces")
            for name, table in content[kind].items()
        ),
    ]
    for kind, name, table in [*rows, *(("claim", "", table) for table in content["claim"])]:
        where = f"[{kind}.{name}]" if name else f"[{kind}]"
        need(isinstance(table, dict), where, "a table")
        for key, value in table.items():
            need(
                kind not in KEYS or key in KEYS[kind],
                where,
                f"unknown {key!r}; there are {', '.join(KEYS.get(kind, ()))}",
            )
            need(
                key not in (*REFERRING, "text", "better", "worse", "task") or text(value),
                f"{where} {key}",
                "a text",
            )
            need(key != "chain" or texts(value), f"{where} chain", "a list of names of runs")
            need(key != "eval" or isinstance(value, dict), f"{where} eval", "a table of options")
            numbers = isinstance(value, dict) and all(
                type(x) in (int, float) for x in value.values()
            )
            need(
                key != "paper" or value == "collapsed" or numbers,
                f"{where} paper",
                'a table of tasks with numbers, or "collapsed"',
            )
        needed = {
            "arm": ("model", "chain"),
            "model": ("model",),
            "traces": ("teacher",),
            "claim": ("text", "better", "worse"),
        }.get(kind, ())
        need(
            not (missing := [key for key in needed if key not in table]),
            where,
            f"it needs {', '.join(missing)}",
        )


class _Plan:
    """What the tables of a file say, as jobs."""

    def __init__(self, content):
        self.content, self.opened = content, set()

    def study(self, title, chosen):
        arms, seeds = (
            {name: self.content["arm"][name] for name in chosen},
            self.content["study"]["seeds"],
        )
        if not arms:
            raise UserError("there is no [arm.NAME]")
        for name in self.content["run"]:  # also what no arm asks for
            self._knobs(name)
        for name in self.content["traces"]:
            self._traces(name)
        for claim in self.content["claim"]:
            tasks = {
                t
                for a in arms.values()
                for t in str((self.content["eval"] | a.get("eval", {})).get("tasks")).split(",")
            }
            columns = {
                c
                for a in self.content["arm"].values()
                if isinstance(a.get("paper"), dict)
                for c in a["paper"]
            }
            if (task := claim.get("task")) and task not in tasks | columns:
                raise UserError(
                    f"[[claim]] task {task!r}: neither a task of [eval] nor a column of an arm's paper"
                )
        claims = [c for c in self.content["claim"] if {c["better"], c["worse"]} <= set(chosen)]
        made = {(name, seed): self._arm(name, seed) for seed in seeds for name in arms}
        return Study(title, seeds, self.content["study"]["gpus"], arms, claims, made)

    def _arm(self, name, seed):
        table = self.content["arm"][name]
        start = self._value(table["model"])
        chain = self._chain(table["chain"], start, seed, f"{name}, seed {seed}")
        options = {"seed": seed} | self.content["eval"] | table.get("eval", {})
        random = start in PRESETS if isinstance(start, str) else False
        if random and not chain:
            raise UserError(f"[arm.{name}]: {start} has random weights; give it a chain of runs")
        before = (
            None if random else self._eval(start, options, f"{table['model']}, before, seed {seed}")
        )
        if not chain:
            return Arm((), before, None, None)
        evals = self._eval(chain[-1], options, f"{name}, seed {seed}")
        if (
            random or options.get("prompt") == "few_shot"
        ):  # nothing to be compared with, or not as it was asked
            return Arm(tuple(chain), evals, before, None)
        sides = dict(checkpoint=chain[-1], reference=start, evals=evals, reference_evals=before)
        return Arm(
            tuple(chain),
            evals,
            before,
            Job("kl", tuple(sides.items()), f"{name}, seed {seed}: divergence"),
        )

    def _eval(self, checkpoint, options, label):
        try:
            eval.__main__.parse(["checkpoint", *flags(options)])
        except UserError as e:
            raise UserError(f"[eval]: {e}") from None
        return Job(
            "eval", (("checkpoint", checkpoint), *sorted(options.items())), f"{label}: evaluation"
        )

    def _chain(self, names, start, seed, label):
        made = []
        for name in names:
            if name not in self.content["run"]:
                raise UserError(
                    f"{label}: no [run.{name}]; there are {', '.join(self.content['run'])}"
                )
            knobs = self._knobs(name)
            knobs |= {"model": made[-1] if made else start, "seed": seed}
            made.append(Job("train", tuple(sorted(knobs.items())), f"{label}: {name}"))
        return made

    def _knobs(self, name):
        """A run's own knobs and those of [common] that it reads."""
        own, common = self.content["run"][name], self.content["common"]
        try:
            if taken := [k for k in (*own, *common) if k in OWN]:
                raise UserError(f"{taken[0]} is given by the study itself")
            readable = options.resolved(
                options.parse(Config, flags(common | own), conditions=False)
            )
            given = {k: v for k, v in common.items() if k in readable} | own
            validate(cfg := options.parse(Config, flags(given)))
        except UserError as e:
            raise UserError(f"[run.{name}]: {e}") from None
        return {"mode": cfg.mode} | {
            k: self._value(v, k) if k in REFERRING else v for k, v in given.items()
        }

    def _value(self, value, key="model"):
        """What "@NAME" stands for: a Job, or the folder or hub id that [model.NAME] gives a name to."""
        if not str(value).startswith("@"):
            return value
        name, kind = value[1:], "traces" if key == "data" else "model"
        if name not in self.content[kind]:
            raise UserError(
                f"{key} {value}: there is no [{kind}.{name}]; there are {', '.join(f'@{n}' for n in self.content[kind]) or 'none'}"
            )
        if kind == "traces":
            return self._traces(name)
        if name in self.opened:
            raise UserError(f"[model.{name}] begins from itself")
        self.opened.add(name)
        table = self.content["model"][name]
        start = self._value(table["model"])
        chain = self._chain(table.get("chain", []), start, 0, f"model {name}")
        self.opened.remove(name)
        return chain[-1] if chain else start

    def _traces(self, name):
        options = dict(self.content["traces"][name])
        teacher = self._value(options.pop("teacher"))
        try:
            eval.traces.parse(["teacher", *flags(options), "--out=traces"])
        except UserError as e:
            raise UserError(f"[traces.{name}]: {e}") from None
        return Job("traces", (("teacher", teacher), *sorted(options.items())), f"traces {name}")


# --- rehearsal -------------------------------------------------------------------------------------------------------

SHORT = dict(
    steps=2,
    batch_size=4,
    grpo_samples=2,
    micro_batch_tokens=512,
    sample_tokens=16,
    grpo_length_penalty=4,
    eval_examples=2,
    eval_tokens=8,
    warmup=1,
)
SHORT |= dict(
    data="word_problems:16",
    kd_topk=8,
    save_every=0,
    log_every=1,
    compile=False,
    template="auto",
    kernels="auto",
    wandb="off",
)


def miniature(content):
    """The same study on a body of a hundred thousand weights and the embedded task, two steps a run: whether a file starts, in minutes, before it
    costs days. What checkpoints, data and prompts of its own would say is not asked."""
    tables = {
        name: [dict(c) for c in table] if name == "claim" else dict(table)
        for name, table in content.items()
    }
    named = lambda value: value if str(value).startswith("@") else "@rehearsed"
    tables["study"] |= {"seeds": content["study"]["seeds"][:1]}
    tables["eval"] = dict(tasks="word_problems", n=2, k="1,2", limit=4, max_tokens=16)
    tables["arm"] = {
        name: {k: v for k, v in arm.items() if k != "eval"} | {"model": named(arm["model"])}
        for name, arm in content["arm"].items()
    }
    tables["model"] = {
        name: m
        | ({"model": "@rehearsed"} if m["model"] not in PRESETS and m["model"][:1] != "@" else {})
        for name, m in content["model"].items()
    }
    tables["model"]["rehearsed"] = {"model": "tiny", "chain": ["rehearsed"]}
    tables["traces"] = {
        name: dict(teacher="@rehearsed", data="word_problems:16", max_tokens=48, keep="ended")
        for name in content["traces"]
    }
    tables["run"] = {name: _short(content["common"] | run) for name, run in content["run"].items()}
    tables["run"]["rehearsed"] = _short({"mode": "sft"}) | {
        "steps": 60,
        "data": "word_problems:64",
        "batch_size": 16,
        "lr": 5e-3,
    }  # its texts come to an end
    tables["common"] = {}
    return tables


def _short(run):
    """A run's knobs with the expensive ones cut down, less those that it then does not read."""
    readable = lambda knobs: options.resolved(options.parse(Config, flags(knobs), conditions=False))
    asked = readable(run)
    referred = {
        k: run[k] if str(run[k]).startswith("@") else "@rehearsed"
        for k in ("teacher", "reference")
        if run.get(k)
    }
    short = (
        asked
        | SHORT
        | referred
        | ({"data": run["data"]} if str(run.get("data", "")).startswith("@") else {})
    )
    short |= {"grpo_reward": "accuracy"} if ".py:" not in str(run.get("grpo_reward", "")) else {}
    kept = readable(short)
    return {k: v for k, v in short.items() if k in kept and k not in OWN}
