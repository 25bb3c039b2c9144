"""Test sets: read in their own forms; gold answers are right, corrupted ones wrong."""

import json
import re

import pytest

from data.grade import grade_by_math_verify
from data.grading.code import IMPORT, find_code
from data.tasks import TASKS, grade
from errors import UserError
from eval import benchmarks, sampling
from tests.evaluation import (
    MATH,
    checkpoint,
    command,
    rows,
    small_sets,
    speaker,
    summary_of,
    svamp_row,
)
from tests.test_code import BREAK


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture
def figures(tiny, tmp_path, capsys, monkeypatch, real_data):
    """The figures of a task, from the whole command, where models say answer(example)."""

    def evaluated(task, answer, out, limit=0):
        examples = benchmarks.load(task, real_data).examples
        monkeypatch.setattr(sampling, "generate", speaker(lambda i: answer(examples[i])))
        argv = ["--tasks", task, "--data", real_data, "--max_tokens=8", f"--limit={limit}"]
        code, _, error = command(capsys)(tiny, *argv, "--out", tmp_path / out)
        assert code == 0, error
        return summary_of(tmp_path / out)["summaries"][0][2]

    return evaluated


def measured(figures):
    names = ("problems", "accuracy", "lenient", "unparsed", "truncated")
    return [figures[n][0] if n == "accuracy" else figures[n] for n in names]


def solution(example):
    return example.messages[-1]["content"]


# Gold solutions that math-verify, left to itself, does not take for their own answers; our graders
# take all.
EXCEPTIONS = {
    "gsm8k": {
        226: "it prefers 33.333 before a % sign to the last line",
        876: "it prefers the 3 of '60% = 3 questions' to the last line",
    },
    "math500": {},
}


