"""Generating the samples that are still missing, keeping each, and grading them.

Every sample has a seed of its own, so that it does not depend on what else is generated beside it,
and goes to a file as soon as it is finished: a command that was killed generates only the rest.
"""

import dataclasses
import functools
import hashlib
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from data.grade import grade_by_math_verify, vote
from data.tasks import Example, grade, grade_all
from errors import RunFailed, UserError
from eval.benchmarks import CODE, Benchmark
from eval.contamination import Trained
from eval.summary import Key, Rows, Samples, json_line
from model import parallel
from model.generate import Completion, generate
from model.load import Subject
from model.transformer import Transformer
from run import environment

PROGRESS_SECONDS = 10.0  # between two lines on the terminal

# --- generating -----------------------------------------------------------------------------------


@dataclasses.dataclass
class Request:
    """Samples that a checkpoint is to generate.

    samples: where they are kept. name: of the prompts, in the seeds. prompts: ids per problem.
    stop: strings that end an answer. args: with n, temperature, top_p, seed, batch_size and group.
    """

    subject: Subject
    samples: Samples
    name: str
    prompts: list[list[int]]
    max_tokens: int
    stop: tuple[str, ...]
    args: Namespace

    def columns(self, problem: int, text: str, completion: Completion) -> dict[str, Any]:
        """What the row of a sample holds beside its numbers."""
        return {"text": text, "tokens": len(completion.tokens), "stopped": completion.stopped}


def seed_of(seed: int, name: str, problem: int, sample: int) -> int:
    """64 bits for a sample: the same in every batch, on every rank and after a resumption."""
    text = f"{seed}/{name}/{problem}/{sample}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def missing(kept: Rows, problems: Sequence[int], args: Namespace) -> list[list[Key]]:
    """The samples of these problems that are not kept yet, in groups to be generated together."""
    groups = []
    size = args.group or len(problems) or 1
    for start in range(0, len(problems), size):
        keys = [(p, s) for p in problems[start : start + size] for s in range(args.n)]
        groups.append([key for key in keys if key not in kept])
    return [keys for keys in groups if keys]


def generate_missing(
    request: Request, groups: list[list[Key]], load_model: Callable[[], Transformer], rank: int = 0
) -> tuple[int, float]:
    """Generate these groups of samples and append them to the rank's file.

    A sample is kept as soon as it is finished. With --group a complete group is, so that what is
    generated after a kill is batched as it would have been, and rounded alike.

    Args:
        load_model: Called once, and only if there is something to generate.

    Returns:
        The number of new tokens, and the seconds that they took.

    Raises:
        RunFailed: if the file cannot be written.
    """
    if not groups:
        return 0, 0.0
    args, model, start = request.args, load_model(), time.perf_counter()
    try:
        with open(request.samples.part(rank), "a", encoding="utf-8") as file:
            # a line that a kill cut off stays apart from what follows
            file.write("\n" if file.tell() else "")
            writer = _Writer(request, file, sum(map(len, groups)), rank == 0)
            for keys in groups:
                generate(
                    model,
                    [request.prompts[problem] for problem, _ in keys],
                    request.max_tokens,
                    request.subject.stop_ids,
                    vocab=request.subject.vocab,
                    temperature=args.temperature,
                    top_p=args.top_p,
                    seeds=[seed_of(args.seed, request.name, *key) for key in keys],
                    stop_strings=request.stop,
                    decode=request.subject.tokenizer.decode,
                    batch_size=args.batch_size,
                    on_done=functools.partial(writer.add, keys),
                )
                writer.flush()
    except OSError as e:
        raise RunFailed(
            f"{e.filename or 'a file'}: {e.strerror or e}; the same command goes on"
        ) from None
    return writer.tokens, time.perf_counter() - start


