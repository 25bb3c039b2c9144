"""The Triton kernels of the head against fp64, interpreted in fp32 (its bf16 product is wrong).

tests/test_triton.py runs this folder in a process of its own: the interpreter is chosen when
Triton is imported.
"""

import math
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 chooses the interpreter", allow_module_level=True)

from kernels import backend, chunk, triton_head
from kernels.divergences import DIVERGENCES, FORMULAS, WITH_BETA
from kernels.linear_kl import linear_kl
from kernels.linear_logprob import LogprobTerm, linear_logprob
from kernels.linear_topk import (
    count_draws,
    cross_entropy_of_draws,
    linear_topk_divergence,
    topk_logprobs,
)
from kernels.triton_steps import bucket_logprobs
from losses.sft import cross_entropy
from tests import reference

CASES = [
    (name, beta) for name in FORMULAS for beta in ((0.1, 0.5, 0.9) if name in WITH_BETA else (0.5,))
]
CASES += [("mixed_kl", 0.0), ("jsd", 0.0), ("jsd", 1.0)]
CASES += [("skew_forward_kl", 0.0), ("skew_reverse_kl", 0.0)]


@pytest.fixture(autouse=True)
def by_kernel(monkeypatch):
    """Every call takes the kernels, and the PyTorch steps are out of reach."""
    backend.use("triton")
    # Hopper's form, and several tiles even of small things
    monkeypatch.setattr(
        triton_head,
        "config_for",
        lambda device: triton_head.Config(16, 32, 16, 4, 1, flatten=True, tma=True, halves=True),
    )
    for module in ("linear_kl", "linear_logprob", "linear_topk"):
        monkeypatch.delattr(f"kernels.{module}.torch_step")
    yield
    backend.use("auto")


@pytest.fixture
def wide_tiles(monkeypatch):
    """Fewer programs for the interpreter to run one after the other, and rows of several blocks."""
    monkeypatch.setattr(
        triton_head,
        "config_for",
        lambda device: triton_head.Config(16, 256, 16, 4, 1, flatten=True, tma=True, halves=True),
    )
    monkeypatch.setattr(triton_head, "ROW_BLOCK", 1024)


def pair(n=11, vocab=37, width=8, teacher_width=12, padding=4, scale=1.0, seed=1):
    g = torch.Generator().manual_seed(seed)

    def make(*shape):
        return torch.randn(*shape, generator=g)

    hidden, head = make(n, width) * scale, make(vocab + padding, width)
    teacher_hidden, teacher_head = (
        make(n, teacher_width) * scale,
        make(vocab + padding + 3, teacher_width),
    )
    return (
        hidden.requires_grad_(),
        head.requires_grad_(),
        teacher_hidden,
        teacher_head,
        torch.randint(vocab, (n,), generator=g),
        torch.rand(n, generator=g),
    )


def in_fp64(*xs):
    return [x.detach().double().requires_grad_(x.requires_grad) for x in xs]


def assert_close(got, want, tolerance):
    error = (got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-300)
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"


def assert_gradients(loss, leaves, want, leaves64, tolerance=5e-6):
    """Returns the gradients of the loss."""
    assert_close(loss.detach(), want.detach(), 1e-6)
    gradients = torch.autograd.grad(loss, leaves)
    for got, exact in zip(gradients, torch.autograd.grad(want, leaves64), strict=True):
        assert got.dtype == torch.float32
        assert_close(got, exact, tolerance)
    return gradients


@pytest.mark.parametrize(
    "name,beta,temperature,ce",
    [(*case, 1.0, 0.0) for case in CASES]
    + [(name, 0.5, *t) for name in FORMULAS for t in ((2.5, 0.3), (1.0, 0.4))],
)
def test_divergence_equals_reference(name, beta, temperature, ce):
    vocab = 37
    hidden, head, th, tw, target, weight = pair(vocab=vocab)
    weight[3] = 0
    term = LogprobTerm(target, weight * ce, cross_entropy) if ce else None
    loss, out = linear_kl(
        hidden,
        head,
        th,
        tw,
        weight,
        name,
        beta=beta,
        temperature=temperature,
        scale=1 - ce,
        logprob=term,
        vocab=vocab,
        chunk_rows=8,
    )
    h, w = in_fp64(hidden, head)
    want_N = reference.kd_row_loss(
        name,
        h @ w[:vocab].T,
        th.double() @ tw[:vocab].double().T,
        target,
        beta=beta,
        temperature=temperature,
        ce_weight=ce,
        t_squared=False,
    )
    want = (want_N * weight.double()).sum()
    _, of_head = assert_gradients(loss, (hidden, head), want, (h, w))
    assert of_head[vocab:].abs().max() == 0


