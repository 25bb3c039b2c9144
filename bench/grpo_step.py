"""One GRPO step at the full vocabulary on a CPU, in rollout and update, beside its products.

    python -m bench.grpo_step --data path/to/gsm8k/train.jsonl --tokenizer path/to/qwen2.5-tokenizer
    python -m bench.grpo_step --dry       # a tiny body and random prompts: the script itself

Policy 4 layers x hidden 256 (random weights), 2 prompts x 8 samples x 128 new tokens (nothing stops
early), temperature 1, token-level loss, no reference, one update, fp32, 2 threads. Rewards are a
coin per sample: they cost nothing and give every group a spread. The products are those that the
step cannot avoid, at the same shapes with buffers allocated once: for every new token the body's
and the head's, for the update the head's three (logits, both gradients) and the body's forward and
its two gradients. Medians of `--repeats` steps, interleaved in one process; memory is the process's
peak above its resident size before there was an optimizer.
"""

import argparse
import functools
import statistics
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.kd_step import body_products, cpu_parser, load, need_data
from bench.measure import median_ratio, resident_gb, rounds
from data.batch import WEIGHTINGS
from data.order import EpochOrder
from kernels.chunk import default_chunk_rows, product
from kernels.cpu import keep_freed_memory
from losses.grpo import GRPOConfig, grpo_loss
from model.checkpoint import build_model
from model.optim import build_optimizer, clip_gradients
from model.presets import PRESETS
from model.transformer import ModelConfig, Transformer
from rl.rollout import GRPORollouts
from rl.sample import RolloutConfig
from train import forward_backward

Prompts = list[list[int]]


class Size(NamedTuple):
    """Prompts of a step, samples of each, new tokens of a sample, ids of the tokenizer."""

    prompts: int
    samples: int
    new_tokens: int
    vocab: int

    @property
    def rows(self) -> int:
        return self.prompts * self.samples


class CoinRollouts(GRPORollouts):
    """Rewards are a coin per sample."""

    coin = np.random.default_rng(0)

    def judge(self, example: Any, sample: Any) -> None:
        """Nobody asks whether a sample is right."""

    def grade(self, example: Any, sample: Any) -> None:
        sample.reward = float(self.coin.integers(2))


class FixedPrompts:
    """The same prompts over and over, as a dataset; an example is the prompt itself."""

    class formatter:
        prompt = list

    def __init__(self, prompts: Prompts) -> None:
        self.prompts = prompts

    def order(self, seed: int) -> EpochOrder:
        return EpochOrder(0, seed)

    def __len__(self) -> int:
        return 0

    def example(self, position: int) -> list[int]:
        return self.prompts[position % len(self.prompts)]


