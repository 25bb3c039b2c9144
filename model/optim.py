"""AdamW's parameter groups, the learning-rate schedule, gradient clipping."""

import math

import torch


def build_optimizer(model, lr, betas, eps, weight_decay):
    """Fused AdamW on fp32 master weights, without those that are frozen. Matrices (adapters too) decay; norms, biases and embeddings (a tied
    head with them) do not."""
    decay, keep = [], []
    for name, p in ((name, p) for name, p in model.named_parameters() if p.requires_grad):
        (
            decay if p.dim() == 2 and not name.startswith(("embed_tokens", "lm_head")) else keep
        ).append(p)
    groups = [
        {"params": decay, "weight_decay": weight_decay},
        {"params": keep, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def learning_rate(step, steps, peak, warmup, schedule, floor):
    """Rate of update number `step` (from 0): linear warm-up over `warmup` updates, then constant, linear or cosine down to
    floor · peak at the last update."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    shape = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (floor + (1 - floor) * shape)


@torch.no_grad()
def clip_gradients(model, max_norm):
    """Scale the gradients to a global L2 norm of at most max_norm (0: leave them). Returns (norm, finite).

    Called after the gradient sync, so every rank computes the same norm from the same bits and comes to the same verdict.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = (
        torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)).double())
        if grads
        else torch.zeros(())
    )
    finite = bool(torch.isfinite(norm))
    if finite and max_norm and norm > max_norm:
        torch._foreach_mul_(grads, (max_norm / norm).to(grads[0].dtype))
    return float(norm), finite
