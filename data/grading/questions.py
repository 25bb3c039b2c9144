"""What the worker is asked: our own comparison of answers first, math-verify only for mathematics
that ours does not read."""

import re

from data.grading import forms
from data.grading.reader import NotUnderstood

try:
    from math_verify import LatexExtractionConfig, parse, verify
except ImportError:
    parse = None

_CALCULUS = re.compile(
    r"\\(?:i*int|oint|sum|prod|lim|det|gcd|max|min|ln|log|pmod|bmod|choose|partial|nabla)(?![A-Za-z])"
)
_NO_VALUE = re.compile(
    r"[=<>$,;&]|\\(?:n?eq?|l[et]|leq|g[et]|geq|in|cup|cap|text|begin|pm|or|and|boxed|\{)(?![A-Za-z])"
)


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
        pass
    understood = _key(answer) is not None
    # Left alone math-verify reduces equations to their right side, and reads the beginning of what
    # it cannot read: it is asked about single values that have a sum, an integral or the like in
    # them, and has to agree with itself.
    if (
        parse is None
        or _NO_VALUE.search(answer + gold)
        or not (_CALCULUS.search(answer) or _CALCULUS.search(gold))
    ):
        return [understood, False]
    there, back = _verify(answer, gold), _verify(gold, answer)
    return [understood or there[0], there[1] and back[1]]


def _key(text):
    try:
        return forms.key(text)
    except (NotUnderstood, RecursionError):
        return None


def _read(text):
    # No fall-back to plain numbers or strings: it would find an 18 in text that is no mathematics.
    return parse(f"${text}$", [LatexExtractionConfig()], "no_fallback", parsing_timeout=None)


def _verify(answer, gold):
    read, gold_read = _read(answer), _read(gold)
    if not read or not gold_read:
        return [bool(read), False]
    return [True, bool(verify(gold_read, read, timeout_seconds=None))]


def _math_verify(text, gold):
    if parse is None:
        return [False, False]
    parsed = parse(text, parsing_timeout=None)
    return [bool(parsed), bool(parsed and verify(_read(gold), parsed, timeout_seconds=None))]
