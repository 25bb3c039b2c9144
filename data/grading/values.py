"""The values of expressions: exact for rational constants, else numeric with 150 digits at fixed
pseudo-random points."""

import functools
import hashlib
from fractions import Fraction
from typing import NamedTuple

from data.grading.exact import MAX_BITS, exact
from data.grading.expression import symbols
from data.grading.tokens import NotUnderstood

DIGITS = 150
ONE = Fraction(1)
SHOWN = 85  # digits in a key
AGREE = 110  # digits; what is left absorbs the rounding of a few hundred operations


def negative(tree: tuple) -> tuple:
    """The tree of the value with its sign changed."""
    return ("mul", ("num", -ONE), tree)


# --- numeric --------------------------------------------------------------------------------------


class Value(NamedTuple):
    """value: a number of mpmath; size: what rounding is relative to, larger than |value| after
    cancellation; varies: it has variables in it."""

    value: object
    size: object
    varies: bool


@functools.cache
def _context():
    """A context of mpmath with our precision, apart from everybody else's."""
    from mpmath import MPContext  # not needed before the first question

    context = MPContext()
    context.dps = DIGITS
    return context


class Undefined(Exception):
    """An expression has no (real) value at this point."""


def evaluate(tree: tuple, point: dict) -> Value:
    """The value of a tree where each variable has the value that `point` gives it; raises Undefined
    or NotUnderstood."""
    mp = _context()
    kind = tree[0]
    if kind == "num":
        value = mp.mpf(tree[1].numerator) / tree[1].denominator
        return Value(value, abs(value), False)
    if kind == "sym":
        return Value(point[tree[1]], abs(point[tree[1]]), True)
    if kind == "const":
        if tree[1] not in ("pi", "e", "i"):
            raise NotUnderstood(tree[1])
        value = {"pi": +mp.pi, "e": +mp.e, "i": mp.mpc(0, 1)}[tree[1]]
        return Value(value, abs(value), False)
    parts = [evaluate(part, point) for part in (tree[2:] if kind == "fn" else tree[1:])]
    varies = any(part.varies for part in parts)
    if kind == "add":
        value, size = sum(p.value for p in parts), sum(p.size for p in parts)
    elif kind == "mul":
        value, size = _product(parts)
    elif kind == "div":
        value, size = _quotient(*parts)
    elif kind == "pow":
        value, size = _power(*parts, tree[2])
    else:
        value, size = _function(tree[1], parts)
    if not mp.isfinite(value) or mp.mag(size) > MAX_BITS:
        raise Undefined
    return Value(
        value, max(size, abs(value)), varies or (kind == "fn" and tree[1].startswith("unknown"))
    )


def _product(parts):
    value = size = _context().mpf(1)
    for part in parts:
        value, size = value * part.value, size * part.size
    return value, size


def _is_zero(part):
    return abs(part.value) <= part.size * _context().mpf(10) ** -AGREE


def _quotient(over, under):
    if _is_zero(under):
        raise Undefined
    return over.value / under.value, over.size / abs(under.value) * (under.size / abs(under.value))


def _power(base, exponent, exponent_tree):
    mp = _context()
    fraction = exact(exponent_tree)
    if _is_zero(base):
        if (
            fraction is None
            and (exponent.varies or mp.im(exponent.value) != 0)
            or mp.re(exponent.value) <= 0
        ):
            raise Undefined
        return mp.mpf(0), base.size ** min(exponent.value, 1) if mp.im(
            exponent.value
        ) == 0 else mp.mpf(1)
    if abs(exponent.value) * (abs(mp.mag(base.value)) + 2) > MAX_BITS:
        raise Undefined
    value, whole = exponent.value, mp.isint(exponent.value)
    relative = (base.size / abs(base.value)) * (1 + abs(value)) + exponent.size * (
        1 + abs(mp.log(base.value))
    )
    negative = mp.im(base.value) == 0 and mp.re(base.value) < 0
    if negative and not whole:
        if fraction is not None and fraction.denominator % 2:  # the real root
            result = (-1 if fraction.numerator % 2 else 1) * mp.power(-base.value, value)
        elif base.varies or exponent.varies:
            raise Undefined
        else:
            result = mp.power(base.value, value)
    else:
        result = mp.power(base.value, int(mp.re(value)) if whole and mp.im(value) == 0 else value)
    return result, abs(result) * max(relative, 1)


