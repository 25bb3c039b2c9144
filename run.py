"""A run's folder, its checkpoints and logs, and the signals that end it early.

A checkpoint is complete or not there at all: it is written beside its place, flushed to the disk
and renamed.
"""

import functools
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from digests import SUMS, seal, verify
from errors import Halted, RunFailed, UserError, say, system_error
from files import (
    Json,
    check_is_folder,
    flush,
    is_there,
    made,
    read_json,
    reason,
    replace_file,
    resolved,
    write_json,
)
from locks import Busy, lock, unused
from model import parallel
from model.checkpoint import open_tensors, save_tensors
from model.lineage import Lineage
from model.sharding import fill, is_sharded, load_shards, local, save_shards
from model.state import check_names, check_tensors, check_values, read_state, updates
from model.transformer import Transformer
from progress import duration
from signals import handled
from tracking import Tracker

LOGS = ("metrics.jsonl", "samples.jsonl")
STEP = re.compile(r"step-(0|[1-9][0-9]*)")  # a checkpoint's folder


class RunFolder:
    """`runs/<name>/` with its `checkpoints/step-N/`.

    A checkpoint is the model in Hugging Face form (with LoRA: merged, beside the `adapter/` that
    training continues from) and `trainer/` (optimizer, data stream, counters).
    """

    def __init__(self, path: str | Path, max_checkpoints: int = 2):
        self.path, self.max_checkpoints = Path(path), max_checkpoints
        self.checkpoints = self.path / "checkpoints"
        self.best: int | None = None  # the step of a checkpoint that is never removed

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, oldest first.

        Raises UserError where one is to be found and something else than a folder is there.
        """
        steps = []
        check_is_folder(self.checkpoints)
        for name in os.listdir(self.checkpoints) if self.checkpoints.is_dir() else ():
            if STEP.fullmatch(name):
                check_is_folder(self.checkpoints / name)
                steps.append(int(name[5:]))
        return sorted(steps)

    def step_folder(self, step: int) -> Path:
        return self.checkpoints / f"step-{step}"

    def save(
        self,
        step: int,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        write_model: Callable[[Path], None],
        state: Json,
        lineage: Lineage | None = None,
        average: Transformer | None = None,
    ) -> None:
        """Write checkpoint `step`, then remove all but the newest `max_checkpoints`.

        Called on all ranks. Rank 0 writes; the optimizer's state of a sharded model is written by
        all, each its shards.

        Args:
            write_model: Writes the model, as others load it, into a folder.
            state: What `load` returns, as JSON.
            lineage: What the model was trained on.
            average: The moving average of its trained weights.

        Raises:
            RunFailed: The files could not be written.
        """
        final, draft = self.step_folder(step), self.checkpoints / f".draft-{step}"
        tensors = _trainer_tensors(model, optimizer, average)

        def write() -> bool:
            if final.exists():
                return False
            self.tidy()
            (draft / "trainer" / "optimizer").mkdir(parents=True)
            write_model(draft)
            if lineage:
                lineage.save(draft)
            if not is_sharded(model):
                (draft / "trainer" / "optimizer").rmdir()
                held = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
                save_tensors(held, draft / "trainer" / "optimizer.safetensors")
            write_json(draft / "trainer" / "state.json", state)
            return True

        def finish() -> None:
            seal(draft)
            logs = [self.path / name for name in LOGS if (self.path / name).exists()]
            for file in (*logs, *draft.rglob("*")):
                flush(file)
            draft.rename(final)
            flush(self.checkpoints)
            self.tidy()

        def reported(call: Callable[[], Any]) -> Any:
            try:
                return call()
            except (OSError, SafetensorError) as e:
                shutil.rmtree(draft, ignore_errors=True)
                failed = f"checkpoint {final} could not be written ({reason(e)})"
                if self.steps():
                    failed += f"; the last complete one is step {self.steps()[-1]}"
                raise RunFailed(failed) from None

        rank = parallel.rank()
        if parallel.on_rank_0(rank, functools.partial(reported, write)):
            if is_sharded(model):
                reported(functools.partial(save_shards, tensors, draft / "trainer" / "optimizer"))
            parallel.on_rank_0(rank, functools.partial(reported, finish))

    def tidy(self) -> None:
        """Remove what a kill left, and all checkpoints but the best and the newest ones."""
        for left_over in self.checkpoints.glob(".draft-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        for old in self.steps()[: -self.max_checkpoints]:
            if old != self.best:
                self._remove(self.step_folder(old))

    def _remove(self, folder: Path) -> None:
        """Remove a checkpoint that nobody reads; one that is read stays until the next save.

        Renamed first: what a kill leaves of it does not count as a checkpoint.
        """
        with unused(folder / "config.json") as is_free:
            if is_free:
                left = self.checkpoints / f".draft-old-{folder.name}"
                with suppress(OSError):
                    folder.rename(left)
                shutil.rmtree(left, ignore_errors=True)

    def drop_trainer(self) -> None:
        """Remove the optimizer's states of a run that is complete: two thirds of its bytes."""
        for folder in self.checkpoints.glob("step-*/trainer"):
            shutil.rmtree(folder, ignore_errors=True)

    def check(self, step: int) -> None:
        """Raise UserError if a file of checkpoint `step` is not what was written."""
        folder = self.step_folder(step)
        try:
            for sums in sorted(folder.rglob(SUMS)):
                verify(sums.parent)
        except UserError as e:
            raise UserError(
                f"--resume: {e}; without {folder} the run goes on from the checkpoint before"
            ) from None

    def load(
        self,
        step: int,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        average: Transformer | None = None,
    ) -> Json:
        """Restore the optimizer and the average of a model with the weights of checkpoint `step`.

        Either may be in shards now and not then, or in other ones.

        Returns:
            The state that was saved with it.
        """
        folder = self.step_folder(step) / "trainer"
        state = read_state(folder / "state.json", step)
        count, file = updates(state["counters"], step), folder / "optimizer.safetensors"
        is_averaged = average is not None
        own = _trainer_tensors(model, optimizer, average or model)

        def place(key: str) -> torch.Tensor | None:
            """What a stored tensor is copied into, if it is wanted."""
            return own.get(key) if is_averaged or not key.startswith("average.") else None

        if (folder / "optimizer").is_dir():
            shards = folder / "optimizer"
            about = {"file": shards, "own": own, "updates": count, "averaged": is_averaged}
            read, error = load_shards(shards, functools.partial(check_names, **about), place), None
            try:
                for key, value in read.items():
                    if local(value).numel():
                        check_values(local(value), shards, key, count)
            except UserError as e:  # of this rank's rows
                error = e
            parallel.raise_on_all(error)
        else:
            with open_tensors(file) as tensors:
                check_tensors(tensors, file, own, count, is_averaged)
                for key in tensors.keys():
                    value = tensors.get_tensor(key)
                    check_values(value, file, key, count)
                    found = place(key)
                    if found is not None:
                        fill(found, value)
        return state


