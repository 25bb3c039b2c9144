"""Rows of public data sets: read as they are written, or refused in one line."""

import gzip
import json
import math
import time

import pytest

from data.formats import read_rows, to_example, unread_columns
from data.gold import gold_of_text
from data.messages import normalise_messages
from data.tasks import grade
from errors import UserError


def content(example):
    return [(m["role"], m["content"]) for m in example.messages]


QUESTION_AND_ANSWER = [("user", "Q?"), ("assistant", "A.")]


@pytest.mark.parametrize(
    "row,messages,answer,task",
    [
        ({"question": "Q?", "answer": "5"}, [("user", "Q?"), ("assistant", "5")], "5", "number"),
        ({"question": "Q?", "answer": 5}, [("user", "Q?"), ("assistant", "5")], "5", "number"),
        ({"question": "Q?", "answer": 5.0}, [("user", "Q?"), ("assistant", "5")], "5", "number"),
        (
            {"question": "Q?", "answer": 0.25},
            [("user", "Q?"), ("assistant", "0.25")],
            "0.25",
            "number",
        ),
        (
            {"question": "Q?", "answer": "x^2+1"},
            [("user", "Q?"), ("assistant", "x^2+1")],
            "x^2+1",
            "answer",
        ),
        (
            {"question": "Q?", "answer": "It is the third one."},
            [("user", "Q?"), ("assistant", "It is the third one.")],
            None,
            "",
        ),
        (
            {"question": "Q?", "answer": "So \\boxed{7}."},
            [("user", "Q?"), ("assistant", "So \\boxed{7}.")],
            "7",
            "answer",
        ),
        ({"problem": "Q?", "answer": "2"}, [("user", "Q?"), ("assistant", "2")], "2", "number"),
        ({"problem": "Q?", "solution": "A.", "answer": "3"}, QUESTION_AND_ANSWER, "3", "math"),
        ({"problem": "Q?", "solution": "A.", "answer": 3}, QUESTION_AND_ANSWER, "3", "math"),
        (
            {
                "problem": "Q?",
                "solution": "It is $\\boxed{\\frac{1}{2}}$.",
                "level": "Level 1",
                "type": "Algebra",
            },
            [("user", "Q?"), ("assistant", "It is $\\boxed{\\frac{1}{2}}$.")],
            "\\frac{1}{2}",
            "math",
        ),
        ({"prompt": "Q?", "solution": "2"}, [("user", "Q?"), ("assistant", "2")], "2", "math"),
        (
            {"prompt": "Q?", "completion": "A.", "solution": "12"},
            QUESTION_AND_ANSWER,
            "12",
            "number",
        ),
        ({"prompt": "Q?", "completion": "A.", "answer": "12"}, QUESTION_AND_ANSWER, "12", "number"),
        ({"prompt": "Q?", "completion": "42"}, [("user", "Q?"), ("assistant", "42")], None, ""),
        (
            {
                "prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q?"}],
                "answer": "4",
            },
            [("system", "S"), ("user", "Q?"), ("assistant", "4")],
            "4",
            "number",
        ),
        (
            {
                "prompt": [{"role": "user", "content": "Q?"}],
                "completion": [{"role": "assistant", "content": "A."}],
            },
            QUESTION_AND_ANSWER,
            None,
            "",
        ),
        ({"problem": "Q?", "final_answer": "9"}, [("user", "Q?")], "9", "number"),
        (
            {
                "prompt": [{"role": "user", "content": "Q?"}],
                "reward_model": {"ground_truth": "34", "style": "rule"},
                "ability": "MATH",
            },
            [("user", "Q?")],
            "34",
            "number",
        ),
        (
            {"problem": "Q?", "solution": "", "answer": "4"},
            [("user", "Q?"), ("assistant", "4")],
            "4",
            "number",
        ),
        (
            {"instruction": "Q?", "response": "A.", "category": "open_qa"},
            QUESTION_AND_ANSWER,
            None,
            "",
        ),
        ({"input": "Q?", "output": "A."}, QUESTION_AND_ANSWER, None, ""),
        (
            {"problem": "Q?", "solution": "It is shown.", "answer": "proof"},
            [("user", "Q?"), ("assistant", "It is shown.")],
            None,
            "",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "Q?"},
                    {"role": "assistant", "content": "A."},
                ],
                "solution": "We add them and it follows at once.",
            },
            QUESTION_AND_ANSWER,
            None,
            "",
        ),
        (
            {"question": "Q?", "answer": 1e-7},
            [("user", "Q?"), ("assistant", "0.0000001")],
            "0.0000001",
            "number",
        ),
        (
            {"question": "Q?", "answer": 10**400},
            [("user", "Q?"), ("assistant", str(10**400))],
            str(10**400),
            "number",
        ),
        (
            {"prompt": "Q?", "reward_model": {"ground_truth": '["2"]'}},
            [("user", "Q?")],
            "2",
            "number",
        ),
        ({"problem": "Q?", "final_answer": ["3"]}, [("user", "Q?")], "3", "number"),
        (
            {
                "question": "Q?",
                "answer": "A.\n#### 2",
                "code": None,
                "test_list": None,
                "canonical_solution": None,
                "reasoning_solution": None,
            },
            [("user", "Q?"), ("assistant", "A.\n#### 2")],
            "2",
            "gsm8k",
        ),
        (
            {
                "conversation": [
                    {"role": "user", "content": "Q?"},
                    {"role": "assistant", "content": "A.", "info": {"a": 1}},
                ]
            },
            QUESTION_AND_ANSWER,
            None,
            "",
        ),
        ({"query": "Q?", "response": "A.", "type": "GSM_Rephrased"}, QUESTION_AND_ANSWER, None, ""),
        (
            {"problem": "Q?", "generated_solution": "A.", "expected_answer": "\\frac12"},
            QUESTION_AND_ANSWER,
            "\\frac12",
            "number",
        ),
        ({"prompt": "Q?"}, [("user", "Q?")], None, ""),
        (
            {"messages": [{"role": "user", "content": "Q?"}], "answer": "2"},
            [("user", "Q?")],
            "2",
            "number",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "Q?"},
                    {"role": "assistant", "content": "A."},
                ],
                "answer": 2,
            },
            QUESTION_AND_ANSWER,
            "2",
            "number",
        ),
        (
            {"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}]},
            QUESTION_AND_ANSWER,
            None,
            "",
        ),
        ({"instruction": "Q?", "input": "", "output": "A."}, QUESTION_AND_ANSWER, None, ""),
        (
            {"instruction": "Add.", "input": "2 and 2", "output": "4"},
            [("user", "Add.\n\n2 and 2"), ("assistant", "4")],
            None,
            "",
        ),
        (
            {"system": "S", "question": "Q?", "answer": "A."},
            [("system", "S"), *QUESTION_AND_ANSWER],
            "A.",
            "answer",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "Q"}, {"type": "text", "text": "?"}],
                    },
                    {"role": "assistant", "content": "A."},
                ]
            },
            QUESTION_AND_ANSWER,
            None,
            "",
        ),
    ],
)
def test_public_forms(row, messages, answer, task):
    example = to_example(json.loads(json.dumps(row)), "f:1")
    assert content(example) == messages
    assert (example.answer, example.task) == (answer, task)
    assert example.question.endswith(messages[[r for r, _ in messages].index("user")][1])


