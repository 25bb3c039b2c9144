"""Sets of real numbers as sorted pieces: unions of intervals and points whose ends are constants
(or, for one interval, expressions)."""

import functools
from typing import NamedTuple

from data.grading import values
from data.grading.expression import symbols
from data.grading.tokens import NotUnderstood


class Piece(NamedTuple):
    """An interval from low to high, which are trees or None for infinity; each end belongs to it or
    does not."""

    low: tuple | None
    low_closed: bool
    high: tuple | None
    high_closed: bool


EMPTY = ()
REALS = (Piece(None, False, None, False),)


def order(a: tuple, b: tuple) -> int:
    """-1, 0 or 1 as one constant is smaller than, equal to or larger than another."""
    if a == b or values.equal(a, b):
        return 0
    difference = values.sign(("add", a, values.negative(b)))
    if difference is None:
        raise NotUnderstood("bounds without an order")
    return difference


def _starts(a, b):
    """The order of two pieces' beginnings: a closed one comes before an open one."""
    if a.low is None or b.low is None:
        return (a.low is not None) - (b.low is not None)
    return order(a.low, b.low) or b.low_closed - a.low_closed


def _ends(a, b):
    if a.high is None or b.high is None:
        return (b.high is not None) - (a.high is not None)
    return order(a.high, b.high) or a.high_closed - b.high_closed


def normal(pieces: list[Piece]) -> tuple[Piece, ...]:
    """The same set as sorted pieces that do not touch."""
    pieces = [piece for piece in pieces if not _is_empty(piece)]
    merged = []
    for piece in sorted(pieces, key=functools.cmp_to_key(_starts)) if len(pieces) > 1 else pieces:
        if merged and _touch(merged[-1], piece):
            last = merged.pop()
            piece = (
                last._replace(high=piece.high, high_closed=piece.high_closed)
                if _ends(last, piece) < 0
                else last
            )
        merged.append(piece)
    return tuple(merged)


def _is_empty(piece):
    if piece.low is None or piece.high is None or symbols(piece.low) or symbols(piece.high):
        return False
    compared = order(piece.low, piece.high)
    if compared > 0:
        raise NotUnderstood("bounds in the wrong order")
    return compared == 0 and not (piece.low_closed and piece.high_closed)


def _touch(first, second):
    if first.high is None or second.low is None:
        return True
    compared = order(first.high, second.low)
    return compared > 0 or (compared == 0 and (first.high_closed or second.low_closed))


def union(sets: list) -> tuple[Piece, ...]:
    """The union of normal sets."""
    return normal([piece for pieces in sets for piece in pieces])


def intersection(sets: list) -> tuple[Piece, ...]:
    """The intersection of normal sets."""
    result = REALS
    for pieces in sets:
        met = []
        for a in result:
            for b in pieces:
                low = a if _starts(a, b) >= 0 else b
                high = a if _ends(a, b) <= 0 else b
                piece = Piece(low.low, low.low_closed, high.high, high.high_closed)
                if piece.low is None or piece.high is None or order(piece.low, piece.high) <= 0:
                    met.append(piece)
        result = normal(met)
    return result


def complement(pieces: tuple) -> tuple[Piece, ...]:
    """All real numbers that are not in a normal set."""
    gaps, low, low_closed = [], None, False
    for piece in pieces:
        if piece.low is not None:
            gaps.append(Piece(low, low_closed, piece.low, not piece.low_closed))
        if piece.high is None:
            return normal(gaps)
        low, low_closed = piece.high, not piece.high_closed
    return normal([*gaps, Piece(low, low_closed, None, False)])


def same_set(a: tuple, b: tuple) -> bool:
    """Whether two normal sets have the same pieces."""
    return len(a) == len(b) and all(
        p.low_closed == q.low_closed
        and p.high_closed == q.high_closed
        and _same_end(p.low, q.low)
        and _same_end(p.high, q.high)
        for p, q in zip(a, b)
    )


def _same_end(a, b):
    return a is b if a is None or b is None else values.equal(a, b)
