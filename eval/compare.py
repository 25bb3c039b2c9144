"""Compare runs: the options that differ, what each reached and cost, paired tests, curves.

    python -m eval.compare runs/a runs/b runs/c [--evals evals] [--out comparison]

Runs may be finished, under way or killed, and of any modes. Those that differ in the seed alone
are one arm: its figures are means over seeds. Arms are tested against each other on the problems
that both were asked in the same way: those of `python -m eval`, found by the run's name in --evals,
in the run's folder, or beside a study's runs; and the held-out ones of training.
"""

from errors import UserError, as_command, say  # isort: skip

import dataclasses
import glob
import itertools
import json
import math
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import curves
import options
from config import Config
from eval import summary
from eval.stats import Counts, difference, over_seeds
from eval.tables import cell, comparison_table, cost_cells, markdown, points, table
from files import (
    LARGEST,
    Fields,
    Json,
    check_file,
    made,
    read_json,
    replace_file,
    resolved,
    without,
)
from locks import is_held
from model.lineage import PROMPT_OPTIONS
from model.load import Checkpoint, read_config
from options import REQUIRED, option
from run import RunFolder, read_lines, run_of

# Options that say where a run is and not what it is.
PLACES = ("runs", "name", "resume", "dry_run")
HELD_OUT, NOT_READ = "held-out problems", "not read"
NOTES = """Brackets: 95 %; of held-out and test problems over problems (of a single run the seed is
not in it), of several seeds by Student's t over seeds. best: the highest of several evaluations,
which flatters it. p: exact, of sign flips by problem, not corrected for the number of tests.
"(default)": what it is where nobody sets it. Options that some of the runs do not read, and the
others have at the default, are left out."""


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """Every option of the command."""

    runs: tuple[str, ...] = option(
        REQUIRED, "folders of runs, or of their checkpoints, as they were then", positional=True
    )
    evals: tuple[str, ...] = option(
        ("evals",), "folders of evaluations, --out of `python -m eval`, with commas between them"
    )
    out: str = option("comparison", "the folder for comparison.md and comparison.png")


class Result(NamedTuple):
    """What a run answered on a task: how it was asked, and the verdicts of each problem.

    figures: of `python -m eval`; None of held-out problems. step: of the checkpoint.
    """

    task: str
    conditions: Json
    step: int
    counts: Counts
    figures: summary.Figures | None = None

    @property
    def key(self) -> str:
        return json.dumps([self.task, self.conditions], sort_keys=True)


@dataclasses.dataclass
class Run:
    """A run as its folder tells. arm: what it has in common with its like of other seeds."""

    path: Path
    label: str
    options: Json
    environment: Json
    metrics: curves.Metrics
    state: str
    arm: str
    at: int | None  # the step of its checkpoint that was named; None: the run as it is
    results: dict[str, Result] = dataclasses.field(default_factory=dict)

    @cached_property
    def defaults(self) -> Json:
        """What the options would be that it was given none of."""
        given = {n: self.options[n] for n in ("mode", "model", "defaults") if n in self.options}
        return without(options.with_defaults(Config, given), given)


Arms = dict[str, list[Run]]  # runs that differ in the seed alone, by the first one's label


# --- reading --------------------------------------------------------------------------------------


def read_run(path: Path, label: str, evals: Sequence[str]) -> Run:
    """A run of which something was measured. Raises UserError for another folder, or damage.

    path: Its folder, or a checkpoint in it: the run until then.
    """
    before, at = run_of(path), None
    if before and path.is_dir() and path.name.removeprefix("step-").isdecimal():
        path, at = before, int(path.name[5:])
    if not os.path.lexists(path / "config.json"):
        raise UserError(f"{path} is no run: it has no config.json; name a folder, as in runs/NAME")
    check_file(path / "config.json")
    metrics = _read_metrics(path / "metrics.jsonl")
    metrics = [line for line in metrics if at is None or line["step"] <= at]
    if not metrics:
        raise UserError(f"{path}: nothing was measured until step {at}")
    given, about = all_options(path), path / "environment.json"
    environment = read_json(about) if about.exists() else {}
    environment = environment | Fields(environment, about).part("packages").values
    arm = arm_of(path)
    if at is not None:
        arm += f"@{at}"
    sittings = read_lines(path / "sittings.jsonl")
    steps = sittings[-1].get("steps") if sittings else given.get("steps")
    if steps and given.get("steps") == 0:
        given["steps"] = f"{steps} by --epochs"
    state = _state(path, metrics[-1]["step"], steps, at)
    run = Run(path, label, given, environment, metrics, state, arm, at)
    for result in [*_held_out(run), *_evaluations(run, evals)]:
        known = run.results.get(result.key)
        if at in (None, result.step) and (known is None or result.step > known.step):
            run.results[result.key] = result
    return run


