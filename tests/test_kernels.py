"""The chunked head against an fp64 reference: values, gradients, extremes, close pairs."""

import math

import pytest
import torch

from kernels import chunk, divergences
from kernels.divergences import DIVERGENCES, FORMULAS, WITH_BETA
from kernels.linear_kl import linear_kl
from kernels.linear_logprob import LogprobTerm, linear_logprob
from losses.sft import cross_entropy
from tests import reference

N, D, C, V, ROWS = 11, 6, 9, 37, 41  # the head has padding rows beyond V
CASES = [
    (name, beta) for name in FORMULAS for beta in ((0.1, 0.5, 0.9) if name in WITH_BETA else (0.5,))
]
CASES += [("mixed_kl", 0.0), ("mixed_kl", 1.0), ("jsd", 0.0), ("jsd", 1.0)]
CASES += [("skew_forward_kl", 0.0), ("skew_reverse_kl", 0.0)]


def pair(dtype=torch.float64, scale=1.0):
    g = torch.Generator().manual_seed(1)

    def make(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    hidden, head = make(N, D) * scale, make(ROWS, D)
    teacher_hidden, teacher_head = make(N, C) * scale, make(ROWS + 3, C)
    target = torch.randint(V, (N,), generator=g)
    weight = torch.rand(N, generator=g, dtype=torch.float64).to(dtype)
    return (
        hidden.requires_grad_(),
        head.requires_grad_(),
        teacher_hidden,
        teacher_head,
        target,
        weight,
    )


def grads(loss, *leaves):
    return torch.autograd.grad(loss, leaves)


def assert_close(got, want, tolerance):
    error = (got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-300)
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"


@pytest.mark.parametrize("rows", [1, 4, 11, 100])
@pytest.mark.parametrize(
    "temperature,t_squared,ce", [(1.0, False, 0.0), (2.5, True, 0.3), (0.7, False, 1.0)]
)
@pytest.mark.parametrize("name,beta", CASES)
def test_divergence_equals_reference(name, beta, temperature, t_squared, ce, rows):
    hidden, head, th, tw, target, weight = pair()
    term = LogprobTerm(target, weight * ce, cross_entropy) if ce else None
    scale = (1 - ce) * (temperature**2 if t_squared else 1)
    loss, out = linear_kl(
        hidden,
        head,
        th,
        tw,
        weight,
        name,
        beta=beta,
        temperature=temperature,
        scale=scale,
        logprob=term,
        vocab=V,
        chunk_rows=rows,
    )
    want_N = reference.kd_row_loss(
        name,
        hidden @ head[:V].T,
        th @ tw[:V].T,
        target,
        beta=beta,
        temperature=temperature,
        ce_weight=ce,
        t_squared=t_squared,
    )
    want = (want_N * weight).sum()
    assert_close(loss, want, 1e-12)
    for got, exact in zip(grads(loss, hidden, head), grads(want, hidden, head), strict=True):
        assert_close(got, exact, 1e-10)
    assert (
        grads(linear_kl(hidden, head, th, tw, weight, name, beta=beta, vocab=V)[0], head)[0][V:]
        .abs()
        .max()
        == 0
    )


def plain_torch(name):
    """The divergence as a user would write it, from log-probs, differentiated by autograd."""

    def forward_kl(student, teacher):
        return (teacher.exp() * (teacher - student)).sum(-1)

    def mixture(a, b, weight):
        if weight in (0, 1):
            return a if weight else b
        return torch.logaddexp(a + math.log(weight), b + math.log1p(-weight))

    def divergence(student, teacher, beta):
        if name == "forward_kl" or (name == "jsd" and beta == 0):
            return forward_kl(student, teacher)
        if name == "reverse_kl" or (name == "jsd" and beta == 1):
            return forward_kl(teacher, student)
        if name == "mixed_kl":
            return beta * forward_kl(student, teacher) + (1 - beta) * forward_kl(teacher, student)
        if name == "jsd":
            m = mixture(teacher, student, beta)
            return beta * forward_kl(m, teacher) + (1 - beta) * forward_kl(m, student)
        if name == "skew_forward_kl":
            return forward_kl(mixture(teacher, student, beta), teacher)
        if name == "skew_reverse_kl":
            return forward_kl(mixture(student, teacher, beta), student)
        return 0.5 * (student.exp() - teacher.exp()).abs().sum(-1)

    return divergence


@pytest.mark.parametrize("name,beta", CASES)
def test_the_definitions_are_differentiable_functions_of_log_probs(name, beta):
    """Values, and gradients at the logits behind them, in fp64."""
    torch.manual_seed(3)
    logits, other = torch.randn(2, 5, 19, dtype=torch.float64).unbind()
    logits.requires_grad_()
    student, teacher = logits.log_softmax(1), other.log_softmax(1)
    weight = torch.rand(5, dtype=torch.float64)
    got = DIVERGENCES[name](student, teacher, beta)
    want = reference.divergence(name, logits, other, beta=beta)
    assert_close(got, want, 1e-12)
    (got_grad,) = grads((got * weight).sum(), logits)
    (want_grad,) = grads((want * weight).sum(), logits)
    assert_close(got_grad, want_grad, 1e-10)


@pytest.mark.parametrize("name,beta", CASES)
def test_a_fork_may_write_a_divergence_in_plain_torch(name, beta, monkeypatch):
    hidden, head, th, tw, target, weight = pair()
    by_name, _ = linear_kl(hidden, head, th, tw, weight, name, beta=beta, vocab=V, chunk_rows=4)
    monkeypatch.setitem(DIVERGENCES, "mine", plain_torch(name))
    plain, _ = linear_kl(hidden, head, th, tw, weight, "mine", beta=beta, vocab=V, chunk_rows=4)
    assert_close(plain, by_name, 1e-12)
    for got, exact in zip(grads(plain, hidden, head), grads(by_name, hidden, head), strict=True):
        assert_close(got, exact, 1e-10)


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_any_function_of_logprob_and_entropy(temperature, rows):
    hidden, head, _, _, target, weight = pair()
    old = torch.randn(N, dtype=torch.float64) - 3

    def clipped(logp, entropy, fields):  # something with a kink, a field and the entropy in it
        ratio = (logp - fields["old"]).exp()
        return -torch.minimum(ratio, ratio.clamp(0.8, 1.2)) - 0.1 * entropy * logp

    loss, out = linear_logprob(
        hidden,
        head,
        target,
        weight,
        clipped,
        {"old": old},
        temperature=temperature,
        entropy=True,
        vocab=V,
        chunk_rows=rows,
    )
    logits = hidden @ head[:V].T / temperature
    logp, entropy = -reference.cross_entropy(logits, target), reference.entropy(logits)
    want = (clipped(logp, entropy, {"old": old}) * weight).sum()
    assert_close(loss, want, 1e-12)
    assert_close(out["logp"], logp, 1e-12)
    assert_close(out["entropy"], entropy, 1e-12)
    for got, exact in zip(grads(loss, hidden, head), grads(want, hidden, head), strict=True):
        assert_close(got, exact, 1e-10)


def test_cross_entropy_without_gradients_and_without_rows():
    hidden, head, th, tw, target, weight = pair()
    with torch.no_grad():
        loss, out = linear_logprob(hidden, head, target, weight, cross_entropy, chunk_rows=3)
    assert_close(loss, (reference.cross_entropy(hidden @ head.T, target) * weight).sum(), 1e-12)
    assert not loss.requires_grad
    for none in (
        linear_logprob(hidden[:0], head, target[:0], weight[:0], cross_entropy)[0],
        linear_kl(hidden[:0], head, th[:0], tw, weight[:0], "forward_kl", vocab=V)[0],
    ):
        assert none == 0 and grads(none, head)[0].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name,beta", CASES)
def test_extreme_logits_give_finite_losses_and_right_gradients(name, beta, dtype):
    """Logits of ±1e4, one-hot teachers on other ids than the student's, identical rows."""
    hidden = (1e4 * torch.eye(6, 6)[[0, 1, 2, 3, 0]]).to(dtype).requires_grad_()
    head = torch.eye(7, 6).to(dtype).requires_grad_()
    teacher = hidden.detach().roll(1, 0)
    teacher[4] = hidden[4].detach()
    weight = torch.ones(5, dtype=dtype)
    loss, out = linear_kl(hidden, head, teacher, head, weight, name, beta=beta)
    want_N = reference.divergence(
        name, (hidden @ head.T).double(), (teacher @ head.T).double(), beta=beta
    )
    assert_close(out["divergence"], want_N, 1e-6)
    assert out["divergence"][4] == 0
    for got in grads(loss, hidden, head):
        assert torch.isfinite(got).all()
    (got,) = grads(linear_kl(hidden, head, teacher, head, weight, name, beta=beta)[0], hidden)
    (want,) = grads(want_N.sum(), hidden)
    assert_close(got, want, 1e-6) if want.norm() else None
    assert want.norm() > 0 or got.norm() < 1e-6


@pytest.mark.parametrize("name,beta", CASES)
def test_close_pairs_keep_their_digits_in_fp32(name, beta):
    """KL of about 1e-3 over Qwen's 151,665 ids: naive sums keep three digits there."""
    inputs = reference.near_pair(6, 151_665, 16, torch.Generator().manual_seed(0), kl=1e-3)
    results = {}
    for dtype in (torch.float32, torch.float64):
        hidden, head, th, tw = (x.to(dtype) for x in inputs)
        hidden.requires_grad_(), head.requires_grad_()
        weight = torch.ones(len(hidden), dtype=dtype)
        if dtype == torch.float64:
            out = reference.divergence(name, hidden @ head.T, th @ tw.T, beta=beta)
            results[dtype] = (out.detach(), *grads(out.sum(), hidden, head))
        else:
            loss, out = linear_kl(hidden, head, th, tw, weight, name, beta=beta)
            results[dtype] = (out["divergence"], *grads(loss, hidden, head))
    (value, *gradients), (value64, *gradients64) = results[torch.float32], results[torch.float64]
    assert_close(value.sum(), value64.sum(), 1e-5)
    for got, want in zip(gradients, gradients64, strict=True):
        assert_close(got, want, 1e-4)


@pytest.mark.parametrize("vocab", [32, 5000])
@pytest.mark.parametrize(
    "kl,value_error,gradient_error",
    [(1e-1, 3e-6, 1e-5), (1e-2, 5e-6, 3e-5), (1e-3, 2e-5, 1e-4), (1e-4, 6e-5, 3e-4)],
    ids=["kl=0.1", "kl=0.01", "kl=0.001", "kl=0.0001"],
)
@pytest.mark.parametrize("name,beta", CASES)
def test_precision_at_every_distance(name, beta, kl, value_error, gradient_error, vocab):
    """fp32 against fp64: the fused operation, and the divergence as a function of log-probs."""
    inputs = reference.near_pair(16, vocab, 16, torch.Generator().manual_seed(0), kl=kl)
    hidden, head, th, tw = (x.requires_grad_() for x in inputs)
    exact = reference.divergence(name, hidden @ head.T, th @ tw.T, beta=beta).sum()
    exact_grads = grads(exact, hidden, head)
    hidden, head, th, tw = (x.detach().float().requires_grad_() for x in inputs)
    fused, _ = linear_kl(hidden, head, th, tw, torch.ones(16), name, beta=beta)
    plain = DIVERGENCES[name](
        (hidden @ head.T).log_softmax(1), (th @ tw.T).detach().log_softmax(1), beta
    ).sum()
    for value in (fused, plain):
        assert_close(value, exact, value_error)
        for got, want in zip(grads(value, hidden, head), exact_grads, strict=True):
            assert_close(got, want, gradient_error)


def test_the_naive_sum_would_fail_that_test():
    hidden, head, th, tw = (
        x.float()
        for x in reference.near_pair(6, 151_665, 16, torch.Generator().manual_seed(0), kl=1e-3)
    )
    ls, lt = (hidden @ head.T).log_softmax(1), (th @ tw.T).log_softmax(1)
    exact = reference.divergence(
        "forward_kl", hidden.double() @ head.double().T, th.double() @ tw.double().T
    )
    naive = (lt.exp() * (lt - ls)).sum(1)
    assert abs(naive.sum() - exact.sum()) / exact.sum() > 1e-5


def test_blocks_of_any_size_give_the_same(monkeypatch):
    hidden, head, th, tw, target, weight = pair()
    want = linear_kl(hidden, head, th, tw, weight, "jsd", vocab=V)[0]
    monkeypatch.setattr(chunk, "BLOCK_ELEMENTS", 3 * V)
    got = linear_kl(hidden, head, th, tw, weight, "jsd", vocab=V)[0]
    assert_close(got, want, 1e-14)
    for a, b in zip(grads(got, hidden, head), grads(want, hidden, head), strict=True):
        assert_close(a, b, 1e-14)


def test_bf16_inputs_keep_fp32_logits():
    hidden, head, th, tw, target, weight = pair(torch.bfloat16, scale=0.5)
    loss, _ = linear_kl(hidden, head, th, tw, weight.float(), "forward_kl", vocab=V)
    exact = reference.divergence(
        "forward_kl", hidden.double() @ head.double()[:V].T, th.double() @ tw.double()[:V].T
    )
    want = (exact * weight.double()).sum()
    assert loss.dtype == torch.float32
    assert_close(loss, want, 1e-5)
    for got, exact in zip(grads(loss, hidden, head), grads(want, hidden, head), strict=True):
        assert got.dtype == torch.bfloat16
        assert_close(got, exact, 2**-7)


def test_backward_runs_once():
    hidden, head, _, _, target, weight = pair()
    loss, _ = linear_logprob(hidden, head, target, weight, cross_entropy)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_a_target_outside_the_vocabulary_is_named():
    hidden, head, _, _, target, weight = pair()
    with pytest.raises(ValueError, match="39"):
        linear_logprob(hidden, head, torch.full_like(target, 39), weight, cross_entropy, vocab=V)
    assert math.isfinite(
        linear_logprob(hidden, head, torch.full_like(target, 39), weight, cross_entropy)[0].item()
    )


@pytest.mark.parametrize("weight", [0.0, 1e-6, 0.3, 0.5, 0.7, 1 - 1e-6, 1.0])
def test_ratios_to_a_mixture_of_any_weight(weight):
    """As exact as the logarithm allows whose argument has an error of 3e-7, relative to m − max."""
    d = torch.linspace(-12, 12, 481)
    log_s, log_t = divergences._log_ratios_to_mixture(d.clone(), weight)
    exact = d.double()
    smaller = torch.where(exact > 0, weight, 1 - weight)
    below = smaller * torch.expm1(-exact.abs())  # m / max(p_s, p_t) − 1
    for got, want in (
        (log_s, exact.clamp(max=0) - torch.log1p(below)),
        (log_t, (-exact).clamp(max=0) - torch.log1p(below)),
    ):
        allowed = 3e-7 * (want.abs() - below / (1 + below))
        assert ((got.double() - want).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_terms_of_second_order_are_exact_on_both_sides_of_the_limit(dtype):
    size = torch.logspace(-6, 1, 400, dtype=torch.float64)
    x = torch.cat((-size, size, torch.tensor([-1 / 8, 1 / 8, -1e-3, 1e-3, 0.0]).double())).to(dtype)
    p = torch.rand(len(x), dtype=dtype) + 0.1
    exact = x.double()
    want = p.double() * torch.where(
        exact.abs() < 1e-2,  # Horner's form of the series, far beyond fp64's digits
        exact**2 / 2 * (1 + exact / 3 * (1 + exact / 4 * (1 + exact / 5 * (1 + exact / 6)))),
        torch.expm1(exact) - exact,
    )
    got = divergences._second_order(p, x.clone(), (p.double() * torch.expm1(exact)).to(dtype))
    small = exact.abs() < 1 / 8  # beyond it a difference is taken, which loses a digit
    for part, narrow in ((small, 5e-7), (~small, 3e-6)):
        rtol = narrow if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(got[part].double(), want[part], rtol=rtol, atol=0)
