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
import threading
import time
import uuid
from pathlib import Path

import pytest

from data import sandbox
from data.sandbox import Helper, Helpers, Limits, check, check_many
from errors import RunFailed
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox needs Linux")
AS_ROOT, NOBODY = os.geteuid() == 0, 54321  # a user without a name
SECRET = "a-secret-of-the-parent"


def opens_for_all(python):
    """Whether any user can run this Python."""
    code = "import os, socket, sys; os.stat(sys.argv[1])"
    return subprocess.run([python, "-S", "-c", code, str(ROOT / "data/jail.py")], user=NOBODY, group=NOBODY, extra_groups=[], cwd="/",
                          capture_output=True).returncode == 0  # fmt: skip


@functools.cache
def open_python():
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        with contextlib.suppress(OSError):
            if not AS_ROOT or opens_for_all(python):
                return python
    pytest.skip("needs a Python and a checkout that are open to all users, to run as one")


class Jail:
    """A helper under test. outside(code): the same code run by its user with no sandbox."""

    def __init__(self, without, unprivileged):
        if unprivileged and not AS_ROOT:
            pytest.skip("the tests are run by an unprivileged user: the other form is this one")
        self.mark, self.user = f"mark-{uuid.uuid4().hex}", NOBODY if unprivileged else None
        self.python = open_python() if unprivileged or without else sys.executable
        self.helper = Helper((*without, self.mark), self.python, self.user)

    def check(self, program, tests="", **limits):
        return self.helper.check(program, tests, Limits(**limits))

    def told(self, program, **limits):
        """What `told` is at the program's end, as it says itself."""
        outcome = self.check(program + "\nimport json\nraise RuntimeError(json.dumps(told))", **limits)
        assert outcome.detail.startswith("RuntimeError: "), outcome
        return json.loads(outcome.detail.removeprefix("RuntimeError: "))

    def outside(self, code):
        user = NOBODY if AS_ROOT else None  # root would succeed at anything
        other = dict(user=user, group=user, extra_groups=[]) if user else {}
        code += "\nimport json\nprint(json.dumps(told))"
        done = subprocess.run([open_python(), "-c", code], cwd="/", capture_output=True, text=True, **other)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def needs(self, *protection):
        for word in protection:
            for lack in self.helper.missing:
                if word in lack:
                    pytest.skip(f"not available here: {lack}")

    def processes(self):
        """Those of the helper, by the mark that all of its children inherit."""
        found = set()
        for path in glob.glob("/proc/[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if self.mark in Path(path).read_text():
                    found.add(int(path.split("/")[2]))
        return found

    def watched(self, program, tests="", **limits):
        """(outcome, the most processes seen at once, the largest resident size of one in bytes)."""
        most, largest, over = 0, 0, threading.Event()

        def watch():
            nonlocal most, largest
            while not over.wait(0.02):
                pids = self.processes()
                most = max(most, len(pids))
                for pid in pids:
                    with contextlib.suppress(OSError):
                        largest = max(largest, int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            return self.check(program, tests, **limits), most, largest
        finally:
            over.set()
            thread.join()


SLOW = ("without namespaces", "unprivileged without namespaces", "with the filter alone", "unprivileged with the filter alone")
FORMS = {
    "as this user": ((), False),
    "unprivileged": ((), True),
    "without namespaces": (("namespaces",), False),
    "unprivileged without namespaces": (("namespaces",), True),
    "with the filter alone": (("namespaces", "landlock"), False),
    "unprivileged with the filter alone": (("namespaces", "landlock"), True),
}


@pytest.fixture(scope="module", params=[pytest.param(f, marks=pytest.mark.slow) if f in SLOW else f for f in FORMS])
def shared(request):
    jail = Jail(*FORMS[request.param])
    yield jail
    jail.helper.close()


@pytest.fixture
def jail(shared):
    """And after every test: the helper is the one it was and does its work, and nothing else is left."""
    pid = shared.helper.pid()
    yield shared
    assert shared.processes() == {pid} and shared.check("x = 1").passed
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
    other = dict(user=NOBODY, group=NOBODY, extra_groups=[]) if AS_ROOT else {}
    process = subprocess.Popen([open_python(), "-c", code], env={"SECRET": SECRET}, cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE, **other)
    yield process.pid, int(process.stdout.readline())
    process.kill()
    process.communicate()


# --- processes -------------------------------------------------------------------------------------------------------


def test_no_processes_unless_asked_for(jail):
    jail.needs("filter of system calls")
    program = """
import os, subprocess, sys
told = []
for name, make in (("fork", os.fork), ("spawn", lambda: os.posix_spawn(sys.executable, [sys.executable], {})),
                   ("run", lambda: subprocess.run(["/bin/true"])), ("exec", lambda: os.execv("/bin/true", ["true"]))):
    try:
        make() or os._exit(0)
        told.append(name)
    except OSError:
        pass
"""
    if AS_ROOT:
        assert jail.outside(program.replace(', ("exec", lambda: os.execv("/bin/true", ["true"]))', "")) == ["fork", "spawn", "run"]
    assert jail.told(program) == []


def test_a_fork_bomb(jail):
    """The mild one first: it says how many there may be."""
    mild = """
import os, time
told = 0
for _ in range(40):
    try:
        if not os.fork():
            time.sleep(60)
        told += 1
    except OSError:
        break
"""
    assert 4 <= jail.told(mild, children=True, tasks=8) <= 8
    assert jail.processes() == {jail.helper.pid()}
    bomb = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    outcome, most, _ = jail.watched(bomb, children=True, tasks=8, timeout=0.4)
    # four are the sandbox's; and where all of the user's are counted, some of those may have ended since
    assert outcome.reason == "timeout" and 4 <= most <= 16


def test_sleeping_and_double_forked_children(jail):
    program = """
import os, signal, time
for number in range(1, 64):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
for _ in range(2):
    if not os.fork():
        os.setsid()
        if not os.fork():
            time.sleep(60)
        os._exit(0)
if not os.fork():
    time.sleep(60)
time.sleep(0.4)
"""
    outcome, most, _ = jail.watched(program, children=True)
    assert outcome.passed and most >= 6  # the helper, the keeper, the tests, the program, and three that sleep
    assert outcome.seconds < 4 and jail.processes() == {jail.helper.pid()}


def test_threads_that_never_end(jail):
    program = """
import threading, time
def forever():
    while True:
        time.sleep(0.01)
for _ in range(4):
    threading.Thread(target=forever).start()
"""
    outcome = jail.check(program)
    assert outcome.passed and outcome.seconds < 4
    bomb = """
import threading, time
told = 0
try:
    for _ in range(200):
        threading.Thread(target=time.sleep, args=(60,)).start()
        told += 1
except RuntimeError:
    pass
"""
    assert 4 <= jail.told(bomb, tasks=16) <= 16


# --- memory, time, output --------------------------------------------------------------------------------------------


def test_a_memory_bomb(jail):
    outcome, _, largest = jail.watched("x = []\nwhile True:\n    x.append(b'x' * (1 << 22))", memory=256 << 20)
    assert outcome.reason == "memory" and 100 << 20 < largest < 256 << 20
    for program in ("x = [0] * 10**11", "x = bytearray(1 << 40)", "x = 1 << (1 << 36)"):
        assert jail.check(program).reason == "memory"


def test_endless_output_goes_nowhere(jail, capfd):
    outcome, _, largest = jail.watched("import os\nwhile True:\n    print('x' * 10**6)\n    os.write(2, b'y' * 10**6)", timeout=0.4)
    assert outcome.reason == "timeout" and largest < 100 << 20
    assert jail.check("import sys\nfor _ in range(20):\n    print('passed' * 10**6, file=sys.stderr)").passed
    assert capfd.readouterr() == ("", "")


WITHOUT_END = ["while True: pass", "import time\ntime.sleep(60)", "9**9**9", "import re\nre.match('(a+)+$', 'a' * 40 + 'b')",
               "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n    except OSError: pass\nwhile True: pass",
               "while True:\n    try:\n        while True: pass\n    except BaseException: pass"]  # fmt: skip


def test_what_never_ends_is_ended(jail):
    for program in WITHOUT_END:
        began = time.monotonic()
        assert jail.check(program, timeout=0.2).reason == "timeout" and time.monotonic() - began < 4, program


def test_deep_recursion_and_huge_integers(jail):
    assert jail.check("def f(): return f()\nf()").reason == "failed"
    for program in (
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f()\nf()",
        "import sys\nsys.setrecursionlimit(10**9)\nclass A:\n    def __repr__(self): return repr(self)\nrepr(A())",
        "eval('(' * 10**5 + ')' * 10**5)",
        "x = 10**(10**9)",
    ):
        assert jail.check(program, timeout=0.4, memory=256 << 20).reason in ("failed", "memory", "crashed", "timeout")


def test_ends_that_are_none(jail):
    crash = "import ctypes\nctypes.string_at(0)"
    for program, reason, word in [
        ("import os\nos._exit(0)", "crashed", "exit code 0"), ("import os\nos._exit(1)", "crashed", "exit code 1"),
        ("import sys\nsys.exit(0)", "failed", "SystemExit"),
        ("raise SystemExit", "failed", "SystemExit"), ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "crashed", "signal 9"),
        ("import os\nos.abort()", "crashed", "signal"), (crash, "crashed", "signal 11"), ("raise KeyboardInterrupt", "failed", "KeyboardInterrupt"),
        ("def f(:", "failed", "SyntaxError"), ("import nothing_of_this_name", "failed", "ModuleNotFoundError"),
        ("1/0", "failed", "ZeroDivisionError: division"),
        ("x = '\\ud800'\nraise ValueError(x)", "failed", "ValueError"), ("\x00", "failed", "null bytes"),
        ("assert 1 == 2, 'no'", "failed", "AssertionError: no"),
    ]:  # fmt: skip
        outcome = jail.check(program)
        assert (outcome.passed, outcome.reason) == (False, reason) and word in outcome.detail, (program, outcome)
        tested = jail.check("def f(): return 1\n" + program, "from solution import f\nassert f() == 1")
        assert not tested.passed and tested.reason == reason


def test_stdin_is_empty(jail):
    assert jail.told("import sys, os\ntold = [sys.stdin.read(), os.read(0, 10).decode()]") == ["", ""]
    assert jail.check("input()").detail == "EOFError: EOF when reading a line"


# --- files -----------------------------------------------------------------------------------------------------------

HARM = """
import os, shutil
told, folder = [], {folder!r}
for name, harm in dict(
    append=lambda: open(folder + "/append", "a").write("x"), overwrite=lambda: open(folder + "/overwrite", "w").write("x"),
    update=lambda: open(folder + "/update", "r+").write("x"), truncate=lambda: os.truncate(folder + "/truncate", 0),
    unlink=lambda: os.unlink(folder + "/unlink"), rename=lambda: os.rename(folder + "/rename", folder + "/renamed"),
    new=lambda: open(folder + "/new", "x"), mkdir=lambda: os.mkdir(folder + "/mkdir"), symlink=lambda: os.symlink("a", folder + "/symlink"),
    link=lambda: os.link(folder + "/own", folder + "/linked"), mkfifo=lambda: os.mkfifo(folder + "/fifo"),
    chmod=lambda: os.chmod(folder + "/own", 0), utime=lambda: os.utime(folder + "/own", (0, 0)), rmtree=lambda: shutil.rmtree(folder + "/tree"),
).items():
    try:
        harm()
        told.append(name)
    except OSError:
        pass
"""


def fill(folder):
    for name in ("append", "overwrite", "update", "truncate", "unlink", "rename", "own", "tree/leaf"):
        path = folder / name
        path.parent.mkdir(exist_ok=True, mode=0o777)
        path.parent.chmod(0o777)
        path.write_text("canary")
        path.chmod(0o666)
        if AS_ROOT and name in ("own", "tree/leaf"):
            os.chown(path, NOBODY, NOBODY)
    if AS_ROOT:
        os.chown(folder / "tree", NOBODY, NOBODY)


def state(folder):
    text = lambda p: p.is_file() and os.access(p, os.R_OK) and p.read_text()
    return {str(p.relative_to(folder)): (p.lstat().st_mode, p.lstat().st_mtime, text(p)) for p in folder.rglob("*")}


def test_files_are_not_deleted_overwritten_or_made(jail, open_folder):
    (decoy := open_folder / "decoy").mkdir()
    (canary := open_folder / "canary").mkdir()
    for folder in (decoy, canary):
        folder.chmod(0o777)
        fill(folder)
    before = state(canary)
    assert len(jail.outside(HARM.format(folder=str(decoy)))) == 14 and state(decoy) != before
    jail.needs("files are protected by their permissions alone")
    assert jail.told(HARM.format(folder=str(canary))) == [] and state(canary) == before
    home = "import os\ntold = []\nfor path in ('/etc/x', '/usr/x', '/x', '/dev/shm/x', '/var/tmp/x', os.path.dirname(os.__file__) + '/x'):\n"
    home += "    try: open(path, 'w'); told.append(path)\n    except OSError: pass"
    jail.told(home)
    assert not [p for p in ("/etc/x", "/usr/x", "/x", "/dev/shm/x", "/var/tmp/x") if os.path.exists(p)]


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
    program = program.replace("{chmod}", str(not any("no namespaces" in lack for lack in jail.helper.missing)))
    assert jail.told(program) == [] and jail.told(program) == []
    full = """
told = 0
with open("big", "wb", 0) as f:
    try:
        while told < 100 and f.write(b"x" * (1 << 18)):
            told += 1
    except OSError:
        pass
"""
    assert 2 <= jail.told(full, disk=1 << 20) <= 4


def test_many_files_are_limited(jail):
    jail.needs("no namespaces")
    program = "told = 0\ntry:\n    for i in range(64):\n        open(str(i), 'wb').write(b'x' * (1 << 18)); told += 1\nexcept OSError: pass"
    assert 2 <= jail.told(program, disk=1 << 20) <= 4


# --- the parent ------------------------------------------------------------------------------------------------------

SPY = """
import ctypes, glob, os
told, secret, libc = [], {secret!r}.encode(), ctypes.CDLL(None, use_errno=True)
def tried(name, read):
    try:
        if secret in read():
            told.append(name)
    except (OSError, OverflowError):
        pass
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
tried("environ", lambda: open("/proc/{pid}/environ", "rb").read())
mine = lambda p: os.access(p, os.R_OK) and os.stat(p).st_uid == os.getuid()
tried("all environs", lambda: b"".join(open(p, "rb").read() for p in glob.glob("/proc/[0-9]*/environ") if mine(p)))
tried("mem", mem), tried("vm", vm), tried("ptrace", ptrace)
tried("own", lambda: repr(dict(os.environ)).encode())
"""


def test_the_parents_environment_and_memory(jail, victim, monkeypatch):
    monkeypatch.setenv("SECRET", SECRET)
    jail.needs("memory of your user's processes can be read")
    spy = SPY.format(secret=SECRET, pid=victim[0], address=victim[1])
    assert jail.outside(spy) == ["environ", "all environs", "mem", "vm", "ptrace", "own"]
    assert jail.told(spy) == []
    assert jail.told(SPY.format(secret=SECRET, pid=os.getpid(), address=victim[1])) == []
    assert len(jail.told("import os\ntold = {k: v for k, v in os.environ.items() if k not in ('PYTHONHASHSEED', 'LC_CTYPE')}")) == 0


def test_what_is_open(jail):
    """Nothing of the parent's: null devices and the two pipes on which the program is asked."""
    program = "import os\ntold = []\nfor fd in range(256):\n    try: told.append([fd, os.fstat(fd).st_mode >> 12])\n    except OSError: pass"
    found = jail.told(program)
    assert [kind for _, kind in found] == [2, 2, 2, 1, 1] and [fd for fd, _ in found][:3] == [0, 1, 2]


def test_signals_to_the_parent(jail, victim):
    kill = "import os, signal\ntold = []\nfor pid in {pids}:\n    for name in ('SIGUSR1', 'SIGTERM', 'SIGKILL'):\n"
    kill += "        try: os.kill(pid, getattr(signal, name)); told.append(pid)\n        except OSError: pass"
    decoy = subprocess.Popen(["sleep", "60"], **(dict(user=NOBODY) if AS_ROOT else {}))
    assert jail.outside(kill.format(pids=[decoy.pid]))[:1] == [decoy.pid] and decoy.wait(10) < 0
    jail.needs("signals and file attributes are not protected")
    before = jail.helper.pid()
    pids = [victim[0], os.getpid(), before]
    jail.check(kill.format(pids=pids) + "\nfor pid in (os.getppid(), 1):\n    try: os.kill(pid, 9)\n    except OSError: pass")
    assert all(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX" for pid in pids)
    had = [Path(f"/proc/{pid}/limits").read_text() for pid in pids]
    lower = f"import resource\nfor pid in {pids}:\n    try: resource.prlimit(pid, resource.RLIMIT_NOFILE, (9, 9))\n    except OSError: pass"
    jail.check(lower)
    assert [Path(f"/proc/{pid}/limits").read_text() for pid in pids] == had


CALL = """
import ctypes, os, socket
told = []
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
for call in (tcp, udp, unix, abstract, pair, listen):
    try:
        call()
        told.append(call.__name__)
    except OSError:
        pass
"""


def test_sockets(jail, open_folder):
    path, name = str(open_folder / "s"), uuid.uuid4().hex
    with contextlib.ExitStack() as stack:
        tcp, udp, unix, abstract, pair = (
            stack.enter_context(socket.socket(*kind)) for kind in
            [(socket.AF_INET, socket.SOCK_STREAM), (socket.AF_INET, socket.SOCK_DGRAM), (socket.AF_UNIX,), (socket.AF_UNIX,),
            (socket.AF_UNIX, socket.SOCK_DGRAM)]
        )  # fmt: skip
        tcp.bind(("127.0.0.1", 0))
        port = tcp.getsockname()[1]
        for s, address in ((udp, ("127.0.0.1", port)), (unix, path), (abstract, "\0" + name), (pair, path + ".d")):
            s.bind(address)
        for file in (path, path + ".d"):
            os.chmod(file, 0o777)
        everyone = (tcp, udp, unix, abstract, pair)
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

        calls = CALL.format(port=port, path=path, name=name)
        assert len(jail.outside(calls)) == 6 and reached() == 5
        jail.needs("the network, signals")
        assert jail.told(calls) == [] and reached() == 0


# --- forged verdicts -------------------------------------------------------------------------------------------------

TESTS = "from solution import f\nassert f(2) == 4\nassert f(3) == 9"
EQUAL = "class Y:\n    def __eq__(self, other): return True\n    def __call__(self, *a): return self\n"
EVERYWHERE = """
import os, pickle, struct, sys
for data in (b"passed\\n", b'["passed", ""]', b'{"passed": true, "reason": "passed", "detail": "", "seconds": 0}', b"0",
             pickle.dumps(("value", None)), pickle.dumps(("value", True))):
    for fd in range(256):
        for text in (data, struct.pack("Q", len(data)) + data):
            try:
                os.write(fd, text)
            except OSError:
                pass
"""
FRAMES = """
import gc, os, pickle, struct, sys
def send(fd, value):
    data = pickle.dumps(("value", value))
    os.write(fd, struct.pack("Q", len(data)) + data)
frame = sys._getframe()
while frame:
    seen = dict(frame.f_locals)
    if "replies" in seen and "rest" in seen:
        for value in (seen["rest"][-1], 4, 9, True):
            send(seen["replies"], value)
    frame = frame.f_back
"""
FORGERIES = {
    "prints": "print('passed')\nprint('[\"passed\", \"\"]')\ndef f(x): return 0",
    "writes everywhere": EVERYWHERE + "def f(x): return 0",
    "writes everywhere and leaves": EVERYWHERE + "os._exit(0)",
    "at exit": "import atexit, os\natexit.register(lambda: os._exit(0))\nimport sys\nsys.exit()",
    "leaves in the call": "import os\ndef f(x): os._exit(0)",
    "exits in the call": "import sys\ndef f(x): sys.exit(0)",
    "equals everything": EQUAL + "f = lambda x: Y()",
    "is everything": EQUAL + "f = Y()",
    "an int that equals everything": "class Y(int):\n    def __eq__(self, other): return True\nf = lambda x: Y(5)",
    "a list that equals everything": "class Y(list):\n    def __eq__(self, other): return True\nf = lambda x: Y([5])",
    "no assertions": "import builtins\nbuiltins.AssertionError = None\nbuiltins.compile = builtins.exec = lambda *a, **k: None\ndef f(x): return 0",
    "patched pickle": "import pickle, os\npickle.dumps = pickle.loads = lambda *a: b''\ndef f(x): return 0",
    "reduces to a call": "import os\nclass Y:\n    def __reduce__(self): return (eval, ('4',))\nf = lambda x: Y()",
    "reduces as a list": "class Y(list):\n    __reduce_ex__ = lambda self, n: (exec, ('import os; os._exit(0)',))\nf = lambda x: Y()",
    "raises what is not": "class Y(BaseException): pass\ndef f(x): raise Y",
    "generator": "def f(x):\n    raise GeneratorExit",
    "kills the tests": "import os\ndef f(x):\n    os.kill(os.getppid(), 9)",
    "other names": "set = sorted = len = abs = check = lambda *a: 0\ndef f(x): return 0",
}  # fmt: skip


def test_forged_verdicts(jail):
    for name, program in FORGERIES.items():
        if name.endswith("equals everything"):
            exec(program, space := {})
            assert space["f"](2) == 4 and space["f"](3) == 9  # with tests beside the solution it passes
        assert not jail.check(program, TESTS, timeout=0.5).passed, name
        if "and leaves" in name or name == "at exit":
            assert not jail.check(program, timeout=0.5).passed, name


def test_a_program_that_knows_how_it_is_asked(jail):
    """It finds the pipes in the frames and answers in advance: with tests apart from it, it has to know what they expect."""
    assert jail.check(FRAMES + "1 / 0").passed  # so the attack is one: on a program that judges itself it works
    outcome = jail.check(FRAMES.replace("4, 9, True", "0, 0, True") + "def f(x): return 0", TESTS)
    assert not outcome.passed
    jail.needs("filter of system calls")
    scan = """
import os
for pid in range(1, 9):
    for n in range(16):
        try:
            os.write(os.open(f"/proc/{pid}/fd/{n}", os.O_WRONLY), b'["passed", ""]')
        except OSError:
            pass
def f(x): return 0
"""
    assert not jail.check(scan, TESTS).passed


def test_honest_programs_pass_with_tests_apart(jail):
    solution = """
import collections, dataclasses, decimal, fractions, enum, math, typing
Point = collections.namedtuple("Point", "x y")
class Colour(enum.IntEnum):
    RED = 1
@dataclasses.dataclass
class Pair:
    a: int
    b: int
def same(x): return x
def pair(a, b): return Pair(a, b)
def total(p): return p.a + p.b
def squares(n): return (i * i for i in range(n))
def views(d): return d.keys(), d.items(), zip(d, d), map(str, d)
def point(): return Point(1, 2)
def colour(): return Colour.RED
def wrong(x): raise ValueError("not " + x)
def adder(n): return lambda x: x + n
def own(): raise type("Mine", (Exception,), {})("mine")
constant = [1, 2]
"""
    tests = """
import collections, decimal, fractions, math
from solution import same, pair, total, squares, views, point, colour, wrong, adder, own, constant, Pair
for x in [None, True, 1, -10**50, 1.5, float("inf"), 1j, "é\\ud800", b"\\0", [1, [2]], (1,), {1: {2, 3}}, frozenset([1]), range(3),
          slice(1, 2), bytearray(b"x"), ..., collections.Counter("aab"), collections.OrderedDict(a=1), collections.deque([1]),
          collections.defaultdict(int, a=2), fractions.Fraction(1, 3), decimal.Decimal("0.1")]:
    assert same(x) == x and type(same(x)) is type(x), x
assert math.isnan(same(math.nan))
assert total(pair(1, 2)) == 3 == total(Pair(1, 2)) and pair(1, 2).b == 2 and pair(3, 4) != 3
assert list(squares(4)) == [0, 1, 4, 9] and next(squares(3)) == 0
keys, items, zipped, mapped = views({1: 2})
assert list(keys) == [1] and list(items) == [(1, 2)] and list(zipped) == [(1, 1)] and list(mapped) == ["1"]
assert point() == (1, 2) and colour() == 1 and adder(2)(3) == 5 and constant == [1, 2]
for call, error, text in ((lambda: wrong("x"), ValueError, "not x"), (own, RuntimeError, "Mine: mine"), (lambda: pair(1), TypeError, "missing")):
    try:
        call()
    except error as e:
        assert text in str(e), str(e)
    else:
        assert False
"""
    outcome = jail.check(solution, tests)
    assert outcome.passed, outcome
    assert jail.check("def f(x): return x", "from solution import f\nassert f(lambda: 1) == 1").reason == "failed"
    assert jail.check("x = 1", "from solution import f").detail.startswith("ImportError")


# --- the helpers -----------------------------------------------------------------------------------------------------


def test_check_many_keeps_the_order_and_uses_its_workers():
    jobs = [f"assert {i} % 3" if i % 2 else (f"def f(): return {i} % 3", "from solution import f\nassert f()") for i in range(24)]
    assert [o.passed for o in check_many(jobs, 3)] == [i % 3 > 0 for i in range(24)]
    began = time.monotonic()
    assert [o.reason for o in check_many(["import time\ntime.sleep(60)"] * 4, 4, timeout=1.0)] == ["timeout"] * 4
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
    lines = ["from data.sandbox import Helper, Limits", f"h = Helper({(*without, mark)!r})", "print(h.pid(), flush=True)",
             f"print(h.check({code!r}, '', Limits(timeout=30, children=True)))"]  # fmt: skip
    run = subprocess.Popen([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    watcher = Jail.__new__(Jail)
    watcher.mark, pid = mark, int(run.stdout.readline())
    until = lambda done: any(done() or time.sleep(0.05) for _ in range(200))
    own = lambda: watcher.processes() - {run.pid}
    assert until(lambda: len(own()) >= 5) and (not without or glob.glob(f"/tmp/srlm-sandbox-{pid}-*"))
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
