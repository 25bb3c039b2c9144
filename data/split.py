"""Which file `--data` names, and which of its questions are kept for validation."""

import hashlib
from pathlib import Path

import numpy as np

from data.formats import SUFFIXES, read_examples
from data.tasks import TASKS, Example
from errors import UserError

SPLIT_SEED = 0  # which examples are kept for validation does not depend on a run's seed


def find_file(name: str) -> Path:
    """`--data` as a file. Raises UserError.

    It is a path, a folder with one data file or a train.*, or org/name/path.jsonl of a hub dataset.
    """
    path = Path(name)
    if path.is_dir():
        return _file_of_folder(path)
    if path.exists():
        if path.suffix not in SUFFIXES:
            raise UserError(f"--data {name}: a data file ends in {', '.join(SUFFIXES)}")
        return path
    owner, *rest = name.split("/")
    if len(rest) >= 2 and path.suffix in SUFFIXES and owner not in ("", ".", "..", "~"):
        from huggingface_hub import hf_hub_download

        repository, file = f"{owner}/{rest[0]}", "/".join(rest[1:])
        try:
            return Path(hf_hub_download(repository, file, repo_type="dataset"))
        except Exception as e:
            problem = f"neither a local file nor a hub dataset file ({type(e).__name__})"
            raise UserError(f"--data {name}: {problem}") from None
    tasks = ", ".join(task for task in TASKS if TASKS[task].make)
    raise UserError(f"--data {name}: no such file or folder, and no task of that name ({tasks})")


def _file_of_folder(folder: Path) -> Path:
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    train = [path for path in files if path.stem.split("-")[0] == "train"]
    candidates = train or files
    if len(candidates) == 1:
        return candidates[0]
    listing = ", ".join(path.name for path in files) or "no .jsonl, .json or .parquet file"
    raise UserError(f"--data {folder}: which file of the folder? It has {listing}")


def task_of(name: str) -> str | None:
    """The task that `--data name` or `--data name:count` asks for, or None: a file."""
    task = name.partition(":")[0]
    return task if task in TASKS and TASKS[task].make else None


def question_key(example: Example) -> bytes:
    """The same for rows that ask the same question, whatever its case and white space.

    A row that asks nothing has a key of its own.
    """
    asked = " ".join(example.opening.split()).casefold() or repr(example.messages)
    return hashlib.blake2b(asked.encode(), digest_size=16).digest()


def divide(
    path: Path, eval_examples: int, train_examples: int = 0, notes: list[str] | None = None
) -> tuple[list[Example], list[Example]]:
    """Divide a file into (validation examples, training examples): the same ones for every seed.

    Questions are divided, not rows: one row of a validation question is kept for validation, and
    none of its rows is trained on.

    Args:
        train_examples: The first so many of the rest only; 0: all.
        notes: Gets sentences on rows that are left out.
    """
    examples = read_examples(path, "train", notes)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(examples))
    if not eval_examples:
        return [], [examples[i] for i in order][: train_examples or None]
    keys = [question_key(example) for example in examples]
    validation: dict[bytes, Example] = {}
    for i in order:
        if len(validation) == eval_examples:
            break
        validation.setdefault(keys[i], examples[i])
    training = [examples[i] for i in order if keys[i] not in validation]
    withheld = len(examples) - len(training) - len(validation)
    if withheld and notes is not None:
        notes.append(
            f"{withheld:,} more rows ask one of the {len(validation):,} held-out questions; "
            "they are not trained on"
        )
    return list(validation.values()), training[: train_examples or None]
