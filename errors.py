"""What goes wrong: for the user to mend, or not; and how a command says so."""

import sys


class UserError(Exception):
    """Bad input: the message is one line that names the thing and the mend; `main` prints it and exits with code 2."""


class RunFailed(Exception):
    """A run that cannot go on through no fault of its input (disk full, loss not finite): one line, exit code 1."""


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
    print(f"{name}: {text}", file=sys.stderr, flush=True)
    return code
