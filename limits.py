"""A limit of time for code of the user's that runs in this process."""

import contextlib
import faulthandler
import signal
import threading
from collections.abc import Iterator
from typing import Any

LAST = 10.0  # seconds after the limit, until a process that hears nothing is ended


class OverTime(BaseException):
    """Code took longer than its limit. No Exception: code that passes over those hears of it."""


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise OverTime in the main thread if what is inside `with` takes longer; 0: no limit.

    What hears no signal (code in C, or in another thread) is ended LAST seconds later with the
    whole process, exit code 1 and a traceback that shows where it hung.
    """
    if not seconds:
        yield
        return

    def alarm(*_: Any) -> None:
        raise OverTime

    is_main = threading.current_thread() is threading.main_thread()
    faulthandler.dump_traceback_later(seconds + LAST, exit=True, file=2)
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
