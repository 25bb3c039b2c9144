"""Policy gradients on groups of samples: GRPO and its kin, as functions of a token's log-prob.

Every variant is a row loss of short vectors plus a weighting of the tokens (`VARIANTS`):

| variant | ratio | each token weighs | paper |
|---|---|---|---|
| grpo | token | 1/|o|, over sequences | DeepSeekMath, arXiv 2402.03300, eq. 3 |
| token | token | 1, over all tokens (DAPO's, BNPO's reduction) | DAPO, arXiv 2503.14476, eq. 8 |
| dr_grpo | token | 1/max_new_tokens, over sequences | Dr. GRPO, arXiv 2503.20783 |
| gspo | sequence | 1/|o|, over sequences | GSPO, arXiv 2507.18071, eq. 5 (gradient: eq. 10) |
| cispo | token, detached | 1, over all tokens | MiniMax-M1, arXiv 2506.13585, eq. 4 |
| sapo | token, through a sigmoid | 1/|o|, over sequences | SAPO, arXiv 2511.20347, eq. 5 and 6 |
| gmpo | geometric mean of tokens' | 1/|o|, over sequences | GMPO, arXiv 2507.20673, eq. 4 |
| dppo | token | 1/max_new_tokens, over sequences | DPPO, arXiv 2602.04879, eq. 12 and 13 |
| mis | sequence, detached | 1/|o|, over sequences | Liu, Li et al., richardli.xyz/rl-collapse |

With a variant come the advantage and the clip bounds of its paper, as defaults (config.py): Dr.
GRPO and DPPO do not divide by a deviation, GSPO's bounds are 3e-4 and 4e-4, DAPO's upper one is
0.28, CISPO has no lower one, SAPO none at all; GMPO's are those of the log-ratio, DPPO's those of
the probability. Where a rollout serves one update all ratios are 1, and variants of equal weighting
have one gradient. A sample without loss rows (masked because it did not stop) counts in no divisor.

Policy, old and reference log-probs are all taken at the sampling temperature. Legend: N loss rows.
"""

import math
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
from plugins import Table


def clipped_ratio(ratio: Tensor, clipped: Tensor, logp: Tensor, advantage: Tensor) -> Tensor:
    """−min(r A, clip(r) A) (Schulman et al., arXiv 1707.06347, eq. 7)."""
    return -torch.minimum(ratio * advantage, clipped * advantage)


def clipped_weight(ratio: Tensor, clipped: Tensor, logp: Tensor, advantage: Tensor) -> Tensor:
    """−sg(clip(r)) A log p: a clipped token keeps its gradient, with a bounded weight."""
    return -clipped.detach() * advantage * logp


def masked_weight(ratio: Tensor, clipped: Tensor, logp: Tensor, advantage: Tensor) -> Tensor:
    """−sg(r) A log p, and 0 where r is out of bounds: masked importance sampling."""
    return -torch.where(ratio == clipped, ratio, 0.0).detach() * advantage * logp


def soft_gate(ratio: Tensor, clipped: Tensor, logp: Tensor, advantage: Tensor) -> Tensor:
    """−4/τ σ(τ(r − 1)) A, τ = 1 for A > 0, else 1.05: no clip, but a slope that dies away."""
    tau = torch.full_like(ratio, 1.05).masked_fill(advantage > 0, 1.0)
    return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantage


def clip_ratio(ratio: Tensor, old_logp: Tensor, low: float, high: float) -> Tensor:
    """The ratio within [1 − low, 1 + high]."""
    return ratio.clamp(1 - low, 1 + high)


def clip_log_ratio(ratio: Tensor, old_logp: Tensor, low: float, high: float) -> Tensor:
    """The ratio within [e^−low, e^high]."""
    return ratio.clamp(math.exp(-low), math.exp(high))


def clip_probability(ratio: Tensor, old_logp: Tensor, low: float, high: float) -> Tensor:
    """The ratio whose probability is within [old − low, old + high]: PPO's minimum then has the
    gradient of DPPO's mask."""
    old = old_logp.exp()
    return ratio.clamp(1 - low / old, 1 + high / old)


class Variant(NamedTuple):
    """One of the objectives in the table above."""

    surrogate: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # as clipped_ratio
    weighting: str  # of the tokens: "token", "sequence" or "constant"
    sequence_ratio: bool = False  # one ratio for all tokens of a sequence
    geometric_mean: bool = False  # of the loss of a sequence's tokens, in place of their mean
    clip: Callable[[Tensor, Tensor, float, float], Tensor] | None = clip_ratio  # None: no bounds

    @property
    def whole_sequences(self) -> bool:
        """Whether a token's loss depends on its sequence: one more pass of the head."""
        return self.sequence_ratio or self.geometric_mean


