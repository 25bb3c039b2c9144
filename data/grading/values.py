"""The values of expressions at fixed pseudo-random points, computed with two precisions: what is
rounding changes with the precision, and so never passes for a value or hides one."""

import functools
import hashlib
from fractions import Fraction

from data.grading.reader import negative, symbols
from data.grading.tokens import NotUnderstood

PRECISIONS = 350, 500  # digits: any number of MAX_BITS is exact
MAX_BITS = 1100
STABLE = 90  # digits that a value shares with either precision
MAX_ARGUMENT = 10**4


class Undefined(Exception):
    """An expression has no (real) value at this point."""


@functools.cache
def _mp():
    """A context of mpmath with our precision, apart from everybody else's."""
    from mpmath import MPContext  # not needed before the first question

    context = MPContext()
    context.dps = PRECISIONS[1]
    return context


def evaluate(tree: tuple, point: dict) -> object:
    """The value (mpf or mpc) where each variable has the number that `point` gives it; raises
    Undefined or ZeroDivisionError. Real functions of variables have real values."""
    mp, (kind, *parts) = _mp(), tree
    if kind == "num":
        return mp.mpf(parts[0].numerator) / parts[0].denominator
    if kind == "sym":
        return mp.mpf(point[parts[0]])
    if kind == "const":
        if parts[0] not in ("pi", "e", "i"):
            raise Undefined
        return mp.mpc(0, 1) if parts[0] == "i" else +getattr(mp, parts[0])
    name = parts.pop(0) if kind == "fn" else kind
    numbers = [evaluate(part, point) for part in parts]
    real = not any(map(mp.im, numbers))
    value = _operation(name, numbers, real)
    if not mp.isfinite(value) or value and mp.mag(value) > MAX_BITS:
        raise Undefined
    if real and mp.im(value) and point and symbols(tree):
        raise Undefined
    return value


def _operation(name, numbers, real):
    mp, x = _mp(), numbers[0]
    if name in ("add", "mul"):
        return mp.fsum(numbers) if name == "add" else mp.fprod(numbers)
    if name == "div":
        return x / numbers[1]
    if name == "pow":
        return _power(*numbers)
    if name == "abs":
        return abs(x)
    if name.startswith("unknown"):
        inside = sum(number * (_draw(f"{name} {i}") + 1) for i, number in enumerate(numbers))
        return inside**3 + inside + _draw(name)
    if name in ("floor", "ceil", "factorial", "binomial") and not real:
        raise Undefined
    if name in ("floor", "ceil"):
        nearest = mp.nint(x)
        close = abs(x - nearest) < mp.mpf(10) ** -STABLE
        return nearest if close else getattr(mp, name)(x)
    too_large = name != "log" and any(abs(number) > MAX_ARGUMENT for number in numbers)
    if too_large or name == "factorial" and x < 0 or name == "log" and x == 0:
        raise Undefined
    return getattr(mp, "a" + name[3:] if name.startswith("arc") else name)(*numbers)


def _power(base, exponent):
    mp = _mp()
    if base == 0:
        if mp.re(exponent) <= 0:
            raise Undefined
        return base
    if abs(exponent) > 30 and abs(exponent * mp.log(abs(base), 2)) > MAX_BITS:
        raise Undefined
    if not mp.im(base) and not mp.im(exponent) and base < 0 and not mp.isint(exponent):
        for degree in (3, 5, 7, 9):  # the real root
            over = mp.nint(exponent * degree)
            if abs(exponent * degree - over) < mp.mpf(10) ** -STABLE:
                return (-1) ** int(over) * mp.power(-base, exponent)
    return mp.power(base, exponent)


def _draw(text, low=0, width=1, steps=2**30):
    """A number from low to low + width that depends on the text alone, in binary steps."""
    digits = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:4]
    return int((low + width * int.from_bytes(digits) / 2**32) * steps) / steps


# --- rounding -------------------------------------------------------------------------------------


def _sample(tree, point):
    """The value with either precision; None where there is none."""
    found = []
    try:
        for digits in PRECISIONS:
            with _mp().workdps(digits):
                found.append(evaluate(tree, point))
    except (Undefined, ZeroDivisionError, OverflowError, ValueError):
        return None
    return found


