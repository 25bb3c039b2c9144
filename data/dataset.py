"""From files or tasks to examples to documents to a deterministic, resumable stream of batches.

data/formats.py reads rows, data/split.py keeps some for validation, and data/formatter.py makes ids
of them; here they are measured and dealt out.
"""

import dataclasses
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from data.batch import Document, GlobalBatch
from data.formats import read_examples, to_example
from data.formatter import Formatter
from data.messages import is_empty
from data.order import EpochOrder, MixedOrder
from data.split import SPLIT_SEED, Source, read_divided, task_of
from data.tasks import TASKS, Example
from data.teacher_cache import TeacherCache
from errors import UserError
from files import Fields
from model import parallel
from progress import Halt, Progress, go_on

__all__ = ["Dataset", "DataStream", "Formatter", "SPLIT_SEED", "task_of", "to_example"]

REDRAWS = 1000  # attempts at a problem of an endless task that is not too long
CHUNK = 2000  # examples that are tokenised at once

NO_TURN, NO_GOLD = "without an assistant's answer", "without a gold answer"
LACKS = {
    NO_TURN: "it ends without an assistant's answer to train on ({:,} such); grpo and --kd_prefix "
    "student take prompts alone",
    NO_GOLD: "no answer that a grader knows ({:,} such); give --grpo_reward file.py:function",
}

Tokenised = list[tuple[Example, Document]]


