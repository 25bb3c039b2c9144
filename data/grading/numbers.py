"""Answers that are one number, a quantity with its unit, or a time of day, read exactly from the
ways in which people write them."""

import re
from fractions import Fraction
from typing import NamedTuple

from data.grading.words import number_in_words

LONGEST = (
    500  # characters; a longer answer is no answer, and numbers of that length cost nothing to read
)

GREEK = set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi "
    "rho varrho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma "
    "Upsilon Phi Psi Omega hbar ell".split()
)

# --- text -----------------------------------------------------------------------------------------

_TEXT_COMMAND = (
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|mbox|mathrm|mathbf|mathit|mathsf|operatorname)"
)
TEXT = re.compile(_TEXT_COMMAND + r"\s*\{([^{}]*)\}(?:\s*\^\s*\{?[23]\}?)?")
_TEXT_ALONE = re.compile(_TEXT_COMMAND + r"\s*\{([^{}]*)\}")

_DEGREES = r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree(?![A-Za-z])|°"


def _braced_fraction(match):
    """\\frac12 as \\frac{1}{2}; an empty argument stays empty."""
    over, under = (match[i] if match[i] is not None else match[i + 1] for i in (1, 3))
    return f"\\frac{{{over}}}{{{under}}}"


_TIDY = [(re.compile(pattern), to) for pattern, to in (
    (r"[−–]", "-"),
    (r"\{,\}(?=[0-9])", ","),
    (r"\{:\}", ":"),
    (r"(?<!\\)\\(?:!\s*|,|(?:left|right|displaystyle|[bB]igg?[lr]?)(?![A-Za-z]))|[\u2009\u202f]", ""),
    (r"(?<!\\)\\(?:[;: ()\[\]]|q?quad(?![A-Za-z]))|~|\u00a0", " "),
    (r"(?<=[-+])\s*\\?[$€£¥₹]\s*", ""),  # -$5
    (r"\\?[$€£¥₹]", " "),
    (r"\\%", "%"),
    (_DEGREES, " "),
    (rf"(?<=[0-9])\s*\^\s*\{{?\s*(?:{_TEXT_COMMAND}\s*)?\{{?\s*(?:st|nd|rd|th)\s*\}}?\s*\}}?",
    ""),  # 12^{\mathrm{th}}
    (r"(?<=[0-9])(?:st|nd|rd|th)(?![A-Za-z])", ""),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\frac\s*(?:\{([^{}]*)\}|([0-9A-Za-z]))\s*(?:\{([^{}]*)\}|([0-9A-Za-z]))", _braced_fraction),
)]  # fmt: skip


def tidy(text: str) -> str:
    """LaTeX and print variants of the same thing made one: minus signs, spacing, currency, degrees,
    ordinals, fractions."""
    if re.search(
        r"(?<![A-Za-z])(?:sin|cos|tan|cot|sec|csc)(?![a-z])", text
    ):  # here degrees are not a unit to leave aside
        text = re.sub(_DEGREES, r" \\arcdegree ", text)
    for pattern, to in _TIDY:
        text = pattern.sub(to, text)
    return text


def scientific(text: str) -> str:
    """4.5e33, which a reader of mathematics takes for 4.5 · e · 33, as 4.5 \\times 10^{33}."""
    return re.sub(
        r"(?<![\w.])([0-9]+(?:\.[0-9]+)?)[eE]([-+]?[0-9]+)(?!\w)", r"\1 \\times 10^{\2}", text
    )


def canonical(text: str) -> str:
    """A form in which answers that differ in print alone are the same string."""
    text = strip_marks(_TEXT_ALONE.sub(r"\1", tidy(text)))
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", text))
    return (
        text.casefold() if text.isalpha() and len(text) > 2 else text
    )  # Evelyn, east; not x against X


def strip_marks(text: str) -> str:
    """Without markdown emphasis, quotes, and the stops of a sentence; 5! and f' keep what is
    theirs."""
    return text.lstrip('*_`" \t\n').rstrip('*_`" \t\n.,:;')


def _plain_text(text):
    """Tidy text with fractions as 1/2, the words of `\\text{…}` bare and other braces gone."""
    text = re.sub(r"(?<=[0-9])\s*\\frac", r" \\frac", text)  # 1\frac{4}{5} is 1 4/5
    text = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"\1/\2 ", text)
    return re.sub(r"[{}]", " ", TEXT.sub(r" \1 ", text))


