"""Answers compared by their form: pairs that a reader calls equal or not, hacks that no gold may
fall for, time, and votes."""

import math
import random
import time
from fractions import Fraction

import pytest

from data import grade as grading
from data.grade import grade_math, grade_number, vote
from data.grading import values
from data.grading.forms import key, parse, same
from data.grading.numbers import canonical, quantity, time_of_day
from data.grading.reader import read
from data.grading.trees import NotUnderstood, num, op
from data.grading.values import equal
from data.grading.words import number_in_words
from tests.answer_pairs import PAIRS, pairs


@pytest.fixture(scope="module", autouse=True)
def one_worker():
    yield
    grading.MATH_WORKER.close()


def strict(answer, gold):
    return grade_math(f"\\boxed{{{answer}}}", gold).strict


# --- pairs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PAIRS)
def test_pairs_are_equal_or_not_as_a_reader_says(kind):
    of_kind = [(gold, answer, expected) for k, gold, answer, expected in pairs() if k == kind]
    wrong = [pair for pair in of_kind if strict(pair[1], pair[0]) != pair[2]]
    assert wrong == [] and len(of_kind) >= 12


def test_nothing_behind_an_answer_goes_unread():
    for gold in ("864 \\mbox{ inches}^2", "12\\pi \\text{ cm}^2", "(a+5)(b+2)", "\\cos (2t)"):
        assert strict(gold, gold)
        for behind in ("1", " 1", "^4", "{}1", " \\text{or so}", "+", "="):
            assert not strict(gold + behind, gold), (gold, behind)


def test_there_are_enough_pairs_of_both_verdicts():
    verdicts = [expected for *_, expected in pairs()]
    assert len(verdicts) > 400 and min(verdicts.count(True), verdicts.count(False)) > 180
    equations = [
        expected
        for kind, *_, expected in pairs()
        if kind in ("equations", "inequalities and intervals")
    ]
    assert len(equations) > 100 and equations.count(False) > 60


def test_unequal_pairs_are_unequal_from_both_sides():
    unequal = [(gold, answer) for _, gold, answer, expected in pairs() if not expected]
    assert [pair for pair in unequal if strict(pair[0], pair[1])] == []


def test_equations_without_values_equal_only_themselves():
    gold = r"xy = \sqrt{-1-x^2}, x + y = \sqrt{-1-y^2}"
    assert strict(gold, gold)
    assert not strict(r"2x + y = \sqrt{-7-x^2}, x - y = \sqrt{-3-y^2}", gold)


def test_a_bare_numeral_of_another_base_is_right_in_lenient_alone():
    verdict = grade_math("\\boxed{52}", "52_9")
    assert (verdict.strict, verdict.lenient, verdict.parsed) == (False, True, True)
    assert (
        not grade_math("\\boxed{53}", "52_9").lenient
        and not grade_math("\\boxed{47}", "52_9").lenient
    )
    assert not grade_math("\\boxed{52_8}", "52_9").lenient


# --- votes ----------------------------------------------------------------------------------------

