"""What a run shows at its end: a table of what was measured, and the curves."""

import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from files import Json, draft_of, read_json, resolved
from run import read_lines, read_metrics, run_of

STEPWISE = ("train/loss", "rollout/reward", "rollout/spread", "train/entropy")  # if a run has them
FRACTIONS = ("/accuracy", "/lenient", "/stopped", "/top1", "/overlap", "_mass", "/half_gradient")

Metrics = list[Json]  # the lines of metrics.jsonl
Table = list[list[str]]  # rows of cells, the heading first


def series(metrics: Metrics, name: str) -> tuple[list[int], list[float]]:
    """Return the steps at which a metric was measured, and its values."""
    steps, values = [], []
    for line in metrics:
        if name in line:
            steps.append(line["step"])
            values.append(line[name])
    return steps, values


COSTS = ("student_tokens", "sampled_tokens", "teacher_tokens", "flops", "seconds", "device_hours")


def run_cost(run: str | Path, metrics: Metrics | None = None) -> dict[str, float]:
    """What a run took, by COSTS; nan for what it did not measure. metrics: the lines until then."""
    last, seconds = {}, []
    for line in read_metrics(run) if metrics is None else metrics:
        last |= line
        seconds.append(line.get("train/seconds", 0))
    total = sum(seconds) if "train/seconds" in last else math.nan
    about = Path(run) / "environment.json"
    ranks = read_json(about).get("ranks", math.nan) if about.exists() else math.nan
    names = ("tokens", "sampled_tokens", "teacher_tokens", "flops")
    values = [last.get(f"train/{name}", math.nan) for name in names]
    return dict(zip(COSTS, [*values, total, total * ranks / 3600], strict=True))


def eval_names(metrics: Metrics) -> list[str]:
    return sorted(name for name in set().union(*metrics) if name.startswith("eval/"))


def result_rows(run: str | Path, teacher_folder: str | Path | None = None) -> Table:
    """Return the table at the end of a run: metrics before and after, beside the teacher's.

    teacher_folder: the teacher's checkpoint; what its run measured last has a column, if it is
    known.
    """
    metrics = read_metrics(run)
    teacher_run = run_of(teacher_folder) if teacher_folder else None
    teacher = read_metrics(teacher_run) if teacher_run else []
    rows, has_teacher = [["", "before", "after", "teacher"]], False
    for name in eval_names(metrics):
        if not name.endswith("/problems") and "_from_" not in name:
            form = ".1%" if name.endswith(FRACTIONS) else ".4f"
            steps, values = series(metrics, name)
            before = f"{values[0]:{form}}" if steps[0] == 0 else "-"  # not measured
            row = [name, before, f"{values[-1]:{form}}", "-"]
            for value in series(teacher, name)[1][-1:]:
                row[3], has_teacher = f"{value:{form}}", True
            rows.append(row)
    for name in STEPWISE:
        values = series(metrics, name)[1]
        if values:
            last = values[-20:]
            rows.append([name, f"{values[0]:.4f}", f"{sum(last) / len(last):.4f}", "-"])
    return rows if has_teacher else [row[:3] for row in rows]


