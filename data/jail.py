"""Executed, never imported: a warm interpreter in which generated programs run, each in processes of its own.

The run (`data/sandbox.py`) starts this file; it locks itself in once and then takes one request at a time. Who is whose child:

    run ─ warden (this, waits for requests) ─ keeper (one per request: time, cleaning up) ─ tests ─ solution

The warden forks and never runs what it is sent. The tests' process is the first of a process namespace, where there are such: as it ends the
kernel ends all that came of it.
"""

import gc
import json
import math
import os
import select
import shutil
import signal
import struct
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
OWN_USERS = 1 << 30  # as root every warden has a user of its own from here on: limits are counted per user, and no file is theirs


class Cell:
    """What holds programs on this system. without: layers left out, for the tests: namespaces, landlock, seccomp."""

    def __init__(self, without=()):
        self.root, self.missing = os.geteuid() == 0, []
        self.user = OWN_USERS | os.getpid() if self.root else os.geteuid()
        self.pages = sorted({os.path.abspath(p) for p in sys.path if os.path.isdir(p)} | {p for p in LIBRARIES if os.path.exists(p)})
        self.devices = [p for p in DEVICES if os.path.exists(p)]
        if self.root and self._fails(lambda: confine.become(self.user)):  # a container with few users
            self.user = 65534
        why = "left out" if "namespaces" in without else self._fails(self._enter)
        if why and self.root and "namespaces" not in without and not self._fails(lambda: (confine.become(self.user), self._enter())):
            confine.become(self.user)  # not root enough for namespaces, but there are those for everyone
            self.root, why = False, None
        self.landlock = 0 if "landlock" in without else confine.landlock_version()
        self.namespaces, self.seccomp, self.rules = not why, "seccomp" not in without and not self._fails(self._filter), None
        if self.seccomp:  # made once: in C they cost microseconds, in Python a millisecond
            self.never, self.no_children = confine.call_filter(confine.never()), confine.call_filter(confine.no_children())
        self._tell(why)

    def _tell(self, why):
        say = self.missing.append
        if why:
            say(f"no namespaces ({why}): programs share the system's process table, and the disk for their scratch folder")
        if not self.landlock:
            say("no Landlock" + ("" if self.namespaces else ": files that everyone may read can be read"))
        if not self.seccomp:
            say("no filter of system calls" + ("" if self.namespaces else ": the network, signals and file attributes are not protected"))
        if not self.namespaces and not self.landlock:
            say("programs cannot write a scratch folder" if self.seccomp else "files are protected by their permissions alone")
            if not self.root:
                say("the environment and memory of your user's processes can be read")
        if not self.namespaces and not self.seccomp and not self.root:
            say("the number of processes is limited with your user's own, and one that escapes may live on")
        if not self.namespaces and self.root and self._fails(self._read):
            say(f"the Python at {sys.base_prefix} is closed to other users: programs can import what is loaded already and nothing else")

    @staticmethod
    def _fails(attempt):
        """Why `attempt` fails, tried in a child of its own, or None."""
        read, write = os.pipe()
        if not (pid := os.fork()):
            try:
                attempt()
            except BaseException as e:  # noqa: BLE001
                os.write(write, (getattr(e, "strerror", None) or repr(e)).encode()[:500])
            os._exit(0)
        os.close(write)
        said = os.read(read, 500).decode(errors="replace")
        os.close(read)
        status = os.waitpid(pid, 0)[1]
        return said or (f"status {status}" if status else None)

    def _read(self):
        confine.become(self.user)
        for path in self.pages:
            os.close(os.open(path, os.O_RDONLY))

    @staticmethod
    def _filter():
        confine.drop_capabilities()
        confine.filter_calls(confine.call_filter(confine.never()))

    def _enter(self):
        uid, gid = os.geteuid(), os.getegid()  # in a user namespace they have no name until they are mapped
        confine.unshare(CELL if uid == 0 else CELL | confine.NEW_USER)
        if uid:
            confine.prctl(confine.PR_DUMPABLE, 1)  # who has been root before does not own its /proc/self
            confine.map_own_user(uid, gid)
        confine.enter_root(self.pages + self.devices)

    def enter(self):
        """Once, before the first request."""
        if self.namespaces:
            self._enter()
        confine.prctl(confine.PR_DUMPABLE, 0)

    def scratch(self):
        """A scratch folder of one request alone. In namespaces it is memory that goes with its last process; else it has to be cleared."""
        if self.namespaces:
            return "/tmp"
        folder = tempfile.mkdtemp(prefix=f"srlm-sandbox-{os.getpid()}-")
        if self.root:
            os.chown(folder, self.user, self.user)
        return folder

    def room(self, scratch, disk):
        """For the calling process and its children."""
        confine.prctl(confine.PR_SUBREAPER, 1)
        if self.namespaces:
            confine.unshare(confine.NEW_PIDS | confine.NEW_MOUNTS)
            confine.mount("tmpfs", scratch, "tmpfs", confine.MS_NOSUID | confine.MS_NODEV, f"mode=777,size={disk},nr_inodes=4096")

    def hold(self, limits, scratch):
        """Locks in the process that calls this, the tests', and those that come of it."""
        os.setsid()
        if self.root:
            confine.become(self.user)
        confine.prctl(confine.PR_PDEATHSIG, signal.SIGKILL)
        # what is there already counts: where a user namespace counts for itself warden, keeper and tests; without one all of the user's
        there = 1 if self.root else 3 if self.namespaces else _tasks_of(self.user)
        cpu = math.ceil(limits["timeout"]) + 1
        confine.limit(AS=limits["memory"], CPU=(cpu, cpu + 1), FSIZE=limits["disk"], NPROC=there + limits["tasks"], NOFILE=64, CORE=0,
                      MEMLOCK=0, MSGQUEUE=0, RTPRIO=0, NICE=0)  # fmt: skip
        os.chdir(scratch)
        confine.drop_capabilities()
        if self.landlock:
            self.rules = confine.file_rules(["/"] if self.namespaces else self._readable(), [scratch, "/dev/null"])
            confine.restrict_files(self.rules)
        if self.seccomp:
            confine.filter_calls(self.never)

    def hold_solution(self, limits):
        """The solution's process, more tightly: nothing that it may touch includes the tests' process."""
        confine.prctl(confine.PR_PDEATHSIG, signal.SIGKILL)
        if self.landlock:
            confine.restrict_files(self.rules)
        if self.seccomp and not limits["children"]:
            confine.filter_calls(self.no_children)
        if self.seccomp and not self.namespaces:
            confine.filter_calls(confine.call_filter(confine.only_itself(os.getpid()) + ([] if self.landlock else confine.no_writing())))

    def _readable(self):
        return [p for p in self.pages + self.devices if os.access(p, os.R_OK)]

    def clear(self, scratch):
        """After the last process, without namespaces: whatever escaped, and every file."""
        if self.namespaces:
            return
        if self.root and self.user & OWN_USERS:  # all of this user's processes at one stroke; it has none but the program's
            self._fails(lambda: (confine.become(self.user), os.kill(-1, signal.SIGKILL)))
        _end_children()
        for folder, names, _ in os.walk(scratch):
            for name in names:
                if not os.path.islink(path := os.path.join(folder, name)):
                    os.chmod(path, 0o700)  # a locked folder is opened before the walk enters it
        shutil.rmtree(scratch, ignore_errors=True)


