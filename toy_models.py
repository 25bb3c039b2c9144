"""The toy task's own models: a teacher, and a student that was distilled from it.

The defaults of `train.py` need no download: the teacher of `--mode kd` and the student that
`--mode grpo` starts from are trained on first use, by the command that a user would type, in a
process of its own, and are kept beside the user's runs.
"""

import contextlib
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import options
from config import Config
from data.sandbox.confine import PR_PDEATHSIG, prctl
from data.tasks import TASKS
from data.tokenizer import Tokenizer, build_tiny
from errors import RunFailed, UserError, say
from files import read_json, reason, without
from locks import sweep, waiting_for
from model import parallel, places
from run import RunFolder, StopSignal

ROOT = Path(__file__).resolve().parent

TEACHER = {
    "mode": "sft",
    "model": "tiny-teacher",
    "data": "word_problems",
    "steps": 350,
    "batch_size": 64,
    "eval_every": 0,
    "save_every": 200,
    "max_checkpoints": 1,
}
STUDENT = {"mode": "kd"}

# Files that decide what such a model learns: another version of them needs another model.
SOURCES = ("data/toy.py", "data/tasks.py", "data/tokenizer.py", "model/transformer.py")

# Options that change nothing of what a run learns.
NEUTRAL = ("name", "runs", "resume", "device", "kernels", "save", "max_checkpoints", "log_every")
NEUTRAL += ("wandb", "wandb_project", "wandb_group", "wandb_tags", "dry_run", "threads")


@functools.cache
def toy_tokenizer() -> Tokenizer:
    """The tokenizer of the toy models: byte-pair merges of 2,000 of the toy task's problems."""
    texts = []
    for number in range(2000):
        example = TASKS["word_problems"].example("word_problems", "train", f"tokenizer/{number}")
        texts.append("\n".join(m["role"] + "\n" + m["content"] for m in example.messages))
    return build_tiny(texts)


def toy_model(kind: str, recipe: Mapping[str, Any], runs: str, device: str, rank: int) -> Path:
    """The checkpoint folder of a toy model; it is trained first where there is none yet.

    Every rank calls this. Rank 0 trains, in one process whatever the number of ranks, so that the
    model does not depend on it.

    Args:
        kind: "teacher" or "student", for messages and the run's name.
        recipe: The options that it is trained with; `TEACHER` or `STUDENT`.
        runs: The folder of runs that it is looked for and kept in.
        device: The value of `--device`.

    Raises:
        RunFailed: The training was stopped or failed; the same command goes on with it.
    """
    find = partial(_find_or_train, kind, recipe, runs, device)
    # A signal to stop reaches all ranks: rank 0 passes it on to what trains, others wait for it.
    with StopSignal() if rank else contextlib.nullcontext():
        path = parallel.on_rank_0(rank, find)
    if rank == 0:
        say(f"the toy {kind}: {path}")
    return path


def _find_or_train(kind: str, recipe: Mapping[str, Any], runs: str, device: str) -> Path:
    cfg = Config(**options.with_defaults(Config, dict(recipe)))
    found = finished_run(runs, cfg)
    folder = RunFolder(Path(runs) / f"{kind}-{_fingerprint(cfg)}")
    if found is not None:
        sweep(folder.path.with_suffix(".lock"))
        return found
    stopped_by = ""
    try:
        folder.path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{folder.path.parent} cannot be made ({reason(e)})") from None
    # The runs of a sweep may all be the first: one trains, the others wait.
    with waiting_for(folder.path.with_suffix(".lock"), f"the toy {kind}"):
        if cfg.steps not in folder.steps():
            say(f"training the toy {kind} first (once; kept in {folder.path})")
            stopped_by = _train(recipe, folder, device)
    if cfg.steps not in folder.steps():
        raise RunFailed(
            f"stopped before the toy {kind} was ready; the same command goes on with it"
        )
    if stopped_by:
        raise RunFailed(
            f"stopped by {stopped_by}, the toy {kind} is ready; the same command goes on"
        )
    return folder.step_folder(cfg.steps)


def _train(recipe: Mapping[str, Any], folder: RunFolder, device: str) -> str:
    """`python train.py …` until it ends. A signal to stop is passed on: the model is saved.

    Returns the signal's name, or "".
    """
    command = [sys.executable, str(ROOT / "train.py")]
    command += [f"--{name}={value}" for name, value in recipe.items()]
    command += [f"--runs={folder.path.parent}", f"--name={folder.path.name}", f"--device={device}"]
    if (folder.path / "config.json").exists():
        command.append("--resume")
    environment = {k: v for k, v in os.environ.items() if k not in places.VARIABLES}
    with StopSignal() as stop:
        # In a session of its own: Ctrl-C reaches it through this process alone, once.
        child = subprocess.Popen(
            command, env=environment, preexec_fn=die_with_parent, start_new_session=True
        )
        passed_on = False
        while True:
            try:
                code = child.wait(timeout=0.1)
                break
            except subprocess.TimeoutExpired:
                if stop.received and not passed_on:
                    child.send_signal(signal.SIGTERM)
                    passed_on = True
    if code and not stop.received:
        raise RunFailed(f"{' '.join(command[1:])} ended with exit code {code}")
    return stop.received


def die_with_parent() -> None:
    """Called in the child before it starts: a parent that is killed takes it along."""
    with contextlib.suppress(OSError, AttributeError):  # a system that is no Linux has no prctl
        prctl(PR_PDEATHSIG, signal.SIGKILL)


def finished_run(runs: str, cfg: Config) -> Path | None:
    """The last checkpoint of a run that did just what `cfg` asks for, with the toy tokenizer.

    So `make grpo` goes on from what `make kd` left. None where there is no such run.
    """
    wanted = options.resolved(cfg, NEUTRAL)
    tokenizer = toy_tokenizer().files["tokenizer.json"]
    for path in sorted(Path(runs).glob("*/config.json")):
        try:
            stored = without(read_json(path), NEUTRAL)
            checkpoint = RunFolder(path.parent).step_folder(cfg.steps)
            if stored == wanted and (checkpoint / "tokenizer.json").read_bytes() == tokenizer:
                return checkpoint
        except (OSError, UserError):
            continue  # the folder of another run, or one that is being written
    return None


def _fingerprint(cfg: Config) -> str:
    """Eight hexadecimal digits of the settings and of the code that defines task and model."""
    digest = hashlib.sha256(json.dumps(options.resolved(cfg, NEUTRAL)).encode())
    for source in SOURCES:
        digest.update((ROOT / source).read_bytes())
    return digest.hexdigest()[:8]
