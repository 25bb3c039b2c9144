"""Answers: found, read, compared. Tables written from the specification, real gold answers, and
strings that no one writes on purpose."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import pytest

from data import grade as grading
from data import worker as processes
from data.grade import (
    LONGEST,
    Verdict,
    format_reward,
    grade_by_math_verify,
    grade_math,
    grade_number,
    marked_answer,
    parse_number,
)
from data.grading.numbers import canonical, tidy
from data.grading.worker import MathWorker
from data.tasks import TASKS, Example, grade
from data.worker import computed
from tests.conftest import ROOT, wait_until

RIGHT, WRONG = Verdict(True, True, True), Verdict(False, False, True)
LENIENT, NOTHING = Verdict(False, True, False), Verdict(False, False, False)


# --- finding the answer ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text,found",
    [
        ("so\n#### 18", "18"),
        ("####18", "18"),
        ("####\n18\nbye", "18"),
        ("#### 3\n#### 4", "4"),
        ("####", ""),
        ("### 18", None),
        ("\\boxed{18}", "18"),
        ("\\boxed {18}", "18"),
        ("\\fbox{18}", "18"),
        ("$\\boxed 3$.", "3"),
        ("\\boxed 3 apples", "3"),
        ("\\boxed{\\frac{1}{\\sqrt{2}}}", "\\frac{1}{\\sqrt{2}}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\left\\{ 1 \\right.}", "\\left\\{ 1 \\right."),
        ("\\boxed{\\boxed{7}}", "7"),
        ("\\boxed{3} and \\boxed{4", "3"),
        ("\\boxed{3", None),
        ("\\boxedx{3}", None),
        ("\\boxed{}", ""),
        ("<answer> 6 </answer>", "6"),
        ("<answer>\n6\n7</answer>", "6\n7"),
        ("<answer>6", None),
        ("<answer>6</answer> <answer>7", "6"),
        ("#### 3 or rather \\boxed{4}", "4"),
        ("\\boxed{4} no\n#### 5 apples\nbye", "5 apples"),
        ("<answer>#### 5</answer>", "5"),
        ("<answer>It is \\boxed{5}.</answer>", "5"),
        ("#### $\\boxed{5}$", "5"),
        ("<answer>1</answer> \\boxed{2} #### 3", "3"),
        ("18", None),
        ("", None),
        ("the answer is 18", None),
    ],
)
def test_the_mark_that_begins_last_counts(text, found):
    assert marked_answer(text) == found


HEADINGS = [
    ("#### Step 1: Add\n9 + 9, so \\boxed{18}.\n\n#### Check\nIt fits.", "18"),
    ("<answer>18</answer>\n#### 2. Verify the sum\nIt fits.", "18"),
    ("\\boxed{18}\n#### Step 3", "18"),
    ("\\boxed{18}\n#### **Step 3:** check\nyes", "18"),
    ("\\boxed{18}\n\n#### 3) Done with it\nyes", "18"),
    ("\\boxed{18}\n#### 2nd way to see it\nyes", "18"),
    ("\\boxed{18}\n##### Final Answer:\nas above", "18"),
    ("\\boxed{18}\n#### Conclusion\nIt is done.", "18"),
    ("#### 18\n\n#### Explanation\nNine and nine.", "18"),
    ("#### 1. Read\nNine.\n#### 2. Compute the total\nEighteen.", None),
    ("#### 18 apples\nbye", "18 apples"),
    ("#### $1,234.50\nbye", "$1,234.50"),
    ("\\boxed{3}\n#### 18", "18"),
    ("\\boxed{3}\n#### 18.\nbye", "18."),
    ("\\boxed{3} and #### 18\nbye", "18"),
    ("#### Paris", "Paris"),
    ("#### x = 5\nbye", "x = 5"),
    ("#### -3\nbye", "-3"),
    ("#### \\frac{1}{2}\nbye", "\\frac{1}{2}"),
    ("#### **18**\nbye", "**18**"),
    ("####\n18\nbye", "18"),
    ("#### Check\n" * 300 + "x", None),
]


@pytest.mark.parametrize("text,found", HEADINGS, ids=range(len(HEADINGS)))
def test_a_heading_is_no_mark(text, found):
    assert marked_answer(text) == found


def test_the_number_of_a_heading_is_no_answer():
    assert (
        grade_number(
            "#### 1. Read\nNine and nine.\n#### 2. Compute the total\nIt is eighteen.", "2"
        )
        == NOTHING
    )
    assert (
        grade_number("#### Step 1: Read\nNine.\n#### Step 2: Compute\nSo she has 18 apples.", "18")
        == LENIENT
    )
    assert grade_number("So she has 18 apples.\n### Step 3: Check 5 times\nFine.", "18") == LENIENT
    assert grade_number("#### Step 1: Add\nSo \\boxed{18}.\n#### Check\nIt fits.", "18") == RIGHT


def test_an_answer_cut_off_counts_in_lenient_only():
    assert (
        marked_answer("<answer>7", unclosed=True) == "7"
        and marked_answer("<answer>6</answer> <answer>7", unclosed=True) == "7"
    )
    assert (
        grade_number("<answer>18", "18")
        == grade_math("<answer>\\frac{x}{2}", "\\frac x2")
        == LENIENT
    )
    assert grade_number("<answer>17", "18") == NOTHING


# --- numbers --------------------------------------------------------------------------------------


EIGHTEENS = """18|18.|18,|18:|+18|18.0|18.00|018|$18|$18.|$ 18|18$|18 $|\\$18|$\\$18$|18\\$|€18
18 €|£18|$18.00|$18$|$$18$$|\\(18\\)|\\[18\\]|{18}
18%|18\\%|18 %|18 percent|18 dollars|18 apples|18 km/h|18 m^2|18 cm³|18 sq. ft.|18kg|18-inch
18 (dollars)|18 dollars per day.|18°|18^\\circ
18^{\\circ}
**18**|**18.**|*18*|`18`|"18"|__18__|**$18**|**18** apples|\\text{18}|\\textbf{18}|18\\text{ cm}
18 \\text{ cm}^2|18\\,\\text{m}
18\\mbox{ inches}^{2}|\\mathrm{18}
x = 5 + 13 = 18|x = 18|x=18.|16 + 2 = 18|16 + 2 = $18|$x = 18$|36/2|36 / 2|\\frac{36}{2}
\\dfrac{36}{2}|17 \\frac{2}{2}|17 2/2|16,000 - 15,982 = 18
0.18 hundred|18th|18^{\\text{th}}|18 AM|18:00|eighteen|eighteen dollars|Total = 18|m\\angle A = 18
f(3) = 18|2 x 9 = 18|9 eggs + 9 eggs = 18 eggs"""


@pytest.mark.parametrize("written", [w for line in EIGHTEENS.splitlines() for w in line.split("|")])
def test_every_way_to_write_eighteen(written):
    assert grade_number(f"So it is\n#### {written}", "18") == RIGHT
    assert grade_number(f"<answer>{written}</answer>", "18") == RIGHT
    assert (
        grade_number(f"#### {written}", "19") == WRONG
        and grade_number(f"#### {written} 19", "18").strict is False
    )
    assert "=" in written or not grade_number(f"#### -{written.lstrip('+')}", "18").strict


@pytest.mark.parametrize(
    "written,value",
    [
        ("-3", -3),
        ("- 3", -3),
        ("−3", -3),
        ("− 3", -3),
        ("–3", -3),
        ("-$3", -3),
        ("$-3", -3),
        ("-\\$3", -3),
        ("-3 degrees", -3),
        ("1,000", 1000),
        ("1,234,567", 1234567),
        ("$1,234.50 dollars", "1234.5"),
        ("10,\\!080", 10080),
        ("11,\\! 111,\\! 100", 11111100),
        ("1{,}000", 1000),
        ("1\\,000", 1000),
        ("1\u202f000", 1000),
        (".5", "1/2"),
        ("-.5", "-1/2"),
        ("0", 0),
        ("-0", 0),
        ("007", 7),
        ("1/2", "1/2"),
        ("-1/2", "-1/2"),
        ("\\frac{1}{2}", "1/2"),
        ("-\\frac{1}{2}", "-1/2"),
        ("\\frac{-1}{2}", "-1/2"),
        ("\\frac12", "1/2"),
        ("\\tfrac{1}2", "1/2"),
        ("1\\frac{4}{5}", "9/5"),
        ("1 1/2 cups", "3/2"),
        ("\\frac{1,000}{3}", "1000/3"),
        ("1.5 million", 1500000),
        ("2 thousand dollars", 2000),
        ("9" * LONGEST, 10**LONGEST - 1),
        ("1e3 = 5", 5),
    ],
)
def test_numbers(written, value):
    assert parse_number(written) == Fraction(value)


@pytest.mark.parametrize(
    "written",
    """|none|.|..|-|--3|18 or 19|18 19|18, 19|18; 19|18 and 19|17 or 18|18 or so|18 and a half
