"""Rollouts with a fake model: what a batch holds, whatever the ranks, rounds and interruptions."""

import functools
import itertools
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.batch import WEIGHTINGS, Document, constant_length
from data.grade import Verdict
from data.order import EpochOrder
from data.tasks import Example
from errors import UserError
from rl.advantage import against_the_unlikely, group_advantages
from rl.logprobs import add_tis_weights
from rl.reward import parse_reward
from rl.rollout import GRPORollouts, MixedSource, Rollouts, sample_seed
from rl.sample import RolloutConfig
from tests import distributed_workers as workers

SAMPLES, SEED = 3, 5
CONSTANT = functools.partial(constant_length, length=8)


class Prompts:
    """An endless data set: the example at a position, and its prompt."""

    teachers = ()

    def __init__(self):
        self.formatter = SimpleNamespace(prompt=prompt_of)

    def __len__(self):
        return 0

    def order(self, seed):
        return EpochOrder(0, seed)

    def example(self, position):
        return SimpleNamespace(question=f"q{position}", answer=str(position), position=position)


def prompt_of(example):
    return [90 + example.position % 7] * (1 + example.position % 3)


def write(prompts, seeds):
    """Completions that depend on the seed alone."""
    done = []
    for rng in map(random.Random, seeds):
        tokens = [rng.randrange(50) for _ in range(rng.randint(1, 6))]
        logp = [-rng.random() for _ in tokens]
        done.append(SimpleNamespace(tokens=tokens, logp=logp, stopped=rng.random() < 0.7))
    assert len(done) == len(prompts)
    return done


def judge(example, tokens, stopped):
    """(reward, parts, verdict): every third prompt is solved by all samples, the others by some."""
    right = tokens[-1] % 2 == 0
    parts = {"accuracy": 1.0}
    if example.position % 3 != 1:
        parts = {"accuracy": float(right), "format": 0.25 * stopped}
    verdict = Verdict(right, right or stopped, right or len(tokens) > 2)
    return sum(parts.values()), parts, verdict


class FakeRollouts(GRPORollouts):
    """The real stages around a fake model and a fake grader."""

    def generate(self, prompts, seeds):
        return write(prompts, seeds)

    def judge(self, example, sample):
        """`grade` does it."""

    def grade(self, example, sample):
        sample.text = f"text of {sample.completion}"
        reward, parts, verdict = judge(example, sample.completion, sample.stopped)
        sample.reward, sample.reward_parts, sample.verdict = reward, parts, verdict
        sample.correctness = reward

    def add_policy_logprobs(self, samples):
        for sample in samples:
            fields = sample.document.fields
            fields["old_logp"] = fields["sampler_logp"] * 1.01


class AllAlike(FakeRollouts):
    """Every sample is right."""

    def grade(self, example, sample):
        sample.reward, sample.verdict = 1.0, Verdict(True, True, True)
        sample.correctness = 1.0


class PlainRollouts(Rollouts):
    def generate(self, prompts, seeds):
        return write(prompts, seeds)


def config_of(**changes):
    defaults = {
        "prompts_per_batch": 3,
        "samples_per_prompt": SAMPLES,
        "seed": SEED,
        "weighting": WEIGHTINGS["sequence"],
        "max_new_tokens": 6,
        "stop_ids": [],
        "vocab_size": 50,
    }
    return RolloutConfig(**defaults | changes)


def make(kind=FakeRollouts, **changes):
    policy = SimpleNamespace(config=SimpleNamespace(vocab_size=10_000))
    return kind(Prompts(), policy, config_of(**changes), reward=None)


def drawn(position):
    """(prompt ids, completions, judgements) of a group, from its position alone."""
    example = Prompts().example(position)
    ids = prompt_of(example)
    completions = write([ids] * SAMPLES, [sample_seed(SEED, position, s) for s in range(SAMPLES)])
    return ids, completions, [judge(example, c.tokens, c.stopped) for c in completions]


def group(position, mask_truncated=False):
    """What a group's documents should be under the sequence weighting, as `described` has them."""
    ids, completions, judged = drawn(position)
    made = []
    advantages = group_advantages([reward for reward, _, _ in judged], "std")
    for c, advantage in zip(completions, advantages, strict=True):
        weight = 0.0 if mask_truncated and not c.stopped else 1 / len(c.tokens)
        zeros, logp = [0.0] * len(ids), np.array([0.0] * len(ids) + c.logp)
        fields = {
            "advantage": [float(advantage)] * len(logp),
            "old_logp": list(logp * 1.01),
            "sampler_logp": list(logp),
        }
        weights = (*zeros, *[weight] * len(c.tokens))
        made.append((tuple(ids + c.tokens), weights, json.dumps(fields), None))
    return made


