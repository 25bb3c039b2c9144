"""The folder of a run: made or found, locked, its checkpoints saved and resumed.

A checkpoint appears whole or not at all: it is written beside its place, flushed to the disk and renamed.
"""

import contextlib
import fcntl
import os
import shutil
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from errors import RunFailed, UserError
from model import parallel
from model.checkpoint import read_json, save_model, write_json


class RunFolder:
    """`runs/<name>/checkpoints/step-N/`: the model in Hugging Face form beside `trainer/` (optimizer, stream, counters)."""

    def __init__(self, path, keep=2):
        self.path, self.keep = Path(path), keep
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
        """Restore the optimizer of a model built from `step_folder(step)`; returns the state that was saved beside it."""
        folder = self.step_folder(step)
        try:
            with safe_open(folder / "trainer" / "optimizer.safetensors", framework="pt", device="cpu") as tensors:
                for name, p in model.named_parameters():
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


def open_run(runs, name, mode, resume, keep, rank):
    """The run's folder, made or found, the same on every rank; and the step to continue from (None: a new run)."""

    def choose():
        if name and ("/" in name or name.startswith(".")):
            return UserError(f"--name {name} must be a plain folder name")
        stamp = f"{mode}-{time.strftime('%Y%m%d-%H%M%S')}"
        names = [name] if name else [stamp, *(f"{stamp}-{n}" for n in range(1, 1000))]
        for path in (Path(runs) / n for n in names):
            if resume:
                return path if path.exists() else UserError(f"--resume: there is no run {path}")
            try:
                (path / "checkpoints").mkdir(parents=True)  # fails if another process was first
                return path
            except FileExistsError:
                continue
            except OSError as e:
                return UserError(f"--runs {runs}: {path} cannot be made ({e.strerror})")
        return UserError(f"run {path} exists; continue it with --resume or choose another --name")

    path = parallel.broadcast(choose() if rank == 0 else None)
    if isinstance(path, UserError):
        raise path
    folder = RunFolder(path, keep)
    saved = parallel.broadcast(folder.steps() if rank == 0 else None)
    return folder, saved[-1] if resume and saved else None


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


def _flush(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _reason(error):
    return getattr(error, "strerror", None) or str(error).splitlines()[0]
