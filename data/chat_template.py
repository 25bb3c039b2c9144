"""A checkpoint's chat templates, rendered in a process of their own."""

import functools
import json
from collections.abc import Sequence
from typing import Any

from data.worker import Worker
from errors import UserError
from files import Json, parse_json, reason

JSON_CONSTANTS = {"true": "true", "false": "false", "null": "null", "none": "null"}
LIMIT = 5.0  # seconds for a text that takes 50 microseconds
WORKER = Worker("data.template_process", LIMIT)
MESSAGE = 1 << 20  # characters, about, of what one message asks for


class ChatTemplates:
    """Templates by name; one alone is "default".

    sources: name -> text of the template. label: begins the errors.
    """

    def __init__(self, sources: dict[str, str], label: str):
        self.sources, self.label = sources, label

    @functools.cached_property
    def arguments(self) -> frozenset[str]:
        """The names that the templates read and do not set themselves."""
        return frozenset(self._ask("arguments", list(self.sources.values())))

    def render(
        self, messages: Sequence[dict], generate: bool, tools: list[dict] | None, variables: Json
    ) -> str:
        """Write messages as text.

        Args:
            messages: Dicts in the form of data/messages.py.
            generate: Whether the text is to end where the assistant begins.
            tools: What may be called; the template "tool_use" is for them where there is one.
            variables: What else the template reads.

        Raises UserError.
        """
        return self._ask("render", *self._question(messages, generate, tools, variables))

    def render_many(self, wanted: Sequence[dict[str, Any]]) -> list[str | None]:
        """What `render` makes of each of these arguments, None where it is to be asked itself.

        One message asks for many: a message of its own costs three times what its text does.
        """
        texts: list[str | None] = [None] * len(wanted)
        places: dict[str, list[int]] = {}  # of the questions of each template
        questions = [self._question(**arguments) for arguments in wanted]
        for place, (source, _) in enumerate(questions):
            places.setdefault(source, []).append(place)
        for source, left in places.items():
            while left:
                some, size = [], 0
                for place in left:
                    some.append(questions[place][1])
                    size += sum(len(str(m["content"])) for m in some[-1]["messages"])
                    if size > MESSAGE:
                        break
                try:
                    replies, _ = WORKER.ask("render_many", source, some, limit=LIMIT / 2)
                except (TimeoutError, ConnectionError, TypeError, ValueError, RecursionError):
                    break
                for place, (text, _) in zip(left, replies, strict=False):
                    texts[place] = text
                left = left[len(replies) :]
        return texts

    def _question(
        self,
        messages: Sequence[dict],
        generate: bool,
        tools: list[dict] | None,
        variables: dict[str, Any],
    ) -> tuple[str, dict[str, Any]]:
        """(template, what it reads) for the arguments of `render`."""
        name = "tool_use" if tools and "tool_use" in self.sources else "default"
        if name not in self.sources:
            raise UserError(f"{self.label} has no chat template; use --template plain")
        shown = []
        for message in messages:
            if reasoning := message.get("reasoning_content"):  # templates have three names for it
                message = message | {"reasoning": reasoning, "thinking": reasoning}
            shown.append(message)
        given = {"tools": tools or None, "documents": None} | variables
        given |= {"messages": shown, "add_generation_prompt": generate}
        return self.sources[name], given

    def _ask(self, *question: Any) -> Any:
        """The reply of the process that knows templates. Raises UserError."""
        try:
            reply, wrong = WORKER.ask(*question)
        except TimeoutError:
            wrong = f"did not end within {LIMIT:g} s"
        except ConnectionError:
            wrong = "takes too much memory"
        except (TypeError, ValueError, RecursionError) as e:
            wrong = f"cannot be given these messages ({reason(e)})"
        if wrong:
            raise UserError(f"{self.label}: the chat template {wrong}")
        return reply


def parse_template_kwargs(text: str, option: str = "--chat_template_kwargs") -> Json:
    """Parse arguments of a chat template: `enable_thinking=false,name=x` or a JSON object.

    option: begins the errors. Raises UserError.
    """
    text = text.strip()
    if text.startswith("{"):
        return parse_json(text, option)
    result = {}
    for item in text.split(",") if text else ():
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not name.isidentifier():
            raise UserError(
                f"{option}: {item.strip()!r}; write name=value,name=value or a JSON object"
            )
        if name in result:
            raise UserError(f"{option}: {name} is there twice; give it one value")
        try:
            result[name] = json.loads(JSON_CONSTANTS.get(value.lower(), value))
        except ValueError:
            result[name] = value
    return result
