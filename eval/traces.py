"""Traces: a teacher's answers to the questions of a data set, the right ones kept for SFT.

This is sequence-level distillation (Kim & Rush, arXiv 1606.07947).

    python -m eval.traces runs/my-teacher --data word_problems:200 --n 4 --out traces
    python train.py --mode sft --data traces/traces.jsonl

--out gets `samples.jsonl` (every sample with its grade), `samples.json` (how they were made, with
hashes), `traces.jsonl` (those that are kept, as messages with the gold answer and their source) and
`trained_on.json` and `.bin` (what the teacher was trained on: keep them beside the traces, and a
run on the traces knows it). The same command goes on with what was interrupted.
"""

from errors import RunFailed, UserError, as_command, say  # isort: skip

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

import options
from data.dataset import Dataset
from data.formats import GOLDS, QUESTIONS, RESPONSES, SYSTEM
from data.formatter import OPENED, Formatter
from data.tasks import TASKS, Example, grade, grade_all
from eval.prompts import template_kwargs
from eval.sampling import Request, SamplingOptions, generate_missing
from eval.summary import Row, Rows, Samples
from files import replace_file
from model import lineage
from model.flops import generation_flops
from model.load import Subject, find
from model.transformer import Transformer
from options import REQUIRED, option
from plugins import digests
from run import environment

# Columns that say in a form of their own what a trace's messages and answer say.
REPLACED = frozenset(
    "conversations instruction input output code test test_list entry_point reasoning_solution "
    "groud_truth_solution canonical_solution".split()
).union(QUESTIONS, RESPONSES, GOLDS, SYSTEM)
# What the samples depend on besides teacher, data and template.
IDENTITY = ("temperature", "top_p", "max_tokens", "system", "instruction", "seed", "eval_examples")


@dataclasses.dataclass(frozen=True)
class TraceOptions(SamplingOptions):
    """Every option of the command."""

    sections = {"n": "how traces are sampled", "teacher": "whose traces of what"}
    teacher: str = option(
        REQUIRED, "a folder in Hugging Face form, a run's folder, or a hub id", positional=True
    )
    data: str = option(
        REQUIRED, "as train.py takes it; an endless task needs a number, as in word_problems:1000"
    )
    out: str = option(REQUIRED, "the folder of the traces")
    temperature: float = option(0.7, "0: always the most likely token", minimum=0)
    top_p: float = option(
        1.0, "sample from the most likely tokens with this mass", above=0, maximum=1
    )
    max_tokens: int = option(1024, "new tokens per trace at most", minimum=1)
    keep: Literal["right", "ended", "all"] = option(
        "right", "traces that the grader finds right, all that came to an end, or all"
    )
    system: str = option("", "the system prompt, for the teacher alone")
    instruction: str = option("", "put behind the question, for the teacher alone")
    chat_template_kwargs: str | None = option(
        None,
        "arguments of the chat template, as in enable_thinking=false; "
        "those of the teacher's run unless given",
    )
    eval_examples: int = option(
        0, "validation examples that a run on this file sets apart: none are used", minimum=0
    )


def parse(argv: Sequence[str]) -> TraceOptions:
    """Return the checked options of a command line. Raises UserError."""
    args = options.parse(TraceOptions, argv)
    if args.temperature == 0 and args.n > 1:
        raise UserError(f"--temperature 0 gives the same trace every time; leave out --n {args.n}")
    return args


def examples_of(
    args: TraceOptions, subject: Subject, kwargs: dict
) -> tuple[list[Example], list[list[int]]]:
    """The training examples and their prompts as token ids.

    Args:
        kwargs: Of the chat template.

    Raises:
        UserError: where a trace could not be made or graded, before a weight is read.
    """
    template = subject.settings.get("template", "auto")  # as it was trained
    formatter = Formatter(subject.tokenizer, template, args.system, args.instruction, kwargs)
    room = subject.config.max_position_embeddings
    data = Dataset(
        args.data,
        formatter,
        seed=0,
        max_tokens=room,
        vocab=subject.vocab,
        eval_examples=args.eval_examples,
        max_length_policy="drop",
        completions=False,
    )
    if not len(data):
        raise UserError(
            f"--data {args.data} is endless; write {args.data}:1000 for its first 1,000 problems"
        )
    examples = [data.example(i) for i in range(len(data))]
    for example in examples:
        if args.keep == "right" and not _is_graded(example):
            raise UserError(f"{example.origin}: no answer that a grader knows; use --keep ended")
    prompts = [formatter.prompt(example) for example in examples]
    longest = max(map(len, prompts))
    if longest + args.max_tokens > room:
        raise UserError(
            f"--max_tokens {args.max_tokens:,} and the longest prompt ({longest:,}) exceed "
            f"the model's {room:,} positions"
        )
    return examples, prompts


def _is_graded(example: Example) -> bool:
    return example.answer is not None and example.task in TASKS


