"""Signals that ask a command to stop: which they are, and who hears them."""

import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Sent by Ctrl-C (INT), a user or a cluster (TERM), a closing terminal (HUP), a scheduler before the
# time is up (Slurm's --signal sends USR1 or USR2 by habit, a processor limit XCPU).
STOP_SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)
INTERRUPTED = 130  # exit code
GRACE = 5.0  # seconds in which a rank's main thread may come back from waiting for other ranks


@contextmanager
def handled(handler: Callable[..., Any]) -> Iterator[None]:
    """Let `handler` get the STOP_SIGNALS inside `with`.

    Signals that are ignored (HUP under nohup) or handled outside Python stay as they are. Only the
    main thread may have handlers: elsewhere (wandb.agent, Ray, notebooks) nothing changes.
    """
    before = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class Interrupt:
    """Handles the first signal as Ctrl-C: `finally` clauses run. A second Ctrl-C leaves at once.

    last_words: called before that; the process ends with the exit code INTERRUPTED.
    """

    def __init__(self, last_words: Callable[[], None]) -> None:
        self.last_words = last_words
        self.heard = threading.Event()

    def __call__(self, number: int, frame: Any = None) -> None:
        if not self.heard.is_set():
            self.heard.set()
            raise KeyboardInterrupt(signal.Signals(number).name)
        if number == signal.SIGINT:
            self.leave()

    def leave(self) -> None:
        self.last_words()
        os._exit(INTERRUPTED)


class Listener(threading.Thread):
    """Ends a rank whose main thread waits for other ranks, where it runs no handler of Python.

    Only where an `Interrupt` would handle the signal, and GRACE seconds after it.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.reading, self.writing = os.pipe()
        os.set_blocking(self.writing, False)
        signal.set_wakeup_fd(self.writing, warn_on_full_buffer=False)
        # a signal to a process that a user's code forks is none to this one
        os.register_at_fork(after_in_child=functools.partial(signal.set_wakeup_fd, -1))

    def run(self) -> None:
        while number := os.read(self.reading, 1):
            handler = signal.getsignal(number[0])
            if isinstance(handler, Interrupt) and not handler.heard.wait(GRACE):
                handler.leave()

    def stop(self) -> None:
        signal.set_wakeup_fd(-1)
        os.close(self.writing)
        self.join()
        os.close(self.reading)
