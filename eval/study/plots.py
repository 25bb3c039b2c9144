"""The pictures of a study: learning curves, and accuracy against cost."""

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
    lines = {}
    for arm in report["arms"]:
        curves = [curve(results.outcomes[arm["arm"], seed]) for seed in arm["seeds"]]
        if arm["model"] == model and curves and all(curves):
            shared = min(map(len, curves))  # evaluations that all seeds have
            lines[arm["arm"]] = np.mean([points[:shared] for points in curves], axis=0)
    # the legend in the order of the ends
    ordered = sorted(lines.items(), key=lambda line: -line[1][-1, 1])
    for i, (arm, points) in enumerate(ordered):
        style = dict(color=f"C{i % 10}", ls=("-", "--", ":")[i // 10 % 3], lw=1.4, marker="o", ms=4)
        ax.plot(points[:, 0], points[:, 1], markevery=points[:, 2] == 1, label=arm, **style)
    ax.set(
        title=f"from {model}",
        xlabel="student tokens along the chain (dots: a run ends)",
        ylabel="validation accuracy, % (mean over seeds)",
    )
    ax.grid(alpha=0.3)
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
        colour, flops = colours[arm["model"]], arm["cost"]["flops"]
        if not arm["chain"]:
            ax.axhline(mean, color=colour, ls="--", lw=1, label=f"{arm['arm']}, as it is")
        elif flops > 0:  # and known
            style = dict(color=colour, marker="o", capsize=3, alpha=0.8)
            ax.errorbar(flops, mean, [[mean - low], [high - mean]], **style)
            marks.append((mean, flops, arm["arm"], colour))
    for i, (mean, flops, name, colour) in enumerate(sorted(marks)):
        ax.annotate(
            name,
            xy=(flops, mean),
            xytext=(1.03, (i + 0.5) / len(marks)),
            textcoords="axes fraction",
            fontsize=8,
            color=colour,
            va="center",
            arrowprops=dict(arrowstyle="-", color=colour, alpha=0.35, lw=0.7),
        )
    ax.set(
        xscale="log",
        xlabel="FLOPs of the whole chain",
        ylabel=f"{task}: accuracy, % (95 % interval)",
    )
    ax.grid(alpha=0.3)
    if ax.get_legend_handles_labels()[0]:
        # above the points
        ax.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1.01), ncols=3)


def draw(results: Results, report: dict, out: Path) -> None:
    """curves.png, a panel for each starting model; cost.png, a panel for each arm's first task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms = report["arms"]
    models = list(dict.fromkeys(arm["model"] for arm in arms if arm["chain"])) or [""]
    curves, axes = plt.subplots(
        len(models), 1, figsize=(9, 4 * len(models)), squeeze=False, layout="constrained"
    )
    for ax, model in zip(axes.flat, models, strict=True):
        draw_curves(results, report, ax, model)
    tasks = {}
    for arm in arms:
        evaluated = [task for task, found in arm["accuracy"].items() if found["figure"]]
        tasks |= dict.fromkeys(evaluated[:1])
    tasks = list(tasks) or [""]
    height = max(4.5, 0.25 * len(arms))
    costs, axes = plt.subplots(len(tasks), 1, figsize=(9, height * len(tasks)), squeeze=False)
    colours = {}
    for arm in arms:
        colours.setdefault(arm["model"], f"C{len(colours) % 10}")
    for ax, task in zip(axes.flat, tasks, strict=True):
        draw_costs(arms, ax, task, colours)
    try:
        for name, figure in (("curves.png", curves), ("cost.png", costs)):
            figure.savefig(out / f".draft-{name}", dpi=120, bbox_inches="tight")
            (out / f".draft-{name}").rename(out / name)
    except OSError as e:
        raise RunFailed(f"{out}: the pictures could not be written ({e.strerror})") from None
    plt.close("all")
