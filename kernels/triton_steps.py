"""The chunks of the fused operations with the Triton kernels: what `chunked_head` calls on a GPU.

Each step multiplies the hidden rows by the head (the kernel keeps the logits tile by tile, with
their statistics), takes the loss from the statistics, and overwrites the logits with its gradient.

Legend: n rows of a chunk, D hidden, V vocabulary, P padded vocabulary, J tiles, t columns of some
tiles, k ids of a top-k, B = k + 1 buckets.
"""

import math
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kernels import triton_head
from kernels.chunk import Step
from kernels.triton_head import Logits

if TYPE_CHECKING:
    from kernels.linear_kl import DivergenceTerm
    from kernels.linear_logprob import LogprobTerm
    from kernels.linear_topk import TopkTerm


class Coefficients(NamedTuple):
    """d loss / d of each, per row, over its temperature."""

    divergence_n: torch.Tensor
    logp_n: torch.Tensor
    entropy_n: torch.Tensor


def student_logits(term, hidden_nD, head_VD, out_nP, rows, kl_temperature) -> Logits:
    """Logits with the statistics of a log-prob term, of a divergence at kl_temperature, or both."""
    if term is None:
        return triton_head.logits(hidden_nD, head_VD, temperature=kl_temperature, out_nP=out_nP)
    return triton_head.logits(
        hidden_nD,
        head_VD,
        temperature=term.temperature,
        kl_temperature=kl_temperature if kl_temperature != term.temperature else None,
        target_n=term.target_N[rows],
        moment=term.entropy,
        out_nP=out_nP,
    )


def term_loss(term, student, rows, want_grad):
    """(weighted losses of the term, Coefficients without the divergence's); 0 without a term."""
    zeros_n = torch.zeros_like(student.row_n4[:, 0])
    if term is None:
        return zeros_n, Coefficients(zeros_n, zeros_n, zeros_n)
    entropy_n = student.entropy_n() if term.entropy else None
    logp_n = student.logp_n(term.temperature)
    loss_n, c_logp_n, c_entropy_n = term.coefficients(logp_n, entropy_n, rows, want_grad)
    t = term.temperature
    return loss_n, Coefficients(zeros_n, c_logp_n / t, c_entropy_n / t)


def gradient_of(student, term, coefficients, rows, **options) -> tuple[Any, torch.Tensor]:
    """`gradient` with that of the log-prob term, if there is one."""
    coefficient_n3 = torch.stack([c_n.float() for c_n in coefficients], 1)
    if term is not None:
        options |= dict(
            lp_temperature=term.temperature, target_n=term.target_N[rows], entropy=term.entropy
        )
    return triton_head.gradient(student, coefficient_n3=coefficient_n3, **options)


def logprob_step(term: "LogprobTerm", vocab: int) -> Step:
    """One chunk of `linear_logprob`."""
    buffer = None

    def step(hidden_nD: Tensor, weight_VD: Tensor, rows: slice, want_grad: bool):
        nonlocal buffer
        out_nP = None
        if want_grad:  # without gradients no logits are kept
            if buffer is None:  # the first chunk is the largest
                buffer = triton_head.buffer(len(hidden_nD), vocab, hidden_nD)
            out_nP = buffer[: len(hidden_nD)]
        weight_VD, t = weight_VD[:vocab], term.temperature
        student = student_logits(term, hidden_nD, weight_VD, out_nP, rows, t)
        loss_n, coefficients = term_loss(term, student, rows, want_grad)
        if not want_grad:
            return loss_n, None
        _, grad_nP = gradient_of(student, term, coefficients, rows, dtype=hidden_nD.dtype)
        return loss_n, grad_nP

    return step


