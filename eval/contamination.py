"""Whether a checkpoint was trained on a test set's questions, as far as its record knows.

model/lineage.py makes and reads that record.
"""

from typing import NamedTuple

from errors import UserError
from eval.benchmarks import Benchmark
from model import lineage
from model.load import Subject

NAMED = 5  # data files that an error names


class Trained(NamedTuple):
    """How many questions of a test set a checkpoint was trained on.

    count: None if none is known of, but not all training data was recorded. unknown: those whose
    training data nobody recorded.
    """

    count: int | None
    unknown: tuple


def seen(subject: Subject, sets: list[Benchmark], allowed: bool = False) -> dict[str, Trained]:
    """{benchmark's name: Trained} for each of the sets.

    Raises:
        UserError: where a question was trained on, unless `allowed`.
    """
    record = lineage.of_checkpoint(subject.name, subject.folder)
    found = {}
    for benchmark in sets:
        hits = record.contains([example.question for example in benchmark.examples])
        count = int(hits.sum())
        if count and not allowed:
            first = benchmark.examples[int(hits.argmax())].origin
            names = [str(entry.get("data")) for entry in record.data]
            if len(names) > NAMED:
                names[NAMED:] = [f"{len(names) - NAMED} more"]
            raise UserError(
                f"{subject.name} was trained on {count:,} of {benchmark.name}'s {len(hits):,} "
                f"questions (first: {first}; its training data: {', '.join(names)}); "
                "--allow_trained evaluates all the same"
            )
        is_unknown = count == 0 and record.unknown
        found[benchmark.name] = Trained(None if is_unknown else count, record.unknown)
    return found


def notes(found: list[tuple[str, str, Trained]]) -> list[str]:
    """Sentences for a report on (checkpoint, task, Trained).

    They say what was trained on, and where that is not known; nothing on what was not trained on.
    """
    lines, unknown_tasks = [], {}
    for checkpoint, task, trained in found:
        if trained.count:
            least = "AT LEAST " if trained.unknown else ""
            lines.append(
                f"{checkpoint} WAS TRAINED ON {least}{trained.count:,} of {task}'s questions"
            )
        elif trained.count is None:
            unknown_tasks.setdefault((checkpoint, trained.unknown), []).append(task)
    for (checkpoint, unknown), tasks in unknown_tasks.items():
        lines.append(
            f"whether {checkpoint} was trained on questions of {', '.join(tasks)} is not known: "
            f"nobody recorded what {', '.join(unknown)} learned from"
        )
    return lines