# --- one number -----------------------------------------------------------------------------------

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)])[-+])?(?<![\w.])(?:(?:(?P<whole>[0-9]+)\s+)?(?P<over>{_DIGITS})\s*/\s*(?P<under>{_DIGITS})|(?P<plain>{_DIGITS}))"
    r"(?:\s*(?P<scale>hundred|thousand|million|billion|trillion)s?\b|(?P<kilo>k)(?![\w^]))?", re.IGNORECASE,
)  # fmt: skip
_SCALE = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_CHANGES_VALUE = re.compile(
    r"\b(?:or|and|half|halves|plus|minus|pi|squared|cubed|factorial|over|divided|tenths?|hundredths?|thousandths?|sqrt)\b",
    re.IGNORECASE,
)
_UNIT_LETTERS = set("mgshlLNJWVACFK")  # one letter that stands for a unit; 18 x is no number
_SHORT_UNITS = set(
    "mm cm dm km mg kg ml cl dl ft yd mi lb lbs oz hr hrs min mins sec secs ms mph kmh kph mpg pt pts qt gb mb kb tb hz khz mhz ghz kw kj kwh kn"
    " pm am th st nd rd ct cts sq cu psi rpm usd eur gbp pcs".split()
)


def parse_number(text: str, words: bool = True) -> Fraction | None:
    """The one number that `text` is, or None: '$1,234.50', '-3 apples', '18\\%', '\\frac{1}{2}',
    '16 + 2 = 18', '1 1/2', 'twelve'.

    What stands before an `=` is a name or plain arithmetic: an equation in unknowns is no number.
    Units may follow the number; without `words` only words that are marked as text (`\\text{cm}`) or
    cannot be variables (`apples`), so that 2k is no number."""
    named = named_number(text, words)
    return named and named.value


class NamedNumber(NamedTuple):
    """A number, and the symbol that it is the value of: "x" of `x = 5`, "" of `5`, of `Total = 5`
    and of `3 + 2 = 5`."""

    name: str
    value: Fraction


def named_number(text: str, words: bool = True) -> NamedNumber | None:
    """As parse_number, with the name that stands before the equals sign."""
    if len(text) > LONGEST:
        return None
    *left, right = tidy(text).split("=")
    names = [_left_name(piece, words) for piece in left]
    if None in names:
        return None
    value = _one_number(strip_marks(right), words)
    return None if value is None else NamedNumber(names[0] if names else "", value)


_IN_NAMES = {
    *GREEK, *"angle measuredangle triangle overline widehat mathbb vec times cdot div frac sqrt pi".split()
}  # fmt: skip
_OF_UNKNOWN = re.compile(
    r"\||[A-Za-z]\s*!|(?<![A-Za-z])(?:sin|cos|tan|cot|sec|csc|ln|log|exp|sqrt|abs|floor|ceil)(?![a-z])"
    r"|\\sqrt[^0-9]*[A-Za-z]"
)
_SYMBOL = re.compile(r"\\?[A-Za-z]+(?:_(?:\w|\{[^{}]*\}))?'*(?:\([\w,\s\\]*\))?")


def _left_name(piece, words):
    """What a left side names: a symbol, "" for words and plain arithmetic, None for anything else
    (without `words` for xy and abc too)."""
    piece = piece.strip()
    if (
        re.search(
            r"[<>!≤≥≠;\n]|\\(?:n?e|l|g)(?:e|eq|t|q)?(?:slant)?(?![A-Za-z])|,(?![0-9]{3})|\b(?:or|and)\b",
            piece,
        )
        or not piece
    ):
        return None
    bare = TEXT.sub(" total ", re.sub(r"\|([A-Z]{1,3})\|", r"\1", piece))
    if not set(re.findall(r"\\([A-Za-z]+|\S)", bare)) <= _IN_NAMES or _OF_UNKNOWN.search(bare):
        return None  # |x|, \\sin x, x!: a value of the unknown is not its name
    letters = re.sub(r"\s+", "", re.sub(r"[{}]", "", bare))
    if (
        letters.isalpha()
        and len(letters) > 1
        and not letters.isupper()
        and not words
        and not _is_word(letters)
    ):
        return None
    if _SYMBOL.fullmatch(re.sub(r"\s+", "", bare)) and (len(letters) <= 2 or not letters.isalpha()):
        return letters
    bare = scientific(
        re.sub(r"(?<=[0-9])\s*[xX]\s*(?=[0-9$(])|(?<=\w)\s+[xX]\s+(?=[0-9$(])", "*", bare)
    )
    bare = re.sub(r"\\(?:times|cdot|div|frac|sqrt)(?![A-Za-z])", "*", bare)
    operators = re.search(r"[-+*/^]|[0-9]", bare)
    if operators and re.search(
        r"\\|(?<![A-Za-z])[A-Za-z](?![A-Za-z])|[0-9]\s*\(?\s*[A-Za-z]{1,2}(?![A-Za-z])",
        _without_units(bare),
    ):
        return None  # an unknown among operators
    if operators and (
        not re.search(r"[0-9]", bare) or re.fullmatch(r"[-+]?[0-9.,]+", bare.strip())
    ):
        return None  # AB + CD; 18 = 18
    return ""