def _tasks_of(user):
    """Threads of a user, as RLIMIT_NPROC counts them."""
    count = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            count += len(os.listdir(f"/proc/{name}/task")) if os.stat(f"/proc/{name}").st_uid == user else 0
        except OSError:  # gone since
            pass
    return count


def _end_children():
    """Kills and reaps until there is no child left: those of killed ones become ours (PR_SUBREAPER)."""
    while True:
        me = str(os.getpid())
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{name}/stat") as f:
                    if f.read().rpartition(")")[2].split()[1] == me:
                        os.kill(int(name), signal.SIGKILL)
            except OSError:
                pass
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


# --- one request -----------------------------------------------------------------------------------------------------


def keep(cell, request, scratch, ends):
    """The keeper: starts the tests' process, ends it in time, cleans up. Returns the outcome. ends: descriptors that hang up when the run
    or the warden is gone; it is not killed with them, since it has to clean up then too."""
    limits = request["limits"]
    cell.room(scratch, limits["disk"])
    began, (read, write) = time.monotonic(), os.pipe()
    tests = os.fork()
    if not tests:
        _keep_open(write)
        try:
            cell.hold(limits, scratch)
            verdict = judge.examine(request["program"], request["tests"], lambda: _solution(cell, request))
        except BaseException as e:  # noqa: BLE001
            verdict = "sandbox", judge.describe(e)
        os.write(write, json.dumps(verdict).encode())
        os._exit(0)
    os.close(write)
    reason, detail = _wait(read, ends, began + limits["timeout"]) or ("timeout", f"ran longer than {limits['timeout']:g} s")
    seconds = time.monotonic() - began
    os.kill(tests, signal.SIGKILL)
    os.waitpid(tests, 0)
    cell.clear(scratch)
    return dict(reason=reason, detail=detail, seconds=seconds)


