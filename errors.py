"""What goes wrong: for the user to mend, or not; and how a command says so."""

import os
import sys


class UserError(Exception):
    """Bad input: the message is one line that names the thing and the mend; `main` prints it and exits with code 2."""


class RunFailed(Exception):
    """A run that cannot go on through no fault of its input (disk full, loss not finite): one line, exit code 1."""


def say(text, file=None):
    """Print a line (file: standard output unless given). A terminal that was closed, or a pipe that nobody reads any more, ends
    no run: from then on what is written there is lost."""
    file = file or sys.stdout
    try:
        print(text, file=file, flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, file.fileno())  # also what is still to be flushed when Python ends
        os.close(nowhere)


def as_command(name, run, interrupted="interrupted; the same command goes on"):
    """run() as the body of a command: what a user can mend, or what failed, becomes one line on standard error. Returns the exit code."""
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
