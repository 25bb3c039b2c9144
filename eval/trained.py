"""Whether a run has seen a test set's questions: its data, and the data of the runs that it began from or learned from."""

import hashlib

from data.dataset import divide, find_file, task_of
from errors import UserError
from eval.report import run_of
from model.checkpoint import read_json


def fingerprint(question):
    """A question's hash, whatever its case and spaces."""
    return hashlib.sha256(" ".join(question.split()).casefold().encode()).digest()


def sources(run):
    """[(run folder, its config)] of a run, of the run whose checkpoint it began from, of its teacher's, and so on."""
    found, waiting = {}, [run]
    while waiting:
        run = waiting.pop()
        if run and run not in found and (run / "config.json").is_file():
            found[run] = read_json(run / "config.json")
            waiting += [run_of(found[run].get(key)) for key in ("model", "teacher") if found[run].get(key)]
    return list(found.items())


def trained_questions(run):
    """{fingerprint: where it was trained on} of every file that the run, or one before it, trained on. Tasks that make their own
    problems are not asked: their held-out problems are no others' by construction."""
    seen, read = {}, set()
    for folder, config in sources(run):
        data, kept = str(config.get("data", "")), (config.get("eval_examples", 0), config.get("train_examples", 0))
        if not data or task_of(data) or (data, kept) in read:
            continue
        try:
            path = find_file(data)
        except UserError:
            message = f"{folder} was trained on {data}, which is not there to be compared with a test set; --allow_trained evaluates all the same"
            raise UserError(message) from None
        read.add((data, kept))
        seen |= {fingerprint(e.question): f"{e.origin} by {folder}" for e in divide(path, *kept)[1]}
    return seen


def seen(subject, sets, allowed=False):
    """{benchmark: how many of its questions the Subject's run was trained on}; None: its data is not there to be compared.
    Raises UserError unless all are 0, or `allowed`."""
    try:
        known = trained_questions(subject.run) if subject.run and any(b.file != "embedded" for b in sets) else {}
    except UserError:
        if allowed:
            return {b.name: None if b.file != "embedded" else 0 for b in sets}
        raise
    counts = {}
    for benchmark in sets:
        found = [known[p] for e in benchmark.examples if (p := fingerprint(e.question)) in known]
        counts[benchmark.name] = len(found)
        if found and not allowed:
            raise UserError(f"{subject.name} was trained on {len(found):,} of {benchmark.name}'s {len(benchmark.examples):,} questions "
                            f"(first: {found[0]}); --allow_trained evaluates all the same")  # fmt: skip
    return counts
