"""Figures of evaluations as tables: lists of rows of strings, the heading first."""

import math
from collections.abc import Sequence

from curves import COSTS, Table
from eval.summary import Comparison, Interval, Summary

COMPARISON_HEADING = ["checkpoint", "minus", "task", "problems", "difference", "p (sign flips)"]
COMPARISON_HEADING += ["better on", "worse on", "asked"]


def table(summaries: list[Summary]) -> Table:
    """Figures by checkpoint and task. Rates in %, with intervals of 95 % over problems."""
    rates = list(dict.fromkeys(name for summary in summaries for name in summary.figures.rates))
    shares = ("lenient", "math_verify", "unparsed", "truncated")
    heading = ["checkpoint", "task", "problems", "samples", *rates, *shares, "tokens", "tokens/s"]
    rows = [[name.replace("_", "-") for name in heading]]
    for checkpoint, task, figures in summaries:
        row = [checkpoint, task, cell(figures.problems, ",.0f"), cell(figures.samples, ",.0f")]
        row += [_interval(figures.rates.get(name)) for name in rates]
        row += [_percent(getattr(figures, name)) for name in shares]
        row += [cell(figures.tokens, ",.0f"), cell(figures.tokens_per_second, ",.0f")]
        rows.append(row)
    return rows


def comparison_table(comparisons: list[Comparison]) -> Table:
    """Differences of accuracy by checkpoint and task, and whether both sides were asked alike."""
    rows = [COMPARISON_HEADING]
    for checkpoint, other, task, paired in comparisons:
        interval = Interval(paired["difference"], paired["low"], paired["high"])
        row = [checkpoint, other, task, str(paired["problems"]), _interval(interval)]
        row += [f"{paired['p']:.2g}", str(paired["better"]), str(paired["worse"])]
        rows.append([*row, asked(paired["asked_differently"])])
    return rows


def asked(differing: dict) -> str:
    """A cell that says whether two results were asked alike (summary.asked_differently)."""
    return "differently: " + ", ".join(differing) if differing else "alike"


def markdown(rows: Table) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


def cell(value: float | str | None, form: str) -> str:
    """A number; "-" where it is not known; a text as it is."""
    if value is None or value != value:
        return "-"
    return value if isinstance(value, str) else f"{value:{form}}"


def cost_cells(cost: dict[str, float]) -> dict[str, str]:
    """{heading: cell} of each of COSTS."""
    found = {}
    for name in COSTS:
        form = ".3g" if name in ("flops", "device_hours") else ",.0f"
        found[name.replace("_", " ").replace("flops", "FLOPs")] = cell(cost.get(name), form)
    return found


def points(figure: Sequence[float] | None, sign: str = "") -> str:
    """[mean, low, high], or only [low, high], in %; bounds that are no numbers are left out."""
    if not figure:
        return "-"
    if math.isnan(figure[-1]):
        return f"{100 * figure[0]:{sign}.1f}"
    *mean, low, high = [f"{100 * x:{sign}.1f}" for x in figure]
    return " ".join([*mean, f"[{low}, {high}]"])


def _interval(value: Interval | None) -> str:
    if value and math.isnan(value.low):
        return f"{value.mean:.1%}"
    return points(value)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
