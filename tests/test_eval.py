"""`python -m eval`: samples against `transformers`, gold and corrupted solutions, what a kill leaves, what is refused."""

import argparse
import json
import re
import shutil

import pytest
import torch

import train
from data.dataset import divide
from data.grade import grade_by_math_verify
from data.grading.code import IMPORT, find_code
from data.tasks import TASKS, Example, grade
from errors import UserError
from eval import __main__ as evaluation
from eval import benchmarks, prompts, sampling, summary
from model.checkpoint import build_model, save_model
from model.generate import Completion, generate
from model.transformer import PRESETS, ModelConfig
from tests.distributed_workers import eval_main, spawned
from tests.test_code import BREAK

CODE = ("humaneval", "mbpp")
MATH = ("gsm8k", "svamp", "math500", "amc23", "aime24", "minerva_math", "olympiadbench")


def checkpoint(folder, seed=0, tokenizer=None, **shape):
    folder.mkdir(parents=True)
    tokenizer = tokenizer or train.toy_tokenizer()
    config = ModelConfig(
        **vars(PRESETS["tiny"])
        | dict(
            hidden_size=32,
            intermediate_size=48,
            num_heads=2,
            num_kv_heads=1,
            head_dim=16,
            vocab_size=tokenizer.size,
            tie_word_embeddings=False,
        )
        | shape
    )
    model = build_model(config, None, device="cpu", seed=seed)
    with torch.no_grad():
        model.head_VD.mul_(4)  # far from uniform: its likeliest ids are not nearly tied
    save_model(model, folder, tokenizer, tokenizer.stop_ids())
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture
def run(capsys):
    """Runs the command; (exit code, what it printed, errors)."""
    return lambda *argv: (evaluation.main([str(a) for a in argv]), *capsys.readouterr())


def rows(folder, task):
    (path,) = folder.glob(f"*/{task}.jsonl")
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def small_sets(folder):
    """Test sets of three rows each, in the sets' own forms, with gold answers 7, 8, 9 (of code: programs that add these)."""
    made = {
        "gsm8k": lambda i: {
            "question": f"How much is {i}?",
            "answer": f"It is <<{i}={i}>>{i}.\n#### {i}",
        },
        "svamp": lambda i: {
            "Body": f"There are {i} figs",
            "Question": "How many?",
            "Equation": "( 1.0 )",
            "Answer": float(i),
        },
        "math500": lambda i: {
            "problem": f"Find ${i}$.",
            "solution": f"$\\boxed{{{i}}}$",
            "answer": f"{i}",
        },
        "amc23": lambda i: {"problem": f"Find ${i}$.", "answer": float(i)},
        "aime24": lambda i: {"problem": f"Find ${i}$.", "solution": "", "answer": f"00{i}"},
        "minerva_math": lambda i: {
            "problem": f"Find ${i}$.",
            "solution": f"So \\boxed{{{i}e3}} m.",
        },
        "olympiadbench": lambda i: {
            "question": f"Find ${i}$.",
            "solution": [f"It is {i}."],
            "final_answer": [f"${i}$"],
        },
        "humaneval": lambda i: {
            "prompt": f"def f{i}(x):\n",
            "canonical_solution": f"    return x + {i}\n",
            "entry_point": f"f{i}",
            "test": f"def check(f):\n    assert f(1) == {i + 1}",
        },
        "mbpp": lambda i: {
            "task_id": i + 4,
            "text": f"Add {i}.",
            "code": f"def f(x): return x + {i}",
            "test_list": [f"assert f(1) == {i + 1}"],
        },
    }
    for name, row in made.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "test.jsonl").write_text(
            "".join(json.dumps(row(i)) + "\n" for i in (7, 8, 9))
        )
    return folder


# --- samples ---------------------------------------------------------------------------------------------------------


