"""Sequence-level distillation: traces that the grader finds right are kept, with where they are from, and SFT trains on them."""

import json
import shutil

import pytest

import train
from data.formats import to_example
from data.formatter import Formatter
from data.tokenizer import Tokenizer
from errors import UserError
from eval import sampling, traces
from model.checkpoint import build_model, save_model
from model.generate import Completion
from model.transformer import PRESETS

ARGS = ["--data=word_problems:6", "--n=3", "--max_tokens=40"]


@pytest.fixture
def teacher(tmp_path):
    tokenizer = train.toy_tokenizer()
    (tmp_path / "teacher").mkdir()
    save_model(
        build_model(PRESETS["tiny"], None, device="cpu", seed=0),
        tmp_path / "teacher",
        tokenizer,
        tokenizer.stop_ids(),
    )
    return str(tmp_path / "teacher")


@pytest.fixture
def writes(monkeypatch):
    """A teacher that gives the gold solution, then a wrong one, then the gold one again but never ends."""
    from data.tasks import TASKS

    tokenizer, asked = train.toy_tokenizer(), []

    def generate(model, prompts, limit, stop_ids, *, seeds, on_done, fail_after=10**9, **more):
        assert len(set(seeds)) == len(prompts)
        asked.append(len(prompts))
        generate.first = tokenizer.decode(prompts[0])
        by_prompt = {}
        for i, prompt in enumerate(prompts):
            if i >= generate.fail_after:
                raise KeyboardInterrupt
            number = by_prompt[tuple(prompt)] = by_prompt.get(tuple(prompt), -1) + 1
            gold = next(e for e in problems if e.question in tokenizer.decode(prompt))
            text = gold.messages[-1]["content"]
            text = text.rpartition("####")[0] + "#### 987" if number == 1 else text
            on_done(i, Completion(tokenizer.encode(text), [0.0], number != 2))

    problems = [
        TASKS["word_problems"].example("word_problems", "train", f"0/{i}") for i in range(6)
    ]
    generate.fail_after, generate.asked, generate.problems = 10**9, asked, problems
    monkeypatch.setattr(sampling, "generate", generate)
    return generate


def test_right_ones_are_kept_once_with_their_source(teacher, writes, tmp_path, capsys):
    out = tmp_path / "t"
    assert traces.main([teacher, *ARGS, f"--out={out}"]) == 0
    rows = [json.loads(line) for line in (out / "traces.jsonl").read_text().splitlines()]
    assert [
        (r["messages"][0]["content"], r["messages"][1]["content"], r["answer"], r["task"])
        for r in rows
    ] == [
        (e.question, e.messages[-1]["content"], e.answer, "word_problems") for e in writes.problems
    ]
    assert all(r["source"]["sample"] == 0 and len(r["source"]["teacher"]) == 64 for r in rows)
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [(s["right"], s["stopped"]) for s in samples] == [
        (True, True),
        (False, True),
        (True, False),
    ] * 6
    assert "12 are right" in capsys.readouterr().out
    assert traces.main([teacher, *ARGS, "--keep=ended", f"--out={tmp_path / 'all'}"]) == 0
    assert len((tmp_path / "all" / "traces.jsonl").read_text().splitlines()) == 12
    argv = [
        "--mode=sft",
        f"--data={out / 'traces.jsonl'}",
        "--steps=1",
        "--batch_size=2",
        "--eval_examples=2",
        "--eval_tokens=2",
        f"--runs={tmp_path}",
        "--name=r",
    ]
    assert train.main(argv) == 0
    assert (
        "eval/word_problems/accuracy" in (tmp_path / "r" / "metrics.jsonl").read_text()
    )  # the gold answers came along


def test_what_was_interrupted_goes_on(teacher, writes, tmp_path):
    assert traces.main([teacher, *ARGS, f"--out={tmp_path / 'whole'}"]) == 0
    writes.fail_after = 6
    assert traces.main([teacher, *ARGS, f"--out={tmp_path / 'cut'}"]) == 130
    assert not (tmp_path / "cut" / "traces.jsonl").exists()
    with open(tmp_path / "cut" / "samples.part-0.jsonl", "a") as f:
        f.write('{"problem": 2, "sample": 0, "te')  # a line that a kill cut off
    writes.fail_after = 10**9
    assert traces.main([teacher, *ARGS, f"--out={tmp_path / 'cut'}"]) == 0
    assert writes.asked == [18, 18, 12]
    assert (tmp_path / "cut" / "traces.jsonl").read_text() == (
        tmp_path / "whole" / "traces.jsonl"
    ).read_text()
    cut, whole = (
        json.loads((tmp_path / name / "samples.json").read_text())["generated"]
        for name in ("cut", "whole")
    )
    matrices = (
        2 * (2 * 96 * 96 + 2 * 96 * 48 + 3 * 96 * 256) + 96 * 512
    )  # two layers of `tiny` and the head, for each new token; then prompts and attention
    assert (
        cut["tokens"] == whole["tokens"]
        and cut["flops"] == whole["flops"]
        and 1 < whole["flops"] / (2 * matrices * whole["tokens"]) < 2
    )  # all samples, whoever wrote them
    assert (
        traces.main([teacher, *ARGS, f"--out={tmp_path / 'cut'}"]) == 0 and len(writes.asked) == 3
    )  # nothing is missing