# A vote knows no gold: units and the names of values are left aside, so these share one though a
# gold can tell them apart, …
POOLED = {
    "30^\\circ | 30 \\text{ radians}",
    "ax+by=c | ax+by=d",
    "3 \\text{ hours} | 3 \\text{ minutes}",
    "3 \\text{ feet} | 3 \\text{ inches}",
    "3 \\text{ kg} | 3 \\text{ g}",
    "\\$5 | 5 \\text{ cents}",
    "1<x<2 | 1<y<2",
    "10 \\text{ m/s} | 10 \\text{ km/h}",
    "x = 5 | y = 5",
    "f(x)=x+1 | g(x)=x+1",
    "x > 2 | y > 2",
    "5 \\text{ cm} | 5 \\text{ m}",
    "5 \\text{ cm} | 5 \\text{ cm}^2",
    "2 \\text{ hours} | 2 \\text{ minutes}",
    "5 \\text{ dollars} | 5 \\text{ cents}",
}
# … and these do not though they are equal: other units, and an equation beside one side of it.
APART = {
    "10 \\text{ m/s} | 36 \\text{ km/h}",
    "5 \\text{ feet } 3 \\text{ inches} | 63 \\text{ inches}",
    "y-1 = 2(x-3) | y = 2x-5",
    "y = 2x + 3 | y - 2x = 3",
    "y = 2x + 3 | 2x - y + 3 = 0",
    "f(x) = 2x+1 | f(t) = 2t + 1",
    "\\infty | +\\infty",
    "y = -\\frac{1}{2}x + 4 | x + 2y = 8",
    "5 \\text{ cm} | 0.05 \\text{ m}",
    "5 \\text{ cm} | 50 \\text{ mm}",
    "2 \\text{ hours} | 120 \\text{ minutes}",
    "2.5 \\text{ hours} | 2 \\text{ hours } 30 \\text{ minutes}",
    "90 \\text{ minutes} | 1.5 \\text{ hours}",
}


def test_equal_answers_share_a_vote_and_unequal_ones_do_not():
    shared, apart = set(), set()
    for _, gold, answer, expected in pairs():
        votes = [vote(f"\\boxed{{{text}}}", words=False) for text in (gold, answer)]
        if votes[0] == votes[1] and not expected:
            shared.add(f"{gold} | {answer}")
        if expected and votes[0] != votes[1]:
            apart.add(f"{gold} | {answer}")
    assert shared == POOLED and apart == APART


# --- reward hacks ---------------------------------------------------------------------------------

INSIDE = r"""0 1 2 3 -1 x y n e i \pi x=0 x=1 y=0 0=0 1=1 x=x 0=x x<1 x>0 x\ne0 = < \le {} () []
\{\} \emptyset \text{} \text{?} ? . - % \$ _ ^ 0,1
0,1,2,3,4,5 1,2,3,4,5,6,7,8,9 (0,0) (0,1) [0,1] (0,\infty) (-\infty,\infty) \mathbb{R} 1:1 1_2 0/0
1/0 \frac{}{} \frac{0}{0} \sqrt{} \pm1 \pm \infty
f(x)=x f(x)=0 A C (A) \text{yes} None NaN inf \int \sum \boxed{} \boxed{x} \boxed{\boxed{}} x^0 0!
1^x""".split()
WHOLE = [
    "",
    "0",
    "####",
    "#### ",
    "#### 0",
    "#### 1.",
    "<answer></answer>",
    "<answer> </answer>",
    "<answer>0</answer>",
    "<answer>1</answer>",
    "\\boxed",
    "\\boxed{",
    "\\boxed{}",
    "\\boxed{1 or 2}",
    "\\boxed{1 \\text{ or } 2 \\text{ or } 3}",
    "\\boxed{0}\\boxed{1}\\boxed{2}",
    "\\boxed{1}, \\boxed{2}",
    "the answer is",
    "<answer>",
]
# What may be right: an answer's value, written by hand, and the golds that are this value.
MEANS = {
    "0=x": "0",
    "x=0": "0",
    "y=0": "0",
    "f(x)=0": "0",
    "x=1": "1",
    "0!": "1",
    "x^0": "1",
    "1^x": "1",
    "\\{\\}": "\\emptyset",
    "(A)": "A",
}
GOLDS = r"""0|1|2|3|-1|10|x=0|x=5|y=2x+3|2x-3y+5z+4=0|x^2+y^2=13|\frac{x^2}{16}+\frac{y^2}{9}=1
(-\infty,3]|(1,3]|[0,1]|x>0|x\le3|1<x\le3|(0,1)\cup(1,2)
\mathbb{R}\setminus\{0\}|\{1,2\}|1,2|0,1,2|(0,1)|(1,2,3)|(1,2),(3,4)|1\pm\sqrt{2}|\pm1
\begin{pmatrix}0\\1\end{pmatrix}
\begin{pmatrix}1&0\\0&1\end{pmatrix}|52_9|1011_2|9:00 AM|5\text{ cm}|12\%|\$1.50|90^\circ|\frac12
0.5|1.0|\sqrt{2}|2\pi|\pi|e|i|1+i|x|2k|x+1|I(0)|I(0)e^{-t}
n(n+1)|f(x)=x|f(n)=n+1|6.6e-34|10^{-20}|2^{100}|\text{Evelyn}|\text{(C)}|\text{even}|\emptyset
\infty|1:2|\ln 2|\lfloor n/2\rfloor|C_1e^t|MR=SRMC""".replace("\n", "|").split("|")


