"""What a student is told, and how tokens count, against the definitions in fp64."""

import functools
import itertools
import json
import math

import numpy as np
import pytest
import torch

import options
import train
from config import validate
from data.batch import Batch, Document, uniforms
from data.teacher_cache import TeacherCache
from errors import UserError
from kernels.linear_topk import (
    count_draws,
    cross_entropy_of_draws,
    draw_ids,
    linear_topk_divergence,
    topk_logprobs,
)
from losses.kd import KDConfig, kd_loss
from run import read_metrics
from tests import reference

N, D, C, V, T = 6, 5, 4, 11, 1.7


def case(scale=1.0):
    """(hidden, head, teacher) of one document's rows, and the batch of it."""
    g = torch.Generator().manual_seed(2)

    def make(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64) * scale

    tokens = torch.randint(V, (N + 1,), generator=g).numpy()
    batch = Batch.pack([Document(tokens, np.array([0.0, *np.linspace(0.3, 1.4, N)]))])
    leaves = make(N + 1, D).requires_grad_(), make(V + 2, D).requires_grad_()
    return *leaves, (make(N, C), make(V + 4, C)), batch


def by_definition(hidden, head, teacher, batch, row_loss):
    """Σ weight · row_loss(student's logits, teacher's logits) of the loss rows."""
    teacher_hidden, teacher_head = teacher
    z_NV, t_NV = hidden[:N] @ head[:V].T, teacher_hidden @ teacher_head[:V].T
    return (row_loss(z_NV, t_NV) * batch.select(batch.weight_T)).sum()


def assert_same(got, want, leaves, tolerance=1e-10):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    for a, b in zip(
        torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def merged(z_NV, ids_Nk):
    """Log-probs of the ids and of all others together."""
    p_NV = torch.softmax(z_NV / T, 1)
    listed = torch.zeros_like(p_NV, dtype=torch.bool).scatter(1, ids_Nk, True)
    tail_N1 = (p_NV * ~listed).sum(1, keepdim=True)
    return torch.cat((p_NV.gather(1, ids_Nk), tail_N1), 1).log()


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "mixed_kl"])
def test_the_students_own_topk(name):
    """The divergence of both distributions merged into the student's k ids and a tail."""
    hidden, head, teacher, batch = case()
    cfg = KDConfig(name, beta=0.3, temperature=T, vocab=V, signal="student_topk", k=3)
    loss, metrics = kd_loss(hidden, head, teacher, batch, cfg)

    def row_loss(z_NV, t_NV):
        ids_Nk = z_NV.detach().topk(3, 1).indices
        both = merged(z_NV, ids_Nk), merged(t_NV, ids_Nk)
        return reference.divergence(name, *both, beta=0.3)  # a log-softmax of log-probs is itself

    want = by_definition(hidden, head, teacher, batch, row_loss)
    assert_same(loss, want, (hidden, head))
    full, _ = kd_loss(
        hidden, head, teacher, batch, KDConfig(name, beta=0.3, temperature=T, vocab=V)
    )
    assert loss < full and metrics[name][0] == pytest.approx(loss.item())


