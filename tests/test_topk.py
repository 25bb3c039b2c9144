"""Top-k divergence with a tail, against autograd over merged distributions and the full one."""

import pytest
import torch

from kernels.linear_kl import linear_kl
from kernels.linear_topk import linear_topk_divergence, topk_logprobs
from losses.kd import DIVERGENCES

N, D, V, U = 7, 5, 23, 19


def case():
    g = torch.Generator().manual_seed(0)

    def make(*s):
        return torch.randn(*s, generator=g, dtype=torch.float64)

    return (
        make(N, D),
        make(V, D),
        make(N, 6),
        make(V + 3, 6),
        torch.rand(N, generator=g, dtype=torch.float64),
    )


def grads(loss, *xs):
    return torch.autograd.grad(loss, xs)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("k", [1, 4, 18])
def test_equals_the_divergence_of_the_merged_distributions(name, k):
    hidden, head, teacher_hidden, teacher_head, weight = case()
    hidden.requires_grad_(), head.requires_grad_()

    def f(ls, lt):
        return DIVERGENCES[name](ls, lt, 0.3)

    ids, logp = topk_logprobs(teacher_hidden, teacher_head, k, temperature=1.7, vocab=U)
    loss, rows = linear_topk_divergence(
        hidden, head, ids, logp, weight, f, temperature=1.7, scale=2.0, vocab=U, chunk_rows=3
    )
    full = torch.log_softmax(teacher_hidden @ teacher_head[:U].t() / 1.7, 1)
    assert torch.equal(ids, full.topk(k, 1).indices)
    merged = []
    for n in range(
        N
    ):  # brute force, one row at a time: a tail is a plain sum of what is not listed
        rest = [v for v in range(U) if v not in ids[n].tolist()]
        both = [
            torch.softmax(z[n] / 1.7, 0)
            for z in (hidden @ head[:U].t(), teacher_hidden @ teacher_head[:U].t())
        ]
        ls, lt = (torch.cat((p[ids[n]], p[rest].sum().view(1))).log() for p in both)
        merged.append(f(ls.unsqueeze(0), lt.unsqueeze(0)))
    want = torch.cat(merged)
    torch.testing.assert_close(rows["divergence"], want.detach(), rtol=1e-10, atol=1e-12)
    for got, ref in zip(
        grads(loss, hidden, head), grads((want * weight * 2.0).sum(), hidden, head), strict=True
    ):
        torch.testing.assert_close(got, ref, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_a_full_list_is_the_full_divergence_and_a_short_one_is_below(name):
    hidden, head, teacher_hidden, teacher_head, weight = case()
    hidden.requires_grad_(), head.requires_grad_()

    def f(ls, lt):
        return DIVERGENCES[name](ls, lt, 0.5)

    want, full = linear_kl(hidden, head, teacher_hidden, teacher_head, weight, name, vocab=U)
    lists = {k: topk_logprobs(teacher_hidden, teacher_head, k, vocab=U) for k in (3, U)}
    got, rows = linear_topk_divergence(hidden, head, *lists[U], weight, f, vocab=U)
    torch.testing.assert_close(rows["divergence"], full["divergence"], rtol=1e-9, atol=1e-12)
    for a, b in zip(grads(got, hidden, head), grads(want, hidden, head), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)
    _, short = linear_topk_divergence(hidden, head, *lists[3], weight, f, vocab=U)
    assert (short["divergence"] < full["divergence"] + 1e-12).all()


def test_the_tail_of_a_certain_teacher_keeps_its_digits():
    """In fp32, 5,000 ids, all but 2e-8 of the mass on four of them: 1 − Σ p would be 0 or 6e-8."""
    g = torch.Generator().manual_seed(0)
    head, hidden = torch.eye(5000), torch.randn(3, 5000, generator=g) * 0.1
    hidden[:, :4] += 26.5
    _, logp = topk_logprobs(hidden, head, 4)
    p = torch.softmax(hidden.double(), 1)
    assert (p[:, 4:].sum(1) < 1e-7).all()
    torch.testing.assert_close(logp[:, -1].double(), p[:, 4:].sum(1).log(), rtol=1e-5, atol=1e-5)
    assert torch.isfinite(
        linear_topk_divergence(
            hidden, head, *topk_logprobs(hidden, head, 5000), torch.ones(3), DIVERGENCE
        )[0]
    )  # no tail at all


def DIVERGENCE(ls, lt):
    return DIVERGENCES["reverse_kl"](ls, lt, 0.5)
