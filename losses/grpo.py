"""Policy gradients on groups of samples: GRPO and its kin, as functions of a token's log-prob.

Every variant is a row loss of short vectors plus a weighting of the tokens (`VARIANTS`):

| variant | ratio | each token weighs | paper |
|---|---|---|---|
| grpo | token | 1/|o|, over sequences | DeepSeekMath, arXiv 2402.03300, eq. 3 |
| token | token | 1, over all tokens (DAPO's, BNPO's reduction) | DAPO, arXiv 2503.14476, eq. 8 |
| dr_grpo | token | 1/max_new_tokens, over sequences | Dr. GRPO, arXiv 2503.20783 |
| gspo | sequence | 1/|o|, over sequences | GSPO, arXiv 2507.18071, eq. 5 (gradient: eq. 10) |
| cispo | token, detached | 1, over all tokens | MiniMax-M1, arXiv 2506.13585, eq. 4 |

With a variant come the baseline and the clip bounds of its paper, as defaults (config.py): Dr. GRPO
divides by no deviation, GSPO's bounds are 3e-4 and 4e-4, DAPO's upper one is 0.28, CISPO has no lower
one. A sample without loss rows (masked because it did not stop) counts in no divisor.

Policy, old and reference log-probs are all taken at the sampling temperature. Legend: N loss rows.
"""

import torch

from kernels.linear_kl import linear_kl
from kernels.linear_logprob import LogprobTerm, linear_logprob
from losses.kd import named_divergence
from losses.sft import weighted


def clipped(log_ratio_N, logp_N, advantage_N, low, high):
    """−min(r A, clip(r, 1−low, 1+high) A) (Schulman et al., arXiv 1707.06347, eq. 7)."""
    ratio_N = log_ratio_N.exp()
    return -torch.minimum(ratio_N * advantage_N, ratio_N.clamp(1 - low, 1 + high) * advantage_N)


def clipped_weight(log_ratio_N, logp_N, advantage_N, low, high):
    """−sg(clip(r, 1−low, 1+high)) A log p: a clipped token keeps its gradient, with a bounded weight."""
    return -log_ratio_N.exp().clamp(1 - low, 1 + high).detach() * advantage_N * logp_N


# variant -> (row loss, weighting of the tokens, is the ratio the sequence's?)
VARIANTS = {
    "grpo": (clipped, "sequence", False),
    "token": (clipped, "token", False),
    "dr_grpo": (clipped, "constant", False),
    "gspo": (clipped, "sequence", True),
    "cispo": (clipped_weight, "token", False),
}

# Estimates of KL(policy ‖ reference) from d = log p − log p_ref of a sampled token (Schulman 2020,
# "Approximating KL divergence"). What the policy follows on its own samples depends on the place
# (arXiv 2510.01555, 2512.21852; tests/test_grpo.py enumerates small vocabularies):
# - in the loss, token by token: k1's gradient is 0 on average, k2's is that of KL(policy ‖ ref), k3's
#   that of KL(ref ‖ policy), each of the next token while the prefixes that the policy writes stay put.
# - in the reward, detached (`rl.logprobs.kl_penalty`): only k1 is right, and summed over a sample it has
#   the gradient of the KL of whole sequences; k3 has that of KL(policy ‖ ref) − KL(ref ‖ policy).
KL_ESTIMATES = {
    "k1": lambda d: d,
    "k2": lambda d: d.square() / 2,
    "k3": lambda d: torch.expm1(-d) + d,
}


