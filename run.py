"""A run's folder: found or made, locked, its checkpoints, its logs, what it was run on, and the signal that ends it early.

A checkpoint appears whole or not at all: it is written beside its place, flushed to the disk and renamed.
"""

import contextlib
import functools
import json
import os
import platform
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors import SafetensorError

from data.sandbox.confine import PR_PDEATHSIG, prctl
from errors import RunFailed, UserError, say
from files import flush, read_json, reason, replace_file, write_json
from locks import Busy, lock, waiting_for
from model import parallel
from model.checkpoint import open_tensors, save_model, save_tensors


class RunFolder:
    """`runs/<name>/checkpoints/step-N/`: the model in Hugging Face form (with LoRA: merged, beside the `adapter/` that training goes on from)
    and `trainer/` (optimizer, stream, counters)."""

    def __init__(self, path, keep=2):
        self.path, self.keep = Path(path), keep
        self.lineage = (
            None  # what the run's model was trained on (model/lineage.py), for its checkpoints
        )
        self.checkpoints = self.path / "checkpoints"

    def steps(self):
        """Steps of the whole checkpoints, oldest first."""
        return sorted(
            int(p.name[5:]) for p in self.checkpoints.glob("step-*") if p.name[5:].isdigit()
        )

    def step_folder(self, step):
        return self.checkpoints / f"step-{step}"

    def save(self, step, model, optimizer, tokenizer, stop_ids, state):
        """Write checkpoint `step` atomically, then drop all but the newest `keep`. Raises RunFailed if the disk refuses."""
        final, draft = self.step_folder(step), self.checkpoints / f".draft-{step}"
        if final.exists():
            return final
        try:
            for left_over in self.checkpoints.glob(".draft-*"):
                shutil.rmtree(left_over, ignore_errors=True)
            (draft / "trainer").mkdir(parents=True)
            save_model(model, draft, tokenizer, stop_ids)
            if self.lineage:
                self.lineage.save(draft)
            save_tensors(
                _optimizer_tensors(model, optimizer), draft / "trainer" / "optimizer.safetensors"
            )
            write_json(draft / "trainer" / "state.json", state)
            for file in draft.rglob("*"):
                flush(file)
            draft.rename(final)
            flush(self.checkpoints)
        except (OSError, SafetensorError) as e:
            shutil.rmtree(draft, ignore_errors=True)
            kept = f"; the newest whole one is step {self.steps()[-1]}" if self.steps() else ""
            raise RunFailed(
                f"checkpoint {final} could not be written ({reason(e)}){kept}"
            ) from None
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.step_folder(old), ignore_errors=True)
        return final

    def load(self, step, model, optimizer):
        """Restore the optimizer of a model built from `step_folder(step)`, or from its adapter; returns the state that was saved beside it."""
        folder = self.step_folder(step)
        with open_tensors(folder / "trainer" / "optimizer.safetensors") as tensors:
            for name, p in ((name, p) for name, p in model.named_parameters() if p.requires_grad):
                keys = [k for k in tensors.keys() if k.partition(".")[2] == name]
                like = {"step": torch.float32}
                optimizer.state[p] = {
                    (part := k.partition(".")[0]): tensors.get_tensor(k).to(
                        p.device, like.get(part, p.dtype)
                    )
                    for k in keys
                }
        return read_json(folder / "trainer" / "state.json")


def _optimizer_tensors(model, optimizer):
    states = ((name, optimizer.state.get(p, {})) for name, p in model.named_parameters())
    return {
        f"{part}.{name}": value.detach().cpu().contiguous()
        for name, state in states
        for part, value in state.items()
    }


@contextlib.contextmanager
def open_run(runs, name, mode, resume, keep, config, rank):
    """Yields the run's folder, made or found, the same on every rank; and the step to continue from (None: the beginning).

    Rank 0 locks the folder meanwhile. config: the resolved knobs, in the folder from the start, so that a run killed at any
    moment can be resumed. A folder in which nothing was trained yet is as good as a new one.
    """
    with contextlib.ExitStack() as held:
        choose = functools.partial(_choose, runs, name, mode, resume, config, held)
        folder = RunFolder(parallel.on_rank_0(rank, choose), keep)
        saved = parallel.on_rank_0(rank, folder.steps)
        yield folder, saved[-1] if resume and saved else None


