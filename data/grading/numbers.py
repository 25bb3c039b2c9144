"""Answers that are one number, a quantity with its unit, or a time of day, read exactly from the
ways in which people write them."""

import re
from fractions import Fraction
from typing import NamedTuple

from data.grading.words import number_in_words

LONGEST = 500  # characters; a longer answer is none, and numbers of that length cost nothing
GREEK = set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi "
    "rho varrho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma "
    "Upsilon Phi Psi Omega hbar ell".split()
)

# --- text -----------------------------------------------------------------------------------------

_COMMAND = r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|mbox|mathrm|mathbf|mathit|mathsf|operatorname)"
_TEXT = re.compile(_COMMAND + r"\s*\{([^{}]*)\}")
_DEGREES = r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree(?![A-Za-z])|°"
_ORDINAL = rf"\s*\^\s*\{{?\s*(?:{_COMMAND}\s*)?\{{?\s*(?:st|nd|rd|th)\s*\}}?\s*\}}?"
_SMALL_SPACE = r"(?<!\\)\\(?:!\s*|,|(?:left|right|displaystyle|[bB]igg?[lr]?)(?![A-Za-z]))"
_REPLACEMENTS = [
    (r"[−–]", "-"),
    (r"\{,\}(?=[0-9])", ","),
    (r"\{:\}", ":"),
    (rf"{_SMALL_SPACE}|[\u2009\u202f]", ""),
    (r"(?<!\\)\\(?:[;: ()\[\]]|q?quad(?![A-Za-z]))|~|\u00a0", " "),
    (r"(?<=[-+])\s*\\?[$€£¥₹]\s*", ""),  # -$5
    (r"\\?[$€£¥₹]", " "),
    (r"\\%", "%"),
    (_DEGREES, " "),
    (rf"(?<=[0-9]){_ORDINAL}", ""),  # 12^{\mathrm{th}}
    (r"(?<=[0-9])(?:st|nd|rd|th)(?![A-Za-z])", ""),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\frac\s*([0-9A-Za-z])(?=\s*[{0-9A-Za-z])", r"\\frac{\1}"),
    (r"\\frac\s*\{([^{}]*)\}\s*([0-9A-Za-z])", r"\\frac{\1}{\2}"),
    (r"\\frac\s*\{([^{}]*)\}\s*\{", r"\\frac{\1}{"),
]
_TIDY = [(re.compile(pattern), to) for pattern, to in _REPLACEMENTS]


def tidy(text: str) -> str:
    """LaTeX and print variants of the same thing made one: minus signs, spacing, currency, degrees,
    ordinals, fractions."""
    if re.search(r"(?<![A-Za-z])(?:sin|cos|tan|cot|sec|csc)(?![a-z])", text):
        text = re.sub(_DEGREES, r" \\arcdegree ", text)  # here no unit to leave aside
    for pattern, to in _TIDY:
        text = pattern.sub(to, text)
    return text


def scientific(text: str) -> str:
    """4.5e33, which a reader of mathematics takes for 4.5 · e · 33, as 4.5 \\times 10^{33}."""
    pattern = r"(?<![\w.])([0-9]+(?:\.[0-9]+)?)[eE]([-+]?[0-9]+)(?!\w)"
    return re.sub(pattern, r"\1 \\times 10^{\2}", text)


def canonical(text: str) -> str:
    """A form in which answers that differ in print alone are the same string."""
    text = strip_marks(_TEXT.sub(r"\1", tidy(text)))
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", text))
    is_word = text.isalpha() and len(text) > 2
    return text.casefold() if is_word else text  # Evelyn, east; not x against X


def strip_marks(text: str) -> str:
    """Without markdown emphasis, quotes, and the stops of a sentence; 5! and f' keep what is
    theirs."""
    return text.lstrip('*_`" \t\n').rstrip('*_`" \t\n.,:;')


def _plain(text: str) -> str:
    """Tidy text with fractions as 1/2, the words of `\\text{…}` bare and other braces gone."""
    text = re.sub(r"\}\s*\^\s*\{?([23])\}?", r"^\1}", text)  # \text{cm}^2
    text = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r" \1/\2 ", _TEXT.sub(r" \1 ", text))
    return strip_marks(re.sub(r"[{}]", " ", text))  # 1\frac{4}{5} is 1 4/5


