"""Whether two answers that were read are equal, and a text that equal answers share.

An equation is not what stands behind its last `=`; order counts in tuples and not in sets and lists
of roots; open ends are not closed ones.
"""

from data.grading import values
from data.grading.answers import parse
from data.grading.expression import symbols
from data.grading.forms import Form, real_set
from data.grading.intervals import same_set


def compare(answer: str, gold: str) -> bool:
    """Whether the answer equals the gold one; raises NotUnderstood where either cannot be read in
    full."""
    return same(parse(gold), parse(answer))


def same(gold: Form, answer: Form) -> bool:
    """Whether two forms are equal."""
    if gold.kind in ("equation", "named", "function") or answer.kind in (
        "equation",
        "named",
        "function",
    ):
        return _same_with_names(gold, answer)
    if gold.kind == "list" or answer.kind == "list":
        return _same_lists(gold, answer)
    if "reals" in (gold.kind, answer.kind) or "between" in (gold.kind, answer.kind):
        sets = real_set(gold), real_set(answer)
        return None not in sets and same_set(*sets) and _same_variable(gold, answer)
    if gold.kind != answer.kind:
        return {gold.kind, answer.kind} == {"ratio", "expression"} and _same_ratio(gold, answer)
    return _SAME[gold.kind](gold, answer)


def _same_variable(gold, answer):
    """x > 3 is not y > 3, but either is the interval."""
    names = [form.parts[1] for form in (gold, answer) if form.kind == "reals"]
    return len(names) < 2 or None in names or names[0] == names[1]


def _same_expressions(gold, answer):
    return values.equal(gold.parts[0], answer.parts[0])


def _same_relations(gold, answer):
    """Unsolved inequalities: the same up to a positive factor."""
    if gold.parts[1] != answer.parts[1]:
        return False
    factor = values.ratio(gold.parts[0], answer.parts[0])
    return factor is not None and values.is_positive(factor)


def _same_tuples(gold, answer):
    pairs = list(zip(gold.parts[1], answer.parts[1]))
    return (
        gold.parts[0] == answer.parts[0]
        and len(gold.parts[1]) == len(answer.parts[1])
        and all(same(*pair) for pair in pairs)
    )


def _same_matrices(gold, answer):
    if [len(row) for row in gold.parts] != [len(row) for row in answer.parts]:
        return False
    return all(
        same(a, b) for row, other in zip(gold.parts, answer.parts) for a, b in zip(row, other)
    )


def _is_whole(tree):
    value = values.exact(tree)
    return value is not None and value.denominator == 1


def _same_ratio(gold, answer):
    """1:2 is 2:4, and as a fraction 1/2 (but 1:1 is not 1); longer ones are the same up to a
    factor."""
    if {gold.kind, answer.kind} == {"ratio", "expression"}:
        ratio, value = (gold, answer) if gold.kind == "ratio" else (answer, gold)
        return (
            len(ratio.parts) == 2
            and not _is_whole(value.parts[0])
            and values.equal(("div", *ratio.parts), value.parts[0])
        )
    if len(gold.parts) != len(answer.parts):
        return False
    first, other = gold.parts[0], answer.parts[0]
    return all(
        values.equal(("mul", a, other), ("mul", b, first))
        for a, b in zip(gold.parts[1:], answer.parts[1:])
    )


_SAME = {
    "expression": _same_expressions,
    "relation": _same_relations,
    "tuple": _same_tuples,
    "matrix": _same_matrices,
    "ratio": _same_ratio,
    "numeral": lambda gold, answer: gold == answer,
}

# --- names and equations --------------------------------------------------------------------------


def _same_with_names(gold, answer):
    """Equations. x = 5 is 5 and never y = 5; y = 2x + 3 is 2x + 3, and any equation that is a
    constant multiple of it."""
    if gold.kind == "function" or answer.kind == "function":
        return _same_functions(gold, answer)
    if gold.kind == answer.kind == "named" and gold.parts[0] == answer.parts[0]:
        return same(gold.parts[1], answer.parts[1])
    if "equation" in (gold.kind, answer.kind) or gold.kind == answer.kind:
        return _same_equations(gold, answer)
    if gold.kind == "named":
        return same(gold.parts[1], answer)
    return same(gold, answer.parts[1])


def _same_equations(gold, answer):
    if any(_is_solved(form) for form in (gold, answer)):
        return False  # x = 5 is solved, 2x = 10 is not
    equations = [_as_equation(form) for form in (gold, answer)]
    if None in equations or len(equations[0]) != len(equations[1]):
        return False
    return all(values.ratio(a, b) is not None for a, b in zip(*equations))


def _is_solved(form):
    return form.kind == "named" and not (
        form.parts[1].kind == "expression" and symbols(form.parts[1].parts[0])
    )


def _as_equation(form):
    if form.kind == "equation":
        return form.parts
    if form.kind == "named" and form.parts[1].kind == "expression":
        name = ("const", form.parts[0]) if form.parts[0] in ("e", "i") else ("sym", form.parts[0])
        return (("add", name, values.negative(form.parts[1].parts[0])),)
    return None


