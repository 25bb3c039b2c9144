"""Rows of public data sets as Examples: every form that is understood, and what is refused by name.

A row is a JSON object (or a Parquet row). The forms, by their columns:

- chat: `messages` ([{role, content}, ...]) or ShareGPT's `conversations` ([{from, value}, ...]);
- question and answer: one of `question`, `problem`, `prompt`, `query` (a text or a list of
  messages) with one of `completion`, `response`, `generated_solution`, `output`, `solution`,
  `answer` (GSM8K, MATH, and most others), or with none of them where nobody's answer is needed;
- Alpaca: `instruction`, `input`, `output` (or none); DeepMath: `question`, `final_answer`,
  `r1_solution_1`; CAMEL's traces: `problem`, `reasoning_solution`;
- HumanEval and MBPP (data/grading/code.py).

A gold answer may stand beside them in `answer`, `final_answer`, `expected_answer`, `ground_truth`
or verl's `reward_model` ({"ground_truth"}); data/gold.py finds it.

What a row says is what is trained on. Text stays as it is written. A column or a field of a message
that would change the prompt or the training is used, or refused by name; columns that are not read
are reported by `unread_columns`. Nothing here knows a tokenizer or a template (data/formatter.py).
"""

import codecs
import gzip
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data.gold import GOLDS, GSM8K_GOLD, TEXTS, Gold, find_gold, is_number, plain_number
from data.grading.code import humaneval, mbpp, split_of
from data.messages import (
    EmptyRow,
    check_all_text,
    errors_at,
    is_empty,
    json_value,
    normalise_messages,
)
from data.tasks import Example, turns
from errors import UserError
from files import HEAD, explain, parse_json, read_bytes, read_head, reason, without_nulls
from model import parallel
from progress import Progress

SUFFIXES = (".jsonl", ".json", ".parquet", ".gz")  # the last: .jsonl.gz, .json.gz

LONGEST_LINE = 64 << 20  # bytes; as Python's objects they may take fifty times as many

# --- the columns that are known ------------------------------------------------------------------

QUESTIONS = ("question", "problem", "prompt", "query")
CONVERSATIONS = ("messages", "conversations", "conversation")
RESPONSES = (*TEXTS, "solution", "answer", "r1_solution_1")  # the last: DeepMath's
SYSTEM = ("system", "system_prompt")
CODE = frozenset(
    "prompt text code canonical_solution test entry_point test_list test_imports test_setup_code "
    "challenge_test_list task_id source_file".split()
)
OTHERS = "instruction task tools chat_template_kwargs reward_model reasoning_solution".split()
READ = {*QUESTIONS, *CONVERSATIONS, *RESPONSES, *GOLDS, *SYSTEM, *OTHERS, "groud_truth_solution"}
# Texts of which one goes before another: the other one is not read.
CANDIDATES = (*QUESTIONS, *TEXTS, "solution", "instruction")
# Columns that are part of what a model has to see; there is no one way to put them into a prompt.
PART_OF_QUESTION = frozenset(
    "context contexts passage passages paragraph paragraphs article story background body premise "
    "hypothesis scenario options option choices choice image images image_url audio audios video "
    "videos table tables document documents history functions function starter_code input inputs"
    "".split()
)
ROW_WEIGHTS = ("weight", "loss_weight", "sample_weight", "loss", "train", "training")

# GSM8K's annotations for a calculator are no part of the text.
GSM8K_CALCULATION = re.compile(r"<<[\d+\-*/().% ]+=[\d+\-*/().=% ]+>>")
# CAMEL's GSM8K has \boxed{1},600 for `#### 1,600`: the box is around the first digits alone.
CAMEL_BOX = re.compile(r"\\boxed\{(\d+)\}")


