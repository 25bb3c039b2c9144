"""Divergence between a teacher's and a student's next-token distributions, straight from their hidden rows.

Teacher and student may differ in width and in padded head rows; only the first `vocab` rows of both heads take part,
cut before the softmax. Gradients are written by hand. With d = log p_s − log p_t everything below is built from
g = p_s − p_t = ± max(p_s, p_t) · (1 − e^{−|d|}) and sums like Σ (g − p_t d) = KL(t ‖ s), whose terms are of second
order in d: in fp32 they keep six digits where Σ p_t (log p_t − log p_s) keeps three (teacher and student close,
151,665 ids).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernels.backend import triton_runs
from kernels.chunk import (
    accumulate_dtype,
    blocks,
    chunked_head,
    default_chunk_rows,
    product,
    torch_step,
)
from kernels.linear_logprob import LogprobTerm


def _gap(ls, ps, lt, pt):
    """d = log p_s − log p_t and g = p_s − p_t without cancellation."""
    d = ls - lt
    if (
        not d.is_cuda and d.numel() and d.amax() < 40
    ):  # no overflow ahead: a third fewer passes over the block
        return d, torch.expm1(d).mul_(pt)
    g = torch.maximum(ps, pt).mul_(d.abs().neg_().expm1_())
    return d, torch.copysign(g, d, out=g)


def _log_ratios(d, weight_t):
    """log(p_s/m) and log(p_t/m) for the mixture m = weight_t · p_t + (1 − weight_t) · p_s."""
    share = torch.where(d > 0, d.new_tensor(weight_t), d.new_tensor(1 - weight_t))
    q = d.abs().neg_().expm1_().mul_(share).log1p_()  # log(m / max(p_s, p_t))
    return d.clamp(max=0).sub_(q), d.neg().clamp_(max=0).sub_(q)


def _second_order(p, x, first_order):
    """p · (e^x − 1 − x), by its series where x is small: a skewed mixture is (1−β)² times closer than the pair was.

    first_order: p · (e^x − 1), known without overflow; used where x is not small.
    """
    series = (
        (x / 720)
        .add_(1 / 120)
        .mul_(x)
        .add_(1 / 24)
        .mul_(x)
        .add_(1 / 6)
        .mul_(x)
        .add_(1 / 2)
        .mul_(x)
        .mul_(x)
        .mul_(p)
    )
    limit = (
        1 / 8 if x.dtype == torch.float32 else 1e-3
    )  # where the terms left out are below rounding
    return torch.where(x.abs() < limit, series, first_order.addcmul_(p, x, value=-1))


def _through_softmax(u, p):
    """Gradient at log p_s (taken as free) → gradient at the logits."""
    return u.sub_(p * u.sum(1, keepdim=True))


def forward_kl(ls, ps, lt, pt, beta):
    """KL(t ‖ s); d/dz = p_s − p_t (Hinton et al., arXiv 1503.02531)."""
    d, g = _gap(ls, ps, lt, pt)
    return torch.addcmul(g, pt, d, value=-1, out=d).sum(1), g


def reverse_kl(ls, ps, lt, pt, beta):
    """KL(s ‖ t); d/dz = p_s (d − KL) (Gu et al., arXiv 2306.08543)."""
    d, g = _gap(ls, ps, lt, pt)
    value = torch.addcmul(g.neg_(), ps, d, out=g).sum(1)
    return value, d.sub_(value.unsqueeze(1)).mul_(ps)


def jsd(ls, ps, lt, pt, beta):
    """β KL(t ‖ m) + (1−β) KL(s ‖ m), m = β p_t + (1−β) p_s (Agarwal et al., arXiv 2306.13649).

    It vanishes at both ends (see ENDS).
    """
    d, g = _gap(ls, ps, lt, pt)
    rs, rt = _log_ratios(d, beta)
    kl_s = torch.addcmul(g.mul_(-beta), ps, rs, out=g).sum(1, keepdim=True)  # KL(s ‖ m)
    value = rt.mul_(pt).mul_(beta).add_(ps * rs, alpha=1 - beta).sum(1)
    return value, rs.sub_(kl_s).mul_(ps).mul_(1 - beta)


def skew_forward_kl(ls, ps, lt, pt, beta):
    """KL(t ‖ β p_t + (1−β) p_s) (DistiLLM, Ko et al., arXiv 2402.03898, eq. 2; β is its α)."""
    d, g = _gap(ls, ps, lt, pt)
    rs, rt = _log_ratios(d, beta)
    u = (
        rs.exp_().mul_(g).mul_((1 - beta) ** 2)
    )  # −(1−β) p_s p_t/m, less a multiple of p_s, which the softmax cancels
    value = _second_order(pt, rt.neg_(), g.mul_(1 - beta)).sum(1)  # m − p_t = (1−β) g
    return value, _through_softmax(u, ps)


def skew_reverse_kl(ls, ps, lt, pt, beta):
    """KL(s ‖ (1−β) p_t + β p_s) (DistiLLM, Ko et al., arXiv 2402.03898, eq. 5; β is its α)."""
    d, g = _gap(ls, ps, lt, pt)
    rs, _ = _log_ratios(d, 1 - beta)
    value = _second_order(ps, -rs, g.mul_(beta - 1)).sum(1)  # m − p_s = −(1−β) g
    return value, _through_softmax(rs.sub_(torch.expm1(rs), alpha=beta).mul_(ps), ps)


def total_variation(ls, ps, lt, pt, beta):
    """½ Σ |p_s − p_t| (Wen et al., arXiv 2307.15190); at ties the sub-gradient 0 is taken."""
    d, g = _gap(ls, ps, lt, pt)
    return g.abs().sum(1).mul_(0.5), _through_softmax(d.sign_().mul_(ps).mul_(0.5), ps)


HAND_WRITTEN = {
    f.__name__: f
    for f in (forward_kl, reverse_kl, jsd, skew_forward_kl, skew_reverse_kl, total_variation)
}

# where a divergence is another one: the skewed KLs without skew; at the ends of the JSD, as the literature does, its rescaled limits
ENDS = {
    ("jsd", 0): "forward_kl",
    ("jsd", 1): "reverse_kl",
    ("skew_forward_kl", 0): "forward_kl",
    ("skew_reverse_kl", 0): "reverse_kl",
}


def _by_autograd(divergence, ls, ps, lt, want_grad):
    """A fork's divergence(logp_s_nV, logp_t_nV) -> value_n in plain torch: slower, never wrong by hand."""
    with torch.enable_grad():
        leaf = ls.detach().requires_grad_(want_grad)
        value = divergence(leaf, lt)
        if not want_grad:
            return value, None
        (u,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), _through_softmax(u.clone(), ps)


