"""How the global batch is cut never changes loss or gradient: micro-batches, order, chunks, ranks.

fp64, relative 1e-10.
"""

import functools
import random

import numpy as np
import pytest
import torch

from data.batch import WEIGHTINGS, Document, GlobalBatch, constant_length
from kernels import chunk
from losses.grpo import VARIANTS, GRPOConfig, grpo_loss
from losses.kd import DIVERGENCES, KDConfig, kd_loss
from losses.sft import sft_loss
from model.checkpoint import build_model
from model.transformer import ModelConfig
from tests import distributed_workers as workers

VOCAB = 40
WEIGHED = WEIGHTINGS | {"constant": functools.partial(constant_length, length=7)}


def losses():
    def kd(name, ce=0.0, **more):
        cfg = KDConfig(name, beta=0.3, temperature=1.7, t_squared=True, ce=ce, vocab=VOCAB, **more)
        return functools.partial(kd_loss, cfg=cfg)

    def grpo(variant, kd_coef=0.0):
        cfg = GRPOConfig(
            variant=variant,
            clip_low=0.2,
            clip_high=0.28,
            kl_coef=0.1,
            entropy_coef=0.01,
            temperature=1.3,
            vocab=VOCAB,
            kd_coef=kd_coef,
        )
        return functools.partial(grpo_loss, cfg=cfg)

    every = {"sft": sft_loss, "kd+ce": kd("jsd", ce=0.4)}
    every |= {name: kd(name) for name in DIVERGENCES}
    every |= {
        "student_topk": kd("reverse_kl", signal="student_topk", k=5, clip=0.2),
        "draws": kd("forward_kl", ce=0.2, signal="draws", k=6, weight_by="student_entropy"),
        "clipped": kd("mixed_kl", clip=0.2, weight_by="teacher_entropy"),
    }
    every |= {name: grpo(name) for name in VARIANTS}
    return every | {"grpo+kd": grpo("grpo", kd_coef=0.5)}


def build():
    shape = ModelConfig(
        vocab_size=VOCAB + 4,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
    )
    teacher_shape = ModelConfig(
        vocab_size=VOCAB + 9,
        hidden_size=24,
        intermediate_size=24,
        num_layers=1,
        num_heads=3,
        num_kv_heads=3,
        head_dim=8,
    )
    make = functools.partial(build_model, folder=None, device="cpu", weight_dtype=torch.float64)
    return make(shape, seed=0), make(teacher_shape, seed=1).requires_grad_(False), losses()


def documents(weighting):
    weigh = WEIGHED[weighting]
    rng = np.random.default_rng(0)
    made = []
    for length in (3, 9, 1, 14, 5, 5, 8, 2, 11):
        weights = np.ones(length, np.float64)
        weights[: rng.integers(1, length + 1)] = 0
        weights *= (1, 3 / 16, 1 / 4)[length % 3]  # as --grpo_paced has it
        tokens = rng.integers(0, VOCAB, length).astype(np.int32)
        # what the policy losses read, and the others do not
        fields = {"advantage": np.full(length, rng.normal())}
        for name in ("old_logp", "ref_logp", "sampler_logp"):
            fields[name] = rng.normal(-np.log(VOCAB), 0.3, length)
        fields["tis_weight"] = rng.uniform(0.5, 1.5, length)
        fields = {name: torch.from_numpy(x) for name, x in fields.items()}
        made.append(weigh(Document(tokens, weights, fields)))
    made.append(Document(np.arange(6, dtype=np.int32), np.zeros(6)))  # carries no loss at all
    return made


def assert_same(got, want, what):
    (metrics, grad), (metrics0, grad0) = got, want
    grad, grad0 = (
        torch.as_tensor(grad, dtype=torch.float64),
        torch.as_tensor(grad0, dtype=torch.float64),
    )
    assert (grad - grad0).norm() / grad0.norm() < 1e-10, what
    assert metrics.keys() == metrics0.keys()
    for name in metrics:
        assert abs(metrics[name] - metrics0[name]) < 1e-10 * max(1, abs(metrics0[name])), (
            what,
            name,
        )


