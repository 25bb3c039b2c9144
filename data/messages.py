"""A conversation in the common names of its fields, whatever names a data set has for them."""

import json
import math
import re

from errors import UserError

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
TRAIN_FIELDS = ("weight", "loss", "train", "training")
ROLE = re.compile(r"[A-Za-z][\w -]*")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


def normalise_messages(value: object, origin: str, name: str = "messages") -> tuple[dict, ...]:
    """A conversation as {role, content, ...} dicts in the common names of their fields.

    `reasoning_content` (also given as `reasoning` or `thinking`), `tool_calls` with arguments as objects,
    `weight` (also `loss`, `train`, `training`; 0 is not trained on). "shortened": true says that the template may
    leave out the reasoning of a turn that is not trained on. Fields that are null are left out; other fields stay
    for the template. Raises UserError naming what cannot be used.
    """
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise UserError(
            f"{origin}: {name!r} must be a list of messages {{role, content}} that is not empty"
        )
    return tuple(
        _normalise_message(message, f"{origin}: message {i}") for i, message in enumerate(value, 1)
    )


def _normalise_message(message: dict, where: str) -> dict:
    fields = {name: value for name, value in message.items() if value is not None}
    if "role" not in fields and "from" in fields:
        fields = _from_sharegpt(fields, where)
    role = fields.get("role")
    if not isinstance(role, str) or not ROLE.fullmatch(role):
        raise UserError(
            f"{where} has no role, or not a plain word for one; write {{role, content}}"
        )
    if not is_empty(fields.get("function_call")):
        raise UserError(f"{where}: 'function_call' is not read; write it as 'tool_calls'")
    result = {"role": role, "content": _content(fields.get("content"), where)}
    known = {"role", "content", "function_call", "tool_calls", *REASONING_FIELDS, *TRAIN_FIELDS}
    if not is_empty(json_value(fields.get("tool_calls"))):
        result["tool_calls"] = _tool_calls(fields["tool_calls"], where)
    reasoning = _same_value(fields, REASONING_FIELDS, where)
    if not is_empty(reasoning):
        if role != "assistant":
            raise UserError(f"{where}: only an assistant's message has reasoning")
        result["reasoning_content"] = _content(reasoning, where)
        if "<think>" in (result["content"] or ""):
            raise UserError(
                f"{where}: its reasoning is in a field of its own and in <think> too; keep one of them"
            )
    weight = _weight(fields, where)
    if weight is not None and role == "assistant":
        result["weight"] = weight
    elif weight:
        raise UserError(
            f"{where}: only the assistant's turns are trained on, and this {role} message asks for it"
        )
    said_otherwise = {"tool_calls", "reasoning_content"} & result.keys()
    if result["content"] is None and not said_otherwise:
        raise UserError(f"{where}: its content must be a text")
    trained = role == "assistant" and result.get("weight") != 0
    if trained and not said_otherwise and not result["content"].strip():
        raise UserError(
            f"{where}: the assistant says nothing; drop the row, or give that message weight 0"
        )
    return result | {n: v for n, v in fields.items() if n not in known and not is_empty(v)}


def _from_sharegpt(fields: dict, where: str) -> dict:
    """ShareGPT's `from` and `value`."""
    rest = {name: value for name, value in fields.items() if name not in ("from", "value")}
    if "value" in fields and "content" in rest:
        raise UserError(f"{where}: both 'value' and 'content'; keep one of them")
    author = str(fields["from"])
    if author == "function_call":  # LLaMA-Factory's: the value is the call
        return {"role": "assistant", "content": None, "tool_calls": fields.get("value")} | rest
    role = SHAREGPT_ROLES.get(author)
    if role is None:
        raise UserError(
            f"{where}: unknown 'from' {author!r}; known are {', '.join(SHAREGPT_ROLES)}"
        )
    return {"role": role, "content": fields.get("value")} | rest


