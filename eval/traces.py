"""What a teacher writes on the questions of a data set, the right ones kept for SFT: sequence-level distillation (Kim & Rush, arXiv 1606.07947).

    python -m eval.traces runs/my-teacher --data word_problems:200 --n 4 --out traces
    python train.py --mode sft --data traces/traces.jsonl

--out gets `samples.jsonl` (every sample with its verdict), `samples.json` (what it was asked under, with hashes), `traces.jsonl` (the kept
ones, as messages with the gold answer and where they are from) and `trained_on.json` and `.bin` (what the teacher was trained on: keep them
beside the traces, and a run on the traces knows it). The same command goes on with what was interrupted.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from data.dataset import Dataset
from data.formats import GOLDS, QUESTIONS, RESPONSES, SYSTEM
from data.formatter import OPENED, Formatter
from data.tasks import TASKS, grade, grade_all
from data.tokenizer import parse_template_kwargs
from errors import RunFailed, UserError, as_command
from eval.__main__ import seed_of
from eval.summary import Samples, line
from files import replace_file
from model import lineage
from model.flops import generation_flops
from model.generate import generate
from model.load import find
from model.transformer import Transformer
from run import environment, handled, interrupt

# Columns that say what a trace's messages and answer say already, in forms of their own.
REPLACED = {
    *QUESTIONS,
    *RESPONSES,
    *GOLDS,
    *SYSTEM,
    "conversations",
    "instruction",
    "input",
    "output",
    "reasoning_solution",
    "groud_truth_solution",
    "canonical_solution",
    "test",
    "entry_point",
    "code",
    "test_list",
}


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="eval.traces",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = lambda message: (_ for _ in ()).throw(UserError(message))
    parser.add_argument(
        "teacher", help="a folder in Hugging Face form, a run's folder, or a hub id"
    )
    parser.add_argument(
        "--data",
        required=True,
        help="as train.py takes it; an endless task needs a number, as in word_problems:1000",
    )
    parser.add_argument("--out", required=True, help="the folder of the traces")
    parser.add_argument("--n", type=int, default=1, help="samples per question")
    parser.add_argument(
        "--temperature", type=float, default=0.7, help="0: always the likeliest token"
    )
    parser.add_argument(
        "--top_p",
        "--top-p",
        type=float,
        default=1.0,
        help="sample from the likeliest ids with this mass",
    )
    parser.add_argument(
        "--max_tokens", "--max-tokens", type=int, default=1024, help="new tokens per trace at most"
    )
    parser.add_argument(
        "--keep",
        choices=("right", "ended"),
        default="right",
        help="traces that the grader finds right, or all that came to an end",
    )
    parser.add_argument("--system", default="", help="the system prompt, for the teacher alone")
    parser.add_argument(
        "--instruction", default="", help="put behind the question, for the teacher alone"
    )
    parser.add_argument(
        "--chat_template_kwargs",
        "--chat-template-kwargs",
        help="arguments of the chat template, as in enable_thinking=false; the teacher's own run's unless given",
    )
    parser.add_argument(
        "--eval_examples",
        "--eval-examples",
        type=int,
        default=0,
        help="held-out examples that a run on this file sets apart: none are used",
    )
    parser.add_argument(
        "--batch_size", "--batch-size", type=int, default=64, help="samples written at once"
    )
    parser.add_argument(
        "--group",
        type=int,
        default=0,
        help="keep so many questions at a time: a killed command then goes on bit for bit; 0: each trace, faster",
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if (
        args.n < 1
        or args.max_tokens < 1
        or args.batch_size < 1
        or min(args.temperature, args.group) < 0
        or not 0 < args.top_p <= 1
    ):
        raise UserError(
            "--n, --max_tokens and --batch_size must be at least 1, --temperature and --group not negative, --top_p above 0 and at most 1"
        )
    if args.temperature == 0 and args.n > 1:
        raise UserError(f"--temperature 0 writes the same trace every time; leave out --n {args.n}")
    return args


def examples_of(args, subject):
    """[(example, prompt ids)] of the training examples. Raises UserError, before a weight is read."""
    template = subject.settings.get("template", "auto")  # as it was trained
    formatter = Formatter(
        subject.tokenizer, template, args.system, args.instruction, template_kwargs(args, subject)
    )
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
    found = [(e, formatter.prompt(e)) for e in map(data.example, range(len(data)))]
    ungraded = next((e for e, _ in found if e.answer is None or e.task not in TASKS), None)
    if ungraded and args.keep == "right":
        raise UserError(f"{ungraded.origin}: no answer that a grader knows; use --keep ended")
    if (longest := max(len(ids) for _, ids in found)) + args.max_tokens > room:
        raise UserError(
            f"--max_tokens {args.max_tokens:,} and the longest prompt ({longest:,}) exceed the model's {room:,} positions"
        )
    return found


def template_kwargs(args, subject):
    """The arguments of the chat template: those given, else those that the teacher was trained with."""
    given = args.chat_template_kwargs
    text = subject.settings.get("chat_template_kwargs", "") if given is None else given
    return parse_template_kwargs(text, "--chat_template_kwargs")


def write(args, subject, found, samples):
    """Generate what is missing; a line for every finished sample, or with --group a whole group's, so that what is batched together stays so.
    Returns the seconds."""
    kept, size = samples.read(), args.group or len(found)
    groups = [
        [
            (p, s)
            for p in range(lo, min(lo + size, len(found)))
            for s in range(args.n)
            if (p, s) not in kept
        ]
        for lo in range(0, len(found), size)
    ]
    if not any(groups):
        return 0.0
    model, tokens, began, shown = subject.model(), 0, time.perf_counter(), time.monotonic()
    with open(samples.folder / f"{samples.task}.part-0.jsonl", "a", encoding="utf-8") as file:
        file.write("\n" if file.tell() else "")  # a line that a kill cut off stays apart
        for keys in groups:
            finished = []

            def keep(i, completion):
                nonlocal tokens, shown
                tokens += len(completion.tokens)
                text = subject.tokenizer.decode(completion.tokens, skip_special=True)
                finished.append(
                    line(
                        dict(
                            problem=keys[i][0],
                            sample=keys[i][1],
                            text=text,
                            tokens=len(completion.tokens),
                            stopped=completion.stopped,
                        )
                    )
                )
                if not args.group or len(finished) == len(keys):
                    file.write("".join(finished))
                    file.flush()
                    finished.clear()
                if time.monotonic() - shown > 10:
                    shown = time.monotonic()
                    print(
                        f"{tokens:,} tokens, {tokens / (time.perf_counter() - began):,.0f} a second",
                        flush=True,
                    )

            generate(
                model,
                [found[p][1] for p, _ in keys],
                args.max_tokens,
                subject.stop_ids,
                vocab=subject.vocab,
                temperature=args.temperature,
                top_p=args.top_p,
                seeds=[seed_of(args.seed, args.data, *key) for key in keys],
                batch_size=args.batch_size,
                on_done=keep,
            )
    return time.perf_counter() - began


def judge(found, rows):
    """Every sample's row with its verdict, in order."""
    ask = lambda example, row: (
        row
        | {
            "right": example.answer is not None
            and example.task in TASKS
            and grade(example, row["text"]).strict
        }
    )
    keys = sorted(rows)
    return dict(
        zip(keys, grade_all(ask, [(found[p][0], rows[p, s]) for p, s in keys]), strict=True)
    )


