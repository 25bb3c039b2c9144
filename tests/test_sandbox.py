"""Hostile programs: all contained, the run unharmed, no process and no file left.

Every attack that could fail for a reason of its own is first made outside the sandbox, by the same user on a decoy, where it must succeed.
All of it in every form that the sandbox takes here: as this user and as an unprivileged one, with and without namespaces and Landlock.
"""

import contextlib
import functools
import glob
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data import sandbox
from data.sandbox import Helper, Helpers, Limits, check, check_many
from errors import RunFailed
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the sandbox needs Linux"
)
AS_ROOT, NOBODY = os.geteuid() == 0, 54321  # a user without a name
OTHER = (
    dict(user=NOBODY, group=NOBODY, extra_groups=[]) if AS_ROOT else {}
)  # root would succeed at anything
SECRET = "a-secret-of-the-parent"


@functools.cache
def open_python():
    """A Python that any user can run, and this checkout with it."""
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        with contextlib.suppress(OSError):
            reads = [
                python,
                "-S",
                "-c",
                "import os, socket, sys; os.stat(sys.argv[1])",
                str(ROOT / "data/sandbox/jail.py"),
            ]
            if (
                not AS_ROOT
                or subprocess.run(reads, cwd="/", capture_output=True, **OTHER).returncode == 0
            ):
                return python
    pytest.skip("needs a Python and a checkout that are open to all users, to run as one")


class Jail:
    """A helper under test. outside(code): the same code run by its user with no sandbox."""

    def __init__(self, without=(), unprivileged=False):
        if unprivileged and not AS_ROOT:
            pytest.skip("the tests are run by an unprivileged user: the other form is this one")
        self.mark, user = f"mark-{uuid.uuid4().hex}", NOBODY if unprivileged else None
        self.helper = Helper(
            (*without, self.mark),
            open_python() if unprivileged or without else sys.executable,
            user,
        )

    def check(self, program, tests="", **limits):
        return self.helper.check(program, tests, Limits(**limits))

    def told(self, program, **limits):
        """What `told` is at the program's end, as it says itself."""
        outcome = self.check(
            program + "\nimport json\nraise RuntimeError(json.dumps(told))", **limits
        )
        assert outcome.detail.startswith("RuntimeError: "), outcome
        return json.loads(outcome.detail.removeprefix("RuntimeError: "))

    def outside(self, code):
        code += "\nimport json\nprint(json.dumps(told))"
        done = subprocess.run(
            [open_python(), "-c", code], cwd="/", capture_output=True, text=True, **OTHER
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def needs(self, protection):
        if lacks := [lack for lack in self.helper.missing if protection in lack]:
            pytest.skip(f"not available here: {lacks[0]}")

    def watched(self, program, **limits):
        """(outcome, the most processes seen at once, the largest resident size of one in bytes)."""
        most = largest = 0
        with ThreadPoolExecutor(1) as pool:
            outcome = pool.submit(self.check, program, **limits)
            while not outcome.done():
                pids = marked(self.mark)
                most = max(most, len(pids))
                for pid in pids:
                    with contextlib.suppress(OSError):
                        largest = max(
                            largest,
                            int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                            * os.sysconf("SC_PAGE_SIZE"),
                        )
                time.sleep(0.02)
        return outcome.result(), most, largest


def marked(mark):
    """The processes of a helper, by the mark in their command line, which all of its children inherit."""
    found = set()
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if mark in Path(path).read_text():
                found.add(int(path.split("/")[2]))
    return found


FORMS = {
    "": (),
    " without namespaces": ("namespaces",),
    " with the filter alone": ("namespaces", "landlock"),
}
FORMS = [
    pytest.param((without, unprivileged), id=user + name, marks=[pytest.mark.slow] * bool(without))
    for name, without in FORMS.items()
    for user, unprivileged in (("this user", False), ("unprivileged", True))
]


@pytest.fixture(scope="module", params=FORMS)
def shared(request):
    jail = Jail(*request.param)
    yield jail
    jail.helper.close()


@pytest.fixture
def jail(shared):
    """And after every test: the helper is the one it was and does its work, and nothing else is left."""
    pid = shared.helper.pid()
    yield shared
    assert marked(shared.mark) == {pid} and shared.check("x = 1").passed
    assert not glob.glob(f"/tmp/srlm-sandbox-{pid}-*")


@pytest.fixture
def open_folder():
    """A folder that anyone may write, with a file that anyone may write."""
    folder = Path(tempfile.mkdtemp(prefix="canary-"))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def victim(shared):
    """(pid, address): a process of the helper's user with the secret in its environment and, at the address, in its memory."""
    code = f"import ctypes, sys; b = ctypes.create_string_buffer(b{SECRET!r}); print(ctypes.addressof(b), flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [open_python(), "-c", code],
        env={"SECRET": SECRET},
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        **OTHER,
    )
    yield process.pid, int(process.stdout.readline())
    process.kill()
    process.communicate()


