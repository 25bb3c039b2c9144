"""What goes wrong, for the user to fix or not; and how a command says so."""

import os
import sys
from collections.abc import Callable
from typing import TextIO


class UserError(Exception):
    """Bad input: one line that names the thing and the fix; the command exits with code 2."""


class RunFailed(Exception):
    """A run cannot go on, though its input is good (disk full, loss not finite).

    One line, exit code 1.
    """


def say(text: object, file: TextIO | None = None) -> None:
    """Print a line, to standard output unless a file is given.

    A terminal that was closed, or a pipe that nobody reads any more, ends no run: what is written
    there from then on is lost.
    """
    stream = file or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # also what is still to be flushed when Python ends
        os.close(nowhere)


def as_command(
    name: str,
    run: Callable[[], None],
    interrupted: str = "interrupted; the same command goes on",
    speaks: Callable[[], bool] = lambda: True,
) -> int:
    """Call run() as the body of the command `name`. Returns the exit code.

    What the user can fix, and what failed, become one line on standard error. speaks: whether this
    process says what all ranks have met; what failed may be its own, and is said by each.
    """
    try:
        run()
        return 0
    except UserError as e:
        code, text = 2, e
    except RunFailed as e:
        code, text = 1, e
    except KeyboardInterrupt:
        code, text = 130, interrupted
    if speaks() or code == 1:
        say(f"{name}: {text}", sys.stderr)
    return code
