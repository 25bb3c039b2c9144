"""Rows of public data sets as Examples: every form that is understood, and what is refused by name.

A row is a JSON object (or a Parquet row). The forms, by their columns:

- chat: `messages` ([{role, content}, ...]) or ShareGPT's `conversations` ([{from, value}, ...]);
- question and answer: one of `question`, `problem`, `prompt`, `query` (a text or a list of messages) with one
  of `completion`, `response`, `generated_solution`, `solution`, `answer` (GSM8K, MATH, and most others), or with
  none of them where nobody's answer is needed; a gold answer may stand beside them in `answer`, `final_answer`,
  `expected_answer`, `ground_truth` or verl's `reward_model` ({"ground_truth"});
- Alpaca: `instruction`, `input`, `output`; CAMEL's traces: `problem`, `reasoning_solution`;
- HumanEval and MBPP (data/grading/code.py).

What a row says is what is trained on: text stays as it is written, a column or a field of a message that
would change the prompt or the training is used or refused by name, and columns that are not read are
reported by `unread_columns`. Nothing here knows a tokenizer or a template; data/formatter.py does.
"""

import codecs
import dataclasses
import gzip
import json
import math
import re
import zlib
from collections.abc import Collection, Iterable, Iterator
from decimal import Decimal
from pathlib import Path

from data.grade import LONGEST, marked_answer, parse_number
from data.grading.code import humaneval, mbpp, split_of
from data.messages import check_all_text, is_empty, json_value, normalise_messages
from data.tasks import TASKS, Example
from errors import UserError
from files import HEAD, explain, parse_json, read_head

SUFFIXES = (".jsonl", ".json", ".parquet", ".gz")  # the last: .jsonl.gz, .json.gz

QUESTIONS = ("question", "problem", "prompt", "query")
CONVERSATIONS = ("messages", "conversations", "conversation")
TEXTS = (
    "completion",
    "response",
    "generated_solution",
    "output",
)  # responses that are no answers, however short
RESPONSES = (*TEXTS, "solution", "answer")
NO_ANSWERS = frozenset(
    {"proof", "not found", "n/a", "na", "none", "null", "unknown", "see solution", "omitted"}
)
GOLDS = ("answer", "final_answer", "expected_answer", "ground_truth")
SYSTEM = ("system", "system_prompt")
# Columns that are part of what a model has to see; there is no one way to put them into a prompt.
PART_OF_QUESTION = frozenset(
    "context contexts passage passages paragraph paragraphs article story background body premise "
    "hypothesis scenario options option choices choice image images image_url audio audios video "
    "videos table tables document documents history functions function starter_code input inputs".split()
)
ROW_WEIGHTS = ("weight", "loss_weight", "sample_weight", "loss", "train", "training")

GSM8K_GOLD = re.compile(r"(?:^|\n)#### *([-+]?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)%?\.?)\s*\Z")
# GSM8K's annotations for a calculator are no part of the text.
GSM8K_CALCULATION = re.compile(r"<<[\d+\-*/().% ]+=[\d+\-*/().=% ]+>>")
# CAMEL's GSM8K has \boxed{1},600 for `#### 1,600`: the box is around the first digits alone.
CAMEL_BOX = re.compile(r"\\boxed\{(\d+)\}")
SHORT_ANSWER = 200  # characters; a longer text is an explanation, not an answer to compare with
PLAIN_WORDS = 3  # so many words in a row are a sentence


# --- files -> rows -------------------------------------------------------------------------------