def has_spread(position):
    return len({reward for reward, _, _ in drawn(position)[2]}) > 1


def described(batch):
    return [
        (
            tuple(d.tokens.tolist()),
            tuple(d.weights.tolist()),
            json.dumps({name: d.fields[name].tolist() for name in sorted(d.fields)}),
            d.normalizer_weight,
        )
        for d in batch.documents
    ]


def groups(positions, **how):
    return [d for p in positions for d in group(p, **how)]


def test_batches_are_whole_groups_in_order_minibatches_within_epochs():
    scored = []

    class Counting(FakeRollouts):
        def add_policy_logprobs(self, samples):
            scored.append(len(samples))
            super().add_policy_logprobs(samples)

    source = make(Counting, minibatches=2, ppo_epochs=2)
    batches = [next(source) for _ in range(10)]
    first, second, third = (range(n, n + 6) for n in (0, 6, 12))
    halves = [(six[:3], six[3:]) for six in (first, second, third)]
    want = [*halves[0] * 2, *halves[1] * 2, *halves[2]]
    assert [described(b) for b in batches] == [groups(w) for w in want]
    assert scored == [6 * SAMPLES] * 3, (
        "log-probs are taken once per rollout, before its first update"
    )
    starts = [i % 4 == 0 for i in range(10)]
    assert [bool(b.metrics) for b in batches] == [bool(b.samples) for b in batches] == starts
    assert all(b.normalizer == pytest.approx(9) for b in batches)
    (packed,) = batches[0].split(10_000)
    assert sorted(packed.tokens_T.tolist()) == sorted(t for d in groups(range(3)) for t in d[0])


def test_weighting_and_masks():
    """mask_truncated takes the loss off a sample that did not stop, not its reward off the mean."""
    masked = next(make(mask_truncated=True, prompts_per_batch=6))
    assert described(masked) == groups(range(6), mask_truncated=True)
    stopped = [c.stopped for p in range(6) for c in drawn(p)[1]]
    assert masked.normalizer == pytest.approx(sum(stopped)) and 0 < sum(stopped) < len(stopped)
    masked = next(make(mask_truncated=True, weighting=CONSTANT, prompts_per_batch=6))
    assert masked.normalizer == sum(stopped), (
        "the divisor of Dr. GRPO counts no masked sample either"
    )
    constant = next(make(weighting=CONSTANT, prompts_per_batch=6))
    assert constant.normalizer == 6 * SAMPLES
    assert {w for d in constant.documents for w in d.weights.tolist()} == {0.0, 1 / 8}
    tokens = next(make(weighting=WEIGHTINGS["token"]))
    assert tokens.normalizer == sum(len(c.tokens) for p in range(3) for c in drawn(p)[1])


