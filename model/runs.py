"""The folder of a run: made or found, locked, its checkpoints saved and resumed; and the signal that ends it early.

A checkpoint appears whole or not at all: it is written beside its place, flushed to the disk and renamed.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from errors import RunFailed, UserError
from model import parallel
from model.checkpoint import read_json, save_model, write_json


class RunFolder:
    """`runs/<name>/checkpoints/step-N/`: the model in Hugging Face form (with LoRA: merged, beside the `adapter/` that training goes on from)
    and `trainer/` (optimizer, stream, counters)."""

    def __init__(self, path, keep=2):
        self.path, self.keep = Path(path), keep
        self.lineage = None  # what the run's model was trained on (model/lineage.py), for its checkpoints
        self.checkpoints = self.path / "checkpoints"

    def steps(self):
        """Steps of the whole checkpoints, oldest first."""
        return sorted(int(p.name[5:]) for p in self.checkpoints.glob("step-*") if p.name[5:].isdigit())

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
            save_file(_optimizer_tensors(model, optimizer), draft / "trainer" / "optimizer.safetensors")
            write_json(draft / "trainer" / "state.json", state)
            for file in draft.rglob("*"):
                _flush(file)
            draft.rename(final)
            _flush(self.checkpoints)
        except (OSError, SafetensorError) as e:
            shutil.rmtree(draft, ignore_errors=True)
            kept = f"; the newest whole one is step {self.steps()[-1]}" if self.steps() else ""
            raise RunFailed(f"checkpoint {final} could not be written ({_reason(e)}){kept}") from None
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.step_folder(old), ignore_errors=True)
        return final

    def load(self, step, model, optimizer):
        """Restore the optimizer of a model built from `step_folder(step)`, or from its adapter; returns the state that was saved beside it."""
        folder = self.step_folder(step)
        try:
            with safe_open(folder / "trainer" / "optimizer.safetensors", framework="pt", device="cpu") as tensors:
                for name, p in ((name, p) for name, p in model.named_parameters() if p.requires_grad):
                    keys = [k for k in tensors.keys() if k.partition(".")[2] == name]
                    like = {"step": torch.float32}
                    optimizer.state[p] = {
                        (part := k.partition(".")[0]): tensors.get_tensor(k).to(p.device, like.get(part, p.dtype)) for k in keys
                    }
        except (SafetensorError, OSError) as e:
            raise UserError(f"{folder}/trainer/optimizer.safetensors: damaged or unreadable ({_reason(e)})") from None
        return read_json(folder / "trainer" / "state.json")


def _optimizer_tensors(model, optimizer):
    states = ((name, optimizer.state.get(p, {})) for name, p in model.named_parameters())
    return {f"{part}.{name}": value.detach().cpu().contiguous() for name, state in states for part, value in state.items()}


@contextlib.contextmanager
def open_run(runs, name, mode, resume, keep, config, rank):
    """Yields the run's folder, made or found, the same on every rank; and the step to continue from (None: the beginning).

    Rank 0 locks the folder meanwhile. config: the resolved knobs, in the folder from the start, so that a run killed at any
    moment can be resumed. A folder in which nothing was trained yet is as good as a new one.
    """
    with contextlib.ExitStack() as held:
        path = parallel.broadcast(_choose(runs, name, mode, resume, config, held) if rank == 0 else None)
        if isinstance(path, Exception):
            raise path
        folder = RunFolder(path, keep)
        saved = parallel.broadcast(folder.steps() if rank == 0 else None)
        yield folder, saved[-1] if resume and saved else None


def _choose(runs, name, mode, resume, config, held):
    """The path of the run, locked until `held` is closed; or what is wrong with it."""
    if name and ("/" in name or name.startswith(".")):
        return UserError(f"--name {name} must be a plain folder name")
    stamp = f"{mode}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = [name] if name else [stamp, *(f"{stamp}-{n}" for n in range(1, 1000))]
    for path in (Path(runs) / n for n in names):
        try:
            if resume and not path.exists():
                return UserError(f"--resume: there is no run {path}")
            if not resume:
                if _begun(path):
                    continue
                (path / "checkpoints").mkdir(parents=True, exist_ok=bool(name))  # a unique name: fails if another process was first
            lock = held.enter_context(open(path / ".lock", "w"))
            if not _lock(lock):
                return UserError(f"run {path} is in use by another process; wait for its end or choose another --name")
            if not resume:
                replace_file(path / "config.json", json.dumps(config, indent=2) + "\n")
            return path
        except FileExistsError:
            continue
        except OSError as e:
            return UserError(f"--runs {runs}: {path} cannot be made or opened ({e.strerror})")
        except RunFailed as e:
            return e
    return UserError(f"run {path} exists; continue it with --resume or choose another --name")


def _begun(path):
    """Whether a folder holds more than what a run has before it trains."""
    found = {p.name for pattern in ("*", "checkpoints/*") for p in path.glob(pattern)}
    return bool(found - {".lock", "config.json", "config.json.draft", "checkpoints"})


def _lock(file):
    """Whether this process now is the only one to hold the file's lock; closing the file, or dying, gives it back."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


def stored_config(runs, name):
    """The config.json of the run that is to be resumed. Raises UserError."""
    path = Path(runs) / name
    if not path.exists():
        raise UserError(f"--resume: there is no run {path}")
    if not (path / "config.json").is_file():
        raise UserError(f"--resume: {path} has no config.json to go on with; if nothing was trained there, begin again without --resume")
    return read_json(path / "config.json") | {"runs": str(runs)}  # it may have been moved


class StopSignal:
    """Inside `with`, SIGTERM is only noted: the loop acts upon it between steps, saves and leaves."""

    def __enter__(self):
        self.received = False
        self.before = signal.signal(signal.SIGTERM, self)
        return self

    def __call__(self, *_):
        self.received = True

    def __exit__(self, *_):
        signal.signal(signal.SIGTERM, self.before)


@contextlib.contextmanager
def only_one(path, rank):
    """Rank 0 holds a lock file that other processes wait for."""
    if rank:
        yield
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")
    except OSError as e:
        raise UserError(f"{path} cannot be made ({e.strerror})") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def replace_file(path, text):
    """Write a file that appears whole or not at all. Raises RunFailed if the disk refuses."""
    draft = path.with_name(path.name + ".draft")
    try:
        draft.write_text(text, encoding="utf-8")
        _flush(draft)
        draft.rename(path)
    except OSError as e:
        raise RunFailed(f"{path} could not be written ({e.strerror})") from None


def _flush(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _reason(error):
    return getattr(error, "strerror", None) or str(error).splitlines()[0]
