"""What `--show_batch` prints: documents as text, with what is trained on marked."""

import sys

from data.batch import GlobalBatch
from data.tokenizer import Tokenizer
from errors import say


def show_batch(batch: GlobalBatch, tokenizer: Tokenizer, count: int) -> None:
    """Print the first documents with what is trained on in ⟦brackets⟧ (green on a terminal)."""
    begin, end = "⟦", "⟧"
    if sys.stdout.isatty():
        begin, end = "\033[32m⟦", "⟧\033[0m"
    for n, d in enumerate(batch.documents[:count], 1):
        tokens, trained = d.tokens.tolist(), d.weights != 0
        say(f"--- example {n}: {len(d)} tokens, {trained.sum()} trained on")
        start, parts = 0, []
        for stop in range(1, len(d) + 1):
            if stop == len(d) or trained[stop] != trained[start]:
                text = tokenizer.decode(tokens[start:stop], before=tokens[:start])
                parts.append(begin + text + end if trained[start] else text)
                start = stop
        say("".join(parts))
