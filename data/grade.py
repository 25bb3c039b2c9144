"""Answers compared: the one place that decides whether a completion is right, for reward and
evaluation alike.

A completion marks its final answer as `#### x`, `\\boxed{x}` or `<answer>x</answer>`; the mark that
begins last counts. Strict is the verdict to reward and report: the marked answer, and nothing but
it, is the gold one. Lenient also takes an answer that is not marked, as people do who read a
completion: the gap between both is what a model loses to form.
"""

import re
from collections import deque
from dataclasses import dataclass

from data.grading.numbers import (
    LONGEST,
    canonical,
    numbers_in,
    parse_number,
    quantity,
    scientific,
    time_of_day,
)
from data.grading.worker import MathWorker

TAIL = 10_000  # characters at the end of a text in which an unmarked answer is looked for
PASSED_OVER = 8  # marks without an answer that are passed over; unclosed ones cost time
MATH_WORKER = MathWorker()  # starts no process before the first question


@dataclass(frozen=True)
class Verdict:
    """strict: the marked answer is right; lenient: or an unmarked one is; parsed: a marked answer
    was found and understood."""

    strict: bool
    lenient: bool
    parsed: bool


def grade_number(text, answer):
    """Whether the completion's number equals the gold one: exact rational values, decorations and
    units aside."""
    gold, marked = parse_number(answer), marked_answer(text)
    got = None if marked is None else parse_number(marked)
    strict = got is not None and got == gold
    lenient = strict or (got is None and gold is not None and _lenient_number(text) == gold)
    return Verdict(strict, lenient, got is not None)


def grade_math(text, answer):
    """Whether the completion's expression equals the gold one: as text, as numbers, else as
    mathematics by its form.

    A numeral of another base has to name it: `52` for `52_9` is right in lenient only."""
    marked = marked_answer(text)
    if marked is not None:
        parsed, same = _same_math(marked, answer)
        return Verdict(same, same or _bare_digits(marked, answer), parsed)
    cut_off = marked_answer(text, unclosed=True)
    if cut_off is not None:
        return Verdict(False, _same_math(cut_off, answer)[1], False)
    gold = parse_number(answer, words=False)
    return Verdict(False, gold is not None and _lenient_number(text) == gold, False)


def grade_exact(text, answer):
    """Whether the completion's answer is the gold string, spaces aside."""

    def same(found):
        return found is not None and "".join(found.split()) == "".join(answer.split())

    marked = marked_answer(text)
    right = same(marked)
    return Verdict(right, right or same(marked_answer(text, unclosed=True)), marked is not None)


def grade_by_math_verify(text, answer):
    """Whether math-verify, left to find the answer in the whole text by itself, takes it for the
    gold one; None where it is missing."""
    verdict = MATH_WORKER.math_verify(scientific(text[-TAIL:]), scientific(answer))
    return None if verdict is None else verdict[1]


def vote(text, words=True):
    """The marked answer in a form that its different spellings share (numbers by value), to be
    counted; None without one."""
    marked = marked_answer(text)
    if not marked or len(marked) > LONGEST:
        return None
    is_time = not words and time_of_day(marked) is not None
    number = None if is_time else parse_number(marked, words)
    return _key(scientific(_set_in_words(marked))) if number is None else str(number)


def _key(answer):
    """What equal answers that are no plain numbers share."""
    minutes, text = time_of_day(answer), canonical(answer)
    if minutes is not None:
        return f"{minutes // 60}:{minutes % 60:02}"
    if _is_word(answer) or _CHOICE.fullmatch(text):
        return text.strip("()")
    return MATH_WORKER.key(answer) or text


