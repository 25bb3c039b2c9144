"""The generation engine against `transformers`, the training forward and exact distributions."""

import collections

import numpy as np
import pytest
import torch

from kernels import attention
from kernels.attention import PackedAttention
from model import generate as engine
from model import kv_cache, sampling
from model.checkpoint import build_model
from model.generate import Engine, generate
from model.sampling import Sampler, below_top_k, block_mass, draw, keep_top_p, random_keys, uniform
from model.transformer import ModelConfig
from tests.test_model import ours, theirs

SHAPE = dict(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    tie_word_embeddings=False,
)


def small(seed=0, dtype=torch.float64, compute_dtype=None, **more):
    model = build_model(
        ModelConfig(**SHAPE | more),
        None,
        device="cpu",
        seed=seed,
        weight_dtype=dtype,
        compute_dtype=compute_dtype,
    )
    with torch.no_grad():
        model.head_VD.mul_(3)  # far from uniform
    return model


def some_prompts(lengths, vocab=50):
    return [
        torch.randint(vocab, (n,), generator=torch.Generator().manual_seed(i)).tolist()
        for i, n in enumerate(lengths)
    ]


PROMPTS = some_prompts((4, 9, 2, 6, 6, 1, 30, 12, 1, 3))


@torch.no_grad()
def training_logp(model, prompt, new, temperature, vocab):
    """The new tokens' log-probs as the trainer's forward has them."""
    tokens = torch.tensor(prompt + new)
    hidden_TD = model(tokens, torch.arange(len(tokens)), PackedAttention([len(tokens)]))[
        len(prompt) - 1 : -1
    ]
    head_VD = (
        model.head_VD[:vocab].to(hidden_TD.dtype).to(model.head_VD.dtype)
    )  # rounded as the engine's, multiplied widely
    logits_TV = hidden_TD.to(head_VD.dtype) @ head_VD.T
    return (logits_TV / temperature).log_softmax(1).gather(1, torch.tensor(new)[:, None]).squeeze(1)


# --- correct tokens, correct log-probs ----------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen2-tied", "qwen3", "gemma3"])
def test_greedy_equals_transformers_over_200_tokens(kind, tmp_path):
    reference = theirs(kind)
    reference.save_pretrained(tmp_path)
    reference, model = reference.double(), ours(tmp_path).double()
    prompts = some_prompts((1, 7, 40, 33, 2), 211)
    completions = generate(model, prompts, 200, [], batch_size=3)
    for prompt, got in zip(prompts, completions, strict=True):
        # each token is their most likely one after all tokens before it
        tokens = torch.tensor([prompt + got.tokens])
        with torch.no_grad():
            want = reference(tokens).logits[0, len(prompt) - 1 : -1].argmax(1).tolist()
        assert got.tokens == want and not got.stopped and len(got.logp) == 200
    # one of them through their generation, too
    want = reference.generate(
        torch.tensor([prompts[2]]), max_new_tokens=200, min_new_tokens=200, do_sample=False
    )
    assert completions[2].tokens == want[0, len(prompts[2]) :].tolist()


@pytest.mark.parametrize(
    "filters",
    [dict(temperature=0.0), dict(temperature=0.7), dict(temperature=1.3, top_k=5, top_p=0.8)],
    ids=str,
)
def test_log_probs_equal_those_of_the_training_forward(filters):
    for model in (small(), small(qk_norm=True, tie_word_embeddings=True)):
        for prompt, c in zip(
            PROMPTS,
            generate(model, PROMPTS, 70, [3], vocab=47, seeds=range(10), batch_size=4, **filters),
            strict=True,
        ):
            want = training_logp(model, prompt, c.tokens, filters["temperature"] or 1.0, 47)
            assert (torch.tensor(c.logp, dtype=torch.float64) - want).abs().max() < 1e-9


def test_log_probs_of_a_deep_model_in_fp32():
    model = small(dtype=torch.float32, num_layers=24, vocab_size=3000)
    for prompt, c in zip(
        PROMPTS,
        generate(model, PROMPTS, 40, [], temperature=1.0, seeds=range(10), batch_size=4),
        strict=True,
    ):
        assert (
            torch.tensor(c.logp) - training_logp(model, prompt, c.tokens, 1.0, 3000)
        ).abs().max() < 2e-4


