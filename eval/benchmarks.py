"""Test sets as examples: their files, how a row is read, who grades, what is asked besides."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from data.dataset import SPLIT_SEED
from data.formats import SUFFIXES, read_examples, read_rows, to_example
from data.grade import marked_answer, parse_number
from data.messages import check_all_text, errors_at
from data.tasks import TASKS, Example, turns
from digests import file_sha256, sha256
from errors import UserError
from plugins import Table

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
PROGRAM = "\nAnswer with the whole program in one ```python block."
TOY_PROBLEMS = 400  # of a toy task, unless --limit asks for another number
HASHED = 20  # problems of a toy task that its sha256 is made of, whatever the limit
CODE = ("humaneval", "mbpp")  # read and graded by data/grading/code.py
MARKED = {"gsm8k", "math", "number", "answer"}  # tasks that look for a marked answer


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A test set.

    examples: all of its problems. instruction: put behind the question unless a run has its own.
    shots: worked (question, solution) pairs for few-shot prompts. file: "embedded" for a toy task,
    which makes its problems. sha256: of the file; of a toy task, of its first questions.
    """

    name: str
    examples: tuple[Example, ...]
    instruction: str
    shots: tuple[tuple[str, str], ...]
    file: str
    sha256: str


# --- rows -----------------------------------------------------------------------------------------


# Each makes (question, solution, gold answer) of a row.


def _gsm8k(row, origin):
    example = to_example(row, origin)
    return example.question, example.own_answer, example.answer


def _math(row, origin):
    answer = row["answer"]
    if not isinstance(answer, str):
        answer = _plain(answer)
    return row["problem"], row.get("solution") or "", answer


def _minerva(row, origin):
    return row["problem"], row["solution"], marked_answer(row["solution"])


def _olympiad(row, origin):
    answers = [str(answer).replace("$", "") for answer in row["final_answer"]]
    return row["question"], "\n".join(row["solution"]), ", ".join(answers)


def _svamp(row, origin):
    body = row["Body"].strip()
    stop = "" if body[-1:] in ".?!," else "."
    return f"{body}{stop} {row['Question'].strip()}", row["Equation"], _plain(row["Answer"])


def _plain(number: Any) -> str:
    """A gold number as text: 12, 12.0, "12" and "12.0" alike, "1,234" without its comma.

    Raises:
        ValueError: for what is no number.
    """
    value = None
    if isinstance(number, (int, float, str)) and not isinstance(number, bool):
        # through Decimal, because str(1e-7) is 1e-07
        text = number.strip() if isinstance(number, str) else f"{Decimal(repr(number)):f}"
        value = parse_number(text)
    if value is None:
        raise ValueError(f"its answer is no number: {number!r}")
    return str(value) if value.denominator == 1 else text


# name -> (the task of data/tasks.py that grades, what reads a row)
READERS: Table[tuple[str, Callable]] = Table(
    "test set",
    tuple,
    {
        "gsm8k": ("gsm8k", _gsm8k),
        "svamp": ("gsm8k", _svamp),
        "math500": ("math", _math),
        "amc23": ("math", _math),
        "aime24": ("math", _math),
        "minerva_math": ("math", _minerva),
        "olympiadbench": ("math", _olympiad),
    },
)


# --- test sets ------------------------------------------------------------------------------------


def is_toy(name: str) -> bool:
    """Whether a task makes its own problems."""
    return name in TASKS and TASKS[name].make is not None


def is_file(name: str) -> bool:
    """Whether a test set is a file of the user's own."""
    return name not in names() and name.endswith(SUFFIXES)


def label(name: str) -> str:
    """The name of a test set in results: of a file the one before its ending, unless it is taken.

    As in `mine` for path/to/mine.jsonl.
    """
    if not is_file(name):
        return name
    file = Path(name).name
    stem = re.sub(r"(\.jsonl|\.json|\.parquet)?(\.gz)?$", "", file)
    return file if stem in names() else stem


def is_own(benchmark: "Benchmark") -> bool:
    """Whether a plugin reads a test set, or grades it."""
    tasks = {example.task for example in benchmark.examples}
    return benchmark.name in READERS.added or not tasks.isdisjoint(TASKS.added)


def names() -> list[str]:
    """Every task that can be evaluated: test sets, and validation problems of the toy tasks."""
    return [*READERS, *CODE, *filter(is_toy, TASKS)]