def test_greedy_answers_and_scores_equal_those_of_transformers(tmp_path, run, request):
    """The same weights and questions through `transformers`: its tokenizer, its template, its generation."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from data.tokenizer import Tokenizer

    try:
        data = request.getfixturevalue("real_data")
        tokenizer = Tokenizer.load(data / "qwen2.5-tokenizer")
    except pytest.skip.Exception:
        data, tokenizer = small_sets(tmp_path / "sets"), None
    folder, new = checkpoint(tmp_path / "c", tokenizer=tokenizer), 6
    tasks = [*MATH, *CODE, "word_problems"]
    argv = [
        "--tasks",
        ",".join(tasks),
        "--greedy",
        "--limit",
        20,
        "--max_tokens",
        new,
        "--data",
        data,
        "--out",
        tmp_path / "out",
    ]
    code, _, error = run(folder, *argv)
    assert code == 0, error
    theirs, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder).eval(),
    )
    seen = set()
    for task in tasks:
        benchmark, got = benchmarks.load(task, data, 20), rows(tmp_path / "out", task)
        assert len(got) == min(20, len(benchmark.examples))
        for row, example in zip(got, benchmark.examples):
            assert (row["question"], row["gold"]) == (example.question, example.answer)
            words = (
                ""
                if task == "word_problems"
                else benchmarks.PROGRAM
                if task in CODE
                else benchmarks.BOXED
            )
            asked = [{"role": "user", "content": example.question + words}]
            prompt = theirs.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
            ids = theirs(prompt, return_tensors="pt", add_special_tokens=False)
            out = model.generate(**ids, max_new_tokens=new, do_sample=False)[
                0, ids["input_ids"].shape[1] :
            ]
            text = theirs.decode(out, skip_special_tokens=True)
            assert (row["text"], row["tokens"]) == (text, len(out)), task
            seen.add(text)
            assert sampling.grade_row(example, row) == sampling.grade_row(example, row | {"text": text})
    assert len(seen) > 20  # not the same few ids after every prompt


@pytest.fixture
def says(monkeypatch):
    """Makes every model say what `answer(example)` returns."""

    def prepare(answer, task, data):
        examples, tokenizer = benchmarks.load(task, data).examples, train.toy_tokenizer()

        def speak(model, prompts, *_, on_done, **more):
            for i in range(len(prompts)):
                on_done(i, Completion(tokenizer.encode(answer(examples[i])), [0.0], True))

        monkeypatch.setattr(sampling, "generate", speak)

    return prepare


# Gold solutions that math-verify, left to itself, does not take for their own answers; the graders of rewards and accuracy take all.
EXCEPTIONS = {
    "gsm8k": {
        226: "it prefers 33.333 before a % sign to the last line",
        876: "it prefers the 3 of '60% = 3 questions' to the last line",
    },
    "math500": {},
}


@pytest.mark.parametrize("task", EXCEPTIONS)
def test_gold_solutions_score_100_and_corrupted_ones_0(
    task, real_data, says, tiny, tmp_path, run, monkeypatch
):
    def figures(answer):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        says(answer, task, real_data)
        code, _, error = run(
            tiny, "--tasks", task, "--data", real_data, "--out", tmp_path / "out", "--max_tokens", 8
        )
        assert code == 0, error
        return json.loads((tmp_path / "out" / "summary.json").read_text())["summaries"][0][2]

    examples = benchmarks.load(task, real_data).examples
    gold = lambda e: (
        f"{e.messages[-1]['content']}\n#### {e.answer}"
        if task == "gsm8k"
        else e.messages[-1]["content"]
    )
    found = figures(gold)
    assert found["problems"] == len(examples)
    assert (found["accuracy"][0], found["lenient"], found["unparsed"], found["truncated"]) == (
        1.0,
        1.0,
        0.0,
        0.0,
    )
    assert {
        row["problem"] for row in rows(tmp_path / "out", task) if not row["math_verify"]
    } == set(EXCEPTIONS[task])
    other = {
        e.question: examples[i - 1].answer for i, e in enumerate(examples)
    }  # the answer of the problem before
    wrong = lambda e: next(
        a
        for a in (other[e.question], "123454321", "7777", "68686")
        if a not in e.answer and e.answer not in a
    )
    marked = (
        (lambda e: f"Thus it is so.\n#### {wrong(e)}")
        if task == "gsm8k"
        else lambda e: f"Thus it is $\\boxed{{{wrong(e)}}}$."
    )
    assert not any(grade_by_math_verify(marked(e), e.answer) for e in examples[:150])
    monkeypatch.setattr(
        sampling, "grade_by_math_verify", lambda text, answer: False
    )  # slow, and all it would do here is seen
    found = figures(marked)
    assert (found["problems"], found["accuracy"][0], found["lenient"], found["unparsed"]) == (
        len(examples),
        0.0,
        0.0,
        0.0,
    )


@pytest.mark.parametrize("limit", [20, pytest.param(0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("task,count", [("humaneval", 164), ("mbpp", 257)])
def test_gold_programs_score_100_and_corrupted_ones_0(
    task, count, limit, real_data, says, tiny, tmp_path, run
):
    """Through the whole command, sandbox and all; a corrupted program calls the gold one and returns something else."""
    examples = benchmarks.load(task, real_data).examples
    assert len(examples) == count and {e.task for e in examples} == {task}

    def corrupted(example):
        program, _ = find_code(gold(example), example.answer)
        name = re.match(r"\w+", example.answer.partition(IMPORT)[2])[0]
        return f"```python\n{program}{BREAK.format(name=name, how='[value]')}\n```"

    gold = lambda e: e.messages[-1]["content"]
    for answer, score in ((gold, 1.0), (corrupted, 0.0)):
        says(answer, task, real_data)
        out = tmp_path / str(score)
        code, _, error = run(
            tiny,
            "--tasks",
            task,
            "--limit",
            limit,
            "--data",
            real_data,
            "--out",
            out,
            "--max_tokens",
            8,
        )
        assert code == 0, error
        found = json.loads((out / "summary.json").read_text())["summaries"][0][2]
        assert (found["problems"], found["accuracy"][0], found["lenient"], found["unparsed"]) == (
            limit or count,
            score,
            score,
            0.0,
        )


@pytest.mark.parametrize(
    "task,count",
    [("svamp", 1000), ("amc23", 40), ("aime24", 30), ("minerva_math", 272), ("olympiadbench", 675)],
)
def test_golds_of_the_other_sets_are_right_and_their_neighbours_wrong(task, count, real_data):
    if not (real_data / task / "test.jsonl").is_file():
        pytest.skip(f"SRLM_DATA has no {task}/test.jsonl")
    examples = benchmarks.load(task, real_data).examples
    written = lambda e: (
        e.messages[-1]["content"] if task == "minerva_math" else f"It is $\\boxed{{{e.answer}}}$."
    )
    assert [e.answer for e in examples if not grade(e, written(e)).strict] == [] and len(
        examples
    ) == count
    if task in (
        "svamp",
        "amc23",
        "aime24",
    ):  # numbers: their neighbours' are compared by value alone
        pairs = list(zip(examples, examples[1:]))
        wrong = [grade(e, written(other)).strict for e, other in pairs]
        assert wrong == [float(e.answer) == float(other.answer) for e, other in pairs] and not all(
            wrong
        )


def test_every_set_is_read_and_graded(tmp_path):
    sets = small_sets(tmp_path / "sets")
    for task in MATH:
        example = benchmarks.load(task, sets).examples[0]
        assert "7" in example.question and "7" in example.answer
        right = sampling.grade_row(example, {"text": f"So \\boxed{{{example.answer}}}"})
        assert right["strict"] and right["lenient"] and right["parsed"] and right["math_verify"]
        assert not any(
            map(
                sampling.grade_row(example, {"text": "So \\boxed{71}"}).get,
                ("strict", "lenient", "math_verify"),
            )
        )
    assert sampling.grade_row(
        benchmarks.load("minerva_math", sets).examples[0], {"text": "\\boxed{7 \\times 10^{3}}"}
    )["strict"]
    assert benchmarks.load("svamp", sets).examples[0].question == "There are 7 figs. How many?"
    embedded, held_out = benchmarks.load("word_problems", sets).examples, TASKS["word_problems"]
    assert embedded == tuple(
        held_out.example("word_problems", "heldout", f"0/{i}") for i in range(400)
    )  # those of a run's own evaluation


@pytest.mark.parametrize(
    "written,gold",
    [
        (12, "12"),
        (12.0, "12"),
        ("12", "12"),
        ("12.0", "12"),
        (" 12 ", "12"),
        ("1,234", "1234"),
        (0.5, "0.5"),
        ("0.5", "0.5"),
        (-3.0, "-3"),
        (1e16, "1" + "0" * 16),
        (1e-7, "0.0000001"),
        ("12 apples", "12"),
    ],
)
@pytest.mark.parametrize("task", ["svamp", "amc23"])
def test_a_gold_number_is_the_same_whatever_its_type(tmp_path, task, written, gold):
    row = {
        "svamp": {
            "Body": "There are figs",
            "Question": "How many?",
            "Equation": "( 1.0 )",
            "Answer": written,
        },
        "amc23": {"problem": "Find it.", "answer": written},
    }[task]
    (tmp_path / task).mkdir()
    (tmp_path / task / "test.jsonl").write_text(json.dumps(row))
    (example,) = benchmarks.load(task, tmp_path).examples
    assert (
        grade(example, f"So \\boxed{{{gold}}}").strict
        and not grade(example, f"So \\boxed{{{gold}1}}").strict
    )
    assert task == "amc23" and isinstance(written, str) or example.answer == gold


@pytest.mark.parametrize(
    "written", [None, True, "", "many", [12], {"a": 1}, float("nan"), float("inf")]
)
def test_a_gold_that_is_no_number_is_refused_by_its_row(tmp_path, written):
    (tmp_path / "svamp").mkdir()
    row = {
        "Body": "There are figs",
        "Question": "How many?",
        "Equation": "( 1.0 )",
        "Answer": written,
    }
    (tmp_path / "svamp" / "test.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match="test.jsonl:1: not a row of svamp"):
        benchmarks.load("svamp", tmp_path)


# --- resumption and ranks ----------------------------------------------------------------------------------------------

SAMPLED = [
    "--tasks",
    "word_problems",
    "--n",
    3,
    "--k",
    "1,3",
    "--limit",
    8,
    "--max_tokens",
    12,
    "--temperature",
    1,
    "--batch_size",
    5,
]


def same(a, b):
    """Equal samples; the sum of log-probs to what rounding in another batch changes."""
    without = lambda rows: [{k: v for k, v in row.items() if k != "logp"} for row in rows]
    return without(a) == without(b) and [r["logp"] for r in a] == pytest.approx(
        [r["logp"] for r in b], abs=2e-3
    )


@pytest.mark.parametrize("group", [0, 2])
def test_a_killed_evaluation_goes_on_with_what_is_missing(group, tiny, tmp_path, run, monkeypatch):
    whole, broken, sampled = tmp_path / "whole", tmp_path / "broken", [*SAMPLED, "--group", group]
    assert run(tiny, *sampled, "--out", whole)[0] == 0
    written, line = [], sampling.json_line

    def dies(row):
        written.append(row)
        if len(written) > 7:
            raise KeyboardInterrupt
        return line(row)

    monkeypatch.setattr(sampling, "json_line", dies)
    assert run(tiny, *sampled, "--out", broken)[0] == 130
    monkeypatch.setattr(sampling, "json_line", line)
    (part,) = broken.glob("*/*.part-0.jsonl")
    part.write_text(part.read_text() + line(written[-1])[:40])  # cut off in the middle of a line
    asked = []
    monkeypatch.setattr(
        sampling,
        "generate",
        lambda model, prompts, *a, **more: (
            asked.append(len(prompts)) or generate(model, prompts, *a, **more)
        ),
    )
    assert run(tiny, *sampled, "--out", broken)[0] == 0
    assert asked == ([6, 6, 6] if group else [24 - 7]) and not list(broken.glob("*/*.part-*"))
    assert same(rows(broken, "word_problems"), rows(whole, "word_problems"))
    if group:  # bit for bit
        assert rows(broken, "word_problems") == rows(whole, "word_problems")
    assert len({row["text"] for row in rows(whole, "word_problems")}) > 20
    figures = lambda out: {
        k: v
        for k, v in json.loads((out / "summary.json").read_text())["summaries"][0][2].items()
        if k != "tokens_per_second"
    }
    assert figures(broken) == figures(whole)
    more = [4 if a == 3 else "1,4" if a == "1,3" else a for a in sampled]
    before = sum(asked)
    assert (
        run(tiny, *more, "--out", broken)[0] == 0 and sum(asked) == before + 8
    )  # one more sample of each problem
    assert (
        run(tiny, *sampled, "--out", broken)[0] == 0 and sum(asked) == before + 8
    )  # nothing is missing; three of the four are shown
    assert figures(broken) == figures(whole)
    code, _, error = run(tiny, *SAMPLED[:-4], "--temperature", 0.5, "--out", broken)
    assert code == 2 and "another temperature (1.0, now 0.5)" in error and error.count("\n") == 1


def test_two_ranks_write_the_same_samples(tiny, tmp_path, run):
    argv = [str(a) for a in (tiny, *SAMPLED)]
    assert run(*argv, "--out", tmp_path / "one")[0] == 0
    assert spawned(eval_main, 2, [*argv, "--out", str(tmp_path / "two")]) == [0, 0]
    assert same(rows(tmp_path / "two", "word_problems"), rows(tmp_path / "one", "word_problems"))
    assert (tmp_path / "two" / "summary.png").stat().st_size > 1000


# --- prompts, comparison, report ---------------------------------------------------------------------------------------


def stated(out, task):
    (path,) = out.glob(f"*/{task}.json")
    return json.loads(path.read_text())["identity"]["prompt"]


def test_prompts_and_what_is_stated(tiny, tmp_path, run):
    sets = small_sets(tmp_path / "sets")
    base = [
        tiny,
        "--tasks",
        "gsm8k,word_problems",
        "--greedy",
        "--limit",
        2,
        "--max_tokens",
        4,
        "--data",
        sets,
    ]
    for kind in ("plain", "chat", "few_shot"):
        assert run(*base, "--prompt", kind, "--out", tmp_path / kind)[0] == 0
    assert (
        stated(tmp_path / "plain", "gsm8k")["first_prompt"] == "How much is 7?" + benchmarks.BOXED
    )
    chat = stated(tmp_path / "chat", "gsm8k")
    assert (
        chat["first_prompt"]
        == f"<|im_start|>user\nHow much is 7?{benchmarks.BOXED}<|im_end|>\n<|im_start|>assistant\n"
    )
    few = stated(tmp_path / "few_shot", "word_problems")["first_prompt"]
    shots = [
        TASKS["word_problems"].example("word_problems", "train", f"shot/{i}") for i in range(4)
    ]
    assert few.startswith(
        "Question: " + shots[0].question + "\nAnswer: " + shots[0].messages[-1]["content"]
    ) and few.endswith("now?\nAnswer:")
    assert few.count("Question:") == 5
    text = (tmp_path / "chat" / "summary.md").read_text()
    assert (
        chat["first_prompt_sha256"][:12] in text
        and chat["template_sha256"][:12] in text
        and "greedy" in text
    )
    assert (
        run(
            *base,
            "--prompt",
            "chat",
            "--system",
            "Be brief.",
            "--instruction",
            " Go.",
            "--prefill",
            "So",
            "--out",
            tmp_path / "own",
        )[0]
        == 0
    )
    own = stated(tmp_path / "own", "gsm8k")["first_prompt"]
    assert (
        own
        == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow much is 7? Go.<|im_end|>\n<|im_start|>assistant\nSo"
    )


def asked_for(**options):
    """The options of the command as far as prompts read them."""
    args = evaluation.parse(["checkpoint", "--tasks=gsm8k"])
    return argparse.Namespace(**vars(args) | options)


def test_code_is_completed_as_it_stands_or_asked_for():
    code = "def f(x):\n    return"
    turns = ({"role": "user", "content": code}, {"role": "assistant", "content": " x"})
    benchmark, tokenizer = (
        benchmarks.Benchmark("humaneval", (Example(turns),), benchmarks.PROGRAM, (), "a", "b"),
        train.toy_tokenizer(),
    )
    plain = prompts.build(benchmark, tokenizer, {}, asked_for(prompt="plain"))
    chat = prompts.build(benchmark, tokenizer, {}, asked_for(prompt="chat"))
    assert plain.stated["first_prompt"] == code and "\ndef" in plain.stop
    assert code + benchmarks.PROGRAM in chat.stated["first_prompt"] and not chat.stop
    with pytest.raises(UserError, match="no worked examples"):
        prompts.build(benchmark, tokenizer, {}, asked_for(prompt="few_shot"))


def test_a_few_shot_answer_ends_before_the_next_question(tiny, tmp_path, run, monkeypatch):
    tokenizer, stops = train.toy_tokenizer(), []

    def speak(model, prompts, *_, on_done, stop_strings, **more):
        stops.append(stop_strings)
        for i in range(len(prompts)):
            on_done(
                i,
                Completion(
                    tokenizer.encode("It is \\boxed{7}.\n\nQuestion: And? \\boxed{1}"), [0.0], True
                ),
            )

    monkeypatch.setattr(sampling, "generate", speak)
    sets = small_sets(tmp_path / "sets")
    assert (
        run(
            tiny,
            "--tasks",
            "gsm8k",
            "--prompt",
            "few_shot",
            "--data",
            sets,
            "--out",
            tmp_path / "out",
        )[0]
        == 0
    )
    assert stops == [("\nQuestion:",)] and [
        row["strict"] for row in rows(tmp_path / "out", "gsm8k")
    ] == [True, False, False]


def test_comparison_of_two_checkpoints(tiny, tmp_path, run, says):
    sets, other = small_sets(tmp_path / "sets"), checkpoint(tmp_path / "other", seed=5)
    base = ["--tasks", "gsm8k", "--data", sets, "--out", tmp_path / "out"]
    says(lambda e: f"#### {e.answer}", "gsm8k", sets)
    assert run(tiny, *base)[0] == 0
    says(lambda e: "#### 7", "gsm8k", sets)  # right once in three
    code, out, _ = run(other, *base, "--compare", tiny)
    assert code == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    ((_, _, _, figures),) = summary["comparisons"]
    assert figures["difference"] == pytest.approx(-2 / 3) and (
        figures["better"],
        figures["worse"],
        figures["p"],
    ) == (0, 2, 0.5)
    assert [f["accuracy"][0] for _, _, f in summary["summaries"]] == pytest.approx([1 / 3, 1])
    assert "-66.7 [" in out and "-66.7 [" in (tmp_path / "out" / "summary.md").read_text()


def test_a_comparison_says_where_the_two_were_asked_differently(tmp_path, run):
    """Runs that were trained with prompts of their own are asked with them: what differs stands in the table."""
    sets = small_sets(tmp_path / "sets")
    runs = {
        "base": [],
        "twin": ["--seed=1"],
        "suffix": ["--prompt_suffix= Go."],
        "system": ["--system_prompt=Be kind."],
        "plain": ["--template=plain"],
        "both": ["--prompt_suffix= Go.", "--system_prompt=Be kind."],
    }
    for name, args in runs.items():
        trained(tmp_path, name, "word_problems:4", "--eval_examples=0", *args)
    others = [tmp_path / name for name in runs if name != "base"]
    argv = [
        "--tasks",
        "gsm8k",
        "--greedy",
        "--max_tokens",
        2,
        "--data",
        sets,
        "--out",
        tmp_path / "out",
    ]
    code, out, error = run(*others, *argv, "--compare", tmp_path / "base")
    assert code == 0, error
    said = {
        line.split("-step")[0]: line
        for line in out.splitlines()
        if "base-step-1" in line and not line.startswith("base")
    }
    page = (tmp_path / "out" / "summary.md").read_text()
    wanted = {
        "twin": "alike",
        "suffix": "differently: instruction",
        "system": "differently: system",
        "plain": "differently: prompt",
        "both": "differently: system, instruction",
    }
    assert said.keys() == wanted.keys()
    for name, words in wanted.items():
        assert said[name].endswith(f" {words}") and any(
            line.startswith(f"| {name}-") and line.endswith(f"| {words} |")
            for line in page.splitlines()
        )
    kept = {
        c[0].split("-step")[0]: c[3]["asked_differently"]
        for c in json.loads((tmp_path / "out" / "summary.json").read_text())["comparisons"]
    }
    assert kept["suffix"] == {"instruction": [" Go.", None]} and kept["twin"] == {}


PROMPT = {"kind": "chat", "system": "", "instruction": "", "first_prompt": "<user>1+1?"}


@pytest.mark.parametrize(
    "prompt,sampling,said",
    [
        ({}, {}, []),
        ({"first_prompt": "[INST]1+1?"}, {}, ["template"]),
        ({"first_prompt": "[INST]1+1?"}, {"temperature": 0.5}, ["temperature", "template"]),
        (
            {"first_prompt": "[INST]1+1?"},
            {"top_p": 0.5, "max_tokens": 9},
            ["top_p", "max_tokens", "template"],
        ),
        (
            {"first_prompt": "<user>1+1? Go.", "instruction": " Go."},
            {"temperature": 0.5},
            ["instruction", "temperature"],
        ),
        ({"first_prompt": "1+1?", "kind": "plain"}, {}, ["prompt"]),
        (
            {
                "first_prompt": "<user>1+1?<think>",
                "chat_template_kwargs": {"enable_thinking": False},
            },
            {},
            ["chat_template_kwargs"],
        ),
    ],
)
def test_a_template_that_differs_is_named_unless_the_prompts_conditions_say_it(
    prompt, sampling, said
):
    """How samples are drawn does not explain a first prompt that differs."""

    def stated(prompt, sampling):
        conditions = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 64} | sampling
        return {"identity": {"prompt": PROMPT | prompt} | conditions, "about": {}}

    assert list(summary.asked_differently(stated(prompt, sampling), stated({}, {}))) == said


def test_answers_that_end_where_the_models_positions_do_are_stated_so(tmp_path, run):
    """The cap on new tokens is the model's, not the one that was asked for, and a pair with other caps was asked differently."""
    short, long = (
        checkpoint(tmp_path / name, seed=i, max_position_embeddings=n)
        for i, (name, n) in enumerate((("short", 90), ("long", 512)))
    )
    argv = [
        "--tasks",
        "word_problems",
        "--limit",
        2,
        "--greedy",
        "--max_tokens",
        100,
        "--instruction",
        "",
        "--out",
        tmp_path / "out",
    ]
    code, out, _ = run(short, *argv, "--compare", long)
    assert (
        code == 0
        and out.count("new tokens, for which the model has positions") == 1
        and "differently: max_tokens" in out
    )
    left = int(re.search(r"up to (\d+) new tokens, for", out)[1])
    assert 0 < left < 90 and all(
        row["tokens"] <= left
        for row in map(
            json.loads, next((tmp_path / "out").glob("short*/*.jsonl")).read_text().splitlines()
        )
    )


