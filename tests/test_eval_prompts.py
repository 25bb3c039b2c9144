"""How `python -m eval` asks: kinds of prompts, what is stated of them, pairs asked otherwise."""

import dataclasses
import re

import pytest

import toy_models
from data.tasks import TASKS, Example
from errors import UserError
from eval import benchmarks, prompts, sampling, summary
from tests.evaluation import (
    CODE,
    arguments_tokenizer,
    checkpoint,
    command,
    read_lines,
    rows,
    small_sets,
    speaker,
    stated,
    summary_of,
    trained,
)


@pytest.fixture
def run(capsys):
    return command(capsys)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


def build(benchmark, settings, **options):
    """Prompts as the command makes them with these options."""
    args = dataclasses.replace(prompts.PromptOptions(), **options)
    return prompts.build(benchmark, toy_models.toy_tokenizer(), settings, args)


def test_prompts_and_what_is_stated(tiny, tmp_path, run):
    sets = small_sets(tmp_path / "sets")
    base = [tiny, "--tasks=gsm8k,word_problems", "--greedy", "--limit=2", "--max_tokens=4"]
    base.append(f"--data={sets}")
    for kind in ("plain", "chat", "few_shot"):
        assert run(*base, f"--prompt={kind}", f"--out={tmp_path / kind}")[0] == 0
    plain = stated(tmp_path / "plain", "gsm8k")
    assert plain["first_prompt"] == "How much is 7?" + benchmarks.BOXED
    chat = stated(tmp_path / "chat", "gsm8k")
    question = f"<|im_start|>user\nHow much is 7?{benchmarks.BOXED}<|im_end|>\n"
    assert chat["first_prompt"] == question + "<|im_start|>assistant\n"
    few = stated(tmp_path / "few_shot", "word_problems")["first_prompt"]
    shot = TASKS["word_problems"].example("word_problems", "train", "shot/0")
    assert few.startswith(f"Question: {shot.question}\nAnswer: {shot.messages[-1]['content']}")
    assert few.endswith("now?\nAnswer:") and few.count("Question:") == 5
    text = (tmp_path / "chat" / "summary.md").read_text()
    assert chat["first_prompt_sha256"][:12] in text and chat["template_sha256"][:12] in text
    assert "greedy" in text
    own = ["--prompt=chat", "--system=Be brief.", "--instruction= Go.", "--prefill=So"]
    assert run(*base, *own, f"--out={tmp_path / 'own'}")[0] == 0
    assert stated(tmp_path / "own", "gsm8k")["first_prompt"] == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHow much is 7? Go.<|im_end|>\n<|im_start|>assistant\nSo"
    )


def test_code_is_completed_as_it_stands_or_asked_for():
    code = "def f(x):\n    return"
    turns = ({"role": "user", "content": code}, {"role": "assistant", "content": " x"})
    benchmark = benchmarks.Benchmark(
        "humaneval", (Example(turns),), benchmarks.PROGRAM, (), "a", "b"
    )
    plain, chat = build(benchmark, {}, prompt="plain"), build(benchmark, {}, prompt="chat")
    assert plain.stated["first_prompt"] == code and "\ndef" in plain.stop
    assert code + benchmarks.PROGRAM in chat.stated["first_prompt"] and not chat.stop
    with pytest.raises(UserError, match="no worked examples"):
        build(benchmark, {}, prompt="few_shot")


def test_an_instruction_stands_once_behind_the_question_of_a_few_shot_prompt(tmp_path):
    math = benchmarks.load("gsm8k", small_sets(tmp_path / "sets"))
    few_shot = build(math, {}, prompt="few_shot", instruction=" Go.")
    assert few_shot.stated["first_prompt"].endswith("Question: How much is 7? Go.\nAnswer:")
    assert few_shot.stated["first_prompt"].count("Go.") == 1


