"""The report of a study: what its arms reached beside the paper's numbers, what they cost, how far they moved, what they write. A figure is [mean, low,
high]. Accuracies are those of `python -m eval`, costs those of the runs' metrics.jsonl; times are under the names seconds and device_hours alone."""

import dataclasses
import functools
import hashlib
import json
import math
import re
import statistics
import textwrap
from pathlib import Path

import numpy as np

from errors import RunFailed
from eval.stats import paired, student_t
from eval.summary import Samples, asked_differently, counts
from eval.tables import aligned, asked, markdown
from files import read_json, replace_file
from run import read_metrics

COSTS = ("student_tokens", "sampled_tokens", "teacher_tokens", "flops", "seconds", "device_hours")
MARK = " †"  # behind a gain whose two sides were asked differently
SHOWN, LENGTH = (
    2,
    1200,
)  # samples of each verdict for an arm in samples.md, and their characters at most
NOTES = """Accuracy: % of samples whose marked answer is right, mean over seeds. Its 95 % interval is over seeds by Student's t, for these problems (of two or
three seeds it is wide: 12.7 and 4.3 standard errors); of one seed, or where all agree exactly, over problems. Gain: over the starting model as it is.
Cost: of the whole chain, mean over seeds. Runs and traces that arms share are charged to each in full (traces as teacher tokens, FLOPs and seconds); making
the starting models and evaluating are not charged; nor the seconds (of an interrupted session, or of filling a teacher's cache) that nobody kept. Device hours: seconds times ranks. "-": not done, or not known. †: the arm and its start were asked differently, so that the gain is not of training alone."""
CLAIM_NOTES = """Ours: accuracy of the arm said to be better less the other's, in points, paired by problem and seed. Over problems: bootstrap of problems, seeds
pooled (what if the problems were others?). Over seeds: Student's t of the seeds' differences (what if the runs were?). The interval beside the difference, and
beside every gain above, holds both: their half-widths squared and added, rather too wide than too narrow; of one seed it knows of problems only. "agrees": it
excludes 0, with the sign of the paper's difference (of single runs; where the paper has none, with that of the claim); "contradicts": with the other sign; "not shown": it holds 0. All are of 95 %, not
corrected for the number of claims."""
KL_NOTES = """Nats per token, mean over seeds; start: the model that the chain began from. KL(arm, start) on the arm's own text: how far what it writes is from
what the start would write. KL(start, arm) on the start's text: how unlikely the old behaviour has become, which is forgetting. Top-1: % of tokens where both have
the same likeliest one. Entropy: how undecided each is; an arm far below its start has lost variety."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One arm with one seed: its run folders in order, the traces folders that they were trained on, its evaluation and that of what the chain began
    from, its divergence from that."""

    chain: tuple
    traces: tuple
    evals: Path | None
    before: Path | None
    kl: Path | None
    failed: str = ""


