"""Supervised fine-tuning: cross-entropy on the trained tokens."""

from torch import Tensor

from data.batch import Batch, Metrics
from kernels.linear_logprob import linear_logprob


def cross_entropy(logp_N: Tensor, entropy_N: Tensor | None, fields: dict[str, Tensor]) -> Tensor:
    """−log p(target): a log-prob loss is a plain function of short vectors."""
    return -logp_N


def sft_loss(
    hidden_TD: Tensor, head_VD: Tensor, frozen: None, batch: Batch
) -> tuple[Tensor, Metrics]:
    """Σ weight · CE over the loss rows, under the full head. Returns (loss_sum, metrics)."""
    weight_N, target_N = batch.select(batch.weight_T), batch.select(batch.target_T)
    loss_sum, rows = linear_logprob(
        batch.select(hidden_TD), head_VD, target_N, weight_N, cross_entropy
    )
    loss = {"loss": (loss_sum.detach(), weight_N.sum())}
    return loss_sum, loss | weighted({"ce": -rows["logp"]}, weight_N)


def weighted(values: dict[str, Tensor], weight_N: Tensor) -> Metrics:
    """Metrics reduce as the loss does: {name: (Σ weight · value, Σ weight)}."""
    return {name: ((value_N * weight_N).sum(), weight_N.sum()) for name, value_N in values.items()}