def _trainer_tensors(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, average: torch.nn.Module | None
) -> dict[str, torch.Tensor]:
    """{"part.parameter": what the optimizer keeps of it, or its moving average}."""
    tensors = {}
    for name, parameter in model.named_parameters():
        parts = dict(optimizer.state.get(parameter, {}))
        if average and parameter.requires_grad:
            parts["average"] = average.get_parameter(name)
        tensors |= {f"{part}.{name}": value for part, value in parts.items()}
    return tensors


# --- the folder of a run -------------------------------------------------------------------------
@contextmanager
def open_run(
    runs: str | Path,
    name: str,
    mode: str,
    resume: bool | Literal["auto"],
    max_checkpoints: int,
    config: Json,
    rank: int,
) -> Iterator[tuple[RunFolder, int | None]]:
    """Find or make a run's folder, the same on every rank, locked by rank 0 inside `with`.

    A folder in which nothing was trained yet is as good as a new one. It has the resolved options
    from the start, so that a run which is killed at any moment can be resumed. resume "auto":
    resume the run if there is one, else begin it.

    Yields:
        The folder, and the step to continue from (None: the beginning).
    """
    stamp = f"{mode}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = [name]
    if not name:
        names = [stamp, *(f"{stamp}-{n}" for n in range(1, 1000))]

    with ExitStack() as stack:

        def claim_first() -> Path:
            for candidate in names:
                path = Path(runs) / candidate
                try:
                    stack.enter_context(_claim(path, resume, len(names) > 1, config))
                    return path
                except FileExistsError:
                    continue
                except Busy as e:
                    raise UserError(
                        f"run {path} is in use by {e}; wait for its end or choose another --name"
                    ) from None
                except OSError as e:
                    raise UserError(
                        f"--runs {runs}: {e.filename or path} cannot be made or opened "
                        f"({reason(e)})"
                    ) from None
            taken = Path(runs) / names[-1]
            raise UserError(
                f"run {taken} exists; continue it with --resume or choose another --name"
            )

        folder = RunFolder(parallel.on_rank_0(rank, claim_first), max_checkpoints)
        saved = parallel.on_rank_0(rank, folder.steps)
        yield folder, saved[-1] if resume and saved else None


