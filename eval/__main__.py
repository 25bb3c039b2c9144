"""Evaluate checkpoints on test sets.

    python -m eval runs/my-run Qwen/Qwen2.5-0.5B-Instruct --tasks gsm8k,math500 --n 8 --k 1,8

A checkpoint is a folder in Hugging Face form, a hub id, or a run's folder (its newest checkpoint).
The defaults are the protocol of arXiv 2506.13404: temperature 0.6, top-p 0.95, up to 32,768 new
tokens. Samples, tables and a picture go to --out; the same command goes on with what was
interrupted. More GPUs: torchrun --standalone --nproc_per_node=8 -m eval … (--samples for --n).
"""

from errors import UserError, as_command, say, system_error  # isort: skip

import dataclasses
import functools
import itertools
import json
import operator
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import options
from curves import aligned
from data.formats import SUFFIXES
from data.tasks import TASKS
from digests import with_sha256
from eval import benchmarks, contamination, prompts, summary, tables
from eval.plots import draw
from eval.prompts import PromptOptions
from eval.sampling import Job, SamplingOptions, complete
from files import replace_file
from locks import waiting_for
from model import parallel
from model.load import Subject, find
from options import REQUIRED, option, turned_round
from plugins import digests

PATIENCE = 7 * 24 * 3600.0  # seconds for which a rank waits for one whose answers are longer


@dataclasses.dataclass(frozen=True)
class EvalOptions(PromptOptions, SamplingOptions):
    """Every option of the command; the defaults are the paper's protocol."""

    sections = {
        "n": "how answers are sampled",
        "prompt": "how questions are asked",
        "checkpoints": "what is evaluated",
        "data": "files",
    }
    hints = turned_round(
        {
            "the checkpoint, without a name before it": "model model_name_or_path pretrained",
            "--max_tokens": "max_new_tokens max_completion_length max_gen_toks",
            "--n": "num_samples num_generations",
            "--prompt few_shot": "num_fewshot",
            "--out": "output_dir output_path",
            "--tasks, which takes a file, too": "dataset",
            "--temperature, or --greedy": "do_sample",
            "--system": "system_prompt",
            "--instruction": "prompt_suffix",
        }
    )
    checkpoints: tuple[str, ...] = option(
        REQUIRED, "a folder in Hugging Face form, a run's folder, or a hub id", positional=True
    )
    tasks: tuple[str, ...] = option(
        REQUIRED,
        "with commas between them; also a file of your own, with rows as train.py takes them",
        choices=benchmarks.names,
        files=SUFFIXES,
        counted="limit",
    )
    grader: str = option(
        "",
        "the task that grades the rows of a file of your own; empty: their column `task`, else by "
        "the look of their answers",
        choices=TASKS,
    )
    k: tuple[int, ...] = option(
        (), "pass@k and majority@k for these k, with commas between them; n unless given", minimum=1
    )
    greedy: bool = option(False, "always the most likely token")
    compare: str = option(
        "", "another checkpoint, evaluated as well: the others are compared with it by problem"
    )
    allow_trained: bool = option(False, "evaluate on questions that a run trained on")
    data: str = option(
        "", "the folder with test sets, NAME/test.jsonl; $SRLM_DATA unless given, else test_sets"
    )
    out: str = option("evals", "where samples and tables are kept")
    tokenizer: str = option("", "folder with tokenizer.json, for checkpoints that have none")