def read_rows(path: Path) -> Iterator[tuple[str, object]]:
    """Yield (origin, row) for every row of a data file; origin is `file:line`, for errors.

    The content decides what a file is, not its name: a `.json` may hold JSON Lines (what
    `datasets.to_json` writes), a `.jsonl` one list. Raises UserError.
    """
    expected = {".parquet": "parquet", ".gz": "gzip"}.get(path.suffix, "text")
    read_head(path, expected)  # a pointer of git-lfs, a web page, another format
    try:
        if path.suffix == ".parquet":
            yield from _parquet_rows(path)
            return
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            start = file.read(HEAD)
            if expected == "gzip" and (wrong := explain(start)):
                raise UserError(f"{path}: its content {wrong}")
            mark = codecs.BOM_UTF8 if start.startswith(codecs.BOM_UTF8) else b""
            file.seek(len(mark))
            is_list = start.removeprefix(mark).lstrip().startswith(b"[")
            if is_list or path.name.removesuffix(".gz").endswith(".json"):
                yield from _json_rows(file.read(), path)
            else:
                yield from _json_lines(file, path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise UserError(f"{path}: not a gzip file, or cut off ({e})") from None
    except OSError as e:
        raise UserError(f"{path}: {e.strerror or e}") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, object]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as e:
        raise UserError(f"{path}: not a Parquet file ({str(e).splitlines()[0]})") from None
    for number, row in enumerate(rows, 1):
        yield f"{path}:row {number}", _without_nulls(row)


def _without_nulls(value: object) -> object:
    """Parquet gives every object of a column all names that any of them has; those without a value are not there."""
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_nulls(part) for part in value]
    return value


def _json_rows(content: bytes, path: Path) -> Iterator[tuple[str, object]]:
    """Rows of a file that is one JSON value: a list of rows. JSON Lines under such a name are read as those."""
    try:
        rows = parse_json(content, str(path))
    except UserError:
        lines = content.splitlines()
        first = next((line for line in lines if line.strip()), b"")
        try:
            json.loads(first)
        except (ValueError, RecursionError):
            first = None
        if first is None:
            raise
        yield from _json_lines(lines, path)
        return
    if isinstance(rows, dict):
        yield from _rows_of_object(rows, path)
        return
    if not isinstance(rows, list):
        raise UserError(
            f"{path}: a data file holds objects, one a line or in one list; found a {type(rows).__name__}"
        )
    for number, row in enumerate(rows, 1):
        yield f"{path}:item {number}", row


def _rows_of_object(value: dict, path: Path) -> Iterator[tuple[str, object]]:
    """A file of one object: {"data": [rows]}, {"train": [rows]}, or a single row."""
    lists = [
        name
        for name, rows in value.items()
        if isinstance(rows, list) and rows and isinstance(rows[0], dict)
    ]
    is_row = any(name in value for name in (*QUESTIONS, *CONVERSATIONS, "instruction"))
    if is_row or not lists:
        yield f"{path}:1", value
        return
    if len(lists) > 1:
        raise UserError(
            f"{path}: which of its lists ({', '.join(lists)})? Save one of them as a file"
        )
    for number, row in enumerate(value[lists[0]], 1):
        yield f"{path}:item {number}", row


def _json_lines(lines: Iterable[bytes], path: Path) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"{path}:{number}", parse_json(line, f"{path}:{number}")


# --- rows -> examples ----------------------------------------------------------------------------


def read_examples(path: Path, split: str, notes: list[str] | None = None) -> list[Example]:
    """The examples of a file; of rows that belong to a split by their data set's own rules those of
    "train" or of "test". notes: gets a sentence on those that are left out."""
    rows = list(read_rows(path))
    kept = [
        (origin, row)
        for origin, row in rows
        if not isinstance(row, dict) or split_of(row) in (None, split)
    ]
    rule = "(HumanEval: test; MBPP: ids 601 to 974 train, 11 to 510 test)"
    if rows and not kept:
        raise UserError(f"{path}: none of its {len(rows):,} rows is for {split} {rule}")
    if len(kept) < len(rows) and notes is not None:
        notes.append(
            f"{len(rows) - len(kept):,} of {len(rows):,} rows are left out: they are not for {split} {rule}"
        )
    return [to_example(row, origin) for origin, row in kept]


def to_example(row: object, origin: str) -> Example:
    """A row of any known form as an Example. Raises UserError naming the row."""
    if not isinstance(row, dict):
        raise UserError(f"{origin}: expected an object, found {type(row).__name__}")
    check_all_text(row, origin)
    values = {name: value for name, value in row.items() if value is not None}
    code = _read_code(row, values, origin)
    if code:
        _refuse_columns(values, origin, read=CODE_COLUMNS)
        return dataclasses.replace(code, messages=_add_system(code.messages, values, origin))
    messages, answer, task = _read_form(values, origin)
    messages = _add_system(messages, values, origin)
    _refuse_columns(values, origin, read=("input",) if _is_alpaca(values) else ())
    return Example(messages, answer, task, origin, row)


