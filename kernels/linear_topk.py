"""Divergence from a teacher that is known by its log-probs of k tokens and the mass of the others.

The k tokens are the teacher's most likely ones, or the student's. The mass of all others is one
further bucket, the tail. Without it a top-k "KL" is no divergence: it ignores, or renormalises
away, what the student puts elsewhere. With it the value is a lower bound of the full one (data
processing inequality), and exact at k = V.

Or the teacher is known by k tokens that were drawn from it (`draw_ids`); then nothing is biased.

Legend: N loss rows, n rows of a chunk, b rows of a block, V vocabulary, k ids, B = k + 1 buckets,
J tiles.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backend import triton_runs
from kernels.chunk import (
    accumulate_dtype,
    chunked_head,
    default_chunk_rows,
    product,
    softmax,
    torch_step,
    wide_buffer,
)
from kernels.linear_kl import DivergenceTerm
from kernels.linear_logprob import LogprobTerm


@torch.no_grad()
def topk_logprobs(
    hidden_ND: Tensor,
    head_VD: Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    vocab: int | None = None,
    chunk_rows: int | None = None,
    ids_Nk: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k most likely ids under softmax(hidden @ head[:vocab]ᵀ / temperature), and log-probs.

    Args:
        ids_Nk: ids to look up in their place, different ones in a row.

    Returns:
        ids [N, k], and log-probs [N, k + 1]: of these ids, then of all other ids together (summed,
        not 1 − Σ p, which cancels where a teacher is certain).
    """
    vocab = vocab or head_VD.shape[0]
    head_VD = head_VD[:vocab].to(hidden_ND.dtype)
    if triton_runs(hidden_ND):
        from kernels import triton_head, triton_steps  # here: not everyone has Triton

        chunk_rows = chunk_rows or triton_head.chunk_rows(vocab, hidden_ND)
        chunk_topk = triton_steps.topk_logprobs
    else:
        chunk_rows = chunk_rows or default_chunk_rows(vocab, len(hidden_ND), hidden_ND.device)
        chunk_topk = _torch_topk
    ids, logps = [], []
    for start in range(0, max(1, len(hidden_ND)), chunk_rows):
        rows = slice(start, start + chunk_rows)
        given_nk = None if ids_Nk is None else ids_Nk[rows]
        id_nk, logp_nB = chunk_topk(hidden_ND[rows], head_VD, min(k, vocab), temperature, given_nk)
        ids.append(id_nk)
        logps.append(logp_nB)
    return torch.cat(ids), torch.cat(logps)


def _torch_topk(
    hidden_nD: Tensor, head_VD: Tensor, k: int, temperature: float, id_nk: Tensor | None
):
    dtype = accumulate_dtype(hidden_nD)
    buffer = wide_buffer(len(hidden_nD), len(head_VD), dtype, hidden_nD.device)
    logits_nV = product(hidden_nD, head_VD.t(), buffer).div_(temperature)
    if id_nk is None:
        id_nk = logits_nV.topk(k, 1).indices
    top_nk = logits_nV.gather(1, id_nk)
    total_n1 = logits_nV.logsumexp(1, keepdim=True)
    tail_n1 = logits_nV.scatter_(1, id_nk, -math.inf).logsumexp(1, keepdim=True)
    return id_nk, torch.cat((top_nk, tail_n1), 1) - total_n1