def _state(path: Path, step: int, steps: int | None, at: int | None) -> str:
    """How far a run is, in words."""
    of = f"of {steps or '?'}"
    if at is not None:
        return f"step {at:,} {of}"
    if is_held(path / ".lock"):
        return f"running, at {step:,} {of}"
    return "finished" if steps == step else f"stopped at {step:,} {of}"


def _read_metrics(path: Path) -> curves.Metrics:
    found = read_lines(path)
    if not found:
        words = "has no line that can be read" if path.exists() else "is not there"
        raise UserError(f"{path} {words}: nothing of this run was measured yet")
    for number, line in enumerate(found, 1):
        fields = Fields(line, f"{path}, entry {number},")
        fields.get("step", int)
        for name in line:
            fields.get(name, float, least=-LARGEST)
    return found


def all_options(path: Path) -> Json:
    """The options that a run reads, also those that came after it was begun."""
    stored = read_json(path / "config.json")
    known = {n: v for n, v in stored.items() if n in Config.__dataclass_fields__}
    fields = Fields(known, path / "config.json")
    for name, value in known.items():
        if isinstance(value, list | dict):
            fields.refuse(f"{name} {value!r:.60}")
    fields.get("seed", int)
    known = options.of_a_run(Config, known)
    cfg = Config(**options.with_defaults(Config, known))
    return options.resolved(cfg, PLACES) | without(stored, PLACES)


def arm_of(path: Path) -> str:
    """What a run has in common with those that differ in the seed alone, or began from such."""
    found = all_options(path) | {"seed": 0}
    for name, value in found.items():
        if isinstance(value, str) and value:
            before = run_of(value) or Path(value)  # a run's folder stands for its newest checkpoint
            if (before / "checkpoints").is_dir() and (before / "config.json").is_file():
                found[name] = arm_of(before)
    return json.dumps(found, sort_keys=True)


def _held_out(run: Run) -> list[Result]:
    """What the run answered last to the problems that it holds out."""
    steps = {line["step"] for line in run.metrics if any(n.startswith("eval/") for n in line)}
    step, seen, counted = max(steps, default=0), Counter(), {}
    for line in read_lines(run.path / "samples.jsonl"):
        if line.get("step") == step and "reward" not in line and "correct" in line:
            question = str(line.get("question"))
            seen[question] += 1  # one that comes twice counts twice
            counted[question, seen[question]] = (1, int(bool(line["correct"])))
    asked = {n: run.options.get(n) for n in (*PROMPT_OPTIONS, "eval_tokens")}
    return [Result(HELD_OUT, asked, step, counted)] if counted else []


def _evaluations(run: Run, evals: Sequence[str]) -> list[Result]:
    """What `python -m eval` has of the run's checkpoints, found by the name of its folders."""
    own, stated_by, found = resolved(run.path), [], []
    for place in [*map(Path, evals), *own.glob("eval*"), *(own.parent.parent / "evals").glob("*")]:
        stated_by += place.glob(f"{glob.escape(own.name)}-step-*/*.json")
    for about in stated_by:
        step = re.fullmatch(r".*-step-(\d+)-[0-9a-f]{6}", about.parent.name)
        samples = summary.Samples(about.parent, about.stem)
        if not step or not samples.path.exists() or samples.parts():
            continue  # another run's, or still under way
        stated = summary.read_about(about)
        named = resolved(str(stated["about"].get("name")))
        if named.exists() and own not in (named, *named.parents):
            continue  # of a run with the same name elsewhere
        rows = samples.read()
        try:
            count = len(rows) // len({problem for problem, _ in rows})
            figures = summary.summarise(rows, [count], stated["generated"])
            conditions = summary.conditions(stated)
        except (KeyError, TypeError, ZeroDivisionError):
            raise UserError(f"{samples.path} has no graded samples; evaluate again") from None
        conditions["test set"] = stated["identity"].get("test set")
        found.append(Result(about.stem, conditions, int(step[1]), summary.counts(rows), figures))
    return found


# --- tables ---------------------------------------------------------------------------------------


def differing(runs: list[Run]) -> curves.Table:
    """A row for each option, then for each fact of the environment, that is not the same in all.

    Not for those that some runs do not read and the others have at the default.
    """
    rows = [["option", *(run.label for run in runs)]]
    for name in dict.fromkeys(itertools.chain(*(run.options for run in runs))):
        values = {str(run.options.get(name, NOT_READ)) for run in runs}
        cells, chosen = zip(*(_option(run, name) for run in runs), strict=True)
        if len(values) > 1 and (any(chosen) or NOT_READ not in values):
            rows.append([name, *cells])
    facts = dict.fromkeys(itertools.chain(*(run.environment for run in runs)))
    for name in facts:
        cells = [str(run.environment.get(name, "unknown")) for run in runs]
        if name not in ("command", "time", "packages") and len(set(cells)) > 1:
            if name == "git_commit":
                cells = [cell[:12] for cell in cells]
            rows.append([name, *cells])
    return rows


