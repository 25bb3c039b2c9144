"""One process at a time has a lock, with and without a file system that knows locks."""

import errno
import fcntl
import os
import subprocess
import sys
import time

import pytest

import locks
from errors import UserError
from eval import study, study_plan
from model.runs import only_one, open_run
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
        first = f"import errno, fcntl\ndef flock(*_): raise OSError(errno.{name}, 'no locks')\nfcntl.flock = flock\n"
    (tmp_path / f"code{len(list(tmp_path.glob('code*')))}.py").write_text(first + code)
    script = max(tmp_path.glob("code*.py"), key=lambda p: p.stat().st_mtime_ns)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(script)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


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


def test_the_dead_of_another_host_are_named_not_taken_for_dead(tmp_path, monkeypatch):
    without_flock(monkeypatch, "ENOSYS")
    path = tmp_path / "a.lock"
    locks.soft_path(path).write_text("4242\nnode-17\n99\n")
    with pytest.raises(locks.Busy, match=r"process 4242 on node-17 \(if it is gone, delete .*a.lock-soft\)"), locks.lock(path):
        pass
    locks.soft_path(path).unlink()
    with locks.lock(path):
        pass


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
        time.sleep(1)
        (folder / "inside").rmdir()
    print("won")
except locks.Busy:
    print("busy")
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
    assert sorted(racer.communicate()[0] for racer in racers) == ["busy\n"] * 3 + ["won\n"]


def test_a_run_has_one_process_without_flock_too(tmp_path, monkeypatch):
    without_flock(monkeypatch, "ENOLCK")
    with open_run(tmp_path, "r", "sft", False, 2, {}, 0) as (folder, step):
        assert step is None
        with pytest.raises(UserError, match="r is in use by another process, [0-9]+; wait"), open_run(tmp_path, "r", "sft", True, 2, {}, 0):
            pass
    with open_run(tmp_path, "r", "sft", False, 2, {}, 0):  # nothing was trained: as good as new, whatever locks left behind
        pass


def test_a_study_has_one_process_without_flock_too(tmp_path, monkeypatch, capsys):
    without_flock(monkeypatch, "EOPNOTSUPP")
    file = ROOT / "recipes/study/mini.toml"
    argv = [str(file), "--seeds=0", f"--arms={next(iter(study_plan.read(file).arms))}", f"--out={tmp_path / 'o'}"]
    codes = []

    def meanwhile(*_):
        codes.append(study.main(argv))
        return {}

    monkeypatch.setattr(study, "run_jobs", meanwhile)
    monkeypatch.setattr(study.study_report, "write", lambda *_: "the report")
    assert study.main(argv) == 0 and codes == [2] and len(list(tmp_path.glob("o/.lock-soft*"))) == 0
    assert "o is in use by another process, " in capsys.readouterr().err


def test_who_waits_says_so_again_and_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(locks, "SAY", 0.2)
    monkeypatch.setattr(locks, "ASK", 0.05)
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 12:
            holding.__exit__(None, None, None)
        time.monotonic()
        os.sched_yield()
        wait(seconds)

    wait = time.sleep
    holding = locks.lock(tmp_path / "t.lock")
    holding.__enter__()
    monkeypatch.setattr(locks.time, "sleep", sleep)
    with only_one(tmp_path / "t.lock", 0, "the embedded teacher"):
        pass
    lines = capsys.readouterr().out.splitlines()
    assert 2 <= len(lines) <= 4 and all("waiting for the embedded teacher" in line and "t.lock is held by another process" in line for line in lines)
    with only_one(tmp_path / "t.lock", 1, "it"), only_one(tmp_path / "t.lock", 0, "it"):  # another rank waits for nothing
        pass
