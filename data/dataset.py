"""From files or tasks to examples to documents to a deterministic, resumable stream of batches.

data/formats.py reads rows and data/formatter.py makes ids of them; here examples are divided into
those to train on and those to validate with, measured, and dealt out.
"""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.batch import Document, GlobalBatch
from data.formats import SUFFIXES, read_examples, to_example, unread_columns
from data.formatter import Formatter
from data.tasks import TASKS, Example
from data.teacher_cache import TeacherCache
from errors import UserError

__all__ = [
    "Dataset",
    "DataStream",
    "EpochOrder",
    "Formatter",
    "divide",
    "find_file",
    "task_of",
    "to_example",
]

REDRAWS = 1000  # attempts at a problem of an endless task that is not too long
SPLIT_SEED = 0  # which examples are kept for validation does not depend on a run's seed
CHUNK = 2000  # examples that are tokenised at once

Tokenised = list[tuple[Example, Document]]


# --- files -> examples ----------------------------------------------------------------------------


def find_file(name: str) -> Path:
    """`--data` as a file. Raises UserError.

    It is a path, a folder with one data file or a train.*, or `org/name/path.jsonl` of a hub dataset.
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


# --- examples -> documents ------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Dataset:
    """Training documents by index, and validation examples. Length 0: an endless task.

    `notes` says in sentences what a user should know of the data. Raises UserError for what cannot
    be trained on.

    Args:
        max_tokens: Of a document.
        vocab: Ids from here on are refused.
        max_length_policy: What happens to a document that is too long: "error" or "drop".
        new_tokens: Room that each prompt has to leave for what a model generates; 0: for nothing.
        completions: Whether rows need an assistant's turn to train on; without it a document is the
            prompt alone, and prompts without an answer will do.
    """

    name: str
    formatter: Formatter
    _: dataclasses.KW_ONLY
    seed: int
    max_tokens: int
    vocab: int
    eval_examples: int = 0
    train_examples: int = 0
    max_length_policy: str = "error"
    new_tokens: int = 0
    completions: bool = True
    progress: bool = False

    def __post_init__(self) -> None:
        self.notes: list[str] = []
        self.dropped = 0
        self.teacher_topk: TeacherCache | None = None
        self._training: Tokenised | None = None
        self.task = task_of(self.name)
        examples = self._make_examples(self.task) if self.task else self._read_examples()
        if examples:
            self._training = self._tokenise_all(examples)
        else:
            self.get(0)  # what is wrong with every problem is wrong with the first
        answered = [e for e in self.validation if self.completions or e.has_answer]
        self._validation_documents = [d for _, d in self._tokenise(answered, completions=True)]
        self._note_texts()

    def _make_examples(self, task: str) -> list[Example]:
        """The training examples of a task that makes its own; none if it is endless."""
        self.label, count = task, self.name.partition(":")[2]
        if count and not (count.isdigit() and int(count)):
            raise UserError(
                f"--data {self.name}: write {task} for an endless supply or {task}:1000 for its "
                "first 1,000 problems"
            )

        def problems(split: str, number: int) -> list[Example]:
            keys = [f"{SPLIT_SEED}/{i}" for i in range(number)]
            return [TASKS[task].example(task, split, key) for key in keys]

        self.validation = problems("heldout", self.eval_examples)
        limits = [int(limit) for limit in (count, self.train_examples) if limit]
        return problems("train", min(limits, default=0))

    def _read_examples(self) -> list[Example]:
        """The training examples of a file."""
        path = find_file(self.name)
        self.validation, training = divide(
            path, self.eval_examples, self.train_examples, self.notes
        )
        if not training:
            number = len(self.validation)
            questions = f"{number} different questions" if number else "no examples"
            raise UserError(
                f"--data {self.name} has {questions}; --eval_examples {self.eval_examples} leaves "
                "none to train on"
            )
        task = (self.validation or training)[0].task
        own_task = task not in ("", "number", "answer")
        self.label = task if own_task else path.stem.removesuffix(".jsonl")
        unread = sorted(set().union(*map(unread_columns, training)))
        if unread:
            self.notes.append(f"columns that are not read: {', '.join(unread)}")
        return training

    def _note_texts(self) -> None:
        """Note the texts that another program would have treated in another way."""
        notes = {
            "in the texts of {:,} examples there are names of control tokens; they are encoded as "
            "characters": len(self.formatter.escaped),
            "the generation prompt opens a block of reasoning, which {:,} answers without any close "
            "before they begin": len(self.formatter.closed),
            "{:,} examples are too long for --micro_batch_tokens and dropped": self.dropped,
        }
        self.notes += [note.format(count) for note, count in notes.items() if count]

    def __len__(self) -> int:
        return len(self._training or ())

    def get(self, index: int) -> Document:
        document = self._pair(index)[1]
        if self.teacher_topk is None:
            return document
        return dataclasses.replace(document, teacher_topk=self.teacher_topk[index])

    def example(self, index: int) -> Example:
        """The example of which `get` returns the document."""
        return self._pair(index)[0]

    def examples(self) -> Iterator[Example]:
        """All training examples; none of an endless task."""
        return (example for example, _ in self._training or ())

    def validation_documents(self) -> list[Document]:
        return self._validation_documents

    def need_answers(self) -> None:
        """Refuse examples without an answer that a grader knows. Raises UserError."""
        bad = [e for e in self.examples() if e.answer is None or e.task not in TASKS]
        if bad:
            raise UserError(
                f"{bad[0].origin}: no answer that a grader knows ({len(bad):,} such); give "
                "--grpo_reward file.py:function"
            )

    def _pair(self, index: int) -> tuple[Example, Document]:
        """(example, document). Of an endless task: the first that fits, of this index's sequence."""
        if self._training is not None:
            return self._training[index]
        assert self.task is not None
        for attempt in range(REDRAWS):
            redraw = f"/redraw-{attempt}" if attempt else ""
            key = f"{self.seed}/{index}{redraw}"
            example = TASKS[self.task].example(self.task, "train", key)
            for pair in self._tokenise([example]):
                return pair
        raise UserError(
            f"--data {self.name}: {REDRAWS:,} problems in a row are longer than "
            f"--micro_batch_tokens {self.max_tokens:,}; raise it"
        )

    def _tokenise_all(self, examples: list[Example]) -> Tokenised:
        pairs, quiet = [], not self.progress or len(examples) <= 5 * CHUNK
        for start in tqdm(range(0, len(examples), CHUNK), "tokenising", disable=quiet):
            pairs += self._tokenise(examples[start : start + CHUNK])
        if not pairs:
            raise UserError(f"--data {self.name}: no example is left to train on")
        return pairs

    def _tokenise(self, examples: Iterable[Example], completions: bool = False) -> Tokenised:
        """Examples with their documents, turns apart where the template asks for it.

        Those that are too long are an error or left out.
        """
        completions = completions or self.completions
        if not completions:
            prompts = [self.formatter.prompt(example) for example in examples]
            documents = [Document.of_completion(prompt, ()) for prompt in prompts]
        else:
            turns = []
            for example in examples:
                if not example.has_answer:
                    raise UserError(
                        f"{example.origin}: it ends without an assistant's answer to train on; "
                        "grpo and --kd_prefix student take prompts alone"
                    )
                turns += self.formatter.split_turns(example)
            examples, documents = turns, self.formatter.documents(turns)
        pairs = []
        for example, document in zip(examples, documents, strict=True):
            if self._fits(example, document, completions):
                pairs.append((example, document))
            else:
                self.dropped += 1
        return pairs

    def _fits(self, example: Example, document: Document, completions: bool) -> bool:
        """Whether a document, and what is generated after its prompt, are short enough."""
        largest = document.tokens.max(initial=0)
        if largest >= self.vocab:
            raise UserError(
                f"{example.origin}: token id {largest} is outside the {self.vocab:,} ids that the "
                "models share"
            )
        problem = ""
        if len(document) > self.max_tokens:
            problem = (
                f"{len(document):,} tokens, more than --micro_batch_tokens {self.max_tokens:,}"
            )
        if self.new_tokens:
            prompt = len(self.formatter.prompt(example)) if completions else len(document)
            if prompt + self.new_tokens > self.max_tokens:
                problem = (
                    f"--sample_tokens {self.new_tokens} and this prompt ({prompt:,} tokens) do not "
                    f"fit --micro_batch_tokens {self.max_tokens}"
                )
        if problem and self.max_length_policy != "drop":
            raise UserError(
                f"{example.origin}: {problem}; raise it or set --max_length_policy drop"
            )
        return not problem