def _same_functions(gold, answer):
    """f(x) = 2x is f(n) = 2n, and 2x; with y = 2x beside it the name does not matter."""
    if gold.kind == answer.kind:
        (name, arguments, tree), (other, letters, theirs) = gold.parts, answer.parts
        if name != other or len(arguments) != len(letters):
            return False
        return values.equal(tree, _renamed(theirs, dict(zip(letters, arguments))))
    function, other = (gold, answer) if gold.kind == "function" else (answer, gold)
    if other.kind == "named" and other.parts[0] in ("y", function.parts[0]):
        other = other.parts[1]
    return other.kind == "expression" and values.equal(function.parts[2], other.parts[0])


def _renamed(tree, names):
    if tree[0] == "sym":
        return ("sym", names.get(tree[1], tree[1]))
    return tuple(_renamed(part, names) if isinstance(part, tuple) else part for part in tree)


# --- lists ----------------------------------------------------------------------------------------


def _same_lists(gold, answer):
    """The same members in any order; a set in braces counts each once, and is its member where it
    has but one."""
    if "list" not in (gold.kind, answer.kind):
        raise AssertionError("one of both is a list")
    if {gold.kind, answer.kind} & {"reals", "between"}:
        sets = real_set(gold, points=True), real_set(answer, points=True)
        return None not in sets and same_set(*sets)
    if answer.kind == "tuple" and _distinct_names(gold):
        return _in_order([form.parts[1] for form in gold.parts[1]], answer.parts[1])
    if gold.kind == "tuple" and _distinct_names(answer):
        return _in_order(gold.parts[1], [form.parts[1] for form in answer.parts[1]])
    lists = [form.parts[1] if form.kind == "list" else (form,) for form in (gold, answer)]
    braces = [form.kind == "list" and form.parts[0] for form in (gold, answer)]
    if any(braces):
        lists = [_without_repeats(forms) for forms in lists]
    elif "list" not in (gold.kind, answer.kind) or gold.kind != answer.kind:
        return False
    for names, bare in ((0, 1), (1, 0)):
        if _distinct_names((gold, answer)[names]) and not any(
            form.kind == "named" for form in lists[bare]
        ):
            return _in_order(
                *(
                    [form.parts[1] if form.kind == "named" else form for form in forms]
                    for forms in lists
                )
            )
    return _same_members(*lists)


def _distinct_names(form):
    """Whether a list gives several variables a value each."""
    if form.kind != "list" or any(item.kind != "named" for item in form.parts[1]):
        return False
    names = [item.parts[0] for item in form.parts[1]]
    return len(names) > 1 and len(set(names)) == len(names)


def _in_order(gold, answer):
    return len(gold) == len(answer) and all(same(a, b) for a, b in zip(gold, answer))


def _same_members(gold, answer):
    left = list(answer)
    if len(left) != len(gold):
        return False
    for item in gold:
        match = next((i for i, other in enumerate(left) if same(item, other)), None)
        if match is None:
            return False
        del left[match]
    return True


def _without_repeats(forms):
    found = []
    for form in forms:
        if not any(same(form, other) for other in found):
            found.append(form)
    return found


# --- votes ----------------------------------------------------------------------------------------


def key(text: str) -> str:
    """A text that equal answers share: for votes. Raises NotUnderstood.

    A name before a value is left out, as the gold answer decides whether it has to be there:
    x = 5, y = 5 and 5 share a vote.
    """
    return _key(parse(text))


def _key(form):
    kind, parts = form
    if kind == "named":
        return _key(
            parts[1]
        )  # the gold answer decides whether the name has to be there; a vote cannot know
    if kind == "function":
        return _key(Form("expression", (parts[2],)))
    if kind == "expression":
        return values.key(parts[0])
    if kind in ("reals", "between"):
        return " u ".join(_piece_key(piece) for piece in real_set(form)) or "empty"
    if kind == "tuple":
        return f"({', '.join(_key(part) for part in parts[1])})"
    if _distinct_names(form):
        by_name = sorted(parts[1], key=lambda item: item.parts[0])
        return _key(Form("tuple", (False, tuple(item.parts[1] for item in by_name))))
    if kind == "list":
        keys = sorted(_key(part) for part in parts[1])
        keys = sorted(set(keys)) if parts[0] else keys
        return keys[0] if parts[0] and len(keys) == 1 else f"[{'; '.join(keys)}]"
    if kind == "matrix":
        return " / ".join(" & ".join(_key(cell) for cell in row) for row in parts)
    if kind == "numeral":
        return f"{parts[0]}_{parts[1]}"
    if kind == "equation":
        return " and ".join(values.direction(tree) for tree in parts) + " = 0"
    if kind == "relation":
        return f"{values.direction(parts[0], signed=True)} {'<=' if parts[1] else '<'} 0"
    if len(parts) == 2 and not _is_whole(("div", *parts)):
        return values.key(("div", *parts))
    return ":".join(values.key(("div", part, parts[0])) for part in parts)


def _piece_key(piece):
    low = "-oo" if piece.low is None else values.key(piece.low)
    high = "oo" if piece.high is None else values.key(piece.high)
    return f"{'[' if piece.low_closed else '('}{low}, {high}{']' if piece.high_closed else ')'}"