def test_a_summary_names_what_is_beside_it_and_not_in_it(tiny, tmp_path, run):
    argv = ["--greedy", "--limit", 2, "--max_tokens", 2, "--out", tmp_path / "out"]
    assert run(tiny, "--tasks", "word_problems_talk", *argv)[0] == 0
    assert "not in this summary" not in (tmp_path / "out" / "summary.md").read_text()
    code, out, _ = run(tiny, "--tasks", "word_problems", *argv)
    page = (tmp_path / "out" / "summary.md").read_text()
    assert code == 0 and all(
        re.search(
            r"not in this summary, though beside it: tiny-\w+ on word_problems_talk$", text, re.M
        )
        for text in (out, page)
    )
    assert (
        "not in this summary"
        not in run(tiny, "--tasks", "word_problems,word_problems_talk", *argv)[1]
    )


def test_samples_of_other_conditions_are_not_summed_up(tmp_path):
    """Another command began in the same folder while this one was generating."""
    ours, theirs = (summary.Samples(tmp_path / "c", "gsm8k") for _ in range(2))
    ours.begin({"temperature": 0.6}, {})
    (tmp_path / "c" / "gsm8k.json").unlink()
    theirs.begin({"temperature": 1.0}, {})
    with pytest.raises(UserError, match="another temperature"):
        ours.finish({}, 0, 0.0)
    assert not (tmp_path / "c" / "gsm8k.jsonl").exists()


