"""What is foreign has a limit of time and memory: templates, answers, rewards, servers, lines."""

import json
import math
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jinja2
import pytest

import toy_models
from data import chat_template, download, formats
from data.chat_template import ChatTemplates
from data.formatter import Formatter
from data.grading import values
from data.grading.questions import ask
from data.tasks import Example, grade_all
from data.tokenizer import Tokenizer
from data.worker import Worker
from errors import UserError
from limits import OverTime, within
from rl.reward import parse_reward
from tests.conftest import ROOT

MESSAGES = [{"role": "user", "content": "What?"}]
NESTED = "{% for i in range(99999) %}{% for j in range(99999) %}"


@pytest.mark.parametrize(
    ("source", "words"),
    {
        NESTED + "{% endfor %}{% endfor %}": "did not end within 1 s",
        NESTED + "{{ messages }}{% endfor %}{% endfor %}": "did not end within 1 s|Memory",
        "{{ 'x' * 8000000000 }}": "Memory",
        "{{ 'x'.ljust(8000000000) }}": "Memory",
        "{% set n = namespace(x='x') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}"
        "{% endfor %}{{ n.x }}": "Memory|did not end within 1 s",
        "{{ 'x' * 10000001 }}": "makes a text of 10,000,001 characters",
    }.items(),
)
def test_a_template_that_does_not_end_is_one_line(source, words, monkeypatch):
    limit = 1.0 if "end within" in words else 60.0
    monkeypatch.setattr(chat_template, "LIMIT", limit)
    monkeypatch.setattr(chat_template.WORKER, "limit", limit)
    with pytest.raises(UserError, match=f"^tiny: the chat template .*({words})") as e:
        ChatTemplates({"default": source}, "tiny").render(MESSAGES, True, None, {})
    assert "\n" not in str(e.value)
    monkeypatch.setattr(chat_template.WORKER, "limit", 60.0)
    good = ChatTemplates({"default": "{{ messages[0].content }}"}, "tiny")
    assert good.render(MESSAGES, True, None, {}) == "What?"


LOOPS = "{% if messages[0].content == 'loop' %}" + NESTED + "{% endfor %}{% endfor %}{% endif %}"
SWELLS = "{% if messages[0].content == 'swell' %}{{ 'x' * 8000000000 }}{% endif %}"
REFUSES = "{% if messages[0].content == 'no' %}{{ raise_exception('not this one') }}{% endif %}"


def chat(*questions, **columns):
    """Examples with these questions, each with an answer."""
    turns = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": "4"}] for q in questions
    ]
    return [Example(tuple(t), columns=columns, origin=f"row {i}") for i, t in enumerate(turns)]


def tokenizer_with(source):
    tiny = toy_models.toy_tokenizer()
    template = tiny.chat_template if source is None else source + tiny.chat_template
    return Tokenizer(tiny.files | {"chat_template.jinja": template.encode()}, "tiny")


@pytest.fixture
def asked(monkeypatch):
    """What the process that renders templates was asked for."""
    found = []
    ask = chat_template.WORKER.ask

    def noting(*question, **more):
        found.append(question)
        return ask(*question, **more)

    monkeypatch.setattr(chat_template.WORKER, "ask", noting)
    return found


def test_templates_of_many_rows_are_rendered_by_few_messages(asked):
    formatter = Formatter(tokenizer_with(None))
    examples = chat(*(f"{i} + {i}?" for i in range(500)), "what is <|im_end|>?")
    alone = [formatter.segments(example) for example in examples]
    prompts = [formatter.prompt(example) for example in examples]
    assert len(asked) > 1000
    asked.clear()
    with formatter.ahead(examples):
        assert [formatter.segments(example) for example in examples] == alone
        assert len(asked) < 10  # the last row has a control token's name: it is looked at twice
        assert [formatter.prompt(example) for example in examples] == prompts
    assert formatter.escaped == {"row 500"}
    asked.clear()
    formatter.segments(examples[0])
    assert len(asked) == 2  # nothing is kept
    asked.clear()
    formatter.documents(examples[:500])
    assert len(asked) == 1


def test_a_row_that_hides_the_tools_is_refused_among_many(asked):
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    examples = chat("a", "b", tools=[tool])
    with pytest.raises(UserError, match="row 0: the chat template has no place for 'tools'"):
        Formatter(tokenizer_with(None)).documents(examples)
    shows = Formatter(tokenizer_with("{{ tools }}"))
    asked.clear()
    shows.documents(examples)
    assert len([question for question in asked if question[0] == "render"]) <= 1  # of the roles


