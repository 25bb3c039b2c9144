"""Knowledge distillation: a divergence from the teacher, mixed with cross-entropy.

`DIVERGENCES` are the definitions, in plain torch: (log p_student, log p_teacher, β) -> value per row. Those that the
kernels know by name run there with hand-written gradients; any other is differentiated chunk by chunk, as written here.
"""

import math

import torch

from kernels.linear_kl import HAND_WRITTEN, linear_kl
from kernels.linear_logprob import LogprobTerm
from kernels.linear_topk import linear_topk_divergence, topk_logprobs
from losses.sft import cross_entropy, weighted


def forward_kl(ls, lt, beta):
    return (lt.exp() * (lt - ls)).sum(-1)


def reverse_kl(ls, lt, beta):
    return (ls.exp() * (ls - lt)).sum(-1)


def jsd(ls, lt, beta):
    if beta in (0, 1):
        return (reverse_kl if beta else forward_kl)(ls, lt, beta)
    lm = mixture(lt, ls, beta)
    return beta * forward_kl(lm, lt, beta) + (1 - beta) * forward_kl(lm, ls, beta)


def skew_forward_kl(ls, lt, beta):
    return forward_kl(mixture(lt, ls, beta), lt, beta)


def skew_reverse_kl(ls, lt, beta):
    return forward_kl(mixture(ls, lt, beta), ls, beta)


def total_variation(ls, lt, beta):
    return 0.5 * (ls.exp() - lt.exp()).abs().sum(-1)


def mixture(la, lb, weight):
    """log(weight · a + (1 − weight) · b)"""
    if weight in (0, 1):
        return la if weight else lb
    return torch.logaddexp(la + math.log(weight), lb + math.log1p(-weight))


DIVERGENCES = {
    f.__name__: f
    for f in (forward_kl, reverse_kl, jsd, skew_forward_kl, skew_reverse_kl, total_variation)
}
WITH_BETA = ("jsd", "skew_forward_kl", "skew_reverse_kl")


def kd_loss(
    hidden_TD,
    head_VD,
    frozen,
    batch,
    *,
    divergence,
    beta,
    temperature,
    t_squared,
    ce,
    vocab,
    topk=0,
):
    """Σ weight · ((1−ce) · T² · D(teacher, student) + ce · CE) over the loss rows.

    frozen: (teacher_hidden_NC, teacher_head_UC), or None where the batch lists the teacher's likeliest ids. Both distributions are softmaxes of logits / T over the shared first
    `vocab` ids; T² keeps the gradient's scale (Hinton et al., arXiv 1503.02531) and is applied if t_squared. CE is taken
    at T = 1 over the same ids. topk: the teacher is known by its likeliest ids and one bucket for all others.
    Returns (loss_sum, {metric: (sum, count)}).
    """
    weight_N, target_N = batch.select(batch.weight_T), batch.select(batch.target_T)
    term = LogprobTerm(target_N, weight_N * ce, cross_entropy) if ce else None
    hidden_ND, scale = batch.select(hidden_TD), (1 - ce) * (temperature**2 if t_squared else 1.0)
    shared = dict(temperature=temperature, scale=scale, logprob=term, vocab=vocab)
    if topk:
        listed = (
            topk_logprobs(*frozen, topk, temperature=temperature, vocab=vocab)
            if frozen
            else (batch.topk_ids_Nk, batch.topk_logp_NB)
        )
        definition = lambda ls, lt: DIVERGENCES[divergence](ls, lt, beta)
        loss_sum, rows = linear_topk_divergence(
            hidden_ND, head_VD, *listed, weight_N, definition, **shared
        )
    else:
        loss_sum, rows = linear_kl(
            hidden_ND,
            head_VD,
            *frozen,
            weight_N,
            named_divergence(divergence, beta),
            beta=beta,
            **shared,
        )
    values = {divergence: rows["divergence"]} | ({"ce": -term.logp_N} if ce else {})
    return loss_sum, {"loss": (loss_sum.detach(), weight_N.sum())} | weighted(values, weight_N)


def named_divergence(name, beta):
    """What `linear_kl` is given: a name that it has by hand, or the definition above."""
    return name if name in HAND_WRITTEN else lambda ls, lt: DIVERGENCES[name](ls, lt, beta)