CODE_COLUMNS = frozenset(
    "prompt text code canonical_solution test entry_point test_list test_imports test_setup_code "
    "challenge_test_list task_id source_file".split()
)


def _read_code(row: dict, values: dict, origin: str) -> Example | None:
    """A row of HumanEval or MBPP as an Example; None for any other."""
    if "canonical_solution" in values and {"prompt", "test"} <= row.keys():
        question, solution, tests = humaneval(row, origin)
        return Example(_turns(question, solution), tests, "humaneval", origin, row)
    if "test_list" in values and "code" in row:
        question, solution, tests = mbpp(row, origin)
        return Example(_turns(question, solution), tests, "mbpp", origin, row)
    return None


def unread_columns(example: Example) -> set[str]:
    """Columns of an example's row that say something and that neither the prompt nor the gold answer is made of."""
    if CODE_COLUMNS & example.columns.keys() and example.task in ("humaneval", "mbpp"):
        return {
            name
            for name, value in example.columns.items()
            if name not in CODE_COLUMNS and not is_empty(value)
        }
    read = {
        *QUESTIONS,
        *RESPONSES,
        *GOLDS,
        *SYSTEM,
        *CONVERSATIONS,
        "instruction",
        "task",
        "tools",
        "chat_template_kwargs",
    }
    read |= {"reward_model", "reasoning_solution", "groud_truth_solution"}
    if not any(name in example.columns for name in QUESTIONS):
        read |= {"input"}
    if isinstance(
        example.columns.get("source"), dict
    ):  # where our own traces say that they are from
        read |= {"source"}
    unused = {
        name
        for name in GOLDS
        if example.answer is None and isinstance(example.columns.get(name), (list, dict))
    }
    unused |= {
        name
        for name in (*QUESTIONS, *TEXTS, "solution", "instruction")
        if _is_passed_over(example, name)
    }
    return {
        n
        for n, value in example.columns.items()
        if (n not in read or n in unused) and not is_empty(value)
    }


def _is_passed_over(example: Example, name: str) -> bool:
    """Whether a column's text is neither in the conversation nor where the gold answer is from: another one went before it."""
    text = example.columns.get(name)
    if not isinstance(text, str) or any(text in (m["content"] or "") for m in example.messages):
        return False
    return not (name == "solution" and example.answer is not None and example.answer in text)


def _is_alpaca(values: dict) -> bool:
    return not is_empty(values.get("instruction")) and ("output" in values or "response" in values)


def _read_form(values: dict, origin: str) -> tuple[tuple, str | None, str]:
    """(messages, gold answer or None, task) of a row without null columns."""
    chats = [name for name in CONVERSATIONS if not is_empty(values.get(name))]
    if chats:
        if any(values[name] != values[chats[0]] for name in chats[1:]):
            raise UserError(
                f"{origin}: both {chats[0]!r} and {chats[1]!r}: which of them is the conversation? Drop the other"
            )
        return normalise_messages(values[chats[0]], origin, chats[0]), *_gold(values, "", origin)
    if "reasoning_solution" in values and "problem" in values:
        return _read_camel(values, origin)
    asked = [name for name in QUESTIONS if name in values]
    if _is_alpaca(values):
        if asked:
            raise UserError(
                f"{origin}: both 'instruction' and {asked[0]!r}: which of them is the question? Drop the other"
            )
        response = "output" if "output" in values else "response"
        _need_texts(values, origin, "instruction", response)
        question = values["instruction"]
        if not is_empty(values.get("input")):
            _need_texts(values, origin, "input")
            question = f"{question}\n\n{values['input']}"
        return _turns(question, values[response]), *_gold(values, values[response], origin)
    if not asked and "input" in values and "output" in values:
        asked = ["input"]
    if not asked:
        if name := next((name for name in CONVERSATIONS if name in values), None):
            return normalise_messages(values[name], origin, name), None, ""  # an empty one: refused
        raise UserError(
            f"{origin}: keys {sorted(values)} fit no known form (question, problem or prompt with answer, "
            "solution or completion; messages; conversations; instruction+output; HumanEval, MBPP)"
        )
    if any(values[name] != values[asked[0]] for name in asked[1:]):
        raise UserError(
            f"{origin}: both {asked[0]!r} and {asked[1]!r}: which of them is the question? Drop the other"
        )
    return _read_question(values, asked[0], origin)


