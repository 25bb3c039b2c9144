"""Sequence-level distillation: right traces are kept with their source, and SFT trains on them."""

import json
import shutil
from types import SimpleNamespace

import pytest

import toy_models
import train
from data.formats import to_example
from data.formatter import Formatter
from data.tasks import TASKS
from errors import UserError
from eval import sampling, traces
from model.checkpoint import build_model, save_model
from model.generate import Completion
from model.presets import PRESETS
from tests.evaluation import arguments_tokenizer, read_lines, speaker, with_template

ARGS = ["--data=word_problems:6", "--n=3", "--max_tokens=40"]


@pytest.fixture
def teacher(tmp_path):
    tokenizer, folder = toy_models.toy_tokenizer(), tmp_path / "teacher"
    folder.mkdir()
    model = build_model(PRESETS["tiny"], None, device="cpu", seed=0)
    save_model(model, folder, tokenizer, tokenizer.stop_ids())
    return str(folder)


class Teacher:
    """Takes the place of `generate`.

    It gives the gold solution, then a wrong one, then the gold one again but never ends. It is
    interrupted after `fail_after` samples. asked: how many samples each call wanted. first: the
    text of the first prompt.
    """

    def __init__(self):
        make = TASKS["word_problems"].example
        self.problems = [make("word_problems", "train", f"0/{i}") for i in range(6)]
        self.tokenizer, self.asked, self.fail_after = toy_models.toy_tokenizer(), [], 10**9

    def __call__(self, model, prompts, limit, stop_ids, *, seeds, on_done, **more):
        assert len(set(seeds)) == len(prompts)
        self.asked.append(len(prompts))
        self.engine = model
        self.first = self.tokenizer.decode(prompts[0])
        counts = {}
        for i, prompt in enumerate(prompts):
            if i >= self.fail_after:
                raise KeyboardInterrupt
            number = counts.get(tuple(prompt), 0)
            counts[tuple(prompt)] = number + 1
            asked = self.tokenizer.decode(prompt)
            (text,) = (p.messages[-1]["content"] for p in self.problems if p.question in asked)
            if number == 1:
                text = text.rpartition("####")[0] + "#### 987"
            on_done(i, Completion(self.tokenizer.encode(text), [0.0], number != 2))


@pytest.fixture
def writes(monkeypatch):
    model = Teacher()
    monkeypatch.setattr(sampling, "generate", model)
    return model