class Study:
    """What is done, by (arm, seed)."""

    def __init__(self, seeds, arms, outcomes):
        keys = [(arm, s) for arm in arms for s in seeds if (arm, s) in outcomes]
        self.outcomes = {
            k: o
            for k in keys
            if (o := outcomes[k]).evals and not o.failed and (o.evals / "summary.json").exists()
        }
        self.seeds, self.arms, self.summaries = (
            seeds,
            arms,
            {k: read_json(o.evals / "summary.json") for k, o in self.outcomes.items()},
        )
        self.figures = {
            key: {task: figures["accuracy"] for _, task, figures in s["summaries"]}
            for key, s in self.summaries.items()
        }
        self.tasks = list(
            dict.fromkeys(task for figures in self.figures.values() for task in figures)
        )
        self.columns = list(
            dict.fromkeys(
                c
                for table in arms.values()
                if isinstance(table.get("paper"), dict)
                for c in table["paper"]
            )
        )
        self.papers = {
            arm: p if isinstance(p := table.get("paper"), dict) else dict.fromkeys(self.columns, p)
            for arm, table in arms.items()
        }
        self.counts = functools.cache(lambda evals, task: counts(samples(evals, task)))
        self.stated = functools.cache(stated)

    def of(self, arm, task=None):
        """The seeds of an arm that are done."""
        return [
            s
            for s in self.seeds
            if (arm, s) in self.figures and task in (None, *self.figures[arm, s])
        ]

    def accuracy(self, arm, task):
        every = [self.figures[arm, s][task] for s in self.of(arm, task)]
        mean, reach = over_seeds(each := [figure[0] for figure in every])
        figure = (
            [mean, max(0.0, mean - reach), min(1.0, mean + reach)]
            if reach
            else every[0]
            if every
            else None
        )
        return {"figure": figure, "each": each, "over": "seeds" if reach else "problems"}

    def claimed(self, better, worse, task):
        """Accuracy of one arm less that of another."""
        seeds = [s for s in self.of(better, task) if s in self.of(worse, task)]
        return self.difference(
            [(self.outcomes[better, s].evals, self.outcomes[worse, s].evals) for s in seeds], task
        )

    def gain(self, arm, task):
        """Accuracy of an arm less that of what its chain began from."""
        done = [self.outcomes[arm, s] for s in self.of(arm, task)]
        return self.difference(
            [(o.evals, o.before) for o in done if o.before and self.arms[arm]["chain"]], task
        )

    def difference(self, evaluated, task):
        """Accuracy of the first less that of the second of each pair of evaluations, one for each seed, over the problems that all have."""
        pairs = [[self.counts(evals, task) for evals in pair] for pair in evaluated]
        both = sorted(set.intersection(*(set(c) for pair in pairs for c in pair))) if pairs else ()
        if not both:
            return {
                "figure": None,
                "each": [],
                "over_problems": None,
                "over_seeds": None,
                "asked_differently": {},
            }
        ours_SPX, theirs_SPX = (
            np.array([[c[key] for key in both] for c in each]) for each in zip(*pairs)
        )  # X: samples, right samples
        pooled = paired(theirs_SPX.sum(0).tolist(), ours_SPX.sum(0).tolist())
        each = (
            (ours_SPX[..., 1] / ours_SPX[..., 0] - theirs_SPX[..., 1] / theirs_SPX[..., 0])
            .mean(1)
            .tolist()
        )
        (mean, low, high), (_, reach) = (
            (pooled[name] for name in ("difference", "low", "high")),
            over_seeds(each),
        )
        figure = [
            mean,
            max(-1.0, mean - math.hypot(mean - low, reach)),
            min(1.0, mean + math.hypot(high - mean, reach)),
        ]
        differing = {}
        for pair in evaluated:
            differing = asked_differently(*(self.stated(evals, task) for evals in pair)) | differing
        return {
            "figure": figure,
            "each": each,
            "problems": len(both),
            "asked_differently": differing,
            "over_problems": [low, high],
            "over_seeds": [max(-1.0, mean - reach), min(1.0, mean + reach)] if reach else None,
        }

    def mean(self, arm, measure):
        """{name: mean over the seeds that are done; None where one of them does not know it}."""
        every = [found for s in self.of(arm) if (found := measure(self.outcomes[arm, s]))]
        return {
            k: None if None in (values := [f.get(k) for f in every]) else statistics.mean(values)
            for k in (every or [{}])[0]
        }


def kept_samples(evals, task):
    """The Samples of an evaluation of one checkpoint."""
    return Samples(evals / read_json(evals / "summary.json")["summaries"][0][0], task)


def samples(evals, task):
    """{(problem, sample): row} of an evaluation of one checkpoint."""
    return kept_samples(evals, task).read()


def stated(evals, task):
    """What an evaluation says of its conditions; None: nothing."""
    about = kept_samples(evals, task).about
    return read_json(about) if about.exists() else None


