"""Replicas: the process group, sums over ranks, one gradient sync.

Without torchrun, in one process, all of it does nothing.
"""

import datetime
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from errors import RunFailed, UserError, say
from files import reason
from kernels import backend

BUCKET_ELEMENTS = 64 << 20
MEETING = 300.0  # seconds for which a process waits for the others to start


VARIABLES = (
    "WORLD_SIZE",
    "RANK",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)  # as torchrun sets them


ALONE = "this is one process of its own; torchrun starts several"


class Place(NamedTuple):
    """Where this process stands among those that were started together.

    note: What was overlooked in the environment, or "".
    """

    rank: int
    world: int
    local_rank: int
    local_world: int
    note: str


def place() -> Place:
    """This process's place, by the variables that torchrun sets; they are read nowhere else.

    Platforms set some of them without starting anything: a WORLD_SIZE above 1 without a RANK, with
    an address to meet at or without, is one process, and so is a RANK above 0 without a WORLD_SIZE.
    But not where a launcher says that it started several tasks (`LAUNCHERS`): each of them would do
    the whole work for itself. Raises UserError then, and where the variables contradict each other.
    """
    world, rank = _variable("WORLD_SIZE", 1), _variable("RANK", 0)
    local_rank, local_world = _variable("LOCAL_RANK", 0), _variable("LOCAL_WORLD_SIZE", 1)
    size, number = world or 1, rank or 0
    if (size > 1 and rank is None) or (world is None and rank is not None):
        _refuse_several_tasks(world, rank)
    if size > 1 and rank is None:
        missing = ", ".join(_not_set("RANK", "MASTER_ADDR", "MASTER_PORT"))
        note = f"WORLD_SIZE={size}, but {missing} not set: {ALONE}"
        return Place(0, 1, 0, local_world or 1, note)
    if world is None and number > 0:
        note = f"RANK={number}, but WORLD_SIZE not set: {ALONE}"
        return Place(0, 1, 0, local_world or 1, note)
    if number >= size:
        raise UserError(
            f"RANK={number} with WORLD_SIZE={size} in the environment: ranks are 0 to {size - 1}; "
            "unset both, or use torchrun"
        )
    if size == 1:
        return Place(0, 1, local_rank or 0, local_world or 1, "")
    missing = " and ".join(_not_set("MASTER_ADDR", "MASTER_PORT"))
    if missing:
        raise UserError(
            f"RANK={number} and WORLD_SIZE={size} in the environment, but not {missing}: "
            "unset the two, or use torchrun"
        )
    if not 0 < (_variable("MASTER_PORT", 1) or 0) < 1 << 16:
        raise UserError(
            f"MASTER_PORT={os.environ['MASTER_PORT']} in the environment is no port; "
            "unset it, or use torchrun"
        )
    if local_rank is None:  # srun and mpirun name the rank only
        local_rank = number % max(1, torch.cuda.device_count())
    return Place(number, size, local_rank, local_world or 1, "")


def _not_set(*names: str) -> list[str]:
    return [name for name in names if not os.environ.get(name)]


class Launcher(NamedTuple):
    """A program that starts processes, by the variables that it sets in each of them."""

    name: str
    tasks: str
    rank: str
    local_rank: str