def test_weights_are_cast_once_and_only_if_they_must_be():
    plain, mixed = (
        small(dtype=torch.float32),
        small(dtype=torch.float32, compute_dtype=torch.bfloat16, tie_word_embeddings=True),
    )
    assert Engine(plain).model is plain
    cast = Engine(mixed).model
    assert {p.dtype for p in cast.parameters()} == {torch.bfloat16} and {
        p.dtype for p in mixed.parameters()
    } == {torch.float32}
    assert cast.head_VD is cast.embed_tokens.weight
    for prompt, c in zip(
        PROMPTS, generate(mixed, PROMPTS, 20, [], temperature=1.0, seeds=range(10)), strict=True
    ):
        assert (
            torch.tensor(c.logp) - training_logp(mixed, prompt, c.tokens, 1.0, 50)
        ).abs().max() < 0.1


# --- the batch does not matter ------------------------------------------------------------


def test_samples_do_not_depend_on_the_batch_its_order_or_the_ranks():
    model, prompts = small(), PROMPTS + [PROMPTS[1]] * 3 + [PROMPTS[6]]
    seeds = [2**64 - 1, 2**63, 0, -5, *range(1, len(prompts) - 3)]

    def run(indices, **more):
        more |= dict(temperature=1.1, top_p=0.95, seeds=[seeds[i] for i in indices])
        return dict(
            zip(
                indices,
                generate(model, [prompts[i] for i in indices], 90, range(9), **more),
                strict=True,
            )
        )

    def same(got, want):
        return all(
            a.tokens == want[i].tokens
            and a.stopped == want[i].stopped
            and a.logp == pytest.approx(want[i].logp, abs=1e-9)
            for i, a in got.items()
        )

    everything = list(range(len(prompts)))
    want = run(everything)
    assert (
        len({len(c.tokens) for c in want.values()}) > 5
        and want[1].tokens != want[10].tokens != want[11].tokens
    )
    for size in (1, 3, 7, len(prompts)):
        assert same(run(everything, batch_size=size), want)
    assert same(run(everything[::-1], batch_size=4), want)
    for rank in range(3):
        assert same(run(everything[rank::3], batch_size=2), want)


def test_no_row_is_computed_for_nothing_and_equal_prompts_are_prefilled_once(monkeypatch):
    model, prompts = small(), PROMPTS[:4] * 5
    rows, forward = collections.Counter(), model.forward

    def counted(tokens, positions, attend):
        rows[type(attend)] += len(tokens)
        return forward(tokens, positions, attend)

    monkeypatch.setattr(model, "forward", counted)
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 8)  # several packs
    got = generate(model, prompts, 60, [7], temperature=1.0, seeds=range(20), batch_size=20)
    assert rows[kv_cache.DecodeAttention] == sum(len(c.tokens) for c in got)
    assert rows[kv_cache.PrefillAttention] == sum(len(p) - 1 for p in PROMPTS[:4])
    rows.clear()
    again = generate(model, prompts, 60, [7], temperature=1.0, seeds=range(20), batch_size=5)
    assert [c.tokens for c in again] == [c.tokens for c in got] and rows[
        kv_cache.DecodeAttention
    ] == sum(len(c.tokens) for c in got)