@pytest.mark.parametrize("weighting", ["token", "sequence"])
def test_a_paced_prompt_weighs_p_of_1_less_p(weighting):
    """PACED: beside the other weights, and from verdicts, whatever is rewarded."""
    how = {"weighting": WEIGHTINGS[weighting], "prompts_per_batch": 9}
    plain, paced = next(make(**how)), next(make(paced=True, **how))
    shares = [np.mean([j[2].strict for j in drawn(p)[2]]) for p in range(9)]
    assert len(set(shares)) > 2
    for i, (d, other) in enumerate(zip(paced.documents, plain.documents, strict=True)):
        p = shares[i // SAMPLES]
        np.testing.assert_allclose(d.weights, other.weights * p * (1 - p), rtol=1e-12)
        assert (d.fields["advantage"] == other.fields["advantage"]).all()
    assert paced.normalizer == pytest.approx(sum(d.weights.sum() for d in paced.documents))


@pytest.mark.parametrize("tis", ["truncate", "mask", "mask_sequence"])
@pytest.mark.parametrize("by_sequence", [False, True])
def test_weights_against_the_samplers_rounding_by_brute_force(tis, by_sequence):
    rng, cap, seen = np.random.default_rng(0), 1.3, set()
    by_sequence = by_sequence or tis == "mask_sequence"  # as train.py has it
    for length in (1, 2, 5, 9):
        for _ in range(20):
            document = Document.of_completion([1, 2], [3] * length)
            gap = np.concatenate([[0, 0], rng.normal(0, 0.4, length)])
            sampler = torch.from_numpy(rng.normal(-2, 1, length + 2))
            fields = {"sampler_logp": sampler, "old_logp": sampler + torch.from_numpy(gap)}
            document.fields.update(fields)
            add_tis_weights(document, config_of(tis=tis, tis_cap=cap, tis_by_sequence=by_sequence))
            for i in range(2, length + 2):
                ratio = np.exp(np.mean(gap[2:])) if by_sequence else np.exp(gap[i])
                want = min(ratio, cap)
                if tis != "truncate" and not 1 / cap <= ratio <= cap:
                    want = 0.0
                assert document.fields["tis_weight"][i] == pytest.approx(want, rel=1e-12)
                seen.add(want)
    assert (0.0 in seen) == (tis != "truncate") and (cap in seen) == (tis == "truncate")


def test_advantages_against_the_unlikely_fifth_of_what_is_trained():
    rng = np.random.default_rng(0)
    for length in (1, 2, 5, 10, 51):
        logp, weights = rng.normal(-1, 1, length + 3), np.array([0.0] * 3 + [1 / length] * length)
        logp[:3] = -9  # a prompt is never trained
        got = against_the_unlikely(logp, weights)
        lowest = (
            3 + np.argsort(logp[3:])[: 1 + (length - 1) // 5]
        )  # the quantile's rank is 0.2(n−1)
        want = np.isin(np.arange(length + 3), lowest) * -0.5
        np.testing.assert_array_equal(got, want)


def tosses(rank=0, world=1, seed=SEED, skip=0):
    """{(position, sample): reward} of eight prompts under --grpo_reward random."""
    reward = parse_reward("random", LIMIT)
    data = Prompts()
    decode = SimpleNamespace(decode=lambda ids, **_: str(ids))
    data.formatter = SimpleNamespace(prompt=prompt_of, tokenizer=decode)
    data.example = lambda position: SimpleNamespace(answer=None, position=position, origin="")

    class Tossed(GRPORollouts):
        def generate(self, prompts, seeds):
            return write(prompts, seeds)

    made = Tossed(data, None, config_of(rank=rank, world=world, seed=seed), reward)
    made.position = skip
    return {(s.position, s.number): s.reward for s in made.draw(200 - skip)}


def test_random_rewards_belong_to_seed_and_sample_alone():
    alone = tosses()
    assert set(alone.values()) == {0.0, 1.0} and 0.45 < np.mean(list(alone.values())) < 0.55
    assert alone == tosses(0, 2) | tosses(1, 2)
    assert tosses(skip=150).items() <= alone.items() and alone != tosses(seed=SEED + 1)


def test_a_rollout_for_distillation_has_no_rewards():
    plain = next(PlainRollouts(Prompts(), None, config_of(samples_per_prompt=1)))
    assert [set(d.fields) for d in plain.documents] == [{"sampler_logp"}] * 3
    assert [d[0] for d in described(plain)] == [group(p)[0][0] for p in range(3)]
    assert list(plain.metrics) == [
        "rollout/tokens",
        "rollout/truncated",
        "rollout/kept",
        "rollout/seconds",
    ]


def dynamic(start, wanted, rounds):
    """(kept positions, next position) of one rollout, by the definition of dynamic sampling."""
    kept = []
    for _ in range(1 + rounds):
        stop = start + wanted - len(kept)
        kept += [p for p in range(start, stop) if has_spread(p)]
        start = stop
    return kept, start


@pytest.mark.parametrize("rounds", [1, 2, 9])
def test_dynamic_sampling_replaces_groups_without_spread(rounds):
    source = make(prompts_per_batch=2, minibatches=2, dynamic_sampling_rounds=rounds)
    position = 0
    for _ in range(3):
        kept, stop = dynamic(position, 4, rounds)
        first, second = next(source), next(source)
        assert described(first) == groups(kept[:2]) and described(second) == groups(kept[2:])
        assert first.metrics["rollout/kept"] == (len(kept), stop - position)
        assert source.state()["position"] == stop and (rounds < 9 or len(kept) == 4)
        position = stop


# --- what dynamic sampling looks at: correctness, by the real rewards -----------------------------

LIMIT = 8  # new tokens
RIGHT, WRONG = Verdict(True, True, True), Verdict(False, False, True)


def teaches(spec, given, **more):
    """Whether a group of (text, verdict, tokens, stopped) is trained on under a --grpo_reward."""
    reward = parse_reward(spec, LIMIT, **more)
    example = Example(({"role": "user", "content": "1+1?"},), "2", "word_problems")

    class Given(GRPORollouts):
        def generate(self, prompts, seeds):
            return [
                SimpleNamespace(tokens=[i] * tokens, logp=[-1.0] * tokens, stopped=stopped)
                for i, (_, _, tokens, stopped) in enumerate(given)
            ]

        def judge(self, example, sample):
            text, verdict = given[sample.completion[0]][:2]
            decode = SimpleNamespace(decode=lambda ids, **_: text)
            self.dataset.formatter.tokenizer = decode
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("rl.reward.grade", lambda example, text: verdict)
                super().judge(example, sample)

    data = Prompts()
    data.example = lambda position: example
    data.formatter = SimpleNamespace(prompt=lambda example: [1], opened=lambda example: "")
    config = config_of(
        prompts_per_batch=1, samples_per_prompt=len(given), dynamic_sampling_rounds=1
    )
    source = Given(data, None, config, reward)
    samples = source.draw(1)
    kept = bool(source.informative(samples))
    batch = next(source)
    assert bool(batch.documents) == kept, (
        "a group that does not teach is replaced, here by its like: none is left"
    )
    total, count = batch.metrics["rollout/correctness_spread"]
    assert total / count == (len({s.correctness for s in samples}) > 1)
    return kept


@pytest.mark.parametrize(
    "spec,words",
    [
        ("accuracy,accuracy", "accuracy is there twice"),
        ("accuracy:1,format:0.5, accuracy:0.2", "accuracy is there twice"),
        ("accuracy:0", "every weight is 0"),
        ("accuracy:0,format:-0.0", "every weight is 0"),
        ("accuracy:nan", "nan is not a number that is finite"),
        ("accuracy:1,format:inf", "inf is not a number that is finite"),
        ("accuracy:x", "'x' is not a number"),
        ("beauty", "no 'beauty'; choose from accuracy"),
    ],
)
def test_rewards_that_say_nothing_or_two_things_are_refused(spec, words):
    with pytest.raises(UserError, match=f"--grpo_reward {spec}: {words}") as e:
        parse_reward(spec, LIMIT)
    assert "\n" not in str(e.value)
    parts = parse_reward("accuracy:0, format:-1", LIMIT).parts
    assert {name: p.weight for name, p in parts.items()} == {"accuracy": 0.0, "format": -1.0}


BOXED = "<think>x</think><answer>2</answer>"  # what the format reward wants


@pytest.mark.parametrize(
    "spec,more,samples,expected",
    [
        ("accuracy", {"length_penalty": 4}, [("2", RIGHT, n, True) for n in (5, 6, 7, 8)], False),
        ("accuracy", {"length_penalty": 4}, [("3", WRONG, n, True) for n in (5, 6, 7, 8)], False),
        (
            "accuracy",
            {"truncation_penalty": 0.5},
            [("2", RIGHT, 3, True), ("2", RIGHT, 8, False)],
            False,
        ),
        (
            "signed_accuracy",
            {"length_penalty": 4},
            [("2", RIGHT, 5, True), ("2", RIGHT, 8, True)],
            False,
        ),
        ("accuracy,format:0.5", {}, [("2", RIGHT, 3, True), (BOXED, RIGHT, 3, True)], False),
        ("accuracy", {"length_penalty": 4}, [("2", RIGHT, 5, True), ("3", WRONG, 5, True)], True),
        (
            "accuracy,format",
            {},
            [("2", RIGHT, 3, True), (BOXED, WRONG, 3, True), ("3", WRONG, 3, True)],
            True,
        ),
        ("lenient", {}, [("2", RIGHT, 3, True), ("2", Verdict(False, True, True), 3, True)], False),
        ("accuracy", {}, [("2", RIGHT, 3, True), ("2", Verdict(False, True, True), 3, True)], True),
        ("format", {"length_penalty": 4}, [("2", RIGHT, 5, True), ("3", WRONG, 8, True)], False),
        ("format", {}, [("2", RIGHT, 3, True), (BOXED, RIGHT, 3, True)], True),
        ("format,accuracy:0", {}, [("2", RIGHT, 3, True), (BOXED, RIGHT, 3, True)], True),
        (
            "signed_accuracy,format",
            {},
            [("2", RIGHT, 3, True), (BOXED, WRONG, 3, True)],
            False,
        ),  # -1 and +1, +1 and -1: all are 0
    ],
)
def test_dynamic_sampling_looks_at_correctness(spec, more, samples, expected):
    assert teaches(spec, samples, **more) == expected


def test_dynamic_sampling_takes_a_functions_word_without_the_penalties(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def letters(example, completion):\n    return completion.count('e')\n"
    )
    spec = f"{tmp_path}/mine.py:letters"
    by_length = [("e", RIGHT, 5, True), ("e", WRONG, 8, False)]
    assert not teaches(spec, by_length, length_penalty=4, truncation_penalty=1.0)
    assert teaches(spec, [("e", RIGHT, 5, True), ("ee", RIGHT, 5, True)])


def test_no_group_with_spread_gives_an_empty_batch_and_goes_on():
    source = make(AllAlike, dynamic_sampling_rounds=2)
    batch = next(source)
    assert batch.documents == [] and batch.normalizer == 0
    assert batch.metrics["rollout/kept"] == (0, 9)
    next(source)
    assert source.state()["position"] == 18
    assert all(not d.fields["advantage"].any() for d in next(make(AllAlike)).documents)


def test_metrics_are_sums_and_counts_over_the_rollout():
    source = make(minibatches=2, ppo_epochs=2, logged_samples=4)
    batch = next(source)
    every = [(c, j) for p in range(6) for c, j in zip(*drawn(p)[1:], strict=True)]
    rewards = [[j[0] for j in drawn(p)[2]] for p in range(6)]
    want = {
        "tokens": sum(len(c.tokens) for c, _ in every),
        "truncated": sum(not c.stopped for c, _ in every),
        "reward": sum(j[0] for _, j in every),
        "reward_accuracy": sum(j[1]["accuracy"] for _, j in every),
        "reward_format": sum(j[1].get("format", 0.0) for _, j in every),
        "accuracy": sum(j[2].strict for _, j in every),
        "lenient": sum(j[2].lenient for _, j in every),
        "disagree": sum(j[2].lenient != j[2].strict for _, j in every),
        "unparsed": sum(not j[2].parsed for _, j in every),
    }
    got = {name.removeprefix("rollout/"): value for name, value in batch.metrics.items()}
    assert got.pop("seconds")[1] == 1 and got.pop("kept") == (6, 6)
    assert got.pop("correctness_spread") == got["spread"], "nothing else was said of correctness"
    assert got.pop("spread") == (sum(has_spread(p) for p in range(6)), 6)
    assert got.pop("reward_std") == (pytest.approx(sum(np.std(r) for r in rewards)), 6)
    assert got == {name: (pytest.approx(value), 18) for name, value in want.items()}
    assert 0 < want["disagree"] < 18 and 0 < want["unparsed"] < 18
    first, (completion, (reward, parts, _)) = batch.samples[0], every[0]
    assert len(batch.samples) == 4 and first["question"] == "q0" and first["gold"] == "0"
    assert first["text"] == f"text of {completion.tokens}"
    assert (first["reward"], first["parts"]) == (reward, parts)


def resume(source, **arguments):
    """A fresh source that goes on from what a checkpoint would have kept."""
    fresh = make(**arguments)
    fresh.load(json.loads(json.dumps(source.state())))
    return fresh


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {
            "dynamic_sampling_rounds": 1,
            "prompts_per_batch": 2,
            "mask_truncated": True,
            "weighting": CONSTANT,
            "advantage": "maxrl",
            "paced": True,
        },
    ],
    ids=["plain", "dynamic sampling, masks"],
)
def test_a_resumed_source_continues_identically(extra):
    arguments = {"minibatches": 2, "ppo_epochs": 2} | extra
    through = make(**arguments)
    want = [next(through) for _ in range(9)]
    for cut in range(9):
        source = make(**arguments)
        for _ in range(cut):
            next(source)
        source = resume(source, **arguments)
        for b in want[cut:]:
            got = next(source)
            assert described(got) == described(b) and got.normalizer == b.normalizer
            for d, e in zip(got.documents, b.documents, strict=True):
                assert d.tokens.dtype == e.tokens.dtype and d.weights.dtype == e.weights.dtype
                assert all(x.dtype == torch.float64 for x in d.fields.values())
            assert timeless(got.metrics) == timeless(b.metrics) and got.samples == b.samples


