"""Whether a checkpoint was trained on a test set's questions, as far as its own record knows (model/lineage.py)."""

from typing import NamedTuple

from errors import UserError
from eval.benchmarks import Benchmark
from model import lineage
from model.load import Subject

NAMED = 5  # data files in an error


class Trained(NamedTuple):
    """count: how many questions of a test set the checkpoint was trained on; None: none that is known of, but not all of what it was trained on is
    known. unknown: what nobody recorded anything about."""

    count: int | None
    unknown: tuple


def seen(subject: Subject, sets: list[Benchmark], allowed: bool = False) -> dict[str, Trained]:
    """{benchmark's name: Trained} for each of the sets. Raises UserError where a question was trained on, unless `allowed`."""
    record = lineage.of_checkpoint(subject.name, subject.folder)
    found = {}
    for benchmark in sets:
        hits = record.contains([example.question for example in benchmark.examples])
        count = int(hits.sum())
        if count and not allowed:
            first = benchmark.examples[int(hits.argmax())].origin
            names = [str(entry.get("data")) for entry in record.data]
            trained_on = ", ".join(
                names[:NAMED] + [f"{len(names) - NAMED} more"] * (len(names) > NAMED)
            )
            raise UserError(
                f"{subject.name} was trained on {count:,} of {benchmark.name}'s {len(hits):,} questions (first: {first}; "
                f"its training data: {trained_on}); --allow_trained evaluates all the same"
            )
        found[benchmark.name] = Trained(
            None if count == 0 and record.unknown else count, record.unknown
        )
    return found


def notes(found: list[tuple[str, str, Trained]]) -> list[str]:
    """Sentences for a report on (checkpoint, task, Trained): what was trained on, and where nobody knows. Nothing on what was not trained on."""
    lines, tasks_of = [], {}
    for checkpoint, task, trained in found:
        if trained.count:
            least = "AT LEAST " if trained.unknown else ""
            lines.append(
                f"{checkpoint} WAS TRAINED ON {least}{trained.count:,} of {task}'s questions"
            )
        elif trained.count is None:
            tasks_of.setdefault((checkpoint, trained.unknown), []).append(task)
    for (checkpoint, unknown), tasks in tasks_of.items():
        lines.append(
            f"whether {checkpoint} was trained on questions of {', '.join(tasks)} is not known: nobody recorded what "
            f"{', '.join(unknown)} learned from"
        )
    return lines
