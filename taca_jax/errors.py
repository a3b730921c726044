"""The exceptions that end a program in one line: the user can mend this, or asked for it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Bad input: the message is one line that says what is wrong and what to do.

    The command line programs print it as `error: <message>` and exit with status 1;
    anything else that escapes is a defect and keeps its traceback.
    """


class StoppedError(Exception):
    """The run was told to stop, and its state is on disk: the message says how to go on.

    The command line programs print it and exit with status 0.
    """


@contextmanager
def ending_in_one_line(stopped: str) -> Iterator[None]:
    """Within it a UserError ends the program with its line on stderr and status 1, and Ctrl-C with
    `stopped`."""
    try:
        yield
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(stopped)
