"""The picture of an evaluation: accuracies and their intervals."""

from pathlib import Path

from curves import SYMBOLS, save_picture, style
from errors import RunFailed
from eval.summary import Summary


def draw(summaries: list[Summary], path: Path) -> None:
    """Draw a panel for each task with a line for each checkpoint: accuracy, pass@k, intervals.

    Raises:
        RunFailed: if the file cannot be written.
    """
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(summary.task for summary in summaries))
    names = list(dict.fromkeys(summary.checkpoint for summary in summaries))
    rates = dict.fromkeys(rate for summary in summaries for rate in summary.figures.rates)
    shown = [rate for rate in rates if "majority" not in rate]
    figure = Figure(figsize=(2.5 + 3.2 * len(tasks), 1.5 + 0.45 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for name, task, figures in summaries:
        ax = axes[tasks.index(task)]
        for place, rate in enumerate(shown):
            if rate not in figures.rates:
                continue
            mean, low, high = (100 * value for value in figures.rates[rate])
            height = names.index(name) + 0.16 * (place - (len(shown) - 1) / 2)
            ax.errorbar(
                mean,
                height,
                xerr=[[max(0, mean - low)], [max(0, high - mean)]],
                ms=5,
                capsize=2,
                **style(place, 0) | {"ls": ""},
            )
            if rate == "accuracy":
                ax.annotate(
                    f"{mean:.1f}", (mean, height), (0, 4), textcoords="offset points", fontsize=7
                )
    for ax, task in zip(axes, tasks, strict=True):
        ax.set(title=task, xlim=(0, 100), xlabel="% of problems", ylim=(len(names) - 0.5, -0.5))
        ax.set_yticks(range(len(names)), names)
        ax.grid(alpha=0.3)
    marks = [f"{SYMBOLS[i % 6]} {rate}" for i, rate in enumerate(shown)]
    figure.suptitle(f"{', '.join(marks)}; bars: 95 %, problems resampled", fontsize=9)
    try:
        save_picture(figure, path)
    except OSError as e:
        raise RunFailed(
            f"{path} could not be written ({e.strerror}); the samples and tables are complete"
        ) from None
