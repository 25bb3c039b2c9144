"""Divergence of a student's next-token distributions from a teacher's, from their hidden rows.

Teacher and student may differ in width and in padded head rows. Only the first `vocab` rows of
both heads take part; they are cut before the softmax.

Legend: N loss rows, n rows of a chunk, b rows of a block, D and C hidden sizes of student and
teacher, V shared vocabulary, U head rows of the teacher.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.backend import triton_runs
from kernels.chunk import accumulate_dtype, chunked_head, default_chunk_rows, softmax, torch_step
from kernels.divergences import DIVERGENCES, FORMULAS, LIMITS, compare, through_softmax
from kernels.linear_logprob import LogprobTerm


def linear_kl(  # noqa: PLR0913 (one argument per symbol of the formula)
    hidden_ND: Tensor,
    head_VD: Tensor,
    teacher_hidden_NC: Tensor,
    teacher_head_UC: Tensor,
    weight_N: Tensor,
    divergence: str,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    scale: float = 1.0,
    clip: float = 0.0,
    logprob: LogprobTerm | None = None,
    vocab: int | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Σ_n weight_n · scale · D(teacher_n, student_n), plus a log-prob loss of the same logits.

    Args:
        divergence: a name in DIVERGENCES; one that a plugin added is differentiated block by block.
            Both distributions are softmaxes of logits / temperature, in nats.
        scale: multiplies the divergence; T² goes here.
        clip: the largest divergence of a row, before scale; 0: none. See `DivergenceTerm`.
        logprob: a second loss with weights of its own, computed from the same logits.

    Gradients reach hidden_ND and head_VD, never the teacher.

    Returns:
        (loss_sum, {"divergence": [N]} and the values of `logprob`); the latter are detached, and
        neither weighted, scaled nor clipped.
    """
    vocab = vocab or min(head_VD.shape[0], teacher_head_UC.shape[0])
    divergence = LIMITS.get((divergence, beta), divergence)
    loss = DivergenceTerm(weight_N, temperature, scale, logprob, clip=clip)
    teacher_hidden_NC = teacher_hidden_NC.detach()
    teacher = teacher_hidden_NC, teacher_head_UC.detach()[:vocab].to(teacher_hidden_NC.dtype)
    kernels_run = triton_runs(hidden_ND) and triton_runs(teacher_hidden_NC)
    if kernels_run and divergence in FORMULAS:
        from kernels import triton_head, triton_steps  # here: not everyone has Triton

        chunk_rows = chunk_rows or triton_head.chunk_rows(vocab, hidden_ND)
        largest_nD = hidden_ND[:chunk_rows]
        step = triton_steps.kl_step(loss, divergence, beta, largest_nD, teacher)
    else:
        # student and teacher logits share the budget
        if not chunk_rows:
            chunk_rows = default_chunk_rows(vocab, len(hidden_ND), hidden_ND.device, models=2)
        block_loss = _torch_block_loss(loss, divergence, beta)
        step = torch_step(block_loss, chunk_rows, vocab, hidden_ND, teacher)
    return chunked_head(hidden_ND, head_VD, step, vocab, chunk_rows), loss.values


@dataclass
class DivergenceTerm:
    """What a divergence does with the value of each row; shared by `linear_kl` and the top-k.

    Attributes:
        temperature, scale, logprob: as in `linear_kl`.
        clip: a row whose divergence is c times the clip counts as the clip, and its gradient is
            divided by c: it keeps its direction. 0: none.
        values: filled on the way, {"divergence": [N]} and those of `logprob`, detached.
    """

    weight_N: Tensor
    temperature: float
    scale: float
    logprob: LogprobTerm | None
    clip: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        value_N = torch.zeros_like(self.weight_N, dtype=accumulate_dtype(self.weight_N))
        self.values = {"divergence": value_N}
        if self.logprob:
            self.values |= self.logprob.values

    def loss(self, value_n: Tensor, rows: slice) -> Tensor:
        """The weighted loss of some rows whose divergence is known."""
        self.values["divergence"][rows] = value_n
        if self.clip:
            value_n = value_n.clamp(max=self.clip)
        return value_n * self.weight_N[rows] * self.scale

    def factor(self, rows: slice) -> Tensor:
        """d loss / d logits over d divergence / d (logits / temperature), per row.

        With a clip, of rows that have been given to `loss`.
        """
        factor_n = self.weight_N[rows] * (self.scale / self.temperature)
        if self.clip:
            factor_n = factor_n * self.clip / self.values["divergence"][rows].clamp(min=self.clip)
        return factor_n


def _torch_block_loss(loss: DivergenceTerm, divergence: str, beta: float):
    """The block_loss of `torch_step`: distributions, divergence, gradient."""
    formula = FORMULAS.get(divergence)
    buffers = None

    def block_loss(student_bV: Tensor, teacher_bV: Tensor, rows: slice, want_grad: bool) -> Tensor:
        nonlocal buffers
        if buffers is None:  # the first block is the largest
            buffers = torch.empty_like(student_bV), torch.empty_like(student_bV)
        logprob_bV = student_bV.clone() if loss.logprob else student_bV
        p_s, normalizer_s = softmax(student_bV, loss.temperature, buffers[0][: len(student_bV)])
        p_t, normalizer_t = softmax(teacher_bV, loss.temperature, buffers[1][: len(student_bV)])
        inverse = 1 / loss.temperature
        if formula:
            difference = torch.sub(student_bV, teacher_bV, out=student_bV)
            shift_b1 = normalizer_t - normalizer_s
            d = torch.add(shift_b1, difference, alpha=inverse, out=difference)
            value_b, grad_bV = formula(compare(d, p_s, p_t), beta)
        else:
            log_s = torch.add(-normalizer_s, student_bV, alpha=inverse, out=student_bV)
            log_t = torch.add(-normalizer_t, teacher_bV, alpha=inverse, out=teacher_bV)
            with torch.enable_grad():
                leaf = log_s.detach().requires_grad_()
                value_b = DIVERGENCES[divergence](leaf, log_t, beta)
                (grad_bV,) = torch.autograd.grad(value_b.sum(), leaf)
            value_b, grad_bV = value_b.detach(), through_softmax(grad_bV.clone(), p_s)
        loss_b = loss.loss(value_b, rows)
        if want_grad:
            factor_b1 = loss.factor(rows).to(grad_bV.dtype).unsqueeze(1)
            torch.mul(grad_bV, factor_b1, out=student_bV)
        if loss.logprob:
            loss_b = loss_b + loss.logprob.block(logprob_bV, rows, want_grad)
            student_bV.add_(logprob_bV)
        return loss_b

    return block_loss
