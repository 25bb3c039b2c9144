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
from fractions import Fraction

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
    """What is said of a completion.

    strict: the marked answer is right.
    lenient: the marked answer, or one that is not marked, is right.
    parsed: a marked answer was found and understood.
    """

    strict: bool
    lenient: bool
    parsed: bool


def grade_number(text: str, answer: str) -> Verdict:
    """Grades by whether the completion's number equals the gold one: exact rational values,
    decorations and units aside."""
    gold, marked = parse_number(answer), marked_answer(text)
    found = None if marked is None else parse_number(marked)
    if found is not None:
        return Verdict(found == gold, found == gold, True)
    return Verdict(False, gold is not None and _lenient_number(text) == gold, False)


def grade_math(text: str, answer: str) -> Verdict:
    """Grades by whether the completion's expression equals the gold one: as text, as numbers, else
    as mathematics by its form.

    A numeral of another base has to name it: `52` for `52_9` is right in lenient only."""
    marked = marked_answer(text)
    if marked is not None:
        parsed, equal = _compare_math(marked, answer)
        return Verdict(equal, equal or _is_bare_numeral(marked, answer), parsed)
    cut_off = marked_answer(text, unclosed=True)
    if cut_off is not None:
        return Verdict(False, _compare_math(cut_off, answer)[1], False)
    gold = _plain_number(answer)
    return Verdict(False, gold is not None and _lenient_number(text) == gold, False)


def grade_by_math_verify(text: str, answer: str) -> bool | None:
    """Returns whether math-verify, left to find the answer in the whole text by itself, takes it
    for the gold one; None where it is missing."""
    verdict = MATH_WORKER.math_verify(scientific(text[-TAIL:]), scientific(answer))
    return None if verdict is None else verdict[1]


def vote(text: str, words: bool = True) -> str | None:
    """Returns the marked answer in a form that its different spellings share (numbers by value), to
    be counted; None without one.

    words: whether a number may be spelled out or follow other words."""
    marked = marked_answer(text)
    if not marked or len(marked) > LONGEST:
        return None
    minutes, number = time_of_day(marked), parse_number(marked, words)
    if number is not None and (words or minutes is None):
        return str(number)
    if minutes is not None:
        return f"{minutes // 60}:{minutes % 60:02}"
    answer = scientific(_set_in_words(marked))
    choice, plain = _choice(answer), canonical(answer)
    if choice or _is_word(answer):
        return choice or plain
    return MATH_WORKER.key(answer) or plain


def format_reward(text: str) -> float:
    """Returns +1.0 for exactly `<think>…</think><answer>…</answer>`, neither empty and only white
    space around, else -1.0 (arXiv 2506.13404)."""
    if any(text.count(tag) != 1 for tag in ("<think>", "</think>", "<answer>", "</answer>")):
        return -1.0
    pattern = r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*"
    match = re.fullmatch(pattern, text, re.DOTALL)
    return 1.0 if match and all(part.strip() for part in match.groups()) else -1.0


# --- finding the answer ---------------------------------------------------------------------------

_MARK = re.compile(r"(?m)(?P<line>^\s{0,3})?#{4,}|\\(?:boxed|fbox)(?![A-Za-z])|<answer>")
_STEPS = "Step|Part|Case|Phase|Method|Approach|Problem|Question|Example|Section|Stage|Task"
_NUMBERED = re.compile(
    rf"[\W_]*(?:(?:{_STEPS})\s+(?:[0-9]+|[A-Z]|[IVX]+)\b"
    r"|\(?[0-9]{1,2}\\?[.):]\)?\s.*?[^\W\d_]{2}|[0-9]{1,2}(?:st|nd|rd|th)\s+[A-Za-z])"
)
_TITLE = re.compile(r"(?![$\\({\[])[\W_]*(?=[A-Z])[^\W\d_]{2}")


def marked_answer(text: str, unclosed: bool = False) -> str | None:
    """Returns what the last mark holds, or None; with `unclosed` also an <answer> that ends with
    the text. At most LONGEST + 1 characters.

    A Markdown heading (`#### Step 1: Add`, `#### 3. Compute`, `#### Check` with text below it) is
    no mark."""
    passed_over = 0
    for mark in reversed(deque(_MARK.finditer(text), maxlen=256)):  # enough for any headings
        if mark[0].startswith("\\"):
            found = _boxed(text, mark.end())
        elif mark[0] == "<answer>":
            found, closing, _ = text[mark.end() :].partition("</answer>")
            if not closing and not unclosed:
                found = None
        else:  # the line, or the next one where it is empty
            line, _, below = text[mark.end() :].lstrip().partition("\n")
            if mark["line"] is not None and _is_heading(line, is_last=not below.strip()):
                continue
            found = line.partition("</answer>")[0]  # of <answer>#### 18</answer>
        if found is not None:
            return found.strip()[: LONGEST + 1]
        passed_over += 1
        if passed_over == PASSED_OVER:
            break
    return None


