"""How far a checkpoint is from another, say the one it was trained from, on answers of both.

    python -m eval.divergence runs/my-run path/to/Qwen2.5-0.5B --evals evals/mine evals/base --out
    kl.json

The answers are those that `python -m eval` wrote. The results are means per token of the measures
of validation.py (CHECKPOINT is the model, REFERENCE its teacher; over the ids that both share), on
what CHECKPOINT generated (`on_own`) and on what REFERENCE generated (`on_reference`). By the chain
rule, reverse_kl summed over an answer of its own estimates KL(CHECKPOINT ‖ REFERENCE) of complete
answers, and forward_kl summed over one of REFERENCE the other KL: these are the measures
..._per_answer. At a temperature or top-p other than 1 that is along the answers as they were
sampled. Texts are tokenized anew; one that ended gets its stop token back.
"""

from errors import UserError, as_command, say  # isort: skip

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import options
from data.batch import Document
from data.formatter import Formatter
from data.tasks import Example
from data.tokenizer import shared_vocabulary
from digests import sha256
from eval.summary import Samples, read_about
from files import check_folder, made, replace_file
from model.load import Subject, find
from options import REQUIRED, option
from validation import compare


@dataclasses.dataclass(frozen=True)
class DivergenceOptions:
    """Every option of the command."""

    checkpoint: str = option(
        REQUIRED, "a folder in Hugging Face form, a run's folder, or a hub id", positional=True
    )
    reference: str = option(REQUIRED, "likewise, with the same tokenizer", positional=True)
    evals: tuple[str, str] = option(
        REQUIRED, "--out of `python -m eval` for either, on the same tasks"
    )
    out: str = option(REQUIRED, "the JSON file to write")
    limit: int = option(100, "the first sample of so many problems of each task", minimum=1)


def answers(folder: str, author: Subject, limit: int) -> dict[str, list[Document]]:
    """{task: documents} of what `author` answered in an evaluation.

    The prompts are made again from what the results say about them.

    Raises:
        UserError: there are no answers of `author`, or prompts cannot be made again.
    """
    found = {}
    for results in sorted(Path(folder).glob("*/*.json")):
        identity = read_about(results)["identity"]
        if identity.get("checkpoint") == author.sha256:
            found[results.stem] = _task_answers(results, identity, author, limit)
    if not any(found.values()):
        raise UserError(
            f"--evals {folder}: no answers of {author.name} to the first {limit} problems; "
            "`python -m eval` writes them"
        )
    return found


def _task_answers(results: Path, identity: dict, author: Subject, limit: int) -> list[Document]:
    samples, prompt = Samples(results.parent, results.stem), identity["prompt"]
    rows = samples.read()
    if not samples.path.exists():
        raise UserError(f"{results}: an unfinished evaluation cannot be compared")
    if prompt["kind"] == "few_shot":
        raise UserError(f"{results}: few-shot prompts cannot be compared")
    tokenizer = author.tokenizer
    template_kwargs = prompt.get("chat_template_kwargs", {})
    formatter = Formatter(
        tokenizer, prompt["kind"], prompt["system"], prompt["instruction"], template_kwargs
    )
    # other stops of this task are text, which is cut off
    has_stop_token = (results.stem, prompt["kind"]) != ("humaneval", "plain")
    documents = []
    for problem, sample in sorted(rows):
        if sample or problem >= limit:
            continue
        row = rows[problem, sample]
        question = {"role": "user", "content": row["question"]}
        example = Example((question, {"role": "assistant", "content": ""}))
        ids = formatter.prompt(example)
        ids += tokenizer.encode(prompt["prefill"], before=ids)
        if problem == 0 and sha256(str(ids)) != prompt["first_prompt_sha256"]:
            raise UserError(
                f"{results}: {author.name} now makes another prompt of the first question; "
                "was its tokenizer changed?"
            )
        completion = tokenizer.encode(tokenizer.escape(row["text"]), before=ids)
        if row["stopped"] and has_stop_token:
            completion += identity["stop_ids"][:1]
        documents.append(Document.of_completion(ids, completion))
    return documents


def run(args: DivergenceOptions) -> None:
    """Measure both directions, write --out and print a table."""
    checkpoint, reference = find(args.checkpoint), find(args.reference)
    vocab = shared_vocabulary(checkpoint.tokenizer, reference.tokenizer)
    vocab = min(vocab, checkpoint.vocab, reference.vocab)
    own = answers(args.evals[0], checkpoint, args.limit)
    others = answers(args.evals[1], reference, args.limit)
    if own.keys() != others.keys():
        raise UserError(
            f"--evals: answers to {', '.join(own)} and to {', '.join(others)}; "
            "evaluate both on the same tasks"
        )
    batches = {}
    for name, tasks in (("on_own", own), ("on_reference", others)):
        batches[name] = [document for task in tasks.values() for document in task]
        if max(int(document.tokens.max()) for document in batches[name]) >= vocab:
            raise UserError(
                f"{checkpoint.name} and {reference.name} share the first {vocab:,} ids only, "
                "and an answer holds another"
            )
    out = Path(args.out)
    check_folder("--out", out.parent)  # before the work
    model, teacher, means = checkpoint.model(), reference.model(), {}
    for name, batch in batches.items():
        sums = compare(model, teacher, batch, vocab, micro_batch_tokens=8192)
        for kl in ("forward_kl", "reverse_kl"):
            if kl in sums:
                sums[f"{kl}_per_answer"] = sums[kl][0], len(batch)
        means[name] = {measure: total / count for measure, (total, count) in sums.items()}
    with made(out.parent):
        replace_file(out, json.dumps(means, indent=1) + "\n")
    say(f"{'':24}{'on own':>14}{'on reference':>14}")
    for measure in means["on_own"] | means["on_reference"]:
        line = f"{measure:24}"
        for values in means.values():
            line += f"{values[measure]:14.5f}" if measure in values else f"{'-':>14}"
        say(line)


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    return as_command("eval.divergence", lambda: run(options.parse(DivergenceOptions, argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