def arguments_tokenizer():
    """The embedded tokenizer with a template that shows its arguments: [thinks] and [x=3]."""
    from data.tokenizer import Tokenizer

    files = dict(train.toy_tokenizer().files)
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is not defined or enable_thinking %}[thinks]{% endif %}{% if x is defined %}[x={{ x }}]{% endif %}{% endif %}"
    )
    files["tokenizer_config.json"] = json.dumps(
        json.loads(files["tokenizer_config.json"]) | {"chat_template": template}
    ).encode()
    return Tokenizer(files, "the tokenizer with arguments")


def test_arguments_of_the_chat_template_are_passed_and_stated(tmp_path, run):
    sets, folder = (
        small_sets(tmp_path / "sets"),
        checkpoint(
            tmp_path / "runs" / "r" / "checkpoints" / "step-1", tokenizer=arguments_tokenizer()
        ),
    )
    base = [folder, "--tasks", "gsm8k", "--greedy", "--limit", 1, "--max_tokens", 2, "--data", sets]
    given = {
        "none": [],
        "off": ["--chat_template_kwargs", "enable_thinking=false"],
        "three": ["--chat-template-kwargs", '{"x": 3}'],
    }
    (tmp_path / "runs" / "r" / "config.json").write_text("{}")
    ends = {
        "none": "[thinks]",
        "off": "assistant\n",
        "three": "[thinks][x=3]",
        "run's": "assistant\n[x=3]",
        "instead": "[thinks]",
    }
    for name in ends:
        if name == "run's":
            (tmp_path / "runs" / "r" / "config.json").write_text(
                '{"chat_template_kwargs": "enable_thinking=false,x=3"}'
            )
        argv = ["--chat_template_kwargs", ""] if name == "instead" else given.get(name, [])
        code, out, error = run(*base, *argv, "--out", tmp_path / name)
        assert code == 0 and stated(tmp_path / name, "gsm8k")["first_prompt"].endswith(
            ends[name]
        ), error
        kept = {
            "off": {"enable_thinking": False},
            "three": {"x": 3},
            "run's": {"enable_thinking": False, "x": 3},
        }.get(name)
        assert stated(tmp_path / name, "gsm8k").get("chat_template_kwargs") == kept and (
            f"chat_template_kwargs {kept}" in out
        ) == (kept is not None)
    code, _, error = run(*base, "--out", tmp_path / "none", "--chat_template_kwargs", "x=3")
    assert code == 2 and "another prompt" in error
    code, _, error = run(
        *base, "--out", tmp_path / "plain", "--prompt", "plain", "--chat_template_kwargs", "x=3"
    )
    assert code == 2 and "without a chat template" in error and error.count("\n") == 1