def parse(argv: Sequence[str]) -> EvalOptions:
    """Return the options of a command line; what cannot work is refused before anything is read.

    Every task is in it once, k sorted, the temperature of --greedy 0.

    Raises:
        UserError: One line that names the option.
    """
    args = options.parse(EvalOptions, argv)
    if not args.tasks:
        raise UserError(f"--tasks names none; there are {', '.join(benchmarks.names())}")
    if args.grader and not any(map(benchmarks.is_file, args.tasks)):
        raise UserError("--grader is for files of your own, and --tasks names none; leave it out")
    labels = [benchmarks.label(task) for task in dict.fromkeys(args.tasks)]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(
                f"--tasks: two of the files would be {label} in the results; rename one"
            )
    ks = sorted({*args.k} or {args.n})
    if ks[-1] > args.n:
        raise UserError(f"--k {ks[-1]} needs as many samples per problem; --n is {args.n}")
    temperature = args.temperature
    if args.greedy:
        temperature = 0.0
        if args.n > 1:
            raise UserError(f"--greedy gives the same answer every time; leave out --n {args.n}")
    elif temperature == 0:
        raise UserError("--temperature must be above 0; --greedy takes the most likely token")
    return dataclasses.replace(
        args,
        tasks=tuple(dict.fromkeys(args.tasks)),
        k=tuple(ks),
        temperature=temperature,
        data=args.data or os.environ.get("SRLM_DATA") or "test_sets",
    )


# --- plan -----------------------------------------------------------------------------------------


def plan(args: EvalOptions) -> list[Job]:
    """Every job of the command; all that can be wrong is found before a weight is read."""
    names = dict.fromkeys([*args.checkpoints, *filter(None, [args.compare])])
    subjects = [find(name, args.tokenizer) for name in names]
    sets = [benchmarks.load(task, args.data, args.limit, args.grader) for task in args.tasks]
    jobs = []
    for subject in subjects:
        seen = contamination.seen(subject, sets, args.allow_trained)
        jobs += [_job(args, subject, test_set, seen[test_set.name]) for test_set in sets]
    return jobs


