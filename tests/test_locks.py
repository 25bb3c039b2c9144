"""One process at a time has a lock, with and without a file system that knows locks."""

import errno
import fcntl
import os
import subprocess
import sys
import time

import pytest

import eval.study.__main__ as study
import locks
from errors import UserError
from eval.study import plan as study_plan
from run import open_run
from tests.conftest import ROOT

ERRORS = ["ENOSYS", "ENOLCK", "EOPNOTSUPP", "EINVAL"]


def without_flock(monkeypatch, name):
    def flock(fd, operation):
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    monkeypatch.setattr(fcntl, "flock", flock)


def python(code, tmp_path, name=""):
    """A process that runs `code`, its flock failing with this error, from the repository's root."""
    first = ""
    if name:
        first = f"import errno, fcntl\ndef flock(*_): raise OSError(errno.{name}, 'no locks')\n"
        first += "fcntl.flock = flock\n"
    script = tmp_path / f"code{len(list(tmp_path.glob('code*')))}.py"
    script.write_text(first + code)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(script)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


HOLD = """
import sys, time
from pathlib import Path
import locks
with locks.lock(Path({path!r})):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("name", ["", *ERRORS])
def test_a_lock_is_held_once_given_back_and_taken_from_the_dead(name, tmp_path, monkeypatch):
    if name:
        without_flock(monkeypatch, name)
    path = tmp_path / "a.lock"
    for _ in range(2):  # given back
        with locks.lock(path), pytest.raises(locks.Busy), locks.lock(path):
            pass
    holder = python(HOLD.format(path=str(path)), tmp_path, name)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(locks.Busy, match="another process"), locks.lock(path):
            pass
    finally:
        holder.kill()
        holder.wait()
    with locks.lock(path):
        assert locks.soft_path(path).exists() == bool(name)
    assert not locks.soft_path(path).exists()


def test_the_lock_file_of_a_dead_holder_is_swept_and_no_other(tmp_path):
    path = tmp_path / "a.lock"
    locks.sweep(path)
    with locks.lock(path):
        locks.sweep(path)
        assert path.exists()
    path.touch()
    locks.sweep(path)
    assert not list(tmp_path.glob("a.lock*"))


def test_the_dead_of_another_host_are_named_not_taken_for_dead(tmp_path, monkeypatch):
    without_flock(monkeypatch, "ENOSYS")
    path = tmp_path / "a.lock"
    locks.soft_path(path).write_text("4242\nnode-17\n99\n")
    with (
        pytest.raises(
            locks.Busy, match=r"process 4242 on node-17 \(if it is gone, delete .*a.lock-soft\)"
        ),
        locks.lock(path),
    ):
        pass
    locks.soft_path(path).unlink()
    with locks.lock(path):
        pass


def without_exchange(monkeypatch):
    """As NFS, Lustre, 9p and most FUSE mounts answer renameat2(RENAME_EXCHANGE), by which filelock
    package takes over what the dead left: who relies on it gets nothing there."""
    exchange = pytest.importorskip("filelock._filesystem._exchange")
    monkeypatch.setattr(exchange, "_rename_call", lambda: (lambda *_: errno.EINVAL, 2))


@pytest.fixture
def holder(tmp_path):
    """holder(error) -> a process that holds a.lock, its flock failing with this error."""
    started = []

    def start(name):
        started.append(python(HOLD.format(path=str(tmp_path / "a.lock")), tmp_path, name))
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield start
    for process in started:
        kill(process)


def kill(process):
    process.kill()
    process.wait()


@pytest.mark.parametrize("name", ["ENOSYS", "ENOLCK"])
def test_the_dead_are_followed_where_files_cannot_be_exchanged(name, tmp_path, monkeypatch, holder):
    without_flock(monkeypatch, name)
    without_exchange(monkeypatch)
    kill(holder(name))
    path = tmp_path / "a.lock"
    assert locks.soft_path(path).exists()
    with (
        locks.lock(path),
        pytest.raises(locks.Busy, match=f"another process, {os.getpid()}$"),
        locks.lock(path),
    ):
        pass
    assert sorted(p.name for p in tmp_path.glob("a.lock*")) == ["a.lock"]


@pytest.mark.parametrize("flock", [True, False])
def test_whoever_removes_the_dead_does_it_alone(flock, tmp_path, monkeypatch, holder):
    kill(holder("ENOSYS"))
    if not flock:
        without_flock(monkeypatch, "ENOSYS")
    path, takeover = tmp_path / "a.lock", tmp_path / "a.lock-soft-takeover"
    takeover.touch()
    dead = locks.soft_path(path).read_text()
    with pytest.raises(locks.Busy), locks.lock(path):
        pass
    assert locks.soft_path(path).read_text() == dead and takeover.exists()
    os.utime(takeover, (time.time() - 61,) * 2)  # it died in the middle of it
    with locks.lock(path):
        pass
    left = [] if flock else ["a.lock"]  # without locks nobody knows that nobody opened it
    assert sorted(p.name for p in tmp_path.glob("a.lock*")) == left


@pytest.mark.parametrize("flock", [True, False])
def test_a_process_is_known_by_its_start_not_by_its_number_alone(flock, tmp_path, monkeypatch):
    path = tmp_path / "a.lock"
    soft = locks.soft_path(path)
    with monkeypatch.context() as m:
        without_flock(m, "ENOSYS")
        with locks.lock(path):
            pid, host, start = soft.read_text().splitlines()
    ticks = int(open(f"/proc/{os.getpid()}/stat").read().rpartition(")")[2].split()[19])
    assert int(pid) == os.getpid() and int(start) % 2**64 == ticks
    if not flock:
        without_flock(monkeypatch, "ENOSYS")
    for alive in (f"{pid}\n{host}\n{start}\n", f"{pid}\n{host}\n", f"{pid}\n{host}-2\n7\n", ""):
        soft.write_text(alive)
        with pytest.raises(locks.Busy), locks.lock(path):
            pass
        assert soft.read_text() == alive
    for dead in (
        f"{pid}\n{host}\n{int(start) + 1}\n",
        f"{2**22 + 1}\n{host}\n{start}\n",
        f"{10**30}\n{host}\n",
    ):
        soft.write_text(dead)
        with locks.lock(path):
            pass
        assert not soft.exists()


def test_a_soft_lock_that_was_deleted_and_taken_by_another_is_not_given_back(tmp_path, monkeypatch):
    without_flock(monkeypatch, "ENOSYS")
    soft = locks.soft_path(tmp_path / "a.lock")
    with locks.lock(tmp_path / "a.lock"):
        soft.write_text("4242\nnode-17\n99\n")
    assert soft.read_text() == "4242\nnode-17\n99\n"


# --- a folder that knows flock on one node, and not on another ------------------------------------


def test_flock_is_no_lock_against_a_soft_holder_that_lives(tmp_path, holder):
    path = tmp_path / "a.lock"
    process = holder("ENOLCK")
    with pytest.raises(locks.Busy, match=f"another process, {process.pid}"), locks.lock(path):
        pass
    kill(process)
    with locks.lock(path):
        assert not locks.soft_path(path).exists()
    locks.soft_path(path).write_text("4242\nnode-17\n99\n")
    with (
        pytest.raises(
            locks.Busy, match=r"process 4242 on node-17 \(if it is gone, delete .*a.lock-soft\)"
        ),
        locks.lock(path),
    ):
        pass


def test_a_soft_lock_is_none_against_a_holder_by_flock_that_lives(tmp_path, monkeypatch, holder):
    path = tmp_path / "a.lock"
    process = holder("")
    without_flock(monkeypatch, "ENOLCK")
    with pytest.raises(locks.Busy, match=f"another process, {process.pid}"), locks.lock(path):
        pass
    assert not locks.soft_path(path).exists()
    kill(process)
    assert path.read_text()  # the dead could not clear it
    with locks.lock(path):
        pass
    monkeypatch.undo()
    with locks.lock(path):
        assert path.read_text().startswith(f"{os.getpid()}\n")
        with pytest.raises(locks.Busy), locks.lock(path):  # who fails to get it leaves what it says
            pass
        assert path.read_text().startswith(f"{os.getpid()}\n")
    assert not path.exists()


CONTEND = """
import sys, time
from pathlib import Path
import locks
folder = Path({folder!r})
print("ready", flush=True)
while not (folder / "go").exists():
    time.sleep(0.001)