def format_reward(text):
    """+1.0 for exactly `<think>…</think><answer>…</answer>`, neither empty and only white space
    around, else -1.0 (arXiv 2506.13404)."""
    once = all(text.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    pattern = r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*"
    match = once and re.fullmatch(pattern, text, re.DOTALL)
    return 1.0 if match and match[1].strip() and match[2].strip() else -1.0


# --- finding the answer ---------------------------------------------------------------------------

_MARK = re.compile(r"(?m)(?P<line>^\s{0,3})?#{4,}|\\(?:boxed|fbox)(?![A-Za-z])|<answer>")
_STEPS = "Step|Part|Case|Phase|Method|Approach|Problem|Question|Example|Section|Stage|Task"
_HEADING = re.compile(
    rf"[\W_]*(?:(?:{_STEPS})\s+(?:[0-9]+|[A-Z]|[IVX]+)\b"
    r"|\(?[0-9]{1,2}\\?[.):]\)?\s.*?[^\W\d_]{2}|[0-9]{1,2}(?:st|nd|rd|th)\s+[A-Za-z])"
)
_TITLE = re.compile(r"(?![$\\({\[])[\W_]*(?=[A-Z])[^\W\d_]{2}")


def marked_answer(text, unclosed=False):
    """What the last mark holds, or None; with `unclosed` also an <answer> that ends with the text.
    At most LONGEST + 1 characters.

    A Markdown heading (`#### Step 1: Add`, `#### 3. Compute`, `#### Check` with text below it) is
    no mark."""
    end, passed = len(text.rstrip()), 0
    for mark in reversed(deque(_MARK.finditer(text), maxlen=256)):  # enough for any headings
        if mark[0].startswith("\\"):
            found = _boxed(text, mark.end())
        elif mark[0] == "<answer>":
            inside, closing, _ = text[mark.end() :].partition("</answer>")
            found = inside if closing or unclosed else None
        else:
            # the line, or the next one where it is empty; `<answer>#### 18</answer>` ends with the
            # tag
            line = re.compile(r"\s*([^\n]*)").match(text, mark.end())
            if mark["line"] is not None and _is_heading(line[1], last=line.end() >= end):
                continue
            found = line[1].partition("</answer>")[0]
        if found is not None:
            return found.strip()[: LONGEST + 1]
        passed += 1
        if passed == PASSED_OVER:
            break
    return None


def _is_heading(line, last):
    """Whether a line behind #### is a heading: numbered, a step's, or a capitalised title with text
    below it."""
    line = line[:LONGEST].strip()
    return bool(_HEADING.match(line) or not last and _TITLE.match(line))


def _boxed(text, start):
    """The group that opens at `start`, braces balanced and `\\{` no brace, or the word there
    (`\\boxed 3`); None if it never closes."""
    piece = text[start : start + 4 * LONGEST]
    if not piece.lstrip().startswith("{"):
        return re.match(r"\s*([^\s$]*)", piece)[1] or None
    depth = 0
    for token in re.finditer(r"\\.|[{}]", piece, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0 and token[0] == "}":
            return piece[piece.index("{") + 1 : token.start()]
    return piece if len(piece) == 4 * LONGEST else None  # too long: found, and wrong


def _lenient_number(text):
    """The number a reader would take: the only one of a marked answer, the one that "the answer
    is", else the last of the text."""
    marked = marked_answer(text, unclosed=True)
    if marked is not None:
        found = numbers_in(marked.rpartition("=")[2])
        if found:
            return found[0] if len(set(found)) == 1 else None
    lines = text[-TAIL:].split("\n")
    heading = re.compile(r" {0,3}#{1,6}[ \t]+(.*)")
    found = [heading.match(line) for line in lines]
    tail = "\n".join(
        line for line, match in zip(lines, found) if not (match and _is_heading(match[1], False))
    )
    stated = list(re.finditer(r"answer is\b", tail, re.IGNORECASE))
    if stated:
        tail = tail[stated[-1].end() :].lstrip(" \t\n:*")
        sentence = re.split(r"[.!?](?:\s|$)|\n", tail, maxsplit=1)[0]
        found = numbers_in(sentence.rpartition("=")[2])
        if found:
            return found[0]
    steps = r"(?m)^[ \t]*[0-9]{1,3}[.)][ \t]+(?=\S)"  # "2. Then …" is the number of a step
    found = numbers_in(re.sub(steps, "", tail))
    return found[-1] if found else None


# --- mathematics ----------------------------------------------------------------------------------


def _same_math(answer, gold):
    """(the answer was understood, it equals the gold one); the cheap comparisons first."""
    if not answer or len(answer) > LONGEST:
        return False, False
    answer, gold = (scientific(_set_in_words(text)) for text in (answer, gold))
    if canonical(answer) == canonical(gold):
        return (True, True) if canonical(gold) else (False, False)
    for read in (time_of_day, quantity, _plain_number):  # units without a partner are left aside
        values = read(answer), read(gold)
        if None not in values:
            return True, values[0] == values[1]
    choices = [_CHOICE.fullmatch(canonical(text)) for text in (answer, gold)]
    if all(choices):
        return True, choices[0][1] == choices[1][1]  # (C) is C
    if _is_word(answer) or _is_word(gold):
        return True, False
    return MATH_WORKER.compare(answer, gold)


def _plain_number(text):
    return parse_number(text, words=False)


_IN_WORDS = {
    "\\emptyset": r"(?:thereare)?no(?:real)?solutions?(?:exists?)?|(?:the)?emptyset",
    "\\mathbb{R}": r"(?:all|any|the)?realnumbers?|allreals|allnumbers",
}


def _set_in_words(text):
    """\\emptyset for "no solution", \\mathbb{R} for "all real numbers"."""
    bare = canonical(text)
    for sign, pattern in _IN_WORDS.items():
        if re.fullmatch(pattern, bare, re.IGNORECASE):
            return sign
    return text


_CHOICE = re.compile(r"\(?([A-Z])\)?")


def _is_word(text):
    text = canonical(text)
    return bool(re.fullmatch(r"[A-Za-z]{3,}", text)) and text not in ("infinity", "inf")


def _bare_digits(answer, gold):
    """Whether the answer is the digits of a gold numeral of another base, without saying so: 52 for
    52_9."""
    numeral = re.fullmatch(r"([0-9A-F]+)_\{?([0-9]+)\}?", canonical(gold))
    return bool(numeral) and canonical(answer) == numeral[1]
