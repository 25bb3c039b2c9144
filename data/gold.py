"""The gold answer of a row, and the task whose grader compares with it."""

import math
import re
from decimal import Decimal
from typing import NamedTuple, TypeGuard

from data.grade import LONGEST, marked_answer, parse_number
from data.messages import json_value
from data.tasks import TASKS
from errors import UserError

GOLDS = ("answer", "final_answer", "expected_answer", "ground_truth")
# Columns with a response that is a text, never an answer by itself, however short.
TEXTS = ("completion", "response", "generated_solution", "output")
NO_ANSWERS = frozenset(
    {"proof", "not found", "n/a", "na", "none", "null", "unknown", "see solution", "omitted"}
)
GSM8K_GOLD = re.compile(r"(?:^|\s)#### *([-+]?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)%?\.?)\s*\Z")
SHORT_ANSWER = 200  # characters; a longer text is an explanation, not an answer to compare with
SENTENCE = re.compile(r"(?:\b[^\W\d_]{2,}[ ,.'-]+){2}[^\W\d_]{2,}")  # three words in a row
LATEX_COMMAND = re.compile(r"\\[A-Za-z]+|\$")


class Gold(NamedTuple):
    """A gold answer and the name of the task that grades it. The default: nothing to grade."""

    answer: str | None = None
    task: str = ""


def find_gold(columns: dict, response: str, response_column: str = "") -> Gold:
    """Find the gold answer of a row: in a column of its own, else in the response.

    A column that is there for the answer alone is taken as it is. A response is searched for
    GSM8K's mark at its end or a box; one as short as an answer is an answer.

    Args:
        columns: The row without null columns.
        response: The text to train on; empty where there is none.
        response_column: The column that the response comes from.
    """
    named = columns.get("task")
    if not isinstance(named, str) or named not in TASKS:
        named = ""
    answer = columns.get("answer")
    if named and isinstance(answer, str) and answer != response:
        return Gold(answer, named)  # traces of eval.traces: in the form that the grader takes
    reward_model = columns.get("reward_model")
    if isinstance(reward_model, dict) and reward_model.get("ground_truth") is not None:
        columns = {"ground_truth": reward_model["ground_truth"]}  # verl's form
    is_solution = response_column == "solution"
    gold = _search(columns, response, response_column)
    if gold.answer is not None and named:
        return Gold(gold.answer, named)
    if is_solution and gold.task in ("number", "answer"):
        return Gold(gold.answer, "math")  # MATH's answers are numbers now and then
    return gold


def _search(columns: dict, response: str, response_column: str) -> Gold:
    """The first gold answer of: a column for it, the column "solution", the response."""
    for name in GOLDS:
        value = _single(columns.get(name))
        if value is None or (name == response_column and value == response):
            continue
        if not isinstance(value, str):
            return Gold(plain_number(value, name), "number")
        gold, text = gold_of_text(value), value.strip()
        if gold.answer is None and len(value) <= LONGEST and text.casefold() not in NO_ANSWERS:
            gold = Gold(text, "answer")  # compared by its text
        if gold.answer is not None:
            return gold
        response = ""  # the answer is what the column says, of which nothing can be graded
        break
    solution = columns.get("solution")
    if response_column != "solution" and isinstance(solution, str):
        gold = gold_of_text(solution)
        if gold.answer is not None:
            return gold
    gold = gold_of_text(response)
    is_short = gold.task in ("number", "answer") and "\\boxed" not in response
    if is_short and response in [columns.get(name) for name in TEXTS]:
        return Gold()  # a short completion is a text like any other
    return gold


def _single(value: object) -> str | int | float | None:
    """A text or a number, also as the only item of a list or of a list in JSON; else None."""
    value = json_value(value)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, str) and value.strip():
        return value
    return value if is_number(value) else None


def gold_of_text(text: str) -> Gold:
    """Find the answer that a response states.

    The task is "gsm8k" for `#### 18` at the end, "answer" for a box, "number" or "answer" for
    a text that is no longer than an answer.
    """
    if mark := GSM8K_GOLD.search(text):
        return Gold(mark[1], "gsm8k")
    if "\\boxed" in text or "\\fbox" in text:
        boxed = marked_answer(text)
        return Gold(boxed, "answer") if boxed and len(boxed) <= LONGEST else Gold()
    text = text.strip()
    is_short = 0 < len(text) <= SHORT_ANSWER and "\n" not in text and "####" not in text
    if not is_short or text.casefold() in NO_ANSWERS:
        return Gold()
    if parse_number(text) is not None:
        return Gold(text, "number")
    if SENTENCE.search(LATEX_COMMAND.sub(" ", text)):
        return Gold()
    return Gold(text, "answer")


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is a number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def plain_number(value: int | float, name: str) -> str:
    """A number as people write it: 18 and 18.0 are "18", 1e-07 is "0.0000001".

    Raises UserError for infinity and NaN.
    """
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        raise UserError(f"{name!r} is {value}, which is no answer")
    if value == int(value):
        return str(int(value))
    return format(Decimal(repr(value)), "f")
