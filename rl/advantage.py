"""How much better a sample is than the other samples of its prompt. G: samples of a prompt."""

from collections.abc import Callable, Sequence

import numpy as np

from plugins import Table

EPSILON = 1e-4  # added to the standard deviation of a group's rewards


def has_reward_spread(rewards_G: Sequence[float]) -> bool:
    """Whether some samples are better than others; a group where none is teaches nothing."""
    return len(rewards_G) > 1 and max(rewards_G) != min(rewards_G)


def unscaled(rewards_G: np.ndarray) -> np.ndarray:
    """r − mean (Dr. GRPO, arXiv 2503.20783)."""
    return rewards_G - rewards_G.mean()


def standardised(rewards_G: np.ndarray) -> np.ndarray:
    """(r − mean) / (std + 1e-4), std over G−1 (DeepSeekMath, arXiv 2402.03300)."""
    centred_G = unscaled(rewards_G)
    return centred_G / (centred_G.std(ddof=1) + EPSILON)


def leave_one_out(rewards_G: np.ndarray) -> np.ndarray:
    """r − mean of the others (RLOO, arXiv 2402.14740)."""
    return unscaled(rewards_G) * len(rewards_G) / (len(rewards_G) - 1)


def maximum_likelihood(rewards_G: np.ndarray) -> np.ndarray:
    """(r − mean) / mean, 0 where that is not positive (MaxRL, arXiv 2602.02710)."""
    mean = rewards_G.mean()
    return unscaled(rewards_G) / mean if mean > 0 else np.zeros_like(rewards_G)


# advantage(rewards_G) -> advantages_G
ADVANTAGES: Table[Callable[[np.ndarray], np.ndarray]] = Table(
    "advantage",
    "rewards_G",
    {
        "std": standardised,
        "mean": unscaled,
        "leave_one_out": leave_one_out,
        "maxrl": maximum_likelihood,
    },
)


def group_advantages(rewards_G: Sequence[float], kind: str) -> np.ndarray:
    """Advantages [G] of one prompt's rewards; zeros where all are equal.

    A KL in the reward adds to them on a scale of its own: `kl_advantages`.

    Args:
        rewards_G: [G] rewards of the samples.
        kind: A name in ADVANTAGES. A plugin adds its own function of the rewards there.
    """
    if not has_reward_spread(rewards_G):
        return np.zeros(len(rewards_G))
    return ADVANTAGES[kind](np.asarray(rewards_G, np.float64))


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
    costs_G = -np.asarray(penalties_G, np.float64)
    if kind == "leave_one_out" and len(costs_G) > 1:
        return leave_one_out(costs_G)
    return unscaled(costs_G)


def against_the_unlikely(logp_T: np.ndarray, weights_T: np.ndarray) -> np.ndarray:
    """Advantages [T] of a document's tokens from their log-probs alone: no reward, no teacher.

    −1/2 on the least likely fifth of the trained tokens, 0 on the others: the control of 'Does
    On-Policy Distillation Really Distill?' (arXiv 2608.31046, section 3.2).
    """
    limit = np.quantile(logp_T[weights_T != 0], 0.2)
    return np.where((weights_T != 0) & (logp_T <= limit), -0.5, 0.0)