def timeless(metrics):
    return {name: value for name, value in metrics.items() if name != "rollout/seconds"}


# --- ranks: a real process group; what a rank does is in tests/distributed_workers.py -------------

RANKED = {
    "plain": {"minibatches": 2, "ppo_epochs": 2},
    "dynamic sampling": {"minibatches": 2, "dynamic_sampling_rounds": 2, "prompts_per_batch": 2},
    "fewer groups than ranks": {"prompts_per_batch": 1, "minibatches": 1},
    "weighed prompts": {"minibatches": 2, "advantage": "maxrl", "paced": True},
}


def sources(rank, world):
    """name -> iterator; "reloaded" goes through a checkpoint before each batch."""

    def reloaded(**arguments):
        source = make(**arguments)
        while True:
            yield next(source := resume(source, **arguments))

    made = {name: make(rank=rank, world=world, **arguments) for name, arguments in RANKED.items()}
    return made | {"reloaded": reloaded(rank=rank, world=world, **RANKED["plain"])}


def describe(batch):
    return described(batch), timeless(batch.metrics), batch.normalizer


def test_ranks_share_the_same_batches():
    by_rank = workers.spawned(workers.rollout_main, 2, sources, describe, 6)
    for name, alone in sources(0, 1).items():
        for i, whole in enumerate(map(describe, itertools.islice(alone, 6))):
            parts = [rank[name][i] for rank in by_rank]
            assert sorted(d for documents, *_ in parts for d in documents) == sorted(whole[0]), (
                name,
                i,
            )
            assert sum(norm for *_, norm in parts) == pytest.approx(whole[2], rel=1e-12)
            for metric, (total, count) in whole[1].items():
                pairs = [metrics.get(metric, (0, 0)) for _, metrics, _ in parts]
                assert np.sum(pairs, 0) == pytest.approx((total, count), rel=1e-12), (
                    name,
                    i,
                    metric,
                )
    assert all(len(rank["plain"][0][0]) for rank in by_rank), "both ranks held groups"


