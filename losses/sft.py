"""Supervised fine-tuning: cross-entropy on the trained tokens."""

from kernels.linear_logprob import linear_logprob


def cross_entropy(logp_N, entropy_N, fields):
    """−log p(target): a log-prob loss is a plain function of short vectors."""
    return -logp_N


def sft_loss(hidden_TD, head_VD, frozen, batch):
    """Σ weight · CE over the loss rows, under the full head. Returns (loss_sum, {metric: (sum, count)})."""
    weight_N, target_N = batch.select(batch.weight_T), batch.select(batch.target_T)
    loss_sum, rows = linear_logprob(
        batch.select(hidden_TD), head_VD, target_N, weight_N, cross_entropy
    )
    return loss_sum, {"loss": (loss_sum.detach(), weight_N.sum())} | weighted(
        {"ce": -rows["logp"]}, weight_N
    )


def weighted(values, weight_N):
    """Metrics reduce as the loss does: {name: (Σ weight · value, Σ weight)}."""
    return {name: ((value_N * weight_N).sum(), weight_N.sum()) for name, value_N in values.items()}
