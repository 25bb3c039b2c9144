"""A limit of time for code of the user's that runs in this process."""

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

LAST = 10.0  # seconds after the limit, until a process that hears nothing is ended


class OverTime(BaseException):
    """Code took longer than its limit. No Exception: code that passes over those hears of it."""


@contextlib.contextmanager
def within(seconds: float, what: str = "") -> Iterator[None]:
    """Raise OverTime in the main thread if what is inside `with` takes longer; 0: no limit.

    What hears no signal (code in C, or in another thread) is ended LAST seconds later with the
    whole process, exit code 1 and the line `what`; without it a traceback that shows where it hung.
    """
    if not seconds:
        yield
        return

    def alarm(*_: Any) -> None:
        raise OverTime

    is_main = threading.current_thread() is threading.main_thread()
    file = _witness.tell(what) if what else 2
    faulthandler.dump_traceback_later(seconds + LAST, exit=True, file=file)
    before, left = None, 0.0
    if is_main:
        before = signal.signal(signal.SIGALRM, alarm)
        # once more every second, for code that passes over everything
        left, _ = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        if is_main:
            signal.setitimer(signal.ITIMER_REAL, left)
            signal.signal(signal.SIGALRM, before)


class _Witness:
    """A process that is told what runs, and says it if a traceback follows.

    No thread of Python gets a turn in a process whose code in C keeps the interpreter.
    """

    CODE = """
import sys
line = b""
for next_line in sys.stdin.buffer:
    if next_line.startswith(b"Timeout ("):
        sys.stderr.buffer.write(line)
        break
    line = next_line
"""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.owner = 0  # the id of the process that started it

    def tell(self, what: str) -> int:
        """Note what runs. Returns the file that a traceback is to be written to."""
        if self.process is None or self.owner != os.getpid() or self.process.poll() is not None:
            command = [sys.executable, "-ISc", self.CODE]  # Ctrl-C is this process's to handle
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
            self.owner = os.getpid()
        assert self.process.stdin
        line = " ".join(what.splitlines()).encode("utf-8", "backslashreplace") + b"\n"
        with contextlib.suppress(OSError):
            os.write(self.process.stdin.fileno(), line)
        return self.process.stdin.fileno()


_witness = _Witness()
