"""The tokens of LaTeX mathematics: numbers, letters, commands, words, with the many spellings of
one sign made one."""

import re
from fractions import Fraction
from typing import NamedTuple

FUNCTIONS = ("arcsin arccos arctan sinh cosh tanh sin cos tan cot sec csc ln log lg exp").split()
GREEK = set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho varrho sigma tau upsilon phi varphi chi psi"
    " omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega hbar ell".split()
)


class NotUnderstood(Exception):
    """The text is no expression that this file can read."""


class Token(NamedTuple):
    """kind: number, letter, word (a function's name, or what \\text holds), command, symbol, or
    begin / end of a matrix."""

    kind: str
    text: str
    spaced: bool  # white space before it


_TOKENS = re.compile(
    r"""(?P<space>\s+)|(?P<number>[0-9]+(?:\.[0-9]*)?|\.[0-9]+)|(?P<environment>\\(?:begin|end)\{[a-z]*\*?\}(?:\{[clr|]*\})?)"""
    r"""|(?P<text>\\(?:text(?:bf|it|rm|sf|normal)?|mbox|mathrm|operatorname)\*?\s*\{[^{}]*\})|(?P<command>\\(?:[A-Za-z]+|[{}|\\]))"""
    rf"""|(?P<word>(?<![A-Za-z])(?:{"|".join(FUNCTIONS)}|sqrt|pi|or|and|infinity|inf|base|mod)(?![A-Za-z]))|(?P<letter>[A-Za-z])"""
    r"""|(?P<symbol><=|>=|!=|\*\*|[-+*/^_(){}\[\]|!,:;=<>&'%])""",
)
_ALIASES = {
    "\\cdot": "*", "\\times": "*", "\\ast": "*", "**": "^", "\\div": "/", "\\lvert": "|",
    "\\rvert": "|", "\\vert": "|", "\\lbrace": "\\{",
    "\\rbrace": "\\}", "\\le": "<=", "\\leq": "<=", "\\leqslant": "<=", "\\ge": ">=",
    "\\geq": ">=", "\\geqslant": ">=", "\\lt": "<", "\\gt": ">",
    "\\ne": "!=", "\\neq": "!=", "\\vee": "\\lor", "\\wedge": "\\land", "\\colon": ":", "\\mid": "\\mid", "\\lbrack": "[",
    "\\rbrack": "]", "\\backslash": "\\setminus", "\\varnothing": "\\emptyset",
    "\\infin": "\\infty", "inf": "\\infty", "infinity": "\\infty",
    "pi": "\\pi", "sqrt": "\\sqrt", "\\varepsilon": "\\epsilon", "\\varphi": "\\phi",
    "\\dbinom": "\\binom", "\\tbinom": "\\binom",
    "\\arcsin": "arcsin", "\\arccos": "arccos", "\\arctan": "arctan",
}  # fmt: skip
_UNICODE = str.maketrans({
    "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ", "÷": "\\div ", "≤": "\\le ", "≥": "\\ge ",
    "≠": "\\ne ", "∞": "\\infty ", "π": "\\pi ", "√": "\\sqrt ",
    "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "±": "\\pm ", "∓": "\\mp ", "θ": "\\theta ",
    "α": "\\alpha ", "β": "\\beta ", "λ": "\\lambda ",
    "∅": "\\emptyset ", "ℝ": "\\mathbb{R} ", "²": "^2 ", "³": "^3 ",
})  # fmt: skip


def tokens(text: str) -> list[Token]:
    """The tokens of tidy text; raises NotUnderstood at a character that is none."""
    text = re.sub(
        r"([0-9]*)\.([0-9]*)\\overline\s*\{([0-9]+)\}", _repeating, text.translate(_UNICODE)
    )
    text = re.sub(r"\^\s*\{?\s*\\prime(?![A-Za-z])\s*\}?", "'", text)
    text = re.sub(r"(?<![A-Za-z])(?:np|math)\.(?=[a-z])", "", text)
    found, at, spaced = [], 0, False
    while at < len(text):
        match = _TOKENS.match(text, at)
        if match is None:
            raise NotUnderstood(text[at])
        at, kind = match.end(), match.lastgroup
        if kind == "space":
            spaced = True
            continue
        found.append(_token(kind, match[0], spaced))
        spaced = False
    return found


def _token(kind, text, spaced):
    if kind == "text":
        inside = text[text.index("{") + 1 : -1].strip()
        inside = {"or": "or", "and": "and", "i": "i", "e": "e"}.get(inside, inside)
        if inside == "to":
            return Token("symbol", ":", spaced)
        if inside in ("or", "and", *FUNCTIONS):
            return Token("word", inside, spaced)
        return Token("letter" if len(inside) == 1 and inside.isalpha() else "text", inside, spaced)
    text = _ALIASES.get(text, text)
    if kind == "command" and text[1:] in FUNCTIONS:
        return Token("word", text[1:], spaced)
    if text in ("or", "and", *FUNCTIONS, "base", "mod"):
        return Token("word", text, spaced)
    if text.startswith("\\") and kind in ("command", "word"):
        return Token("command", text, spaced)
    return Token("symbol" if kind in ("command", "symbol") else kind, text, spaced)


def _repeating(match):
    """0.1\\overline{6} as the fraction that it is."""
    whole, fixed, cycle = match[1] or "0", match[2], match[3]
    value = Fraction(
        int(whole + fixed + cycle) - int(whole + fixed), 10 ** len(fixed) * (10 ** len(cycle) - 1)
    )
    return f"({value.numerator}/{value.denominator})"
