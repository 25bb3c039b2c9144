"""The evaluation's estimates against brute force and simulation, and their tables."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from curves import aligned
from eval.stats import intervals, majority_at_k, paired, pass_at_k, sign_flip_p, student_t
from eval.summary import Summary, compare, summarise
from eval.tables import markdown, table

# --- estimates ------------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n in range(1, 8):
        for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([1] * correct + [0] * (n - correct), k))
            assert pass_at_k(n, correct, k) == pytest.approx(
                sum(map(any, subsets)) / len(subsets), abs=1e-12
            )


def test_pass_at_k_is_unbiased_where_the_plain_one_is_not():
    p, n, k = 0.3, 6, 4
    chance = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    assert sum(w * pass_at_k(n, c, k) for c, w in enumerate(chance)) == pytest.approx(
        1 - (1 - p) ** k, abs=1e-12
    )
    assert (
        abs(sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(chance)) - (1 - (1 - p) ** k))
        > 0.03
    )


def test_majority():
    def vote(votes, k, gold="a"):
        return majority_at_k(votes, [v == gold for v in votes], k)

    assert vote(["a", "b", "a"], 3) == 1 and vote(["a", "b", "b"], 3) == 0
    # equally common: each as often
    assert vote(["a", "b"], 2) == 0.5 and vote(["a", "b", "c", "c", "a"], 5) == 0.5
    assert vote([None, None, "a"], 3) == 1 and vote([None] * 3, 3) == 0
    assert vote(["a", "a", "b", "b", "a"], 2) == 0.5  # runs aa, bb; the fifth has no partner
    assert vote(["a", "b", "a"], 1) == pytest.approx(2 / 3)
    rng = np.random.default_rng(0)
    for _ in range(200):  # against all ways to choose among the commonest
        votes = [rng.choice(["a", "b", "c", None]) for _ in range(5)]
        voted = [v for v in votes if v is not None]
        best = {v for v in voted if voted.count(v) == max(voted.count(w) for w in voted)}
        assert vote(votes, 5) == (("a" in best) / len(best) if best else 0)


def test_sign_flips_against_all_assignments_and_mcnemar():
    rng = np.random.default_rng(1)
    for size in [*range(1, 11)] * 6:
        d = rng.integers(-4, 5, size)
        signs = np.array(list(itertools.product((1, -1), repeat=size)))
        share = np.mean(abs(signs @ d) >= abs(d.sum()))
        assert sign_flip_p(d) == pytest.approx(share, abs=1e-12)
    assert sign_flip_p([]) == sign_flip_p([0, 0]) == 1
    for better, worse in ((10, 2), (40, 20), (700, 619)):  # McNemar's exact test, in whole numbers
        n = better + worse
        tail = sum(Fraction(math.comb(n, j), 2**n) for j in range(better, n + 1))
        assert sign_flip_p([1] * better + [-1] * worse + [0] * 50) == pytest.approx(
            float(min(1, 2 * tail)), rel=1e-9
        )


def test_students_t():
    for freedom, t in (
        (1, 12.7062),
        (2, 4.3027),
        (3, 3.1824),
        (5, 2.5706),
        (10, 2.2281),
        (29, 2.0452),
        (39, 2.0227),
        (100, 1.9840),
        (1318, 1.9618),
    ):  # tabulated
        assert student_t(0.975, freedom) == pytest.approx(t, abs=6e-5)


# --- intervals by simulation ----------------------------------------------------------------------


def benchmarks(problems, samples, mean, spread=2.0, count=1000, seed=0):
    """[P, count] mean accuracies of `count` simulated benchmarks.

    The difficulty of problems is Beta-distributed; each has `samples` samples.
    """
    rng = np.random.default_rng(seed)
    chance = rng.beta(mean * spread, (1 - mean) * spread, size=(problems, count))
    return rng.binomial(samples, chance) / samples


REGIMES = [(200, 1, 0.5), (200, 4, 0.3), (500, 1, 0.15), (40, 8, 0.5), (1319, 1, 0.54)]


@pytest.mark.parametrize("problems,samples,mean", REGIMES)
def test_the_95_percent_interval_covers_the_truth_in_95_percent_of_1000_benchmarks(
    problems, samples, mean
):
    low, high = intervals(benchmarks(problems, samples, mean))
    assert 0.93 <= ((low <= mean) & (mean <= high)).mean() <= 0.97


def test_samples_taken_for_problems_would_not_cover():
    """The test above can fail: with each sample counted for itself intervals are too narrow."""
    rng = np.random.default_rng(0)
    chance = rng.beta(1.0, 1.0, size=(100, 300))
    flat = np.concatenate([rng.binomial(1, chance) for _ in range(8)])
    low, high = intervals(flat)
    assert ((low <= 0.5) & (0.5 <= high)).mean() < 0.8


def test_the_interval_of_a_difference_and_its_p_value():
    """Two models on the same problems.

    Of equal accuracy: the interval holds 0 in 95 %, p is below 0.05 in at most 5 %. A gain is seen.
    """
    rng = np.random.default_rng(3)
    chance = rng.beta(1, 1, (150, 1000))
    a, b, better = (rng.binomial(4, np.minimum(1, chance + gain)) for gain in (0, 0, 0.1))
    low, high = intervals((b - a) / 4, lowest=-1.0)
    assert 0.93 <= ((low <= 0) & (0 <= high)).mean() <= 0.97
    assert np.mean([sign_flip_p(d) < 0.05 for d in (b - a).T]) <= 0.065
    assert np.mean([sign_flip_p(d) < 0.05 for d in (better - a).T]) > 0.9
    one, gain = paired([(4, c) for c in a[:, 0]], [(4, c) for c in better[:, 0]]), better - a
    assert one["difference"] == pytest.approx(gain[:, 0].mean() / 4)
    assert one["p"] == sign_flip_p(gain[:, 0]) and one["better"] == (gain[:, 0] > 0).sum()
    assert one["low"] < one["difference"] < one["high"]


def test_the_edges():
    low, high = intervals([[0.0, 1.0]] * 20)
    assert (low[0], high[1]) == (0, 1)
    assert high[0] == pytest.approx(1 - 0.025 ** (1 / 20))
    assert low[1] == pytest.approx(0.025 ** (1 / 20))
    # a chance that gives 20 wrong ones in one case of 40
    assert (1 - high[0]) ** 20 == pytest.approx(0.025)
    assert np.isnan(intervals([[1.0]])).all()
    found = paired([(1, 1), (2, 1)], [(4, 1), (1, 1)])  # samples may differ in number
    assert found["difference"] == pytest.approx((-0.75 + 0.5) / 2)
    assert (found["p"], found["better"], found["worse"]) == (1.0, 1, 1)


def row(problem, sample, vote, right):
    return {
        "problem": problem,
        "sample": sample,
        "question": f"q{problem}",
        "vote": vote,
        "strict": right,
        "lenient": True,
        "parsed": vote is not None,
        "math_verify": right,
        "stopped": sample == 0,
        "tokens": 10 * sample + 2,
    }


def test_a_summary_by_hand():
    rows = {
        (0, 0): row(0, 0, "7", True),
        (0, 1): row(0, 1, "8", False),
        (1, 0): row(1, 0, None, False),
        (1, 1): row(1, 1, "1", False),
    }
    found = summarise(rows, [1, 2], {"tokens": 48, "seconds": 2.0})
    assert (found.problems, found.samples) == (2, 2)
    means = {name: interval.mean for name, interval in found.rates.items()}
    assert means == {"accuracy": 0.25, "pass@2": 0.5, "majority@2": 0.25}
    assert (found.lenient, found.math_verify) == (1.0, 0.25)
    assert (found.unparsed, found.truncated) == (0.25, 0.5)
    assert (found.tokens, found.tokens_longest, found.tokens_per_second) == (7, 12, 24)
    assert list(found.flat())[:5] == ["problems", "samples", *means]
    ungraded = {key: r | {"vote": False, "math_verify": None} for key, r in rows.items()}
    code = summarise(ungraded, [2], {"tokens": 0, "seconds": 0})
    assert "majority@2" not in code.rates
    assert code.math_verify is None and code.tokens_per_second is None
    shown = table([Summary("a|b", "t", found), Summary("c", "code", code)])
    assert markdown(shown).count("\n") == 3 and "a\\|b" in markdown(shown)
    assert "25.0 [" in aligned(shown)
    others = {key: r | {"strict": True} for key, r in rows.items()}
    for sample in (0, 1):
        others[0, sample]["question"] = "another"
    compared = compare(rows, others)  # only what both were asked
    assert (compared["difference"], compared["problems"]) == (-1, 1)