@pytest.mark.parametrize("hopper", [True, False])
@pytest.mark.parametrize(
    "n,vocab,width,padding,rows",
    [
        (1, 1, 4, 0, 9),
        (3, 15, 8, 0, 2),
        (16, 16, 16, 0, 16),
        (17, 17, 20, 0, 17),
        (5, 48, 36, 100, 3),
        (33, 300, 4, 1, 20),
    ],
)
def test_ragged_sizes(n, vocab, width, padding, rows, hopper, monkeypatch):
    """Sizes around a tile, heads with and without room for a last tile, several blocks of a row."""
    monkeypatch.setattr(triton_head, "ROW_BLOCK", 128)
    if not hopper:
        monkeypatch.setattr(
            triton_head, "config_for", lambda device: triton_head.Config(16, 16, 16, 4, 1)
        )
    hidden, head, th, tw, target, weight = pair(n, vocab, width, 2 * width, padding, scale=0.5)
    term = LogprobTerm(target, weight, cross_entropy)
    loss, _ = linear_kl(
        hidden, head, th, tw, weight, "reverse_kl", logprob=term, vocab=vocab, chunk_rows=rows
    )
    h, w = in_fp64(hidden, head)
    zs, zt = h @ w[:vocab].T, th.double() @ tw[:vocab].double().T
    want = (
        (reference.divergence("reverse_kl", zs, zt) + reference.cross_entropy(zs, target))
        * weight.double()
    ).sum()
    assert_gradients(
        loss, (hidden, head), want + 0 * (h.sum() + w.sum()), (h, w)
    ) if vocab > 1 else None


@pytest.mark.parametrize("temperature,entropy", [(1.0, False), (0.6, True), (1.0, True)])
def test_any_function_of_logprob_and_entropy(temperature, entropy):
    hidden, head, _, _, target, weight = pair()
    old = torch.randn(11) - 3

    def clipped(logp, entropy, fields):
        ratio = (logp - fields["old"]).exp()
        return -torch.minimum(ratio, ratio.clamp(0.8, 1.2)) - (
            0.1 * entropy * logp if entropy is not None else 0
        )

    loss, out = linear_logprob(
        hidden,
        head,
        target,
        weight,
        clipped,
        {"old": old},
        temperature=temperature,
        entropy=entropy,
        vocab=37,
        chunk_rows=4,
    )
    h, w = in_fp64(hidden, head)
    logits = h @ w[:37].T / temperature
    logp, exact = -reference.cross_entropy(logits, target), reference.entropy(logits)
    want = (
        clipped(logp, exact if entropy else None, {"old": old.double()}) * weight.double()
    ).sum()
    assert_gradients(loss, (hidden, head), want, (h, w))
    assert_close(out["logp"], logp.detach(), 1e-6)
    if entropy:
        assert_close(out["entropy"], exact.detach(), 1e-6)