def _is_word(letters):
    return letters.lower() in ("sum", "ans", "max", "min") or (
        len(letters) > 3 and bool(re.search("[aeiou]", letters, re.IGNORECASE))
    )


def _without_units(text):
    units = "|".join(sorted(_SHORT_UNITS, key=len, reverse=True))
    return re.sub(rf"(?<=[0-9])\s*(?:{units})(?![A-Za-z])", "", text)


def _one_number(text, words):
    bare = strip_marks(_plain_text(text))
    clock = re.fullmatch(r"([0-9]{1,2}):00(\s*(?:[ap]\.?\s*m\.?|o'?clock)?)", bare, re.IGNORECASE)
    if clock:
        return Fraction(clock[1])  # nine o'clock is 9
    if re.fullmatch(r"[-+]?[1-9][0-9]{0,2}(?: [0-9]{3})+", bare):
        return Fraction(bare.replace(" ", ""))  # 12 000 000
    match = _NUMBER.match(re.sub(r"^([-+])\s+", r"\1", bare))
    if match is None:
        in_words = number_in_words(bare, unit=words)
        return (
            in_words
            if in_words is not None and (words or _only_marked_words(text) or bare.isascii())
            else None
        )
    if not (words or _only_marked_words(text)):
        return None
    return _value(match) if is_unit(match.string[match.end() :]) else None


def is_unit(rest: str) -> bool:
    """Whether what follows a number leaves its value alone: words, m^2, km/h, % – not digits,
    operators, an unknown or '… and a half'."""
    rest = re.sub(r"(?<=[A-Za-z])\^?\s?[23²³](?![0-9²³])", "", rest)
    rest = re.sub(r"(?:^|(?<=[A-Za-z]))-(?=[A-Za-z]{2})", " ", rest)  # 18-inch, but not 18-x
    if (
        not all(c.isalpha() or c in " \t\n/.'()%*`\"" for c in rest)
        or _CHANGES_VALUE.search(rest)
        or rest.strip() == "/"
    ):
        return False
    words = list(re.finditer(r"[^\W_]+", rest))
    return all(_is_unit_word(m[0], attached=m.start() == 0, last=m is words[-1]) for m in words)


def _is_unit_word(word, attached, last):
    if len(word) == 1:
        return word in _UNIT_LETTERS or (word in "aA" and not attached and not last)
    if word.lower() in _SHORT_UNITS:
        return True
    if attached and len(word) == 2:
        return False  # 18ab
    return not (attached or len(word) == 2) or bool(re.search("[aeiou]", word, re.IGNORECASE))


def _only_marked_words(text):
    """Whether all words are marked as text, or are no product of variables: 12 apples."""
    text = re.sub(
        r"(?<=[0-9a-z])\s+([A-Za-z]{4,})(?![A-Za-z])",
        lambda m: "" if _is_word(m[1]) else m[0],
        text,
    )
    return not re.search(r"[^\W\d_]", TEXT.sub("", text).replace("\\frac", ""))


def _value(match):
    """A match of _NUMBER as a Fraction, or None for a division by zero or more digits than an
    answer has."""
    if match.end() - match.start() > LONGEST:
        return None

    def part(name):
        return Fraction((match[name] or "0").replace(",", ""))

    if match["under"] and not part("under"):
        return None
    value = part("whole") + part("over") / part("under") if match["under"] else part("plain")
    scale = 1000 if match["kilo"] else _SCALE.get((match["scale"] or "").lower(), 1)
    return value * scale * (-1 if match["sign"] == "-" else 1)


def numbers_in(text: str) -> list[Fraction]:
    """The values of all numbers in `text`, in order."""
    values = [_value(m) for m in _NUMBER.finditer(_plain_text(tidy(text)))]
    return [v for v in values if v is not None]