def _unit():
    return _mp().mpf(10) ** -STABLE


def _is_zero(found):
    """Whether a value is zero; None where rounding has eaten its digits."""
    low, high = found
    if abs(low - high) <= abs(high) * _unit():
        return high == 0
    return abs(high) <= max(abs(low) * _unit(), _unit() ** 3) or None


def _divided(x, y):
    """The quotient of two values, with either precision."""
    found = []
    for digits, over, under in zip(PRECISIONS, x, y):
        with _mp().workdps(digits):
            found.append(over / under)
    return found


def sign(tree: tuple) -> int | None:
    """-1, 0 or 1 of a real constant; None for anything else."""
    found = None if symbols(tree) else _sample(tree, {})
    zero = found and _is_zero(found)
    if zero is None or abs(_mp().im(found[1])) > abs(found[1]) * _unit():
        return None
    return 0 if zero else int(_mp().sign(_mp().re(found[1])))


# --- comparing ------------------------------------------------------------------------------------


def _points(*trees):
    """Points at which expressions are compared: positive, of either sign, and whole ones."""
    names = sorted(set().union(*map(symbols, trees)))
    if not names:
        return [{}]
    shapes = [("positive", 0.2, 4, 2**20)] * 3 + [("mixed", -3, 6, 2**20)] * 4
    shapes += [("whole", 2, 29, 1)] * 5
    return [
        {name: _draw(f"{name} {kind} {i}", *shape) for name in names}
        for i, (kind, *shape) in enumerate(shapes)
    ]


def _samples(*trees):
    """The values of trees at all points where each has one; [] where these are too few."""
    points = _points(*trees)
    found = [[_sample(tree, point) for tree in trees] for point in points]
    found = [values for values in found if None not in values]
    return found if len(found) >= min(4, len(points)) else []


@functools.lru_cache(maxsize=4096)
def equal(a: tuple, b: tuple) -> bool:
    """Whether two expressions have the same value wherever both have one."""
    if a == b:
        return True
    found = _samples(("add", a, negative(b)))
    return bool(found) and all(_is_zero(difference) for (difference,) in found)


def proportional(a: tuple, b: tuple) -> bool:
    """Whether a = c · b at all points with one constant c, and neither vanishes."""
    if not symbols(a) or not symbols(b):
        return False
    found = [pair for pair in _samples(a, b) if not all(map(_is_zero, pair))]
    if len(found) < 4 or any(_is_zero(value) is not False for pair in found for value in pair):
        return False
    first, *others = [_divided(*pair) for pair in found]
    return all(_is_zero([p - q for p, q in zip(first, other)]) for other in others)


# --- votes ----------------------------------------------------------------------------------------


def key(tree: tuple, scaled: bool = False) -> str:
    """A text that expressions of the same value share; with `scaled` all their multiples do."""
    found = [_sample(tree, point) for point in _points(tree)]
    known = [value for value in found if value and not (scaled and _is_zero(value))]
    if not known:
        raise NotUnderstood("no value")
    if scaled:
        found = [value and _divided(value, known[0]) for value in found]
    shown, names = [_shown(value) if value else "-" for value in found], sorted(symbols(tree))
    if not names:
        return shown[0]
    return f"{' '.join(names)}: {hashlib.sha256(' '.join(shown).encode()).hexdigest()[:16]}"


def _shown(found):
    """A value's digits without what is rounding: a simple fraction where it is one."""
    mp, zero, (_, value) = _mp(), _is_zero(found), found
    if zero is None:
        raise NotUnderstood("lost digits")
    digits = []
    for part in (mp.re(value), mp.im(value)):
        if zero or abs(part) <= abs(value) * _unit():
            part = mp.mpf(0)
        near = Fraction(mp.nstr(part, STABLE)).limit_denominator(10**6)
        close = abs(part * near.denominator - near.numerator) <= abs(part) * _unit() * 10**8
        digits.append(str(near) if close else mp.nstr(part, STABLE - 5))
    return digits[0] if digits[1] == "0" else f"{digits[0]} + {digits[1]} i"
