"""The evaluation inside a run: loss and greedy answers on examples that were held out of the training data."""

import itertools

import torch

from data.batch import Batch
from data.tasks import TASKS, grade
from kernels.attention import PackedAttention
from model import parallel
from model.generate import generate


@torch.no_grad()
def evaluate(model, dataset, stop_ids, loss_fn, micro_tokens, max_new_tokens, rank=0, world=1):
    """Held-out loss (nats per trained token) and, where the examples have answers, greedy accuracy. Returns (metrics, samples)."""
    model.eval()
    device, formatter = model.head_VD.device, dataset.formatter
    documents = dataset.held_out_documents()[rank::world]
    total = count = 0.0
    for micro in Batch.pack(documents).split(micro_tokens) if documents else ():
        micro = micro.to(device)
        hidden_TD = model(micro.tokens_T, micro.positions_T, PackedAttention(micro.lengths, device))
        loss_sum, _ = loss_fn(hidden_TD, model.head_VD, None, micro)
        total, count = total + float(loss_sum), count + micro.normaliser
    examples = [e for e in dataset.held_out if e.answer is not None and e.task in TASKS][rank::world]
    answers = generate(model, [formatter.prompt(e) for e in examples], max_new_tokens, stop_ids, vocab=formatter.tokenizer.size)
    samples = [_sample(e, formatter.tokenizer.decode(a.tokens, skip_special=True), a) for e, a in zip(examples, answers)]
    model.train()
    samples = [s for each in itertools.zip_longest(*parallel.gather(samples)) for s in each if s]  # in the examples' order
    total, count = parallel.all_reduce_sum([total, count], device)
    metrics = {"loss": total / count} if count else {}
    if n := len(samples):
        metrics |= {name: sum(s[name] for s in samples) / n for name in ("correct", "lenient", "stopped")} | {"problems": n}
        metrics["accuracy"] = metrics.pop("correct")
    return {f"eval/{dataset.label}/{name}": value for name, value in metrics.items()}, samples


def _sample(example, text, answer):
    verdict = grade(example, text)
    return dict(question=example.messages[-2]["content"], gold=example.answer, text=text, correct=verdict.strict, lenient=verdict.lenient,
                parsed=verdict.parsed, tokens=len(answer.tokens), stopped=answer.stopped)  # fmt: skip