# --- quantities and times -------------------------------------------------------------------------

_UNIT_NAMES = {
    "length": {"mm millimeter millimetre": "1/10", "cm centimeter centimetre": 1,
    "m meter metre": 100, "km kilometer kilometre": 100_000,
               "in inch inches": "2.54", "ft foot feet": "30.48", "yd yard": "91.44",
               "mi mile": "160934.4"},
    "time": {"s sec second": 1, "min minute": 60, "h hr hour": 3600, "day": 86400, "week": 604800},
    "mass": {"mg milligram": "1/1000", "g gram": 1, "kg kilogram": 1000,
    "lb pound": "453.59237", "oz ounce": "28.349523125"},
    "volume": {"ml milliliter millilitre": 1, "cl centiliter": 10, "l L liter litre": 1000},
    "money": {"cent": 1, "dollar": 100},
    "percent": {"% percent": 1},
    "angle": {"degree": 1}, "radian": {"rad radian": 1},
}  # fmt: skip
UNITS = {
    name + plural: (dimension, Fraction(factor))
    for dimension, units in _UNIT_NAMES.items()
    for names, factor in units.items()
    for name in names.split()
    for plural in ("", "s")
}
_QUANTITY = re.compile(
    rf"\s*(?:and\s+)?(?P<value>{_NUMBER.pattern})\s*(?P<square>square|sq\.?|cubic|cu\.?)?\s*(?P<unit>%|[A-Za-z]+)\.?(?:(?:\s*\^\s*|(?<=[A-Za-z]))(?P<power>[23])(?![0-9]))?(?:\s*(?:/|per\b)\s*(?P<per>[A-Za-z]+)\.?)?",
    re.IGNORECASE,
)


def quantity(text: str) -> tuple[str, Fraction] | None:
    """(dimension, value in its base unit) of a number with a known unit, '2 hours 30 minutes'
    included; None without one."""
    if len(text) > LONGEST:
        return None
    text = re.sub(r"\\\$\s*([0-9.,]+)", r"\1 dollars", text.rpartition("=")[2])
    text = re.sub(_DEGREES, " degrees ", text)
    text = re.sub(r"[{}]", " ", _TEXT_ALONE.sub(r" \1 ", tidy(text)))
    text = strip_marks(re.sub(r"\\frac\s+([0-9]+)\s+([0-9]+)", r"\1/\2", text))
    total, dimension, at = Fraction(0), None, 0
    while at < len(text):
        match = _QUANTITY.match(text, at)
        value = match and _value(_NUMBER.match(match["value"]))
        unit, per = (match and _unit(match["unit"]), match and match["per"] and _unit(match["per"]))
        if value is None or unit is None or (match["per"] and per is None):
            return None
        if match["per"]:
            unit = f"{unit[0]}/{per[0]}", unit[1] / per[1]
        power = int(match["power"] or {"s": 2, "c": 3}.get((match["square"] or " ")[0].lower(), 1))
        if dimension not in (None, (unit[0], power)):
            return None
        dimension, at = (unit[0], power), match.end()
        total += value * unit[1] ** power
    return None if dimension is None else (f"{dimension[0]}^{dimension[1]}", total)


def _unit(name):
    return UNITS.get(name) or (UNITS.get(name.lower()) if len(name) > 1 else None)


_CLOCK = re.compile(
    r"([0-9]{1,2})(?::([0-9]{2}))?(?:\s*([ap])\.?\s*m\.?|(\s*o'?\s*clock))?", re.IGNORECASE
)


def time_of_day(text: str) -> int | None:
    """Minutes after midnight of '9:00 AM', '9 a.m.', '21:00', 'noon'; a bare number is no time."""
    if len(text) > LONGEST:
        return None
    bare = strip_marks(re.sub(r"\s+", " ", _plain_text(tidy(text.rpartition("=")[2])))).strip()
    if bare.lower() in ("noon", "12 noon", "12:00 noon", "midnight", "12 midnight"):
        return 720 if "noon" in bare.lower() else 0
    match = _CLOCK.fullmatch(bare)
    if match is None or not (match[2] or match[3] or match[4]):
        return None
    hour, minute = int(match[1]), int(match[2] or 0)
    if minute > 59 or hour > (12 if match[3] else 24) or (match[3] and hour == 0):
        return None
    if match[3]:
        hour = hour % 12 + (12 if match[3] in "pP" else 0)
    return hour * 60 + minute
