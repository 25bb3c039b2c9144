"""What a kept top-k, or kept draws, cost: how far the gradient is from the full one.

    python -m bench.teacher_cache runs/kd-…/checkpoints/step-500 \\
        runs/teacher-…/checkpoints/step-700 --data word_problems:200

Student and teacher checkpoints of one tokenizer; forward KL at temperature 1 over the trained
positions of the data. The error is that of the gradient at the student's hidden rows and at its
head, where the tokens are summed (‖kept − full‖ / ‖full‖), fp32; the lists are rounded as
data/teacher_cache.py keeps them. Of draws, which take 6 bytes for each different id: what one cache
of them is off by on average (bias and noise), and the mean gradient of REPEATS caches, of which
the bias would remain.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.measure import relative_error, table
from data.batch import Batch, uniforms
from data.dataset import Dataset
from data.formatter import Formatter
from data.tokenizer import Tokenizer
from kernels.attention import PackedAttention
from kernels.linear_kl import linear_kl
from kernels.linear_topk import (
    count_draws,
    cross_entropy_of_draws,
    draw_ids,
    linear_topk_divergence,
    topk_logprobs,
)
from losses.kd import DIVERGENCES
from model.checkpoint import build_model, read_config

LOWEST_FP16 = -65504
REPEATS = 8  # caches of draws, each with a seed of its own


class Rows(NamedTuple):
    """Hidden states of the loss rows, and the head above them."""

    hidden_ND: Tensor
    head_VD: Tensor


def loss_rows(folder: Path, batch: Batch) -> Rows:
    model = build_model(read_config(str(folder), folder), folder, device="cpu", seed=0)
    attend = PackedAttention(batch.lengths)
    with torch.no_grad():
        hidden_ND = batch.select(model(batch.tokens_T, batch.positions_T, attend))
    return Rows(hidden_ND, model.head_VD.detach())


def forward_kl(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    return DIVERGENCES["forward_kl"](student_logp, teacher_logp, 0.0)


def rounded(logp_NK: Tensor) -> Tensor:
    """Log-probs as the cache keeps them, in fp16, normalised again."""
    fp16 = np.maximum(logp_NK.numpy(), LOWEST_FP16).astype(np.float16)
    return torch.from_numpy(fp16.astype(np.float32)).log_softmax(1)


def gradients(student: Rows, loss: Tensor) -> Sequence[Tensor]:
    """At the hidden rows, and at the head."""
    return torch.autograd.grad(loss, (student.hidden_ND, student.head_VD))


def percent_off(got: Sequence[Tensor], want: Sequence[Tensor]) -> list[float]:
    return [100 * relative_error(a, b) for a, b in zip(got, want, strict=True)]


def off_by_draws(
    student: Rows, teacher: Rows, batch: Batch, n: int, want: Sequence[Tensor]
) -> dict[str, float]:
    """What n draws of a token are off by: (a cache, the mean of all), at hidden rows and head."""
    vocab = len(teacher.head_VD)
    weight_N = torch.ones(len(student.hidden_ND))
    means, errors, distinct = [torch.zeros_like(x) for x in want], [], 0.0
    for seed in range(REPEATS):
        drawn = draw_ids(*teacher, uniforms(batch.documents, n, seed))
        ids, shares = count_draws(drawn, vocab)
        distinct += float((shares[:, :-1] > -torch.inf).sum(1).double().mean()) / REPEATS
        loss, _ = linear_topk_divergence(
            *student, ids, shares, weight_N, cross_entropy_of_draws, vocab=vocab
        )
        got = gradients(student, loss)
        errors.append(percent_off(got, want))
        for mean, gradient in zip(means, got, strict=True):
            mean += gradient / REPEATS
    one, many = np.mean(errors, axis=0), percent_off(means, want)
    return {
        "distinct": distinct,
        "head off, %": float(one[1]),
        "mean of caches, %": many[0],
        "mean of caches, head, %": many[1],
        "gradient off, %": float(one[0]),
    }


def compare(
    student: Rows, teacher: Rows, batch: Batch, ks: Sequence[int], draws: Sequence[int], vocab: int
) -> list[dict]:
    """A row per k and number of draws: what is kept, and how far its gradient is from the full
    vocabulary's."""
    weight_N = torch.ones(len(student.hidden_ND))
    teacher = Rows(teacher.hidden_ND, teacher.head_VD[:vocab])
    loss, full = linear_kl(*student, *teacher, weight_N, "forward_kl", vocab=vocab)
    want = gradients(student, loss)
    full_kl = float(full["divergence"].mean())
    print(f"{len(weight_N):,} positions, {vocab:,} ids, mean KL {full_kl:.4f}")
    found = []
    for k in [*ks, vocab]:
        ids, logp = topk_logprobs(*teacher, k)
        loss, kept = linear_topk_divergence(
            *student, ids, rounded(logp), weight_N, forward_kl, vocab=vocab
        )
        off = percent_off(gradients(student, loss), want)
        row = {
            "kept": f"top-{k}",
            "bytes": 6 * k + 2,
            "distinct": k,
            "mass left out, %": 100 * float(logp[:, -1].exp().mean()),
            "of the full KL, %": 100 * float(kept["divergence"].mean()) / full_kl,
            "head off, %": off[1],
            "mean of caches, %": off[0],
            "mean of caches, head, %": off[1],
            "gradient off, %": off[0],
        }
        found.append(row)
    for n in draws:
        off = off_by_draws(student, teacher, batch, n, want)
        row = dict.fromkeys(found[0], 0.0) | off
        found.append(row | {"kept": f"{n}-draws", "bytes": 6 * off["distinct"]})
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("student", type=Path)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--data", default="word_problems:200")
    parser.add_argument("--k", default="1,2,4,8,32,128")
    parser.add_argument("--draws", default="2,12,64,256,1024,4096")
    args = parser.parse_args(argv)
    tokenizer = Tokenizer.load(args.teacher)
    vocab = tokenizer.size
    data = Dataset(args.data, Formatter(tokenizer), seed=0, max_tokens=8192, vocab=vocab)
    batch = Batch.pack(data.get(i) for i in range(len(data)))
    student, teacher = loss_rows(args.student, batch), loss_rows(args.teacher, batch)
    for leaf in student:
        leaf.requires_grad_()
    ks, draws = ([int(n) for n in given.split(",")] for given in (args.k, args.draws))
    print(table(compare(student, teacher, batch, ks, draws, vocab)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