def test_a_few_shot_answer_ends_before_the_next_question(tiny, tmp_path, run, monkeypatch):
    stops, says = [], speaker(lambda i: "It is \\boxed{7}.\n\nQuestion: And? \\boxed{1}")

    def generate(*args, stop_strings, **more):
        stops.append(stop_strings)
        says(*args, **more)

    monkeypatch.setattr(sampling, "generate", generate)
    argv = ["--tasks=gsm8k", "--prompt=few_shot", f"--data={small_sets(tmp_path / 'sets')}"]
    assert run(tiny, *argv, f"--out={tmp_path / 'out'}")[0] == 0
    assert stops == [("\nQuestion:",)]
    assert [row["strict"] for row in rows(tmp_path / "out", "gsm8k")] == [True, False, False]


# the prompts that a run was trained with, how it differs from "base" and how that is said
RUNS = {
    "twin": (["--seed=1"], "alike"),
    "suffix": (["--prompt_suffix= Go."], "differently: instruction"),
    "system": (["--system_prompt=Be kind."], "differently: system"),
    "plain": (["--template=plain"], "differently: prompt"),
    "both": (
        ["--prompt_suffix= Go.", "--system_prompt=Be kind."],
        "differently: system, instruction",
    ),
}


def test_a_comparison_says_where_the_two_were_asked_differently(tmp_path, run):
    """Runs that were trained with prompts of their own are asked with them."""
    data = "word_problems:4"
    base = trained(tmp_path, "base", data)
    others = [trained(tmp_path, n, data, "--eval_examples=0", *a) for n, (a, _) in RUNS.items()]
    argv = ["--tasks=gsm8k", "--greedy", "--max_tokens=2", f"--out={tmp_path / 'out'}"]
    argv += [f"--data={small_sets(tmp_path / 'sets')}", f"--compare={base}"]
    code, out, error = run(*others, *argv)
    assert code == 0, error
    page = (tmp_path / "out" / "summary.md").read_text().splitlines()
    said = {}
    for line in out.splitlines():
        if "base-step-1" in line and not line.startswith("base"):
            said[line.split("-step")[0]] = line
    assert said.keys() == RUNS.keys()
    for name, (_, words) in RUNS.items():
        assert said[name].endswith(f" {words}")
        assert any(row.startswith(f"| {name}-") and row.endswith(f"| {words} |") for row in page)
    kept = {}
    for label, _, _, figures in summary_of(tmp_path / "out")["comparisons"]:
        kept[label.split("-step")[0]] = figures["asked_differently"]
    assert kept["suffix"] == {"instruction": [" Go.", None]} and kept["twin"] == {}


PROMPT = {"kind": "chat", "system": "", "instruction": "", "first_prompt": "<user>1+1?"}
WITHOUT_THINKING = {
    "first_prompt": "<user>1+1?<think>",
    "chat_template_kwargs": {"enable_thinking": False},
}
OTHER_TEMPLATE = {"first_prompt": "[INST]1+1?"}


@pytest.mark.parametrize(
    "prompt,options,said",
    [
        ({}, {}, []),
        (OTHER_TEMPLATE, {}, ["template"]),
        (OTHER_TEMPLATE, {"temperature": 0.5}, ["temperature", "template"]),
        (OTHER_TEMPLATE, {"top_p": 0.5, "max_tokens": 9}, ["top_p", "max_tokens", "template"]),
        (
            {"first_prompt": "<user>1+1? Go.", "instruction": " Go."},
            {"temperature": 0.5},
            ["instruction", "temperature"],
        ),
        ({"first_prompt": "1+1?", "kind": "plain"}, {}, ["prompt"]),
        (WITHOUT_THINKING, {}, ["chat_template_kwargs"]),
    ],
    ids=["alike", "template", "temperature", "top-p", "instruction", "kind", "arguments"],
)
def test_a_template_that_differs_is_named_unless_the_prompts_conditions_say_it(
    prompt, options, said
):
    """How samples are drawn does not explain a first prompt that differs."""

    def conditions(prompt, options):
        identity = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 64} | options
        return {"identity": identity | {"prompt": PROMPT | prompt}, "about": {}}

    differing = summary.asked_differently(conditions(prompt, options), conditions({}, {}))
    assert list(differing) == said


