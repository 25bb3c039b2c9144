"""The tables of a study's report, as rows of strings with the heading first."""

from eval.tables import asked, cell, cost_cells, points

MARK = " †"  # behind a gain whose two sides were asked differently


def main_table(report: dict) -> list[dict[str, str]]:
    """{heading: cell} of each arm."""
    rows = []
    for arm in report["arms"]:
        row = {
            "arm": arm["arm"],
            "chain": " → ".join([arm["model"], *arm["chain"]]),
            "seeds": f"{len(arm['seeds'])} of {len(report['seeds'])}",
        }
        papers = {f"paper {c}": cell(arm["paper"].get(c), ".1f") for c in report["columns"]}
        for task in report["tasks"]:
            gain = arm["gain"][task]
            mark = MARK if gain["asked_differently"] else ""
            row[task] = points(arm["accuracy"][task]["figure"])
            if f"paper {task}" in papers:  # beside ours; the others follow below
                row[f"paper {task}"] = papers[f"paper {task}"]
            row[f"gain {task}"] = points(gain["figure"], "+") + mark
            for name, found in arm["pass_at_k"][task].items():
                row[f"{name} {task}"] = points(found["figure"])
        rows.append(row | papers | cost_cells(arm["cost"]))
    return rows


def footnotes(report: dict) -> list[str]:
    """What the marks of the gains stand for."""
    lines = []
    for arm in report["arms"]:
        for task, gain in arm["gain"].items():
            if gain["asked_differently"]:
                how = asked(gain["asked_differently"])
                lines.append(f"†: {arm['arm']} on {task} was asked {how}")
    return lines


def claims_table(claims: list[dict]) -> list[dict[str, str]]:
    """{heading: cell} of each claim."""
    rows = []
    for claim in claims:
        ours, each, paper = claim["ours"], claim["ours"]["each"], claim["paper"]
        same = [difference for difference in each if difference * ours["figure"][0] > 0]
        verdict = claim["verdict"]
        if len(each) == 1 and "paper" not in verdict:
            verdict += " (one seed)"
        on = "" if isinstance(paper, str | None) else f" on {claim['column']}"
        rows.append(
            {
                "claim": claim["text"],
                "on": claim["task"] or "-",
                "ours: difference": points(ours["figure"], "+"),
                "over problems": points(ours["over_problems"], "+"),
                "over seeds": points(ours["over_seeds"], "+"),
                "seeds of that sign": f"{len(same)} of {len(each)}" if each else "-",
                "paper": cell(paper, "+.1f") + on,
                "asked": asked(ours["asked_differently"]) if each else "-",
                "verdict": verdict,
            }
        )
    return rows


# whose text, its name in kl/*.json, and the divergence that is measured on it
SIDES = (
    ("own text", "on_own", "KL(arm, start)", "reverse_kl"),
    ("start's text", "on_reference", "KL(start, arm)", "forward_kl"),
)


def kl_table(arms: list[dict]) -> list[dict[str, str]]:
    """{heading: cell} of each arm with a divergence from its start."""
    rows = []
    for arm in arms:
        row = {"arm": arm["arm"]}
        for text, side, name, kl in SIDES:
            columns = {name: kl, "top-1": "top1"}
            columns |= {"entropy": "entropy", "start's entropy": "teacher_entropy"}
            for heading, measure in columns.items():
                form = ".1%" if measure == "top1" else ".4f"
                value = cell(arm["kl"].get(f"{side}/{measure}"), form)
                row[f"{heading}, {text}"] = value.removesuffix("%")
        if arm["kl"]:
            rows.append(row)
    return rows


def listed(rows: list[dict[str, str]], headings: list[str] | None = None) -> list[list[str]]:
    """Rows of cells, the heading first; of these columns only if they are named."""
    headings = headings or list(rows[0])
    return [headings, *([row[heading] for heading in headings] for row in rows)]
