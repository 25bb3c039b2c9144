"""Executed, never imported: a warm interpreter in which generated programs run, each in processes of its own.

The run (`data/sandbox.py`) starts this file; it locks itself in once and then takes one request at a time. Who is whose child:

    run ─ warden (this, waits for requests) ─ keeper (one per request: time, cleaning up) ─ tests ─ solution

The warden forks and never runs what it is sent. The tests' process is the first of a process namespace, where there are such: as it ends the
kernel ends all that came of it.
"""

import contextlib
import gc
import json
import math
import os
import select
import shutil
import signal
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [HERE] + [p for p in sys.path if os.path.abspath(p or ".") != HERE]
import confine  # noqa: E402
import judge  # noqa: E402

sys.path.remove(HERE)  # generated programs find the standard library and nothing else

WARM = """abc array bisect cmath collections collections.abc contextlib copy dataclasses datetime decimal enum fractions functools hashlib
heapq inspect io itertools json math numbers operator queue random re statistics string struct textwrap threading time traceback types typing
unicodedata""".split()  # imported once, not by every program
LIBRARIES = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache"]
DEVICES = ["/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"]
CELL = confine.NEW_MOUNTS | confine.NEW_NET | confine.NEW_IPC | confine.NEW_UTS
OWN_USERS = (
    1 << 30
)  # as root every warden has a user of its own from here on: limits are counted per user, and no file is theirs


def child(work, *fds):
    """Forks: (pid, a pipe on which comes, as JSON, what work(its end of the pipe) returns). The child keeps that, `fds` and null devices open."""
    read, write = os.pipe()
    if pid := os.fork():
        os.close(write)
        return pid, read
    try:
        kept = [2, *sorted((*fds, write)), 1 << 16]
        for below, above in zip(kept, kept[1:]):
            os.closerange(below + 1, above)
        try:
            said = work(write)
        except BaseException as e:  # noqa: BLE001
            said = "sandbox", judge.describe(e)
        os.write(write, json.dumps(said).encode())
    finally:
        os._exit(0)


def told(pid, pipe):
    """What a child has returned, or None if it was killed, once it is over."""
    said = os.read(pipe, 1 << 16)
    os.close(pipe)
    os.waitpid(pid, 0)
    return json.loads(said) if said else None


def fails(*attempts):
    """Why these fail, tried in a child, or None."""
    said = told(*child(lambda _: [attempt() for attempt in attempts])) or (
        "sandbox",
        "it was killed",
    )
    return said[1] if said[0] == "sandbox" else None