# --- files -> rows -------------------------------------------------------------------------------


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (origin, row) for every row of a data file; origin is `file:line`, for errors.

    The content decides what a file is, not its name: a `.json` may hold JSON Lines (what
    `datasets.to_json` writes), a `.jsonl` one list. Raises UserError.
    """
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    if path.suffix == ".gz":
        content = _decompressed(path)
    else:
        content = read_bytes(path)
    content = content.removeprefix(codecs.BOM_UTF8)
    is_list = content[:HEAD].lstrip().startswith(b"[")
    if is_list or path.name.removesuffix(".gz").endswith(".json"):
        yield from _json_rows(content, path)
    else:
        yield from _json_lines(content, path)


def _decompressed(path: Path) -> bytes:
    try:
        content = gzip.decompress(read_bytes(path, "gzip"))
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise UserError(f"{path}: not a gzip file, or cut off ({e})") from None
    if wrong := explain(content[:HEAD]):
        raise UserError(f"{path}: its content {wrong}")
    return content


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    read_head(path, "parquet")  # a pointer of git-lfs, a web page, another format
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as e:
        raise UserError(f"{path}: not a Parquet file to be read ({reason(e)})") from None
    columns = []
    for name, column in zip(table.column_names, table.columns, strict=True):
        try:
            columns.append(column.to_pylist())
        except (pyarrow.ArrowException, ValueError, OverflowError) as e:  # a date far away, say
            raise UserError(
                f"{path}: column {name!r} ({column.type}) cannot be read ({reason(e)}); "
                "drop it or make it a text"
            ) from None
    for number, values in enumerate(zip(*columns, strict=True), 1):
        row = dict(zip(table.column_names, values, strict=True))
        yield f"{path}:row {number}", _without_nulls(row)


def _without_nulls(value: object) -> object:
    """A value without the nulls that Parquet puts in.

    It gives every object of a column all names that any of them has.
    """
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_nulls(part) for part in value]
    return value


def _json_rows(content: bytes, path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a file that is one JSON value, or JSON Lines under the name of one."""
    try:
        rows = parse_json(content, str(path))
    except UserError:
        first_line = content.lstrip().partition(b"\n")[0]
        if not isinstance(json_value(first_line.decode("utf-8", "replace")), dict):
            raise
        yield from _json_lines(content, path)
        return
    if isinstance(rows, dict):
        lists = []
        for name, value in rows.items():
            if isinstance(value, list) and value and isinstance(value[0], dict):
                lists.append(name)
        if not lists or not {*QUESTIONS, *CONVERSATIONS, "instruction"}.isdisjoint(rows):
            yield f"{path}:1", rows  # a single row
            return
        if len(lists) > 1:
            names = ", ".join(lists)
            raise UserError(f"{path}: which of its lists ({names})? Save one of them as a file")
        rows = rows[lists[0]]  # {"data": [rows]}, {"train": [rows]}
    if not isinstance(rows, list):
        found = type(rows).__name__
        raise UserError(
            f"{path}: a data file holds objects, one a line or in one list; found a {found}"
        )
    for number, row in enumerate(rows, 1):
        yield f"{path}:item {number}", row