@pytest.mark.parametrize("window", [0, 9, 80])
@pytest.mark.parametrize("few_scores", [0, 1 << 20])
def test_what_all_prompts_begin_with_is_computed_once(window, few_scores, monkeypatch):
    monkeypatch.setattr(attention, "FEW_SCORES", few_scores)
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 20)  # several packs
    more = dict(windows=(window, 0), window_rope_theta=100.0) if window else {}
    model, shared = small(**more), some_prompts([70])[0]
    # The second prompt has one token more than all have in common, so that nothing of it is left.
    prompts = [shared + more for more in ([1, 2, 3], [4], [1, 2, 9, 9], [5, *range(30)], [4])]
    tokens, forward = collections.Counter(), model.forward

    def counted(tokens_T, positions_T, attend):
        tokens[type(attend)] += len(tokens_T)
        return forward(tokens_T, positions_T, attend)

    monkeypatch.setattr(model, "forward", counted)
    got = generate(model, prompts, 12, [], temperature=1.0, seeds=range(5), batch_size=5)
    assert tokens[kv_cache.PrefillAttention] == len(shared) + 2 + 0 + 3 + 30
    in_turn = generate(model, prompts, 12, [], temperature=1.0, seeds=range(5), batch_size=1)
    for prompt, c, alone in zip(prompts, got, in_turn, strict=True):
        want = training_logp(model, prompt, c.tokens, 1.0, 50)
        assert (torch.tensor(c.logp, dtype=torch.float64) - want).abs().max() < 1e-9
        assert c.tokens == alone.tokens


# --- what ends a generation ---------------------------------------------------------------


def test_limits_stop_ids_and_the_callback():
    model, heard = small(), []
    free = generate(model, PROMPTS, 40, [], temperature=1.0, seeds=range(10))
    assert all(len(c.tokens) == len(c.logp) == 40 and not c.stopped for c in free)
    stops = {free[0].tokens[5], free[2].tokens[20]}
    for got, want in zip(
        generate(model, PROMPTS, 40, stops, temperature=1.0, seeds=range(10), batch_size=4),
        free,
        strict=True,
    ):
        end = next((i + 1 for i, t in enumerate(want.tokens) if t in stops), 40)
        assert got.tokens == want.tokens[:end] and got.stopped == (want.tokens[end - 1] in stops)
    got = generate(
        model,
        PROMPTS,
        1,
        [free[3].tokens[0]],
        temperature=1.0,
        seeds=range(10),
        on_token=lambda *a: heard.append(a),
    )
    assert [c.tokens for c in got] == [c.tokens[:1] for c in free] and got[3].stopped
    assert sorted(heard) == [(i, c.tokens[0], c.logp[0]) for i, c in enumerate(got)]
    assert generate(model, [], 10, []) == [] and [
        c.tokens for c in generate(model, PROMPTS[:2], 0, [])
    ] == [[], []]
    assert all(
        t < 7
        for c in generate(model, PROMPTS, 10, [], vocab=7, temperature=2.0, seeds=range(10))
        for t in c.tokens
    )


def test_stop_strings_end_where_the_text_first_has_them():
    model, decode = small(), lambda ids: "".join("abcdé"[i % 5] * (i % 3) for i in ids)
    free = generate(model, PROMPTS, 60, [], temperature=1.0, seeds=range(10))
    strings = ["éa", "bcc", "dad"]
    ends = []
    for got, want in zip(
        generate(
            model,
            PROMPTS,
            60,
            [],
            temperature=1.0,
            seeds=range(10),
            stop_strings=strings,
            decode=decode,
        ),
        free,
        strict=True,
    ):
        hits = [i for i in range(1, 61) if any(s in decode(want.tokens[:i]) for s in strings)]
        assert got.tokens == want.tokens[: hits[0] if hits else 60] and got.stopped == bool(hits)
        ends.append(len(got.tokens))
    assert len(set(ends)) > 3


@pytest.mark.parametrize(
    "arguments,words",
    [
        (dict(prompts=[[1], []]), "prompt 1 is empty"),
        (dict(temperature=1.0), "one seed per prompt"),
        (dict(temperature=1.0, seeds=[1, 2]), "one seed"),
        (dict(stop_strings=["a"]), "decode"),
        (dict(temperature=-1.0), "negative"),
        (dict(top_p=0.0), "top_p"),
    ],
)
def test_what_cannot_work_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        generate(**dict(model=small(), prompts=[[1]], max_new_tokens=3, stop_ids=[]) | arguments)


# --- distributions ------------------------------------------------------------------------


def exact(logits, temperature=1.0, top_k=0, top_p=1.0):
    """What should be sampled, in the plainest form: sort, cut, renormalise."""
    p = np.exp(logits / temperature - np.max(logits / temperature))
    p /= p.sum()
    if top_k:
        p[logits < np.sort(logits)[::-1][top_k - 1]] = 0
    order = np.argsort(-p, kind="stable")
    inside = np.cumsum(p[order]) - p[order] < top_p * p.sum()
    p[order[~inside]] = 0
    return p / p.sum()