won, end = 0, time.monotonic() + 2
while time.monotonic() < end or len(list(folder.glob("won-*"))) < 2:
    try:
        with locks.lock(folder / "a.lock"):
            (folder / "inside").mkdir()  # fails if another one is in
            time.sleep(0.002)
            (folder / "inside").rmdir()
        won += 1
        (folder / "won-{kind}").touch()
    except locks.Busy:
        pass
    time.sleep(0.001)
print(won)
"""


def test_of_processes_with_and_without_flock_never_two_are_in(tmp_path):
    contenders = [
        python(CONTEND.format(folder=str(tmp_path), kind=bool(name)), tmp_path, name)
        for name in ("", "ENOSYS", "", "ENOLCK")
    ]
    for process in contenders:
        assert process.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    said = [process.communicate(timeout=300)[0] for process in contenders]
    assert all(text.strip().isdigit() for text in said), said
    by_kind = [int(said[0]) + int(said[2]), int(said[1]) + int(said[3])]
    assert min(by_kind) > 0, said
    assert {p.name for p in tmp_path.glob("a.lock*")} <= {"a.lock"}


RACE = """
import sys, time
from pathlib import Path
import locks
folder, me = Path({folder!r}), sys.argv[0]
print("ready", flush=True)
while not (folder / "go").exists():
    time.sleep(0.001)
