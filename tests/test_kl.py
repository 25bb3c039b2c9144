"""The KL to the reference, by estimate and by place: gradients by exact enumeration.

And that it falls where nothing else is rewarded.
"""

import contextlib
import dataclasses
import io
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from data.batch import WEIGHTINGS, Batch, Document
from data.order import EpochOrder
from losses.grpo import KL_ESTIMATORS, GRPOConfig, grpo_loss
from rl.advantage import ADVANTAGES, group_advantages, kl_advantages
from rl.logprobs import kl_penalty
from rl.rollout import GRPORollouts
from rl.sample import RolloutConfig
from run import read_metrics

IDS, STOP, BETA = 3, 2, 0.4
LOSS = dict(variant="token", clip_low=0.2, clip_high=0.28, vocab=IDS)


class Sequences:
    """All sequences of a three-id vocabulary that end with the stop id or at `longest` tokens.

    Policy and reference are free in every context. Sums over `documents`, weighted by their
    probability, are expectations.
    """

    def __init__(self, longest, seed=0):
        gen = torch.Generator().manual_seed(seed)
        inner = [p for n in range(longest) for p in itertools.product(range(STOP), repeat=n)]
        self.contexts = {context: i for i, context in enumerate(inner)}
        self.hidden_PD = torch.randn(
            len(inner), 4, dtype=torch.float64, generator=gen
        ).requires_grad_()
        self.head_VD = torch.randn(IDS, 4, dtype=torch.float64, generator=gen).requires_grad_()
        self.ref_PV = torch.log_softmax(
            torch.randn(len(inner), IDS, dtype=torch.float64, generator=gen), 1
        )
        self.all = []
        for n in range(1, longest + 1):
            for y in itertools.product(range(IDS), repeat=n):
                if STOP not in y[:-1] and (y[-1] == STOP or n == longest):
                    self.all.append(y)
        assert sum(self.probabilities()) == pytest.approx(1, abs=1e-12)

    def log_policy(self):
        return torch.log_softmax(self.hidden_PD @ self.head_VD.T, 1)

    def token_logps(self, y, logp_PV):
        return [logp_PV[self.contexts[y[:t]]][y[t]] for t in range(len(y))]

    def sequence_logp(self, y, logp_PV):
        return sum(self.token_logps(y, logp_PV))

    def documents(self):
        """One per sequence, with a prompt of one id; tokens weigh the sequence's probability."""
        logp_PV, ref_PV, made = self.log_policy().tolist(), self.ref_PV.tolist(), []
        for y, p in zip(self.all, self.probabilities(), strict=True):
            fields = {
                "old_logp": self.token_logps(y, logp_PV),
                "ref_logp": self.token_logps(y, ref_PV),
            }
            fields = {
                name: torch.tensor([0.0, *x], dtype=torch.float64) for name, x in fields.items()
            }
            made.append(Document(np.array([0, *y]), np.array([0.0, *[p] * len(y)]), fields))
        return made

    def loss(self, documents, **arguments):
        """grpo_loss of the documents, divided by their normalizer."""
        rows = []
        for d in documents:
            y = tuple(d.tokens[1:].tolist())
            rows += [self.contexts[y[:t]] for t in range(len(y))]
            rows.append(0)  # the last position predicts nothing
        batch = Batch.pack(documents)
        cfg = GRPOConfig(**LOSS | arguments)
        loss_sum, _ = grpo_loss(self.hidden_PD[rows], self.head_VD, None, batch, cfg)
        return loss_sum / batch.normalizer

    def gradient(self, documents, **arguments):
        """Of grpo_loss (a sum), in the policy's parameters."""
        return self.flat(
            self.loss(documents, **arguments) * sum(d.weights.sum() for d in documents)
        )

    def sampler(self, rng):
        """draw(count) -> documents of that many sequences of the policy as it is now."""
        p, documents = np.array(self.probabilities()), self.documents()
        for d in documents:
            d.weights[1:] = 1.0

        def draw(count):
            drawn = [documents[i] for i in rng.choice(len(documents), count, p=p / p.sum())]
            return [dataclasses.replace(d, fields=dict(d.fields)) for d in drawn]

        return draw

    def probabilities(self):
        logp_PV = self.log_policy().tolist()
        return [math.exp(self.sequence_logp(y, logp_PV)) for y in self.all]

    def flat(self, value):
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(value, (self.hidden_PD, self.head_VD))]
        )

    def sequence_kl(self, forward=False):
        """KL(policy ‖ reference) of whole sequences; forward: KL(reference ‖ policy)."""
        logp_PV = self.log_policy()
        total = 0.0
        for y in self.all:
            log_p, log_q = self.sequence_logp(y, logp_PV), self.sequence_logp(y, self.ref_PV)
            total = total + (
                log_q.exp() * (log_q - log_p) if forward else log_p.exp() * (log_p - log_q)
            )
        return total

    def next_token_kl(self, forward=False):
        """The KL of the next token, over the contexts that the policy reaches.

        How often it reaches them has no gradient.
        """
        logp_PV = self.log_policy()
        a_PV, b_PV = (self.ref_PV, logp_PV) if forward else (logp_PV, self.ref_PV)
        kl_P = (a_PV.exp() * (a_PV - b_PV)).sum(1)
        total = 0.0
        for context, i in self.contexts.items():
            reached = self.sequence_logp(context, logp_PV.detach())
            total = total + (reached.exp() if context else 1.0) * kl_P[i]
        return total

    def rewarded(self, estimate):
        """The gradient of a run whose reward is −BETA · the estimate, summed over a sample."""
        documents = self.documents()
        for d in documents:
            loss = penalty(d, estimate, BETA)
            # a baseline changes nothing on average
            d.fields = {"advantage": torch.full((len(d),), 0.7 - loss, dtype=torch.float64)}
        return self.gradient(documents)

    def in_loss(self, estimate):
        documents = self.documents()
        for d in documents:
            d.fields = {
                "advantage": torch.zeros(len(d), dtype=torch.float64),
                "ref_logp": d.fields["ref_logp"],
            }
        return self.gradient(documents, kl_coef=BETA, kl_estimator=estimate)


