"""Ground truth for the distillation losses: the papers' formulas, in plain PyTorch fp64.

Slow and unfused on purpose; gradients are autograd's. Shapes: N rows, V vocabulary, D hidden.
Logits are fp64 and finite. Nothing here is detached: gradients flow to the teacher as well.
Run this file to check it against 60-digit arithmetic.
"""

import itertools
import math

import torch

DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "mixed_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
)


def _log_softmax(logits_NV, temperature=1.0):
    assert logits_NV.dtype == torch.float64, (
        f"the reference takes fp64 logits, got {logits_NV.dtype}"
    )
    return torch.log_softmax(logits_NV / temperature, dim=-1)


def _kl(log_p_NV, log_q_NV):
    """KL(p || q) = sum_v p_v (log p_v - log q_v), a term with p_v = 0 counting as 0."""
    p_NV = log_p_NV.exp()
    log_ratio_NV = torch.where(p_NV > 0, log_p_NV - log_q_NV, 0.0)
    return (p_NV * log_ratio_NV).sum(-1)


def _log_mixture(weight, log_p_NV, log_q_NV):
    """log(weight * p + (1 - weight) * q)."""
    if weight in (0, 1):
        return log_p_NV if weight == 1 else log_q_NV
    return torch.logaddexp(log_p_NV + math.log(weight), log_q_NV + math.log1p(-weight))


def cross_entropy(logits_NV, target_N):
    """-log softmax(z)[target], the negative log-likelihood of the target token."""
    return -_log_softmax(logits_NV).gather(-1, target_N[:, None]).squeeze(-1)


def entropy(logits_NV):
    """H(p) = -sum_v p_v log p_v with p = softmax(z) (Shannon 1948, section 6), in nats."""
    log_p_NV = _log_softmax(logits_NV)
    return -_kl(log_p_NV, torch.zeros_like(log_p_NV))


def divergence(name, student_logits_NV, teacher_logits_NV, *, beta=0.5, temperature=1.0):
    """Divergence of p_s = softmax(z_s / T) from p_t = softmax(z_t / T), per row.

    forward_kl       KL(p_t || p_s)       Hinton et al., arXiv 1503.02531, s. 2, less H(p_t)
    reverse_kl       KL(p_s || p_t)       MiniLLM, Gu et al., arXiv 2306.08543, s. 2
    mixed_kl         beta KL(p_t || p_s) + (1-beta) KL(p_s || p_t)
                     Zhao et al., arXiv 2605.16826, KL mixing (their alpha is our beta)
    jsd              beta KL(p_t || m) + (1-beta) KL(p_s || m), m = beta p_t + (1-beta) p_s
                     GKD, Agarwal et al., arXiv 2306.13649, D_JSD(beta)
    skew_forward_kl  KL(p_t || beta p_t + (1-beta) p_s)
                     DistiLLM, Ko et al., arXiv 2402.03898, alpha-SKL
    skew_reverse_kl  KL(p_s || (1-beta) p_t + beta p_s)
                     ibid., alpha-SRKL (their alpha is our beta)
    total_variation  1/2 sum_v |p_s - p_t|
                     f-DISTILL, Wen et al., arXiv 2307.15190

    JSD itself vanishes at both ends, so there `jsd` is by convention its rescaled limit (GKD, below
    its definition): D/beta -> forward KL at beta = 0, D/(1-beta) -> reverse KL at beta = 1.
    """
    assert 0 <= beta <= 1, beta
    log_s_NV = _log_softmax(student_logits_NV, temperature)
    log_t_NV = _log_softmax(teacher_logits_NV, temperature)
    if name == "forward_kl" or (name == "jsd" and beta == 0):
        return _kl(log_t_NV, log_s_NV)
    if name == "reverse_kl" or (name == "jsd" and beta == 1):
        return _kl(log_s_NV, log_t_NV)
    if name == "mixed_kl":
        return beta * _kl(log_t_NV, log_s_NV) + (1 - beta) * _kl(log_s_NV, log_t_NV)
    if name == "jsd":
        log_m_NV = _log_mixture(beta, log_t_NV, log_s_NV)
        return beta * _kl(log_t_NV, log_m_NV) + (1 - beta) * _kl(log_s_NV, log_m_NV)
    if name == "skew_forward_kl":
        return _kl(log_t_NV, _log_mixture(beta, log_t_NV, log_s_NV))
    if name == "skew_reverse_kl":
        return _kl(log_s_NV, _log_mixture(beta, log_s_NV, log_t_NV))
    if name == "total_variation":
        return 0.5 * (log_s_NV.exp() - log_t_NV.exp()).abs().sum(-1)
    raise ValueError(f"unknown divergence {name!r}")


