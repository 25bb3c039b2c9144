"""Tasks that make their own problems: endless, seeded, with a held-out split by construction.

A task is `make(rng) -> (question, solution, answer)` and a grader. Which split a problem belongs to is decided by a hash of
its question, so no training problem is ever a held-out one, whatever the seed, however many are drawn and in whatever style they are solved.
"""

import dataclasses
import functools
import random
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from data.grade import grade_math, grade_number
from data.grading.code import grade_code
from data.sandbox import at_once

HELD_OUT_SHARE = 8  # one problem in eight is held out
FEW_WORDS = 8  # of a user who asks about what the system said


@dataclasses.dataclass(frozen=True)
class Example:
    """A conversation and what its answer should be.

    messages: dicts with role and content (data/formats.py has their other fields). The last one is the assistant's,
    or the user's where nobody's answer is given (a prompt alone). answer: the gold answer, or None. origin: the
    file and line, for errors. columns: the whole row, for reward functions; a column is an attribute, too.
    """

    messages: tuple
    answer: str | None = None
    task: str = ""
    origin: str = ""
    columns: dict = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @property
    def question(self) -> str:
        """What the user said last."""
        return next(
            (m["content"] or "" for m in reversed(self.messages) if m["role"] == "user"), ""
        )

    @property
    def opening(self) -> str:
        """What was asked before the first answer, empty if nothing was. Rows with the same opening ask the same question:
        a longer conversation begins like a shorter one, and several answers to one question are rows of their own. It is
        the user's text; what the system says belongs to it where the user says little ("Summarise the text.")."""
        asked = next(
            (i for i, m in enumerate(self.messages) if m["role"] == "user"), len(self.messages)
        )
        answered = next(
            (i for i, m in enumerate(self.messages) if i > asked and m["role"] == "assistant"),
            len(self.messages),
        )
        before = self.messages[:answered]
        user = "\n".join(m["content"] or "" for m in before if m["role"] == "user")
        if len(user.split()) >= FEW_WORDS:
            return user
        return "\n".join(
            [user, *(m["content"] or "" for m in before if m["role"] not in ("user", "assistant"))]
        ).strip()

    @property
    def has_answer(self) -> bool:
        """Whether there is an assistant's turn to train on."""
        return bool(self.messages) and self.messages[-1]["role"] == "assistant"

    def __getattr__(self, name: str) -> object:
        columns = self.__dict__.get("columns", {})
        if name in columns:
            return columns[name]
        raise AttributeError(
            f"the example has no {name!r}; its row has the columns {', '.join(columns) or 'of no file'}"
        )


@dataclasses.dataclass(frozen=True)
class Task:
    make: Callable | None  # None: the problems come from a file
    grade: Callable  # (text, gold answer) -> Verdict
    waits: bool = False  # grading waits for other processes: several at a time are faster

    def example(self, name, split, key):
        """The problem with this key ("{seed}/{index}") in "train" or "heldout"; the same key gives the same problem."""
        for attempt in range(10_000):
            question, solution, answer = self.make(random.Random(f"{name}/{key}/{attempt}"))
            if _held_out(question) == (split == "heldout"):
                return _example(question, solution, answer, name, f"{name} problem {key}")
        raise ValueError(f"task {name} makes no problem for the {split} split")


def _held_out(question):
    return zlib.crc32(question.encode()) % HELD_OUT_SHARE == 0


def _example(question, solution, answer, task, origin):
    return Example(
        ({"role": "user", "content": question}, {"role": "assistant", "content": solution}),
        answer,
        task,
        origin,
    )


