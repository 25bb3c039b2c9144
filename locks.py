"""A lock file that one process at a time may have, also where the file system has no locks.

Where `flock` works the kernel keeps the lock, and a holder that dies gives it back. Elsewhere
(Lustre without `-o flock`, some NFS and FUSE mounts) a file that only one process can create stands
for it; it says who holds it, and what a dead process of this host left is taken over. Of another
host nobody can tell whether it died: then the message names the file to delete.
"""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import SoftFileLock, Timeout

from errors import UserError, say
from files import reason

ASK = 1.0  # seconds between two looks at a lock that another process holds
SAY = 30.0  # seconds between two lines that say so
HELD = (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK)  # from `flock`: another has the lock


class Busy(Exception):
    """Another process holds the lock. The message says which, as far as is known."""


def soft_path(path: Path) -> Path:
    """The file that stands for the lock where the file system has none."""
    return path.with_name(path.name + "-soft")


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path` inside `with`.

    Raises Busy if another process has it, OSError if it cannot be made.
    """
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            soft = None
        except OSError as e:
            if e.errno in HELD:
                raise Busy("another process") from None
            soft = SoftFileLock(soft_path(path), timeout=0)
            try:
                soft.acquire()
            except Timeout:
                raise Busy(_holder(soft_path(path))) from None
        try:
            yield
        finally:
            if soft:
                soft.release()


def _holder(path: Path) -> str:
    """Who holds a soft lock, as its file says: process id, host, start time, one a line."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []  # given back meanwhile
    if len(lines) < 2:
        return f"another process (if there is none, delete {path})"
    pid, host = lines[:2]
    if host == socket.gethostname():
        return f"another process, {pid}"
    return f"process {pid} on {host} (if it is gone, delete {path})"


@contextlib.contextmanager
def waiting_for(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` inside `with`, after whoever has it.

    A line says at once, and then every 30 seconds, what is waited for. Raises UserError if the file
    cannot be made.
    """
    said = None
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(lock(path))
                break
            except Busy as e:
                if said is None or time.monotonic() - said >= SAY:
                    say(f"waiting for {what}: {path} is held by {e}")
                    said = time.monotonic()
                time.sleep(ASK)
            except OSError as e:
                raise UserError(f"{path} cannot be made ({reason(e)})") from None
        yield