@dataclasses.dataclass(eq=False)
class Dataset:
    """Training documents by index, and validation examples. Length 0: an endless task.

    The documents of several files stand one file after the other: `sizes` of each of `sources`.
    `notes` says in sentences what a user should know of the data. Raises UserError for what cannot
    be trained on.

    Args:
        max_tokens: Of a document.
        vocab: Ids from here on are refused.
        eval_data: The file of the validation examples; empty: they are set apart from the data.
        at_most_a_tenth: Whether a file keeps no more than a tenth of its rows for them.
        max_length_policy: What happens to a document that is too long: "error" or "drop".
        bad_rows: What happens to a row that says nothing or lacks the answer that is needed.
        new_tokens: Room that each prompt has to leave for what a model generates; 0: for nothing.
        completions: Whether rows need an assistant's turn to train on; without it a document is the
            prompt alone, and prompts without an answer will do.
        gold: Whether rows need a gold answer that a grader knows.
        prefix_tokens: How much of its answer each prompt may be followed by, too.
        teachers: The names of those who score the text; several: the column `teacher` chooses.
    """

    name: str
    formatter: Formatter
    _: dataclasses.KW_ONLY
    seed: int
    max_tokens: int
    vocab: int
    eval_examples: int = 0
    eval_data: str = ""
    at_most_a_tenth: bool = False
    train_examples: int = 0
    max_length_policy: str = "error"
    bad_rows: str = "error"
    new_tokens: int = 0
    completions: bool = True
    gold: bool = False
    prefix_tokens: int = 0
    teachers: Sequence[str] = ()
    progress: bool = False

    def __post_init__(self) -> None:
        self.notes: list[str] = []
        self.dropped: Counter[str] = Counter()  # how many examples are left out, by the reason
        self.teacher_topk: TeacherCache | None = None
        self.sources: list[Source] = []
        self.task = task_of(self.name)
        training = [self._make_examples(self.task)] if self.task else self._read_examples()
        self._training: Tokenised = []
        self.sizes: list[int] = []
        for examples in training:
            progress = Progress("tokenising", len(examples), "examples", self.progress)
            pairs = []
            for start in range(0, len(examples), CHUNK):
                chunk = examples[start : start + CHUNK]
                pairs += self._tokenise(chunk)
                progress.add(len(chunk))
            if examples and not pairs:
                raise UserError(f"--data {self.name}: no example is left to train on")
            self._training += pairs
            self.sizes.append(len(pairs))
        if not self._training:
            self.get(0)  # what is wrong with every problem is wrong with the first
        answered = [example for example in self.validation if example.has_answer]
        self._validation_documents = [d for _, d in self._tokenise(answered, validation=True)]
        self._note_texts()

    def _make_examples(self, task: str) -> list[Example]:
        """The training examples of a task that makes its own; none if it is endless."""
        if self.eval_data:
            raise UserError(f"--eval_data: {task} makes validation problems of its own")
        self.label, count = task, self.name.partition(":")[2]
        if count and not (re.fullmatch("[0-9]{1,9}", count) and int(count)):
            raise UserError(
                f"--data {self.name}: write {task} for an endless supply or {task}:1000 for its "
                "first 1,000 problems"
            )

        def problems(split: str, number: int) -> list[Example]:
            keys = [f"{SPLIT_SEED}/{i}" for i in range(number)]
            return [TASKS[task].example(task, split, key) for key in keys]

        self.validation = problems("validation", self.eval_examples)
        limits = [int(limit) for limit in (count, self.train_examples) if limit]
        return problems("train", min(limits, default=0))

    def _read_examples(self) -> list[list[Example]]:
        """The training examples of each file."""
        division = read_divided(
            self.name,
            self._read,
            self.eval_examples,
            eval_data=self.eval_data,
            train_examples=self.train_examples,
            notes=self.notes,
            teachers=len(self.teachers),
            at_most_a_tenth=self.at_most_a_tenth,
        )
        self.sources, self.label = division.sources, division.label
        self.validation = division.validation
        for examples in division.training:
            self._refuse_bad(examples)
        if self.completions and not self.eval_data:
            self._refuse_bad(self.validation)
        return division.training

    def _read(self, path: Path, split: str) -> list[Example]:
        """A file's examples, without bad rows where they are dropped."""
        if self.bad_rows != "drop":
            return read_examples(path, split, self.notes)
        good, before = [], self.dropped.total()
        for example in read_examples(path, split, self.notes, self.dropped):
            lack = self._lack(example) if split == "train" else ""
            if lack:
                self.dropped[lack] += 1
            else:
                good.append(example)
        if not good and self.dropped.total() > before:
            raise UserError(f"{path}: all its rows are empty or lack what this run needs")
        return good

    def _lack(self, example: Example) -> str:
        """What this run needs and the example lacks, of LACKS; empty for nothing."""
        if self.completions and not example.has_answer:
            return NO_TURN
        if self.gold and (example.answer is None or example.task not in TASKS):
            return NO_GOLD
        return ""

    def _refuse_bad(self, examples: list[Example]) -> None:
        bad = [example for example in examples if self._lack(example)]
        if bad:
            problem = LACKS[self._lack(bad[0])].format(len(bad))
            columns = ", ".join(bad[0].columns)
            raise UserError(
                f"{bad[0].origin}: {problem}, or set --bad_rows drop; its columns are {columns}: "
                "an answer is called answer, solution or completion"
            )

    def _note_texts(self) -> None:
        """Note the texts that another program would have treated in another way."""
        escaped, closed = len(self.formatter.escaped), len(self.formatter.closed)
        if escaped:
            self.notes.append(
                f"in the texts of {escaped:,} examples there are names of control tokens; they are "
                "encoded as characters"
            )
        if closed:
            self.notes.append(
                f"the generation prompt opens a block of reasoning, which {closed:,} answers "
                "without any close before they begin"
            )
        dropped = self.dropped.total()
        if dropped:
            total = dropped + len(self._training) + len(self._validation_documents)
            reasons = [f"{count:,} {reason}" for reason, count in self.dropped.items() if count]
            self.notes.append(
                f"{dropped:,} of {total:,} examples ({dropped / total:.1%}) are dropped: "
                + ", ".join(reasons)
            )

    def __len__(self) -> int:
        return len(self._training)

    def digest(self) -> str:
        """A hash of the ids of all documents, the validation's, too; of the first problem where
        the task is endless."""
        training = map(self.get, range(len(self) or 1))
        digest = hashlib.sha256()
        for document in (*training, *self._validation_documents):
            digest.update(document.tokens.tobytes() + b"/" + document.weights.tobytes())
        return digest.hexdigest()

    def get(self, index: int) -> Document:
        document = self._pair(index)[1]
        if self.teacher_topk is None:
            return document
        return dataclasses.replace(document, teacher_topk=self.teacher_topk[index])

    def example(self, index: int) -> Example:
        """The example of which `get` returns the document."""
        return self._pair(index)[0]

    def teaching(self, example: Example) -> tuple[int, list[int] | None]:
        """Which of the teachers scores an example, and the prompt of its own that it sees."""
        number = 0
        if len(self.teachers) > 1:
            name = example.columns.get("teacher")
            if name not in self.teachers:
                known = ", ".join(self.teachers)
                raise UserError(
                    f"{example.origin}: the column 'teacher' is {name!r} and must be one of {known}"
                )
            number = self.teachers.index(name)
        return number, self.formatter.teacher_prompt(example)

    def prefix(self, index: int) -> list[int]:
        """The first `prefix_tokens` of an example's last answer, at most half of it."""
        document = self.get(index)
        answer = document.tokens[document.completion_start :]
        return answer[: min(self.prefix_tokens, len(answer) // 2)].tolist()

    def examples(self) -> Iterator[Example]:
        """All training examples; none of an endless task."""
        return (example for example, _ in self._training)

    def validation_documents(self) -> list[Document]:
        return self._validation_documents

    def order(self, seed: int) -> EpochOrder | MixedOrder:
        """Which example stands at which position of a stream."""
        if len(self.sources) < 2:
            return EpochOrder(len(self), seed)
        return MixedOrder(self.sizes, [source.weight for source in self.sources], seed)

    def _pair(self, index: int) -> tuple[Example, Document]:
        """(example, document). An endless task draws again until a problem is short enough."""
        if self._training:
            return self._training[index]
        assert self.task is not None
        key = first = f"{self.seed}/{index}"
        for attempt in range(1, REDRAWS + 1):
            pairs = self._tokenise([TASKS[self.task].example(self.task, "train", key)])
            if pairs:
                return pairs[0]
            key = f"{first}/redraw-{attempt}"
        raise UserError(
            f"--data {self.name}: {REDRAWS:,} problems in a row are longer than "
            f"--micro_batch_tokens {self.max_tokens:,}; raise it"
        )

    def _tokenise(self, examples: Iterable[Example], validation: bool = False) -> Tokenised:
        """Examples with their documents, turns apart where the template asks for it.

        Those that are too long are an error or left out. No teacher reads validation documents.
        """
        examples = list(examples)
        completions = validation or self.completions
        with self.formatter.ahead(examples, completions):
            return self._tokenise_now(examples, validation, completions)

    def _tokenise_now(
        self, examples: list[Example], validation: bool, completions: bool
    ) -> Tokenised:
        teaches = self.teachers and not validation
        if not completions:
            prompts = [self.formatter.prompt(example) for example in examples]
            documents = [Document.of_completion(prompt, ()) for prompt in prompts]
        else:
            turns = []
            for example in examples:
                split = self.formatter.split_turns(example)
                told = not is_empty(example.columns.get("teacher_prompt"))
                if teaches and told and len(split) > 1:
                    raise _several_turns(example)
                turns += split
            examples, documents = turns, self.formatter.documents(turns)
        if teaches:
            documents = list(map(self._taught, examples, documents))
        pairs = []
        for example, document in zip(examples, documents, strict=True):
            if self._fits(example, document, completions):
                pairs.append((example, document))
            else:
                self.dropped["too long for --micro_batch_tokens"] += 1
        return pairs

    def _taught(self, example: Example, document: Document) -> Document:
        """The document with what its teacher reads."""
        number, prompt = self.teaching(example)
        if prompt and document.weights[: document.completion_start].any():
            raise _several_turns(example)
        return document.taught(number, prompt)

    def _fits(self, example: Example, document: Document, completions: bool) -> bool:
        """Whether a document, and what is generated after its prompt, are short enough."""
        seen = document.for_teacher()
        largest = max(document.tokens.max(initial=0), seen.tokens.max(initial=0))
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
        elif len(seen) > self.max_tokens:
            problem = f"{len(seen):,} tokens for the teacher, more than --micro_batch_tokens"
        if self.new_tokens:
            prompt = len(self.formatter.prompt(example)) if completions else len(document)
            if document.teacher_tokens is not None:
                prompt = max(prompt, len(self.teaching(example)[1] or ()))
            prompt += self.prefix_tokens
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


class DataStream(Iterator[GlobalBatch]):
    """Endless global batches of `batch_size` documents, of which this rank gets its part.

    Batch k holds positions k·batch_size … of the concatenated epochs: what a step trains on depends
    on (seed, step) alone, not on the number of ranks. The next batch is made while a step runs;
    `state` counts what was consumed, not what was made. halt: raises what ends the making.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int,
        weighting: Callable[[Document], Document],
        rank: int = 0,
        world: int = 1,
        halt: Halt = go_on,
    ):
        self.dataset, self.batch_size, self.weighting = dataset, batch_size, weighting
        self.rank, self.world, self.halt, self.consumed = rank, world, halt, 0
        self.order = dataset.order(seed)
        self.worker = ThreadPoolExecutor(1)
        self.prefetched: Future[GlobalBatch] | None = None

    def __next__(self) -> GlobalBatch:
        future = self.prefetched or self.worker.submit(self._make, self.consumed)
        with parallel.as_one():  # one that was told to stop ends all
            batch = future.result()
        self.consumed += 1
        self.prefetched = self.worker.submit(self._make, self.consumed)
        return batch

    def _make(self, k: int) -> GlobalBatch:
        positions = range(k * self.batch_size + self.rank, (k + 1) * self.batch_size, self.world)
        speaks, documents = self.rank == 0, []
        progress = Progress("making a batch", len(positions), "examples", speaks, self.halt)
        for position in positions:
            documents.append(self.weighting(self.dataset.get(self.order(position))))
            progress.add(1)
        return GlobalBatch(documents)

    def take_cost(self) -> dict[str, float]:
        """Reading data costs no model's tokens or FLOPs."""
        return {}

    def state(self) -> dict:
        return {"consumed": self.consumed}

    def load(self, state: dict) -> None:
        self.consumed = Fields(state, "the checkpoint's place in the data").get("consumed", int)
        self.prefetched = None

    def close(self) -> None:
        self.worker.shutdown(wait=True, cancel_futures=True)


def _several_turns(example: Example) -> UserError:
    return UserError(
        f"{example.origin}: 'teacher_prompt' stands before one answer, and the row trains on "
        "several turns; give the earlier ones weight 0"
    )
