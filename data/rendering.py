"""Conversations through a chat template: a user's text stays text, and nothing is left out."""

import difflib
import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from data.messages import (
    call_texts,
    check_all_text,
    is_empty,
    json_value,
    loss_weight,
    message_texts,
    normalise_tools,
)
from data.tasks import Example
from data.tokenizer import Tokenizer
from errors import UserError
from files import without

OUR_FIELDS = ("weight", "shortened", "truncated")  # no template sees them
COMMON_FIELDS = {"role", "content", "reasoning_content", "tool_calls", *OUR_FIELDS}
# Fields that link messages or describe them: a template may pass over them.
LABELS = frozenset(
    "id tool_call_id message_id timestamp refusal annotations info metadata source model".split()
)


class Renderer:
    """The chat template of a tokenizer, with the arguments of a run.

    `escaped` has the origins of examples with control tokens' names in their texts.
    """

    def __init__(self, tokenizer: Tokenizer, template_kwargs: dict):
        self.tokenizer, self.template_kwargs = tokenizer, template_kwargs
        self.escaped: set[str] = set()
        self._lost_roles: dict[tuple, str | None] = {}
        self._ready: dict[tuple, str] = {}  # texts, by the messages themselves
        self._check_arguments(template_kwargs, "--chat_template_kwargs")

    def _escaped(self, value: Any) -> Any:
        """A value with the control tokens escaped in all its texts, names of fields too."""
        if isinstance(value, str):
            return self.tokenizer.escape(value)
        if isinstance(value, list):
            return [self._escaped(part) for part in value]
        if isinstance(value, dict):
            return {self._escaped(name): self._escaped(part) for name, part in value.items()}
        return value

    def render(self, messages: list[dict], example: Example, generate: bool = False) -> str:
        """The template's text, in which a user's control tokens are escaped.

        Raises UserError if escaping them would change what the template makes of the messages, or
        if it does not show the row's tools.
        """
        ready = self._ready.get(_key(messages, generate))
        if ready is not None:
            return ready
        given = self._given(messages, example)
        escaped, tools = self._escaped(given), given["tools"]
        text = self.tokenizer.render(**escaped, generate=generate)
        if escaped != given:
            self.escaped.add(example.origin)
            unmarked = self.tokenizer.render(**given, generate=generate)
            if self.tokenizer.unescape(text) != unmarked:
                raise UserError(
                    "the chat template looks into texts that hold names of control tokens; "
                    "take those out"
                )
        escaped["tools"] = None
        if tools and text == self.tokenizer.render(**escaped, generate=generate):
            raise UserError(
                "the chat template has no place for 'tools'; drop that column, or give a "
                "template that shows them"
            )
        return text

    def _given(self, messages: list[dict], example: Example) -> dict[str, Any]:
        """What the tokenizer's `render` is given, as the user wrote it."""
        shown = [without(message, OUR_FIELDS) for message in messages]
        tools = normalise_tools(example.columns.get("tools"))
        return {"messages": shown, "tools": tools, "template_kwargs": self._arguments(example)}

    @contextmanager
    def ahead(
        self, wanted: Sequence[tuple[list[dict], Example, list[tuple[int, bool]]]]
    ) -> Iterator[None]:
        """Inside `with`, have ready what `render` makes of these very messages.

        Of each conversation those up to some places, each with its `generate`. Texts that need a
        closer look are left to `render`: those with control tokens' names, those that fail, and
        those that do not show the row's tools.
        """
        questions: dict[tuple, dict[str, Any]] = {}
        for messages, example, parts in wanted:
            with suppress(UserError, TypeError, ValueError, RecursionError):
                given = self._given(messages, example)
                is_plain = self.tokenizer.is_plain(json.dumps(given, ensure_ascii=False))
                for end, generate in parts if is_plain else ():
                    key = _key(messages[:end], generate)
                    part = {"messages": given["messages"][:end], "generate": generate}
                    questions[*key, True] = given | part
                    if given["tools"]:
                        questions[*key, False] = given | part | {"tools": None}
        texts = dict(zip(questions, self.tokenizer.render_many(questions.values()), strict=True))
        for (*key, with_tools), text in texts.items():
            if with_tools and text is not None and text != texts.get((*key, False)):
                self._ready[tuple(key)] = text
        try:
            yield
        finally:
            for *key, _ in questions:
                self._ready.pop(tuple(key), None)

    def _arguments(self, example: Example) -> dict:
        """The template's arguments: the run's, and over them those of the row (as in TRL)."""
        own = json_value(example.columns.get("chat_template_kwargs") or {})
        if not isinstance(own, dict):
            raise UserError("'chat_template_kwargs' must be an object")
        given = {name: value for name, value in own.items() if not is_empty(value)}
        check_all_text(given)
        self._check_arguments(given, "'chat_template_kwargs'")
        return self.template_kwargs | given

    def _check_arguments(self, names: Collection[str], source: str) -> None:
        """Refuse arguments that the chat template does not read."""
        known = self.tokenizer.template_arguments if names else ()
        for name in names:
            if name in known:
                continue
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "leave it out"
            raise UserError(
                f"{source}: the chat template of {self.tokenizer.source} reads no {name!r}; {hint}"
            )

    # --- nothing is left out ---------------------------------------------------------------------

    def missing(self, texts: list[str], rendered: str) -> str | None:
        """One of some texts that a rendered text does not hold; None if it holds all.

        Each has a place of its own, the longest ones first. It may be written as it is or as JSON,
        white space around it aside.
        """
        for text in sorted(texts, key=lambda text: len(text.strip()), reverse=True):
            form = self.tokenizer.escape(text.strip())
            if form not in rendered:
                in_json = (json.dumps(form, ensure_ascii=False)[1:-1], json.dumps(form)[1:-1])
                forms = [form for form in in_json if form in rendered]
                if not forms:
                    return text
                form = forms[0]
            rendered = rendered.replace(form, "\0", 1)
        return None

    def check_prompt(
        self, messages: list[dict], text: str, conversation: list[dict], example: Example
    ) -> None:
        """Refuse a part of a prompt that lacks something that its messages say.

        messages: those of the part. conversation: all so far.
        """
        self._check_roles(conversation, example)
        self.check_fields(messages, conversation, example)
        said = []
        for message in messages:
            content = (message["content"] or "").strip()
            if not message.get("shortened"):
                said += message_texts(message)
                continue
            if content.startswith("<think>"):
                content = content.rpartition("</think>")[2]
            said += [content, *call_texts(message)]
        lost = self.missing(said, text)
        if lost is not None:
            raise UserError(f"the chat template leaves out {lost[:60]!r}; use another template")

    def _check_roles(self, messages: list[dict], example: Example) -> None:
        """Refuse roles whose messages the template passes over.

        They are found out with words of their own as contents.
        """
        roles = tuple(message["role"] for message in messages)
        kwargs = self._arguments(example)
        key = (roles, json.dumps(kwargs, sort_keys=True))
        if key not in self._lost_roles:
            probe = [{"role": role, "content": f"srlmword{i}x"} for i, role in enumerate(roles)]
            try:
                text = self.tokenizer.render(probe, True, None, kwargs)
                lost = [m["role"] for m in probe if m["content"] not in text]
            except UserError:  # a template that looks into contents; these are compared as well
                lost = []
            self._lost_roles[key] = lost[0] if lost else None
        if role := self._lost_roles[key]:
            raise UserError(
                f"the chat template passes over the role {role!r}; "
                "drop such messages, or give a template that shows them"
            )

    def check_fields(
        self, messages: list[dict], conversation: list[dict], example: Example
    ) -> None:
        """Refuse a field of some messages that neither this project nor the template reads."""
        for message in messages:
            for name in message.keys() - COMMON_FIELDS - LABELS:
                if message["role"] == "tool" and name == "name":
                    continue
                other = [without(m, {name}) if m is message else m for m in conversation]
                if self.render(other, example) == self.render(conversation, example):
                    raise UserError(
                        f"the field {name!r} of a {message['role']} message is "
                        "not read by the chat template; drop it"
                    )

    def check_untrained(self, messages: list[dict], example: Example) -> None:
        """Refuse an untrained turn whose reasoning no document would show."""
        text = self.render(messages, example)
        for message in messages:
            if message["role"] != "assistant" or loss_weight(message) or message.get("shortened"):
                continue
            if self.missing(list(message_texts(message)), text) is not None:
                raise UserError(
                    "the chat template leaves out the reasoning of a turn with "
                    'weight 0; take it out of the row, or write "shortened": true into that message'
                )


def _key(messages: list[dict], generate: bool) -> tuple:
    """What tells a text from all others as long as the messages live."""
    return (*map(id, messages), generate)