@pytest.mark.parametrize("task", CODE)
def test_code_is_asked_for_with_its_own_words_whatever_a_run_puts_behind_its_questions(
    task, tmp_path
):
    benchmark, tokenizer = (
        benchmarks.load(task, small_sets(tmp_path / "sets")),
        train.toy_tokenizer(),
    )
    for run in ({"prompt_suffix": "\nPut your answer in \\boxed{}."}, {"prompt_suffix": ""}, {}):
        asked = prompts.build(benchmark, tokenizer, run, asked_for())
        assert (
            asked.stated["instruction"] == benchmarks.PROGRAM
            and f"{benchmarks.PROGRAM}<|im_end|>" in asked.stated["first_prompt"]
        )
        assert (
            prompts.build(benchmark, tokenizer, run, asked_for(instruction=" Go.")).stated[
                "instruction"
            ]
            == " Go."
        )
    math = benchmarks.load("gsm8k", tmp_path / "sets")
    assert (
        prompts.build(math, tokenizer, {"prompt_suffix": " Think."}, asked_for()).stated["instruction"]
        == " Think."
    )


# --- what is refused ---------------------------------------------------------------------------------------------------


def trained(home, name, data, *args):
    """A run of one step."""
    argv = [
        "--mode=sft",
        "--model=tiny",
        "--device=cpu",
        "--steps=1",
        "--batch_size=1",
        f"--data={data}",
        f"--runs={home}",
        f"--name={name}",
    ]
    assert train.main([*argv, "--eval_tokens=2", *(args or ["--eval_examples=0"])]) == 0
    return home / name