def _read_question(values: dict, asked: str, origin: str) -> tuple[tuple, str | None, str]:
    """Forms of a question and, in most, a response: GSM8K, MATH, prompt and completion, and their kin."""
    messages = _prompt(values, asked, origin)
    present = [name for name in RESPONSES if name in values]
    response = next((name for name in present if not is_empty(values[name])), None)
    if response is None:
        if present:
            raise UserError(f"{origin}: {present[0]!r} must be a text that is not empty")
        return messages, *_gold(values, "", origin)
    value = values[response]
    if isinstance(value, list) and response in TEXTS:
        return (*messages, *normalise_messages(value, origin, response)), *_gold(values, "", origin)
    if isinstance(value, list) and len(value) == 1 and response == "answer":
        value = value[0]
    if _is_number(value):
        value = _plain_number(value, origin, response)
    elif not isinstance(value, str) or not value.strip():
        raise UserError(f"{origin}: {response!r} must be a text that is not empty")
    answer, task = _gold(values, value, origin, is_solution=response == "solution")
    if GSM8K_GOLD.search(value):
        value = GSM8K_CALCULATION.sub("", value)
    return (*messages, {"role": "assistant", "content": value}), answer, task


def _prompt(values: dict, asked: str, origin: str) -> tuple[dict, ...]:
    """The messages of a question: a text, or a list of messages, of which none is trained on."""
    if not isinstance(values[asked], list):
        _need_texts(values, origin, asked)
        return ({"role": "user", "content": values[asked]},)
    messages = normalise_messages(values[asked], origin, asked)
    if messages[-1]["role"] == "assistant":
        raise UserError(
            f"{origin}: {asked!r} ends with the assistant's words, which would have to be continued; give them with the completion"
        )
    return tuple(m | {"weight": 0.0} if m["role"] == "assistant" else m for m in messages)


def _read_camel(values: dict, origin: str) -> tuple[tuple, str | None, str]:
    """Every trace is kept, right or wrong, as it is; the misspelt column is CAMEL's."""
    _need_texts(values, origin, "problem", "reasoning_solution")
    solution = str(values.get("groud_truth_solution"))
    gold = GSM8K_GOLD.search(CAMEL_BOX.sub(r"#### \1", solution))
    turns = _turns(values["problem"], values["reasoning_solution"])
    return turns, gold and gold[1], "gsm8k" if gold else ""


# --- gold answers --------------------------------------------------------------------------------


def _gold(
    values: dict, response: str, origin: str, is_solution: bool = False
) -> tuple[str | None, str]:
    """(gold answer, the task that grades it) of a row: from a column for it, else from its response.

    A column that is there for the answer alone is taken as it is. A response is searched: GSM8K's last
    line, MATH's box, or all of it where it is as short as an answer. (None, ""): nothing can be graded.
    """
    named = values.get("task") if isinstance(values.get("task"), str) else None
    if named in TASKS and isinstance(values.get("answer"), str) and values["answer"] != response:
        return values[
            "answer"
        ], named  # traces: the answer is in the form that the task's grader takes
    if (
        isinstance(values.get("reward_model"), dict)
        and values["reward_model"].get("ground_truth") is not None
    ):
        values = {"ground_truth": values["reward_model"]["ground_truth"]}  # verl's form
    given = {name: _single(values[name]) for name in GOLDS if name in values}
    column = next(
        (name for name, value in given.items() if value is not None and value != response), None
    )
    answer, task = None, ""
    if column and _is_number(given[column]):
        answer, task = _plain_number(given[column], origin, column), "number"
    elif column:
        answer, task = gold_of_text(given[column])
        if (
            answer is None
            and len(given[column]) <= LONGEST
            and given[column].strip().casefold() not in NO_ANSWERS
        ):
            answer, task = given[column].strip(), "answer"  # compared by its text
    if answer is None and not is_solution and isinstance(values.get("solution"), str):
        answer, task = gold_of_text(values["solution"])
    if answer is None and column is None:
        answer, task = gold_of_text(response)
        is_text = any(response == values.get(name) for name in TEXTS)
        if is_text and task in ("number", "answer") and "\\boxed" not in response:
            answer, task = None, ""  # a short completion is a text like any other
    if is_solution and task in ("number", "answer"):
        task = "math"  # MATH's answers are numbers now and then
    return answer, named if answer is not None and named in TASKS else task