class GrpoStep:
    """The loop's own rollout and update of a policy."""

    def __init__(
        self,
        model: Transformer,
        prompts: Prompts,
        size: Size,
        micro_tokens: int = 8192,
        stop_ids: Sequence[int] = (),
    ) -> None:
        self.model, self.micro_tokens = model, micro_tokens
        config = RolloutConfig(
            prompts_per_batch=size.prompts,
            samples_per_prompt=size.samples,
            weighting=WEIGHTINGS["token"],
            max_new_tokens=size.new_tokens,
            stop_ids=list(stop_ids),
            vocab_size=size.vocab,
            logged_samples=0,
        )
        dataset: Any = FixedPrompts(prompts)
        no_reward: Any = None  # CoinRollouts asks none
        self.source = CoinRollouts(dataset, model, config, no_reward)
        cfg = GRPOConfig(variant="token", clip_low=0.2, clip_high=0.2, vocab=size.vocab)
        self.loss_fn = functools.partial(grpo_loss, cfg=cfg)
        self.optimizer = build_optimizer(model, 1e-6, (0.9, 0.95), 1e-8, 0.0)
        self.batch: Any = None

    def rollout(self) -> None:
        self.batch = next(self.source)

    def update(self) -> dict:
        """The sums of the loss."""
        device, normalizer = self.model.head_VD.device, self.batch.normalizer
        sums = forward_backward(
            self.model, [], self.loss_fn, self.batch, normalizer, self.micro_tokens, device
        )
        clip_gradients(self.model, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sums


class Products:
    """The matrix products of a rollout and those of an update, by themselves."""

    def __init__(self, config: ModelConfig, prompt_tokens: int, size: Size) -> None:
        self.prompt_tokens, self.size = prompt_tokens, size
        self.config = config
        new = size.rows * size.new_tokens
        self.chunk = default_chunk_rows(size.vocab, new, torch.device("cpu"))
        self.head = torch.randn(config.vocab_size, config.hidden_size)
        self.transposed = self.head.t().contiguous()  # the faster one for few rows
        self.logits = torch.empty(max(self.chunk, size.rows), config.vocab_size)

    def rollout(self) -> None:
        body_products(self.config, self.prompt_tokens, 1)
        x = torch.zeros(self.size.rows, self.head.shape[1])
        for _ in range(self.size.new_tokens):
            body_products(self.config, self.size.rows, 1)
            product(x, self.transposed, self.logits[: self.size.rows])

    def update(self) -> None:
        n = self.size.rows * self.size.new_tokens
        body_products(self.config, self.prompt_tokens * self.size.samples + n, 3)
        hidden = torch.zeros(n, self.head.shape[1])
        grad_hidden, grad_head = torch.empty_like(hidden), torch.empty_like(self.head)
        for start in range(0, n, self.chunk):
            rows = slice(start, start + self.chunk)
            x = hidden[rows]
            z = product(x, self.head.t(), self.logits[: len(x)])
            product(z, self.head, grad_hidden[rows])
            product(z.t(), x, grad_head, add=start > 0)


def inputs(args: argparse.Namespace) -> tuple[Prompts, Size]:
    """The first two prompts as token ids, and the sizes of the step."""
    batch, vocab = load(args)
    prompts = []
    for document in batch.documents[:2]:
        pairs = zip(document.tokens, document.weights, strict=True)
        prompts.append([int(token) for token, weight in pairs if not weight])
    return prompts, Size(2, 8, 4 if args.dry else 128, vocab)


def report(seconds: dict[str, list[float]], size: Size, peak: float) -> None:
    for name, values in seconds.items():
        print(f"{name:<24}{statistics.median(values):>8.2f} s")
    pairs = zip(seconds["rollout"], seconds["update"], strict=True)
    steps = [sum(pair) for pair in pairs]
    pairs = zip(seconds["its products, rollout"], seconds["its products, update"], strict=True)
    products = [sum(pair) for pair in pairs]
    rate = size.rows * size.new_tokens / statistics.median(seconds["rollout"])
    print(
        f"step {statistics.median(steps):.2f} s, {median_ratio(steps, products):.2f}x its "
        f"products; peak {peak:.2f} GB; rollout {rate:,.0f} tokens/s"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = cpu_parser(__doc__ or "")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    need_data(parser, args)
    torch.set_num_threads(args.threads)
    prompts, size = inputs(args)
    model = build_model(PRESETS["tiny" if args.dry else "small"], None, device="cpu", seed=0)
    keep_freed_memory()  # as `train.py` does; what building the model freed is gone
    before = resident_gb()
    step = GrpoStep(model, prompts, size)
    for _ in range(3):  # warm-up; memory that a step frees may not fit what the next one wants
        step.rollout()
        step.update()
    peak = resident_gb(peak=True) - before
    products = Products(model.config, sum(map(len, prompts)), size)
    parts = {
        "rollout": step.rollout,
        "update": step.update,
        "its products, rollout": products.rollout,
        "its products, update": products.update,
    }
    seconds = rounds(parts, args.repeats)
    print(
        f"{size.rows} samples of {size.new_tokens} new tokens, prompts of "
        f"{[len(p) for p in prompts]}, {size.vocab:,} ids, {args.threads} threads, "
        f"torch {torch.__version__}"
    )
    report(seconds, size, peak)
    return 0


if __name__ == "__main__":
    sys.exit(main())
