"""Knowledge distillation: a divergence from the teacher, mixed with cross-entropy.

`DIVERGENCES` are the definitions, (student_logp_NV, teacher_logp_NV, beta) -> value_N in plain
torch. A fork adds its own under a new name; its gradient is taken chunk by chunk, as it is
written.
"""

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from data.batch import Batch, Metrics
from kernels.divergences import DIVERGENCES, WITH_BETA
from kernels.linear_kl import linear_kl
from kernels.linear_logprob import LogprobTerm
from kernels.linear_topk import linear_topk_divergence, topk_logprobs
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
    topk: int = 0  # the teacher is known by so many ids and a tail; 0: by its whole distribution


def kd_loss(
    hidden_TD: Tensor,
    head_VD: Tensor,
    frozen: tuple[Tensor, Tensor] | None,
    batch: Batch,
    cfg: KDConfig,
) -> tuple[Tensor, Metrics]:
    """Σ weight · ((1−ce) · T² · D(teacher, student) + ce · CE) over the loss rows.

    T² is that of Hinton et al., arXiv 1503.02531. CE is taken at temperature 1 over the same ids.

    Args:
        frozen: the teacher's (hidden_NC, head_UC), or None where the batch has its top-k.

    Returns:
        (loss_sum, metrics {name: (sum, count)}).
    """
    weight_N, target_N = batch.select(batch.weight_T), batch.select(batch.target_T)
    logprob = LogprobTerm(target_N, weight_N * cfg.ce, cross_entropy) if cfg.ce else None
    scale = 1 - cfg.ce
    if cfg.t_squared:
        scale *= cfg.temperature**2
    loss = partial(
        linear_topk_divergence if cfg.topk else linear_kl,
        batch.select(hidden_TD),
        head_VD,
        temperature=cfg.temperature,
        scale=scale,
        logprob=logprob,
        vocab=cfg.vocab,
    )
    if cfg.topk:
        topk = batch.topk_ids_Nk, batch.topk_logp_NB
        if frozen:
            topk = topk_logprobs(*frozen, cfg.topk, temperature=cfg.temperature, vocab=cfg.vocab)

        def divergence(student_logp_NB: Tensor, teacher_logp_NB: Tensor) -> Tensor:
            return DIVERGENCES[cfg.divergence](student_logp_NB, teacher_logp_NB, cfg.beta)

        loss_sum, rows = loss(*topk, weight_N, divergence)
    else:
        assert frozen, "the full distribution needs the teacher's hidden rows and head"
        loss_sum, rows = loss(*frozen, weight_N, cfg.divergence, beta=cfg.beta)
    values = {cfg.divergence: rows["divergence"]}
    if logprob:
        values["ce"] = -rows["logp"]
    sums = {"loss": (loss_sum.detach(), weight_N.sum())}
    return loss_sum, sums | weighted(values, weight_N)