class _Writer:
    """Appends finished samples to a file and reports progress."""

    def __init__(self, request: Request, file: TextIO, total: int, is_loud: bool):
        self.request, self.file, self.total, self.is_loud = request, file, total, is_loud
        self.pending: list[str] = []
        self.done = self.tokens = 0
        self.reported = time.monotonic()

    def add(self, keys: list[Key], i: int, completion: Completion) -> None:
        """Take the completion of keys[i]."""
        (problem, sample), request = keys[i], self.request
        text = request.subject.tokenizer.decode(completion.tokens, skip_special=True)
        for stop in request.stop:
            text = text.partition(stop)[0]
        row = request.columns(problem, text, completion)
        self.pending.append(json_line({"problem": problem, "sample": sample} | row))
        if not request.args.group:
            self.flush()
        self.done += 1
        self.tokens += len(completion.tokens)
        if self.is_loud and time.monotonic() - self.reported > PROGRESS_SECONDS:
            self.reported = time.monotonic()
            print(
                f"{request.name}: {self.done:,} of this rank's {self.total:,} samples, "
                f"{self.tokens:,} tokens",
                flush=True,
            )

    def flush(self) -> None:
        self.file.write("".join(self.pending))
        self.file.flush()
        self.pending.clear()


# --- one checkpoint on one task -------------------------------------------------------------------


@dataclasses.dataclass
class Job(Request):
    """The evaluation of one checkpoint on one task.

    identity: what samples depend on; those made under another identity are refused. trained: how
    many of the questions the checkpoint was trained on. rows: of the figures, once `complete`.
    """

    benchmark: Benchmark
    identity: dict[str, Any]
    trained: Trained
    rows: Rows = dataclasses.field(default_factory=dict)

    def columns(self, problem: int, text: str, completion: Completion) -> dict[str, Any]:
        example = self.benchmark.examples[problem]
        row = {"question": example.question, "gold": example.answer}
        row |= super().columns(problem, text, completion)
        return row | {"logp": round(sum(completion.logp), 3)}

    def begin(self) -> None:
        """State the conditions beside the samples."""
        about = {
            "name": self.subject.name,
            "file": self.benchmark.file,
            "problems": len(self.benchmark.examples),
            "new_tokens": self.max_tokens,
            "trained_on": self.trained.count,
            "unknown_training": self.trained.unknown,
            "environment": environment(),
        }
        self.samples.begin(self.identity, about)


def complete(job: Job, load_model: Callable[[], Transformer], rank: int, world: int) -> None:
    """Generate what is missing of a job, grade it and set its rows, the same on all ranks."""
    samples, problems = job.samples, range(len(job.prompts))
    wanted = [(p, s) for p in problems for s in range(job.args.n)]
    groups = missing(samples.read(), problems[rank::world], job.args)
    parallel.barrier()  # everyone has read what was kept
    parallel.on_rank_0(rank, job.begin)
    spent = error = None
    try:
        spent = generate_missing(job, groups, load_model, rank)
    except (UserError, RunFailed) as e:
        error = e
    parallel.raise_on_all(error)
    tokens, seconds = zip(*parallel.gather(spent), strict=True)
    rows = samples.read()
    ungraded = [key for key in wanted[rank::world] if "strict" not in rows[key]]
    examples = job.benchmark.examples
    graded = grade_all(grade_row, [(examples[key[0]], rows[key]) for key in ungraded])
    for part in parallel.gather(dict(zip(ungraded, graded, strict=True))):
        rows |= part
    parallel.on_rank_0(rank, lambda: samples.finish(rows, sum(tokens), max(seconds)))
    job.rows = {key: rows[key] for key in wanted}


def grade_row(example: Example, row: dict[str, Any]) -> dict[str, Any]:
    """A sample's row with its grades.

    strict, lenient, parsed: the verdict of the task's own grader. math_verify: whether math-verify
    finds the gold answer in the text by itself; None on code. vote: the answer in a form in which
    equal ones can be counted; False on code.
    """
    verdict, text = grade(example, row["text"]), row["text"]
    graded = row | {"strict": verdict.strict, "lenient": verdict.lenient, "parsed": verdict.parsed}
    if example.task in CODE:
        return graded | {"math_verify": None, "vote": False}
    return graded | {
        "math_verify": grade_by_math_verify(text, example.answer),
        "vote": vote(text, words=example.task not in ("math", "answer")),
    }