try:
    with locks.lock(folder / "a.lock"):
        (folder / "inside").mkdir()  # fails if another one is in
        while len(list(folder.glob("*.busy"))) < 3:
            time.sleep(0.01)
        (folder / "inside").rmdir()
    print("won")
except locks.Busy:
    print("busy")
    Path(me + ".busy").touch()
"""


@pytest.mark.parametrize("name", ["", "ENOSYS"])
@pytest.mark.parametrize("stale", [False, True], ids=["free", "left by a dead one"])
def test_of_processes_that_race_one_wins(name, stale, tmp_path):
    if stale:
        holder = python(HOLD.format(path=str(tmp_path / "a.lock")), tmp_path, name)
        assert holder.stdout.readline() == "held\n"
        holder.kill()
        holder.wait()
    racers = [python(RACE.format(folder=str(tmp_path)), tmp_path, name) for _ in range(4)]
    assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 4
    (tmp_path / "go").touch()
    said = [racer.communicate(timeout=300)[0] for racer in racers]
    assert sorted(said) == ["busy\n"] * 3 + ["won\n"]


def test_a_run_has_one_process_without_flock_too(tmp_path, monkeypatch):
    without_flock(monkeypatch, "ENOLCK")
    with open_run(tmp_path, "r", "sft", False, 2, {}, 0) as (folder, step):
        assert step is None
        with (
            pytest.raises(UserError, match="r is in use by another process, [0-9]+; wait"),
            open_run(tmp_path, "r", "sft", True, 2, {}, 0),
        ):
            pass
    with open_run(
        tmp_path, "r", "sft", False, 2, {}, 0
    ):  # nothing was trained: as good as new, whatever locks left behind
        pass


def test_a_study_has_one_process_without_flock_too(tmp_path, monkeypatch, capsys):
    without_flock(monkeypatch, "EOPNOTSUPP")
    file = ROOT / "recipes/study/mini.toml"
    argv = [
        str(file),
        "--seeds=0",
        f"--arms={next(iter(study_plan.read(file).arms))}",
        f"--out={tmp_path / 'o'}",
    ]
    codes = []

    def meanwhile(*_):
        codes.append(study.main(argv))
        return []

    monkeypatch.setattr(study, "run_jobs", meanwhile)
    monkeypatch.setattr(study.study_report, "write", lambda *_: "the report")
    assert study.main(argv) == 0 and codes == [2] and len(list(tmp_path.glob("o/.lock-soft*"))) == 0
    assert "o is in use by another process, " in capsys.readouterr().err


def test_who_waits_says_so_again_and_again(tmp_path, monkeypatch, capsys):
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if sum(slept) == 70:
            holding.__exit__(None, None, None)

    holding = locks.lock(tmp_path / "t.lock")
    holding.__enter__()
    with monkeypatch.context() as m:
        m.setattr(locks.time, "sleep", sleep)
        m.setattr(locks.time, "monotonic", lambda: sum(slept))
        with locks.waiting_for(tmp_path / "t.lock", "the toy teacher"):
            pass
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(  # after 0, 30 and 60 seconds
        "waiting for the toy teacher" in line and "t.lock is held by another process" in line
        for line in lines
    )