FILTERS = [
    {},
    dict(temperature=0.6),
    dict(temperature=1.7),
    dict(top_k=6),
    dict(top_p=0.7),
    dict(temperature=1.5, top_k=9, top_p=0.8),
    dict(temperature=0.5, top_p=0.95),
    dict(top_k=1),
    dict(top_p=1e-9),
    dict(temperature=2.0, top_k=49),
]


def chi_square(counts, p):
    """(statistic - its mean) / its deviation, ids of little mass taken together."""
    common = p * counts.sum() > 5
    observed, expected = (
        np.append(counts[common], counts[~common].sum()),
        np.append(p[common], p[~common].sum()) * counts.sum(),
    )
    observed, expected = observed[expected > 0], expected[expected > 0]
    return ((observed - expected) ** 2 / expected).sum() - (len(expected) - 1), np.sqrt(
        2 * max(1, len(expected) - 1)
    )


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_samples_follow_the_exact_distribution(filters):
    model, prompt, n = small(), PROMPTS[1], 6000
    with torch.no_grad():
        logits = (
            model(torch.tensor(prompt), torch.arange(9), PackedAttention([9]))[-1] @ model.head_VD.T
        ).numpy()
    p = exact(logits, **filters)
    drawn = generate(
        model,
        [prompt] * n,
        1,
        [],
        seeds=range(n),
        batch_size=2000,
        **dict(temperature=1.0) | filters,
    )
    counts = np.bincount([c.tokens[0] for c in drawn], minlength=50)
    assert not counts[p == 0].any()
    excess, deviation = chi_square(counts, p)
    assert excess < 4 * deviation
    if not filters:  # the test would see a temperature that is 10 % off
        excess, deviation = chi_square(counts, exact(logits, temperature=1.1))
        assert excess > 6 * deviation


def test_filters_are_exact_with_ties_flat_distributions_and_a_large_vocabulary():
    g = torch.Generator().manual_seed(0)
    for rows in (
        torch.zeros(3, 5120),
        torch.randint(3, (4, 5120), generator=g),
        3 * torch.randn(4, 5120, generator=g),
    ):
        logits = rows.double()
        probs = logits.softmax(1)
        for k, p in ((0, 0.3), (0, 0.999), (40, 1.0), (40, 0.6), (1, 0.5), (3000, 0.9)):
            got = probs.masked_fill(below_top_k(logits, k), 0) if k else probs
            got = keep_top_p(got, p, k + 1 if k else sampling.NUCLEUS) if p < 1 else got
            want = np.stack([exact(row, 1.0, k, p) for row in logits.numpy()])
            assert ((got > 0).numpy() == (want > 0)).all(), (k, p)
            np.testing.assert_allclose((got / got.sum(1, keepdim=True)).numpy(), want, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_id_without_probability_is_never_drawn(dtype):
    g = torch.Generator().manual_seed(0)
    probs = torch.rand(4000, 4 * sampling.BLOCK, generator=g, dtype=dtype) * (
        torch.rand(4000, 4 * sampling.BLOCK, generator=g) < 0.01
    )
    probs[:1000, : sampling.BLOCK + 7] = 0
    probs[1000:2000, -sampling.BLOCK - 7 :] = 0
    probs[2000] = 0
    probs[2000, 777] = 1e-30
    ends = torch.tensor([2.0**-53, 2.0**-40, 1 - 2.0**-53, 1 - 2.0**-40, 0.5], dtype=torch.float64)
    for u in (ends.repeat(800), torch.rand(4000, generator=g, dtype=torch.float64)):
        token = draw(probs, block_mass(probs), u)
        assert (probs.gather(1, token[:, None]) > 0).all()
        below = probs.double().cumsum(1).gather(1, token[:, None])[:, 0] / probs.sum(
            1, dtype=torch.float64
        )
        assert (below >= u - 1e-6).all()
    first, last = (
        draw(probs, block_mass(probs), torch.full((4000,), 2.0**-53)),
        draw(probs, block_mass(probs), torch.full((4000,), 1 - 2.0**-53, dtype=torch.float64)),
    )
    assert (first == (probs > 0).int().argmax(1)).all() and (
        last == 4 * sampling.BLOCK - 1 - (probs > 0).flip(1).int().argmax(1)
    ).all()


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 40])
def test_the_head_product_in_slices(rows):
    vocab = sampling.LARGE_HEAD + 37
    hidden, head = (
        torch.randn(rows, 8, dtype=torch.float64),
        torch.randn(vocab + 3, 8, dtype=torch.float64)[:vocab],
    )
    out = torch.full((rows, vocab + 5), 7.0, dtype=torch.float64)
    sampling.head_product(hidden, head, out[:, :vocab])
    assert (
        torch.allclose(out[:, :vocab], hidden @ head.T, atol=1e-12) and (out[:, vocab:] == 7).all()
    )