18-19|16 + 2|18 + x|18 - x|1,00|1,2345|1.2.3|18..5
5:30
about 18|The answer is 18|x > 18|x >= 18|x <= 18|x != 18|x \\neq 18|x ≠ 18|≤18|x = 3, y = 18
x = 3 or x = 18|x = 3; x = 18|x = 3 and y = 18|x =|= =
1/0|0/0|18x|18 x|18ab|18/|18 squared|18 hundredths|2x = 18|x + y = 18|2x - 3y = 18|x^2 = 18
18 = 18|52_{\\text{nine}}|18 = x
\\frac{1}{0}|18\\frac{1}{0}|10^2|10^{2}|5_8|2 \\pi|2 pi|3\\sqrt{2}|1e5|18e400|nan|inf|-inf
Infinity|NaN|１８|١٨|18½|½|Ⅷ|18²²|±18|18\x00|\\frac
\\frac{1}|\\frac{}{}|\ud800""".replace("\n", "|").split("|"),
)
def test_what_is_not_one_number_is_none(written):
    assert parse_number(written) is None
    assert not grade_number(f"<answer>{written}</answer>", "18").strict


def test_the_length_of_an_answer_is_limited():
    for digits in (
        "9" * (LONGEST + 1),
        "9" * 100_000,
        "1," * 50_000,
        "0." + "3" * 100_000,
        "1/" + "7" * 100_000,
    ):
        for text in (
            f"#### {digits}",
            f"\\boxed{{{digits}}}",
            f"<answer>{digits}</answer>",
            f"the answer is {digits}",
            digits,
        ):
            assert not grade_number(text, "9").strict and not grade_math(text, "9").strict


@pytest.mark.parametrize(
    "text,verdict",
    [
        ("He has 3 and then 18.", LENIENT),
        ("18 at first, then 3.", NOTHING),
        ("No number.", NOTHING),
        ("", NOTHING),
        ("It costs $18.", LENIENT),
        ("The answer is 18. I checked it 3 times.", LENIENT),
        ("The answer is 16 + 2 = 18 dollars for 3 days.", LENIENT),
        ("So the answer is: **$18**.\nStep 9", LENIENT),
        ("The answer is:\n\n18\n\nGood day 7.", LENIENT),
        ("The answer is 17. It was 18.", NOTHING),
        ("Not 18: the Answer is 17", NOTHING),
        ("The answer is 3, no, the answer is 18.", LENIENT),
        ("The answer is clear: add.\nSo 18", LENIENT),
        ("1. Add 16.\n2. And 2\n3. get 18\n4. Done", LENIENT),
        ("he has 16-3+5=18", LENIENT),
        ("5 - 18", LENIENT),
        ("-18", NOTHING),
        ("#### The total is 18 dollars", LENIENT),
        ("#### 18 or 19", NOTHING),
        ("#### 18 or 18", LENIENT),
        ("#### done, 18\n3 more", LENIENT),
        ("x1 is 18, x2", LENIENT),
        ("so 18\n#### Note", LENIENT),
        ("#### 17\nbut 18", WRONG),
        ("so 18\n#### 17", WRONG),
        ("18 " + "x" * 20_000, NOTHING),
        ("#### 18", RIGHT),
        ("#### 19", WRONG),
        ("#### about 19", NOTHING),
    ],
)
def test_strict_lenient_and_parsed(text, verdict):
    assert grade_number(text, "18") == verdict


def test_gold_solutions_of_the_embedded_task():
    for i in range(300):
        e = TASKS["word_problems"].example("word_problems", "train", f"0/{i}")
        solution = e.messages[1]["content"]
        assert grade(e, solution) == RIGHT and grade(e, solution + "1") == WRONG
    assert (
        not grade(Example((), "\\frac12", "math"), "\\boxed{2}").strict
        and grade(Example((), "1,024", "gsm8k"), "#### $1024").strict
    )


# --- exact answers and the format -----------------------------------------------------------------


@pytest.mark.parametrize(
    "text,reward",
    [
        ("<think>a</think><answer>b</answer>", 1),
        (" \n<think>a\nb</think>\n\n<answer>\nb\n</answer>\n", 1),
        ("<think>1 < 2</think><answer>x>y</answer>", 1),
        ("", -1),
        ("b", -1),
        ("<answer>b</answer>", -1),
        ("<think>a</think>", -1),
        ("<think>a</think>b", -1),
        ("<think></think><answer>b</answer>", -1),
        ("<think>a</think><answer> \n</answer>", -1),
        ("<answer>b</answer><think>a</think>", -1),
        ("<think>a</think> so <answer>b</answer>", -1),
        ("x<think>a</think><answer>b</answer>", -1),
        ("<think>a</think><answer>b</answer>.", -1),
        ("<think>a<answer>b</answer></think>", -1),
        ("<think>a</think><answer>b", -1),
        ("<think>a<think>a</think><answer>b</answer>", -1),
        ("<Think>a</Think><answer>b</answer>", -1),
        ("<think>a</think><answer>b</answer><answer>b</answer>", -1),
        ("<think>a</think><think>a</think><answer>b</answer>", -1),
        ("<think>a</answer></think><answer>b", -1),
        ("<think>a</think><answer>b</answer>" * 2, -1),
    ],
)
def test_format_reward(text, reward):
    assert format_reward(text) == reward and isinstance(format_reward(text), float)


# --- mathematics ----------------------------------------------------------------------------------


@pytest.fixture
def no_math_verify(monkeypatch):
    def compare(*_):
        raise AssertionError("this needs no math-verify")

    monkeypatch.setattr(grading.MATH_WORKER, "compare", compare)


SAME_IN_PRINT = [
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\dfrac{\\pi}{2})"),
    ("\\frac43", "\\frac{4}{3}"),
    ("\\frac 59", "\\tfrac{5}{9}"),
    ("90^\\circ", "90"),
    ("\\text{Evelyn}", "Evelyn"),
    ("\\text{east}", "East."),
    ("4210_{5}", "4210_5"),
    ("x^{2}", "x^2"),
    ("11,\\! 111", "11111"),
    ("\\$18.90", "18.9"),
    ("864 \\mbox{ inches}^2", "864"),
    ("5.4 \\text{ cents}", "5.4"),
    ("1\\frac{4}{5}", "\\frac{9}{5}"),
    ("\\frac{270}7\\text{ degrees}", "\\frac{270}{7}"),
    ("10\\%", "10"),
    (".35625", "0.35625"),
    ("-\\frac{35}{9}", "\\frac{-35}{9}"),
    ("$p - q$", "p-q"),
    ("58,500", "58500"),
]
DIFFERENT = [
    ("18", "18 \\text{ or } 19"),
    ("x", "y"),
    ("2k", "2"),
    ("7\\pi", "7"),
    ("3R^2", "3"),
    ("5!", "5"),
    ("\\frac{1}{2}", "0.51"),
    ("(2,4)", "(4,2)"),
    ("1, 2", "12"),
    ("1 \\pm \\sqrt{19}", "1 + \\sqrt{19}"),
    ("18", "?"),
    ("\\sqrt{51}", "51"),
    ("(3,4]", "(3,4)"),
    ("-2,1", "-2"),
    ("p - q", "q - p"),
    ("18", "16}$ $18"),
]
SAME_BY_MATH = [
    ("x=5", "5"),
    ("1,-2", "-2, 1"),
    ("\\sqrt{51}", "51^{1/2}"),
    ("(a+5)(b+2)", "(b+2)(a+5)"),
    ("\\{1\\pm\\sqrt{5},-2\\}", "-2, 1+\\sqrt5, 1-\\sqrt5"),
    ("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt{3}}"),
    ("6 - 5i", "-5i + 6"),
    ("x \\in [-2,7]", "[-2,7]"),
    ("18", "20 - 2"),
    ("3", "\\sqrt{9}"),
    ("\\text{(C)}", "C"),
    ("5", "5 inches"),
    ("y = 2x + 3", "2x + 3"),
    ("5x - 7y + 11z + 4 = 0", "4 + 5x - 7y + 11z = 0"),
    ("\\cot x", "\\frac{\\cos x}{\\sin x}"),
    (
        "\\begin{pmatrix} 1/5 \\\\ -18/5 \\end{pmatrix}",
        "\\begin{bmatrix} 0.2 \\\\ -3.6 \\end{bmatrix}",
    ),
]


@pytest.mark.parametrize("gold,written", SAME_IN_PRINT)
def test_math_that_differs_in_print_alone(gold, written, no_math_verify):
    assert (
        grade_math(f"so $\\boxed{{{written}}}$.", gold)
        == grade_math(f"<answer>{gold}</answer>", written)
        == RIGHT
    )


@pytest.mark.parametrize("gold,written", DIFFERENT)
def test_math_that_differs(gold, written):
    assert not grade_math(f"<answer>{written}</answer>", gold).lenient
    assert not grade_math(f"<answer>{gold}</answer>", written).lenient


@pytest.mark.parametrize("gold,written", SAME_BY_MATH)
def test_math_that_needs_math_verify(gold, written):
    pytest.importorskip("math_verify")
    assert grade_math(f"\\boxed{{{written}}}", gold) == RIGHT


def test_unmarked_math():
    assert (
        grade_math("The answer is $18$.", "18") == LENIENT
        and grade_math("So we get 18x", "18x") == NOTHING
    )
    assert (
        grade_math("The answer is 18.", "18x")
        == grade_math("", "18")
        == grade_math("\\boxed{}", "18")
        == NOTHING
    )
    assert grade_math("18\n\\boxed{17}", "18") == WRONG  # what is marked is the answer


# --- the worker -----------------------------------------------------------------------------------


@pytest.fixture
def worker():
    pytest.importorskip("math_verify")
    w = MathWorker(limit=1.0)
    yield w
    w.close()


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A worker whose math_verify is this source."""

    def make(source, limit=5.0):
        (tmp_path / "math_verify.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return MathWorker(limit)

    return make


FAKE = """
import os, sys, time
LatexExtractionConfig = object
def parse(text, *_, **__):
    assert "torch" not in sys.modules and "numpy" not in sys.modules
    if "die" in text: os._exit(1)
    if "sleep" in text: time.sleep(60)
    if "raise" in text: raise MemoryError
    print("noise")
    return [text]
def verify(gold, answer, **_): return gold == answer
"""


def test_a_pathological_expression_times_out_from_any_thread_and_the_next_call_works(
    worker, monkeypatch
):
    monkeypatch.setattr(grading, "MATH_WORKER", worker)

    def ask():
        assert threading.current_thread() is not threading.main_thread()
        assert grade_math("\\boxed{\\sqrt{9}}", "3") == RIGHT  # starts the worker
        assert grade_by_math_verify("\\boxed{9^{9^{9^{9}}}}", "7") is False
        assert (worker.timeouts, worker.crashes) == (1, 0)
        return grade_math("\\boxed{\\sqrt{9}}", "3")

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(ask).result(300) == RIGHT
    assert grade_math("\\boxed{\\sqrt{9}}", "3") == RIGHT  # and from another thread


def test_many_threads_get_their_own_verdicts(worker):
    worker.limit = 30
    with ThreadPoolExecutor(8) as pool:
        verdicts = list(
            pool.map(lambda i: worker.compare(f"\\sqrt{{{i * i}}}", str(i + i % 2)), range(2, 34))
        )
    assert verdicts == [(True, i % 2 == 0) for i in range(2, 34)]


def test_a_worker_that_dies_hangs_or_raises(fake):
    w = fake(FAKE, limit=1.0)
    assert w.math_verify("$1$", "1") == (True, True) and w.math_verify("$1$", "2") == (True, False)
    (first,) = w.pids()
    assert (
        w.math_verify("raise", "1") == (False, False)
        and w.pids() == [first]
        and (w.timeouts, w.crashes) == (0, 0)
    )
    assert w.math_verify("die", "1") == (False, False) and (w.timeouts, w.crashes) == (0, 1)
    assert w.math_verify("$\ud800$", "\ud800") == (True, True) and w.pids() != [first]
    assert w.math_verify("sleep", "1") == (False, False) and (w.timeouts, w.crashes) == (1, 1)
    assert w.math_verify("$2$", "2") == (True, True) and w.compare("\\sqrt{9}", "3") == (True, True)
    os.kill(w.pids()[0], 9)  # from outside, between two questions
    assert w.math_verify("$3$", "3") == (True, True) and (w.timeouts, w.crashes) == (1, 1)
    w.close()
    assert w.pids() == []


def test_no_verdict_depends_on_a_clock(worker, monkeypatch):
    """On a busy machine, or in a job that a scheduler suspends, a process computes late."""
    assert worker.compare("\\sqrt{9}", "3") == (True, True)
    (pid,), looks = worker.pids(), []

    def looked(number):
        looks.append(number)
        if len(looks) == 3:  # the first two are before the question and after its time
            os.kill(pid, signal.SIGCONT)
        return computed(number)

    monkeypatch.setattr(processes, "computed", looked)
    worker.limit = 2.0
    os.kill(pid, signal.SIGSTOP)
    assert worker.compare("\\sqrt{16}", "4") == (True, True) and worker.pids() == [pid]
    assert worker.timeouts == 0 and len(looks) >= 3


def test_without_math_verify_our_own_comparison_remains(fake, monkeypatch):
    w = fake("raise ImportError('not here')")
    monkeypatch.setattr(grading, "MATH_WORKER", w)
    assert (
        grade_math("\\boxed{\\sqrt{9}}", "3") == RIGHT
        and w.missing
        and grade_by_math_verify("\\boxed{3}", "3") is None
    )
    assert grade_math("\\boxed{\\int_0^1 6 x dx}", "3").strict is False
    assert (
        grade_math("\\boxed{\\dfrac{x}{2}}", "\\frac x2")
        == grade_math("\\boxed{3.0}", "3")
        == RIGHT
    )
    w.close()


def gone(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX"  # dead, if no one has asked for its exit code yet


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks processes up in /proc")
@pytest.mark.parametrize("ending", ["returns", "killed", "killed while it hangs"])
def test_no_worker_outlives_its_run(ending):
    pytest.importorskip("math_verify")
    lines = [
        "from data.grade import MATH_WORKER, grade_by_math_verify, grade_math",
        "import sys, threading",
        "MATH_WORKER.limit = 2.0",
        "grade_math('\\\\boxed{\\\\sqrt{9}}', '3')",
        "print(*MATH_WORKER.pids(), 'torch' in sys.modules, flush=True)",
    ]
    if ending == "killed":
        lines.append("sys.stdin.read()")
    elif ending != "returns":
        lines.append("grade_by_math_verify('\\\\boxed{9^{9^{9^{9}}}}', '7'); sys.stdin.read()")
    run = subprocess.Popen(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    pid, torch_there = run.stdout.readline().split()
    assert torch_there == "False"
    if ending != "returns":
        if ending == "killed while it hangs":
            began = computed(int(pid))  # wait until the question is in hand
            wait_until(lambda: computed(int(pid)) > began + 0.3)
        assert not gone(pid)
        run.kill()
    run.communicate()
    wait_until(lambda: gone(pid))


# --- real gold answers ----------------------------------------------------------------------------


def rows(path):
    if not path.is_file():
        pytest.skip(f"SRLM_DATA has no {path.parent.name}/{path.name}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_gsm8k_gold_solutions_are_right_and_with_another_last_number_wrong(real_data):
    test = rows(real_data / "gsm8k/test.jsonl")
    assert len(test) == 1319
    for row in test:
        steps, _, gold = row["answer"].rpartition("#### ")
        changed = str(parse_number(gold) + 1)
        assert (
            grade_number(row["answer"], gold) == RIGHT
            and grade_number(steps + "#### " + changed, gold) == WRONG
        )
        assert (
            grade_number(f"{steps}The answer is {gold}.", gold)
            == grade_number(steps + gold, gold)
            == LENIENT
        )
        assert grade_math(row["answer"], gold) == RIGHT


def test_math500_gold_solutions_are_right_by_name(real_data, no_math_verify):
    test = rows(real_data / "math500/test.jsonl")
    wrong = [
        row["unique_id"] for row in test if grade_math(row["solution"], row["answer"]) != RIGHT
    ]
    assert len(test) == 500 and wrong == []


@pytest.mark.slow
def test_math500_golds_through_math_verify(real_data):
    """Every gold answer equals itself in math-verify too, also in other print; none equals the
    answer to another problem."""
    pytest.importorskip("math_verify")
    golds = [row["answer"] for row in rows(real_data / "math500/test.jsonl")]
    for gold in golds:
        verdict = grading.MATH_WORKER.math_verify(f"${tidy(gold)}$", tidy(gold))
        assert verdict == (True, True), gold
        other_print = gold.replace("\\frac", "\\dfrac").replace(",", ", ").replace("+", " + ")
        other_print = other_print.replace("(", "\\left(").replace(")", "\\right)")
        assert grade_math(f"\\boxed{{{other_print}}}", gold).strict, gold
    pairs = [(golds[i], golds[(i + shift) % 500]) for i in range(500) for shift in (1, 7, 101)]
    assert [(a, b) for a, b in pairs if a != b and grade_math(f"\\boxed{{{a}}}", b).strict] == [
        ("5", "x=5")
    ]


# --- strings that no one writes on purpose --------------------------------------------------------


PIECES = [
    "####",
    "\\boxed{",
    "\\boxed",
    "\\fbox{",
    "<answer>",
    "</answer>",
    "<think>",
    "</think>",
    "answer is",
    "\\frac{",
    "\\frac",
    "\\text{",
    "\\left(",
    "\\right)",
    "\\sqrt{",
    "\\,",
    "\\!",
    "\\%",
    "\\$",
    "$",
    "{",
    "}",
    "{}",
    "(",
    ")",
    "[",
    "\\",
    "\\\\",
    "=",
    "<",
    ">=",
    "+",
    "-",
    "−",
    "/",
    "*",
    "**",
    "^",
    "_",
    ",",
    ".",
    ";",
    ":",
    " ",
    "\n",
    "1",
    "18",
    "1,234",
    "0",
    "9" * 30,
    ".5",
    "1/0",
    "١٨",
    "½",
    "²",
    "１８",
    "nan",
    "inf",
    "e9",
    "x",
    "\\pi",
    "or",
    "and",
    "million",
    "apples",
    "\ud800",
    "\x00",
    "\u202e",
    "𝟙",
    "\\infty",
    "\\cup",
    "\\pm",
    "\\begin{pmatrix}",
    "\\end{pmatrix}",
    "&",
    "\\circ",
    "\\int_0^1",
    "\\sum_{n=1}",
    "!",
]
SOUND = [
    "He has $16 + 2 = 18$.\n#### 18",
    "so $\\boxed{\\frac{1}{\\sqrt{2}}}$.",
    "<think>a</think><answer>1,234</answer>",
    "The answer is 18.",
]


def strange(rng):
    """A random string of pieces, or a sound completion with some of them spliced in."""
    text = "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 30)))
    if rng.random() < 0.5:
        sound = rng.choice(SOUND)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(sound) + 1)
            sound = (
                sound[:at]
                + rng.choice([rng.choice(PIECES), "", text[:5]])
                + sound[at + rng.randint(0, 3) :]
            )
        text = sound
    return text * rng.choice([1] * 20 + [50])


def fuzz(count, seed):
    rng = random.Random(seed)
    for _ in range(count):
        text = strange(rng)
        began = time.process_time()
        number = grade_number(text, "18")
        assert number.lenient >= number.strict <= number.parsed, text
        assert format_reward(text) in (1.0, -1.0)
        parse_number(text)
        canonical(text)
        assert time.process_time() - began < 1, text


def test_fuzz_briefly():
    fuzz(3000, seed=0)


@pytest.mark.slow
def test_fuzz():
    fuzz(100_000, seed=1)


@pytest.mark.slow
def test_fuzz_through_math_verify(worker):
    """Every answer goes to the worker: no crash, no call that lasts."""
    worker.limit = 3.0
    rng, slowest = random.Random(2), 0.0
    for _ in range(2000):
        text = "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 12)))[:LONGEST]
        began = time.monotonic()
        verdict = worker.compare(
            text,
            rng.choice(
                ["18", "\\frac{1}{\\sqrt{2}}", "(-\\infty, 2) \\cup (3, \\infty)", "x^2 + 1"]
            ),
        )
        slowest = max(slowest, time.monotonic() - began)
        assert verdict in ((True, True), (True, False), (False, False))
    print(f"slowest call {slowest:.2f} s, {worker.timeouts} time-outs, {worker.crashes} crashes")
    assert slowest < 6 and worker.crashes == 0


HUGE = 10**6
SHAPES = [
    "\\boxed{",
    "\\boxed{{",
    "<answer>",
    "####",
    "#### ",
    "9",
    "\\frac{",
    " ",
    "answer is ",
    "1 ",
    "1/",
    "1,",
    ",123",
    "{",
    "$",
    "-",
    "- ",
    "\n",
    "1. ",
    "^",
    "^{ ",
    "\\!",
    "\\! ",
    "\\text{",
    "<think>",
    "</think>",
    "= ",
    "1 1/",
    "million ",
    "\\\\",
    "*",
    "a",
    "1\\frac{1}{",
]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_megabyte_is_fast(shape):
    body = shape * (HUGE // len(shape))
    began = time.process_time()
    for text in (body, f"#### {body}", f"<answer>the answer is {body}</answer>"):
        assert not grade_number(text, "17").strict and not grade_math(text, "17").strict
    assert format_reward(f"<think>{body}</think> <answer>a</answer>") in (1.0, -1.0)
    assert time.process_time() - began < 15  # quadratic, it takes minutes
