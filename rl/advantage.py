"""How much better a sample is than the other samples of its prompt."""

import numpy as np

EPSILON = 1e-4  # beside the deviation of a group's rewards; a group whose rewards are all equal has no advantage at all


def group_advantages(rewards_G, baseline):
    """[G] rewards of one prompt -> [G] advantages; zeros where all rewards are equal.

    std: (r − mean) / (std + 1e-4), std over G−1 (DeepSeekMath, arXiv 2402.03300); mean: r − mean (Dr. GRPO, arXiv 2503.20783);
    leave_one_out: r − mean of the others (RLOO, arXiv 2402.14740).
    """
    rewards_G = np.asarray(rewards_G, np.float64)
    if not spread(rewards_G):
        return np.zeros_like(rewards_G)
    return BASELINES[baseline](rewards_G - rewards_G.mean())


def spread(rewards_G):
    """Whether a group can teach anything."""
    return len(rewards_G) > 1 and max(rewards_G) != min(rewards_G)


BASELINES = {
    "std": lambda centred_G: centred_G / (centred_G.std(ddof=1) + EPSILON),
    "mean": lambda centred_G: centred_G,
    "leave_one_out": lambda centred_G: centred_G * len(centred_G) / (len(centred_G) - 1),
}