def _job(
    args: EvalOptions,
    subject: Subject,
    benchmark: benchmarks.Benchmark,
    trained: contamination.Trained,
) -> Job:
    built = prompts.build(benchmark, subject.tokenizer, subject.settings, args)
    longest, positions = max(map(len, built.ids)), subject.config.max_position_embeddings
    if longest >= positions:
        raise UserError(
            f"{subject.name}: {benchmark.name} has a prompt of {longest:,} tokens, "
            f"the model {positions:,} positions"
        )
    identity = {
        "checkpoint": subject.sha256,
        "test set": benchmark.sha256,
        "prompt": built.stated,
        "temperature": args.temperature,
        "top_p": None if args.greedy else args.top_p,
        "max_tokens": args.max_tokens,
        "seed": None if args.greedy else args.seed,
        "stop_ids": subject.stop_ids,
        "vocabulary": subject.vocab,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    if benchmarks.is_own(benchmark):
        identity["plugin"] = digests()
    samples = summary.Samples(Path(args.out) / subject.label, benchmark.name)
    samples.check(identity)
    return Job(
        subject=subject,
        samples=samples,
        name=benchmark.name,
        prompts=built.ids,
        max_tokens=min(args.max_tokens, positions - longest),
        stop=built.stop,
        args=args,
        benchmark=benchmark,
        identity=identity,
        trained=trained,
    )


# --- report ---------------------------------------------------------------------------------------


def report(args: EvalOptions, jobs: list[Job]) -> str:
    """Write summary.md, summary.json and summary.png; returns the text for the terminal.

    What earlier commands have summed up in the same --out stays in them.
    """
    summaries = []
    for job in jobs:
        figures = summary.summarise(job.rows, args.k, job.samples.stated["generated"])
        summaries.append(summary.Summary(job.subject.label, job.name, figures))
    training = contamination.notes([(job.subject.label, job.name, job.trained) for job in jobs])
    ours = summary.Report(
        conditions=[*conditions_of(args, jobs), *training],
        training=training,
        summaries=summaries,
        comparisons=compare(args.compare, jobs) if args.compare else [],
        trained_on=[[job.subject.label, job.name, *job.trained] for job in jobs],
    )
    out = Path(args.out)
    with waiting_for(out / ".summary.lock", f"another evaluation's summary in {out}"):
        found = ours.beside(summary.read_report(out / "summary.json"))
        shown = [tables.table(found.summaries)]
        if found.comparisons:
            shown.append(tables.comparison_table(found.comparisons))
        conditions = [*found.all_conditions(), *_unfinished(jobs, found)]
        page = [*map(tables.markdown, shown), "\n".join(f"- {line}" for line in conditions)]
        replace_file(out / "summary.md", "\n\n".join(page) + "\n")
        replace_file(
            out / "summary.json", json.dumps(with_sha256(found.as_json()), indent=1) + "\n"
        )
        draw(found.summaries, out / "summary.png")
    said = [*map(aligned, shown), *conditions]
    said.append(f"samples, summary.md, summary.json and summary.png are in {out}")
    return "\n\n".join(said)


def _unfinished(jobs: list[Job], found: summary.Report) -> list[str]:
    """A sentence on what lies beside the summary and is not in it."""
    shown = {f"{s.checkpoint} on {s.task}" for s in found.summaries}
    others = [name for name in jobs[0].samples.others() if name not in shown]
    return [f"not in this summary, though beside it: {', '.join(others)}"] if others else []


def conditions_of(args: EvalOptions, jobs: list[Job]) -> list[str]:
    """Sentences on how samples and figures were made; jobs that were asked alike share a line."""
    drawn = f"temperature {args.temperature}, top-p {args.top_p}, seed {args.seed}"
    lines = [
        f"{'greedy' if args.greedy else drawn}, up to {args.max_tokens:,} new tokens. Rates in %; "
        "accuracy: the marked answer alone (strict), mean over all samples; intervals: 95 %, "
        "problems resampled"
    ]
    return list(dict.fromkeys([*lines, *map(_asked, jobs)]))


def _asked(job: Job) -> str:
    """How the questions of a job were asked."""
    prompt = job.identity["prompt"]
    line = f"{job.name}: {prompt['kind']} prompt"
    for name in summary.PROMPT_CONDITIONS:
        if prompt.get(name):
            line += f", {name} {prompt[name]!r}"
    line += (
        f"; sha256 of the first prompt {prompt['first_prompt_sha256'][:12]}, "
        f"of the template {(prompt['template_sha256'] or 'none')[:12]}, "
        f"of the test set {job.benchmark.sha256[:12]}"
    )
    if job.max_tokens < job.args.max_tokens:
        line += f"; up to {job.max_tokens:,} new tokens, for which the model has positions"
    return line


def compare(name: str, jobs: list[Job]) -> list[summary.Comparison]:
    """All checkpoints against the one of this name, on the problems that both have."""
    others = {job.name: job for job in jobs if job.subject.name == name}
    found = []
    for job in jobs:
        label, other = job.subject.label, others[job.name]
        if label == other.subject.label:
            continue
        differing = summary.asked_differently(job.samples.stated, other.samples.stated)
        paired = summary.compare(job.rows, other.rows) | {"asked_differently": differing}
        found.append(summary.Comparison(label, other.subject.label, job.name, paired))
    return found


# --- command --------------------------------------------------------------------------------------


def evaluate(args: EvalOptions) -> None:
    """Plan, generate and grade, report."""
    # only Python objects go from rank to rank
    rank, world, local_rank = parallel.init("cpu", patience=PATIENCE)
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    jobs = plan(args)
    summary.read_report(Path(args.out) / "summary.json")  # a damaged one is refused before the work
    for subject, own_jobs in itertools.groupby(jobs, operator.attrgetter("subject")):
        # read by the first job that needs it; the model before is dropped here
        load_model = functools.cache(subject.model)
        for job in own_jobs:
            complete(job, load_model, rank, world)
    parallel.on_rank_0(rank, lambda: say(report(args, jobs)))


def run(argv: list[str]) -> None:
    """The body of the command. Raises UserError and RunFailed."""
    try:
        args = parse(argv)
        with parallel.telling():
            evaluate(args)
    except OSError as e:  # a file that cannot be read
        raise system_error(e, more="; the same command goes on") from None


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    return as_command("eval", lambda: run(argv), speaks=parallel.is_first_to_say)


if __name__ == "__main__":
    parallel.leave(main(sys.argv[1:]))
