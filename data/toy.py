"""The toy task: word problems that are made from a seed, in several styles of solving.

Whether a problem is for training or for validation is decided by a hash of its question. So no
training problem is ever a validation one, whatever the seed, however many are drawn and in whatever
style they are solved.
"""

import random
import zlib
from typing import NamedTuple

VALIDATION_SHARE = 8  # one problem in eight is for validation


class Problem(NamedTuple):
    """A question, a text that solves it, and the gold answer."""

    question: str
    solution: str
    answer: str


def is_validation(question: str) -> bool:
    """Whether a problem is for validation; the others are for training."""
    return zlib.crc32(question.encode()) % VALIDATION_SHARE == 0


NAMES = ("Mia", "Ben", "Ada", "Leo", "Zoe", "Sam", "Eva", "Tom")
ITEMS = ("apples", "coins", "books", "cards", "shells", "stamps")
STORY = {
    "+": ("{n} finds {b} more {i}.", "{n} buys {b} {i}.", "A friend gives {n} {b} {i}."),
    "-": ("{n} loses {b} {i}.", "{n} sells {b} {i}.", "{n} gives away {b} {i}."),
    "*": ("Then {n} has {b} times as many {i}.",),
}


class Style(NamedTuple):
    """A way to write a solution.

    frame: what stands around the steps. steps: sign -> wordings of a step. In both, {n} is the
    name, {i} the things; of a step {a} is the total before, {b} the number, {c} the total after.
    """

    frame: str
    steps: dict[str, tuple[str, ...]]


TERSE = Style(
    "{steps} #### {c}",
    {
        "+": ("{a}+{b}={c}.", "Adding {b} to {a} gives {c}.", "{b} more than {a} is {c}."),
        "-": ("{a}-{b}={c}.", "Taking {b} from {a} leaves {c}.", "{b} less than {a} is {c}."),
        "*": ("{a}*{b}={c}.", "{b} times {a} makes {c}.", "{a} taken {b} times is {c}."),
    },
)
TALK = Style(
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
LONG = Style(
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


def word_problem(rng: random.Random, style: Style = TERSE) -> Problem:
    """Two or three steps with numbers up to 12.

    Each step is worded in one of three ways, as people word the same step differently: a sample
    shows one wording, a teacher's distribution knows all.
    """
    name, item, total = rng.choice(NAMES), rng.choice(ITEMS), rng.randint(1, 12)
    story, steps = [f"{name} has {total} {item}."], []
    for _ in range(rng.choice((2, 3))):
        signs = []
        if total <= 20:
            signs += "++"
        if total >= 2:
            signs += "--"
        if total <= 10:
            signs += "*"
        sign = rng.choice(signs)
        if sign == "+":
            number = rng.randint(1, 12)
            result = total + number
        elif sign == "-":
            number = rng.randint(1, min(12, total - 1))
            result = total - number
        else:
            number = rng.randint(2, 3)
            result = total * number
        fields = dict(n=name, i=item, a=total, b=number, c=result)
        story.append(rng.choice(STORY[sign]).format(**fields))
        steps.append(rng.choice(style.steps[sign]).format(**fields))
        total = result
    solution = style.frame.format(steps=" ".join(steps), c=total, n=name, i=item)
    return Problem(" ".join([*story, f"How many {item} now?"]), solution, str(total))


def running_text(rng: random.Random) -> Problem:
    """What a model reads before it is taught to answer: a few problems after one another.

    They are of the same split and each is solved in any style. One text in four is a single problem
    and marks its answer. Question and answer are those of the first problem.
    """
    is_marked = rng.random() < 1 / 4
    count = 1 if is_marked else rng.randint(2, 4)
    styles = (TERSE, TALK, LONG)
    first = word_problem(rng, rng.choice(styles))
    problems, text = [first], ""
    while len(problems) < count:
        problem = word_problem(rng, rng.choice(styles))
        if is_validation(problem.question) == is_validation(first.question):
            problems.append(problem)
    for problem in problems:
        solution = problem.solution if is_marked else problem.solution.partition(" ####")[0]
        text += f"\n\n{problem.question}\n{solution}"
    return Problem(first.question, text.removeprefix(f"\n\n{first.question}"), first.answer)
