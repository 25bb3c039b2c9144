"""The evaluation inside a run: loss and greedy answers on examples that were held out of the training data, and how far a teacher is."""

import itertools

import numpy as np
import torch

from data.batch import Batch, Document
from data.tasks import TASKS, grade, grade_all
from kernels.attention import PackedAttention
from kernels.chunk import accumulate_dtype, default_chunk_rows, product
from model import parallel
from model.generate import generate

COMPARED = 100  # held-out prompts on which a teacher and its student are compared
POSITIONS = (0, 8, 16, 32, 64, 128)  # where the buckets of the per-position divergence begin


@torch.no_grad()
def evaluate(
    model,
    dataset,
    stop_ids,
    loss_fn,
    micro_batch_tokens,
    max_new_tokens,
    rank=0,
    world=1,
    teacher=None,
    vocab=None,
):
    """Held-out loss (nats per trained token) and, where the examples have answers, greedy accuracy; against a teacher the measures of
    `compare`, on what the teacher and what the student answer to the same prompts. Returns (metrics, samples)."""
    model.eval()
    device, formatter = model.head_VD.device, dataset.formatter
    documents = dataset.validation_documents()[rank::world]
    total = count = 0.0
    for micro in Batch.pack(documents).split(micro_batch_tokens) if documents else ():
        micro = micro.to(device)
        hidden_TD = model(micro.tokens_T, micro.positions_T, PackedAttention(micro.lengths, device))
        loss_sum, _ = loss_fn(hidden_TD, model.head_VD, None, micro)
        total, count = total + float(loss_sum), count + micro.normaliser
    examples = [e for e in dataset.validation if e.answer is not None and e.task in TASKS][
        rank::world
    ]
    prompts = [formatter.prompt(e) for e in examples]
    answers = generate(model, prompts, max_new_tokens, stop_ids, vocab=formatter.tokenizer.size)
    samples = grade_all(
        _sample,
        [
            (e, formatter.tokenizer.decode(a.tokens, skip_special=True), a)
            for e, a in zip(examples, answers)
        ],
    )
    sums = {}
    if teacher:
        few = prompts[: -(-COMPARED // world)]
        theirs = generate(teacher, few, max_new_tokens, stop_ids, vocab=vocab)
        for author, written in (("teacher", theirs), ("student", answers)):
            batch = Batch.pack(document(p, a.tokens) for p, a in zip(few, written))
            sums |= {
                f"on_{author}/{k}": v
                for k, v in compare(model, teacher, batch, vocab, micro_batch_tokens).items()
            }
    model.train()
    samples = [
        s for each in itertools.zip_longest(*parallel.gather(samples)) for s in each if s
    ]  # in the examples' order
    total, count = parallel.all_reduce_sum([total, count], device)
    metrics = {"loss": total / count} if count else {}
    if n := len(samples):
        metrics |= {
            name: sum(s[name] for s in samples) / n for name in ("correct", "lenient", "stopped")
        } | {"problems": n}
        metrics["accuracy"] = metrics.pop("correct")
    metrics |= {
        name: total / count
        for name, (total, count) in parallel.reduce_metrics(sums).items()
        if count
    }
    return {f"eval/{dataset.label}/{name}": value for name, value in metrics.items()}, samples


@torch.no_grad()
def compare(model, teacher, batch, vocab, micro_batch_tokens):
    """{measure: (sum, count)} over the loss rows of a batch, at temperature 1 in nats: forward and reverse KL, how often both have the same
    likeliest token, both entropies, and the forward KL by position in the answer."""
    sums = {}
    for micro in batch.split(max([micro_batch_tokens, *batch.lengths])):
        position = [i for d in micro.documents for i in range(np.count_nonzero(d.weights))]
        moved = micro.to(model.head_VD.device)
        attend = PackedAttention(micro.lengths, model.head_VD.device)
        hidden = [
            moved.select(m(moved.tokens_T, moved.positions_T, attend)) for m in (model, teacher)
        ]
        for lo in range(
            0, len(position), step := max(1, default_chunk_rows(vocab, attend.device) // 8)
        ):
            ls, lt = (
                torch.log_softmax(_logits(h[lo : lo + step], m.head_VD[:vocab]), 1)
                for h, m in zip(hidden, (model, teacher))
            )
            values = {
                "forward_kl": (lt.exp() * (lt - ls)).sum(1),
                "reverse_kl": (ls.exp() * (ls - lt)).sum(1),
                "top1": ls.argmax(1) == lt.argmax(1),
            }
            values |= {
                "entropy": -(ls.exp() * ls).sum(1),
                "teacher_entropy": -(lt.exp() * lt).sum(1),
            }
            bucket = np.searchsorted(POSITIONS, position[lo : lo + step], side="right") - 1
            for i in np.unique(bucket):
                values[f"forward_kl_from_{POSITIONS[i]}"] = values["forward_kl"][
                    torch.from_numpy(bucket == i).to(ls.device)
                ]
            for name, x in values.items():
                old = sums.get(name, (0.0, 0))
                sums[name] = (old[0] + float(x.double().sum()), old[1] + len(x))
    return sums


def _logits(hidden_nD, head_VD):
    out_nV = torch.empty(
        len(hidden_nD), len(head_VD), dtype=accumulate_dtype(hidden_nD), device=hidden_nD.device
    )
    return product(hidden_nD, head_VD.to(hidden_nD.dtype).t(), out_nV)


def document(prompt, completion):
    tokens = np.array([*prompt, *completion], np.int32)
    return Document(tokens, (np.arange(len(tokens)) >= len(prompt)).astype(np.float64))


def _sample(example, text, answer):
    verdict = grade(example, text)
    return dict(
        question=example.question,
        gold=example.answer,
        text=text,
        correct=verdict.strict,
        lenient=verdict.lenient,
        parsed=verdict.parsed,
        tokens=len(answer.tokens),
        stopped=answer.stopped,
    )
