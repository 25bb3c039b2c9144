"""Estimates, intervals and tests for a handful of samples per problem.

Problems are the unit: samples of one problem resemble each other, so every interval resamples whole
problems and every test swaps whole problems. Legend: P problems, X quantities, n samples of a
problem.
"""

import math
import statistics
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
from scipy.special import ndtr, stdtrit  # what scipy.stats uses, which takes seconds to import

ALPHA = 1 - 0.95  # of the intervals
RESAMPLES = 4000
BLOCK = 250  # resamples made at once, to bound the memory


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The chance that at least one of k of a problem's n samples is right.

    The k samples are drawn without replacement: 1 - C(n - c, k) / C(n, k), the unbiased estimate of
    Chen et al. 2021 (arXiv 2107.03374, equation 1).
    """
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority_at_k(votes: Sequence[Hashable], correct: Sequence[bool], k: int) -> float:
    """The chance that the most common vote of k samples is right.

    The mean over the disjoint runs of k samples in their order. A tie is broken at random; a run
    without any vote is wrong.

    Args:
        votes: One answer per sample, None for none.
        correct: Whether each sample is right.
    """
    chances = []
    for start in range(0, len(votes) - k + 1, k):
        run = votes[start : start + k]
        is_right = dict(zip(run, correct[start : start + k], strict=True))
        counts = Counter(vote for vote in run if vote is not None)
        best = [vote for vote, count in counts.items() if count == max(counts.values())]
        chances.append(sum(is_right[vote] for vote in best) / len(best) if best else 0.0)
    return sum(chances) / len(chances)


def intervals(values_PX: np.ndarray, lowest: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Bootstrap intervals (low_X, high_X) of 95 % of the means over problems.

    The percentiles are a little further out than 2.5 and 97.5 %, by Student's t and √(P/(P-1)): the
    plain ones are too narrow for few problems (Hesterberg 2015, arXiv 1411.5279, "expanded
    percentile"). Resampling says nothing where all problems agree: there the bound is that of P
    equal outcomes, 1 - (α/2)^(1/P) away. A single problem has no interval (NaN).

    Args:
        values_PX: One value per problem and quantity, between `lowest` and 1.
    """
    values_PX = np.asarray(values_PX, float)
    problems = len(values_PX)
    if problems < 2:
        unknown_X = np.full(values_PX.shape[1], np.nan)
        return unknown_X, unknown_X
    rng, means = np.random.default_rng(0), []
    for _ in range(0, RESAMPLES, BLOCK):
        counts = rng.multinomial(problems, np.full(problems, 1 / problems), size=BLOCK)
        means.append(counts @ values_PX / problems)
    widening = math.sqrt(problems / (problems - 1))
    outer = ndtr(-student_t(1 - ALPHA / 2, problems - 1) * widening)
    low_X, high_X = np.quantile(np.concatenate(means), (outer, 1 - outer), axis=0)
    is_constant_X = np.ptp(values_PX, axis=0) == 0
    reach = 1 - (ALPHA / 2) ** (1 / problems)
    low_X = np.where(is_constant_X, np.maximum(lowest, values_PX[0] - reach), low_X)
    high_X = np.where(is_constant_X, np.minimum(1.0, values_PX[0] + reach), high_X)
    return low_X, high_X


def student_t(p: float, freedom: int) -> float:
    """The p-quantile of Student's t with `freedom` degrees of freedom."""
    return float(stdtrit(freedom, p))


def sign_flip_p(differences_P: Sequence[int] | np.ndarray) -> float:
    """The exact two-sided p-value of the hypothesis that two models are alike.

    It is the share of the 2^P ways to swap both models' results, problem by problem, whose sum is
    at least as far from 0. The distribution of the sum is made by convolution: c problems that
    differ by a add a · (2j - c) with j binomial. For one sample per problem this is McNemar's
    exact test.

    Args:
        differences_P: Whole numbers, the right samples of one model less those of the other.
    """
    sizes = Counter(abs(int(d)) for d in differences_P)
    del sizes[0]
    pmf = np.ones(1)  # of the sum, from -reach to reach
    for size, count in sizes.items():
        flips = np.zeros(2 * size * count + 1)
        flips[:: 2 * size] = [math.comb(count, j) / 2**count for j in range(count + 1)]
        pmf = np.convolve(pmf, flips)
    reach = len(pmf) // 2
    sums = np.abs(np.arange(-reach, reach + 1))
    return min(1.0, float(pmf[sums >= abs(int(np.sum(differences_P)))].sum()))


