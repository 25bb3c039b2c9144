"""Paths on a GPU that small shapes do not reach; each by its name, so that each has a process.

    python -m bench.paths chunks      # the head in several chunks of rows
    python -m bench.paths offsets     # a buffer of logits with more than 2^31 elements
    python -m bench.paths step        # a compiled rollout and its update

Exit code 1: a result is wrong. With --dry tiny shapes on a CPU.
"""

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from bench import measure
from bench.grpo_step import GrpoStep, Size
from bench.measure import Bench
from kernels import backend
from kernels.linear_kl import linear_kl
from model.checkpoint import build_model
from model.presets import PRESETS

# Relative error of bf16 gradients against fp64.
LIMIT = 1e-2


def random_rows(bench: Bench, n: int, vocab: int, width: int) -> list[Tensor]:
    """Hidden rows and head of a student and of a teacher."""
    generator = torch.Generator(bench.device).manual_seed(0)
    found = []
    for _ in range(2):
        for rows, scale in ((n, 1.0), (vocab, 3 * width**-0.5)):
            x = torch.randn(rows, width, generator=generator, device=bench.device) * scale
            found.append(x.to(bench.dtype))
    return found


def gradients(tensors: Sequence[Tensor], chunk_rows: int | None) -> list[Tensor]:
    """Of the mean forward KL, at the student's hidden rows and head."""
    hidden, head, teacher_hidden, teacher_head = (x.detach() for x in tensors)
    hidden.requires_grad_()
    head.requires_grad_()
    weight = torch.full((len(hidden),), 1 / len(hidden), device=hidden.device)
    teacher = teacher_hidden, teacher_head
    loss, _ = linear_kl(hidden, head, *teacher, weight, "forward_kl", chunk_rows=chunk_rows)
    return list(torch.autograd.grad(loss, (hidden, head)))


def chunks(bench: Bench) -> None:
    """1,000 rows, 256 at a time: later chunks are added to the head's gradient."""
    n, vocab, chunk_rows = (50, 300, 16) if bench.dry else (1000, 2000, 256)
    tensors = random_rows(bench, n, vocab, 256)
    want = gradients([x.double() for x in tensors], None)
    for kernels in ("torch",) if bench.dry else ("torch", "triton"):
        backend.use(kernels)
        got = gradients(tensors, chunk_rows)
        errors = [measure.relative_error(a, b) for a, b in zip(got, want, strict=True)]
        row = {"path": f"chunks, {kernels}", "dX off": errors[0], "dW off": errors[1]}
        bench.check("checks", row | {"right": max(errors) < LIMIT})


def offsets(bench: Bench) -> None:
    """The last rows of a large chunk are those that they are by themselves."""
    n, vocab, last = (40, 300, 8) if bench.dry else (16_384, 151_665, 64)
    tensors = random_rows(bench, n, vocab, 64)
    got = gradients(tensors, n)[0][-last:] * n
    hidden, head, teacher_hidden, teacher_head = tensors
    alone = [hidden[-last:], head, teacher_hidden[-last:], teacher_head]
    want = gradients([x.double() for x in alone], None)[0] * last
    error = measure.relative_error(got, want)
    bench.check("checks", {"path": "offsets", "dX off": error, "right": error < LIMIT})


def step(bench: Bench) -> None:
    """Two GRPO steps, compiled and (on a GPU) with recorded decoding."""
    options = {"device": bench.device, "seed": 0, "compute_dtype": bench.dtype}
    model = build_model(PRESETS["tiny"], None, **options)
    if not bench.dry:
        model.compile_blocks()
    size = Size(prompts=2, samples=4, new_tokens=16, vocab=500)
    grpo = GrpoStep(model, [[1, 2, 3], [4, 5, 6, 7]], size, micro_tokens=128)
    for number in (1, 2):
        grpo.rollout()
        loss = float(grpo.update()["loss"][0])
        finite = math.isfinite(loss) and all(bool(p.isfinite().all()) for p in model.parameters())
        bench.check("checks", {"path": f"step {number}", "loss": loss, "right": finite})


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.parser_of(__doc__ or "", "--out", "paths.json", minutes=5)
    paths = {"chunks": chunks, "offsets": offsets, "step": step}
    parser.add_argument("name", choices=paths)
    args = parser.parse_args(argv)
    bench = Bench(args.dry, args.minutes, args.path)
    paths[args.name](bench)
    backend.use("auto")
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