def processes():
    """(pid, parent, user, threads) of all that can be seen."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as f:  # it may be gone since
            status = dict(line.split(":", 1) for line in f)
            yield (
                int(pid),
                int(status["PPid"]),
                int(status["Uid"].split()[0]),
                int(status["Threads"]),
            )


class Cell:
    """What holds programs on this system. without: layers left out, for the tests: namespaces, landlock, seccomp."""

    def __init__(self, without):
        self.root = os.geteuid() == 0
        self.user = OWN_USERS | os.getpid() if self.root else os.geteuid()
        self.pages = sorted(
            {os.path.abspath(p) for p in sys.path if os.path.isdir(p)}
            | {p for p in LIBRARIES if os.path.exists(p)}
        )
        self.devices = [p for p in DEVICES if os.path.exists(p)]
        become = lambda: confine.become(self.user)
        if self.root and fails(become):  # a container with few users
            self.user = 65534
        why = "left out" if "namespaces" in without else fails(self.enter)
        if why and self.root and "namespaces" not in without and not fails(become, self.enter):
            become()  # not root enough for namespaces, but there are those for everyone
            self.root, why = False, None
        self.landlock = 0 if "landlock" in without else confine.landlock_version()
        self.seccomp = "seccomp" not in without and not fails(
            confine.drop_capabilities, lambda: confine.refuse(confine.NEVER)
        )
        closed = (
            why
            and self.root
            and fails(become, lambda: [os.close(os.open(path, os.O_RDONLY)) for path in self.pages])
        )
        self._tell(why, closed)
        self.namespaces = not why
        if self.namespaces:
            self.enter()
        confine.prctl(confine.PR_DUMPABLE, 0)

    def enter(self):
        """Namespaces, with a file system that holds Python and nothing else."""
        uid, gid = (
            os.geteuid(),
            os.getegid(),
        )  # in a user namespace they have no name until they are mapped
        confine.call("unshare", CELL if uid == 0 else CELL | confine.NEW_USER)
        if uid:
            confine.prctl(
                confine.PR_DUMPABLE, 1
            )  # who has been root before does not own its /proc/self
            for name, text in (
                ("setgroups", "deny"),
                ("uid_map", f"{uid} {uid} 1"),
                ("gid_map", f"{gid} {gid} 1"),
            ):
                with open(f"/proc/self/{name}", "w") as f:
                    f.write(text)
        confine.enter_root(self.pages + self.devices)

    def _tell(self, why, closed):
        """missing: sentences."""
        bare, user = why and not self.landlock, not self.root  # bare: no layer is about files
        self.missing = [
            sentence
            for lacking, sentence in (
                (
                    why,
                    f"no namespaces ({why}): programs share the system's process table, and the disk for their scratch folder",
                ),
                (
                    not self.landlock,
                    "no Landlock" + (": files that everyone may read can be read" if why else ""),
                ),
                (
                    not self.seccomp,
                    "no filter of system calls"
                    + (
                        ": the network, signals and file attributes are not protected"
                        if why
                        else ""
                    ),
                ),
                (
                    bare,
                    "programs cannot write a scratch folder"
                    if self.seccomp
                    else "files are protected by their permissions alone",
                ),
                (bare and user, "the environment and memory of your user's processes can be read"),
                (
                    why and user and not self.seccomp,
                    "the number of processes is limited with your user's own, and one that escapes may live on",
                ),
                (
                    closed,
                    f"the Python at {sys.base_prefix} is closed to other users: programs can import what is loaded already and nothing else",
                ),
            )
            if lacking
        ]

    def scratch(self):
        """A scratch folder of one request alone. In namespaces it is memory that goes with its last process; else it has to be cleared."""
        if self.namespaces:
            return "/tmp"
        folder = tempfile.mkdtemp(prefix=f"srlm-sandbox-{os.getpid()}-")
        if self.root:
            os.chown(folder, self.user, self.user)
        return folder

    def clear(self, scratch):
        """After the last process, without namespaces: whatever escaped, and every file."""
        if self.namespaces:
            return
        if (
            self.root and self.user & OWN_USERS
        ):  # all of this user's processes at one stroke; it has none but the program's
            fails(lambda: confine.become(self.user), lambda: os.kill(-1, signal.SIGKILL))
        while True:  # until there is no child left: those of killed ones become ours (PR_SUBREAPER)
            for pid, parent, _, _ in processes():
                if parent == os.getpid():
                    os.kill(pid, signal.SIGKILL)
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                break
        for folder, names, _ in os.walk(scratch):
            for name in names:
                if not os.path.islink(path := os.path.join(folder, name)):
                    os.chmod(path, 0o700)  # a locked folder is opened before the walk enters it
        shutil.rmtree(scratch, ignore_errors=True)

    def hold(self, limits, scratch):
        """Locks in the tests' process, which calls this, and all that come of it."""
        os.setsid()
        if self.root:
            confine.become(self.user)
        # what is there already counts: where a user namespace counts for itself warden, keeper and tests; without one all of the user's
        there = (
            1
            if self.root
            else 3
            if self.namespaces
            else sum(threads for _, _, user, threads in processes() if user == self.user)
        )
        confine.limit(
            AS=limits["memory"],
            CPU=math.ceil(limits["timeout"]) + 1,
            FSIZE=limits["disk"],
            NPROC=there + limits["tasks"],
            NOFILE=64,
            CORE=0,
            MEMLOCK=0,
            MSGQUEUE=0,
            RTPRIO=0,
            NICE=0,
        )
        os.chdir(scratch)
        confine.drop_capabilities()
        self._lock(scratch, confine.NEVER)

    def hold_solution(self, limits, scratch):
        """Locks in the solution's process, more tightly: nothing that it may touch includes the tests' process."""
        others = [] if self.namespaces else confine.only_itself(os.getpid())
        files = [] if self.namespaces or self.landlock else confine.NO_WRITING
        self._lock(scratch, others + files + ([] if limits["children"] else confine.NO_CHILDREN))

    def _lock(self, scratch, rules):
        confine.prctl(confine.PR_PDEATHSIG, signal.SIGKILL)
        if self.landlock:
            readable = (
                ["/"]
                if self.namespaces
                else [p for p in self.pages + self.devices if os.access(p, os.R_OK)]
            )
            confine.restrict_files(readable, [scratch, "/dev/null"])
        if self.seccomp:
            confine.refuse(rules)


