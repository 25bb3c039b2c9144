"""What answers are, whether two of them are equal, and a text that equal ones share.

An equation is not what stands behind its last `=`; order counts in tuples and not in sets and lists
of roots; open ends are not closed ones. A form is a nested tuple, its kind first:

value      tree                            2x + 3
named      tree, form                      y = 2x + 3, f(x) = 2x + 3
equation   trees                           left side minus right side, one for each `=`
reals      variable or None, whether it holds minus infinity's end, cuts      x > 3, (0, 1) ∪ {2}
tuple      brackets, forms                 also matrices ("matrix 2") and numerals ("52_9")
list       whether in braces, forms        roots in any order

A cut is (tree, 0 or 1): the place just before or just behind a number, where a set begins or ends.
"""

import re
from functools import cmp_to_key

from data.grading import values
from data.grading.numbers import canonical
from data.grading.reader import ARITHMETIC, negative, read, symbols
from data.grading.tokens import NotUnderstood

MAX_ITEMS = 60
INFINITY = ("const", "infty")
EMPTY, REALS = ("reals", None, False), ("reals", None, True)
NUMBER_SETS = [("sym", f"mathbb {letter}") for letter in "ZNQC"]
_SWAPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "!=": "!="}
_DIGITS = "two three four five six seven eight nine ten eleven twelve".split()
_BASES = {word: i for i, word in enumerate(_DIGITS, start=2)} | {"sixteen": 16}
_NUMERAL = re.compile(r"\(?([0-9A-Z]*[0-9][0-9A-Z]*)\)?(?:_|base)[{(]*(\w+)[)}]*")
_BUILDER = re.compile(
    r"\\\{\s*([a-z])\s*(?:\\in\s*\\mathbb\s*\{?R\}?)?\s*(?:\\mid|:|\|)(.*)\\\}", re.DOTALL
)


def parse(text: str) -> tuple:
    """The form of a whole answer; raises NotUnderstood."""
    plain = canonical(text)
    if re.fullmatch(r"[A-Za-z]{3,}", plain):
        raise NotUnderstood("a word")
    numeral = _NUMERAL.fullmatch(plain)
    if numeral and (numeral[2].lower() in _BASES or numeral[2].isdigit()):
        return _numeral(*numeral.groups())
    builder = _BUILDER.fullmatch(text.strip())
    if builder:
        form = parse(builder[2])
        if form[:2] != ("reals", builder[1]):
            raise NotUnderstood("a set")
        return ("reals", None, *form[2:])
    return _alternatives((), [read(text)])


def _numeral(digits, base):
    base = _BASES.get(base.lower()) or int(base)
    if not 2 <= base <= 36 or any(int(digit, 36) >= base for digit in digits):
        raise NotUnderstood("digits of another base")
    if base == 10:
        return ("value", read(digits))
    return ("tuple", f"{digits.lstrip('0') or '0'}_{base}")


def _alternatives(connectors, nodes):
    """A list of answers, or a single one; inequalities that 'and' or 'or' connects are one set."""
    nodes = [both for node in nodes for both in _both_signs(node)]
    if len(nodes) == 1 and nodes[0][0] == "list":
        return _alternatives(nodes[0][1], nodes[0][2:])
    if len(nodes) > MAX_ITEMS:
        raise NotUnderstood("too many")
    forms = [_form(node) for node in nodes]
    if len(forms) == 1:
        return forms[0]
    together = {"and", "\\land"} & set(connectors)
    if all(form[0] == "reals" for form in forms) and len({form[1] for form in forms}) == 1:
        name, either = forms[0][1], {"or", "\\lor"} & set(connectors)
        met = combined(all, *forms)
        if either or name is None or met[2:] == EMPTY[2:] and not together:
            return ("reals", name, *combined(any, *forms)[2:])
        return ("reals", name, *met[2:])
    if {"\\lor", "\\land"} & set(connectors):
        raise NotUnderstood("logic")
    return ("list", False, *forms)


def _both_signs(node):
    """A node with \\pm as + and as -; more than one of them have to be linked by a \\mp."""
    if node[0] == "list" or node[:2] == ("group", "\\{\\}"):
        return [node]  # {1 \pm 2, 3} is one set, whose members have the signs
    found = []
    both = [_with_sign(node, 1, found), _with_sign(node, -1, [])]
    if len(found) > 1 and len(set(found)) == 1:
        raise NotUnderstood("signs that may differ")
    return both if found else [node]


