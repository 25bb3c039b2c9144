"""Answers read by their form: equations, inequalities, intervals, sets, tuples, lists, matrices,
numerals of another base, values.

What cannot be read in full raises NotUnderstood. data/grading/compare.py says which forms are
equal.
"""

import re

from data.grading import values
from data.grading.expression import read, symbols
from data.grading.forms import Form, real_set
from data.grading.intervals import (
    EMPTY,
    REALS,
    Piece,
    complement,
    intersection,
    normal,
    union,
)
from data.grading.layout import (
    both_signs,
    closes_last,
    is_sign,
    split,
    with_thousands,
    without_stops,
)
from data.grading.numbers import UNITS, is_unit, strip_marks, tidy
from data.grading.tokens import NotUnderstood, Token, tokens

MAX_ITEMS = 60
RELATIONS = ("=", "<", "<=", ">", ">=", "!=", "\\in")
SWAPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "!=": "!=", "=": "="}


def parse(text: str) -> Form:
    """The form of a whole answer."""
    text = strip_marks(tidy(text)).strip()
    items = without_stops(with_thousands(tokens(text)))
    if re.fullmatch(r"[A-Za-z]{3,}", text) or not items:
        raise NotUnderstood("a word")
    return _alternatives(items)


def _variable(form):
    return form.parts[1] if form.kind == "reals" else None


def _alternatives(items):
    """A list of answers, or a single one; inequalities that 'and' or 'or' connects are one set."""
    pieces, connectors = split(items, ",", ";", "or", "and", "\\lor", "\\land")
    pieces = [piece for piece in pieces if piece]
    if not pieces or len(pieces) > MAX_ITEMS:
        raise NotUnderstood("no answer, or too many")
    signs = sum(is_sign(token, "\\pm", "\\mp") for token in items)
    if len(pieces) == 1 and not signs:
        return _item(pieces[0])
    forms = [_item(p) for piece in pieces for p in both_signs(piece)]
    conditions = [form.kind in ("reals", "between") for form in forms]
    if len(forms) > 1 and all(conditions) and len({_variable(form) for form in forms}) == 1:
        sets = [real_set(form) for form in forms]
        variable = _variable(forms[0])
        either = "or" in connectors or "\\lor" in connectors
        result = union(sets) if either or variable is None else intersection(sets)
        return Form(
            "reals",
            (
                union(sets)
                if result == EMPTY and not {"and", "\\land"} & set(connectors)
                else result,
                variable,
            ),
        )
    if {"\\lor", "\\land"} & set(connectors):
        raise NotUnderstood("logic")
    return forms[0] if len(forms) == 1 else Form("list", (False, _inherit_names(forms)))


def _inherit_names(forms):
    """x = 1, 2 names both; (x, y) = (1, 2) is x = 1, y = 2 already."""
    flat = []
    for form in forms:
        flat.extend(form.parts[1] if form.kind == "list" and not form.parts[0] else [form])
    name = flat[0].parts[0] if flat[0].kind == "named" else None
    bare = [form.kind == "expression" for form in flat[1:]]
    if name is None or not all(bare) or not bare:
        return tuple(flat)
    return tuple(form if form.kind == "named" else Form("named", (name, form)) for form in flat)


def _item(items):
    """One answer: relations first, then sets, brackets, and what is left as an expression."""
    sides, relations = split(items, *RELATIONS)
    if relations:
        return _relation(sides, relations)
    pieces, operators = split(items, "\\cup", "\\cap", "\\setminus")
    if operators:
        return _set_operation(pieces, operators)
    for reader in (_known_set, _matrix, _bracketed, _numeral, _ratio):
        form = reader(items)
        if form is not None:
            return form
    return Form("expression", (read(_without_unit(items)),))


