"""Generating the samples that are still missing, keeping each, and grading them.

Every sample has a seed of its own, so that it does not depend on what else is generated beside it,
and goes to a file as soon as it is finished: a command that was killed generates only the rest.
"""

import contextlib
import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable
from typing import TextIO

import plugins
from data.grade import grade_by_math_verify, vote
from data.tasks import Example, grade, grade_all
from errors import RunFailed, UserError
from eval.benchmarks import CODE, Benchmark
from eval.contamination import Trained
from eval.summary import Key, Row, Rows, Samples, json_line
from model import parallel
from model.generate import Completion, Engine, generate
from model.load import Subject
from options import option
from progress import Progress
from run import environment

# --- generating -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How samples are generated: the options that evaluations and traces share."""

    n: int = option(
        1,
        "samples per problem; torchrun takes --n for its own: write --samples there",
        alias="samples",
        minimum=1,
    )
    temperature: float = option(0.6, "of sampling", minimum=0)
    top_p: float = option(
        0.95, "sample from the most likely tokens with this mass", above=0, maximum=1
    )
    max_tokens: int = option(
        32768,
        "new tokens per answer at most; fewer where the model has no positions for them",
        minimum=1,
    )
    seed: int = option(0, "the same seed gives every sample the same random numbers", minimum=0)
    batch_size: int = option(
        64,
        "samples generated at once, per rank; the cache holds as many rows of the longest length",
        minimum=1,
    )
    group: int = option(
        0,
        "finish and keep so many problems at a time: a killed run then goes on bit for bit; "
        "0: each sample by itself, faster",
        minimum=0,
    )
    compile: bool = option(False, "torch.compile the transformer's blocks")
    plugin: str = option(
        "",
        "Python files with commas between them, run first: tasks that they add can be named",
        load=plugins.load,
    )


@dataclasses.dataclass
class Request:
    """Samples that a checkpoint is to generate.

    samples: where they are kept. name: of the prompts, in the seeds. prompts: ids per problem.
    max_tokens: new ones per sample at most. stop: strings that end an answer.
    """

    subject: Subject
    samples: Samples
    name: str
    prompts: list[list[int]]
    max_tokens: int
    stop: tuple[str, ...]
    args: SamplingOptions

    def columns(self, problem: int, text: str, completion: Completion) -> Row:
        """What the row of a sample holds beside its numbers."""
        return {"text": text, "tokens": len(completion.tokens), "stopped": completion.stopped}


def seed_of(seed: int, name: str, problem: int, sample: int) -> int:
    """64 bits for a sample: the same in every batch, on every rank and after a resumption."""
    text = f"{seed}/{name}/{problem}/{sample}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def generate_missing(
    request: Request, problems: range, load_model: Callable, rank: int = 0
) -> tuple[int, float]:
    """Generate the samples of these problems that are not kept yet, and append them to a file.

    A sample is kept as soon as it is finished. With --group a complete group of problems is, so
    that what is generated after a kill is batched as it would have been, and rounded alike.

    Args:
        load_model: Returns the model; called only if there is something to generate.

    Returns:
        The number of new tokens, and the seconds that they took.

    Raises:
        RunFailed: if the file cannot be written.
    """
    args, kept, groups = request.args, request.samples.read(again=True), []
    size = args.group or len(problems) or 1
    for start in range(0, len(problems), size):
        block = problems[start : start + size]
        keys = [(p, s) for p in block for s in range(args.n) if (p, s) not in kept]
        if keys:
            groups.append(keys)
    if not groups:
        return 0, 0.0
    model = load_model()
    if args.compile:
        model.compile_blocks()
    engine, start = Engine(model), time.perf_counter()
    try:
        with open(request.samples.part(rank), "a", encoding="utf-8") as file:
            # a line that a kill cut off stays apart from what follows
            file.write("\n" if file.tell() else "")
            total = sum(map(len, groups))
            progress = Progress(request.name, total, "samples of this rank", rank == 0)
            writer = _Writer(request, file)
            for keys in groups:
                generate(
                    engine,
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
                    progress=progress,
                )
                writer.flush()
    except OSError as e:
        raise RunFailed(
            f"{e.filename or 'a file'}: {e.strerror or e}; the same command goes on"
        ) from None
    return writer.tokens, time.perf_counter() - start


@dataclasses.dataclass
class _Writer:
    """Appends finished samples to a file."""

    request: Request
    file: TextIO
    tokens: int = 0
    pending: list = dataclasses.field(default_factory=list)

    def add(self, keys: list[Key], i: int, completion: Completion) -> None:
        """Take the completion of keys[i]."""
        (problem, sample), request = keys[i], self.request
        text = request.subject.tokenizer.decode(
            completion.tokens, skip_special=True, before=request.prompts[problem]
        )
        for stop in request.stop:
            text = text.partition(stop)[0]
        row = request.columns(problem, text, completion)
        self.pending.append(json_line({"problem": problem, "sample": sample} | row))
        if not request.args.group:
            self.flush()
        self.tokens += len(completion.tokens)

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
    identity: dict
    trained: Trained
    rows: Rows = dataclasses.field(default_factory=dict)

    def columns(self, problem: int, text: str, completion: Completion) -> Row:
        example = self.benchmark.examples[problem]
        return {
            "question": example.question,
            "gold": example.answer,
            **super().columns(problem, text, completion),
            "logp": round(sum(completion.logp), 3),
        }

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


def complete(job: Job, load_model: Callable, rank: int, world: int) -> None:
    """Generate what is missing of a job, grade it and set its rows, the same on all ranks.

    Another command that makes the same samples is waited for.
    """
    with contextlib.ExitStack() as held:
        parallel.on_rank_0(rank, lambda: held.enter_context(job.samples.locked()))
        _complete(job, load_model, rank, world)


def _complete(job, load_model, rank, world):
    samples, problems = job.samples, range(len(job.prompts))
    wanted = [(p, s) for p in problems for s in range(job.args.n)]
    parallel.on_rank_0(rank, job.begin)
    cost = error = None
    try:
        cost = generate_missing(job, problems[rank::world], load_model, rank)
    except (UserError, RunFailed) as e:
        error = e
    parallel.raise_on_all(error)
    tokens, seconds = zip(*parallel.gather(cost), strict=True)
    rows = samples.read(again=True)
    ungraded = [key for key in wanted[rank::world] if "strict" not in rows[key]]
    examples = job.benchmark.examples
    graded = grade_all(grade_row, [(examples[key[0]], rows[key]) for key in ungraded])
    for part in parallel.gather(dict(zip(ungraded, graded, strict=True))):
        rows |= part
    parallel.on_rank_0(rank, lambda: samples.finish(rows, sum(tokens), max(seconds)))
    job.rows = {key: rows[key] for key in wanted}


def grade_row(example: Example, row: Row) -> Row:
    """A sample's row with its grades.

    strict, lenient, parsed: by the task's own grader. math_verify: whether math-verify
    finds the gold answer in the text by itself; None on code. vote: the answer in a form in which
    equal ones can be counted; False on code.
    """
    text = row["text"]
    graded = row | dataclasses.asdict(grade(example, text))
    if example.task in CODE:
        return graded | {"math_verify": None, "vote": False}
    return graded | {
        "math_verify": grade_by_math_verify(text, example.answer or ""),
        "vote": vote(text, words=example.task not in ("math", "answer")),
    }