def kd_row_loss(
    name, student_logits_NV, teacher_logits_NV, target_N, *, beta, temperature, ce_weight, t_squared
):
    """(1 - ce_weight) * T^2 * divergence at T + ce_weight * cross-entropy at T = 1, per row.

    Hinton et al., arXiv 1503.02531, section 2: soft-target gradients scale as 1/T^2, hence the
    factor T^2 (1 if not `t_squared`), and the hard-target term is taken at temperature 1.
    """
    soft_N = divergence(
        name, student_logits_NV, teacher_logits_NV, beta=beta, temperature=temperature
    )
    scale = temperature**2 if t_squared else 1.0
    return (1 - ce_weight) * scale * soft_N + ce_weight * cross_entropy(student_logits_NV, target_N)


def exact_divergence_mp(name, student_logits_V, teacher_logits_V, beta, temperature):
    """`divergence` for one row of numbers in 60-digit arithmetic.

    Straight on probabilities, which are never 0 here.
    """
    import mpmath as mp

    def softmax(logits_V):
        exps = [mp.exp(mp.mpf(z) / mp.mpf(temperature)) for z in logits_V]
        return [e / mp.fsum(exps) for e in exps]

    def mix(weight, p, q):
        return [weight * a + (1 - weight) * b for a, b in zip(p, q, strict=True)]

    def kl(p, q):
        return mp.fsum(a * mp.log(a / b) for a, b in zip(p, q, strict=True))

    with mp.workdps(60):
        w, s, t = mp.mpf(beta), softmax(student_logits_V), softmax(teacher_logits_V)
        if name == "forward_kl" or (name == "jsd" and beta == 0):
            return kl(t, s)
        if name == "reverse_kl" or (name == "jsd" and beta == 1):
            return kl(s, t)
        return {
            "mixed_kl": w * kl(t, s) + (1 - w) * kl(s, t),
            "jsd": w * kl(t, mix(w, t, s)) + (1 - w) * kl(s, mix(w, t, s)),
            "skew_forward_kl": kl(t, mix(w, t, s)),
            "skew_reverse_kl": kl(s, mix(1 - w, t, s)),
            "total_variation": mp.fsum(abs(a - b) for a, b in zip(s, t, strict=True)) / 2,
        }[name]


def near_pair(n, vocab, hidden, generator, kl=1e-3):
    """A student near its teacher: (hidden_ND, head_VD, teacher_hidden_ND, teacher_head_VD), fp64.

    Logits hidden @ head.T have standard deviation about 3.5, and mean KL(teacher || student) is
    `kl` within 1 %, by bisection on the size of the student's perturbation (over at most 256 rows).
    Every value is exactly representable in fp32, so fp32 and fp64 runs see identical inputs.
    """

    def randn(rows, std):
        return std * torch.randn(
            rows, hidden, dtype=torch.float64, generator=generator, device=generator.device
        )

    head_std = 3.5 / math.sqrt(hidden)
    teacher_hidden_ND, teacher_head_VD = (
        x.float().double() for x in (randn(n, 1.0), randn(vocab, head_std))
    )
    hidden_noise_ND, head_noise_VD = randn(n, 1.0), randn(vocab, head_std)
    teacher_logits_NV = teacher_hidden_ND[:256] @ teacher_head_VD.T
    low, high = math.log(1e-6), math.log(10.0)
    for _ in range(40):
        mid = (low + high) / 2
        hidden_ND = (teacher_hidden_ND + math.exp(mid) * hidden_noise_ND).float().double()
        head_VD = (teacher_head_VD + math.exp(mid) * head_noise_VD).float().double()
        got = divergence("forward_kl", hidden_ND[:256] @ head_VD.T, teacher_logits_NV).mean().item()
        if abs(got - kl) <= 0.01 * kl:
            return hidden_ND, head_VD, teacher_hidden_ND, teacher_head_VD
        low, high = (low, mid) if got > kl else (mid, high)
    raise ValueError(f"no perturbation gives a mean KL of {kl}")


