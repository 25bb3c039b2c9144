"""Generated Python run where it can do no harm: `check(program, tests)`.

A program has no network, no files but the standard library (to read) and a scratch folder of its own, no other process's memory or signals,
no environment, and limits on memory, processor, processes, file sizes and time; when it is over, all its processes and files are gone.
What enforces this, whichever of it the system has: namespaces with a file system of their own, Landlock, a filter of system calls, another
user where the run is root's, and limits. `missing()` says what this system lacks; the first use warns of it.

The verdict cannot be written by the program where `tests` are given apart from it: they run in a process of their own and ask for the
program's functions (`from solution import f`). A program without tests judges itself: it cannot pass by printing, exiting or writing to what
it finds open, but it could by looking for the harness in its own interpreter.

No fork happens in this process, so threads, CUDA and OpenMP are safe: a helper is started, and forks there.
"""

import atexit
import contextlib
import json
import os
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from data.sandbox.judge import receive, send
from errors import RunFailed, UserError
from model.parallel import place

START_LIMIT = 60.0  # seconds for a helper to start on a busy machine
GRACE = 20.0  # seconds beyond a program's own for the helper to clean up


@dataclass(frozen=True)
class Outcome:
    """reason: passed, failed (it raised), timeout, memory or crashed (it ended before its end). detail: the error in one short line."""

    passed: bool
    reason: str
    seconds: float
    detail: str = ""


@dataclass(frozen=True)
class Limits:
    """timeout: seconds of wall time; memory: bytes per process; tasks: threads and processes; children: whether there may be processes;
    disk: bytes of a file, and of all (where the system has namespaces)."""

    timeout: float = 5.0
    memory: int = 512 << 20
    tasks: int = 16
    children: bool = False
    disk: int = 32 << 20


def check(program, tests="", **limits):
    """Runs one program. limits: of `Limits`. Any thread may call; each runs its own."""
    return HELPERS.check(program, tests, Limits(**limits))


def at_once():
    """How many programs this process should run at a time: its share of the processors, where torchrun started others beside it."""
    return max(1, len(os.sched_getaffinity(0)) // place().local_world)


def check_many(jobs, workers=0, **limits):
    """Outcomes of programs, or of (program, tests) pairs, in their order; `workers` at a time, 0: `at_once`."""
    jobs = [(job, "") if isinstance(job, str) else job for job in jobs]
    with ThreadPoolExecutor(workers or at_once()) as pool:
        return list(pool.map(lambda job: check(*job, **limits), jobs))


def missing():
    """Sentences: the protections that this system does not offer."""
    return HELPERS.missing()


class Helper:
    """One warm process (`data/sandbox/jail.py`), one program at a time."""

    def __init__(self, without=(), python=None, user=None):
        if not sys.platform.startswith("linux"):
            raise UserError("the sandbox for generated code needs Linux")
        other = dict(user=user, group=user, extra_groups=[]) if user else {}
        self.owner, self._process = (
            os.getpid(),
            subprocess.Popen(
                [
                    python or sys.executable,
                    "-S",
                    "-s",
                    "-B",
                    str(Path(__file__).with_name("jail.py")),
                    *without,
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                cwd="/",
                start_new_session=True,
                env={"PYTHONHASHSEED": "0"},
                **other,  # nothing of ours; and the order of a set, and with it a verdict, follows the hash seed
            ),
        )
        self.missing = self._ask(None, START_LIMIT)
        if self.missing is None:
            raise RunFailed("the sandbox for generated code did not start")

    def check(self, program, tests, limits):
        """An Outcome, or None if the helper is gone."""
        said = self._ask(
            dict(program=program, tests=tests, limits=asdict(limits)), limits.timeout + GRACE
        )
        if said is None:
            return None
        reason, detail, *seconds = said
        if reason == "sandbox":
            raise RunFailed(f"the sandbox for generated code failed ({detail})")
        return Outcome(reason == "passed", reason, round(*seconds, 4), detail)

    def close(self):
        """Ends it, and with it all that runs in it."""
        if self.owner == os.getpid():  # after a fork it is the parent's
            self._process.kill()
            self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def pid(self):
        return self._process.pid

    def _ask(self, request, limit):
        """What it answers; None: it is gone, or is gone now since it has not answered in time."""
        with contextlib.suppress(OSError):
            if request:
                send(self._process.stdin.fileno(), json.dumps(request).encode())
            if message := receive(self._process.stdout.fileno(), until=time.monotonic() + limit):
                return json.loads(message)
        self.close()
        return None


class Helpers:
    """As many helpers as there are callers at once; they are kept for the next ones."""

    def __init__(self):
        self._idle, self._warned = (
            [],
            False,
        )  # its `pop` and `append` are atomic: no lock that a fork could leave closed

    def check(self, program, tests, limits):
        for _ in range(2):  # one that was killed from outside is replaced once
            helper = self._take()
            if outcome := helper.check(program, tests, limits):
                self._idle.append(helper)
                return outcome
        raise RunFailed("the sandbox for generated code was killed")

    def missing(self):
        helper = self._take()
        self._idle.append(helper)
        return helper.missing

    def close(self):
        """Ends the idle helpers; the next program starts another."""
        while self._idle:
            self._idle.pop().close()

    def _take(self):
        with contextlib.suppress(IndexError):
            while True:
                if (helper := self._idle.pop()).owner == os.getpid():
                    return helper
        helper = Helper()
        if helper.missing and not self._warned:
            warnings.warn(
                "the sandbox for generated code lacks: " + "; ".join(helper.missing), stacklevel=2
            )
        self._warned = True
        return helper


HELPERS = Helpers()  # starts no process before the first program
atexit.register(HELPERS.close)
