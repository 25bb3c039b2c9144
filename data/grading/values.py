"""The values of expressions at fixed pseudo-random points, computed with two precisions: what is
rounding changes with the precision, and so never passes for a value or hides one."""

import functools
import hashlib
import math
from fractions import Fraction
from typing import Any, NamedTuple

from data.grading.trees import NotUnderstood, Tree, difference, symbols

PRECISIONS = 350, 500  # digits: any number of MAX_BITS is exact
MAX_BITS = 1100
STABLE = 90  # digits that a value shares with either precision
MAX_ARGUMENT = 10**4
# What a question may cost, in microseconds as an operation takes them at these precisions: counted,
# so that a verdict depends on no clock. The benchmarks' dearest gold answer costs less than half.
BUDGET = 100_000
COSTS = {"add": 8, "mul": 10, "div": 8, "factorial": 1000, "binomial": 1000}
COST = 200  # of any other one


_left = [math.inf]  # of the budget; none is set before the first question


def begin() -> None:
    """Give a new question the whole budget; nothing that it costs was paid by the last one."""
    _left[0] = BUDGET
    equal.cache_clear()
    _function.cache_clear()


class TooMuch(NotUnderstood):
    """The budget is spent."""


class Undefined(Exception):
    """An expression has no (real) value at this point."""


@functools.cache
def _mp() -> Any:
    """A context of mpmath with our precision, apart from everybody else's."""
    from mpmath import MPContext  # not needed before the first question

    context = MPContext()
    context.dps = PRECISIONS[1]
    return context


def evaluate(tree: Tree, point: dict[str, float]) -> Any:
    """Returns the value (mpf or mpc) where each variable has the number that `point` gives it.

    Real functions of variables have real values. Raises Undefined or ZeroDivisionError.
    """
    mp = _mp()
    match tree:
        case Tree("num", value):
            return mp.mpf(value.numerator) / value.denominator
        case Tree("sym", name):
            return mp.mpf(point[name])
        case Tree("const", "infty"):
            raise Undefined
        case Tree("const", name):
            return mp.mpc(0, 1) if name == "i" else +getattr(mp, name)
    numbers = [evaluate(part, point) for part in tree.parts]
    is_real = not any(map(mp.im, numbers))
    if tree.kind == "function":
        value = _unknown_function(tree.value, numbers)
    else:
        value = _operation(tree.value, numbers, is_real)
    if not mp.isfinite(value) or (value and mp.mag(value) > MAX_BITS):
        raise Undefined
    if is_real and mp.im(value) and symbols(tree):
        raise Undefined
    return value


def _unknown_function(name: str, numbers: list) -> Any:
    """A function that depends on its name alone."""
    inside = sum(number * (_draw(f"{name} {i}") + 1) for i, number in enumerate(numbers))
    return inside**3 + inside + _draw(name)


def _pay(name: str) -> None:
    _left[0] -= COSTS.get(name, COST)
    if _left[0] < 0:
        raise TooMuch


def _operation(name: str, numbers: list, is_real: bool) -> Any:
    mp = _mp()
    if name not in ("add", "mul", "div"):
        return _function(name, is_real, mp.prec, *numbers)
    _pay(name)
    match name:
        case "add":
            return mp.fsum(numbers)
        case "mul":
            return mp.fprod(numbers)
    return numbers[0] / numbers[1]


@functools.lru_cache(maxsize=4096, typed=True)
def _function(name: str, is_real: bool, precision: int, *numbers: Any) -> Any:
    """A dear operation, which the items of a list share."""
    mp, x = _mp(), numbers[0]
    _pay(name)
    if name in ("floor", "ceil", "factorial", "binomial") and not is_real:
        raise Undefined
    match name:
        case "pow":
            return _power(*numbers)
        case "abs":
            return abs(x)
        case "floor" | "ceil":
            nearest = mp.nint(x)
            return nearest if abs(x - nearest) < _tiny() else getattr(mp, name)(x)
        case "log":
            is_outside = x == 0
        case _:
            is_outside = any(abs(number) > MAX_ARGUMENT for number in numbers)
    if is_outside or (name == "factorial" and x < 0):
        raise Undefined
    return getattr(mp, name.replace("arc", "a"))(*numbers)


def _power(base: Any, exponent: Any) -> Any:
    mp = _mp()
    if base == 0:
        if mp.re(exponent) <= 0:
            raise Undefined
        return base
    if abs(exponent) > 30 and abs(exponent * mp.log(abs(base), 2)) > MAX_BITS:
        raise Undefined
    if not (mp.im(base) or mp.im(exponent)) and base < 0 and not mp.isint(exponent):
        for degree in (3, 5, 7, 9):  # the real root
            numerator = mp.nint(exponent * degree)
            if abs(exponent * degree - numerator) < _tiny():
                return (-1) ** int(numerator) * mp.power(-base, exponent)
    return mp.power(base, exponent)


