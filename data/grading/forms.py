r"""What answers are, whether two of them are equal, and a text that equal ones share.

An equation is not what stands behind its last `=`; order counts in tuples and not in sets and lists
of roots; open ends are not closed ones. The form of an expression (2x + 3) is its tree, that of an
inequality or interval is Reals, and the others are the classes below.
"""

import re
from itertools import chain, pairwise
from typing import Any, NamedTuple, TypeAlias

from data.grading import values
from data.grading.numbers import canonical
from data.grading.reader import read
from data.grading.reals import ALL_REALS, EMPTY, Reals, combined, interval, point, ray
from data.grading.trees import INFINITY, NotUnderstood, Tree, difference, negative, op, symbols

MAX_ITEMS = 60


class Named(NamedTuple):
    """x = 5 or f(x) = 2x + 3: a variable or an unknown function of variables, and its value."""

    name: Tree
    value: "Form"


class Equation(NamedTuple):
    """x^2 + y^2 = 1: left side minus right side, one for each `=`."""

    trees: tuple[Tree, ...]


class Items(NamedTuple):
    """Several answers in one.

    kind: "list" for roots in any order (1, 2), "set" for the same in braces. In these the order
        counts: the brackets of a tuple, "matrix 2" for one of two rows, ":" for a ratio, and
        "52_9" without items for a numeral of another base.
    """

    kind: str
    items: tuple["Form", ...] = ()

    @property
    def is_ordered(self) -> bool:
        return self.kind not in ("list", "set")


Form: TypeAlias = Tree | Named | Equation | Reals | Items

NUMBER_SETS = [Tree("sym", f"mathbb {letter}") for letter in "ZNQC"]
_SWAPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "!=": "!="}
_DIGITS = "two three four five six seven eight nine ten eleven twelve".split()
_BASES = {word: i for i, word in enumerate(_DIGITS, start=2)} | {"sixteen": 16}
_NUMERAL = re.compile(r"\(?([0-9A-Z]*[0-9][0-9A-Z]*)\)?(?:_|base)[{(]*(\w+)[)}]*")
_BUILDER = re.compile(
    r"\\\{\s*([a-z])\s*(?:\\in\s*\\mathbb\s*\{?R\}?)?\s*(?:\\mid|:|\|)(.*)\\\}", re.DOTALL
)


def parse(text: str) -> Form:
    """Returns the form of a whole answer; raises NotUnderstood."""
    plain = canonical(text)
    if re.fullmatch(r"[A-Za-z]{3,}", plain):
        raise NotUnderstood("a word")
    numeral = _NUMERAL.fullmatch(plain)
    if numeral and (numeral[2].lower() in _BASES or numeral[2].isdigit()):
        return _numeral(numeral[1], numeral[2].lower())
    builder = _BUILDER.fullmatch(text.strip())
    if builder is None:
        return _alternatives(read(text))
    form = parse(builder[2])
    if not isinstance(form, Reals) or form.variable != builder[1]:
        raise NotUnderstood("a set")
    return form._replace(variable=None)


def _numeral(digits: str, base_name: str) -> Form:
    base = _BASES.get(base_name) or int(base_name)
    if not 2 <= base <= 36 or int(max(digits), 36) >= base:
        raise NotUnderstood("digits of another base")
    if base == 10:
        return read(digits)
    return Items(f"{digits.lstrip('0') or '0'}_{base}")


def _alternatives(node: Tree) -> Form:
    """A list of answers, or a single one; inequalities that 'and' or 'or' connect are one set."""
    connectors, members = set(), (node,)
    if node.kind == "list":
        connectors, members = set(node.value), node.parts
    signed = list(chain(*map(_both_signs, members)))
    if len(signed) > MAX_ITEMS:
        raise NotUnderstood("too many")
    forms = tuple(map(_form, signed))
    if len(forms) == 1:
        return forms[0]
    sets = [form for form in forms if isinstance(form, Reals)]
    if len(sets) == len(forms) and len({form.variable for form in sets}) == 1:
        both = combined(all, sets)
        is_union = connectors & {"or", "\\lor"} or both.variable is None
        is_possible = both.begins_inside or both.cuts or connectors & {"and", "\\land"}
        if is_union or not is_possible:
            return combined(any, sets)
        return both
    if connectors & {"\\lor", "\\land"}:
        raise NotUnderstood("logic")
    return Items("list", forms)


