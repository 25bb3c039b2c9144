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


def _names_below_thousand() -> dict[str, int]:
    names = {word: i for i, word in enumerate(_SMALL)}
    for i, ten in enumerate(_TENS, start=2):
        names[ten] = 10 * i
        for j in range(1, 10):
            names[f"{ten} {_SMALL[j]}"] = 10 * i + j
    below_hundred = list(names.items())[1:]
    for i in range(1, 20):  # nineteen hundred, too
        hundred = f"{_SMALL[i]} hundred"
        names[hundred] = 100 * i
        for name, value in below_hundred:
            names[f"{hundred} {name}"] = 100 * i + value
    return names


_NAMES = _names_below_thousand()
_DENOMINATORS = {part: i for i, part in enumerate(_PARTS, start=2)} | {"halve": 2, "fourth": 4}
# What may end a number in words, so that it is no unit.
_NUMBER_WORDS = {*" ".join(_NAMES).split(), *_SCALES, "and", "a", "an", "minus", "negative"}
_NUMBER_WORDS |= {*_PARTS, *(f"{part}s" for part in _DENOMINATORS)}
_LARGE = "|".join(["hundred", *_SCALES])
_FRACTION = re.compile(
    rf"(?:(?P<integer>.+) and )?(?P<over>.+?) (?P<part>{'|'.join(_DENOMINATORS)})s?"
)


def number_in_words(text: str, unit: bool = False) -> Fraction | None:
    """Returns the number that `text` spells, or None; with `unit` one word that is no number may
    follow ('twelve apples')."""
    if not re.fullmatch(r"[A-Za-z]+(?:[\s-]+[A-Za-z]+)*", text.strip()):
        return None
    words = re.split(r"[\s-]+", text.strip().lower())
    if unit and len(words) > 1 and words[-1] not in _NUMBER_WORDS:
        words.pop()
    sign = -1 if words[0] in ("minus", "negative") else 1
    spelled = " ".join(words[sign < 0 :])
    match = _FRACTION.fullmatch(spelled)
    if match is None:
        value = _integer(spelled)
        return None if value is None else Fraction(sign * value)
    integer = _integer(match["integer"]) if match["integer"] else 0
    over = _integer(re.sub(r"^an?$", "one", match["over"]))
    under = _DENOMINATORS[match["part"]]
    if integer is None or over is None or (integer and over >= under):
        return None
    return sign * (integer + Fraction(over, under))


def _integer(text: str) -> int | None:
    """The value of an integer's words, or None where they do not make one ('two three', 'and
    five')."""
    text = re.sub(rf"^a (?={_LARGE})", "one ", text)
    rest, value = re.sub(rf"\b({_LARGE}) and (?=.)", r"\1 ", text), 0
    for power, scale in reversed(list(enumerate(_SCALES, start=1))):
        head, found, behind = rest.partition(f" {scale}")
        if found:
            if head not in _NAMES or behind[:1].strip():
                return None
            value += _NAMES[head] * 1000**power
            rest = behind.strip()
            if not rest:
                return value
    return value + _NAMES[rest] if rest in _NAMES else None