# --- one number -----------------------------------------------------------------------------------

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_SCALES = {"": 1, "k": 1000, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)])[-+])?(?<![\w.])(?:(?:(?P<whole>[0-9]+)\s+)?(?P<over>{_DIGITS})\s*/\s*"
    rf"(?P<under>{_DIGITS})|(?P<plain>{_DIGITS}))"
    r"(?:\s*(?P<scale>hundred|thousand|million|billion)s?\b|(?P<kilo>k)(?![\w^]))?",
    re.IGNORECASE,
)
_CHANGES_VALUE = re.compile(
    r"\b(?:or|and|half|halves|plus|minus|pi|squared|cubed|factorial|over|divided|sqrt"
    r"|tenths?|hundredths?|thousandths?)\b",
    re.IGNORECASE,
)
_UNIT_LETTERS = set("mgshlLNJWVACFK")  # one letter that stands for a unit; 18 x is no number
_SHORT_UNITS = set(
    "mm cm dm km mg kg ml cl dl ft yd mi lb lbs oz hr hrs min mins sec secs ms mph kmh kph mpg pt "
    "pts qt gb mb kb tb hz khz mhz ghz kw kj kwh kn pm am th st nd rd ct cts sq cu psi rpm usd eur "
    "gbp pcs".split()
)
_UNMARKED = r"(?<=[0-9] )(?!sin|cos|tan|log|exp)(?=[a-z]*[aeiou])[a-z]{5,}(?![A-Za-z])"  # apples


def parse_number(text: str, words: bool = True) -> Fraction | None:
    """The one number that `text` is, or None: '$1,234.50', '-3 apples', '18\\%', '\\frac{1}{2}',
    '16 + 2 = 18', '1 1/2', 'twelve'.

    What stands before an `=` is a name or plain arithmetic: an equation in unknowns is no number.
    Units may follow the number. Without `words` nothing may stand before it, and only words that
    are marked as text (`\\text{cm}`) or cannot be variables (`apples`) behind it."""
    *left, right = tidy(text).split("=")
    if len(text) > LONGEST or (left and not words) or not all(map(_is_name, left)):
        return None
    bare = _plain(right)
    clock = re.fullmatch(r"([0-9]{1,2}):00(\s*(?:[ap]\.?\s*m\.?|o'?clock)?)", bare, re.IGNORECASE)
    if clock:
        return Fraction(clock[1])  # nine o'clock is 9
    bare = re.sub(r"^([-+])\s+", r"\1", bare.strip())
    if re.fullmatch(r"[-+]?[1-9][0-9]{0,2}(?: [0-9]{3})+", bare):
        bare = bare.replace(" ", "")  # 12 000 000
    match = _NUMBER.match(bare)
    if match is None:
        return number_in_words(bare, unit=words)
    marked = re.sub(_UNMARKED, "", _TEXT.sub("", right).replace("\\frac", ""))
    if not words and re.search(r"[^\W\d_]", marked):
        return None
    return _value(match) if is_unit(bare[match.end() :]) else None


def _is_name(left: str) -> bool:
    """Whether a left side is a name, words, or plain arithmetic."""
    operators = r"\\(?:times|cdot|div|(?:measured)?angle|triangle|overline)(?![A-Za-z])"
    bare = _plain(re.sub(operators, "*", scientific(left))).strip()
    if re.fullmatch(r"\*?\s*[A-Za-z]+(?:_\w+)?'?(?:\([\w,\s]*\))?", bare):
        return True
    unknown = r"[<>!|≤≥≠;\\]|\b(?:or|and|sin|cos|tan|ln|log|exp|sqrt|abs)\b"
    if re.search(unknown, bare) or not bare:
        return False
    if not re.search(r"[-+/^0-9]", bare):
        return True
    units = "|".join(sorted(_SHORT_UNITS, key=len, reverse=True))
    known = rf"[A-Za-z]{{3,}}|(?<=[0-9])\s*(?:{units})\b|(?<=[0-9)])\s*[xX](?=\s*[0-9(])"
    rest = re.sub(known, "*", bare)  # 18 = 18 has no name
    return re.fullmatch(r"(?![-+]?[0-9.,]+$)[-+*/^().,:%'\s0-9]*", rest) is not None


def is_unit(rest: str) -> bool:
    """Whether what follows a number leaves its value alone: words, m^2, km/h, % – not digits,
    operators, an unknown or '… and a half'."""
    rest = re.sub(r"(?<=[A-Za-z])\^?\s?[23²³](?![0-9²³])", "", rest)
    rest = re.sub(r"(?:^|(?<=[A-Za-z]))-(?=[A-Za-z]{2})", " ", rest)  # 18-inch, but not 18-x
    if not all(c.isalpha() or c in " \t\n/.'()%*`\"" for c in rest):
        return False
    if _CHANGES_VALUE.search(rest) or rest.strip() == "/":
        return False
    for match in re.finditer(r"[^\W_]+", rest):
        word, vowel = match[0], re.search("(?i)[aeiou]", match[0])
        if word in _UNIT_LETTERS or word.lower() in _SHORT_UNITS:
            continue
        if match.start() == 0:  # directly behind the number
            is_usual = len(word) > 2 and vowel
        else:
            is_article = word in "aA" and match.end() < len(rest)
            is_usual = len(word) > 2 or (len(word) == 2 and vowel) or is_article
        if not is_usual:
            return False  # 18x, 18ab
    return True