def _with_sign(node, sign, found):
    if not isinstance(node, tuple):
        return node
    parts = tuple(_with_sign(part, sign, found) for part in node)
    if node[:1] != ("pm",):
        return parts
    found.append(node[1])
    return parts[2] if node[1] == sign else negative(parts[2])


def _form(node):
    kind = node[0]
    if kind in _READERS:
        return _READERS[kind](*node[1:])
    if node in (("sym", "mathbb R"), ("sym", "\\emptyset")):
        return REALS if node[1] == "mathbb R" else EMPTY
    return ("value", _arithmetic(node))


def _arithmetic(tree):
    """The tree itself, which has to be an expression."""
    if tree[0] in ARITHMETIC:
        for part in tree[1:]:
            if isinstance(part, tuple):
                _arithmetic(part)
    elif tree[0] not in ("num", "sym", "const"):
        raise NotUnderstood(tree[0])
    return tree


def _group(brackets, node):
    """A tuple, an interval, or a set in braces."""
    connectors, nodes = (node[1], node[2:]) if node[0] == "list" else ((), (node,))
    if brackets == "\\{\\}":
        form = _alternatives(connectors, nodes)
        return ("list", True, *(form[2:] if form[:2] == ("list", False) else [form]))
    if len(nodes) < 2 or not set(connectors) <= {",", ";"}:
        raise NotUnderstood("brackets")
    if len(nodes) == 2 and (brackets not in ("()", "\\langle\\rangle") or INFINITY in nodes):
        return interval(*nodes, brackets[0] == "[", brackets[-1] == "]")
    return ("tuple", "()" if brackets == "\\langle\\rangle" else brackets, *map(_form, nodes))


def _matrix(rows, *cells):
    return ("tuple", f"matrix {rows}", *(("value", _arithmetic(cell)) for cell in cells))


def _ratio(_, first, *others):
    """3:2:1, whose members count up to a factor."""
    parts = [("div", _arithmetic(other), _arithmetic(first)) for other in others]
    return ("tuple", ":", *(("value", part) for part in parts))


def _set_operation(operators, *nodes):
    sets = [as_reals(_form(node), points=True) for node in nodes]
    if None in sets or len(set(operators)) > 1:
        raise NotUnderstood("no set")
    if operators[0] == "\\cup":
        return combined(any, *sets)
    if operators[0] == "\\setminus":
        sets[1:] = map(_complement, sets[1:])
    return combined(all, *sets)


# --- relations ------------------------------------------------------------------------------------


def _relation(signs, *sides):
    if signs == ("\\in",):
        return _membership(*sides)
    if set(signs) == {"="}:
        return _equation(sides)
    if len(signs) > 2 or {"=", "\\in"} & set(signs):
        raise NotUnderstood("a chain of mixed relations")
    trees = [_arithmetic(side) for side in sides]
    bounds = [_isolated(*pair) for pair in zip(trees, signs, trees[1:])]
    if None not in bounds and len({form[1] for form in bounds}) == 1:
        return ("reals", bounds[0][1], *combined(all, *bounds)[2:])
    raise NotUnderstood("an inequality that is not solved")


def _isolated(left, sign, right):
    """The reals of `name < constant`, of `constant > name` and of |name| < constant; None of
    another relation."""
    if not symbols(left):
        left, sign, right = right, _SWAPPED[sign], left
    inner = left[2] if left[:2] == ("fn", "abs") else left
    if inner[0] != "sym" or symbols(right):
        return None
    form = _ray(sign, right)
    if inner is not left:
        rule = all if sign in ("<", "<=", "!=") else any
        form = combined(rule, form, _ray(_SWAPPED[sign], negative(right)))
    return ("reals", inner[1], *form[2:])


def _ray(sign, bound):
    if sign == "!=":
        return ("reals", None, True, (bound, 0), (bound, 1))
    return ("reals", None, sign[0] == "<", (bound, int(sign in ("<=", ">"))))


def _membership(left, right):
    form = _form(right)
    if left[0] != "sym":
        raise NotUnderstood("what is in the set")
    if right in NUMBER_SETS or form[:2] == ("list", True):
        return ("named", left, form)
    form = as_reals(form)
    if form is None:
        raise NotUnderstood("a set")
    return ("reals", left[1], *form[2:])