@contextmanager
def _claim(
    path: Path, resume: bool | Literal["auto"], unique: bool, config: Json
) -> Iterator[None]:
    """Lock a run's folder inside `with`, and make it unless it is resumed.

    unique: the name was made up, so that a folder which is there is another run's.
    Raises FileExistsError if another run has it, Busy if one is using it.
    """
    if resume == "auto":
        resume = os.path.lexists(path / "config.json")
    if not resume:
        if has_output(path):
            raise FileExistsError
    with made(path.parent):
        if not resume:
            (path / "checkpoints").mkdir(parents=True, exist_ok=not unique)
        with lock(path / ".lock"):
            if not resume:
                if has_output(path):  # of a process that had the lock meanwhile
                    raise FileExistsError
                replace_file(path / "config.json", json.dumps(config, indent=2) + "\n")
            try:
                yield
            except Exception:
                if not resume and not has_output(path, "environment.json", "sittings.jsonl"):
                    shutil.rmtree(path)  # nothing goes on from there
                raise


def has_output(path: Path, *more: str) -> bool:
    """Return whether a folder holds more than what a run has before it trains, and `more`."""
    found = {p.name for p in (*path.glob("*"), *path.glob("checkpoints/*"))}
    found -= {"config.json", "checkpoints", *more}
    return not all(name.startswith((".lock", "config.json.")) for name in found)


def stored_config(runs: str, name: str, optional: bool = False) -> Json:
    """Read the config.json of a run that is to be resumed.

    optional: return {} where there is none. Raises UserError.
    """
    path = Path(runs) / name
    has_config = os.path.lexists(path / "config.json")
    if optional and not has_config:
        return {}
    if not path.exists():
        raise UserError(f"--resume: there is no run {path}")
    if not has_config:
        raise UserError(
            f"--resume: {path} has no config.json to go on with; if nothing was trained there, "
            "begin again without --resume"
        )
    return read_json(path / "config.json") | {"runs": runs}  # it may have been moved


def run_of(checkpoint: str | Path) -> Path | None:
    """Return the run that saved <run>/checkpoints/step-N, or the adapter in it; otherwise None."""
    path = resolved(checkpoint)
    if path.name == "adapter":
        path = path.parent
    if path.parent.name == "checkpoints" and STEP.fullmatch(path.name):
        return path.parents[1]
    return None


def newest_checkpoint(name: str, option: str) -> str:
    """The newest checkpoint of a run's folder; any other name of a model as it is."""
    run = RunFolder(name)
    steps = run.steps()
    if steps:
        return str(run.step_folder(steps[-1]))
    if run.checkpoints.is_dir():
        raise UserError(f"{option} {name}: this run has no checkpoint yet")
    return name


def refuse_fewer(steps: int, resume_step: int | None, path: Path) -> None:
    """Raise UserError if a run has gone further than it is to go."""
    if resume_step and resume_step > steps:
        raise UserError(
            f"run {path} is at step {resume_step} already, and was told to end at step {steps}; "
            "raise --steps (or --epochs), or begin a new run with the checkpoint as --model"
        )


def resume_command(runs: str, name: str) -> str:
    """The command line that continues a run, started as this process was."""
    here = parallel.place()
    words = ["python"]
    if here.world > 1:
        words = ["torchrun", "--standalone", f"--nproc_per_node={here.local_world}"]
    words.append(sys.argv[0] if sys.argv[0].endswith("train.py") else "train.py")
    if runs != "runs":
        words += ["--runs", runs]
    return shlex.join([*words, "--name", name, "--resume"])


