"""What the tests of the sandbox share, besides fixtures."""

import contextlib
import functools
import glob
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

linux_only = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the sandbox needs Linux"
)
AS_ROOT = os.geteuid() == 0
NOBODY = 54321  # a user without a name
# How attacks are made outside the sandbox: root would succeed at anything.
OTHER_USER = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if AS_ROOT else {}
SECRET = "a-secret-of-the-parent"

# An attack is a dict of calls; result: the names of those that succeeded.
TRY_CALLS = """
result = []
for name, attempt in calls.items():
    try:
        attempt()
        result.append(name)
    except (OSError, OverflowError, AssertionError):
        pass
"""


@functools.cache
def open_python():
    """A Python that any user can run, and this checkout with it."""
    jail = str(ROOT / "data/sandbox/jail.py")
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        command = [python, "-S", "-c", "import os, socket, sys; os.stat(sys.argv[1])", jail]
        with contextlib.suppress(OSError):
            if not AS_ROOT:
                return python
            done = subprocess.run(command, cwd="/", capture_output=True, **OTHER_USER)
            if done.returncode == 0:
                return python
    pytest.skip("needs a Python and a checkout that are open to all users, to run as one")


def processes_marked(mark):
    """The processes of a helper, by the mark in their command line, which its children inherit."""
    found = set()
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if mark in Path(path).read_text():
                found.add(int(path.split("/")[2]))
    return found


def scratch_of(pid):
    """The scratch folders of a helper, which knows no TMPDIR: it has none of the environment."""
    return glob.glob(f"/tmp/srlm-sandbox-{pid}-*")


def resident_bytes(pid):
    """The resident size of a process; 0 if it is gone."""
    with contextlib.suppress(OSError):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return 0