def _function(name, parts):
    mp, x = _context(), parts[0].value
    size, real = parts[0].size, _context().im(x) == 0
    if name.startswith("unknown"):
        shift = _fraction_of(name)
        inner = sum(part.value * (_fraction_of(f"{name} {i}") + 1) for i, part in enumerate(parts))
        return mp.cos(inner + shift) + 3 * shift + 2, sum(part.size for part in parts) * 4 + 4
    if name == "abs":
        return abs(x), size
    if name in ("max", "min"):
        if any(mp.im(part.value) != 0 for part in parts):
            raise Undefined
        return {"max": max, "min": min}[name](mp.re(part.value) for part in parts), max(
            part.size for part in parts
        )
    if name in ("floor", "ceil"):
        if not real:
            raise Undefined
        nearest = mp.nint(x)
        return (
            nearest if abs(x - nearest) <= size * mp.mpf(10) ** -AGREE else getattr(mp, name)(x)
        ), size + 1
    if name in ("factorial", "binomial"):
        return _combinatorial(name, [part.value for part in parts])
    if name in ("ln", "log"):
        if _is_zero(parts[0]) or (parts[0].varies and not (real and x > 0)):
            raise Undefined
        return mp.log(x), abs(mp.log(x)) + size / abs(x)
    if abs(x) > 10**4 or (
        name.startswith("arc")
        and parts[0].varies
        and not (real and abs(x) <= 1)
        and name != "arctan"
    ):
        raise Undefined
    function = {"arcsin": mp.asin, "arccos": mp.acos, "arctan": mp.atan}.get(name) or getattr(
        mp, name
    )
    result = function(x)
    if abs(result) > 10**30 and name in ("tan", "cot", "sec", "csc"):
        raise Undefined  # a pole
    slope = (
        abs(result) ** (1 if name in ("exp", "sinh", "cosh") else 2) + 1
    )  # of the derivative's order, or larger
    return result, abs(result) + size * slope


def _combinatorial(name, values):
    mp = _context()
    if any(mp.im(v) != 0 or not 0 <= v <= 5000 for v in values):
        raise Undefined
    result = mp.factorial(values[0]) if name == "factorial" else mp.binomial(*values)
    return result, abs(result) * 10**6


def _fraction_of(text):
    """A number between 0 and 1 that depends on the text alone."""
    digits = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:12]
    return _context().mpf(int.from_bytes(digits)) / 2**96


# --- comparing ------------------------------------------------------------------------------------

POSITIVE, MIXED, WHOLE = 5, 5, 8  # how many points of each kind


def _points(names, discrete):
    """Points at which expressions with these variables are compared: positive, of either sign, and
    whole ones; only whole ones if `discrete`."""
    mp = _context()
    points = []
    for i in range(0 if discrete else POSITIVE):
        points.append(
            {name: mp.mpf("0.2") + 4 * _fraction_of(f"{name} positive {i}") for name in names}
        )
    for i in range(0 if discrete else MIXED):
        points.append({name: 6 * _fraction_of(f"{name} mixed {i}") - 3 for name in names})
    for i in range(WHOLE):
        points.append(
            {name: mp.mpf(int(2 + 29 * _fraction_of(f"{name} whole {i}"))) for name in names}
        )
    return points


def is_discrete(tree: tuple) -> bool:
    """Whether an expression is meant for whole numbers: it rounds a variable."""
    if tree[0] == "fn" and tree[1] in ("floor", "ceil") and symbols(tree):
        return True
    return any(is_discrete(part) for part in tree[1:] if isinstance(part, tuple))


def samples(tree: tuple, names: set, discrete: bool) -> list[Value | None]:
    """The values at all points; None where there is none."""
    return [_sample(tree, point) for point in _points(sorted(names), discrete)]


def _sample(tree, point):
    try:
        return evaluate(tree, point)
    except (Undefined, ZeroDivisionError, OverflowError, ValueError):
        return None


def equal(a: tuple, b: tuple) -> bool:
    """Whether two expressions have the same value wherever both have one."""
    if a == b:
        return True
    exact_a, exact_b = exact(a), exact(b)
    if exact_a is not None and exact_b is not None:
        return exact_a == exact_b
    pairs = _sample_pairs(a, b)
    return len(pairs) >= _needed(a, b) and all(_agree(x, y) for x, y in pairs)


def ratio(a: tuple, b: tuple) -> object | None:
    """The constant c with a = c · b at all points, or None where there is none (or either
    expression vanishes)."""
    if not symbols(a) or not symbols(b):
        return None
    pairs = [(x, y) for x, y in _sample_pairs(a, b) if not (_is_zero(x) and _is_zero(y))]
    if len(pairs) < _needed(a, b) or any(_is_zero(x) or _is_zero(y) for x, y in pairs):
        return None
    factor = None
    for x, y in pairs:
        found = Value(x.value / y.value, x.size / abs(y.value) * (y.size / abs(y.value)), True)
        if factor is not None and not _agree(factor, found):
            return None
        factor = factor or found
    return factor.value