def _option(run: Run, name: str) -> tuple[str, bool]:
    """The cell of a run's option, and whether it is read there and not at the default."""
    value = run.options.get(name, NOT_READ)
    before = run_of(value) if isinstance(value, str) and value else None
    shown = f"{before.name}/{Path(value).name}" if before else str(value)
    if name in run.defaults and value == run.defaults[name]:
        return f"{shown} (default)", False
    return shown, name in run.options


def reached(runs: list[Run]) -> curves.Table:
    """What each run reached on its held-out problems, and what that took."""
    rows = [["run", "state", "accuracy", "best (step)", "loss", "parameters", *cost_cells({})]]
    for run in runs:
        names = curves.shown_names(run.metrics)
        accuracy = next((name for name in names if name.endswith("/accuracy")), "")
        loss = next((name for name in names if re.fullmatch("eval/[^/]+/loss", name)), "")
        losses = curves.series(run.metrics, loss)[1] or [math.nan]
        row = [run.label, run.state, "-", "-", cell(losses[-1], ".4g"), parameters(run)]
        steps, values = curves.series(run.metrics, accuracy)
        if values:
            problems = accuracy.removesuffix("accuracy") + "problems"
            asked = curves.series(run.metrics, problems)[1]
            last, best = values[-1], max(values)
            row[2] = f"{100 * last:.1f}"
            if asked:
                row[2] = points([last, *curves.wilson(last, asked[-1])])
            row[3] = f"{100 * best:.1f} ({steps[values.index(best)]:,})"
        rows.append([*row, *cost_cells(curves.run_cost(run.path, run.metrics)).values()])
    return rows


def parameters(run: Run) -> str:
    """How many parameters a run's checkpoint has, the newest one's unless one was named, if any."""
    folder = RunFolder(run.path)
    steps = folder.steps() if run.at is None else [run.at]
    if not steps:
        return "-"
    newest = folder.step_folder(steps[-1])
    return f"{Checkpoint(str(newest), newest, read_config(str(newest), newest), None).parameters:,}"


def arms_of(runs: list[Run]) -> Arms:
    """The runs by arm."""
    arms, named = defaultdict(list), {}
    for run in runs:
        arms[run.arm].append(run)
    for first, *others in arms.values():
        more = f" and {len(others)} more" if others else ""
        named[first.label + more] = [first, *others]
    return named


def over_arms(arms: Arms, keys: dict[str, str]) -> curves.Table:
    """The accuracy of each arm with several seeds, on each task, mean over seeds."""
    rows = [["arm", "task", "runs", "accuracy, over seeds"]]
    for arm, own in arms.items():
        for key, task in keys.items():
            means = []
            for counts in _by_seed(own, key).values():
                means.append(sum(right / n for n, right in counts.values()) / len(counts))
            mean, reach = over_seeds(means)
            if len(means) > 1:
                bounds = [max(0.0, mean - reach), min(1.0, mean + reach)]
                if not reach:  # seeds that agree exactly say nothing of how seeds differ
                    bounds = [math.nan, math.nan]
                rows.append([arm, task, str(len(means)), points([mean, *bounds])])
    return rows


def tests(arms: Arms, keys: dict[str, str]) -> list[summary.Comparison]:
    """Every two arms on every task that both were asked in the same way, paired by problem."""
    found = []
    for key, task in keys.items():
        for (one, ours), (other, theirs) in itertools.combinations(arms.items(), 2):
            paired = difference(_by_seed(theirs, key), _by_seed(ours, key))
            if paired:
                _, low, high = paired["figure"]
                paired |= {"low": low, "high": high, "asked_differently": {}}
                found.append(summary.Comparison(other, one, task, paired))
    return found


def _by_seed(arm: list[Run], key: str) -> dict[Any, Counts]:
    """{(seed, a number for runs of one seed): what the arm's runs answered}."""
    found, seen = {}, Counter()
    for run in arm:
        if key in run.results:
            seed = run.options.get("seed", 0)
            found[seed, seen[seed]] = run.results[key].counts
            seen[seed] += 1
    return found


def tasks_of(runs: list[Run]) -> dict[str, str]:
    """{key of a result: the task's name}, with how it was asked where that is not one way only."""
    results = {key: result for run in runs for key, result in run.results.items()}
    names = {}
    for key, result in results.items():
        alike = [other.conditions for other in results.values() if other.task == result.task]
        differing = [n for n, v in result.conditions.items() if any(c.get(n) != v for c in alike)]
        said = ", ".join(f"{name} {result.conditions[name]!s:.20}" for name in differing)
        names[key] = f"{result.task} ({said})" if said else result.task
    return names


