"""The KL to the reference, by estimate and by place: gradients by exact enumeration, and that it falls when nothing else is rewarded."""

import contextlib
import io
import itertools

import numpy as np
import pytest
import torch

import train
from data.batch import Batch, Document
from eval.report import read_metrics
from losses.grpo import KL_ESTIMATES, grpo_loss
from rl.score import kl_penalty

IDS, STOP, BETA = 3, 2, 0.4
LOSS = dict(variant="token", clip_low=0.2, clip_high=0.28, vocab=IDS)


class Sequences:
    """All sequences of a three-id vocabulary that end with the stop id or at `longest` tokens, under a policy and a reference that are
    free in every context. Sums over `documents`, weighted by their probability, are expectations."""

    def __init__(self, longest):
        gen = torch.Generator().manual_seed(longest)
        inner = [p for n in range(longest) for p in itertools.product(range(STOP), repeat=n)]
        self.contexts = {context: i for i, context in enumerate(inner)}
        self.hidden_PD = torch.randn(len(inner), 4, dtype=torch.float64, generator=gen).requires_grad_()
        self.head_VD = torch.randn(IDS, 4, dtype=torch.float64, generator=gen).requires_grad_()
        self.ref_PV = torch.log_softmax(torch.randn(len(inner), IDS, dtype=torch.float64, generator=gen), 1)
        self.all = []
        for n in range(1, longest + 1):
            for y in itertools.product(range(IDS), repeat=n):
                if STOP not in y[:-1] and (y[-1] == STOP or n == longest):
                    self.all.append(y)
        logp_PV = self.log_policy()
        self.probability = [self.sequence_logp(y, logp_PV).exp().item() for y in self.all]
        assert sum(self.probability) == pytest.approx(1, abs=1e-12)

    def log_policy(self):
        return torch.log_softmax(self.hidden_PD @ self.head_VD.T, 1)

    def token_logps(self, y, logp_PV):
        return [logp_PV[self.contexts[y[:t]], y[t]] for t in range(len(y))]

    def sequence_logp(self, y, logp_PV):
        return sum(self.token_logps(y, logp_PV))

    def documents(self):
        """One per sequence: the prompt is a single id, each token weighs the sequence's probability."""
        logp_PV, made = self.log_policy().detach(), []
        for y, p in zip(self.all, self.probability):
            fields = {"old_logp": self.token_logps(y, logp_PV), "ref_logp": self.token_logps(y, self.ref_PV)}
            fields = {name: np.array([0.0, *map(float, x)]) for name, x in fields.items()}
            made.append(Document(np.array([0, *y]), np.array([0.0, *[p] * len(y)]), fields))
        return made

    def gradient(self, documents, **arguments):
        """Of grpo_loss, in the policy's parameters."""
        hidden = []
        for y in self.all:
            rows = [self.hidden_PD[self.contexts[y[:t]]] for t in range(len(y))]
            hidden += [*rows, torch.zeros(4, dtype=torch.float64)]  # the last position predicts nothing
        loss_sum, _ = grpo_loss(torch.stack(hidden), self.head_VD, None, Batch.pack(documents), **LOSS | arguments)
        return self.flat(loss_sum)

    def flat(self, value):
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, (self.hidden_PD, self.head_VD))])

    def sequence_kl(self, forward=False):
        """KL(policy ‖ reference) of whole sequences by its definition; forward: KL(reference ‖ policy)."""
        logp_PV = self.log_policy()
        total = 0.0
        for y in self.all:
            log_p, log_q = self.sequence_logp(y, logp_PV), self.sequence_logp(y, self.ref_PV)
            total = total + (log_q.exp() * (log_q - log_p) if forward else log_p.exp() * (log_p - log_q))
        return total

    def next_token_kl(self, forward=False):
        """The KL of the next token, over the contexts that the policy reaches; how often it reaches them has no gradient."""
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
            gaps = torch.from_numpy(d.fields["old_logp"] - d.fields["ref_logp"])
            loss = kl_penalty(d, BETA) if estimate == "k1" else BETA * float(KL_ESTIMATES[estimate](gaps).sum())
            d.fields = {"advantage": np.full(len(d), 0.7 - loss)}  # a baseline changes nothing on average
        return self.gradient(documents)

    def in_loss(self, estimate):
        documents = self.documents()
        for d in documents:
            d.fields = {"advantage": np.zeros(len(d)), "ref_logp": d.fields["ref_logp"]}
        return self.gradient(documents, beta=BETA, kl=estimate)


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
    """k2: of KL(policy ‖ reference), k3: of KL(reference ‖ policy), k1: of nothing. For one token that is the whole KL; for several, how
    the policy comes to its contexts has no part in it."""
    world = Sequences(longest)
    assert_same(world.in_loss("k2"), BETA * world.flat(world.next_token_kl()))
    assert_same(world.in_loss("k3"), BETA * world.flat(world.next_token_kl(forward=True)))
    assert world.in_loss("k1").norm() < 1e-12
    assert world.next_token_kl().item() == pytest.approx(world.sequence_kl().item(), rel=1e-12)  # the chain rule, in value
    if longest == 1:
        assert_same(world.in_loss("k2"), BETA * world.flat(world.sequence_kl()))
        assert_same(world.in_loss("k3"), BETA * world.flat(world.sequence_kl(forward=True)))
    else:
        whole = BETA * world.flat(world.sequence_kl())
        assert float((world.in_loss("k2") - whole).norm() / whole.norm()) > 0.01