def test_a_gold_answer_of_a_row_is_met_by_its_own_form():
    for row in (
        {"question": "?", "answer": 12.0},
        {"problem": "?", "answer": "12"},
        {"prompt": "?", "solution": "12"},
    ):
        example = to_example(row, "f:1")
        assert (
            grade(example, "So \\boxed{12}.").strict
            and not grade(example, "So \\boxed{13}.").strict
        )


@pytest.mark.parametrize(
    "row,words",
    [
        ({"question": "Q", "answer": "A", "context": "C"}, "'context' is part of the question"),
        ({"question": "Q", "answer": "A", "Passage": "C"}, "'Passage' is part of the question"),
        (
            {"question": "Q", "answer": "B", "options": ["A) 1", "B) 2"]},
            "'options' is part of the question",
        ),
        (
            {"question": "Q", "answer": "B", "choices": {"text": ["1"], "label": ["A"]}},
            "'choices' is part of the question",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "Q"},
                    {"role": "assistant", "content": "A"},
                ],
                "images": ["a.png"],
            },
            "'images'",
        ),
        ({"instruction": "Q", "output": "A", "history": [["a", "b"]]}, "'history'"),
        ({"question": "Q", "prompt": "P", "answer": "A"}, "which of them is the question"),
        (
            {"question": "Q", "answer": "A", "system": "S", "weight": 0.5},
            "'weight' would weigh the row",
        ),
        (
            {
                "messages": [
                    {"role": "system", "content": "one"},
                    {"role": "user", "content": "Q"},
                ],
                "system": "two",
            },
            "two system prompts",
        ),
        ({"question": "Q", "answer": True}, "'answer' must be a text"),
        ({"question": "Q", "answer": math.nan}, "is nan"),
        ({"question": ["Q"], "answer": "A"}, "list of messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "content of type 'image_url'",
        ),
        (
            {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": " "}]},
            "says nothing",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "Q"},
                    {"role": "assistant", "content": "A", "weight": "no"},
                ]
            },
            "'weight' must be",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "Q"},
                    {"role": "assistant", "content": "A", "weight": 10**400},
                ]
            },
            "'weight' must be",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "Q", "train": True},
                    {"role": "assistant", "content": "A"},
                ]
            },
            "only the assistant's",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "Q"},
                    {"role": "assistant", "content": "A", "weight": 1, "loss": False},
                ]
            },
            "different things",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "Q"},
                    {"role": "assistant", "content": "A", "thinking": "a", "reasoning": "b"},
                ]
            },
            "different things",
        ),
        (
            {"messages": [{"role": "user", "content": "Q", "reasoning": "r"}]},
            "only an assistant's message has reasoning",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "Q"},
                    {"role": "assistant", "content": None, "function_call": {"name": "f"}},
                ]
            },
            "'tool_calls'",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "Q"},
                    {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
                ]
            },
            "no function with a name",
        ),
        ({"messages": [{"content": "Q"}]}, "no role"),
        ({"conversations": [{"from": "narrator", "value": "Q"}]}, "unknown 'from' 'narrator'"),
        ({"chosen": "a", "rejected": "b"}, "fit no known form"),
        (
            {"question": "Q", "answer": "A", "system": "a", "system_prompt": "b"},
            "two system prompts",
        ),
        (
            {
                "messages": [{"role": "user", "content": "Q"}],
                "conversations": [{"from": "human", "value": "P"}],
            },
            "which of them is the conversation",
        ),
        ({"question": "P", "instruction": "Q", "output": "A"}, "which of them is the question"),
        (
            {"conversations": [{"from": "human", "value": "Q", "content": "P"}]},
            "both 'value' and 'content'",
        ),
        ({"question": "Q", "answer": "A", "train": False}, "'train' would weigh the row"),
        (
            {
                "prompt": [
                    {"role": "user", "content": "Q"},
                    {"role": "assistant", "content": "Let me"},
                ],
                "answer": "4",
            },
            "would have to be continued",
        ),
        ({"messages": [{"role": "user<|im_end|>", "content": "Q"}]}, "not a plain word"),
        (
            {
                "messages": [
                    {"role": "user", "content": "Q"},
                    {"role": "assistant", "content": "", "tool_calls": "[]"},
                ]
            },
            "says nothing",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [{"name": "f", "args": {"city": "P"}}],
                    }
                ]
            },
            "'args' of a tool call",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [{"function": {"name": "f", "parameters": {}}}],
                    }
                ]
            },
            "'parameters' of a tool call",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [{"name": "f", "arguments": '{"x": "\\ud800"}'}],
                    }
                ]
            },
            "half a character",
        ),
        (
            {"messages": [{"role": "assistant", "content": "<think>a</think>b", "reasoning": "c"}]},
            "keep one of them",
        ),
        ({"question": "a", "answer": "b", "task": ["x"], "context": "c"}, "'context'"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(row, words):
    with pytest.raises(UserError) as e:
        to_example(row, "f.jsonl:7")
    assert "f.jsonl:7" in str(e.value) and words in str(e.value) and "\n" not in str(e.value)


def test_columns_are_there_for_reward_functions_and_the_unread_ones_are_named():
    row = {"prompt": "Q", "completion": "A", "nums": [1, 2], "target": 3, "id": 9, "note": None}
    example = to_example(row, "f:1")
    assert example.columns["nums"] == [1, 2] and example.nums == [1, 2] and example.target == 3
    assert unread_columns(example) == {"nums", "target", "id"}
    with pytest.raises(
        AttributeError, match="no 'goal'; its row has the columns prompt, completion, nums"
    ):
        _ = example.goal


def test_a_column_that_another_one_goes_before_is_named():
    turns = [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}]
    for row, unread in (
        (
            {"messages": turns, "problem": "Q?", "solution": "Another way.", "answer": "2"},
            {"solution"},
        ),
        ({"messages": turns, "question": "Another?"}, {"question"}),
        (
            {"problem": "Q?", "generated_solution": "A.", "solution": "B.", "expected_answer": "2"},
            {"solution"},
        ),
        (
            {"prompt": "Q?", "completion": "A.", "solution": "So \\boxed{12}."},
            set(),
        ),  # the gold answer is from it
        ({"question": "Q?", "answer": "<<1+1=2>>2\n#### 2"}, set()),
        ({"instruction": "Q", "input": "x", "output": "A."}, set()),
        ({"system": "S", "text": "Q", "code": "def f(): 0", "test_list": ["assert f()"]}, set()),
    ):
        assert unread_columns(to_example(row, "f:1")) == unread, row