def _without_unit(items):
    """Without the words behind a value: \\text{cm}^2, or a unit that is no product of variables
    (square inches)."""
    while len(items) > 1 and is_sign(items[-1], "%"):
        items = items[:-1]
    end = len(items)
    if end > 2 and is_sign(items[-2], "^") and items[-1].text in ("2", "3"):
        end -= 2
    texts = end
    while texts > 1 and items[texts - 1].kind == "text" and items[texts - 2].text not in ("_", "{"):
        texts -= 1
    if texts < end:
        if not all(is_unit(f" {token.text} ") for token in items[texts:end]):
            raise NotUnderstood("words that are no unit")  # 3 or more
        return items[:texts]
    start = end
    while start > 1 and items[start - 1].kind == "letter":
        start -= 1
    words = "".join((" " if t.spaced else "") + t.text for t in items[start:end]).split()
    if (
        words
        and start > 0
        and all(
            len(w) > 1 and (w in UNITS or w in ("square", "cubic", "unit", "units", "sq"))
            for w in words
        )
    ):
        return items[:start]
    return items


# --- relations ------------------------------------------------------------------------------------


def _relation(sides, relations):
    if not all(sides):
        raise NotUnderstood("half a relation")
    if relations == ["\\in"]:
        return _membership(*sides)
    if all(relation == "=" for relation in relations):
        return _equation(sides)
    if len(relations) > 2 or "=" in relations or "\\in" in relations:
        raise NotUnderstood("a chain of mixed relations")
    trees = [read(_without_unit(side)) for side in sides]
    bounds = [_isolated(*pair) for pair in zip(trees, relations, trees[1:])]
    if None not in bounds and len({name for name, _ in bounds}) == 1:
        return Form("reals", (intersection([pieces for _, pieces in bounds]), bounds[0][0]))
    if len(relations) == 1 and relations[0] != "!=":
        smaller_first = relations[0].startswith("<")
        small, large = trees if smaller_first else reversed(trees)
        return Form(
            "relation", (("add", small, values.negative(large)), relations[0].strip("<>") == "=")
        )
    raise NotUnderstood("a relation")


def _isolated(left, relation, right):
    """(name, pieces) of `name < constant`, of `constant > name` and of |name| < constant; None of
    another relation."""
    if symbols(left) == set() and symbols(right):
        left, relation, right = right, SWAPPED[relation], left
    absolute = left[:2] == ("fn", "abs")
    inner = left[2] if absolute else left
    if inner[0] != "sym" or symbols(right):
        return None
    pieces = _ray(relation, right)
    if absolute:
        mirrored = _ray(SWAPPED[relation], values.negative(right))
        pieces = (
            intersection([pieces, mirrored])
            if relation in ("<", "<=", "!=")
            else union([pieces, mirrored])
        )
    return inner[1], pieces


def _ray(relation, bound):
    if relation == "!=":
        return complement(normal([Piece(bound, True, bound, True)]))
    closed = relation.endswith("=")
    if relation.startswith("<"):
        return normal([Piece(None, False, bound, closed)])
    return normal([Piece(bound, closed, None, False)])


_NUMBER_SETS = [("sym", f"mathbb {letter}") for letter in "ZNQC"]


def _membership(left, right):
    name = read(left)
    if name[0] != "sym":
        raise NotUnderstood("what is in the set")
    form = _item(right)
    if form.kind == "expression" and form.parts[0] in _NUMBER_SETS:
        return Form("named", (name[1], form))
    pieces = real_set(form)
    if form.kind == "list" and form.parts[0]:
        return Form("named", (name[1], form))
    if pieces is None:
        raise NotUnderstood("a set")
    return Form("reals", (pieces, name[1]))


def _equation(sides):
    """name = value (also the first and the last of a chain), f(x) = value, or the sides of an
    equation."""
    first, last = sides[0], sides[-1]
    function = _function_head(first)
    if function:
        return Form("function", (*function, read(_without_unit(last))))
    names = _tuple_of_names(first)
    if names:
        return _named_tuple(names, _item(last))
    middle = [read(side) for side in sides[1:-1]]
    for name, value in ((first, last), (last, first)):
        if middle and (
            name is last
            or not all(values.equal(tree, read(_without_unit(last))) for tree in middle)
        ):
            continue  # x = 5 + 13 = 18 names x; a line (x - 1)/2 = y/3 = z has three sides
        symbol = _symbol(name)
        if symbol is not None:
            form = _item(value)
            if form.kind != "expression" or symbol not in symbols(form.parts[0]):
                return Form("named", (symbol, form))
    trees = [read(_without_unit(side)) for side in sides]
    if not any(symbols(tree) for tree in trees):
        if trees[0][0] == "num":
            raise NotUnderstood("no arithmetic")  # 0 = 0
        return Form("expression", (trees[-1],))  # 16 + 2 = 18
    return Form("equation", tuple(("add", a, values.negative(b)) for a, b in zip(trees, trees[1:])))


