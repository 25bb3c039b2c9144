"""The divergences between a teacher t and a student s, as every PyTorch path reads them.

A formula takes both distributions of a block of rows and returns the value of each row and its
gradient at the student's logits, derived by hand. With d = log p_s − log p_t everything is built
from p_s − p_t = ± max(p_s, p_t) · (1 − e^{−|d|}) and from sums like Σ (p_s − p_t − p_t d) = KL(t ‖
s), whose terms are of second order in d. In fp32 they keep six digits where Σ p_t (log p_t − log
p_s) keeps three (teacher and student close, 151,665 ids). The work is bound by memory: formulas
overwrite what they are given.

`DIVERGENCES` are the same as differentiable functions of log-probs; a plugin adds its own there.
The kernels of kernels/triton_head.py have the formulas once more, tested against these.

Legend: n rows, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from plugins import Table


class Pair(NamedTuple):
    """The distributions of some rows, [n, V] each."""

    student: Tensor  # p_s
    teacher: Tensor  # p_t
    log_ratio: Tensor  # d = log p_s − log p_t
    difference: Tensor  # p_s − p_t, without cancellation


def compare(d: Tensor, p_s: Tensor, p_t: Tensor) -> Pair:
    """A pair from its log-ratio and probabilities."""
    if not d.is_cuda and d.numel() and d.amax() < 40:  # cannot overflow: fewer passes
        return Pair(p_s, p_t, d, torch.expm1(d).mul_(p_t))
    size = torch.maximum(p_s, p_t).mul_(d.abs().neg_().expm1_())
    return Pair(p_s, p_t, d, torch.copysign(size, d, out=size))


def _log_ratios_to_mixture(d: Tensor, teacher_weight: float) -> tuple[Tensor, Tensor]:
    """log(p_s/m) and log(p_t/m), m = teacher_weight · p_t + (1 − teacher_weight) · p_s."""
    # The weight of the smaller probability: the teacher's where d > 0. (On a CPU torch.where takes
    # 20 times as long as any of these, since it branches at every number.)
    larger, smaller = (
        max(teacher_weight, 1 - teacher_weight),
        min(teacher_weight, 1 - teacher_weight),
    )
    sign = d.sign() if teacher_weight == larger else d.sign().neg_()
    weight = F.leaky_relu_(sign, -smaller / larger).mul_(larger)
    log_m = d.abs().neg_().expm1_().mul_(weight).log1p_()  # log(m / max(p_s, p_t))
    return d.clamp(max=0).sub_(log_m), d.neg().clamp_(max=0).sub_(log_m)


def _second_order(p: Tensor, x: Tensor, first_order: Tensor) -> Tensor:
    """p · (e^x − 1 − x), by its series where x is small.

    A skewed mixture is (1−β)² times closer than the pair was, so that the difference would lose
    digits.

    Args:
        first_order: p · (e^x − 1), known without overflow; used where x is not small.
    """
    limit = 1 / 8 if x.dtype == torch.float32 else 1e-3  # the terms left out are below rounding
    large = F.hardshrink(x, limit)  # x or 0
    small = x - large
    series = small / 720
    for coefficient in (1 / 120, 1 / 24, 1 / 6, 1 / 2):
        series.add_(coefficient).mul_(small)
    series.mul_(small).mul_(p)
    is_large = large.sign_().abs_()  # 0 or 1: see _log_ratios_to_mixture
    return series.addcmul_(first_order.addcmul_(p, x, value=-1), is_large)


def through_softmax(grad: Tensor, p: Tensor) -> Tensor:
    """The gradient at the logits, from that at the log-probs."""
    return grad.sub_(p * grad.sum(1, keepdim=True))


def forward_kl(pair: Pair, beta: float) -> tuple[Tensor, Tensor]:
    """KL(t ‖ s); d/dz = p_s − p_t (Hinton et al., arXiv 1503.02531)."""
    _, p_t, d, difference = pair
    return torch.addcmul(difference, p_t, d, value=-1, out=d).sum(1), difference


def reverse_kl(pair: Pair, beta: float) -> tuple[Tensor, Tensor]:
    """KL(s ‖ t); d/dz = p_s (d − KL) (Gu et al., arXiv 2306.08543)."""
    p_s, _, d, difference = pair
    value = torch.addcmul(difference.neg_(), p_s, d, out=difference).sum(1)
    return value, d.sub_(value.unsqueeze(1)).mul_(p_s)


def mixed_kl(pair: Pair, beta: float) -> tuple[Tensor, Tensor]:
    """β KL(t ‖ s) + (1−β) KL(s ‖ t) (mixed as in Zhao et al., arXiv 2605.16826)."""
    p_s, p_t, d, difference = pair
    forward = torch.addcmul(difference, p_t, d, value=-1).sum(1)
    reverse = torch.addcmul(difference.neg(), p_s, d).sum(1)
    grad = d.sub_(reverse.unsqueeze(1)).mul_(p_s).mul_(1 - beta).add_(difference, alpha=beta)
    return forward.mul_(beta).add_(reverse, alpha=1 - beta), grad


def jsd(pair: Pair, beta: float) -> tuple[Tensor, Tensor]:
    """β KL(t ‖ m) + (1−β) KL(s ‖ m), m = β p_t + (1−β) p_s (Agarwal et al., arXiv 2306.13649).

    It vanishes at both ends of β (see LIMITS). d/dz = (1−β) p_s (log(p_s/m) − KL(s ‖ m)).
    """
    p_s, p_t, d, difference = pair
    log_s, log_t = _log_ratios_to_mixture(d, beta)
    kl_s = torch.addcmul(difference.mul_(-beta), p_s, log_s, out=difference).sum(1, keepdim=True)
    value = log_t.mul_(p_t).mul_(beta).add_(p_s * log_s, alpha=1 - beta).sum(1)
    return value, log_s.sub_(kl_s).mul_(p_s).mul_(1 - beta)


def skew_forward_kl(pair: Pair, beta: float) -> tuple[Tensor, Tensor]:
    """KL(t ‖ m), m = β p_t + (1−β) p_s (DistiLLM, Ko et al., arXiv 2402.03898, eq. 2, α = β)."""
    p_s, p_t, d, difference = pair
    log_s, log_t = _log_ratios_to_mixture(d, beta)
    # −(1−β) p_s p_t/m, less a multiple of p_s, which the softmax cancels
    grad = log_s.exp_().mul_(difference).mul_((1 - beta) ** 2)
    value = _second_order(p_t, log_t.neg_(), difference.mul_(1 - beta)).sum(1)
    return value, through_softmax(grad, p_s)


def skew_reverse_kl(pair: Pair, beta: float) -> tuple[Tensor, Tensor]:
    """KL(s ‖ m), m = (1−β) p_t + β p_s (DistiLLM, Ko et al., arXiv 2402.03898, eq. 5, α = β)."""
    p_s, _, d, difference = pair
    log_s, _ = _log_ratios_to_mixture(d, 1 - beta)
    value = _second_order(p_s, -log_s, difference.mul_(beta - 1)).sum(1)
    grad = log_s.sub_(torch.expm1(log_s), alpha=beta).mul_(p_s)
    return value, through_softmax(grad, p_s)


def total_variation(pair: Pair, beta: float) -> tuple[Tensor, Tensor]:
    """½ Σ |p_s − p_t| (Wen et al., arXiv 2307.15190); at ties the sub-gradient 0 is taken."""
    p_s, _, d, difference = pair
    return difference.abs().sum(1).mul_(0.5), through_softmax(d.sign_().mul_(p_s).mul_(0.5), p_s)


FORMULAS: dict[str, Callable[[Pair, float], tuple[Tensor, Tensor]]] = {
    formula.__name__: formula
    for formula in (
        forward_kl,
        reverse_kl,
        mixed_kl,
        jsd,
        skew_forward_kl,
        skew_reverse_kl,
        total_variation,
    )
}
# those that read beta
WITH_BETA = ["mixed_kl", "jsd", "skew_forward_kl", "skew_reverse_kl"]

# Where a divergence is another one: the mixed KLs of one part, the skewed ones without skew, and at
# both ends, as is usual in the literature, the rescaled limits of the JSD.
LIMITS: dict[tuple[str, float], str] = {
    ("mixed_kl", 0): "reverse_kl",
    ("mixed_kl", 1): "forward_kl",
    ("jsd", 0): "forward_kl",
    ("jsd", 1): "reverse_kl",
    ("skew_forward_kl", 0): "forward_kl",
    ("skew_reverse_kl", 0): "reverse_kl",
}


class _Differentiable(torch.autograd.Function):
    """A formula as a function of the student's log-probs."""

    @staticmethod
    def forward(ctx, log_s, log_t, formula, beta):
        pair = compare(log_s - log_t, log_s.exp(), log_t.exp())
        value, grad = formula(pair, beta)
        ctx.save_for_backward(grad)
        return value

    @staticmethod
    def backward(ctx, grad_value):
        (grad,) = ctx.saved_tensors
        return grad * grad_value.unsqueeze(1), None, None, None


# divergence(student_logp_nV, teacher_logp_nV, beta) -> value_n in nats
Divergence = Callable[[Tensor, Tensor, float], Tensor]


def _divergence(name: str, student_logp: Tensor, teacher_logp: Tensor, beta: float) -> Tensor:
    formula = FORMULAS[LIMITS.get((name, beta), name)]
    return _Differentiable.apply(student_logp, teacher_logp, formula, beta)


DIVERGENCES: Table[Divergence] = Table(
    "divergence",
    "student_logp, teacher_logp, beta",
    {name: partial(_divergence, name) for name in FORMULAS},
)
