"""Answers compared: the one place that decides whether a completion is right, for reward and evaluation alike.

A completion marks its final answer as `#### x`, `\\boxed{x}` or `<answer>x</answer>`; the mark that begins last counts. Strict is the
verdict to reward and report: the marked answer, and nothing but it, is the gold one. Lenient also takes an answer that is
not marked, as people do who read a completion: the gap between both is what a model loses to form.
"""

import re
from collections import deque
from dataclasses import dataclass
from fractions import Fraction

from data.math_worker import MathWorker

LONGEST = 500  # characters; a longer answer is no answer, and numbers of that length cost nothing to read
TAIL = 10_000  # characters at the end of a text in which an unmarked answer is looked for
MATH_WORKER = MathWorker()  # starts no process before the first question


@dataclass(frozen=True)
class Verdict:
    """strict: the marked answer is right; lenient: or an unmarked one is; parsed: a marked answer was found and understood."""

    strict: bool
    lenient: bool
    parsed: bool


def grade_number(text, answer):
    """Whether the completion's number equals the gold one: exact rational values, decorations and units aside."""
    gold, marked = parse_number(answer), marked_answer(text)
    got = None if marked is None else parse_number(marked)
    strict = got is not None and got == gold
    lenient = strict or (got is None and gold is not None and _lenient_number(text) == gold)
    return Verdict(strict, lenient, got is not None)


def grade_math(text, answer):
    """Whether the completion's expression equals the gold one: as text, as numbers, else as mathematics (math-verify, where installed)."""
    marked = marked_answer(text)
    if marked is not None:
        parsed, same = _same_math(marked, answer)
        return Verdict(same, same, parsed)
    cut_off = marked_answer(text, unclosed=True)
    if cut_off is not None:
        return Verdict(False, _same_math(cut_off, answer)[1], False)
    gold = parse_number(answer, words=False)
    return Verdict(False, gold is not None and _lenient_number(text) == gold, False)


def grade_exact(text, answer):
    """Whether the completion's answer is the gold string, spaces aside."""
    same = lambda found: found is not None and "".join(found.split()) == "".join(answer.split())
    marked = marked_answer(text)
    return Verdict(same(marked), same(marked) or same(marked_answer(text, unclosed=True)), marked is not None)


def grade_by_math_verify(text, answer):
    """Whether math-verify, left to find the answer in the whole text by itself, takes it for the gold one; None where it is missing."""
    verdict = MATH_WORKER.compare(_scientific(text[-TAIL:]), _scientific(answer), whole=True)
    return None if verdict is None else verdict[1]


def vote(text, words=True):
    """The marked answer in a form that its different spellings share (numbers by value), to be counted; None without one."""
    marked = marked_answer(text)
    if not marked or len(marked) > LONGEST:
        return None
    number = parse_number(marked, words)
    return _canonical(_scientific(marked)) if number is None else str(number)


