"""Rational constants, exactly; what is none, or too large to hold, has no exact value."""

import math
from fractions import Fraction

from data.grading.tokens import NotUnderstood

MAX_BITS = 200_000  # of a number that is computed exactly


def exact(tree: tuple) -> Fraction | None:
    """The value of a rational constant, or None where the tree is none or its value would be too
    large to hold."""
    try:
        return _exact(tree)
    except (NotUnderstood, ZeroDivisionError):
        return None


def _exact(tree):
    kind = tree[0]
    if kind == "num":
        return tree[1]
    if kind == "fn" and tree[1] in ("factorial", "binomial", "abs", "floor", "ceil"):
        return _exact_function(tree[1], [_exact(part) for part in tree[2:]])
    if kind not in ("add", "mul", "div", "pow"):
        raise NotUnderstood(kind)
    parts = [_exact(part) for part in tree[1:]]
    if kind == "add":
        return _small(sum(parts))
    if kind == "mul":
        return _small(math.prod(parts))
    if kind == "div":
        return _small(parts[0] / parts[1])
    return _exact_power(*parts)


def _small(value):
    if value.numerator.bit_length() + value.denominator.bit_length() > MAX_BITS:
        raise NotUnderstood("too large")
    return value


def _exact_power(base, exponent):
    if exponent.denominator > 1:
        base = _exact_root(base, exponent.denominator)
    if base == exponent == 0:
        raise NotUnderstood("0^0")
    if base in (1, 0, -1) and abs(exponent.numerator) > MAX_BITS:
        raise NotUnderstood("too large")
    if (
        abs(exponent.numerator) * (base.numerator.bit_length() + base.denominator.bit_length())
        > MAX_BITS
    ):
        raise NotUnderstood("too large")
    return base**exponent.numerator


def _exact_root(base, degree):
    if degree > 64 or (base < 0 and degree % 2 == 0):
        raise NotUnderstood("no rational root")
    parts = [_integer_root(abs(part), degree) for part in (base.numerator, base.denominator)]
    return Fraction(*parts) * (-1 if base < 0 else 1)


def _integer_root(value, degree):
    low, high = 0, 1 << (value.bit_length() // degree + 1)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if middle**degree < value else (low, middle)
    if low**degree != value:
        raise NotUnderstood("no rational root")
    return low


def _exact_function(name, arguments):
    if name == "abs":
        return abs(arguments[0])
    if name in ("floor", "ceil"):
        return Fraction(getattr(math, name)(arguments[0]))
    if any(a.denominator > 1 or not 0 <= a <= 5000 for a in arguments):
        raise NotUnderstood("no whole number of this size")
    whole = [int(a) for a in arguments]
    return Fraction(math.factorial(*whole) if name == "factorial" else math.comb(*whole))
