"""Evaluation inside a run, on validation examples: loss, greedy answers, distance to the teacher.

Legend: N loss rows, n rows of a chunk, D hidden, V vocabulary.
"""

import dataclasses
import itertools

import numpy as np
import torch

from data.batch import Document, GlobalBatch, Metrics
from data.dataset import Dataset
from data.tasks import TASKS, Example, grade, grade_all
from kernels.chunk import accumulate_dtype, default_chunk_rows, product
from losses.kd import DIVERGENCES
from losses.sft import sft_loss
from model import parallel
from model.generate import Completion, generate
from model.transformer import Transformer
from progress import Halt, Progress, go_on
from rl.logprobs import last_states
from rl.sample import sample_line

COMPARED = 100  # validation prompts on which a teacher and its student are compared
LISTED = 16  # likeliest ids of either, whose overlap is measured
POSITIONS = (0, 8, 16, 32, 64, 128)  # where the buckets of the per-position divergence begin


@dataclasses.dataclass
class Validation:
    """The evaluations of one run. vocab: how many ids student and teacher share.

    rank, world: which of the examples are this process's. halt: raises Halted, between two parts of
    an evaluation, when a signal came.
    """

    dataset: Dataset
    stop_ids: list[int]
    micro_batch_tokens: int
    max_new_tokens: int
    teacher: Transformer | None = None
    vocab: int = 0
    rank: int = 0
    world: int = 1
    halt: Halt = go_on

    @torch.no_grad()
    def run(self, model: Transformer) -> tuple[dict[str, float], list[dict]]:
        """Evaluate a model. Returns (metrics, samples), over all ranks.

        The loss is in nats per trained token. Where the examples have answers there is the accuracy
        of greedy ones; with a teacher there are the measures of `compare`, on what the teacher and
        on what the student answers to the same prompts. What one rank raises all of them raise.
        """
        graded = [e for e in self.dataset.validation if e.answer is not None and e.task in TASKS]
        examples = graded[self.rank :: self.world]
        prompts = [self.dataset.formatter.prompt(e) for e in examples]
        model.eval()
        with parallel.as_one():
            losses = self.loss(model)
            answers = self.generate(model, prompts, self.dataset.formatter.tokenizer.size)
        metrics = _means(losses)
        samples = self.grade(examples, prompts, answers)
        if samples:
            for name in ("lenient", "stopped"):
                metrics[name] = sum(sample[name] for sample in samples) / len(samples)
            metrics["problems"] = len(samples)
            metrics["accuracy"] = sum(sample["correct"] for sample in samples) / len(samples)
        with parallel.as_one():
            distances = self.divergence(model, prompts, answers)
        metrics |= _means(distances)
        model.train()
        label = self.dataset.label
        return {f"eval/{label}/{name}": value for name, value in metrics.items()}, samples

    def loss(self, model: Transformer) -> Metrics:
        documents = self.dataset.validation_documents()[self.rank :: self.world]
        total = count = 0.0
        progress = self.progress("validation loss", len(documents), "examples")
        for micro in GlobalBatch(documents).split(self.micro_batch_tokens):
            moved = micro.to(model.head_VD.device)
            loss_sum, _ = sft_loss(last_states(model, moved), model.head_VD, None, moved)
            total, count = total + float(loss_sum), count + micro.normalizer
            progress.add(len(micro.documents))
        return {"loss": (total, count)}

    def generate(self, model: Transformer, prompts: list, vocab: int) -> list[Completion]:
        progress = self.progress("validation", len(prompts), "answers")
        return generate(
            model, prompts, self.max_new_tokens, self.stop_ids, vocab=vocab, progress=progress
        )

    def progress(self, what: str, total: int, unit: str) -> Progress:
        """Of a part of an evaluation, at which a signal to stop is looked at."""
        return Progress(what, total, unit, self.rank == 0, self.halt)

    def grade(
        self, examples: list[Example], prompts: list, answers: list[Completion]
    ) -> list[dict]:
        """Lines of samples.jsonl, over all ranks, in the order of the examples."""
        decode = self.dataset.formatter.tokenizer.decode
        texts = [
            decode(answer.tokens, skip_special=True, before=prompt)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        items = list(zip(examples, texts, answers, strict=True))
        with parallel.as_one():
            own = grade_all(_sample_line, items, self.halt)
        by_rank = itertools.zip_longest(*parallel.gather(own))
        return [line for lines in by_rank for line in lines if line]

    def divergence(self, model: Transformer, prompts: list, answers: list[Completion]) -> Metrics:
        """The measures of `compare` on the teacher's and on the student's answers."""
        if self.teacher is None:
            return {}
        some = prompts[: -(-COMPARED // self.world)]
        sums = {}
        teachers = self.generate(self.teacher, some, self.vocab)
        for name, completions in (("on_teacher", teachers), ("on_student", answers)):
            pairs = zip(some, completions, strict=False)
            documents = [Document.of_completion(prompt, c.tokens) for prompt, c in pairs]
            limit, halt = self.micro_batch_tokens, self.halt
            found = compare(model, self.teacher, documents, self.vocab, limit, halt)
            sums |= {f"{name}/{measure}": value for measure, value in found.items()}
        return sums


@torch.no_grad()
def compare(
    model: Transformer,
    teacher: Transformer,
    documents: list[Document],
    vocab: int,
    micro_batch_tokens: int,
    halt: Halt = go_on,
) -> Metrics:
    """Compare the next-token distributions of two models over the trained positions.

    At temperature 1, in nats: forward and reverse KL, both by position in the answer, too; how
    often both have the same likeliest token; which share of the LISTED likeliest ids they have in
    common, and the mass of these under either (Li et al., arXiv 2604.13016, overlap ratio and
    overlap mass); both entropies; and as "half_gradient" the smallest share of an answer's tokens
    that has half of its gradient: of Σ ‖p_s − p_t‖, the forward KL's at the logits. Means per
    token, the last one per answer.
    """
    device = model.head_VD.device
    sums: Metrics = {}
    total, speaks = len(documents), parallel.speaks()
    progress = Progress("teacher and student", total, "answers", speaks, halt)
    for micro in GlobalBatch(documents).split(max([micro_batch_tokens, *map(len, documents)])):
        positions = [np.arange(np.count_nonzero(d.weights)) for d in micro.documents]
        bucket_N = np.searchsorted(POSITIONS, np.concatenate(positions), side="right") - 1
        moved = micro.to(device)
        student_ND = moved.select(last_states(model, moved))
        teacher_ND = moved.select(last_states(teacher, moved))
        step, gradients = default_chunk_rows(vocab, len(bucket_N), device, models=8), []
        for lo in range(0, len(bucket_N), step):
            rows = slice(lo, lo + step)
            student_nV = _log_probs(model, student_ND[rows], vocab)
            teacher_nV = _log_probs(teacher, teacher_ND[rows], vocab)
            values = {
                "forward_kl": DIVERGENCES["forward_kl"](student_nV, teacher_nV, 0.0),
                "reverse_kl": DIVERGENCES["reverse_kl"](student_nV, teacher_nV, 0.0),
                "top1": student_nV.argmax(1) == teacher_nV.argmax(1),
                "entropy": -(student_nV.exp() * student_nV).sum(1),
                "teacher_entropy": -(teacher_nV.exp() * teacher_nV).sum(1),
            } | overlap(student_nV, teacher_nV)
            gradients.append((student_nV.exp() - teacher_nV.exp()).norm(dim=1).cpu())
            for i in np.unique(bucket_N[rows]):
                in_bucket_n = torch.from_numpy(bucket_N[rows] == i).to(device)
                for kl in ("forward_kl", "reverse_kl"):
                    values[f"{kl}_from_{POSITIONS[i]}"] = values[kl][in_bucket_n]
            _add(sums, values)
        if gradients:
            lengths = [len(p) for p in positions if len(p)]
            halves = [half_share(own_n) for own_n in torch.cat(gradients).split(lengths)]
            _add(sums, {"half_gradient": torch.tensor(halves, dtype=torch.float64)})
        progress.add(len(micro.documents))
    return sums


def _add(sums: Metrics, values: dict[str, torch.Tensor]) -> None:
    for name, value_n in values.items():
        total, count = sums.get(name, (0.0, 0))
        sums[name] = (total + float(value_n.double().sum()), count + len(value_n))


def overlap(student_nV: torch.Tensor, teacher_nV: torch.Tensor) -> dict[str, torch.Tensor]:
    """Share of the likeliest ids that both have, and the mass of these under either."""
    k = min(LISTED, student_nV.shape[1])
    ids_nk = student_nV.topk(k, 1).indices
    other_nk1 = teacher_nV.topk(k, 1).indices.unsqueeze(2)
    common_nk = (ids_nk.unsqueeze(1) == other_nk1).any(1).to(student_nV.dtype)
    return {
        "overlap": common_nk.mean(1),
        "overlap_mass": (student_nV.gather(1, ids_nk).exp() * common_nk).sum(1),
        "overlap_teacher_mass": (teacher_nV.gather(1, ids_nk).exp() * common_nk).sum(1),
    }


def half_share(size_n: torch.Tensor) -> float:
    """The smallest share of some tokens whose sizes sum to half of all."""
    below_n = size_n.double().sort(descending=True).values.cumsum(0)
    return (1 + int((below_n < below_n[-1] / 2).sum())) / len(size_n)


def _log_probs(model: Transformer, hidden_nD: torch.Tensor, vocab: int) -> torch.Tensor:
    head_DV = model.head_VD[:vocab].to(hidden_nD.dtype).t()
    shape, dtype = (len(hidden_nD), vocab), accumulate_dtype(hidden_nD)
    out_nV = torch.empty(shape, dtype=dtype, device=hidden_nD.device)
    return torch.log_softmax(product(hidden_nD, head_DV, out_nV), 1)


def _sample_line(example: Example, text: str, answer: Completion) -> dict:
    return sample_line(example, text, grade(example, text), len(answer.tokens), answer.stopped)


def _means(sums: Metrics) -> dict[str, float]:
    """Over all ranks; a measure of nothing is left out."""
    reduced = parallel.reduce_metrics(sums)
    return {name: total / count for name, (total, count) in reduced.items() if count}