def test_answers_that_end_where_the_models_positions_do_are_stated_so(tmp_path, run):
    """The cap on new tokens is then the model's, and a pair with other caps is no equal one."""
    short = checkpoint(tmp_path / "short", seed=0, max_position_embeddings=90)
    long = checkpoint(tmp_path / "long", seed=1, max_position_embeddings=512)
    argv = ["--tasks=word_problems", "--limit=2", "--greedy", "--max_tokens=100"]
    argv += ["--instruction=", f"--out={tmp_path / 'out'}", f"--compare={long}"]
    code, out, _ = run(short, *argv)
    assert code == 0 and "differently: max_tokens" in out
    (left,) = re.findall(r"up to (\d+) new tokens, for which the model has positions", out)
    assert 0 < int(left) < 90
    (path,) = (tmp_path / "out").glob("short*/*.jsonl")
    assert all(row["tokens"] <= int(left) for row in read_lines(path))


# name -> (the options, the end of the first prompt, the arguments that are stated)
ARGUMENTS = {
    "none": ([], "[thinks]", None),
    "off": (
        ["--chat_template_kwargs", "enable_thinking=false"],
        "assistant\n",
        {"enable_thinking": False},
    ),
    "three": (["--chat-template-kwargs", '{"x": 3}'], "[thinks][x=3]", {"x": 3}),
    "run's": ([], "assistant\n[x=3]", {"enable_thinking": False, "x": 3}),
    "instead": (["--chat_template_kwargs", ""], "[thinks]", None),
}


def test_arguments_of_the_chat_template_are_passed_and_stated(tmp_path, run):
    home = tmp_path / "runs" / "r"
    folder = checkpoint(home / "checkpoints" / "step-1", tokenizer=arguments_tokenizer())
    base = [folder, "--tasks=gsm8k", "--greedy", "--limit=1", "--max_tokens=2"]
    base.append(f"--data={small_sets(tmp_path / 'sets')}")
    (home / "config.json").write_text("{}")
    for name, (argv, end, arguments) in ARGUMENTS.items():
        if name == "run's":
            config = '{"chat_template_kwargs": "enable_thinking=false,x=3"}'
            (home / "config.json").write_text(config)
        code, out, error = run(*base, *argv, "--out", tmp_path / name)
        assert code == 0, error
        prompt = stated(tmp_path / name, "gsm8k")
        assert prompt["first_prompt"].endswith(end)
        assert prompt.get("chat_template_kwargs") == arguments
        assert (f"chat_template_kwargs {arguments}" in out) == (arguments is not None)
    code, _, error = run(*base, "--out", tmp_path / "none", "--chat_template_kwargs=x=3")
    assert code == 2 and "another prompt" in error
    plain = ["--prompt=plain", "--chat_template_kwargs=x=3"]
    code, _, error = run(*base, "--out", tmp_path / "plain", *plain)
    assert code == 2 and "without a chat template" in error and error.count("\n") == 1


@pytest.mark.parametrize("task", CODE)
def test_code_is_asked_for_with_its_own_words_whatever_a_run_puts_behind_its_questions(
    task, tmp_path
):
    benchmark = benchmarks.load(task, small_sets(tmp_path / "sets"))
    for settings in (
        {"prompt_suffix": "\nPut your answer in \\boxed{}."},
        {"prompt_suffix": ""},
        {},
    ):
        asked = build(benchmark, settings).stated
        assert asked["instruction"] == benchmarks.PROGRAM
        assert f"{benchmarks.PROGRAM}<|im_end|>" in asked["first_prompt"]
        assert build(benchmark, settings, instruction=" Go.").stated["instruction"] == " Go."
    math = benchmarks.load("gsm8k", tmp_path / "sets")
    assert build(math, {"prompt_suffix": " Think."}).stated["instruction"] == " Think."
