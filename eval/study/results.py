"""What the arms of a study have reached, in figures: accuracies, gains, costs, divergences, claims.

A figure is [mean, low, high] with the bounds of a 95 % interval. Accuracies are those of
`python -m eval`, costs those of the runs' metrics.jsonl; nan: not known. Times are in `seconds` and
`device_hours` alone. Legend: S seeds, P problems.
"""

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable, Sequence
from math import nan
from pathlib import Path

from curves import COSTS, run_cost
from digests import read_checked
from eval.stats import difference, over_seeds
from eval.study.schema import Arm, Claim
from eval.summary import Samples, asked_differently, counts, read_about
from files import read_json

NOTHING = dict.fromkeys(("figure", "over_problems", "over_seeds")) | {"each": []}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one arm with one seed has left: paths of what is done, and why it failed if it did.

    runs: in the order of the chain. traces: what they were trained on. start_evals: the evaluation
    of the model that the chain begins from. kl: the divergence from that model.
    """

    runs: Sequence[Path] = ()
    traces: Sequence[Path] = ()
    evals: Path | None = None
    start_evals: Path | None = None
    kl: Path | None = None
    failure: str = ""


Outcomes = dict[tuple[str, int], Outcome]  # by (arm, seed)


class Results:
    """The evaluations that are done, by (arm, seed).

    figures: by task, what eval.summary.Figures holds. tasks: what was evaluated. columns: the tasks
    of the paper's numbers.
    """

    def __init__(self, seeds: list[int], arms: dict[str, Arm], outcomes: Outcomes) -> None:
        self.seeds, self.arms = seeds, arms
        self.outcomes, self.summaries, self.figures, self.failures = {}, {}, {}, {}
        tasks, columns = {}, {}
        for key in itertools.product(arms, seeds):
            outcome = outcomes.get(key, Outcome())
            if outcome.failure:
                self.failures[key] = outcome.failure
            elif outcome.evals and (outcome.evals / "summary.json").exists():
                summary = _summary(outcome.evals)
                self.outcomes[key], self.summaries[key] = outcome, summary
                self.figures[key] = {task: found for _, task, found in summary["summaries"]}
                tasks |= self.figures[key]
        for arm in arms.values():
            columns |= arm.paper if isinstance(arm.paper, dict) else {}
        self.tasks, self.columns = list(tasks), list(columns)

    def done(self, arm: str, task: str | None = None) -> list[int]:
        """The seeds for which an arm is evaluated, on this task if one is named."""
        done = [seed for seed in self.seeds if (arm, seed) in self.figures]
        return [seed for seed in done if task is None or task in self.figures[arm, seed]]

    def accuracy(self, arm: str, task: str, rate: str = "accuracy") -> dict:
        """Its figure, the accuracy for each seed, and what the interval is over.

        rate: another rate of samples, as in "pass@8".
        """
        figures = []
        for seed in self.done(arm, task):
            found = self.figures[arm, seed][task]
            if rate in found:
                figures.append(found[rate])
        each = [figure[0] for figure in figures]
        mean, reach = over_seeds(each)
        if reach:
            figure = [mean, max(0.0, mean - reach), min(1.0, mean + reach)]
            return {"figure": figure, "each": each, "over": "seeds"}
        return {"figure": figures[0] if figures else None, "each": each, "over": "problems"}

    def pass_at_k(self, task: str) -> list[str]:
        """["pass@k"] with the largest k of this task's evaluations; [] if no k is above 1."""
        names = set().union(*(found.get(task, ()) for found in self.figures.values()))
        ks = [int(name[5:]) for name in names if name.startswith("pass@")]
        return [f"pass@{max(ks)}"] if ks else []

    def evaluations(self, arm: str, task: str | None) -> dict[int, Path]:
        """{seed: the evaluation of an arm}."""
        return {seed: self.outcomes[arm, seed].evals for seed in self.done(arm, task)}

    def gain(self, arm: str, task: str) -> dict:
        """The accuracy of an arm less that of the model that its chain begins from."""
        starts = {}
        for seed in self.done(arm):
            start = self.outcomes[arm, seed].start_evals
            if start:
                starts[seed] = start
        return self.difference(self.evaluations(arm, task), starts, task)

    def difference(self, ours: dict, theirs: dict, task: str | None) -> dict:
        """The accuracy of evaluations less that of others, {seed: Path} both, seed by seed.

        Compared are the problems that all of them have.
        """
        our_counts, their_counts, asked = {}, {}, {}
        for seed in ours:
            if seed in theirs:
                our_counts[seed] = _counts(ours[seed], task)
                their_counts[seed] = _counts(theirs[seed], task)
                conditions = _conditions(ours[seed], task), _conditions(theirs[seed], task)
                asked = asked_differently(*conditions) | asked
        found = difference(our_counts, their_counts) or NOTHING
        return found | {"asked_differently": asked if found["each"] else {}}

    def mean(self, arm: str, measure: Callable[[Outcome], dict[str, float]]) -> dict[str, float]:
        """{name: mean over the seeds that are done}; nan where one of them does not know it."""
        measured = [measure(self.outcomes[arm, seed]) for seed in self.done(arm)]
        found = list(filter(None, measured))
        means = {}
        for name in found[0] if found else ():
            means[name] = statistics.mean(values.get(name, nan) for values in found)
        return means


def _summary(evals: Path) -> dict:
    return read_checked(evals / "summary.json", "delete it, and evaluate again")


