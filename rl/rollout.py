"""From prompts to completions to rewards to batches: the sources that train on sampled text.

`Rollouts` is the source of `kd` on text that a model writes, `SampledKDRollouts` that of `kd` by
sampled tokens, `GRPORollouts` that of `grpo`. The `rollout` method of each lists its stages. A fork
edits a stage or what it calls: rl/reward.py, rl/advantage.py, rl/logprobs.py.

What is sampled depends on the seed and the prompt's position alone: every sample has its own random
numbers, whatever rank or batch it is generated in. Legend: G samples of a prompt.
"""

import copy
import hashlib
import random
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from data.batch import Document, GlobalBatch, Metrics
from data.dataset import Dataset, DataStream
from data.tasks import Example, grade_all
from errors import UserError
from files import Fields, reason
from model import parallel
from model.flops import forward_flops, generation_flops
from model.generate import Completion, Engine, generate
from model.transformer import Transformer
from progress import Progress
from rl.advantage import against_the_unlikely, group_advantages, has_reward_spread, kl_advantages
from rl.logprobs import add_logprobs, add_teacher_logprobs, add_tis_weights, kl_penalty
from rl.reward import Reward
from rl.sample import RolloutConfig, Sample, sample_line


class Rollouts(Iterator[GlobalBatch]):
    """Endless batches of completions that `generator` samples for the prompts of a dataset.

    `cost` counts their tokens and FLOPs; what teachers read and write are teacher tokens, too.
    """

    def __init__(
        self,
        dataset: Dataset,
        generator: Transformer,
        config: RolloutConfig,
        teachers: Sequence[Transformer] = (),
    ):
        self.dataset, self.generator, self.config = dataset, generator, config
        self.engine = Engine(generator)
        self.teachers = teachers
        self.prompt_order = dataset.order(config.prompt_seed)
        self.position = 0  # of the next prompt
        self.number = 0  # of the next rollout
        self.pending: list[GlobalBatch] = []
        self.cost: dict[str, float] = defaultdict(int)

    def __next__(self) -> GlobalBatch:
        if not self.pending:
            started = time.perf_counter()
            self.pending = self.rollout()
            self.number += 1
            self.pending[0].metrics["rollout/seconds"] = (time.perf_counter() - started, 1)
        batch, *self.pending = self.pending  # a new list: a copy of this source keeps the old one
        return batch

    def rollout(self) -> list[GlobalBatch]:
        """The batches of one rollout; here a single one, of plain text."""
        return [self.batch(self.draw(self.config.prompts_per_batch))]

    def draw(self, prompts: int) -> list[Sample]:
        """This rank's samples of the next prompts, rewarded. An error is raised on all ranks."""
        positions = range(self.position, self.position + prompts)
        self.position = positions.stop
        with parallel.as_one():
            samples = self.sample(positions[self.config.rank :: self.config.world])
            self.add_rewards(samples)
        return samples

    def sample(self, positions: Sequence[int]) -> list[Sample]:
        """G completions of the prompt at each position, one prompt after the other."""
        samples, progress = [], self.progress("prompts", len(positions), "prompts")
        for position in positions:
            progress.add(1)
            example = self.dataset.example(self.prompt_order(position))
            prompt = self.dataset.formatter.prompt(example)
            teacher, teacher_prompt = 0, None
            if self.config.taught:
                teacher, teacher_prompt = self.dataset.teaching(example)
            if self.config.continues:
                prefix = self.dataset.prefix(self.prompt_order(position))
                prompt = prompt + prefix
                teacher_prompt = teacher_prompt and teacher_prompt + prefix
            for number in range(self.config.samples_per_prompt):
                samples.append(Sample(position, number, example, prompt, teacher, teacher_prompt))
        by_teacher, prompts, seeds = self.is_teacher(self.generator), [], []
        for s in samples:
            prompts.append((by_teacher and s.teacher_prompt) or s.prompt)
            seeds.append(sample_seed(self.config.seed, s.position, s.number))
        completions = self.generate(prompts, seeds)
        for s, completion in zip(samples, completions, strict=True):
            s.completion, s.stopped = completion.tokens, completion.stopped
            document = Document.of_completion(s.prompt, s.completion)
            s.document = document.taught(s.teacher, s.teacher_prompt)
            logp = [0.0] * len(s.prompt) + completion.logp
            s.document.fields["sampler_logp"] = torch.tensor(logp, dtype=torch.float64)
        return samples

    def generate(self, prompts: list[list[int]], seeds: list[int]) -> list[Completion]:
        config, model = self.config, self.generator
        completions = generate(
            self.engine,
            prompts,
            self.token_limit(),
            config.stop_ids,
            vocab=config.vocab_size,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            seeds=seeds,
            batch_size=config.generation_batch,
            progress=self.progress("rollout", len(prompts), "samples"),
        )
        new_tokens = [len(c.tokens) for c in completions]
        self.cost["sampled_tokens"] += sum(new_tokens)
        flops = generation_flops(model, prompts, new_tokens, config.vocab_size)
        self.count(model, sum(new_tokens), flops)
        return completions

    def progress(self, what: str, total: int, unit: str) -> Progress:
        """Of a part of a rollout, at which a signal to stop is looked at."""
        return Progress(what, total, unit, self.config.rank == 0, self.config.halt)

    def token_limit(self) -> int:
        """New tokens of a sample in this rollout, of whose number alone they depend."""
        config = self.config
        if not config.start_tokens:
            return config.max_new_tokens
        done = min(1.0, self.number / max(1, config.rollouts - 1))
        return round(config.start_tokens + done * (config.max_new_tokens - config.start_tokens))

    def add_rewards(self, samples: list[Sample]) -> None:
        """Nothing is rewarded in distillation."""

    def add_logprobs(self, samples: list[Sample], name: str, model: Transformer) -> None:
        """Set the field `name` of the samples' documents to the log-probs of their tokens."""
        batch = GlobalBatch([s.document for s in samples])
        with parallel.as_one():
            add_logprobs(batch, name, model, self.config)
        self.count_forward(model, batch)

    def batch(self, samples: list[Sample]) -> GlobalBatch:
        metrics = length_metrics(samples) | {"rollout/kept": (len(samples), len(samples))}
        return GlobalBatch([self.config.weighting(s.document) for s in samples], metrics)

    def count_forward(self, model: Transformer, batch: GlobalBatch) -> None:
        flops = forward_flops(model, batch.lengths, batch.loss_rows, self.config.vocab_size)
        self.count(model, sum(batch.lengths), flops)

    def count(self, model: Transformer, tokens: int, flops: float) -> None:
        self.cost["flops"] += flops
        if self.is_teacher(model):
            self.cost["teacher_tokens"] += tokens

    def is_teacher(self, model: Transformer) -> bool:
        return any(model is teacher for teacher in self.teachers)

    def take_cost(self) -> dict[str, float]:
        """The cost since this was last called."""
        cost = dict(self.cost)
        self.cost.clear()
        return cost

    def state(self) -> dict:
        return {
            "position": self.position,
            "number": self.number,
            "world": self.config.world,
            "pending": [list(map(_to_json, batch.documents)) for batch in self.pending],
        }

    def load(self, state: dict) -> None:
        fields = Fields(state, "the checkpoint's rollouts")
        pending, world = fields.get("pending", list), fields.get("world", int)
        if pending and world != self.config.world:
            raise UserError(
                f"the checkpoint holds samples of {world} ranks that were not trained on yet: "
                "resume with as many"
            )
        self.position, self.number = fields.get("position", int), fields.get("number", int, 0)
        vocab, teachers = self.generator.config.vocab_size, max(1, len(self.dataset.teachers))
        self.pending = []
        try:
            for saved in pending:
                self.pending.append(GlobalBatch([_from_json(d, vocab, teachers) for d in saved]))
        except (TypeError, ValueError, KeyError, OverflowError) as e:
            fields.refuse(f"a sample that was not trained on yet ({reason(e)})")

    def close(self) -> None:
        """Nothing runs in the background."""