def assert_same(got, want):
    """Norm ratio 1 and cosine 1."""
    assert float(got.norm() / want.norm()) == pytest.approx(1, abs=1e-10)
    assert float(got @ want / got.norm() / want.norm()) == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("longest", [1, 2, 3])
def test_k1_in_the_reward_is_the_gradient_of_the_kl_of_whole_sequences(longest):
    world = Sequences(longest)
    assert_same(world.rewarded("k1"), BETA * world.flat(world.sequence_kl()))


def test_other_estimates_in_the_reward_are_the_gradient_of_something_else():
    world = Sequences(1)
    both = world.flat(world.sequence_kl()) - world.flat(world.sequence_kl(forward=True))
    assert_same(world.rewarded("k3"), BETA * both)
    right = BETA * world.flat(world.sequence_kl())
    for estimate in ("k2", "k3"):
        assert float((world.rewarded(estimate) - right).norm() / right.norm()) > 0.1


@pytest.mark.parametrize("longest", [1, 2, 3])
def test_estimates_in_the_loss_are_gradients_of_the_next_tokens_kl(longest):
    """k2: of KL(policy ‖ reference), k3: of KL(reference ‖ policy), k1: of nothing.

    For one token that is the whole KL; for several, how the policy comes to its contexts has no
    part in it.
    """
    world = Sequences(longest)
    assert_same(world.in_loss("k2"), BETA * world.flat(world.next_token_kl()))
    assert_same(world.in_loss("k3"), BETA * world.flat(world.next_token_kl(forward=True)))
    assert world.in_loss("k1").norm() < 1e-12
    assert world.next_token_kl().item() == pytest.approx(
        world.sequence_kl().item(), rel=1e-12
    )  # the chain rule, in value
    if longest == 1:
        assert_same(world.in_loss("k2"), BETA * world.flat(world.sequence_kl()))
        assert_same(world.in_loss("k3"), BETA * world.flat(world.sequence_kl(forward=True)))
    else:
        whole = BETA * world.flat(world.sequence_kl())
        assert float((world.in_loss("k2") - whole).norm() / whole.norm()) > 0.01


# --- training on nothing but the KL ---------------------------------------------------------------


def penalty(document, estimate, beta=1.0):
    """What the KL in the reward costs a sample, or would cost by an estimate that is refused."""
    if estimate == "k1":
        return kl_penalty(document, beta)
    gaps = document.fields["old_logp"] - document.fields["ref_logp"]
    return beta * float(KL_ESTIMATORS[estimate](gaps).sum())


