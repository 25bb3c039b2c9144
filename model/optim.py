"""AdamW's parameter groups, the learning-rate schedule, gradient clipping."""

import copy
import math
from typing import Any

import torch
from torch import nn

from model.sharding import local, norm_over_shards


def build_optimizer(
    model: nn.Module, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """Fused AdamW for the parameters that are trained.

    Matrices (adapters too) decay; norms, biases and embeddings (a tied head with them) do not. Its
    moments are there at once: made at the first update, as AdamW does, they take up places that
    logits leave, which later steps then find too small.
    """
    decay, no_decay = [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.dim() == 2 and not name.startswith(("embed_tokens", "lm_head")):
            decay.append(p)
        else:
            no_decay.append(p)
    groups = [
        {"params": decay, "weight_decay": weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    for p in decay + no_decay:
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        optimizer.state[p] = {"step": step, **moments}
    return optimizer


def average_of(policy: nn.Module) -> Any:
    """A copy of a policy that is to become its moving average; what is frozen is shared."""
    frozen = {id(p): p for p in policy.parameters() if not p.requires_grad}
    return copy.deepcopy(policy, frozen).requires_grad_(False)


@torch.no_grad()
def update_average(average: nn.Module, policy: nn.Module, decay: float) -> None:
    """average = decay · average + (1 − decay) · policy, in place, for all that is trained."""
    for old, new in zip(average.parameters(), policy.parameters(), strict=True):
        if new.requires_grad:
            local(old).lerp_(local(new), 1 - decay)


def learning_rate(
    step: int, steps: int, peak: float, warmup: int, schedule: str, floor: float
) -> float:
    """The rate of update number `step`, from 0.

    Linear warm-up over `warmup` updates, then constant, linear or cosine down to floor · peak at
    the last update.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    shape = 1 - progress
    if schedule == "cosine":
        shape = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (floor + (1 - floor) * shape)


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float) -> tuple[float, bool]:
    """Scale the gradients to a global L2 norm of at most max_norm (0: leave them as they are).

    Called after the gradient sync: every rank computes the same norm from the same bits and comes
    to the same verdict.

    Returns:
        The norm before clipping, and whether it is finite.
    """
    grads = [local(p.grad) for p in model.parameters() if p.grad is not None]
    if not grads:
        return 0.0, True
    norms = torch.stack(torch._foreach_norm(grads))  # pyright: ignore[reportPrivateImportUsage]
    norm = norm_over_shards(model, torch.linalg.vector_norm(norms.double()))
    finite = bool(torch.isfinite(norm))
    if finite and max_norm and norm > max_norm:
        scale = (max_norm / norm).to(grads[0].dtype)
        torch._foreach_mul_(grads, scale)  # pyright: ignore[reportPrivateImportUsage]
    return float(norm), finite


def sizes_of(policy: nn.Module) -> dict[str, int]:
    """How many parameters a policy has, and how many of them are trained."""
    parameters = list(policy.parameters())
    trained = [p for p in parameters if p.requires_grad]
    return {
        "parameters": sum(p.numel() for p in parameters),
        "trained_parameters": sum(p.numel() for p in trained),
    }
