"""The processes that serve the sandbox: as many as are asked for, replaced, ended, and honest."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data import sandbox
from data.sandbox import Helper, Helpers, Limits, check, check_many
from errors import RunFailed
from tests.conftest import ROOT, wait_until
from tests.sandbox_tools import AS_ROOT, linux_only, open_python, processes_marked, scratch_of

pytestmark = linux_only
PATIENT = Limits(timeout=60.0)  # a busy machine starts a program late


def test_check_many_keeps_the_order_and_uses_its_workers(monkeypatch):
    jobs = []
    for i in range(24):
        if i % 2:
            jobs.append(f"assert {i} % 3")
        else:
            jobs.append((f"def f(): return {i} % 3", "from solution import f\nassert f()"))
    outcomes = check_many(jobs, 3, timeout=60.0)
    assert [outcome.passed for outcome in outcomes] == [i % 3 > 0 for i in range(24)]
    meeting, ask = threading.Barrier(4, timeout=300), sandbox.HELPERS.check

    def beside_three_others(*job):
        meeting.wait()
        return ask(*job)

    monkeypatch.setattr(sandbox.HELPERS, "check", beside_three_others)
    outcomes = check_many(["import time\ntime.sleep(60)"] * 4, 4, timeout=1.0)
    assert [outcome.reason for outcome in outcomes] == ["timeout"] * 4
    monkeypatch.undo()
    with pytest.raises(TypeError):
        check("x = 1", time_out=3)


def test_a_helper_killed_from_outside_is_replaced():
    pool = Helpers()
    try:
        assert pool.check("x = 1", "", PATIENT).passed
        (helper,) = pool._idle
        os.kill(helper.pid, signal.SIGKILL)
        assert pool.check("x = 1", "", PATIENT).passed
        assert pool._idle[0].pid != helper.pid
    finally:
        pool.close()


def test_a_supervisor_killed_from_outside_is_replaced():
    pool = Helpers()
    pool._idle.append(Helper((mark := f"mark-{uuid.uuid4().hex}",)))
    first = pool._idle[0].pid
    try:
        for seconds in (1, 4, 16):  # until the program lasts longer than its killer needs
            with ThreadPoolExecutor(1) as killers:
                was_killed = killers.submit(kill_child_of, first)
                program = f"import time\ntime.sleep({seconds})"
                assert pool.check(program, "", PATIENT).passed
            if was_killed.result():
                break
        assert pool._idle[0].pid != first and processes_marked(mark) == set()
    finally:
        pool.close()


def kill_child_of(pid):
    """Kill what a process starts, in the midst of it. Returns whether it was still there."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    while not children.read_text():
        time.sleep(0.02)
    time.sleep(0.2)
    for child in children.read_text().split()[:1]:
        os.kill(int(child), 9)
        return True
    return False


DAEMON = """
import os, time
if not os.fork():
    os.setsid()
    if not os.fork():
        time.sleep(600)
    os._exit(0)
time.sleep(600)
"""
RUN = """
from data.sandbox import Helper, Limits
helper = Helper({layers!r})
print(helper.pid, flush=True)
print(helper.check({program!r}, '', Limits(timeout=600, children=True)))
"""


