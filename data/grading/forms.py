"""What an answer is once it is read: its form, and the set of real numbers that it may stand
for."""

from typing import NamedTuple

from data.grading import values
from data.grading.intervals import Piece, normal
from data.grading.tokens import NotUnderstood


class Form(NamedTuple):
    """An answer's kind, and its parts:

    expression (tree)             2x + 3
    named      (name, form)       y = 2x + 3
    function   (name, arguments, tree)   f(x) = 2x + 3
    equation   (tree, ...)        left side minus right side, one for each `=`
    relation   (tree, may be 0)   tree < 0 of an inequality that is not solved
    reals      (pieces, variable or None)    x > 3, (0, 1) \\cup {2}
    between    (low, high, closed)   the interval [1, 3); closed is (True, False)
    tuple      (in square brackets, forms)
    list       (in braces, forms)   roots in any order
    matrix     rows of forms
    numeral    (digits, base)
    ratio      trees
    """

    kind: str
    parts: tuple


def real_set(form, points=False):
    """The set of real numbers that a form is, or None: (1, 2) as an open interval, and with
    `points` {1, 2}."""
    if form.kind == "reals":
        return form.parts[0]
    if (
        form.kind == "tuple"
        and not form.parts[0]
        and [f.kind for f in form.parts[1]] == ["expression"] * 2
    ):
        form = Form("between", (*form.parts[1], (False, False)))
    if form.kind == "between":
        low, high, closed = form.parts
        if low is None or high == "-":
            raise NotUnderstood("an interval that begins at infinity")
        ends = [None if end in (None, "-") else end.parts[0] for end in (low, high)]
        left, right = closed
        if (left and ends[0] is None) or (right and ends[1] is None):
            raise NotUnderstood("infinity is no member")
        if None not in ends and not (left and right) and values.equal(*ends):
            raise NotUnderstood(
                "nothing between its ends"
            )  # (0, 0) is a point of the plane, not the empty set
        return normal([Piece(ends[0], left, ends[1], right)])
    if (
        points
        and form.kind == "list"
        and form.parts[0]
        and all(f.kind == "expression" for f in form.parts[1])
    ):
        return normal([Piece(f.parts[0], True, f.parts[0], True) for f in form.parts[1]])
    return None
