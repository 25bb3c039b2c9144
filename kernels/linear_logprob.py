"""Losses of the log-prob and entropy of target tokens under hidden_ND @ head_VDᵀ.

Cross-entropy and token-level policy gradients are functions of a row's log-prob, its entropy and a
few numbers that belong to the row. Their derivative with respect to the log-prob is one
coefficient c per row, and d loss / d logits = c · (onehot(target) − p) / temperature, so the
gradient is known the moment the logits of the chunk are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels.backend import triton_runs
from kernels.chunk import LOG2_E, accumulate_dtype, chunked_head, default_chunk_rows, torch_step

# row_loss(logp_n, entropy_n, fields) -> loss_n
RowLoss = Callable[[Tensor, Any, dict[str, Tensor]], Tensor]


@dataclass
class LogprobTerm:
    """A log-prob loss over N rows; shared by `linear_logprob` and the divergences.

    Attributes:
        row_loss: row_loss(logp_n, entropy_n, fields) -> loss_n, plain differentiable torch.
            `fields` has the slice of these n rows of every tensor in `fields`; entropy_n is None
            without `entropy`.
        temperature: divides the logits.
        values: filled on the way, {"logp": [N], "entropy": [N]}, detached, in nats.
    """

    target_N: Tensor
    weight_N: Tensor
    row_loss: RowLoss
    fields: Mapping[str, Tensor] = field(default_factory=dict)
    temperature: float = 1.0
    entropy: bool = False

    def __post_init__(self) -> None:
        self.logp_N = torch.zeros_like(self.weight_N, dtype=accumulate_dtype(self.weight_N))
        self.entropy_N = torch.zeros_like(self.logp_N)

    @property
    def values(self) -> dict[str, Tensor]:
        """Log-probs and, if asked for, entropies of all rows."""
        values = {"logp": self.logp_N}
        if self.entropy:
            values["entropy"] = self.entropy_N
        return values

    def block(self, logits_bV: Tensor, rows: slice, want_grad: bool) -> Tensor:
        """Overwrite a block of logits with d loss / d logits and return its weighted losses."""
        target_b1 = self.target_N[rows].unsqueeze(1)
        # x = log2 of e^(logits / temperature), less its maximum
        scale = LOG2_E / self.temperature
        largest_b1 = logits_bV.amax(1, keepdim=True)
        x_bV = torch.add(largest_b1 * -scale, logits_bV, alpha=scale, out=logits_bV)
        target_x_b = x_bV.gather(1, target_b1).squeeze(1)
        exp_bV = torch.exp2(x_bV, out=None if self.entropy else x_bV)
        sum_b = exp_bV.sum(1)
        log_sum_b = sum_b.log()
        mean_b = sum_b.new_zeros(len(sum_b))
        entropy_b = None
        if self.entropy:  # H = −Σ p log p with log p = x / log2(e) − log Σ 2^x
            mean_b = _weighted_sum(exp_bV, x_bV) / sum_b
            entropy_b = log_sum_b - mean_b / LOG2_E
        loss_b, c_logp_b, c_entropy_b = self.coefficients(
            target_x_b / LOG2_E - log_sum_b, entropy_b, rows, want_grad
        )
        if not want_grad:
            return loss_b
        factor_b1 = -1 / (sum_b * self.temperature).unsqueeze(1)
        c_logp_b1 = c_logp_b.unsqueeze(1)
        if c_entropy_b.any():  # dH/dlogits = −p (log p + H) = −p (x − mean) / log2(e)
            grad_bV = x_bV.sub_(mean_b.unsqueeze(1)).mul_((c_entropy_b / LOG2_E).unsqueeze(1))
            grad_bV.add_(c_logp_b1).nan_to_num_().mul_(exp_bV).mul_(factor_b1)
        else:
            grad_bV = torch.mul(exp_bV, c_logp_b1 * factor_b1, out=logits_bV)
        grad_bV.scatter_add_(1, target_b1, c_logp_b1 / self.temperature)
        return loss_b

    def coefficients(
        self, logp_n: Tensor, entropy_n: Tensor | None, rows: slice, want_grad: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted losses of some rows, and their derivatives by log-prob and by entropy.

        The derivatives are 0 without want_grad; that by entropy is 0 without an entropy, too.
        """
        self.logp_N[rows] = logp_n.to(self.logp_N.dtype)
        leaves = [logp_n.detach().requires_grad_()]
        if entropy_n is not None:
            self.entropy_N[rows] = entropy_n.to(self.entropy_N.dtype)
            leaves.append(entropy_n.detach().requires_grad_())
        fields = {name: field_N[rows] for name, field_N in self.fields.items()}
        grads = [torch.zeros_like(logp_n)] * 2
        with torch.enable_grad():
            loss_n = self.row_loss(leaves[0], leaves[1] if self.entropy else None, fields)
            loss_n = loss_n * self.weight_N[rows]
            if want_grad:
                grads[: len(leaves)] = torch.autograd.grad(
                    loss_n.sum(), leaves, allow_unused=True, materialize_grads=True
                )
        return loss_n.detach(), grads[0], grads[1]


def _weighted_sum(weight_bV: Tensor, x_bV: Tensor) -> Tensor:
    """Σ weight · x of each row, where a weight of 0 counts even if x is −inf."""
    product_bV = weight_bV * x_bV
    sum_b = product_bV.sum(1)
    return sum_b if sum_b.isfinite().all() else product_bV.nan_to_num_().sum(1)


def linear_logprob(  # noqa: PLR0913 (one argument per symbol of the formula)
    hidden_ND: Tensor,
    head_VD: Tensor,
    target_N: Tensor,
    weight_N: Tensor,
    row_loss: RowLoss,
    fields: Mapping[str, Tensor] | None = None,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    vocab: int | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Σ_n weight_n · row_loss(log p(target_n), entropy_n, fields_n).

    Differentiable in hidden_ND and head_VD. Log-probs are in nats under softmax(hidden @
    head[:vocab]ᵀ / temperature). Under `torch.no_grad` only the product of the logits runs. The
    arguments are those of `LogprobTerm`.

    Returns:
        (loss_sum, {"logp": [N], "entropy": [N]}); the latter are detached, the entropy only if
        asked for.

    Raises:
        ValueError: on a CPU, for a target ≥ vocab.
    """
    vocab = vocab or head_VD.shape[0]
    if target_N.device.type == "cpu" and target_N.numel() and int(target_N.max()) >= vocab:
        raise ValueError(f"target id {int(target_N.max())} is outside the vocabulary of {vocab}")
    term = LogprobTerm(target_N, weight_N, row_loss, fields or {}, temperature, entropy)
    if triton_runs(hidden_ND):
        from kernels import triton_head, triton_steps  # here: not everyone has Triton

        chunk_rows = chunk_rows or triton_head.chunk_rows(vocab, hidden_ND)
        step = triton_steps.logprob_step(term, vocab)
    else:
        chunk_rows = chunk_rows or default_chunk_rows(vocab, len(hidden_ND), hidden_ND.device)
        step = torch_step(term.block, chunk_rows, vocab, hidden_ND)
    return chunked_head(hidden_ND, head_VD, step, vocab, chunk_rows), term.values
