"""Hostile programs: all contained, the run unharmed, no process and no file left.

Every attack that could fail for a reason of its own is first made outside the sandbox, by the same
user on a decoy, where it must succeed. All are made in every form that the sandbox takes here: as
this user and as an unprivileged one, with and without namespaces and Landlock.
"""

import os
import subprocess
import time
from pathlib import Path

from tests.sandbox_tools import AS_ROOT, NOBODY, SECRET, TRY_CALLS, linux_only, processes_marked

pytest_plugins = ["tests.sandbox_fixtures"]
pytestmark = linux_only

# --- processes, memory, time, output ------------------------------------------------------------


STARTS = """
import os, subprocess, sys
calls = dict(
    fork=lambda: os.fork() or os._exit(0),
    spawn=lambda: os.posix_spawn(sys.executable, [sys.executable], {}),
    run=lambda: subprocess.run(["/bin/true"]),
    exec=lambda: os.execv("/bin/true", ["true"]),
)
"""


def test_no_processes_unless_asked_for(jail):
    jail.needs("filter of system calls")
    if AS_ROOT:
        started = jail.result_outside(STARTS + "del calls['exec']" + TRY_CALLS)
        assert started == ["fork", "spawn", "run"]
    assert jail.result(STARTS + TRY_CALLS) == []


COUNT = """
import os, threading, time
result = 0
try:
    for _ in range(200):
        {start}
        result += 1
except (OSError, RuntimeError):
    pass
"""
FORK_BOMB = """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
"""


def test_bombs_of_processes_and_threads(jail):
    """The mild ones first: they say how many there may be."""
    forks = COUNT.format(start="os.fork() or time.sleep(60)")
    assert 4 <= jail.result(forks, children=True, tasks=8) <= 8
    assert processes_marked(jail.mark) == {jail.helper.pid}
    threads = COUNT.format(start="threading.Thread(target=time.sleep, args=(60,)).start()")
    assert 4 <= jail.result(threads, tasks=16) <= 16
    outcome, most = jail.watch_until_seen(FORK_BOMB, 4, children=True, tasks=8, timeout=0.4)
    assert outcome.reason == "timeout"
    # Four are the sandbox's; where all of the user's are counted, some may have ended since.
    assert 4 <= most <= 16


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
time.sleep(SECONDS)
"""
THREADS = """
def forever():
    while True:
        time.sleep(0.01)
for _ in range(4):
    threading.Thread(target=forever).start()
"""


def test_children_and_threads_end_with_the_program(jail):
    # six: the helper, the supervisor, the tests, the program, and those that sleep
    outcome, most = jail.watch_until_seen(IGNORE + ORPHANS, 6, children=True, timeout=59)
    assert outcome.passed and most >= 6
    assert processes_marked(jail.mark) == {jail.helper.pid}
    assert jail.check(IGNORE + THREADS).passed


MEMORY_BOMB = """
x = []
while True:
    x.append(b'x' * (1 << 22))
"""
MEMORY_TAKEN = """
import resource
x = []
try:
    while True:
        x.append(b'x' * (1 << 22))
except MemoryError:
    del x
result = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
"""
OUTPUT_BOMB = """
import os
while True:
    print('x' * 10**6)
    os.write(2, b'y' * 10**6)
"""
MUCH_OUTPUT = """
import sys
for _ in range(20):
    print('passed' * 10**6, file=sys.stderr)
"""


def test_bombs_of_memory_and_output(jail, capfd):
    outcome, _, largest = jail.watch(MEMORY_BOMB, memory=256 << 20)
    assert outcome.reason == "memory" and largest < 256 << 20
    assert 100 << 20 < jail.result(MEMORY_TAKEN, memory=256 << 20) < 256 << 20
    outcome, _, largest = jail.watch(OUTPUT_BOMB, timeout=0.4)
    assert outcome.reason == "timeout" and largest < 100 << 20
    assert jail.check(MUCH_OUTPUT).passed
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


def test_programs_that_do_not_come_to_their_end(jail):
    for (reasons, word), programs in ENDS.items():
        limits = {}
        if "timeout" in reasons:
            limits = {"timeout": 0.2 if reasons == "timeout" else 0.4, "memory": 256 << 20}
        for program in programs:
            jobs = [(program, "")]
            if not limits:  # the others are slow, and with tests the same
                tests = "from solution import f\nassert f() == 1"
                jobs.append(("def f(): return 1\n" + program, tests))
            for job in jobs:
                start = time.monotonic()
                outcome = jail.check(*job, **limits)
                assert not outcome.passed and outcome.reason in reasons, (program, outcome)
                assert word in outcome.detail, (program, outcome)
                assert time.monotonic() - start < 59, program  # one of them sleeps for 60


# --- files --------------------------------------------------------------------------------------

HARM = """
import os, shutil
folder = {folder!r}
def at(name):
    return folder + "/" + name
