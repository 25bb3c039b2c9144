"""Rollouts with a fake model: which documents a batch holds, whatever the ranks, the refills and the interruptions."""

import functools
import itertools
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest

from data.batch import WEIGHTINGS, constant_length
from data.grade import Verdict
from data.tasks import Example
from errors import UserError
from rl.advantage import group_advantages
from rl.reward import parse_reward
from rl.rollout import Mixed, Rollouts, sample_seed
from tests import distributed_workers as workers

SAMPLES, SEED = 3, 5
CONSTANT = functools.partial(constant_length, length=8)


def prompt_at(position):
    example = SimpleNamespace(question=f"q{position}", answer=str(position), position=position)
    return example, [90 + position % 7] * (1 + position % 3)


def write(prompts, seeds):
    """Completions that depend on the seed alone."""
    done = []
    for rng in map(random.Random, seeds):
        tokens = [rng.randrange(50) for _ in range(rng.randint(1, 6))]
        done.append(
            SimpleNamespace(
                tokens=tokens, logp=[-rng.random() for _ in tokens], stopped=rng.random() < 0.7
            )
        )
    assert len(done) == len(prompts)
    return done


def judge(example, completion):
    """Every third prompt is solved by all of its samples; the others by some."""
    right = completion.tokens[-1] % 2 == 0
    parts = (
        {"accuracy": float(right), "format": 0.25 * completion.stopped}
        if example.position % 3 != 1
        else {"accuracy": 1.0}
    )
    verdict = SimpleNamespace(
        strict=right,
        lenient=right or completion.stopped,
        parsed=right or len(completion.tokens) > 2,
    )
    return sum(parts.values()), parts, verdict, f"text of {completion.tokens}"


def score(documents):
    for d in documents:
        d.fields["old_logp"] = d.fields["sampler_logp"] * 1.01


def make(rank=0, world=1, **arguments):
    defaults = dict(per_batch=3, samples=SAMPLES, seed=SEED, weighting=WEIGHTINGS["sequence"])
    calls = [arguments.pop(name, f) for name, f in (("judge", judge), ("score", score))]
    return Rollouts(prompt_at, write, *calls, **defaults | arguments, rank=rank, world=world)


def drawn(position):
    """(prompt ids, completions, judgements) of a group, from its position alone."""
    example, ids = prompt_at(position)
    completions = write([ids] * SAMPLES, [sample_seed(SEED, position, s) for s in range(SAMPLES)])
    return ids, completions, [judge(example, c) for c in completions]


def group(position, mask_truncated=False):
    """What a group's documents should be under the sequence weighting, as `told` tells them."""
    ids, completions, judged = drawn(position)
    made = []
    for c, advantage in zip(completions, group_advantages([j[0] for j in judged], "std")):
        weight = 0.0 if mask_truncated and not c.stopped else 1 / len(c.tokens)
        zeros, logp = [0.0] * len(ids), np.array([0.0] * len(ids) + c.logp)
        fields = {
            "advantage": [float(advantage)] * len(logp),
            "old_logp": list(logp * 1.01),
            "sampler_logp": list(logp),
        }
        made.append(
            (
                tuple(ids + c.tokens),
                tuple(zeros + [weight] * len(c.tokens)),
                json.dumps(fields),
                None,
            )
        )
    return made


def has_spread(position):
    return len({reward for reward, *_ in drawn(position)[2]}) > 1


def told(batch):
    return [
        (
            tuple(d.tokens.tolist()),
            tuple(d.weights.tolist()),
            json.dumps({k: d.fields[k].tolist() for k in sorted(d.fields)}),
            d.share,
        )
        for d in batch.documents
    ]


def groups(positions, **how):
    return [d for p in positions for d in group(p, **how)]


def test_batches_are_whole_groups_in_order_updates_within_epochs():
    asked = []

    def scored(documents):
        asked.append(len(documents))
        score(documents)

    source = make(updates=2, epochs=2, score=scored)
    batches = [next(source) for _ in range(10)]
    want = (
        [range(0, 3), range(3, 6)] * 2
        + [range(6, 9), range(9, 12)] * 2
        + [range(12, 15), range(15, 18)]
    )
    assert [told(b) for b in batches] == [groups(w) for w in want]
    assert asked == [6 * SAMPLES] * 3, (
        "log-probs are taken once per rollout, before its first update"
    )
    assert (
        [bool(b.metrics) for b in batches]
        == [bool(b.samples) for b in batches]
        == [i % 4 == 0 for i in range(10)]
    )
    assert all(b.normaliser == pytest.approx(9) for b in batches)
    assert batches[0].tokens_T.tolist() == [t for d in told(batches[0]) for t in d[0]]


