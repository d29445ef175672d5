"""The one exception that means "the input is wrong", as opposed to "the program is wrong"."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


class InputError(ValueError):
    """Bad input: the message is one line that names the file or field and how to mend it; of several slides, a line of
    each.

    The command line prints it without a traceback and exits with code 2.
    """


class OutputError(InputError):
    """An output cannot be written: no space, no permission. Trying the next one would not help."""


class SlidesFailed(InputError):
    """Some slides of several could not be predicted; the others are written.

    Attributes:
        failed: a line for each.
        n_written: the number of the others.
        folder: where those are.
    """

    def __init__(self, failed: Sequence[str], n_written: int, folder: Path) -> None:
        super().__init__(str(batch_error(failed, n_written, folder)))
        self.failed, self.n_written, self.folder = tuple(failed), n_written, folder


def first_line(error: BaseException) -> str:
    """What an exception says, in one line; its name where it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def as_input_error(error: Exception) -> InputError:
    """What was raised, foreseen or not, as what is said of it in a line."""
    return error if isinstance(error, InputError) else InputError(f"{type(error).__name__}: {first_line(error)}")


def with_path(path: str | os.PathLike[str] | None, error: InputError) -> str:
    """What is wrong with a file, in a line that has its path; None is of what is no file."""
    said = str(error)
    return said if path is None or str(path) in said else f"{path}: {said}"


def others_written(n_written: int, folder: Path) -> str:
    return f"{n_written} other slide{'s are' if n_written > 1 else ' is'} in {folder}"


def batch_error(failed: Sequence[str], n_written: int, folder: Path) -> InputError:
    """What is wrong with the slides of a batch, a line each, and how many others are written; one line where only one
    is bad."""
    others = others_written(n_written, folder)
    if n_written and len(failed) == 1:
        return InputError(f"{failed[0]} ({others})")
    return InputError("\n".join((*failed, *([others] if n_written else []))))