@pytest.mark.parametrize("kl_temperature,lp_temperature", [(1.0, 0.7), (1.3, 1.3)])
def test_a_policy_gradient_and_a_divergence_share_the_logits(kl_temperature, lp_temperature):
    hidden, head, th, tw, target, weight = pair()

    def row_loss(logp, entropy, fields):
        return -fields["a"] * logp.exp() - 0.2 * entropy

    fields = {"a": torch.randn(11)}
    term = LogprobTerm(target, weight, row_loss, fields, lp_temperature, entropy=True)
    loss, _ = linear_kl(
        hidden,
        head,
        th,
        tw,
        weight,
        "jsd",
        beta=0.3,
        temperature=kl_temperature,
        scale=2.0,
        logprob=term,
        vocab=37,
        chunk_rows=5,
    )
    h, w = in_fp64(hidden, head)
    zs, zt = h @ w[:37].T, th.double() @ tw[:37].double().T
    rows = row_loss(
        -reference.cross_entropy(zs / lp_temperature, target),
        reference.entropy(zs / lp_temperature),
        {"a": fields["a"].double()},
    )
    rows = rows + 2.0 * reference.divergence("jsd", zs, zt, beta=0.3, temperature=kl_temperature)
    assert_gradients(loss, (hidden, head), (rows * weight.double()).sum(), (h, w))


def test_without_gradients_no_logits_are_kept(monkeypatch):
    hidden, head, _, _, target, weight = pair()
    monkeypatch.delattr(triton_head, "buffer")
    with torch.no_grad():
        _, out = linear_logprob(
            hidden,
            head,
            target,
            weight,
            lambda logp, *_: logp,
            temperature=0.7,
            entropy=True,
            vocab=37,
            chunk_rows=4,
        )
    logits = hidden.detach().double() @ head.detach()[:37].double().T / 0.7
    assert_close(out["logp"], -reference.cross_entropy(logits, target), 1e-6)
    assert_close(out["entropy"], reference.entropy(logits), 1e-6)
    assert out["logp"].max() <= 0


@pytest.mark.parametrize("k", [1, 20, 37])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_topk_list_with_its_tail(name, k):
    hidden, head, th, tw, target, weight = pair()

    def definition(ls, lt):
        return DIVERGENCES[name](ls, lt, 0.3)

    ids, listed = topk_logprobs(th, tw, k, temperature=1.7, vocab=37, chunk_rows=4)
    full = torch.log_softmax(th.double() @ tw[:37].double().T / 1.7, 1)
    assert torch.equal(ids, full.topk(k, 1).indices)

    def merge(lp):
        return torch.cat(
            (
                lp.gather(1, ids),
                lp.scatter(1, ids, -math.inf)
                .logsumexp(1, keepdim=True)
                .clamp(min=math.log(torch.finfo(torch.float32).tiny)),
            ),
            1,
        )

    torch.testing.assert_close(
        listed.clamp(min=-87.0).double(), merge(full).clamp(min=-87.0), rtol=1e-5, atol=1e-5
    )
    for ce in (0.0, 0.3):
        term = LogprobTerm(target, weight * ce, cross_entropy) if ce else None
        loss, _ = linear_topk_divergence(
            hidden,
            head,
            ids,
            listed,
            weight,
            definition,
            temperature=1.7,
            scale=2.0,
            logprob=term,
            vocab=37,
            chunk_rows=4,
        )
        h, w = in_fp64(hidden, head)
        logits = h @ w[:37].T
        want = 2.0 * definition(
            merge(torch.log_softmax(logits / 1.7, 1)), merge(full)
        ) + ce * reference.cross_entropy(logits, target)
        assert_gradients(loss, (hidden, head), (want * weight.double()).sum(), (h, w), 1e-5)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "mixed_kl"])