def _self_check():
    import mpmath as mp

    mp.mp.dps, step = 60, mp.mpf(10) ** -20
    gen = torch.Generator().manual_seed(0)

    # Values and gradients against 60-digit arithmetic; sign; zero at equality. Row 0 is the
    # student's, row 1 the teacher's.
    for case in itertools.product(
        DIVERGENCES, (0.0, 0.1, 0.5, 0.9, 1.0), (1.0, 1.7), (1.0, 30.0, 1e4)
    ):
        name, beta, temperature, size = case
        z_2V = (size * torch.randn(2, 7, dtype=torch.float64, generator=gen)).requires_grad_()
        value = divergence(name, z_2V[:1], z_2V[1:], beta=beta, temperature=temperature).sum()
        (grad_2V,) = torch.autograd.grad(value, z_2V)

        logits = z_2V.tolist()

        def exact(i=0, v=0, shift=0, case=case, rows=logits):
            name, beta, temperature, _ = case
            rows = [[mp.mpf(z) for z in row] for row in rows]
            rows[i][v] += shift
            return exact_divergence_mp(name, *rows, beta, temperature)

        tolerance = 1e-14 * (10 + size)
        assert value > -1e-15 and abs(exact() - value.item()) < tolerance, case
        for i, v in itertools.product(range(2), range(7)):
            central = (exact(i, v, step) - exact(i, v, -step)) / (2 * step)
            assert abs(central - grad_2V[i, v].item()) < tolerance, case
        assert (
            divergence(name, z_2V, z_2V, beta=beta, temperature=temperature).abs().max() < 1e-15
        ), case

    # The ends of JSD are the limits of its rescaled interior.
    gen.manual_seed(0)
    s_NV, t_NV = 3 * torch.randn(2, 50, 20, dtype=torch.float64, generator=gen)
    for end, beta in ((0.0, 1e-7), (1.0, 1 - 1e-7)):
        limit_N = divergence("jsd", s_NV, t_NV, beta=beta) / 1e-7
        torch.testing.assert_close(
            limit_N, divergence("jsd", s_NV, t_NV, beta=end), rtol=1e-3, atol=0
        )

    # By hand: KL at T = 2 is 1e4 / 2 and cross-entropy 2e4, with no overlap left; the entropy of
    # the uniform distribution is log V.
    z_2V = torch.tensor(
        [[1e4, -1e4, 0.0], [-1e4, -1e4, 1e4]], dtype=torch.float64, requires_grad=True
    )
    weights = dict(beta=0.5, temperature=2.0, ce_weight=0.25, t_squared=True)
    loss_N = kd_row_loss("forward_kl", z_2V[:1], z_2V[1:], torch.tensor([1]), **weights)
    assert loss_N.item() == 0.75 * 4 * 5e3 + 0.25 * 2e4
    (grad_2V,) = torch.autograd.grad(loss_N.sum() + entropy(z_2V).sum(), z_2V)
    assert grad_2V.isfinite().all()
    assert abs(entropy(torch.zeros(1, 8, dtype=torch.float64)).item() - math.log(8)) < 1e-15

    for kl in (1e-5, 1e-3, 1.0):
        pair = near_pair(64, 500, 32, gen, kl)
        assert all(torch.equal(x, x.float().double()) for x in pair)
        student_NV, teacher_NV = pair[0] @ pair[1].T, pair[2] @ pair[3].T
        assert abs(divergence("forward_kl", student_NV, teacher_NV).mean().item() / kl - 1) < 0.02
        assert all(3 < z_NV.std() < 4.5 for z_NV in (student_NV, teacher_NV))


if __name__ == "__main__":
    _self_check()
    print("reference self-check: ok")
