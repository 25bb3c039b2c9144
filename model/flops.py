"""How many floating-point operations generation and training take, and the peaks of known GPUs."""

import itertools

# Dense bf16 FLOP/s summed in fp32, from NVIDIA's data sheets and architecture papers (half of what they
# state with sparsity), by the device's whole name without "NVIDIA ": cards of one chip differ by a factor
# of two (H100 SXM and PCIe, A10 and A10G, desktop and laptop). What is not listed has no known peak.
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


def peak_flops(name):
    """Dense bf16 FLOP/s of the GPU of exactly this name, or None."""
    return PEAK_FLOPS.get(name.removeprefix("NVIDIA "))


def forward_flops(model, lengths, rows, vocab):
    """FLOPs of a forward pass over documents of these lengths, the head on `rows` of their tokens only."""
    context = sum(n * n for n in lengths) / max(1, 2 * sum(lengths))
    return (
        sum(lengths) * model.flops_per_token(context) + 2 * rows * model.config.hidden_size * vocab
    )


def generation_flops(model, prompts, new, vocab):
    """FLOPs of writing new[i] tokens behind prompts[i]: the last one is never read, and a prompt like the one before it shares that one's cache."""
    shared = [len(p) - 1 for before, p in itertools.pairwise(prompts) if p == before]
    read = [len(p) + n - 1 for p, n in zip(prompts, new, strict=True)]
    return forward_flops(model, read, sum(new), vocab) - forward_flops(model, shared, 0, vocab)


def step_flops(batch, model, teacher, vocab, head_passes=0):
    """FLOPs of one step's share: body over all tokens, head over the loss rows only, backward twice the forward but for the gradients of
    frozen matrices. head_passes: how often the head runs over the loss rows before, without gradients (GSPO's sequence ratios: once)."""
    tokens, rows = sum(batch.lengths), batch.loss_rows
    forward = lambda m: forward_flops(m, batch.lengths, rows, vocab)
    spared = (
        2
        * tokens
        * sum(p.numel() for p in model.layers.parameters() if p.dim() == 2 and not p.requires_grad)
    )
    head = 2 * rows * model.config.hidden_size * vocab
    spared += 0 if model.head_VD.requires_grad else head
    return 3 * forward(model) + head_passes * head - spared + (forward(teacher) if teacher else 0)
