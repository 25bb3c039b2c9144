"""What a spawned rank runs in `test_invariance.py`; a module of its own so that it can be imported by name."""

import os

import torch

import train
from data.batch import Batch
from model import parallel


def setup(world, rank, port):
    os.environ.update(WORLD_SIZE=str(world), RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    parallel.init("cpu")


def gradient(model, teacher, loss_fn, documents, micro_tokens):
    """Loss and gradients of the global batch as the loop computes them: (metrics, flat gradient)."""
    batch = Batch.pack(documents)
    (norm,) = parallel.all_reduce_sum([batch.normaliser])
    model.zero_grad()
    sums = train.forward_backward(model, teacher, loss_fn, batch, norm, micro_tokens, torch.device("cpu"))
    parallel.sync_gradients(model)
    metrics = {name: total / count for name, (total, count) in parallel.reduce_metrics(sums).items() if count}
    return metrics, torch.cat([p.grad.flatten() for p in model.parameters()])


def rank_main(rank, world, port, build, jobs, results):
    """jobs: [(name, [documents of each rank], micro_tokens)]; rank 0 puts {job: (metrics, gradient)} into `results`."""
    setup(world, rank, port)
    done = {}
    for name, shares, micro_tokens in jobs:
        model, teacher, losses = build()
        for loss_name, loss_fn in losses.items():
            metrics, grad = gradient(model, teacher, loss_fn, shares[rank], micro_tokens)
            done[name, loss_name] = (metrics, grad.tolist())
    if rank == 0:
        results.put(done)
    parallel.barrier()
    parallel.close()