def _both_signs(node: Tree) -> list[Tree]:
    r"""A node with \pm as + and as -; more than one of them have to be linked by a \mp."""
    if (node.kind, node.value) == ("group", "\\{\\}"):
        return [node]  # {1 \pm 2, 3} is one set, whose members have the signs
    found = []
    both = [_with_sign(node, 1, found), _with_sign(node, -1, [])]
    if len(found) > 1 and len(set(found)) == 1:
        raise NotUnderstood("signs that may differ")
    return both if found else [node]


def _with_sign(node: Tree, sign: int, found: list[int]) -> Tree:
    parts = tuple(_with_sign(part, sign, found) for part in node.parts)
    if node.kind != "pm":
        return Tree(node.kind, node.value, parts)
    found.append(node.value)
    return parts[0] if node.value == sign else negative(parts[0])


def _form(node: Tree) -> Form:
    """The form of anything but a list."""
    match node:
        case Tree("relation", ("\\in",), (left, right)):
            return _membership(left, right)
        case Tree("relation", signs, sides):
            return _equation(sides) if set(signs) == {"="} else _inequality(signs, sides)
        case Tree("set", operators, parts):
            return _set_operation(set(operators), parts)
        case Tree("ratio", _, parts):  # 3:2:1, whose members count up to a factor
            first, *others = map(_expression, parts)
            return Items(":", tuple(op("div", other, first) for other in others))
        case Tree("matrix", rows, cells):
            return Items(f"matrix {rows}", tuple(map(_expression, cells)))
        case Tree("group", "\\{\\}", (inside,)):
            form = _alternatives(inside)
            is_list = isinstance(form, Items) and form.kind == "list"
            return form._replace(kind="set") if is_list else Items("set", (form,))
        case Tree("group", brackets, (Tree("list", signs, parts),)) if set(signs) <= {",", ";"}:
            return _tuple_or_interval(brackets, parts)
        case Tree("sym", "mathbb R"):
            return ALL_REALS
        case Tree("sym", "\\emptyset"):
            return EMPTY
    return _expression(node)


def _expression(tree: Tree) -> Tree:
    """The tree itself, which has to be an expression."""
    if tree.kind not in ("num", "sym", "const", "op", "function"):
        raise NotUnderstood(tree.kind)
    for part in tree.parts:
        _expression(part)
    return tree


def _tuple_or_interval(brackets: str, members: tuple[Tree, ...]) -> Form:
    is_round = brackets in ("()", "\\langle\\rangle")
    if len(members) == 2 and (not is_round or INFINITY in members):
        low, high = map(_expression, members)
        return interval(low, high, brackets[0] == "[", brackets[-1] == "]")
    return Items("()" if is_round else brackets, tuple(map(_form, members)))


def _set_operation(operators: set[str], parts: tuple[Tree, ...]) -> Form:
    if len(operators) > 1:
        raise NotUnderstood("operators that differ")
    sets = []
    for part in parts:
        form = as_reals(_form(part), points=True)
        if form is None:
            raise NotUnderstood("no set")
        if sets and operators == {"\\setminus"}:
            form = form._replace(begins_inside=not form.begins_inside)
        sets.append(form)
    return combined(any if operators == {"\\cup"} else all, sets)._replace(variable=None)


# --- relations ------------------------------------------------------------------------------------


def _inequality(signs: tuple[str, ...], sides: tuple[Tree, ...]) -> Form:
    if len(signs) > 2 or {"=", "\\in"} & set(signs):
        raise NotUnderstood("a chain of mixed relations")
    pairs = pairwise(map(_expression, sides))
    sets = [_isolated(left, sign, right) for (left, right), sign in zip(pairs, signs, strict=True)]
    if len({form.variable for form in sets}) > 1:
        raise NotUnderstood("an inequality that is not solved")
    return combined(all, sets)


