"""Divergence from a teacher that is known by its k likeliest tokens and the mass of all others, as one further bucket.

Without that bucket a top-k "KL" is no divergence: it ignores, or renormalises away, what the student puts elsewhere. With it the value is a
lower bound of the full one (data processing inequality), and exact at k = V. Legend: N rows, n rows of a chunk, V vocabulary, k listed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernels.backend import triton_runs
from kernels.chunk import (
    accumulate_dtype,
    blocks,
    chunked_head,
    default_chunk_rows,
    product,
    torch_step,
)
from kernels.linear_logprob import LogprobTerm


@torch.no_grad()
def topk_logprobs(hidden_ND, head_VD, k, *, temperature=1.0, vocab=None, chunk_rows=None):
    """The k likeliest ids and their log-probs (nats) under softmax(hidden @ head[:vocab]ᵀ / temperature): [N, k], and [N, k + 1] with that of
    all other ids together behind them (summed, not 1 − Σ p, which cancels where a teacher is certain)."""
    vocab = vocab or head_VD.shape[0]
    head_VD, chunk_rows = (
        head_VD[:vocab].to(hidden_ND.dtype),
        chunk_rows or default_chunk_rows(vocab, hidden_ND.device),
    )
    ids, logps, by_kernel = [], [], triton_runs(hidden_ND)
    for rows_nD in hidden_ND.split(chunk_rows) if len(hidden_ND) else ():
        if by_kernel:
            from kernels import triton_head

            scored = triton_head.logits(
                rows_nD,
                head_VD,
                temperature=temperature,
                out_nP=triton_head.buffer(len(rows_nD), vocab, rows_nD),
            )
            ids.append(_likeliest(scored, min(k, vocab)))
            logps.append(_listed_logprobs(scored, ids[-1], temperature))
            continue
        logits = torch.empty(
            len(rows_nD), vocab, dtype=accumulate_dtype(hidden_ND), device=hidden_ND.device
        )
        logits = product(rows_nD, head_VD.t(), logits).div_(temperature)
        top_nk, id_nk = logits.topk(min(k, vocab), 1)
        ids.append(id_nk)
        total_n1 = logits.logsumexp(1, keepdim=True)
        tail_n1 = logits.scatter_(1, id_nk, float("-inf")).logsumexp(1, keepdim=True)
        logps.append(torch.cat((top_nk, tail_n1), 1) - total_n1)
    if not ids:
        return torch.empty(0, k, dtype=torch.long, device=hidden_ND.device), hidden_ND.new_empty(
            0, k + 1
        )
    return torch.cat(ids), torch.cat(logps)


def linear_topk_divergence(
    hidden_ND,
    head_VD,
    ids_Nk,
    teacher_logp_NB,
    weight_N,
    divergence,
    *,
    temperature=1.0,
    scale=1.0,
    logprob=None,
    vocab=None,
    chunk_rows=None,
):
    """Σ_n weight_n · scale · D over the k listed ids and the bucket of all others (teacher_logp_NB: as `topk_logprobs` gives them).

    divergence(logp_student_nB, logp_teacher_nB) -> value_n in plain torch, B = k + 1 buckets. logprob: a LogprobTerm on the same logits.
    Gradients reach hidden_ND and head_VD. Returns (loss_sum, {"divergence": [N]}).
    """
    vocab = vocab or head_VD.shape[0]
    value_N = torch.zeros(
        hidden_ND.shape[0], dtype=accumulate_dtype(hidden_ND), device=hidden_ND.device
    )
    chunk_rows = chunk_rows or default_chunk_rows(vocab, hidden_ND.device)
    loss = TopkLoss(
        ids_Nk, teacher_logp_NB, weight_N, divergence, temperature, scale, logprob, value_N
    )
    step = (_triton_step if triton_runs(hidden_ND) else _torch_step)(
        loss, hidden_ND, vocab, chunk_rows
    )
    return chunked_head(hidden_ND, head_VD, step, vocab, chunk_rows), {"divergence": value_N}


@dataclass
class TopkLoss:
    """The loss of the buckets; it fills value_N."""

    ids_Nk: torch.Tensor
    teacher_logp_NB: torch.Tensor
    weight_N: torch.Tensor
    divergence: Callable
    temperature: float
    scale: float
    logprob: LogprobTerm | None
    value_N: torch.Tensor

    def buckets(self, ls_nB, rows, want_grad):
        """From the student's log-probs: the weighted losses, and (when want_grad) their gradient by these log-probs, scaled for the logits."""
        tiny = torch.finfo(ls_nB.dtype).tiny
        lt_nB = self.teacher_logp_NB[rows].to(ls_nB.dtype).clamp(min=math.log(tiny))
        with torch.enable_grad():
            ls_nB = ls_nB.detach().clamp(min=math.log(tiny)).requires_grad_(want_grad)
            value_n = self.divergence(ls_nB, lt_nB)
            u_nB = torch.autograd.grad(value_n.sum(), ls_nB)[0] if want_grad else None
        self.value_N[rows] = value_n = value_n.detach()
        if want_grad:
            u_nB *= (
                (self.weight_N[rows] * (self.scale / self.temperature)).to(u_nB.dtype).unsqueeze(1)
            )
        return value_n * self.weight_N[rows] * self.scale, u_nB