def _is_heading(line: str, is_last: bool = False) -> bool:
    """Whether a line behind #### is a heading: numbered, a step's, or a capitalised title with text
    below it."""
    line = line[:LONGEST].strip()
    return bool(_NUMBERED.match(line) or (not is_last and _TITLE.match(line)))


def _boxed(text: str, start: int) -> str | None:
    """The group that opens at `start`, braces balanced and `\\{` no brace, or the word there
    (`\\boxed 3`); None if it never closes."""
    piece = text[start : start + 4 * LONGEST]
    if not piece.lstrip().startswith("{"):
        return re.split(r"[\s$]", piece.lstrip(), maxsplit=1)[0] or None
    depth = 0
    for token in re.finditer(r"\\.|[{}]", piece, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0 and token[0] == "}":
            return piece[piece.index("{") + 1 : token.start()]
    return piece if len(piece) == 4 * LONGEST else None  # too long: found, and wrong


def _lenient_number(text: str) -> Fraction | None:
    """The number a reader would take: the only one of a marked answer, the one that "the answer
    is", else the last of the text."""
    marked = marked_answer(text, unclosed=True)
    if marked is not None:
        found = numbers_in(marked.rpartition("=")[2])
        if found:
            return found[0] if len(set(found)) == 1 else None
    lines = []
    for line in text[-TAIL:].split("\n"):
        heading = re.match(r" {0,3}#{1,6}[ \t]+(.*)", line)
        if heading is None or not _is_heading(heading[1]):
            lines.append(line)
    parts = re.split(r"(?i)answer is\b", "\n".join(lines))
    tail = parts[-1]
    if len(parts) > 1:
        tail = tail.lstrip(" \t\n:*")
        sentence = re.split(r"[.!?](?:\s|$)|\n", tail, maxsplit=1)[0]
        found = numbers_in(sentence.rpartition("=")[2])
        if found:
            return found[0]
    steps = r"(?m)^[ \t]*[0-9]{1,3}[.)][ \t]+(?=\S)"  # "2. Then …" is the number of a step
    found = numbers_in(re.sub(steps, "", tail))
    return found[-1] if found else None


# --- mathematics ----------------------------------------------------------------------------------


def _compare_math(answer: str, gold: str) -> tuple[bool, bool]:
    """Whether the answer was understood and whether it equals the gold one; the cheap comparisons
    first."""
    if not answer or len(answer) > LONGEST:
        return False, False
    answer, gold = scientific(_set_in_words(answer)), scientific(_set_in_words(gold))
    if canonical(answer) == canonical(gold):
        is_answer = canonical(gold) != ""
        return is_answer, is_answer
    # A unit that only one of them has is left aside.
    for read in (time_of_day, quantity, _plain_number, _choice):
        found = read(answer), read(gold)
        if None not in found:
            return True, found[0] == found[1]
    if _is_word(answer) or _is_word(gold):
        return True, False
    return MATH_WORKER.compare(answer, gold)


def _plain_number(text: str) -> Fraction | None:
    return parse_number(text, words=False)


def _choice(text: str) -> str | None:
    """The letter of a multiple choice: (C) is C."""
    match = re.fullmatch(r"\(?([A-Z])\)?", canonical(text))
    return match and match[1]


def _is_word(text: str) -> bool:
    return re.fullmatch(r"(?!inf(?:inity)?$)[A-Za-z]{3,}", canonical(text)) is not None


def _set_in_words(text: str) -> str:
    """\\emptyset for "no solution", \\mathbb{R} for "all real numbers"."""
    bare = canonical(text).lower()
    if re.fullmatch(r"(?:thereare)?no(?:real)?solutions?(?:exists?)?|(?:the)?emptyset", bare):
        return "\\emptyset"
    if re.fullmatch(r"(?:all|any|the)?realnumbers?|allreals|allnumbers", bare):
        return "\\mathbb{R}"
    return text


def _is_bare_numeral(answer: str, gold: str) -> bool:
    """Whether the answer is the digits of a gold numeral of another base, without saying so: 52 for
    52_9."""
    numeral = re.fullmatch(r"([0-9A-F]+)_\{?([0-9]+)\}?", canonical(gold))
    return numeral is not None and canonical(answer) == numeral[1]