def collect(args, subject, found, rows):
    """The text of traces.jsonl, and how many of it there are. Equal traces of a question are kept once."""
    lines, seen = [], set()
    for (problem, sample), row in rows.items():
        example, prompt = found[problem]
        if (
            not row["stopped"]
            or args.keep == "right"
            and not row["right"]
            or (problem, row["text"]) in seen
        ):
            continue
        seen.add((problem, row["text"]))
        opening = OPENED.search(subject.tokenizer.decode(prompt[-16:]))
        text = opening[0] + row["text"] if opening else row["text"]
        source = dict(teacher=subject.sha256, data=args.data, origin=example.origin, sample=sample)
        trace = dict(
            messages=[*context(example), {"role": "assistant", "content": text}],
            answer=example.answer,
            task=example.task,
            source=source,
        )
        lines.append(line(trace | other_columns(example, trace)))
    return "".join(lines), len(lines)


def context(example):
    """The messages before the answer that the teacher was asked for, as they were. Earlier answers are not the teacher's: `"weight": 0` keeps
    them out of what is trained on, "shortened" lets the template leave out their reasoning, as it did for the teacher."""
    messages = list(example.messages)
    if messages[-1]["role"] == "assistant":
        messages.pop()
    answered = {"weight": 0, "shortened": True}
    return [
        message | answered if message["role"] == "assistant" else message for message in messages
    ]


def other_columns(example, trace):
    """The row's columns that a trace keeps (tools, say): neither its question and answer, nor what the trace says itself. Raises UserError."""
    columns = {
        name: value
        for name, value in example.columns.items()
        if name not in REPLACED and name not in trace
    }
    for name, value in columns.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise UserError(
                f"{example.origin}: column {name!r} holds a {type(value).__name__}, which JSON cannot; drop it or make it a text"
            ) from None
    return columns


def run(args):
    subject = find(args.teacher)
    found = examples_of(args, subject)
    kwargs = template_kwargs(args, subject)
    identity = dict(
        teacher=subject.sha256,
        data=args.data,
        questions=len(found),
        temperature=args.temperature,
        top_p=args.top_p,
        max_tokens=args.max_tokens,
        system=args.system,
        instruction=args.instruction,
        seed=args.seed,
        eval_examples=args.eval_examples,
    )
    identity |= {"chat_template_kwargs": kwargs} if kwargs else {}
    samples = Samples(Path(args.out), "samples")
    samples.agree(identity)
    samples.begin(identity, {"name": args.teacher, "environment": environment()})
    seconds = write(args, subject, found, samples)
    rows = judge(
        found,
        {
            key: row
            for key, row in samples.read().items()
            if key[0] < len(found) and key[1] < args.n
        },
    )
    with torch.device("meta"):
        shape = Transformer(
            subject.config
        )  # without weights: where nothing was missing none were read
    written = [found[p][1] for p, _ in rows], [row["tokens"] for row in rows.values()]
    samples.finish(
        rows,
        0,
        seconds,
        dict(tokens=sum(written[1]), flops=generation_flops(shape, *written, subject.vocab)),
    )
    text, count = collect(args, subject, found, rows)
    try:
        lineage.of_checkpoint(args.teacher, subject.folder).save_beside(Path(args.out))
    except OSError as e:
        raise RunFailed(
            f"{args.out}: what the teacher was trained on could not be written ({e.strerror})"
        ) from None
    replace_file(Path(args.out) / "traces.jsonl", text)
    right, ended = (sum(r[name] for r in rows.values()) for name in ("right", "stopped"))
    print(
        f"{len(found):,} questions × {args.n}: {ended:,} of {len(rows):,} came to an end, {right:,} are right; {count:,} different ones are kept in {args.out}/traces.jsonl"
    )


def main(argv):
    with handled(interrupt):
        return as_command("eval.traces", lambda: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
