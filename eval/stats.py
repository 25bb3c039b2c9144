"""What a handful of samples says about a model: unbiased estimates, intervals over problems, paired tests.

Problems are the unit: the samples of one problem are alike, so every interval resamples problems and every test flips whole
problems. Legend: P problems, R resamples, X quantities, n samples of a problem.
"""

import math
from collections import Counter
from statistics import NormalDist

import numpy as np

RESAMPLES, BLOCK = 4000, 250
Z = NormalDist()


def pass_at_k(n, correct, k):
    """The chance that one of k of a problem's n samples is right, drawn without putting back: 1 - C(n-c, k) / C(n, k), the
    unbiased estimate of Chen et al. 2021 (arXiv 2107.03374, eq. 1)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority_at_k(votes, correct, k):
    """The chance that the commonest vote of k samples is right, over the disjoint runs of k samples in their order. votes: one
    hashable answer per sample, None for none; of equally common ones each is chosen equally often; without a vote it is wrong."""
    shares = []
    for lo in range(0, len(votes) - k + 1, k):
        right = {v: c for v, c in zip(votes[lo : lo + k], correct[lo : lo + k])}
        counts = Counter(v for v in votes[lo : lo + k] if v is not None)
        best = [v for v, count in counts.items() if count == max(counts.values())]
        shares.append(sum(right[v] for v in best) / len(best) if best else 0.0)
    return sum(shares) / len(shares)


def intervals(values_PX, lowest=0.0, level=0.95, seed=0):
    """(low_X, high_X): bootstrap intervals of the means over problems; values lie between `lowest` and 1.

    Percentiles are taken a little further out than `level` says, by Student's t and √(P/(P-1)): the plain ones are too narrow
    for few problems (Hesterberg 2015, arXiv 1411.5279, "expanded percentile"). Resampling says nothing where all problems agree:
    there the bound is that of P equal outcomes, 1 - (α/2)^(1/P) away. A single problem has no interval (nan).
    """
    values_PX = np.asarray(values_PX, float)
    problems, alpha = len(values_PX), 1 - level
    if problems < 2:
        return np.full((2, values_PX.shape[1]), np.nan)
    rng, means = np.random.default_rng(seed), []
    for _ in range(0, RESAMPLES, BLOCK):
        means.append(
            rng.multinomial(problems, np.full(problems, 1 / problems), size=BLOCK)
            @ values_PX
            / problems
        )
    outer = Z.cdf(-student_t(1 - alpha / 2, problems - 1) * math.sqrt(problems / (problems - 1)))
    low_X, high_X = np.quantile(np.concatenate(means), (outer, 1 - outer), axis=0)
    constant_X, reach = np.ptp(values_PX, axis=0) == 0, 1 - (alpha / 2) ** (1 / problems)
    low_X = np.where(constant_X, np.maximum(lowest, values_PX[0] - reach), low_X)
    return low_X, np.where(constant_X, np.minimum(1.0, values_PX[0] + reach), high_X)


def student_t(p, freedom):
    """The p-quantile of Student's t: exactly for one and two degrees of freedom, else by its expansion around the normal one (Abramowitz &
    Stegun 26.7.5; 0.7 % too small at three)."""
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) * math.sqrt(2 / (1 - (2 * p - 1) ** 2))
    z = Z.inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**i for i, term in enumerate(terms, 1))


def sign_flip_p(differences_P):
    """The exact two-sided p-value that two models are alike: the share of the 2^P ways to swap both models' results, problem by
    problem, that differ in sum at least as much. differences_P: whole numbers (right samples of one less those of the other).

    The distribution of the sum is made by convolution: c problems that differ by a add a · (2j - c) with j binomial. For one
    sample a problem this is McNemar's exact test.
    """
    sizes = Counter(abs(int(d)) for d in differences_P)
    del sizes[0]
    reach = sum(a * c for a, c in sizes.items())
    pmf = np.ones(1)  # of the sum, from -reach to reach
    for a, c in sizes.items():
        flips = np.zeros(2 * a * c + 1)
        flips[:: 2 * a] = [math.comb(c, j) / 2**c for j in range(c + 1)]
        pmf = np.convolve(pmf, flips)
    sums = np.abs(np.arange(-reach, reach + 1))
    return min(1.0, float(pmf[sums >= abs(int(np.sum(differences_P)))].sum()))


def paired(a_P, b_P):
    """Two models on the same problems, each result a (samples, right samples): the difference b - a of mean accuracies, its
    bootstrap interval, the sign-flip p-value, and how many problems each did better on."""
    difference_P = np.array([cb / nb - ca / na for (na, ca), (nb, cb) in zip(a_P, b_P)])
    low, high = (x[0] for x in intervals(difference_P[:, None], lowest=-1.0))
    whole = math.lcm(*(n for pair in (*a_P, *b_P) for n in pair[:1]))
    p = sign_flip_p([round(d * whole) for d in difference_P])
    better = {"better": int((difference_P > 0).sum()), "worse": int((difference_P < 0).sum())}
    return {
        "problems": len(difference_P),
        "difference": float(difference_P.mean()),
        "low": float(low),
        "high": float(high),
        "p": p,
    } | better