def over_seeds(values):
    """Mean and the reach of its interval by Student's t: 0 where seeds say nothing, because there is one or all agree."""
    mean, n = statistics.mean(values or [0.0]), len(values)
    return mean, student_t(0.975, n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else 0.0


def cost(outcome):
    """What the chain of one seed took; None for what one of its runs did not measure."""
    parts = []
    for run in outcome.chain:
        metrics = read_metrics(run)
        last, timed = (
            {k: v for row in metrics for k, v in row.items()},
            [row["train/seconds"] for row in metrics if "train/seconds" in row],
        )
        ranks = (
            read_json(run / "environment.json").get("ranks")
            if (run / "environment.json").exists()
            else None
        )
        tokens_and_flops = [
            last.get(f"train/{k}") for k in ("tokens", "sampled_tokens", "teacher_tokens", "flops")
        ]
        parts.append([*tokens_and_flops, *times(sum(timed) if timed else None, ranks)])
    for about in (read_json(folder / "samples.json") for folder in dict.fromkeys(outcome.traces)):
        made = about["generated"]
        parts.append(
            [
                0,
                0,
                made.get("tokens"),
                made.get("flops"),
                *times(made.get("seconds"), about["about"].get("environment", {}).get("ranks")),
            ]
        )
    return (
        {name: None if None in values else sum(values) for name, *values in zip(COSTS, *parts)}
        if parts
        else dict.fromkeys(COSTS, 0)
    )


def times(seconds, ranks):
    """Seconds and device hours; None where they are not known."""
    return seconds, None if seconds is None or ranks is None else seconds * ranks / 3600


def divergence(outcome):
    found = read_json(outcome.kl) if outcome.kl and outcome.kl.exists() else {}
    return {
        f"{text}/{measure}": value
        for text, measures in found.items()
        for measure, value in measures.items()
    }


def judge(study, claim):
    """A claim with our difference, the paper's own, and whether they agree."""
    column = claim.get("task") or next(iter(study.columns), None)
    task = (
        column
        if column in study.tasks
        else None
        if claim.get("task")
        else next(iter(study.tasks), None)
    )  # no other than was named
    theirs = [study.papers.get(claim[side], {}).get(column) for side in ("better", "worse")]
    paper = (
        "collapsed" if "collapsed" in theirs else None if None in theirs else theirs[0] - theirs[1]
    )
    ours = study.claimed(claim["better"], claim["worse"], task)
    verdict = "paper: collapsed" if paper == "collapsed" else "-"
    if ours["figure"] and paper != "collapsed":
        sign, expected = (
            (ours["figure"][1] > 0) - (ours["figure"][2] < 0),
            1 if paper is None else paper,
        )
        verdict = (
            "not shown"
            if not sign or not expected
            else "agrees"
            if sign * expected > 0
            else "contradicts"
        )
    return claim | {
        "task": task,
        "column": column,
        "ours": ours,
        "paper": paper,
        "verdict": verdict,
    }


def numbers(study, title, outcomes, claims, hide):
    """All that report.json holds."""
    arms = []
    for name, table in study.arms.items():
        model = str(table.get("model", "")).removeprefix("@")
        arms.append(
            {
                "arm": name,
                "model": Path(model).name if model.startswith("/") else model,
                "chain": table["chain"],
                "seeds": study.of(name),
                "failed": {
                    s: hide(o.failed)
                    for s in study.seeds
                    if (o := outcomes.get((name, s))) and o.failed
                },
                "paper": study.papers[name],
                "accuracy": {task: study.accuracy(name, task) for task in study.tasks},
                "gain": {task: study.gain(name, task) for task in study.tasks},
                "cost": study.mean(name, cost),
                "kl": study.mean(name, divergence),
            }
        )
    conditions = dict.fromkeys(
        line
        for s in study.summaries.values()
        for line in s["conditions"]
        if line not in s.get("training", ())
    )
    return {
        "title": title,
        "seeds": study.seeds,
        "tasks": study.tasks,
        "columns": study.columns,
        "arms": arms,
        "claims": [judge(study, c) for c in claims],
        "conditions": list(conditions),
        "training": training(study),
    }


def training(study):
    """Sentences on the test questions that arms were trained on, and on those of which nobody knows."""
    lines, arms_of = [], {}
    for (arm, seed), summary in study.summaries.items():
        kept = {task: (count, unknown) for _, task, count, unknown in summary.get("trained_on", ())}
        for task in study.figures[arm, seed]:
            count, unknown = kept.get(task, (None, ["a checkpoint evaluated before this was kept"]))
            if count:
                lines.append(
                    f"{arm}, seed {seed}, WAS TRAINED ON {'AT LEAST ' * bool(unknown)}{count:,} of {task}'s questions"
                )
            elif count is None:
                arms_of.setdefault((task, *unknown), []).append(arm)
    tasks_of = {}
    for (task, *unknown), arms in arms_of.items():
        tasks_of.setdefault((", ".join(dict.fromkeys(arms)), ", ".join(unknown)), []).append(task)
    for (arms, unknown), tasks in tasks_of.items():
        lines.append(
            f"Whether these arms were trained on questions of {', '.join(tasks)} is not known, for nobody recorded what {unknown} learned from: {arms}"
        )
    return lines


def points(figure, sign=""):
    """[mean, low, high], or only [low, high], in %."""
    *mean, low, high = [f"{100 * x:{sign}.1f}" for x in figure or (0, 0)]
    return " ".join([*mean, f"[{low}, {high}]"]) if figure else "-"


def main_table(kept):
    """{heading: cell} of each arm."""
    rows, cell = (
        [],
        lambda value, form: (
            "-" if value is None else value if isinstance(value, str) else f"{value:{form}}"
        ),
    )
    for a in kept["arms"]:
        said = {f"paper {c}": cell(a["paper"].get(c), ".1f") for c in kept["columns"]}
        row = {
            "arm": a["arm"],
            "chain": " → ".join([a["model"], *a["chain"]]),
            "seeds": f"{len(a['seeds'])} of {len(kept['seeds'])}",
        }
        for task in kept["tasks"]:
            row |= {task: points(a["accuracy"][task]["figure"])} | {
                k: v for k, v in said.items() if k == f"paper {task}"
            }
            row[f"gain {task}"] = points(a["gain"][task]["figure"], "+") + MARK * bool(
                a["gain"][task]["asked_differently"]
            )
        costs = {
            k: cell(a["cost"].get(k), ".3g" if k in ("flops", "device_hours") else ",.0f")
            for k in COSTS
        }
        rows.append(
            row
            | said
            | {k.replace("_", " ").replace("flops", "FLOPs"): v for k, v in costs.items()}
        )
    return rows


def footnotes(kept):
    """What the gains' marks stand for."""
    lines = []
    for a in kept["arms"]:
        for task, gain in a["gain"].items():
            if gain["asked_differently"]:
                lines.append(
                    f"†: {a['arm']} on {task} was asked {asked(gain['asked_differently'])}"
                )
    return lines


def claims_table(claims):
    rows = [
        [
            "claim",
            "on",
            "ours: difference",
            "over problems",
            "over seeds",
            "seeds of that sign",
            "paper",
            "asked",
            "verdict",
        ]
    ]
    for c in claims:
        ours, each = c["ours"], c["ours"]["each"]
        signs = f"{sum(d * ours['figure'][0] > 0 for d in each)} of {len(each)}" if each else "-"
        paper = (
            f"{c['paper']:+.1f} on {c['column']}"
            if isinstance(c["paper"], (int, float))
            else c["paper"] or "-"
        )
        figures = [points(ours[k], "+") for k in ("figure", "over_problems", "over_seeds")]
        alike = asked(ours["asked_differently"]) if each else "-"
        rows.append(
            [
                c["text"],
                c["task"] or "-",
                *figures,
                signs,
                paper,
                alike,
                c["verdict"] + " (one seed)" * (len(each) == 1 and "paper" not in c["verdict"]),
            ]
        )
    return rows


def kl_table(arms):
    sides = (
        ("own text", "on_own", "KL(arm, start)", "reverse_kl"),
        ("start's text", "on_reference", "KL(start, arm)", "forward_kl"),
    )
    keys = [
        f"{where}/{k}"
        for _, where, _, kl in sides
        for k in (kl, "top1", "entropy", "teacher_entropy")
    ]
    show = lambda key, value: (
        "-" if value is None else f"{100 * value:.1f}" if key.endswith("top1") else f"{value:.4f}"
    )
    heading = [
        "arm",
        *(
            f"{name}, {text}"
            for text, _, kl, _ in sides
            for name in (kl, "top-1", "entropy", "start's entropy")
        ),
    ]
    return [
        heading,
        *([a["arm"], *(show(key, a["kl"].get(key)) for key in keys)] for a in arms if a["kl"]),
    ]


def fenced(text):
    """A block that nothing in the text can end."""
    text = (
        text
        if len(text) <= LENGTH
        else f"{text[:LENGTH]}… ({len(text) - LENGTH:,} more characters)"
    )
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def samples_page(study):
    """Right and wrong samples of every arm: the same draw every time, first of problems that an arm before has shown."""
    shown, parts = set(), []
    for arm, seed in ((arm, seeds[0]) for arm in study.arms if (seeds := study.of(arm))):
        task = next(iter(study.figures[arm, seed]))
        parts.append(f"## {arm}, seed {seed}, on {task}")
        order = lambda row: (
            row["question"] not in shown,
            hashlib.sha256(row["question"].encode()).digest(),
            row["sample"],
        )
        rows = sorted(samples(study.outcomes[arm, seed].evals, task).values(), key=order)
        for strict, verdict in ((True, "right"), (False, "wrong")):
            first = {
                row["question"]: row for row in reversed(rows) if row["strict"] == strict
            }  # one sample of a problem
            for question, row in list(first.items())[: -SHOWN - 1 : -1]:
                shown.add(question)
                ended = "stopped by itself" if row["stopped"] else "cut off"
                parts += [
                    f"**{verdict}**, {ended}: problem {row['problem']}, sample {row['sample']}, {row['tokens']:,} tokens"
                ]
                parts += [fenced(f"{question}\n\ngold: {row['gold']}"), fenced(row["text"])]
    return (
        "\n\n".join(["# Samples: a question with its gold answer, then what the arm wrote", *parts])
        + "\n"
    )


def curve(outcome):
    """[[student tokens so far, held-out accuracy, whether a run ends here]] along the chain."""
    found, before = [], 0
    for run in outcome.chain:
        tokens = 0
        for row in read_metrics(run):
            tokens = row.get("train/tokens", tokens)
            found += [
                [before + tokens, 100 * value, 0]
                for name, value in row.items()
                if re.fullmatch("eval/.*/accuracy", name)
            ]
        before += tokens
        found = found and [*found[:-1], [*found[-1][:2], 1]]
    return found


def draw_curves(study, kept, ax, model):
    seeds = {
        a["arm"]: [curve(study.outcomes[a["arm"], s]) for s in a["seeds"]]
        for a in kept["arms"]
        if a["model"] == model
    }
    lines = {
        arm: np.mean(list(zip(*found)), 1).T for arm, found in seeds.items() if all(found) and found
    }  # evaluations that all seeds have
    for i, (arm, (x, y, ends)) in enumerate(
        sorted(lines.items(), key=lambda line: -line[1][1, -1])
    ):  # the legend in the order of the ends
        ax.plot(
            x,
            y,
            f"C{i % 10}",
            ls=("-", "--", ":")[i // 10 % 3],
            lw=1.4,
            marker="o",
            ms=4,
            markevery=ends == 1,
            label=arm,
        )
    ax.set(
        title=f"from {model}",
        xlabel="student tokens along the chain (dots: a run ends)",
        ylabel="held-out accuracy, % (mean over seeds)",
    )
    ax.grid(alpha=0.3)
    if lines:
        ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))