def _keep_open(*fds):
    """Closes all others, but for the null devices."""
    low = 3
    for fd in sorted(fds):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, 1 << 16)


def _wait(verdict, ends, deadline):
    """[reason, detail], or None when time is up."""
    poll = select.poll()
    poll.register(verdict, select.POLLIN)
    for fd in ends:
        poll.register(fd, 0)
    ready = poll.poll(max(0, deadline - time.monotonic()) * 1000)
    if any(fd in ends for fd, _ in ready):
        return "crashed", "the run has ended"
    if not ready:
        return None
    said = os.read(verdict, 1 << 16)
    return json.loads(said) if said else ("crashed", "the tests' process ended early")


def _solution(cell, request):
    """Starts the solution's process. It keeps its two pipes and nothing else: not the verdict's."""
    asked, request_end = os.pipe()
    reply_end, replies = os.pipe()
    if pid := os.fork():
        os.close(asked)
        os.close(replies)
        return pid, request_end, reply_end
    try:
        cell.hold_solution(request["limits"])
        _keep_open(asked, replies)
        judge.serve(asked, replies, "solution" if request["tests"] else "__main__")
    finally:
        os._exit(1)


def serve():
    requests, replies = os.dup(0), os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    os.umask(0o022)
    for name in WARM:
        __import__(name)
    try:
        with open("/proc/self/oom_score_adj", "w") as f:
            f.write("1000")  # if the machine runs out of memory, not the run
    except OSError:
        pass
    cell = Cell(sys.argv[1:])
    cell.enter()
    confine.prctl(confine.PR_SUBREAPER, 1)
    gc.disable()  # what is collected is written to, and what is written to is copied in every child
    gc.freeze()
    judge.send(replies, json.dumps(cell.missing).encode())
    while (message := judge.receive(requests)) is not None:
        request, (read, write) = json.loads(message), os.pipe()
        scratch = cell.scratch()
        if not (keeper := os.fork()):
            os.close(read)
            os.close(replies)
            try:
                outcome = keep(cell, request, scratch, (requests, write))
            except BaseException as e:  # noqa: BLE001
                outcome = dict(reason="sandbox", detail=judge.describe(e), seconds=0.0)
            os.write(write, json.dumps(outcome).encode())
            os._exit(0)
        os.close(write)
        if os.waitpid(keeper, 0)[1]:  # killed from outside: what it kept is ours now
            cell.clear(scratch)
        said = os.read(read, 1 << 16) or json.dumps(dict(reason="sandbox", detail="its keeper was killed", seconds=0.0)).encode()
        os.close(read)
        judge.send(replies, said)


if __name__ == "__main__":
    serve()
