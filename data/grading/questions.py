"""The process that MathWorker asks: our own comparison of answers, their keys for votes, and what
math-verify alone says of a whole text."""

from typing import Any

from data.grading.forms import key, parse, same
from data.grading.trees import NotUnderstood
from data.grading.values import TooMuch, begin
from data.worker import serve

try:
    import math_verify
except ImportError:
    math_verify = None

MEMORY_LIMIT = 4 << 30  # bytes of address space: a huge power is refused, not paid for
NO_LIMIT: Any = None  # math-verify's time limit is a signal; MathWorker ends what takes too long


def ask(question: str, *texts: str) -> object:
    """Returns the reply to a question of MathWorker: [understood, equal] or a key; None where there
    is none."""
    begin()
    questions = {"compare": _compare, "math_verify": _math_verify, "key": _key}
    try:
        return questions[question](*texts)
    except Exception:  # whatever sympy raises, the answer is not shown to be right
        return None


def _compare(answer: str, gold: str) -> list[bool]:
    form = parse(answer)
    try:
        return [True, same(parse(gold), form)]
    except TooMuch:
        return [False, False]
    except (NotUnderstood, RecursionError):
        return [True, False]


def _key(text: str) -> str:
    return key(parse(text))


def _math_verify(text: str, gold: str) -> list[bool] | None:
    if math_verify is None:
        return None
    # No fall-back to plain numbers or strings: it would find an 18 in text that is no mathematics.
    latex = [math_verify.LatexExtractionConfig()]
    golds = math_verify.parse(f"${gold}$", latex, "no_fallback", parsing_timeout=NO_LIMIT)
    found = math_verify.parse(text, parsing_timeout=NO_LIMIT)
    return [bool(found), bool(found and math_verify.verify(golds, found, timeout_seconds=NO_LIMIT))]


def ready() -> bool:
    """Compiles the patterns of the first questions; returns whether math-verify is there."""
    ask("compare", "x", "x+1")
    ask("math_verify", "$x$", "x+1")
    return math_verify is not None


if __name__ == "__main__":
    serve(ask, MEMORY_LIMIT, ready)
