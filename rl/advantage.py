"""How much better a sample is than the other samples of its prompt. G: samples of a prompt."""

from collections.abc import Sequence

import numpy as np

EPSILON = 1e-4  # added to the standard deviation of a group's rewards


def has_reward_spread(rewards_G: Sequence[float]) -> bool:
    """Whether some samples are better than others; a group where none is teaches nothing."""
    return len(rewards_G) > 1 and max(rewards_G) != min(rewards_G)


def standardised(centred_G: np.ndarray) -> np.ndarray:
    """(r − mean) / (std + 1e-4), std over G−1 (DeepSeekMath, arXiv 2402.03300)."""
    return centred_G / (centred_G.std(ddof=1) + EPSILON)


def unscaled(centred_G: np.ndarray) -> np.ndarray:
    """r − mean (Dr. GRPO, arXiv 2503.20783)."""
    return centred_G


def leave_one_out(centred_G: np.ndarray) -> np.ndarray:
    """r − mean of the others (RLOO, arXiv 2402.14740)."""
    return centred_G * len(centred_G) / (len(centred_G) - 1)


ADVANTAGES = {"std": standardised, "mean": unscaled, "leave_one_out": leave_one_out}


def group_advantages(rewards_G: Sequence[float], kind: str) -> np.ndarray:
    """Advantages [G] of one prompt's rewards; zeros where all are equal.

    A KL in the reward adds to them on a scale of its own: `kl_advantages`.

    Args:
        rewards_G: [G] rewards of the samples.
        kind: A name in ADVANTAGES. A fork adds its own function of the centred rewards there.
    """
    if not has_reward_spread(rewards_G):
        return np.zeros(len(rewards_G))
    values_G = np.asarray(rewards_G, np.float64)
    return ADVANTAGES[kind](values_G - values_G.mean())


def kl_advantages(penalties_G: Sequence[float], kind: str) -> np.ndarray:
    """What the KL penalties of one prompt's samples add to their advantages [G].

    That is the group's mean penalty (for leave_one_out: of the others only) minus the sample's own,
    and no deviation divides it. The advantages of the task's rewards may be normalised, since only
    their order and proportions matter; a KL penalty is a quantity in nats times beta, and must stay
    proportional to beta. Divided by the deviation of the group's rewards it would not: where all
    samples earn the same, the penalties would be the whole deviation, and hundredths of a nat would
    become advantages of 1 at any beta.

    Args:
        penalties_G: [G] beta times the KL estimate of each sample, in nats.
        kind: A name in ADVANTAGES.
    """
    values_G = np.asarray(penalties_G, np.float64)
    centred_G = values_G.mean() - values_G
    if kind == "leave_one_out" and len(centred_G) > 1:
        return leave_one_out(centred_G)
    return centred_G
