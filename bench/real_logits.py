"""How precise the arithmetic of the head's kernels is on a real model's logits.

    python -m bench.real_logits --model path/to/checkpoint --data path/to/gsm8k/train.jsonl

The teacher is the model, the student the same model with every weight matrix perturbed, so that the
mean KL over the trained positions of a few problems is 4e-4, 4e-3 and 5e-2: the closer they are,
the more the gradient is a small difference of what was rounded. Compared with fp64 are
  tile fp16      what kernels/triton_head.py keeps: fp16 differences from a tile's largest logit,
                 log sum e from before the rounding, and a bf16 gradient
  whole bf16     logits as a plain bf16 implementation keeps them, and a bf16 gradient
  linear_kl      the fp32 PyTorch path
each by the relative error of the gradient at the logits and at the hidden rows, and of the value.
Both heads are multiplied in fp32 from the same hidden rows, so that storing alone differs.
"""

import argparse
import copy
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench.measure import relative_error, table
from data.batch import Batch
from data.formats import read_rows, to_example
from data.formatter import Formatter
from errors import UserError
from kernels.attention import PackedAttention
from kernels.divergences import FORMULAS, compare
from kernels.linear_kl import linear_kl
from kernels.triton_head import CONFIGS, FLOOR16
from model.checkpoint import build_model
from model.load import describe, policy_vocab_size
from model.transformer import Transformer

KLS = (4e-4, 4e-3, 5e-2)
TILE = CONFIGS[9].tile
LOG2 = 0.6931471805599453


class Rows(NamedTuple):
    """Hidden rows that carry loss, and the head of the tokenizer's ids, fp32."""

    hidden_ND: Tensor
    head_VD: Tensor


class Result(NamedTuple):
    """The mean divergence, and its gradient at the student's logits (None: unknown) and rows."""

    value: Tensor
    logits_NV: Tensor | None
    hidden_ND: Tensor


def load(args: argparse.Namespace) -> tuple[Transformer, Batch, int]:
    """The model, the trained tokens of the first problems, and how many ids take part."""
    checkpoint = describe(args.model, "--model")
    if checkpoint.tokenizer is None:
        raise UserError(f"--model {args.model}: a preset has no tokenizer; name a checkpoint")
    vocab = policy_vocab_size(checkpoint.tokenizer, checkpoint.config)
    rows = itertools.islice(read_rows(Path(args.data)), args.problems)
    examples = [to_example(row, origin) for origin, row in rows]
    batch = Batch.pack(Formatter(checkpoint.tokenizer).documents(examples))
    model = build_model(checkpoint.config, checkpoint.folder, device="cpu", seed=0)
    return model.requires_grad_(False), batch, vocab


def loss_rows(model: Transformer, batch: Batch, vocab: int) -> Rows:
    hidden_TD = model(batch.tokens_T, batch.positions_T, PackedAttention(batch.lengths))
    return Rows(batch.select(hidden_TD), model.head_VD[:vocab])


def logits_of(rows: Rows) -> Tensor:
    return rows.hidden_ND @ rows.head_VD.t()


def mean_kl(student: Rows, teacher: Rows) -> float:
    """Forward KL in fp64."""
    ls = logits_of(student).double().log_softmax(1)
    lt = logits_of(teacher).double().log_softmax(1)
    return float((lt.exp() * (lt - ls)).sum(1).mean())


def perturb(model: Transformer, original: Transformer, scale: float) -> None:
    """Each matrix plus `scale` of its deviation times a fixed noise; the others as they are."""
    generator = torch.Generator().manual_seed(0)
    pairs = zip(model.parameters(), original.parameters(), strict=True)
    for changed, weight in pairs:
        if weight.dim() == 2:
            noise = torch.randn(weight.shape, generator=generator)
            changed.copy_(weight + scale * weight.std() * noise)


def student_at(
    kl: float, student: Transformer, original: Transformer, batch: Batch, teacher: Rows
) -> tuple[Rows, float]:
    """A perturbed student whose mean KL is within a tenth of `kl`, and what it is.

    The KL grows with the square of a small perturbation, so a few corrections are enough.
    """
    scale = 0.01
    for _ in range(12):
        perturb(student, original, scale)
        rows = loss_rows(student, batch, len(teacher.head_VD))
        found = mean_kl(rows, teacher)
        if abs(found - kl) < 0.1 * kl:
            return rows, found
        scale *= min(4.0, max(0.25, (kl / max(found, 1e-12)) ** 0.5))
    raise UserError(f"no perturbation of the weights gives a KL of {kl}; the last gave {found:.2g}")