def _equation(sides):
    """name = value (also the first and the last of a chain), f(x) = value, or the sides of an
    equation."""
    first, last = sides[0], sides[-1]
    if first[:2] == ("group", "()") and all(node[0] == "sym" for node in first[2][2:]):
        form, names = _form(last), first[2][2:]
        if form[0] != "tuple" or len(form) - 2 != len(names):
            raise NotUnderstood("a tuple of another length")
        return ("list", False, *(("named", *pair) for pair in zip(names, form[2:])))
    for name, value in ((first, last), (last, first)):
        # x = 5 + 13 = 18 names x; a line (x - 1)/2 = y/3 = z has three sides
        chained = name is first and all(values.equal(side, last) for side in sides[1:-1])
        if _is_name(name) and (len(sides) == 2 or chained):
            form = _form(value)
            if form[0] != "value" or name[0] == "fn" or not symbols(name) & symbols(value):
                return ("named", name, form)
    trees = [_arithmetic(side) for side in sides]
    if not any(map(symbols, trees)):
        if first[0] == "num":
            raise NotUnderstood("no arithmetic")  # 0 = 0
        return ("value", last)  # 16 + 2 = 18
    return ("equation", *(("add", a, negative(b)) for a, b in zip(trees, trees[1:])))


def _is_name(tree):
    """Whether a side is x, e, or f(x)."""
    function = tree[0] == "fn" and tree[1].startswith("unknown")
    if function:
        return all(argument[0] == "sym" for argument in tree[2:])
    return tree[0] == "sym" or tree in (("const", "e"), ("const", "i"))


_READERS = {
    "list": lambda connectors, *nodes: _alternatives(connectors, nodes),
    "group": _group,
    "matrix": _matrix,
    "ratio": _ratio,
    "set": _set_operation,
    "relation": _relation,
}

# --- sets of real numbers -------------------------------------------------------------------------


def _order(a, b):
    """The order of two cuts: -1, 0 or 1."""
    if not values.equal(a[0], b[0]):
        difference = values.sign(("add", a[0], negative(b[0])))
        if not difference:
            raise NotUnderstood("bounds without an order")
        return difference
    return a[1] - b[1]


def interval(low: tuple, high: tuple, low_closed: bool, high_closed: bool) -> tuple:
    """The form of an interval. INFINITY has no order, so it has to be at its open end."""
    below = low == negative(INFINITY) and not low_closed
    cuts = [] if below else [(_arithmetic(low), int(not low_closed))]
    if high != INFINITY or high_closed:
        cuts.append((_arithmetic(high), int(high_closed)))
    if len(cuts) == 2 and not (symbols(low) or symbols(high)) and _order(*cuts) >= 0:
        raise NotUnderstood("nothing between its ends")  # (0, 0) is a point of the plane
    return ("reals", None, below, *cuts)


def as_reals(form: tuple, points: bool = False) -> tuple | None:
    """The set of real numbers that a form is, or None: (1, 2) as an open interval, and with
    `points` {1, 2}."""
    if form[0] == "reals":
        return form
    if form[:2] == ("tuple", "()") and [part[0] for part in form[2:]] == ["value"] * 2:
        return interval(form[2][1], form[3][1], False, False)
    if points and form[:2] == ("list", True) and all(part[0] == "value" for part in form[2:]):
        cuts = [[(part[1], 0), (part[1], 1)] for part in form[2:]]
        return combined(any, *(("reals", None, False, *pair) for pair in cuts))
    return None


def _complement(form):
    return (*form[:2], not form[2], *form[3:])


def combined(rule: object, *forms: tuple) -> tuple:
    """The union (`any`) or intersection (`all`) of sets."""
    if len(forms) == 1:
        return forms[0]
    inside = [form[2] for form in forms]
    begins = current = rule(inside)
    events = [(cut, i) for i, form in enumerate(forms) for cut in form[3:]]
    events.sort(key=cmp_to_key(lambda a, b: _order(a[0], b[0])))
    cuts = []
    for at, (cut, i) in enumerate(events):
        inside[i] = not inside[i]
        together = at + 1 < len(events) and _order(cut, events[at + 1][0]) == 0
        if not together and rule(inside) != current:
            current = not current
            cuts.append(cut)
    return ("reals", None, begins, *cuts)


# --- comparing ------------------------------------------------------------------------------------


def compare(answer: str, gold: str) -> bool:
    """Whether the answer equals the gold one; raises NotUnderstood where either cannot be read in
    full."""
    return same(parse(gold), parse(answer))


def same(gold: tuple, answer: tuple) -> bool:
    """Whether two forms are equal."""
    kinds = {gold[0], answer[0]}
    if kinds & {"equation", "named"}:
        return _same_with_names(gold, answer)
    if kinds == {"list", "reals"} or "reals" in kinds and "list" not in kinds:
        return _same_sets(gold, answer)
    if "list" in kinds:
        return _same_lists(gold, answer)
    if len(kinds) > 1:
        return False
    if gold[0] == "tuple":
        return gold[1] == answer[1] and _in_order(gold[2:], answer[2:])
    return values.equal(gold[1], answer[1])


