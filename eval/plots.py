"""The picture of an evaluation: accuracies and their intervals."""

from pathlib import Path

from errors import RunFailed
from eval.summary import Summary


def draw(summaries: list[Summary], path: Path) -> None:
    """Draw accuracy and, lighter, pass@k with their intervals, by task and checkpoint.

    Raises:
        RunFailed: if the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(summary.task for summary in summaries))
    names = list(dict.fromkeys(summary.checkpoint for summary in summaries))
    figure, ax = plt.subplots(figsize=(4.5 + 1.3 * len(tasks) * max(1, len(names) / 2), 3.8))
    labelled = set()  # every series stands once in the legend
    for name, task, figures in summaries:
        i = names.index(name)
        x = tasks.index(task) + 0.7 * ((i + 0.5) / len(names) - 0.5)
        shown = ["accuracy", *(rate for rate in figures.rates if rate.startswith("pass@"))]
        for j, rate in enumerate(shown):
            mean, low, high = figures.rates[rate]
            label = f"{name} {rate}" if j else name
            ax.errorbar(
                x + 0.04 * j,
                100 * mean,
                [[100 * max(0, mean - low)], [100 * max(0, high - mean)]],
                label=None if label in labelled else label,
                linestyle="",
                color=f"C{i}",
                alpha=0.45 if j else 1.0,
                marker="^" if j else "o",
                capsize=3,
            )
            labelled.add(label)
    ax.set(
        xticks=range(len(tasks)),
        xticklabels=tasks,
        xlim=(-0.6, len(tasks) - 0.4),
        ylim=(0, 100),
        ylabel="% of problems (95 % interval)",
    )
    ax.grid(axis="y", alpha=0.3)
    ax.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))  # beside the points
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=120)
    except OSError as e:
        raise RunFailed(
            f"{path} could not be written ({e.strerror}); the samples and tables are complete"
        ) from None
    finally:
        plt.close(figure)