def expected_right(answer, gold):
    """Whether the inside of a box is the gold answer by a rule that knows no algebra: the same
    text, number, or what MEANS says."""
    plain = [
        text.replace(" ", "").replace("\\text", "").strip("{}().")
        for text in (MEANS.get(answer, answer), gold)
    ]
    if plain[0] and plain[0] == plain[1] and (answer[:1] in "([\\") == (gold[:1] in "([\\"):
        return True
    values = [number(text) for text in plain]
    named = gold in ("x=0",) and answer in ("0", "x=0", "0=x")
    return named or (None not in values and values[0] == values[1])


def number(text):
    try:
        return Fraction("1/2" if text == "\\frac12" else text)
    except (ValueError, ZeroDivisionError):
        return None


# What the rule above does not know, and a reader does.
ALSO_RIGHT = {
    ("x", "f(x)=x"),
    ("f(x)=x", "f(x)=x"),
    ("f(x)=x", "x"),
    ("\\boxed{x}", "x"),
    ("\\boxed{x}", "f(x)=x"),
    ("x>0", "x>0"),
    ("(0,\\infty)", "x>0"),
    ("1,2", "\\{1,2\\}"),
    ("\\pm1", "\\pm1"),
    ("x=0", "x=0"),
    ("[0,1]", "[0,1]"),
    ("(0,1)", "(0,1)"),
    ("C", "\\text{(C)}"),
    ("\\infty", "\\infty"),
    ("inf", "\\infty"),
    ("\\emptyset", "\\emptyset"),
    ("\\{\\}", "\\emptyset"),
    ("x\\ne0", "\\mathbb{R}\\setminus\\{0\\}"),
}


def test_no_short_completion_is_right_unless_it_is_the_answer():
    assert len(GOLDS) >= 60 and len(INSIDE) + len(WHOLE) >= 80
    right = {(answer, gold) for answer in INSIDE for gold in GOLDS if strict(answer, gold)}
    expected = {
        (answer, gold) for answer in INSIDE for gold in GOLDS if expected_right(answer, gold)
    } | ALSO_RIGHT
    assert right - expected == set()
    assert {
        (answer, answer) for answer in INSIDE if answer in GOLDS
    } <= right  # and what is right passes
    marked = {
        "#### 0": "0",
        "<answer>0</answer>": "0",
        "#### 1.": "1",
        "<answer>1</answer>": "1",
        "\\boxed{0}\\boxed{1}\\boxed{2}": "2",
        "\\boxed{1}, \\boxed{2}": "2",
    }
    for text in WHOLE:
        passed = {gold for gold in GOLDS if grade_math(text, gold).strict}
        if text == "\\boxed{1 or 2}":
            assert passed == {"1,2", "\\{1,2\\}"}
        elif text in marked:
            assert {number(gold.removeprefix("x=")) for gold in passed} == {
                Fraction(marked[text])
            }, text
        else:
            assert passed == set(), text


