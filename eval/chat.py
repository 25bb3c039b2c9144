"""Talk to a checkpoint: python -m eval.chat runs/my-run [--temperature 0.7 --top_p 0.95 --logp]

Reads a line at a time, streams the answer and keeps the conversation; the line /new begins another
one. The checkpoint is a folder in Hugging Face form, a hub id, or the folder of a run (its newest
checkpoint).
"""

import argparse
import sys

from data.formatter import Formatter
from data.messages import check_text
from data.tasks import Example
from data.tokenizer import Tokenizer
from errors import UserError, as_command
from eval.prompts import template_kwargs
from model.generate import generate
from model.load import Subject, find
from model.transformer import Transformer


class Stream:
    """Prints text as its tokens arrive; a character that is not complete yet waits."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.text = tokenizer, ""
        self.tokens: list[int] = []

    def __call__(self, index: int, token: int, logp: float) -> None:
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens, skip_special=True)
        if not text.endswith("\ufffd"):
            self.show(text)

    def show(self, text: str, end: str = "") -> None:
        """Print what `text` has beyond what was printed already."""
        print(text[len(self.text) :], end=end, flush=True)
        self.text = text


def parse(argv: list[str]) -> argparse.Namespace:
    """The options of a command line. Raises UserError."""
    parser = argparse.ArgumentParser(
        prog="eval.chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: (_ for _ in ()).throw(UserError(message))
    parser.add_argument(
        "checkpoint", help="a folder in Hugging Face form, a run's folder, or a hub id"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.7, help="0: always the most likely token"
    )
    parser.add_argument(
        "--top_p",
        "--top-p",
        type=float,
        default=0.95,
        help="sample from the most likely tokens with this mass",
    )
    parser.add_argument(
        "--top_k",
        "--top-k",
        type=int,
        default=0,
        help="sample from this many most likely tokens; 0: all",
    )
    parser.add_argument(
        "--max_tokens", "--max-tokens", type=int, default=1024, help="new tokens per answer at most"
    )
    parser.add_argument("--system", help="the system prompt; the run's own unless given")
    parser.add_argument(
        "--chat_template_kwargs",
        "--chat-template-kwargs",
        help="arguments of the chat template, as in enable_thinking=false; "
        "the run's own unless given",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="the same seed and lines give the same answers"
    )
    parser.add_argument(
        "--logp",
        action="store_true",
        help="after an answer, its number of tokens and their mean log-prob",
    )
    return parser.parse_args(argv)


def formatter_of(subject: Subject, args: argparse.Namespace) -> Formatter:
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
    return formatter.tokenizer.encode(formatter.tokenizer.escape(text)), ""


def answer(
    subject: Subject,
    model: Transformer,
    formatter: Formatter,
    messages: list[dict],
    args: argparse.Namespace,
) -> str:
    """Stream the assistant's next turn; returns its text, with the tag that the prompt opened."""
    prompt, opened = prompt_of(formatter, messages)
    positions = model.config.max_position_embeddings
    limit = min(args.max_tokens, positions - len(prompt))
    if limit < 1:
        raise UserError(f"the conversation fills the model's {positions:,} positions")
    stream = Stream(subject.tokenizer)
    try:
        (completion,) = generate(
            model,
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
    except ValueError as e:
        raise UserError(str(e)) from None
    count = len(completion.tokens)
    stream.show(subject.tokenizer.decode(completion.tokens, skip_special=True), end="\n")
    if args.logp:
        cut_off = "" if completion.stopped else ", cut off"
        mean = sum(completion.logp) / count
        print(f"[{count} tokens, mean log-prob {mean:.4f}{cut_off}]", flush=True)
    return opened + stream.text


def talk(args: argparse.Namespace) -> None:
    """Answer line by line until the input ends."""
    subject = find(args.checkpoint)
    formatter, model = formatter_of(subject, args), subject.model()
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
            text = answer(subject, model, formatter, messages, args)
            messages.append({"role": "assistant", "content": text})


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    return as_command("eval.chat", lambda: talk(parse(argv)), "interrupted")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