# --- processes, memory, time, output ---------------------------------------------------------------------------------

TRIED = """
told = []
for name, attempt in calls.items():
    try:
        attempt()
        told.append(name)
    except (OSError, OverflowError, AssertionError):
        pass
"""  # an attack is a dict of calls; told: those that succeeded


def test_no_processes_unless_asked_for(jail):
    jail.needs("filter of system calls")
    program = """
import os, subprocess, sys
calls = dict(fork=lambda: os.fork() or os._exit(0), spawn=lambda: os.posix_spawn(sys.executable, [sys.executable], {}),
             run=lambda: subprocess.run(["/bin/true"]), exec=lambda: os.execv("/bin/true", ["true"]))
"""
    if AS_ROOT:
        assert jail.outside(program + "del calls['exec']" + TRIED) == ["fork", "spawn", "run"]
    assert jail.told(program + TRIED) == []


COUNT = """
import os, threading, time
told = 0
try:
    for _ in range(200):
        {start}
        told += 1
except (OSError, RuntimeError):
    pass
"""


def test_bombs_of_processes_and_threads(jail):
    """The mild ones first: they say how many there may be."""
    assert (
        4
        <= jail.told(COUNT.format(start="os.fork() or time.sleep(60)"), children=True, tasks=8)
        <= 8
    )
    assert marked(jail.mark) == {jail.helper.pid()}
    assert (
        4
        <= jail.told(
            COUNT.format(start="threading.Thread(target=time.sleep, args=(60,)).start()"), tasks=16
        )
        <= 16
    )
    bomb = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    outcome, most, _ = jail.watched(bomb, children=True, tasks=8, timeout=0.4)
    # four are the sandbox's; and where all of the user's are counted, some of those may have ended since
    assert outcome.reason == "timeout" and 4 <= most <= 16


IGNORE = """
import os, signal, threading, time
for number in range(1, 64):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
"""
ORPHANS = """
for _ in range(2):
    if not os.fork():
        os.setsid()
        os.fork() or time.sleep(60)
        os._exit(0)
os.fork() or time.sleep(60)
time.sleep(0.4)
"""
THREADS = "def forever():\n    while True: time.sleep(0.01)\nfor _ in range(4): threading.Thread(target=forever).start()"


def test_children_and_threads_end_with_the_program(jail):
    outcome, most, _ = jail.watched(IGNORE + ORPHANS, children=True)
    assert (
        outcome.passed and outcome.seconds < 4 and most >= 6
    )  # the helper, the keeper, the tests, the program, and three that sleep
    assert marked(jail.mark) == {jail.helper.pid()}
    outcome = jail.check(IGNORE + THREADS)
    assert outcome.passed and outcome.seconds < 4