def _choose(runs, name, mode, resume, config, held):
    """The path of the run, locked until `held` is closed. Raises UserError or RunFailed."""
    if name and ("/" in name or name.startswith(".")):
        raise UserError(f"--name {name} must be a plain folder name")
    stamp = f"{mode}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = [name] if name else [stamp, *(f"{stamp}-{n}" for n in range(1, 1000))]
    for path in (Path(runs) / n for n in names):
        try:
            if resume and not path.exists():
                raise UserError(f"--resume: there is no run {path}")
            if not resume:
                if _begun(path):
                    continue
                (path / "checkpoints").mkdir(
                    parents=True, exist_ok=bool(name)
                )  # a unique name: fails if another process was first
            with contextlib.ExitStack() as taken:
                taken.enter_context(lock(path / ".lock"))
                if not resume:
                    if _begun(path):  # another process had it, and is done
                        continue
                    replace_file(path / "config.json", json.dumps(config, indent=2) + "\n")
                held.push(taken.pop_all())
            return path
        except FileExistsError:
            continue
        except Busy as e:
            raise UserError(
                f"run {path} is in use by {e}; wait for its end or choose another --name"
            ) from None
        except OSError as e:
            raise UserError(
                f"--runs {runs}: {path} cannot be made or opened ({reason(e)})"
            ) from None
    raise UserError(f"run {path} exists; continue it with --resume or choose another --name")


def _begun(path):
    """Whether a folder holds more than what a run has before it trains."""
    found = {p.name for pattern in ("*", "checkpoints/*") for p in path.glob(pattern)}
    found = {name for name in found if not name.startswith(".lock")}
    return bool(found - {"config.json", "config.json.draft", "checkpoints"})


def stored_config(runs, name):
    """The config.json of the run that is to be resumed. Raises UserError."""
    path = Path(runs) / name
    if not path.exists():
        raise UserError(f"--resume: there is no run {path}")
    if not (path / "config.json").is_file():
        raise UserError(
            f"--resume: {path} has no config.json to go on with; if nothing was trained there, begin again without --resume"
        )
    return read_json(path / "config.json") | {"runs": str(runs)}  # it may have been moved


# Told to stop: by a user or a cluster (TERM), by a terminal that closes (HUP), by a scheduler before the time is up (Slurm's
# --signal sends USR1 or USR2 by habit, a processor limit XCPU).
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


@contextlib.contextmanager
def handled(handler, signals=STOP_SIGNALS):
    """Inside `with`, `handler` gets these signals; but for those that are ignored (HUP under nohup) or handled by no Python code.
    Only the main thread may have handlers: elsewhere (wandb.agent, Ray, notebooks) the signals do what they did."""
    before = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in signals:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class StopSignal:
    """Inside `with`, a signal to stop is only noted: the loop acts upon it between steps, saves and leaves."""

    def __enter__(self):
        self.received = ""  # the signal's name
        self.handlers = contextlib.ExitStack()
        self.handlers.enter_context(handled(self))
        return self

    def __call__(self, number, frame=None):
        self.received = signal.Signals(number).name

    def __exit__(self, *_):
        self.handlers.close()


def die_with_parent() -> None:
    """Run in a child process (`preexec_fn`): a killed parent takes it along."""
    prctl(PR_PDEATHSIG, signal.SIGKILL)


def interrupt(number, frame=None):
    """A handler that ends a command as Ctrl-C does: its `finally` clauses run, and `as_command` says how to go on."""
    raise KeyboardInterrupt(signal.Signals(number).name)


@contextlib.contextmanager
def only_one(path, rank, what):
    """Rank 0 holds a lock file that other processes wait for, its own other ranks with it. what: the thing that they wait for, in a
    line on the terminal. Raises UserError on every rank if the file cannot be made."""
    with contextlib.ExitStack() as held:

        def take():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as e:
                raise UserError(f"{path} cannot be made ({reason(e)})") from None
            held.enter_context(waiting_for(path, what))

        parallel.on_rank_0(rank, take)
        yield