def _single(value: object) -> str | int | float | None:
    """A gold answer of a column: a text or a number, also as the only one of a list (or of a list that is JSON in a text)."""
    value = json_value(value)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, str) and value.strip():
        return value
    return value if _is_number(value) else None


def gold_of_text(text: str) -> tuple[str | None, str]:
    """(the answer that a response states, the task that grades it): "gsm8k" for `#### 18` as its last line,
    "answer" for a box, "number" or "answer" for a text that is no longer than an answer; else (None, "")."""
    if mark := GSM8K_GOLD.search(text):
        return mark[1], "gsm8k"
    if "\\boxed" in text or "\\fbox" in text:
        boxed = marked_answer(text)
        return (boxed, "answer") if boxed and len(boxed) <= LONGEST else (None, "")
    text = text.strip()
    if (
        not text
        or len(text) > SHORT_ANSWER
        or "\n" in text
        or "####" in text
        or text.casefold() in NO_ANSWERS
    ):
        return None, ""
    if parse_number(text) is not None:
        return text, "number"
    bare = re.sub(r"\\[A-Za-z]+|\$", " ", text)
    if re.search(rf"(?:\b[^\W\d_]{{2,}}[ ,.'-]+){{{PLAIN_WORDS - 1}}}[^\W\d_]{{2,}}", bare):
        return None, ""
    return text, "answer"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _plain_number(value: int | float, origin: str, name: str) -> str:
    """A number as people write it: 18 and 18.0 are 18, 1e-07 is 0.0000001."""
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        raise UserError(f"{origin}: {name!r} is {value}, which is no answer")
    return str(int(value)) if value == int(value) else format(Decimal(repr(value)), "f")


def _add_system(messages: tuple, values: dict, origin: str) -> tuple:
    """The conversation with the row's own system prompt in front of it."""
    given = {name: values[name] for name in SYSTEM if not is_empty(values.get(name))}
    if not given:
        return messages
    _need_texts(values, origin, *given)
    prompts = list(given.values())
    if messages[0]["role"] == "system":
        prompts.append(messages[0]["content"])
    if any(prompt != prompts[0] for prompt in prompts[1:]):
        raise UserError(
            f"{origin}: there are two system prompts, and {next(iter(given))!r} is one of them; keep one"
        )
    return (
        messages
        if messages[0]["role"] == "system"
        else ({"role": "system", "content": prompts[0]}, *messages)
    )


def _refuse_columns(values: dict, origin: str, read: Collection[str]) -> None:
    """Refuse a row with a column that the prompt would have to show, or that weighs the row. read: columns that are used."""
    question = next((name for name in QUESTIONS if name in values), None)
    for name, value in values.items():
        if name in read or is_empty(value) or (name == "input" and question is None):
            continue
        if name.lower() in PART_OF_QUESTION:
            raise UserError(
                f"{origin}: the column {name!r} is part of the question; write it into the question's text"
            )
        if name in ROW_WEIGHTS and isinstance(value, (bool, int, float)) and value != 1:
            raise UserError(
                f"{origin}: the column {name!r} would weigh the row, which is not done; drop it or the row"
            )


def _need_texts(values: dict, origin: str, *names: str) -> None:
    for name in names:
        if not isinstance(values[name], str) or not values[name].strip():
            raise UserError(f"{origin}: {name!r} must be a text that is not empty")


def _turns(user: str, assistant: str) -> tuple[dict, dict]:
    return ({"role": "user", "content": user}, {"role": "assistant", "content": assistant})
