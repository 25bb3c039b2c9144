"""Answers compared. One grader per task serves reward and evaluation alike."""

import re
from decimal import Decimal, InvalidOperation

_NUMBER = re.compile(r"[-+]?[$€£]?\s?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?<=\d)")
_MARKED = (re.compile(r"####\s*([^\n]*)"), re.compile(r"\\boxed\{([^{}]*)\}"), re.compile(r"<answer>(.*?)</answer>", re.S))


def parse_number(text):
    """The first number in `text` as a Decimal, or None: '$1,234.50 dollars' -> 1234.50, '-3' -> -3, '18.' -> 18."""
    for match in _NUMBER.finditer(text):
        digits = re.sub(r"[^\d.+-]", "", match.group())
        try:
            return Decimal(digits)
        except InvalidOperation:
            continue
    return None


def marked_answer(text):
    """What stands behind the last `####`, in the last `\\boxed{}` or in the last `<answer>`, whichever comes last; or None."""
    found = [(m.start(), m.group(1)) for pattern in _MARKED for m in pattern.finditer(text)]
    return max(found)[1].strip() if found else None


def grade_number(text, answer):
    """Strict: the completion's marked answer is the gold number."""
    marked = marked_answer(text)
    got = parse_number(marked) if marked is not None else None
    return got is not None and got == parse_number(answer)


def grade_exact(text, answer):
    """Strict: the completion's marked answer is the gold string, spaces aside."""
    marked = marked_answer(text)
    return marked is not None and "".join(marked.split()) == "".join(answer.split())
