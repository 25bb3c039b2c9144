"""The one exception that every part may raise for something the user can mend."""


class UserError(Exception):
    """Bad input: the message is one line that names the thing and the mend; `main` prints it and exits with code 2."""


class RunFailed(Exception):
    """A run that cannot go on through no fault of its input (disk full, loss not finite): one line, exit code 1."""
