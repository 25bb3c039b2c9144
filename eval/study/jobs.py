"""The jobs of a study: commands, each named by what its output depends on.

Jobs that ask for the same thing have the same name, and are one job; a changed option, data file
or checkpoint makes a new one.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

from data.teacher_cache import weights_digest
from digests import file_sha256, sha256
from errors import UserError
from eval.benchmarks import is_file, label
from files import Json, read_json, replace_file
from run import RunFolder, newest_checkpoint

ROOT = Path(__file__).resolve().parents[2]
REFERRING = ("model", "teacher", "reference", "data")  # options that "@NAME" may be given for
# options whose value may be a local path
PATHS = (*REFERRING, "checkpoint", "config")
LISTS = ("grpo_reward", "plugin")  # those that may name several, with commas


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A command of a study.

    kind: train, traces, eval or kl (a divergence). options: a value that is a Job stands for the
    output of that job. label: what people call it, as in "sft_rl, seed 0: rl".
    """

    kind: str
    options: Json
    label: str

    @property
    def needs(self) -> list["Job"]:
        """The jobs that must be done before this one."""
        return [value for value in self.options.values() if isinstance(value, Job)]

    @functools.cached_property
    def name(self) -> str:
        """Kind (of a run: mode and seed) and a hash of everything that is asked for."""
        identity = sorted((key, _identity(key, value)) for key, value in self.options.items())
        digest = sha256(json.dumps([self.kind, identity]))
        prefix = "{mode}-s{seed}".format(**self.options) if self.kind == "train" else self.kind
        return f"{prefix}-{digest[:8]}"

    def output(self, out: Path) -> Path:
        """What other jobs take from this one: of a run its newest checkpoint.

        out: the study's folder.
        """
        if self.kind == "train":
            run = RunFolder(out / "runs" / self.name)
            return run.step_folder(max(run.steps(), default=0))
        paths = {"traces": "traces/{}/traces.jsonl", "eval": "evals/{}", "kl": "kl/{}.json"}
        return out / paths[self.kind].format(self.name)

    def command(self, out: Path) -> list[str]:
        """The arguments of the Python interpreter."""
        values = {}
        for key, value in self.options.items():
            values[key] = str(value.output(out)) if isinstance(value, Job) else value
        output = self.output(out)
        if self.kind == "train":
            return self._train_command(out, values)
        if self.kind == "traces":
            return [
                "-m",
                "eval.traces",
                values.pop("teacher"),
                *flags(values | {"out": output.parent}),
            ]
        checkpoint = values.pop("checkpoint")
        if self.kind == "eval":
            return ["-m", "eval", checkpoint, *flags(values | {"out": output})]
        evals = ["--evals", values["evals"], values["reference_evals"]]
        return ["-m", "eval.divergence", checkpoint, values["reference"], *evals, f"--out={output}"]

    def _train_command(self, out: Path, values: Json) -> list[str]:
        if values.get("kd_cache"):
            draws = values.get("kd_signal") == "draws"  # each seed has draws of its own
            own = f"{values['kd_cache']}-{values['seed']}" if draws else values["kd_cache"]
            values["kd_cache"] = f"{out}/caches/{own}"
        place = [f"--runs={out}/runs", f"--name={self.name}"]
        config = out / "runs" / self.name / "config.json"
        if not config.exists():
            return [f"{ROOT}/train.py", *flags(values), *place]
        # the study's folder may have been moved since the run began
        paths = {key: values[key] for key in (*REFERRING, "kd_cache") if key in values}
        replace_file(config, json.dumps(read_json(config) | paths, indent=2) + "\n")
        return [f"{ROOT}/train.py", "--resume", *place]


def flags(options: Json) -> list[str]:
    """{name: value} as arguments of a command line. Raises UserError for a list or a table."""
    for name, value in options.items():
        if isinstance(value, list | dict):
            raise UserError(f"{name}: one value, not {value!r}")
    return [f"--{k}" if v is True else f"--{k}={v}" for k, v in options.items()]


def _identity(key: str, value: Any) -> Any:
    """What an option adds to a job's hash: 1 is 1.0, and local files count by their contents."""
    if isinstance(value, Job):
        return value.name
    if key in PATHS:
        return fingerprint(newest_checkpoint(str(value), f"--{key}"))
    if key in LISTS:
        return ",".join(map(fingerprint, str(value).split(",")))
    if key == "tasks":
        named = [(label(task), task) for task in str(value).split(",")]
        return ",".join(f"{n} {fingerprint(t)}" if is_file(t) else n for n, t in named)
    is_whole = type(value) is int and value.bit_length() < 1000  # beyond, no float is so large
    return float(value) if is_whole else value


@functools.cache
def fingerprint(value: str) -> str:
    """The digest of a local file or of a checkpoint's weights; any other value as it is.

    value: also a Python file with what is taken of it, as in rewards.py:mine.
    """
    path, function = value, ""
    if ".py:" in value:
        path, _, function = value.partition(":")
    if Path(path).is_file():
        return file_sha256(Path(path)) + function
    return weights_digest(path) if any(Path(path).glob("*.safetensors")) else value
