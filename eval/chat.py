"""Talk to a checkpoint: python -m eval.chat runs/my-run [--temperature 0.7 --top_p 0.95 --logp]

Reads a line at a time, streams the answer and keeps the conversation; the line /new begins another
one. The checkpoint is a folder in Hugging Face form, a hub id, or the folder of a run (its newest
checkpoint).
"""

from errors import UserError, as_command, say  # isort: skip

import dataclasses
import sys

import options
from data.formatter import Formatter
from data.messages import check_text
from data.tasks import Example
from data.tokenizer import Tokenizer
from eval.prompts import template_kwargs
from model.generate import Engine, generate
from model.load import Subject, find
from options import REQUIRED, option


class Stream:
    """Prints text as its tokens arrive; a character that is not complete yet waits."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]):
        self.tokenizer, self.prompt, self.text = tokenizer, prompt, ""
        self.tokens: list[int] = []

    def __call__(self, index: int, token: int, logp: float) -> None:
        self.tokens.append(token)
        text = self.decoded()
        if not text.endswith("\ufffd"):
            self.show(text)

    def decoded(self) -> str:
        """The text of the tokens so far."""
        return self.tokenizer.decode(self.tokens, skip_special=True, before=self.prompt)

    def show(self, text: str, end: str = "") -> None:
        """Print what `text` has beyond what was printed already."""
        print(text[len(self.text) :], end=end, flush=True)
        self.text = text


@dataclasses.dataclass(frozen=True)
class ChatOptions:
    """Every option of the command."""

    checkpoint: str = option(
        REQUIRED, "a folder in Hugging Face form, a run's folder, or a hub id", positional=True
    )
    temperature: float = option(0.7, "0: always the most likely token", minimum=0)
    top_p: float = option(
        0.95, "sample from the most likely tokens with this mass", above=0, maximum=1
    )
    top_k: int = option(0, "sample from this many most likely tokens; 0: all", minimum=0)
    max_tokens: int = option(1024, "new tokens per answer at most", minimum=1)
    system: str | None = option(None, "the system prompt; the run's own unless given")
    chat_template_kwargs: str | None = option(
        None,
        "arguments of the chat template, as in enable_thinking=false; the run's own unless given",
    )
    seed: int = option(0, "the same seed and lines give the same answers")
    logp: bool = option(False, "after an answer, its number of tokens and their mean log-prob")


def formatter_of(subject: Subject, args: ChatOptions) -> Formatter:
    """What makes prompts as the checkpoint's run did, unless the options say otherwise."""
    settings = subject.settings
    return Formatter(
        subject.tokenizer,
        template=settings.get("template", "auto"),
        system_prompt=settings.get("system_prompt", "") if args.system is None else args.system,
        prompt_suffix=settings.get("prompt_suffix", ""),
        template_kwargs=template_kwargs(args.chat_template_kwargs, settings),
    )


def prompt_of(formatter: Formatter, messages: list[dict]) -> tuple[list[int], str]:
    """Token ids up to the assistant's turn, and the reasoning tag that they open ("<think>")."""
    if formatter.chat:
        example = Example(tuple(messages), origin="the conversation")
        return formatter.prompt(example), formatter.opened(example)
    # `Formatter` refuses several turns without a template; here their texts stand in a row
    texts = [message["content"] for message in messages]
    text = "".join([formatter.system_prompt, *texts, formatter.prompt_suffix])
    return formatter.prompt_ids(formatter.tokenizer.escape(text)), ""


def answer(
    subject: Subject, engine: Engine, formatter: Formatter, messages: list[dict], args: ChatOptions
) -> str:
    """Stream the assistant's next turn; returns its text, with the tag that the prompt opened."""
    prompt, opened = prompt_of(formatter, messages)
    positions = subject.config.max_position_embeddings
    limit = min(args.max_tokens, positions - len(prompt))
    if limit < 1:
        raise UserError(f"the conversation fills the model's {positions:,} positions")
    stream = Stream(subject.tokenizer, prompt)
    (completion,) = generate(
        engine,
        [prompt],
        limit,
        subject.stop_ids,
        vocab=subject.vocab,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seeds=[(args.seed << 20) + len(messages)],
        on_token=stream,
    )
    count = len(completion.tokens)
    stream.show(stream.decoded(), end="\n")
    if args.logp:
        cut_off = "" if completion.stopped else ", cut off"
        mean = sum(completion.logp) / count
        print(f"[{count} tokens, mean log-prob {mean:.4f}{cut_off}]", flush=True)
    return opened + stream.text


def talk(args: ChatOptions) -> None:
    """Answer line by line until the input ends."""
    subject = find(args.checkpoint)
    formatter, engine = formatter_of(subject, args), Engine(subject.model())
    say(f"talking to {subject.folder}", sys.stderr)
    messages, prompt = [], "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        check_text(line, "that line")
        if line == "/new":
            messages = []
        elif line:
            messages.append({"role": "user", "content": line})
            text = answer(subject, engine, formatter, messages, args)
            messages.append({"role": "assistant", "content": text})


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    return as_command("eval.chat", lambda: talk(options.parse(ChatOptions, argv)), "interrupted")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