def test_bombs_of_memory_and_output(jail, capfd):
    outcome, _, largest = jail.watched(
        "x = []\nwhile True:\n    x.append(b'x' * (1 << 22))", memory=256 << 20
    )
    assert outcome.reason == "memory" and 100 << 20 < largest < 256 << 20
    outcome, _, largest = jail.watched(
        "import os\nwhile True:\n    print('x' * 10**6)\n    os.write(2, b'y' * 10**6)", timeout=0.4
    )
    assert outcome.reason == "timeout" and largest < 100 << 20
    assert jail.check(
        "import sys\nfor _ in range(20):\n    print('passed' * 10**6, file=sys.stderr)"
    ).passed
    assert capfd.readouterr() == ("", "")


DEEP = "import sys\nsys.setrecursionlimit(10**9)\n"
ENDS = {  # (reason, a word of the detail): programs
    ("timeout", "longer than"): [
        "while True: pass",
        "import time\ntime.sleep(60)",
        "9**9**9",
        "import re\nre.match('(a+)+$', 'a' * 40 + 'b')",
        IGNORE + "while True: pass",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    ],
    ("memory", "MemoryError"): ["x = [0] * 10**11", "x = bytearray(1 << 40)", "x = 1 << (1 << 36)"],
    ("failed memory crashed timeout", ""): [
        DEEP + "def f(): return f()\nf()",
        DEEP + "class A:\n    def __repr__(self): return repr(self)\nrepr(A())",
        "eval('(' * 10**5 + ')' * 10**5)",
        "x = 10**(10**9)",
    ],
    ("failed", "RecursionError"): ["def f(): return f()\nf()"],
    ("crashed", "exit code 0"): ["import os\nos._exit(0)"],
    ("crashed", "exit code 1"): ["import os\nos._exit(1)"],
    ("crashed", "signal 9"): ["import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"],
    ("crashed", "signal 6"): ["import os\nos.abort()"],
    ("crashed", "signal 11"): ["import ctypes\nctypes.string_at(0)"],
    ("failed", "SystemExit"): ["import sys\nsys.exit(0)", "raise SystemExit"],
    ("failed", "KeyboardInterrupt"): ["raise KeyboardInterrupt"],
    ("failed", "EOFError"): ["input()"],
    ("failed", "SyntaxError"): ["def f(:"],
    ("failed", "ModuleNotFoundError"): ["import nothing_of_this_name"],
    ("failed", "ZeroDivisionError: division"): ["1/0"],
    ("failed", "AssertionError: no"): ["assert 1 == 2, 'no'"],
    ("failed", "ValueError"): ["x = '\\ud800'\nraise ValueError(x)"],
    ("failed", "null bytes"): ["\x00"],
}


def test_ends_that_are_none(jail):
    for (reasons, word), programs in ENDS.items():
        limits = (
            dict(timeout=0.2 if reasons == "timeout" else 0.4, memory=256 << 20)
            if "timeout" in reasons
            else {}
        )
        for program in programs:
            for part, tests in (
                (program, ""),
                ("def f(): return 1\n" + program, "from solution import f\nassert f() == 1"),
            ):
                if tests and limits:
                    continue  # slow, and the same
                began, outcome = time.monotonic(), jail.check(part, tests, **limits)
                assert (
                    not outcome.passed and outcome.reason in reasons and word in outcome.detail
                ), (program, outcome)
                assert time.monotonic() - began < 4, program


# --- files -----------------------------------------------------------------------------------------------------------

HARM = """
import os, shutil
at = lambda name: {folder!r} + "/" + name
calls = dict(
    append=lambda: open(at("append"), "a").write("x"), overwrite=lambda: open(at("overwrite"), "w").write("x"),
    update=lambda: open(at("update"), "r+").write("x"), truncate=lambda: os.truncate(at("truncate"), 0), unlink=lambda: os.unlink(at("unlink")),
    rename=lambda: os.rename(at("rename"), at("renamed")), new=lambda: open(at("new"), "x"), mkdir=lambda: os.mkdir(at("mkdir")),
    symlink=lambda: os.symlink("a", at("symlink")), link=lambda: os.link(at("own"), at("linked")), mkfifo=lambda: os.mkfifo(at("fifo")),
    chmod=lambda: os.chmod(at("own"), 0), utime=lambda: os.utime(at("own"), (0, 0)), rmtree=lambda: shutil.rmtree(at("tree")))
"""
ELSEWHERE = [
    "/etc/x",
    "/usr/x",
    "/x",
    "/dev/shm/x",
    "/var/tmp/x",
    os.path.dirname(os.__file__) + "/x",
]


