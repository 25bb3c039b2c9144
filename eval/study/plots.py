"""The pictures of a study: learning curves, and accuracy against cost.

A panel shows the arms of a few methods (chains of runs) in colour, and all others in grey behind
them. Colour: the method; kind of line and mark: the model that the chain begins from.
"""

import itertools
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import curves
from errors import RunFailed
from eval.stats import over_seeds
from eval.study.results import Outcome, Results
from run import read_metrics

METHODS = 6  # in one panel
GREY = "#cccccc"
BANDS = "bands: 95 %, of seeds by Student's t from three on, else of problems"


def curve(outcome: Outcome) -> list[list[float]]:
    """[[student tokens so far, validation accuracy, whether a run ends here, problems]] of a chain.

    Accuracies in %.
    """
    points, before = [], 0.0
    for run in outcome.runs:
        metrics = read_metrics(run)
        tokens = curves.progress(metrics)["tokens"]
        for row, so_far in zip(metrics, tokens, strict=True):
            for name, value in row.items():
                if re.fullmatch("eval/.*/accuracy", name):
                    problems = row.get(name.removesuffix("accuracy") + "problems", 0)
                    points.append([before + so_far, 100 * value, 0, problems])
        before += tokens[-1] if tokens else 0
        if points:
            points[-1][2] = 1
    return points


def mean_curve(results: Results, arm: dict) -> np.ndarray | None:
    """[x, y, low, high, whether a run ends] of an arm's curve, mean over seeds; None without one.

    The bounds are those of the seeds from three on, else of the problems.
    """
    every = [curve(results.outcomes[arm["arm"], seed]) for seed in arm["seeds"]]
    if not arm["chain"] or not every or not all(every):
        return None
    shared = min(map(len, every))  # evaluations that all seeds have
    points_SC4 = np.array([points[:shared] for points in every])
    x, y, ends, problems = points_SC4.mean(0).T
    low, high = y.copy(), y.copy()
    for i, values in enumerate(points_SC4[:, :, 1].T):
        if len(values) > 2:
            reach = over_seeds(values.tolist())[1]
            low[i], high[i] = max(0.0, y[i] - reach), min(100.0, y[i] + reach)
        elif problems[i]:
            low[i], high[i] = (100 * bound for bound in curves.wilson(y[i] / 100, problems[i]))
    return np.array([x, y, low, high, ends])


def panels(arms: list[dict]) -> list[list[str]]:
    """The methods of each panel."""
    methods = list(dict.fromkeys(method(arm) for arm in arms if arm["chain"]))
    return [methods[i : i + METHODS] for i in range(0, len(methods), METHODS)] or [[]]


def method(arm: dict) -> str:
    return " → ".join(arm["chain"])


def _style(arm: dict, arms: list[dict], shown: list[str]) -> dict[str, Any]:
    """How an arm is drawn in a panel of these methods."""
    starts = list(dict.fromkeys(other["model"] for other in arms))
    start = starts.index(arm["model"])
    if method(arm) not in shown:
        return curves.style(0, start, start) | {"color": GREY, "lw": 0.7, "ms": 3}
    place = shown.index(method(arm))
    # what coincides is seen at the edges of what was drawn later, and thinner
    return curves.style(place, start, start) | {"lw": 3.2 - 0.4 * place, "ms": 6, "zorder": 3}


def draw_curves(results: Results, arms: list[dict]) -> "Draw":
    """A function that draws the learning curves of all arms, some methods' in colour."""
    means = [mean_curve(results, arm) for arm in arms]
    runs = [run for outcome in results.outcomes.values() for run in outcome.runs]
    every = {name for run in runs for name in curves.eval_names(read_metrics(run))}
    names = [name for name in sorted(every) if name.endswith("/accuracy")]

    def draw_one(ax: Any, shown: list[str]) -> None:
        ends = []
        ax.set(xlabel="student tokens along the chain (marks: a run ends)", ylim=(-2, 100))
        ax.set_ylabel("validation accuracy, %")
        for arm, found in zip(arms, means, strict=True):
            if found is None:
                continue
            style, (x, y, low, high, is_end) = _style(arm, arms, shown), found
            ax.plot(x, y, markevery=is_end == 1, **style)
            if style["color"] != GREY:
                ax.fill_between(x, low, high, color=style["color"], alpha=0.07, lw=0)
                ends.append((x[-1], y[-1], f"{arm['arm']} {y[-1]:.0f}", style["color"]))
        for name in names:
            curves.draw_teachers(ax, runs, name)
        curves.label_ends(ax, ends, 0.05)

    return draw_one


