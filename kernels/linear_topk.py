"""Divergence from a teacher that is known by its k most likely tokens and the mass of the others.

The mass of all other tokens is one further bucket, the tail.

Without the tail a top-k "KL" is no divergence: it ignores, or renormalises away,
what the student puts elsewhere. With it the value is a lower bound of the full one (data
processing inequality), and exact at k = V.

Legend: N loss rows, n rows of a chunk, b rows of a block, V vocabulary, k ids, B = k + 1 buckets,
J tiles.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.backend import triton_runs
from kernels.chunk import (
    Step,
    accumulate_dtype,
    chunked_head,
    default_chunk_rows,
    product,
    torch_step,
)
from kernels.linear_kl import DivergenceTerm
from kernels.linear_logprob import LogprobTerm

if TYPE_CHECKING:
    from kernels.triton_head import Coefficients, Logits


@torch.no_grad()
def topk_logprobs(
    hidden_ND: Tensor,
    head_VD: Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    vocab: int | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The k most likely ids under softmax(hidden @ head[:vocab]ᵀ / temperature), and log-probs.

    Returns:
        ids [N, k], and log-probs [N, k + 1]: of these ids, then of all other ids together (summed,
        not 1 − Σ p, which cancels where a teacher is certain).
    """
    vocab = vocab or head_VD.shape[0]
    head_VD = head_VD[:vocab].to(hidden_ND.dtype)
    chunk_topk = _triton_topk if triton_runs(hidden_ND) else _torch_topk
    ids, logps = [], []
    for hidden_nD in hidden_ND.split(chunk_rows or default_chunk_rows(vocab, hidden_ND.device)):
        id_nk, logp_nB = chunk_topk(hidden_nD, head_VD, min(k, vocab), temperature)
        ids.append(id_nk)
        logps.append(logp_nB)
    return torch.cat(ids), torch.cat(logps)


def _torch_topk(hidden_nD: Tensor, head_VD: Tensor, k: int, temperature: float):
    shape, dtype = (len(hidden_nD), len(head_VD)), accumulate_dtype(hidden_nD)
    buffer = torch.empty(shape, dtype=dtype, device=hidden_nD.device)
    logits_nV = product(hidden_nD, head_VD.t(), buffer).div_(temperature)
    top_nk, id_nk = logits_nV.topk(k, 1)
    total_n1 = logits_nV.logsumexp(1, keepdim=True)
    tail_n1 = logits_nV.scatter_(1, id_nk, -math.inf).logsumexp(1, keepdim=True)
    return id_nk, torch.cat((top_nk, tail_n1), 1) - total_n1