def fill(folder):
    (folder / "tree").mkdir(parents=True)
    for name in (
        "append",
        "overwrite",
        "update",
        "truncate",
        "unlink",
        "rename",
        "own",
        "tree/leaf",
    ):
        (folder / name).write_text("canary")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o777)
        if AS_ROOT and path.name in ("own", "tree", "leaf"):
            os.chown(path, NOBODY, NOBODY)
    return folder


def state(folder):
    text = lambda p: p.is_file() and os.access(p, os.R_OK) and p.read_text()
    return {
        str(p.relative_to(folder)): (p.lstat().st_mode, p.lstat().st_mtime, text(p))
        for p in folder.rglob("*")
    }


def test_files_are_not_deleted_overwritten_or_made(jail, open_folder):
    decoy, canary = fill(open_folder / "decoy"), fill(open_folder / "canary")
    before = state(canary)
    assert (
        len(jail.outside(HARM.format(folder=str(decoy)) + TRIED)) == 14 and state(decoy) != before
    )
    jail.needs("files are protected by their permissions alone")
    assert jail.told(HARM.format(folder=str(canary)) + TRIED) == [] and state(canary) == before
    jail.told(f"calls = {{p: lambda p=p: open(p, 'w') for p in {ELSEWHERE}}}" + TRIED)
    assert not any(map(os.path.exists, ELSEWHERE))


BIG = """
told = 0
try:
    with {opened} as f:
        while told < 64 and f.write(b"x" * (1 << 18)):
            told += 1
            {then}
except OSError:
    pass
"""


def test_a_scratch_folder_of_its_own(jail):
    jail.needs("cannot write a scratch folder")
    program = """
import os, tempfile
told = os.listdir(".")
open("a", "w").write("b")
os.makedirs("c/d/e"), os.symlink("/", "c/f"), os.rename("a", "g")
assert open("g").read() == "b" and tempfile.mkdtemp(dir=".")
os.makedirs("locked/within"), os.chmod("locked/within", 0) if {chmod} else None, os.mkdir("shut", 0)
"""
    shared = any("no namespaces" in lack for lack in jail.helper.missing)
    program = program.replace("{chmod}", str(not shared))
    assert jail.told(program) == [] and jail.told(program) == []
    assert 2 <= jail.told(BIG.format(opened="open('big', 'wb', 0)", then="pass"), disk=1 << 20) <= 4
    if not shared:  # not one file alone, but all of them
        assert (
            2
            <= jail.told(
                BIG.format(opened="open('0', 'wb', 0)", then="f = open(str(told), 'wb', 0)"),
                disk=1 << 20,
            )
            <= 4
        )


# --- the parent ------------------------------------------------------------------------------------------------------

SPY = """
import ctypes, glob, os
secret, libc = {secret!r}.encode(), ctypes.CDLL(None, use_errno=True)
def mem():
    fd = os.open("/proc/{pid}/mem", os.O_RDONLY)
    return os.pread(fd, 64, {address})
def vm():
    buffer = ctypes.create_string_buffer(64)
    class Vector(ctypes.Structure):
        _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
    here, there = Vector(ctypes.addressof(buffer), 64), Vector({address}, 64)
    libc.process_vm_readv({pid}, ctypes.byref(here), ctypes.c_ulong(1), ctypes.byref(there), ctypes.c_ulong(1), ctypes.c_ulong(0))
    return buffer.raw
def ptrace():
    libc.ptrace.restype = ctypes.c_long
    attached = libc.ptrace(ctypes.c_long(16), ctypes.c_long({pid}), None, None) == 0
    if attached:
        os.waitpid({pid}, 0x40000000)
        libc.ptrace(ctypes.c_long(17), ctypes.c_long({pid}), None, None)
    return secret if attached else b""
mine = lambda p: os.access(p, os.R_OK) and os.stat(p).st_uid == os.getuid()
reads = dict(environ=lambda: open("/proc/{pid}/environ", "rb").read(), mem=mem, vm=vm, ptrace=ptrace,
             all=lambda: b"".join(open(p, "rb").read() for p in glob.glob("/proc/[0-9]*/environ") if mine(p)),
             own=lambda: repr(dict(os.environ)).encode())
def finds(read):
    assert secret in read()
calls = dict((name, lambda read=read: finds(read)) for name, read in reads.items())
"""