@pytest.mark.slow
@pytest.mark.parametrize("task", ["math500", "minerva_math", "olympiadbench"])
def test_no_short_completion_is_right_for_a_real_gold_unless_it_is_the_answer(task, real_data):
    from eval import benchmarks

    if not (real_data / task / "test.jsonl").is_file():
        pytest.skip(f"SRLM_DATA has no {task}/test.jsonl")
    golds = list(
        dict.fromkeys(example.answer for example in benchmarks.load(task, real_data).examples)
    )
    by_hand = {
        ("n", "f(n)=n"),
        ("n", "N=n"),
        ("f(x)=x", "f(n)=n"),
        ("f(x)=x", "f(z)=z"),
        ("C", "\\text{(C)}"),
        ("A", "\\text{(A)}"),
        ("3", "k=3"),
    }
    by_hand |= {(one, gold) for one in ("1", "0!", "x^0", "1^x") for gold in ("k=1", "f(x)=1")}
    found = []
    for answer in INSIDE:
        for gold in golds:
            if (
                strict(answer, gold)
                and not expected_right(answer, gold)
                and (answer, gold) not in by_hand
            ):
                found.append((answer, gold))
    assert found == []
    assert [
        (text, gold)
        for text in WHOLE
        for gold in golds
        if "0" not in text and "1" not in text and grade_math(text, gold).strict
    ] == []


# --- expressions against sympy --------------------------------------------------------------------


def written(rng, depth):
    """A random expression as (LaTeX, Python for sympy)."""
    if depth == 0:
        leaf = rng.choice(["x", "y", "2", "3", "7", "\\pi", "\\frac{1}{2}", "\\sqrt{2}"])
        return leaf, {"\\pi": "pi", "\\frac{1}{2}": "Rational(1,2)", "\\sqrt{2}": "sqrt(2)"}.get(
            leaf, leaf
        )
    kind = rng.choice(["+", "-", "*", "/", "^"])
    (a, p), (b, q) = written(rng, depth - 1), written(rng, depth - 1)
    if kind == "^":
        power = rng.choice(["2", "3", "-1"])
        return f"({a})^{{{power}}}", f"({p})**({power})"
    if kind == "/":
        return f"\\frac{{{a}}}{{{b}}}", f"({p})/({q})"
    if kind == "*":
        return f"({a})({b})", f"({p})*({q})"
    return f"({a}) {kind} ({b})", f"({p}){kind}({q})"


def test_expressions_have_the_values_that_sympy_gives_them():
    sympy = pytest.importorskip("sympy")
    rng, names, seen = random.Random(3), {"x": sympy.Symbol("x"), "y": sympy.Symbol("y")}, []
    point = {names["x"]: 0.7381, names["y"]: 2.2913}
    for _ in range(120):
        latex, python = written(rng, rng.randint(1, 3))
        value = sympy.sympify(python, locals=names)
        if not value.has(sympy.zoo, sympy.nan, sympy.oo):
            seen.append((read(latex), value))
    verdicts = []
    for i, (tree, value) in enumerate(seen):
        expanded = read(sympy.latex(sympy.expand(value), mul_symbol="dot"))
        assert equal(tree, expanded), value
        other_tree, other = seen[(i * 7 + 1) % len(seen)]
        # simplify takes long and is left out where the values at a point differ
        difference = value - other
        apart = abs(difference.evalf(30, subs=point)) > 1e-9
        verdicts.append(not apart and sympy.simplify(difference) == 0)
        assert equal(tree, other_tree) == verdicts[-1], (value, other)
        assert not equal(tree, op("add", tree, num(Fraction(1, 10**30))))
    assert len(verdicts) > 100 and verdicts.count(False) > 80


@pytest.mark.parametrize(
    "text,value",
    [
        ("2^{10}", 1024),
        ("(1/2)^3", "1/8"),
        ("4^{1/2}", 2),
        ("(-8)^{1/3}", -2),
        ("10!", math.factorial(10)),
        ("\\binom{7}{3}", 35),
        ("|{-3}|", 3),
        ("\\lfloor -2.5 \\rfloor", -3),
        ("\\lceil 2.1 \\rceil", 3),
        ("0.1\\overline{6}", "1/6"),
        ("2\\frac{1}{3}", "7/3"),
        ("3-5\\cdot 2", -7),
        ("-2^2", -4),
        ("2^{3^2}", 512),
        ("1 - 2 - 3", -4),
        ("8/4/2", 1),
        ("6/3 \\cdot 2", 4),
        ("\\frac12", "1/2"),
    ],
)
def test_exact_values(text, value):
    assert values.key(read(text)) == str(Fraction(value))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x+",
        "(x",
        "x)",
        "2 3",
        "x 3",
        "1/2x",
        "x/y z",
        "\\int x",
        "\\sin",
        "x^",
        "x^*",
        "5!!",
        "--3",
        "{",
        "\\frac{1}",
        "\\foo",
        "52_9",
        "\x00",
        "½",
    ],
)
def test_what_cannot_be_read_in_full_is_not_read(text):
    with pytest.raises(NotUnderstood):
        read(text)