def _isolated(left: Tree, sign: str, right: Tree) -> Reals:
    """The set of `name < constant`, of `constant > name` or of |name| < constant."""
    if not symbols(left):
        left, sign, right = right, _SWAPPED[sign], left
    match left:
        case Tree("sym", name) if not symbols(right):
            return ray(name, sign, right)
        case Tree("op", "abs", (Tree("sym", name),)) if not symbols(right):
            sides = [ray(name, sign, right), ray(name, _SWAPPED[sign], negative(right))]
            return combined(any if sign[0] == ">" else all, sides)
    raise NotUnderstood("an inequality that is not solved")


def _membership(left: Tree, right: Tree) -> Form:
    form = _form(right)
    reals = as_reals(form)
    if left.kind != "sym":
        raise NotUnderstood("what is in the set")
    if reals is not None:
        return reals._replace(variable=left.value)
    if right in NUMBER_SETS or (isinstance(form, Items) and form.kind == "set"):
        return Named(left, form)
    raise NotUnderstood("a set")


def _equation(sides: tuple[Tree, ...]) -> Form:
    """name = value (also the first and the last of a chain), f(x) = value, or the sides of an
    equation."""
    first, last = sides[0], sides[-1]
    match first:
        case Tree("group", "()", (Tree(_, _, names),)) if all(name.kind == "sym" for name in names):
            form = _form(last)
            if not isinstance(form, Items) or not form.is_ordered or len(form.items) != len(names):
                raise NotUnderstood("a tuple of another length")
            return Items("list", tuple(map(Named, names, form.items)))
    for name, value in ((first, last), (last, first)):
        # x = 5 + 13 = 18 names x; a line (x - 1)/2 = y/3 = z has three sides
        is_chain = name is first and all(values.equal(side, last) for side in sides[1:-1])
        if _is_name(name) and (len(sides) == 2 or is_chain):
            form = _form(value)
            is_solved = not symbols(name) & symbols(value)
            if not isinstance(form, Tree) or name.kind == "function" or is_solved:
                return Named(name, form)
    trees = [_expression(side) for side in sides]
    if any(map(symbols, trees)):
        return Equation(tuple(difference(left, right) for left, right in pairwise(trees)))
    if first.kind == "num":
        raise NotUnderstood("no arithmetic")  # 0 = 0
    return last  # 16 + 2 = 18


def _is_name(tree: Tree) -> bool:
    """Whether a side is x, e, or f(x)."""
    match tree:
        case Tree("sym") | Tree("const", "e" | "i"):
            return True
        case Tree("function", _, arguments):
            return all(argument.kind == "sym" for argument in arguments)
    return False


def as_reals(form: Form, points: bool = False) -> Reals | None:
    """The set of real numbers that a form is, or None: (1, 2) as an open interval, and with
    `points` {1, 2}."""
    match form:
        case Reals():
            return form
        case Items("()", (Tree() as low, Tree() as high)):
            return interval(low, high)
        case Items("set", items) if points:
            trees = [item for item in items if isinstance(item, Tree)]
            if len(trees) == len(items):
                return combined(any, [point(tree) for tree in trees])
    return None


# --- comparing ------------------------------------------------------------------------------------


def same(gold: Form, answer: Form) -> bool:
    """Whether two forms are equal.

    x = 5 is 5 and never y = 5; y = 2x + 3 is 2x + 3, and any equation that is a constant multiple
    of it; f(x) = 2x is f(n) = 2n. x > 3 is not y > 3, but either is the interval."""
    match gold, answer:
        case Named(a, value), Named(b, other) if a[:2] == b[:2]:  # the kind and the name itself
            names = dict(zip(b.parts, a.parts, strict=False))
            return len(a.parts) == len(b.parts) and same(value, _renamed(other, names))
        case Named() | Equation(), Named() | Equation():
            trees, others = _as_equation(gold), _as_equation(answer)
            return 0 < len(trees) == len(others) and all(map(values.proportional, trees, others))
        case Named(_, value), _:
            return same(value, answer)
        case _, Named(_, value):
            return same(gold, value)
        case (Reals(), _) | (_, Reals()):
            return _same_sets(as_reals(gold, points=True), as_reals(answer, points=True))
        case (Items("list" | "set"), Items() | Tree()) | (Items() | Tree(), Items("list" | "set")):
            return _same_lists(gold, answer)
        case Items(), Items():
            return gold.kind == answer.kind and _in_order(gold.items, answer.items)
        case Tree(), Tree():
            return values.equal(gold, answer)
    return False


