"""Run generated Python where it can do no harm: `check(program, tests)`.

A program has no network, no files but the standard library (to read) and a scratch folder of its
own, no memory or signals of other processes, no environment, and limits on memory, processor time,
processes, file sizes and wall time. When it is over, all its processes and files are gone.
README.md in this folder says what enforces this. `missing()` says which of it this system lacks,
and the first use warns of it.

A program cannot write its own verdict where `tests` are given apart from it: they run in a process
of their own and ask for the program's functions (`from solution import f`). A program without tests
is its own judge: it cannot pass by printing, exiting or writing to what it finds open, but it could
by looking for the harness in its own interpreter.

This process never forks, so threads, CUDA and OpenMP are safe: it starts helpers, which fork.
"""

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.sandbox.judge import receive, send
from errors import RunFailed, UserError
from model.parallel import place

START_SECONDS = 60.0  # for a helper to start on a busy machine
GRACE_SECONDS = 20.0  # beyond a program's own time, for the helper to clean up
PROCESSOR_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of this container, where it has one


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        passed: whether it came to its end, and its tests passed.
        reason: passed, failed (it raised), timeout, memory or crashed (it ended before its end).
        seconds: of wall time.
        detail: the error in one short line.
    """

    passed: bool
    reason: str
    seconds: float
    detail: str = ""


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        timeout: seconds of wall time.
        memory: bytes of each process.
        tasks: threads and processes.
        children: whether it may start processes.
        disk: bytes of each file, and of all together.
    """

    timeout: float = 5.0
    memory: int = 512 << 20
    tasks: int = 16
    children: bool = False
    disk: int = 32 << 20


def check(program: str, tests: str = "", **limits: Any) -> Outcome:
    """Run one program; `limits` are fields of `Limits`. Any thread may call."""
    return HELPERS.check(program, tests, Limits(**limits))


def at_once() -> int:
    """How many programs this process should run at a time.

    It is this process's part of the processors, where torchrun started others beside it. A
    container may be given the time of fewer than it sees: more programs would only wait for each
    other, and right ones run out of time.
    """
    processors = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # "max" is no number
        microseconds, period = map(int, PROCESSOR_QUOTA.read_text().split())
        processors = min(processors, microseconds // period)
    return max(1, processors // place().local_world)


def check_many(
    jobs: Iterable[str | tuple[str, str]], workers: int = 0, **limits: Any
) -> list[Outcome]:
    """Run programs, or (program, tests) pairs; return their outcomes in the same order.

    Args:
        jobs: the programs.
        workers: how many run at a time; 0 for `at_once()`.
        limits: fields of `Limits`.
    """

    def check_job(job):
        if isinstance(job, str):
            return check(job, **limits)
        return check(*job, **limits)

    with ThreadPoolExecutor(workers or at_once()) as pool:
        return list(pool.map(check_job, jobs))


def missing() -> list[str]:
    """Sentences: the protections that this system does not offer."""
    return HELPERS.missing()


class Helper:
    """A warm process (`jail.py`) that runs one program at a time.

    Args:
        without: layers of the sandbox to leave out, for its tests.
        python: the interpreter; this one's by default.
        user: the user as whom it runs; this one by default.

    Raises:
        UserError: this is not Linux.
        RunFailed: it did not start.
    """

    def __init__(
        self, without: Iterable[str] = (), python: str = sys.executable, user: int | None = None
    ) -> None:
        if not sys.platform.startswith("linux"):
            raise UserError("the sandbox for generated code needs Linux")
        self.owner = os.getpid()
        self._process = subprocess.Popen(
            [python, "-S", "-s", "-B", Path(__file__).with_name("jail.py"), *without],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd="/",
            start_new_session=True,
            # Nothing of this environment. The order of a set, and with it sometimes a verdict,
            # follows the hash seed.
            env={"PYTHONHASHSEED": "0"},
            user=user,
            group=user,
            extra_groups=[] if user else None,
        )
        self.pid = self._process.pid
        assert self._process.stdin and self._process.stdout
        self._requests = self._process.stdin
        self._replies = self._process.stdout
        self.error = "it was killed"  # why it did not answer
        self.missing: list[str] = self._ask([], START_SECONDS)
        if self.missing is None:
            raise RunFailed("the sandbox for generated code did not start")

    def check(self, program: str, tests: str, limits: Limits) -> Outcome | None:
        """Run a program; None if this helper is gone or failed, which ends it."""
        # The server reads the first message alone: what it has seen, every later program inherits.
        header = {"limits": asdict(limits), "apart": bool(tests)}
        answer = self._ask([header, [program, tests]], limits.timeout + GRACE_SECONDS)
        if answer is None:
            return None
        reason, detail, seconds = answer
        # The supervisor has said this; the server says when that has ended, too.
        if reason != "sandbox" and self._ask([], GRACE_SECONDS) == "over":
            return Outcome(reason == "passed", reason, round(seconds, 4), detail)
        self.error = detail
        self.close()
        return None

    def close(self) -> None:
        """End it, and with it all that runs in it."""
        if self.owner == os.getpid():  # after a fork it is still the parent's
            self._process.kill()
            self._process.wait()
        self._requests.close()
        self._replies.close()

    def _ask(self, messages: list[Any], timeout: float) -> Any:
        """Send messages and return the answer; end the helper and return None if none comes."""
        with contextlib.suppress(OSError):
            for message in messages:
                send(self._requests.fileno(), json.dumps(message).encode())
            poll = select.poll()
            poll.register(self._replies, select.POLLIN)
            if poll.poll(timeout * 1000):
                message = receive(self._replies.fileno())
                if message:
                    return json.loads(message)
        self.close()
        return None


class Helpers:
    """As many helpers as there are callers at once, kept for the next ones."""

    def __init__(self) -> None:
        # Its `pop` and `append` are atomic: there is no lock that a fork could leave closed.
        self._idle: list[Helper] = []
        self._warned = False

    def check(self, program: str, tests: str, limits: Limits) -> Outcome:
        """Run a program. What ends its helper is tried once more, in a new one.

        A program that ends two has crashed, as long as a trivial one comes to its end.

        Raises:
            RunFailed: a trivial program fails too.
        """
        start, error = time.monotonic(), ""
        helper = self._take()
        for _ in range(2):
            outcome = helper.check(program, tests, limits)
            if outcome:
                self._idle.append(helper)
                return outcome
            error, helper = helper.error, self._start()
        trivial = helper.check("", "", Limits())
        if not trivial or not trivial.passed:
            helper.close()
            raise RunFailed(f"the sandbox for generated code failed ({error})")
        self._idle.append(helper)
        seconds = round(time.monotonic() - start, 4)
        return Outcome(False, "crashed", seconds, f"it ended the sandbox ({error})")

    def missing(self) -> list[str]:
        """Sentences: the protections that this system does not offer."""
        helper = self._take()
        self._idle.append(helper)
        return helper.missing

    def close(self) -> None:
        """End the idle helpers; the next program starts another."""
        while self._idle:
            self._idle.pop().close()

    def _take(self) -> Helper:
        with contextlib.suppress(IndexError):
            while True:
                helper = self._idle.pop()
                if helper.owner == os.getpid():
                    return helper
        return self._start()

    def _start(self) -> Helper:
        helper = Helper()
        if helper.missing and not self._warned:
            lacks = "; ".join(helper.missing)
            warnings.warn(f"the sandbox for generated code lacks: {lacks}", stacklevel=2)
        self._warned = True
        return helper


HELPERS = Helpers()  # starts no process before the first program
atexit.register(HELPERS.close)