class SampledKDRollouts(Rollouts):
    """On-policy distillation by sampled tokens: the gradient of the reverse KL, on average.

    The advantage of a token is log p_teacher − log p_student; without a teacher, as a control, a
    fixed one against unlikely tokens.
    """

    def rollout(self) -> list[GlobalBatch]:
        samples = self.draw(self.config.prompts_per_batch)
        self.add_logprobs(samples, "old_logp", self.generator)
        batch = GlobalBatch([s.document for s in samples])
        for number, teacher in enumerate(self.teachers):
            own = [d for d in batch.documents if d.teacher == number]
            with parallel.as_one():
                add_teacher_logprobs(own, teacher, self.config)
            self.count_forward(teacher, batch.for_teacher(number))
        for sample in samples:
            fields = sample.document.fields
            if self.teachers:
                fields["advantage"] = fields.pop("teacher_logp") - fields["old_logp"]
            else:
                own = against_the_unlikely(fields["old_logp"].numpy(), sample.document.weights)
                fields["advantage"] = torch.from_numpy(own)
        return [self.batch(samples)]


class GRPORollouts(Rollouts):
    """Groups of G samples of a prompt with rewards, and the log-probs that their loss reads."""

    def __init__(
        self,
        dataset: Dataset,
        policy: Transformer,
        config: RolloutConfig,
        reward: Reward,
        reference: Transformer | None = None,
    ):
        super().__init__(dataset, policy, config)
        self.reward, self.reference = reward, reference
        self.prompts_per_rollout = config.prompts_per_batch * config.minibatches

    def rollout(self) -> list[GlobalBatch]:
        drawn = self.draw(self.prompts_per_rollout)  # prompts, completions, rewards
        samples = self.dynamic_sampling(drawn)
        self.add_policy_logprobs(samples)
        self.add_kl_penalties(samples)
        self.add_advantages(samples)
        self.pace(samples)
        self.mask_truncated(samples)
        batches = self.minibatches(samples)
        batches[0].metrics = self.metrics(drawn, samples)
        batches[0].samples = [_logged(s) for s in drawn[: self.config.logged_samples]]
        return batches

    def add_rewards(self, samples: list[Sample]) -> None:
        grade_all(self.judge, [(s.example, s) for s in samples], self.config.halt)
        progress = self.progress("rewards", len(samples), "samples")
        for sample in samples:  # a function of the user's is called in this thread
            self.grade(sample.example, sample)
            progress.add(1)

    def judge(self, example: Example, sample: Sample) -> None:
        """Set a sample's text and verdict; several threads at a time may do so."""
        sample.text = self.dataset.formatter.tokenizer.decode(
            sample.completion, skip_special=True, before=sample.prompt
        )
        sample.verdict = self.reward.judge(example, sample.text)

    def grade(self, example: Example, sample: Sample) -> None:
        """Set a sample's reward."""
        # Few parts look at the tag with which the prompt may have opened the completion.
        opened = self.dataset.formatter.opened(example) if self.reward.takes("opened") else ""
        toss = random.Random(f"{self.config.seed}/{sample.position}/{sample.number}")
        sample.reward, sample.reward_parts, sample.verdict = self.reward(
            example,
            sample.text,
            len(sample.completion),
            sample.stopped,
            opened,
            coin=toss.random() < 0.5,
            verdict=sample.verdict,
        )
        sample.correctness = self.reward.correctness(sample.reward_parts)

    def dynamic_sampling(self, drawn: list[Sample]) -> list[Sample]:
        """The samples to train on: groups that teach nothing are replaced by fresh ones.

        DAPO, arXiv 2503.14476, eq. 11. What is drawn in their place is appended to `drawn`.
        """
        if not self.config.dynamic_sampling_rounds:
            return drawn
        samples = self.informative(drawn)
        for _ in range(self.config.dynamic_sampling_rounds):
            missing = self.prompts_per_rollout - sum(parallel.gather(len(self.groups(samples))))
            if not missing:
                break
            fresh = self.draw(missing)
            drawn += fresh
            samples += self.informative(fresh)
        return samples

    def informative(self, samples: list[Sample]) -> list[Sample]:
        """The groups in which some samples are more correct than others, and rewarded for it."""
        found = []
        for group in self.groups(samples):
            if _spread(group, "correctness") and _spread(group, "reward"):
                found += group
        return found

    def add_policy_logprobs(self, samples: list[Sample]) -> None:
        if self.config.old_logprobs:
            self.add_logprobs(samples, "old_logp", self.generator)
        if self.reference is not None:
            self.add_logprobs(samples, "ref_logp", self.reference)
        if self.config.tis != "none":
            for sample in samples:
                add_tis_weights(sample.document, self.config)

    def add_kl_penalties(self, samples: list[Sample]) -> None:
        if self.config.kl_penalty_coef:
            for sample in samples:
                sample.kl_penalty = kl_penalty(sample.document, self.config.kl_penalty_coef)

    def add_advantages(self, samples: list[Sample]) -> None:
        """Compare each sample with its group; the KL penalty has a scale of its own."""
        for group in self.groups(samples):
            advantages_G = group_advantages([s.reward for s in group], self.config.advantage)
            advantages_G += kl_advantages([s.kl_penalty for s in group], self.config.advantage)
            for sample, advantage in zip(group, advantages_G.tolist(), strict=True):
                sample.advantage = advantage
                fields = sample.document.fields
                fields["advantage"] = torch.full_like(fields["sampler_logp"], advantage)

    def pace(self, samples: list[Sample]) -> None:
        """Weigh a prompt by p(1 − p), p its share of right samples (PACED, arXiv 2603.11178)."""
        if not self.config.paced:
            return
        for group in self.groups(samples):
            share = float(np.mean([s.verdict.strict for s in group]))
            for sample in group:
                sample.document.weights *= share * (1 - share)

    def mask_truncated(self, samples: list[Sample]) -> None:
        """Take the loss off samples that did not stop, after their part in their groups' means."""
        for sample in samples:
            if self.config.mask_truncated and not sample.stopped:
                sample.document.weights[:] = 0

    def minibatches(self, samples: list[Sample]) -> list[GlobalBatch]:
        """Whole groups in the order of their prompts over all ranks, once for each epoch."""
        own = {s.position for s in samples}
        positions = sorted(set().union(*parallel.gather(own)))
        parts = [[] for _ in range(max(1, min(self.config.minibatches, len(positions))))]
        for sample in samples:
            order = bisect_left(positions, sample.position)
            part = parts[order * len(parts) // len(positions)]
            part.append(self.config.weighting(sample.document))
        return [GlobalBatch(part) for _ in range(self.config.ppo_epochs) for part in parts]

    def groups(self, samples: list[Sample]) -> list[list[Sample]]:
        size = self.config.samples_per_prompt
        return [samples[i : i + size] for i in range(0, len(samples), size)]

    def metrics(self, drawn: list[Sample], samples: list[Sample]) -> Metrics:
        """What was earned, how verdicts differ and how samples end."""
        values = defaultdict(list)
        values["reward"] = [s.reward for s in drawn]
        groups = self.groups(drawn)
        for group in groups:
            values["spread"].append(_spread(group, "reward"))
            values["correctness_spread"].append(_spread(group, "correctness"))
            values["reward_std"].append(np.std([s.reward for s in group]))
        for name in sorted(set().union(*(s.reward_parts for s in drawn))):
            values[f"reward_{name}"] = [s.reward_parts.get(name, 0.0) for s in drawn]
        for s in drawn:
            values["accuracy"].append(s.verdict.strict)
            values["lenient"].append(s.verdict.lenient)
            values["disagree"].append(s.verdict.lenient != s.verdict.strict)
            values["unparsed"].append(not s.verdict.parsed)
        kept = {"rollout/kept": (len(self.groups(samples)), len(groups))}
        return length_metrics(drawn) | _sums(values) | kept


class MixedSource(Iterator[GlobalBatch]):
    """Each batch is from `rollouts` with a probability, else from `data` (GKD, algorithm 1).

    Which one depends on the seed and the batch's number alone (arXiv 2306.13649).
    """

    def __init__(self, data: DataStream, rollouts: Rollouts, on_policy_fraction: float, seed: int):
        self.sources = (data, rollouts)
        self.on_policy_fraction, self.seed, self.count = on_policy_fraction, seed, 0

    def __next__(self) -> GlobalBatch:
        coin = random.Random(f"{self.seed}/{self.count}").random()
        self.count += 1
        return next(self.sources[coin < self.on_policy_fraction])

    def __copy__(self) -> "MixedSource":
        """Where this source is now, whatever is drawn from it later."""
        same = MixedSource(*self.sources, self.on_policy_fraction, self.seed)
        same.sources, same.count = tuple(map(copy.copy, self.sources)), self.count
        return same

    def take_cost(self) -> dict[str, float]:
        return self.sources[1].take_cost()

    def state(self) -> dict:
        return {"count": self.count, "sources": [s.state() for s in self.sources]}

    def load(self, state: dict) -> None:
        fields = Fields(state, "the checkpoint's sources")
        self.count, sources = fields.get("count", int), fields.get("sources", list)
        if len(sources) != len(self.sources):
            fields.refuse(f"another number of them ({len(sources)})")
        for source, saved in zip(self.sources, sources, strict=True):
            source.load(saved)

    def close(self) -> None:
        for source in self.sources:
            source.close()


Source = DataStream | Rollouts | MixedSource  # where the training loop takes batches from


def sample_seed(seed: int, position: int, sample: int) -> int:
    """63 bits that belong to this sample alone."""
    key = f"{seed}/{position}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def _spread(group: list[Sample], name: str) -> bool:
    return has_reward_spread([getattr(s, name) for s in group])


def length_metrics(samples: list[Sample]) -> Metrics:
    tokens = [len(s.completion) for s in samples]
    return _sums({"tokens": tokens, "truncated": [not s.stopped for s in samples]})


def _sums(values: dict[str, list]) -> Metrics:
    return {f"rollout/{name}": (float(np.sum(x)), len(x)) for name, x in values.items()}


def _logged(s: Sample) -> dict:
    reward = {"reward": s.reward, "parts": s.reward_parts}
    return sample_line(s.example, s.text, s.verdict, len(s.completion), s.stopped, **reward)


def _to_json(document: Document) -> dict:
    saved = {
        "tokens": document.tokens.tolist(),
        "weights": document.weights.tolist(),
        "fields": {name: x_T.tolist() for name, x_T in document.fields.items()},
        "teacher": document.teacher,
        "normalizer_weight": document.normalizer_weight,
    }
    if document.teacher_tokens is not None:
        saved["teacher_tokens"] = document.teacher_tokens.tolist()
    return saved


def _from_json(saved: dict, vocab: int, teachers: int) -> Document:
    """What `_to_json` wrote, or a TypeError, ValueError, KeyError or OverflowError."""
    tokens, weights = np.array(saved["tokens"], np.int32), np.array(saved["weights"], np.float64)
    fields = {n: torch.tensor(x, dtype=torch.float64) for n, x in dict(saved["fields"]).items()}
    own = saved["normalizer_weight"]
    document = Document(tokens, weights, fields, own if own is None else float(own))
    seen = tokens
    if "teacher_tokens" in saved:
        document.teacher_tokens = seen = np.array(saved["teacher_tokens"], np.int32)
    document.teacher = int(saved.get("teacher", 0))
    if {weights.shape, *(tuple(x_T.shape) for x_T in fields.values())} != {(len(tokens),)}:
        raise ValueError("fields of other lengths than its tokens")
    if not (np.isfinite(weights).all() and 0 <= document.teacher < teachers):
        raise ValueError("no finite weights, or another teacher")
    if min(tokens.min(), seen.min()) < 0 or max(tokens.max(), seen.max()) >= vocab:
        raise ValueError("an id that is no token")
    return document
