"""The pictures of a study: learning curves, and accuracy against cost."""

import operator
import re
from pathlib import Path
from typing import Any

import numpy as np

from errors import RunFailed
from eval.study.results import Outcome, Results
from run import read_metrics


def curve(outcome: Outcome) -> list[list[float]]:
    """[[student tokens so far, validation accuracy in %, whether a run ends here]] of the chain."""
    points, before = [], 0
    for run in outcome.runs:
        tokens = 0
        for row in read_metrics(run):
            tokens = row.get("train/tokens", tokens)
            for name, value in row.items():
                if re.fullmatch("eval/.*/accuracy", name):
                    points.append([before + tokens, 100 * value, 0])
        before += tokens
        if points:
            points[-1][2] = 1
    return points


def draw_curves(results: Results, report: dict, ax: Any, model: str) -> None:
    """A line for each arm that begins from this model, mean over seeds."""
    lines = []
    for arm in report["arms"]:
        curves = [curve(results.outcomes[arm["arm"], seed]) for seed in arm["seeds"]]
        if arm["model"] == model and curves and all(curves):
            shared = min(map(len, curves))  # evaluations that all seeds have
            points = np.mean([points[:shared] for points in curves], axis=0)
            lines.append((points[-1, 1], arm["arm"], points))
    lines.sort(key=operator.itemgetter(0), reverse=True)  # the legend in the order of the ends
    for i, (_, name, points) in enumerate(lines):
        style = dict(color=f"C{i % 10}", ls=("-", "--", ":")[i // 10 % 3], lw=1.4, marker="o", ms=4)
        ax.plot(points[:, 0], points[:, 1], markevery=points[:, 2] == 1, label=name, **style)
    ax.set(title=f"from {model}", xlabel="student tokens along the chain (dots: a run ends)")
    ax.set_ylabel("validation accuracy, % (mean over seeds)")
    if lines:
        ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))


def draw_costs(arms: list[dict], ax: Any, task: str, colours: dict[str, str]) -> None:
    """A point for each trained arm, a line for each model as it is.

    The names stand in a column beside the points, in their order, so that none hides another.
    """
    marks = []
    for arm in arms:
        figure = arm["accuracy"][task]["figure"] if arm["seeds"] else None
        if not figure:
            continue
        mean, low, high = [100 * x for x in figure]
        name, colour, flops = arm["arm"], colours[arm["model"]], arm["cost"]["flops"]
        if not arm["chain"]:
            ax.axhline(mean, color=colour, ls="--", lw=1, label=f"{name}, as it is")
        elif flops > 0:  # and known
            style = dict(color=colour, marker="o", capsize=3, alpha=0.8)
            ax.errorbar(flops, mean, [[mean - low], [high - mean]], **style)
            marks.append((mean, flops, name, colour))
    for i, (mean, flops, name, colour) in enumerate(sorted(marks)):
        line = dict(arrowstyle="-", color=colour, alpha=0.35, lw=0.7)
        place = dict(xytext=(1.03, (i + 0.5) / len(marks)), textcoords="axes fraction")
        style = dict(fontsize=8, color=colour, va="center", arrowprops=line)
        ax.annotate(name, (flops, mean), **place, **style)
    ax.set(xscale="log", xlabel="FLOPs of the whole chain")
    ax.set_ylabel(f"{task}: accuracy, % (95 % interval)")
    if ax.get_legend_handles_labels()[0]:  # above the points
        ax.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1.01), ncols=3)


def _panels(titles: list[str], height: float) -> tuple[Any, Any]:
    """A figure with a panel for each title, below each other, and its axes."""
    from matplotlib.figure import Figure

    count = len(titles)
    figure = Figure(figsize=(9, height * count), layout="constrained")
    axes = list(figure.subplots(count, 1, squeeze=False).flat)
    for ax in axes:
        ax.grid(alpha=0.3)
    return figure, axes


def draw(results: Results, report: dict, out: Path) -> None:
    """curves.png, a panel for each starting model; cost.png, a panel for each arm's first task."""
    arms = report["arms"]
    models = list(dict.fromkeys(arm["model"] for arm in arms if arm["chain"])) or [""]
    curves, axes = _panels(models, 4)
    for ax, model in zip(axes, models, strict=True):
        draw_curves(results, report, ax, model)
    tasks, colours = {}, {}
    for arm in arms:
        evaluated = [task for task, found in arm["accuracy"].items() if found["figure"]]
        tasks |= dict.fromkeys(evaluated[:1])
        colours.setdefault(arm["model"], f"C{len(colours) % 10}")
    tasks = list(tasks) or [""]
    costs, axes = _panels(tasks, max(4.5, 0.25 * len(arms)))
    for ax, task in zip(axes, tasks, strict=True):
        draw_costs(arms, ax, task, colours)
    try:
        for name, figure in (("curves.png", curves), ("cost.png", costs)):
            figure.savefig(out / f".draft-{name}", dpi=120, bbox_inches="tight")
            (out / f".draft-{name}").rename(out / name)
    except OSError as e:
        raise RunFailed(f"{out}: the pictures could not be written ({e.strerror})") from None