def test_weights_share_and_masks():
    """mask_truncated takes the loss off a sample that did not stop; its reward stays in the group's mean."""
    masked = next(make(mask_truncated=True, per_batch=6))
    assert told(masked) == groups(range(6), mask_truncated=True)
    stopped = [c.stopped for p in range(6) for c in drawn(p)[1]]
    assert masked.normaliser == pytest.approx(sum(stopped)) and 0 < sum(stopped) < len(stopped)
    masked = next(make(mask_truncated=True, weighting=CONSTANT, per_batch=6))
    assert masked.normaliser == sum(stopped), (
        "the divisor of Dr. GRPO counts no masked sample either"
    )
    constant = next(make(weighting=CONSTANT, per_batch=6))
    assert constant.normaliser == 6 * SAMPLES and set(constant.weight_T.tolist()) == {0.0, 1 / 8}
    tokens = next(make(weighting=WEIGHTINGS["token"]))
    assert tokens.normaliser == sum(len(c.tokens) for p in range(3) for c in drawn(p)[1])
    plain = next(make(judge=None, score=None))
    assert [set(d.fields) for d in plain.documents] == [{"sampler_logp"}] * 9, (
        "a rollout for distillation has no rewards"
    )
    assert plain.metrics.keys() == {
        "rollout/tokens",
        "rollout/truncated",
        "rollout/kept",
        "rollout/seconds",
    }


def refilled(start, wanted, refills):
    """(kept positions, next position) of one rollout, by the definition of dynamic sampling."""
    kept = []
    for _ in range(1 + refills):
        stop = start + wanted - len(kept)
        kept += [p for p in range(start, stop) if has_spread(p)]
        start = stop
    return kept, start


@pytest.mark.parametrize("refills", [1, 2, 9])
def test_refills_replace_groups_without_spread(refills):
    source, position = make(per_batch=2, updates=2, refills=refills), 0
    for _ in range(3):
        kept, stop = refilled(position, 4, refills)
        first, second = next(source), next(source)
        assert told(first) == groups(kept[:2]) and told(second) == groups(kept[2:])
        assert first.metrics["rollout/kept"] == (len(kept), stop - position)
        assert source.state()["position"] == stop and (refills < 9 or len(kept) == 4)
        position = stop


# --- what dynamic sampling looks at: correctness, by the real rewards -----------------------------------------------------

LIMIT = 8  # new tokens
RIGHT, WRONG = Verdict(True, True, True), Verdict(False, False, True)


def group_of(spec, samples, **more):
    """The Group that Rollouts makes of (text, verdict, tokens, stopped) samples under a --grpo_reward, by their verdicts as given."""
    reward = parse_reward(spec, LIMIT, **more)

    def judge(example, completion):
        text, verdict, tokens, stopped = completion.sample
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("rl.reward.grade", lambda example, text: verdict)
            return *reward(example, text, tokens, stopped), text

    def write(prompts, seeds):
        return [
            SimpleNamespace(tokens=[1] * s[2], logp=[-1.0] * s[2], stopped=s[3], sample=s)
            for s in samples
        ]

    example = Example(({"role": "user", "content": "1+1?"},), "2", "word_problems")
    source = Rollouts(
        lambda position: (example, [1]),
        write,
        judge,
        None,
        per_batch=1,
        samples=len(samples),
        seed=0,
        weighting=WEIGHTINGS["token"],
        correctness=reward.correctness,
        refills=1,
    )
    (group,) = source._groups([0])
    batch = next(source)
    assert (len(batch.documents) > 0) == group.teaches(), (
        "a group that does not teach is replaced, here by its like: none is left"
    )
    assert batch.metrics["rollout/correctness_spread"][0] / batch.metrics[
        "rollout/correctness_spread"
    ][1] == (len(set(group.correctness)) > 1)
    return group


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
    assert parse_reward("accuracy:0, format:-1", LIMIT).parts == {"accuracy": 0.0, "format": -1.0}


BOXED = "<think>x</think><answer>2</answer>"  # what the format reward wants