@pytest.mark.parametrize("listed", [False, True])
def test_divergence_equals_reference_with_a_clip(name, listed):
    """Full and over given ids, beside a cross-entropy, which is not clipped."""
    hidden, head, th, tw, target, weight = pair()
    term = LogprobTerm(target, weight * 0.3, cross_entropy)
    clip = 0.3 if listed else 1.5
    options = dict(temperature=1.7, clip=clip, logprob=term, vocab=37, chunk_rows=4)
    h, w = in_fp64(hidden, head)
    z_NV, t_NV = h @ w[:37].T, th.double() @ tw[:37].double().T
    log_s, log_t = (torch.log_softmax(x / 1.7, 1) for x in (z_NV, t_NV))
    if listed:
        ids = (
            torch.randint(37, (11, 1), generator=torch.Generator().manual_seed(0))
            + torch.arange(0, 30, 6) * torch.ones(11, 1).long()
        )
        ids, logp = topk_logprobs(th, tw, 5, ids_Nk=ids % 37, temperature=1.7, vocab=37)
        others = torch.ones(11, 37).scatter(1, ids, 0)
        log_s, log_t = (
            torch.cat((x.gather(1, ids), (x.exp() * others).sum(1, keepdim=True).log()), 1)
            for x in (log_s, log_t)
        )
        torch.testing.assert_close(logp.double(), log_t, rtol=1e-5, atol=1e-5)

        def definition(ls, lt):
            return DIVERGENCES[name](ls, lt, 0.3)

        loss, _ = linear_topk_divergence(hidden, head, ids, logp, weight, definition, **options)
    else:
        loss, _ = linear_kl(hidden, head, th, tw, weight, name, beta=0.3, **options)
    value = reference.divergence(name, log_s, log_t, beta=0.3)
    assert 0 < (value > clip).sum() < 11
    clipped = value * (clip / value.detach()).clamp(max=1)
    want = clipped + 0.3 * reference.cross_entropy(z_NV, target)
    assert_gradients(loss, (hidden, head), (want * weight.double()).sum(), (h, w), 1e-5)


def test_divergence_equals_reference_with_topk_draws():
    """Draws with repetitions: −Σ share · log p_s."""
    hidden, head, _, _, _, weight = pair()
    drawn = torch.randint(19, (11, 12), generator=torch.Generator().manual_seed(0))
    draws = count_draws(drawn, 37)
    loss, _ = linear_topk_divergence(
        hidden, head, *draws, weight, cross_entropy_of_draws, vocab=37, chunk_rows=4
    )
    h, w = in_fp64(hidden, head)
    log_s = torch.log_softmax(h @ w[:37].T, 1)
    want = -(log_s.gather(1, drawn).mean(1) * weight.double()).sum()
    assert_gradients(loss, (hidden, head), want, (h, w), 1e-5)