# --- mixtures -------------------------------------------------------------------------------------


class Counting:
    def __init__(self, name):
        self.name, self.n, self.closed = name, 0, False

    def __next__(self):
        self.n += 1
        return f"{self.name}{self.n}"

    def state(self):
        return self.n

    def load(self, state):
        self.n = state

    def close(self):
        self.closed = True


def test_the_coin_of_a_mixture_depends_on_seed_and_number_alone():
    def mixture(share, seed=0):
        return MixedSource(Counting("a"), Counting("b"), share, seed)

    def first(source, n):
        return list(itertools.islice(source, n))

    assert first(mixture(0.0), 3) == ["a1", "a2", "a3"] and first(mixture(1.0), 3) == [
        "b1",
        "b2",
        "b3",
    ]
    drawn_400 = first(mixture(0.3), 400)
    assert 0.22 < sum(x[0] == "b" for x in drawn_400) / 400 < 0.38
    assert drawn_400 == first(mixture(0.3), 400) != first(mixture(0.3, seed=1), 400)
    more_b = [x[0] for x in first(mixture(0.6), 400)]
    assert all(x == "b" for x, y in zip(more_b, drawn_400, strict=True) if y[0] == "b"), (
        "the coin itself does not depend on the share"
    )
    for cut in (0, 1, 7):
        source, fresh = mixture(0.3), mixture(0.3)
        first(source, cut)
        fresh.load(json.loads(json.dumps(source.state())))
        assert first(fresh, 20) == drawn_400[cut : cut + 20]
    source.close()
    assert all(s.closed for s in source.sources)


def test_sample_seeds_are_their_own():
    seeds = {sample_seed(*x) for x in itertools.product((0, 1, 11), range(30), range(30))}
    assert len(seeds) == 3 * 900 and all(0 <= s < 2**63 for s in seeds) and max(seeds) > 2**62
