"""A lock file that one process at a time may have, also where the file system has no locks.

Where `flock` works the kernel keeps the lock, and a holder that dies gives it back. Elsewhere
(Lustre without `-o flock`, some NFS and FUSE mounts) a second file that only one process can create
stands for it, the soft lock; it says who holds it, and what a dead process of this host left is
removed. Of another host nobody can tell whether it died: then the message names the file to delete.

A folder may be mounted both ways on two nodes, so each kind of holder looks for the other kind: a
holder by `flock` writes who it is into the lock file and then looks for a soft lock; a soft one
creates its file and then looks into the lock file. Whoever comes second sees the first.
"""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from errors import UserError, say
from files import HEAD, is_there, reason, this_host

ASK = 1.0  # seconds between two looks at a lock that another process holds
SAY = 30.0  # seconds between two lines that say so
TAKEOVER = (
    60.0  # seconds after which whoever was removing a dead holder's file is taken for dead too
)
HELD = (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK)  # from `flock`: another has the lock


class Busy(Exception):
    """Another process holds the lock. The message says which, as far as is known."""


def soft_path(path: Path) -> Path:
    """The file that stands for the lock where the file system has none."""
    return path.with_name(path.name + "-soft")


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path` inside `with`; it is removed behind that.

    On a file system without locks it stays, empty. Raises Busy if another process has it, OSError
    or UserError if it cannot be made.
    """
    is_there(path)
    while True:
        with open(path, "a+", encoding="utf-8") as file:  # not "w": it may say who holds it
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                has_flock = True
            except OSError as e:
                if e.errno in HELD:
                    raise Busy("another process") from None
                has_flock = False
            with _flock_holder(file, path) if has_flock else _soft_holder(path):
                if not has_flock or _is_at(file, path):
                    yield
                    return
        # its last holder has removed the file that was opened here: once more with a new one


@contextlib.contextmanager
def _flock_holder(file, path):
    """Inside `with`, the lock file of which this process has the flock says so; then it goes."""
    try:
        with contextlib.suppress(OSError):  # a full disk keeps no lock away
            file.truncate(0)
            file.write(_record())
            file.flush()
        soft = soft_path(path)
        if soft.exists() and not _remove_dead(soft):
            raise Busy(_described(soft))
        yield
    finally:
        with contextlib.suppress(OSError):
            file.truncate(0)
            if _is_at(file, path):
                path.unlink()


@contextlib.contextmanager
def _soft_holder(path):
    """Inside `with`, a soft lock of this process stands beside the lock file `path`."""
    soft, record = soft_path(path), _record()
    _create_soft(soft, record)
    try:
        holder = _holder(path)
        if holder and not _is_dead(holder):
            raise Busy(_described(path))
        yield
    finally:
        with contextlib.suppress(OSError):
            if soft.read_text(encoding="utf-8") == record:  # not another's, after ours was deleted
                soft.unlink()


def _create_soft(soft, record):
    for _ in range(2):
        try:
            with open(soft, "x", encoding="utf-8") as file:
                _write_or_unlink(file, record)
            return
        except FileExistsError:
            if not _remove_dead(soft):
                break
    raise Busy(_described(soft))


def _write_or_unlink(file, record):
    try:
        file.write(record)
        file.flush()
    except BaseException:  # a full disk, an interrupt: nobody could tell whose an empty one is
        Path(file.name).unlink(missing_ok=True)
        raise


def _is_at(file: IO[Any], path: Path) -> bool:
    """Whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


# --- who holds a lock -------------------------------------------------------------------------


class Holder(NamedTuple):
    """What the file of a lock says. start: tells a process from a later one with its id."""

    pid: int
    host: str
    start: int | None


def _record() -> str:
    """This process, as it is written into a lock: process id, host, start time, one a line.

    It is the form of the filelock package (4.3).
    """
    start = _start(os.getpid())
    lines = [str(os.getpid()), this_host(), *([] if start is None else [str(start)])]
    return "".join(line + "\n" for line in lines)


def _holder(path: Path) -> Holder | None:
    """Who a lock's file names; None if nobody, or if it is gone or not written yet."""
    if not path.is_file():  # a pipe would be waited for
        return None
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read(HEAD).splitlines()
    except OSError:
        return None
    if len(lines) < 2 or not _is_number(lines[0]):
        return None
    start = int(lines[2]) if len(lines) > 2 and _is_number(lines[2]) else None
    return Holder(int(lines[0]), lines[1], start)


def _is_number(text):
    return text.isascii() and text.isdigit()


def _described(path: Path) -> str:
    """Who holds a lock, by what its file says, and what to do about one that may be dead."""
    holder = _holder(path)
    if holder is None:
        return f"another process (if there is none, delete {path})"
    if holder.host == this_host():
        return f"another process, {holder.pid}"
    return f"process {holder.pid} on {holder.host} (if it is gone, delete {path})"


def _is_dead(holder: Holder) -> bool:
    """Whether a holder is certainly gone.

    Its process is of this host, and there is none, or another one that began later.
    """
    if holder.host != this_host():
        return False
    try:
        os.kill(holder.pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        pass  # of another user
    now = _start(holder.pid)
    return None not in (now, holder.start) and now != holder.start


def _start(pid: int) -> int | None:
    """When a process began, in ticks since the boot, and the boot's id; None: nobody can say."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:
        return None
    ticks = stat.rpartition(")")[2].split()[19]  # the name before it may hold spaces and brackets
    return int(boot.strip().replace("-", ""), 16) << 64 | int(ticks)


# --- what the dead left behind ----------------------------------------------------------------


def _remove_dead(soft: Path) -> bool:
    """Remove a soft lock whose holder is certainly dead. Returns whether it is gone now.

    One process at a time may do that, and it looks again first: of two that saw a dead holder, the
    slower one would else remove the lock that the faster one has created meanwhile.
    """
    holder = _holder(soft)
    if holder is None or not _is_dead(holder):
        return not soft.exists()
    takeover = soft.with_name(soft.name + "-takeover")
    with contextlib.suppress(FileNotFoundError):
        if time.time() - takeover.stat().st_mtime > TAKEOVER:
            takeover.unlink()
    try:
        takeover.touch(exist_ok=False)
    except FileExistsError:
        return False
    try:
        holder = _holder(soft)
        if holder and _is_dead(holder):
            soft.unlink(missing_ok=True)
        return not soft.exists()
    finally:
        takeover.unlink(missing_ok=True)


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


def sweep(path: Path) -> None:
    """Remove a lock file that a dead process left, where nobody needs the lock any more."""
    with contextlib.suppress(Busy, OSError):
        if path.exists():
            with lock(path):
                return


def is_held(path: Path) -> bool:
    """Whether a process has the lock `path`, as its files say; nothing is locked or written."""
    holders = [_holder(file) for file in (path, soft_path(path))]
    return any(holder and not _is_dead(holder) for holder in holders)


# --- files in use ---------------------------------------------------------------------------------


def use(path: Path) -> IO[bytes] | None:
    """Open a file that is not to be removed until it is closed, or this process ends.

    None if it is not there, or is being removed. Where the file system has no locks nothing keeps
    it there.
    """
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        return None
    with contextlib.ExitStack() as stack:
        stack.callback(file.close)
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno in HELD:
                return None
        if not _is_at(file, path):
            return None
        stack.pop_all()
    return file


@contextlib.contextmanager
def unused(path: Path) -> Iterator[bool]:
    """Whether nobody has a file in `use`; nobody gets it while inside `with`."""
    try:
        file = open(path, "r+b")
    except OSError:
        yield True
        return
    with file:
        is_free = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            is_free = e.errno not in HELD
        yield is_free