def _same_sets(gold, answer):
    """Sets with the same cuts. x > 3 is not y > 3, but either is the interval."""
    a, b = as_reals(gold, points=True), as_reals(answer, points=True)
    if None in (a, b) or (a[1] and b[1] and a[1] != b[1]) or a[2] != b[2] or len(a) != len(b):
        return False
    return all(p[1] == q[1] and values.equal(p[0], q[0]) for p, q in zip(a[3:], b[3:]))


def _in_order(gold, answer):
    return len(gold) == len(answer) and all(map(same, gold, answer))


def _same_with_names(gold, answer):
    """Equations. x = 5 is 5 and never y = 5; y = 2x + 3 is 2x + 3, and any equation that is a
    constant multiple of it; f(x) = 2x is f(n) = 2n."""
    if gold[0] == answer[0] == "named" and gold[1][:2] == answer[1][:2]:
        if len(gold[1]) != len(answer[1]):
            return False
        return same(gold[2], _renamed(answer[2], dict(zip(answer[1][2:], gold[1][2:]))))
    if gold[0] == answer[0] or {gold[0], answer[0]} == {"named", "equation"}:
        a, b = _as_equation(gold), _as_equation(answer)
        if None in (a, b) or len(a) != len(b):
            return False
        return all(values.proportional(p, q) for p, q in zip(a, b))
    if gold[0] == "named":
        return same(gold[2], answer)
    return answer[0] == "named" and same(gold, answer[2])


def _as_equation(form):
    """Its trees; None of x = 5, which is solved as 2x = 10 is not."""
    if form[0] == "equation":
        return form[1:]
    if form[2][0] != "value" or not symbols(form[2][1]):
        return None
    return (("add", form[1], negative(form[2][1])),)


def _renamed(tree, names):
    if tree in names:
        return names[tree]
    return tuple(_renamed(part, names) if isinstance(part, tuple) else part for part in tree)


def _same_lists(gold, answer):
    """The same members in any order; a set in braces counts each once, and is its member where it
    has but one. Names that are all different give the order."""
    forms = [form[2:] if form[0] == "list" else (form,) for form in (gold, answer)]
    for named, other in ((gold, answer), (answer, gold)):
        if _distinct_names(named) and "named" not in [part[0] for part in other[2:]]:
            in_order = other[0] == "tuple" or other[:2] == ("list", False)
            return in_order and _in_order([part[2] for part in named[2:]], other[2:])
    braces = any(form[:2] == ("list", True) for form in (gold, answer))
    if not braces and (gold[0] != answer[0] or len(gold) != len(answer)):
        return False
    counts = [[sum(same(item, x) for x in part) for part in forms] for item in forms[0] + forms[1]]
    return all(a and b if braces else a == b for a, b in counts)


def _distinct_names(form):
    """Whether a list gives several variables a value each."""
    if form[0] != "list" or any(item[0] != "named" for item in form[2:]):
        return False
    names = [item[1] for item in form[2:]]
    return len(names) > 1 and len(set(names)) == len(names)


# --- votes ----------------------------------------------------------------------------------------


def key(text: str) -> str:
    """A text that equal answers share: for votes. Raises NotUnderstood.

    A name before a value is left out, as the gold answer decides whether it has to be there:
    x = 5, y = 5 and 5 share a vote."""
    return _key(parse(text))


def _key(form):
    kind, *parts = form
    if kind == "named":
        return _key(parts[1])
    if kind == "value":
        return values.key(parts[0])
    if kind == "reals":
        ends, sides = [values.key(cut[0]) for cut in parts[2:]], [cut[1] for cut in parts[2:]]
        is_pair = sides == [1, 0] and not parts[1]  # (1, 2) may be one as well
        return f"(): {ends}" if is_pair else f"reals {parts[1]} {ends} {sides}"
    if kind == "tuple":
        return f"{parts[0]}: {[_key(part) for part in parts[1:]]}"
    if _distinct_names(form):
        by_name = sorted(parts[1:], key=lambda item: item[1])
        return _key(("tuple", "()", *(item[2] for item in by_name)))
    if kind == "list":
        keys = sorted(_key(part) for part in parts[1:])
        keys = sorted(set(keys)) if parts[0] else keys
        return keys[0] if parts[0] and len(keys) == 1 else f"list {keys}"
    return " and ".join(values.key(tree, scaled=True) for tree in parts) + " = 0"
