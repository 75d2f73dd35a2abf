"""The one exception meant for the person at the keyboard."""

MAX_LENGTH = 1000
"""Characters of a message; a name or a value in it may be as long as somebody made it."""


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line and names the file, line, flag or tensor.

    The command line prints it without a traceback and exits with status 2; every other exception is a bug of ours
    and keeps its traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class RankError(InputError):
    """Something has gone wrong on this rank alone; every other InputError is raised by all ranks of a job alike."""


def one_line(text: str) -> str:
    """A text with its control characters escaped, so that a terminal does not obey them, and cut if it is long."""
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    return line if len(line) <= MAX_LENGTH else f"{line[: MAX_LENGTH * 3 // 4]} [...] {line[-MAX_LENGTH // 5 :]}"
