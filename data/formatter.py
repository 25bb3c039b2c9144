"""Examples as token ids: the checkpoint's chat template, or plain text.

Prompt and completion are tokenised apart, as in generation. What is trained on is what the model
has to write after the template's generation prompt: the assistant's own text in the form that the
template gives it, to the token that ends the turn. Nothing of a message is lost: what the template
leaves out is refused by name.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from data.batch import Document
from data.messages import (
    check_text,
    errors_at,
    is_empty,
    json_value,
    loss_weight,
    message_texts,
    normalise_messages,
)
from data.rendering import LABELS, OUR_FIELDS, Renderer
from data.tasks import Example
from data.tokenizer import Tokenizer
from errors import UserError

PLAIN_FIELDS = {"role", "content", *OUR_FIELDS, *LABELS}
OPENED = re.compile(r"<(think|thinking|thought|reasoning)>\s*\Z")
PLACEHOLDER = re.compile(r"\{(?:question|answer)\}")
CLOSED_BLOCK = re.compile(r"</(?:think|thinking|thought|reasoning)>\s*\Z")


class Segment(NamedTuple):
    """A piece of a document, tokenised by itself.

    weight: of its tokens in the loss; 0 is not trained on.
    """

    text: str
    weight: float


class Formatter:
    """Makes prompts and documents of examples.

    Args:
        tokenizer: The checkpoint's.
        template: "chat", "plain", or "auto" (chat if the tokenizer has a template).
        system_prompt: Put before a conversation that has none.
        prompt_suffix: Put behind the last question.
        template_kwargs: Arguments of the chat template (`enable_thinking`, ...).
        teacher_form: What a teacher is asked, with {question} and {answer}; empty: the same.

    `escaped` has the origins of examples with control tokens' names in their texts, `closed` of
    those whose answer had to close a reasoning block that the generation prompt opens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str = "auto",
        system_prompt: str = "",
        prompt_suffix: str = "",
        template_kwargs: dict | None = None,
        teacher_form: str = "",
    ):
        if template == "auto":
            template = "chat" if tokenizer.chat_template else "plain"
        self.tokenizer = tokenizer
        self.chat = template == "chat"
        self.end = tokenizer.turn_end if self.chat else tokenizer.eos
        self._opening = [] if self.chat else tokenizer.opening_ids  # a chat template writes its own
        self.system_prompt, self.prompt_suffix = system_prompt, prompt_suffix
        self.teacher_form = teacher_form
        self.closed: set[str] = set()
        self._ready: dict[int, list[dict]] = {}  # conversations, by the ids of their examples
        check_text(system_prompt, "--system_prompt")
        check_text(prompt_suffix, "--prompt_suffix")
        if template_kwargs and not self.chat:
            raise UserError(
                "--chat_template_kwargs are read by a chat template only; "
                "leave them out with --template plain"
            )
        self._renderer = Renderer(tokenizer, template_kwargs or {})
        self.escaped = self._renderer.escaped

    # --- what a model is given and what it has to write ------------------------------------------

    def prompt(self, example: Example) -> list[int]:
        """Ids that a model is given to answer `example`.

        That is the conversation without its last message if that one is the assistant's.
        """
        return self.prompt_ids(self.prompt_text(example))

    def teacher_prompt(self, example: Example) -> list[int] | None:
        """Ids that a teacher is given in place of `prompt`; None: the same.

        The column `teacher_prompt` has them, a text in place of the last question or a list of
        messages in place of the conversation; where it is empty the form that all rows share.
        """
        given = example.columns.get("teacher_prompt")
        if is_empty(given):
            given = self.teacher_form
        if is_empty(given):
            return None
        with errors_at(example.origin):
            if isinstance(given, str):
                messages = self._told(given, example)
            else:
                messages = normalise_messages(given, "teacher_prompt")
                if messages[-1]["role"] == "assistant":
                    raise UserError("'teacher_prompt' ends with the assistant's words; drop them")
        return self.prompt(dataclasses.replace(example, messages=tuple(messages)))

    def _told(self, text: str, example: Example) -> list[dict]:
        """The conversation with this text, filled in where it is the form, as its last question."""
        messages = list(example.messages)
        if text is self.teacher_form:
            if "{answer}" in text and not example.has_answer:
                raise UserError("--teacher_prompt shows an {answer}, and this row has none")
            parts = {"{question}": example.question, "{answer}": example.own_answer}
            text = PLACEHOLDER.sub(lambda found: parts[found[0]], text)
        asked = [i for i, message in enumerate(messages) if message["role"] == "user"]
        messages[asked[-1]] = {"role": "user", "content": text}
        return messages

    def prompt_ids(self, text: str) -> list[int]:
        """Ids of a prompt's text, a user's control tokens escaped."""
        return self._opening + self.tokenizer.encode(text)

    def prompt_text(self, example: Example) -> str:
        """The text of `prompt`, a user's control tokens escaped."""
        with errors_at(example.origin):
            return self._prompt_text(example)

    def _prompt_text(self, example: Example) -> str:
        messages = self._conversation(example)
        if messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not self.chat:
            return "".join(message["content"] for message in messages)
        text = self._renderer.render(messages, example, generate=True)
        for place, message in enumerate(messages):
            if message["role"] == "assistant":
                messages[place] = message | {"shortened": True}
        self._renderer.check_prompt(messages, text, messages, example)
        return text

    def opened(self, example: Example) -> str:
        """The tag of a reasoning block that the generation prompt opens, "" if it opens none.

        After `<think>` the model writes on inside the block.
        """
        found = OPENED.search(self.prompt_text(example))
        return f"<{found[1]}>" if found else ""

    def segments(self, example: Example) -> list[Segment]:
        """The pieces of an example's document: prompts with weight 0, the assistant's turns.

        A turn that the example does not train on is part of the next prompt. Without an assistant's
        turn at the end it is the prompt alone. Raises UserError for what the template does not
        render.
        """
        with errors_at(example.origin):
            return self._segments(example)

    def _segments(self, example: Example) -> list[Segment]:
        messages = self._conversation(example)
        if not messages or messages[-1]["role"] != "assistant":
            return [Segment(self._prompt_text(example), 0.0)]
        if not self.chat:
            prompt = self._prompt_text(example)
            content = messages[-1]["content"]
            completion = self._continue(prompt, content, "", example)
            if messages[-1].get("truncated"):
                completion = _unfinished(prompt, content)
            return [Segment(prompt, 0.0), Segment(completion, loss_weight(messages[-1]))]
        segments, text, done = [], "", 0
        for i in _trained_turns(messages):
            prompt = self._renderer.render(messages[:i], example, generate=True)
            if not prompt.startswith(text):
                raise RewrittenTurns(
                    "the chat template rewrites earlier turns; split the conversation"
                )
            new = prompt.removeprefix(text)
            self._renderer.check_prompt(messages[done:i], new, messages[:i], example)
            completion = self._completion(messages[: i + 1], prompt, example)
            if messages[i].get("truncated"):  # a template would end, or close, what it has not
                completion = _unfinished(prompt, self.tokenizer.escape(messages[i]["content"]))
            segments += [Segment(new, 0.0), Segment(completion, loss_weight(messages[i]))]
            text, done = prompt + completion, i + 1
        return segments

    @contextmanager
    def ahead(self, examples: Iterable[Example], answers: bool = True) -> Iterator[None]:
        """Have the template's texts of these examples ready inside `with`: many are cheaper.

        Those of `prompt`, `segments` and `documents`; others are made when they are asked for.
        answers: Whether more than `prompt` will be called.
        """
        new = [example for example in examples if self.chat and id(example) not in self._ready]
        wanted = []
        for example in new:
            messages = self._conversation(example)
            self._ready[id(example)] = messages
            turns = _trained_turns(messages)
            parts = [(turn, True) for turn in turns]
            parts = parts[-1:] if not answers else parts + [(turn + 1, False) for turn in turns]
            if not turns or turns[-1] + 1 < len(messages):
                parts.append((len(messages), True))
            wanted.append((messages, example, parts))
        try:
            with self._renderer.ahead(wanted):
                yield
        finally:
            for example in new:
                self._ready.pop(id(example), None)

    def split_turns(self, example: Example) -> list[Example]:
        """Make an example of each trained turn where the template rewrites earlier turns.

        Qwen3's, for one, takes the reasoning out of them. Where it rewrites none: the example
        itself.
        """
        turns = _trained_turns(example.messages)
        if not self.chat or len(turns) < 2:
            return [example]
        try:
            self.segments(example)
            return [example]
        except RewrittenTurns:
            with errors_at(example.origin):
                self._renderer.check_untrained(self._conversation(example), example)
        return [dataclasses.replace(example, messages=_until(example.messages, i)) for i in turns]

    def documents(self, examples: list[Example]) -> list[Document]:
        """Documents in the examples' order."""
        with self.ahead(examples):
            segments = [self.segments(example) for example in examples]
        texts = [piece.text for pieces in segments for piece in pieces]
        ids = iter(self.tokenizer.encode_many(texts))
        documents = []
        for pieces in segments:
            tokens, weights = [], []
            for piece in pieces:
                encoded = self.tokenizer.going_on(piece.text, next(ids), tokens)
                tokens += encoded
                weights += [piece.weight] * len(encoded)
            tokens = self._opening + tokens
            weights = [0.0] * len(self._opening) + weights
            weights[:1] = [0.0]  # nothing predicts the first token
            documents.append(Document(np.array(tokens, np.int32), np.array(weights, np.float32)))
        return documents

    # --- a conversation as the template gets it --------------------------------------------------

    def _conversation(self, example: Example) -> list[dict]:
        """Copies of the messages, with suffix and system prompt; for plain text escaped."""
        if id(example) in self._ready:
            return list(self._ready[id(example)])
        messages = [dict(message) for message in example.messages]
        if self.prompt_suffix:
            for message in reversed(messages):
                if message["role"] == "user":
                    message["content"] = (message["content"] or "") + self.prompt_suffix
                    break
        if self.system_prompt and messages and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        if self.chat:
            return messages
        self._check_plain(messages, example.columns)
        for message in messages:
            escaped = self.tokenizer.escape(message["content"])
            if escaped != message["content"]:
                self.escaped.add(example.origin)
            message["content"] = escaped
        return messages

    def _check_plain(self, messages: list[dict], columns: dict) -> None:
        """Refuse what plain text has no place for: anything but the content of one question."""
        lost = []
        for message in messages:
            lost += [name for name in message if name not in PLAIN_FIELDS]
            if message["content"] is None:
                lost.append("a message without content")
        for name in ("tools", "chat_template_kwargs"):
            if json_value(columns.get(name) or []):
                lost.append(name)
        if lost:
            raise UserError(f"plain text has no place for {lost[0]!r}; use a chat template")
        if sum(message["role"] not in ("system", "assistant") for message in messages) > 1:
            raise UserError(
                "plain text cannot show who says what in a conversation of "
                "several turns; use a chat template"
            )

    # --- what the assistant has to write ---------------------------------------------------------

    def _completion(self, messages: list[dict], prompt: str, example: Example) -> str:
        """What is to be written behind `prompt` for the last of the messages, with its end.

        That is the template's own text where it goes on from the prompt and has all that the
        message says, else the content as it is.
        """
        message, escape = messages[-1], self.tokenizer.escape
        self._renderer.check_fields([message], messages, example)
        content, reasoning = message["content"] or "", message.get("reasoning_content") or ""
        if CLOSED_BLOCK.search(prompt) and content.lstrip().startswith("<think>"):
            raise UserError(
                "the generation prompt ends with a finished <think> block and "
                "the answer begins with another; give --chat_template_kwargs enable_thinking=true, "
                "or take the reasoning out"
            )
        said = list(message_texts(message))
        rendered = self._renderer.render(messages, example)
        if rendered.startswith(prompt):
            turn, end, after = rendered[len(prompt) :].rpartition(self.end)
            if not end:  # a template that does not end turns
                turn = after.rstrip("\n")
            if (end or len(said) > 1) and not self._renderer.missing(said, turn):
                return turn + self.end
            said = [text for text in said if self._renderer.missing([text], turn)] or said
        shown = [content, reasoning] if OPENED.search(prompt) else [content]
        for text in said:
            if text not in shown:
                fields = {reasoning: "reasoning_content", content: "content"}
                raise UserError(
                    f"the chat template has no place for {text[:60]!r} of the "
                    f"assistant's {fields.get(text, 'tool_calls')}; write it into the content, or "
                    "give a template that shows it"
                )
        return self._continue(prompt, escape(content), escape(reasoning), example)

    def _continue(self, prompt: str, content: str, reasoning: str, example: Example) -> str:
        """The assistant's own words behind a prompt, and the token that ends them.

        Where the prompt has opened a block of reasoning, the tag with which the words begin is
        there already. Words without reasoning close the block first, as templates write an empty
        one: behind the tag they would be taken for reasoning.
        """
        opened = OPENED.search(prompt)
        if not opened:
            return content + self.end
        tag, close = f"<{opened[1]}>", f"</{opened[1]}>"
        line_end = "" if prompt.endswith("\n") else "\n"
        body = content.lstrip()
        if reasoning:
            content = f"{line_end}{reasoning}\n{close}\n\n{content}"
        elif body.startswith(tag):
            content = body.removeprefix(tag)
            if not line_end:
                content = content.removeprefix("\n")
        elif close not in content:
            self.closed.add(example.origin)
            content = f"{line_end}\n{close}\n\n{content}"
        return content + self.end


def _unfinished(prompt: str, content: str) -> str:
    """What was written behind a prompt and did not come to an end: as it is, a tag only once."""
    opened = OPENED.search(prompt)
    if not opened:
        return content
    whole, tag = opened[0], f"<{opened[1]}>"
    return content.removeprefix(whole if content.startswith(whole) else tag)


class RewrittenTurns(UserError):
    """A template renders a turn otherwise once another follows it."""


def _trained_turns(messages: Sequence[dict]) -> list[int]:
    """Places of the assistant's turns that are trained on, and of the last message if it is one."""
    last = len(messages) - 1
    return [
        i
        for i, message in enumerate(messages)
        if message["role"] == "assistant" and (loss_weight(message) or i == last)
    ]


def _until(messages: tuple[dict, ...], turn: int) -> tuple[dict, ...]:
    """Messages up to an assistant's turn, of which that turn alone is trained on.

    "shortened": the template may leave out the reasoning of the turns before, which are trained on
    with documents of their own.
    """
    result = []
    for message in messages[:turn]:
        if message["role"] == "assistant":
            message = message | {"weight": 0.0, "shortened": True}
        result.append(message)
    return (*result, messages[turn])
