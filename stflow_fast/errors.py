"""The one exception that means "the input is wrong", as opposed to "the program is wrong"."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input: the message is one line that names the file or field and how to mend it.

    The command line prints it without a traceback and exits with code 2.
    """


class OutputError(InputError):
    """An output cannot be written: no space, no permission. Trying the next one would not help."""


def first_line(error: BaseException) -> str:
    """What an exception says, in one line; its name where it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