def linear_kl(
    hidden_ND,
    head_VD,
    teacher_hidden_NC,
    teacher_head_UC,
    weight_N,
    divergence,
    *,
    beta=0.5,
    temperature=1.0,
    scale=1.0,
    logprob=None,
    vocab=None,
    chunk_rows=None,
):
    """Σ_n weight_n · scale · D(teacher_n, student_n), plus a log-prob loss on the same student logits if one is given.

    divergence: a name in HAND_WRITTEN or a function (logp_s_nV, logp_t_nV) -> value_n; both distributions are softmaxes of
    logits / temperature, in nats. scale multiplies the divergence (T² goes here). logprob: a LogprobTerm (its own weights).
    Gradients reach hidden_ND and head_VD, never the teacher. Returns (loss_sum, {"divergence": [N]}), the latter detached.
    """
    vocab = vocab or min(head_VD.shape[0], teacher_head_UC.shape[0])
    teacher_hidden_NC = teacher_hidden_NC.detach()
    teacher_VC = teacher_head_UC.detach()[:vocab].to(teacher_hidden_NC.dtype)
    value_N = torch.zeros(
        hidden_ND.shape[0], dtype=accumulate_dtype(hidden_ND), device=hidden_ND.device
    )
    divergence = ENDS.get((divergence, beta), divergence)
    loss = Divergence(divergence, beta, temperature, scale, weight_N, value_N, logprob)
    by_kernel = (
        triton_runs(hidden_ND) and triton_runs(teacher_hidden_NC) and divergence in HAND_WRITTEN
    )
    step, chunk_rows = (_triton_step if by_kernel else _torch_step)(
        loss, hidden_ND, teacher_hidden_NC, teacher_VC, chunk_rows
    )
    return chunked_head(hidden_ND, head_VD, step, vocab, chunk_rows), {"divergence": value_N}


@dataclass
class Divergence:
    """What a step needs to know of the loss; it fills value_N."""

    name: str | Callable
    beta: float
    temperature: float
    scale: float
    weight_N: torch.Tensor
    value_N: torch.Tensor
    logprob: LogprobTerm | None