def test_a_group_is_kept_whole(teacher, writes, tmp_path):
    writes.fail_after = 4
    assert traces.main([teacher, *ARGS, "--group=2", f"--out={tmp_path / 'cut'}"]) == 130
    assert (
        not (tmp_path / "cut" / "samples.part-0.jsonl").read_text().strip()
    )  # what is batched together stays so
    writes.fail_after = 10**9
    assert traces.main([teacher, *ARGS, "--group=2", f"--out={tmp_path / 'cut'}"]) == 0
    assert (
        writes.asked == [6, 6, 6, 6]
        and len((tmp_path / "cut" / "samples.jsonl").read_text().splitlines()) == 18
    )


def test_a_run_is_asked_as_it_was_trained(teacher, writes, tmp_path):
    assert traces.main(
        [teacher, *ARGS, f"--out={tmp_path / 'a'}"]
    ) == 0 and writes.first.startswith("<|im_start|>user")
    run = tmp_path / "run" / "checkpoints" / "step-1"
    shutil.copytree(teacher, run)
    (tmp_path / "run" / "config.json").write_text('{"template": "plain"}')
    assert (
        traces.main([str(run), *ARGS, f"--out={tmp_path / 'b'}"]) == 0
        and writes.first == writes.problems[0].question
    )


def conversation(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def test_a_trace_keeps_the_conversation_before_it(teacher, tmp_path, monkeypatch):
    """Earlier answers stay, untrained, other fields and columns too; only the last answer is the teacher's."""
    earlier = {"role": "assistant", "content": "I have 4.", "id": "m3"}
    before = [
        *conversation(("system", "Be kind."), ("user", "How many?")),
        earlier,
        *conversation(("user", "And with 3 more?")),
    ]
    rows = [
        {
            "messages": [*before, {"role": "assistant", "content": "It was 8."}],
            "answer": "7",
            "task": "word_problems",
        }
    ]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts, tokenizer = [], train.toy_tokenizer()

    def generate(model, asked, *_, on_done, **more):
        prompts.extend(asked)
        for i in range(len(asked)):
            on_done(i, Completion(tokenizer.encode("It is\n#### 7"), [0.0], True))

    monkeypatch.setattr(sampling, "generate", generate)
    assert (
        traces.main(
            [
                teacher,
                f"--data={tmp_path / 'talk.jsonl'}",
                "--max_tokens=20",
                f"--out={tmp_path / 't'}",
            ]
        )
        == 0
    )
    assert tokenizer.decode(prompts[0]) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\nI have 4.<|im_end|>"
        "<|im_start|>user\nAnd with 3 more?<|im_end|>\n<|im_start|>assistant\n"
    ).replace("4.<|im_end|><", "4.<|im_end|>\n<")
    (row,) = [
        json.loads(line) for line in (tmp_path / "t" / "traces.jsonl").read_text().splitlines()
    ]
    assert row["messages"] == [
        *before[:2],
        earlier | {"weight": 0, "shortened": True},
        before[3],
        {"role": "assistant", "content": "It is\n#### 7"},
    ]
    assert (row["answer"], row["task"]) == ("7", "word_problems")
    (document,) = Formatter(tokenizer).documents([to_example(row, "t:1")])
    assert (
        tokenizer.decode(document.tokens[document.weights != 0]) == "It is\n#### 7<|im_end|>"
    )  # I have 4. is not trained on


class Row:
    """An example whose row has other columns."""

    def __init__(self, messages, /, **columns):
        self.messages, self.columns, self.answer, self.task, self.origin = (
            tuple(messages),
            columns,
            "7",
            "",
            "x.jsonl:3",
        )


def collected(example, prompt="", text="ok"):
    subject = type("Subject", (), dict(tokenizer=train.toy_tokenizer(), sha256="ab"))
    args = type("Args", (), dict(keep="ended", data="x.jsonl"))
    ids = subject.tokenizer.encode(prompt)
    rows = {(0, 0): dict(text=text, stopped=True)}
    (line,) = traces.collect(args, subject, [example], [ids], rows)
    return json.loads(line)


def test_a_row_without_an_answer_of_its_own_keeps_its_question():
    turns = conversation(("user", "a"), ("assistant", "b"), ("user", "c"))
    assert collected(Row(turns))["messages"] == [
        turns[0],
        turns[1] | {"weight": 0, "shortened": True},
        turns[2],
        {"role": "assistant", "content": "ok"},
    ]
    assert collected(Row(conversation(("user", "a"))))["messages"] == conversation(
        ("user", "a"), ("assistant", "ok")
    )


