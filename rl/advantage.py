"""How much better a sample is than the other samples of its prompt."""

from collections.abc import Sequence

import numpy as np

EPSILON = 1e-4  # beside the deviation of a group's rewards; a group whose rewards are all equal has no advantage at all


def group_advantages(rewards_G, baseline):
    """[G] rewards of one prompt -> [G] advantages; zeros where all rewards are equal.

    std: (r − mean) / (std + 1e-4), std over G−1 (DeepSeekMath, arXiv 2402.03300); mean: r − mean (Dr. GRPO, arXiv 2503.20783);
    leave_one_out: r − mean of the others (RLOO, arXiv 2402.14740).
    """
    rewards_G = np.asarray(rewards_G, np.float64)
    if not has_reward_spread(rewards_G):
        return np.zeros_like(rewards_G)
    return BASELINES[baseline](rewards_G - rewards_G.mean())


def kl_advantages(penalties_G: Sequence[float], baseline: str) -> np.ndarray:
    """What the KL penalties of one prompt's samples add to their advantages.

    That is the group's mean penalty minus each sample's own (of the others only, for leave_one_out),
    and no deviation divides it. The advantages of the task's rewards may be normalised, since only
    their order and proportions matter; a KL penalty is a quantity in nats times beta, and must stay
    proportional to beta. Divided by the deviation of the group's rewards it would not: where all
    samples earn the same, the penalties would be the whole deviation, and hundredths of a nat would
    become advantages of 1 at any beta.

    Args:
        penalties_G: [G] beta times the KL estimate of each sample, in nats.
        baseline: A name in BASELINES.

    Returns:
        [G] advantages, to be added to those of the rewards.
    """
    penalties_G = np.asarray(penalties_G, np.float64)
    centred_G = penalties_G.mean() - penalties_G
    samples = len(penalties_G)
    if baseline == "leave_one_out" and samples > 1:
        centred_G = centred_G * samples / (samples - 1)
    return centred_G


def has_reward_spread(rewards_G):
    """Whether a group can teach anything."""
    return len(rewards_G) > 1 and max(rewards_G) != min(rewards_G)


BASELINES = {
    "std": lambda centred_G: centred_G / (centred_G.std(ddof=1) + EPSILON),
    "mean": lambda centred_G: centred_G,
    "leave_one_out": lambda centred_G: centred_G * len(centred_G) / (len(centred_G) - 1),
}
