"""The policy losses against a token-by-token fp64 re-statement of the papers."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch

from data.batch import WEIGHTINGS, Batch, Document, constant_length
from kernels import chunk
from losses.grpo import KL_ESTIMATORS, VARIANTS, GRPOConfig, grpo_loss
from losses.kd import KDConfig, kd_loss
from rl.advantage import ADVANTAGES, group_advantages, has_reward_spread
from tests import reference

VOCAB, HEAD, HIDDEN, LENGTH = 17, 20, 6, 9

# (prompt tokens, completion tokens, advantage, log-ratio of the completion, masked as truncated)
SAMPLES = [
    (3, 4, 1.2, 0.5, False),
    (3, 7, -0.7, 0.5, False),
    (3, 1, 0.9, -0.5, False),
    (3, 5, -1.4, -0.5, False),
    (3, 6, 0.8, 0.03, False),
    (2, 3, -0.5, -0.04, False),
    (2, 6, -1.1, 0.4, True),
    (2, 5, 0.0, 0.5, False),
    (2, 2, 0.0, -0.5, False),
    (2, 1, 0.6, 0.45, False),
    (4, 4, 0.3, -0.45, False),
    (1, 3, -0.2, 0.02, False),
    (1, 1, 0.4, 0.6, False),
]


def policy_term(variant, cfg, logp, old, n, advantage):
    """(loss of a sequence's n-th token, its ratio, the side on which that is out of bounds)."""
    ratios = [torch.exp(a - b) for a, b in zip(logp, old, strict=True)]
    sequence = math.prod(ratios) ** (1 / len(ratios))
    ratio, low, high = ratios[n], 1 - cfg.clip_low, 1 + cfg.clip_high
    if variant in ("gspo", "mis"):  # GSPO, eq. 5 and 7: the likelihood ratio, to 1/|o|
        ratio = sequence
    elif variant == "gspo-token":  # eq. 14
        ratio = sequence.detach() * torch.exp(logp[n] - logp[n].detach())
    elif variant == "gmpo":  # section 3: its bounds are those of the logarithm
        low, high = math.exp(-cfg.clip_low), math.exp(cfg.clip_high)
    elif variant == "sapo":  # no bounds
        low, high = 0, math.inf
    side = "low" if ratio < low else "high" if ratio > high else "in"
    inside = torch.clamp(ratio, low, high)
    if variant == "cispo":  # eq. 4 and 5
        return -inside.detach() * advantage * logp[n], ratio, side
    if variant == "mis":  # nothing of a sequence whose geometric mean is out of bounds
        return (-ratio.detach() * advantage * logp[n] if side == "in" else 0 * logp[n]), ratio, side
    if variant == "sapo":  # eq. 5 and 6
        tau = 1.0 if advantage > 0 else 1.05
        return -4 / tau / (1 + torch.exp(-tau * (ratio - 1))) * advantage, ratio, side
    if variant == "gmpo":  # A Π clip(r)^(1/|o|), each clipped where PPO's minimum would
        worst = min if advantage >= 0 else max
        product = math.prod(worst(r, torch.clamp(r, low, high)) for r in ratios)
        return -advantage * product ** (1 / len(ratios)), ratio, side
    if variant == "dppo":  # a mask: A and r agree, and D = |p − p_old| is too much
        moved = torch.exp(logp[n]) - torch.exp(old[n])
        side = "low" if moved < -cfg.clip_low else "high" if moved > cfg.clip_high else "in"
        masked = (side == "high" and advantage > 0) or (side == "low" and advantage < 0)
        bound = {"low": -cfg.clip_low, "high": cfg.clip_high}.get(side, 0) / math.exp(old[n])
        loss = -advantage * (1 + bound) + 0 * logp[n]  # not the paper's 0, but without a gradient
        return (loss if masked else -ratio * advantage), ratio, side
    return -min(ratio * advantage, inside * advantage), ratio, side  # PPO, eq. 7


def restated(variant, hidden_TD, head_VD, documents, cfg):
    """(the papers' mean loss, a record per trained token); every ratio and sum is spelled out.

    A masked sequence is as if it had not been drawn, under every variant.
    """
    per_sequence, records, start = [], [], 0
    for d in documents:
        trained = [i for i in range(1, len(d)) if d.weights[i] != 0]
        logp, old, terms = [], [], []
        for i in trained:
            ls_V = torch.log_softmax(
                head_VD[: cfg.vocab] @ hidden_TD[start + i - 1] / cfg.temperature, 0
            )
            entropy_i = -(ls_V.exp() * ls_V).sum()
            logp.append(ls_V[d.tokens[i]])
            old.append(
                torch.tensor(d.fields["old_logp"][i])
                if "old_logp" in d.fields
                else logp[-1].detach()
            )
            terms.append(-cfg.entropy_coef * entropy_i)
            records.append(
                {
                    "entropy": entropy_i.item(),
                    "logp": logp[-1].item(),
                    "old": old[-1].item(),
                    "at": (start, i),
                }
            )
            if cfg.kl_coef:  # Schulman, "Approximating KL divergence": x ~ pi, r = pi_ref / pi
                log_r = d.fields["ref_logp"][i] - logp[-1]
                estimates = {"k1": -log_r, "k2": log_r**2 / 2, "k3": log_r.exp() - 1 - log_r}
                terms[-1] = terms[-1] + cfg.kl_coef * estimates[cfg.kl_estimator]
                records[-1]["ref_kl"] = estimates["k3"].item()
        for n, i in enumerate(trained):
            advantage, correction = (
                float(d.fields[name][i]) if name in d.fields else 1.0
                for name in ("advantage", "tis_weight")
            )
            policy, ratio, side = policy_term(variant, cfg, logp, old, n, advantage)
            terms[n] = terms[n] + correction * policy
            records[len(records) - len(trained) + n] |= {
                "side": side,
                "sign": int(np.sign(advantage)),
                "log_ratio": ratio.log().item(),
            }
        if trained:
            per_sequence.append(terms)
        start += len(d)
    sequences, tokens = len(per_sequence), len(records)
    if variant in ("token", "cispo"):  # DAPO, eq. 8; CISPO, eq. 4
        return sum(sum(terms) for terms in per_sequence) / tokens, records
    if variant in ("dr_grpo", "dppo"):  # DPPO sums over tokens, over sequences
        return sum(sum(terms) / LENGTH for terms in per_sequence) / sequences, records
    return sum(
        sum(terms) / len(terms) for terms in per_sequence
    ) / sequences, records  # DeepSeekMath, eq. 3; GSPO, eq. 5; SAPO, eq. 5


# case -> (settings, fields of a document beside the advantage); the clip bounds are asymmetric
BASE = dict(
    clip_low=0.2,
    clip_high=0.28,
    kl_coef=0.0,
    kl_estimator="k3",
    entropy_coef=0.0,
    temperature=1.0,
    vocab=VOCAB,
)
CASES = {
    "on-policy": ({}, ()),
    "off-policy": ({"temperature": 0.7}, ("old_logp",)),
    "k1": (
        {"kl_coef": 0.3, "kl_estimator": "k1", "temperature": 1.3},
        ("old_logp", "ref_logp", "sampler_logp"),
    ),
    "k2": (
        {"kl_coef": 0.3, "kl_estimator": "k2", "entropy_coef": 0.05},
        ("ref_logp", "sampler_logp"),
    ),
    "k3": (
        {"kl_coef": 0.3, "entropy_coef": 0.05, "temperature": 1.3, "vocab": None},
        ("old_logp", "ref_logp", "tis_weight", "sampler_logp"),
    ),
}


def weigh(variant):
    """The weighting that VARIANTS names."""
    return (WEIGHTINGS | {"constant": functools.partial(constant_length, length=LENGTH)})[
        VARIANTS[variant].weighting
    ]


def samples(arguments, names, seed=0):
    """(hidden_TD, head_VD, documents) of SAMPLES; NaN where nothing may look."""
    rng, gen = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    hidden_TD = torch.randn(
        sum(p + c for p, c, *_ in SAMPLES), HIDDEN, dtype=torch.float64, generator=gen
    )
    head_VD = torch.randn(HEAD, HIDDEN, dtype=torch.float64, generator=gen)
    documents = []
    for prompt, completion, advantage, _, masked in SAMPLES:
        length = prompt + completion
        weights = np.where(np.arange(length) >= prompt, 0.0 if masked else 1.0, 0.0)
        documents.append(
            Document(
                rng.integers(0, VOCAB, length),
                weights,
                {"advantage": np.where(weights > 0, advantage, np.nan)},
            )
        )
    _, records = restated(
        "token",
        hidden_TD,
        head_VD,
        documents,
        GRPOConfig(
            "token", 0.2, 0.28, temperature=arguments["temperature"], vocab=arguments["vocab"]
        ),
    )
    now = iter(r["logp"] for r in records)
    for d, (_, completion, _, shift, masked) in zip(documents, SAMPLES, strict=True):
        made = {name: np.full(len(d), np.nan) for name in names}
        if not masked:
            logp = np.array([next(now) for _ in range(completion)])
            jitter = rng.normal(0, 0.4, completion)
            old = (
                logp - shift - (jitter - jitter.mean())
            )  # the sequence's log-ratio is the shift, its tokens' are all about it
            noise = {
                "old_logp": old,
                "ref_logp": logp - rng.normal(0, 0.5, completion),
                "sampler_logp": old + rng.normal(0, 0.01, completion),
            }
            noise["tis_weight"] = np.full(completion, rng.uniform(0.5, 1.5))
            for name in names:
                made[name][-completion:] = noise[name]
        d.fields.update(made)
    return hidden_TD.requires_grad_(), head_VD.requires_grad_(), documents


def relative(got, want):
    return float((got - want).norm() / want.norm())


def assert_agrees(variant, loss_variant, arguments, hidden_TD, head_VD, documents):
    """Mean loss and gradients against the re-statement; returns (metrics, records)."""
    batch = Batch.pack(weigh(loss_variant)(d) for d in documents)
    cfg = GRPOConfig(variant=loss_variant, **arguments)
    loss_sum, metrics = grpo_loss(hidden_TD, head_VD, None, batch, cfg)
    got = torch.autograd.grad(loss_sum / batch.normalizer, (hidden_TD, head_VD))
    want_loss, records = restated(variant, hidden_TD, head_VD, documents, cfg)
    want = torch.autograd.grad(want_loss, (hidden_TD, head_VD))
    assert abs(loss_sum.item() / batch.normalizer - want_loss.item()) < 1e-10 * abs(
        want_loss.item()
    )
    assert relative(got[0], want[0]) < 1e-10 and relative(got[1], want[1]) < 1e-10
    assert (got[0][[t for t in range(len(hidden_TD)) if t not in batch.rows_N]] == 0).all()
    return metrics, records


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_gradients_and_metrics_are_the_papers(variant, case, monkeypatch):
    extra, names = CASES[case]
    arguments = BASE | extra
    if variant == "dppo":  # bounds of a probability
        arguments |= {"clip_low": 0.01, "clip_high": 0.015}
    hidden_TD, head_VD, documents = samples(arguments, names)
    monkeypatch.setitem(chunk.CHUNK_ELEMENTS, "cpu", 5 * HEAD)  # sequences lie across chunks
    metrics, records = assert_agrees(variant, variant, arguments, hidden_TD, head_VD, documents)

    seen = {(r["side"], r["sign"]) for r in records}
    bounded = "old_logp" in names and variant != "sapo"
    sides = ("low", "in", "high") if bounded else ("in",)
    assert seen >= set(itertools.product(sides, (-1, 1))) and any(sign == 0 for _, sign in seen), (
        "every clip case occurs"
    )

    got = {name: float(total / count) for name, (total, count) in metrics.items()}
    assert all(
        float(count) == len(records) for name, (_, count) in metrics.items() if name != "loss"
    )
    sequences = sum(not masked for *_, masked in SAMPLES)
    counts = {"token": len(records), "sequence": sequences, "constant": sequences}
    assert float(metrics["loss"][1]) == pytest.approx(
        counts[VARIANTS[variant].weighting], rel=1e-12
    )

    def mean(of):
        return np.mean([of(r) for r in records])

    both = variant in ("cispo", "mis")
    cut = {"low": (-1, 1) if both else (-1,), "high": (-1, 1) if both else (1,)}  # whose gradient
    for side, signs in cut.items():
        want = np.mean([r["side"] == side and r["sign"] in signs for r in records])
        assert got[f"clip_{side}"] == pytest.approx(want, abs=1e-12) and (want > 0) == bounded
    assert got["entropy"] == pytest.approx(mean(lambda r: r["entropy"]), rel=1e-10)
    assert abs(got["entropy"] + mean(lambda r: r["logp"])) > 0.1, (
        "entropy is not the mean of -log p"
    )
    assert got["old_kl"] == pytest.approx(
        mean(lambda r: np.exp(r["log_ratio"]) - 1 - r["log_ratio"]), abs=1e-10
    )
    assert ("ref_kl" in got) == ("ref_logp" in names) and ("sampler_mismatch" in got) == (
        "sampler_logp" in names
    )
    if "ref_kl" in got:
        assert got["ref_kl"] == pytest.approx(mean(lambda r: r["ref_kl"]), rel=1e-10)
    if "sampler_mismatch" in got:
        starts = Batch.pack(documents).cu_seqlens[:-1].tolist()
        sampled = {
            (start, i): x
            for start, d in zip(starts, documents, strict=True)
            for i, x in enumerate(d.fields["sampler_logp"])
        }
        assert got["sampler_mismatch"] == pytest.approx(
            mean(lambda r: abs(r["old"] - sampled[r["at"]])), rel=1e-9
        )


def gradients(hidden_TD, head_VD, documents, arguments):
    """The gradient of every variant, all under one weighting."""
    batch = Batch.pack(map(weigh("grpo"), documents))
    made = {}
    for variant in VARIANTS:
        loss, _ = grpo_loss(hidden_TD, head_VD, None, batch, GRPOConfig(variant, **arguments))
        grads = torch.autograd.grad(loss, (hidden_TD, head_VD))
        made[variant] = torch.cat([grad.flatten() for grad in grads])
    return made


def test_variants_differ_where_a_rollout_serves_several_updates_and_only_there():
    arguments = BASE | {"temperature": 1.3}
    hidden_TD, head_VD, documents = samples(arguments, ("old_logp",))
    for a, b in itertools.combinations(
        gradients(hidden_TD, head_VD, documents, arguments).items(), 2
    ):
        same = {a[0], b[0]} <= {"grpo", "token", "dr_grpo"}  # they differ in the weighting
        assert (relative(a[1], b[1]) < 1e-12) == same and (same or relative(a[1], b[1]) > 0.01)
    for d in documents:
        del d.fields["old_logp"]
    alone = gradients(hidden_TD, head_VD, documents, arguments)
    records = iter(
        restated("token", hidden_TD, head_VD, documents, GRPOConfig("token", **arguments))[1]
    )
    for d in documents:  # the first update of several: the old policy is the policy
        now = [next(records)["logp"] if weight else np.nan for weight in d.weights]
        d.fields["old_logp"] = np.array(now)
    first = gradients(hidden_TD, head_VD, documents, arguments)
    for variant in VARIANTS:
        assert relative(alone[variant], alone["grpo"]) < 1e-12, variant
        assert relative(first[variant], alone["grpo"]) < 1e-10, variant


def test_gspo_with_a_correction_per_token_is_gspo_token():
    """Where a factor differs between tokens, the gradient is that of GSPO-token (eq. 14)."""
    arguments = BASE | {"temperature": 1.3}
    hidden_TD, head_VD, documents = samples(arguments, ("old_logp", "tis_weight"))
    for d in documents:
        d.fields["tis_weight"] = d.fields["tis_weight"] * np.linspace(0.5, 2, len(d))
    assert_agrees("gspo-token", "gspo", arguments, hidden_TD, head_VD, documents)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_teacher_adds_its_divergence_at_the_weights_of_the_policy(variant):
    """At T = 1, whatever the sampling temperature is."""
    arguments = BASE | {"temperature": 1.3, "kl_coef": 0.2}
    hidden_TD, head_VD, documents = samples(arguments, ("old_logp", "ref_logp"))
    gen = torch.Generator().manual_seed(7)
    teacher_TC, teacher_UC = (
        torch.randn(n, 5, dtype=torch.float64, generator=gen) for n in (len(hidden_TD), HEAD + 3)
    )
    batch = Batch.pack(weigh(variant)(d) for d in documents)
    rows = batch.rows_N
    for name in ("reverse_kl", "forward_kl", "jsd"):
        student_NV, teacher_NV = (
            x[rows] @ w[:VOCAB].T for x, w in ((hidden_TD, head_VD), (teacher_TC, teacher_UC))
        )
        policy, _ = grpo_loss(
            hidden_TD, head_VD, None, batch, GRPOConfig(variant=variant, **arguments)
        )
        cfg = GRPOConfig(variant=variant, kd_coef=0.7, kd_divergence=name, kd_beta=0.3, **arguments)
        frozen = (teacher_TC[rows], teacher_UC)
        loss, metrics = grpo_loss(hidden_TD, head_VD, frozen, batch, cfg)
        value_N = reference.divergence(name, student_NV, teacher_NV, beta=0.3)
        want = policy + 0.7 * (value_N * batch.select(batch.weight_T)).sum()
        assert abs(loss.item() - want.item()) < 1e-10 * abs(want.item())
        for got_grad, want_grad in zip(
            *(torch.autograd.grad(x, (hidden_TD, head_VD)) for x in (loss, want)), strict=True
        ):
            assert relative(got_grad, want_grad) < 1e-10
        assert float(metrics[name][0] / metrics[name][1]) == pytest.approx(
            value_N.mean().item(), rel=1e-10
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_to_learn_gives_zero(variant):
    """No advantage anywhere, or every sample masked: zeros, no NaN."""
    hidden_TD, head_VD, documents = samples(BASE, ("old_logp", "ref_logp"))
    equal = [
        Document(d.tokens, d.weights, d.fields | {"advantage": np.zeros(len(d))}) for d in documents
    ]
    masked = [Document(d.tokens, np.zeros(len(d)), d.fields) for d in documents]
    for docs, arguments in ((equal, BASE), (masked, BASE | {"kl_coef": 0.3, "entropy_coef": 0.1})):
        batch = Batch.pack(weigh(variant)(d) for d in docs)
        cfg = GRPOConfig(variant=variant, **arguments)
        loss_sum, metrics = grpo_loss(hidden_TD, head_VD, None, batch, cfg)
        assert loss_sum.item() == 0 and all(
            not g.any() for g in torch.autograd.grad(loss_sum, (hidden_TD, head_VD))
        )
        assert metrics["clip_low"][0] == metrics["clip_high"][0] == 0


def over_all_tokens(seed=0):
    """A context and every next token y once, weighted by p(y): sums are expectations.

    Returns (hidden_D, head_VD, hidden_TD, the reference's (hidden_NC, head_UC), documents)."""
    gen = torch.Generator().manual_seed(seed)
    hidden_D, other_C = (torch.randn(n, dtype=torch.float64, generator=gen) for n in (HIDDEN, 4))
    head_VD, other_UC = (
        torch.randn(HEAD, HIDDEN, dtype=torch.float64, generator=gen),
        torch.randn(HEAD, 4, dtype=torch.float64, generator=gen),
    )
    ls_V, lt_V = (
        torch.log_softmax(head_VD[:VOCAB] @ hidden_D, 0),
        torch.log_softmax(other_UC[:VOCAB] @ other_C, 0),
    )
    documents = []
    for y in range(VOCAB):
        fields = {
            "advantage": np.array([0.0, -(ls_V[y] - lt_V[y])]),
            "ref_logp": np.array([0.0, lt_V[y]]),
        }
        documents.append(Document(np.array([0, y]), np.array([0.0, ls_V[y].exp()]), fields))
    hidden_D.requires_grad_(), head_VD.requires_grad_()
    return (
        hidden_D,
        head_VD,
        hidden_D.expand(2 * VOCAB, HIDDEN),
        (other_C.expand(VOCAB, 4), other_UC),
        documents,
    )


def test_expected_gradient_of_a_teacher_as_advantage_is_the_reverse_kl():
    """On-policy distillation: A = log p_teacher - log p_student descends KL(student || teacher)."""
    hidden_D, head_VD, hidden_TD, teacher, documents = over_all_tokens()
    batch = Batch.pack(documents)
    sampled, _ = grpo_loss(hidden_TD, head_VD, None, batch, GRPOConfig(variant="token", **BASE))
    full, _ = kd_loss(hidden_TD, head_VD, teacher, batch, KDConfig("reverse_kl", vocab=VOCAB))
    logits_1V, teacher_1V = (
        (head_VD[:VOCAB] @ hidden_D)[None],
        (teacher[1][:VOCAB] @ teacher[0][0])[None],
    )
    plain = reference.divergence("reverse_kl", logits_1V, teacher_1V).sum()
    assert abs(sampled.item() - plain.item()) < 1e-10 and abs(full.item() - plain.item()) < 1e-10
    got, fused, want = (torch.autograd.grad(x, (hidden_D, head_VD)) for x in (sampled, full, plain))
    for g, f, w in zip(got, fused, want, strict=True):
        assert relative(g, w) < 1e-10 and relative(f, w) < 1e-10


@pytest.mark.parametrize(
    "kl, direction", [("k1", None), ("k2", "reverse_kl"), ("k3", "forward_kl")]
)
def test_expected_gradients_of_the_kl_estimates(kl, direction):
    """As losses/grpo.py says; k1 and k3 estimate KL(policy || reference) in value."""
    hidden_D, head_VD, hidden_TD, other, documents = over_all_tokens(1)
    for d in documents:
        d.fields["advantage"] = np.zeros(2)
    cfg = GRPOConfig(variant="token", **BASE | {"kl_coef": 1.0, "kl_estimator": kl})
    loss_sum, metrics = grpo_loss(hidden_TD, head_VD, None, Batch.pack(documents), cfg)
    got = torch.autograd.grad(loss_sum, (hidden_D, head_VD))
    logits_1V, other_1V = (head_VD[:VOCAB] @ hidden_D)[None], (other[1][:VOCAB] @ other[0][0])[None]
    if kl != "k2":
        assert loss_sum.item() == pytest.approx(
            reference.divergence("reverse_kl", logits_1V, other_1V).item(), rel=1e-10
        )
    if direction is None:
        assert all(g.norm() < 1e-12 for g in got)
    else:
        want = torch.autograd.grad(
            reference.divergence(direction, logits_1V, other_1V).sum(), (hidden_D, head_VD)
        )
        assert all(relative(g, w) < 1e-10 for g, w in zip(got, want, strict=True))


def test_estimates_of_a_kl_near_and_far():
    """k3 keeps its digits where both models nearly agree, and overflows only where exp does."""
    d = torch.tensor([1e-9, -1e-9, 0.0, 3.0, -3.0], dtype=torch.float64)
    assert KL_ESTIMATORS["k3"](d).tolist() == pytest.approx(
        [0, 0, 0, np.exp(-3) + 2, np.exp(3) - 4], rel=1e-12, abs=1e-18
    )
    assert (KL_ESTIMATORS["k3"](d) >= 0).all()


def test_advantages_against_brute_force():
    rng = np.random.default_rng(0)
    groups = [rng.integers(0, 2, g) * 1.0 for g in (2, 3, 8, 16)] + [
        rng.normal(size=5),
        [0.1] * 7,
        [1.0],
        [0.0, 0.0, 1.0],
        [-1, 1],
        [3, 3, 4],
    ]
    for rewards in (list(map(float, g)) for g in groups):
        n = len(rewards)
        got = {name: group_advantages(rewards, name) for name in ADVANTAGES}
        assert all(
            a.shape == (n,) and a.dtype == np.float64 and np.isfinite(a).all() for a in got.values()
        )
        if n == 1 or all(r == rewards[0] for r in rewards):
            assert not has_reward_spread(rewards) and not any(a.any() for a in got.values()), (
                "exactly zero"
            )
            continue
        mean = sum(rewards) / n
        std = (sum((r - mean) ** 2 for r in rewards) / (n - 1)) ** 0.5
        others = [sum(rewards[:i] + rewards[i + 1 :]) / (n - 1) for i in range(n)]
        assert has_reward_spread(rewards)
        np.testing.assert_allclose(got["mean"], [r - mean for r in rewards], rtol=1e-12, atol=1e-15)
        by_mean = [(r - mean) / mean if mean > 0 else 0.0 for r in rewards]
        np.testing.assert_allclose(got["maxrl"], by_mean, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(
            got["std"], [(r - mean) / (std + 1e-4) for r in rewards], rtol=1e-12, atol=1e-15
        )
        np.testing.assert_allclose(
            got["leave_one_out"],
            [r - o for r, o in zip(rewards, others, strict=True)],
            rtol=1e-12,
            atol=1e-15,
        )