def format_reward(text):
    """+1.0 for exactly `<think>…</think><answer>…</answer>`, neither empty and only white space around, else -1.0 (arXiv 2506.13404)."""
    once = all(text.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    match = once and re.fullmatch(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", text, re.DOTALL)
    return 1.0 if match and match[1].strip() and match[2].strip() else -1.0


# --- finding the answer --------------------------------------------------------------------------------------------

_MARK = re.compile(r"#{4,}|\\(?:boxed|fbox)(?![A-Za-z])|<answer>")


def marked_answer(text, unclosed=False):
    """What the last mark holds, or None; with `unclosed` also an <answer> that ends with the text. At most LONGEST + 1 characters."""
    for mark in reversed(deque(_MARK.finditer(text), maxlen=8)):  # a few suffice: only unclosed ones are passed over
        if mark[0].startswith("#"):
            # the line, or the next one where it is empty; `<answer>#### 18</answer>` ends with the tag
            found = re.compile(r"\s*([^\n]*)").match(text, mark.end())[1].partition("</answer>")[0]
        elif mark[0].startswith("\\"):
            found = _boxed(text, mark.end())
        else:
            inside, closing, _ = text[mark.end() :].partition("</answer>")
            found = inside if closing or unclosed else None
        if found is not None:
            return found.strip()[: LONGEST + 1]
    return None


def _boxed(text, start):
    """The group that opens at `start`, braces balanced and `\\{` no brace, or the word there (`\\boxed 3`); None if it never closes."""
    piece = text[start : start + 4 * LONGEST]
    if not piece.lstrip().startswith("{"):
        return re.match(r"\s*([^\s$]*)", piece)[1] or None
    depth = 0
    for token in re.finditer(r"\\.|[{}]", piece, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0 and token[0] == "}":
            return piece[piece.index("{") + 1 : token.start()]
    return piece if len(piece) == 4 * LONGEST else None  # too long for an answer: found, and wrong


def _lenient_number(text):
    """The number a reader would take: the only one of a marked answer, the one that "the answer is", else the last of the text."""
    marked = marked_answer(text, unclosed=True)
    if marked is not None:
        found = _numbers(marked.rpartition("=")[2])
        if found:
            return found[0] if len(set(found)) == 1 else None
    tail = text[-TAIL:]
    stated = list(re.finditer(r"answer is\b", tail, re.IGNORECASE))
    if stated:
        tail = tail[stated[-1].end() :].lstrip(" \t\n:*")
        sentence = re.split(r"[.!?](?:\s|$)|\n", tail, maxsplit=1)[0]
        found = _numbers(sentence.rpartition("=")[2])
        if found:
            return found[0]
    found = _numbers(re.sub(r"(?m)^[ \t]*[0-9]{1,3}[.)][ \t]+(?=\S)", "", tail))  # "2. Then …" is the number of a step
    return found[-1] if found else None


# --- numbers -------------------------------------------------------------------------------------------------------

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)])[-+])?(?<![\w.])(?:(?:(?P<whole>[0-9]+)\s+)?(?P<over>{_DIGITS})\s*/\s*(?P<under>{_DIGITS})|(?P<plain>{_DIGITS}))"
    r"(?:\s*(?P<scale>hundred|thousand|million|billion)s?\b)?", re.IGNORECASE,
)  # fmt: skip
_SCALE = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9}
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm)?|mbox|mathrm|mathbf|mathit|operatorname)\s*\{([^{}]*)\}(?:\s*\^\s*\{?[23]\}?)?")
_CHANGES_VALUE = re.compile(r"\b(?:or|and|half|halves|plus|minus|pi)\b", re.IGNORECASE)


def parse_number(text, words=True):
    """The one number that `text` is, as a Fraction, or None: '$1,234.50', '-3 apples', '18\\%', '\\frac{1}{2}', '16 + 2 = 18', '1 1/2'.

    Units may follow; without `words` only marked as text (`\\text{cm}`), so that 2k is no number."""
    if len(text) > LONGEST:
        return None
    *left, right = _tidy(text).split("=")
    if any(re.search(r"[<>!]$|[;\n]|,(?![0-9]{3})|\b(?:or|and)\b", piece) for piece in left):
        return None  # a relation or several equations, not one
    right = _strip_marks(right)
    match = _NUMBER.match(re.sub(r"^([-+])\s+", r"\1", _strip_marks(_plain_text(right))))
    if match is None or not (words or _only_marked_words(right)):
        return None
    return _value(match) if _is_unit(match.string[match.end() :]) else None


def _is_unit(rest):
    """Whether what follows a number leaves its value alone: words, m^2, km/h, % – not digits, operators or '… and a half'."""
    rest = re.sub(r"(?<=[A-Za-z])\^?\s?[23²³](?![0-9²³])", "", rest)
    rest = re.sub(r"(?:^|(?<=[A-Za-z]))-(?=[A-Za-z]{2})", " ", rest)  # 18-inch, but not 18-x
    return all(c.isalpha() or c in " \t\n/.'()%*_`\"" for c in rest) and not _CHANGES_VALUE.search(rest)


