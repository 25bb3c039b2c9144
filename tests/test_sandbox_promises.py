"""The table of promises in data/sandbox/README.md: every line of it in every form of the sandbox.

No solution finds its tests, no program ends a run, none leaves files or hurts its neighbours.
"""

import contextlib
import json
import os
import subprocess
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data import sandbox
from data.sandbox import Helper, Helpers, Limits
from errors import RunFailed
from tests import test_sandbox, test_sandbox_judge, test_sandbox_network
from tests.conftest import ROOT
from tests.sandbox_attacks import seekers
from tests.sandbox_tools import (
    OTHER_USER,
    SECRET,
    TRY_CALLS,
    linux_only,
    open_python,
    processes_marked,
    scratch_of,
)

pytest_plugins = ["tests.sandbox_fixtures"]
pytestmark = linux_only

# --- the tests stay hidden ------------------------------------------------------------------------

TESTS = "from solution import f\nassert f(2) == 7436251\n"
# They are given away by the failure of an earlier program, if anything keeps it.
FAILS = "def f(x): return 0"
# Where every way to look for them works: in a process whose memory, environment, open files and
# parent hold the tests.
OPEN = """
import os, sys
tests, path = os.environ["TESTS"], sys.argv[1]
spare = [tests + str(number) for number in range(2000)]
out, into = os.pipe()
os.write(into, tests.encode())
os.set_inheritable(out, True)
for name, program in __import__("json").load(open(path)).items():
    if not os.fork():
        space = {}
        try:
            exec(program, space)
            os.write(1, f"{name}\\n".encode() if space["f"](2) == 7436251 else b"")
        finally:
            os._exit(0)
    os.wait()
"""


@pytest.fixture
def decoy(open_folder):
    """A data set with the tests, which anyone may read."""
    path = open_folder / "tests.jsonl"
    path.write_text(TESTS)
    path.chmod(0o644)
    return str(path)


def test_the_ways_to_look_for_tests_work_outside(open_folder, decoy):
    path = open_folder / "programs.json"
    for seconds in (0.5, 5.0, 50.0):  # as a busy machine needs
        path.write_text(json.dumps(seekers(decoy, seconds)))
        path.chmod(0o644)
        done = subprocess.run(
            [open_python(), "-c", OPEN, path],
            env={"TESTS": TESTS},
            cwd=open_folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            **OTHER_USER,
        )
        if len(done.stdout.splitlines()) >= 20:
            return
    pytest.fail(done.stdout + done.stderr)


def test_no_solution_finds_the_tests(jail, decoy):
    assert "7436251" in repr(jail.check(FAILS, TESTS))  # what this says, no later one may know
    for name, program in seekers(decoy).items():
        outcome = jail.check(program, TESTS)
        assert outcome.reason == "failed" and "assert f(2)" in outcome.detail, (name, outcome)


PACKAGES = """
import glob, os, sys
result = []
for path in {*sys.path, "/lib", "/usr/lib", "/usr/local/lib"}:
    for found in glob.glob(path + "/*-packages") + glob.glob(path + "/*/*-packages"):
        result += os.listdir(found)
"""


def test_installed_packages_are_hidden(jail):
    """They are not the standard library, and may bring the tests of a benchmark."""
    jail.needs("no namespaces")
    if not jail.result_outside(PACKAGES):
        pytest.skip("no packages are installed beside the standard library")
    assert jail.result(PACKAGES) == []


def test_every_line_of_the_table_has_its_tests():
    readme = (ROOT / "data/sandbox/README.md").read_text()
    lines = [line for line in readme.split("\n") if line.startswith("| ") and " x |" in line]
    tested = "".join(path.read_text() for path in Path(__file__).parent.glob("test_sandbox*.py"))
    assert len(lines) >= 12
    for line in lines:
        names = line.split("|")[-2].replace("`", "").split(", ")
        assert all(f"def test_{name.strip()}(" in tested for name in names), line


# --- no program ends the run ----------------------------------------------------------------------

