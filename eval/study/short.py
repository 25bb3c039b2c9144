"""The top of a study's report, computed: which arm won, by how much, how sure, at what cost, what
to run next; and its end: where everything is.
"""

import statistics
from pathlib import Path

from eval.stats import half_width
from eval.study.results import Results
from eval.tables import asked, cost_cells, points
from run import RunFolder

MOST = 1000  # seeds that are worth a thought
NAMED = 8  # arms at most in one sentence


def in_short(results: Results, report: dict) -> dict | None:
    """The best arm of the first task, and every other one against it; None if nothing is done."""
    task = next(iter(report["tasks"]), None)
    arms = [arm for arm in report["arms"] if task and arm["accuracy"][task]["figure"]]
    if not arms:
        return None
    arms.sort(key=lambda arm: -arm["accuracy"][task]["figure"][0])
    best, *others = arms
    own = results.evaluations(best["arm"], task)
    against = []
    for arm in others:
        found = results.difference(own, results.evaluations(arm["arm"], task), task)
        against.append({"arm": arm["arm"], **found})
    starts = {}
    for arm in arms:  # the best comes first
        if arm["chain"] and arm["gain"][task]["figure"]:
            starts.setdefault(arm["model"], arm["arm"])
    return {"task": task, "arm": best["arm"], "against": against, "best_from": starts}


def more_seeds(count: int) -> int:
    """How many seeds halve the interval of the mean that `count` (two or more) have given."""
    return next(n for n in range(count, MOST) if half_width(n) <= half_width(count) / 2)


def sentences(report: dict) -> list[str]:
    """What `in_short` found, in words."""
    short = report["short"]
    if not short:
        return []
    task, against = short["task"], short["against"]
    arms = {arm["arm"]: arm for arm in report["arms"]}
    best = arms[short["arm"]]
    lines = [
        f"**Highest on {task}**: {best['arm']}, {points(best['accuracy'][task]['figure'])} % "
        f"({_seeds(best['seeds'])}), of {len(against) + 1} arms. "
        "The highest of several flatters itself."
    ]
    compared = [other for other in against if other["figure"]]
    if not compared:
        return lines
    following, near = compared[0], [o["arm"] for o in compared if o["figure"][1] <= 0]
    lines.append(
        f"**By how much**: {points(following['figure'], '+')} points over the next one, "
        f"{following['arm']} (paired on {following['problems']:,} problems and "
        f"{_seeds(following['each'])}, p "
        f"{following['p']:.2g} by sign flips over problems; asked "
        f"{asked(following['asked_differently'])})."
    )
    lines.append(
        f"**Not shown to be below it** (by the paired 95 % interval; of {len(compared)} "
        f"comparisons, not corrected for their number): {_names(near)}."
    )
    cost = ", ".join(
        f"{cell} {name}" for name, cell in cost_cells(best["cost"]).items() if cell not in "-0"
    )
    line = f"**Cost of {best['arm']}**: {cost or 'none: a model as it is'}."
    flops = {name: arms[name]["cost"].get("flops", 0) for name in arms}
    known = [name for name in near if arms[name]["chain"] and flops[name] > 0]
    if known and flops[best["arm"]] > 0:
        cheapest = min(known, key=lambda name: flops[name])
        ratio = flops[cheapest] / flops[best["arm"]]
        line += f" The cheapest of those, {cheapest}, takes {ratio:.2g} times its FLOPs."
    lines.append(line)
    gains = [
        f"{arm} {points(arms[arm]['gain'][task]['figure'], '+')} over {start}"
        for start, arm in short["best_from"].items()
    ]
    if gains:
        lines.append(f"**The best from each start**, in points: {'; '.join(gains)}.")
    return [*lines, _next(report, following, [best["arm"], *(near or [following["arm"]])])]


def _seeds(found: list) -> str:
    return f"{len(found)} seed" + "s" * (len(found) != 1)


def _names(arms: list[str]) -> str:
    more = f" and {len(arms) - NAMED} more" * (len(arms) > NAMED)
    return (", ".join(arms[:NAMED]) + more) or "none"


def _next(report: dict, following: dict, arms: list[str]) -> str:
    """What would make the margin over the following arm more certain."""
    have, each = list(report["seeds"]), following["each"]
    wanted = 3
    if len(each) < 2:
        line = "one seed in common says nothing of how seeds differ, so three of them"
    elif statistics.pstdev(each) == 0:
        return "**Next**: the seeds agree exactly, and more problems narrow the intervals."
    else:
        wanted = more_seeds(len(each))
        line = f"{wanted} seeds (now {len(each)}) for half the interval over seeds"
    new = (seed for seed in range(wanted + max(have) + 1) if seed not in have)
    seeds = have + [next(new) for _ in range(wanted - len(have))]
    shown = ",".join(map(str, seeds)) if len(seeds) <= NAMED else f"{seeds[0]},…,{seeds[-1]}"
    only = f"--arms {','.join(arms)} " if len(arms) <= NAMED else ""
    return (
        f"**Next**: {line}, as in `{only}--seeds {shown}`; half the "
        f"interval over problems takes {4 * following['problems']:,} of them (now "
        f"{following['problems']:,})."
    )


def where(results: Results, out: Path) -> list[dict[str, str]]:
    """{heading: cell} of every run of each arm and seed; paths from the study's folder on."""
    rows = []
    for (arm, seed), outcome in results.outcomes.items():
        evals = str(outcome.evals.relative_to(out)) if outcome.evals else "-"
        for run in outcome.runs or [None]:
            row = {"seed": str(seed), "arm": arm, "checkpoint": "-", "evaluation": evals}
            row["command"] = "none: the model as it is"
            if run:
                steps = RunFolder(run).steps()
                path = run.relative_to(out)
                if steps:
                    row["checkpoint"] = f"{path}/checkpoints/step-{steps[-1]}"
                row["command"] = (
                    f"`python train.py --config STUDY/{path}/config.json --runs STUDY/runs-again`"
                )
            rows.append(row)
    return rows
