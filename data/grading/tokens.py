"""The text of an answer cut into tokens, with the many spellings of one sign made one."""

import re
from typing import NamedTuple

from data.grading.numbers import UNITS, strip_marks, tidy
from data.grading.trees import NotUnderstood

FUNCTIONS = "arcsin arccos arctan sinh cosh tanh sin cos tan cot sec csc ln log exp".split()


class Token(NamedTuple):
    """A token.

    kind: number, letter, text (what \\text holds), sign (symbols, commands, names of functions),
        or matrix, whose text is begin or end.
    spaced: white space stands before it.
    """

    kind: str
    text: str
    spaced: bool


_WORDS = "|".join([*FUNCTIONS, "sqrt", "pi", "or", "and", "infinity", "inf"])
_TOKEN = re.compile(
    r"(?P<spaced>\s*)(?:(?P<number>[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
    r"|\\(?P<matrix>begin|end)\{(?:[pb]?matrix|array)\}(?:\{[clr|]*\})?"
    r"|\\(?:text(?:bf|it|rm|normal)?|mbox|mathrm|operatorname)\*?\s*\{(?P<text>[^{}]*)\}"
    rf"|(?P<sign>\\(?:[A-Za-z]+|[{{}}|\\])|(?<![A-Za-z])(?:{_WORDS})(?![A-Za-z])"
    r"|<=|>=|!=|\*\*|[-+*/^_(){}\[\]|!,:;=<>&'%])|(?P<letter>[A-Za-z])|(?P<unknown>\S))"
)
# Each line: the spelling that the reader knows, and others for it.
_SPELLINGS = r"""
* \cdot \times \ast
^ **
/ \div
| \lvert \rvert \vert
<= \le \leq \leqslant
>= \ge \geq \geqslant
< \lt
> \gt
!= \ne \neq
\lor \vee
\land \wedge
\setminus \backslash
\emptyset \varnothing
\infty inf infinity
\pi pi
\sqrt sqrt
\binom \dbinom \tbinom
"""
_ALIASES: dict[str, str] = {}
for _line in _SPELLINGS.strip().splitlines():
    _sign, *_others = _line.split()
    _ALIASES |= dict.fromkeys(_others, _sign)
_REPLACEMENTS = (
    r"*|*|/|<=|>=|!=|\infty |\pi |\sqrt |\cup |\cap |\in |\pm |\theta |\emptyset |\mathbb{R} "
)
_UNICODE = dict(zip(map(ord, "×·÷≤≥≠∞π√∪∩∈±θ∅ℝ"), _REPLACEMENTS.split("|"), strict=True))


def tokens(text: str) -> list[Token]:
    """Cuts prepared text into tokens; raises NotUnderstood at a character that is none."""
    found = []
    for match in _TOKEN.finditer(text):
        kind = str(match.lastgroup)
        content = match[kind]
        if kind == "unknown":
            raise NotUnderstood(content)
        if kind == "text":
            content = content.strip()
            if content in ("or", "and", *FUNCTIONS):
                kind = "sign"
            elif len(content) == 1 and content.isalpha():
                kind = "letter"
        elif kind == "sign":
            content = _ALIASES.get(content, content)
            if content[1:] in FUNCTIONS:
                content = content[1:]
        found.append(Token(kind, content, bool(match["spaced"])))
    return found


# --- text before it is tokens ---------------------------------------------------------------------

_UNIT_WORDS = "|".join(name for name in UNITS if len(name) > 1 and name.isalpha())
_LAST_UNIT = re.compile(
    rf"(?<=[\s0-9}})])((?:(?:square|cubic|sq|units?|{_UNIT_WORDS})(?:\s+|(?=\^)|$))+)"
    r"(?=(?:\^\{?[23]\}?)?$)"
)
_D = r"\{\s*((?:d|\\partial)(?:\s*\^\s*\{?[0-9]\}?)?\s*"
_DERIVATIVE = re.compile(
    rf"\\frac\s*{_D}(?:\\?[A-Za-z]+(?:_(?:\w|\{{\w+\}}))?)?)\s*\}}"
    rf"\s*{_D}\\?[A-Za-z]+(?:\s*\^\s*\{{?[0-9]\}}?)?)\s*\}}"
)


def _opaque(match: re.Match) -> str:
    """\\frac{dM}{dt} as a symbol of its own, and not d times something."""
    return f"\\bm{{{re.sub(r'[{} ]', '', match[1] + '/' + match[2])}}}"


def _repeating(match: re.Match) -> str:
    """0.1\\overline{6} as the fraction that it is."""
    integer, fixed, cycle = match.groups()
    numerator = int(integer + fixed + cycle) - int(integer + fixed)
    return f"({numerator}/{10 ** len(fixed) * (10 ** len(cycle) - 1)})"


def prepared(text: str) -> str:
    """Tidy text in which each thing is written in the one way that the reader knows."""
    text = strip_marks(tidy(text).translate(_UNICODE)).strip()
    text = re.sub(r"([0-9]+)\.([0-9]*)\\overline\s*\{([0-9]+)\}", _repeating, text)
    text = re.sub(r"\^\s*\{?\s*\\prime(?![A-Za-z])\s*\}?", "'", text)
    text = re.sub(r"\\text\s*\{\s*to\s*\}", ":", text)
    text = _LAST_UNIT.sub(r"\\text{\1}", _DERIVATIVE.sub(_opaque, text))
    if ", " in text or not re.search(r"[(\[{]", text):  # else (1,000) may be a pair
        grouped = r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])"
        text = re.sub(grouped, lambda match: match[0].replace(",", ""), text)
    return text
