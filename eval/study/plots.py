"""The pictures of a study: learning curves, and accuracy against cost."""

import re
from collections.abc import Callable
from functools import partial
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
    for i, arm in enumerate(report["arms"]):
        curves = [curve(results.outcomes[arm["arm"], seed]) for seed in arm["seeds"]]
        if arm["model"] == model and curves and all(curves):
            shared = min(map(len, curves))  # evaluations that all seeds have
            x, y, ends = np.mean([points[:shared] for points in curves], axis=0).T
            ax.plot(x, y, markevery=ends == 1, lw=1.4, ms=4, label=arm["arm"], **_style(i))
    ax.set(title=f"from {model}", xlabel="student tokens along the chain (marks: a run ends)")
    ax.set_ylabel("validation accuracy, % (mean over seeds)")


def draw_costs(arms: list[dict], ax: Any, task: str) -> None:
    """A point for each trained arm, a line for each model as it is."""
    for i, arm in enumerate(arms):
        figure = arm["accuracy"][task]["figure"] if arm["seeds"] else None
        if not figure:
            continue
        mean, low, high = [100 * x for x in figure]
        flops = arm["cost"]["flops"]
        if not arm["chain"]:
            ax.axhline(mean, color=f"C{i % 10}", ls=":", label=f"{arm['arm']}, as it is")
        elif flops > 0:  # and known
            reach = [[mean - low], [high - mean]]
            style = _style(i) | {"ls": "", "capsize": 3, "alpha": 0.8}
            ax.errorbar(flops, mean, reach, label=arm["arm"], **style)
    ax.set(xscale="log", xlabel="FLOPs of the whole chain")
    ax.set_ylabel(f"{task}: accuracy, % (95 % interval)")


def _style(i: int) -> dict[str, str]:
    """How arm i is drawn: 40 differ."""
    return {"color": f"C{i % 10}", "marker": "os^D"[i // 10 % 4], "ls": ("-", "--")[i // 10 % 2]}


def save_panels(path: Path, titles: list[str], draw: Callable[[Any, str], None]) -> None:
    """Save a picture with a panel for each title, one below the other."""
    from matplotlib.figure import Figure

    titles = titles or [""]
    figure = Figure(figsize=(9, 5 * len(titles)), layout="constrained")
    axes = figure.subplots(len(titles), squeeze=False)
    for ax, title in zip(axes.flat, titles, strict=True):
        draw(ax, title)
        ax.grid(alpha=0.3)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    draft = path.with_name(f".draft-{path.name}")
    try:
        figure.savefig(draft, dpi=120, bbox_inches="tight")
        draft.rename(path)
    except OSError as e:
        raise RunFailed(f"{path} could not be written ({e.strerror})") from None


def draw(results: Results, report: dict, out: Path) -> None:
    """curves.png, a panel for each starting model; cost.png, a panel for each arm's first task."""
    arms, tasks = report["arms"], {}
    models = dict.fromkeys(arm["model"] for arm in arms if arm["chain"])
    for arm in arms:
        evaluated = [task for task, found in arm["accuracy"].items() if found["figure"]]
        tasks |= dict.fromkeys(evaluated[:1])
    save_panels(out / "curves.png", list(models), partial(draw_curves, results, report))
    save_panels(out / "cost.png", list(tasks), partial(draw_costs, arms))