def test_log_probs_of_given_ids_keep_their_tail():
    """In fp32, where all but 1e-9 of the mass is on the ids that are asked for."""
    hidden = torch.zeros(2, 50)
    hidden[:, 7:10] = 25.0
    ids = torch.tensor([[8, 7, 9], [9, 8, 7]])
    got_ids, logp = topk_logprobs(hidden, torch.eye(50), 3, ids_Nk=ids, chunk_rows=1)
    exact = torch.softmax(hidden.double(), 1)
    tail = exact[:, :7].sum(1) + exact[:, 10:].sum(1)
    assert torch.equal(got_ids, ids)
    torch.testing.assert_close(logp[:, -1].double(), tail.log(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("signal", ["full", "topk"])
@pytest.mark.parametrize("ce", [0.0, 0.3])
def test_a_clipped_token_keeps_its_direction(signal, ce):
    hidden, head, teacher, batch = case()
    cfg = KDConfig("reverse_kl", temperature=T, ce=ce, vocab=V, signal=signal, k=4, clip=0.7)
    loss, metrics = kd_loss(hidden, head, teacher, batch, cfg)
    over = []

    def row_loss(z_NV, t_NV):
        both = z_NV / T, t_NV / T
        if signal == "topk":
            ids_Nk = t_NV.topk(4, 1).indices
            both = merged(z_NV, ids_Nk), merged(t_NV, ids_Nk)
        value_N = reference.divergence("reverse_kl", *both)
        over.append((value_N > 0.7).double())
        clipped_N = value_N * (0.7 / value_N.detach()).clamp(max=1)
        target_N = batch.select(batch.target_T)
        return (1 - ce) * clipped_N + ce * reference.cross_entropy(z_NV, target_N)

    want = by_definition(hidden, head, teacher, batch, row_loss)
    assert_same(loss, want, (hidden, head))
    assert 0 < over[0].sum() < N
    weight_N = batch.select(batch.weight_T)
    assert metrics["clipped"][0] == pytest.approx(float((over[0] * weight_N).sum()))


@pytest.mark.parametrize("who", ["teacher_entropy", "student_entropy"])
def test_entropy_weighs_the_divergence_alone(who):
    hidden, head, teacher, batch = case()
    cfg = KDConfig("jsd", temperature=T, ce=0.3, vocab=V, weight_by=who)
    loss, _ = kd_loss(hidden, head, teacher, batch, cfg)

    def row_loss(z_NV, t_NV):
        known_NV = t_NV if who == "teacher_entropy" else z_NV.detach()
        entropy_N = reference.entropy(known_NV / T)
        value_N = reference.divergence("jsd", z_NV, t_NV, temperature=T)
        ce_N = reference.cross_entropy(z_NV, batch.select(batch.target_T))
        return 0.7 * value_N * entropy_N / math.log(V) + 0.3 * ce_N

    assert_same(loss, by_definition(hidden, head, teacher, batch, row_loss), (hidden, head))


# --- draws ----------------------------------------------------------------------------------------


def gradients_of_draws(hidden, head, ids_Nk, vocab):
    """[N, D] gradients at the student's hidden rows, from k draws of each row."""
    hidden = hidden.detach().requires_grad_()
    weight_N = torch.ones(len(hidden), dtype=torch.float64)
    loss, _ = linear_topk_divergence(
        hidden, head, *count_draws(ids_Nk, vocab), weight_N, cross_entropy_of_draws, vocab=vocab
    )
    return torch.autograd.grad(loss, hidden)[0]


def systematic_draws(teacher_V, k):
    """Every draw that (u + i) / k can give, and the length of the u's that give it."""
    edges = (k * teacher_V.cumsum(0)[:-1, None] - torch.arange(k)).flatten()
    edges = torch.cat((edges[(edges > 0) & (edges < 1)], torch.tensor([0.0, 1.0]).double())).sort()[
        0
    ]
    middles = (edges[1:] + edges[:-1]) / 2
    at = (middles[:, None] + torch.arange(k)) / k
    return torch.searchsorted(teacher_V.cumsum(0)[:-1].contiguous(), at, right=True), edges.diff()


def independent_draws(teacher_V, k):
    """Every draw of k independent ids, and its probability."""
    every = torch.tensor(list(itertools.product(range(len(teacher_V)), repeat=k)))
    return every, teacher_V[every].prod(1)


@pytest.mark.parametrize("draws", [independent_draws, systematic_draws])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_expected_gradient_of_draws_is_that_of_the_forward_kl(k, draws):
    """Over all draws that there are, with their probabilities."""
    g = torch.Generator().manual_seed(5)
    vocab = 5
    hidden = torch.randn(1, 3, generator=g, dtype=torch.float64)
    head = torch.randn(vocab, 3, generator=g, dtype=torch.float64)
    teacher_V = torch.softmax(1.5 * torch.randn(vocab, generator=g, dtype=torch.float64), 0)
    every, probability = draws(teacher_V, k)
    probability = probability[:, None]
    gradients = gradients_of_draws(hidden.expand(len(every), -1), head, every, vocab)
    expected = (probability * gradients).sum(0)
    leaf = hidden.clone().requires_grad_()
    kl = reference.divergence("forward_kl", leaf @ head.T, teacher_V.log().unsqueeze(0)).sum()
    (want,) = torch.autograd.grad(kl, leaf)
    torch.testing.assert_close(expected, want[0], rtol=1e-10, atol=1e-12)
    # its variance: that of one draw, over k; less where the draws are spread evenly
    variance = (probability * (gradients - expected) ** 2).sum()
    one = gradients_of_draws(hidden.expand(vocab, -1), head, torch.arange(vocab)[:, None], vocab)
    of_one = (teacher_V[:, None] * (one - expected) ** 2).sum()
    if draws is independent_draws or k == 1:
        assert variance.item() == pytest.approx(of_one.item() / k, rel=1e-10)
    else:
        counts = torch.nn.functional.one_hot(every, vocab).sum(1)
        assert (counts - k * teacher_V).abs().max() < 1
        assert variance < 2 * of_one / k**2  # it falls with the square of their number


@pytest.mark.parametrize("k,vocab", [(1, 3), (6, 40), (9, 11), (30, 4)])
def test_draws_are_counted(k, vocab):
    ids = torch.randint(vocab, (20, k), generator=torch.Generator().manual_seed(k))
    ids[0] = 0  # one id alone, and those that come first
    ids[1] = torch.arange(k) % vocab
    got, logshare = count_draws(ids, vocab)
    width = min(-(-max(len(set(row)) for row in ids.tolist()) // 8) * 8, vocab)
    assert got.shape == (20, width) and logshare.shape == (20, width + 1)
    for row, listed, shares in zip(
        ids.tolist(), got.tolist(), logshare.exp().tolist(), strict=True
    ):
        assert len(set(listed)) == len(listed) and max(listed) < vocab
        want = {i: row.count(i) / k for i in set(row)}
        assert {i: s for i, s in zip(listed, shares, strict=False) if s} == pytest.approx(want)
        assert shares[-1] == 0


def test_draws_invert_the_distribution_function():
    _, _, (hidden, head), _ = case()
    p_NV = torch.softmax(hidden @ head[:V].T / T, 1)
    grid = (torch.arange(5000, dtype=torch.float64) + 0.5) / 5000
    ids = draw_ids(hidden, head, grid.expand(N, -1), temperature=T, vocab=V, chunk_rows=4)
    for row_k, p_V in zip(ids, p_NV, strict=True):
        assert row_k.diff().min() >= 0
        share_V = torch.bincount(row_k, minlength=V) / 5000
        torch.testing.assert_close(share_V, p_V.float(), rtol=0, atol=2.1e-4)


def test_rare_ids_are_drawn_from_fp32_logits():
    """20,000 ids of 1e-9 each, behind one of nearly all: an fp32 sum would lose their mass."""
    hidden, head = torch.ones(1, 1), torch.full((20_001, 1), -20.7)
    head[0] = 0
    tail = 20_000 * math.exp(-20.7)
    tail /= 1 + tail
    uniform = 1 - tail * torch.tensor([[0.999, 0.5, 0.001]], dtype=torch.float64)
    (ids,) = draw_ids(hidden, head, uniform).tolist()
    assert ids == pytest.approx([20, 10_000, 19_980], abs=2)


def test_random_numbers_belong_to_the_document():
    documents = [Document(np.arange(n), (np.arange(n) > 1).astype(float)) for n in (5, 9, 3)]
    whole = uniforms(documents, 4, seed=3)
    assert whole.shape == (3 + 7 + 1, 4) and 0 <= whole.min() and whole.max() < 1
    torch.testing.assert_close(whole.diff(), torch.full((11, 3), 0.25).double())
    assert len(set(whole[:, 0].tolist())) == 11 and whole[:, 0].max() < 0.25
    parts = [uniforms([d], 4, seed=3) for d in documents]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, uniforms(documents, 4, seed=4))
    assert uniforms([], 4, seed=3).shape == (0, 4)


def run(tmp_path, name, *given):
    common = ["--mode=kd", "--teacher=random:tiny-teacher", "--data=word_problems:12", "--steps=3"]
    common += ["--batch_size=4", "--eval_examples=0", "--dtype=float32", f"--runs={tmp_path}"]
    assert train.main([*common, f"--name={name}", *given]) == 0
    return read_metrics(tmp_path / name)


def test_training_from_kept_draws_is_training_with_the_teacher(tmp_path, capsys):
    draws, cache = ["--kd_signal=draws", "--kd_draws=5"], f"--kd_cache={tmp_path / 'c'}"
    with_teacher = run(tmp_path, "with", *draws)
    filled = run(tmp_path, "filled", *draws, cache)
    again = run(tmp_path, "again", *draws, cache)
    for a, b, c in zip(with_teacher, filled, again, strict=True):
        for name in ("train/teacher_ce", "train/grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-5)
            assert b[name] == c[name]
    counts = np.load(tmp_path / "c/counts.npy")
    assert counts.sum() == 5 * positions(tmp_path / "c") and len(counts) <= counts.sum()
    assert (tmp_path / "c/ids.npy").stat().st_size == 128 + 4 * len(counts)
    capsys.readouterr()
    other = ["--mode=kd", "--teacher=random:tiny-teacher", "--data=word_problems:12", cache]
    other += ["--eval_examples=0", f"--runs={tmp_path}", "--name=refused"]
    for given, word in (
        (["--kd_signal=topk", "--kd_topk=5"], "--kd_signal or --kd_topk"),
        (["--kd_signal=draws", "--kd_draws=6"], "--kd_draws"),
    ):
        assert train.main([*other, *given]) == 2
        error = capsys.readouterr().err
        assert f"was made with other {word}" in error and error.count("\n") == 1


def test_kept_draws_are_what_was_drawn(tmp_path):
    """In documents of any size, some without a trained position, filled in uneven pieces."""
    random = np.random.default_rng(0)
    sizes = [0, 3, 1, 0, 700, 5, 0]
    documents = [Document(np.arange(n + 2), (np.arange(n + 2) > 1) * 1.0) for n in sizes]
    for k, vocab in ((1, 9), (7, 3), (300, 40_000)):
        ids_Rk = random.integers(vocab, size=(sum(sizes), k))
        folder = tmp_path / str(k)
        open_cache = functools.partial(TeacherCache, folder, documents, "teacher", k, 1.0, vocab)
        pieces = np.split(ids_Rk, [0, 1, 4, 10, 500])
        open_cache(draws_seed=0).fill(
            lambda _, pieces=pieces: ((piece, np.empty((len(piece), 0))) for piece in pieces)
        )
        cache = open_cache(draws_seed=0)
        assert cache.complete and len(cache.ids) == sum(len(set(row)) for row in ids_Rk.tolist())
        rows = np.split(np.sort(ids_Rk, 1), np.cumsum(sizes)[:-1])
        for index, want in enumerate(rows):
            got, logp = cache[index]
            assert np.array_equal(got, want) and logp.shape == (len(want), 0)


def positions(folder):
    return json.loads((folder / "cache.json").read_text())["positions"]


def test_a_topk_or_another_seed_is_refused_where_draws_are_wanted(tmp_path):
    documents = [Document(np.arange(5), np.ones(5))]
    open_cache = functools.partial(TeacherCache, documents=documents, teacher="teacher", k=2)
    open_cache = functools.partial(open_cache, temperature=1.0, vocab=9)
    topk, draws = open_cache(tmp_path / "topk"), open_cache(tmp_path / "draws", draws_seed=0)
    topk.fill(lambda _: [(np.zeros((5, 2), int), np.log(np.full((5, 3), 1 / 3)))])
    draws.fill(lambda _: [(np.zeros((5, 2), int), np.empty((5, 0)))])
    assert open_cache(tmp_path / "draws", draws_seed=0).complete
    for name, seed, word in (
        ("topk", 0, "--kd_signal"),
        ("draws", None, "--kd_signal"),
        ("draws", 1, "seed"),
    ):
        with pytest.raises(UserError, match=f"was made with other {word}"):
            open_cache(tmp_path / name, draws_seed=seed)


@pytest.mark.parametrize(
    "given,words",
    [
        ("--kd_signal=draws --kd_divergence=jsd", "only the forward KL is"),
        ("--kd_signal=topk --kd_cache=c --kd_weight_by=teacher_entropy", "the teacher's entropy"),
        ("--kd_signal=draws --kd_clip=1", "kd_clip is not read with kd_signal=draws"),
        ("--kd_signal=student_topk --kd_cache=c", "kd_cache is not read with"),
        ("--kd_clip=-1", "at least 0"),
    ],
)
def test_what_cannot_work_is_refused(given, words):
    with pytest.raises(UserError, match=words):
        validate(options.parse(train.Config, ["--mode=kd", *given.split()]))


def test_every_signal_trains(tmp_path):
    weighed = ["--kd_weight_by=student_entropy", "--kd_clip=0.5", "--kd_divergence=mixed_kl"]
    full = run(tmp_path, "full")
    student = run(tmp_path, "student", "--kd_signal=student_topk", "--kd_topk=8", *weighed)
    teacher = run(tmp_path, "teacher", "--kd_weight_by=teacher_entropy")
    for other in (student, teacher):  # passes of the heads that come before
        assert other[-1]["train/flops"] > full[-1]["train/flops"]
        assert math.isfinite(other[-1]["train/loss"])
    assert 0 <= student[-1]["train/clipped"] <= 1
