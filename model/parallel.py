"""Replicas: the process group, sums over ranks, one gradient sync. Without torchrun all of it is a no-op."""

import datetime
import os

import torch
import torch.distributed as dist

BUCKET_ELEMENTS = 64 << 20


def init(device_type, patience=None):
    """(rank, world, local rank). Joins torchrun's process group if there is more than one rank. patience: seconds after which a rank
    that waits for another gives up (None: torch's own 10 or 30 minutes)."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=patience and datetime.timedelta(seconds=patience))
    return int(os.environ.get("RANK", 0)), world, int(os.environ.get("LOCAL_RANK", 0))


def active():
    return dist.is_initialized() and dist.get_world_size() > 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def all_reduce_sum(values, device="cpu"):
    """Element-wise sum of a list of numbers over ranks, in fp64."""
    if not active():
        return [float(v) for v in values]
    total = torch.tensor([float(v) for v in values], dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def broadcast(value):
    """Rank 0's picklable value (it comes from our own process group) on every rank."""
    if not active():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gather(value):
    """Every rank's value, by rank."""
    if not active():
        return [value]
    box = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def reduce_metrics(sums):
    """Sum the ranks' (sum, count) pairs; a rank without micro-batches has none."""
    pairs = {name: (float(total), float(count)) for name, (total, count) in sums.items()}
    merged = {}
    for part in gather(pairs):
        for name, (total, count) in part.items():
            old = merged.get(name, (0.0, 0.0))
            merged[name] = (old[0] + total, old[1] + count)
    return merged


@torch.no_grad()
def sync_gradients(model):
    """Sum the gradients over ranks: the losses were divided by a global normaliser already. A rank without micro-batches
    contributes zeros."""
    if not active():
        return
    bucket, size = [], 0
    for p in (p for p in model.parameters() if p.requires_grad):
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        bucket.append(p.grad)
        size += p.grad.numel()
        if size >= BUCKET_ELEMENTS:
            _reduce(bucket)
            bucket, size = [], 0
    if bucket:
        _reduce(bucket)


def _reduce(grads):
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in grads]), grads)])


def barrier():
    if active():
        dist.barrier()


def close():
    if dist.is_initialized():
        dist.destroy_process_group()