def grpo_loss(
    hidden_TD,
    head_VD,
    frozen,
    batch,
    *,
    variant,
    clip_low,
    clip_high,
    beta=0.0,
    kl="k3",
    entropy=0.0,
    temperature=1.0,
    vocab=None,
    kd=0.0,
    divergence="reverse_kl",
    kd_beta=0.5,
):
    """Σ weight · (policy loss · tis_weight + beta · KL estimate − entropy · H) over the loss rows, plus kd · divergence from a teacher
    (at temperature 1).

    batch.fields (per token, nats): "advantage"; "old_logp" where a rollout serves several updates (else the current value, detached);
    "ref_logp" if beta; "tis_weight" where the sampler's mismatch is corrected. frozen: the teacher's (hidden_NC, head_UC) if kd.
    Returns (loss_sum, {metric: (sum, count)}); a token-level variant costs three vocabulary products, gspo four.
    """
    policy_loss, _, by_sequence = VARIANTS[variant]
    weight_N, target_N, hidden_ND = (
        batch.select(x) for x in (batch.weight_T, batch.target_T, hidden_TD)
    )
    fields = {name: batch.select(x_T) for name, x_T in batch.fields.items()}
    if by_sequence and "old_logp" in fields:
        with torch.no_grad():
            _, rows = linear_logprob(
                hidden_ND,
                head_VD,
                target_N,
                weight_N,
                _nothing,
                temperature=temperature,
                vocab=vocab,
            )
        fields["sequence_log_ratio"] = sequence_mean(rows["logp"] - fields["old_logp"], batch)

    def row_loss(logp_N, entropy_N, fields):
        loss_N = policy_loss(
            log_ratio(logp_N, fields), logp_N, fields["advantage"], clip_low, clip_high
        ) * fields.get("tis_weight", 1.0)
        if beta:
            loss_N = loss_N + beta * KL_ESTIMATES[kl](logp_N - fields["ref_logp"])
        return loss_N - entropy * entropy_N if entropy else loss_N

    if kd:
        term = LogprobTerm(target_N, weight_N, row_loss, fields, temperature, entropy=True)
        loss_sum, rows = linear_kl(
            hidden_ND,
            head_VD,
            *frozen,
            weight_N,
            named_divergence(divergence, kd_beta),
            beta=kd_beta,
            scale=kd,
            logprob=term,
            vocab=vocab,
        )
        rows |= {"logp": term.logp_N, "entropy": term.entropy_N}
    else:
        loss_sum, rows = linear_logprob(
            hidden_ND,
            head_VD,
            target_N,
            weight_N,
            row_loss,
            fields,
            temperature=temperature,
            entropy=True,
            vocab=vocab,
        )
    values = measures(rows["logp"], fields, clip_low, clip_high, policy_loss is clipped_weight) | {
        "entropy": rows["entropy"]
    }
    if kd:
        values[divergence] = rows["divergence"]
    return loss_sum, {"loss": (loss_sum.detach(), torch.as_tensor(batch.normaliser))} | weighted(
        values, (weight_N != 0).double()
    )


def log_ratio(logp_N, fields):
    """log of the policy's ratio to the one that sampled; a sequence's ratio passes its gradient to every token (GSPO, eq. 10)."""
    if "sequence_log_ratio" in fields:
        return fields["sequence_log_ratio"] + logp_N - logp_N.detach()
    return logp_N - fields.get("old_logp", logp_N.detach())


@torch.no_grad()
def measures(logp_N, fields, low, high, either_sign):
    """Per token: what the clip cut off, the distance to the old policy, the sampler's and the reference.

    Only clips that change the gradient count: a minimum spares one sign of the advantage, a clipped weight neither.
    """
    log_ratio_N, advantage_N = log_ratio(logp_N, fields), fields["advantage"]
    ratio_N, any_N = log_ratio_N.exp(), (advantage_N != 0) & either_sign
    values = {
        "clip_low": ((ratio_N < 1 - low) & ((advantage_N < 0) | any_N)).double(),
        "clip_high": ((ratio_N > 1 + high) & ((advantage_N > 0) | any_N)).double(),
        "old_kl": KL_ESTIMATES["k3"](-log_ratio_N),  # sampled by the old policy: KL(old ‖ policy)
    }
    if "ref_logp" in fields:
        values["ref_kl"] = KL_ESTIMATES["k3"](logp_N - fields["ref_logp"])
    if (
        "sampler_logp" in fields
    ):  # the same weights in training and in generation: what is left is rounding
        values["sampler_mismatch"] = (fields.get("old_logp", logp_N) - fields["sampler_logp"]).abs()
    return values


def sequence_mean(x_N, batch):
    """Every loss row gets the mean of its document's loss rows."""
    document_N = torch.bucketize(
        batch.rows_N, batch.cu_seqlens[1:].to(batch.rows_N.dtype), right=True
    )
    zeros = x_N.new_zeros(len(batch.documents))
    total, count = (
        zeros.index_add(0, document_N, x_N),
        zeros.index_add(0, document_N, torch.ones_like(x_N)),
    )
    return (total / count.clamp(min=1))[document_N]


def _nothing(logp_N, entropy_N, fields):
    return torch.zeros_like(logp_N)
