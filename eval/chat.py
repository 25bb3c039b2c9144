"""Talk to a checkpoint: python -m eval.chat runs/my-run [--temperature 0.7 --top_p 0.95 --logp]

Reads a line at a time, streams the answer and keeps the conversation; the line /new begins another one. The checkpoint is a
folder in Hugging Face form (Qwen2.5, Qwen3), a hub id, or the folder of a run (its newest checkpoint).
"""

import argparse
import sys

from data.formatter import Formatter
from data.messages import check_text
from data.tasks import Example
from data.tokenizer import parse_template_kwargs
from errors import UserError
from model.generate import generate
from model.load import find


class Stream:
    """Prints text as its ids arrive; a character that is not complete yet waits."""

    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.text = tokenizer, [], ""

    def __call__(self, index, token, logp):
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids, skip_special=True)
        if not text.endswith("\ufffd"):
            self.show(text)

    def show(self, text, end=""):
        print(text[len(self.text) :], end=end, flush=True)
        self.text = text


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="eval.chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: (_ for _ in ()).throw(UserError(message))
    parser.add_argument(
        "checkpoint", help="a folder in Hugging Face form, a run's folder, or a hub id"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.7, help="0: always the likeliest token"
    )
    parser.add_argument(
        "--top_p",
        "--top-p",
        type=float,
        default=0.95,
        help="sample from the likeliest ids with this mass",
    )
    parser.add_argument(
        "--top_k", "--top-k", type=int, default=0, help="sample from this many ids; 0: all"
    )
    parser.add_argument(
        "--max_tokens", "--max-tokens", type=int, default=1024, help="new tokens per answer at most"
    )
    parser.add_argument("--system", help="the system prompt; the run's own unless given")
    parser.add_argument(
        "--chat_template_kwargs",
        "--chat-template-kwargs",
        help="arguments of the chat template, as in enable_thinking=false; the run's own unless given",
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


def prompt_ids(formatter, messages):
    """Ids of a conversation up to the assistant's turn, asked as the run asked; without a template its texts in a row."""
    if formatter.chat:
        return formatter.prompt(Example(tuple(messages), origin="the conversation"))
    text = (
        formatter.system_prompt
        + "".join(message["content"] for message in messages)
        + formatter.prompt_suffix
    )
    return formatter.tokenizer.encode(formatter.tokenizer.escape(text))


def answer(subject, model, messages, args, formatter):
    """Stream the assistant's next turn; returns its text, with the tag that the prompt opened."""
    tokenizer = subject.tokenizer
    ids = prompt_ids(formatter, messages)
    opened = (
        formatter.opened(Example(tuple(messages), origin="the conversation"))
        if formatter.chat
        else ""
    )
    limit = min(args.max_tokens, model.config.max_position_embeddings - len(ids))
    if limit < 1:
        raise UserError(
            f"the conversation fills the model's {model.config.max_position_embeddings:,} positions"
        )
    stream = Stream(tokenizer)
    try:
        result = generate(
            model,
            [ids],
            limit,
            subject.stop_ids,
            vocab=subject.vocab,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seeds=[(args.seed << 20) + len(messages)],
            on_token=stream,
        )[0]
    except ValueError as e:
        raise UserError(str(e)) from None
    stream.show(tokenizer.decode(result.tokens, skip_special=True), end="\n")
    if args.logp:
        mean = sum(result.logp) / len(result.logp)
        print(
            f"[{len(result.tokens)} tokens, mean log-prob {mean:.4f}{'' if result.stopped else ', cut off'}]",
            flush=True,
        )
    return opened + stream.text


def main(argv):
    try:
        args = parse(argv)
        subject = find(args.checkpoint)
        given = args.chat_template_kwargs
        text = subject.settings.get("chat_template_kwargs", "") if given is None else given
        template_kwargs = parse_template_kwargs(text, "--chat_template_kwargs")
        if given and subject.tokenizer.chat_template is None:
            raise UserError(
                f"--chat_template_kwargs {given}: {subject.tokenizer.source} has no chat template; leave it out"
            )
        settings = subject.settings
        system = settings.get("system_prompt", "") if args.system is None else args.system
        formatter = Formatter(
            subject.tokenizer,
            settings.get("template", "auto"),
            system,
            settings.get("prompt_suffix", ""),
            template_kwargs,
        )
        model = subject.model()
        messages, prompt = [], "> " if sys.stdin.isatty() else ""
        while True:
            line = input(prompt).strip()
            check_text(line, "that line")
            if line == "/new":
                messages = []
            elif line:
                messages.append({"role": "user", "content": line})
                messages.append(
                    {
                        "role": "assistant",
                        "content": answer(subject, model, messages, args, formatter),
                    }
                )
    except EOFError:
        return 0
    except UserError as e:
        print(f"eval.chat: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
