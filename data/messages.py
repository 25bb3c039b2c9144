"""A conversation in the common names of its fields, whatever names a data set has for them."""

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any, TypeGuard

from errors import UserError
from files import LARGEST, without_nulls

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
TRAIN_FIELDS = ("weight", "loss", "train", "training")
ROLE = re.compile(r"[A-Za-z][\w -]*")
# Other words for a role, in any case; ShareGPT's `from` is one of them.
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
# Of a conversation: a template shows every turn with all before it, 5 seconds for so many.
MOST_MESSAGES = 1000
LABELS = ("id", "index")  # of a tool call
CALL_FIELDS = (*LABELS, "type", "function", "name", "arguments")
FUNCTION_FIELDS = ("name", "arguments", "description")


class EmptyRow(UserError):
    """A row that says nothing where it has to: what `--bad_rows drop` leaves out."""


# --- one form for all ----------------------------------------------------------------------------


def normalise_messages(value: object, name: str = "messages") -> tuple[dict, ...]:
    """Bring a conversation into {role, content, ...} dicts.

    The other fields: `reasoning_content` (also given as `reasoning` or `thinking`); `tool_calls`,
    their arguments as objects; `weight` in the loss (also given as `loss`, `train`, `training`; 0
    is not trained on). "shortened": true says that the template may leave out the reasoning of a
    turn that is not trained on. Fields that are null are left out; others stay for the template.

    Args:
        value: What the row has as its conversation.
        name: The column, for errors.

    Raises UserError naming what cannot be used.
    """
    if not _is_list_of_dicts(value) or not value:
        error = EmptyRow if is_empty(value) else UserError
        raise error(f"{name!r} must be a list of messages {{role, content}} that is not empty")
    if len(value) > MOST_MESSAGES:
        raise UserError(
            f"{name!r} has {len(value):,} messages; a conversation has at most {MOST_MESSAGES:,}: "
            "cut it into several rows"
        )
    result = []
    for number, message in enumerate(value, 1):
        with errors_at(f"message {number}"):
            result.append(_normalise_message(message))
    return tuple(result)


def _normalise_message(message: dict) -> dict:
    rest = without_nulls(message)
    if "role" not in rest and "from" in rest:
        rest = _from_sharegpt(rest)
    role = rest.pop("role", None)
    if not isinstance(role, str) or not ROLE.fullmatch(role):
        raise UserError("it has no role, or not a plain word for one; write {role, content}")
    role = ROLES.get(role.casefold(), role)
    if not is_empty(rest.pop("function_call", None)):
        raise UserError("'function_call' is not read; write it as 'tool_calls'")
    content = _content(rest.pop("content", None))
    result = {"role": role, "content": content}
    calls = _tool_calls(rest.pop("tool_calls", None))
    if calls:
        result["tool_calls"] = calls
    reasoning = _pop_same(rest, REASONING_FIELDS)
    if not is_empty(reasoning):
        if role != "assistant":
            raise UserError("only an assistant's message has reasoning")
        if "<think>" in (content or ""):
            raise UserError(
                "its reasoning is in a field of its own and in <think> too; keep one of them"
            )
        result["reasoning_content"] = _content(reasoning)
    weight = _pop_weight(rest)
    if weight is not None and role == "assistant":
        result["weight"] = weight
    elif weight:
        raise UserError(
            f"only the assistant's turns are trained on, and this {role} message asks for it"
        )
    if not calls and is_empty(reasoning):
        if content is None:
            raise UserError("its content must be a text")
        if role == "assistant" and weight != 0 and not content.strip():
            raise EmptyRow(
                "the assistant says nothing; drop the row, or give that message weight 0"
            )
    return result | {name: part for name, part in rest.items() if not is_empty(part)}


def _from_sharegpt(fields: dict) -> dict:
    """A message of ShareGPT's `from` and `value` with `role` and `content`."""
    sender, value = str(fields.pop("from")), fields.pop("value", None)
    if value is not None and "content" in fields:
        raise UserError("both 'value' and 'content'; keep one of them")
    if sender == "function_call":  # LLaMA-Factory's: the value is the call
        return {"role": "assistant", "content": None, "tool_calls": value} | fields
    if sender.casefold() not in ROLES:
        known = ", ".join(ROLES)
        raise UserError(f"unknown 'from' {sender!r}; known are {known}")
    return {"role": sender, "content": value} | fields