def _symbol(items):
    """The name that tokens are, or None."""
    if len(items) == 1 and items[0].kind == "text":
        return items[0].text
    try:
        tree = read(items)
    except NotUnderstood:
        return (
            "\\angle" + "".join(t.text for t in items[1:])
            if items and is_sign(items[0], "\\angle", "\\triangle")
            else None
        )
    if tree == ("const", "e") or tree == ("const", "i"):
        return tree[1]
    return tree[1] if tree[0] == "sym" else None


def _function_head(items):
    """(name, arguments) of f(x), f(x, y)."""
    if len(items) < 4 or not is_sign(items[-1], ")"):
        return None
    opening = next((i for i, token in enumerate(items) if is_sign(token, "(")), 0)
    head = items[:opening]
    inverse = [token.text for token in head[1:]] == ["^", "{", "-", "1", "}"]
    name = _symbol(head[:1] if inverse else head) if opening else None
    arguments = items[opening + 1 : -1]
    letters = arguments[::2]
    if (
        name is None
        or not all(t.kind == "letter" or t.kind == "command" for t in letters)
        or any(t.text != "," for t in arguments[1::2])
    ):
        return None
    return name + "^-1" * inverse, tuple(t.text for t in letters)


def _tuple_of_names(items):
    if len(items) < 5 or not is_sign(items[0], "(") or not is_sign(items[-1], ")"):
        return None
    names = [_symbol(piece) if piece else None for piece in split(items[1:-1], ",")[0]]
    return None if None in names else names


def _named_tuple(names, form):
    forms = form.parts[1] if form.kind == "list" else (form,)
    if any(f.kind != "tuple" or len(f.parts[1]) != len(names) for f in forms):
        raise NotUnderstood("a tuple of another length")
    if len(forms) > 1:
        return form
    return Form(
        "list", (False, tuple(Form("named", pair) for pair in zip(names, forms[0].parts[1])))
    )


# --- sets, brackets, matrices ---------------------------------------------------------------------


def _known_set(items):
    texts = [token.text for token in items]
    if texts in (["\\emptyset"], ["\\{", "\\}"]):
        return Form("reals", (EMPTY, None))
    if texts in (["\\mathbb", "{", "R", "}"], ["\\mathbb", "R"], ["\\R"]):
        return Form("reals", (REALS, None))
    return None


def _set_operation(pieces, operators):
    if not all(pieces) or len(set(operators)) > 1:
        raise NotUnderstood("mixed set operations")
    forms = [_item(_as_set(piece)) for piece in pieces]
    sets = [real_set(form, points=True) for form in forms]
    if None in sets:
        raise NotUnderstood("no set")
    if operators[0] == "\\cup":
        return Form("reals", (union(sets), None))
    others = sets[1:] if operators[0] == "\\cap" else [complement(s) for s in sets[1:]]
    return Form("reals", (intersection([sets[0], *others]), None))


def _as_set(piece):
    """{0} of \\mathbb{R} \\setminus {0}, whose braces were meant to be seen."""
    if len(piece) > 2 and is_sign(piece[0], "{") and is_sign(piece[-1], "}"):
        return [Token("symbol", "\\{", False), *piece[1:-1], Token("symbol", "\\}", False)]
    return piece