def test_a_transposed_copy_of_the_head_draws_the_same_and_is_given_back(monkeypatch):
    monkeypatch.setattr(sampling, "uses_onednn", lambda out: True)
    head = torch.randn(sampling.LARGE_HEAD + 1101, 8, dtype=torch.float64)
    hidden, u = torch.randn(40, 8, dtype=torch.float64), torch.rand(40, dtype=torch.float64)
    sampler = Sampler(head, len(head), 40, temperature=1.0)

    def check(rows, is_copied):
        ids, logps = sampler(hidden[:rows], u[:rows])
        exact = torch.log_softmax(hidden[:rows] @ head.T, 1)
        upto = exact.exp().cumsum(1).gather(1, ids[:, None])[:, 0]
        assert ((upto - u[:rows]).gt(-1e-9) & (upto - logps.exp() - u[:rows]).lt(1e-9)).all()
        assert torch.allclose(logps, exact.gather(1, ids[:, None])[:, 0], atol=1e-10)
        assert (sampler.head_DV is not None) == is_copied
        assert not is_copied or sampler.head_DV.stride(0) % 64 == 0  # 17,485 would be slow

    check(sampling.FEW, False)
    check(40, True)
    head.mul_(-1)  # an optimizer's step
    sampler.refresh()
    check(40, True)
    sampler.rest()
    check(sampling.FEW, False)
    monkeypatch.setattr(sampling, "TRANSPOSED_BYTES", head.nbytes - 1)
    check(40, False)


