"""Divergence from a teacher that is known by its k likeliest tokens and the mass of all others, as one further bucket.

Without that bucket a top-k "KL" is no divergence: it ignores, or renormalises away, what the student puts elsewhere. With it the value is a
lower bound of the full one (data processing inequality), and exact at k = V. Legend: N rows, n rows of a chunk, V vocabulary, k listed.
"""

import math

import torch

from kernels.chunk import accumulate_dtype, blocks, chunked_head, default_chunk_rows, product


@torch.no_grad()
def topk_logprobs(hidden_ND, head_VD, k, *, temperature=1.0, vocab=None, chunk_rows=None):
    """The k likeliest ids and their log-probs (nats) under softmax(hidden @ head[:vocab]ᵀ / temperature): [N, k], and [N, k + 1] with that of
    all other ids together behind them (summed, not 1 − Σ p, which cancels where a teacher is certain)."""
    vocab = vocab or head_VD.shape[0]
    head_VD, chunk_rows = head_VD[:vocab].to(hidden_ND.dtype), chunk_rows or default_chunk_rows(vocab, hidden_ND.device)
    ids, logps = [], []
    for rows_nD in hidden_ND.split(chunk_rows) if len(hidden_ND) else ():
        logits = torch.empty(len(rows_nD), vocab, dtype=accumulate_dtype(hidden_ND), device=hidden_ND.device)
        logits = product(rows_nD, head_VD.t(), logits).div_(temperature)
        top_nk, id_nk = logits.topk(min(k, vocab), 1)
        ids.append(id_nk)
        total_n1 = logits.logsumexp(1, keepdim=True)
        tail_n1 = logits.scatter_(1, id_nk, float("-inf")).logsumexp(1, keepdim=True)
        logps.append(torch.cat((top_nk, tail_n1), 1) - total_n1)
    if not ids:
        return torch.empty(0, k, dtype=torch.long, device=hidden_ND.device), hidden_ND.new_empty(0, k + 1)
    return torch.cat(ids), torch.cat(logps)


def linear_topk_divergence(
    hidden_ND, head_VD, ids_Nk, teacher_logp_NB, weight_N, divergence, *, temperature=1.0, scale=1.0, logprob=None, vocab=None, chunk_rows=None
):
    """Σ_n weight_n · scale · D over the k listed ids and the bucket of all others (teacher_logp_NB: as `topk_logprobs` gives them).

    divergence(logp_student_nB, logp_teacher_nB) -> value_n in plain torch, B = k + 1 buckets. logprob: a LogprobTerm on the same logits.
    Gradients reach hidden_ND and head_VD. Returns (loss_sum, {"divergence": [N]}).
    """
    vocab = vocab or head_VD.shape[0]
    value_N = torch.zeros(hidden_ND.shape[0], dtype=accumulate_dtype(hidden_ND), device=hidden_ND.device)

    def block_loss(logits_nV, rows, want_grad):
        extra_nV = logits_nV.clone() if logprob else None
        tiny = torch.finfo(logits_nV.dtype).tiny
        id_nk, lt_nB = ids_Nk[rows], teacher_logp_NB[rows].to(logits_nV.dtype).clamp(min=math.log(tiny))
        p_nV = torch.softmax(logits_nV / temperature, 1, out=logits_nV)
        p_nk = p_nV.gather(1, id_nk)
        tail_n1 = p_nV.scatter_(1, id_nk, 0).sum(1, keepdim=True)  # not 1 − Σ p: that would cancel
        with torch.enable_grad():
            ls_nB = torch.cat((p_nk, tail_n1), 1).clamp(min=tiny).log().requires_grad_(want_grad)
            value_n = divergence(ls_nB, lt_nB)
            u_nB = torch.autograd.grad(value_n.sum(), ls_nB)[0] if want_grad else None
        value_N[rows] = value_n = value_n.detach()
        loss_n = value_n * weight_N[rows] * scale
        if want_grad:  # d log p_j / dz = onehot(j) − p; d log tail / dz = p/tail outside the list − p
            u_nk, u_tail_n1, u_sum_n1 = u_nB[:, :-1], u_nB[:, -1:], u_nB.sum(1, keepdim=True)
            coefficient_n1 = (weight_N[rows] * (scale / temperature)).to(p_nV.dtype).unsqueeze(1)
            p_nV.mul_((u_tail_n1 / tail_n1.clamp(min=tiny) - u_sum_n1) * coefficient_n1)
            p_nV.scatter_(1, id_nk, (u_nk - p_nk * u_sum_n1) * coefficient_n1)
        if logprob:
            loss_n = loss_n + logprob.block(extra_nV, rows, want_grad)
            p_nV.add_(extra_nV)
        return loss_n

    def rows_loss(logits_nV, lo, want_grad):
        parts = blocks(len(logits_nV), vocab, logits_nV.device)
        return torch.cat([block_loss(logits_nV[b], slice(lo + b.start, lo + b.stop), want_grad) for b in parts])

    return chunked_head(hidden_ND, head_VD, rows_loss, vocab, chunk_rows), {"divergence": value_N}