def _in_order(golds: tuple[Form, ...], answers: tuple[Form, ...]) -> bool:
    return len(golds) == len(answers) and all(map(same, golds, answers))


def _same_sets(a: Reals | None, b: Reals | None) -> bool:
    if a is None or b is None or len({a.variable, b.variable} - {None}) > 1:
        return False
    same_shape = (a.begins_inside, a.sides) == (b.begins_inside, b.sides)
    return same_shape and all(map(values.equal, a.bounds, b.bounds))


def _as_equation(form: Named | Equation) -> tuple[Tree, ...]:
    """Its trees; none of x = 5, which is solved as 2x = 10 is not."""
    match form:
        case Equation(trees):
            return trees
        case Named(name, Tree() as value) if symbols(value):
            return (difference(name, value),)
    return ()


def _renamed(part: Any, names: dict[Tree, Tree]) -> Any:
    """A form, or a part of one, in which these variables have other names."""
    if not isinstance(part, tuple):
        return part
    if isinstance(part, Tree) and part in names:
        return names[part]
    renamed = [_renamed(inner, names) for inner in part]
    return tuple(renamed) if type(part) is tuple else type(part)(*renamed)


def _same_lists(gold: Items | Tree, answer: Items | Tree) -> bool:
    """The same items in any order; a set in braces counts each once, and is its item where it has
    but one. Names that are all different give the order."""
    for named, other in ((gold, answer), (answer, gold)):
        assigned = tuple(item.value for item in _assignments(named))
        items = other.items if isinstance(other, Items) else ()
        if assigned and Named not in map(type, items):
            return other.kind != "set" and _in_order(assigned, items)
    is_set = "set" in (gold.kind, answer.kind)
    golds, answers = _unordered(gold), _unordered(answer)
    if not is_set and (gold.kind != answer.kind or len(golds) != len(answers)):
        return False
    for item in golds + answers:
        wanted, found = _count(item, golds), _count(item, answers)
        if not wanted or not found or (not is_set and wanted != found):
            return False
    return True


def _count(item: Form, items: tuple[Form, ...]) -> int:
    return sum(same(item, other) for other in items)


def _unordered(form: Items | Tree) -> tuple[Form, ...]:
    return form.items if isinstance(form, Items) and not form.is_ordered else (form,)


def _assignments(form: Form) -> list[Named]:
    """The items of a list that gives several variables a value each (x = 1, y = 2), else none."""
    items = form.items if isinstance(form, Items) and form.kind == "list" else ()
    named = [item for item in items if isinstance(item, Named)]
    return named if len(items) == len({item.name for item in named}) > 1 else []


# --- votes ----------------------------------------------------------------------------------------


def key(form: Form) -> str:
    """Returns a text that equal forms share: for votes. Raises NotUnderstood.

    A name before a value is left out, as the gold answer decides whether it has to be there:
    x = 5, y = 5 and 5 share a vote."""
    match form:
        case Tree():
            return values.key(form)
        case Named(_, value):
            return key(value)
        case Reals(_, begins_inside):
            bounds = list(map(values.key, form.bounds))
            is_pair = form.sides == [1, 0] and not begins_inside  # (1, 2) may be one as well
            if is_pair:
                return f"(): {bounds}"
            return f"reals {begins_inside} {bounds} {form.sides}"
        case Equation(trees):
            return " and ".join(values.key(tree, scaled=True) for tree in trees) + " = 0"
    assigned = sorted(_assignments(form))
    if assigned:
        form = Items("()", tuple(item.value for item in assigned))
    keys = [key(item) for item in form.items]
    if form.is_ordered:
        return f"{form.kind}: {keys}"
    if form.kind == "set":
        keys = list(set(keys))
        if len(keys) == 1:
            return keys[0]
    return f"list {sorted(keys)}"