def trained(place, estimate, seed, steps=100, groups=2, samples=8):
    """(KL of whole sequences before, after) of GRPO steps on samples without reward, at beta 1."""
    world, rng = Sequences(3, seed), np.random.default_rng(seed)
    optimizer = torch.optim.Adam([world.hidden_PD, world.head_VD], lr=0.03)
    before = world.sequence_kl().item()
    for _ in range(steps):
        documents, draw = [], world.sampler(rng)
        for _ in range(groups):
            group = draw(samples)
            advantages_G = group_advantages([0.0] * samples, "std")
            if place == "reward":
                advantages_G = advantages_G + kl_advantages(
                    [penalty(d, estimate) for d in group], "std"
                )
            for d, advantage in zip(group, advantages_G, strict=True):
                d.fields["advantage"] = torch.full((len(d),), advantage, dtype=torch.float64)
            documents += group
        optimizer.zero_grad()
        world.loss(documents, kl_coef=float(place == "loss"), kl_estimator=estimate).backward()
        optimizer.step()
    return before, world.sequence_kl().item()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("place,estimate", [("reward", "k1"), ("loss", "k2"), ("loss", "k3")])
def test_the_kl_falls_where_nothing_else_is_rewarded(place, estimate, seed):
    before, after = trained(place, estimate, seed)
    assert after < before / 5


@pytest.mark.parametrize("place,estimate", [("reward", "k2"), ("reward", "k3"), ("loss", "k1")])
def test_what_is_refused_does_not_take_it_down(place, estimate):
    """Or what is refused would not have to be."""
    ratios = [
        after / before for before, after in (trained(place, estimate, seed) for seed in range(3))
    ]
    assert min(ratios) > 0.5 and max(ratios) > 1


class Given(GRPORollouts):
    """A group of samples of the policy, with the rewards and log-probs that are given."""

    group: list
    rewards: tuple

    def generate(self, prompts, seeds):
        return [
            SimpleNamespace(tokens=d.tokens[1:].tolist(), logp=[0.0] * (len(d) - 1), stopped=True)
            for d in self.group
        ]

    def add_rewards(self, samples):
        for sample, reward in zip(samples, self.rewards, strict=True):
            sample.reward = reward
            sample.reward_parts = {"accuracy": reward}

    def add_policy_logprobs(self, samples):
        for sample, given in zip(samples, self.group, strict=True):
            sample.document.fields |= given.fields


class OnePrompt:
    formatter = SimpleNamespace(prompt=lambda example: [0])

    def __len__(self):
        return 1

    def order(self, seed):
        return EpochOrder(1, seed)

    def example(self, index):
        return SimpleNamespace(question="", answer="")


def kl_gradient(beta, baseline, rewards=(1.0,) * 8):
    """(gradient of a group's step with the KL in the reward, the rollout's batch)."""
    world = Sequences(3)
    config = RolloutConfig(
        prompts_per_batch=1,
        samples_per_prompt=len(rewards),
        weighting=WEIGHTINGS["token"],
        max_new_tokens=3,
        stop_ids=[STOP],
        vocab_size=IDS,
        advantage=baseline,
        kl_penalty_coef=beta,
    )
    source = Given(OnePrompt(), None, config, reward=None)
    source.group = world.sampler(np.random.default_rng(1))(len(rewards))
    source.rewards = rewards
    batch = next(source)
    return world.gradient(batch.documents), batch


@pytest.mark.parametrize("baseline", ADVANTAGES)
def test_a_kl_in_the_reward_is_proportional_to_beta(baseline):
    """Where rewards are equal nothing else has a gradient, and no baseline may normalise it."""
    one, batch = kl_gradient(1.0, baseline)
    assert float(one.norm()) > 1e-3
    for beta in (1e-4, 0.02, 7.0):
        other, _ = kl_gradient(beta, baseline)
        assert_same(other, beta * one)
    assert kl_gradient(0.0, baseline)[0].norm() == 0
    assert batch.metrics["rollout/spread"] == (0.0, 1)
    assert batch.metrics["rollout/reward"] == (8.0, 8)


