"""The fork server of the sandbox, started as a script by `data/sandbox/__init__.py`.

It is a warm interpreter that locks itself in once and then answers one request at a time. Each
program runs in processes of its own, each the child of the one before:

    run ─ fork server ─ supervisor ─ tests ─ solution

The server forks and reads nothing of programs and tests: all processes of a request are started
before those are read, so that no solution has tests in its memory, of its own request or an earlier
one. There is a supervisor for each request: it watches the time and cleans up. The tests' process
is the first of its process namespace, where there is one, so the kernel ends all that came of it
when it ends.
"""

import contextlib
import gc
import json
import math
import os
import random
import select
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

# A script finds its neighbours by their plain names: Python puts its folder first in sys.path.
import confine
import judge

del sys.path[0]  # programs shall find the standard library and nothing else

# Imported once by the server, not by every program.
WARM_MODULES = """
abc array bisect cmath collections collections.abc contextlib copy dataclasses datetime decimal enum
fractions functools hashlib heapq inspect io itertools json math numbers operator queue random re
statistics string struct textwrap threading time traceback types typing unicodedata
""".split()
# Imported besides where programs can open no file.
MORE_MODULES = """
_strptime ast base64 binascii calendar codecs csv ctypes difflib doctest encodings.ascii
encodings.hex_codec encodings.idna encodings.latin_1 encodings.rot_13 encodings.unicode_escape
encodings.utf_16 fnmatch gc glob gzip hmac html ipaddress keyword linecache locale logging lzma
multiprocessing pathlib pickle platform pprint resource secrets select shlex shutil signal socket
stringprep subprocess tempfile timeit tokenize unittest urllib.parse uuid weakref zlib zoneinfo
""".split()
LIBRARIES = "/lib /lib64 /usr/lib /usr/lib64 /usr/local/lib /etc/ld.so.cache".split()
DEVICES = "/dev/null /dev/zero /dev/random /dev/urandom".split()
NAMESPACES = confine.NEW_MOUNTS | confine.NEW_NET | confine.NEW_IPC | confine.NEW_UTS
# As root each server's programs run as a user of its own, from this number on: limits are counted
# per user, and no file belongs to them.
OWN_USERS = 1 << 30
FEW_USERS = 1 << 15  # the same in a container that has 65536 users
# What a root needs for that (capabilities(7)): to give files away and to delete them whatever their
# permissions, to signal other users' processes, and to become another user.
ROOTS_RIGHTS = 0b11101011
MAX_FD = 1 << 16
MAX_FILES = 256  # of a scratch folder on disk, where folders take milliseconds to delete
MAX_PATH = 1000  # characters of a path in it, which the kernel limits
LOOK_SECONDS = 0.05  # between its looks


def fork(work: Callable[[int], Any], *keep_open: int) -> tuple[int, int]:
    """Run `work` in a child process.

    Args:
        work: called with the child's end of a pipe, to which its result is written as JSON.
        keep_open: descriptors that the child keeps, besides that pipe and 0 to 2.

    Returns:
        The child's process id, and this end of the pipe.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return pid, read
    try:
        for kept, next_kept in pairwise([2, *sorted((*keep_open, write)), MAX_FD]):
            os.closerange(kept + 1, next_kept)
        try:
            result = work(write)
        except BaseException as error:  # whatever it is, the parent reports it
            result = "sandbox", judge.describe(error)
        os.write(write, json.dumps(result).encode())
    finally:
        os._exit(0)


def wait(pid: int, pipe: int, killed: Any = ("sandbox", "it was killed")) -> Any:
    """Wait until a child of `fork` is over; return its result, or `killed` if it left none."""
    result = os.read(pipe, 1 << 16)
    os.close(pipe)
    os.waitpid(pid, 0)
    return json.loads(result) if result else killed


def failure(*attempts: Callable[[], object]) -> str | None:
    """Try these in a child process; return why they fail, or None if they succeed."""

    def attempt_all(_):
        for attempt in attempts:
            attempt()
        return "passed", ""

    reason, detail = wait(*fork(attempt_all))
    return detail if reason == "sandbox" else None


def import_all(names: Iterable[str]) -> None:
    """Import modules, except those that this Python was built without."""
    for name in names:
        with contextlib.suppress(ImportError):
            __import__(name)


def process_statuses() -> Iterator[dict[str, str]]:
    """The fields of /proc/<pid>/status of every process that can be seen."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        # The process may be gone since.
        with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as file:
            yield dict(line.split(":", 1) for line in file)