# --- documents -> batches -------------------------------------------------------------------------


class EpochOrder:
    """position -> index: epochs of `size` examples, each a permutation drawn from (seed, epoch).

    size 0: endless, as they come.
    """

    def __init__(self, size: int, seed: int):
        self.size, self.seed, self.epoch = size, seed, -1
        self.permutation = np.empty(0, int)

    def __call__(self, position: int) -> int:
        if not self.size:
            return position
        epoch, offset = divmod(position, self.size)
        if epoch != self.epoch:
            generator = np.random.default_rng([self.seed, epoch])
            self.epoch, self.permutation = epoch, generator.permutation(self.size)
        return int(self.permutation[offset])


class DataStream(Iterator[GlobalBatch]):
    """Endless global batches of `batch_size` documents, of which this rank gets its part.

    Batch k holds positions k·batch_size … of the concatenated epochs: what a step trains on depends
    on (seed, step) alone, not on the number of ranks. The next batch is made while a step runs;
    `state` counts what was consumed, not what was made.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int,
        weighting: Callable[[Document], Document],
        rank: int = 0,
        world: int = 1,
    ):
        self.dataset, self.batch_size, self.weighting = dataset, batch_size, weighting
        self.rank, self.world, self.consumed = rank, world, 0
        self.order = EpochOrder(len(dataset), seed)
        self.worker = ThreadPoolExecutor(1)
        self.prefetched: Future[GlobalBatch] | None = None

    def __next__(self) -> GlobalBatch:
        future = self.prefetched or self.worker.submit(self._make, self.consumed)
        batch = future.result()
        self.consumed += 1
        self.prefetched = self.worker.submit(self._make, self.consumed)
        return batch

    def _make(self, k: int) -> GlobalBatch:
        positions = range(k * self.batch_size + self.rank, (k + 1) * self.batch_size, self.world)
        documents = [self.dataset.get(self.order(position)) for position in positions]
        return GlobalBatch([self.weighting(document) for document in documents])

    def take_cost(self) -> Counter:
        """Reading data costs no tokens."""
        return Counter()

    def state(self) -> dict:
        return {"consumed": self.consumed}

    def load(self, state: dict) -> None:
        self.consumed, self.prefetched = state["consumed"], None

    def close(self) -> None:
        self.worker.shutdown(wait=True, cancel_futures=True)
