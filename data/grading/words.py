"""Numbers in words: 'twelve', 'twenty-one', 'three hundred and five', 'two and a half'."""

import re
from fractions import Fraction

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_SCALES = "thousand million billion trillion".split()
_PARTS = "half third quarter fifth sixth seventh eighth ninth tenth".split()


def _below_thousand():
    names = {word: i for i, word in enumerate(_SMALL)}
    for i, ten in enumerate(_TENS, start=2):
        names[ten] = 10 * i
        names |= {f"{ten} {one}": 10 * i + j for j, one in enumerate(_SMALL[1:10], start=1)}
    for i, one in enumerate(_SMALL[1:], start=1):  # nineteen hundred, too
        rests = {f" {rest}": value for rest, value in names.items() if 0 < value < 100} | {"": 0}
        names |= {f"{one} hundred{rest}": 100 * i + value for rest, value in rests.items()}
    return names


_NAMES = _below_thousand()
_NUMBER_WORDS = {*" ".join(_NAMES).split(), *_SCALES, "and", "a", "an", "minus", "negative"}
_LARGE = "|".join(["hundred", *_SCALES])
_FRACTION = re.compile(
    rf"(?:(?P<whole>.+) and )?(?P<over>.+?) (?P<part>{'|'.join(_PARTS)}|halve|fourth)s?"
)


def number_in_words(text: str, unit: bool = False) -> Fraction | None:
    """The number that `text` spells, or None; with `unit` one word that is no number may follow
    ('twelve apples')."""
    if not re.fullmatch(r"[A-Za-z]+(?:[\s-]+[A-Za-z]+)*", text.strip()):
        return None
    words = re.split(r"[\s-]+", text.strip().lower())
    fraction_words = {*_PARTS, *(part + "s" for part in _PARTS), "halves", "fourths"}
    if unit and len(words) > 1 and words[-1] not in _NUMBER_WORDS | fraction_words:
        words.pop()
    sign = -1 if words[0] in ("minus", "negative") else 1
    spelled = " ".join(words[sign < 0 :])
    match = _FRACTION.fullmatch(spelled)
    if match is None:
        value = _whole(spelled)
        return None if value is None else sign * value
    whole = _whole(match["whole"]) if match["whole"] else Fraction(0)
    over = _whole(re.sub(r"^an?$", "one", match["over"]))
    under = {"halve": 2, "fourth": 4}.get(match["part"]) or _PARTS.index(match["part"]) + 2
    if None in (whole, over) or (whole and over >= under):
        return None
    return sign * (whole + over / Fraction(under))


def _whole(text):
    """The value of a whole number's words, or None where they do not make one ('two three', 'and
    five')."""
    text = re.sub(rf"^a (?={_LARGE})", "one ", text)
    rest, value = re.sub(rf"\b({_LARGE}) and (?=.)", r"\1 ", text), Fraction(0)
    for power, scale in reversed(list(enumerate(_SCALES, start=1))):
        head, found, behind = rest.partition(f" {scale}")
        if found:
            if head not in _NAMES or behind[:1].strip():
                return None
            value, rest = value + _NAMES[head] * 1000**power, behind.strip()
            if not rest:
                return value
    return value + _NAMES[rest] if rest in _NAMES else None