def has_roots_rights() -> bool:
    """Whether this process may do what only root may, which a container may forbid its root."""
    with open("/proc/self/status") as file:
        status = dict(line.split(":", 1) for line in file)
    return int(status["CapEff"], 16) & ROOTS_RIGHTS == ROOTS_RIGHTS


class Isolation:
    """The layers that this system offers, found by trying them, and how they are put on.

    Args:
        left_out: layers to do without, for the tests: namespaces, landlock, seccomp, or "new
            landlock" for all that came after its first version.
    """

    def __init__(self, left_out: Collection[str]) -> None:
        self.root = os.geteuid() == 0 and has_roots_rights()
        self.user = OWN_USERS | os.getpid() if self.root else os.geteuid()
        if self.root and failure(self.become_user):
            self.user = FEW_USERS | os.getpid() % FEW_USERS
            if failure(self.become_user):  # a container with a single user, say
                self.root, self.user = False, 0
        folders = {os.path.abspath(path) for path in sys.path if os.path.isdir(path)}
        self.libraries = sorted(folders.union(filter(os.path.exists, LIBRARIES)))
        self.readable = self.libraries + list(filter(os.path.exists, DEVICES))
        no_namespaces = self._why_no_namespaces(left_out)
        self.namespaces = not no_namespaces
        if "new landlock" in left_out:
            confine.NEWEST_LANDLOCK = 1
        self.landlock = "landlock" not in left_out and confine.landlock_version() > 0
        self.seccomp = "seccomp" not in left_out and not failure(
            confine.drop_capabilities, partial(confine.refuse, confine.NEVER)
        )
        self.missing = list(self._missing(no_namespaces))
        if self.seccomp and not self.namespaces and not self.landlock:
            import_all(MORE_MODULES)
        if self.namespaces:
            self.enter_namespaces()
        confine.prctl(confine.PR_DUMPABLE, 0)

    def become_user(self) -> None:
        """Become the user as whom programs run, for good."""
        os.setgroups([])
        os.setresgid(self.user, self.user, self.user)
        os.setresuid(self.user, self.user, self.user)

    def enter_namespaces(self) -> None:
        """Enter namespaces, with a file system that holds Python and nothing else."""
        # Inside a user namespace these have no name until they are mapped.
        uid, gid = os.geteuid(), os.getegid()
        own_users = uid or not self.root
        confine.call("unshare", NAMESPACES | confine.NEW_USER if own_users else NAMESPACES)
        if own_users:
            confine.prctl(confine.PR_DUMPABLE, 1)  # else a former root does not own its /proc/self
            maps = {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"}
            for name, text in maps.items():
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
        confine.enter_root(self.readable)

    def _why_no_namespaces(self, left_out: Collection[str]):
        """Why there are none, or None; gives root up where only other users can have them."""
        if "namespaces" in left_out:
            return "left out"
        reason = failure(self.enter_namespaces)
        if reason and self.root and not failure(self.become_user, self.enter_namespaces):
            self.become_user()
            self.root = False
            return None
        return reason

    def _open_libraries(self):
        for path in self.libraries:
            os.close(os.open(path, os.O_RDONLY))

    def _missing(self, no_namespaces: str | None):
        """Sentences: the protections that this system does not offer."""
        if not self.landlock:
            yield "no Landlock"
        if not self.seccomp:
            yield "no filter of system calls"
        if not self.root and self.user == 0:
            yield "this root may become no other user: nor do programs, whose number has no limit"
        if self.namespaces:
            return
        yield (
            f"no namespaces ({no_namespaces}): programs share the system's process table, "
            "and the disk for their scratch folder"
        )
        if not self.landlock:
            if self.seccomp:
                yield "programs can open no file: they import what is loaded already"
            else:
                yield "files are protected by their permissions alone"
                if not self.root:
                    yield "the environment and memory of your user's processes can be read"
        if not self.seccomp:
            yield "the network, signals and file attributes are not protected"
            if not self.root:
                yield "the number of processes is limited with your user's own"
                yield "processes that escape may live on"
        if self.root and failure(self.become_user, self._open_libraries):
            yield (
                f"the Python at {sys.base_prefix} is closed to other users: programs can import "
                "what is loaded already and nothing else"
            )

    def scratch_of_request(self) -> str:
        """The path of a new scratch folder for one request."""
        if self.namespaces:
            return "/tmp"
        name = f"srlm-sandbox-{os.getpid()}-{os.urandom(8).hex()}"
        return os.path.join(tempfile.gettempdir(), name)

    def make_scratch(self, scratch: str, disk: int) -> None:
        """Make that folder. The supervisor does, since it outlives the server and cleans up.

        In namespaces a file system in memory is put over it, which ends with its last process.
        """
        if self.namespaces:
            confine.call("unshare", confine.NEW_PIDS | confine.NEW_MOUNTS)
            confine.mount_memory(scratch, f"mode=777,size={disk},nr_inodes=4096")
            return
        os.mkdir(scratch, 0o700)
        if self.root:
            os.chown(scratch, self.user, self.user)

    def clean_up(self, scratch: str) -> None:
        """End what has escaped and delete every file; namespaces have done so already."""
        if self.namespaces:
            return
        if self.root and self.user & OWN_USERS:
            # All processes of this user at one stroke: it has none but the program's.
            failure(self.become_user, partial(os.kill, -1, signal.SIGKILL))
        # The children of a killed process become this one's (PR_SUBREAPER), so repeat.
        with contextlib.suppress(ChildProcessError):
            while True:
                for status in process_statuses():
                    if int(status["PPid"]) == os.getpid():
                        os.kill(int(status["Pid"]), signal.SIGKILL)
                os.waitpid(-1, 0)
        with contextlib.suppress(OSError):
            remove(scratch)

    def lock_tests(self, request: dict) -> None:
        """Lock in the tests' process, which calls this, and all that will come of it."""
        limits = request["limits"]
        os.setsid()
        if self.root:
            self.become_user()
        confine.set_limits(
            AS=limits["memory"],
            CPU=math.ceil(limits["timeout"]) + 1,
            FSIZE=limits["disk"],
            NPROC=self._tasks_of_user() + limits["tasks"],
            NOFILE=64,
            CORE=0,
            MEMLOCK=0,
            MSGQUEUE=0,
            RTPRIO=0,
            NICE=0,
        )
        os.chdir(request["scratch"])
        tempfile.tempdir = request["scratch"]  # the server has asked for the system's
        confine.drop_capabilities()
        self._restrict(request, confine.NEVER)

    def _tasks_of_user(self):
        """How many processes and threads count against the user's limit already."""
        if self.root:
            return 1
        if self.namespaces:
            return 3  # a user namespace counts for itself: the server, the supervisor, the tests
        return sum(
            int(status["Threads"])
            for status in process_statuses()
            if int(status["Uid"].split()[0]) == self.user
        )

    def lock_solution(self, request: dict) -> None:
        """Lock in the solution's process more tightly, so that it cannot touch the tests'."""
        rules = confine.only_itself(os.getpid())
        if not self.namespaces:
            rules += confine.NO_ATTRIBUTES
        if not self.namespaces and not self.landlock:
            rules += confine.NO_FILES
        if not request["limits"]["children"]:
            rules += confine.NO_CHILDREN
        self._restrict(request, rules)

    def _restrict(self, request: dict, rules: bytes):
        confine.prctl(confine.PR_PDEATHSIG, signal.SIGKILL)
        if self.landlock:
            readable = ["/"]
            if not self.namespaces:
                readable = [path for path in self.readable if os.access(path, os.R_OK)]
            confine.restrict_files(readable, [request["scratch"], "/dev/null"])
        if self.seccomp:
            confine.refuse(rules)


def files_in_excess(folder: str, disk: int) -> str:
    """Why a scratch folder, in which a program may be at work, holds too much; "" if it does not.

    A folder that the program replaces by a link is followed: what is there counts as its own. One
    that only it can fill and nobody list holds too much.
    """
    count = size = 0
    waiting = [folder]
    while waiting:
        # What was listed may be gone by now. What is closed to its owner is empty.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            for entry in os.scandir(waiting.pop()):
                count += 1
                status = entry.stat(follow_symlinks=False)
                size += status.st_blocks * 512
                is_folder = stat.S_ISDIR(status.st_mode)
                hides = is_folder and status.st_mode & 0o700 == 0o300
                if count > MAX_FILES or len(entry.path) > MAX_PATH or hides:
                    return f"more than {MAX_FILES} files, or folders that hide them"
                if is_folder:
                    waiting.append(entry.path)
    return f"files of more than {disk} bytes" if size > disk else ""


def remove(folder: str) -> None:
    """Delete a folder in which no program is at work, whatever its rights and its depth.

    The folders within are moved up one by one, so that no path and no recursion grows with them.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
    # A program may have put a link in its place, where nothing but permissions protects files.
    place = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
    os.chmod(f"/proc/self/fd/{place}", 0o700)
    top = os.open(f"/proc/self/fd/{place}", flags & ~os.O_NOFOLLOW)
    os.close(place)
    waiting = ["."]
    while waiting:
        name = waiting.pop()
        inner = os.open(name, flags, dir_fd=top)
        for entry in list(os.scandir(inner)):
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.name, dir_fd=inner)
                continue
            with contextlib.suppress(OSError):
                os.rmdir(entry.name, dir_fd=inner)
                continue
            os.chmod(entry.name, 0o700, dir_fd=inner)  # else it can be neither entered nor moved
            waiting.append(os.urandom(16).hex())  # a name that no program could have taken
            os.rename(entry.name, waiting[-1], src_dir_fd=inner, dst_dir_fd=top)
        os.close(inner)
        if name != ".":
            os.rmdir(name, dir_fd=top)
    os.close(top)
    os.rmdir(folder)


def run_tests(isolation: Isolation, request: dict, incoming: int, _: int) -> tuple[str, str]:
    """Lock in the tests' process, start the solution's, then read both and grade."""
    isolation.lock_tests(request)
    # The solution's process keeps the two pipes on which it is asked, and no pipe of a verdict.
    questions, asking = os.pipe()

    def serve(replies):
        isolation.lock_solution(request)
        judge.serve(questions, replies, "solution" if request["apart"] else "__main__")

    pid, replies = fork(serve, questions)
    os.close(questions)
    program, tests = json.loads(judge.receive(incoming) or b"")
    return judge.grade(program, tests, judge.Solution(pid, asking, replies))


def supervise(isolation: Isolation, request: dict, requests: int, replies: int, server: int) -> str:
    """Start the tests' process, end it in time, clean up and reply, in the supervisor's process.

    The program and its tests are read when all its processes have been started: a process has in
    its memory whatever those had read that it comes from. For the same reason the reply, which may
    quote a test, is sent from here.

    The supervisor is not killed with the run or the server, since it has to clean up then too.
    Their pipes, `requests` and `server`, hang up when they are gone.
    """
    limits, scratch = request["limits"], request["scratch"]
    confine.prctl(confine.PR_SUBREAPER, 1)
    isolation.make_scratch(scratch, limits["disk"])
    incoming, outgoing = os.pipe()
    start = time.monotonic()
    tests, verdict = fork(partial(run_tests, isolation, request, incoming), incoming)
    os.close(incoming)
    with contextlib.suppress(BrokenPipeError):
        judge.send(outgoing, judge.receive(requests) or b"")
    poll = select.poll()
    poll.register(verdict, select.POLLIN)
    poll.register(requests, 0)
    poll.register(server, 0)
    excess, ended = "", []
    while not ended and not excess:
        left = start + limits["timeout"] - time.monotonic()
        wait_seconds = left if isolation.namespaces else min(left, LOOK_SECONDS)
        ended = poll.poll(1000 * max(0.0, wait_seconds))
        if left <= 0:
            break
        if not isolation.namespaces:
            excess = files_in_excess(scratch, limits["disk"])
    seconds = time.monotonic() - start
    os.kill(tests, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):  # it may not have a group of its own yet
        os.killpg(tests, signal.SIGKILL)
    outcome = wait(tests, verdict, ("crashed", "the tests' process ended early"))
    isolation.clean_up(scratch)
    if excess:
        outcome = "failed", excess
    elif verdict not in dict(ended):
        outcome = "timeout", f"ran longer than {limits['timeout']:g} s"
    judge.send(replies, json.dumps((*outcome, seconds)).encode())
    return "over"


def main() -> None:
    requests, replies = os.dup(0), os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.umask(0o022)
    import_all(WARM_MODULES)
    random.seed(0)
    # If the machine runs out of memory, this is killed and not the run.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    isolation = Isolation(sys.argv[1:])
    confine.prctl(confine.PR_SUBREAPER, 1)
    # Collecting would write to every object, and what is written to is copied in every child.
    gc.disable()
    gc.freeze()
    judge.send(replies, json.dumps(isolation.missing).encode())
    while (header := judge.receive(requests)) is not None:
        request = json.loads(header) | {"scratch": isolation.scratch_of_request()}
        work = partial(supervise, isolation, request, requests, replies)
        result = wait(*fork(work, requests, replies))
        if result != "over":  # the supervisor was killed or failed: what it left is cleaned up
            isolation.clean_up(request["scratch"])
            judge.send(replies, json.dumps((*result, 0.0)).encode())
            return  # this server may have seen a test in that result
        judge.send(replies, json.dumps(result).encode())


if __name__ == "__main__":
    main()