SIGNALS = """
import ctypes, fcntl, os, resource, signal, socket, struct
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def call(x86_64, aarch64, *args):
    number = x86_64 if os.uname().machine == "x86_64" else aarch64
    result = libc.syscall(*map(ctypes.c_long, (number, *args)))
    if result < 0:
        raise OSError
    return result
pid, urgent, end = {pid}, signal.SIGURG, socket.socketpair()[0]
info = ctypes.create_string_buffer(struct.pack("iiiiII", urgent, 0, -1, 0, os.getpid(), 0), 128)
queued = ctypes.addressof(info)
calls = dict(
    kill=lambda: os.kill(pid, urgent),
    group=lambda: os.kill(-os.getpgid(pid), urgent),
    own_group=lambda: os.kill(0, urgent),
    tgkill=lambda: call(234, 131, pid, pid, urgent),
    tkill=lambda: call(200, 130, pid, urgent),
    queue=lambda: call(129, 138, pid, urgent, queued),
    thread_queue=lambda: call(297, 240, pid, pid, urgent, queued),
    pidfd=lambda: call(424, 424, call(434, 434, pid, 0), urgent, 0, 0),
    owner=lambda: fcntl.fcntl(end, 8, pid),
    owner_by_structure=lambda: fcntl.fcntl(end, 15, struct.pack("ii", 1, pid)),
    owner_by_ioctl=lambda: fcntl.ioctl(end, 0x8901, struct.pack("i", pid)),
    group_by_ioctl=lambda: fcntl.ioctl(end, 0x8902, struct.pack("i", pid)),
    limit=lambda: resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0)),
    affinity=lambda: os.sched_setaffinity(pid, os.sched_getaffinity(pid)),
    priority=lambda: os.setpriority(os.PRIO_PROCESS, pid, 19),
    scheduler=lambda: os.sched_setscheduler(pid, os.SCHED_BATCH, os.sched_param(0)),
)
"""


def test_signals_and_limits_of_every_kind(jail):
    outside = "child = os.fork()\nif not child:\n    os.setpgid(0, 0); signal.pause()\n"
    outside = "import os, signal\n" + outside + SIGNALS.format(pid="child") + TRY_CALLS
    done = jail.result_outside(outside + "\nos.kill(child, 9)")
    assert len(done) == 16, done
    jail.needs("signals and file attributes are not protected")
    assert jail.result(SIGNALS.format(pid="os.getppid()") + TRY_CALLS) == []


HEAPS = {
    "files": "for i in range(10**7):\n    open(str(i), 'w').close()",
    "folders": "for i in range(10**7):\n    os.mkdir(str(i))",
    "links": "for i in range(10**7):\n    os.symlink('x', str(i))",
    "names": "open('x', 'w').close()\nfor i in range(10**7):\n    os.link('x', str(i))",
    "a folder that is not listed": """
os.mkdir('x', 0o300)
for i in range(10**7):
    open(f'x/{i}', 'w').close()
""",
    "nested folders": "for _ in range(10**7):\n    os.mkdir('d')\n    os.chdir('d')",
    "long nested folders": "for _ in range(10**7):\n    os.mkdir('d' * 99)\n    os.chdir('d' * 99)",
    "bytes": "for i in range(10**7):\n    open(str(i), 'wb').write(bytes(1 << 20))",
}


def test_heaps_of_files_and_folders(jail):
    """They are few, and gone at once, also 2,000 folders that are nested."""
    nested = "for _ in range(2000):\n    os.mkdir('d')\n    os.chdir('d')"
    on_disk = any("no namespaces" in lack for lack in jail.helper.missing)
    for name, program in {**HEAPS, "2,000 nested folders": nested}.items():
        start = time.monotonic()
        outcome = jail.check("import os\n" + program, timeout=8.0 if on_disk else 0.5)
        assert outcome.reason in ("failed", "timeout") or program == nested, (name, outcome)
        assert outcome.reason == "failed" or not on_disk, (name, outcome)
        assert time.monotonic() - start < 60, name
        assert not scratch_of(jail.helper.pid), name


class Fragile:
    """A helper that some programs end, and that is as good as new afterwards."""

    pid, missing, error, owner = 0, (), "it fell", os.getpid()
    ends: tuple[str, ...] = ("bad",)

    def check(self, program, tests, limits):
        if program in self.ends:
            return None
        return sandbox.Outcome(True, "passed", 0.0)

    def close(self):
        pass


