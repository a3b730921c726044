"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """Bad input: the message is one line that says what is wrong and what to do.

    The command line programs print it as `error: <message>` and exit with status 1;
    anything else that escapes is a defect and keeps its traceback.
    """
