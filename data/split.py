"""Which files `--data` names, and which of their questions are kept for validation."""

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.download import SETS
from data.formats import SUFFIXES, unread_columns
from data.tasks import TASKS, Example
from errors import UserError
from files import resolved

HELD_OUT = 10  # by default at most one row of so many is kept for validation
SPLIT_SEED = 0  # which examples are kept for validation does not depend on a run's seed


class Source(NamedTuple):
    """A file of `--data`: as it was named, where it is, and its weight beside other files."""

    name: str
    path: Path
    weight: float


def find_sources(names: str) -> list[Source]:
    """The files of `--data a.jsonl,b.parquet:0.3`; a weight that is not given is 1.

    Commas and colons in the name of a file that exists belong to the name. Raises UserError.
    """
    pieces, sources = names.split(","), []
    while pieces:
        count = _pieces_of_name(pieces)
        given, pieces = ",".join(pieces[:count]).strip(), pieces[count:]
        name, weight = _split_weight(given)
        is_alone = not (pieces or sources)
        if is_alone and name != given:
            raise UserError(
                f"--data {names}: a weight is one beside another file's; --train_examples takes "
                "the first examples of a file"
            )
        if not is_alone and (not name or task_of(name)):
            raise UserError(f"--data {names}: files are mixed, and {name!r} is none")
        sources.append(Source(name, find_file(name), weight))
    if len({resolved(source.path) for source in sources}) < len(sources):
        raise UserError(f"--data {names}: a file is named twice; give it one weight")
    return sources


def _pieces_of_name(pieces: list[str]) -> int:
    """How many of the first pieces between commas are the name of one file."""
    for count in range(len(pieces), 1, -1):
        name, _ = _split_weight(",".join(pieces[:count]).strip())
        if os.path.exists(name):
            return count
    return 1


def _split_weight(given: str) -> tuple[str, float]:
    """A file's name and weight."""
    name, _, number = given.rpartition(":")
    if os.path.exists(given) or not name:
        return given, 1.0
    try:
        weight = float(number)
    except ValueError:
        return given, 1.0
    if not 0 < weight < math.inf:
        raise UserError(
            f"--data {given}: a weight is a number above 0; leave out a file without weight"
        )
    return name, weight


def find_file(name: str, option: str = "--data") -> Path:
    """What an option names, as a file. Raises UserError.

    It is a path, a folder with one data file or a train.*, or org/name/path.jsonl of a hub dataset.
    """
    path = Path(name)
    if path.is_dir():
        return _file_of_folder(path, option)
    if path.exists():
        if path.suffix not in SUFFIXES:
            raise UserError(f"{option} {name}: a data file ends in {', '.join(SUFFIXES)}")
        return path
    if "://" in name:
        raise UserError(f"{option} {name} is an address; download the file and name that")
    owner, *rest = name.split("/")
    if len(rest) >= 2 and path.suffix in SUFFIXES and owner not in ("", ".", "..", "~"):
        from huggingface_hub import hf_hub_download

        repository, file = f"{owner}/{rest[0]}", "/".join(rest[1:])
        try:
            return Path(hf_hub_download(repository, file, repo_type="dataset"))
        except Exception as e:
            problem = f"neither a local file nor a hub dataset file ({type(e).__name__})"
            raise UserError(f"{option} {name}: {problem}") from None
    tasks = ", ".join(task for task in TASKS if TASKS[task].make)
    known = rest[-1] if rest else owner
    fetched = f"; python -m data.download {known} fetches it as files" if known in SETS else ""
    raise UserError(
        f"{option} {name}: no such file or folder, and no task of that name ({tasks}){fetched}"
    )


def _file_of_folder(folder: Path, option: str) -> Path:
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    train = [path for path in files if path.stem.split("-")[0] == "train"]
    candidates = train or files
    if len(candidates) == 1:
        return candidates[0]
    listing = ", ".join(path.name for path in files) or "no .jsonl, .json or .parquet file"
    raise UserError(f"{option} {folder}: which file of the folder? It has {listing}")


def task_of(name: str) -> str | None:
    """The task that `--data name` or `--data name:count` asks for, or None: a file."""
    task, _, count = name.partition(":")
    return task if "," not in count and task in TASKS and TASKS[task].make else None


def question_key(example: Example) -> bytes:
    """The same for rows that ask the same question, whatever its case and white space.

    A row that asks nothing has a key of its own.
    """
    asked = " ".join(example.opening.split()).casefold() or repr(example.messages)
    return hashlib.blake2b(asked.encode(), digest_size=16).digest()


class Division(NamedTuple):
    """Files of training data, what is trained on of each, what is validated on, and its name."""

    sources: list[Source]
    training: list[list[Example]]
    validation: list[Example]
    label: str


