"""What the head costs on a CPU against its size: seconds and memory beside the products alone.

    python -m bench.head_sizes [--vocab 32000,152064,262144] [--width 256,896] [--rows 64,...,4096]

For each vocabulary, width (student and teacher alike) and number of rows, fp32: forward and
backward of `linear_kl` (forward KL) and `linear_logprob` (cross-entropy), and the matrix products
that each cannot avoid (four and three) in the same chunks. Each in a process of its own, in turn,
medians of `--repeats` after a warm-up; memory is the peak above inputs and heads, gradients of both
included. The whole table takes the better part of an hour on two cores.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Sequence

import torch

from bench.measure import median_ratio, show, table
from bench.processes import in_turn, serve
from kernels.chunk import default_chunk_rows, product
from kernels.cpu import keep_freed_memory
from kernels.linear_kl import linear_kl
from kernels.linear_logprob import linear_logprob

WAYS = ("linear_kl", "products of KL", "linear_logprob", "products of log-prob")
COLUMNS = ("V", "D", "rows", "loss", "seconds", "products", "ratio", "GB", "products' GB")


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def products(rows: int, width: int, vocab: int, teacher: bool) -> Callable[[], dict]:
    """Logits of student (and teacher), gradients of rows and head, in the chunks of the loss."""
    hidden, head = torch.randn(rows, width), torch.randn(vocab, width)
    chunk = default_chunk_rows(vocab, rows, torch.device("cpu"), models=1 + teacher)

    def step() -> dict:
        z = torch.empty(min(rows, chunk), vocab)
        grad_hidden, grad_head = torch.empty_like(hidden), torch.empty_like(head)
        for start in range(0, rows, chunk):
            x = hidden[start : start + chunk]
            logits = z[: len(x)]
            for _ in range(1 + teacher):
                product(x, head.t(), logits)
            product(logits, head, grad_hidden[start : start + chunk])
            product(logits.t(), x, grad_head, add=start > 0)
        return {}

    return step


def loss_step(way: str, rows: int, width: int, vocab: int) -> Callable[[], dict]:
    """Forward and backward of one of our losses."""
    hidden = torch.randn(rows, width, requires_grad=True)
    head = (torch.randn(vocab, width) * width**-0.5).requires_grad_()
    weight = torch.full((rows,), 1 / rows)
    if way == "linear_kl":
        teacher = torch.randn(rows, width), torch.randn(vocab, width) * width**-0.5

        def step() -> dict:
            loss, _ = linear_kl(hidden, head, *teacher, weight, "forward_kl")
            torch.autograd.grad(loss, (hidden, head))
            return {}

        return step
    target = torch.randint(vocab, (rows,))

    def cross_entropy_step() -> dict:
        loss, _ = linear_logprob(hidden, head, target, weight, lambda logp, *_: -logp)
        torch.autograd.grad(loss, (hidden, head))
        return {}

    return cross_entropy_step


def child(way: str, rows: int, width: int, vocab: int, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if way.startswith("products"):
        step = products(rows, width, vocab, teacher=way == "products of KL")
    else:
        step = loss_step(way, rows, width, vocab)
    keep_freed_memory()  # as `train.py` does
    serve({}, step)


def measure_size(args: argparse.Namespace, vocab: int, width: int, rows: int) -> list[dict]:
    """Two rows of the table."""
    options = [f"--vocab={vocab}", f"--width={width}", f"--rows={rows}"]
    options.append(f"--threads={args.threads}")
    commands = {}
    for way in WAYS:
        commands[way] = [sys.executable, "-m", "bench.head_sizes", *options, "--way", way]
    _, results = in_turn(commands, args.repeats)
    seconds, peak = {}, {}
    for way, steps in results.items():
        seconds[way] = [step["seconds"] for step in steps[1:]]
        peak[way] = max(step["gb"] for step in steps)
    found = []
    for loss, floor in (WAYS[:2], WAYS[2:]):
        row = {
            "V": vocab,
            "D": width,
            "rows": rows,
            "loss": loss,
            "seconds": statistics.median(seconds[loss]),
            "products": statistics.median(seconds[floor]),
            "ratio": median_ratio(seconds[loss], seconds[floor]),
            "GB": peak[loss],
            "products' GB": peak[floor],
        }
        found.append(row)
        show(row, COLUMNS)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocab", type=numbers, default=[32_000, 152_064, 262_144])
    parser.add_argument("--width", type=numbers, default=[256, 896])
    parser.add_argument("--rows", type=numbers, default=[64, 256, 1024, 4096])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    sizes = itertools.product(args.vocab, args.width, args.rows)
    if args.way:
        vocab, width, rows = next(sizes)
        child(args.way, rows, width, vocab, args.threads)
        return 0
    found = []
    for vocab, width, rows in sizes:
        found += measure_size(args, vocab, width, rows)
    print("\n" + table(found, COLUMNS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