def _value(match: re.Match) -> Fraction | None:
    """The value of a match of _NUMBER; None for a division by zero or more digits than an answer
    has."""

    def part(name: str) -> Fraction:
        return Fraction(match[name].replace(",", ""))

    if match.end() - match.start() > LONGEST:
        return None
    if match["plain"]:
        value = part("plain")
    elif part("under"):
        value = part("over") / part("under")
        if match["whole"]:
            value += part("whole")
    else:
        return None
    scale = (match["scale"] or match["kilo"] or "").lower()
    return value * _SCALES[scale] * (-1 if match["sign"] == "-" else 1)


def numbers_in(text: str) -> list[Fraction]:
    """The values of all numbers in `text`, in order."""
    values = [_value(match) for match in _NUMBER.finditer(_plain(tidy(text)))]
    return [value for value in values if value is not None]


# --- quantities and times -------------------------------------------------------------------------

_UNIT_TABLE = """length 0.1 mm millimeter millimetre|length 1 cm centimeter centimetre
length 100 m meter metre|length 100000 km kilometer kilometre|length 2.54 in inch inches
length 30.48 ft foot feet|length 91.44 yd yard|length 160934.4 mi mile|time 1 s sec second
time 60 min minute|time 3600 h hr hour|time 86400 day|time 604800 week|mass 0.001 mg milligram
mass 1 g gram|mass 1000 kg kilogram|mass 453.59237 lb pound|mass 28.349523125 oz ounce
volume 1 ml milliliter millilitre|volume 10 cl centiliter|volume 1000 l L liter litre|money 1 cent
money 100 dollar|percent 1 % percent|angle 1 degree|radian 1 rad radian"""


class Quantity(NamedTuple):
    """So many base units of what a unit measures (its dimension)."""

    dimension: str
    size: Fraction


UNITS = {"": Quantity("", Fraction(1))}
for _line in re.split(r"[|\n]", _UNIT_TABLE):
    _dimension, _factor, *_names = _line.split()
    for _name in _names:
        UNITS[_name] = UNITS[_name + "s"] = Quantity(_dimension, Fraction(_factor))
_QUANTITY = re.compile(
    rf"\s*(?:and\s+)?(?P<value>{_NUMBER.pattern})\s*(?P<square>square|sq\.?|cubic|cu\.?)?\s*"
    r"(?P<unit>%|[A-Za-z]+)\.?(?:(?:\s*\^\s*|(?<=[A-Za-z]))(?P<power>[23])(?![0-9]))?"
    r"(?:\s*(?:/|per\b)\s*(?P<per>[A-Za-z]+)\.?)?",
    re.IGNORECASE,
)


def quantity(text: str) -> Quantity | None:
    """Returns what a number with a known unit is, '2 hours 30 minutes' included; None of anything
    else."""
    text = re.sub(r"\\\$\s*([0-9.,]+)", r"\1 dollars", text[: LONGEST + 1].rpartition("=")[2])
    text = _plain(tidy(re.sub(_DEGREES, " degrees ", text))).strip()
    total, dimensions, at = Fraction(0), set(), 0
    while at < len(text):
        match = _QUANTITY.match(text, at)
        if match is None:
            return None
        value, unit, per = _value(match), _unit(match["unit"]), _unit(match["per"] or "")
        if value is None or unit is None or per is None:
            return None
        square = {"s": 2, "c": 3}.get((match["square"] or " ")[0].lower(), 1)
        power = int(match["power"] or square)
        dimensions.add(f"{unit.dimension}/{per.dimension}".rstrip("/") + f"^{power}")
        total += value * (unit.size / per.size) ** power
        at = match.end()
    return Quantity(dimensions.pop(), total) if len(dimensions) == 1 else None


def _unit(name: str) -> Quantity | None:
    return UNITS.get(name if len(name) == 1 else name.lower())


_MINUTES = r"(?::([0-5][0-9]))?"
_HALF_DAY = re.compile(rf"(0?[1-9]|1[0-2]){_MINUTES}\s*([ap])\.?\s*m\.?")
_FULL_DAY = re.compile(rf"([01]?[0-9]|2[0-4])(?=:|\s*o){_MINUTES}(?:\s*o'?\s*clock)?")


def time_of_day(text: str) -> int | None:
    """Minutes after midnight of '9:00 AM', '9 a.m.', '21:00', 'noon'; a bare number is no time."""
    bare = _plain(tidy(text[: LONGEST + 1].rpartition("=")[2])).strip().lower()
    bare = {"noon": "12:00 pm", "midnight": "12:00 am"}.get(bare, " ".join(bare.split()))
    match = _HALF_DAY.fullmatch(bare)
    if match:
        return int(match[1]) % 12 * 60 + int(match[2] or 0) + 720 * (match[3] == "p")
    match = _FULL_DAY.fullmatch(bare)
    return int(match[1]) * 60 + int(match[2] or 0) if match else None
