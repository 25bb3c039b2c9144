"""From files or tasks to examples to documents to a deterministic, resumable stream of batches.

data/formats.py reads rows, data/formatter.py makes ids of them; here they are divided into those to train on and
those to validate with, measured, and dealt out.
"""

import dataclasses
import hashlib
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data.batch import Batch, Document
from data.formats import SUFFIXES, read_examples, to_example, unread_columns
from data.formatter import Formatter
from data.tasks import TASKS, Example
from errors import UserError

__all__ = [
    "Dataset",
    "Formatter",
    "Order",
    "Stream",
    "divide",
    "find_file",
    "task_of",
    "to_example",
]  # what others take from here

REDRAWS = 1000  # attempts at a problem of an endless task that is not overlong
SPLIT_SEED = 0  # which examples are kept for validation does not depend on a run's seed


# --- files -> examples ---------------------------------------------------------------------------------------------


def find_file(name):
    """`--data` as a file: a path, a folder with one data file or a train.*, or `org/name/path.jsonl` of a hub dataset."""
    path = Path(name)
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
        train = [p for p in found if p.stem.split("-")[0] == "train"]
        if len(train or found) == 1:
            return (train or found)[0]
        listing = ", ".join(p.name for p in found) or "no .jsonl, .json or .parquet file"
        raise UserError(f"--data {name}: which file of the folder? It has {listing}")
    if path.exists():
        if path.suffix not in SUFFIXES:
            raise UserError(f"--data {name}: a data file ends in {', '.join(SUFFIXES)}")
        return path
    owner, *rest = name.split("/")
    if len(rest) >= 2 and Path(name).suffix in SUFFIXES and owner not in ("", ".", "..", "~"):
        from huggingface_hub import hf_hub_download

        try:
            return Path(
                hf_hub_download(f"{owner}/{rest[0]}", "/".join(rest[1:]), repo_type="dataset")
            )
        except Exception as e:
            raise UserError(
                f"--data {name}: neither a local file nor a hub dataset file ({type(e).__name__})"
            ) from None
    raise UserError(
        f"--data {name}: no such file or folder, and no task of that name ({', '.join(t for t in TASKS if TASKS[t].make)})"
    )


# --- documents -> batches ------------------------------------------------------------------------------------------


def task_of(name):
    """The task that `--data name` or `--data name:count` asks for, or None: a file."""
    task = name.partition(":")[0]
    return task if task in TASKS and TASKS[task].make else None


def question_key(example: Example) -> bytes:
    """The same for rows that ask the same question, whatever its case and white space; a row that asks nothing has its own."""
    asked = " ".join(example.opening.split()).casefold() or repr(example.messages)
    return hashlib.blake2b(asked.encode(), digest_size=16).digest()


def divide(
    path: Path, eval_examples: int, train_examples: int = 0, notes: list[str] | None = None
) -> tuple[list[Example], list[Example]]:
    """(held-out examples, those to train on) of a file: the same ones for every seed.

    Questions are divided, not rows: of a question that is held out no row is trained on, and one row is held out.
    train_examples: the first so many of the rest only; 0: all. notes: gets sentences on rows that are left out.
    """
    examples = read_examples(path, "train", notes)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(examples))
    keys = [question_key(example) for example in examples] if eval_examples else []
    held_out = {}
    for i in order if eval_examples else ():
        if len(held_out) == eval_examples:
            break
        held_out.setdefault(keys[i], examples[i])
    rest = [examples[i] for i in order if not held_out or keys[i] not in held_out]
    withheld = len(examples) - len(rest) - len(held_out)
    if withheld and notes is not None:
        notes.append(
            f"{withheld:,} more rows ask one of the {len(held_out):,} held-out questions; they are not trained on"
        )
    return list(held_out.values()), rest[: train_examples or None]


