"""Numbers in words: 'twelve', 'twenty-one', 'three hundred and five', 'one half', 'two and three
quarters'."""

import re
from fractions import Fraction

_SMALL = {word: i for i, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
)}  # fmt: skip
_TENS = {
    word: 10 * i
    for i, word in enumerate(
        "twenty thirty forty fifty sixty seventy eighty ninety".split(), start=2
    )
}
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PARTS = {"half": 2, "halves": 2}
for _i, _word in enumerate("third quarter fifth sixth seventh eighth ninth tenth".split(), start=3):
    _PARTS[_word] = _PARTS[_word + "s"] = _i
_PARTS["fourth"] = _PARTS["fourths"] = 4
NUMBER_WORDS = {
    *_SMALL,
    *_TENS,
    *_SCALES,
    *_PARTS,
    "hundred",
    "and",
    "a",
    "an",
    "minus",
    "negative",
}


def number_in_words(text: str, unit: bool = False) -> Fraction | None:
    """The number that `text` spells, or None; with `unit` one word that is no number may follow
    ('twelve apples')."""
    if not re.fullmatch(r"[A-Za-z]+(?:[\s-]+[A-Za-z]+)*", text.strip()):
        return None
    words = re.split(r"[\s-]+", text.strip().lower())
    if unit and len(words) > 1 and words[-1] not in NUMBER_WORDS:
        words.pop()
    sign = 1
    if words[0] in ("minus", "negative"):
        sign, words = -1, words[1:]
    value = _mixed(words)
    return None if value is None else sign * value


def _mixed(words):
    """A whole number, a fraction, or both with 'and' between them."""
    if not words:
        return None
    if words[-1] not in _PARTS:
        return _whole(words)
    for i in [i for i, word in enumerate(words) if word == "and"]:
        whole, part = _whole(words[:i]), _part(words[i + 1 :])
        if whole is not None and part is not None and part < 1:
            return whole + part
    return _part(words)


def _part(words):
    """'half', 'a half', 'two thirds'."""
    if not words or words[-1] not in _PARTS:
        return None
    alone = words == ["half"] or words[:-1] in (["a"], ["an"])  # a "third" alone is an ordinal
    over = 1 if alone else _whole(words[:-1])
    return None if over is None else over / Fraction(_PARTS[words[-1]])


def _whole(words):
    """The value of a whole number's words, or None where they do not make one ('two three', 'and
    five')."""
    total, current, allowed, last_scale = 0, None, True, 10**15
    for i, word in enumerate(words):
        if word in _SMALL:
            follows_tens = i > 0 and words[i - 1] in _TENS and 0 < _SMALL[word] < 10
            if not (allowed or follows_tens):
                return None
            current, allowed = (current or 0) + _SMALL[word], False
        elif word in _TENS:
            if not allowed:
                return None
            current, allowed = (current or 0) + _TENS[word], False
        elif word == "hundred":
            if (
                i == 0
                or words[i - 1] not in _SMALL
                and words[i - 1] != "a"
                or not 0 < (current or 1) < 20
            ):
                return None
            current, allowed = (current or 1) * 100, True
        elif word in _SCALES:
            if i == 0 or _SCALES[word] >= last_scale or (current is None and words[i - 1] != "a"):
                return None
            last_scale = _SCALES[word]
            total, current, allowed = total + (current or 1) * last_scale, None, True
        elif word == "and":
            if i == 0 or i == len(words) - 1 or words[i - 1] not in (*_SCALES, "hundred"):
                return None
        elif word != "a" or i > 0 or len(words) == 1 or words[1] not in (*_SCALES, "hundred"):
            return None
    return Fraction(total + (current or 0)) if words else None
