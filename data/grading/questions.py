"""What the worker is asked: our own comparison of answers, their keys for votes, and what
math-verify alone says of a whole text."""

from data.grading import forms
from data.grading.tokens import NotUnderstood

try:
    from math_verify import LatexExtractionConfig, parse, verify
except ImportError:
    parse = None


def warm_up() -> bool:
    """Whether math-verify is there; the first call compiles its patterns."""
    ask("compare", "x", "x+1")
    ask("math_verify", "$x$", "x+1")
    return parse is not None


def ask(question: str, *texts: str) -> object:
    """The reply to a question of MathWorker: [understood, equal], or a key."""
    try:
        return {"compare": _compare, "math_verify": _math_verify, "key": _key}[question](*texts)
    except Exception:  # noqa: BLE001 (whatever sympy raises, the answer is not shown to be right)
        return None if question == "key" else [False, False]


def _compare(answer, gold):
    try:
        return [True, forms.compare(answer, gold)]
    except (NotUnderstood, RecursionError):
        return [_key(answer) is not None, False]


def _key(text):
    try:
        return forms.key(text)
    except (NotUnderstood, RecursionError):
        return None


def _math_verify(text, gold):
    if parse is None:
        return [False, False]
    # No fall-back to plain numbers or strings: it would find an 18 in text that is no mathematics.
    gold = parse(f"${gold}$", [LatexExtractionConfig()], "no_fallback", parsing_timeout=None)
    parsed = parse(text, parsing_timeout=None)
    return [bool(parsed), bool(parsed and verify(gold, parsed, timeout_seconds=None))]
