"""Whether a run has seen a test set's questions: its data, and the data of the runs that it began from or learned from."""

import hashlib

from data.dataset import divide, find_file, task_of
from errors import UserError
from eval.benchmarks import EMBEDDED
from eval.report import run_of
from model.checkpoint import read_json


def fingerprint(question):
    """A question's hash, whatever its case and spaces."""
    return hashlib.sha256(" ".join(question.split()).casefold().encode()).digest()


def trained_questions(run):
    """{fingerprint: where it was trained on} of every file that trained the run, the one whose checkpoint it began from, its teacher,
    and so on. Tasks that make their own problems are not asked: what they hold out is never trained on."""
    questions, seen, waiting = {}, set(), [run]
    while waiting:
        run = waiting.pop()
        if run is None or run in seen or not (run / "config.json").is_file():
            continue
        seen.add(run)
        config = read_json(run / "config.json")
        waiting += [run_of(config[key]) for key in ("model", "teacher") if config.get(key)]
        data = str(config.get("data", ""))
        if not data or task_of(data):
            continue
        try:
            path = find_file(data)
        except UserError:
            message = f"{run} was trained on {data}, which is not there to be compared with a test set; --allow_trained evaluates all the same"
            raise UserError(message) from None
        training = divide(path, config.get("eval_examples", 0), config.get("train_examples", 0))[1]
        questions |= {fingerprint(e.question): f"{e.origin} by {run}" for e in training}
    return questions


def seen(subject, sets, allowed=False):
    """{benchmark: how many of its questions the Subject's run was trained on}; None: its data is not there to be compared.
    Raises UserError unless all are 0, or `allowed`."""
    try:
        known = trained_questions(subject.run) if subject.run and any(b.file != EMBEDDED for b in sets) else {}
    except UserError:
        if allowed:
            return {b.name: None if b.file != EMBEDDED else 0 for b in sets}
        raise
    counts = {}
    for benchmark in sets:
        found = [known[p] for e in benchmark.examples if (p := fingerprint(e.question)) in known]
        counts[benchmark.name] = len(found)
        if found and not allowed:
            raise UserError(f"{subject.name} was trained on {len(found):,} of {benchmark.name}'s {len(benchmark.examples):,} questions "
                            f"(first: {found[0]}); --allow_trained evaluates all the same")  # fmt: skip
    return counts