def _tiny() -> Any:
    return _mp().mpf(10) ** -STABLE


def _draw(text: str, low: float = 0, width: float = 1, steps: float = 2**30) -> float:
    """A number from low to low + width that depends on the text alone, in binary steps."""
    digits = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:4]
    return int((low + width * int.from_bytes(digits) / 2**32) * steps) / steps


# --- rounding -------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """A value with either precision."""

    low: Any
    high: Any

    @property
    def is_zero(self) -> bool | None:
        """None where rounding has eaten the value's digits."""
        if abs(self.low - self.high) <= abs(self.high) * _tiny():
            return self.high == 0
        return abs(self.high) <= max(abs(self.low) * _tiny(), _tiny() ** 3) or None

    def divided_by(self, other: "Sample") -> "Sample":
        with _mp().workdps(PRECISIONS[0]):
            low = self.low / other.low
        return Sample(low, self.high / other.high)


def _sample(tree: Tree, point: dict[str, float]) -> Sample | None:
    """The value at a point; None where there is none."""
    try:
        with _mp().workdps(PRECISIONS[0]):
            low = evaluate(tree, point)
        return Sample(low, evaluate(tree, point))
    except (Undefined, ZeroDivisionError, OverflowError, ValueError):
        return None


def sign(tree: Tree) -> int | None:
    """Returns -1, 0 or 1 of a real constant; None of anything else."""
    found = None if symbols(tree) else _sample(tree, {})
    if found is None or found.is_zero is None:
        return None
    real, imaginary = _mp().re(found.high), _mp().im(found.high)
    if abs(imaginary) > abs(found.high) * _tiny():
        return None
    return 0 if found.is_zero else int(_mp().sign(real))


# --- comparing ------------------------------------------------------------------------------------


def _points(*trees: Tree) -> list[dict[str, float]]:
    """Points at which expressions are compared: positive, of either sign, and whole ones."""
    names = sorted(set().union(*map(symbols, trees)))
    if not names:
        return [{}]
    shapes = [("positive", 0.2, 4, 2**20)] * 3 + [("mixed", -3, 6, 2**20)] * 4
    shapes += [("whole", 2, 29, 1)] * 5
    points = []
    for i, (kind, *shape) in enumerate(shapes):
        points.append({name: _draw(f"{name} {kind} {i}", *shape) for name in names})
    return points


@functools.lru_cache(maxsize=4096)
def equal(a: Tree, b: Tree) -> bool:
    """Whether two expressions have the same value wherever both have one, at enough points."""
    if a == b:
        return True
    points, known = _points(a, b), 0
    for point in points:
        if sample := _sample(difference(a, b), point):
            known += 1
            if not sample.is_zero:  # unequal ones, as most are, cost one point
                return False
    return known >= min(4, len(points))


def proportional(a: Tree, b: Tree) -> bool:
    """Whether a = c · b at all points with one constant c, and neither vanishes."""
    if not symbols(a) or not symbols(b):
        return False
    first, known = None, 0
    for point in _points(a, b):
        x, y = _sample(a, point), _sample(b, point)
        if x is None or y is None or (x.is_zero and y.is_zero):
            continue
        if x.is_zero is not False or y.is_zero is not False:
            return False
        quotient = x.divided_by(y)
        first, known = first or quotient, known + 1
        if not Sample(first.low - quotient.low, first.high - quotient.high).is_zero:
            return False
    return known >= 4


# --- votes ----------------------------------------------------------------------------------------


def key(tree: Tree, scaled: bool = False) -> str:
    """Returns a text that expressions of the same value share; with `scaled` all multiples do."""
    samples = [_sample(tree, point) for point in _points(tree)]
    known = [sample for sample in samples if sample and not (scaled and sample.is_zero)]
    if not known:
        raise NotUnderstood("no value")
    shown = []
    for sample in samples:
        if sample and scaled:
            sample = sample.divided_by(known[0])
        shown.append(_shown(sample) if sample else "-")
    names = sorted(symbols(tree))
    if not names:
        return shown[0]
    return f"{' '.join(names)}: {hashlib.sha256(' '.join(shown).encode()).hexdigest()[:16]}"


def _shown(sample: Sample) -> str:
    """A value's digits without what is rounding: a simple fraction where it is one."""
    mp, zero, value = _mp(), sample.is_zero, sample.high
    if zero is None:
        raise NotUnderstood("lost digits")
    digits = []
    for part in (mp.re(value), mp.im(value)):
        if zero or abs(part) <= abs(value) * _tiny():
            part = mp.mpf(0)
        near = Fraction(mp.nstr(part, STABLE)).limit_denominator(10**6)
        is_near = abs(part * near.denominator - near.numerator) <= abs(part) * _tiny() * 10**8
        digits.append(str(near) if is_near else mp.nstr(part, STABLE - 5))
    return digits[0] if digits[1] == "0" else f"{digits[0]} + {digits[1]} i"