def samples_of(evals: Path, task: str) -> Samples:
    """The samples of an evaluation of one checkpoint."""
    checkpoint = _summary(evals)["summaries"][0][0]
    return Samples(evals / checkpoint, task)


@functools.cache
def _counts(evals, task):
    return counts(samples_of(evals, task).read())


@functools.cache
def _conditions(evals, task):
    about = samples_of(evals, task).about
    return read_about(about) if about.exists() else None


def cost(outcome: Outcome) -> dict[str, float]:
    """What the chain of one seed took, by COSTS; nan for what one of its parts did not measure."""
    parts = [[0] * len(COSTS), *(list(run_cost(run).values()) for run in outcome.runs)]
    parts += map(_traces_cost, dict.fromkeys(outcome.traces))
    return {name: sum(values) for name, *values in zip(COSTS, *parts, strict=True)}


def _traces_cost(folder):
    """The numbers of COSTS for what a teacher has generated."""
    stated = read_about(folder / "samples.json")
    made, ranks = stated["generated"], stated["about"].get("environment", {}).get("ranks", nan)
    tokens, flops, seconds = (made.get(name, nan) for name in ("tokens", "flops", "seconds"))
    return [0, 0, tokens, flops, seconds, seconds * ranks / 3600]


def divergence(outcome: Outcome) -> dict[str, float]:
    """{"on_own/reverse_kl": nats per token, ...} as `python -m eval.divergence` wrote it."""
    found = {}
    if outcome.kl and outcome.kl.exists():
        for text, measures in read_json(outcome.kl).items():
            found |= {f"{text}/{name}": value for name, value in measures.items()}
    return found


def check_claim(results: Results, claim: Claim) -> dict:
    """A claim with our difference, the paper's own, and whether they agree."""
    column = claim.task or next(iter(results.columns), None)
    task = column
    if column not in results.tasks:  # where a task is named, no other is taken for it
        task = None if claim.task else next(iter(results.tasks), None)
    sides = (claim.better, claim.worse)
    numbers = [results.arms[arm].paper_number(column) for arm in sides if arm in results.arms]
    paper = None
    if "collapsed" in numbers:
        paper = "collapsed"
    elif len(numbers) == 2 and None not in numbers:
        paper = numbers[0] - numbers[1]
    better, worse = [results.evaluations(arm, task) for arm in sides]
    ours = results.difference(better, worse, task)
    verdict = _verdict(ours["figure"], paper)
    found = dict(task=task, column=column, ours=ours, paper=paper, verdict=verdict)
    return dataclasses.asdict(claim) | found


def _verdict(figure, paper):
    if paper == "collapsed":
        return "paper: collapsed"
    if not figure:
        return "-"
    _, low, high = figure
    agreement = (low > 0) - (high < 0)  # without a number: with the claim's own sign
    if paper is not None:
        agreement *= paper
    if not agreement:
        return "not shown"
    return "agrees" if agreement > 0 else "contradicts"


def collect(results: Results, title: str, claims: list[Claim]) -> dict:
    """All that report.json holds."""
    arms = []
    for name, arm in results.arms.items():
        model = arm.model.removeprefix("@")
        found = {
            "arm": name,
            "model": Path(model).name if model.startswith("/") else model,
            "chain": arm.chain,
            "seeds": results.done(name),
            "failed": {seed: text for (a, seed), text in results.failures.items() if a == name},
            "paper": {column: arm.paper_number(column) for column in results.columns},
            "accuracy": {task: results.accuracy(name, task) for task in results.tasks},
            "pass_at_k": {
                task: {k: results.accuracy(name, task, k) for k in results.pass_at_k(task)}
                for task in results.tasks
            },
            "gain": {task: results.gain(name, task) for task in results.tasks},
            "cost": results.mean(name, cost),
            "kl": results.mean(name, divergence),
        }
        arms.append(found)
    conditions = {}
    for summary in results.summaries.values():
        own = summary.get("training", ())  # said by `training` for all arms together
        conditions |= dict.fromkeys(line for line in summary["conditions"] if line not in own)
    return {
        "title": title,
        "seeds": results.seeds,
        "tasks": results.tasks,
        "columns": results.columns,
        "arms": arms,
        "claims": [check_claim(results, claim) for claim in claims],
        "conditions": list(conditions),
        "training": training(results),
    }


def training(results: Results) -> list[str]:
    """Sentences on test questions that arms were trained on, or of which nobody knows."""
    lines = []
    unrecorded = None, ["a checkpoint evaluated before this was kept"]
    arms_of = {}  # {(task, *models of which nothing is recorded): {arm: True}}
    for (arm, seed), summary in results.summaries.items():
        recorded = {task: (n, models) for _, task, n, models in summary.get("trained_on", ())}
        for task in results.figures[arm, seed]:
            count, unknown = recorded.get(task, unrecorded)
            if count:
                number = f"{'AT LEAST ' * bool(unknown)}{count:,}"
                lines.append(f"{arm}, seed {seed}, WAS TRAINED ON {number} of {task}'s questions")
            elif count is None:
                arms_of.setdefault((task, *unknown), {})[arm] = True
    tasks_of = {}  # {(arms, models): tasks}
    for (task, *unknown), arms in arms_of.items():
        tasks_of.setdefault((", ".join(arms), ", ".join(unknown)), []).append(task)
    for (arms, unknown), tasks in tasks_of.items():
        lines.append(
            f"Whether these arms were trained on questions of {', '.join(tasks)} is not known, "
            f"for nobody recorded what {unknown} learned from: {arms}"
        )
    return lines