@pytest.mark.parametrize(
    "baseline,of_rewards,times",
    [
        # rewards 1 −1 −1 1: mean 0, variance over G − 1: 4/3
        ("std", 1 / (math.sqrt(4 / 3) + 1e-4), 1.0),
        ("mean", 1.0, 1.0),
        ("leave_one_out", 4 / 3, 4 / 3),
        ("maxrl", 0.0, 1.0),  # a mean of 0 teaches nothing
    ],
)
def test_advantages_of_rewards_and_penalties_by_hand(baseline, of_rewards, times):
    rewards, penalties = [1.0, -1.0, -1.0, 1.0], [0.5, 0.1, -0.3, 0.1]  # mean penalty 0.1
    got = group_advantages(rewards, baseline) + kl_advantages(penalties, baseline)
    from_kl = [-0.4 * times, 0.0, 0.4 * times, 0.0]
    assert got == pytest.approx(
        [sign * of_rewards + kl for sign, kl in zip((1, -1, -1, 1), from_kl, strict=True)],
        rel=1e-12,
    )


@pytest.mark.parametrize("baseline", ADVANTAGES)
def test_a_rollouts_advantages_are_those_of_rewards_less_the_kl(baseline):
    """By the definition, from log-probs; penalties are small beside the rewards' deviation."""
    rewards = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    _, batch = kl_gradient(0.1, baseline, rewards)
    penalties = [
        0.1 * float((d.fields["old_logp"] - d.fields["ref_logp"]).sum()) for d in batch.documents
    ]
    divisors = {"std": np.std(rewards, ddof=1) + 1e-4, "maxrl": np.mean(rewards)}
    deviation = divisors.get(baseline, 1.0)
    for i, d in enumerate(batch.documents):
        others = [j for j in range(8) if j != i] if baseline == "leave_one_out" else list(range(8))
        of_task = (rewards[i] - np.mean([rewards[j] for j in others])) / deviation
        of_kl = penalties[i] - np.mean([penalties[j] for j in others])
        want = pytest.approx(np.full(len(d), of_task - of_kl), rel=1e-9, abs=1e-12)
        assert d.fields["advantage"].numpy() == want
    assert np.std(penalties) > 1e-3


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """(checkpoint of a reference, one of a policy that was moved away from it).

    The policy was trained on the same problems in another style.
    """
    cwd = tmp_path_factory.mktemp("moved")
    common = [
        "--mode=sft",
        "--device=cpu",
        "--eval_examples=0",
        "--save_every=0",
        "--batch_size=16",
    ]
    first = ["--model=tiny-teacher", "--data=word_problems:400", "--steps=100", "--lr=3e-3"]
    ref = cwd / "runs/ref/checkpoints/step-100"
    second = [f"--model={ref}", "--data=word_problems_talk:200", "--steps=20", "--lr=3e-4"]
    with contextlib.chdir(cwd), contextlib.redirect_stdout(io.StringIO()):
        assert train.main([*common, *first, "--name=ref"]) == 0
        assert train.main([*common, *second, "--batch_size=8", "--name=policy"]) == 0
    return ref, cwd / "runs/policy/checkpoints/step-20"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "args",
    [["--grpo_kl_in=reward"], ["--grpo_kl_estimator=k2"], ["--grpo_kl_estimator=k3"]],
    ids=["reward", "k2", "k3"],
)
def test_a_run_with_a_zero_reward_goes_back_to_its_reference(moved, tmp_path, args, seed):
    (tmp_path / "zero.py").write_text("def zero(example, completion):\n    return 0.0\n")
    ref, policy = moved
    args = [
        *args,
        "--mode=grpo",
        "--device=cpu",
        f"--model={policy}",
        f"--reference={ref}",
        "--grpo_kl_coef=1",
        f"--grpo_reward={tmp_path}/zero.py:zero",
    ]
    args += [
        "--steps=120",
        "--batch_size=16",
        "--grpo_samples=4",
        "--sample_tokens=10",
        "--warmup=5",
        "--schedule=constant",
        "--eval_examples=0",
    ]
    with contextlib.chdir(tmp_path), contextlib.redirect_stdout(io.StringIO()):
        assert train.main([*args, f"--seed={seed}", "--save_every=0", "--name=r"]) == 0
    kl = [m["train/ref_kl"] for m in read_metrics(tmp_path / "runs/r") if "train/ref_kl" in m]
    first, last = np.mean(kl[:5]), np.mean(kl[-5:])
    # seen with -s, and in the log of a failure
    print(f"{args[0]} seed {seed}: {first:.3f} -> {last:.3f}")
    assert last < first / 4