_NAMES = ("Mia", "Ben", "Ada", "Leo", "Zoe", "Sam", "Eva", "Tom")
_ITEMS = ("apples", "coins", "books", "cards", "shells", "stamps")
_STORY = {
    "+": ("{n} finds {b} more {i}.", "{n} buys {b} {i}.", "A friend gives {n} {b} {i}."),
    "-": ("{n} loses {b} {i}.", "{n} sells {b} {i}.", "{n} gives away {b} {i}."),
    "*": ("Then {n} has {b} times as many {i}.",),
}
# A style of solving: what a step says, the total before it ({a}) and after it ({c}) included, and what is around the steps.
_TERSE = (
    "{steps} #### {c}",
    {
        "+": ("{a}+{b}={c}.", "Adding {b} to {a} gives {c}.", "{b} more than {a} is {c}."),
        "-": ("{a}-{b}={c}.", "Taking {b} from {a} leaves {c}.", "{b} less than {a} is {c}."),
        "*": ("{a}*{b}={c}.", "{b} times {a} makes {c}.", "{a} taken {b} times is {c}."),
    },
)
_TALK = (
    "{steps} {n} now has {c} {i}. #### {c}",
    {
        "+": (
            "{n} has {a} {i}, {b} more makes {c} {i}.",
            "Then {n} has {b} more than {a} {i}: {c}.",
            "Adding {b} {i} to {a}, {n} now has {c}.",
        ),
        "-": (
            "{n} has {a} {i}, {b} less leaves {c} {i}.",
            "Then {n} has {b} less than {a} {i}: {c}.",
            "Taking {b} {i} from {a}, {n} now has {c}.",
        ),
        "*": (
            "{n} has {a} {i}, {b} times as many is {c}.",
            "Then {n} has {b} times {a} {i}: {c}.",
            "Having {a} {i} taken {b} times, {n} now has {c}.",
        ),
    },
)
_LONG = (
    "<think>{steps}</think> {n} has {c} {i}. #### {c}",
    {
        "+": (
            "Adding {b}: {a}+{b}={c}, as {c}-{b}={a}.",
            "{b} more: {a}+{b}={c}, as {c}-{a}={b}.",
            "{a}+{b} is {b}+{a}, {a}+{b}={c}.",
        ),
        "-": (
            "Taking {b}: {a}-{b}={c}, as {c}+{b}={a}.",
            "{b} less: {a}-{b}={c}, as {b}+{c}={a}.",
            "{a} is {b}+{c}, {a}-{b}={c}.",
        ),
        "*": (
            "{b} times: {a}*{b}={c}.",
            "{a} taken {b} times: {b}*{a}={c}.",
            "{b} times {a} is {b}*{a}={c}.",
        ),
    },
)


def word_problem(rng, style=_TERSE):
    """Two or three steps with numbers up to 12. Each step is worded in one of three ways, as people word the same step
    differently: a sample shows one wording, a teacher's distribution knows all."""
    frame, wordings = style
    name, item, total = rng.choice(_NAMES), rng.choice(_ITEMS), rng.randint(1, 12)
    story, steps = [f"{name} has {total} {item}."], []
    for _ in range(rng.choice((2, 3))):
        op = rng.choice(
            [
                o
                for o in "++--*"
                if not (
                    o == "-" and total < 2 or o == "*" and total > 10 or o == "+" and total > 20
                )
            ]
        )
        b = (
            rng.randint(2, 3)
            if op == "*"
            else rng.randint(1, min(12, total - 1) if op == "-" else 12)
        )
        result = {"+": total + b, "-": total - b, "*": total * b}[op]
        story.append(rng.choice(_STORY[op]).format(n=name, b=b, i=item))
        steps.append(rng.choice(wordings[op]).format(a=total, b=b, c=result, n=name, i=item))
        total = result
    question = " ".join([*story, f"How many {item} now?"])
    return question, frame.format(steps=" ".join(steps), c=total, n=name, i=item), str(total)


def running_text(rng):
    """What a model reads before it is taught to answer: problems of the same split after one another, each solved in any style. One text in
    four is a single problem and marks its answer. Question and answer are those of the first problem."""
    marked, problems = rng.random() < 1 / 4, []
    wanted = 1 if marked else rng.randint(2, 4)
    while len(problems) < wanted:
        problem = word_problem(rng, rng.choice((_TERSE, _TALK, _LONG)))
        if not problems or _held_out(problem[0]) == _held_out(problems[0][0]):
            problems.append(problem)
    solutions = [s if marked else s.partition(" ####")[0] for _, s, _ in problems]
    later = (
        f"\n\n{question}\n{solution}"
        for (question, _, _), solution in zip(problems[1:], solutions[1:])
    )
    return problems[0][0], "".join([f"\n{solutions[0]}", *later]), problems[0][2]


TASKS = {
    "word_problems": Task(word_problem, grade_number),
    "word_problems_talk": Task(functools.partial(word_problem, style=_TALK), grade_number),
    "word_problems_long": Task(functools.partial(word_problem, style=_LONG), grade_number),
    "word_problems_text": Task(running_text, grade_number),
    "gsm8k": Task(None, grade_number),
    "math": Task(None, grade_math),
    "number": Task(
        None, grade_number
    ),  # this and the next: of any file, by the look of its answers
    "answer": Task(None, grade_math),
    "humaneval": Task(None, grade_code, waits=True),
    "mbpp": Task(None, grade_code, waits=True),
}


def grade(example, text):
    """The Verdict on `text` as an answer to `example`, by its task's grader."""
    return TASKS[example.task].grade(text, example.answer)


def grade_all(judge, items):
    """[judge(example, …)] of tuples (example, …) in their order, several at a time where an example's task waits for other processes."""
    pool = ThreadPoolExecutor(at_once())
    waits = lambda example: getattr(TASKS.get(getattr(example, "task", None)), "waits", False)
    try:
        futures = [pool.submit(judge, *item) if waits(item[0]) else None for item in items]
        return [future.result() if future else judge(*item) for future, item in zip(futures, items)]
    finally:
        pool.shutdown(cancel_futures=True)