def test_prompts_alone_are_answered_too(teacher, tmp_path, monkeypatch):
    tokenizer = train.toy_tokenizer()
    rows = [
        {"prompt": "How many?"},
        {"prompt": conversation(("system", "Be kind."), ("user", "How many?"))},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(
        sampling,
        "generate",
        lambda m, asked, *_, on_done, **k: [
            on_done(i, Completion(tokenizer.encode("7"), [0.0], True)) for i in range(len(asked))
        ],
    )
    assert (
        traces.main(
            [
                teacher,
                f"--data={tmp_path / 'prompts.jsonl'}",
                "--keep=ended",
                "--max_tokens=9",
                f"--out={tmp_path / 't'}",
            ]
        )
        == 0
    )
    found = [
        json.loads(line)["messages"]
        for line in (tmp_path / "t" / "traces.jsonl").read_text().splitlines()
    ]
    wanted = [
        conversation(("user", "How many?"), ("assistant", "7")),
        conversation(("system", "Be kind."), ("user", "How many?"), ("assistant", "7")),
    ]
    assert sorted(found, key=len) == wanted


def test_other_columns_come_along_but_none_that_says_something_else(tmp_path):
    turns, tools = (
        conversation(("user", "a"), ("assistant", "b")),
        [{"type": "function", "function": {"name": "add"}}],
    )
    row = collected(
        Row(
            turns,
            tools=tools,
            nums=[1, 2],
            question="a",
            answer="#### 9",
            source="web",
            solution="b",
            messages="no",
            prompt="x",
        )
    )
    assert (row["tools"], row["nums"], row["answer"], row["source"]["teacher"]) == (
        tools,
        [1, 2],
        "7",
        "ab",
    )
    assert row.keys() == {"messages", "answer", "task", "source", "tools", "nums"}
    with pytest.raises(UserError, match="x.jsonl:3: column 'raw' holds a bytes"):
        collected(Row(turns, raw=b"1"))


def test_a_tag_that_the_template_opens_is_part_of_the_trace():
    turns = conversation(("user", "a"), ("assistant", "b"))
    row = collected(Row(turns), "<|im_start|>assistant\n<think>\n", "So.\n</think>\nIt is 7.")
    assert row["messages"][-1]["content"] == "<think>\nSo.\n</think>\nIt is 7."
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|><think>\n{% endif %}"
    files = dict(train.toy_tokenizer().files)
    files["tokenizer_config.json"] = json.dumps(
        json.loads(files["tokenizer_config.json"]) | {"chat_template": template}
    ).encode()
    opening = Tokenizer(files, "a tokenizer whose template opens the block")
    (document,) = Formatter(opening).documents([to_example(row, "t:1")])
    assert (
        opening.decode(document.tokens[document.weights != 0])
        == "So.\n</think>\nIt is 7.<|im_end|>"
    )  # what the teacher wrote
    assert collected(Row(turns), "<think> is a tag\n", "So.")["messages"][-1]["content"] == "So."


def test_the_templates_arguments_are_the_runs_unless_given(teacher, writes, tmp_path):
    from tests.test_eval import arguments_tokenizer

    run = tmp_path / "run" / "checkpoints" / "step-1"
    shutil.copytree(teacher, run)
    arguments_tokenizer().save(run)
    (tmp_path / "run" / "config.json").write_text('{"chat_template_kwargs": "x=3"}')
    for name, argv, end in (
        ("a", [], "[thinks][x=3]"),
        ("b", ["--chat_template_kwargs=enable_thinking=false"], "assistant\n"),
        ("c", ["--chat-template-kwargs="], "[thinks]"),
    ):
        assert traces.main(
            [str(run), *ARGS, *argv, f"--out={tmp_path / name}"]
        ) == 0 and writes.first.endswith(end)
    assert traces.main([str(run), *ARGS, f"--out={tmp_path / 'b'}"]) == 2  # other traces


@pytest.mark.parametrize(
    "change,said",
    [
        (["--temperature=0"], "same trace"),
        (["--n=0"], "at least 1"),
        (["--data=word_problems"], "endless"),
        (["--data=nowhere.jsonl"], "nowhere"),
        (["--max_tokens=100000"], "positions"),
        (["--seed=1"], "another seed"),
        (["--keep=wrong"], "keep"),
    ],
)
def test_wrong_inputs_are_one_line(change, said, teacher, writes, tmp_path, capsys):
    if change == ["--seed=1"]:
        assert traces.main([teacher, *ARGS, f"--out={tmp_path / 't'}"]) == 0
    capsys.readouterr()
    assert traces.main([teacher, *ARGS, f"--out={tmp_path / 't'}", *change]) == 2
    err = capsys.readouterr().err.strip()
    assert said in err and "\n" not in err