def aligned(rows: Table, left: int = 2) -> str:
    """A table for the terminal: so many columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for place, (cell, width) in enumerate(zip(row, widths, strict=True)):
            cells.append(cell.ljust(width) if place < left else cell.rjust(width))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def summary(run: str | Path, rows: Table) -> str:
    """Return the text at the end of a run: its `result_rows`, and what it took."""
    metrics = read_metrics(run)
    counted = series(metrics, "train/tokens")[1]
    tokens = f"{counted[-1]:,}" if counted else "an unknown number of"
    seconds = sum(series(metrics, "train/seconds")[1])
    steps = metrics[-1]["step"] if metrics else 0
    took = f"{steps} steps, {tokens} tokens in {seconds:.0f} s of training"
    return f"\n{aligned(rows, left=1)}\n{took}; {run}/curves.png shows the curves"


# --- pictures -------------------------------------------------------------------------------------

# What is drawn, in this order: how a metric is called, and what its axis says, with the unit.
SHOWN = {
    r"eval/.+/accuracy": "answered right, % of held-out problems",
    r"eval/[^/]+/loss": "cross-entropy on held-out text, nats per token",
    r"train/loss": "training loss per token",
    r"rollout/reward": "reward of a sample, mean",
    r"rollout/spread": "prompts whose samples earn differently, share",
    r"rollout/tokens": "length of a sample, tokens",
    r"train/entropy": "entropy of the policy, nats per token",
    r"train/ref_kl": "KL from the reference, nats per token",
    r"eval/.+/on_student/reverse_kl": "KL(student, teacher) on the student's text, nats per token",
    r"eval/.+/on_teacher/forward_kl": "KL(teacher, student) on the teacher's text, nats per token",
}
# Colours that also the colour-blind tell apart (Okabe and Ito).
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
STYLES = ("-", "--", ":", "-.")
MARKERS, SYMBOLS = "os^Dv*", "●■▲◆▼★"
AXES = {"step": "step", "tokens": "tokens trained on", "seconds": "seconds of training"}
Z = 1.959964  # standard errors on either side of a 95 % interval


def style(method: int, line: int, mark: int | None = None) -> dict[str, str]:
    """Colour and mark of a method, and the kind of line of a seed or a start."""
    if mark is None:
        mark = method
    return {
        "color": COLORS[method % len(COLORS)],
        "ls": STYLES[line % len(STYLES)],
        "marker": MARKERS[mark % len(MARKERS)],
    }


def shown_names(metrics: Metrics) -> list[str]:
    """The metrics of a run that are drawn, in the order of SHOWN."""
    names, shown = sorted(set().union(*metrics)), []
    for pattern in SHOWN:
        shown += [name for name in names if re.fullmatch(pattern, name)]
    return shown


def centred_mean(values: list[float]) -> tuple[np.ndarray, int]:
    """The mean of the values around each one, and of how many at most.

    Near the ends it is of fewer, as many on either side: what rises evenly is not shifted.
    """
    count = len(values)
    sums, at = np.concatenate([[0.0], np.cumsum(values)]), np.arange(count)
    reach = np.minimum(count // 80 + 1, np.minimum(at, count - 1 - at))
    means = (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)
    return means, 2 * (count // 80 + 1) + 1


def wilson(share: float, count: float) -> tuple[float, float]:
    """The 95 % interval of a share of `count` yes-or-no outcomes (Wilson 1927)."""
    centre, scale = share + Z**2 / (2 * count), 1 + Z**2 / count
    reach = Z * math.sqrt(share * (1 - share) / count + (Z / (2 * count)) ** 2)
    return max(0.0, (centre - reach) / scale), min(1.0, (centre + reach) / scale)


def progress(metrics: Metrics) -> dict[str, list[float]]:
    """How far a run was at each line: its step, the tokens trained on, the seconds of training."""
    found = {name: [] for name in AXES}
    tokens = seconds = 0.0
    for line in metrics:
        tokens, seconds = line.get("train/tokens", tokens), seconds + line.get("train/seconds", 0)
        found["step"].append(line["step"])
        found["tokens"].append(tokens)
        found["seconds"].append(seconds)
    return found


def draw_metric(ax: Any, metrics: Metrics, name: str, against: str = "step", **style: Any) -> None:
    """Draw a metric of a run against a name of `progress`, and what the axis means.

    An evaluation has a mark for each time, and an accuracy the interval that its number of problems
    gives; what every step measures is a thin line behind its mean. style: color, ls, marker, label.
    """
    from matplotlib.ticker import EngFormatter, MaxNLocator

    x, y, bounds = [], [], []
    for line, place in zip(metrics, progress(metrics)[against], strict=True):
        if name in line:
            value, problems = line[name], line.get(f"{name.removesuffix('accuracy')}problems", 0)
            x.append(place)
            y.append(value)
            bounds.append(wilson(value, problems) if problems else (value, value))
    if not x:
        return
    marker = style.pop("marker", "o")
    if name.startswith("eval/"):
        if name.endswith("/accuracy"):
            y, bounds = 100 * np.array(y), 100 * np.array(bounds)
            ax.fill_between(x, *bounds.T, color=style.get("color"), alpha=0.12, lw=0)
            ax.set_ylim(0, 100)
        ax.plot(x, y, marker=marker, ms=4, lw=1.6, **style)
    else:
        ax.plot(x, y, lw=0.6, alpha=0.35, color=style.get("color"))
        ax.plot(x, centred_mean(y)[0], lw=1.6, **style)
    if name.endswith(("/loss", "_kl")) and max(y) > 10 * min(y) > 0:
        ax.set_yscale("log")
    axis = next(axis for pattern, axis in SHOWN.items() if re.fullmatch(pattern, name))
    ax.set(title=name, ylabel=textwrap.fill(axis, 34))
    ax.set_xlabel(AXES[against])
    if against == "step":  # of which there are no halves
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if against == "tokens":
        ax.xaxis.set_major_formatter(EngFormatter())


def label_ends(
    ax: Any, ends: list[tuple[float, float, str, str]], least: float = 0.075, reach: float = 1.0
) -> None:
    """Write beside each curve's end (x, y, text, colour) what it is, no text over another.

    least: the distance of two texts, as a part of the axis, whose limits are final. reach: how far
    a line leads from a text; of a curve that ends farther to the left it is said where.
    """
    if not ends:
        return
    ax.autoscale_view()  # the limits of what was drawn are found late
    to_axes = ax.transData + ax.transAxes.inverted()
    widths, heights = to_axes.transform([end[:2] for end in ends]).T
    least = min(least, 1 / len(ends))
    order, steps = np.argsort(heights, kind="stable"), least * np.arange(len(ends))
    heights = np.maximum.accumulate(heights[order] - steps) + steps  # each above the one before
    heights = np.minimum(heights, 1 - steps[::-1])  # and all of them inside
    for i, height in zip(order, heights, strict=True):
        x, y, text, color = ends[i]
        is_near = widths[i] >= 1 - reach
        ax.annotate(
            text if is_near else f"{text} (to {x:,.0f})",
            (x, y),
            (1.03, height),
            textcoords="axes fraction",
            va="center",
            fontsize=7,
            color=color,
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.5} if is_near else None,
        )


def teacher_run(run: str | Path) -> Path | None:
    """The run that made a run's teacher, as its last sitting names it, if it is still there."""
    sittings, options = read_lines(Path(run) / "sittings.jsonl"), options_of(run)
    weights = sittings[-1].get("weights", {}) if sittings else {}
    found = run_of(weights.get("teacher") or options.get("teacher") or ".")
    if not found:
        return None
    for place in (found, resolved(run).parent / found.name):
        if place.is_dir():
            return place


