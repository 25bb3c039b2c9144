"""The outer layout of an answer's tokens: brackets, separators, thousands, and both signs of
\\pm."""

import itertools
import re
from collections.abc import Iterator

from data.grading.tokens import NotUnderstood, Token

OPENING, CLOSING = (
    {"(", "[", "{", "\\{", "\\lfloor", "\\lceil", "\\langle"},
    {")", "]", "}", "\\}", "\\rfloor", "\\rceil", "\\rangle"},
)


def with_thousands(items: list[Token]) -> list[Token]:
    """1,000 as one number: where a run of digits and commas without white space is grouped in
    threes and is no list itself."""
    spaced_comma = any(a.text == "," and b.spaced for a, b in zip(items, items[1:]))
    found, at, depth = [], 0, 0
    while at < len(items):
        token = items[at]
        depth += (token.text in OPENING and token.kind != "text") - (
            token.text in CLOSING and token.kind != "text"
        )
        end = at + 1
        while (
            token.kind == "number"
            and end + 1 < len(items)
            and _continues(items[end], items[end + 1])
        ):
            end += 2
        run = "".join(t.text for t in items[at:end])
        grouped = re.fullmatch(r"[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?", run) and (
            spaced_comma or depth == 0
        )
        found.extend(
            [Token("number", run.replace(",", ""), token.spaced)] if grouped else items[at:end]
        )
        at = end
    return found


def _continues(comma, number):
    return comma.text == "," and number.kind == "number" and not comma.spaced and not number.spaced


def without_stops(items: list[Token]) -> list[Token]:
    """Without the stops of a sentence at the end."""
    while items and items[-1].text in (".", ",", ";"):
        items = items[:-1]
    return items


def is_sign(token: Token, *texts: str) -> bool:
    """Whether a token is one of these signs or commands, and not a text of the same letters."""
    return token.kind in ("symbol", "command", "word") and token.text in texts


def split(items: list[Token], *separators: str) -> tuple[list[list[Token]], list[str]]:
    """(the pieces between separators outside of all brackets and matrices, the separators)."""
    pieces, found, depth, matrix = [[]], [], 0, 0
    for token in items:
        if token.kind == "environment":
            matrix += 1 if token.text.startswith("\\begin") else -1
        if token.kind in ("symbol", "command"):
            depth += (token.text in OPENING) - (token.text in CLOSING)
        if depth == 0 and matrix == 0 and is_sign(token, *separators):
            pieces.append([])
            found.append(token.text)
        else:
            pieces[-1].append(token)
    return pieces, found


def both_signs(items: list[Token]) -> Iterator[list[Token]]:
    """The tokens with each \\pm as + and as -, independently; \\mp follows the one \\pm beside
    it."""
    places = [i for i, token in enumerate(items) if is_sign(token, "\\pm", "\\mp")]
    if is_sign(items[0], "\\{") and is_sign(items[-1], "\\}"):
        places = []  # {1 \pm 2, 3} is one set, whose members have the signs
    linked = any(is_sign(items[i], "\\mp") for i in places)
    if len(places) > 4:
        raise NotUnderstood("too many signs")
    for choice in itertools.product("+-", repeat=1 if linked else len(places)):
        copy = list(items)
        for i, place in enumerate(places):
            chosen = choice[0] if linked else choice[i]
            if is_sign(items[place], "\\mp"):
                chosen = "-" if chosen == "+" else "+"
            copy[place] = Token("symbol", chosen, items[place].spaced)
        yield copy


def closes_last(items: list[Token]) -> bool:
    """Whether the first bracket is closed by the last one: (1,2),(3,4) is no tuple."""
    depth = 0
    for i, token in enumerate(items):
        if token.kind in ("symbol", "command"):
            depth += (token.text in OPENING) - (token.text in CLOSING)
        if depth == 0:
            return i == len(items) - 1
    return False