def test_rows_that_a_run_trained_on_are_refused_unless_asked_for(tmp_path, run):
    sets, data = small_sets(tmp_path / "sets"), tmp_path / "mix.jsonl"
    clean = [{"question": f"What is {i}+1?", "answer": f"#### {i + 1}"} for i in range(4)]
    data.write_text(
        "".join(
            json.dumps(r) + "\n"
            for r in [*clean, {"question": " how much  is 8?", "answer": "#### 3"}]
        )
    )
    seen = trained(tmp_path, "seen", data)
    after = trained(
        tmp_path, "after", "word_problems", f"--model={seen / 'checkpoints' / 'step-1'}"
    )  # it began from the first
    base = [
        "--tasks",
        "word_problems,gsm8k",
        "--greedy",
        "--limit",
        2,
        "--max_tokens",
        2,
        "--data",
        sets,
        "--out",
        tmp_path / "out",
    ]
    for folder in (seen, after):
        code, _, error = run(folder, *base)
        assert (
            code == 2
            and "trained on 1 of gsm8k's 3 questions" in error
            and "test.jsonl:2" in error
            and "mix.jsonl" in error
            and error.count("\n") == 1
        )
    assert run(trained(tmp_path, "clean", "word_problems:10"), *base)[0] == 0
    code, out, _ = run(seen, *base, "--allow_trained")
    assert code == 0 and "WAS TRAINED ON 1 of gsm8k's questions" in out
    for held_out in (1, 2, 3, 4):  # a question that the run only validated on was not trained on
        asked = [e.question for e in divide(data, held_out)[1]]
        folder = trained(tmp_path, f"held-out-{held_out}", data, f"--eval_examples={held_out}")
        assert run(folder, *base)[0] == (2 if " how much  is 8?" in asked else 0)