@functools.cache
def uncut(weighting):
    """(documents, every loss of the uncut batch on one rank)"""
    model, teacher, every = build()
    docs = documents(weighting)
    return docs, {
        name: workers.gradient(model, teacher, fn, docs, 10_000) for name, fn in every.items()
    }


@pytest.fixture(params=WEIGHED)
def whole(request):
    return uncut(request.param)


@pytest.mark.parametrize("name", losses())
def test_micro_batches_order_and_chunks(whole, name, monkeypatch):
    docs, want = whole
    model, teacher, every = build()
    for micro_batch_tokens in (14, 20, 31):
        assert_same(
            workers.gradient(model, teacher, every[name], docs, micro_batch_tokens),
            want[name],
            f"{micro_batch_tokens} tokens",
        )
    shuffled = random.Random(0).sample(docs, len(docs))
    assert_same(workers.gradient(model, teacher, every[name], shuffled, 23), want[name], "order")
    for rows in (1, 3, 7):
        monkeypatch.setitem(chunk.CHUNK_ELEMENTS, "cpu", rows * 2 * (VOCAB + 4))
        monkeypatch.setattr(chunk, "BLOCK_ELEMENTS", 2 * VOCAB)
        assert_same(
            workers.gradient(model, teacher, every[name], docs, 31), want[name], f"chunks of {rows}"
        )


@pytest.mark.parametrize("name", ["sft", "forward_kl", *VARIANTS, "grpo+kd"])
def test_a_mean_of_micro_batches_would_fail(whole, name):
    """The classic bug is dividing each micro-batch by its own count: it must not pass."""
    docs, want = whole
    model, teacher, every = build()

    carrying = [m for m in GlobalBatch(docs).split(14) if m.normalizer]
    norm = sum(m.normalizer for m in carrying)

    def mean_of_means(hidden, head, frozen, micro):
        loss_sum, metrics = every[name](hidden, head, frozen, micro)
        return loss_sum / (micro.normalizer or 1.0) * norm / len(carrying), metrics

    assert_same(
        workers.gradient(model, teacher, every[name], docs, 14), want[name], "the right one"
    )
    with pytest.raises(AssertionError):
        assert_same(workers.gradient(model, teacher, mean_of_means, docs, 14), want[name], "mutant")


def shares(docs, world):
    """Named ways of dealing the documents out to ranks."""
    deal = [docs[r::world] for r in range(world)]
    by_loss = sorted(docs, key=lambda d: d.weights.sum())
    no_loss = [[d for d in docs if d.weights.sum() == 0]] + [
        [d for d in docs if d.weights.sum()][r :: world - 1] for r in range(world - 1)
    ]
    return {
        "dealt": deal,
        "a rank without loss rows": no_loss,
        "a rank without micro-batches": [[], by_loss] + [[]] * (world - 2),
    }


EVERY = [pytest.param(world, True, marks=pytest.mark.slow) for world in (2, 3)]


@pytest.mark.parametrize("world,every", [(3, False), *EVERY])
def test_ranks(world, every):
    """Every loss in each way of dealing and each weighting; all pairs of the two where `every`."""
    jobs = []
    for i, weighting in enumerate(WEIGHED):
        for j, (name, share) in enumerate(shares(uncut(weighting)[0], world).items()):
            if every or i == j:
                jobs.append(((weighting, name), share, 20))
    assert len(jobs) == (9 if every else 3)
    done = workers.spawned(workers.rank_main, world, build, jobs)
    assert len(done) == len(jobs) * len(losses())
    for ((weighting, job), name), got in done.items():
        assert_same(got, uncut(weighting)[1][name], f"{world} ranks, {weighting}, {job}, {name}")