def read_divided(
    names: str,
    read: Callable[[Path, str], list[Example]],
    eval_examples: int,
    eval_data: str,
    train_examples: int,
    notes: list[str],
    teachers: int = 0,
    at_most_a_tenth: bool = False,
) -> Division:
    """Read what `--data` and `--eval_data` name.

    Args:
        read: (path, "train" or "test") -> the examples of a file.
        notes: Gets sentences on what is not used.
        teachers: How many there are, who read columns of their own.
        at_most_a_tenth: Whether `eval_examples` is no more than one of HELD_OUT rows of the data.

    Raises:
        UserError: for a file of which nothing is left to train on.
    """
    sources = find_sources(names)
    found = [read(source.path, "train") for source in sources]
    held_out, paths = None, [source.path for source in sources]
    if eval_data:
        paths = [find_file(eval_data, "--eval_data")]
        held_out = read(paths[0], "test")
        if not held_out:
            raise UserError(f"--eval_data {eval_data} has no examples")
    elif at_most_a_tenth:
        eval_examples = min(eval_examples, -(-sum(map(len, found)) // HELD_OUT))
    validation, training = divide(found, eval_examples, train_examples, notes, held_out)
    for source, examples, kept in zip(sources, found, training, strict=True):
        if not kept:
            why = "validation and --train_examples leave"
            has = f"{len(examples):,} examples"
            if len(sources) == 1:
                has, why = _used_up(examples, len(validation), eval_examples, eval_data)
            raise UserError(f"--data {source.name} has {has}; {why} none to train on")
    if len(sources) > 1:
        total = sum(source.weight for source in sources)
        shares = [f"{source.weight / total:.1%} from {source.name}" for source in sources]
        notes.append(f"of the documents that are drawn, {', '.join(shares)}")
    together, unread = [], set()
    for examples in training:
        together += examples
    for example in together:
        unread |= unread_columns(example, teachers)
    if unread:
        notes.append(f"columns of no prompt and no gold answer: {', '.join(sorted(unread))}")
    label = _label((validation or together)[0], paths)
    return Division(sources, training, validation, label)


def _used_up(
    examples: list[Example], validated: int, eval_examples: int, eval_data: str
) -> tuple[str, str]:
    """What a file has of which nothing is left to train on, and what leaves nothing."""
    if eval_data:
        return f"{len(examples):,} examples", f"--eval_data {eval_data} asks the same:"
    why = f"--eval_examples {eval_examples} leaves"
    return f"{validated} different questions" if validated else "no examples", why


def _label(first: Example, paths: list[Path]) -> str:
    """What is validated on: a task whose name the rows or the path of the one file have, or files.

    Other files may only look alike.
    """
    place = "/".join(paths[0].absolute().parts[-5:]).lower()
    is_named = first.columns.get("task") == first.task or first.task in place
    if len(paths) == 1 and first.task not in ("", "number", "answer") and is_named:
        return first.task
    return "+".join(path.stem.removesuffix(".jsonl") for path in paths)


def divide(
    sources: Sequence[list[Example]],
    eval_examples: int,
    train_examples: int = 0,
    notes: list[str] | None = None,
    held_out: Sequence[Example] | None = None,
) -> tuple[list[Example], list[list[Example]]]:
    """Divide examples into (validation, training by source): the same ones for every seed.

    Questions are divided, not rows: one row of a validation question is kept for validation, and
    none of its rows is trained on.

    Args:
        sources: The examples of each file.
        train_examples: The first so many of the rest only, over all files; 0: all.
        notes: Gets sentences on rows that are left out.
        held_out: Examples of another file to validate on. No question of it is trained on.
    """
    examples = [example for source in sources for example in source]
    source_of = [number for number, source in enumerate(sources) for _ in source]
    order = np.random.default_rng(SPLIT_SEED).permutation(len(examples))
    keys, asked = [], {}
    if held_out is not None:
        shuffled = np.random.default_rng(SPLIT_SEED).permutation(len(held_out))
        asked = _by_question(held_out, [question_key(e) for e in held_out], shuffled)
        keys = [question_key(example) for example in examples]
    elif eval_examples:
        keys = [question_key(example) for example in examples]
        asked = _by_question(examples, keys, order, eval_examples)
    kept = [i for i in order if not asked or keys[i] not in asked]
    withheld = len(examples) - len(kept) - (0 if held_out is not None else len(asked))
    if withheld and notes is not None:
        notes.append(
            f"{withheld:,} more rows ({withheld / len(examples):.1%}) ask one of the "
            f"{len(asked):,} held-out questions; they are not trained on"
        )
    training = [[] for _ in sources]
    for i in kept[: train_examples or None]:
        training[source_of[i]].append(examples[i])
    return list(asked.values())[:eval_examples], training


def _by_question(
    examples: Sequence[Example], keys: Sequence[bytes], order: np.ndarray, limit: int | None = None
) -> dict[bytes, Example]:
    """The first example of each question, of so many questions at most, in this order."""
    found: dict[bytes, Example] = {}
    for i in order:
        if len(found) == limit:
            break
        found.setdefault(keys[i], examples[i])
    return found