def _content(value: object, where: str) -> str | None:
    """A text, or the texts of a list of parts; pictures and sounds are refused."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise UserError(f"{where}: its content must be a text")
    texts = []
    for part in value:
        if isinstance(part, str):
            texts.append(part)
        elif (
            isinstance(part, dict)
            and part.get("type", "text") == "text"
            and isinstance(part.get("text"), str)
        ):
            texts.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise UserError(f"{where}: content of type {kind!r} is not read; only texts are")
    return "".join(texts)


def _tool_calls(value: object, where: str) -> list[dict]:
    """Calls as {"type": "function", "function": {"name", "arguments"}}; arguments that are JSON in a text
    become an object, as templates expect them."""
    calls = json_value(value)
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise UserError(f"{where}: 'tool_calls' must be a list of calls")
    check_all_text(calls, where)
    result = []
    for call in calls:
        function = call.get(
            "function", {k: v for k, v in call.items() if k not in ("id", "type", "index")}
        )
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"{where}: a tool call has no function with a name")
        strange = next(
            (name for name in function if name not in ("name", "arguments", "description")), None
        )
        strange = strange or next(
            (k for k in call if k not in ("id", "type", "index", "function", "name", "arguments")),
            None,
        )
        if strange:
            raise UserError(
                f"{where}: {strange!r} of a tool call is not read; a call has a name and 'arguments'"
            )
        arguments = json_value(function.get("arguments"))
        function = dict(function, arguments={} if arguments is None else arguments)
        check_all_text(function, where)  # also what was JSON in a text
        labels = {name: part for name, part in call.items() if name in ("id", "index")}
        result.append({"type": "function", **labels, "function": function})
    return result


def normalise_tools(value: object, origin: str) -> list[dict]:
    """A row's `tools`: a list of objects, also as JSON in a text; [] for none."""
    tools = json_value(value)
    if tools is None or tools in ("", "null", "None", [], {}):
        return []
    tools = [tools] if isinstance(tools, dict) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{origin}: 'tools' must be a list of objects, or JSON of one")
    check_all_text(tools, origin)
    return tools


def json_value(value: object) -> object:
    """What a text of JSON holds (Parquet keeps calls and tools so); any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, (dict, list)) else value


def _weight(fields: dict, where: str) -> float | None:
    """How much a message counts in the loss, by any of the names that people use for it; None: not said."""
    given = {name: _as_weight(name, fields[name], where) for name in TRAIN_FIELDS if name in fields}
    return _same_value(given, TRAIN_FIELDS, where)


def _as_weight(name: str, value: object, where: str) -> float:
    if not isinstance(value, (bool, int, float)) or not 0 <= value < math.inf:
        raise UserError(
            f"{where}: {name!r} must be true, false or a number that is not negative; it is {value!r}"
        )
    return float(value)


def _same_value(fields: dict, names: tuple[str, ...], where: str) -> object:
    """The one value that a message has under several names of the same thing."""
    given = {name: fields[name] for name in names if name in fields}
    values = list(given.values())
    if any(value != values[0] for value in values[1:]):
        raise UserError(f"{where}: {' and '.join(map(repr, given))} say different things")
    return values[0] if values else None


def is_empty(value: object) -> bool:
    """Whether a value says nothing: null, an empty text, list or object."""
    return value is None or (isinstance(value, (str, list, dict, tuple)) and len(value) == 0)


def check_all_text(value: object, origin: str) -> None:
    """Refuse halves of characters anywhere in a row: no tokenizer takes them and no file keeps them."""
    if isinstance(value, str):
        check_text(value, origin)
    elif isinstance(value, dict):
        for name, part in value.items():
            check_text(str(name), origin)
            check_all_text(part, origin)
    elif isinstance(value, (list, tuple)):
        for part in value:
            check_all_text(part, origin)


def check_text(text: str, origin: str) -> None:
    """JSON and command lines can hold halves of characters, which no tokenizer takes and no file keeps."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        half = f"{text[e.start]!a} is half a character (a lone surrogate)"
        raise UserError(f"{origin}: {half}; fix or drop that text") from None