@pytest.mark.parametrize("target", ["the run", "the helper"])
@pytest.mark.parametrize("without", [(), ("namespaces",)], ids=["all layers", "no namespaces"])
def test_nothing_outlives_the_run(target, without):
    mark = f"mark-{uuid.uuid4().hex}"
    run = subprocess.Popen(
        [sys.executable, "-c", RUN.format(layers=(*without, mark), program=DAEMON)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    helper_pid = int(run.stdout.readline())

    def own():
        return processes_marked(mark) - {run.pid}

    wait_until(lambda: len(own()) >= 5)
    assert not without or scratch_of(helper_pid)
    os.kill(run.pid if target == "the run" else helper_pid, signal.SIGKILL)
    wait_until(lambda: not own())
    assert not scratch_of(helper_pid)
    run.kill()
    run.communicate()


@pytest.mark.parametrize("count", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_a_helper_killed_at_any_moment_leaves_no_folder(count):
    """Its folder is made by the process that outlives it."""
    rng = random.Random(0)
    for number in range(count):
        mark = f"mark-{uuid.uuid4().hex}"
        helper = Helper(("namespaces", mark))
        killer = threading.Timer(rng.uniform(0, 0.02), os.kill, (helper.pid, signal.SIGKILL))
        killer.start()
        while helper.check("x = 1", "", PATIENT):
            continue
        killer.join()
        wait_until(lambda mark=mark: not processes_marked(mark))
        assert not scratch_of(helper.pid), number


def test_what_is_lacking_is_said_once(monkeypatch):
    helper = Helper(("namespaces", "landlock", "seccomp"))
    lacks = " ".join(helper.missing)
    helper.close()
    for word in ("namespaces", "Landlock", "filter", "network", "files", "process"):
        assert word in lacks
    pool = Helpers()
    monkeypatch.setattr(sandbox, "Helper", lambda: Helper(("landlock",)))
    with pytest.warns(UserWarning, match="no Landlock") as caught:
        for _ in range(2):
            helpers = [pool._take(), pool._take()]
            for helper in helpers:
                helper.close()
    assert len(caught) == 1


def test_a_helper_that_does_not_start_is_one_line(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(RunFailed, match="did not start"):
        Helper(python=str(python))


# It starts Python as a root that was left some rights or none, as some containers do.
BARE_ROOT = """#!{python}
import ctypes, os, sys
for capability in set(range(64)) - {left}:
    ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)
os.execv({python!r}, [{python!r}, *sys.argv[1:]])
"""


@pytest.mark.skipif(not AS_ROOT, reason="needs root, to give its rights up")
@pytest.mark.parametrize("left", [set(), {6, 7}, {0, 6, 7}], ids=["none", "users", "chown"])
def test_a_root_without_rights(left, tmp_path):
    python = tmp_path / "python"
    python.write_text(BARE_ROOT.format(python=open_python(), left=left))
    python.chmod(0o755)
    helper = Helper(python=str(python))
    outcome = helper.check("x = 1", "", PATIENT)
    lacks = " ".join(helper.missing)
    helper.close()
    assert outcome.passed and "no other user" in lacks
    assert not scratch_of(helper.pid)


# It starts Python as the root of a user namespace with 65536 users, as rootless containers do.
FEW_USERS = """#!{python}
import ctypes, os, sys
ready, say_ready = os.pipe()
pid = os.fork()
if not pid:
    os.read(ready, 1)
    for name in ("uid_map", "gid_map"):
        with open(f"/proc/{{os.getppid()}}/{{name}}", "w") as file:
            file.write("0 0 65536")
    os._exit(0)
ctypes.CDLL(None).unshare(1 << 28)
os.write(say_ready, b"x")
os.waitpid(pid, 0)
os.execv({python!r}, [{python!r}, *sys.argv[1:]])
"""


MANY = """
from data.sandbox import HELPERS, check_many
outcomes = check_many(["import time; time.sleep(1)"] * 10, workers=10, timeout=60.0)
HELPERS.close()
print([outcome for outcome in outcomes if not outcome.passed])
"""


@pytest.mark.skipif(not AS_ROOT, reason="needs root, to map its users")
def test_programs_in_a_container_with_few_users_share_no_limit(tmp_path):
    """Each has two processes, and the limit of the user as whom they run is 17."""
    python = tmp_path / "python"
    python.write_text(FEW_USERS.format(python=sys.executable))
    python.chmod(0o755)
    done = subprocess.run([python, "-c", MANY], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


REPLACED = """
import os
scratch = os.getcwd()
os.chdir("/")
os.rmdir(scratch)
os.symlink({victim!r}, scratch)
"""


def test_cleaning_up_changes_nothing_where_a_link_leads(tmp_path):
    """A program can replace its folder where no layer protects the one that it is in."""
    victim = tmp_path / "victim"
    victim.mkdir()
    victim.chmod(0o755)  # whatever the umask
    helper = Helper(("namespaces", "landlock", "seccomp"), open_python())
    outcome = helper.check(REPLACED.format(victim=str(victim)), "", PATIENT)
    helper.close()
    (link,) = map(Path, scratch_of(helper.pid))
    assert outcome.passed and link.is_symlink()
    link.unlink()
    assert victim.stat().st_mode & 0o777 == 0o755