def kl_step(
    loss: "DivergenceTerm",
    divergence: str,
    beta: float,
    largest_nD: Tensor,
    teacher: tuple[Tensor, Tensor],
) -> Step:
    """One chunk of `linear_kl`; largest_nD: the hidden rows of the largest chunk."""
    teacher_hidden_NC, teacher_VC = teacher
    vocab, t = len(teacher_VC), loss.temperature
    student_buffer = triton_head.buffer(len(largest_nD), vocab, largest_nD)
    teacher_buffer = triton_head.buffer(len(largest_nD), vocab, teacher_hidden_NC)

    def step(hidden_nD: Tensor, weight_VD: Tensor, rows: slice, want_grad: bool):
        out_nP, teacher_nP = student_buffer[: len(hidden_nD)], teacher_buffer[: len(hidden_nD)]
        teacher_logits = triton_head.logits(
            teacher_hidden_NC[rows], teacher_VC, temperature=t, out_nP=teacher_nP
        )
        student = student_logits(loss.logprob, hidden_nD, weight_VD[:vocab], out_nP, rows, t)
        term_loss_n, coefficients = term_loss(loss.logprob, student, rows, want_grad)
        kernel = partial(
            gradient_of,
            student,
            loss.logprob,
            rows=rows,
            teacher=teacher_logits,
            divergence=divergence,
            beta=beta,
            kl_temperature=t,
            dtype=hidden_nD.dtype,
        )
        if loss.clip and want_grad:  # the factor depends on the values: a pass for them alone
            value_n, _ = kernel(coefficients, write=False)
            loss.loss(value_n, rows)
        coefficients = coefficients._replace(divergence_n=loss.factor(rows))
        value_n, grad_nP = kernel(coefficients, write=want_grad)
        return loss.loss(value_n, rows) + term_loss_n, grad_nP

    return step


def topk_logprobs(
    hidden_nD: Tensor, head_VD: Tensor, k: int, temperature: float, id_nk: Tensor | None
):
    out_nP = triton_head.buffer(len(hidden_nD), len(head_VD), hidden_nD)
    logits = triton_head.logits(hidden_nD, head_VD, temperature=temperature, out_nP=out_nP)
    if id_nk is None:
        # the k most likely ids lie in the k tiles with the largest maxima
        tile_nt = logits.largest_nJ.topk(min(k, logits.largest_nJ.shape[1]), 1).indices
        z_nt, id_nt = _logits_of_tiles(logits, tile_nt)
        id_nk = id_nt.gather(1, z_nt.topk(k, 1).indices)
    return id_nk, bucket_logprobs(logits, id_nk, temperature)


def topk_step(loss: "TopkTerm", largest_nD: Tensor, vocab: int) -> Step:
    """One chunk of `linear_topk_divergence`; largest_nD: the hidden rows of the largest chunk."""
    logprob, t = loss.logprob, loss.temperature
    buffer = triton_head.buffer(len(largest_nD), vocab, largest_nD)

    def step(hidden_nD: Tensor, weight_VD: Tensor, rows: slice, want_grad: bool):
        id_nk, out_nP = loss.ids_Nk[rows], buffer[: len(hidden_nD)]
        student = student_logits(logprob, hidden_nD, weight_VD[:vocab], out_nP, rows, t)
        logp_nB = bucket_logprobs(student, id_nk, t)
        term_loss_n, coefficients = term_loss(logprob, student, rows, want_grad)
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
        _, grad_nP = gradient_of(
            student,
            logprob,
            coefficients._replace(divergence_n=factor_n),
            rows,
            divergence="proportional",
            kl_temperature=t,
            dtype=hidden_nD.dtype,
        )
        return loss_n, grad_nP.scatter_(1, id_nk, topk_nk.to(grad_nP.dtype))

    return step


def _logprob_gradient(
    term: "LogprobTerm", student: Logits, coefficients: Coefficients, rows: slice, id_nk: Tensor
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


def bucket_logprobs(logits: Logits, id_nk: Tensor, temperature: float) -> Tensor:
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


def _logits_of_tiles(logits: Logits, tile_nt: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of some tiles less the row's largest, fp32, side by side, and their ids."""
    inside = torch.arange(logits.tile, device=tile_nt.device)
    id_nt = (tile_nt.unsqueeze(2) * logits.tile + inside).flatten(1)
    below_nt = logits.largest_nJ.gather(1, tile_nt) - logits.row.max_logit_n1
    z_nt = logits.z_nP.gather(1, id_nt).float()
    return z_nt + below_nt.repeat_interleave(logits.tile, 1), id_nt
