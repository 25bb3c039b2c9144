"""Test sets as examples: which file of the `--data` folder, how a row is read, who grades, what is asked besides the question."""

import dataclasses
import hashlib
import re
from decimal import Decimal
from pathlib import Path

from data.dataset import SPLIT_SEED
from data.formats import SUFFIXES, read_examples, read_rows, to_example
from data.grade import marked_answer, parse_number
from data.tasks import TASKS, Example
from errors import UserError

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
PROGRAM = "\nAnswer with the whole program in one ```python block."
HELD_OUT = 400  # problems of an embedded task, unless --limit asks for another number
CODE = ("humaneval", "mbpp")  # read and graded by data/grading/code.py
EMBEDDED = "embedded"  # instead of a file: the problems are made


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """examples: every problem of the set; instruction: put behind the question unless a run has its own; shots: worked
    [(question, solution)] for few-shot prompts; sha256: of the file (of an embedded task: of the first questions that it makes)."""

    name: str
    examples: tuple
    instruction: str
    shots: tuple
    file: str
    sha256: str


# --- rows ----------------------------------------------------------------------------------------------------------


def _gsm8k(row, origin):
    example = to_example(row, origin)
    return example.question, example.messages[-1]["content"], example.answer


def _math(row, origin):
    return (
        row["problem"],
        row.get("solution") or "",
        row["answer"] if isinstance(row["answer"], str) else _plain(row["answer"]),
    )


def _minerva(row, origin):
    return row["problem"], row["solution"], marked_answer(row["solution"])


def _olympiad(row, origin):
    return (
        row["question"],
        "\n".join(row["solution"]),
        ", ".join(str(answer).replace("$", "") for answer in row["final_answer"]) or None,
    )


def _svamp(row, origin):
    body = row["Body"].strip()
    return (
        f"{body}{'' if body[-1:] in '.?!,' else '.'} {row['Question'].strip()}",
        row["Equation"],
        _plain(row["Answer"]),
    )


def _plain(number):
    """A gold number as text, whatever type a file gives it: 12, 12.0, "12", "12.0" and "1,234" alike; raises ValueError for no number."""
    if isinstance(number, bool) or not isinstance(number, (int, float, str)):
        raise ValueError(f"its answer is no number: {number!r}")
    text = number.strip() if isinstance(number, str) else f"{Decimal(repr(number)):f}"  # not 1e-07
    value = parse_number(text)
    if value is None:
        raise ValueError(f"its answer is no number: {number!r}")
    return str(value) if value.denominator == 1 else text


# name -> (the task of data/tasks.py that grades, a row -> (question, solution, gold answer))
READ = {
    "gsm8k": ("gsm8k", _gsm8k),
    "svamp": ("gsm8k", _svamp),
    "math500": ("math", _math),
    "amc23": ("math", _math),
    "aime24": ("math", _math),
    "minerva_math": ("math", _minerva),
    "olympiadbench": ("math", _olympiad),
}


# --- test sets -----------------------------------------------------------------------------------------------------


def names():
    """Every task that can be evaluated: test sets, and the embedded tasks' held-out problems."""
    return [*READ, *CODE, *(name for name, task in TASKS.items() if task.make)]


def load(name, folder, limit=0):
    """The Benchmark of this name, whole: `limit` only says how many problems an endless task makes."""
    if name in TASKS and TASKS[name].make:
        wanted = limit or HELD_OUT
        examples = tuple(
            TASKS[name].example(name, "validation", f"{SPLIT_SEED}/{i}")
            for i in range(max(wanted, 20))
        )
        digest = hashlib.sha256(
            "\n".join(e.question for e in examples[:20]).encode()
        ).hexdigest()  # whatever the limit
        shots = [TASKS[name].example(name, "train", f"shot/{i}") for i in range(4)]
        shots = tuple((e.question, e.messages[-1]["content"]) for e in shots)
        return Benchmark(name, examples[:wanted], "", shots, EMBEDDED, digest)
    path = find(name, folder)
    examples = tuple(_code(name, path) if name in CODE else _math_set(name, path))
    if not examples:
        raise UserError(f"{path} is empty; put {name}'s own file there")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Benchmark(
        name, examples, *((PROGRAM, ()) if name in CODE else (BOXED, SHOTS)), str(path), digest
    )


def _math_set(name, path):
    task, read = READ[name]
    for origin, row in read_rows(path):
        try:
            question, solution, answer = read(row, origin)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise UserError(
                f"{origin}: not a row of {name} ({type(e).__name__}: {e}); put the set's own file there"
            ) from None
        if answer is None or not answer.strip():
            raise UserError(
                f"{origin}: {name} has no gold answer here; put the set's own file there"
            )
        yield Example(
            ({"role": "user", "content": question}, {"role": "assistant", "content": solution}),
            answer,
            task,
            origin,
        )


def _code(name, path):
    """Problems whose tests run in the sandbox: those rows that their own rules let one test on."""
    for example in read_examples(path, "test"):
        if example.task != name:
            raise UserError(f"{example.origin}: not a row of {name}; put the set's own file there")
        yield example


def find(name, folder):
    """The test file below `folder`: the only test* of FOLDER/NAME, else its only data file."""
    place = Path(folder) / name
    found = sorted(p for p in place.glob("*") if p.suffix in (*SUFFIXES, ".gz"))
    test = [p for p in found if re.match(r"(?:.*_)?test\b", p.stem)]
    if len(test or found) != 1:
        what = (
            f"which file of {', '.join(p.name for p in found)}?" if found else "no test set there."
        )
        raise UserError(
            f"{name}: {place}: {what} Name a folder with --data, or fetch: python -m data.download {name} --to {folder}"
        )
    return (test or found)[0]


# Worked examples of few-shot prompts, for every set: their form is what a base model is to learn from them.
SHOTS = (
    (
        "A box holds 6 pens. How many pens are in 4 boxes, if 3 pens are missing from one of them?",
        "Four full boxes hold 4 * 6 = 24 pens. With 3 missing there are 24 - 3 = 21 pens. The final answer is \\boxed{21}.",
    ),
    (
        "Solve $3x - 7 = 11$ for $x$.",
        "Adding 7 to both sides gives $3x = 18$, so $x = 6$. The final answer is \\boxed{6}.",
    ),
    (
        "A shirt costs $40 after a discount of 20%. What did it cost before?",
        "After the discount the price is 80% of the old one, so the old price is 40 / 0.8 = 50 dollars. The final answer is \\boxed{50}.",
    ),
    (
        "What is the probability that two fair coins show the same side?",
        "Of the 4 equally likely outcomes 2 do, so it is $\\frac{2}{4} = \\frac{1}{2}$. The final answer is \\boxed{\\frac{1}{2}}.",
    ),
)
