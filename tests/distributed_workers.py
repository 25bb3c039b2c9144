"""What a spawned rank runs in several tests; a module of its own, to be imported by name."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.multiprocessing as mp

import train
from data.batch import GlobalBatch
from eval.study.scheduler import free_port
from model import parallel
from tests import gates
from tests.conftest import ROOT


def forks():
    """Processes that are forks of one that has imported this module and what optimizers import."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(
        [
            __name__,
            "torch._dynamo",
            "torch.distributed.fsdp",
            "torch.distributed.checkpoint",
            "matplotlib.pyplot",
        ]
    )
    return context


def start(*argv: str, cwd: Path, main=train.main, **environment: str) -> BaseProcess:
    """`train.py` on the CPU in a process of its own; cwd/stdout and cwd/stderr have what it says.

    main: what is run in its place.
    """
    process = forks().Process(target=train_main, args=(main, argv, cwd, environment))
    process.start()
    return process


def start_ranks(*argv: str, cwd: Path, ranks=0, main=train.main, **environment: str):
    """The processes of `start` on this many ranks of a group if not on one alone, by rank."""
    for name in ("stdout", "stderr"):
        (cwd / name).write_text("")
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank in range(max(ranks, 1)):
        if ranks:
            environment |= group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(start(*argv, cwd=cwd, main=main, **environment))
    return processes


def run(*argv: str, cwd: Path, timeout=600, **more):
    """What `start_ranks` began when it has ended."""
    processes = start_ranks(*argv, cwd=cwd, **more)
    for process in processes:
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            with (cwd / "stderr").open("a") as file:
                file.write(f"a hang: the test waited {timeout} s\n")
    code = max((process.exitcode for process in processes), key=abs)
    out, err = ((cwd / name).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(argv, code, out, err)


def train_main(main, argv, cwd, environment):
    os.environ.update(environment)
    torch.set_num_threads(1)
    os.chdir(cwd)
    for number, name in enumerate(("stdout", "stderr"), 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    code = main(["--device=cpu", *argv])
    parallel.close()
    sys.exit(code)


def main_of_a_copy(argv):
    """`python train.py` in the working directory, which has the project's files."""
    for name in gates.source_files(ROOT):
        sys.modules.pop(name.removesuffix(".py").replace("/", "."), None)
        sys.modules.pop(Path(name).parent.as_posix().replace("/", "."), None)  # its package
    sys.path = [os.getcwd(), *(path for path in sys.path if path not in ("", str(ROOT)))]
    sys.argv = ["train.py", *argv]
    runpy.run_path("train.py", run_name="__main__")


def spawned(main, world, *arguments):
    """What rank 0 of `world` processes puts into the queue `results`; raises if one fails.

    Each process runs main(rank, world, port, *arguments, results).
    """
    port = free_port()
    results = forks().SimpleQueue()
    processes = mp.start_processes(
        main, (world, port, *arguments, results), world, join=False, start_method="forkserver"
    )
    while results.empty():
        processes.join(timeout=0.1)
    done = results.get()
    processes.join()
    return done


def setup(world, rank, port, patience=None):
    os.environ.update(
        WORLD_SIZE=str(world),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    parallel.init("cpu", patience)


def gradient(model, teacher, loss_fn, documents, micro_batch_tokens):
    """(metrics, flat gradient) of the global batch as the loop computes them."""
    teachers = [teacher] if teacher else []
    if isinstance(teacher, list):
        teachers = teacher
    batch = GlobalBatch(documents)
    (norm,) = parallel.all_reduce_sum([batch.normalizer])
    model.zero_grad()
    sums = train.forward_backward(
        model, teachers, loss_fn, batch, norm, micro_batch_tokens, torch.device("cpu")
    )
    parallel.sync_gradients(model)
    metrics = {
        name: total / count
        for name, (total, count) in parallel.reduce_metrics(sums).items()
        if count
    }
    grads = [full(p.grad).flatten() for p in model.parameters() if p.requires_grad]
    return metrics, torch.cat(grads)


def full(tensor):
    """A tensor that may be in shards, on all ranks."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def rank_main(rank, world, port, build, jobs, results):
    """Rank 0 puts {job: (metrics, gradient)}.

    jobs: [(name, [documents of each rank], micro_batch_tokens)]
    """
    setup(world, rank, port)
    done = {}
    for name, shares, micro_batch_tokens in jobs:
        model, teacher, losses = build()
        for loss_name, loss_fn in losses.items():
            metrics, grad = gradient(model, teacher, loss_fn, shares[rank], micro_batch_tokens)
            done[name, loss_name] = (metrics, grad.tolist())
    if rank == 0:
        results.put(done)
    parallel.barrier()
    parallel.close()


def rollout_main(rank, world, port, sources, describe, batches, results):
    """Rank 0 puts, for each rank, {source: what `describe` says of its first batches}."""
    setup(world, rank, port)
    told = {
        name: [describe(next(source)) for _ in range(batches)]
        for name, source in sources(rank, world).items()
    }
    every = parallel.gather(told)
    if rank == 0:
        results.put(every)
    parallel.barrier()
    parallel.close()


def failing_main(rank, world, port, jobs, results):
    """Rank 0 puts, for each job, every rank's (exit code or the name of an error, standard error).

    jobs: [(main, argv, rank that is sabotaged, its context manager)]
    """
    setup(world, rank, port, patience=60)  # a rank that waits for one that failed alone gives up
    told = []
    for main, argv, sabotaged, sabotage in jobs:
        said = io.StringIO()
        with (
            contextlib.redirect_stderr(said),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.ExitStack() as stack,
        ):
            if rank == sabotaged:
                stack.enter_context(sabotage())
            try:
                code = main(argv)
            except Exception as e:
                code = type(e).__name__
        told.append(parallel.gather((code, said.getvalue())))
    if rank == 0:
        results.put(told)
    parallel.barrier()
    parallel.close()


def eval_main(rank, world, port, argv, results):
    """Rank 0 puts the exit codes of `python -m eval` on every rank."""
    from eval.__main__ import main

    setup(world, rank, port)
    codes = parallel.gather(main(argv))
    if rank == 0:
        results.put(codes)
    parallel.barrier()
    parallel.close()
