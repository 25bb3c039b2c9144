"""Fixtures for the tests of the sandbox: a helper in every form that it takes, and decoys.

A test module loads them by `pytest_plugins = ["tests.sandbox_fixtures"]`.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data.sandbox import Helper, Limits
from tests.sandbox_tools import (
    AS_ROOT,
    NOBODY,
    OTHER_USER,
    SECRET,
    open_python,
    processes_marked,
    resident_bytes,
    scratch_of,
)


class Jail:
    """A helper under test."""

    def __init__(self, without=(), unprivileged=False):
        if unprivileged and not AS_ROOT:
            pytest.skip("the tests are run by an unprivileged user: the other form is this one")
        self.mark = f"mark-{uuid.uuid4().hex}"
        self.arguments = (
            (*without, self.mark),
            open_python() if unprivileged or without else sys.executable,
            NOBODY if unprivileged else None,
        )
        self.helper = Helper(*self.arguments)

    def check(self, program, tests="", timeout=60.0, **limits):
        return self.helper.check(program, tests, Limits(timeout, **limits))

    def result(self, program, **limits):
        """What the program leaves in `result`, by its own word."""
        program += "\nimport json\nraise RuntimeError(json.dumps(result))"
        outcome = self.check(program, **limits)
        assert outcome.detail.startswith("RuntimeError: "), outcome
        return json.loads(outcome.detail.removeprefix("RuntimeError: "))

    def result_outside(self, code):
        """The same for code that its user runs without a sandbox."""
        code += "\nimport json\nprint(json.dumps(result))"
        done = subprocess.run(
            [open_python(), "-c", code], cwd="/", capture_output=True, text=True, **OTHER_USER
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def needs(self, protection):
        """Skip the rest of a test where the system lacks a protection."""
        for lack in self.helper.missing:
            if protection in lack:
                pytest.skip(f"not available here: {lack}")

    def watch(self, program, **limits):
        """(outcome, the most processes seen at once, the largest resident size of one in bytes)."""
        most = largest = 0
        with ThreadPoolExecutor(1) as pool:
            outcome = pool.submit(self.check, program, **limits)
            while not outcome.done():
                pids = processes_marked(self.mark)
                most = max(most, len(pids))
                largest = max([largest, *map(resident_bytes, pids)])
                time.sleep(0.02)
        return outcome.result(), most, largest

    def watch_until_seen(self, program, count, **limits):
        """The same with ever more seconds for the program, until `count` processes were seen.

        program: SECONDS in it is how long it takes, 0.4 at first.
        """
        for seconds in (0.4, 2.0, 10.0, 50.0):
            outcome, most, _ = self.watch(program.replace("SECONDS", str(seconds)), **limits)
            if most >= count:
                break
            limits = {name: n * 5 if name == "timeout" else n for name, n in limits.items()}
        return outcome, most


def _forms():
    layers = {
        "": (),
        " without namespaces": ("namespaces",),
        " without Landlock": ("landlock",),
        " with an old Landlock": ("namespaces", "new landlock"),
        " with the filter alone": ("namespaces", "landlock"),
    }
    for name, without in layers.items():
        marks = [pytest.mark.slow] if without else []
        yield pytest.param((without, False), id="this user" + name, marks=marks)
        yield pytest.param((without, True), id="unprivileged" + name, marks=marks)


@pytest.fixture(scope="module", params=_forms())
def shared_jail(request):
    jail = Jail(*request.param)
    yield jail
    jail.helper.close()


@pytest.fixture
def jail(shared_jail):
    """After every test the helper is the one it was and works, and nothing else is left."""
    pid = shared_jail.helper.pid
    yield shared_jail
    assert processes_marked(shared_jail.mark) == {pid}
    assert shared_jail.check("x = 1").passed
    assert not scratch_of(pid)


@pytest.fixture
def open_folder():
    """A folder that anyone may write."""
    folder = Path(tempfile.mkdtemp(prefix="canary-"))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


VICTIM = f"""
import ctypes, sys
buffer = ctypes.create_string_buffer(b{SECRET!r})
print(ctypes.addressof(buffer), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def victim(shared_jail):
    """(pid, address) of a process of the helper's user.

    It has the secret in its environment and, at the address, in its memory.
    """
    process = subprocess.Popen(
        [open_python(), "-c", VICTIM],
        env={"SECRET": SECRET},
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        **OTHER_USER,
    )
    yield process.pid, int(process.stdout.readline())
    process.kill()
    process.communicate()
