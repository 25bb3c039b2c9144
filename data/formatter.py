"""Examples as token ids: the checkpoint's chat template, or plain text.

Prompt and completion are tokenised apart, as in generation. What is trained on is what the model has to write
after the template's generation prompt: the assistant's own text in the form that the template gives it, to the
token that ends the turn. Nothing of a message is lost: what the template leaves out is refused by name.
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from data.batch import Document
from data.messages import check_all_text, check_text, is_empty, json_value, normalise_tools
from data.tasks import Example
from data.tokenizer import Tokenizer
from errors import UserError

COMMON_FIELDS = frozenset(
    {"role", "content", "reasoning_content", "tool_calls", "weight", "shortened"}
)
# Fields that link messages or describe them: a template may pass over them.
LABELS = frozenset(
    "id tool_call_id message_id timestamp refusal annotations info metadata source model".split()
)
OPENED = re.compile(r"<(think|thinking|thought|reasoning)>\s*\Z")
CLOSED_BLOCK = re.compile(r"</(?:think|thinking|thought|reasoning)>\s*\Z")


class Segment(NamedTuple):
    """A piece of a document, tokenised by itself. weight: of its tokens in the loss; 0 is not trained on."""

    text: str
    weight: float


class Formatter:
    """Makes prompts and documents of examples.

    template: "chat", "plain", or "auto" (chat if the tokenizer has a template). system_prompt: put before a
    conversation that has none. prompt_suffix: put behind the last question. template_kwargs: arguments of the
    chat template (`enable_thinking`, ...). `escaped` has the origins of examples with control tokens' names in
    their texts, `closed` of those whose answer had to close a reasoning block that the generation prompt opens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str = "auto",
        system_prompt: str = "",
        prompt_suffix: str = "",
        template_kwargs: dict | None = None,
    ):
        if template == "auto":
            template = "chat" if tokenizer.chat_template else "plain"
        self.tokenizer = tokenizer
        self.chat = template == "chat"
        self.end = tokenizer.turn_end if self.chat else tokenizer.eos
        self.system_prompt, self.prompt_suffix = system_prompt, prompt_suffix
        self.template_kwargs = dict(template_kwargs or {})
        self.escaped: set[str] = set()
        self.closed: set[str] = set()
        self._roles_rendered = {}
        check_text(system_prompt, "--system_prompt")
        check_text(prompt_suffix, "--prompt_suffix")
        if self.template_kwargs and not self.chat:
            raise UserError(
                "--chat_template_kwargs are read by a chat template only; leave them out with --template plain"
            )
        for name in self.template_kwargs:
            if name not in tokenizer.template_arguments:
                near = difflib.get_close_matches(name, tokenizer.template_arguments, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise UserError(
                    f"--chat_template_kwargs: the chat template of {tokenizer.where} reads no {name!r}{hint}"
                )

    # --- what a model is given and what it has to write ------------------------------------------

    def prompt(self, example: Example) -> list[int]:
        """Ids that a model is given to answer `example`: all but its last message, if that is the assistant's."""
        return self.tokenizer.encode(self.prompt_text(example))

    def prompt_text(self, example: Example) -> str:
        """The text of `prompt`, a user's control tokens escaped."""
        messages = self._conversation(example)
        if messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not self.chat:
            return "".join(message["content"] for message in messages)
        messages = [m | {"shortened": True} if m["role"] == "assistant" else m for m in messages]
        text = self._render(messages, example, generate=True)
        self._check_rendered(messages, text, messages, example)
        return text

    def opened(self, example: Example) -> str:
        """The tag of a reasoning block that the generation prompt opens (`<think>`), so that the model writes on in
        it; else an empty text."""
        found = OPENED.search(self.prompt_text(example))
        return f"<{found[1]}>" if found else ""

    def segments(self, example: Example) -> list[Segment]:
        """The pieces of an example's document: prompts with weight 0, the assistant's turns with their own.

        A turn that the example does not train on is part of the next prompt. Without an assistant's turn at the
        end it is the prompt alone. Raises UserError for what the template does not render.
        """
        messages = self._conversation(example)
        if not messages or messages[-1]["role"] != "assistant":
            return [Segment(self.prompt_text(example), 0.0)]
        if not self.chat:
            before = self.prompt_text(example)
            content = self._raw_completion(messages[-1], before, example)
            return [Segment(before, 0.0), Segment(content + self.end, _weight(messages[-1]))]
        segments, so_far, seen = [], "", 0
        for i, message in enumerate(messages):
            is_last = i == len(messages) - 1
            if message["role"] != "assistant" or not (_weight(message) or is_last):
                continue
            prompt = self._render(messages[:i], example, generate=True)
            if not prompt.startswith(so_far):
                raise RewrittenTurns(
                    f"{example.origin}: the chat template rewrites earlier turns; split the conversation"
                )
            self._check_rendered(messages[seen:i], prompt[len(so_far) :], messages[:i], example)
            completion = self._completion(messages[: i + 1], prompt, example)
            segments += [Segment(prompt[len(so_far) :], 0.0), Segment(completion, _weight(message))]
            so_far, seen = prompt + completion, i + 1
        return segments

    def split_turns(self, example: Example) -> list[Example]:
        """The example itself, or, where the template writes earlier turns otherwise than it trains them (Qwen3 takes
        their reasoning out), one example for each of its trained turns, with what comes before it as the prompt."""
        turns = [i for i, message in enumerate(example.messages) if message["role"] == "assistant"]
        if not self.chat or len(turns) < 2 or not self._rewrites_turns(example):
            return [example]
        self._check_untrained_turns(example)
        own = [i for i in turns if _weight(example.messages[i]) or i == turns[-1]]
        return [dataclasses.replace(example, messages=_until(example.messages, i)) for i in own]

    def _rewrites_turns(self, example: Example) -> bool:
        try:
            self.segments(example)
        except RewrittenTurns:
            return True
        return False

    def documents(self, examples: list[Example]) -> list[Document]:
        """Documents in the examples' order."""
        segments = [self.segments(example) for example in examples]
        ids = iter(
            self.tokenizer.encode_many([piece.text for pieces in segments for piece in pieces])
        )
        result = []
        for pieces in segments:
            encoded = [(next(ids), piece.weight) for piece in pieces]
            tokens = np.array([i for piece, _ in encoded for i in piece], np.int32)
            weights = np.array([weight for piece, weight in encoded for _ in piece], np.float32)
            weights[:1] = 0  # nothing predicts the first token
            result.append(Document(tokens, weights))
        return result

    # --- a conversation as the template gets it --------------------------------------------------

    def _conversation(self, example: Example) -> list[dict]:
        """The messages with suffix and system prompt."""
        messages = [dict(message) for message in example.messages]
        user = next((m for m in reversed(messages) if m["role"] == "user"), None)
        if user and self.prompt_suffix:
            user["content"] = (user["content"] or "") + self.prompt_suffix
        if self.system_prompt and messages and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        if self.chat:
            return messages
        self._refuse_fields(messages, example)
        escaped = [
            message | {"content": self.tokenizer.escape(message["content"])} for message in messages
        ]
        if escaped != messages:
            self.escaped.add(example.origin)
        return escaped

    def _refuse_fields(self, messages: list[dict], example: Example) -> None:
        """Plain text has no place for anything but content."""
        for message in messages:
            field = next(
                (
                    name
                    for name in message
                    if name not in ("role", "content", "weight", "shortened", *LABELS)
                ),
                None,
            )
            if field or message["content"] is None:
                raise UserError(
                    f"{example.origin}: plain text has no place for {field or 'a message without content'!r}; use a chat template"
                )
        for name in ("tools", "chat_template_kwargs"):
            if json_value(example.columns.get(name) or []):
                raise UserError(
                    f"{example.origin}: plain text has no place for {name!r}; use a chat template"
                )
        if sum(message["role"] not in ("system", "assistant") for message in messages) > 1:
            raise UserError(
                f"{example.origin}: plain text cannot show who says what in a conversation of several turns; use a chat template"
            )

    def _escaped(self, value: object) -> object:
        """Texts anywhere in a value, names of fields too, with their control tokens escaped."""
        if isinstance(value, str):
            return self.tokenizer.escape(value)
        if isinstance(value, list):
            return [self._escaped(part) for part in value]
        if isinstance(value, dict):
            return {self._escaped(name): self._escaped(part) for name, part in value.items()}
        return value

    def _render(self, messages: list[dict], example: Example, generate: bool = False) -> str:
        """The template's text, in which a user's control tokens are escaped. Raises UserError if escaping them would
        change what the template makes of the messages, or if it does not show the row's tools."""
        shown = [
            {k: v for k, v in message.items() if k not in ("weight", "shortened")}
            for message in messages
        ]
        tools, kwargs = (
            normalise_tools(example.columns.get("tools"), example.origin),
            self._template_kwargs(example),
        )
        escaped = self._escaped([shown, tools, kwargs])
        try:
            text = self.tokenizer.render(escaped[0], generate, escaped[1], escaped[2])
            if escaped != [shown, tools, kwargs]:
                self.escaped.add(example.origin)
                if self.tokenizer.unescape(text) != self.tokenizer.render(
                    shown, generate, tools, kwargs
                ):
                    raise UserError(
                        "the chat template looks into texts that hold names of control tokens; take those out"
                    )
            without_tools = (
                self.tokenizer.render(escaped[0], generate, None, escaped[2]) if tools else ""
            )
        except UserError as e:
            raise UserError(f"{example.origin}: {e}") from None
        if tools and text == without_tools:
            raise UserError(
                f"{example.origin}: the chat template has no place for 'tools'; drop that column, or give a template that shows them"
            )
        return text

    def _template_kwargs(self, example: Example) -> dict:
        """The template's arguments: the run's, and over them those of the row (TRL's column of that name)."""
        own = json_value(example.columns.get("chat_template_kwargs") or {})
        if not isinstance(own, dict):
            raise UserError(f"{example.origin}: 'chat_template_kwargs' must be an object")
        given = {name: value for name, value in own.items() if not is_empty(value)}
        check_all_text(given, example.origin)
        strange = next(
            (name for name in given if name not in self.tokenizer.template_arguments), None
        )
        if strange:
            raise UserError(
                f"{example.origin}: the chat template reads no {strange!r} of 'chat_template_kwargs'; drop it"
            )
        return self.template_kwargs | given

    def _completion(self, messages: list[dict], prompt: str, example: Example) -> str:
        """What the assistant has to write behind the generation prompt `prompt` for the last message, with its end."""
        message = messages[-1]
        self._check_other_fields(messages, message, example)
        said = [self.tokenizer.escape(text) for text in _said(message)]
        content = message["content"] or ""
        if CLOSED_BLOCK.search(prompt) and content.lstrip().startswith("<think>"):
            raise UserError(
                f"{example.origin}: the generation prompt ends with a finished <think> block and the answer begins with another; "
                "give --chat_template_kwargs enable_thinking=true, or take the reasoning out"
            )
        whole = self._render(messages, example)
        if whole.startswith(prompt):
            turn, found, after = whole[len(prompt) :].rpartition(self.end)
            turn = turn if found else after.rstrip("\n")  # a template that does not end turns
            if (found or len(said) > 1) and _holds(turn, said):
                return turn + self.end
            said = [text for text in said if not _holds(turn, [text])] or said
        handled = [message["content"]] + (
            [message.get("reasoning_content")] if OPENED.search(prompt) else []
        )
        lost = next((text for text in said if self.tokenizer.unescape(text) not in handled), None)
        if lost is not None:
            lost = self.tokenizer.unescape(lost)
            raise UserError(
                f"{example.origin}: the chat template has no place for {lost[:60]!r} of the assistant's {_field_of(message, lost)}; "
                "write it into the content, or give a template that shows it"
            )
        escaped = {
            name: self.tokenizer.escape(message.get(name) or "")
            for name in ("content", "reasoning_content")
        }
        return self._raw_completion(escaped, prompt, example) + self.end

    def _raw_completion(self, message: dict, prompt: str, example: Example) -> str:
        """The assistant's content itself, behind what the prompt has opened."""
        opened = OPENED.search(prompt)
        if not opened:
            return message["content"]
        text, closes = _continued(
            prompt, opened[1], message["content"], message.get("reasoning_content")
        )
        if closes:
            self.closed.add(example.origin)
        return text

    # --- nothing is left out ---------------------------------------------------------------------

    def _check_rendered(
        self, messages: list[dict], text: str, conversation: list[dict], example: Example
    ) -> None:
        """Refuse a part of a prompt that lacks something that its messages, a part of the conversation, say."""
        self._check_roles(conversation, example)
        said = []
        for message in messages:
            content = (message["content"] or "").strip()
            if message.get("shortened") and content.startswith("<think>"):
                said += [content.rpartition("</think>")[2], *_said_in_calls(message)]
            elif message.get("shortened"):
                said += [content, *_said_in_calls(message)]
            else:
                said += _said(message)
            self._check_other_fields(conversation, message, example)
        said = [self.tokenizer.escape(part) for part in said]
        if not _holds(text, said):
            lost = next((part for part in said if not _holds(text, [part])), said[0])
            raise UserError(
                f"{example.origin}: the chat template leaves out {self.tokenizer.unescape(lost)[:60]!r}; use another template"
            )

    def _check_roles(self, messages: list[dict], example: Example) -> None:
        """Refuse roles whose messages the template passes over, found out with words of their own as contents."""
        roles, kwargs = (
            tuple(message["role"] for message in messages),
            self._template_kwargs(example),
        )
        key = (roles, json.dumps(kwargs, sort_keys=True))
        if key not in self._roles_rendered:
            words = [f"srlmword{i}x" for i in range(len(roles))]
            probe = [{"role": role, "content": word} for role, word in zip(roles, words)]
            try:
                text = self.tokenizer.render(probe, True, None, kwargs)
                lost = next((role for role, word in zip(roles, words) if word not in text), None)
            except (
                UserError
            ):  # a template that looks into contents; what is said is compared all the same
                lost = None
            self._roles_rendered[key] = lost
        if lost := self._roles_rendered[key]:
            raise UserError(
                f"{example.origin}: the chat template passes over the role {lost!r}; drop such messages, or give a template that shows them"
            )

    def _check_other_fields(self, messages: list[dict], message: dict, example: Example) -> None:
        """Refuse a field that neither this project nor the template reads."""
        for name in message.keys() - COMMON_FIELDS - LABELS:
            if message["role"] == "tool" and name == "name":
                continue
            without = [
                {k: v for k, v in m.items() if m is not message or k != name} for m in messages
            ]
            if self._render(without, example) == self._render(messages, example):
                raise UserError(
                    f"{example.origin}: the field {name!r} of a {message['role']} message is not read by the chat template; drop it"
                )

    def _check_untrained_turns(self, example: Example) -> None:
        """Refuse an untrained turn whose reasoning no document would show."""
        messages = self._conversation(example)
        text = self._render(messages, example)
        for message in messages:
            is_untrained = message["role"] == "assistant" and not _weight(message)
            said = [self.tokenizer.escape(part) for part in _said(message)]
            if is_untrained and not message.get("shortened") and not _holds(text, said):
                raise UserError(
                    f"{example.origin}: the chat template leaves out the reasoning of a turn with weight 0; take it out of the "
                    'row, or write "shortened": true into that message'
                )


class RewrittenTurns(UserError):
    """A template renders a turn otherwise once another follows it."""


def _continued(prompt: str, tag: str, content: str, reasoning: str | None) -> tuple[str, bool]:
    """(the assistant's text where the generation prompt has opened <tag> already, whether it closes an empty block).

    The tag with which the text begins is there already. An answer without reasoning closes the block first, as
    templates write an empty one: behind the tag it would be taken for reasoning.
    """
    line_end = "" if prompt.endswith("\n") else "\n"
    if reasoning:
        return f"{line_end}{reasoning}\n</{tag}>\n\n{content}", False
    body = content.lstrip()
    if body.startswith(f"<{tag}>"):
        body = body.removeprefix(f"<{tag}>")
        return (body if line_end else body.removeprefix("\n")), False
    if f"</{tag}>" in content:
        return content, False
    return f"{line_end}\n</{tag}>\n\n{content}", True


def _until(messages: tuple, turn: int) -> tuple:
    """Messages up to an assistant's turn, of which that turn alone is trained on. "shortened": the template may leave
    out the reasoning of the turns before, which are trained on with documents of their own."""
    context = {"weight": 0.0, "shortened": True}
    before = [m | context if m["role"] == "assistant" else m for m in messages[:turn]]
    return (*before, messages[turn])


def _weight(message: dict) -> float:
    return message.get("weight", 1.0)


def _said(message: dict) -> Iterator[str]:
    """Every text that a message says: content, reasoning, and what is in its tool calls."""
    for name in ("content", "reasoning_content"):
        if message.get(name):
            yield message[name]
    yield from _said_in_calls(message)


def _field_of(message: dict, text: str) -> str:
    """The field of a message that says a text."""
    return next(
        (name for name in ("content", "reasoning_content") if message.get(name) == text),
        "tool_calls",
    )


def _said_in_calls(message: dict) -> Iterator[str]:
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


def _holds(text: str, said: list[str]) -> bool:
    """Whether a text holds all of these, each in a place of its own, but for white space around them; as they are or as
    JSON writes them."""
    for wanted in sorted((part.strip() for part in said), key=len, reverse=True):
        if wanted not in text:
            in_json = (json.dumps(wanted, ensure_ascii=False)[1:-1], json.dumps(wanted)[1:-1])
            wanted = next((form for form in in_json if form in text), None)
            if wanted is None:
                return False
        text = text.replace(wanted, "\0", 1)
    return True