LAUNCHERS = (
    Launcher("Slurm", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    Launcher(
        "Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"
    ),
    Launcher("MPI", "PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
    Launcher("MVAPICH", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
)


def _refuse_several_tasks(world: int | None, rank: int | None) -> None:
    """Raise UserError if WORLD_SIZE or RANK is missing in one of several tasks of a launcher."""
    for launcher in LAUNCHERS:
        tasks = os.environ.get(launcher.tasks, "").strip()
        several = tasks.isascii() and tasks.isdigit() and int(tasks) > 1
        if not (several and os.environ.get(launcher.rank)):
            continue
        if rank is None:
            found = f"WORLD_SIZE={world}, but RANK not set"
            export = f"RANK=${launcher.rank} LOCAL_RANK=${launcher.local_rank}"
        else:
            found = f"RANK={rank}, but WORLD_SIZE not set"
            export = f"WORLD_SIZE=${launcher.tasks}"
        raise UserError(
            f"{found}, in one of {tasks} tasks of {launcher.name}: start with torchrun, or export "
            f"{export} in each task (or unset it, for tasks that are processes of their own)"
        )


def _variable(name: str, least: int) -> int | None:
    """A whole number of the environment, at least `least`; None where it is not set, or empty."""
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise UserError(
            f"{name}={text} in the environment is not a whole number of at least {least}; "
            "unset it, or use torchrun"
        )
    return int(text)


def speaks() -> bool:
    """Whether this process speaks for all: before `init` too, whatever the environment holds."""
    if dist.is_initialized():
        return rank() == 0
    try:
        return place().rank == 0
    except UserError:
        return True


def init(device_type: str, patience: float | None = None) -> tuple[int, int, int]:
    """Join the process group if there is more than one rank.

    Args:
        patience: Seconds after which a rank that waits for another gives up; None: torch's own 10
            or 30 minutes.

    Returns:
        (rank, number of ranks, rank on this machine).

    Raises:
        UserError: The others cannot be met.
    """
    here = place()
    if here.note and here.note not in _said:
        _said.add(here.note)
        say(here.note)
    if here.world > 1 and not dist.is_initialized():
        _join(here, "nccl" if device_type == "cuda" else "gloo", patience)
    return here.rank, here.world, here.local_rank


class Device(NamedTuple):
    """Where this process computes, and as which rank."""

    device: torch.device
    compute_dtype: torch.dtype
    rank: int
    world: int


def choose_device(device: str, dtype: str, kernels: str) -> Device:
    """Pick device, dtype and kernels from the options of these names, and join the other ranks.

    "auto" is a GPU where there is one, in bf16; else the CPU, in fp32. Raises UserError.
    """
    kind = device
    if device == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    rank, world, local_rank = init(kind)
    chosen = torch.device("cpu")
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK={local_rank} in the environment, but there are "
                f"{torch.cuda.device_count()} GPUs to be seen; start fewer processes"
            )
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    try:
        backend.use(kernels)
    except ValueError as e:
        raise UserError(f"--kernels={kernels}: {e}") from None
    if dtype == "auto":
        dtype = "bfloat16" if kind == "cuda" else "float32"
    return Device(chosen, getattr(torch, dtype), rank, world)


_said: set[str] = set()  # notes are printed once per process


def _join(here: Place, engine: str, patience: float | None) -> None:
    waits = (
        f"rank {here.rank} waits for the other {here.world - 1} of WORLD_SIZE={here.world} "
        f"at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    )
    alarm = threading.Timer(30, say, (waits,))
    alarm.daemon = True
    alarm.start()
    try:
        limit = datetime.timedelta(seconds=MEETING)
        meeting = rendezvous("env://", here.rank, here.world, timeout=limit)
        store, _, _ = next(iter(meeting))
    except (RuntimeError, ValueError, OSError) as e:  # torch's DistError is a RuntimeError
        raise UserError(
            f"{waits}, in vain ({reason(e)}); unset WORLD_SIZE to run as one process, "
            "or use torchrun"
        ) from None
    finally:
        alarm.cancel()
    waiting = None if patience is None else datetime.timedelta(seconds=patience)
    dist.init_process_group(
        engine, store=store, rank=here.rank, world_size=here.world, timeout=waiting
    )


def active() -> bool:
    """Whether there is more than one rank."""
    return dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's rank; 0 before `init`."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_reduce_sum(values: Sequence[float], device: torch.device | str = "cpu") -> list[float]:
    """Element-wise sum of a list of numbers over ranks, in fp64."""
    if not active():
        return [float(v) for v in values]
    total = torch.tensor([float(v) for v in values], dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def broadcast(value: Any) -> Any:
    """Rank 0's value on every rank. It is pickled: it comes from our own process group."""
    if not active():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gather(value: Any) -> list[Any]:
    """Every rank's value, by rank."""
    if not active():
        return [value]
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def on_rank_0(rank: int, call: Callable[[], Any]) -> Any:
    """What `call` returns on rank 0, or the error that it raises there, on every rank.

    Work of rank 0 alone (a lock, a file) would otherwise fail alone: the other ranks would wait for
    it at the next sum, and end in a traceback of the process group.

    Args:
        rank: Of this process.
        call: Called on rank 0 only. What it returns must be picklable, and small.

    Raises:
        UserError or RunFailed as `call` does. Any other error of it is raised on rank 0, and the
        other ranks raise a RunFailed that names it.
    """
    value = reported = unexpected = None
    if rank == 0:
        try:
            value = call()
        except (UserError, RunFailed) as e:
            reported = e
        except Exception as e:  # the others must hear of it, whatever it is
            unexpected = e
            reported = RunFailed(f"rank 0 failed ({type(e).__name__}: {reason(e)})")
    value, reported = broadcast((value, reported))
    if unexpected:
        raise unexpected
    if reported:
        raise reported
    return value


def raise_on_all(error: Exception | None) -> None:
    """Raise the first error that a rank has, on every rank.

    Args:
        error: This rank's, or None.
    """
    for found in gather(error):
        if found:
            raise found


def reduce_metrics(sums: Mapping[str, tuple[Any, Any]]) -> dict[str, tuple[float, float]]:
    """Sum the ranks' (sum, count) pairs; a rank without micro-batches has none."""
    pairs = {name: (float(total), float(count)) for name, (total, count) in sums.items()}
    merged: dict[str, tuple[float, float]] = {}
    for part in gather(pairs):
        for name, (total, count) in part.items():
            old_total, old_count = merged.get(name, (0.0, 0.0))
            merged[name] = (old_total + total, old_count + count)
    return merged


@torch.no_grad()
def sync_gradients(model: torch.nn.Module) -> None:
    """Sum the gradients over ranks: the losses were divided by a global normalizer already.

    A rank without micro-batches contributes zeros.
    """
    if not active():
        return
    bucket, size = [], 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        size += parameter.grad.numel()
        if size >= BUCKET_ELEMENTS:
            _reduce(bucket)
            bucket, size = [], 0
    if bucket:
        _reduce(bucket)


def _reduce(grads: list[torch.Tensor]) -> None:
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    parts = flat.split([grad.numel() for grad in grads])
    for grad, part in zip(grads, parts, strict=True):
        grad.copy_(part.view_as(grad))


def barrier() -> None:
    """Wait for all ranks."""
    if active():
        dist.barrier()


def close() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """Leave the process group, and end the process with this exit code.

    Runs that were complete have died as the interpreter took its objects apart ("terminate called
    without an active exception", on busy machines), probably of gloo's threads. So a process of a
    group ends at once.
    """
    if not dist.is_initialized():
        sys.exit(code)
    close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