def _sample_pairs(a, b):
    names = symbols(a) | symbols(b)
    discrete = is_discrete(a) or is_discrete(b)
    if not names:
        values = _sample(a, {}), _sample(b, {})
        return [] if None in values else [values]
    both = zip(samples(a, names, discrete), samples(b, names, discrete))
    return [(x, y) for x, y in both if x is not None and y is not None]


def _needed(a, b):
    return 4 if symbols(a) | symbols(b) else 1


def _agree(x, y):
    """Whether two values are the same but for rounding; where rounding has eaten all digits they
    are not shown to be."""
    mp, size = _context(), x.size + y.size
    known = size <= mp.mpf(10) ** 40 or size <= max(abs(x.value), abs(y.value)) * mp.mpf(10) ** 40
    return known and abs(x.value - y.value) <= size * mp.mpf(10) ** -AGREE


def sign(tree: tuple) -> int | None:
    """-1, 0 or 1 of a real constant; None for anything else."""
    value = exact(tree)
    if value is not None:
        return (value > 0) - (value < 0)
    found = None if symbols(tree) else _sample(tree, {})
    if found is None or _context().im(found.value) != 0:
        return None
    return 0 if _is_zero(found) else int(_context().sign(found.value))


def key(tree: tuple) -> str:
    """A text that expressions of the same value share: for votes."""
    value = exact(tree)
    if value is not None:
        return str(value)
    infinite = {("const", "infty"): "oo", negative(("const", "infty")): "-oo"}
    if tree in infinite:
        return infinite[tree]
    names = sorted(symbols(tree))
    found = _positive_samples(tree, names)
    simple = None if names or not found[0] else _simple_fraction(found[0])
    if simple is not None:
        return str(simple)  # \\log_2 8 shares the key of 3
    if not any(found):
        raise NotUnderstood("no value")
    shown = ["-" if value is None else _shown(value.value, value.size) for value in found]
    return (
        f"{' '.join(names)}: {hashlib.sha256(' '.join(shown).encode()).hexdigest()[:16]}"
        if names
        else shown[0]
    )


def _simple_fraction(found):
    """The fraction with a small denominator that a numeric value is but for rounding, or None."""
    mp = _context()
    if mp.im(found.value) != 0 or not mp.mpf(10) ** -6 < abs(found.value) < mp.mpf(10) ** 20:
        return None
    near = Fraction(mp.nstr(mp.re(found.value), 40)).limit_denominator(10**6)
    return (
        near if _agree(found, Value(mp.mpf(near.numerator) / near.denominator, 1, False)) else None
    )


def _positive_samples(tree, names):
    """The values where variables are positive, so that binomials and their polynomials share a key;
    also others of what folds a sign, as |x| does."""
    if not names:
        return [_sample(tree, {})]
    points = _points(names, is_discrete(tree))
    positive = [
        _sample(tree, point) for point in points if all(value > 0 for value in point.values())
    ]
    others = (
        [_sample(tree, point) for point in points if any(value < 0 for value in point.values())]
        if _folds(tree)
        else []
    )
    return positive + others if None not in others else positive


def _folds(tree):
    """Whether an absolute value or an even root of a variable is in an expression."""
    even_root = tree[0] == "pow" and (exact(tree[2]) or ONE).denominator % 2 == 0
    if (even_root or tree[:2] == ("fn", "abs")) and symbols(tree):
        return True
    return any(_folds(part) for part in tree[1:] if isinstance(part, tuple))


def _shown(value, size):
    """A value's digits, without what is rounding."""
    mp = _context()
    if size > abs(value) * mp.mpf(10) ** 20 and not abs(value) <= size * mp.mpf(10) ** -AGREE:
        raise NotUnderstood("lost digits")
    parts = [
        part if abs(part) > size * mp.mpf(10) ** -AGREE else mp.mpf(0)
        for part in (mp.re(value), mp.im(value))
    ]
    digits = [mp.nstr(part, SHOWN) for part in parts]
    return digits[0] if parts[1] == 0 else f"{digits[0]} + {digits[1]} i"


def is_positive(value: object) -> bool:
    """Whether a numeric value is real and larger than zero."""
    mp = _context()
    return abs(mp.im(value)) <= abs(value) * mp.mpf(10) ** -AGREE and mp.re(value) > 0


def direction(tree: tuple, signed: bool = False) -> str:
    """A text that all multiples of an expression share; of `signed` ones those by a positive
    factor. For votes on equations."""
    names = sorted(symbols(tree))
    found = [value for value in samples(tree, names, is_discrete(tree)) if value is not None]
    if not names or not found or _is_zero(found[0]):
        raise NotUnderstood("no direction")
    unit = abs(found[0].value) if signed else found[0].value
    shown = " ".join(_shown(value.value / unit, value.size / abs(unit)) for value in found)
    return f"{' '.join(names)}: {hashlib.sha256(shown.encode()).hexdigest()[:16]}"
