"""From prompts to samples to rewards to batches: the source of `grpo`, and of `kd` on prefixes that a model writes itself.

A rollout draws whole groups (the samples of one prompt), deals them out to ranks, and is spent over one or several batches. What is
drawn depends on (seed, position) alone: every sample has its own random numbers, whatever rank or batch it is generated in.
"""

import dataclasses
import hashlib
import random
import time
from collections.abc import Iterator

import numpy as np

from data.batch import Batch, Document
from data.tasks import grade_all
from errors import RunFailed, UserError
from model import parallel
from rl.advantage import group_advantages, has_reward_spread, kl_advantages


@dataclasses.dataclass
class Group:
    """A prompt's samples. judged: per sample (reward, {part: value}, verdict, text), or [] where nothing is rewarded.
    correctness: per sample what its reward says of that alone."""

    position: int
    example: object
    prompt: list
    completions: list
    judged: list
    correctness: list

    @property
    def rewards(self):
        return [reward for reward, *_ in self.judged]

    def teaches(self):
        """Whether dynamic sampling keeps the group: some samples are better than others, by their
        correctness (DAPO, arXiv 2503.14476, eq. 11), and their rewards say so."""
        return has_reward_spread(self.correctness) and has_reward_spread(self.rewards)


class Rollouts(Iterator):
    """Endless batches of `per_batch` groups over all ranks.

    prompt_at(position) -> (example, ids); write(prompts, seeds) -> completions; judge(example, completion) -> (reward, parts, verdict,
    text) or None; score(documents) adds their fields of trainer log-probs in place, or None; price(document) is a penalty in
    nats, a KL to the reference, that is taken off its reward on a scale of its own (`kl_advantages`). weighting: as in `data.batch`. A rollout
    serves `updates` batches, `epochs` times over. refills: how often at most groups that do not teach (`Group.teaches`) are replaced by
    fresh ones (dynamic sampling). correctness(parts) -> what a sample's reward says of its correctness; None: the whole reward.
    mask_truncated: a sample that did not stop carries no loss and counts in no divisor; its reward stays in its group's mean.
    """

    def __init__(
        self,
        prompt_at,
        write,
        judge,
        score,
        *,
        per_batch,
        samples,
        seed,
        weighting,
        baseline="std",
        updates=1,
        epochs=1,
        refills=0,
        mask_truncated=False,
        price=None,
        correctness=None,
        logged=8,
        rank=0,
        world=1,
    ):
        self.prompt_at, self.write, self.judge, self.score = prompt_at, write, judge, score
        self.per_batch, self.samples, self.seed, self.weighting, self.baseline = (
            per_batch,
            samples,
            seed,
            weighting,
            baseline,
        )
        self.updates, self.epochs, self.refills, self.mask_truncated = (
            updates,
            epochs,
            refills,
            mask_truncated,
        )
        self.price, self.correctness = price, correctness
        self.logged, self.rank, self.world = logged, rank, world
        self.position, self.pending = 0, []

    def __next__(self):
        if not self.pending:
            began = time.perf_counter()
            groups, order, drawn = self._draw()
            batches = self._batches(groups, order)
            metrics, samples = (
                self._audit(drawn),
                self._samples(drawn[: -(-self.logged // self.samples)]),
            )
            metrics["rollout/kept"] = (len(groups), len(drawn))
            batches[0] = dataclasses.replace(batches[0], metrics=metrics, samples=samples)
            batches[0].metrics["rollout/seconds"] = (time.perf_counter() - began, 1)
            self.pending = batches * self.epochs
            self.pending[1:] = [
                dataclasses.replace(b, metrics={}, samples=[]) for b in self.pending[1:]
            ]
        return self.pending.pop(0)

    def state(self):
        return {
            "position": self.position,
            "world": self.world,
            "pending": [[_as_lists(d) for d in batch.documents] for batch in self.pending],
        }

    def load(self, state):
        if state["pending"] and state["world"] != self.world:
            raise UserError(
                f"the checkpoint holds unspent samples of {state['world']} ranks: resume with as many"
            )
        self.position = state["position"]
        self.pending = [
            Batch.pack(_from_lists(d) for d in documents) for documents in state["pending"]
        ]

    def close(self):
        """Nothing runs in the background."""

    def _draw(self):
        """(this rank's groups to train on, the positions of all ranks' such groups in order, all groups that this rank drew)."""
        wanted, groups, kept, drawn = self.per_batch * self.updates, [], [], []
        for _ in range(1 + self.refills):
            positions = range(self.position, self.position + wanted - len(kept))
            self.position = positions.stop
            fresh, error = [], None
            try:
                fresh = self._groups(positions[self.rank :: self.world])
            except (
                UserError,
                RunFailed,
            ) as e:  # a reward of the user's, say: every rank must hear of it
                error = e
            parallel.raise_on_all(error)
            drawn += fresh
            groups += (good := [g for g in fresh if not self.refills or g.teaches()])
            kept += sorted(p for part in parallel.gather([g.position for g in good]) for p in part)
            if len(kept) == wanted:
                break
        return groups, kept, drawn

    def _groups(self, positions):
        prompts = [self.prompt_at(p) for p in positions]
        jobs = [(p, s) for p in positions for s in range(self.samples)]
        seeds = [sample_seed(self.seed, p, s) for p, s in jobs]
        done = self.write([ids for _, ids in prompts for _ in range(self.samples)], seeds)
        examples = [example for example, _ in prompts for _ in range(self.samples)]
        judged = grade_all(self.judge, list(zip(examples, done))) if self.judge else []
        groups = []
        for i, (position, (example, ids)) in enumerate(zip(positions, prompts)):
            own = slice(i * self.samples, (i + 1) * self.samples)
            correctness = [self._correctness(j) for j in judged[own]]
            groups.append(Group(position, example, ids, done[own], judged[own], correctness))
        return groups

    def _correctness(self, judged):
        reward, parts, *_ = judged
        return self.correctness(parts) if self.correctness else reward

    def _batches(self, groups, order):
        """`updates` batches (fewer if groups are) of whole groups, in the order in which they were drawn, whatever rank holds them."""
        batches = [[] for _ in range(max(1, min(self.updates, len(order))))]
        made = [self._documents(g) for g in groups]
        if self.score:
            self.score([d for documents in made for d in documents])
        ordinal = {position: i for i, position in enumerate(order)}
        for group, documents in zip(groups, made):
            if group.judged:
                for d, advantage in zip(documents, self._advantages(group, documents)):
                    d.fields["advantage"] = np.full(len(d), advantage)
            for d, completion in zip(documents, group.completions):
                if (
                    self.mask_truncated and not completion.stopped
                ):  # not earlier: its log-probs have a price
                    d.weights[:] = 0
            batches[ordinal[group.position] * len(batches) // len(order)] += documents
        return [Batch.pack(self.weighting(d) for d in documents) for documents in batches]

    def _advantages(self, group, documents):
        """[G]: of the rewards, normalised as the baseline says; the KL is on its own scale."""
        advantages_G = group_advantages(group.rewards, self.baseline)
        if self.price:
            prices = [self.price(d) for d in documents]
            advantages_G = advantages_G + kl_advantages(prices, self.baseline)
        return advantages_G

    def _documents(self, group):
        made = []
        for completion in group.completions:
            tokens = np.array([*group.prompt, *completion.tokens], np.int32)
            generated = np.arange(len(tokens)) >= len(group.prompt)
            logp = np.zeros(len(tokens))
            logp[generated] = completion.logp
            made.append(Document(tokens, generated.astype(np.float64), {"sampler_logp": logp}))
        return made

    def _audit(self, groups):
        """Metrics of a rollout as (sum, count): what was earned, how verdicts differ, how samples end."""
        completions = [c for g in groups for c in g.completions]
        values = {
            "tokens": [len(c.tokens) for c in completions],
            "truncated": [not c.stopped for c in completions],
        }
        judged = [j for g in groups for j in g.judged]
        if judged:
            values["reward"] = [reward for reward, *_ in judged]
            values["spread"] = [has_reward_spread(g.rewards) for g in groups]
            values["correctness_spread"] = [has_reward_spread(g.correctness) for g in groups]
            values["reward_std"] = [np.std(g.rewards) for g in groups]
            for name in sorted({name for _, parts, *_ in judged for name in parts}):
                values[f"reward_{name}"] = [parts.get(name, 0.0) for _, parts, *_ in judged]
            verdicts = [verdict for *_, verdict, _ in judged]
            values["accuracy"] = [v.strict for v in verdicts]
            values["lenient"] = [v.lenient for v in verdicts]
            values["disagree"] = [v.lenient != v.strict for v in verdicts]
            values["unparsed"] = [not v.parsed for v in verdicts]
        return {f"rollout/{name}": (float(np.sum(v)), len(v)) for name, v in values.items()}

    def _samples(self, groups):
        lines = []
        for g in groups:
            for completion, (reward, parts, verdict, text) in zip(g.completions, g.judged):
                line = dict(
                    question=g.example.question,
                    gold=g.example.answer,
                    text=text,
                    reward=reward,
                    parts=parts,
                )
                line |= dict(correct=verdict.strict, lenient=verdict.lenient, parsed=verdict.parsed)
                lines.append(line | dict(tokens=len(completion.tokens), stopped=completion.stopped))
        return lines[: self.logged]


class Mixed(Iterator):
    """Each batch is from `second` with probability `share`, else from `first`; which one depends on (seed, number) alone (GKD's
    mixture, arXiv 2306.13649, algorithm 1)."""

    def __init__(self, first, second, share, seed):
        self.sources, self.share, self.seed, self.count = (first, second), share, seed, 0

    def __next__(self):
        chosen = self.sources[random.Random(f"{self.seed}/{self.count}").random() < self.share]
        self.count += 1
        return next(chosen)

    def state(self):
        return {"count": self.count, "sources": [s.state() for s in self.sources]}

    def load(self, state):
        self.count = state["count"]
        for source, saved in zip(self.sources, state["sources"]):
            source.load(saved)

    def close(self):
        for source in self.sources:
            source.close()


def sample_seed(seed, position, sample):
    """63 bits that belong to this sample alone."""
    return (
        int.from_bytes(
            hashlib.blake2b(f"{seed}/{position}/{sample}".encode(), digest_size=8).digest(),
            "little",
        )
        >> 1
    )


def _as_lists(d):
    return [
        d.tokens.tolist(),
        d.weights.tolist(),
        {name: x.tolist() for name, x in d.fields.items()},
        d.share,
    ]


def _from_lists(saved):
    tokens, weights, fields, share = saved
    return Document(
        np.array(tokens, np.int32),
        np.array(weights),
        {name: np.array(x) for name, x in fields.items()},
        share,
    )