@pytest.mark.parametrize("limit", [240, pytest.param(0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("task", EXCEPTIONS)
def test_gold_solutions_score_100_and_corrupted_ones_0(
    task, limit, real_data, figures, tmp_path, monkeypatch
):
    examples = benchmarks.load(task, real_data).examples[: limit or None]
    # the answer of the problem before, or another one that is not part of the right one
    other = {e.question: examples[i - 1].answer for i, e in enumerate(examples)}

    def gold(example):
        text = solution(example)
        return f"{text}\n#### {example.answer}" if task == "gsm8k" else text

    def corrupted(example):
        for wrong in (other[example.question], "123454321", "7777", "68686"):
            if wrong not in example.answer and example.answer not in wrong:
                break
        if task == "gsm8k":
            return f"Thus it is so.\n#### {wrong}"
        return f"Thus it is $\\boxed{{{wrong}}}$."

    assert measured(figures(task, gold, "gold", limit)) == [len(examples), 1.0, 1.0, 0.0, 0.0]
    refused = {row["problem"] for row in rows(tmp_path / "gold", task) if not row["math_verify"]}
    assert refused == {number for number in EXCEPTIONS[task] if number < len(examples)}
    count = 50 if limit else 150
    assert not any(grade_by_math_verify(corrupted(e), e.answer) for e in examples[:count])
    # slow, and all that it would do here is seen
    monkeypatch.setattr(sampling, "grade_by_math_verify", lambda text, answer: False)
    got = measured(figures(task, corrupted, "corrupted", limit))
    assert got == [len(examples), 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("limit", [20, pytest.param(0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("task,count", [("humaneval", 164), ("mbpp", 257)])
def test_gold_programs_score_100_and_corrupted_ones_0(task, count, limit, real_data, figures):
    """The sandbox included; a corrupted program calls the gold one and returns something else."""
    examples = benchmarks.load(task, real_data).examples
    assert len(examples) == count and {e.task for e in examples} == {task}

    def corrupted(example):
        program, _ = find_code(solution(example), example.answer)
        name = re.match(r"\w+", example.answer.partition(IMPORT)[2])[0]
        return f"```python\n{program}{BREAK.format(name=name, how='[value]')}\n```"

    for answer, score in ((solution, 1.0), (corrupted, 0.0)):
        found = measured(figures(task, answer, str(score), limit))
        assert found == [limit or count, score, score, 0.0, 0.0]


@pytest.mark.parametrize(
    "task,count",
    [("svamp", 1000), ("amc23", 40), ("aime24", 30), ("minerva_math", 272), ("olympiadbench", 675)],
)
def test_golds_of_the_other_sets_are_right_and_their_neighbours_wrong(task, count, real_data):
    if not (real_data / task / "test.jsonl").is_file():
        pytest.skip(f"SRLM_DATA has no {task}/test.jsonl")
    examples = benchmarks.load(task, real_data).examples

    def written(example):
        if task == "minerva_math":
            return solution(example)
        return f"It is $\\boxed{{{example.answer}}}$."

    assert len(examples) == count
    assert [e.answer for e in examples if not grade(e, written(e)).strict] == []
    if task in ("svamp", "amc23", "aime24"):  # numbers: neighbours are compared by value alone
        pairs = list(zip(examples, examples[1:], strict=False))
        wrong = [grade(e, written(other)).strict for e, other in pairs]
        assert wrong == [float(e.answer) == float(other.answer) for e, other in pairs]
        assert not all(wrong)


def test_every_set_is_read_and_graded(tmp_path):
    sets = small_sets(tmp_path / "sets")
    for task in MATH:
        example = benchmarks.load(task, sets).examples[0]
        assert "7" in example.question and "7" in example.answer
        right = sampling.grade_row(example, {"text": f"So \\boxed{{{example.answer}}}"})
        assert right["strict"] and right["lenient"] and right["parsed"] and right["math_verify"]
        wrong = sampling.grade_row(example, {"text": "So \\boxed{71}"})
        assert not (wrong["strict"] or wrong["lenient"] or wrong["math_verify"])
    minerva = benchmarks.load("minerva_math", sets).examples[0]
    assert sampling.grade_row(minerva, {"text": "\\boxed{7 \\times 10^{3}}"})["strict"]
    assert benchmarks.load("svamp", sets).examples[0].question == "There are 7 figs. How many?"
    # a toy task's problems are those of a run's own evaluation
    made = [
        TASKS["word_problems"].example("word_problems", "validation", f"0/{i}") for i in range(400)
    ]
    assert benchmarks.load("word_problems", sets).examples == tuple(made)


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
    row = {"svamp": svamp_row(written), "amc23": {"problem": "Find it.", "answer": written}}[task]
    (tmp_path / task).mkdir()
    (tmp_path / task / "test.jsonl").write_text(json.dumps(row))
    (example,) = benchmarks.load(task, tmp_path).examples
    assert grade(example, f"So \\boxed{{{gold}}}").strict
    assert not grade(example, f"So \\boxed{{{gold}1}}").strict
    if task == "svamp" or not isinstance(written, str):
        assert example.answer == gold


@pytest.mark.parametrize(
    "written", [None, True, "", "many", [12], {"a": 1}, float("nan"), float("inf")]
)
def test_a_gold_that_is_no_number_is_refused_by_its_row(tmp_path, written):
    (tmp_path / "svamp").mkdir()
    (tmp_path / "svamp" / "test.jsonl").write_text(json.dumps(svamp_row(written)))
    with pytest.raises(UserError, match="test.jsonl:1: not a row of svamp"):
        benchmarks.load("svamp", tmp_path)


@pytest.mark.parametrize("question,words", [(5, "not a row of"), ("a\ud800", "half a character")])
def test_a_question_that_no_tokenizer_takes_is_refused_by_its_row(tmp_path, question, words):
    path = tmp_path / "math500" / "test.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps({"problem": question, "answer": "1"}))
    with pytest.raises(UserError, match=f"test.jsonl:1: .*{words}"):
        benchmarks.load("math500", tmp_path)
