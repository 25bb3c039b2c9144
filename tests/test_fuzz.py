"""Hostile rows, templates, command lines and study files: one line, no hang, nothing written.

The quick tests take a few of each; `pytest -m slow tests/test_fuzz.py` takes the thousands of
COUNTS, or SRLM_FUZZ times as many, made from SRLM_FUZZ_SEED.
"""

import copy
import json
import random
import string
import tomllib
from functools import partial

import pytest

import toy_models
import train
from config import Config
from data import chat_template
from data.chat_template import ChatTemplates
from data.formats import read_examples
from data.formatter import Formatter
from data.tokenizer import Tokenizer
from eval import __main__ as evaluate
from eval import traces
from eval.study import plan
from tests.chat_templates import ALL
from tests.conftest import ROOT
from tests.test_damage import SEED, TIMES, VALUES, mutated, outcome
from tests.test_formatter import TOOLS

COUNTS = {"rows": 20_000, "templates": 2_000, "commands": 2_000, "studies": 500}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
TURNS = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "#### 4"}]
ROWS = [
    {"question": "How many apples are 2 and 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"},
    {"problem": "What is $1/2 + 1/3$?", "solution": "$\\boxed{5/6}$", "answer": "5/6"},
    {"instruction": "Add.", "input": "2, 3", "output": "5"},
    {"messages": TURNS, "answer": "4"},
    {"messages": [{"role": "system", "content": "Be brief."}, *TURNS, *TURNS], "task": "number"},
    {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
    {
        "messages": [
            TURNS[0],
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "rain", "tool_call_id": "1", "name": "weather"},
            TURNS[1] | {"reasoning_content": "It rains.", "weight": 1},
        ],
        "tools": TOOLS,
        "chat_template_kwargs": {"enable_thinking": False},
    },
    {"prompt": TURNS[:1], "completion": "4", "reward_model": {"ground_truth": "4"}},
    {"question": "Q", "final_answer": "5", "r1_solution_1": "<think>x</think>5"},
    {"task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f", "test": "def check(f):"},
    {
        "task_id": 601,
        "text": "Write.",
        "code": "def f(): pass",
        "test_list": ["assert f() is None"],
    },
]


def counted(codes, code):
    codes[code] = codes.get(code, 0) + 1