def _torch_step(loss, hidden_ND, vocab, chunk_rows):
    def block_loss(logits_nV, rows, want_grad):
        extra_nV = logits_nV.clone() if loss.logprob else None
        tiny, id_nk = torch.finfo(logits_nV.dtype).tiny, loss.ids_Nk[rows]
        p_nV = torch.softmax(logits_nV / loss.temperature, 1, out=logits_nV)
        p_nk = p_nV.gather(1, id_nk)
        tail_n1 = p_nV.scatter_(1, id_nk, 0).sum(1, keepdim=True)  # not 1 − Σ p: that would cancel
        loss_n, u_nB = loss.buckets(
            torch.cat((p_nk, tail_n1), 1).clamp_(min=tiny).log_(), rows, want_grad
        )
        if (
            want_grad
        ):  # d log p_j / dz = onehot(j) − p; d log tail / dz = p/tail outside the list − p
            u_nk, u_tail_n1, u_sum_n1 = u_nB[:, :-1], u_nB[:, -1:], u_nB.sum(1, keepdim=True)
            p_nV.mul_(u_tail_n1 / tail_n1.clamp(min=tiny) - u_sum_n1)
            p_nV.scatter_(1, id_nk, u_nk - p_nk * u_sum_n1)
        if loss.logprob:
            loss_n = loss_n + loss.logprob.block(extra_nV, rows, want_grad)
            p_nV.add_(extra_nV)
        return loss_n

    def rows_loss(logits_nV, lo, want_grad):
        parts = blocks(len(logits_nV), vocab, logits_nV.device)
        return torch.cat(
            [block_loss(logits_nV[b], slice(lo + b.start, lo + b.stop), want_grad) for b in parts]
        )

    return torch_step(rows_loss, min(chunk_rows, len(hidden_ND)), vocab, hidden_ND)


def _triton_step(loss, hidden_ND, vocab, chunk_rows):
    from kernels import triton_head  # here, so that nothing needs Triton where it is not used

    logprob, buffer = (
        loss.logprob,
        triton_head.buffer(min(chunk_rows, len(hidden_ND)), vocab, hidden_ND),
    )

    def step(rows_nD, weight_VD, lo, want_grad):
        rows = slice(lo, lo + len(rows_nD))
        id_nk = loss.ids_Nk[rows]
        wanted = (
            triton_head.of_term(logprob, rows, second=loss.temperature)
            if logprob
            else dict(temperature=loss.temperature)
        )
        student = triton_head.logits(
            rows_nD, weight_VD[:vocab], out_nP=buffer[: len(rows_nD)], **wanted
        )
        ls_nB = _listed_logprobs(student, id_nk, loss.temperature)
        term_loss_n, coefficient_n3 = triton_head.term_loss(logprob, student, rows, want_grad)
        loss_n, u_nB = loss.buckets(ls_nB, rows, want_grad)
        if not want_grad:
            return loss_n + term_loss_n, None
        u_nk, u_tail_n, u_sum_n1 = u_nB[:, :-1], u_nB[:, -1], u_nB.sum(1, keepdim=True)
        tiny = torch.finfo(ls_nB.dtype).tiny
        coefficient_n3[:, 0] = u_tail_n / ls_nB[:, -1].exp().clamp(min=tiny) - u_sum_n1.squeeze(1)
        listed_nk = u_nk - ls_nB[:, :-1].exp() * u_sum_n1
        if logprob:
            listed_nk += _term_gradient(logprob, student, coefficient_n3, rows, id_nk)
        _, grad_nP = triton_head.gradient_of(
            student,
            logprob,
            coefficient_n3,
            rows,
            divergence="proportional",
            kl_temperature=loss.temperature,
            dtype=rows_nD.dtype,
        )
        return loss_n + term_loss_n, grad_nP.scatter_(1, id_nk, listed_nk.to(grad_nP.dtype))

    return step