def grade_row(example: Example, row: Row) -> Row:
    """A sample's row with its grade."""
    return row | {"right": _is_graded(example) and grade(example, row["text"]).strict}


def collect(
    args: TraceOptions,
    subject: Subject,
    examples: list[Example],
    prompts: list[list[int]],
    rows: Rows,
) -> list[str]:
    """The lines of traces.jsonl. Equal traces of a question are kept once."""
    lines, seen = [], set()
    for (problem, sample), row in rows.items():
        is_wrong = args.keep == "right" and not row["right"]
        is_cut = not row["stopped"]
        if (is_cut and args.keep != "all") or is_wrong or (problem, row["text"]) in seen:
            continue
        seen.add((problem, row["text"]))
        example, text = examples[problem], row["text"]
        # the tag of a reasoning block that the generation prompt opened is part of the answer
        opening = OPENED.search(subject.tokenizer.decode(prompts[problem][-16:]))
        if opening:
            text = opening[0] + text
        answer = {"role": "assistant", "content": text}
        if is_cut:
            answer["truncated"] = True  # no token that ends a turn is put behind it
        trace = {
            "messages": [*context(example), answer],
            "answer": example.answer,
            "task": example.task,
            "source": {
                "teacher": subject.sha256,
                "data": args.data,
                "origin": example.origin,
                "sample": sample,
            },
        }
        line = json.dumps(trace | other_columns(example, trace), ensure_ascii=False)
        lines.append(line + "\n")
    return lines


def context(example: Example) -> list[dict]:
    """The messages before the answer that the teacher was asked for.

    Earlier answers are not the teacher's: `"weight": 0` keeps them out of what is trained on, and
    "shortened" lets the template leave out their reasoning, as it did for the teacher.
    """
    messages = [dict(message) for message in example.messages]
    if messages[-1]["role"] == "assistant":
        messages.pop()
    for message in messages:
        if message["role"] == "assistant":
            message.update(weight=0, shortened=True)
    return messages


def other_columns(example: Example, trace: dict) -> dict:
    """The columns of the row that a trace keeps (tools, say): none that it replaces.

    Raises:
        UserError: for a value that JSON cannot hold.
    """
    columns = {}
    for name, value in example.columns.items():
        if name in REPLACED or name in trace:
            continue
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise UserError(
                f"{example.origin}: column {name!r} holds a {type(value).__name__}, which JSON "
                "cannot; drop it or make it a text"
            ) from None
        columns[name] = value
    return columns


def run(args: TraceOptions) -> None:
    """Generate what is missing, grade it, and write the traces that are kept."""
    subject = find(args.teacher)
    kwargs = template_kwargs(args.chat_template_kwargs, subject.settings)
    examples, prompts = examples_of(args, subject, kwargs)
    identity = {"teacher": subject.sha256, "data": args.data, "questions": len(examples)}
    identity |= {name: getattr(args, name) for name in IDENTITY}
    if kwargs:
        identity["chat_template_kwargs"] = kwargs
    if args.plugin:
        identity["plugin"] = digests()
    request = Request(
        subject=subject,
        samples=Samples(Path(args.out), "samples"),
        name=args.data,
        prompts=prompts,
        max_tokens=args.max_tokens,
        stop=(),
        args=args,
    )
    with request.samples.locked():
        request.samples.begin(identity, {"name": args.teacher, "environment": environment()})
        _make(args, request, examples)


def _make(args: TraceOptions, request: Request, examples: list[Example]) -> None:
    subject, samples, prompts = request.subject, request.samples, request.prompts
    out, problems = samples.folder, range(len(prompts))
    _, seconds = generate_missing(request, problems, subject.model)
    found = samples.read(again=True)
    keys = [(p, s) for p in problems for s in range(args.n)]
    graded = grade_all(grade_row, [(examples[key[0]], found[key]) for key in keys])
    rows = dict(zip(keys, graded, strict=True))
    lengths = [row["tokens"] for row in graded]
    with torch.device("meta"):
        model = Transformer(subject.config)  # its shapes alone: nothing may have been generated
    flops = generation_flops(model, [prompts[p] for p, _ in keys], lengths, subject.vocab)
    samples.finish(rows, 0, seconds, {"tokens": sum(lengths), "flops": flops})
    lines = collect(args, subject, examples, prompts, rows)
    try:
        lineage.of_checkpoint(args.teacher, subject.folder).save_beside(out)
    except OSError as e:
        raise RunFailed(
            f"{out}: what the teacher was trained on could not be written ({e.strerror})"
        ) from None
    replace_file(out / "traces.jsonl", "".join(lines))
    stopped, right = (sum(row[name] for row in graded) for name in ("stopped", "right"))
    say(
        f"{len(examples):,} questions × {args.n}: {stopped:,} of {len(rows):,} came to an end, "
        f"{right:,} are right; {len(lines):,} different ones are kept in {out}/traces.jsonl"
    )


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    return as_command("eval.traces", lambda: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
