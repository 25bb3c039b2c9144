"""Examples, and the tasks that make and grade them."""

import dataclasses
import functools
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from data.grade import Verdict, grade_math, grade_number
from data.grading.code import grade_code
from data.sandbox import at_once
from data.toy import LONG, TALK, is_validation, running_text, word_problem
from model import parallel
from plugins import Table
from progress import Halt, go_on, watched

FEW_WORDS = 8  # of a user who asks about what the system said


@dataclasses.dataclass(frozen=True)
class Example:
    """A conversation and what its answer should be.

    messages: dicts with role and content (data/messages.py has their other fields). The last one is
        the assistant's, or the user's where nobody's answer is given (a prompt alone).
    answer: the gold answer, or None.
    task: the name of the task that grades it; "" if none does.
    origin: the file and line, for errors.
    columns: the whole row, for reward functions; a column is an attribute, too.
    """

    messages: tuple[dict, ...]
    answer: str | None = None
    task: str = ""
    origin: str = ""
    columns: dict = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @property
    def question(self) -> str:
        """What the user said last."""
        for message in reversed(self.messages):
            if message["role"] == "user":
                return message["content"] or ""
        return ""

    @property
    def opening(self) -> str:
        """What was asked before the first answer, empty if nothing was.

        Rows with the same opening ask the same question: a longer conversation begins like a
        shorter one, and several answers to one question are rows of their own. It is the user's
        text; what the system says belongs to it where the user says little ("Summarise the text.").
        """
        user, others = [], []
        for message in self.messages:
            if message["role"] == "user":
                user.append(message["content"] or "")
            elif message["role"] != "assistant":
                others.append(message["content"] or "")
            elif user:
                break
        text = "\n".join(user)
        if len(text.split()) >= FEW_WORDS:
            return text
        return "\n".join([text, *others]).strip()

    @property
    def has_answer(self) -> bool:
        """Whether there is an assistant's turn to train on."""
        return bool(self.messages) and self.messages[-1]["role"] == "assistant"

    @property
    def own_answer(self) -> str:
        """The assistant's last turn; empty where nobody's answer is given."""
        return (self.has_answer and self.messages[-1]["content"]) or ""

    def __getattr__(self, name: str) -> Any:
        columns = self.__dict__.get("columns", {})
        if name in columns:
            return columns[name]
        known = ", ".join(columns) or "of no file"
        raise AttributeError(f"the example has no {name!r}; its row has the columns {known}")


def turns(question: str, answer: str) -> tuple[dict, dict]:
    """The messages of a question and its answer."""
    return ({"role": "user", "content": question}, {"role": "assistant", "content": answer})


@dataclasses.dataclass(frozen=True)
class Task:
    """What a kind of problem is made by, and graded by.

    make: a seeded generator -> (question, solution, answer); None: the problems come from a file.
    grade: (text, gold answer) -> Verdict.
    waits: grading waits for other processes, so that several at a time are faster.
    """

    make: Callable[[random.Random], tuple[str, str, str]] | None
    grade: Callable[[str, Any], Verdict]
    waits: bool = False

    def example(self, name: str, split: str, key: str) -> Example:
        """Make the problem of task `name` with this key ("{seed}/{index}").

        split: "train" or "validation". The same key gives the same problem.
        """
        if not self.make or split not in ("train", "validation"):
            raise ValueError(f"task {name} makes no problems for the split {split!r}")
        for attempt in range(10_000):
            question, solution, answer = self.make(random.Random(f"{name}/{key}/{attempt}"))
            if is_validation(question) == (split == "validation"):
                origin = f"{name} problem {key}"
                return Example(turns(question, solution), answer, name, origin)
        raise ValueError(f"task {name} makes no problem for the split {split!r}")


TASKS: Table[Task] = Table(
    "task",
    Task,
    {
        "word_problems": Task(word_problem, grade_number),
        "word_problems_talk": Task(functools.partial(word_problem, style=TALK), grade_number),
        "word_problems_long": Task(functools.partial(word_problem, style=LONG), grade_number),
        "word_problems_text": Task(running_text, grade_number),
        "gsm8k": Task(None, grade_number),
        "math": Task(None, grade_math, waits=True),
        "number": Task(
            None, grade_number
        ),  # this and the next: of any file, by the look of its answers
        "answer": Task(None, grade_math, waits=True),
        "humaneval": Task(None, grade_code, waits=True),
        "mbpp": Task(None, grade_code, waits=True),
    },
)


def grade(example: Example, text: str) -> Verdict:
    """Grade `text` as an answer to `example`, by its task's grader."""
    return TASKS[example.task].grade(text, example.answer)


def grade_all(grade_one: Callable, items: Sequence[tuple], halt: Halt = go_on) -> list:
    """Call grade_one(*item) for tuples (example, ...) and return the results in their order.

    Several run at a time where an example's task waits for other processes. halt: raises what ends
    it between two of them.
    """
    pool, calls = ThreadPoolExecutor(at_once()), []
    try:
        for item in items:
            task = TASKS.get(getattr(item[0], "task", ""))
            if task and task.waits:
                calls.append(pool.submit(grade_one, *item).result)
            else:
                calls.append(functools.partial(grade_one, *item))
        watching = watched("grading", calls, "answers", parallel.speaks(), halt)
        return [call() for call in watching]
    finally:
        pool.shutdown(cancel_futures=True)
