"""The toy task: three styles of solving the same problems, running text, and its two splits."""

import hashlib
import re

import pytest

import toy_models
from data.tasks import TASKS, grade
from data.toy import is_validation

STYLES = ("word_problems", "word_problems_talk", "word_problems_long")
PROBLEM = re.compile(r"\w+ has \d+ \w+\. .*?How many \w+ now\?")


def answered(question):
    """The answer, from the words of the question alone."""
    first, *told = re.findall(r"[^.?]+[.?]", question)[:-1]

    def number(sentence):
        return int(re.search(r"\d+", sentence)[0])

    total = number(first)
    for sentence in told:
        verb = re.search(r"finds|buys|A friend gives|loses|sells|gives away|times", sentence)[0]
        sign = 1 if verb in ("finds", "buys", "A friend gives") else -1
        total = total * number(sentence) if verb == "times" else total + sign * number(sentence)
    return total


@pytest.mark.parametrize("name", STYLES)
def test_every_style_solves_the_problem(name):
    tokenizer = toy_models.toy_tokenizer()
    longest = {"word_problems": 45, "word_problems_talk": 75, "word_problems_long": 100}[name]
    for split in ("train", "validation"):
        for i in range(150):
            e = TASKS[name].example(name, split, f"0/{i}")
            solution = e.messages[1]["content"]
            assert (
                e.answer == str(answered(e.question))
                and grade(e, solution).strict
                and not grade(e, solution + "1").strict
            )
            steps = re.findall(r"(\d+)([+*-])(\d+)=(\d+)", solution.replace("<think>", " "))
            for left, op, right, result in steps:
                values = {
                    "+": int(left) + int(right),
                    "-": int(left) - int(right),
                    "*": int(left) * int(right),
                }
                assert values[op] == int(result)
            assert len(tokenizer.encode(solution)) <= longest
            assert TASKS[name].example(name, split, f"0/{i}") == e
            assert is_validation(e.question) == (split == "validation")


def test_other_splits_and_tasks_without_problems_are_refused():
    for name, split in (("word_problems", "heldout"), ("gsm8k", "train")):
        with pytest.raises(ValueError, match=f"{name} makes no problems for the split '{split}'"):
            TASKS[name].example(name, split, "0/0")


def test_what_the_first_style_makes_is_what_it_always_was():
    made = [
        repr(TASKS["word_problems"].example("word_problems", split, f"0/{i}"))
        for split in ("train", "validation")
        for i in range(500)
    ]
    assert hashlib.sha256("".join(made).encode()).hexdigest()[:16] == "20ddbc7e09822d77"


def test_running_text_holds_whole_problems_of_one_split():
    task, found = TASKS["word_problems_text"], []
    for split in ("train", "validation"):
        for i in range(200):
            e = task.example("word_problems_text", split, f"0/{i}")
            text = e.question + e.messages[1]["content"]
            problems = PROBLEM.findall(text)
            assert problems[0] == e.question and {is_validation(p) for p in problems} == {
                split == "validation"
            }
            assert e.answer == str(answered(e.question)) and text.count("####") == (
                len(problems) == 1
            )
            for solution, problem in zip(re.split(PROBLEM, text)[1:], problems, strict=True):
                assert int(re.findall(r"\d+", solution)[-1]) == answered(problem)
            assert task.example("word_problems_text", split, f"0/{i}") == e
            found.append((len(problems), "####" in text, "<think>" in text))
    assert {n for n, _, _ in found} == {1, 2, 3, 4} and 0.2 < sum(m for _, m, _ in found) / len(
        found
    ) < 0.3
