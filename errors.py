"""What goes wrong, for the user to fix or not; and how a command says so."""

import errno
import os
import sys
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

from signals import INTERRUPTED, Interrupt, handled

# Where the store of the ranks is gone, torch would write pages of C++ frames behind the one line
# that says so. It reads this as it is imported: after this module.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


class UserError(Exception):
    """Bad input: one line that names the thing and the fix; the command exits with code 2."""


class RunFailed(Exception):
    """A run cannot go on, though its input is good (disk full, loss not finite).

    One line, exit code 1.
    """


class Halted(RunFailed):
    """A signal to stop came in the midst of a step, which is dropped."""


# What the operating system says of a path that the user chose: another one, or other permissions,
# help. Anything else (a full disk, a broken one) is no fault of the command.
PATH_ERRORS = (
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.EINVAL,
    errno.ENAMETOOLONG,
    errno.ENOLCK,
)


def system_error(error: OSError, what: object = "", more: str = "") -> UserError | RunFailed:
    """What the operating system refused, as an error of ours.

    what: The thing that it is about; empty: the file that the error names. more: Put behind it.
    """
    kind = UserError if error.errno in PATH_ERRORS else RunFailed
    return kind(f"{what or error.filename or 'a file'}: {error.strerror or error}{more}")


def say(text: object, file: TextIO | None = None) -> None:
    """Print a line, to standard output unless a file is given.

    A terminal that was closed, or a pipe that nobody reads any more, ends no run: what is written
    there from then on is lost.
    """
    stream = file or sys.stdout
    # names of files and texts in JSON may hold what no encoding has, or this one not
    encoding = getattr(stream, "encoding", None) or "utf-8"
    shown = str(text).encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(f"{shown}\n", end="", file=stream, flush=True)  # one write: ranks share the terminal
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # also what is still to be flushed when Python ends
        os.close(nowhere)


def as_command(
    name: str,
    run: Callable[[], None],
    interrupted: str = "interrupted; the same command goes on",
    speaks: Callable[[str, bool], bool] | None = None,
) -> int:
    """Call run() as the body of the command `name`. Returns the exit code.

    What the user can fix, what failed, what the operating system refused, and a signal to stop
    become one line on standard error. speaks: whether this process says a line that other ranks may
    have met, too; is_own: what failed or was refused is perhaps this one's alone. None: a command
    of one process.
    """

    def tell(text: object, is_own: bool = False) -> None:
        one_line = " ".join(str(text).splitlines())  # what is quoted from a file may hold several
        if not speaks or speaks(one_line, is_own):
            say(f"{name}: {one_line}", sys.stderr)

    is_own = False
    with handled(Interrupt(lambda: tell(interrupted))):
        try:
            if not speaks:
                _refuse_ranks(name)
            run()
            return 0
        except UserError as e:
            code, text = 2, e
        except RunFailed as e:
            code, text, is_own = 1, e, True
        except OSError as e:
            text, is_own = system_error(e), True
            code = 2 if isinstance(text, UserError) else 1
        except KeyboardInterrupt:
            code, text = INTERRUPTED, interrupted
        tell(text, is_own)
        return code


def _refuse_ranks(name: str) -> None:
    """Raise UserError where torchrun has started several: each would do the whole work."""
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(f"this is a command of one process; start it with python -m {name}")


def _uncaught(kind: type[BaseException], e: BaseException, trace: TracebackType | None) -> None:
    """Ctrl-C while a command is still importing PyTorch is one line, too."""
    if issubclass(kind, KeyboardInterrupt):
        say("interrupted before it began", sys.stderr)
    else:
        sys.__excepthook__(kind, e, trace)


sys.excepthook = _uncaught  # so commands import this module before all others
