"""The record of a training run: all that its model was trained on, with its ancestors' records.

Every checkpoint carries it (`model/lineage.py`), so that an evaluation can refuse questions which
the model has seen.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from data.dataset import Dataset
from data.split import find_sources, task_of
from data.tasks import Example
from digests import file_sha256
from errors import say
from files import resolved
from model import lineage, parallel
from progress import watched


def training_record(
    data: str,
    dataset: Dataset,
    prompt_options: Mapping[str, str],
    ancestors: Sequence[tuple[str, Path | None]],
    resumed: Path | None = None,
) -> lineage.Lineage:
    """What a model will have been trained on after this run.

    Of its own examples everything counts that the assistant does not say: the turns of user,
    system and tools, and what the options add to every prompt. A note is printed where an ancestor
    was trained on questions that this run keeps for validation.

    Args:
        data: `--data`, as the user wrote it.
        prompt_options: The values of `PROMPT_OPTIONS`.
        ancestors: (name, folder) of each model that this run begins from or learns from; the
            folder is None for random weights.
        resumed: The checkpoint of this run that it goes on from. It is no ancestor.
    """
    record = lineage.Lineage(prompt=dict(prompt_options))
    for name, folder in ancestors:
        record += lineage.of_checkpoint(name, folder)
    if resumed:
        before = lineage.of_checkpoint(str(resumed), resumed)
        own = lineage.short_name(str(resumed), resumed)
        others = tuple(name for name in before.ancestors if name != own)
        record += dataclasses.replace(before, ancestors=others)
    examples = list(dataset.examples())
    entries = []
    if task_of(data):
        # A task's own rule keeps its validation problems apart, and its problems are much alike.
        entries.append({"data": data, "sha256": None, "examples": len(examples) or None})
        examples = []
    else:
        stop = 0
        for source, size in zip(find_sources(data), dataset.sizes, strict=True):
            start, stop = stop, stop + size
            entry = {"data": source.name, "sha256": None, "examples": size}
            is_local = Path(source.name).exists()
            from_teacher = _file_record(source.path, entry, is_local, examples[start:stop])
            entries.append(entry)
            if from_teacher is not None:
                record += from_teacher
    seen = int(record.contains([example.question for example in dataset.validation]).sum())
    if seen:
        say(
            f"note: {seen:,} of the {len(dataset.validation):,} validation questions were trained "
            "on by what this run begins from"
        )
    texts = prompt_texts(prompt_options, examples)
    return record + lineage.Lineage(lineage.fingerprints(texts), tuple(entries))


def _file_record(
    path: Path, entry: dict, is_local: bool, examples: Sequence[Example]
) -> lineage.Lineage | None:
    """Complete `entry` with the file's hash; return the record of a teacher that wrote it."""
    if is_local:
        entry["data"] = f"{resolved(path).parent.name}/{path.name}"
    entry["sha256"] = file_sha256(path)
    if (path.parent / lineage.RECORD).exists():
        return lineage.read(path.parent, f"traces {entry['data']}")
    for example in examples:
        source = example.columns.get("source")
        if isinstance(source, dict) and "teacher" in source:  # `eval.traces` wrote this row
            return lineage.Lineage(unknown=(f"the teacher that wrote {entry['data']}",))
    return None


def prompt_texts(prompt_options: Mapping[str, str], examples: Sequence[Example]) -> Iterator[str]:
    """All texts of the prompts: worked examples may stand in any of them."""
    yield prompt_options["system_prompt"]
    yield prompt_options["prompt_suffix"]
    for example in watched("record of the data", examples, "examples", parallel.speaks()):
        for message in example.messages:
            if message["role"] != "assistant":
                yield message["content"] or ""
