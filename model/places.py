"""Where this process stands among those that were started together, as the environment says it."""

import os
from typing import NamedTuple

import torch

from errors import UserError

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