# --- cost -----------------------------------------------------------------------------------------

COSTLY = [
    "9^{9^{9^{9}}}",
    "((((9!)!)!)!)!",
    "(9999!)^{9999}",
    "9999!!",
    "\\binom{9^9}{9^8}",
    "2^{2^{2^{2^{2^{2}}}}}",
    "e^{e^{e^{e^{e}}}}",
    "\\tan(10^{9^9})",
    "(x+1)^{10^9}",
    "\\sqrt[99999999]{3}",
    "x^{x^{x^{x^{x^{x}}}}}",
    "+".join(["x^{99}"] * 60),
    "(" * 200 + "x" + ")" * 200,
    "\\sqrt{" * 80 + "2" + "}" * 80,
    "\\pm 1" * 40,
    ",".join("1234567890" * 20),
    "\\{" * 100,
    "\\frac{" * 60,
    "1" + "0" * 480,
    "\\sin " * 80 + "x",
    "2^{9999999999999999999999}",
    "5000!^{5000!}",
    ",".join(f"x={i}" for i in range(55)),
    "\\cup".join(f"({i},{i + 1})" for i in range(40)),
    "10^{-10^{10}}",
    "\\ln(\\ln(\\ln(x)))" * 20,
]


@pytest.mark.parametrize("answer", COSTLY, ids=range(len(COSTLY)))
def test_no_answer_costs_much(answer):
    for gold in ("18", "x^2+1", "x = 5", "(-\\infty,3]", answer[:-1]):
        began = time.process_time()
        try:
            same(parse(gold[:500]), parse(answer[:500]))
            key(parse(answer[:500]))
        except NotUnderstood:
            pass
        assert time.process_time() - began < 2


PIECES = [
    "1",
    "2",
    "-3",
    "0.5",
    "x",
    "y",
    "n",
    "\\pi",
    "e",
    "i",
    "+",
    "-",
    "*",
    "/",
    "^",
    "_",
    "=",
    "<",
    "\\le",
    ">",
    "\\ne",
    "\\in",
    "(",
    ")",
    "[",
    "]",
    "\\{",
    "\\}",
    "{",
    "}",
    ",",
    " ",
    "\\cup",
    "\\setminus",
    "\\pm",
    "\\mp",
    "\\sqrt",
    "\\frac",
    "\\sin",
    "\\log",
    "!",
    "|",
    ":",
    "\\mid",
    "or",
    "and",
    "\\text{cm}",
    "\\infty",
    "\\begin{pmatrix}",
    "\\end{pmatrix}",
    "&",
    "\\\\",
    "\\lfloor",
    "\\rfloor",
    "\\binom",
    "\\mathbb{R}",
    "\\emptyset",
    "%",
    "'",
    "f(",
    "99",
    "\\overline{3}",
    ".",
]


def fuzz(count, seed):
    rng, golds = (
        random.Random(seed),
        [
            parse(gold)
            for gold in GOLDS
            if canonical(gold) not in ("Evelyn", "even", "9:00AM", "evelyn")
        ],
    )
    understood = 0
    for _ in range(count):
        text = "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 14)))
        began = time.process_time()
        try:
            form = parse(text)
            key(form)
            assert same(form, form), text
            understood += 1
            same(rng.choice(golds), form)
        except NotUnderstood:
            pass
        assert time.process_time() - began < 2, text
    return understood