calls = dict(
    append=lambda: open(at("append"), "a").write("x"),
    overwrite=lambda: open(at("overwrite"), "w").write("x"),
    update=lambda: open(at("update"), "r+").write("x"),
    truncate=lambda: os.truncate(at("truncate"), 0),
    unlink=lambda: os.unlink(at("unlink")),
    rename=lambda: os.rename(at("rename"), at("renamed")),
    new=lambda: open(at("new"), "x"),
    mkdir=lambda: os.mkdir(at("mkdir")),
    symlink=lambda: os.symlink("a", at("symlink")),
    link=lambda: os.link(at("own"), at("linked")),
    mkfifo=lambda: os.mkfifo(at("fifo")),
    chmod=lambda: os.chmod(at("own"), 0),
    utime=lambda: os.utime(at("own"), (0, 0)),
    rmtree=lambda: shutil.rmtree(at("tree")),
)
"""
ELSEWHERE = [
    "/etc/x",
    "/usr/x",
    "/x",
    "/dev/shm/x",
    "/var/tmp/x",
    os.path.dirname(os.__file__) + "/x",
]


CANARIES = ["append", "overwrite", "update", "truncate", "unlink", "rename", "own", "tree/leaf"]


def fill(folder):
    """Fill a folder with files that anyone may harm."""
    (folder / "tree").mkdir(parents=True)
    for name in CANARIES:
        (folder / name).write_text("canary")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o777)
        if AS_ROOT and path.name in ("own", "tree", "leaf"):
            os.chown(path, NOBODY, NOBODY)
    return folder


def state(folder):
    found = {}
    for path in folder.rglob("*"):
        text = path.read_text() if path.is_file() and os.access(path, os.R_OK) else None
        found[path] = (path.lstat().st_mode, path.lstat().st_mtime, text)
    return found


def test_files_are_not_deleted_overwritten_or_made(jail, open_folder):
    decoy, canary = fill(open_folder / "decoy"), fill(open_folder / "canary")
    before, decoy_before = state(canary), state(decoy)
    assert len(jail.result_outside(HARM.format(folder=str(decoy)) + TRY_CALLS)) == 14
    assert state(decoy) != decoy_before
    jail.needs("files are protected by their permissions alone")
    assert jail.result(HARM.format(folder=str(canary)) + TRY_CALLS) == []
    assert state(canary) == before
    jail.result(f"calls = {{p: lambda p=p: open(p, 'w') for p in {ELSEWHERE}}}" + TRY_CALLS)
    assert not any(map(os.path.exists, ELSEWHERE))


BIG = """
result = 0
try:
    with {opened} as f:
        while result < 64 and f.write(b"x" * (1 << 18)):
            result += 1
            {then}
except OSError:
    pass
"""


SCRATCH = """
import os, tempfile
result = os.listdir(".")
open("a", "w").write("b")
os.makedirs("c/d/e")
os.symlink("/", "c/f")
os.rename("a", "g")
assert open("g").read() == "b" and tempfile.mkdtemp(dir=".")
assert os.path.samefile(os.path.dirname(tempfile.mkdtemp()), ".")
os.makedirs("locked/within")
if {chmod}:
    os.chmod("locked/within", 0)
os.mkdir("shut", 0)
"""


def test_a_scratch_folder_of_its_own(jail):
    jail.needs("can open no file")
    on_disk = any("no namespaces" in lack for lack in jail.helper.missing)
    program = SCRATCH.format(chmod=not on_disk)
    assert jail.result(program) == []
    assert jail.result(program) == []  # what the first left is gone
    one_file = BIG.format(opened="open('big', 'wb', 0)", then="pass")
    assert 2 <= jail.result(one_file, disk=1 << 20) <= 4
    if not on_disk:  # not one file alone, but all of them
        files = BIG.format(opened="open('0', 'wb', 0)", then="f = open(str(result), 'wb', 0)")
        assert 2 <= jail.result(files, disk=1 << 20) <= 4


# --- the parent ---------------------------------------------------------------------------------

SPY = """
import ctypes, glob, os
secret, libc = {secret!r}.encode(), ctypes.CDLL(None, use_errno=True)
def environ():
    return open("/proc/{pid}/environ", "rb").read()