def keep(cell, request, scratch, run, warden):
    """The keeper: starts the tests' process, ends it in time, cleans up. Returns (reason, detail, seconds).

    It is not killed with the run or the warden, since it has to clean up then too: their pipes hang up when they are gone."""
    limits = request["limits"]
    confine.prctl(confine.PR_SUBREAPER, 1)
    if cell.namespaces:
        confine.call("unshare", confine.NEW_PIDS | confine.NEW_MOUNTS)
        confine.mount(
            "tmpfs",
            scratch,
            "tmpfs",
            confine.MS_NOSUID | confine.MS_NODEV,
            f"mode=777,size={limits['disk']},nr_inodes=4096",
        )

    def test(_):
        cell.hold(limits, scratch)
        return judge.examine(request["program"], request["tests"], solve)

    def solve():
        """Its process keeps the two pipes on which it is asked and nothing else: not the verdict's."""
        asked, requests = os.pipe()
        pid, replies = child(lambda pipe: serve(asked, pipe), asked)
        os.close(asked)
        return pid, requests, replies

    def serve(asked, replies):
        cell.hold_solution(limits, scratch)
        judge.serve(asked, replies, "solution" if request["tests"] else "__main__")

    began, (tests, verdict) = time.monotonic(), child(test)
    poll = select.poll()
    for fd, event in ((verdict, select.POLLIN), (run, 0), (warden, 0)):
        poll.register(fd, event)
    in_time = any(fd == verdict for fd, _ in poll.poll(limits["timeout"] * 1000))
    seconds = time.monotonic() - began
    os.kill(tests, signal.SIGKILL)
    said = told(tests, verdict) or ("crashed", "the tests' process ended early")
    cell.clear(scratch)
    return *(said if in_time else ("timeout", f"ran longer than {limits['timeout']:g} s")), seconds


def main():
    requests, replies, null = os.dup(0), os.dup(1), os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.umask(0o022)
    for name in WARM:
        __import__(name)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as f:
        f.write("1000")  # if the machine runs out of memory, not the run
    cell = Cell(sys.argv[1:])
    confine.prctl(confine.PR_SUBREAPER, 1)
    gc.disable()  # what is collected is written to, and what is written to is copied in every child
    gc.freeze()
    judge.send(replies, json.dumps(cell.missing).encode())
    while (message := judge.receive(requests)) is not None:
        request, scratch = json.loads(message), cell.scratch()
        outcome = told(
            *child(lambda warden: keep(cell, request, scratch, requests, warden), requests)
        ) or ("sandbox", "it was killed")
        if len(outcome) < 3:  # killed from outside, or broken: what it kept is ours now
            cell.clear(scratch)
        judge.send(replies, json.dumps(outcome).encode())


if __name__ == "__main__":
    main()