def test_a_program_that_ends_its_helper_has_crashed(monkeypatch):
    monkeypatch.setattr(sandbox, "Helper", Fragile)
    outcome = Helpers().check("bad", "", Limits())
    assert not outcome.passed and outcome.reason == "crashed" and "it fell" in outcome.detail
    assert Helpers().check("good", "", Limits()).passed
    monkeypatch.setattr(Fragile, "ends", ("bad", ""))
    with pytest.raises(RunFailed, match="it fell"):
        Helpers().check("bad", "", Limits())


# --- everything at once ---------------------------------------------------------------------------


def hostile(port, path, name, canary, victim):
    """{name: (program, limits)}: each escapes, harms, forges or falls, and its `f` is wrong."""
    pid, address = victim
    sources = {
        "file": (test_sandbox.HARM.format(folder=canary), 14),
        "call": (test_sandbox_network.CALL.format(port=port, path=path, name=name), 6),
        "spy": (test_sandbox.SPY.format(secret=SECRET, pid=pid, address=address), 6),
        "start": (test_sandbox.STARTS, 4),
        "signal": (SIGNALS.format(pid="os.getppid()"), 16),
        "signal to the run": (SIGNALS.format(pid=os.getpid()), 16),
        "signal to another": (SIGNALS.format(pid=pid), 16),
        "kill": (test_sandbox.KILL.replace("PIDS", f"[os.getppid(), 1, {pid}]"), 12),
    }
    programs = {}
    for kind, (source, count) in sources.items():
        for i in range(count):
            attempt = f"\ntry:\n    list(calls.values())[{i}]()\nexcept Exception:\n    pass"
            programs[f"{kind} {i}"] = source + attempt, {}
    for (reasons, _), ends in test_sandbox.ENDS.items():
        for i, program in enumerate(ends):
            programs[f"ends {reasons} {i}"] = program, {}
    for kind, program in HEAPS.items():
        programs[kind] = "import os\n" + program, {}
    for kind in ("FORK_BOMB", "MEMORY_BOMB", "OUTPUT_BOMB", "ORPHANS"):
        source = test_sandbox.IGNORE + getattr(test_sandbox, kind)
        programs[kind] = source, {"children": True, "tasks": 8}
    wrong = {
        name: (program + test_sandbox_judge.WRONG, more)
        for name, (program, more) in programs.items()
    }
    forged = {name: (program, {}) for name, program in test_sandbox_judge.FORGERIES.items()}
    return wrong | forged


@pytest.mark.slow
def test_campaign(shared_jail, open_folder, decoy, victim, monkeypatch):
    """Four at a time, in helpers that are kept: none finds the tests, escapes, is accepted, ends
    the run or leaves anything."""
    started = []

    def start():
        started.append(Helper(*shared_jail.arguments))
        return started[-1]

    monkeypatch.setattr(sandbox, "Helper", start)
    path, name = str(open_folder / "s"), f"srlm-{time.monotonic_ns()}"
    canary = test_sandbox.fill(open_folder / "canary")
    state, pool = test_sandbox.state(canary), Helpers()
    with contextlib.ExitStack() as stack:
        sockets, port = test_sandbox_network.listening_sockets(stack, path, name)
        jobs = [(name, program, TESTS, {}) for name, program in seekers(decoy).items()]
        for label, (program, more) in hostile(port, path, name, str(canary), victim).items():
            jobs.append((label, program, test_sandbox_judge.TESTS, more))

        def run(job):
            label, program, tests, more = job
            limits = Limits(**{"timeout": 2.0, "memory": 256 << 20} | more)
            return label, pool.check(program, tests, limits)

        with ThreadPoolExecutor(4) as workers, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcomes = list(workers.map(run, jobs))
        accepted = [label for label, outcome in outcomes if outcome.passed]
        ended = [(label, o) for label, o in outcomes if "ended the sandbox" in o.detail]
        assert len(jobs) >= 150 and not accepted and not ended, (accepted, ended)
        assert test_sandbox_network.reached(sockets) == 0
    assert test_sandbox.state(canary) == state
    assert Path(f"/proc/{victim[0]}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    helpers = {helper.pid for helper in pool._idle}
    assert processes_marked(shared_jail.mark) == helpers | {shared_jail.helper.pid}
    pool.close()
    assert len(started) == len(helpers) == 4  # none was replaced
    for helper in started:
        assert not scratch_of(helper.pid)
