"""Evaluate checkpoints: python -m eval runs/my-run Qwen/Qwen2.5-0.5B-Instruct --tasks gsm8k,math500 --n 8 --k 1,8

A checkpoint is a folder in Hugging Face form (Qwen2.5, Qwen3), a hub id, or a run's folder (its newest checkpoint). The defaults
are the protocol of arXiv 2506.13404: temperature 0.6, top-p 0.95, up to 32,768 new tokens. Samples, tables and a picture go to
--out; the same command goes on with what was interrupted. More GPUs: torchrun --standalone --nproc_per_node=8 -m eval … (--samples for --n).
"""

import argparse
import contextlib
import dataclasses
import difflib
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import torch

from data.grade import grade_by_math_verify, vote
from data.tasks import grade, grade_all
from errors import RunFailed, UserError
from eval import benchmarks, contamination, prompts, summary
from files import replace_file
from model import parallel
from model.generate import generate
from model.load import Subject, find
from run import environment, handled, interrupt

PROGRESS = 10.0  # seconds between progress lines
PATIENCE = 7 * 24 * 3600.0  # seconds for which a rank may wait for one whose answers are longer


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: (_ for _ in ()).throw(UserError(message))
    add = lambda name, default, help, kind=str, **more: parser.add_argument(
        *dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")),
        default=default,
        type=kind,
        help=help,
        **more,
    )
    parser.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CHECKPOINT",
        help="a folder in Hugging Face form, a run's folder, or a hub id",
    )
    add(
        "tasks",
        None,
        f"of {', '.join(benchmarks.names())}; with commas between them",
        required=True,
    )
    parser.add_argument(
        "--n",
        "--samples",
        default=1,
        type=int,
        help="samples per problem; torchrun takes --n for its own: write --samples there",
    )
    add("k", "", "pass@k and majority@k for these k, with commas between them; empty: n")
    add("temperature", 0.6, "of sampling", float)
    add("top_p", 0.95, "sample from the likeliest ids with this mass", float)
    add(
        "max_tokens",
        32768,
        "new tokens per answer at most; fewer where the model has no positions for them",
        int,
    )
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token")
    add(
        "prompt",
        "auto",
        "auto: as the run was trained, else chat if the tokenizer has a template",
        choices=prompts.KINDS,
    )
    add("system", None, "the system prompt; a run's own unless given")
    add("instruction", None, "put behind every question; a run's own unless given, else the task's")
    add("prefill", "", "text that begins every answer")
    add(
        "chat_template_kwargs",
        None,
        "arguments of the chat template, as in enable_thinking=false,x=3 or JSON; a run's own unless given",
    )
    add("limit", 0, "the first so many problems only; 0: all", int)
    add("seed", 0, "the same seed gives every sample the same random numbers", int)
    add(
        "batch_size",
        64,
        "samples written at once, per rank; the cache holds this many rows as long as the longest",
        int,
    )
    add(
        "group",
        0,
        "finish and keep so many problems at a time: a killed run then goes on bit for bit; 0: each sample by itself, faster",
        int,
    )
    add(
        "data",
        os.environ.get("SRLM_DATA") or "test_sets",
        "the folder with test sets, NAME/test.jsonl",
    )
    add("out", "evals", "where samples and tables are kept")
    add(
        "compare",
        "",
        "another checkpoint, evaluated as well: the others are compared with it, problem by problem",
    )
    add("tokenizer", "", "folder with tokenizer.json, for checkpoints that have none")
    parser.add_argument(
        "--allow_trained",
        "--allow-trained",
        action="store_true",
        help="evaluate on questions that a run trained on",
    )
    return check(parser.parse_args(argv))