def test_right_ones_are_kept_once_with_their_source(teacher, writes, tmp_path, capsys):
    out = tmp_path / "t"
    assert traces.main([teacher, *ARGS, f"--out={out}"]) == 0
    rows = read_lines(out / "traces.jsonl")
    for row, problem in zip(rows, writes.problems, strict=True):
        assert [m["content"] for m in row["messages"]] == [m["content"] for m in problem.messages]
        assert (row["answer"], row["task"]) == (problem.answer, "word_problems")
        assert row["source"]["sample"] == 0 and len(row["source"]["teacher"]) == 64
    samples = read_lines(out / "samples.jsonl")
    graded = [(True, True), (False, True), (True, False)] * 6
    assert [(s["right"], s["stopped"]) for s in samples] == graded
    assert "12 are right" in capsys.readouterr().out
    assert traces.main([teacher, *ARGS, "--keep=ended", f"--out={tmp_path / 'all'}"]) == 0
    assert len(read_lines(tmp_path / "all" / "traces.jsonl")) == 12
    argv = ["--mode=sft", f"--data={out / 'traces.jsonl'}", "--steps=1", "--batch_size=2"]
    argv += ["--eval_examples=2", "--eval_tokens=2", f"--runs={tmp_path}", "--name=r"]
    assert train.main(argv) == 0
    # the gold answers came along
    assert "eval/word_problems/accuracy" in (tmp_path / "r" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("asked", ["true", "false"])
def test_the_teacher_is_compiled_where_that_is_asked_for(asked, teacher, writes, tmp_path):
    assert traces.main([teacher, *ARGS, f"--compile={asked}", f"--out={tmp_path / 't'}"]) == 0
    for block in writes.engine.source.layers:
        assert block.is_compiled == (asked == "true")


def test_what_was_interrupted_goes_on(teacher, writes, tmp_path):
    complete, cut = tmp_path / "complete", tmp_path / "cut"
    assert traces.main([teacher, *ARGS, f"--out={complete}"]) == 0
    writes.fail_after = 6
    assert traces.main([teacher, *ARGS, f"--out={cut}"]) == 130
    assert not (cut / "traces.jsonl").exists()
    with open(cut / "samples.part-0.jsonl", "a") as f:
        f.write('{"problem": 2, "sample": 0, "te')  # a line that a kill cut off
    writes.fail_after = 10**9
    assert traces.main([teacher, *ARGS, f"--out={cut}"]) == 0
    assert writes.asked == [18, 18, 12]
    assert (cut / "traces.jsonl").read_text() == (complete / "traces.jsonl").read_text()
    counts = []
    for out in (cut, complete):
        counts.append(json.loads((out / "samples.json").read_text())["generated"])
    # two layers of `tiny` and the head, for each new token; then prompts and attention
    matrices = 2 * (2 * 96 * 96 + 2 * 96 * 48 + 3 * 96 * 256) + 96 * 512
    assert 1 < counts[1]["flops"] / (2 * matrices * counts[1]["tokens"]) < 2
    for name in ("tokens", "flops"):  # of all samples, in whichever session they were generated
        assert counts[0][name] == counts[1][name]
    assert traces.main([teacher, *ARGS, f"--out={cut}"]) == 0
    assert len(writes.asked) == 3  # nothing is missing


def test_a_group_is_kept_as_one(teacher, writes, tmp_path):
    cut = tmp_path / "cut"
    argv = [teacher, *ARGS, "--group=2", f"--out={cut}"]
    writes.fail_after = 4
    assert traces.main(argv) == 130
    # what is batched together stays so
    assert not cut.exists()
    writes.fail_after = 10**9
    assert traces.main(argv) == 0
    assert writes.asked == [6, 6, 6, 6] and len(read_lines(cut / "samples.jsonl")) == 18


def test_a_full_disk_is_one_line(teacher, tmp_path, monkeypatch, capsys):
    def generate(*args, **more):
        raise OSError(28, "No space left on device", "a part")

    monkeypatch.setattr(sampling, "generate", generate)
    assert traces.main([teacher, *ARGS, f"--out={tmp_path / 't'}"]) == 1
    said = "eval.traces: a part: No space left on device; the same command goes on\n"
    assert capsys.readouterr().err == said


def test_a_run_is_asked_as_it_was_trained(teacher, writes, tmp_path):
    assert traces.main([teacher, *ARGS, f"--out={tmp_path / 'a'}"]) == 0
    assert writes.first.startswith("<|im_start|>user")
    run = tmp_path / "run" / "checkpoints" / "step-1"
    shutil.copytree(teacher, run)
    (tmp_path / "run" / "config.json").write_text('{"template": "plain"}')
    assert traces.main([str(run), *ARGS, f"--out={tmp_path / 'b'}"]) == 0
    assert writes.first == writes.problems[0].question


def conversation(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def test_a_trace_keeps_the_conversation_before_it(teacher, tmp_path, monkeypatch):
    """Earlier answers stay, untrained, with their fields; only the last answer is the teacher's."""
    earlier = {"role": "assistant", "content": "I have 4.", "id": "m3"}
    before = [
        *conversation(("system", "Be kind."), ("user", "How many?")),
        earlier,
        *conversation(("user", "And with 3 more?")),
    ]
    messages = [*before, {"role": "assistant", "content": "It was 8."}]
    row = {"messages": messages, "answer": "7", "task": "word_problems"}
    data, out = tmp_path / "talk.jsonl", tmp_path / "t"
    data.write_text(json.dumps(row) + "\n")
    asked, says = [], speaker(lambda i: "It is\n#### 7")

    def generate(model, prompts, *args, **more):
        asked.extend(prompts)
        says(model, prompts, *args, **more)

    monkeypatch.setattr(sampling, "generate", generate)
    assert traces.main([teacher, f"--data={data}", "--max_tokens=20", f"--out={out}"]) == 0
    tokenizer = toy_models.toy_tokenizer()
    assert tokenizer.decode(asked[0]) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n"
        "<|im_start|>user\nHow many?<|im_end|>\n"
        "<|im_start|>assistant\nI have 4.<|im_end|>\n"
        "<|im_start|>user\nAnd with 3 more?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    (trace,) = read_lines(out / "traces.jsonl")
    kept = [*before[:2], earlier | {"weight": 0, "shortened": True}, before[3]]
    assert trace["messages"] == [*kept, {"role": "assistant", "content": "It is\n#### 7"}]
    assert (trace["answer"], trace["task"]) == ("7", "word_problems")
    (document,) = Formatter(tokenizer).documents([to_example(trace, "t:1")])
    # "I have 4." is not trained on
    assert tokenizer.decode(document.tokens[document.weights != 0]) == "It is\n#### 7<|im_end|>"


class Row:
    """An example whose row has other columns."""

    answer, task, origin = "7", "", "x.jsonl:3"

    def __init__(self, messages, /, **columns):
        self.messages, self.columns = tuple(messages), columns


def collected(example, prompt="", text="ok"):
    """The trace that is made of one sample."""
    subject = SimpleNamespace(tokenizer=toy_models.toy_tokenizer(), sha256="ab")
    args = SimpleNamespace(keep="ended", data="x.jsonl")
    rows, ids = {(0, 0): dict(text=text, stopped=True)}, subject.tokenizer.encode(prompt)
    (line,) = traces.collect(args, subject, [example], [ids], rows)
    return json.loads(line)


def test_a_row_without_an_answer_of_its_own_keeps_its_question():
    turns = conversation(("user", "a"), ("assistant", "b"), ("user", "c"))
    untrained = turns[1] | {"weight": 0, "shortened": True}
    answer = {"role": "assistant", "content": "ok"}
    assert collected(Row(turns))["messages"] == [turns[0], untrained, turns[2], answer]
    question = conversation(("user", "a"))
    assert collected(Row(question))["messages"] == [*question, answer]


def test_prompts_alone_are_answered_too(teacher, tmp_path, monkeypatch):
    data, out = tmp_path / "prompts.jsonl", tmp_path / "t"
    kind = conversation(("system", "Be kind."), ("user", "How many?"))
    data.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("How many?", kind)))
    monkeypatch.setattr(sampling, "generate", speaker(lambda i: "7"))
    argv = [f"--data={data}", "--keep=ended", "--max_tokens=9", f"--out={out}"]
    assert traces.main([teacher, *argv]) == 0
    found = [trace["messages"] for trace in read_lines(out / "traces.jsonl")]
    answer = {"role": "assistant", "content": "7"}
    assert sorted(found, key=len) == [[kind[1], answer], [*kind, answer]]


