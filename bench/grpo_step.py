"""One GRPO step at the full vocabulary on a CPU, split into rollout and update, beside its own matrix products.

    python -m bench.grpo_step --data path/to/gsm8k/train.jsonl --tokenizer path/to/qwen2.5-tokenizer

Policy 4 layers × hidden 256 (random weights), 2 prompts × 8 samples × 128 new tokens (nothing stops early), temperature 1, token-level
loss, no reference, one update, fp32, 2 threads. Rewards are a coin per sample: they cost nothing and give every group a spread. The
products are those that the step cannot avoid, at the same shapes with buffers allocated once: for every new token the body's and the
head's, for the update the head's three (logits, both gradients) and the body's forward and its two gradients. Medians of `--repeats`
steps, interleaved in one process; memory is the process's peak above its resident size before the first step.
"""

import argparse
import functools
import statistics
import sys
import time
from types import SimpleNamespace

import numpy as np
import torch

from bench.kd_step import ROOT, load, resident

sys.path.insert(0, str(ROOT))

SAMPLES, NEW, VOCAB_ROWS = 8, 128, 151_936


def prompts_of(args):
    """The first two prompts as token ids, and how many ids the tokenizer has."""
    batch, vocab = load(args.data, args.tokenizer)
    return [
        [int(t) for t, w in zip(d.tokens, d.weights) if not w] for d in batch.documents[:2]
    ], vocab


def products(config, prompt_tokens, rows, steps, chunk):
    """A function that does the matrix products of a rollout and one of those of an update."""
    d, f = config.hidden_size, config.intermediate_size
    qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    shapes = [(d, qkv), (config.num_heads * config.head_dim, d), (d, 2 * f), (f, d)]
    weights = [torch.randn(a, b) for a, b in shapes] * config.num_layers
    head, logits = torch.randn(VOCAB_ROWS, d), torch.empty(chunk, VOCAB_ROWS)

    def body(tokens, times):
        for w in weights:
            x = torch.zeros(tokens, w.shape[0])
            for _ in range(times):
                x @ w

    def rollout():
        body(prompt_tokens, 1)
        x = torch.zeros(rows, d)
        for _ in range(steps):
            body(rows, 1)
            torch.mm(x, head.t(), out=logits[:rows])

    def update():
        n = rows * steps
        body(prompt_tokens * SAMPLES + n, 3)
        hidden, grad_hidden, grad_head = (
            torch.zeros(n, d),
            torch.empty(n, d),
            torch.zeros(VOCAB_ROWS, d),
        )
        for lo in range(0, n, chunk):
            x = hidden[lo : lo + chunk]
            z = torch.mm(x, head.t(), out=logits[: len(x)])
            torch.mm(z, head, out=grad_hidden[lo : lo + chunk])
            torch.addmm(grad_head, z.t(), x, out=grad_head)

    return rollout, update


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    from data.batch import WEIGHTINGS
    from kernels.chunk import default_chunk_rows
    from losses.grpo import GRPOConfig, grpo_loss
    from model.checkpoint import build_model
    from model.optim import build_optimizer, clip_gradients
    from model.transformer import PRESETS
    from rl.rollout import GRPORollouts
    from rl.sample import RolloutConfig
    from train import forward_backward

    prompts, vocab = prompts_of(args)
    model = build_model(PRESETS["small"], None, device="cpu", seed=0)
    optimizer = build_optimizer(model, 1e-6, (0.9, 0.95), 1e-8, 0.0)
    coin = np.random.default_rng(0)

    class CoinRollouts(GRPORollouts):
        def grade(self, example, sample):
            sample.reward = float(coin.integers(2))

    class TwoPrompts:
        """Endless; an example is the prompt itself."""

        formatter = SimpleNamespace(prompt=list)

        def __len__(self):
            return 0

        def example(self, position):
            return prompts[position % 2]

    config = RolloutConfig(
        prompts_per_batch=2,
        samples_per_prompt=SAMPLES,
        weighting=WEIGHTINGS["token"],
        max_new_tokens=NEW,
        stop_ids=[],
        vocab_size=vocab,
        logged_samples=0,
    )
    source = CoinRollouts(TwoPrompts(), model, config, reward=None)
    cfg = GRPOConfig(variant="token", clip_low=0.2, clip_high=0.2, vocab=vocab)
    loss_fn = functools.partial(grpo_loss, cfg=cfg)
    before = resident()

    def rollout():
        source.batch = next(source)

    def update():
        forward_backward(
            model, None, loss_fn, source.batch, source.batch.normalizer, 8192, torch.device("cpu")
        )
        clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    rollout(), update()  # warm-up
    peak = resident(peak=True) - before
    rollout_products, update_products = products(
        model.config,
        sum(map(len, prompts)),
        2 * SAMPLES,
        NEW,
        default_chunk_rows(vocab, torch.device("cpu")),
    )
    parts = {
        "rollout": rollout,
        "update": update,
        "its products, rollout": rollout_products,
        "its products, update": update_products,
    }
    seconds = {name: [] for name in parts}
    for _ in range(args.repeats):
        for name, part in parts.items():
            began = time.perf_counter()
            part()
            seconds[name].append(time.perf_counter() - began)
    print(
        f"{2 * SAMPLES} samples of {NEW} new tokens, prompts of {[len(p) for p in prompts]}, {vocab:,} ids, {args.threads} threads, "
        f"torch {torch.__version__}"
    )
    for name, values in seconds.items():
        print(f"{name:<24}{statistics.median(values):>8.2f} s")
    total = [a + b for a, b in zip(seconds["rollout"], seconds["update"])]
    ratio = [
        t / (a + b)
        for t, a, b in zip(total, seconds["its products, rollout"], seconds["its products, update"])
    ]
    tokens = 2 * SAMPLES * NEW / statistics.median(seconds["rollout"])
    print(
        f"step {statistics.median(total):.2f} s, {statistics.median(ratio):.2f}x its products; peak {peak:.2f} GB; rollout {tokens:,.0f} tokens/s"
    )


if __name__ == "__main__":
    main()