@pytest.mark.parametrize(
    ("source", "bad", "words"),
    [
        (LOOPS, "loop", "did not end within 1 s"),
        (SWELLS, "swell", ".*Memory|takes too much memory"),
        (REFUSES, "no", "refuses these messages .*not this one"),
    ],
)
def test_one_row_of_many_that_fails_is_named(source, bad, words, monkeypatch):
    monkeypatch.setattr(chat_template, "LIMIT", 1.0)
    monkeypatch.setattr(chat_template.WORKER, "limit", 1.0 if bad == "loop" else 60.0)
    formatter = Formatter(tokenizer_with(source))
    examples = chat(*"abcdefghij", bad, *"klm")
    with formatter.ahead(examples):
        before = [formatter.segments(example) for example in examples[:10]]
        for segments, question in zip(before, "abcdefghij", strict=True):
            assert f"user\n{question}<|im_end|>" in segments[0].text
        with pytest.raises(UserError, match=f"^row 10: tiny: the chat template ({words})"):
            formatter.segments(examples[10])
        assert "user\nm<|im_end|>" in formatter.segments(examples[13])[0].text


def test_many_slow_rows_are_answered_in_parts(asked, monkeypatch):
    monkeypatch.setattr(chat_template.WORKER, "limit", 60.0)
    loop = "{% for i in range(99999) %}{% endfor %}"
    began = time.process_time()
    jinja2.Template(loop).render()
    slow = loop * math.ceil(0.012 / (time.process_time() - began))  # 12 ms or more
    formatter, examples = Formatter(tokenizer_with(slow)), chat(*map(str, range(120)))
    formatter.segments(examples[0])
    asked.clear()
    documents = formatter.documents(examples)
    assert {question[0] for question in asked} == {"render_many"}
    assert 1 < len(asked) < 120
    assert documents[7].tokens.tolist() == formatter.documents([examples[7]])[0].tokens.tolist()


def test_a_template_that_drops_the_question_is_refused():
    files = toy_models.toy_tokenizer().files
    for source in ("Hi", "{{ messages[0].content[:3] }}", "{{ messages[1:] }}"):
        tokenizer = Tokenizer(files | {"chat_template.jinja": source.encode()}, "tiny")
        with pytest.raises(UserError, match="passes over the role 'user'|leaves out"):
            Formatter(tokenizer).prompt(Example(tuple(MESSAGES)))


# Each took 1 to 27 s.
DEAR = {
    "powers": ", ".join(f"{i}^x" for i in range(60)),
    "signs": ", ".join(f"x\\pm {i}" for i in range(30)),
    "roots": ", ".join(f"\\sqrt{{{i}}}" for i in range(2, 42)),
    "sines": ", ".join(f"\\sin({i})" for i in range(50)),
    "factorials": "(" * 38 + "x" + ")!" * 38,
    "fractions": "+".join(f"x^{{{i / 7}}}" for i in range(40)),
    "complex": "+".join(f"(1+i)^{{{i}.5x}}" for i in range(30)),
}


@pytest.mark.parametrize(
    "names", [["powers", "signs"], pytest.param([*DEAR], marks=pytest.mark.slow)]
)
def test_dear_answers_have_a_budget_that_no_clock_decides(names, monkeypatch):
    monkeypatch.setattr(values, "_left", [math.inf])
    began = time.process_time()
    for name in names:
        text = DEAR[name]
        replies = [ask("compare", text, f"{text}+0.1") for _ in range(1 + (name == "powers"))]
        assert set(map(tuple, replies)) < {(True, False), (False, False)}, name
        ask("key", text)
    assert time.process_time() - began < 12  # seven answers, with their votes
    gold = "\\frac{d !}{2 k(d-k) !}"
    assert ask("compare", "\\frac{d!}{(d-k)! \\cdot 2k}", gold) == [
        True,
        True,
    ]  # the dearest of all golds


def test_most_dear_answers_are_wrong_at_the_first_point(monkeypatch):
    """128 of them took 11 s of CPU, and take 3."""
    monkeypatch.setattr(values, "_left", [math.inf])
    for text in DEAR.values():
        assert ask("compare", text, "x^2+1") == [True, False]
        assert values.BUDGET - values._left[0] < 80_000, text
    both = ", ".join(f"{i}^x" for i in range(1, 30))  # each power is computed once for all pairs
    assert ask("compare", both, f"{both} + 0") == [True, True]
    assert values.BUDGET - values._left[0] < 80_000


def test_graders_of_mathematics_work_side_by_side(monkeypatch):
    worker = Worker("data.template_process", 60.0)  # it starts quickly
    monkeypatch.setattr("data.tasks.at_once", lambda: 3)
    meeting = threading.Barrier(3, timeout=60)

    def grade(example):
        meeting.wait()
        return worker.ask("render", "{{ x }}", {"x": example.answer})[0]

    items = [(Example(tuple(MESSAGES), str(i), "math"),) for i in range(3)]
    assert grade_all(grade, items) == ["0", "1", "2"]
    pids = worker.pids()
    assert 1 <= len(pids) <= 3
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(worker.ask, "render", "{{ x }}", {"x": 3}).result() == ["3", ""]
    assert set(worker.pids()) == set(pids)
    worker.close()