# --- signals -------------------------------------------------------------------------------------
class StopSignal:
    """Notes a signal to stop inside `with`; the loop saves and leaves between two steps.

    What takes long is left between its parts, too, at which it asks `halt`. A second Ctrl-C is a
    KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.received = ""  # the signal's name

    def halt(self) -> None:
        """Raise Halted if a signal came."""
        if self.received:
            raise Halted(self.received)

    def __enter__(self) -> "StopSignal":
        self.handlers = handled(self)
        self.handlers.__enter__()
        return self

    def __call__(self, number: int, frame: Any = None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT:
            if self.received == name:
                raise KeyboardInterrupt(name)
            if parallel.speaks():
                with suppress(OSError):  # print may be what was interrupted
                    os.write(1, b"\nstopping; Ctrl-C again leaves at once\n")
        self.received = name

    def __exit__(self, *exception: Any) -> None:
        self.handlers.__exit__(*exception)


# --- logs ----------------------------------------------------------------------------------------
class RunLogger:
    """Writes metrics.jsonl, samples.jsonl, Weights & Biases and the terminal, on rank 0 only.

    config: the resolved options. resume_step: lines of later steps are removed; None: there is no
    checkpoint, and lines of an earlier sitting are kept in a file of their own. about: what
    sittings.jsonl says of this sitting, beside the options and the environment.
    before: the line of the sitting before, or None. evaluated: what an evaluation of the checkpoint
    that is continued has measured; empty if the run was stopped before.
    error: the RunFailed of the first line that could not be written, on rank 0, or None: the
    loop raises it on all ranks at its next step.
    """

    def __init__(self, folder: Path, config: Json, resume_step: int | None, rank: int, about: Json):
        self.folder, self.rank = folder, rank
        self.tracker: Tracker | None = None
        self.error: RunFailed | None = None
        self.said = time.monotonic()  # when a line was printed last
        self.note = ""  # in every progress line
        begin = functools.partial(self._open, config, resume_step, about)
        self.before, self.evaluated = parallel.on_rank_0(rank, begin)

    def _open(
        self, config: Json, resume_step: int | None, about: Json
    ) -> tuple[Json | None, dict[str, float]]:
        for name in LOGS:
            cut_back(self.folder / name, resume_step)
        now = environment()
        before = self._record_sitting({"step": resume_step or 0, "options": config} | about | now)
        for name, value in (("config.json", config), ("environment.json", now)):
            replace_file(self.folder / name, json.dumps(value, indent=2) + "\n")
        lines = read_metrics(self.folder)
        self.tracker = Tracker(self.folder, config, about | {"environment": now}, lines)
        evaluated = {}
        for line in lines:
            if line.get("step") == resume_step and any(name.startswith("eval/") for name in line):
                evaluated = line
        return before, evaluated

    def _record_sitting(self, sitting: Json) -> Json | None:
        """Add a line to sittings.jsonl, and say what is not as it was in the one before."""
        path = self.folder / "sittings.jsonl"
        earlier = read_lines(path)
        lines = [json.dumps(line) + "\n" for line in (*earlier, sitting)]
        replace_file(path, "".join(lines))
        if not earlier:
            return None
        before = earlier[-1]
        changes = _changes(before.get("options", {}), sitting["options"])
        for name in ELSEWHERE:
            changes += _changes({name: before.get(name)}, {name: sitting.get(name)})
        if changes:
            self.say(f"other than in the sitting before: {', '.join(changes)}")
        return before

    def metrics(self, step: int, values: Json) -> None:
        if self.rank:
            return
        numbers = {name: v if math.isfinite(v) else None for name, v in values.items()}
        self._append("metrics.jsonl", json.dumps({"step": step} | numbers) + "\n")
        if self.tracker:
            self.tracker.metrics(step, values)

    def samples(self, step: int, samples: Sequence[Json], evaluated: bool = False) -> None:
        """Log samples of a rollout, or the answers of an evaluation, after `step`."""
        lines = [json.dumps({"step": step} | s, ensure_ascii=False) + "\n" for s in samples]
        if lines and not self.rank:
            self._append("samples.jsonl", "".join(lines))
        if self.tracker:
            self.tracker.samples(step, samples, evaluated)

    def _append(self, name: str, text: str) -> None:
        try:
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.write(text)
        except OSError as e:
            error = RunFailed(f"{self.folder / name} could not be written ({e.strerror})")
            self.error = self.error or error

    def evaluation(
        self, step: int, steps: int, metrics: dict[str, float], samples: Sequence[Json]
    ) -> None:
        """Log an evaluation after `step` of `steps`."""
        self.metrics(step, metrics)
        self.samples(step, samples, evaluated=True)
        shown = [f"{k.split('/')[-1]} {v:.4g}" for k, v in metrics.items() if k.count("/") == 2]
        self.say("  ".join([f"step {step}/{steps}  held out:", *shown]))

    def progress(self, step: int, steps: int, values: Json, seconds_left: float) -> None:
        """Print a progress line from the metrics of `step`."""
        parts = [
            f"step {step:>{len(str(steps))}}/{steps}",
            f"loss {values.get('train/loss', float('nan')):.4f}",
            f"|g| {values['train/grad_norm']:.2f}",
        ]
        if "rollout/reward" in values:
            parts.append(f"reward {values['rollout/reward']:.3f}")
        if self.note:
            parts.append(self.note)
        parts.append(f"lr {values['train/lr']:.1e}")
        parts.append(f"{values['train/tokens_per_second']:,.0f} tok/s")
        if "train/mfu" in values:
            parts.append(f"mfu {values['train/mfu']:.1%}")
        if values["train/skipped"]:
            parts.append(f"skipped {values['train/skipped']}")
        if not values["train/grad_norm"] and values.get("rollout/spread") == 0:
            parts.append("NOTHING TO LEARN: no group's rewards differ")
        if values["train/no_gradient"]:
            parts.append(f"no gradient {values['train/no_gradient']}")
        self.say("  ".join([*parts, f"{duration(seconds_left)} left"]))

    def say(self, text: str) -> None:
        self.said = time.monotonic()
        if not self.rank:
            say(text)

    def close(self, table: Sequence[Sequence[str]] = ()) -> None:
        """The run is over. table: of what it came to, if it is complete."""
        if self.tracker:
            self.tracker.finish(table)


def due(step: int, every: int, last: int) -> bool:
    """Before the first step, every `every` steps, and after the last."""
    return step in (0, last) or (every > 0 and step % every == 0)


def still_due(step: int, every: int, last: int) -> int:
    """How many of the steps from this one on are `due`."""
    if not every:
        return 1
    return last // every - (step - 1) // every + (last % every > 0)


class Clock:
    """Measures what a run's steps, evaluations and checkpoints take, to say when it will end."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = {}  # what -> seconds of each

    @contextmanager
    def measure(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.spent.setdefault(what, []).append(time.perf_counter() - began)

    def left(self, **remaining: int) -> float:
        """Seconds for so many more of each; what was never measured is not counted."""
        seconds = 0.0
        for what, count in remaining.items():
            measured = self.spent.get(what, [0.0])
            seconds += count * sum(measured) / len(measured)
        return seconds


def cut_back(path: Path, step: int | None) -> None:
    """Remove the lines of later steps, and a line that was cut off while it was written.

    A damaged line stays where it is, and is passed over by those who read. step None: the run
    begins again, and all its lines are kept in another file.
    """
    try:
        if not is_there(path) or not path.stat().st_size:
            return
        if step is None:
            names = (path.with_suffix(f".before-{n}.jsonl") for n in itertools.count(1))
            kept = next(name for name in names if not name.exists())
            path.rename(kept)
            say(f"no checkpoint to go on from: step 0 again; {path} so far is kept as {kept.name}")
            return
        end = position = damaged = 0
        is_later = False
        for line in path.read_bytes().splitlines(keepends=True):
            position += len(line)
            found = _json_object(line).get("step")
            if isinstance(found, int):
                is_later = found > step
            elif line.endswith(b"\n") and not is_later:
                damaged += 1
            else:
                continue
            if not is_later:
                end = position
        if damaged:
            say(f"{path}: {damaged} damaged lines are kept, and passed over")
        os.truncate(path, end)
    except OSError as e:
        raise system_error(e, f"{path} could not be cut back") from None


def _json_object(line: bytes) -> Json:
    """A line of a log without what is null; {} if it is damaged."""
    try:
        return {name: v for name, v in json.loads(line).items() if v is not None}
    except (ValueError, AttributeError):
        return {}


def read_lines(path: Path) -> list[Json]:
    """The objects of a JSON Lines file of ours; [] if there is none."""
    lines = path.read_bytes().splitlines() if is_there(path) else []
    return [value for value in map(_json_object, lines) if value]


def read_metrics(run: str | Path) -> list[Json]:
    """Read a run's metrics.jsonl, without what was no number; [] if there is none."""
    return read_lines(Path(run) / "metrics.jsonl")


ELSEWHERE = ("git_commit", "device", "ranks", "host", "plugins")  # what is worth a word, too


def _changes(old: Json, new: Json) -> list[str]:
    """What was and is different, as in "lr 0.1 -> 0.2"."""
    changes = []
    for name, value in old.items():
        if name != "runs" and value != new.get(name):
            changes.append(f"{name} {value} -> {new.get(name, 'not read')}")
    return changes


PACKAGES = ("torch", "triton", "safetensors", "tokenizers", "numpy", "math-verify", "wandb")


def environment() -> Json:
    """Return versions, git commit, device and command of this process."""
    packages: Json = dict.fromkeys(PACKAGES)
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            packages[package] = version(package)
    changes = _git("status", "--porcelain")
    device = platform.processor() or platform.machine()
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return {
        "command": sys.argv,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": platform.node(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if changes is None else bool(changes),
        "device": device,
        "threads": torch.get_num_threads(),
        "ranks": parallel.place().world,
        "python": platform.python_version(),
        "packages": packages,
    }


def _git(*arguments: str) -> str | None:
    """Return what git says about the folder of this file, or None."""
    command = ["git", "-C", Path(__file__).parent, *arguments]
    with suppress(OSError, subprocess.CalledProcessError):  # no git, no repository
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