def draw_costs(arms, ax, task, colours):
    """The names stand in a column beside the points, in their order, so that none hides another."""
    marks = []
    for a in (a for a in arms if a["seeds"] and a["accuracy"][task]["figure"]):
        (mean, low, high), colour = (
            (100 * x for x in a["accuracy"][task]["figure"]),
            colours[a["model"]],
        )
        if not a["chain"]:
            ax.axhline(mean, color=colour, ls="--", lw=1, label=f"{a['arm']}, as it is")
        elif a["cost"]["flops"]:
            ax.errorbar(
                a["cost"]["flops"],
                mean,
                [[mean - low], [high - mean]],
                color=colour,
                marker="o",
                capsize=3,
                alpha=0.8,
            )
            marks.append((mean, a["cost"]["flops"], a["arm"], colour))
    for i, (mean, flops, arm, colour) in enumerate(sorted(marks)):
        ax.annotate(
            arm,
            (flops, mean),
            (1.03, (i + 0.5) / len(marks)),
            "data",
            "axes fraction",
            fontsize=8,
            color=colour,
            va="center",
            arrowprops=dict(arrowstyle="-", color=colour, alpha=0.35, lw=0.7),
        )
    ax.set(
        xscale="log",
        xlabel="FLOPs of the whole chain",
        ylabel=f"{task}: accuracy, % (95 % interval)",
    )
    ax.grid(alpha=0.3)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(
            fontsize=8, loc="lower left", bbox_to_anchor=(0, 1.01), ncols=3
        )  # above the points


