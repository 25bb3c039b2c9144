"""Syntax trees of answers."""

from fractions import Fraction
from typing import Any, NamedTuple


class NotUnderstood(Exception):
    """The text is no answer that can be read in full."""


class Tree(NamedTuple):
    r"""A node of a syntax tree. What `value` is depends on the kind.

    Expressions consist of these kinds alone:
        num: a Fraction
        sym: the name of a variable
        const: "pi", "e", "i" or "infty"
        op: an operation ("add", "pow", ...) on, or a known function ("sin", ...) of, `parts`
        function: "unknown f", a function f of `parts` of which only the name is known

    Around expressions there are:
        list: the connectors, for example (",", "or")
        relation: the signs, for example ("<", "<=")
        set: the operators, for example ("\cup",)
        ratio: the colons
        group: the opening and the closing bracket, around one part
        matrix: the number of rows; the parts are the cells, row by row
        pm: 1 for \pm, -1 for \mp, before one part
    """

    kind: str
    value: Any
    parts: tuple["Tree", ...] = ()


INFINITY = Tree("const", "infty")


def num(value: int | str | Fraction) -> Tree:
    """The tree of a number."""
    return Tree("num", Fraction(value))


def op(name: str, *parts: Tree) -> Tree:
    """The tree of an operation on, or a function of, `parts`."""
    return Tree("op", name, parts)


def negative(tree: Tree) -> Tree:
    """The tree of the value with its sign changed."""
    return op("mul", num(-1), tree)


def difference(a: Tree, b: Tree) -> Tree:
    """The tree of a - b."""
    return op("add", a, negative(b))


def symbols(tree: Tree) -> set[str]:
    """The names of all variables and unknown functions in a tree."""
    names = {tree.value} if tree.kind in ("sym", "function") else set()
    return names.union(*map(symbols, tree.parts))