class Log:
    """Written on rank 0 only. config: the resolved knobs, kept as config.json. resume_step: later lines are cut off (None: all).
    error: the RunFailed of the first line that could not be written, on rank 0, or None: the loop tells all ranks of it at its next step."""

    def __init__(self, folder, config, resume_step, rank):
        self.folder, self.rank, self.wandb, self.error = folder, rank, None, None
        parallel.on_rank_0(rank, functools.partial(self._open, folder, config, resume_step))

    def _open(self, folder, config, resume_step):
        for name in ("metrics.jsonl", "samples.jsonl"):
            cut_back(folder / name, -1 if resume_step is None else resume_step)
        replace_file(folder / "config.json", json.dumps(config, indent=2) + "\n")
        replace_file(folder / "environment.json", json.dumps(environment(), indent=2) + "\n")
        if config["wandb"] != "off":
            import wandb

            id_file = folder / "wandb_id"
            run_id = (
                id_file.read_text()
                if id_file.exists()
                else os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
            )
            replace_file(id_file, run_id)
            try:
                self.wandb = wandb.init(
                    project=config["wandb_project"],
                    name=folder.name,
                    id=run_id,
                    resume="allow",
                    mode=config["wandb"],
                    dir=str(folder),
                    config=config,
                )
            except Exception as e:  # not logged in, no network: wandb raises many kinds
                raise RunFailed(
                    f"wandb did not start ({str(e).splitlines()[0]}); use --wandb offline or off"
                ) from None

    def metrics(self, step, values):
        if self.rank:
            return
        self._append("metrics.jsonl", json.dumps({"step": step} | values) + "\n")
        if self.wandb:
            self.wandb.log(values, step=step)

    def samples(self, step, samples):
        lines = "".join(json.dumps({"step": step} | s, ensure_ascii=False) + "\n" for s in samples)
        if not self.rank and lines:
            self._append("samples.jsonl", lines)

    def _append(self, name, text):
        try:
            append(self.folder / name, text)
        except RunFailed as e:
            self.error = self.error or e

    def evaluation(self, step, steps, metrics, samples):
        self.metrics(step, metrics)
        self.samples(step, samples)
        self.say(
            f"step {step}/{steps}  "
            + "  ".join(
                f"{k.split('/')[-1]} {v:.4g}" for k, v in metrics.items() if k.count("/") == 2
            )
        )

    def say(self, text):
        if not self.rank:
            say(text)

    def progress(self, step, steps, values, left):
        shown = {"loss": float("nan")} | {k.removeprefix("train/"): v for k, v in values.items()}
        parts = [
            f"step {step:>{len(str(steps))}}/{steps}",
            f"loss {shown['loss']:.4f}",
            f"|g| {shown['grad_norm']:.2f}",
        ]
        parts += [f"reward {shown['rollout/reward']:.3f}"] if "rollout/reward" in shown else []
        parts += [f"lr {shown['lr']:.1e}", f"{shown['tokens_per_second']:,.0f} tok/s"]
        parts += [f"mfu {shown['mfu']:.1%}"] if "mfu" in shown else []
        parts += [f"skipped {shown['skipped']}"] if shown["skipped"] else []
        parts += [f"no gradient {shown['no_gradient']}"] if shown["no_gradient"] else []
        self.say("  ".join([*parts, f"{duration(left)} left"]))

    def close(self):
        if self.wandb:
            self.wandb.finish()


def duration(seconds):
    """As in 0m32s, 59m59s, 2h00m00s. Rounded first: 59.7 seconds are a minute."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m{seconds:02}s" if hours else f"{minutes}m{seconds:02}s"


def append(path, text):
    try:
        with open(path, "a", encoding="utf-8") as f:
            f.write(text)
    except OSError as e:
        raise RunFailed(f"{path} could not be written ({e.strerror})") from None


def cut_back(path, step):
    """Drop the lines of later steps, and a line that was cut off while written."""
    if path.exists():
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").split(
            "\n"
        ):  # texts hold other line separators raw
            try:
                if json.loads(line)["step"] > step:
                    break
            except (ValueError, KeyError, TypeError):
                break
            kept.append(line + "\n")
        replace_file(path, "".join(kept))


def environment():
    """Versions, git commit, device and command of this process."""
    import torch

    from model import parallel

    def git(*args):
        try:
            result = subprocess.run(
                ["git", *args],
                cwd=Path(__file__).parent,
                capture_output=True,
                text=True,
                check=False,
            )
        except OSError:  # no git on this machine
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    def installed(package):
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    changes = git("status", "--porcelain")
    return {
        "command": sys.argv,
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": None if changes is None else bool(changes),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "ranks": parallel.place().world,
        "python": platform.python_version(),
        "packages": {
            p: installed(p)
            for p in (
                "torch",
                "triton",
                "safetensors",
                "tokenizers",
                "numpy",
                "math-verify",
                "wandb",
            )
        },
    }


def read_metrics(run):
    """metrics.jsonl as a list of dicts; [] if there is none."""
    path = Path(run) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_of(checkpoint):
    """The folder of the run that saved this checkpoint, <run>/checkpoints/step-N, or the adapter in it; None for any other folder."""
    path = Path(checkpoint).resolve()
    path = path.parent if path.name == "adapter" else path
    return (
        path.parents[1]
        if path.parent.name == "checkpoints" and re.fullmatch(r"step-\d+", path.name)
        else None
    )