# --- on the logits that the kernels keep -----------------------------------------------------------------------------


def _term_gradient(term, student, coefficient_n3, rows, ids_nk):
    """The log-prob term's gradient at some ids, fp32, from logits that are not overwritten yet."""
    tile_nk = ids_nk // student.tile
    z_nk = student.z_nP.gather(1, ids_nk).float() + (
        student.largest_nJ.gather(1, tile_nk) - student.row_n4[:, :1]
    )
    x_nk = z_nk / term.temperature
    (log_n1, mean_n1), (c_lp_n1, c_h_n1) = (
        student.row_n4[:, 2:].split(1, 1),
        coefficient_n3[:, 1:].split(1, 1),
    )
    hit_nk = (ids_nk == term.target_N[rows].unsqueeze(1)) * c_lp_n1
    return hit_nk - (x_nk - log_n1).exp() * (c_lp_n1 + c_h_n1 * (x_nk - mean_n1))


def _likeliest(scored, k):
    """The k likeliest ids of each row: they lie in the k tiles with the largest maxima."""
    _, tile_nt = scored.largest_nJ.topk(min(k, scored.largest_nJ.shape[1]), 1)
    z_nt, id_nt = _of_tiles(scored, tile_nt)
    return id_nt.gather(1, z_nt.topk(k, 1).indices)


def _listed_logprobs(scored, ids_nk, temperature):
    """[n, k + 1] log-probs at the divergence's temperature: of the listed ids, and of all others together (summed, not 1 − Σ p)."""
    largest_n1, log_n1 = scored.row_n4[:, :1], scored.row_n4[:, 1:2]
    tile_nk = ids_nk // scored.tile
    sorted_nk = tile_nk.sort(1).values
    z_nt, _ = _of_tiles(scored, sorted_nk)
    slot_nk = (
        torch.searchsorted(sorted_nk, tile_nk) * scored.tile + ids_nk % scored.tile
    )  # in the first of equal tiles
    listed_nk = z_nt.gather(1, slot_nk)
    z_nt.scatter_(1, slot_nk, float("-inf"))
    again_nk = torch.zeros_like(sorted_nk, dtype=torch.bool)
    again_nk[:, 1:] = sorted_nk[:, 1:] == sorted_nk[:, :-1]
    z_nt.unflatten(1, (-1, scored.tile)).masked_fill_(again_nk.unsqueeze(2), float("-inf"))
    others_nJ = (scored.sum_nJ.log() + (scored.largest_nJ - largest_n1) / temperature).scatter(
        1, tile_nk, float("-inf")
    )
    tail_n1 = torch.cat((z_nt / temperature, others_nJ), 1).logsumexp(1, keepdim=True)
    return torch.cat((listed_nk / temperature, tail_n1), 1) - log_n1


def _of_tiles(scored, tile_nt):
    """Logits of some tiles less the row's largest, fp32, side by side, and their ids."""
    inside = torch.arange(scored.tile, device=tile_nt.device)
    id_nt = (tile_nt.unsqueeze(2) * scored.tile + inside).flatten(1)
    below_nt = scored.largest_nJ.gather(1, tile_nt) - scored.row_n4[:, :1]
    return scored.z_nP.gather(1, id_nt).float() + below_nt.repeat_interleave(scored.tile, 1), id_nt