@pytest.mark.parametrize(
    "spec,more,samples,teaches",
    [
        ("accuracy", {"overlong": 4}, [("2", RIGHT, n, True) for n in (5, 6, 7, 8)], False),
        ("accuracy", {"overlong": 4}, [("3", WRONG, n, True) for n in (5, 6, 7, 8)], False),
        ("accuracy", {"truncated": 0.5}, [("2", RIGHT, 3, True), ("2", RIGHT, 8, False)], False),
        ("signed_accuracy", {"overlong": 4}, [("2", RIGHT, 5, True), ("2", RIGHT, 8, True)], False),
        ("accuracy,format:0.5", {}, [("2", RIGHT, 3, True), (BOXED, RIGHT, 3, True)], False),
        ("accuracy", {"overlong": 4}, [("2", RIGHT, 5, True), ("3", WRONG, 5, True)], True),
        (
            "accuracy,format",
            {},
            [("2", RIGHT, 3, True), (BOXED, WRONG, 3, True), ("3", WRONG, 3, True)],
            True,
        ),
        ("lenient", {}, [("2", RIGHT, 3, True), ("2", Verdict(False, True, True), 3, True)], False),
        ("accuracy", {}, [("2", RIGHT, 3, True), ("2", Verdict(False, True, True), 3, True)], True),
        ("format", {"overlong": 4}, [("2", RIGHT, 5, True), ("3", WRONG, 8, True)], False),
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
def test_dynamic_sampling_looks_at_correctness(spec, more, samples, teaches):
    assert group_of(spec, samples, **more).teaches() == teaches


def test_dynamic_sampling_takes_a_functions_word_without_the_penalties(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def letters(example, completion):\n    return completion.count('e')\n"
    )
    spec = f"{tmp_path}/mine.py:letters"
    assert not group_of(
        spec, [("e", RIGHT, 5, True), ("e", WRONG, 8, False)], overlong=4, truncated=1.0
    ).teaches()
    assert group_of(spec, [("e", RIGHT, 5, True), ("ee", RIGHT, 5, True)]).teaches()


def test_no_group_with_spread_gives_an_empty_batch_and_goes_on():
    same = lambda example, completion: (
        1.0,
        {},
        SimpleNamespace(strict=True, lenient=True, parsed=True),
        "",
    )  # noqa: E731
    source = make(judge=same, refills=2)
    batch = next(source)
    assert (
        batch.documents == [] and batch.normaliser == 0 and batch.metrics["rollout/kept"] == (0, 9)
    )
    next(source)
    assert source.state()["position"] == 18
    assert all(not d.fields["advantage"].any() for d in next(make(judge=same)).documents)


def test_metrics_are_sums_and_counts_over_the_rollout():
    source = make(updates=2, epochs=2, logged=4)
    batch = next(source)
    every = [(c, j) for p in range(6) for c, j in zip(*drawn(p)[1:])]
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
    first = batch.samples[0]
    assert len(batch.samples) == 4 and first["question"] == "q0" and first["gold"] == "0"
    assert (first["text"], first["reward"], first["parts"]) == (
        every[0][1][3],
        every[0][1][0],
        every[0][1][1],
    )


def resume(source, **arguments):
    """A fresh source that goes on from what a checkpoint would have kept."""
    fresh = make(**arguments)
    fresh.load(json.loads(json.dumps(source.state())))
    return fresh


@pytest.mark.parametrize(
    "extra", [{}, {"refills": 1, "per_batch": 2, "mask_truncated": True, "weighting": CONSTANT}]
)
def test_a_resumed_source_continues_identically(extra):
    arguments = dict(updates=2, epochs=2) | extra
    through = make(**arguments)
    want = [next(through) for _ in range(9)]
    for cut in range(9):
        source = make(**arguments)
        for _ in range(cut):
            next(source)
        source = resume(source, **arguments)
        for b in want[cut:]:
            got = next(source)
            assert told(got) == told(b) and got.normaliser == b.normaliser
            assert got.tokens_T.dtype == b.tokens_T.dtype and got.weight_T.dtype == b.weight_T.dtype
            assert timeless(got.metrics) == timeless(b.metrics) and got.samples == b.samples


def timeless(metrics):
    return {name: value for name, value in metrics.items() if name != "rollout/seconds"}


# --- ranks: a real process group; what a rank does is in tests/distributed_workers.py ------------------------------------------------

RANKED = {
    "plain": dict(updates=2, epochs=2),
    "refills": dict(updates=2, refills=2, per_batch=2),
    "fewer groups than ranks": dict(per_batch=1, updates=1),
}


def sources(rank, world):
    """name -> iterator; "reloaded" goes through a checkpoint before each batch."""

    def reloaded(**arguments):
        source = make(**arguments)
        while True:
            yield next(source := resume(source, **arguments))

    made = {name: make(rank, world, **arguments) for name, arguments in RANKED.items()}
    return made | {"reloaded": reloaded(rank=rank, world=world, **RANKED["plain"])}


def describe(batch):
    return told(batch), timeless(batch.metrics), batch.normaliser


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


# --- mixtures ----------------------------------------------------------------------------------------------------------


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
        return Mixed(Counting("a"), Counting("b"), share, seed)

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
    assert all(x == "b" for x, y in zip(more_b, drawn_400) if y[0] == "b"), (
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