def _bracketed(items):
    """A tuple, an interval, or a set in braces: brackets around the whole, and not a product of
    parentheses."""
    if is_sign(items[0], "]") and is_sign(items[-1], "[", "]"):
        items = [
            Token("symbol", "(", False),
            *items[1:-1],
            Token("symbol", ")", False) if is_sign(items[-1], "[") else items[-1],
        ]
    if (
        len(items) < 3
        or not is_sign(items[0], "(", "[", "\\{", "\\langle")
        or not is_sign(items[-1], ")", "]", "\\}", "\\rangle")
    ):
        return None
    if is_sign(items[0], "\\{") and is_sign(items[-1], "\\}"):
        return _braces(items[1:-1])
    pieces, _ = split(items[1:-1], ",", ";")
    if len(pieces) < 2 or len(split(items[:-1], "")[0]) != 1 or not closes_last(items):
        return None
    if len(pieces) == 2 and (
        is_sign(items[0], "[")
        or is_sign(items[-1], "]")
        or any(is_sign(t, "\\infty") for t in items)
    ):
        low, high = (_bound(piece) for piece in pieces)
        return Form("between", (low, high, (items[0].text == "[", items[-1].text == "]")))
    if items[0].text + items[-1].text not in ("()", "[]", "\\langle\\rangle"):
        raise NotUnderstood("brackets")
    return Form(
        "tuple", (items[0].text == "[", tuple(_item(piece) for piece in pieces if piece or _fail()))
    )


def _fail():
    raise NotUnderstood("an empty place")


def _bound(items):
    texts = [token.text for token in items]
    if texts in (["\\infty"], ["+", "\\infty"], ["-", "\\infty"]):
        return None if texts[0] != "-" else "-"
    return Form("expression", (read(items),))


def _braces(items):
    """{1, 2, 3}, or {x : x > 3} and {x | x > 3}."""
    for separator in ("\\mid", ":", "|"):
        head, found = split(items, separator)
        if len(found) == 1 and len(head) == 2 and all(head):
            name, _ = split(head[0], "\\in")
            domain = "".join(t.text for t in name[1]) if len(name) == 2 else "\\mathbb{R}"
            form = _alternatives(head[1])
            if (
                form.kind != "reals"
                or _symbol(name[0]) != form.parts[1]
                or domain not in ("\\mathbb{R}", "\\mathbbR")
            ):
                raise NotUnderstood("a set")
            return Form("reals", (form.parts[0], None))
    form = _alternatives(items)
    if form.kind == "list" and form.parts[0] is False:
        return Form("list", (True, form.parts[1]))
    return Form("list", (True, (form,)))


def _matrix(items):
    if (
        len(items) > 2
        and items[0].text + items[-1].text in ("()", "[]")
        and items[1].text.startswith("\\begin{array}")
    ):
        items = items[1:-1]
    opening, closing = items[0], items[-1]
    if opening.kind != "environment" or not re.match(
        r"\\begin\{([pb]?matrix|array)\}", opening.text
    ):
        return None
    if closing.kind != "environment" or any(token.kind == "environment" for token in items[1:-1]):
        raise NotUnderstood("matrices")
    rows = [split(row, "&")[0] for row in split(items[1:-1], "\\\\")[0] if row]
    if (
        not rows
        or len({len(row) for row in rows}) != 1
        or not all(cell for row in rows for cell in row)
    ):
        raise NotUnderstood("a ragged matrix")
    return Form(
        "matrix", tuple(tuple(Form("expression", (read(cell),)) for cell in row) for row in rows)
    )


_BASES = {
    w: i
    for i, w in enumerate(
        "two three four five six seven eight nine ten eleven twelve".split(), start=2
    )
} | {"sixteen": 16}


def _numeral(items):
    """(digits, base) of 52_9, 52_{9}, 52_{\\text{nine}}, (52)_9 and 52 base 9."""
    texts = [token.text for token in items if token.text not in ("{", "}", "(", ")")]
    at = next((i for i, text in enumerate(texts) if text in ("_", "base")), 0)
    digits, base = "".join(texts[:at]), "".join(texts[at + 1 :])
    base = _BASES.get(base.lower(), int(base) if re.fullmatch("[0-9]{1,2}", base) else 0)
    if at == 0 or not re.fullmatch("[0-9A-Z]*[0-9][0-9A-Z]*", digits) or not 2 <= base <= 36:
        return None
    if any(int(digit, 36) >= base for digit in digits):
        if digits.isdigit():
            raise NotUnderstood("digits of another base")
        return None  # 2A_3: a product
    if base == 10:
        return Form("expression", (("num", values.ONE * int(digits)),))
    return Form("numeral", (digits.lstrip("0").upper() or "0", base))


def _ratio(items):
    pieces, colons = split(items, ":")
    if not colons:
        return None
    return Form("ratio", tuple(read(piece) for piece in pieces))