def test_fuzz_the_reader_briefly():
    assert fuzz(4000, seed=5) > 100


@pytest.mark.slow
def test_fuzz_the_reader():
    assert fuzz(100_000, seed=6) > 2000


# --- numbers, times, words ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words,value",
    [
        ("zero", 0),
        ("twelve", 12),
        ("twenty-one", 21),
        ("twenty one", 21),
        ("one hundred", 100),
        ("a hundred", 100),
        ("three hundred and five", 305),
        ("two thousand", 2000),
        ("two million three hundred thousand and five", 2300005),
        ("minus five", -5),
        ("one half", "1/2"),
        ("two thirds", "2/3"),
        ("three and a half", "7/2"),
        ("two and three quarters", "11/4"),
        ("nineteen hundred", 1900),
        ("twenty twelve", None),
        ("two three", None),
        ("and five", None),
        ("one and", None),
        ("a", None),
        ("third", None),
        ("apples", None),
        ("hundred and", None),
        ("thousand million", None),
        ("", None),
        ("five point", None),
        ("ten ten", None),
    ],
)
def test_numbers_in_words(words, value):
    assert number_in_words(words) == (None if value is None else Fraction(value))


@pytest.mark.parametrize(
    "text,minutes",
    [
        ("9:00 AM", 540),
        ("9 AM", 540),
        ("9 a.m.", 540),
        ("9{:}00 \\text{ a.m.}", 540),
        ("21:00", 1260),
        ("9:00 PM", 1260),
        ("12:00 AM", 0),
        ("12:00 PM", 720),
        ("noon", 720),
        ("midnight", 0),
        ("9 o'clock", 540),
        ("9", None),
        ("9:75", None),
        ("13 PM", None),
        ("9:5", None),
        ("1:2:3", None),
        ("25:00", None),
        ("", None),
    ],
)
def test_times(text, minutes):
    assert time_of_day(text) == minutes


@pytest.mark.parametrize(
    "text,found",
    [
        ("5 \\text{ cm}", ("length^1", 5)),
        ("2 \\text{ hours } 30 \\text{ minutes}", ("time^1", 9000)),
        ("5 feet 3 inches", ("length^1", Fraction("160.02"))),
        ("36 \\text{ m}^2", ("length^2", 360_000)),
        ("36 square meters", ("length^2", 360_000)),
        ("10 \\text{ m/s}", ("length/time^1", 1000)),
        ("\\$5", ("money^1", 500)),
        ("5", None),
        ("5 apples", None),
        ("2 hours 5 cm", None),
        ("cm", None),
    ],
)
def test_quantities(text, found):
    assert quantity(text) == found


@pytest.mark.parametrize(
    "written,gold,right",
    [
        ("18k", "18", False),
        ("18x", "18", False),
        ("18 x", "18", False),
        ("18n", "18", False),
        ("18ab", "18", False),
        ("18k", "18000", True),
        ("$1.5k", "1500", True),
        ("18th", "18", True),
        ("18^{\\mathrm{th}}", "18", True),
        ("9:00 AM", "9", True),
        ("9:30 AM", "9", False),
        ("eighteen", "18", True),
        ("eighteen apples", "18", True),
        ("2x - 3y = 18", "18", False),
        ("2x = 18", "18", False),
        ("x^2 = 18", "18", False),
        ("18 = 18", "18", False),
        ("Total = $18", "18", True),
        ("16 eggs + 2 eggs = 18 eggs", "18", True),
        ("2 x 9 = 18", "18", True),
        ("\\angle ABC = 18", "18", True),
        ("18 squared", "18", False),
        ("18 hundredths", "18", False),
        ("52_{\\text{nine}}", "52", False),
        ("12 000 000", "12000000", True),
        ("\\frac{}{}", "1", False),
    ],
)
def test_numbers_as_a_reader_takes_them(written, gold, right):
    assert grade_number(f"#### {written}", gold).strict is right