REWARDS = """
import re, time
def loop(example, text):
    while True: pass
def sleep(example, text): time.sleep(1e6)
def passes_over(example, text):
    while True:
        try: time.sleep(100)
        except Exception: pass
def regex(example, text): return float(bool(re.match("(a+)+$", "a" * 40 + "b")))
def length(example, text): return float(len(text))
def leaves(example, text): raise SystemExit(0)
"""
EXAMPLE = Example(tuple(MESSAGES), "2", "", "rows.jsonl:3")


def test_a_reward_that_does_not_return_is_one_line(tmp_path, monkeypatch):
    path = tmp_path / "mine.py"
    path.write_text(REWARDS)
    before = signal.getsignal(signal.SIGALRM)
    for name in ("loop", "sleep", "passes_over", "regex"):
        reward = parse_reward(f"{path}:{name}", 10, seconds=0.2)
        words = "took longer than --grpo_reward_seconds 0.2 on the sample 'ab' for rows.jsonl:3"
        with pytest.raises(UserError, match=words):
            reward(EXAMPLE, "ab", 2, True)
        assert signal.getsignal(signal.SIGALRM) == before
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    for seconds in (0.0, 5.0):
        assert parse_reward(f"{path}:length", 10, seconds=seconds)(EXAMPLE, "ab", 2, True)[0] == 2
    with pytest.raises(UserError, match="raised SystemExit: 0"):
        parse_reward(f"{path}:leaves", 10)(EXAMPLE, "ab", 2, True)
    path.write_text("import time; time.sleep(1e6)")
    monkeypatch.setattr("plugins.LOADING", 0.2)
    with pytest.raises(UserError, match="took more than 0.2 s to load"):
        parse_reward(f"{path}:length", 10)


def test_a_timer_of_somebody_else_goes_on():
    signal.setitimer(signal.ITIMER_REAL, 100)
    with within(50):
        assert signal.getitimer(signal.ITIMER_REAL)[0] < 60
    assert signal.setitimer(signal.ITIMER_REAL, 0)[0] > 60
    with pytest.raises(OverTime), within(0.05):
        time.sleep(5)


def test_what_hears_no_signal_ends_with_the_process():
    """In a thread that is not the main one nothing can be raised."""
    lines = [
        "import limits, threading, time",
        "limits.LAST = 0.2",
        "def body():",
        "    with limits.within(0.2): time.sleep(1e6)",
        "threading.Thread(target=body).start()",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and "in body" in done.stderr


def test_c_code_that_never_returns_ends_with_the_process():
    """It hears no signal in the main thread either, and no other thread of Python gets a turn."""
    lines = [
        "import limits",
        "limits.LAST = 0.2",
        "def deaf():",
        "    with limits.within(0.2): sum(range(10**13))",
        "deaf()",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and "in deaf" in done.stderr and "OverTime" not in done.stderr


def test_a_reward_in_c_code_that_never_returns_is_one_line_that_names_the_sample(tmp_path):
    (tmp_path / "mine.py").write_text("def deaf(example, text): return sum(range(10**13))\n")
    lines = [
        "import limits; limits.LAST = 0.2",
        "from data.tasks import Example",
        "from rl.reward import parse_reward",
        f"reward = parse_reward({str(tmp_path / 'mine.py:deaf')!r}, 10, seconds=0.2)",
        "example = Example(({'role': 'user', 'content': 'What?'},), '2', '', 'rows.jsonl:3')",
        "reward(example, 'a\\nb', 2, True)",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True
    )
    words = "took longer than --grpo_reward_seconds 0.2 on the sample 'a\\nb' for rows.jsonl:3"
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"--grpo_reward {tmp_path}/mine.py:deaf {words}, and hears no")


def test_a_silent_server_is_given_up(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/x"
        monkeypatch.setattr(download, "SILENCE", 0.3)
        monkeypatch.setattr(download, "SETS", {"s": [("s/x.jsonl", url, "0" * 64)]})
        with pytest.raises(UserError, match="could not be fetched to .*timed out"):
            download.fetch("s", tmp_path, say=print)
    assert not (tmp_path / "s").exists()


def test_a_line_that_is_no_row_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LONGEST_LINE", 1000)
    path = tmp_path / "rows.jsonl"
    row = json.dumps({"question": "What?", "answer": "x" * 1000}) + "\n"
    path.write_text('{"question": "What?", "answer": "4"}\n' + row)
    with pytest.raises(UserError, match=r"rows.jsonl:2: a line of 1,0\d\d bytes, more than 1,000"):
        list(formats.read_rows(path))
