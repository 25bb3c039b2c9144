"""Documents, the global batch of one step, and the packed micro-batches that a model reads.

There is no padding: documents are packed end to end, and each token has a weight of its own.
Legend: T packed tokens, N loss rows (positions whose weight is not 0), k ids of a teacher's top-k,
B = k + 1 buckets: these ids, and one for all others.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from errors import UserError

Metrics = dict[str, tuple[Any, Any]]  # name -> (sum, count), as numbers or tensors


@dataclasses.dataclass
class Document:
    """A sequence. `weights[i]` is the weight of predicting `tokens[i]`: 0 on a prompt's tokens.

    Args:
        fields: More numbers per token (fp64, aligned like `weights`): "advantage", "old_logp",
            "ref_logp", "sampler_logp", "tis_weight".
        normalizer_weight: What it adds to the normalizer; None: the sum of its weights.
        teacher_topk: For each position with a weight, the teacher's k likeliest ids, and the
            log-probs of these and of all other ids together; or k draws from it, and no numbers
            (data/teacher_cache.py).
        teacher: Which of the run's teachers scores it.
        teacher_tokens: What that teacher reads in place of `tokens`: a prompt of its own and the
            same completion; None: the same.
    """

    tokens: np.ndarray
    weights: np.ndarray
    fields: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    normalizer_weight: float | None = None
    teacher_topk: tuple[np.ndarray, np.ndarray] | None = None
    teacher: int = 0
    teacher_tokens: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def of_completion(cls, prompt: Sequence[int], completion: Sequence[int]) -> "Document":
        """A prompt and what was written after it; the latter alone is trained on."""
        tokens = np.array([*prompt, *completion], np.int32)
        return cls(tokens, (np.arange(len(tokens)) >= len(prompt)).astype(np.float64))

    @property
    def completion_start(self) -> int:
        """Where its last trained turn begins: what stands from there on is trained on."""
        return int(np.flatnonzero(self.weights == 0).max(initial=-1)) + 1

    def taught(self, teacher: int, prompt: Sequence[int] | None) -> "Document":
        """The document as that teacher scores it, who sees `prompt` before the completion."""
        seen = None
        if prompt is not None:
            seen = np.array([*prompt, *self.tokens[self.completion_start :]], np.int32)
        return dataclasses.replace(self, teacher=teacher, teacher_tokens=seen)

    def for_teacher(self) -> "Document":
        """What its teacher reads, with the same trained tokens at the end."""
        if self.teacher_tokens is None:
            return self
        weights = np.zeros(len(self.teacher_tokens))
        common = min(len(weights), len(self))
        weights[-common:] = self.weights[-common:]
        return Document(self.teacher_tokens, weights)


def consecutive(documents: Sequence[Document], limit: int) -> Iterator[list[Document]]:
    """The documents in their order, in parts of at most `limit` tokens (a longer one is alone)."""
    part, tokens = [], 0
    for document in documents:
        if part and tokens + len(document) > limit:
            yield part
            part, tokens = [], 0
        part.append(document)
        tokens += len(document)
    if part:
        yield part


def normalizer(documents: Iterable[Document]) -> float:
    """What divides the loss: the sum of all weights, or of `normalizer_weight` where it is set.

    That is the number of tokens for a token mean, and of sequences for a sequence mean. Losses are
    sums, divided once by the normalizer of the global batch, summed over ranks.
    """
    total = 0.0
    for d in documents:
        own = d.normalizer_weight
        total += d.weights.sum(dtype=np.float64) if own is None else own
    return float(total)


@dataclasses.dataclass
class Batch:
    """Packed documents. Position t predicts target_T[t] with weight_T[t]; rows_N carry loss."""

    documents: list[Document]
    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    cu_seqlens: torch.Tensor
    target_T: torch.Tensor
    weight_T: torch.Tensor
    rows_N: torch.Tensor
    fields: dict[str, torch.Tensor]
    normalizer: float
    topk_ids_Nk: torch.Tensor | None = None
    topk_logp_NB: torch.Tensor | None = None

    @property
    def lengths(self) -> list[int]:
        return [len(d) for d in self.documents]

    @classmethod
    def pack(cls, documents: Iterable[Document]) -> "Batch":
        """Pack documents end to end. A field that a document lacks is 0 there."""
        documents = list(documents)
        ends = np.cumsum([0, *map(len, documents)])
        tokens_T = _concatenate([d.tokens for d in documents], torch.int64)
        weight_T = _predicted(_concatenate([d.weights for d in documents], torch.float64), ends)
        fields = {}
        for name in dict.fromkeys(name for d in documents for name in d.fields):
            values = [d.fields.get(name, np.zeros(len(d))) for d in documents]
            fields[name] = _predicted(_concatenate(values, torch.float64), ends)
        batch = cls(
            documents,
            tokens_T,
            positions_T=_concatenate([np.arange(len(d)) for d in documents], torch.int64),
            cu_seqlens=torch.from_numpy(ends).int(),
            target_T=_predicted(tokens_T, ends),
            weight_T=weight_T,
            rows_N=weight_T.nonzero().squeeze(1),
            fields=fields,
            normalizer=normalizer(documents),
        )
        topk = [d.teacher_topk for d in documents if d.teacher_topk]
        if topk and len(topk) == len(documents):
            ids, logp = zip(*topk, strict=True)
            batch.topk_ids_Nk = torch.from_numpy(np.concatenate(ids)).long()
            batch.topk_logp_NB = torch.from_numpy(np.concatenate(logp)).float().log_softmax(1)
        return batch

    def to(self, device: torch.device | str) -> "Batch":
        """A copy with its tensors on `device`; asynchronous from pinned memory on a GPU."""
        if torch.device(device).type == "cpu":
            return self

        moved = dataclasses.replace(self, fields=dict(self.fields))
        for values in (vars(moved), moved.fields):
            for name, x in values.items():
                if isinstance(x, torch.Tensor):
                    values[name] = x.pin_memory().to(device, non_blocking=True)
        return moved

    def select(self, x_T: torch.Tensor) -> torch.Tensor:
        """The loss rows of a [T, …] tensor: rows first, head second."""
        return x_T.index_select(0, self.rows_N)

    @property
    def teacher(self) -> int:
        """Which teacher scores all its documents: `GlobalBatch.split` sees to that."""
        return self.documents[0].teacher


@dataclasses.dataclass
class GlobalBatch:
    """This rank's documents of one optimizer step, not packed yet.

    metrics and samples (lines of samples.jsonl) are only logged.
    """

    documents: list[Document]
    metrics: Metrics = dataclasses.field(default_factory=dict)
    samples: list[dict] = dataclasses.field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        return [len(d) for d in self.documents]

    @property
    def loss_rows(self) -> int:
        return sum(int(np.count_nonzero(d.weights)) for d in self.documents)

    @property
    def normalizer(self) -> float:
        return normalizer(self.documents)

    def has_field(self, name: str) -> bool:
        return any(name in d.fields for d in self.documents)

    def for_teacher(self, teacher: int) -> "GlobalBatch":
        """What this teacher reads of it."""
        return GlobalBatch([d.for_teacher() for d in self.documents if d.teacher == teacher])

    def split(self, micro_batch_tokens: int) -> Iterator[Batch]:
        """Pack whole documents into micro-batches of at most micro_batch_tokens tokens each.

        Those of a micro-batch have the same teacher. First-fit decreasing: at most 11/9 of the
        fewest micro-batches. Data that is too long was refused when it was read; a document that is
        too long here is a UserError.
        """
        bins: list[list[Document]] = []
        free, teacher = np.zeros((2, len(self.documents)), dtype=np.int64)  # of each bin
        for d in sorted(self.documents, key=len, reverse=True):
            if len(d) > micro_batch_tokens:
                raise UserError(
                    f"a document of {len(d)} tokens does not fit "
                    f"micro_batch_tokens={micro_batch_tokens}; raise --micro_batch_tokens"
                )
            fits = (free[: len(bins)] >= len(d)) & (teacher[: len(bins)] == d.teacher)
            i = int(fits.argmax()) if fits.any() else len(bins)
            if i == len(bins):
                bins.append([])
                free[i], teacher[i] = micro_batch_tokens, d.teacher
            bins[i].append(d)
            free[i] -= len(d)
        yield from map(Batch.pack, bins)


def per_token(document: Document) -> Document:
    """Every trained token counts the same over the whole global batch."""
    return document


def per_sequence(document: Document) -> Document:
    """Every sequence counts the same: its trained tokens share a weight of 1 between them."""
    trained = max(1, np.count_nonzero(document.weights))
    return dataclasses.replace(document, weights=document.weights / trained)


def constant_length(document: Document, length: int) -> Document:
    """Every token weighs 1/length, and the normalizer counts sequences.

    Long wrong answers are then not cheaper than short ones (Dr. GRPO, arXiv 2503.20783). A sequence
    without loss (a masked one) counts in no divisor, here as in the other two means.
    """
    counts, weights = float(document.weights.any()), document.weights / length
    return dataclasses.replace(document, weights=weights, normalizer_weight=counts)


def uniforms(documents: Iterable[Document], count: int, seed: int) -> torch.Tensor:
    """Random numbers [N, count] in [0, 1) for the positions with a weight, fp64.

    Those of a position are (u + i) / count with one random u (systematic sampling): on average what
    is drawn at them comes as often as at independent ones, but it is never off by a whole draw, so
    that the variance is far lower. They depend on the seed, what the teacher reads and the position
    alone, not on what is packed beside the document, nor on when.
    """
    drawn = [np.zeros((0, 1))]
    for d in documents:
        tokens = np.ascontiguousarray(d.for_teacher().tokens, np.int64)
        digest = hashlib.sha256(tokens.tobytes()).digest()
        generator = np.random.default_rng([seed, int.from_bytes(digest[:8], "little")])
        drawn.append(generator.random((np.count_nonzero(d.weights), 1)))
    return torch.from_numpy((np.concatenate(drawn) + np.arange(count)) / count)


WEIGHTINGS = {"token": per_token, "sequence": per_sequence}


def _concatenate(parts: list, dtype: torch.dtype) -> torch.Tensor:
    """One [T] tensor of arrays or tensors."""
    return torch.cat([torch.empty(0, dtype=dtype), *map(torch.as_tensor, parts)]).to(dtype)


def _predicted(x_T: torch.Tensor, ends: np.ndarray) -> torch.Tensor:
    """Each token's value at the position that predicts it; 0 at a document's last one."""
    x_T = x_T.roll(-1)
    x_T[torch.from_numpy(ends[1:] - 1)] = 0
    return x_T
