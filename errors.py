"""What goes wrong, and how a command says so."""

import os
import sys
from collections.abc import Callable
from typing import Any, TextIO


class UserError(Exception):
    """Bad input: the message is one line that names the thing and the fix; exit code 2."""


class RunFailed(Exception):
    """A run cannot go on through no fault of its input (full disk, infinite loss): exit code 1."""


def say(text: object, file: TextIO | None = None) -> None:
    """Print a line, to standard output unless `file` is given.

    A terminal that was closed, or a pipe that nobody reads any more, ends no run: from then on what
    is written there is lost.
    """
    out = file or sys.stdout
    try:
        print(text, file=out, flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, out.fileno())  # also what is still to be flushed when Python ends
        os.close(nowhere)


def as_command(
    name: str, run: Callable[[], Any], interrupted: str = "interrupted; the same command goes on"
) -> int:
    """Call run() as the body of a command, and print what went wrong as one line.

    Returns the exit code.
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
    say(f"{name}: {text}", sys.stderr)
    return code