def _content(value: object) -> str | None:
    """A text, or the texts of a list of parts; pictures and sounds are refused."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise UserError("its content must be a text")
    texts = []
    for part in value:
        kind, text = type(part).__name__, part
        if isinstance(part, dict):
            kind = part.get("type", "text")
            text = part.get("text") if kind == "text" else None
        if not isinstance(text, str):
            raise UserError(f"content of type {kind!r} is not read; only texts are")
        texts.append(text)
    return "".join(texts)


def _tool_calls(value: object) -> list[dict]:
    """Calls as {"type": "function", "function": {"name", "arguments"}}; [] for none.

    Arguments that are JSON in a text become an object, as templates expect them.
    """
    if is_empty(json_value(value)):
        return []
    result = []
    for call in _list_of_dicts(value, "tool_calls"):
        bare = {k: v for k, v in call.items() if k not in (*LABELS, "type")}
        function = call.get("function", bare)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError("a tool call has no function with a name")
        unknown = [name for name in function if name not in FUNCTION_FIELDS]
        unknown += [name for name in call if name not in CALL_FIELDS]
        if unknown:
            raise UserError(
                f"{unknown[0]!r} of a tool call is not read; a call has a name and 'arguments'"
            )
        arguments = json_value(function.get("arguments"))
        function = function | {"arguments": {} if arguments is None else arguments}
        check_all_text(function)  # also what was JSON in a text
        labels = {name: part for name, part in call.items() if name in LABELS}
        result.append({"type": "function", **labels, "function": function})
    return result


def normalise_tools(value: object) -> list[dict]:
    """A row's `tools`: a list of objects, also as JSON in a text; [] for none."""
    if is_empty(json_value(value)) or value in ("null", "None"):
        return []
    return _list_of_dicts(value, "tools")


def _list_of_dicts(value: object, name: str) -> list[dict]:
    """Objects that are given in a list, alone, or as JSON in a text."""
    value = json_value(value)
    items = [value] if isinstance(value, dict) else value
    if not _is_list_of_dicts(items):
        raise UserError(f"{name!r} must be a list of objects, or JSON of one")
    check_all_text(items)
    return items


def _is_list_of_dicts(value: object) -> TypeGuard[list[dict]]:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def json_value(value: object) -> object:
    """The list or object that a text holds as JSON, as in Parquet; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, (dict, list)) else value


def _pop_weight(fields: dict) -> float | None:
    """Take out how much a message counts in the loss, under any name for it; None: not said."""
    for name in TRAIN_FIELDS:
        value = fields.get(name, 1)
        if not isinstance(value, (bool, int, float)) or not 0 <= value <= LARGEST:
            raise UserError(
                f"{name!r} must be true, false or a number from 0 to 1e30; it is {value!r:.60}"
            )
    weight = _pop_same(fields, TRAIN_FIELDS)
    return None if weight is None else float(weight)


def _pop_same(fields: dict, names: tuple[str, ...]) -> Any:
    """Take out the one value that a message has under several names of the same thing."""
    given = {name: fields.pop(name) for name in names if name in fields}
    values = list(given.values())
    if any(value != values[0] for value in values[1:]):
        raise UserError(f"{' and '.join(map(repr, given))} say different things")
    return values[0] if values else None


def is_empty(value: object) -> bool:
    """Whether a value says nothing: null, an empty text, list or object."""
    return value in (None, "", [], {}, ())


# --- what a message says -------------------------------------------------------------------------


def loss_weight(message: dict) -> float:
    """The weight of a message's tokens in the loss; 0 is not trained on."""
    return message.get("weight", 1.0)


def message_texts(message: dict) -> Iterator[str]:
    """Every text that a message says: content, reasoning, and what is in its tool calls."""
    for name in ("content", "reasoning_content"):
        if message.get(name):
            yield message[name]
    yield from call_texts(message)


def call_texts(message: dict) -> Iterator[str]:
    """Names and arguments of a message's tool calls."""
    for call in message.get("tool_calls", ()):
        yield call["function"]["name"]
        yield from _leaves(call["function"]["arguments"])


def _leaves(value: object) -> Iterator[str]:
    """Names and texts and numbers anywhere in an object."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield name
            yield from _leaves(part)
    elif isinstance(value, list):
        for part in value:
            yield from _leaves(part)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield json.dumps(value)


# --- errors ------------------------------------------------------------------------------------


@contextlib.contextmanager
def errors_at(origin: str) -> Iterator[None]:
    """Begin the errors of a block with the place that they are about."""
    try:
        yield
    except UserError as e:
        raise type(e)(f"{origin}: {e}") from None


def check_text(text: str, origin: str) -> None:
    """`check_all_text` for a text; errors begin with `origin`."""
    with errors_at(origin):
        check_all_text(text)


def check_all_text(value: object) -> None:
    """Refuse half a character (a lone surrogate) in the texts of a value.

    JSON and command lines can hold one; no tokenizer takes it and no file keeps it.
    """
    text = json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError as e:
        half = f"{text[e.start]!a} is half a character (a lone surrogate)"
        raise UserError(f"{half}; fix or drop that text") from None