def test_the_parents_environment_and_memory(jail, victim, monkeypatch):
    monkeypatch.setenv("SECRET", SECRET)
    jail.needs("memory of your user's processes can be read")
    spy = SPY.format(secret=SECRET, pid=victim[0], address=victim[1]) + TRIED
    assert jail.outside(spy) == ["environ", "mem", "vm", "ptrace", "all", "own"]
    assert jail.told(spy) == []
    assert jail.told(SPY.format(secret=SECRET, pid=os.getpid(), address=victim[1]) + TRIED) == []
    assert (
        jail.told(
            "import os\ntold = [name for name in os.environ if name not in ('PYTHONHASHSEED', 'LC_CTYPE')]"
        )
        == []
    )


def test_what_is_open(jail):
    """Nothing of the parent's: null devices, so that reading ends at once, and the two pipes on which the program is asked."""
    program = "import os\ntold = []\nfor fd in range(256):\n    try: told.append([fd, os.fstat(fd).st_mode >> 12])\n    except OSError: pass"
    found = jail.told(program)
    assert [kind for _, kind in found] == [2, 2, 2, 1, 1] and [fd for fd, _ in found][:3] == [
        0,
        1,
        2,
    ]
    assert jail.told("import sys, os\ntold = [sys.stdin.read(), os.read(0, 10).decode()]") == [
        "",
        "",
    ]


KILL = """
import os, resource, signal
calls = {}
for pid in PIDS:
    for name in ("SIGUSR1", "SIGTERM", "SIGKILL"):
        calls[f"{name} {pid}"] = lambda pid=pid, name=name: os.kill(pid, getattr(signal, name))
    calls[f"limit {pid}"] = lambda pid=pid: resource.prlimit(pid, resource.RLIMIT_NOFILE, (9, 9))
"""


def test_signals_to_the_parent(jail, victim):
    decoy = subprocess.Popen(["sleep", "60"], **(dict(user=NOBODY) if AS_ROOT else {}))
    assert (
        jail.outside(KILL.replace("PIDS", f"[{decoy.pid}]") + TRIED)[:1] == [f"SIGUSR1 {decoy.pid}"]
        and decoy.wait(10) < 0
    )
    jail.needs("signals and file attributes are not protected")
    pids = [victim[0], os.getpid(), jail.helper.pid()]
    had = [Path(f"/proc/{pid}/limits").read_text() for pid in pids]
    jail.check(KILL.replace("PIDS", f"[*{pids}, 1, os.getppid()]") + TRIED)
    assert all(
        Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        for pid in pids
    )
    assert [Path(f"/proc/{pid}/limits").read_text() for pid in pids] == had


CALL = """
import socket
def tcp():
    with socket.create_connection(("127.0.0.1", {port}), 1) as s: s.send(b"tcp")
def udp():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s: s.sendto(b"udp", ("127.0.0.1", {port}))
def unix():
    with socket.socket(socket.AF_UNIX) as s: s.connect({path!r})
def abstract():
    with socket.socket(socket.AF_UNIX) as s: s.connect("\\0" + {name!r})
def pair():
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    a.sendto(b"pair", {path!r} + ".d")
def listen():
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); s.listen()
calls = dict(tcp=tcp, udp=udp, unix=unix, abstract=abstract, pair=pair, listen=listen)
"""
KINDS = [
    (socket.AF_INET, socket.SOCK_STREAM),
    (socket.AF_INET, socket.SOCK_DGRAM),
    (socket.AF_UNIX,),
    (socket.AF_UNIX,),
    (socket.AF_UNIX, socket.SOCK_DGRAM),
]