def test_mbpp_keeps_to_its_split_and_is_refused_where_a_run_did_not(tmp_path, run):
    """A run on MBPP's own file has seen none of the test problems; one on a file with other ids, or in another form, is found out."""
    problem = lambda number: {
        "task_id": number,
        "prompt": f"Add {number}.",
        "code": "def f(x): return x",
        "test_list": ["assert f(1) == 1"],
    }
    sets = tmp_path / "sets"
    (sets / "mbpp").mkdir(parents=True)
    (sets / "mbpp" / "test.json").write_text(
        json.dumps([problem(number) for number in range(9, 612)])
    )
    examples = benchmarks.load("mbpp", sets).examples
    assert len(examples) == 500 and len(divide(sets / "mbpp" / "test.json", 0)[1]) == 11
    (tmp_path / "other.json").write_text(
        json.dumps([problem(9) | {"task_id": 700}, problem(16) | {"task_id": 701}])
    )
    (tmp_path / "asked.json").write_text(
        json.dumps([{"prompt": examples[3].question, "completion": "def f(x): return x"}])
    )
    for name, data, count in (
        ("own", sets / "mbpp" / "test.json", 0),
        ("other", tmp_path / "other.json", 1),
        ("asked", tmp_path / "asked.json", 1),
    ):
        trained(tmp_path, name, data)
        small = [
            "--greedy",
            "--limit",
            1,
            "--max_tokens",
            2,
            "--data",
            sets,
            "--out",
            tmp_path / "out",
        ]
        code, _, error = run(tmp_path / name, "--tasks", "mbpp", *small)
        assert code == (2 if count else 0) and (
            not count or f"trained on {count} of mbpp's 500 questions" in error
        ), error