def draw_costs(arms: list[dict], task: str, ax: Any, shown: list[str]) -> None:
    """A point for each trained arm, a line for each model as it is."""
    ends = []
    ax.set(xscale="log", xlabel="FLOPs of the whole chain", ylim=(-2, 100))
    ax.set_ylabel(f"{task}: accuracy, % (bars: 95 %)")
    for arm in arms:
        figure = arm["accuracy"][task]["figure"] if arm["seeds"] else None
        if not figure:
            continue
        mean, low, high = [100 * x for x in figure]
        style, flops = _style(arm, arms, shown), arm["cost"]["flops"]
        if not arm["chain"]:
            text = f"{arm['arm']}, as it is: {mean:.0f} %"
            curves.draw_level(ax, mean, text, style["ls"], "bottom")
        elif flops > 0:  # and known
            reach = [[mean - low], [high - mean]]
            style |= {"ls": ""}
            if style["color"] == GREY:
                ax.plot(flops, mean, **style)
            else:
                ax.errorbar(flops, mean, reach, capsize=3, elinewidth=1.2, **style)
                ends.append((flops, mean, f"{arm['arm']} {mean:.0f}", style["color"]))
    curves.label_ends(ax, ends, 0.05)


Draw = Callable[[Any, list[str]], None]


def save_panels(path: Path, title: str, draws: list[Draw], shown: list[list[str]]) -> None:
    """Save a picture: what each of `draws` draws into an axis, for the methods of each panel."""
    from matplotlib.ticker import EngFormatter

    columns = min(3, len(shown))
    padded = [*shown, *[None] * (-len(shown) % columns)]  # each begins a new line of panels
    every = list(itertools.product(draws, padded))
    lines = len(every) // columns
    figure, axes = curves.grid_of(lines, columns, 6.6, 4)
    for ax, (draw_one, methods) in zip(axes.flat, every, strict=True):
        if methods is None:
            ax.axis("off")
            continue
        ax.grid(alpha=0.3)
        draw_one(ax, methods)
        ax.xaxis.set_major_formatter(EngFormatter())
    figure.suptitle(title, fontsize=10)
    try:
        curves.save_picture(figure, path)
    except OSError as e:
        raise RunFailed(f"{path} could not be written ({e.strerror})") from None


def draw(results: Results, report: dict, out: Path) -> None:
    """curves.png, and cost.png with the first task of each arm."""
    arms, tasks = report["arms"], {}
    for arm in arms:
        evaluated = [task for task, found in arm["accuracy"].items() if found["figure"]]
        tasks |= dict.fromkeys(evaluated[:1])
    starts = dict.fromkeys(arm["model"] for arm in arms)
    lines, marks = [], []
    for i, start in enumerate(starts):
        lines.append(f"{curves.STYLES[i % 4]} {start}")
        marks.append(f"{curves.SYMBOLS[i % 6]} from {start}")
    name, shown = report["title"], panels(arms)
    title = f"{name}: learning curves, mean over seeds; from {', '.join(lines)}; {BANDS}"
    save_panels(out / "curves.png", title, [draw_curves(results, arms)], shown)
    title = f"{name}: accuracy against cost; marks: {', '.join(marks)}"
    draws = [partial(draw_costs, arms, task) for task in tasks or [""]]
    save_panels(out / "cost.png", title, draws, shown)