def evaluated(runs: list[Run], keys: dict[str, str]) -> list[summary.Summary]:
    found = []
    for key, task in keys.items():
        for run in runs:
            result = run.results.get(key)
            if result and result.figures:
                name = f"{run.label}, step {result.step}"
                found.append(summary.Summary(name, task, result.figures))
    return found


# --- the picture ----------------------------------------------------------------------------------


def draw(runs: list[Run], path: Path) -> None:
    """Draw what all runs have measured, against steps, tokens and seconds.

    Colour and mark: the arm; the kind of line: which of its runs.
    """
    names = dict.fromkeys(name for run in runs for name in curves.shown_names(run.metrics))
    shown = []
    for name in names:
        having = [run for run in runs if any(name in line for line in run.metrics)]
        modes = {run.options.get("mode") for run in having}
        # losses of two modes are not the same thing
        is_shared = len(having) > 1 and (name != "train/loss" or len(modes) == 1)
        if is_shared or name.endswith("/accuracy"):
            shown.append(name)
    shown = shown or list(names)[:1]
    figure, axes = curves.grid_of(len(shown), len(curves.AXES), 5.5, 3.6)
    for name, row in zip(shown, axes, strict=True):
        for ax, against in zip(row, curves.AXES, strict=True):
            _draw_runs(ax, runs, name, against)
    title = ", ".join(run.label for run in runs)
    if any(name.endswith("/accuracy") for name in shown):
        title += " (bands: 95 % over problems)"
    figure.suptitle(title, fontsize=9)
    curves.save_picture(figure, path)


def _draw_runs(ax: Any, runs: list[Run], name: str, against: str) -> None:
    ends = []
    for i, own in enumerate(arms_of(runs).values()):
        for j, run in enumerate(own):
            style = curves.style(i, j)
            curves.draw_metric(ax, run.metrics, name, against, **style)
            if any(name in line for line in run.metrics):
                x, y = ax.get_lines()[-1].get_data()
                ends.append((x[-1], y[-1], run.label, style["color"]))
    if name.startswith("eval/"):
        curves.draw_teachers(ax, [run.path for run in runs], name)
    ax.grid(alpha=0.3)
    if against == "step":
        curves.label_ends(ax, ends, reach=0.2)


# --- the command ----------------------------------------------------------------------------------


def compare(args: CompareOptions) -> None:
    """Read, test, write and say. Raises UserError before anything is written."""
    if len(args.runs) < 2:
        raise UserError("name two runs or more, as in runs/a runs/b")
    if len({resolved(name) for name in args.runs}) < len(args.runs):
        raise UserError("a run is named twice; it would count as two of one seed")
    missing = [folder for folder in args.evals if not Path(folder).is_dir()]
    if missing and args.evals != CompareOptions.evals:
        raise UserError(f"--evals {missing[0]} is no folder; name an --out of python -m eval")
    names, runs = [], []
    for name in args.runs:
        before, last = run_of(name), resolved(name).name
        names.append(f"{before.name}/{last}".lstrip("/") if before else last)
    for given, name in zip(args.runs, names, strict=True):
        label = name if names.count(name) == 1 else given
        runs.append(read_run(Path(given), label, args.evals))
    arms, keys = arms_of(runs), tasks_of(runs)
    compared, found = tests(arms, keys), evaluated(runs, keys)
    parts: list[tuple[str, curves.Table]] = [
        ("What differs", differing(runs)),
        ("What each reached on its held-out problems, and at what cost", reached(runs)),
    ]
    if found:
        parts.append(("Evaluations", table(found)))
    if len(arms) < len(runs):
        parts.append(("Arms of several seeds", over_arms(arms, keys)))
    if compared:
        parts.append(("Paired by problem", comparison_table(compared)))
    out = Path(args.out)
    pages = [f"## {title}\n\n{markdown(rows)}" for title, rows in parts]
    picture = "![curves](comparison.png)"
    with made(out):
        draw(runs, out / "comparison.png")
        page = "\n\n".join(["# Runs", *pages, NOTES, picture])
        replace_file(out / "comparison.md", page + "\n")
    shown = [f"{title}\n{curves.aligned(rows)}" for title, rows in parts]
    if not compared:
        shown.append("no two arms were asked the same problems: nothing to test")
    say("\n\n".join([*shown, NOTES, f"{out}: comparison.md, comparison.png"]))


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    return as_command(
        "eval.compare", lambda: compare(options.parse(CompareOptions, argv)), "interrupted"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