def exact(student: Rows, teacher: Rows, divergence: str) -> Result:
    """From the definition, in fp64, of the fp32 logits."""
    logits_NV = logits_of(student).double().requires_grad_()
    ls = logits_NV.log_softmax(1)
    lt = logits_of(teacher).double().log_softmax(1)
    if divergence == "forward_kl":
        value_N = (lt.exp() * (lt - ls)).sum(1)
    elif divergence == "reverse_kl":
        value_N = (ls.exp() * (ls - lt)).sum(1)
    else:
        lm = torch.logaddexp(ls, lt) - LOG2
        value_N = 0.5 * (lt.exp() * (lt - lm) + ls.exp() * (ls - lm)).sum(1)
    value = value_N.mean()
    (gradient_NV,) = torch.autograd.grad(value, logits_NV)
    return Result(value.detach(), gradient_NV, gradient_NV @ student.head_VD.double())


def by_tiles(logits_NV: Tensor) -> Tensor:
    """Logits that went through fp16 differences from their tile's largest."""
    n_ids = logits_NV.shape[1]
    padded = torch.nn.functional.pad(logits_NV, (0, -n_ids % TILE), value=float("-inf"))
    tiles_NJI = padded.unflatten(1, (-1, TILE))
    largest_NJ1 = tiles_NJI.amax(2, keepdim=True)
    below_NJI = (tiles_NJI - largest_NJ1).clamp(min=FLOOR16.value).half().float()
    return (below_NJI + largest_NJ1).flatten(1)[:, :n_ids]


def stored(student: Rows, teacher: Rows, divergence: str, form: str) -> Result:
    """The divergence of logits that were stored in two bytes, its gradient stored as bf16."""
    logp = []
    for rows in (student, teacher):
        logits_NV = logits_of(rows)
        if form == "tile fp16":
            logp.append(by_tiles(logits_NV) - logits_NV.logsumexp(1, keepdim=True))
        else:
            logp.append(logits_NV.bfloat16().float().log_softmax(1))
    ls, lt = logp
    value_N, gradient_NV = FORMULAS[divergence](compare(ls - lt, ls.exp(), lt.exp()), 0.5)
    gradient_NV = (gradient_NV / len(value_N)).bfloat16()
    hidden_ND = gradient_NV.float() @ student.head_VD
    return Result(value_N.mean(), gradient_NV, hidden_ND)


def by_linear_kl(student: Rows, teacher: Rows, divergence: str) -> Result:
    hidden_ND = student.hidden_ND.clone().requires_grad_()
    weight_N = torch.full((len(hidden_ND),), 1 / len(hidden_ND))
    loss, _ = linear_kl(hidden_ND, student.head_VD, *teacher, weight_N, divergence, beta=0.5)
    (gradient_ND,) = torch.autograd.grad(loss, hidden_ND)
    return Result(loss.detach(), None, gradient_ND)


def errors(form: str, got: Result, want: Result) -> dict:
    """A row of the table, in per cent."""
    row: dict = {"form": form}
    if got.logits_NV is not None and want.logits_NV is not None:
        row["gradient at logits, %"] = 100 * relative_error(got.logits_NV, want.logits_NV)
    row["at hidden rows, %"] = 100 * relative_error(got.hidden_ND, want.hidden_ND)
    row["value, %"] = 100 * relative_error(got.value, want.value)
    return row


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="the folder of a checkpoint")
    parser.add_argument("--data", required=True, help="a file of problems, such as GSM8K's")
    parser.add_argument("--problems", type=int, default=2)
    names = ("forward_kl", "reverse_kl", "jsd")
    parser.add_argument("--divergence", choices=names, default="forward_kl")
    args = parser.parse_args(argv)
    divergence = args.divergence
    found = []
    try:
        original, batch, vocab = load(args)
        teacher, student = loss_rows(original, batch, vocab), copy.deepcopy(original)
        for kl in KLS:
            rows, reached = student_at(kl, student, original, batch, teacher)
            want = exact(rows, teacher, divergence)
            results = {
                "tile fp16": stored(rows, teacher, divergence, "tile fp16"),
                "whole bf16": stored(rows, teacher, divergence, "whole bf16"),
                "linear_kl": by_linear_kl(rows, teacher, divergence),
            }
            for form, got in results.items():
                found.append({"KL": reached} | errors(form, got, want))
    except UserError as e:
        print(e, file=sys.stderr)
        return 2
    print(f"{len(teacher.hidden_ND)} trained positions, {vocab:,} ids, {divergence}")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