class Paired(TypedDict):
    """The difference of two models' mean accuracies on the same problems.

    low, high: the bootstrap interval. p: of the sign-flip test. better, worse: the number of
    problems on which the second model did better or worse than the first.
    """

    problems: int
    difference: float
    low: float
    high: float
    p: float
    better: int
    worse: int


def paired(a_P: Sequence[Sequence[int]], b_P: Sequence[Sequence[int]]) -> Paired:
    """Compare two models on the same problems: mean accuracy of b less that of a.

    Args:
        a_P: Per problem the numbers of samples and of right samples of the first model.
        b_P: The same of the second model.
    """
    differences = []
    denominator = 1  # with it every difference is a whole number
    for (n_a, correct_a), (n_b, correct_b) in zip(a_P, b_P, strict=True):
        differences.append(correct_b / n_b - correct_a / n_a)
        denominator = math.lcm(denominator, n_a, n_b)
    difference_P = np.array(differences)
    low_X, high_X = intervals(difference_P[:, None], lowest=-1.0)
    return {
        "problems": len(difference_P),
        "difference": float(difference_P.mean()),
        "low": float(low_X[0]),
        "high": float(high_X[0]),
        "p": sign_flip_p([round(d * denominator) for d in differences]),
        "better": int((difference_P > 0).sum()),
        "worse": int((difference_P < 0).sum()),
    }


Counts = Mapping[Any, tuple[int, int]]  # {problem: (samples, right samples)}


def half_width(n: int, deviation: float = 1.0) -> float:
    """Half of the 95 % interval of a mean of n values by Student's t, by their deviation."""
    return student_t(1 - ALPHA / 2, n - 1) * deviation / math.sqrt(n)


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t.

    The width is 0 where seeds say nothing, because there is one or all agree.
    """
    mean = statistics.mean(values or [0.0])
    if len(values) < 2:
        return mean, 0.0
    return mean, half_width(len(values), statistics.stdev(values))


def difference(ours: Mapping[Any, Counts], theirs: Mapping[Any, Counts]) -> dict[str, Any] | None:
    """The accuracy of one arm less that of another, both {seed: Counts}; None without problems.

    Compared are the problems that all of them have, seed by seed where both have the same seeds.

    Returns:
        What `paired` says of the seeds pooled; "each": the difference of every seed; "figure": it
        [mean, low, high], the bounds being those over problems and those over seeds together: their
        half-widths squared and added.
    """
    shared = [seed for seed in ours if seed in theirs]
    ours_S = [ours[seed] for seed in shared or ours]
    theirs_S = [theirs[seed] for seed in shared or theirs]
    problems = set.intersection(*map(set, ours_S + theirs_S)) if ours_S and theirs_S else set()
    if not problems:
        return None
    ours_SP2, theirs_SP2 = _array(ours_S, problems), _array(theirs_S, problems)
    found = paired(theirs_SP2.sum(0).tolist(), ours_SP2.sum(0).tolist())
    each = []
    if shared:
        accuracy_SP = ours_SP2[..., 1] / ours_SP2[..., 0]
        each = (accuracy_SP - theirs_SP2[..., 1] / theirs_SP2[..., 0]).mean(1).tolist()
    mean, low, high = found["difference"], found["low"], found["high"]
    _, reach = over_seeds(each)
    below, above = math.hypot(mean - low, reach), math.hypot(high - mean, reach)
    return {
        **found,
        "figure": [mean, max(-1.0, mean - below), min(1.0, mean + above)],
        "each": each,
        "over_problems": [low, high],
        "over_seeds": [max(-1.0, mean - reach), min(1.0, mean + reach)] if reach else None,
    }


def _array(counts_S, problems):
    """Samples and right samples of each problem, for each seed."""
    return np.array([[found[p] for p in sorted(problems)] for found in counts_S])