def options_of(run: str | Path) -> Json:
    """What a run's config.json says; {} if there is none."""
    path = Path(run) / "config.json"
    return read_json(path) if path.exists() else {}


def draw_level(ax: Any, height: float, text: str, ls: str = "--", va: str = "top") -> None:
    """Draw a line over the whole width, and what it is."""
    ax.axhline(height, color="#555555", ls=ls, lw=1, zorder=1)
    where = ("axes fraction", "data")
    ax.annotate(text, (0.01, height), xycoords=where, fontsize=7, va=va)


def draw_teachers(ax: Any, runs: Sequence[str | Path], name: str) -> None:
    """A line where each of the runs' teachers was at last, if its own run has measured the same."""
    for teacher in dict.fromkeys(filter(None, map(teacher_run, runs))):
        for value in series(read_metrics(teacher), name)[1][-1:]:
            if name.endswith("/accuracy"):
                draw_level(ax, 100 * value, f"teacher {100 * value:.3g} %")
            else:
                draw_level(ax, value, f"teacher {value:.3g}", va="bottom")


def draw_curves(run: str | Path) -> None:
    """Draw curves.png: what every step measured, with its mean, and the evaluations."""
    run, metrics = Path(run), read_metrics(run)
    names = shown_names(metrics)
    columns = min(3, max(1, len(names)))
    if len(names) > 6:
        columns = 4
    rows = max(1, -(-len(names) // columns))
    figure, axes = grid_of(rows, columns, 4.5, 3.2)
    for ax in axes.flat[len(names) :]:
        ax.axis("off")
    for ax, name in zip(axes.flat, names, strict=False):
        is_eval = name.startswith("eval/")
        draw_metric(ax, metrics, name, color=COLORS[is_eval])
        if is_eval:
            draw_teachers(ax, [run], name)
        ax.grid(alpha=0.3)
    _, window = centred_mean(series(metrics, "train/loss")[1])
    options = options_of(run)
    said = []
    for name in ("mode", "model", "data", "seed"):
        if name in options:
            said.append(f"{name} {options[name]}")
    notes = f"thin: each step; thick: mean of {window} steps around it; bands: 95 % over problems"
    figure.suptitle(f"{run.name}: {', '.join(said)}\n{notes}", fontsize=9)
    save_picture(figure, run / "curves.png")


def grid_of(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure, and its axes in rows and columns, each of this size in inches."""
    from matplotlib.figure import Figure

    size = (width * columns, height * rows + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_picture(figure: Any, path: Path) -> None:
    """Write a picture that appears whole or not at all. Raises OSError."""
    draft = draft_of(path)
    try:
        figure.savefig(draft, dpi=120, format="png", bbox_inches="tight")
        draft.rename(path)
    finally:
        draft.unlink(missing_ok=True)
