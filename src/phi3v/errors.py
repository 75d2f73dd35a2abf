"""The one exception meant for the person at the keyboard."""


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line and names the file, line, flag or tensor.

    The command line prints it without a traceback and exits with status 2; every other exception is a bug of ours
    and keeps its traceback.
    """