def _json_lines(content: bytes, path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(content.split(b"\n"), 1):
        if len(line) > LONGEST_LINE:
            raise UserError(
                f"{path}:{number}: a line of {len(line):,} bytes, more than {LONGEST_LINE:,}; "
                "a row has a line of its own"
            )
        if line.strip():
            yield f"{path}:{number}", parse_json(line, f"{path}:{number}")


# --- rows -> examples ----------------------------------------------------------------------------


def read_examples(
    path: Path, split: str, notes: list[str] | None = None, dropped: Counter | None = None
) -> list[Example]:
    """Read the examples of a file.

    Args:
        path: The data file.
        split: "train" or "test": which rows to take where their data set's own rules say so.
        notes: Gets a sentence on the rows that are left out.
        dropped: Counts the rows that say nothing, which are left out; None: they are errors.
    """
    rule = "(HumanEval: test; MBPP: ids 601 to 974 train, 11 to 510 test)"
    examples, left_out = [], 0
    progress = Progress(f"reading {path}", 0, "rows", parallel.speaks())
    for origin, row in read_rows(path):
        progress.add(1)
        if isinstance(row, dict) and split_of(row) not in (None, split):
            left_out += 1
            continue
        try:
            examples.append(to_example(row, origin))
        except EmptyRow:
            if dropped is None:
                raise
            dropped["empty"] += 1
    count = left_out + len(examples)
    if left_out and not examples:
        raise UserError(f"{path}: none of its {count:,} rows is for {split} {rule}")
    if left_out and notes is not None:
        notes.append(
            f"{left_out:,} of {count:,} rows are left out: they are not for {split} {rule}"
        )
    return examples


def to_example(row: object, origin: str) -> Example:
    """Make an Example of a row of any known form. Raises UserError naming the row."""
    with errors_at(origin):
        if not isinstance(row, dict):
            raise UserError(f"expected an object, found {type(row).__name__}")
        check_all_text(row)
    code = _read_code(row, origin)
    columns = without_nulls(row)
    with errors_at(origin):
        form = (
            code
            or _read_chat(columns)
            or _read_camel(columns)
            or _read_alpaca(columns)
            or _read_question(columns)
        )
        gold = form.gold
        if gold is None:
            gold = find_gold(columns, form.response, form.response_column)
        messages = _add_system(form.messages, columns)
        _refuse_columns(columns)
    return Example(messages, gold.answer, gold.task, origin, row)


class Form(NamedTuple):
    """What a reader makes of a row's columns.

    messages: the conversation.
    response: the text that may state the gold answer, and the column that it comes from.
    gold: the gold answer where the form says where it is; None: `find_gold` looks for it.
    """

    messages: tuple[dict, ...]
    response: str = ""
    response_column: str = ""
    gold: Gold | None = None


def _read_code(row: dict, origin: str) -> Form | None:
    """HumanEval and MBPP."""
    if row.get("canonical_solution") is not None and {"prompt", "test"} <= row.keys():
        question, solution, tests = humaneval(row, origin)
        return Form(turns(question, solution), gold=Gold(tests, "humaneval"))
    if row.get("test_list") is not None and "code" in row:
        question, solution, tests = mbpp(row, origin)
        return Form(turns(question, solution), gold=Gold(tests, "mbpp"))
    return None


def _read_chat(columns: dict) -> Form | None:
    """A conversation, under any of its names."""
    given = [name for name in CONVERSATIONS if not is_empty(columns.get(name))]
    if not given:
        return None
    _need_same(given, columns, "conversation")
    return Form(normalise_messages(columns[given[0]], given[0]))


def _read_camel(columns: dict) -> Form | None:
    """CAMEL's traces: all are kept as they are, right or wrong. The misspelt column is theirs."""
    names = ("problem", "reasoning_solution")
    if not columns.keys() >= set(names):
        return None
    problem, trace = (_text(columns[name], name) for name in names)
    solution = CAMEL_BOX.sub(r"#### \1", str(columns.get("groud_truth_solution")))
    mark = GSM8K_GOLD.search(solution)
    gold = Gold(mark[1], "gsm8k") if mark else Gold()
    return Form(turns(problem, trace), gold=gold)


def _read_alpaca(columns: dict) -> Form | None:
    """Alpaca and its kin: an instruction, now and then with an input to it, and an output."""
    response = "output" if "output" in columns else "response"
    is_prompt = columns.keys().isdisjoint((*QUESTIONS, *RESPONSES))
    if is_empty(columns.get("instruction")) or not (is_prompt or response in columns):
        return None
    for name in QUESTIONS:
        if name in columns:
            raise _ambiguous("instruction", name, "question")
    question = _text(columns["instruction"], "instruction")
    if not is_empty(columns.get("input")):
        question += "\n\n" + _text(columns["input"], "input")
    if is_prompt:
        return Form(({"role": "user", "content": question},))
    output = _text(columns[response], response)
    return Form(turns(question, output), output, response)


def _read_question(columns: dict) -> Form:
    """A question and, in most, a response: GSM8K, MATH, prompt and completion, and their kin."""
    asked = [name for name in QUESTIONS if name in columns]
    if not asked and {"input", "output"} <= columns.keys():
        asked = ["input"]
    if not asked:
        for name in CONVERSATIONS:
            if name in columns:
                normalise_messages(columns[name], name)  # says that it is empty
        # A response to nothing: in Parquet a question that is null leaves no column behind.
        has_response = not columns.keys().isdisjoint((*RESPONSES, *GOLDS))
        error = EmptyRow if has_response or not columns else UserError
        raise error(
            f"columns {sorted(columns)} fit no known form (question, problem, prompt, query or "
            "instruction, alone or with completion, response, output, solution or answer; "
            "messages; conversations; HumanEval, MBPP); rename them"
        )
    _need_same(asked, columns, "question")
    prompt = _prompt(columns, asked[0])
    present = [name for name in RESPONSES if name in columns]
    if not present:
        return Form(prompt)
    name = next((name for name in present if not is_empty(columns[name])), present[0])
    value = columns[name]
    if isinstance(value, list) and value and name in TEXTS:
        return Form((*prompt, *normalise_messages(value, name)))
    if isinstance(value, list) and len(value) == 1 and name == "answer":
        value = value[0]
    if is_number(value):
        value = plain_number(value, name)
    response = _text(value, name)
    content = response
    if GSM8K_GOLD.search(response):
        content = GSM8K_CALCULATION.sub("", response)
    return Form((*prompt, {"role": "assistant", "content": content}), response, name)


def _prompt(columns: dict, name: str) -> tuple[dict, ...]:
    """The messages of a question: a text, or a list of messages, of which none is trained on."""
    if not isinstance(columns[name], list):
        return ({"role": "user", "content": _text(columns[name], name)},)
    messages = normalise_messages(columns[name], name)
    if messages[-1]["role"] == "assistant":
        raise UserError(
            f"{name!r} ends with the assistant's words, which would have to be "
            "continued; give them with the completion"
        )
    for message in messages:
        if message["role"] == "assistant":
            message["weight"] = 0.0
    return messages


# --- columns that every form may have ------------------------------------------------------------


def _need_same(names: list[str], columns: dict, meaning: str) -> None:
    """Refuse columns with different values for the same thing."""
    for name in names[1:]:
        if columns[name] != columns[names[0]]:
            raise _ambiguous(names[0], name, meaning)


def _ambiguous(first: str, second: str, meaning: str) -> UserError:
    return UserError(
        f"both {first!r} and {second!r}: which of them is the {meaning}? Drop the other"
    )


def _add_system(messages: tuple[dict, ...], columns: dict) -> tuple[dict, ...]:
    """The conversation with the row's own system prompt in front of it."""
    prompts = [_text(columns[name], name) for name in SYSTEM if not is_empty(columns.get(name))]
    has_own = messages[0]["role"] == "system"
    if has_own:
        prompts.append(messages[0]["content"])
    if len(set(prompts)) > 1:
        raise UserError("there are two system prompts, which differ; keep one of them")
    if has_own or not prompts:
        return messages
    return ({"role": "system", "content": prompts[0]}, *messages)


def _refuse_columns(columns: dict) -> None:
    """Refuse a column that the prompt would have to show, or that weighs the row."""
    has_question = any(name in columns for name in QUESTIONS)
    for name, value in columns.items():
        if is_empty(value) or (name == "input" and not has_question):
            continue
        if name.lower() in PART_OF_QUESTION:
            raise UserError(
                f"the column {name!r} is part of the question; write it into the question's text"
            )
        if name in ROW_WEIGHTS and isinstance(value, (bool, int, float)) and value != 1:
            raise UserError(
                f"the column {name!r} would weigh the row, which is not done; drop it or the row"
            )


def unread_columns(example: Example, teachers: int = 0) -> set[str]:
    """Columns of a row that say something and are neither in the prompt nor the gold answer.

    teachers: how many there are; one reads `teacher_prompt`, and several `teacher`, too.
    """
    read = ("teacher_prompt", "teacher")[:teachers]
    unread = set()
    for name, value in example.columns.items():
        if not is_empty(value) and name not in read and not _is_read(example, name, value):
            unread.add(name)
    return unread


def _is_read(example: Example, name: str, value: object) -> bool:
    columns = example.columns
    if example.task in ("humaneval", "mbpp") and not CODE.isdisjoint(columns):
        return name in CODE or name in SYSTEM
    if name == "input":
        return not any(question in columns for question in QUESTIONS)
    if name == "source":  # where traces of eval.traces come from
        return isinstance(value, dict)
    if name in GOLDS and example.answer is None and isinstance(value, (list, dict)):
        return False
    if name in CANDIDATES and isinstance(value, str):
        if any(value in (message["content"] or "") for message in example.messages):
            return True
        return name == "solution" and example.answer is not None and example.answer in value
    return name in READ


def _text(value: object, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        error = EmptyRow if isinstance(value, str) or is_empty(value) else UserError
        raise error(f"{name!r} must be a text that is not empty")
    return value
