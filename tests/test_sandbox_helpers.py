"""The processes that serve the sandbox: as many as are asked for, replaced, ended, and honest."""

import glob
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest

from data import sandbox
from data.sandbox import Helper, Helpers, Limits, check, check_many
from errors import RunFailed
from tests.conftest import ROOT
from tests.sandbox_tools import AS_ROOT, linux_only, open_python, processes_marked

pytestmark = linux_only


def test_check_many_keeps_the_order_and_uses_its_workers():
    jobs = []
    for i in range(24):
        if i % 2:
            jobs.append(f"assert {i} % 3")
        else:
            jobs.append((f"def f(): return {i} % 3", "from solution import f\nassert f()"))
    assert [outcome.passed for outcome in check_many(jobs, 3)] == [i % 3 > 0 for i in range(24)]
    start = time.monotonic()
    outcomes = check_many(["import time\ntime.sleep(60)"] * 4, 4, timeout=1.0)
    assert [outcome.reason for outcome in outcomes] == ["timeout"] * 4
    assert time.monotonic() - start < 3.5
    with pytest.raises(TypeError):
        check("x = 1", time_out=3)


def test_a_helper_killed_from_outside_is_replaced():
    pool = Helpers()
    try:
        assert pool.check("x = 1", "", Limits()).passed
        (helper,) = pool._idle
        os.kill(helper.pid, signal.SIGKILL)
        assert pool.check("x = 1", "", Limits()).passed
        assert pool._idle[0].pid != helper.pid
    finally:
        pool.close()


def test_a_supervisor_killed_from_outside_is_replaced():
    pool = Helpers()
    pool._idle.append(Helper((mark := f"mark-{time.monotonic_ns()}",)))
    first = pool._idle[0].pid
    killer = threading.Thread(target=kill_child_of, args=(first,))
    killer.start()
    try:
        assert pool.check("import time\ntime.sleep(1)", "", Limits()).passed
        assert pool._idle[0].pid != first and processes_marked(mark) == set()
    finally:
        killer.join()
        pool.close()


def kill_child_of(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children")
    while not children.read_text():
        time.sleep(0.02)
    time.sleep(0.2)
    os.kill(int(children.read_text().split()[0]), 9)


DAEMON = """
import os, time
if not os.fork():
    os.setsid()
    if not os.fork():
        time.sleep(60)
    os._exit(0)
time.sleep(60)
"""
RUN = """
from data.sandbox import Helper, Limits
helper = Helper({layers!r})
print(helper.pid, flush=True)
print(helper.check({program!r}, '', Limits(timeout=30, children=True)))
"""


def wait_until(condition):
    for _ in range(200):
        if condition():
            return True
        time.sleep(0.05)
    return False


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
    scratch = f"/tmp/srlm-sandbox-{helper_pid}-*"

    def own():
        return processes_marked(mark) - {run.pid}

    assert wait_until(lambda: len(own()) >= 5)
    assert not without or glob.glob(scratch)
    os.kill(run.pid if target == "the run" else helper_pid, signal.SIGKILL)
    assert wait_until(lambda: not own()), own()
    assert not glob.glob(scratch)
    run.kill()
    run.communicate()


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


# It starts Python as a root that was left no rights, as some containers do.
BARE_ROOT = """#!{python}
import ctypes, os, sys
for capability in range(64):
    ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)
os.execv({python!r}, [{python!r}, *sys.argv[1:]])
"""


@pytest.mark.skipif(not AS_ROOT, reason="needs root, to give its rights up")
def test_a_root_without_rights(tmp_path):
    python = tmp_path / "python"
    python.write_text(BARE_ROOT.format(python=open_python()))
    python.chmod(0o755)
    helper = Helper(python=str(python))
    outcome = helper.check("x = 1", "", Limits())
    lacks = " ".join(helper.missing)
    helper.close()
    assert outcome.passed and "no other user" in lacks