def mem():
    fd = os.open("/proc/{pid}/mem", os.O_RDONLY)
    return os.pread(fd, 64, {address})
def vm():
    buffer = ctypes.create_string_buffer(64)
    class Vector(ctypes.Structure):
        _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
    here, there = Vector(ctypes.addressof(buffer), 64), Vector({address}, 64)
    one, zero = ctypes.c_ulong(1), ctypes.c_ulong(0)
    libc.process_vm_readv({pid}, ctypes.byref(here), one, ctypes.byref(there), one, zero)
    return buffer.raw
def ptrace():
    libc.ptrace.restype = ctypes.c_long
    attached = libc.ptrace(ctypes.c_long(16), ctypes.c_long({pid}), None, None) == 0
    if attached:
        os.waitpid({pid}, 0x40000000)
        libc.ptrace(ctypes.c_long(17), ctypes.c_long({pid}), None, None)
    return secret if attached else b""
def all():
    found = b""
    for path in glob.glob("/proc/[0-9]*/environ"):
        if os.access(path, os.R_OK) and os.stat(path).st_uid == os.getuid():
            found += open(path, "rb").read()
    return found
def own():
    return repr(dict(os.environ)).encode()
def finds(read):
    assert secret in read()
calls = dict((read.__name__, lambda read=read: finds(read))
             for read in (environ, mem, vm, ptrace, all, own))
"""


def test_the_parents_environment_and_memory(jail, victim, monkeypatch):
    monkeypatch.setenv("SECRET", SECRET)
    jail.needs("memory of your user's processes can be read")
    pid, address = victim
    spy = SPY.format(secret=SECRET, pid=pid, address=address) + TRY_CALLS
    assert jail.result_outside(spy) == ["environ", "mem", "vm", "ptrace", "all", "own"]
    assert jail.result(spy) == []
    on_parent = SPY.format(secret=SECRET, pid=os.getpid(), address=address) + TRY_CALLS
    assert jail.result(on_parent) == []
    names = jail.result("import os\nresult = list(os.environ)")
    assert set(names) <= {"PYTHONHASHSEED", "LC_CTYPE"}


OPEN_FILES = """
import os
result = []
for fd in range(256):
    try:
        result.append([fd, os.fstat(fd).st_mode >> 12])
    except OSError:
        pass
"""


def test_open_files_are_null_devices_and_two_pipes(jail):
    """Nothing of the parent's; reading ends at once; the pipes are those of the questions."""
    device, pipe = 2, 1
    found = jail.result(OPEN_FILES)
    assert [kind for _, kind in found] == [device, device, device, pipe, pipe]
    assert [fd for fd, _ in found][:3] == [0, 1, 2]
    reads = "import sys, os\nresult = [sys.stdin.read(), os.read(0, 10).decode()]"
    assert jail.result(reads) == ["", ""]


KILL = """
import os, resource, signal
calls = {}
for pid in PIDS:
    for name in ("SIGUSR1", "SIGTERM", "SIGKILL"):
        calls[f"{name} {pid}"] = lambda pid=pid, name=name: os.kill(pid, getattr(signal, name))
    calls[f"limit {pid}"] = lambda pid=pid: resource.prlimit(pid, resource.RLIMIT_NOFILE, (9, 9))
"""


def test_signals_to_the_parent(jail, victim):
    user = {"user": NOBODY} if AS_ROOT else {}
    decoy = subprocess.Popen(["sleep", "60"], **user)
    killed = jail.result_outside(KILL.replace("PIDS", f"[{decoy.pid}]") + TRY_CALLS)
    assert killed[:1] == [f"SIGUSR1 {decoy.pid}"] and decoy.wait(10) < 0
    jail.needs("signals and file attributes are not protected")
    pids = [victim[0], os.getpid(), jail.helper.pid]
    limits = [Path(f"/proc/{pid}/limits").read_text() for pid in pids]
    jail.check(KILL.replace("PIDS", f"[*{pids}, 1, os.getppid()]") + TRY_CALLS)
    for pid in pids:
        process_state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        assert process_state not in "ZX"
    assert [Path(f"/proc/{pid}/limits").read_text() for pid in pids] == limits
