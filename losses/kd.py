"""Knowledge distillation: a divergence from the teacher, mixed with cross-entropy.

`DIVERGENCES` are the definitions, (student_logp_NV, teacher_logp_NV, beta) -> value_N in plain
torch. A plugin adds its own under a new name; its gradient is taken chunk by chunk, as it is
written. If it reads beta, its name belongs into `WITH_BETA`, too.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from data.batch import Batch, Metrics, uniforms
from kernels.divergences import DIVERGENCES, WITH_BETA
from kernels.linear_kl import linear_kl
from kernels.linear_logprob import LogprobTerm, linear_logprob
from kernels.linear_topk import (
    count_draws,
    cross_entropy_of_draws,
    draw_ids,
    linear_topk_divergence,
    topk_logprobs,
)
from losses.sft import cross_entropy, weighted

__all__ = ["DIVERGENCES", "WITH_BETA", "KDConfig", "kd_loss"]


@dataclass(frozen=True)
class KDConfig:
    """Settings of `kd_loss`."""

    divergence: str  # a name in DIVERGENCES
    beta: float = 0.5  # its β
    temperature: float = 1.0  # distributions are softmaxes of logits / temperature
    t_squared: bool = False  # multiply by temperature², which keeps the gradient's scale
    ce: float = 0.0  # the cross-entropy's part of the loss, between 0 and 1
    vocab: int | None = None  # the first ids, which student and teacher share
    # What is known of the teacher: "full", its whole distribution; "topk" and "student_topk", its
    # log-probs of its own or of the student's k most likely ids and a tail; "draws", k ids drawn
    # from it, which the forward KL alone can use.
    signal: str = "full"
    k: int = 0
    seed: int = 0  # of the draws
    weight_by: str = "none"  # or "teacher_entropy", "student_entropy": see `entropy_weight`
    clip: float = 0.0  # the largest divergence of a token; 0: none


def kd_loss(
    hidden_TD: Tensor,
    head_VD: Tensor,
    frozen: tuple[Tensor, Tensor] | None,
    batch: Batch,
    cfg: KDConfig,
) -> tuple[Tensor, Metrics]:
    """Σ weight · ((1−ce) · T² · a · D(teacher, student) + ce · CE) over the loss rows.

    T² is that of Hinton et al., arXiv 1503.02531, and a that of `entropy_weight`. CE is taken at
    temperature 1 over the same ids.

    Args:
        frozen: the teacher's (hidden_NC, head_UC), or None where the batch has its top-k or draws.

    Returns:
        (loss_sum, metrics {name: (sum, count)}).
    """
    weight_N, target_N = batch.select(batch.weight_T), batch.select(batch.target_T)
    logprob = LogprobTerm(target_N, weight_N * cfg.ce, cross_entropy) if cfg.ce else None
    scale = 1 - cfg.ce
    if cfg.t_squared:
        scale *= cfg.temperature**2
    hidden_ND = batch.select(hidden_TD)
    loss = partial(
        linear_kl if cfg.signal == "full" else linear_topk_divergence,
        hidden_ND,
        head_VD,
        temperature=cfg.temperature,
        scale=scale,
        clip=cfg.clip,
        logprob=logprob,
        vocab=cfg.vocab,
    )
    name, token_weight_N = cfg.divergence, weight_N
    if cfg.weight_by != "none":
        known = frozen if cfg.weight_by == "teacher_entropy" else (hidden_ND, head_VD)
        token_weight_N = weight_N * entropy_weight(known, target_N, cfg)
    if cfg.signal == "full":
        assert frozen, "the full distribution needs the teacher's hidden rows and head"
        loss_sum, rows = loss(*frozen, token_weight_N, cfg.divergence, beta=cfg.beta)
    elif cfg.signal == "draws":
        name, draws = "teacher_ce", teacher_draws(frozen, batch, cfg)
        counted = count_draws(draws, cfg.vocab or len(head_VD))
        loss_sum, rows = loss(*counted, token_weight_N, cross_entropy_of_draws)
    else:
        topk = teacher_topk(hidden_ND, head_VD, frozen, batch, cfg)

        def divergence(student_logp_NB: Tensor, teacher_logp_NB: Tensor) -> Tensor:
            return DIVERGENCES[cfg.divergence](student_logp_NB, teacher_logp_NB, cfg.beta)

        loss_sum, rows = loss(*topk, token_weight_N, divergence)
    values = {name: rows["divergence"]}
    if cfg.clip:
        values["clipped"] = (rows["divergence"] > cfg.clip).double()
    if logprob:
        values["ce"] = -rows["logp"]
    sums = {"loss": (loss_sum.detach(), weight_N.sum())}
    return loss_sum, sums | weighted(values, weight_N)


def teacher_topk(
    hidden_ND: Tensor,
    head_VD: Tensor,
    frozen: tuple[Tensor, Tensor] | None,
    batch: Batch,
    cfg: KDConfig,
) -> tuple[Tensor, Tensor]:
    """The k ids of each loss row, and the teacher's log-probs of these and of all others together.

    Of the student's own k (Li et al., arXiv 2604.13016, student top-k) the reverse KL leaves out
    little, since it is an expectation over the student. They cost another product with its head.
    """
    if not frozen:
        assert batch.topk_ids_Nk is not None and batch.topk_logp_NB is not None
        return batch.topk_ids_Nk, batch.topk_logp_NB
    likeliest = partial(topk_logprobs, k=cfg.k, temperature=cfg.temperature, vocab=cfg.vocab)
    ids_Nk = None
    if cfg.signal == "student_topk":
        ids_Nk, _ = likeliest(hidden_ND, head_VD)
    return likeliest(*frozen, ids_Nk=ids_Nk)


def teacher_draws(frozen: tuple[Tensor, Tensor] | None, batch: Batch, cfg: KDConfig) -> Tensor:
    """k ids drawn from the teacher for each loss row: each time the same ones, as a cache has."""
    if not frozen:
        assert batch.topk_ids_Nk is not None
        return batch.topk_ids_Nk
    uniform_Nk = uniforms(batch.documents, cfg.k, cfg.seed).to(frozen[0].device)
    return draw_ids(*frozen, uniform_Nk, temperature=cfg.temperature, vocab=cfg.vocab)


@torch.no_grad()
def entropy_weight(known: tuple[Tensor, Tensor] | None, target_N: Tensor, cfg: KDConfig) -> Tensor:
    """Entropy of each row over its largest, log V: between 0 and 1, another pass of that head.

    With the student's entropy the baseline of TIP (Xu et al., arXiv 2604.14084, eq. 2), which adds
    the divergence, since tokens of which the student is sure and wrong are missed; the teacher's
    entropy decides in Jin et al., arXiv 2603.07079. Both compare with a
    batch or a threshold; this is a function of the token alone, so how a batch is cut changes
    nothing. It is not normalised: the mean weight is small.

    Args:
        known: the model's (hidden_ND, head_VD).
    """
    assert known, "a cache does not know the teacher's entropy"
    hidden_ND, head_VD = known
    _, rows = linear_logprob(
        hidden_ND,
        head_VD,
        target_N,
        torch.ones_like(target_N, dtype=torch.float64),
        cross_entropy,
        temperature=cfg.temperature,
        entropy=True,
        vocab=cfg.vocab,
    )
    return rows["entropy"].clamp(min=0) / math.log(cfg.vocab or len(head_VD))
