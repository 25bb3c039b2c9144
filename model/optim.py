"""Optimizers and their parameter groups, the learning-rate schedule, gradient clipping."""

import copy
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kernels.cpu import fastest_product
from model.sharding import gathered, local, norm_over_shards, own_rows

MUON_MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of x, x³ and x⁵: steep at 0, and near 1 after 5 steps
ITERATIONS = 5
STACKED_ELEMENTS = 1 << 20  # matrices of one shape that are orthogonalized together


def orthogonalized(matrix_BMN: Tensor) -> Tensor:
    """Matrices with the singular vectors of these, and singular values of 0.7 to 1.2 (0 stays 0).

    The quintic Newton-Schulz iteration of Muon (Jordan et al. 2024).
    """
    is_tall = matrix_BMN.size(-2) > matrix_BMN.size(-1)
    x = matrix_BMN.mT if is_tall else matrix_BMN
    tiny = torch.finfo(x.dtype).tiny
    # The largest number first: the squares of tiny ones are 0.
    x = x / torch.linalg.vector_norm(x, math.inf, (-2, -1), True).clamp(min=tiny)
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=tiny)
    a, b, c = NEWTON_SCHULZ
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if is_tall else x


class MuonAdamW(torch.optim.AdamW):
    """Muon for the groups that say `muon`, of matrices alone; AdamW for the others.

    A matrix moves by its orthogonalized Nesterov momentum, scaled to the size that AdamW's updates
    have (Liu et al., arXiv 2502.16982), so that both take the same learning rate. All matrices of
    a shape are orthogonalized together; what is in shards is whole on every rank for that.
    """

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            if not group["muon"]:
                continue
            alike = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.shape].append(p)
            for shape, parameters in alike.items():
                number = max(1, STACKED_ELEMENTS // shape.numel())
                for first in range(0, len(parameters), number):
                    self._move(parameters[first : first + number], group)
        super().step()

    def flops(self) -> float:
        """Of the products of one update."""
        total = 0
        for group in self.param_groups:
            if not group["muon"]:
                continue
            for p in group["params"]:
                total += 4 * p.numel() * min(p.shape) + 2 * min(p.shape) ** 3
        return ITERATIONS * total

    def _move(self, parameters: Sequence[Any], group: dict[str, Any]) -> None:
        """Update matrices of one shape, and drop their gradients: AdamW passes over them then."""
        like = local(parameters[0])
        dtype = torch.bfloat16 if like.is_cuda else like.dtype  # tensor cores; its usual precision
        shape = parameters[0].shape
        stack_BMN = torch.empty((len(parameters), *shape), dtype=dtype, device=like.device)
        for matrix, p in zip(stack_BMN, parameters, strict=True):
            grad, momentum = local(p.grad), local(self.state[p]["momentum"])
            momentum.lerp_(grad, 1 - MUON_MOMENTUM)
            matrix.copy_(gathered(grad.lerp(momentum, MUON_MOMENTUM), p))
            p.grad = None
        lr, scale = group["lr"], 0.2 * math.sqrt(max(shape))
        with fastest_product(stack_BMN, len(stack_BMN) * min(shape) ** 3):
            direction_BMN = orthogonalized(stack_BMN)
        for direction, p in zip(direction_BMN, parameters, strict=True):
            rows = local(p).mul_(1 - lr * group["weight_decay"])
            rows.sub_(own_rows(direction, p), alpha=lr * scale)


def build_optimizer(
    model: nn.Module,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    muon: bool = False,
) -> MuonAdamW:
    """Fused AdamW for the parameters that are trained, or Muon for the matrices among them.

    Matrices (adapters too) decay; norms, biases and embeddings (a tied head with them) do not, and
    are always AdamW's. The state is there at once: made at the first update, as AdamW does, it
    takes up places that logits leave, which later steps then find too small.
    """
    matrices, others = [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.dim() == 2 and not name.startswith(("embed_tokens", "lm_head")):
            matrices.append(p)
        else:
            others.append(p)
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "muon": muon},
        {"params": others, "weight_decay": 0.0, "muon": False},
    ]
    optimizer = MuonAdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    for group in optimizer.param_groups:
        for p in group["params"]:
            if group["muon"]:
                optimizer.state[p] = {"momentum": torch.zeros_like(p)}
            else:
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