def test_sockets(jail, open_folder):
    path, name = str(open_folder / "s"), uuid.uuid4().hex
    with contextlib.ExitStack() as stack:
        tcp, udp, unix, abstract, pair = everyone = [
            stack.enter_context(socket.socket(*kind)) for kind in KINDS
        ]
        tcp.bind(("127.0.0.1", 0))
        port = tcp.getsockname()[1]
        for s, address in (
            (udp, ("127.0.0.1", port)),
            (unix, path),
            (abstract, "\0" + name),
            (pair, path + ".d"),
        ):
            s.bind(address)
        for file in (path, path + ".d"):
            os.chmod(file, 0o777)
        for s in everyone:
            s.settimeout(0.05)
            if s in (tcp, unix, abstract):
                s.listen()

        def reached():
            seen = []
            for s in everyone:
                with contextlib.suppress(TimeoutError):
                    s.accept()[0].close() if s in (tcp, unix, abstract) else s.recv(10)
                    seen.append(s)
            return len(seen)

        calls = CALL.format(port=port, path=path, name=name) + TRIED
        assert len(jail.outside(calls)) == 6 and reached() == 5
        jail.needs("the network, signals")
        assert jail.told(calls) == [] and reached() == 0


# --- the helpers -----------------------------------------------------------------------------------------------------


def test_check_many_keeps_the_order_and_uses_its_workers():
    jobs = [
        f"assert {i} % 3"
        if i % 2
        else (f"def f(): return {i} % 3", "from solution import f\nassert f()")
        for i in range(24)
    ]
    assert [o.passed for o in check_many(jobs, 3)] == [i % 3 > 0 for i in range(24)]
    began = time.monotonic()
    assert [o.reason for o in check_many(["import time\ntime.sleep(60)"] * 4, 4, timeout=1.0)] == [
        "timeout"
    ] * 4
    assert time.monotonic() - began < 3.5
    with pytest.raises(TypeError):
        check("x = 1", time_out=3)


def test_a_helper_killed_from_outside_is_replaced():
    pool = Helpers()
    try:
        assert pool.check("x = 1", "", Limits()).passed
        (helper,) = pool._idle
        os.kill(helper.pid(), signal.SIGKILL)
        assert pool.check("x = 1", "", Limits()).passed and pool._idle[0].pid() != helper.pid()
    finally:
        pool.close()


@pytest.mark.parametrize("target", ["the run", "the helper"])
@pytest.mark.parametrize("without", [(), ("namespaces",)])
def test_nothing_outlives_the_run(target, without):
    mark = f"mark-{uuid.uuid4().hex}"
    code = "import os, time\nif not os.fork():\n    os.setsid()\n    if not os.fork(): time.sleep(60)\n    os._exit(0)\ntime.sleep(60)"
    lines = [
        "from data.sandbox import Helper, Limits",
        f"h = Helper({(*without, mark)!r})",
        "print(h.pid(), flush=True)",
        f"print(h.check({code!r}, '', Limits(timeout=30, children=True)))",
    ]
    run = subprocess.Popen(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    pid = int(run.stdout.readline())
    until = lambda done: any(done() or time.sleep(0.05) for _ in range(200))
    own = lambda: marked(mark) - {run.pid}
    assert until(lambda: len(own()) >= 5) and (
        not without or glob.glob(f"/tmp/srlm-sandbox-{pid}-*")
    )
    os.kill(run.pid if target == "the run" else pid, signal.SIGKILL)
    assert until(lambda: not own()), own()
    assert not glob.glob(f"/tmp/srlm-sandbox-{pid}-*")
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
            first, second = pool._take(), pool._take()
            first.close(), second.close()
    assert len(caught) == 1


def test_a_helper_that_does_not_start_is_one_line(tmp_path):
    (python := tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(RunFailed, match="did not start"):
        Helper(python=str(python))