def check(args):
    """Refuse what cannot work before anything is read; makes lists of --tasks and --k."""

    def need(ok, message):
        if not ok:
            raise UserError(message)

    args.tasks = list(dict.fromkeys(t.strip() for t in args.tasks.split(",") if t.strip()))
    for task in args.tasks:
        near = difflib.get_close_matches(task, benchmarks.names(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(benchmarks.names())}"
        need(task in benchmarks.names(), f"--tasks: no {task!r}; {hint}")
    need(args.tasks, f"--tasks names none; there are {', '.join(benchmarks.names())}")
    need(args.n >= 1, "--n must be at least 1")
    try:
        args.k = sorted({int(k) for k in (args.k or str(args.n)).split(",")})
    except ValueError:
        raise UserError(
            f"--k {args.k}: write whole numbers with commas between them, as in 1,8"
        ) from None
    need(args.k[0] >= 1, "--k must be at least 1")
    need(
        args.k[-1] <= args.n, f"--k {args.k[-1]} needs as many samples per problem; --n is {args.n}"
    )
    need(
        not args.greedy or args.n == 1,
        f"--greedy writes the same answer every time; leave out --n {args.n}",
    )
    args.temperature = 0.0 if args.greedy else args.temperature
    need(
        args.greedy or 0 < args.temperature < float("inf"),
        "--temperature must be positive; --greedy takes the likeliest token",
    )
    need(0 < args.top_p <= 1, "--top_p must be above 0 and at most 1")
    for name in ("max_tokens", "batch_size"):
        need(getattr(args, name) >= 1, f"--{name} must be at least 1")
    need(
        min(args.limit, args.seed, args.group) >= 0,
        "--limit, --seed and --group must not be negative",
    )
    return args


# --- what is to be done --------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Job:
    """One checkpoint on one task."""

    subject: Subject
    benchmark: benchmarks.Benchmark
    prompts: prompts.Prompts
    samples: summary.Samples
    identity: dict  # what the samples depend on: they are kept together only if it agrees
    new_tokens: int
    trained: (
        contamination.Trained
    )  # how many questions of the test set the checkpoint was trained on, as far as that is known


def plan(args):
    """Every Job, all that can be wrong found before a weight is read."""
    names = [*args.checkpoints, *filter(None, [args.compare])]
    subjects = [find(name, args.tokenizer) for name in dict.fromkeys(names)]
    sets = [benchmarks.load(task, args.data, args.limit) for task in args.tasks]
    jobs = []
    for subject in subjects:
        seen = contamination.seen(subject, sets, args.allow_trained)
        for benchmark in sets:
            words = args.prompt, args.system, args.instruction, args.prefill
            asked = prompts.build(
                benchmark,
                subject.tokenizer,
                subject.settings,
                *words,
                args.limit,
                args.chat_template_kwargs,
            )
            longest, positions = max(map(len, asked.ids)), subject.config.max_position_embeddings
            if longest >= positions:
                raise UserError(
                    f"{subject.name}: {benchmark.name} has a prompt of {longest:,} tokens, the model {positions:,} positions"
                )
            identity = {
                "checkpoint": subject.sha256,
                "test set": benchmark.sha256,
                "prompt": asked.stated,
                "temperature": args.temperature,
                "top_p": args.top_p if args.temperature else None,
                "max_tokens": args.max_tokens,
                "seed": args.seed if args.temperature else None,
                "stop_ids": subject.stop_ids,
                "vocabulary": subject.vocab,
                "device": "cuda" if torch.cuda.is_available() else "cpu",
            }
            samples = summary.Samples(Path(args.out) / subject.label, benchmark.name)
            samples.agree(identity)
            jobs.append(
                Job(
                    subject,
                    benchmark,
                    asked,
                    samples,
                    identity,
                    min(args.max_tokens, positions - longest),
                    seen[benchmark.name],
                )
            )
    return jobs


# --- samples -------------------------------------------------------------------------------------------------------


def seed_of(seed, task, problem, sample):
    """64 bits for (problem, sample): the same in every batch, order and number of ranks, and after a resumption."""
    return int.from_bytes(
        hashlib.blake2b(f"{seed}/{task}/{problem}/{sample}".encode(), digest_size=8).digest(), "big"
    )


def fill(job, args, model, rank, world):
    """Generate what is missing of a job and grade it; returns the figures' rows {(problem, sample): row}, the same on all ranks."""
    examples = job.benchmark.examples[: args.limit or None]
    kept = job.samples.read()
    wanted = [(p, s) for p in range(len(examples)) for s in range(args.n)]
    mine, size = range(rank, len(examples), world), args.group or len(examples)
    groups = [
        [(p, s) for p in mine[lo : lo + size] for s in range(args.n) if (p, s) not in kept]
        for lo in range(0, len(mine), size)
    ]
    groups = [keys for keys in groups if keys]
    parallel.barrier()  # everyone has read what was kept
    about = {
        "name": job.subject.name,
        "file": job.benchmark.file,
        "problems": len(job.benchmark.examples),
        "new_tokens": job.new_tokens,
        "trained_on": job.trained.count,
        "unknown_training": job.trained.unknown,
    }
    parallel.on_rank_0(
        rank, lambda: job.samples.begin(job.identity, about | {"environment": environment()})
    )
    ready = model() if groups else None
    clock, written, error = time.perf_counter(), 0, None
    try:
        written = write(job, args, ready, groups, rank) if groups else 0
    except (OSError, UserError, RunFailed) as e:
        error = e
    parallel.raise_on_all(error)
    tokens, seconds = zip(*parallel.gather((written, time.perf_counter() - clock)))
    rows = job.samples.read()
    ungraded = [key for key in wanted[rank::world] if "strict" not in rows[key]]
    graded = grade_all(
        judge, [(examples[problem], rows[problem, sample]) for problem, sample in ungraded]
    )
    for part in parallel.gather(dict(zip(ungraded, graded))):
        rows |= part
    parallel.on_rank_0(
        rank, lambda: job.samples.finish(rows, sum(tokens), max(seconds) if sum(tokens) else 0.0)
    )
    return {key: rows[key] for key in wanted}


def write(job, args, model, groups, rank):
    """Generate these groups of (problem, sample). Without --group a sample is kept as soon as it is finished; with it a group is, whole,
    so that what is generated later is batched as it would have been, and rounded alike. Returns the number of new tokens."""
    tokenizer, examples, name = job.subject.tokenizer, job.benchmark.examples, job.benchmark.name
    counts, shown, total = {"samples": 0, "tokens": 0}, time.monotonic(), sum(map(len, groups))

    def row_of(key, completion):
        nonlocal shown
        counts["samples"], counts["tokens"] = (
            counts["samples"] + 1,
            counts["tokens"] + len(completion.tokens),
        )
        if rank == 0 and time.monotonic() - shown > PROGRESS:
            shown = time.monotonic()
            print(f"{name}: {counts['samples']:,} of this rank's {total:,} samples", flush=True)
        text, example = tokenizer.decode(completion.tokens, skip_special=True), examples[key[0]]
        for stop in job.prompts.stop:
            text = text.partition(stop)[0]
        return summary.line(
            dict(
                problem=key[0],
                sample=key[1],
                question=example.question,
                gold=example.answer,
                text=text,
                tokens=len(completion.tokens),
                stopped=completion.stopped,
                logp=round(sum(completion.logp), 3),
            )
        )

    with open(job.samples.folder / f"{name}.part-{rank}.jsonl", "a", encoding="utf-8") as file:
        file.write(
            "\n" if file.tell() else ""
        )  # the line that a kill cut off, if it did, stays apart from what follows
        for keys in groups:
            finished = []

            def keep(i, completion):
                finished.append(row_of(keys[i], completion))
                if not args.group:
                    flush()

            def flush():
                file.write("".join(finished))
                file.flush()
                finished.clear()

            generate(
                model,
                [job.prompts.ids[problem] for problem, _ in keys],
                job.new_tokens,
                job.subject.stop_ids,
                vocab=job.subject.vocab,
                temperature=args.temperature,
                top_p=args.top_p,
                seeds=[seed_of(args.seed, name, *key) for key in keys],
                stop_strings=job.prompts.stop,
                decode=tokenizer.decode,
                batch_size=args.batch_size,
                on_done=keep,
            )
            flush()
    return counts["tokens"]


def judge(example, row):
    """A sample's row with its verdicts: the task's own, strict and lenient; math-verify's, left to itself; what is put to the vote."""
    verdict, text = grade(example, row["text"]), row["text"]
    verdicts = {"strict": verdict.strict, "lenient": verdict.lenient, "parsed": verdict.parsed}
    if example.task in benchmarks.CODE:
        return row | verdicts | {"math_verify": None, "vote": False}
    return (
        row
        | verdicts
        | {
            "math_verify": grade_by_math_verify(text, example.answer),
            "vote": vote(text, words=example.task not in ("math", "answer")),
        }
    )


# --- the report ----------------------------------------------------------------------------------------------------


def report(args, jobs, rows):
    """summary.md, summary.json and summary.png; returns the text for the terminal. rows: those of each job."""
    summaries = [
        (
            j.subject.label,
            j.benchmark.name,
            summary.summarise(r, args.k, j.samples.stated["generated"]),
        )
        for j, r in zip(jobs, rows)
    ]
    comparisons = compare(args, jobs, rows) if args.compare else []
    sampling = (
        "greedy"
        if args.greedy
        else f"temperature {args.temperature}, top-p {args.top_p}, seed {args.seed}"
    )
    conditions = [
        f"{sampling}, up to {args.max_tokens:,} new tokens. Rates in %; accuracy: the marked answer alone (strict), mean over all samples; "
        "intervals: 95 %, problems resampled",
        *map(_stated, jobs),
    ]
    conditions = list(
        dict.fromkeys(conditions)
    )  # checkpoints that were asked the same share a line
    training = contamination.notes([(j.subject.label, j.benchmark.name, j.trained) for j in jobs])
    listed = {f"{j.subject.label} on {j.benchmark.name}" for j in jobs}
    if others := [name for name in jobs[0].samples.others() if name not in listed]:
        conditions.append(f"not in this summary, though beside it: {', '.join(others)}")
    tables = [
        summary.table(summaries),
        *([summary.comparison_table(comparisons)] if comparisons else []),
    ]
    out = Path(args.out)
    page = [*map(summary.markdown, tables), "\n".join(f"- {c}" for c in [*conditions, *training])]
    kept = {
        "conditions": [*conditions, *training],
        "training": training,
        "summaries": summaries,
        "comparisons": comparisons,
    }
    kept["trained_on"] = [[j.subject.label, j.benchmark.name, *j.trained] for j in jobs]
    replace_file(out / "summary.md", "\n\n".join(page) + "\n")
    replace_file(out / "summary.json", json.dumps(kept, indent=1) + "\n")
    summary.draw(summaries, out / "summary.png")
    said = [*map(summary.aligned, tables), *conditions, *training]
    return "\n\n".join([*said, f"samples, summary.md, summary.json and summary.png are in {out}"])


def _stated(job):
    p, brief = job.identity["prompt"], lambda digest: (digest or "none")[:12]
    words = "".join(
        f", {name} {p[name]!r}"
        for name in ("system", "instruction", "prefill", "chat_template_kwargs")
        if p.get(name)
    )
    cut = (
        f"; up to {job.new_tokens:,} new tokens, for which the model has positions"
        if job.new_tokens < job.identity["max_tokens"]
        else ""
    )
    return (
        f"{job.benchmark.name}: {p['kind']} prompt{words}; sha256 of the first prompt {brief(p['first_prompt_sha256'])}, "
        f"of the template {brief(p['template_sha256'])}, of the test set {brief(job.benchmark.sha256)}{cut}"
    )


def compare(args, jobs, rows):
    """[(checkpoint, other, task, paired figures)] of all checkpoints against --compare, on the problems that both have."""
    label = next(j.subject.label for j in jobs if j.subject.name == args.compare)
    others = {j.benchmark.name: (j, r) for j, r in zip(jobs, rows) if j.subject.label == label}
    found = []
    for job, ours in zip(jobs, rows):
        if job.subject.label == label:
            continue
        other, theirs = others[job.benchmark.name]
        differing = summary.asked_differently(job.samples.stated, other.samples.stated)
        found.append(
            (
                job.subject.label,
                label,
                job.benchmark.name,
                summary.compare(ours, theirs) | {"asked_differently": differing},
            )
        )
    return found


def evaluate(args):
    rank, world, local = parallel.init(
        "cpu", patience=PATIENCE
    )  # only Python objects go from rank to rank
    if torch.cuda.is_available():
        torch.cuda.set_device(local)
    jobs, rows, loaded = plan(args), [], (None, None)

    for job in jobs:

        def model(subject=job.subject):
            nonlocal loaded
            if loaded[0] is not subject:
                loaded = (None, None)  # the one before makes room first
                loaded = (subject, subject.model())
            return loaded[1]

        rows.append(fill(job, args, model, rank, world))
    parallel.on_rank_0(rank, lambda: print(report(args, jobs, rows), flush=True))


def main(argv):
    try:
        args = parse(argv)
        # a rank that waits for another runs no handler of Python's: there the signal itself has to end it
        with contextlib.nullcontext() if parallel.place().world > 1 else handled(interrupt):
            evaluate(args)
        return 0
    except UserError as e:
        code, text = 2, e
    except RunFailed as e:
        code, text = 1, e
    except OSError as e:  # a full disk
        code, text = 1, f"{e.filename or 'a file'}: {e.strerror or e}; the same command goes on"
    except KeyboardInterrupt:
        code, text = 130, "interrupted; the same command goes on"
    if parallel.speaks() or code == 1:
        print(f"eval: {text}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    code = main(sys.argv[1:])
    parallel.close()
    sys.exit(code)
