"""Questions to a process of its own, so that nothing foreign can hang, crash or swell a run.

What comes from elsewhere (expressions in answers, chat templates) may compute for ever or fill the
memory, deaf to signals in the midst of one long operation. So a process answers one line of JSON
per question (`serve`), and whoever waits for it kills it when time is up (`Worker`). Time is what
the process computes: no verdict depends on how busy the machine is, or on a pause of the whole job.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
START_LIMIT = 120.0  # seconds for a process's imports
IDLE = 3  # looks in a row at a process that computes nothing, after which it is given up


class Worker:
    """Asks processes that are started as they are needed. Any thread may ask.

    There are as many as there were questions at once, and a new one after a kill.

    module: calls `serve`. limit: seconds of computing per question.
    """

    def __init__(self, module: str, limit: float):
        self.module, self.limit = module, limit
        self.ready: Any = None  # what the processes say when they have started
        # Its `pop` and `append` are atomic: there is no lock that a fork could leave closed.
        self._idle: list[subprocess.Popen[str]] = []
        self._owner = 0  # the id of the process that started ours

    def ask(self, *question: Any, limit: float = 0.0) -> Any:
        """The reply to a question.

        limit: seconds of computing for this one, where they are not those of all.

        Raises TimeoutError, ConnectionError if the process died of it, ValueError or TypeError if
        the question is no JSON.
        """
        limit = limit or self.limit
        line = json.dumps([limit, *question]) + "\n"
        for _ in range(2):  # a process found dead before its time is replaced once
            process = self._take()
            with contextlib.suppress(ConnectionError):
                reply = self._exchange(process, line, limit)
                self._idle.append(process)
                return reply
        raise ConnectionError

    def close(self) -> None:
        """End the processes that nobody asks; the next question starts another."""
        while self._idle:
            process = self._idle.pop()
            if self._owner == os.getpid():  # else a fork's parent has it
                _end(process)

    def pids(self) -> list[int]:
        """The ids of the processes that nobody asks."""
        return [process.pid for process in self._idle]

    def _take(self) -> subprocess.Popen[str]:
        if self._owner != os.getpid():
            self.close()
            self._owner = os.getpid()
        with contextlib.suppress(IndexError):
            while True:
                process = self._idle.pop()
                if process.poll() is None:
                    return process
                _end(process)
        process = subprocess.Popen(
            [sys.executable, "-m", self.module],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            # sympy's order of terms, and with it a verdict, may follow the hash seed
            env=os.environ | {"PYTHONHASHSEED": "0"},
            start_new_session=True,  # Ctrl-C is the run's to handle
        )
        self.ready = self._exchange(process, "", START_LIMIT)
        return process

    def _exchange(self, process: subprocess.Popen[str], line: str, limit: float) -> Any:
        """The next reply. Without one the process is ended: its next line would be that reply."""
        stdin, stdout = process.stdin, process.stdout
        assert stdin and stdout
        try:
            stdin.write(line)
            stdin.flush()
            if not _replies(process, limit):
                raise TimeoutError
            reply = stdout.readline()
            if not reply.endswith("\n"):
                raise ConnectionError
            return json.loads(reply)
        except BaseException:
            _end(process)
            raise


def _replies(process: subprocess.Popen[str], limit: float) -> bool:
    """Whether a process says something, or ends, before it has computed `limit` seconds."""
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)  # pyright: ignore[reportArgumentType]
    began = before = computed(process.pid)
    idle = 0
    while not poll.poll(1000 * max(began + limit - before, limit / 20)):
        now = computed(process.pid)
        idle = idle + 1 if now == before else 0
        before = now
        if now >= began + limit or idle == IDLE:
            return False
    return True


def computed(pid: int) -> float:
    """Seconds that a process has computed; those of a clock where the system does not tell."""
    try:
        return time.clock_gettime(~pid << 3 | 2)  # Linux's clock_getcpuclockid
    except OSError:
        return time.monotonic()


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    with contextlib.suppress(OSError):  # what it was not told any more
        process.communicate()


def serve(answer: Callable[..., Any], memory: int, ready: Callable[[], Any] = lambda: None) -> None:
    """Answer a line of JSON, [limit in seconds, question ...], with another until the pipe closes.

    That is when the run ends, however it ends. memory: bytes of address space. ready: called
    first; the first line is what it returns.
    """
    replies, sys.stdout = sys.stdout, sys.stderr  # nothing else may print between the replies
    with contextlib.suppress(ImportError, ValueError, OSError):  # not every system has it
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    print(json.dumps(ready()), file=replies, flush=True)
    for line in sys.stdin:
        limit, *question = json.loads(line)
        # The system ends a process that outlives the run in the midst of a question, whatever
        # Python is doing.
        signal.setitimer(signal.ITIMER_PROF, limit + 1)
        reply = answer(*question)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), file=replies, flush=True)
