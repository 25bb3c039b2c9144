"""Log-probs of what was sampled, from the trainer's own forward pass, written back onto the documents."""

import numpy as np
import torch

from data.batch import Batch
from kernels.attention import PackedAttention
from kernels.linear_logprob import linear_logprob
from kernels.linear_topk import topk_logprobs


@torch.no_grad()
def add_logprobs(documents, name, model, *, temperature, vocab, micro_batch_tokens, device):
    """documents[i].fields[name] = log p(token) in nats under softmax(logits / temperature) over `vocab` ids; 0 where the weight is 0."""
    for micro in Batch.pack(documents).split(micro_batch_tokens):
        moved = micro.to(device)
        hidden_TD = model(moved.tokens_T, moved.positions_T, PackedAttention(micro.lengths, device))
        target_N, weight_N = moved.select(moved.target_T), moved.select(moved.weight_T)
        _, rows = linear_logprob(
            moved.select(hidden_TD),
            model.head_VD,
            target_N,
            weight_N,
            lambda logp_N, *_: logp_N,
            temperature=temperature,
            vocab=vocab,
        )
        logp_T = np.zeros(len(micro.tokens_T) + 1)
        logp_T[micro.rows_N.numpy() + 1] = (
            rows["logp"].double().cpu().numpy()
        )  # position t predicts token t + 1
        for document, start in zip(micro.documents, micro.cu_seqlens.tolist()):
            document.fields[name] = logp_T[start : start + len(document)].copy()


def kl_penalty(document, beta):
    """beta · Σ_t (log p(token) − log p_ref(token)) of a sample, in nats: what the reward loses.

    The sum over a sample's tokens is the log-ratio of the whole sequence: its mean is the KL of the
    policy's sequences from the reference's, and as a reward it has that KL's gradient (k1; see
    `losses.grpo.KL_ESTIMATORS` for why no other estimate may stand here).
    """
    return beta * float((document.fields["old_logp"] - document.fields["ref_logp"]).sum())


@torch.no_grad()
def teacher_topk(documents, model, k, *, temperature, vocab, micro_batch_tokens, device):
    """Yields (ids_Rk, logp_RB) of the trained positions of the documents, in their order: what data/teacher_cache.py keeps."""
    lo = 0
    while lo < len(documents):
        hi, total = lo, 0
        while hi < len(documents) and (
            hi == lo or total + len(documents[hi]) <= micro_batch_tokens
        ):
            total, hi = total + len(documents[hi]), hi + 1
        micro = Batch.pack(documents[lo:hi])
        moved = micro.to(device)
        hidden_TD = model(moved.tokens_T, moved.positions_T, PackedAttention(micro.lengths, device))
        ids_Rk, logp_RB = topk_logprobs(
            moved.select(hidden_TD), model.head_VD, k, temperature=temperature, vocab=vocab
        )
        yield ids_Rk.cpu().numpy(), logp_RB.float().cpu().numpy()
        lo = hi


def add_correction(documents, how, cap, by_sequence=False):
    """fields["tis_weight"]: the ratio of the trainer's to the sampler's probability of a token (or, by_sequence, its geometric mean over the
    sample), where rounding made them differ: cut at `cap` ("truncate") or 0 outside [1/cap, cap] ("mask")."""
    for d in documents:
        gap = d.fields["old_logp"] - d.fields["sampler_logp"]
        if by_sequence:
            gap = np.full(len(d), gap.sum() / max(1, np.count_nonzero(d.weights)))
        ratio = np.exp(gap)
        d.fields["tis_weight"] = (
            np.minimum(ratio, cap)
            if how == "truncate"
            else np.where((ratio <= cap) & (ratio >= 1 / cap), ratio, 0.0)
        )