class Dataset:
    """Training documents by index, and held-out examples. Length None: endless, made on demand.

    max_tokens: of a document. vocab: ids from here on are refused. max_length_policy: "error" or "drop". new_tokens: room
    that every prompt has to leave for what a model generates; 0: nothing is generated. completions: whether rows need an
    assistant's turn to train on; without it a document is the prompt alone, and prompts without an answer will do.
    `notes` says in sentences what a user should know of the data.
    """

    def __init__(
        self,
        name: str,
        formatter: Formatter,
        *,
        seed: int,
        max_tokens: int,
        vocab: int,
        eval_examples: int = 0,
        train_examples: int = 0,
        max_length_policy: str = "error",
        new_tokens: int = 0,
        completions: bool = True,
        progress: bool = False,
    ):
        self.name, self.formatter, self.seed = name, formatter, seed
        self.max_tokens, self.vocab, self.max_length_policy = max_tokens, vocab, max_length_policy
        self.new_tokens, self.completions = new_tokens, completions
        self.dropped, self._documents, self._examples, self.listed = 0, None, None, None
        self.notes = []
        task, _, count = name.partition(":")
        self.task = task_of(name)
        if self.task:
            self._make(task, count, eval_examples, train_examples, progress)
        else:
            self._read(eval_examples, train_examples, progress)
        with_answers = [e for e in self.validation if completions or e.has_answer]
        self._validation_documents = self._checked(with_answers, completions=True)[1]
        self._note_texts()

    def _make(
        self, task: str, count: str, eval_examples: int, train_examples: int, progress: bool
    ) -> None:
        """The examples of a task that makes its own."""
        self.label = task
        if count and not (count.isdigit() and int(count)):
            raise UserError(
                f"--data {self.name}: write {task} for an endless supply or {task}:1000 for its first 1,000 problems"
            )
        self.validation = [
            TASKS[task].example(task, "validation", f"{SPLIT_SEED}/{i}") for i in range(eval_examples)
        ]
        if count or train_examples:
            n = min(int(n) for n in (count, train_examples) if n)
            self._tokenise(
                [TASKS[task].example(task, "train", f"{SPLIT_SEED}/{i}") for i in range(n)],
                progress,
            )
        else:
            self.get(0)  # what is wrong with every problem is wrong with the first

    def _read(self, eval_examples: int, train_examples: int, progress: bool) -> None:
        """The examples of a file."""
        path = find_file(self.name)
        self.validation, training = divide(path, eval_examples, train_examples, self.notes)
        first = next(iter([*self.validation, *training]), None)
        named = first is not None and first.task not in ("", "number", "answer")
        self.label = first.task if named else path.stem.removesuffix(".jsonl")
        if not training:
            questions = f"{len(self.validation)} different questions" if first else "no examples"
            raise UserError(
                f"--data {self.name} has {questions}; --eval_examples {eval_examples} leaves none to train on"
            )
        unread = sorted(set().union(*(unread_columns(e) for e in training)))
        if unread:
            self.notes.append(f"columns that are not read: {', '.join(unread)}")
        self._tokenise(training, progress)

    def _note_texts(self) -> None:
        """Say what was done with texts that another program would have made something else of."""
        if escaped := len(self.formatter.escaped):
            self.notes.append(
                f"in the texts of {escaped:,} examples there are names of control tokens; they are encoded as characters"
            )
        if closed := len(self.formatter.closed):
            self.notes.append(
                f"the generation prompt opens a block of reasoning, which {closed:,} answers without any close before they begin"
            )
        if self.dropped:
            self.notes.append(
                f"{self.dropped:,} examples are too long for --micro_batch_tokens and dropped"
            )

    def __len__(self) -> int:
        return 0 if self._documents is None else len(self._documents)

    def get(self, index: int) -> Document:
        document = self._documents[index] if self._documents is not None else self._draw(index)[1]
        return dataclasses.replace(document, listed=self.listed[index]) if self.listed else document

    def example(self, index: int) -> Example:
        """What `get` makes a document of."""
        return self._examples[index] if self._examples is not None else self._draw(index)[0]

    def examples(self) -> Iterator[Example]:
        """All training examples; none of an endless task."""
        return iter(self._examples or ())

    def _draw(self, index: int) -> tuple[Example, Document]:
        """(example, document) of an endless task: the first that is not dropped, of a fixed sequence for this index."""
        for key in (
            f"{self.seed}/{index}",
            *(f"{self.seed}/{index}/redraw-{n}" for n in range(1, REDRAWS)),
        ):
            example = TASKS[self.task].example(self.task, "train", key)
            documents = self._checked([example])[1]
            if documents:
                return example, documents[0]
        raise UserError(
            f"--data {self.name}: {REDRAWS:,} problems in a row are longer than --micro_batch_tokens {self.max_tokens:,}; raise it"
        )

    def need_answers(self) -> None:
        """Refuse examples without an answer that a grader knows. Raises UserError."""
        bad = [e for e in self._examples or () if e.answer is None or e.task not in TASKS]
        if bad:
            raise UserError(
                f"{bad[0].origin}: no answer that a grader knows ({len(bad):,} such); give --grpo_reward file.py:function"
            )

    def validation_documents(self) -> list[Document]:
        return self._validation_documents

    def _tokenise(self, examples: list[Example], progress: bool) -> None:
        self._documents, self._examples, step = [], [], 2000
        show = progress and len(examples) > 5 * step
        for lo in range(0, len(examples), step):
            kept, documents = self._checked(examples[lo : lo + step])
            self._examples += kept
            self._documents += documents
            if show:
                done = min(lo + step, len(examples))
                print(
                    f"\rtokenising {done:,}/{len(examples):,}", end="", file=sys.stderr, flush=True
                )
        if show:
            print(file=sys.stderr)
        if not self._documents:
            raise UserError(f"--data {self.name}: no example is left to train on")

    def _checked(
        self, examples: list[Example], completions: bool = False
    ) -> tuple[list[Example], list[Document]]:
        """The examples that are not too long (or an error), turns apart where the template asks for it, and their documents."""
        completions = completions or self.completions
        if completions:
            for example in examples:
                if not example.has_answer:
                    raise UserError(
                        f"{example.origin}: it ends without an assistant's answer to train on; grpo and --kd_prefix student take prompts alone"
                    )
            examples = [
                part for example in examples for part in self.formatter.split_turns(example)
            ]
            documents = self.formatter.documents(examples)
        else:
            documents = [prompt_alone(self.formatter.prompt(example)) for example in examples]
        kept = [
            (e, d)
            for e, d in zip(examples, documents, strict=True)
            if self._fits(e, d, completions)
        ]
        self.dropped += len(documents) - len(kept)
        return [e for e, _ in kept], [d for _, d in kept]

    def _fits(self, example: Example, document: Document, completions: bool) -> bool:
        """Whether a document and what is generated behind its prompt are not too long. Raises UserError where that is an error."""
        if len(document) and document.tokens.max() >= self.vocab:
            raise UserError(
                f"{example.origin}: token id {document.tokens.max()} is outside the {self.vocab:,} ids that the models share"
            )
        if self.new_tokens:
            prompt = len(self.formatter.prompt(example)) if completions else len(document)
            if prompt + self.new_tokens > self.max_tokens:
                if self.max_length_policy == "drop":
                    return False
                raise UserError(
                    f"{example.origin}: --sample_tokens {self.new_tokens} and this prompt ({prompt:,} tokens) do not fit "
                    f"--micro_batch_tokens {self.max_tokens}; raise it or set --max_length_policy drop"
                )
        if len(document) <= self.max_tokens:
            return True
        if self.max_length_policy == "drop":
            return False
        raise UserError(
            f"{example.origin}: {len(document):,} tokens, more than --micro_batch_tokens {self.max_tokens:,}; raise it or set --max_length_policy drop"
        )


