"""What the environment says of other processes, and what a platform says that started none."""

import itertools
import os
import tempfile
import time

import pytest

import train
from data import sandbox
from errors import UserError
from model import parallel, places
from run import environment
from tests.distributed_workers import free_port, run

MEET = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    of_launchers = [name for launcher in places.LAUNCHERS for name in launcher[1:]]
    for name in (*places.VARIABLES, *of_launchers):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "variables,want",
    [
        ({}, (0, 1, 0, 1)),
        (
            dict(
                WORLD_SIZE="",
                RANK="",
                LOCAL_RANK="",
                LOCAL_WORLD_SIZE="",
                MASTER_ADDR="",
                MASTER_PORT="",
            ),
            (0, 1, 0, 1),
        ),
        (dict(WORLD_SIZE="1"), (0, 1, 0, 1)),
        (
            dict(WORLD_SIZE="1", RANK="0", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", **MEET),
            (0, 1, 0, 1),
        ),
        (dict(RANK="0"), (0, 1, 0, 1)),
        (dict(LOCAL_WORLD_SIZE="4"), (0, 1, 0, 4)),
        (
            dict(WORLD_SIZE=" 2 ", RANK="1", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", **MEET),
            (1, 2, 1, 2),
        ),
        (dict(WORLD_SIZE="16", RANK="9", LOCAL_RANK="", **MEET), (9, 16, 0, 1)),
    ],
)
def test_places_that_are_clear(variables, want, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(sandbox, "PROCESSOR_QUOTA", tmp_path / "none")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (
        parallel.place() == (*want, "")
        and environment()["ranks"] == want[1]
        and parallel.speaks() == (want[0] == 0)
    )
    assert sandbox.at_once() == max(1, len(os.sched_getaffinity(0)) // want[3])
    if want[1] == 1:
        assert parallel.init("cpu") == want[:3] and capsys.readouterr().out == ""


def test_a_rank_without_a_local_rank_takes_its_share_of_the_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    for name, value in dict(WORLD_SIZE="16", RANK="9", **MEET).items():
        monkeypatch.setenv(name, value)
    assert parallel.place().local_rank == 1


@pytest.mark.parametrize(
    "variables",
    [
        dict(WORLD_SIZE="8"),
        dict(WORLD_SIZE="8", MASTER_ADDR="10.0.0.1"),
        dict(WORLD_SIZE="2", **MEET),
        dict(RANK="3"),
        dict(WORLD_SIZE="4", LOCAL_RANK="3"),
    ],
)
def test_what_a_platform_sets_without_starting_anything_is_one_process_that_says_so(
    variables, monkeypatch, capsys
):
    monkeypatch.setattr(parallel, "_said", set())
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for _ in range(2):
        assert parallel.init("cpu") == (0, 1, 0) and not parallel.active()
    (line,) = capsys.readouterr().out.splitlines()
    assert "one process" in line and all(
        f"{k}={v}" in line for k, v in variables.items() if k == "WORLD_SIZE"
    )
    assert parallel.speaks() and environment()["ranks"] == 1


SLURM = dict(SLURM_NTASKS="2", SLURM_PROCID="1", SLURM_LOCALID="1")
OPEN_MPI = dict(OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="0")


@pytest.mark.parametrize(
    "variables,words",
    [
        (
            dict(WORLD_SIZE="2", **MEET, **SLURM),
            r"WORLD_SIZE=2, but RANK .* 2 tasks of Slurm: .* torchrun, or export "
            r"RANK=\$SLURM_PROCID LOCAL_RANK=\$SLURM_LOCALID",
        ),
        (dict(WORLD_SIZE="2") | SLURM | dict(SLURM_PROCID="0"), "tasks of Slurm"),
        (
            dict(WORLD_SIZE="2", LOCAL_RANK="1", **OPEN_MPI),
            r"2 tasks of Open MPI: .* RANK=\$OMPI_COMM_WORLD_RANK",
        ),
        (dict(WORLD_SIZE="8", PMI_SIZE="8", PMI_RANK="3"), r"8 tasks of MPI: .* RANK=\$PMI_RANK"),
        (
            dict(WORLD_SIZE="8", MV2_COMM_WORLD_SIZE="8", MV2_COMM_WORLD_RANK="3"),
            "8 tasks of MVAPICH",
        ),
        (dict(RANK="0", **SLURM), r"RANK=0, but WORLD_SIZE .* export WORLD_SIZE=\$SLURM_NTASKS"),
        (dict(RANK="1", **OPEN_MPI), "RANK=1, but WORLD_SIZE"),
    ],
)
def test_tasks_of_a_launcher_that_do_not_know_each_other_are_refused(variables, words, monkeypatch):
    """Each of them would train the whole run for itself."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words) as e:
        parallel.init("cpu")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "variables,want",
    [
        (
            dict(WORLD_SIZE="8", SLURM_NTASKS="1", SLURM_PROCID="0"),
            (0, 1, 0, 1),
        ),  # a pod or a job of one task
        (dict(WORLD_SIZE="8", SLURM_NTASKS="4"), (0, 1, 0, 1)),  # a shell of salloc is no task
        (dict(WORLD_SIZE="8", PMI_SIZE="", PMI_RANK="0"), (0, 1, 0, 1)),
        (
            SLURM,
            (0, 1, 0, 1),
        ),  # as many runs as there are tasks: nothing says that they belong together
        (dict(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1", **MEET, **SLURM), (1, 2, 1, 1)),
        (dict(WORLD_SIZE="1", **SLURM), (0, 1, 0, 1)),
    ],
)
def test_what_a_launcher_sets_beside_a_place_that_is_clear(variables, want, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert parallel.place()[:4] == want


@pytest.mark.parametrize(
    "variables,words",
    [
        (dict(WORLD_SIZE="two"), "WORLD_SIZE=two .* not a whole number"),
        (dict(WORLD_SIZE="0"), "WORLD_SIZE=0 .* at least 1"),
        (dict(WORLD_SIZE="-2"), "WORLD_SIZE=-2"),
        (dict(WORLD_SIZE="2.0", RANK="0"), "WORLD_SIZE=2.0"),
        (dict(WORLD_SIZE="²"), "WORLD_SIZE"),
        (dict(RANK="x"), "RANK=x"),
        (dict(WORLD_SIZE="2", RANK="2", **MEET), "RANK=2 with WORLD_SIZE=2"),
        (dict(WORLD_SIZE="1", RANK="1"), "RANK=1 with WORLD_SIZE=1"),
        (dict(WORLD_SIZE="2", RANK="0"), "not MASTER_ADDR and MASTER_PORT"),
        (dict(WORLD_SIZE="2", RANK="1", MASTER_ADDR="a"), "not MASTER_PORT"),
        (dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="a", MASTER_PORT="http"), "MASTER_PORT=http"),
        (dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="a", MASTER_PORT="70000"), "MASTER_PORT=70000"),
        (dict(LOCAL_RANK="a"), "LOCAL_RANK=a"),
        (dict(LOCAL_WORLD_SIZE="0"), "LOCAL_WORLD_SIZE=0"),
    ],
)
def test_contradictions_are_one_line(variables, words, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words) as e:
        parallel.init("cpu")
    assert "\n" not in str(e.value) and parallel.speaks()


def test_runs_side_by_side_have_a_gpu_each(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(parallel, "_claimed", [])
    names = tuple(f"{tmp_path.name}-{i}" for i in range(3))
    first_free = parallel.first_free.__wrapped__
    assert [first_free(names) for _ in range(5)] == [0, 1, 2, 0, 0], "each call is another run"
    for file in parallel._claimed:
        file.close()  # as their end does
    assert first_free(names[1:]) == 0 and first_free(names) == 0 and first_free(names) == 2
    assert parallel.first_free(names) == parallel.first_free(names), "a process keeps its own"


def test_no_combination_hangs_or_ends_in_a_traceback(monkeypatch):
    """Every one of them is a place or a UserError."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    values = (None, "", "0", "1", "3", "x")
    for world, rank, local, port in itertools.product(values, values, values, (None, "29500", "y")):
        for name, value in dict(
            WORLD_SIZE=world,
            RANK=rank,
            LOCAL_RANK=local,
            MASTER_ADDR=port and "h",
            MASTER_PORT=port,
        ).items():
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(
                name, value
            )
        try:
            place = parallel.place()
        except UserError:
            continue
        assert 0 <= place.rank < place.world and (
            place.world == 1 or (rank, port) not in ((None, None), ("", None))
        )


def impatient(argv):
    parallel.MEETING = 2.0
    return train.main(argv)


def test_who_waits_for_others_in_vain_says_so_in_one_line(tmp_path):
    """A rendezvous that nobody else comes to."""
    group = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    group["MASTER_PORT"] = str(free_port())
    began = time.monotonic()
    done = run("--mode=sft", cwd=tmp_path, main=impatient, **group)
    last = done.stderr.strip().splitlines()[-1]
    assert (
        done.returncode == 2
        and last.startswith("train.py: rank 0 waits for the other 1 of WORLD_SIZE=2")
        and "in vain" in last
    )
    assert "Traceback" not in done.stderr and time.monotonic() - began < 290  # without it 300
