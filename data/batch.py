"""The one Batch: documents packed end to end, one weight per token, no padding path.

Legend: T packed tokens, N loss rows (positions whose weight is not 0).
"""

import dataclasses

import numpy as np
import torch

from errors import UserError


@dataclasses.dataclass
class Document:
    """One sequence. `weights[i]` is the weight of predicting `tokens[i]`: 0 on a prompt token; the first is never predicted.

    `fields` hold one float per token, aligned like `weights`: "advantage", "sampler_logp", "old_logp", "ref_logp".
    share: what it adds to the normaliser; None: the sum of its weights. listed: a teacher's likeliest ids and their log-probs for every
    position whose weight is not 0 (arrays, one row each; data/teacher_cache.py).
    """

    tokens: np.ndarray
    weights: np.ndarray
    fields: dict = dataclasses.field(default_factory=dict)
    share: float | None = None
    listed: tuple | None = None

    def __len__(self):
        return len(self.tokens)


@dataclasses.dataclass
class Batch:
    """Packed documents. Position t predicts target_T[t] with weight_T[t]; rows_N are the positions that carry loss.

    normaliser: the sum of all weights (tokens for a token mean, sequences for a sequence mean) unless documents say otherwise; losses
    are sums and are divided once, by the normaliser summed over ranks. metrics ({name: (sum, count)}) and samples come from a source
    that has something to tell, and are only logged.
    """

    documents: list
    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    cu_seqlens: torch.Tensor
    target_T: torch.Tensor
    weight_T: torch.Tensor
    rows_N: torch.Tensor
    fields: dict
    normaliser: float
    topk_ids_Nk: torch.Tensor | None = None
    topk_logp_NB: torch.Tensor | None = None
    metrics: dict = dataclasses.field(default_factory=dict)
    samples: list = dataclasses.field(default_factory=list)

    @property
    def lengths(self):
        return [len(d) for d in self.documents]

    @classmethod
    def pack(cls, documents):
        documents = list(documents)
        names = {name for d in documents for name in d.fields}
        target, weight, position = [], [], []
        fields = {name: [] for name in names}
        for d in documents:
            target.append(_shift(d.tokens))
            weight.append(_shift(d.weights))
            position.append(np.arange(len(d)))
            for name in names:
                fields[name].append(_shift(d.fields.get(name, np.zeros(len(d)))))
        weight_T = _concat(weight, np.float64)
        listed = {}
        if documents and all(d.listed for d in documents):
            listed["topk_ids_Nk"] = torch.from_numpy(
                np.concatenate([d.listed[0] for d in documents]).astype(np.int64)
            )
            listed["topk_logp_NB"] = torch.from_numpy(
                np.concatenate([d.listed[1] for d in documents]).astype(np.float32)
            ).log_softmax(1)
        return cls(
            documents,
            torch.from_numpy(_concat([d.tokens for d in documents], np.int64)),
            torch.from_numpy(_concat(position, np.int64)),
            torch.tensor([0, *np.cumsum([len(d) for d in documents])], dtype=torch.int32),
            torch.from_numpy(_concat(target, np.int64)),
            torch.from_numpy(weight_T),
            torch.from_numpy(weight_T.nonzero()[0]),
            {name: torch.from_numpy(_concat(f, np.float64)) for name, f in fields.items()},
            float(
                sum(
                    d.weights.sum(dtype=np.float64) if d.share is None else d.share
                    for d in documents
                )
            ),
            **listed,
        )

    def split(self, micro_batch_tokens):
        """Micro-batches of whole documents, at most micro_batch_tokens tokens each.

        First-fit decreasing: the fullest bins that a simple rule finds. Documents longer than micro_batch_tokens were refused
        when the data was read; one that arrives here all the same is an error.
        """
        bins = []
        for d in sorted(self.documents, key=lambda d: -len(d)):
            if len(d) > micro_batch_tokens:
                raise UserError(
                    f"a document of {len(d)} tokens does not fit micro_batch_tokens={micro_batch_tokens}; raise --micro_batch_tokens"
                )
            home = next((b for b in bins if b[0] + len(d) <= micro_batch_tokens), None)
            if home is None:
                bins.append(home := [0, []])
            home[0] += len(d)
            home[1].append(d)
        return [Batch.pack(documents) for _, documents in bins]

    def to(self, device):
        """A copy with its tensors on `device`; asynchronous from pinned memory on a GPU."""
        if torch.device(device).type == "cpu":
            return self
        move = lambda x: x.pin_memory().to(device, non_blocking=True)
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        moved = {k: move(v) if isinstance(v, torch.Tensor) else v for k, v in tensors.items()}
        return Batch(**moved | {"fields": {k: move(v) for k, v in self.fields.items()}})

    def select(self, x_T):
        """The loss rows of a [T, …] tensor: rows first, head second."""
        return x_T.index_select(0, self.rows_N)


def token_mean(document):
    """Every trained token counts the same over the whole global batch."""
    return document


def sequence_mean(document):
    """Every sequence counts the same: its trained tokens share a weight of 1 (of what its turns weigh, where that is said)."""
    trained = np.count_nonzero(document.weights)
    return (
        dataclasses.replace(document, weights=document.weights / trained) if trained else document
    )


def constant_length(document, length):
    """Every token weighs 1/length and every sequence counts, so that long wrong answers are not cheaper (Dr. GRPO, arXiv 2503.20783).

    A sequence without loss (a masked one) counts in no divisor, here as in the other two means.
    """
    counts = float(document.weights.any())
    return dataclasses.replace(document, weights=document.weights / length, share=counts)


WEIGHTINGS = {"token": token_mean, "sequence": sequence_mean}


def _shift(x):
    return np.append(x[1:], x.dtype.type(0))[: len(x)]


def _concat(parts, dtype):
    return np.concatenate([np.asarray(p, dtype) for p in parts]) if parts else np.zeros(0, dtype)
