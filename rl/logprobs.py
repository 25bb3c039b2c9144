"""Log-probs of a document's tokens by the trainer's own forward pass, and what is made of them."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from data.batch import Batch, Document, GlobalBatch, consecutive, uniforms
from kernels.attention import PackedAttention
from kernels.linear_logprob import linear_logprob
from kernels.linear_topk import draw_ids, topk_logprobs
from losses.sft import cross_entropy
from model.transformer import Transformer
from progress import Progress
from rl.sample import RolloutConfig


def last_states(model: Transformer, batch: Batch) -> torch.Tensor:
    """The last hidden states [T, D] of a batch that is on the model's device."""
    attention = PackedAttention(batch.lengths, batch.tokens_T.device)
    return model(batch.tokens_T, batch.positions_T, attention)


@torch.no_grad()
def add_logprobs(batch: GlobalBatch, name: str, model: Transformer, config: RolloutConfig) -> None:
    """Set the field `name` of each document of a batch to the log-probs of its tokens, in nats.

    They are those of softmax(logits / temperature) over the vocabulary; 0 where the weight is 0.
    """
    size = len(batch.documents)
    progress = Progress("log-probs", size, "samples", config.rank == 0, config.halt)
    for micro in batch.split(config.micro_batch_tokens):
        moved = micro.to(model.head_VD.device)
        _, rows = linear_logprob(
            moved.select(last_states(model, moved)),
            model.head_VD,
            moved.select(moved.target_T),
            moved.select(moved.weight_T),
            cross_entropy,
            temperature=config.temperature,
            vocab=config.vocab_size,
        )
        logp_T = torch.zeros(len(micro.tokens_T) + 1, dtype=torch.float64)
        logp_T[micro.rows_N + 1] = rows["logp"].double().cpu()  # position t predicts token t + 1
        for document, logp in zip(micro.documents, logp_T[:-1].split(micro.lengths), strict=True):
            document.fields[name] = logp
        progress.add(len(micro.documents))


def kl_penalty(document: Document, beta: float) -> float:
    """beta · Σ_t (log p(token) − log p_ref(token)), in nats; subtracted from a sample's reward.

    The sum over a sample's tokens is the log-ratio of the whole sequence: its mean is the KL of the
    policy's sequences from the reference's, and as a reward it has that KL's gradient (k1; see
    `losses.grpo.KL_ESTIMATORS` for why no other estimate may stand here).
    """
    log_ratio = document.fields["old_logp"] - document.fields["ref_logp"]
    return beta * float(log_ratio.numpy().sum())


def add_tis_weights(document: Document, config: RolloutConfig) -> None:
    """Set the field "tis_weight": importance weights, where the sampler rounds in another way.

    The ratio of the trainer's to the sampler's probability of a token, or (tis_by_sequence) its
    geometric mean over the sample: cut at the cap ("truncate"), or 0 outside [1/cap, cap] ("mask",
    and "mask_sequence", which is always by sequence).
    """
    gap = (document.fields["old_logp"] - document.fields["sampler_logp"]).numpy()
    if config.tis_by_sequence:
        gap = np.full_like(gap, gap.sum() / max(1, np.count_nonzero(document.weights)))
    ratio, cap = np.exp(gap), config.tis_cap
    weight = np.minimum(ratio, cap)
    if config.tis != "truncate":
        weight = np.where((ratio <= cap) & (ratio >= 1 / cap), ratio, 0.0)
    document.fields["tis_weight"] = torch.from_numpy(weight)


@torch.no_grad()
def teacher_rows(
    documents: Sequence[Document], model: Transformer, micro_batch_tokens: int
) -> Iterator[tuple[list[Document], torch.Tensor]]:
    """Yield consecutive documents as the teacher reads them, and its hidden rows [N, C] of these.

    The rows are those of the trained positions. What is meant for the teacher may be longer than
    what the student reads.
    """
    for part in consecutive([d.for_teacher() for d in documents], micro_batch_tokens):
        batch = Batch.pack(part).to(model.head_VD.device)
        yield part, batch.select(last_states(model, batch))


@torch.no_grad()
def add_teacher_logprobs(
    documents: Sequence[Document], model: Transformer, config: RolloutConfig
) -> None:
    """Set the field "teacher_logp" of documents that this teacher scores (see `add_logprobs`)."""
    seen = [d.for_teacher() for d in documents]
    add_logprobs(GlobalBatch(seen), "teacher_logp", model, config)
    for document, view in zip(documents, seen, strict=True):
        logp = torch.zeros(len(document), dtype=torch.float64)
        common = min(len(document), len(view))
        logp[-common:] = view.fields["teacher_logp"][-common:]
        document.fields["teacher_logp"] = logp


@torch.no_grad()
def teacher_topk(
    documents: list[Document],
    model: Transformer,
    k: int,
    *,
    temperature: float,
    vocab: int,
    micro_batch_tokens: int,
    draws_seed: int | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (ids_Rk, logp_RB) of the R trained positions of consecutive documents.

    data/teacher_cache.py keeps them: B is k ids and one for all others together. With a seed the
    ids are k draws, without log-probs: B is 0.
    """
    for part, hidden_ND in teacher_rows(documents, model, micro_batch_tokens):
        if draws_seed is None:
            ids_Rk, logp_RB = topk_logprobs(
                hidden_ND, model.head_VD, k, temperature=temperature, vocab=vocab
            )
        else:
            uniform_Rk = uniforms(part, k, draws_seed).to(hidden_ND.device)
            ids_Rk = draw_ids(
                hidden_ND, model.head_VD, uniform_Rk, temperature=temperature, vocab=vocab
            )
            logp_RB = torch.empty(len(ids_Rk), 0)
        yield ids_Rk.cpu().numpy(), logp_RB.float().cpu().numpy()