def fuzz_rows(count, tmp_path, capfd):
    rng, codes, path = random.Random("rows" + SEED), {}, tmp_path / "rows.jsonl"
    tiny = toy_models.toy_tokenizer()
    tools = Tokenizer(tiny.files | {"chat_template.jinja": ALL["tools"].encode()}, "the tools one")
    formatters = [Formatter(tools), Formatter(tiny), Formatter(tiny, template="plain")]
    found = []

    def read():
        found[:] = read_examples(path, "train")

    for i in range(count):
        text = json.dumps(mutated(ROWS[i % len(ROWS)], rng))
        if rng.random() < 0.1:  # bytes that are none of JSON's
            place = rng.randrange(len(text))
            text = text[:place] + rng.choice(["", '"', "}", "\x00", "é"]) + text[place + 1 :]
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            code = outcome(read, capfd)
            counted(codes, code)
            if not code and found:
                show = partial(formatters[i // len(ROWS) % 3].documents, found)
                counted(codes, ("shown", outcome(show, capfd)))
        except BaseException as e:
            raise AssertionError(f"row {i}: {text[:900]}") from e
    return codes


PIECES = ["{% for i in range(99999) %}", "{% endfor %}", "{{ 'x' * 10**10 }}", "{{ messages }}"]
PIECES += ["{% if", "%}", "{{", "}}", "{#", "| tojson", "[0]", ".content", "['role']", "()", "|"]
PIECES += ["{% set x = x ~ x %}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "None", "\0"]
PIECES += ["{{ lipsum(n=10**9) }}", "{{ ''.__class__.__mro__ }}", "{{ self.__init__ }}", "\ud800"]
PIECES += ["{{ messages.append(1) }}", "9**9**9", "{% include 'x' %}", "{% import 'os' as os %}"]


def fuzz_templates(count, monkeypatch, capfd):
    rng, codes = random.Random("templates" + SEED), {}
    monkeypatch.setattr(chat_template.WORKER, "limit", 1.0)
    for i in range(count):
        text = rng.choice([*ALL.values()])
        for _ in range(rng.choice((1, 2, 5))):
            start = rng.randrange(len(text) + 1)
            cut = rng.choice((0, 0, 1, 10, 60))
            text = text[:start] + rng.choice([*PIECES, ""]) + text[start + cut :]
        templates = ChatTemplates({"default": text}, "tiny")

        def render(templates=templates):
            templates.render(TURNS, True, TOOLS, {"bos_token": "<s>"})
            assert templates.arguments is not None

        try:
            counted(codes, outcome(render, capfd))
        except BaseException as e:
            raise AssertionError(f"template {i}: {text!r}") from e
    return codes


def fuzz_commands(count, monkeypatch, capfd):
    """Command lines up to where something would be read."""
    rng, codes = random.Random("commands" + SEED), {}
    monkeypatch.setattr(train, "launch", lambda cfg, **_: None)
    names = [*Config.__dataclass_fields__]
    words = [str(v) for v in VALUES if isinstance(v, str | int | float | None)]
    words += ["nan", "-inf", "1e400", "0x10", "٣", "1,2", "a=b", "kd", "grpo", "auto", "--", "²"]
    words = [w for w in words if "\0" not in w and not w.startswith("\ud800")]
    parsers = [lambda argv: train.main(argv), evaluate.parse, traces.parse]
    for i in range(count):
        argv = [f"--mode={rng.choice(['sft', 'kd', 'grpo'])}"] if i % 5 < 3 else []
        for _ in range(rng.choice((1, 2, 4))):
            name = rng.choice(names)
            if rng.random() < 0.1:
                name = name[:-1] + rng.choice(string.printable[:70])
            form = rng.randrange(4)
            if form == 0:
                argv.append(f"--{name}")
            elif form == 1:
                argv += [f"--{name}", rng.choice(words)]
            else:
                argv.append(f"--{name}={rng.choice(words)}")
        call = parsers[max(0, i % 5 - 2)]
        try:
            if call is parsers[0]:
                code, error = call(argv), capfd.readouterr().err
                assert code in (0, 2) and error.count("\n") == (code == 2), (code, error)
            else:
                code = outcome(lambda call=call, argv=argv: call(argv), capfd)
            counted(codes, code)
        except SystemExit as e:  # --help
            assert e.code == 0 and capfd.readouterr().out
        except BaseException as e:
            raise AssertionError(f"command {i}: {argv!r}") from e
    return codes


def as_toml(value):
    """A value in TOML; None is left out by who calls."""
    if isinstance(value, dict):
        parts = [f"{json.dumps(k)} = {as_toml(v)}" for k, v in value.items() if v is not None]
        return "{" + ", ".join(parts) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(as_toml(v) for v in value if v is not None) + "]"
    return json.dumps(value).replace("Infinity", "inf").replace("NaN", "nan")


def fuzz_studies(count, tmp_path, capfd):
    rng, codes, path = random.Random("studies" + SEED), {}, tmp_path / "study.toml"
    files = sorted((ROOT / "recipes/study").glob("*.toml"))
    studies = [tomllib.loads(file.read_text()) for file in files]
    for i in range(count):
        study = mutated(copy.deepcopy(studies[i % len(studies)]), rng)
        tables = [f"{json.dumps(k)} = {as_toml(v)}\n" for k, v in study.items() if v is not None]
        text = "".join(tables)
        if rng.random() < 0.1:
            text = text[: rng.randrange(len(text))]
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            counted(codes, outcome(lambda: plan.read(str(path), (), (), False), capfd))
        except BaseException as e:
            raise AssertionError(f"study {i}: {text[:3000]}") from e
    return codes


def campaign(kind, count, tmp_path, monkeypatch, capfd):
    if kind == "rows":
        return fuzz_rows(count, tmp_path, capfd)
    if kind == "templates":
        return fuzz_templates(count, monkeypatch, capfd)
    if kind == "commands":
        return fuzz_commands(count, monkeypatch, capfd)
    return fuzz_studies(count, tmp_path, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("kind", COUNTS)
def test_thousands_of_hostile_inputs(kind, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    codes = campaign(kind, int(COUNTS[kind] * TIMES), tmp_path, monkeypatch, capfd)
    with capfd.disabled():
        print(kind, codes)
    assert codes[2] > 100 * min(TIMES, 1)
    assert {p.name for p in tmp_path.iterdir()} <= {"rows.jsonl", "study.toml"}


@pytest.mark.parametrize(("kind", "count"), {"rows": 150, "commands": 60, "studies": 12}.items())
def test_hostile_inputs_are_one_line(kind, count, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert campaign(kind, count, tmp_path, monkeypatch, capfd)[2]
    assert {p.name for p in tmp_path.iterdir()} <= {"rows.jsonl", "study.toml"}
