"""The report of a study: what its arms reached beside the paper's numbers, what they cost, how far
they moved from their start, and samples of what they answer.
"""

import hashlib
import json
import re
import textwrap
from pathlib import Path

from curves import aligned
from eval.study.plan import Study
from eval.study.plots import draw
from eval.study.results import Outcomes, Results, collect, samples_of
from eval.study.short import in_short, sentences, where
from eval.study.tables import claims_table, footnotes, kl_table, listed, main_table
from eval.tables import markdown
from files import replace_file

SHOWN = 2  # samples of each verdict for an arm in samples.md
LENGTH = 1200  # characters of a sample at most

NOTES = """Accuracy: % of samples whose marked answer is right, mean over seeds. Its 95 % interval
is over seeds by Student's t, for these problems (of two or three seeds it is wide: 12.7 and 4.3
standard errors); of one seed, or where all agree exactly, over problems. Gain: over the starting
model as it is. Cost: of the whole chain, mean over seeds. Runs and traces that arms share are
charged to each in full (traces as teacher tokens, FLOPs and seconds); making the starting models
and evaluating are not charged; nor are seconds that were not recorded (of an interrupted session,
or of filling a teacher's cache). Device hours: seconds times ranks. "-": not done, or not known.
†: the arm and its start were asked differently, so that the gain is not of training alone."""
CLAIM_NOTES = """Ours: accuracy of the arm said to be better less the other's, in points, paired
by problem and seed. Over problems: bootstrap of problems, seeds pooled (what if the problems were
others?). Over seeds: Student's t of the seeds' differences (what if the runs were?). The interval
beside the difference, and beside every gain above, holds both: their half-widths squared and
added, rather too wide than too narrow; of one seed it knows of problems only. "agrees": it
excludes 0, with the sign of the paper's difference (of single runs; where the paper has none,
with that of the claim); "contradicts": with the other sign; "not shown": it holds 0. All
intervals are of 95 %, not corrected for the number of claims."""
KL_NOTES = """Nats per token, mean over seeds; start: the model that the chain began from. KL(arm,
start) on the arm's own text: how far what it writes is from what the start would write. KL(start,
arm) on the start's text: how unlikely the old behaviour has become, which is forgetting. Top-1: %
of tokens where both have the same most likely one. Entropy: how undecided each is; an arm far
below its start has lost variety."""

WHERE_NOTES = """Paths from this folder on; a chain has a line for each of its runs. The command
makes the run again, elsewhere: in the project's folder, with the path of this one for STUDY."""


def fenced(text: str) -> str:
    """A block of Markdown that nothing in the text can end, cut off after LENGTH characters."""
    if len(text) > LENGTH:
        text = f"{text[:LENGTH]}… ({len(text) - LENGTH:,} more characters)"
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def samples_page(results: Results) -> str:
    """Right and wrong samples of every arm, for its first seed.

    The draw is the same every time, first of problems that an arm before has shown.
    """
    shown = set()
    parts = ["# Samples: a question with its gold answer, then what the arm wrote"]

    def order(row: dict) -> tuple[bool, bytes, int]:
        digest = hashlib.sha256(row["question"].encode()).digest()
        return row["question"] not in shown, digest, row["sample"]

    for arm in results.arms:
        for seed in results.done(arm)[:1]:
            task = next(iter(results.figures[arm, seed]))
            parts.append(f"## {arm}, seed {seed}, on {task}")
            rows = samples_of(results.outcomes[arm, seed].evals, task).read().values()
            rows = sorted(rows, key=order)
            for verdict in ("right", "wrong"):
                first = {}  # of each problem
                for row in rows:
                    if row["strict"] == (verdict == "right"):
                        first.setdefault(row["question"], row)
                for question, row in list(first.items())[:SHOWN]:
                    shown.add(question)
                    ended = "stopped by itself" if row["stopped"] else "cut off"
                    parts.append(
                        f"**{verdict}**, {ended}: problem {row['problem']}, "
                        f"sample {row['sample']}, {row['tokens']:,} tokens"
                    )
                    parts += [fenced(f"{question}\n\ngold: {row['gold']}"), fenced(row["text"])]
    return "\n\n".join(parts) + "\n"


def page(report: dict, failed: list[str]) -> str:
    """report.md. failed: a line for each arm and seed that failed."""
    moved = kl_table(report["arms"])
    parts = [f"# {report['title']}"]
    if report["short"]:
        parts += ["## In short", "\n".join(f"- {line}" for line in sentences(report))]
        parts.append("## All arms")
    parts += [f"- {line}" for line in report["conditions"] + report["training"]]
    parts += [markdown(listed(main_table(report))), *footnotes(report), *failed]
    if failed:
        parts.append("Failed seeds are left out of the means, which flatters their arms.")
    parts.append(NOTES)
    if report["claims"]:
        claims = markdown(listed(claims_table(report["claims"])))
        parts += ["## What the paper concludes", claims, CLAIM_NOTES]
    parts += [
        "## Learning curves, on the validation examples of the runs",
        "![validation accuracy against student tokens](curves.png)",
        "## Accuracy against cost",
        "![accuracy against FLOPs](cost.png)",
    ]
    if moved:
        parts += ["## How far the arms moved", markdown(listed(moved)), KL_NOTES]
    if report["where"]:
        parts += ["## Where everything is", markdown(listed(report["where"])), WHERE_NOTES]
    parts.append("What the arms write: [samples.md](samples.md)")
    return "\n\n".join(parts) + "\n"


def summary(report: dict, failed: list[str]) -> list[str]:
    """The main columns, for the terminal."""
    rows = main_table(report)
    columns = ["arm", "seeds"]
    for task in report["tasks"][:1]:
        columns += [task, f"gain {task}"]
    columns += [heading for heading in rows[0] if heading.startswith("paper ")][:1]
    parts = [aligned(listed(rows, [*columns, "student tokens", "FLOPs", "seconds"]))]
    if report["claims"]:
        columns = ["claim", "ours: difference", "seeds of that sign", "paper", "asked", "verdict"]
        parts.append(aligned(listed(claims_table(report["claims"]), columns)))
    training = [textwrap.fill(line, 150) for line in report["training"] + sentences(report)]
    return [*parts, *footnotes(report), *training, *failed]


def write(out: Path, study: Study, outcomes: Outcomes) -> str:
    """Write report.md, report.json, samples.md and the pictures into `out`.

    outcomes: what the arms of the study have left behind. Returns the text for the terminal.
    """
    results = Results(study.seeds, study.arms, outcomes)
    for key, failure in results.failures.items():
        # one line, the same wherever the study's folder is
        words = failure.replace(f"{out.resolve()}/", "").replace(f"{out}/", "").split()
        results.failures[key] = " ".join(words)
    failed = [f"{arm}, seed {s} FAILED: {text}" for (arm, s), text in results.failures.items()]
    report = collect(results, study.title, study.claims)
    report |= {"short": in_short(results, report), "where": where(results, out)}
    draw(results, report, out)
    replace_file(out / "samples.md", samples_page(results))
    # JSON has no NaN, which is the interval of a single problem: null there
    valid = json.loads(json.dumps(report), parse_constant=lambda name: None)
    text = json.dumps(valid, indent=1, sort_keys=True, ensure_ascii=False)
    replace_file(out / "report.json", text + "\n")
    replace_file(out / "report.md", page(report, failed))
    written = f"{out}: report.md, report.json, samples.md, curves.png, cost.png"
    return "\n\n".join([*summary(report, failed), written])
