"""Floating-point operations (FLOPs) of generation and training, and the peaks of known GPUs."""

import itertools
from collections.abc import Sequence
from typing import Any

# Dense bf16 FLOP/s with fp32 sums, from NVIDIA's data sheets and architecture papers (half of what
# they state with sparsity), by the device's complete name without "NVIDIA ": cards of one chip
# differ by a factor of two (H100 SXM and PCIe, A10 and A10G, desktop and laptop).
PEAK_FLOPS = {
    "H100 80GB HBM3": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "GH200 480GB": 989e12,
    "GH200 144G HBM3e": 989e12,
    "H800": 989e12,
    "H800 PCIe": 756e12,
    "H20": 148e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "A100-SXM4-40GB": 312e12,
    "A100-SXM4-80GB": 312e12,
    "A100-PCIE-40GB": 312e12,
    "A100-PCIE-80GB": 312e12,
    "A100 80GB PCIe": 312e12,
    "A800-SXM4-40GB": 312e12,
    "A800-SXM4-80GB": 312e12,
    "A800 80GB PCIe": 312e12,
    "A10": 125e12,
    "A10G": 70e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "RTX A6000": 154.8e12,
    "L4": 121e12,
    "L20": 119.5e12,
    "L40": 181e12,
    "L40S": 362e12,
    "RTX 6000 Ada Generation": 364e12,
    "GeForce RTX 5090": 209.5e12,
    "GeForce RTX 4090": 165.2e12,
    "GeForce RTX 3090": 71e12,
}


def peak_flops(name: str) -> float | None:
    """Return the dense bf16 FLOP/s of the GPU of exactly this name, or None if it is not known."""
    return PEAK_FLOPS.get(name.removeprefix("NVIDIA "))


def head_flops(model: Any, rows: int, vocab: int) -> int:
    """Return the FLOPs of the head on `rows` hidden rows."""
    return 2 * rows * model.config.hidden_size * vocab


def forward_flops(model: Any, lengths: Sequence[int], rows: int, vocab: int) -> float:
    """Return the FLOPs of a forward pass.

    Args:
        lengths: Tokens of each document.
        rows: Tokens on which the head runs.
        vocab: Head rows that are used.
    """
    contexts = [_mean_context(lengths, window) for window in model.config.windows or [0]]
    mean_context = sum(contexts) / len(contexts)
    return sum(lengths) * model.flops_per_token(mean_context) + head_flops(model, rows, vocab)


def _mean_context(lengths: Sequence[int], window: int) -> float:
    """Return how many tokens a query sees on average, through a window of so many (0: all)."""
    total = 0.0
    for length in lengths:
        seen = min(length, window) if window else length
        total += seen * seen / 2 + (length - seen) * seen
    return total / max(1, sum(lengths))


def generation_flops(
    model: Any, prompts: Sequence[Sequence[int]], new: Sequence[int], vocab: int
) -> float:
    """Return the FLOPs of generating new[i] tokens after the token ids prompts[i].

    The last token is never read, and a prompt that equals the one before it shares its cache. What
    all prompts begin with is counted for each: only a CPU computes it once.
    """
    read = [len(p) + n - 1 for p, n in zip(prompts, new, strict=True)]
    shared = [len(p) - 1 for before, p in itertools.pairwise(prompts) if p == before]
    return forward_flops(model, read, sum(new), vocab) - forward_flops(model, shared, 0, vocab)


def step_flops(batch: Any, model: Any, teacher: Any, vocab: int, head_passes: int = 0) -> float:
    """Return the FLOPs of this rank's part of an optimizer step.

    The body runs over all tokens, the head over the loss rows only. The backward pass takes twice
    the forward, less the gradients of frozen matrices.

    Args:
        teacher: A model that runs forward only, or None.
        head_passes: How often the head runs over the loss rows before, without gradients (GSPO's
            sequence ratios: once).
    """
    rows = batch.loss_rows
    head = head_flops(model, rows, vocab)
    frozen = [p for p in model.layers.parameters() if p.dim() == 2 and not p.requires_grad]
    spared = 2 * sum(batch.lengths) * sum(p.numel() for p in frozen)
    if not model.head_VD.requires_grad:
        spared += head
    flops = 3 * forward_flops(model, batch.lengths, rows, vocab) + head_passes * head - spared
    return flops + (forward_flops(teacher, batch.lengths, rows, vocab) if teacher else 0)
