"""How far a checkpoint is from another – the one it was trained from, say – on the answers of both that `python -m eval` kept.

    python -m eval.divergence runs/my-run path/to/Qwen2.5-0.5B --evals evals/mine evals/base --out kl.json

Means per token of the measures of validation.py (CHECKPOINT is the model, REFERENCE its teacher; over the ids that both share), on what
CHECKPOINT wrote (`on_own`) and on what REFERENCE wrote. By the chain rule reverse_kl summed over an own answer estimates KL(CHECKPOINT ‖
REFERENCE) of whole answers, and forward_kl summed over REFERENCE's the other KL: …_per_answer. At a temperature or top-p other than 1
that is along the answers as they were sampled. Texts become tokens anew; one that was ended gets its stop token back.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

from data.batch import Document
from data.formatter import Formatter
from data.tasks import Example
from data.tokenizer import shared_vocabulary
from errors import UserError, as_command
from eval.summary import Samples
from files import read_json, replace_file
from model.load import find
from run import handled, interrupt
from validation import compare


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="eval.divergence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = lambda message: (_ for _ in ()).throw(UserError(message))
    parser.add_argument(
        "checkpoint", help="a folder in Hugging Face form, a run's folder, or a hub id"
    )
    parser.add_argument("reference", help="likewise, with the same tokenizer")
    parser.add_argument(
        "--evals",
        nargs=2,
        required=True,
        metavar="FOLDER",
        help="--out of `python -m eval` for either, on the same tasks",
    )
    parser.add_argument("--out", required=True, help="the JSON file to write")
    parser.add_argument(
        "--limit", type=int, default=100, help="the first sample of so many problems of each task"
    )
    return parser.parse_args(argv)


def answers(folder, author, limit):
    """{task: documents} of what `author` answered: prompts made again from what the results state of them."""
    found, tokenizer = {}, author.tokenizer
    for about in sorted(Path(folder).glob("*/*.json")):
        samples, identity = Samples(about.parent, about.stem), read_json(about).get("identity", {})
        if identity.get("checkpoint") != author.sha256:
            continue
        asked, rows, found[about.stem] = identity["prompt"], samples.read(), []
        if not samples.path.exists() or asked["kind"] == "few_shot":
            raise UserError(
                f"{about}: {'few-shot prompts cannot' if samples.path.exists() else 'an unfinished evaluation cannot'} be compared"
            )
        formatter = Formatter(
            tokenizer,
            asked["kind"],
            asked["system"],
            asked["instruction"],
            asked.get("chat_template_kwargs", {}),
        )
        for problem, row in sorted(
            (p, row) for (p, sample), row in rows.items() if sample == 0 and p < limit
        ):
            example = Example(
                ({"role": "user", "content": row["question"]}, {"role": "assistant", "content": ""})
            )
            prompt = [*formatter.prompt(example), *tokenizer.encode(asked["prefill"])]
            if (
                problem == 0
                and hashlib.sha256(str(prompt).encode()).hexdigest() != asked["first_prompt_sha256"]
            ):
                raise UserError(
                    f"{about}: {author.name} now makes another prompt of the first question; was its tokenizer changed?"
                )
            ended = row["stopped"] and (about.stem, asked["kind"]) != (
                "humaneval",
                "plain",
            )  # by other text, which is cut off
            found[about.stem].append(
                Document.of_completion(
                    prompt,
                    [
                        *tokenizer.encode(tokenizer.escape(row["text"])),
                        *identity["stop_ids"][:ended],
                    ],
                )
            )
    if not any(found.values()):
        raise UserError(
            f"--evals {folder}: no answers of {author.name} to the first {limit} problems; `python -m eval` writes them"
        )
    return found


def run(args):
    both = checkpoint, reference = find(args.checkpoint), find(args.reference)
    vocab = min(
        shared_vocabulary(checkpoint.tokenizer, reference.tokenizer),
        checkpoint.vocab,
        reference.vocab,
    )
    own, others = written = [
        answers(folder, author, args.limit) for folder, author in zip(args.evals, both)
    ]
    if own.keys() != others.keys():
        raise UserError(
            f"--evals: answers to {', '.join(own)} and to {', '.join(others)}; evaluate both on the same tasks"
        )
    batches = {
        name: [d for task in found.values() for d in task]
        for name, found in zip(("on_own", "on_reference"), written)
    }
    if max(int(d.tokens.max()) for batch in batches.values() for d in batch) >= vocab:
        raise UserError(
            f"{checkpoint.name} and {reference.name} share the first {vocab:,} ids only, and an answer holds another"
        )
    try:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {args.out}: {e.strerror}") from None
    model, teacher, measured = checkpoint.model(), reference.model(), {}
    for name, batch in batches.items():
        sums = compare(model, teacher, batch, vocab, micro_batch_tokens=8192)
        sums |= {
            f"{kl}_per_answer": (sums[kl][0], len(batch))
            for kl in ("forward_kl", "reverse_kl")
            if kl in sums
        }
        measured[name] = {measure: total / count for measure, (total, count) in sums.items()}
    replace_file(Path(args.out), json.dumps(measured, indent=1) + "\n")
    print(f"{'':24}{'on own':>14}{'on reference':>14}")
    for measure in dict.fromkeys(m for means in measured.values() for m in means):
        print(
            f"{measure:24}"
            + "".join(
                f"{means[measure]:14.5f}" if measure in means else f"{'-':>14}"
                for means in measured.values()
            )
        )


def main(argv):
    with handled(interrupt):
        return as_command("eval.divergence", lambda: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