def load(name: str, folder: str | Path, limit: int = 0, grader: str = "") -> Benchmark:
    """The complete test set of this name, from its file below `folder`, or of this file.

    Args:
        limit: How many problems a toy task makes, which has no end; else not read.
        grader: The task that grades the rows of a file of the user's own; empty: what they say.

    Raises:
        UserError: where the file is missing or holds something else.
    """
    if is_toy(name):
        return _toy(name, limit or TOY_PROBLEMS)
    if is_file(name):
        return _own(Path(name), grader)
    path = find(name, folder)
    examples = tuple(_code(name, path) if name in CODE else _math_set(name, path))
    if not examples:
        raise UserError(f"{path} is empty; put {name}'s own file there")
    return Benchmark(
        name=name,
        examples=examples,
        instruction=PROGRAM if name in CODE else BOXED,
        shots=() if name in CODE else SHOTS,
        file=str(path),
        sha256=file_sha256(path),
    )


def _toy(name: str, count: int) -> Benchmark:
    make = TASKS[name].example
    examples = [make(name, "validation", f"{SPLIT_SEED}/{i}") for i in range(max(count, HASHED))]
    hashed = "\n".join(example.question for example in examples[:HASHED])
    worked = [make(name, "train", f"shot/{i}") for i in range(4)]
    return Benchmark(
        name=name,
        examples=tuple(examples[:count]),
        instruction="",
        shots=tuple((example.question, example.own_answer) for example in worked),
        file="embedded",
        sha256=sha256(hashed),
    )


def _own(path: Path, grader: str) -> Benchmark:
    """The rows of a file as training data, graded by their own task or by `grader`."""
    examples = []
    for example in read_examples(path, "test"):
        task = grader or example.task
        if example.answer is None or task not in TASKS:
            raise UserError(
                f"{example.origin}: no answer that a grader knows; give it a column 'answer'"
            )
        examples.append(dataclasses.replace(example, task=task))
    if not examples:
        raise UserError(f"{path} has no row")
    tasks = {example.task for example in examples}
    instruction = BOXED if tasks <= MARKED else ""
    return Benchmark(
        name=label(str(path)),
        examples=tuple(examples),
        instruction=PROGRAM if tasks <= {*CODE} else instruction,
        shots=(),
        file=str(path),
        sha256=sha256(path.read_bytes() + grader.encode()),
    )


def _math_set(name: str, path: Path) -> Iterator[Example]:
    task, read = READERS[name]
    for origin, row in read_rows(path):
        try:
            question, solution, answer = read(row, origin)
            if not isinstance(question, str):
                raise TypeError("its question is no text")
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise UserError(
                f"{origin}: not a row of {name} ({type(e).__name__}: {e}); "
                "put the set's own file there"
            ) from None
        if not (answer and answer.strip()):
            raise UserError(
                f"{origin}: {name} has no gold answer here; put the set's own file there"
            )
        with errors_at(origin):
            check_all_text([question, solution, answer])
        yield Example(turns(question, solution), answer, task, origin)


def _code(name: str, path: Path) -> Iterator[Example]:
    """Problems with tests for the sandbox: the rows of the set's own test split."""
    for example in read_examples(path, "test"):
        if example.task != name:
            raise UserError(f"{example.origin}: not a row of {name}; put the set's own file there")
        yield example


def find(name: str, folder: str | Path) -> Path:
    """The test file of a set: the only test* of FOLDER/NAME, else its only data file.

    Raises:
        UserError: where there is none, or several.
    """
    place = Path(folder) / name
    files = sorted(p for p in place.glob("*") if p.suffix in (*SUFFIXES, ".gz"))
    tests = [p for p in files if re.match(r"(?:.*_)?test\b", p.stem)]
    candidates = tests or files
    if len(candidates) == 1:
        return candidates[0]
    problem = "no test set there."
    if files:
        problem = f"which file of {', '.join(p.name for p in files)}?"
    raise UserError(
        f"{name}: {place}: {problem} Name a folder with --data, "
        f"or fetch: python -m data.download {name} --to {folder}"
    )


# Worked examples of few-shot prompts, for every set: a base model learns the form from them.
SHOTS = (
    (
        "A box holds 6 pens. How many pens are in 4 boxes, if 3 pens are missing from one of them?",
        "Four full boxes hold 4 * 6 = 24 pens. With 3 missing there are 24 - 3 = 21 pens. "
        "The final answer is \\boxed{21}.",
    ),
    (
        "Solve $3x - 7 = 11$ for $x$.",
        "Adding 7 to both sides gives $3x = 18$, so $x = 6$. The final answer is \\boxed{6}.",
    ),
    (
        "A shirt costs $40 after a discount of 20%. What did it cost before?",
        "After the discount the price is 80% of the old one, so the old price is "
        "40 / 0.8 = 50 dollars. The final answer is \\boxed{50}.",
    ),
    (
        "What is the probability that two fair coins show the same side?",
        "Of the 4 equally likely outcomes 2 do, so it is $\\frac{2}{4} = \\frac{1}{2}$. "
        "The final answer is \\boxed{\\frac{1}{2}}.",
    ),
)
