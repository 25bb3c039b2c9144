"""A run in Weights & Biases, beside its own files.

What fails there is said once and ends no run: the files in the run's folder have all of it.
"""

import contextlib
import json
import os
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from errors import UserError, say
from files import Json, decode_text, is_there, read_head, reason, replace_file

SHOWN = 32  # samples of a table
TOKENS = "train/tokens"  # the axis of evaluations: runs of other modes are comparable over it


def check(mode: str) -> None:
    """Raise UserError if `--wandb mode` asks for a package that is not there."""
    if mode != "off" and find_spec("wandb") is None:
        raise UserError(f"--wandb {mode}: the package is missing; pip install wandb, or leave out")


class Tracker:
    """One run of Weights & Biases; without effect where --wandb is off, or once it has failed.

    folder: of the run; it keeps the id, under which a resumed run goes on.
    config: the options. about: what else describes the run (environment, sizes, weights).
    lines: of metrics.jsonl so far, of which the best evaluation is known.
    """

    def __init__(self, folder: Path, config: Json, about: dict, lines: Sequence[dict]):
        self.folder = folder
        self.run: Any = None
        self.best: tuple[float, int] | None = None  # accuracy and its step
        self.rollout: Sequence[dict] = ()  # the newest samples that were trained on
        for line in lines:
            self._note_best(line["step"], line)
        for mode in dict.fromkeys((config["wandb"], "offline")):
            if config["wandb"] != "off" and not self.run:
                with self._trying(f"--wandb {mode} did not start"):
                    self.run = self._started(mode, config, about)
                if not self.run and mode == "online":
                    say("wandb: kept offline instead; `wandb sync` sends it later")

    @contextlib.contextmanager
    def _trying(self, failed: str) -> Iterator[None]:
        """What fails inside `with` ends the tracking and not the run."""
        try:
            yield
        except Exception as e:  # not logged in, no network, a full disk: wandb raises many kinds
            self.run = None
            say(f"wandb: {failed} ({reason(e)}); the run goes on, {self.folder} has all of it")

    def _started(self, mode: str, config: Json, about: Json) -> Any:
        import wandb

        id_file = self.folder / "wandb_id"
        run_id = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        if is_there(id_file):
            run_id = decode_text(read_head(id_file), str(id_file)).strip()
        replace_file(id_file, run_id)
        tags = [tag.strip() for tag in config["wandb_tags"].split(",") if tag.strip()]
        run = wandb.init(
            project=config["wandb_project"],
            name=self.folder.name,
            id=run_id,
            group=config["wandb_group"] or None,
            job_type=config["mode"],
            tags=tags or None,
            resume="allow",
            mode=mode,  # pyright: ignore[reportArgumentType]
            dir=str(self.folder),
            config=config,
        )
        run.config.update(about, allow_val_change=True)
        run.define_metric(TOKENS)
        run.define_metric("eval/*", step_metric=TOKENS)
        return run

    def _note_best(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            is_accuracy = name.startswith("eval/") and name.endswith("/accuracy")
            if step and is_accuracy and (self.best is None or value > self.best[0]):
                self.best = (value, step)

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Log the values of a step: of its training, then of the evaluation after it."""
        if self.run:
            self._note_best(step, values)
            start = {} if step else {TOKENS: 0}
            with self._trying("not logged"):
                self.run.log(start | dict(values), step=step)
                if self.best:
                    accuracy, at = self.best
                    self.run.summary.update({"best/accuracy": accuracy, "best/step": at})

    def samples(self, step: int, samples: Sequence[dict], evaluated: bool = False) -> None:
        """Log a table of an evaluation's answers, beside the newest samples of the rollouts."""
        if not evaluated:
            self.rollout = samples or self.rollout
        elif self.run:
            with self._trying("samples not logged"):
                self._log_table("samples/validation", step, samples)
                self._log_table("samples/rollout", step, self.rollout)

    def _log_table(self, title: str, step: int, samples: Sequence[dict]) -> None:
        import wandb

        if samples:
            names = dict.fromkeys(key for sample in samples for key in sample)
            columns: list[Any] = ["step", *names]
            rows = []
            for sample in samples[:SHOWN]:
                rows.append([step, *(_cell(sample.get(name)) for name in names)])
            self.run.log({title: wandb.Table(columns, rows)}, step=step)

    def finish(self, table: Sequence[Sequence[str]] = ()) -> None:
        """End the run with its last table and its curves; without them if it was stopped."""
        if self.run:
            with self._trying("not finished"):
                import wandb

                if table:
                    columns: list[Any] = ["metric", *table[0][1:]]
                    last = {"results": wandb.Table(columns, [list(row) for row in table[1:]])}
                    self.run.log(last | {"curves": wandb.Image(str(self.folder / "curves.png"))})
                self.run.finish(exit_code=0)
        self.run = None


def _cell(value: Any) -> Any:
    """A value of a sample as a table holds it; a column has one type."""
    return value if isinstance(value, str | bool) or value is None else json.dumps(value)


def report_failure(failure: str) -> None:
    """Say in one line why this process's run failed, in the run's summary.

    A trial of a sweep has a run also where it failed before one was begun: without it the sweep
    would show a trial that came to nothing for no reason.
    """
    wandb = sys.modules.get("wandb")
    try:
        if (wandb is None or wandb.run is None) and os.environ.get("WANDB_SWEEP_ID"):
            import wandb

            wandb.init()
        if wandb and wandb.run:
            wandb.run.summary["failed"] = failure
            wandb.finish(exit_code=1)
    except Exception as e:
        say(f"wandb: the failure was not noted ({reason(e)})")