def test_other_columns_come_along_but_none_that_says_something_else():
    turns = conversation(("user", "a"), ("assistant", "b"))
    tools = [{"type": "function", "function": {"name": "add"}}]
    kept = {"tools": tools, "nums": [1, 2]}
    replaced = {"question": "a", "answer": "#### 9", "source": "web", "solution": "b"}
    row = collected(Row(turns, **kept, **replaced, messages="no", prompt="x"))
    assert row.keys() == {"messages", "answer", "task", "source", "tools", "nums"}
    assert {name: row[name] for name in kept} == kept
    assert (row["answer"], row["source"]["teacher"]) == ("7", "ab")
    with pytest.raises(UserError, match="x.jsonl:3: column 'raw' holds a bytes"):
        collected(Row(turns, raw=b"1"))


def test_a_tag_that_the_template_opens_is_part_of_the_trace():
    turns = conversation(("user", "a"), ("assistant", "b"))
    row = collected(Row(turns), "<|im_start|>assistant\n<think>\n", "So.\n</think>\nIt is 7.")
    assert row["messages"][-1]["content"] == "<think>\nSo.\n</think>\nIt is 7."
    opening = with_template(
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|><think>\n{% endif %}"
    )
    (document,) = Formatter(opening).documents([to_example(row, "t:1")])
    trained = opening.decode(document.tokens[document.weights != 0])
    assert trained == "So.\n</think>\nIt is 7.<|im_end|>"  # what the teacher generated
    assert collected(Row(turns), "<think> is a tag\n", "So.")["messages"][-1]["content"] == "So."


def test_the_templates_arguments_are_the_runs_unless_given(teacher, writes, tmp_path):
    run = tmp_path / "run" / "checkpoints" / "step-1"
    shutil.copytree(teacher, run)
    arguments_tokenizer().save(run)
    (tmp_path / "run" / "config.json").write_text('{"chat_template_kwargs": "x=3"}')
    for name, argv, end in (
        ("a", [], "[thinks][x=3]"),
        ("b", ["--chat_template_kwargs=enable_thinking=false"], "assistant\n"),
        ("c", ["--chat-template-kwargs="], "[thinks]"),
    ):
        assert traces.main([str(run), *ARGS, *argv, f"--out={tmp_path / name}"]) == 0
        assert writes.first.endswith(end)
    assert traces.main([str(run), *ARGS, f"--out={tmp_path / 'b'}"]) == 2  # other traces


@pytest.mark.parametrize(
    "change,said",
    [
        ("--temperature=0", "same trace"),
        ("--n=0", "at least 1"),
        ("--data=word_problems", "endless"),
        ("--data=nowhere.jsonl", "nowhere"),
        ("--max_tokens=100000", "positions"),
        ("--seed=1", "another seed"),
        ("--keep=wrong", "keep"),
    ],
)
def test_wrong_inputs_are_one_line(change, said, teacher, writes, tmp_path, capsys):
    argv = [teacher, *ARGS, f"--out={tmp_path / 't'}"]
    if change == "--seed=1":
        assert traces.main(argv) == 0
    capsys.readouterr()
    assert traces.main([*argv, change]) == 2
    err = capsys.readouterr().err.strip()
    assert said in err and "\n" not in err