@torch.no_grad()
def draw_ids(
    hidden_ND: Tensor,
    head_VD: Tensor,
    uniform_Nk: Tensor,
    *,
    temperature: float = 1.0,
    vocab: int | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Draw k ids for each row from softmax(hidden @ head[:vocab]ᵀ / temperature).

    Args:
        uniform_Nk: numbers in [0, 1), at which the distribution function is inverted. It is summed
            in fp64: in fp32 rare ids would never come.

    Returns:
        ids [N, k], some of them several times.
    """
    vocab = vocab or head_VD.shape[0]
    head_VD = head_VD[:vocab].to(hidden_ND.dtype)
    chunk_rows = chunk_rows or default_chunk_rows(vocab, len(hidden_ND), hidden_ND.device, models=4)
    dtype, ids = accumulate_dtype(hidden_ND), []
    for hidden_nD, uniform_nk in zip(
        hidden_ND.split(chunk_rows), uniform_Nk.split(chunk_rows), strict=True
    ):
        buffer = wide_buffer(len(hidden_nD), vocab, dtype, hidden_nD.device)
        logits_nV = product(hidden_nD, head_VD.t(), buffer).double().div_(temperature)
        below_nV = torch.softmax(logits_nV, 1).cumsum(1).contiguous()
        at_nk = uniform_nk.double() * below_nV[:, -1:]
        ids.append(torch.searchsorted(below_nV, at_nk, right=True).clamp_(max=vocab - 1))
    return torch.cat(ids)


def count_draws(ids_Nk: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Draws as `linear_topk_divergence` takes them: different ids, and the log of their shares.

    Places that are left where an id was drawn several times get ids that were not, of share 0, as
    the tail is. A share's expectation is the probability that was drawn from.

    Returns:
        ids [N, k'] and log-shares [N, k' + 1]; k' is at least the most different ids of a row, and
        a multiple of 8 where the vocabulary allows it.
    """
    device = ids_Nk.device
    sorted_Nk = ids_Nk.sort(1).values
    new_Nk = torch.ones_like(sorted_Nk, dtype=torch.bool)
    new_Nk[:, 1:] = sorted_Nk[:, 1:] != sorted_Nk[:, :-1]
    place_Nk = new_Nk.cumsum(1) - 1
    one_Nk = torch.full(ids_Nk.shape, 1 / ids_Nk.shape[1], dtype=torch.float64, device=device)
    most = int(place_Nk.max()) + 1 if len(ids_Nk) else 1
    k = min(math.ceil(most / 8) * 8, vocab)
    share_NB = one_Nk.new_zeros(len(ids_Nk), k + 1).scatter_add_(1, place_Nk, one_Nk)
    # among the first 2k ids of the vocabulary at least k were not drawn; these come first
    room = min(2 * k, vocab)
    drawn = torch.zeros(len(ids_Nk), room + 1, dtype=torch.int8, device=device)
    drawn.scatter_(1, sorted_Nk.clamp(max=room), 1)
    others_Nk = drawn[:, :room].sort(stable=True, dim=1).indices[:, :k].flip(1)
    return others_Nk.scatter(1, place_Nk, sorted_Nk), share_NB.log()


def cross_entropy_of_draws(student_logp_nB: Tensor, logshare_nB: Tensor) -> Tensor:
    """−Σ share · log p_s: its expectation is the forward KL and the teacher's entropy.

    So the expected gradient is the forward KL's (Anshumann et al., arXiv 2503.16870).
    """
    return -(logshare_nB.exp() * student_logp_nB)[:, :-1].sum(1)


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
    clip: float = 0.0,
    logprob: LogprobTerm | None = None,
    vocab: int | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Σ_n weight_n · scale · D over k ids and the tail, plus a log-prob loss of the same logits.

    Args:
        ids_Nk, teacher_logp_NB: as `topk_logprobs` gives them; the ids of a row are different ones.
        divergence: (student_logp_nB, teacher_logp_nB) -> value_n in plain torch.
        scale, clip, logprob: as in `linear_kl`.

    Gradients reach hidden_ND and head_VD.

    Returns:
        as `linear_kl` does.
    """
    vocab = vocab or head_VD.shape[0]
    loss = TopkTerm(
        weight_N,
        temperature,
        scale,
        logprob,
        clip=clip,
        ids_Nk=ids_Nk,
        teacher_logp_NB=teacher_logp_NB,
        divergence=divergence,
    )
    if triton_runs(hidden_ND):
        from kernels import triton_head, triton_steps

        chunk_rows = chunk_rows or triton_head.chunk_rows(vocab, hidden_ND)
        step = triton_steps.topk_step(loss, hidden_ND[:chunk_rows], vocab)
    else:
        chunk_rows = chunk_rows or default_chunk_rows(vocab, len(hidden_ND), hidden_ND.device)
        step = torch_step(loss.block, chunk_rows, vocab, hidden_ND)
    return chunked_head(hidden_ND, head_VD, step, vocab, chunk_rows), loss.values


@dataclass
class TopkTerm(DivergenceTerm):
    """A divergence over k ids and the tail; its arguments are those of `linear_topk_divergence`."""

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
        loss_n = self.loss(value_n.detach(), rows)
        return loss_n, grad_nB * self.factor(rows).to(grad_nB.dtype).unsqueeze(1)

    def block(self, logits_bV: Tensor, rows: slice, want_grad: bool) -> Tensor:
        """The block_loss of `torch_step`."""
        logprob_bV = logits_bV.clone() if self.logprob else logits_bV
        tiny, id_bk = torch.finfo(logits_bV.dtype).tiny, self.ids_Nk[rows]
        p_bV, _ = softmax(logits_bV, self.temperature, out=logits_bV)
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
