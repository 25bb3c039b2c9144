"""What a kept top-k costs: bytes a trained token, and how far the gradient is from the full one.

    python -m bench.teacher_cache runs/kd-…/checkpoints/step-500 \\
        runs/teacher-…/checkpoints/step-700 --data word_problems:200

Student and teacher checkpoints of one tokenizer; forward KL at temperature 1 over the trained
positions of the data. The error is that of the gradient at the student's hidden rows (‖kept − full‖
/ ‖full‖), fp32; the lists are rounded as data/teacher_cache.py keeps them.
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
from data.batch import Batch
from data.dataset import Dataset
from data.formatter import Formatter
from data.tokenizer import Tokenizer
from kernels.attention import PackedAttention
from kernels.linear_kl import linear_kl
from kernels.linear_topk import linear_topk_divergence, topk_logprobs
from losses.kd import DIVERGENCES
from model.checkpoint import build_model, read_config

LOWEST_FP16 = -65504


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


def compare(student: Rows, teacher: Rows, ks: Sequence[int], vocab: int) -> list[dict]:
    """A row per k: what is kept, and how far its gradient is from the full vocabulary's."""
    weight_N = torch.ones(len(student.hidden_ND))
    loss, full = linear_kl(*student, *teacher, weight_N, "forward_kl", vocab=vocab)
    (want,) = torch.autograd.grad(loss, student.hidden_ND)
    full_kl = float(full["divergence"].mean())
    print(f"{len(weight_N):,} positions, {vocab:,} ids, mean KL {full_kl:.4f}")
    found = []
    for k in [*ks, vocab]:
        ids, logp = topk_logprobs(*teacher, k, vocab=vocab)
        loss, kept = linear_topk_divergence(
            *student, ids, rounded(logp), weight_N, forward_kl, vocab=vocab
        )
        (got,) = torch.autograd.grad(loss, student.hidden_ND)
        row = {
            "k": k,
            "bytes a token": 6 * k + 2,
            "mass left out, %": 100 * float(logp[:, -1].exp().mean()),
            "of the full KL, %": 100 * float(kept["divergence"].mean()) / full_kl,
            "gradient off, %": 100 * relative_error(got, want),
        }
        found.append(row)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("student", type=Path)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--data", default="word_problems:200")
    parser.add_argument("--k", default="1,8,32,128")
    args = parser.parse_args(argv)
    tokenizer = Tokenizer.load(args.teacher)
    vocab = tokenizer.size
    data = Dataset(args.data, Formatter(tokenizer), seed=0, max_tokens=8192, vocab=vocab)
    batch = Batch.pack(data.get(i) for i in range(len(data)))
    student, teacher = loss_rows(args.student, batch), loss_rows(args.teacher, batch)
    student.hidden_ND.requires_grad_()
    ks = [int(k) for k in args.k.split(",")]
    print(table(compare(student, teacher, ks, vocab)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