def prompt_alone(ids: list[int]) -> Document:
    """A document on which nothing is trained: what is trained on is generated behind it."""
    return Document(np.array(ids, np.int32), np.zeros(len(ids), np.float32))


class Stream:
    """Endless global batches of `batch_size` documents; this rank gets its share. The next one is made while a step runs.

    Batch k holds positions k·batch_size … of the concatenated epochs, each a permutation drawn from (seed, epoch): what a
    step trains on depends on (seed, step) alone, not on the number of ranks. `state` counts what was consumed, not fetched.
    """

    def __init__(self, dataset, batch_size, seed, weighting, rank=0, world=1):
        self.dataset, self.batch_size, self.seed, self.weighting = (
            dataset,
            batch_size,
            seed,
            weighting,
        )
        self.rank, self.world, self.consumed = rank, world, 0
        self._worker, self._next = ThreadPoolExecutor(1), None
        self._order = Order(len(dataset), seed)

    def __iter__(self):
        return self

    def __next__(self):
        batch = (self._next or self._worker.submit(self._make, self.consumed)).result()
        self.consumed += 1
        self._next = self._worker.submit(self._make, self.consumed)
        return batch

    def state(self):
        return {"consumed": self.consumed}

    def load(self, state):
        self.consumed, self._next = state["consumed"], None

    def close(self):
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _make(self, k):
        positions = range(k * self.batch_size + self.rank, (k + 1) * self.batch_size, self.world)
        return Batch.pack(self.weighting(self.dataset.get(self._order(p))) for p in positions)


class Order:
    """position -> index: epochs of `size` examples, each a permutation drawn from (seed, epoch); size 0: endless, as they come."""

    def __init__(self, size, seed):
        self.size, self.seed, self._epoch = size, seed, (-1, None)

    def __call__(self, position):
        if not self.size:
            return position
        epoch, offset = divmod(position, self.size)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, np.random.default_rng([self.seed, epoch]).permutation(self.size))
        return int(self._epoch[1][offset])


def show_batch(batch, tokenizer, count):
    """Print documents with what is trained on in ⟦brackets⟧ (green on a terminal)."""
    on, off = ("\033[32m⟦", "⟧\033[0m") if sys.stdout.isatty() else ("⟦", "⟧")
    for n, d in enumerate(batch.documents[:count], 1):
        trained = int((d.weights != 0).sum())
        print(f"--- example {n}: {len(d)} tokens, {trained} trained on")
        lo = 0
        for hi in range(1, len(d) + 1):
            if hi == len(d) or (d.weights[hi] != 0) != (d.weights[lo] != 0):
                text = tokenizer.decode(d.tokens[lo:hi])
                print(on + text + off if d.weights[lo] != 0 else text, end="")
                lo = hi
        print()