def test_a_prompt_of_messages_is_not_trained_on():
    shots = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "Q?"},
    ]
    for row in (
        {"prompt": shots, "completion": [{"role": "assistant", "content": "A."}]},
        {"prompt": shots, "answer": "A."},
    ):
        example = to_example(row, "f:1")
        assert [m.get("weight", 1.0) for m in example.messages if m["role"] == "assistant"] == [
            0.0,
            1.0,
        ]


def test_shared_parquet_columns_bring_no_nulls(tmp_path):
    import pyarrow.parquet

    rows = []
    for arguments in ({"city": "P"}, {"zip": 7}):
        calls = [{"name": "f", "arguments": arguments}]
        rows.append({"messages": [{"role": "assistant", "content": "x", "tool_calls": calls}]})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = [
        to_example(row, origin).messages[0]["tool_calls"][0]["function"]["arguments"]
        for origin, row in read_rows(path)
    ]
    assert found == [{"city": "P"}, {"zip": 7}]


def test_a_long_last_line_is_read_in_no_time():
    began = time.process_time()
    example = to_example({"question": "Q", "answer": "#### " + "1" * 200_000 + "x"}, "f:1")
    assert example.answer is None and time.process_time() - began < 2


def test_messages_in_common_names():
    (call,) = normalise_messages(
        [
            {
                "role": "assistant",
                "content": None,
                "thinking": "hm",
                "loss": 0,
                "name": None,
                "refusal": None,
                "tool_calls": [
                    {
                        "id": "c",
                        "type": "function",
                        "function": {"name": "f", "arguments": '{"x": 1}'},
                    }
                ],
            }
        ]
    )
    assert (
        call["reasoning_content"] == "hm"
        and call["weight"] == 0.0
        and "loss" not in call
        and "name" not in call
    )
    assert (
        call["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
        and "refusal" not in call
    )


@pytest.mark.parametrize(
    "text,gold",
    [
        ("a\n#### 1,024", ("1,024", "gsm8k")),
        ("$12.50", ("$12.50", "number")),
        ("12 apples", ("12 apples", "number")),
        ("(-\\infty, 3]", ("(-\\infty, 3]", "answer")),
        ("\\text{Evelyn}", ("\\text{Evelyn}", "answer")),
        ("B", ("B", "answer")),
        ("the number of apples left", (None, "")),
        ("", (None, "")),
        ("one\ntwo", (None, "")),
        ("x" * 300, (None, "")),
        ("#### Heading", (None, "")),
        ("3+4=7. #### 7", ("7", "gsm8k")),
        ("see item #### 3 of the list", (None, "")),
        ("a####7", (None, "")),
        ("see \\boxed{3}, or \\boxed{4}", ("4", "answer")),
    ],
)
def test_the_gold_answer_of_a_response(text, gold):
    assert gold_of_text(text) == gold


ROWS = [{"question": "1+1?", "answer": "2\n#### 2"}, {"question": "1+2?", "answer": "3\n#### 3"}]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz"])
@pytest.mark.parametrize("form", ["lines", "list", "indented", "data"])
def test_the_content_decides_what_a_file_is(tmp_path, name, mark, form):
    text = {
        "lines": "\n".join(map(json.dumps, ROWS)) + "\n",
        "list": json.dumps(ROWS),
        "indented": json.dumps(ROWS, indent=2),
        "data": json.dumps({"version": 1, "data": ROWS}, indent=2),
    }[form]
    path = tmp_path / name
    encoded = (mark + text).encode()
    path.write_bytes(gzip.compress(encoded) if name.endswith(".gz") else encoded)
    if form == "data" and "jsonl" in name:
        pytest.skip("an object over several lines is no JSON Lines")
    assert [row for _, row in read_rows(path)] == ROWS


@pytest.mark.parametrize(
    "content,words",
    [
        ('{"a": 1, "a": 2}'.encode(), "there twice"),
        ("\ufeff[]".encode("utf-16"), "UTF-16"),
        (b'{"question": "a"}\n{"question": ', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' * 5000, "not valid JSON"),
        (b'{"train": [{"question": "a"}], "test": [{"question": "b"}]}', "which of its lists"),
        (b"3", "found a int"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, content, words):
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as e:
        list(read_rows(path))
    assert "data.json" in str(e.value) and words in str(e.value) and "\n" not in str(e.value)


def test_the_rows_of_public_sets_in_their_own_columns():
    """DAPO-Math-17k (both forms), DeepMath-103K, OpenR1-Math, NuminaMath, OpenThoughts, Tulu."""
    chat = [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}]
    prompt = [{"role": "user", "content": "Q?", "name": None}]
    verl = {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"}
    dapo = {"data_source": "math_dapo", "prompt": prompt, "ability": "MATH", "reward_model": verl}
    dapo |= {"extra_info": {"index": "9a9b6eb4"}}
    processed = {"prompt": "Q?", "solution": "34", "source_prompt": prompt, "reward_model": verl}
    deepmath = {"question": "Q?", "final_answer": "\\frac{1}{2}", "difficulty": 5.0, "topic": "T"}
    solutions = {f"r1_solution_{n}": f"So {n}.\n</think>\n\\boxed{{{n}}}" for n in (1, 2, 3)}
    openr1 = {"problem": "Q?", "solution": "It is 4.", "answer": "4", "generations": ["A.", "B."]}
    openr1 |= {"messages": chat, "correctness_math_verify": [True, False], "uuid": "u"}
    sharegpt = [{"from": "user", "value": "Q?"}, {"from": "assistant", "value": "A."}]
    asked, answered = [("user", "Q?")], QUESTION_AND_ANSWER
    for row, messages, answer, task in (
        (dapo, asked, "34", "number"),
        (processed, [*asked, ("assistant", "34")], "34", "math"),
        (deepmath, asked, "\\frac{1}{2}", "number"),
        (
            deepmath | solutions,
            [*asked, ("assistant", solutions["r1_solution_1"])],
            "\\frac{1}{2}",
            "number",
        ),
        (openr1, answered, "4", "number"),
        (
            {"problem": "Q?", "solution": "A.", "answer": "4", "problem_type": "Algebra"},
            answered,
            "4",
            "math",
        ),
        ({"system": "S", "conversations": sharegpt}, [("system", "S"), *answered], None, ""),
        ({"id": "1", "messages": chat, "source": "ai2-adapt"}, answered, None, ""),
        ({"instruction": "Q?", "input": "", "data_source": "x"}, asked, None, ""),
    ):
        example = to_example(row, "f:1")
        assert (content(example), example.answer, example.task) == (messages, answer, task)
    assert unread_columns(to_example(deepmath | solutions, "f:1")) == {
        "difficulty",
        "topic",
        "r1_solution_2",
        "r1_solution_3",
    }


def test_an_answer_column_is_the_gold_answer_also_where_the_completion_says_the_same():
    prompt = [{"role": "user", "content": "Q?"}]
    said = [{"role": "assistant", "content": "5"}]
    for row in (
        {"prompt": "Q?", "completion": "5", "answer": "5"},
        {"prompt": "Q?", "completion": "5", "answer": 5},
        {"prompt": prompt, "completion": said, "answer": "5"},
        {"prompt": prompt, "completion": said, "solution": "5"},
        {"instruction": "Q?", "output": "5", "final_answer": ["5"]},
    ):
        example = to_example(row, "f:1")
        assert (example.answer, example.task) == ("5", "number")
        assert content(example)[-1] == ("assistant", "5")
    example = to_example({"question": "Q?", "completion": "5", "answer": "5", "task": "math"}, "")
    assert (example.answer, example.task) == ("5", "math")


def test_roles_in_other_spellings_and_odd_turns():
    words = ["System", "human", "GPT", "Human", "tool", "ai", "USER"]
    roles = ["system", "user", "assistant", "user", "tool", "assistant", "user"]
    for sender, text in (("from", "value"), ("role", "content")):
        turns = [{sender: word, text: f"t{i}"} for i, word in enumerate(words)]
        example = to_example({"conversations": turns}, "f:1")
        assert [m["role"] for m in example.messages] == roles and not example.has_answer
        assert example.question == "t6"
    with pytest.raises(UserError, match="unknown 'from' 'narrator'; known are human"):
        to_example({"conversations": [{"from": "narrator", "value": "Q"}]}, "f:1")


def test_files_as_other_programs_leave_them(tmp_path):
    """A byte-order mark, CRLF, Unicode line separators, no last line end, nested nulls, gzip."""
    rows = [
        {"prompt": "a\u2028b\u0085c\x0bd\r\ne", "completion": "1"},
        {"prompt": "é", "completion": "2", "extra": {"a": None, "b": [None]}, "answer": None},
    ]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + lines.encode() + b"\n"))
    for name in ("a.jsonl", "a.jsonl.gz"):
        assert [row for _, row in read_rows(tmp_path / name)] == rows
    assert content(to_example(rows[0], ""))[0] == ("user", rows[0]["prompt"])