def test_several_listed_ids_of_one_tile_count_once():
    hidden, head, *_ = pair(n=2, vocab=64)
    ids = torch.tensor([[17, 18, 31, 16, 0], [63, 62, 61, 15, 48]])
    scored = triton_head.logits(
        hidden.detach(), head.detach()[:64], out_nP=triton_head.buffer(2, 64, hidden)
    )
    got = bucket_logprobs(scored, ids, 1.0)
    full = torch.log_softmax(hidden.detach().double() @ head.detach()[:64].double().T, 1)
    torch.testing.assert_close(got[:, :5].double(), full.gather(1, ids), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        got[:, 5].double(), full.scatter(1, ids, -math.inf).logsumexp(1), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name,beta", CASES)
def test_extreme_logits(name, beta):
    """Logits of ±1e4, one-hot teachers on other ids than the student's, and equal rows."""
    hidden = (1e4 * torch.eye(8)[[0, 1, 2, 3, 0, 5]]).requires_grad_()
    hidden.data[5] *= -1  # all but one id at the top: logits of −1e4
    head = torch.eye(40, 8).requires_grad_()
    teacher = hidden.detach().roll(1, 0)
    teacher[4] = hidden[4].detach()
    loss, out = linear_kl(hidden, head, teacher, head.detach(), torch.ones(6), name, beta=beta)
    h, w = in_fp64(hidden, head)
    want_N = reference.divergence(name, h @ w.T, teacher.double() @ w.T.detach(), beta=beta)
    assert_close(out["divergence"], want_N.detach(), 1e-6)
    assert out["divergence"][4] == 0
    for got, exact in zip(
        torch.autograd.grad(loss, (hidden, head)),
        torch.autograd.grad(want_N.sum(), (h, w)),
        strict=True,
    ):
        assert torch.isfinite(got).all()
        assert_close(got, exact, 1e-5) if exact.norm() else None


def test_masked_ids_have_no_probability_and_no_gradient():
    """A head row of −inf masks its id for teacher and student; a whole tile of them too."""
    hidden, head, th, tw, target, weight = pair(n=5, vocab=50, padding=0)
    masked = [3, 20, *range(32, 48)]
    free = [v for v in range(50) if v not in masked]
    hidden.data[:, 0], th[:, 0] = 1.0, 1.0
    tw = tw[:50].clone()
    for w in (head.data, tw):
        w[masked] = 0.0
        w[masked, 0] = -math.inf
    target = torch.tensor(free)[target % len(free)]
    for name in FORMULAS:
        term = LogprobTerm(
            target, weight, lambda logp, entropy, fields: -logp - 0.1 * entropy, entropy=True
        )
        loss, out = linear_kl(hidden, head, th, tw, weight, name, logprob=term)
        (got,) = torch.autograd.grad(loss, head)
        (w,) = in_fp64(head.data[free].requires_grad_())
        zs, zt = hidden.detach().double() @ w.T, th.double() @ tw[free].double().T
        again = torch.tensor([free.index(t) for t in target.tolist()])
        rows = (
            reference.divergence(name, zs, zt)
            + reference.cross_entropy(zs, again)
            - 0.1 * reference.entropy(zs)
        )
        (exact,) = torch.autograd.grad((rows * weight.double()).sum(), w)
        assert_close(loss.detach(), (rows * weight.double()).sum().detach(), 1e-6)
        assert_close(got[free], exact, 3e-6)
        assert got[masked].abs().max() == 0


@pytest.mark.parametrize("name,beta", [(name, 0.3) for name in FORMULAS])
def test_close_pairs_keep_their_digits(name, beta, wide_tiles):
    hidden, head, th, tw = (
        x.float()
        for x in reference.near_pair(4, 3001, 16, torch.Generator().manual_seed(0), kl=1e-3)
    )
    hidden.requires_grad_(), head.requires_grad_()
    loss, out = linear_kl(hidden, head, th, tw, torch.ones(4), name, beta=beta)
    h, w = in_fp64(hidden, head)
    want = reference.divergence(name, h @ w.T, th.double() @ tw.double().T, beta=beta).sum()
    assert_close(loss.detach(), want.detach(), 1e-4)
    for got, exact in zip(
        torch.autograd.grad(loss, (hidden, head)), torch.autograd.grad(want, (h, w)), strict=True
    ):
        assert_close(got, exact, 1e-4)


def test_a_number_that_is_none_reaches_the_loss():
    hidden, head, th, tw, target, weight = pair()
    hidden.data[2, 1] = math.nan
    assert math.isnan(linear_logprob(hidden, head, target, weight, cross_entropy, vocab=37)[0])
    assert math.isnan(linear_kl(hidden, head, th, tw, weight, "forward_kl", vocab=37)[0])


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_half_precision_storage_keeps_a_gradient_to_its_own_rounding(name, wide_tiles):
    """What a GPU keeps: fp16 differences, then 2-byte gradients (the interpreter has no bf16)."""
    hidden, head, th, tw = (
        x.float()
        for x in reference.near_pair(4, 3001, 16, torch.Generator().manual_seed(0), kl=1e-3)
    )

    def score(x, w):
        return triton_head.logits(x, w, out_nP=torch.empty(4, 3072, dtype=torch.float16))

    student, teacher = score(hidden, head), score(th, tw)
    stored = teacher.z_nP.clone()
    coefficient = torch.tensor([[100.0, 0, 0]]).expand(4, 3).contiguous()
    value, grad = triton_head.gradient(
        student, teacher, divergence=name, coefficient_n3=coefficient, dtype=torch.float16
    )
    zs = (hidden.double() @ head.double().T).requires_grad_()
    want = reference.divergence(name, zs, th.double() @ tw.double().T)
    (exact,) = torch.autograd.grad(want.sum(), zs)
    assert torch.equal(stored, teacher.z_nP) == (
        name == "forward_kl"
    )  # the others leave u in the teacher's bytes
    assert grad.data_ptr() == student.z_nP.data_ptr() and grad[:, 3001:].abs().max() == 0
    assert_close(value, want.detach(), 5e-3)
    assert_close(grad[:, :3001] / 100, exact, 4e-3)


def test_rows_are_cut_into_chunks_without_a_trace(monkeypatch):
    """The same bits leave the kernels, of numbers whose products are exact.

    On some CPUs the sums of a product of matrices depend on where a row lies.
    """
    hidden, head, th, tw, target, weight = pair(n=10)
    for x in (hidden, head, th, tw):
        x.data.mul_(8).round_().div_(8)
    multiply, parts, results = chunk.product, [], []

    def spy(a, b, out, add=False):
        parts.append(a.clone())
        return multiply(a, b, out, add)

    monkeypatch.setattr(chunk, "product", spy)
    for rows in (4, 7, 1000):
        parts.clear()
        options = dict(vocab=37, chunk_rows=rows)
        loss, _ = linear_kl(hidden, head.detach(), th, tw, weight, "jsd", **options)
        results.append((torch.cat(parts), torch.autograd.grad(loss, hidden)[0]))
    for logits, rows in results[1:]:
        assert torch.equal(logits, results[0][0]) and len(logits) == 10
        assert_close(rows, results[0][1], 1e-6)


def test_rows_in_groups_are_the_rows(monkeypatch):
    """Every row is computed once, whatever the order that keeps some rows in the cache."""
    hidden, head, *_ = pair(n=70, vocab=90)

    def score():
        return triton_head.logits(
            hidden.detach(),
            head.detach()[:90],
            out_nP=triton_head.buffer(70, 90, hidden).fill_(7.0),
        )

    want = score()
    for kept in (1, 2 * 16 * 8 * 4, 3 * 16 * 8 * 4):
        monkeypatch.setattr(triton_head, "CACHED_BYTES", kept)
        got = score()
        assert torch.equal(got.z_nP, want.z_nP) and torch.equal(got.row_n4, want.row_n4)


def test_no_target_is_above_the_largest_logit(wide_tiles):
    """Its product is one of its own, whose sum has another order; the others have no mass."""
    tensors = pair(n=100, vocab=200, width=64, padding=0, scale=40.0)
    hidden, head, *_ = (x.detach() for x in tensors)
    logits = hidden.double() @ head.double().T
    for target in (logits.argmax(1), logits.argmin(1)):
        logp = triton_head.logits(hidden, head, target_n=target).logp_n(1.0)
        exact = logits.log_softmax(1).gather(1, target[:, None])[:, 0]
        assert logp.max() <= 0 and (logp - exact).abs().max() < 2e-3


def test_a_target_that_is_no_id_and_a_head_of_another_layout():
    hidden, head, _, _, target, weight = pair(width=12)
    target[:4] = torch.tensor([36, 37, 40, -100])  # 37 ids, in tiles of 16
    scored = triton_head.logits(hidden.detach(), head.detach()[:37], target_n=target)
    assert scored.logp_n(1.0).isnan().tolist() == [False, True, True, True, *[False] * 7]
    target[1:4] = 0
    turned = head.detach().t().contiguous().t()
    losses = [
        linear_logprob(hidden, w, target, weight, cross_entropy, vocab=37)[0].item()
        for w in (head, turned)
    ]
    assert losses[0] == losses[1]


def test_topk_cuts_its_rows_as_the_kernels_want(monkeypatch):
    """A CPU's chunks begin at rows of another alignment: every kernel would be compiled again."""
    hidden, head, _, _, _, weight = pair(n=10)
    asked = []
    monkeypatch.setattr(triton_head, "chunk_rows", lambda *about: asked.append(about) or 4)
    ids, logp = topk_logprobs(hidden.detach(), head.detach(), 5, vocab=37)
    linear_topk_divergence(hidden, head, ids, logp, weight, cross_entropy_of_draws, vocab=37)
    assert [(vocab, len(rows)) for vocab, rows in asked] == [(37, 10)] * 2


def test_chunks_are_few_and_alike():
    def rows(n):
        return triton_head.chunk_rows(151_665, torch.empty(n, 8, dtype=torch.bfloat16))

    for n in (1, 300, 8192, 8900, 16_384, 100_000):
        assert rows(n) % 256 == 0 and rows(n) * 151_665 * 2 <= 5 << 29
        chunks = -(-n // rows(n))
        assert chunks == -(-n // 8704) and n - (chunks - 1) * rows(n) > rows(n) - 256 * chunks