def test_argmax_takes_the_first_and_the_sampler_its_rows_in_pieces(monkeypatch):
    x = torch.randint(5, (50, 3 * sampling.BLOCK)).float()
    assert torch.equal(sampling.argmax(x), x.argmax(1))
    head, hidden, u = (
        torch.randn(5000, 16),
        torch.randn(40, 16),
        torch.rand(40, dtype=torch.float64),
    )
    whole = Sampler(head, 4000, 40, temperature=1.0)(hidden, u)
    monkeypatch.setattr(sampling, "default_chunk_rows", lambda *_: 7)
    for a, b in zip(whole, Sampler(head, 4000, 40, temperature=1.0)(hidden, u), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


# --- random numbers -----------------------------------------------------------------------


def numbers(keys, index):
    return uniform(torch.from_numpy(keys), torch.from_numpy(index)).numpy()


def test_the_hash_is_splitmix64():
    known = np.array(
        [
            6457827717110365317,
            3203168211198807973,
            9817491932198370423,
            4593380528125082431,
            16408922859458223821,
        ],
        np.uint64,
    )
    want = ((known >> np.uint64(12)).astype(np.float64) + 0.5) / 2**52
    assert (numbers(np.full(5, 1234567), np.arange(5)) == want).all()


def test_random_numbers_are_uniform_and_independent():
    n = 1 << 16

    def close(counts):
        expected = counts.sum() / counts.size
        statistic = ((counts - expected) ** 2 / expected).sum()
        return statistic < counts.size + 5 * np.sqrt(2 * counts.size)

    along_seeds, along_tokens = (
        numbers(random_keys(range(n)), np.zeros(n, int)),
        numbers(random_keys([5] * n), np.arange(n)),
    )
    far = numbers(random_keys([2**63 + 977 * i for i in range(n)]), np.full(n, 300))
    for u in (along_seeds, along_tokens, far):
        assert 0 < u.min() < 1e-3 and 1 - 1e-3 < u.max() < 1
        assert close(np.histogram(u, 256, (0, 1))[0])
        assert close(np.histogram2d(u[:-1], u[1:], 16, [(0, 1)] * 2)[0]), "neighbours"
        assert close(np.histogram((u * 2**20) % 1, 256, (0, 1))[0]), "low bits"
    assert close(
        np.histogram2d(
            along_seeds, numbers(random_keys(range(n)), np.ones(n, int)), 16, [(0, 1)] * 2
        )[0]
    ), "tokens of a seed"
    assert len(np.unique(random_keys(range(n)))) == n


# --- recorded steps: what a GPU replays ---------------------------------------------------


class Recorded:
    """Stands in for a CUDA graph.

    It repeats what was recorded, and knows the addresses that a graph would go on using.
    """

    made, replayed = [], 0

    def __init__(self, run, pool):
        step = run.func.__self__
        self.run, self.step, self.at = run, step, self.addresses(step)
        Recorded.made.append(self)

    @staticmethod
    def addresses(step):
        tensors = (
            step.state_4B,
            step.hidden_BD,
            step.sampled_2SB,
            step.cache.arrived,
            *step.cache.layers,
            step.sampler.logits_BP,
            step.model.head_VD,
        )
        return [t.data_ptr() for t in tensors]

    def pool(self):
        return 0

    def replay(self):
        assert self.at == self.addresses(self.step), (
            "a graph would read or write what is no longer there"
        )
        Recorded.replayed += self.step.steps
        self.run()
        assert self.at == self.addresses(self.step)


@pytest.mark.parametrize(
    "filters",
    [dict(temperature=0.0), dict(temperature=0.9), dict(temperature=1.3, top_k=5, top_p=0.8)],
    ids=str,
)
def test_recorded_steps_write_the_same(filters, monkeypatch):
    """With rounded-up buckets, free rows, rows that move, refills and a cache that moves."""
    model, prompts = small(), some_prompts([n % 13 + 1 for n in range(60)])

    def ask(size):
        options = dict(vocab=47, seeds=range(60), batch_size=size)
        return generate(model, prompts, 80, [3], **options, **filters)

    want = ask(60)
    monkeypatch.setattr(engine, "uses_graphs", lambda cache: True)
    monkeypatch.setattr(engine, "record", Recorded)
    monkeypatch.setattr(
        kv_cache, "by_kernel", lambda cache: True
    )  # the kernel's place in the engine, taken by its reference
    for size in (7, 60):
        Recorded.made, Recorded.replayed = [], 0
        got = ask(size)
        assert [c.tokens for c in got] == [c.tokens for c in want]
        assert (
            max(
                abs(a - b)
                for c, d in zip(got, want, strict=True)
                for a, b in zip(c.logp, d.logp, strict=True)
            )
            < 1e-9
        )
        assert Recorded.replayed > 20 and len(Recorded.made) >= 2


def test_buckets_hold_their_rows():
    for size in (1, 7, 64, 200):
        buckets = [engine._bucket(n, size) for n in range(1, size + 1)]
        assert all(n <= b <= size for n, b in enumerate(buckets, 1)) and buckets == sorted(buckets)
        assert len(set(buckets)) <= 8 + size // 64


@pytest.mark.parametrize("temperature", [1e-9, 1e-7, 1e-3])
def test_a_low_temperature_is_greedy(temperature):
    """Logits of 40 over 1e-9 are 4e10: in fp32 their distances are beyond any exponent."""
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(9, 8, generator=g), 5 * torch.randn(700, 8, generator=g)
    ids, logps = Sampler(head, 700, 9, temperature)(hidden, torch.rand(9, dtype=torch.float64))
    best = (hidden.double() @ head.double().t()).topk(2)
    assert (best.values.diff(dim=1) / temperature).max() < -20
    assert torch.equal(ids, best.indices[:, 0]) and logps.abs().max() < 1e-6