VARIANTS: Table[Variant] = Table(
    "variant",
    Variant,
    {
        "grpo": Variant(clipped_ratio, "sequence"),
        "token": Variant(clipped_ratio, "token"),
        "dr_grpo": Variant(clipped_ratio, "constant"),
        "gspo": Variant(clipped_ratio, "sequence", sequence_ratio=True),
        "cispo": Variant(clipped_weight, "token"),
        "sapo": Variant(soft_gate, "sequence", clip=None),
        "gmpo": Variant(clipped_ratio, "sequence", geometric_mean=True, clip=clip_log_ratio),
        "dppo": Variant(clipped_ratio, "constant", clip=clip_probability),
        "mis": Variant(masked_weight, "sequence", sequence_ratio=True),
    },
)


def clipped_variants() -> list[str]:
    """The names of those that read the clip bounds."""
    return [name for name, variant in VARIANTS.items() if variant.clip]


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
    clip_low: float  # bounds of the ratio, as the variant's `clip` reads them
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
    ratio_N, clipped_N = ratios(logp_N, fields, cfg)
    surrogate = VARIANTS[cfg.variant].surrogate
    loss_N = surrogate(ratio_N, clipped_N, logp_N, fields["advantage"])
    for name in ("sequence_weight", "tis_weight"):
        if name in fields:
            loss_N = loss_N * fields[name]
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


def ratios(logp_N: Tensor, fields: dict[str, Tensor], cfg: GRPOConfig) -> tuple[Tensor, Tensor]:
    """(the policy's ratio to the old policy, the same within its variant's bounds)."""
    ratio_N, clip = log_ratio(logp_N, fields).exp(), VARIANTS[cfg.variant].clip
    if clip is None:
        return ratio_N, ratio_N
    old_logp_N = fields.get("old_logp", logp_N.detach())
    return ratio_N, clip(ratio_N, old_logp_N, cfg.clip_low, cfg.clip_high)


def sequence_fields(
    logp_N: Tensor, fields: dict[str, Tensor], batch: Batch, cfg: GRPOConfig
) -> dict[str, Tensor]:
    """What a variant of whole sequences needs beside a token's own fields.

    GMPO's loss of a sequence is −A Π r^(1/|o|), with the ratios that PPO's minimum leaves. As a sum
    over tokens it is PPO's loss of each, times the geometric mean over the token's own ratio.
    """
    if VARIANTS[cfg.variant].sequence_ratio:
        return {"sequence_log_ratio": document_mean(logp_N - fields["old_logp"], batch)}
    ratio_N, clipped_N = ratios(logp_N, fields, cfg)
    least_N, most_N = torch.minimum(ratio_N, clipped_N), torch.maximum(ratio_N, clipped_N)
    left_N = torch.where(fields["advantage"] < 0, most_N, least_N).log()
    return {"sequence_weight": (document_mean(left_N, batch) - left_N).exp()}


def grpo_loss(
    hidden_TD: Tensor,
    head_VD: Tensor,
    frozen: tuple[Tensor, Tensor] | None,
    batch: Batch,
    cfg: GRPOConfig,
) -> tuple[Tensor, Metrics]:
    """Σ weight · `policy_row_loss` over the loss rows, plus kd_coef · a divergence from a teacher.

    A variant of single tokens costs three products with the head, one of whole sequences four.

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
    if VARIANTS[cfg.variant].whole_sequences and "old_logp" in fields:
        with torch.no_grad():
            _, rows = logprobs(_no_loss)
        fields |= sequence_fields(rows["logp"], fields, batch, cfg)
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
    clipped or masked weight neither.
    """
    advantage_N = fields["advantage"]
    ratio_N, clipped_N = ratios(logp_N, fields, cfg)
    lowers_N, raises_N = advantage_N < 0, advantage_N > 0
    if VARIANTS[cfg.variant].surrogate in (clipped_weight, masked_weight):
        lowers_N = raises_N = advantage_N != 0
    values = {
        "clip_low": ((ratio_N < clipped_N) & lowers_N).double(),
        "clip_high": ((ratio_N > clipped_N) & raises_N).double(),
        "old_kl": k3(-log_ratio(logp_N, fields)),  # sampled by the old: KL(old ‖ policy)
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