def test_wrong_inputs_are_one_line(tiny, tmp_path, run):
    sets = small_sets(tmp_path / "sets")
    bare = tmp_path / "bare"
    shutil.copytree(tiny, bare)
    (bare / "tokenizer.json").unlink()
    no_template = tmp_path / "no_template"
    shutil.copytree(tiny, no_template)
    (no_template / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    yarn = tmp_path / "yarn"
    shutil.copytree(tiny, yarn)
    (yarn / "config.json").write_text(
        json.dumps(
            json.loads((tiny / "config.json").read_text())
            | {"rope_scaling": {"type": "yarn", "factor": 4.0}}
        )
    )
    for name, content in (("broken", "{"), ("foreign", '{"text": "a"}\n'), ("empty", "")):
        (tmp_path / name / "svamp").mkdir(parents=True)
        (tmp_path / name / "svamp" / "test.jsonl").write_text(content)
    (tmp_path / "foreign" / "humaneval").mkdir()
    shutil.copy(sets / "mbpp" / "test.jsonl", tmp_path / "foreign" / "humaneval")
    (tmp_path / "two" / "svamp").mkdir(parents=True)
    for name in ("test.jsonl", "test.json"):
        (tmp_path / "two" / "svamp" / name).write_text("[]")
    good = ["--data", sets, "--out", tmp_path / "out", "--max_tokens", 2]
    cases = (
        ([tiny, "--tasks", "gsm9k"], "did you mean gsm8k?"),
        ([tiny, "--tasks", "chess"], "there are gsm8k"),
        ([tiny, "--tasks", ","], "names none"),
        ([tiny, "--tasks", "mawps"], "no 'mawps'"),
        ([tiny], "--tasks"),
        (["--tasks", "gsm8k"], "CHECKPOINT"),
        ([tiny, "--tasks", "gsm8k", "--n", 2, "--k", "1,4"], "--k 4 needs as many samples"),
        ([tiny, "--tasks", "gsm8k", "--k", "a"], "--k a"),
        ([tiny, "--tasks", "gsm8k", "--group", -1], "--group"),
        ([tiny, "--tasks", "gsm8k", "--k", 0], "--k"),
        ([tiny, "--tasks", "gsm8k", "--n", 0], "--n"),
        ([tiny, "--tasks", "gsm8k", "--greedy", "--n", 4], "--greedy"),
        ([tiny, "--tasks", "gsm8k", "--temperature", 0], "--greedy"),
        ([tiny, "--tasks", "gsm8k", "--top_p", 0], "--top_p"),
        ([tiny, "--tasks", "gsm8k", "--max-tokens", 0], "--max_tokens"),
        ([tiny, "--tasks", "gsm8k", "--prompt", "fancy"], "few_shot"),
        (
            [bare, "--tasks", "gsm8k"],
            "no tokenizer.json; name a folder that has one with --tokenizer",
        ),
        (["tiny", "--tasks", "gsm8k"], "preset"),
        ([tmp_path / "none", "--tasks", "gsm8k"], "no such folder"),
        ([yarn, "--tasks", "gsm8k"], "rope scaling 'yarn' is not supported"),
        (
            [no_template, "--tasks", "gsm8k", "--prompt", "chat"],
            "no chat template; use --prompt plain",
        ),
        ([tiny, "--tasks", "svamp", "--data", tmp_path / "nowhere"], "no test set there"),
        ([tiny, "--tasks", "svamp", "--data", tmp_path / "two"], "which file of"),
        ([tiny, "--tasks", "svamp", "--data", tmp_path / "broken"], "not valid JSON"),
        ([tiny, "--tasks", "svamp", "--data", tmp_path / "foreign"], "not a row of svamp"),
        ([tiny, "--tasks", "humaneval", "--data", tmp_path / "foreign"], "not a row of humaneval"),
        ([tiny, "--tasks", "svamp", "--data", tmp_path / "empty"], "is empty"),
        ([tiny, "--tasks", "gsm8k", "--compare", tmp_path / "none"], "no such folder"),
    )
    for argv, words in cases:
        code, out, error = run(*good, *argv)
        assert code == 2 and words in error and error.count("\n") == 1 and not out, (argv, error)
    assert not (tmp_path / "out").exists()  # all of them before anything is written
    assert run(*good, bare, "--tasks", "gsm8k", "--greedy", "--tokenizer", tiny)[0] == 0
