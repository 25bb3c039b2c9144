"""What a run shows at its end: a table of what was measured, and the curves."""

from pathlib import Path

from run import read_metrics, run_of


def series(metrics, name):
    points = [(m["step"], m[name]) for m in metrics if name in m]
    return [p[0] for p in points], [p[1] for p in points]


def eval_names(metrics):
    return sorted({name for m in metrics for name in m if name.startswith("eval/")})


STEPWISE = (
    "train/loss",
    "rollout/reward",
    "rollout/spread",
    "train/entropy",
)  # where a run has them


def summary(run, teacher_folder=None):
    """The table at the end of a run: held-out measures before and after, beside the teacher's where they are known."""
    metrics = read_metrics(run)
    teacher_run = run_of(teacher_folder) if teacher_folder else None
    teacher = read_metrics(teacher_run) if teacher_run else []
    rows = []
    for name in eval_names(metrics):
        if name.endswith("/problems") or "_from_" in name:
            continue
        steps, values = series(metrics, name)
        of_teacher = series(teacher, name)[1]
        before = _show(name, values[0]) if steps[0] == 0 else "-"  # not evaluated then
        rows.append(
            [
                name,
                before,
                _show(name, values[-1]),
                _show(name, of_teacher[-1]) if of_teacher else "-",
            ]
        )
    for name in STEPWISE:
        if values := series(metrics, name)[1]:
            rows.append(
                [name, f"{values[0]:.4f}", f"{sum(values[-20:]) / len(values[-20:]):.4f}", "-"]
            )
    rows = [["", "before", "after", "teacher"], *rows]
    widths = [max(len(r[i]) for r in rows) for i in range(4)]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths)))
        for r in rows
    ]
    counted = series(metrics, "train/tokens")[1]
    tokens = f"{counted[-1]:,}" if counted else "an unknown number of"
    seconds = sum(m.get("train/seconds", 0) for m in metrics)
    steps = metrics[-1]["step"] if metrics else 0
    lines.append(
        f"{steps} steps, {tokens} tokens in {seconds:.0f} s of training; {run}/curves.png shows the curves"
    )
    return "\n" + "\n".join(lines)


def _show(name, value):
    return (
        f"{value:.1%}"
        if name.endswith(("/accuracy", "/lenient", "/stopped", "/top1"))
        else f"{value:.4f}"
    )


def draw_curves(run):
    """curves.png: what every step measured, smoothed, then every held-out measure, over steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metrics = read_metrics(run)
    names = [n for n in STEPWISE if n == "train/loss" or series(metrics, n)[0]]
    names += [n for n in eval_names(metrics) if n.endswith(("/accuracy", "/loss"))]
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.5 * columns, 3.2 * rows), squeeze=False)
    for ax in axes.flat[len(names) :]:
        ax.axis("off")
    for ax, name in zip(axes.flat, names):
        x, y = series(metrics, name)
        if name in STEPWISE:
            ax.plot(x, y, color="#b9cbe6", linewidth=0.8)
            window = max(1, len(y) // 40)
            smooth = [
                sum(y[max(0, i - window) : i + 1]) / len(y[max(0, i - window) : i + 1])
                for i in range(len(y))
            ]
            ax.plot(x, smooth, color="#2b5c9e")
            if name == "train/loss" and y and min(y) > 0:
                ax.set_yscale("log")
        else:
            ax.plot(x, y, "o-", color="#c4572e")
        if name.endswith("accuracy"):
            ax.set_ylim(0, 1)
        ax.set(title=name, xlabel="step")
        ax.grid(alpha=0.3)
    figure.suptitle(Path(run).name, fontsize=9)
    figure.tight_layout()
    figure.savefig(Path(run) / "curves.png", dpi=120)
    plt.close(figure)
