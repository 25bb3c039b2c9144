"""Sets of real numbers: inequalities, intervals, unions of them, and single points."""

from collections.abc import Callable, Iterable
from functools import cmp_to_key
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

from data.grading import values
from data.grading.trees import INFINITY, NotUnderstood, Tree, difference, negative, symbols


class Cut(NamedTuple):
    """The place just before (0) or just behind (1) a number, where a set begins or ends."""

    bound: Tree
    behind: int


class Reals(NamedTuple):
    """A set of real numbers: x > 3, (0, 1) ∪ {2}.

    variable: what is said to be in the set, if anything is.
    begins_inside: the set reaches down to minus infinity.
    cuts: where it begins and ends in turn, in order.
    """

    variable: str | None
    begins_inside: bool
    cuts: tuple[Cut, ...]

    @property
    def bounds(self) -> list[Tree]:
        return [cut.bound for cut in self.cuts]

    @property
    def sides(self) -> list[int]:
        return [cut.behind for cut in self.cuts]


EMPTY, ALL_REALS = Reals(None, False, ()), Reals(None, True, ())


def ray(variable: str, sign: str, bound: Tree) -> Reals:
    """The set of `variable < bound`, or what other sign there is."""
    if sign == "!=":
        return Reals(variable, True, (Cut(bound, 0), Cut(bound, 1)))
    return Reals(variable, sign[0] == "<", (Cut(bound, int(sign in ("<=", ">"))),))


def point(tree: Tree) -> Reals:
    """The set of a single number."""
    return Reals(None, False, (Cut(tree, 0), Cut(tree, 1)))


def interval(low: Tree, high: Tree, low_closed: bool = False, high_closed: bool = False) -> Reals:
    """Infinity has no order, so it has to be at the open end of an interval."""
    begins_inside = low == negative(INFINITY) and not low_closed
    cuts = () if begins_inside else (Cut(low, int(not low_closed)),)
    if high != INFINITY or high_closed:
        cuts += (Cut(high, int(high_closed)),)
    if len(cuts) == 2 and not symbols(low) | symbols(high):
        if _order(*cuts) >= 0:
            raise NotUnderstood("nothing between its ends")  # (0, 0) is a point of the plane
    return Reals(None, begins_inside, cuts)


def combined(rule: Callable[[Iterable[bool]], bool], sets: list[Reals]) -> Reals:
    """The union (rule any) or intersection (rule all) of sets of the same variable."""
    inside = [form.begins_inside for form in sets]
    begins_inside = was_inside = rule(inside)
    # From left to right, each cut switches between inside and outside of one set.
    ends = [(cmp_to_key(_order)(cut), cut, i) for i, form in enumerate(sets) for cut in form.cuts]
    cuts = []
    for _, group in groupby(sorted(ends, key=itemgetter(0)), itemgetter(0)):
        together = list(group)
        for _, _, i in together:
            inside[i] = not inside[i]
        if rule(inside) != was_inside:
            was_inside = not was_inside
            cuts.append(together[-1][1])
    return Reals(sets[0].variable, begins_inside, tuple(cuts))


def _order(a: Cut, b: Cut) -> int:
    """Negative, 0 or positive, as cut a lies before, at or behind cut b."""
    if values.equal(a.bound, b.bound):
        return a.behind - b.behind
    order = values.sign(difference(a.bound, b.bound))
    if not order:
        raise NotUnderstood("bounds without an order")
    return order
