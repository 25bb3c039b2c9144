"""Policy gradients on groups of samples: GRPO and its kin, as functions of a token's log-prob.

Every variant is a row loss of short vectors plus a weighting of the tokens (`VARIANTS`):

| variant | ratio | each token weighs | paper |
|---|---|---|---|
| grpo | token | 1/|o|, over sequences | DeepSeekMath, arXiv 2402.03300, eq. 3 |
| token | token | 1, over all tokens (DAPO's, BNPO's reduction) | DAPO, arXiv 2503.14476, eq. 8 |
| dr_grpo | token | 1/max_new_tokens, over sequences | Dr. GRPO, arXiv 2503.20783 |
| gspo | sequence | 1/|o|, over sequences | GSPO, arXiv 2507.18071, eq. 5 (gradient: eq. 10) |
| cispo | token, detached | 1, over all tokens | MiniMax-M1, arXiv 2506.13585, eq. 4 |

With a variant come the advantage and the clip bounds of its paper, as defaults (config.py): Dr.
GRPO does not divide by a deviation, GSPO's bounds are 3e-4 and 4e-4, DAPO's upper one is 0.28,
CISPO has no lower one. A sample without loss rows (masked because it did not stop) counts in no
divisor.

Policy, old and reference log-probs are all taken at the sampling temperature. Legend: N loss rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from data.batch import Batch, Metrics
from kernels.linear_kl import linear_kl
from kernels.linear_logprob import LogprobTerm, linear_logprob
from losses.sft import weighted


def clipped_ratio(ratio: Tensor, clipped: Tensor, logp: Tensor, advantage: Tensor) -> Tensor:
    """−min(r A, clip(r) A) (Schulman et al., arXiv 1707.06347, eq. 7)."""
    return -torch.minimum(ratio * advantage, clipped * advantage)


def clipped_weight(ratio: Tensor, clipped: Tensor, logp: Tensor, advantage: Tensor) -> Tensor:
    """−sg(clip(r)) A log p: a clipped token keeps its gradient, with a bounded weight."""
    return -clipped.detach() * advantage * logp


class Variant(NamedTuple):
    """One of the objectives in the table above."""

    surrogate: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # as clipped_ratio
    weighting: str  # of the tokens: "token", "sequence" or "constant"
    sequence_ratio: bool = False  # one ratio for all tokens of a sequence


VARIANTS = {
    "grpo": Variant(clipped_ratio, "sequence"),
    "token": Variant(clipped_ratio, "token"),
    "dr_grpo": Variant(clipped_ratio, "constant"),
    "gspo": Variant(clipped_ratio, "sequence", sequence_ratio=True),
    "cispo": Variant(clipped_weight, "token"),
}


# Estimators of KL(policy ‖ reference) from d = log p − log p_ref of a sampled token (Schulman 2020,
# "Approximating KL divergence"). What the policy follows on its own samples depends on where the
# estimate stands (arXiv 2510.01555, 2512.21852; tests/test_kl.py enumerates small vocabularies):
# - In the loss, token by token: the gradient of k1 is 0 on average, that of k2 is the gradient of
#   KL(policy ‖ ref), that of k3 the gradient of KL(ref ‖ policy), each for the next token while the
#   prefixes that the policy generates stay as they are.
# - In the reward, detached (`rl.logprobs.kl_penalty`): only k1 is right. Summed over a sample it
#   has the gradient of the KL of complete sequences; k3 has that of
#   KL(policy ‖ ref) − KL(ref ‖ policy).


def k1(d: Tensor) -> Tensor:
    """d: unbiased, but with a high variance."""
    return d


def k2(d: Tensor) -> Tensor:
    """d² / 2: biased, with a low variance."""
    return d.square() / 2


def k3(d: Tensor) -> Tensor:
    """e^(−d) − 1 + d: unbiased and never negative."""
    return torch.expm1(-d) + d


KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


@dataclass(frozen=True)
class GRPOConfig:
    """Settings of `grpo_loss`."""

    variant: str  # a name in VARIANTS
    clip_low: float  # the ratio is clipped to [1 − clip_low, 1 + clip_high]
    clip_high: float
    kl_coef: float = 0.0  # of the KL to the reference
    kl_estimator: str = "k3"  # a name in KL_ESTIMATORS
    entropy_coef: float = 0.0  # of the entropy, which is subtracted from the loss
    temperature: float = 1.0  # of the sampling: log-probs are under softmax(logits / temperature)
    vocab: int | None = None  # how many ids take part; None: all rows of the head
    kd_coef: float = 0.0  # of a divergence from a teacher, at temperature 1
    kd_divergence: str = "reverse_kl"
    kd_beta: float = 0.5


def policy_row_loss(
    logp_N: Tensor, entropy_N: Tensor, fields: dict[str, Tensor], cfg: GRPOConfig
) -> Tensor:
    """One loss per token, before weighting.

    A new objective is a surrogate in `VARIANTS`; this is to be edited if it needs other fields.

    Args:
        logp_N, entropy_N: of the policy, in nats; differentiable.
        fields: the fields of the batch at these tokens (see `grpo_loss`).
    """
    ratio_N = log_ratio(logp_N, fields).exp()
    clipped_N = ratio_N.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    surrogate = VARIANTS[cfg.variant].surrogate
    loss_N = surrogate(ratio_N, clipped_N, logp_N, fields["advantage"])
    if "tis_weight" in fields:
        loss_N = loss_N * fields["tis_weight"]
    if cfg.kl_coef:
        kl_N = KL_ESTIMATORS[cfg.kl_estimator](logp_N - fields["ref_logp"])
        loss_N = loss_N + cfg.kl_coef * kl_N
    if cfg.entropy_coef:
        loss_N = loss_N - cfg.entropy_coef * entropy_N
    return loss_N


def log_ratio(logp_N: Tensor, fields: dict[str, Tensor]) -> Tensor:
    """log of the policy's ratio to the old policy, which sampled.

    A sequence's ratio passes its gradient to every one of its tokens (GSPO, eq. 10).
    """
    if "sequence_log_ratio" in fields:
        return fields["sequence_log_ratio"] + logp_N - logp_N.detach()
    return logp_N - fields.get("old_logp", logp_N.detach())


def grpo_loss(
    hidden_TD: Tensor,
    head_VD: Tensor,
    frozen: tuple[Tensor, Tensor] | None,
    batch: Batch,
    cfg: GRPOConfig,
) -> tuple[Tensor, Metrics]:
    """Σ weight · `policy_row_loss` over the loss rows, plus kd_coef · a divergence from a teacher.

    A variant with the ratio of a token costs three products with the head, one with that of a
    sequence four.

    Args:
        frozen: the teacher's (hidden_NC, head_UC) if kd_coef.
        batch: its fields are per token, log-probs in nats. "advantage"; "old_logp" where a rollout
            serves several updates (else the current value, detached); "ref_logp" with kl_coef;
            "tis_weight" where the mismatch of the sampler is corrected; "sampler_logp" to measure
            that mismatch.

    Returns:
        (loss_sum, metrics {name: (sum, count)}).
    """
    weight_N, target_N = batch.select(batch.weight_T), batch.select(batch.target_T)
    hidden_ND = batch.select(hidden_TD)
    fields = {name: batch.select(x_T) for name, x_T in batch.fields.items()}
    logprobs = partial(
        linear_logprob,
        hidden_ND,
        head_VD,
        target_N,
        weight_N,
        temperature=cfg.temperature,
        vocab=cfg.vocab,
    )
    if VARIANTS[cfg.variant].sequence_ratio and "old_logp" in fields:
        with torch.no_grad():
            _, rows = logprobs(_no_loss)
        fields["sequence_log_ratio"] = document_mean(rows["logp"] - fields["old_logp"], batch)
    row_loss = partial(policy_row_loss, cfg=cfg)
    if cfg.kd_coef:
        assert frozen, "a divergence needs the teacher's hidden rows and head"
        term = LogprobTerm(target_N, weight_N, row_loss, fields, cfg.temperature, entropy=True)
        loss_sum, rows = linear_kl(
            hidden_ND,
            head_VD,
            *frozen,
            weight_N,
            cfg.kd_divergence,
            beta=cfg.kd_beta,
            scale=cfg.kd_coef,
            logprob=term,
            vocab=cfg.vocab,
        )
    else:
        loss_sum, rows = logprobs(row_loss, fields, entropy=True)
    values = measures(rows["logp"], fields, cfg) | {"entropy": rows["entropy"]}
    if cfg.kd_coef:
        values[cfg.kd_divergence] = rows["divergence"]
    loss = {"loss": (loss_sum.detach(), torch.as_tensor(batch.normalizer))}
    return loss_sum, loss | weighted(values, (weight_N != 0).double())


@torch.no_grad()
def measures(logp_N: Tensor, fields: dict[str, Tensor], cfg: GRPOConfig) -> dict[str, Tensor]:
    """Per token: what the clip cut off, and how far old policy, sampler and reference are.

    Only clips that change the gradient count: a minimum spares one sign of the advantage, a
    clipped weight neither.
    """
    log_ratio_N, advantage_N = log_ratio(logp_N, fields), fields["advantage"]
    ratio_N = log_ratio_N.exp()
    lowers_N, raises_N = advantage_N < 0, advantage_N > 0
    if VARIANTS[cfg.variant].surrogate is clipped_weight:
        lowers_N = raises_N = advantage_N != 0
    values = {
        "clip_low": ((ratio_N < 1 - cfg.clip_low) & lowers_N).double(),
        "clip_high": ((ratio_N > 1 + cfg.clip_high) & raises_N).double(),
        "old_kl": k3(-log_ratio_N),  # sampled by the old policy: KL(old ‖ policy)
    }
    if "ref_logp" in fields:
        values["ref_kl"] = k3(logp_N - fields["ref_logp"])
    if "sampler_logp" in fields:
        # training and generation have the same weights: what is left is rounding
        old_logp_N = fields.get("old_logp", logp_N)
        values["sampler_mismatch"] = (old_logp_N - fields["sampler_logp"]).abs()
    return values


def document_mean(x_N: Tensor, batch: Batch) -> Tensor:
    """Every loss row gets the mean of its document's loss rows."""
    ends = batch.cu_seqlens[1:].to(batch.rows_N.dtype)
    document_N = torch.bucketize(batch.rows_N, ends, right=True)
    zeros = x_N.new_zeros(len(ends))
    total = zeros.index_add(0, document_N, x_N)
    count = zeros.index_add(0, document_N, torch.ones_like(x_N))
    return (total / count.clamp(min=1))[document_N]


def _no_loss(logp_N: Tensor, entropy_N: Tensor | None, fields: dict[str, Tensor]) -> Tensor:
    return torch.zeros_like(logp_N)