def linear_topk_divergence(  # noqa: PLR0913 (one argument per symbol of the formula)
    hidden_ND: Tensor,
    head_VD: Tensor,
    ids_Nk: Tensor,
    teacher_logp_NB: Tensor,
    weight_N: Tensor,
    divergence: Callable[[Tensor, Tensor], Tensor],
    *,
    temperature: float = 1.0,
    scale: float = 1.0,
    logprob: LogprobTerm | None = None,
    vocab: int | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Σ_n weight_n · scale · D over k ids and the tail, plus a log-prob loss of the same logits.

    Args:
        ids_Nk, teacher_logp_NB: as `topk_logprobs` gives them.
        divergence: (student_logp_nB, teacher_logp_nB) -> value_n in plain torch.
        scale, logprob: as in `linear_kl`.

    Gradients reach hidden_ND and head_VD.

    Returns:
        as `linear_kl` does.
    """
    vocab = vocab or head_VD.shape[0]
    chunk_rows = chunk_rows or default_chunk_rows(vocab, hidden_ND.device)
    loss = _TopkTerm(weight_N, temperature, scale, logprob)
    loss.ids_Nk, loss.teacher_logp_NB, loss.divergence = ids_Nk, teacher_logp_NB, divergence
    if triton_runs(hidden_ND):
        step = _triton_step(loss, hidden_ND[:chunk_rows], vocab)
    else:
        step = torch_step(loss.block, chunk_rows, vocab, hidden_ND)
    return chunked_head(hidden_ND, head_VD, step, vocab, chunk_rows), loss.values


class _TopkTerm(DivergenceTerm):
    ids_Nk: Tensor
    teacher_logp_NB: Tensor
    divergence: Callable[[Tensor, Tensor], Tensor]

    def buckets(self, logp_nB: Tensor, rows: slice, want_grad: bool) -> tuple[Tensor, Tensor]:
        """The weighted losses, and their gradient by the log-probs of the student's buckets.

        The gradient is scaled for logits before the temperature; without want_grad it is 0.
        """
        lowest = math.log(torch.finfo(logp_nB.dtype).tiny)
        teacher_nB = self.teacher_logp_NB[rows].to(logp_nB.dtype).clamp(min=lowest)
        grad_nB = torch.zeros_like(logp_nB)
        with torch.enable_grad():
            leaf_nB = logp_nB.clamp(min=lowest).requires_grad_(want_grad)
            value_n = self.divergence(leaf_nB, teacher_nB)
            if want_grad:
                (grad_nB,) = torch.autograd.grad(value_n.sum(), leaf_nB)
                grad_nB = grad_nB * self.factor(rows).to(grad_nB.dtype).unsqueeze(1)
        return self.loss(value_n.detach(), rows), grad_nB

    def block(self, logits_bV: Tensor, rows: slice, want_grad: bool) -> Tensor:
        """The block_loss of `torch_step`."""
        logprob_bV = logits_bV.clone() if self.logprob else logits_bV
        tiny, id_bk = torch.finfo(logits_bV.dtype).tiny, self.ids_Nk[rows]
        p_bV = torch.softmax(logits_bV / self.temperature, 1, out=logits_bV)
        p_bk = p_bV.gather(1, id_bk)
        tail_b1 = p_bV.scatter_(1, id_bk, 0).sum(1, keepdim=True)  # 1 − Σ p would cancel
        logp_bB = torch.cat((p_bk, tail_b1), 1).clamp_(min=tiny).log_()
        loss_b, grad_bB = self.buckets(logp_bB, rows, want_grad)
        if want_grad:
            # d log p_j / dz = onehot(j) − p; d log tail / dz = p/tail outside of the k ids, less p
            grad_sum_b1 = grad_bB.sum(1, keepdim=True)
            p_bV.mul_(grad_bB[:, -1:] / tail_b1.clamp(min=tiny) - grad_sum_b1)
            p_bV.scatter_(1, id_bk, grad_bB[:, :-1] - p_bk * grad_sum_b1)
        if self.logprob:
            loss_b = loss_b + self.logprob.block(logprob_bV, rows, want_grad)
            p_bV.add_(logprob_bV)
        return loss_b


# --- with the Triton kernels: from the logits that they keep, tile by tile


def _triton_topk(hidden_nD: Tensor, head_VD: Tensor, k: int, temperature: float):
    from kernels import triton_head

    out_nP = triton_head.buffer(len(hidden_nD), len(head_VD), hidden_nD)
    logits = triton_head.logits(hidden_nD, head_VD, temperature=temperature, out_nP=out_nP)
    # the k most likely ids lie in the k tiles with the largest maxima
    tile_nt = logits.largest_nJ.topk(min(k, logits.largest_nJ.shape[1]), 1).indices
    z_nt, id_nt = _logits_of_tiles(logits, tile_nt)
    id_nk = id_nt.gather(1, z_nt.topk(k, 1).indices)
    return id_nk, bucket_logprobs(logits, id_nk, temperature)


def _triton_step(loss: _TopkTerm, largest_nD: Tensor, vocab: int) -> Step:
    """largest_nD: the hidden rows of the largest chunk."""
    from kernels import triton_head

    logprob, buffer = loss.logprob, triton_head.buffer(len(largest_nD), vocab, largest_nD)

    def step(hidden_nD: Tensor, weight_VD: Tensor, rows: slice, want_grad: bool):
        id_nk, out_nP = loss.ids_Nk[rows], buffer[: len(hidden_nD)]
        inputs = triton_head.of_term(logprob, rows, loss.temperature)
        student = triton_head.logits(hidden_nD, weight_VD[:vocab], out_nP=out_nP, **inputs)
        logp_nB = bucket_logprobs(student, id_nk, loss.temperature)
        term_loss_n, coefficients = triton_head.term_loss(logprob, student, rows, want_grad)
        loss_n, grad_nB = loss.buckets(logp_nB, rows, want_grad)
        loss_n = loss_n + term_loss_n
        if not want_grad:
            return loss_n, None
        grad_sum_n1, p_nB = grad_nB.sum(1, keepdim=True), logp_nB.exp()
        tail_n = p_nB[:, -1].clamp(min=torch.finfo(p_nB.dtype).tiny)
        factor_n = grad_nB[:, -1] / tail_n - grad_sum_n1.squeeze(1)
        topk_nk = grad_nB[:, :-1] - p_nB[:, :-1] * grad_sum_n1
        if logprob:
            topk_nk += _logprob_gradient(logprob, student, coefficients, rows, id_nk)
        _, grad_nP = triton_head.gradient_of(
            student,
            logprob,
            coefficients._replace(divergence_n=factor_n),
            rows,
            divergence="proportional",
            kl_temperature=loss.temperature,
            dtype=hidden_nD.dtype,
        )
        return loss_n, grad_nP.scatter_(1, id_nk, topk_nk.to(grad_nP.dtype))

    return step


def _logprob_gradient(
    term: LogprobTerm, student: "Logits", coefficients: "Coefficients", rows: slice, id_nk: Tensor
) -> Tensor:
    """The log-prob term's gradient at some ids, fp32, from logits that are not overwritten yet."""
    row = student.row
    below_nk = student.largest_nJ.gather(1, id_nk // student.tile) - row.max_logit_n1
    x_nk = (student.z_nP.gather(1, id_nk).float() + below_nk) / term.temperature
    c_logp_n1 = coefficients.logp_n.float().unsqueeze(1)
    c_entropy_n1 = coefficients.entropy_n.float().unsqueeze(1)
    target_nk = (id_nk == term.target_N[rows].unsqueeze(1)) * c_logp_n1
    p_nk = (x_nk - row.lse_n1).exp()
    return target_nk - p_nk * (c_logp_n1 + c_entropy_n1 * (x_nk - row.mean_n1))


def bucket_logprobs(logits: "Logits", id_nk: Tensor, temperature: float) -> Tensor:
    """Log-probs [n, k + 1] of the ids and of all others, at the divergence's temperature."""
    tile_nk = id_nk // logits.tile
    sorted_nk = tile_nk.sort(1).values
    z_nt, _ = _logits_of_tiles(logits, sorted_nk)
    # a tile that holds several of the ids is there several times: its first copy counts
    slot_nk = torch.searchsorted(sorted_nk, tile_nk) * logits.tile + id_nk % logits.tile
    topk_nk = z_nt.gather(1, slot_nk)
    z_nt.scatter_(1, slot_nk, -math.inf)
    again_nk = torch.zeros_like(sorted_nk, dtype=torch.bool)
    again_nk[:, 1:] = sorted_nk[:, 1:] == sorted_nk[:, :-1]
    z_nt.unflatten(1, (-1, logits.tile)).masked_fill_(again_nk.unsqueeze(2), -math.inf)
    below_nJ = (logits.largest_nJ - logits.row.max_logit_n1) / temperature
    others_nJ = (logits.sum_nJ.log() + below_nJ).scatter(1, tile_nk, -math.inf)
    tail_n1 = torch.cat((z_nt / temperature, others_nJ), 1).logsumexp(1, keepdim=True)
    return torch.cat((topk_nk / temperature, tail_n1), 1) - logits.row.kl_lse_n1


def _logits_of_tiles(logits: "Logits", tile_nt: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of some tiles less the row's largest, fp32, side by side, and their ids."""
    inside = torch.arange(logits.tile, device=tile_nt.device)
    id_nt = (tile_nt.unsqueeze(2) * logits.tile + inside).flatten(1)
    below_nt = logits.largest_nJ.gather(1, tile_nt) - logits.row.max_logit_n1
    z_nt = logits.z_nP.gather(1, id_nt).float()
    return z_nt + below_nt.repeat_interleave(logits.tile, 1), id_nt
