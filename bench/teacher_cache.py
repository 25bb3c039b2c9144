"""What a kept top-k costs: bytes a trained token, and how far the gradient is from the full vocabulary's.

    python -m bench.teacher_cache runs/kd-…/checkpoints/step-500 runs/teacher-…/checkpoints/step-700 --data word_problems:200

Student and teacher checkpoints of one tokenizer; forward KL at temperature 1 over the trained positions of the data. The error is that of the
gradient at the student's hidden rows (‖kept − full‖ / ‖full‖), fp32; the lists are rounded as data/teacher_cache.py keeps them.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from bench.gpu import table
from data.batch import Batch
from data.dataset import Dataset
from data.formatter import Formatter
from data.tokenizer import Tokenizer
from kernels.attention import PackedAttention
from kernels.linear_kl import linear_kl
from kernels.linear_topk import linear_topk_divergence, topk_logprobs
from losses.kd import DIVERGENCES
from model.checkpoint import build_model, read_config


def hidden_rows(folder, batch):
    model = build_model(read_config(folder, folder), folder, device="cpu", seed=0)
    with torch.no_grad():
        return batch.select(
            model(batch.tokens_T, batch.positions_T, PackedAttention(batch.lengths))
        ), model.head_VD.detach()


def main(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("--data", default="word_problems:200")
    parser.add_argument("--k", default="1,8,32,128")
    args = parser.parse_args(argv)
    student, teacher = Path(args.student), Path(args.teacher)
    tokenizer = Tokenizer.load(teacher)
    data = Dataset(args.data, Formatter(tokenizer), seed=0, max_tokens=8192, vocab=tokenizer.size)
    batch = Batch.pack(data.get(i) for i in range(len(data)))
    (hidden, head), (teacher_hidden, teacher_head) = (
        hidden_rows(student, batch),
        hidden_rows(teacher, batch),
    )
    hidden.requires_grad_()
    weight, vocab = torch.ones(len(hidden)), tokenizer.size
    loss, rows = linear_kl(
        hidden, head, teacher_hidden, teacher_head, weight, "forward_kl", vocab=vocab
    )
    (full,) = torch.autograd.grad(loss, hidden)
    found = []
    for k in [*map(int, args.k.split(",")), vocab]:
        ids, logp = topk_logprobs(teacher_hidden, teacher_head, k, vocab=vocab)
        kept = torch.from_numpy(
            np.maximum(logp.numpy(), -65504).astype(np.float16).astype(np.float32)
        ).log_softmax(1)
        loss, short = linear_topk_divergence(
            hidden,
            head,
            ids,
            kept,
            weight,
            lambda ls, lt: DIVERGENCES["forward_kl"](ls, lt, 0.0),
            vocab=vocab,
        )
        (got,) = torch.autograd.grad(loss, hidden)
        found.append(
            {
                "k": k,
                "bytes a token": 6 * k + 2,
                "mass left out, %": 100 * float(logp[:, -1].exp().mean()),
                "of the full KL, %": 100
                * float(short["divergence"].mean() / rows["divergence"].mean()),
                "gradient off, %": 100 * float((got - full).norm() / full.norm()),
            }
        )
    print(
        f"{len(hidden):,} positions, {vocab:,} ids, mean KL {float(rows['divergence'].mean()):.4f}"
    )
    print(table(found, tuple(found[0])))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
