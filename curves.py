"""What a run shows at its end: a table of what was measured, and the curves."""

from pathlib import Path
from typing import Any

import numpy as np

from run import read_metrics, run_of

STEPWISE = ("train/loss", "rollout/reward", "rollout/spread", "train/entropy")  # if a run has them
FRACTIONS = ("/accuracy", "/lenient", "/stopped", "/top1", "/overlap", "_mass", "/half_gradient")

Metrics = list[dict[str, Any]]  # the lines of metrics.jsonl


def series(metrics: Metrics, name: str) -> tuple[list[int], list[float]]:
    """Return the steps at which a metric was measured, and its values."""
    lines = [line for line in metrics if name in line]
    return [line["step"] for line in lines], [line[name] for line in lines]


def eval_names(metrics: Metrics) -> list[str]:
    return sorted({name for line in metrics for name in line if name.startswith("eval/")})


def result_rows(run: str | Path, teacher_folder: str | Path | None = None) -> list[list[str]]:
    """Return the table at the end of a run: metrics before and after, beside the teacher's.

    teacher_folder: the teacher's checkpoint; what its run measured last is shown, if it is known.
    """
    metrics = read_metrics(run)
    teacher_run = run_of(teacher_folder) if teacher_folder else None
    teacher = read_metrics(teacher_run) if teacher_run else []
    rows = [["", "before", "after", "teacher"]]
    for name in eval_names(metrics):
        if not name.endswith("/problems") and "_from_" not in name:
            steps, values = series(metrics, name)
            before = values[0] if steps[0] == 0 else None
            shown = [before, values[-1], *series(teacher, name)[1][-1:], None]
            rows.append([name, *(_format(name, value) for value in shown[:3])])
    for name in STEPWISE:
        values = series(metrics, name)[1]
        if values:
            last = values[-20:]
            rows.append([name, f"{values[0]:.4f}", f"{sum(last) / len(last):.4f}", "-"])
    return rows


def summary(run: str | Path, rows: list[list[str]]) -> str:
    """Return the text at the end of a run: its `result_rows`, and what it took."""
    metrics, lines = read_metrics(run), [""]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    counted = series(metrics, "train/tokens")[1]
    tokens = f"{counted[-1]:,}" if counted else "an unknown number of"
    seconds = sum(series(metrics, "train/seconds")[1])
    steps = metrics[-1]["step"] if metrics else 0
    lines.append(
        f"{steps} steps, {tokens} tokens in {seconds:.0f} s of training; "
        f"{run}/curves.png shows the curves"
    )
    return "\n".join(lines)


def _format(name: str, value: float | None) -> str:
    if value is None:
        return "-"  # not measured
    return f"{value:.1%}" if name.endswith(FRACTIONS) else f"{value:.4f}"


def draw_curves(run: str | Path) -> None:
    """Draw curves.png: what every step measured, with a moving average, then the evaluations."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metrics = read_metrics(run)
    names = [name for name in STEPWISE if name == "train/loss" or series(metrics, name)[0]]
    names += [name for name in eval_names(metrics) if name.endswith(("/accuracy", "/loss"))]
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    size = (4.5 * columns, 3.2 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for ax in axes.flat[len(names) :]:
        ax.axis("off")
    for ax, name in zip(axes.flat, names, strict=False):
        steps, values = series(metrics, name)
        if name in STEPWISE and values:
            ax.plot(steps, values, color="#b9cbe6", linewidth=0.8)
            window = max(1, len(values) // 40) + 1
            counts = np.minimum(np.arange(len(values)) + 1, window)
            sums = np.convolve(values, np.ones(window))[: len(values)]
            ax.plot(steps, sums / counts, color="#2b5c9e")
            if name == "train/loss" and min(values) > 0:
                ax.set_yscale("log")
        else:
            ax.plot(steps, values, "o-", color="#c4572e")
        if name.endswith("accuracy"):
            ax.set_ylim(0, 1)
        ax.set(title=name, xlabel="step")
        ax.grid(alpha=0.3)
    figure.suptitle(Path(run).name, fontsize=9)
    figure.tight_layout()
    figure.savefig(Path(run) / "curves.png", dpi=120)
    plt.close(figure)