def _only_marked_words(text):
    return not re.search(r"[^\W\d_]", _TEXT.sub("", text).replace("\\frac", ""))


def _value(match):
    """A match of _NUMBER as a Fraction, or None for a division by zero or more digits than an answer has."""
    if match.end() - match.start() > LONGEST:
        return None
    part = lambda name: Fraction((match[name] or "0").replace(",", ""))
    if match["under"] and not part("under"):
        return None
    value = part("whole") + part("over") / part("under") if match["under"] else part("plain")
    return value * _SCALE.get((match["scale"] or "").lower(), 1) * (-1 if match["sign"] == "-" else 1)


def _numbers(text):
    """The values of all numbers in `text`, in order."""
    values = [_value(m) for m in _NUMBER.finditer(_plain_text(_tidy(text)))]
    return [v for v in values if v is not None]


# --- text ----------------------------------------------------------------------------------------------------------

_TIDY = [(re.compile(pattern), to) for pattern, to in (
    (r"[−–]", "-"),
    (r"\{,\}(?=[0-9])", ","),
    (r"(?<!\\)\\(?:!\s*|,|(?:left|right|displaystyle)(?![A-Za-z]))|[\u2009\u202f]", ""),
    (r"(?<!\\)\\(?:[;: ()\[\]]|q?quad(?![A-Za-z]))|~|\u00a0", " "),
    (r"(?<=[-+])\s*\\?[$€£¥₹]\s*", ""),  # -$5
    (r"\\?[$€£¥₹]", " "),
    (r"\\%", "%"),
    (r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree(?![A-Za-z])|°", " "),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\frac\s*(?:\{([^{}]*)\}|([0-9A-Za-z]))\s*(?:\{([^{}]*)\}|([0-9A-Za-z]))", lambda m: f"\\frac{{{m[1] or m[2]}}}{{{m[3] or m[4]}}}"),
)]  # fmt: skip


def _tidy(text):
    """LaTeX and print variants of the same thing made one: minus signs, spacing, currency, degrees, fractions."""
    for pattern, to in _TIDY:
        text = pattern.sub(to, text)
    return text


def _plain_text(text):
    """Tidy text with fractions as 1/2, the words of `\\text{…}` bare and other braces gone."""
    text = re.sub(r"(?<=[0-9])\s*\\frac", r" \\frac", text)  # 1\frac{4}{5} is 1 4/5
    text = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"\1/\2 ", text)
    return re.sub(r"[{}]", " ", _TEXT.sub(r" \1 ", text))


def _strip_marks(text):
    """Without markdown emphasis, quotes, and the stops of a sentence; 5! and f' keep what is theirs."""
    return text.lstrip('*_`" \t\n').rstrip('*_`" \t\n.,:;')


# --- mathematics ---------------------------------------------------------------------------------------------------


def _same_math(answer, gold):
    """(the answer was understood, it equals the gold one); the cheap comparisons first."""
    if not answer or len(answer) > LONGEST:
        return False, False
    answer, gold = _scientific(answer), _scientific(gold)
    if _canonical(answer) == _canonical(gold):
        return True, True
    ours, theirs = parse_number(answer, words=False), parse_number(gold, words=False)
    if ours is not None and theirs is not None:
        return True, ours == theirs
    verdict = MATH_WORKER.compare(_strip_marks(_tidy(answer)), _strip_marks(_tidy(gold)))
    return (True, False) if verdict is None else verdict


def _scientific(text):
    """4.5e33, which math-verify would read as 4.5 · e · 33, as 4.5 \\times 10^{33}."""
    return re.sub(r"(?<![\w.])([0-9]+(?:\.[0-9]+)?)[eE]([-+]?[0-9]+)(?!\w)", r"\1 \\times 10^{\2}", text)


def _canonical(text):
    """A form in which answers that differ in print alone are the same string."""
    text = _strip_marks(_TEXT.sub(r"\1", _tidy(text)))
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", text))
    return text.casefold() if text.isalpha() and len(text) > 2 else text  # Evelyn, east; not x against X