def _torch_step(loss, hidden_ND, teacher_hidden_NC, teacher_VC, chunk_rows):
    vocab, device, logprob = teacher_VC.shape[0], hidden_ND.device, loss.logprob
    chunk_rows = chunk_rows or max(
        1, default_chunk_rows(vocab, device) // 2
    )  # two buffers share the budget
    rows = min(chunk_rows, hidden_ND.shape[0])
    teacher_logits = torch.empty(rows, vocab, dtype=accumulate_dtype(hidden_ND), device=device)
    block_rows = blocks(rows, vocab, device)[0].stop if rows else 0
    ps_buffer, pt_buffer = (teacher_logits.new_empty(block_rows, vocab) for _ in range(2))
    hand = HAND_WRITTEN.get(loss.name) if isinstance(loss.name, str) else None

    def block_loss(student_nV, teacher_nV, rows, want_grad):
        extra_nV = student_nV.clone() if logprob else None
        (ls, ps), (lt, pt) = (
            _log_softmax_(z, loss.temperature, p[: len(z)])
            for z, p in ((student_nV, ps_buffer), (teacher_nV, pt_buffer))
        )
        value_n, grad_nV = (
            hand(ls, ps, lt, pt, loss.beta)
            if hand
            else _by_autograd(loss.name, ls, ps, lt, want_grad)
        )
        loss.value_N[rows] = value_n
        loss_n = value_n * loss.weight_N[rows] * loss.scale
        if want_grad:
            coefficient_n = (loss.weight_N[rows] * (loss.scale / loss.temperature)).to(
                value_n.dtype
            )
            torch.mul(grad_nV, coefficient_n.unsqueeze(1), out=student_nV)
        if logprob:
            loss_n = loss_n + logprob.block(extra_nV, rows, want_grad)
            student_nV.add_(extra_nV)
        return loss_n

    def rows_loss(logits_nV, lo, want_grad):
        n = logits_nV.shape[0]
        teacher_nV = product(teacher_hidden_NC[lo : lo + n], teacher_VC.t(), teacher_logits[:n])
        parts = [
            block_loss(logits_nV[b], teacher_nV[b], slice(lo + b.start, lo + b.stop), want_grad)
            for b in blocks(n, vocab, device)
        ]
        return torch.cat(parts)

    return torch_step(rows_loss, rows, vocab, hidden_ND), chunk_rows


def _triton_step(loss, hidden_ND, teacher_hidden_NC, teacher_VC, chunk_rows):
    from kernels import triton_head  # here, so that nothing needs Triton where it is not used

    vocab, logprob = teacher_VC.shape[0], loss.logprob
    chunk_rows = chunk_rows or triton_head.chunk_rows(vocab, hidden_ND)
    student_buffer, teacher_buffer = (
        triton_head.buffer(min(chunk_rows, len(hidden_ND)), vocab, x)
        for x in (hidden_ND, teacher_hidden_NC)
    )

    def step(rows_nD, weight_VD, lo, want_grad):
        n = len(rows_nD)
        rows = slice(lo, lo + n)
        teacher = triton_head.logits(
            teacher_hidden_NC[rows],
            teacher_VC,
            temperature=loss.temperature,
            out_nP=teacher_buffer[:n],
        )
        of_student = (
            triton_head.of_term(logprob, rows, second=loss.temperature)
            if logprob
            else dict(temperature=loss.temperature)
        )
        student = triton_head.logits(
            rows_nD, weight_VD[:vocab], out_nP=student_buffer[:n], **of_student
        )
        loss_n, coefficient_n3 = triton_head.term_loss(logprob, student, rows, want_grad)
        coefficient_n3[:, 0] = loss.weight_N[rows] * (loss.scale / loss.temperature)
        value_n, grad_nP = triton_head.gradient_of(
            student,
            logprob,
            coefficient_n3,
            rows,
            teacher=teacher,
            divergence=loss.name,
            beta=loss.beta,
            kl_temperature=loss.temperature,
            write=want_grad,
            dtype=rows_nD.dtype,
        )
        loss.value_N[rows] = value_n
        return value_n * loss.weight_N[rows] * loss.scale + loss_n, grad_nP

    return step, chunk_rows


def _log_softmax_(z_nV, temperature, p_nV):
    """z becomes the log-probs in place, p_nV the probabilities; both are returned.

    PyTorch's softmax is one fast pass, but its sum over 151,665 ids is off by 1e-5: the sum of what it wrote, over the largest of
    it, is the right one.
    """
    if temperature != 1.0:
        z_nV.div_(temperature)
    largest_n1 = z_nV.amax(1, keepdim=True)
    torch.softmax(z_nV, 1, out=p_nV)
    sum_n1 = p_nV.sum(1, keepdim=True)
    z_nV.sub_(largest_n1).sub_((sum_n1 / p_nV.amax(1, keepdim=True)).log_())
    return z_nV, p_nV.div_(sum_n1)
