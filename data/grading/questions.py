"""What the worker is asked: our own comparison of answers, their keys for votes, and what
math-verify alone says of a whole text."""

from typing import Any

from data.grading.forms import key, parse, same
from data.grading.trees import NotUnderstood

try:
    import math_verify
except ImportError:
    math_verify = None

NO_LIMIT: Any = None  # its own time limit is a signal; MathWorker ends what takes too long


def warm_up() -> bool:
    """Returns whether math-verify is there; the first call compiles its patterns."""
    ask("compare", "x", "x+1")
    ask("math_verify", "$x$", "x+1")
    return math_verify is not None


def ask(question: str, *texts: str) -> object:
    """Returns the reply to a question of MathWorker: [understood, equal], or a key."""
    questions = {"compare": _compare, "math_verify": _math_verify, "key": _key}
    try:
        return questions[question](*texts)
    except Exception:  # whatever sympy raises, the answer is not shown to be right
        return None if question == "key" else [False, False]


def _compare(answer: str, gold: str) -> list[bool]:
    try:
        return [True, same(parse(gold), parse(answer))]
    except (NotUnderstood, RecursionError):
        return [_key(answer) is not None, False]


def _key(text: str) -> str | None:
    try:
        return key(parse(text))
    except (NotUnderstood, RecursionError):
        return None


def _math_verify(text: str, gold: str) -> list[bool]:
    if math_verify is None:
        return [False, False]
    # No fall-back to plain numbers or strings: it would find an 18 in text that is no mathematics.
    latex = [math_verify.LatexExtractionConfig()]
    golds = math_verify.parse(f"${gold}$", latex, "no_fallback", parsing_timeout=NO_LIMIT)
    found = math_verify.parse(text, parsing_timeout=NO_LIMIT)
    return [bool(found), bool(found and math_verify.verify(golds, found, timeout_seconds=NO_LIMIT))]