def draw(study, kept, out):
    """curves.png, a panel for each starting model; cost.png, a panel for each task that is the first of an arm."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms, models = (
        kept["arms"],
        list(dict.fromkeys(a["model"] for a in kept["arms"] if a["chain"])) or [""],
    )
    curves, axes = plt.subplots(
        len(models), 1, figsize=(9, 4 * len(models)), squeeze=False, layout="constrained"
    )
    for ax, model in zip(axes.flat, models):
        draw_curves(study, kept, ax, model)
    tasks = list(
        dict.fromkeys(
            task
            for a in arms
            for task in [t for t in kept["tasks"] if a["accuracy"][t]["figure"]][:1]
        )
    ) or [""]
    costs, axes = plt.subplots(
        len(tasks), 1, figsize=(9, max(4.5, 0.25 * len(arms)) * len(tasks)), squeeze=False
    )
    colours = {
        model: f"C{i % 10}" for i, model in enumerate(dict.fromkeys(a["model"] for a in arms))
    }
    for ax, task in zip(axes.flat, tasks):
        draw_costs(arms, ax, task, colours)
    try:
        for name, figure in (("curves.png", curves), ("cost.png", costs)):
            figure.savefig(out / f".draft-{name}", dpi=120, bbox_inches="tight")
            (out / f".draft-{name}").rename(out / name)
    except OSError as e:
        raise RunFailed(f"{out}: the pictures could not be written ({e.strerror})") from None
    plt.close("all")


def write(out, title, seeds, arms, outcomes, claims):
    """Write report.md, report.json, samples.md and the pictures into `out`; returns the text for the terminal."""
    hide = lambda text: " ".join(
        text.replace(f"{out.resolve()}/", "").replace(f"{out}/", "").split()
    )
    study = Study(seeds, arms, outcomes)
    kept = numbers(study, title, outcomes, claims, hide)
    rows, claimed, moved = main_table(kept), claims_table(kept["claims"]), kl_table(kept["arms"])
    failed = [
        f"{a['arm']}, seed {seed} FAILED: {text}"
        for a in kept["arms"]
        for seed, text in a["failed"].items()
    ]
    draw(study, kept, out)
    replace_file(out / "samples.md", samples_page(study))
    valid = json.loads(
        json.dumps(kept), parse_constant=lambda name: None
    )  # JSON has no NaN: the interval of a single problem
    replace_file(
        out / "report.json", json.dumps(valid, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    )
    parts = [f"# {title}", *(f"- {line}" for line in [*kept["conditions"], *kept["training"]])]
    parts += [
        markdown([list(rows[0]), *(list(r.values()) for r in rows)]),
        *footnotes(kept),
        *failed,
    ]
    parts += ["Failed seeds are left out of the means, which flatters their arms."] * bool(
        failed
    ) + [NOTES]
    parts += ["## What the paper concludes", markdown(claimed), CLAIM_NOTES] * bool(claims)
    parts += [
        "## Learning curves, on the examples that the runs held out",
        "![held-out accuracy against student tokens](curves.png)",
    ]
    parts += ["## Accuracy against cost", "![accuracy against FLOPs](cost.png)"]
    parts += ["## How far the arms moved", markdown(moved), KL_NOTES] * (len(moved) > 1)
    replace_file(
        out / "report.md",
        "\n\n".join([*parts, "What the arms write: [samples.md](samples.md)"]) + "\n",
    )
    first = [h for task in kept["tasks"][:1] for h in (task, f"gain {task}")] + [
        h for h in rows[0] if h.startswith("paper ")
    ][:1]
    narrow = ["arm", "seeds", *first, "student tokens", "FLOPs", "seconds"]
    tables = [
        [narrow, *([row[h] for h in narrow] for row in rows)],
        *[[[row[0], row[2], *row[5:]] for row in claimed]] * bool(claims),
    ]
    said = [
        *map(aligned, tables),
        *footnotes(kept),
        *(textwrap.fill(line, 150) for line in kept["training"]),
        *failed,
    ]
    return "\n\n".join([*said, f"{out}: report.md, report.json, samples.md, curves.png, cost.png"])
