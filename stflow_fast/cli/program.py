"""The program: its entry point, and how it speaks. Bad input is one line on standard error and exit code 2."""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from .._version import __version__
from ..errors import InputError, SlidesFailed, others_written

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Predict spatial gene expression from histology: STFlow in memory linear in the spots.",
)

MOST_SHOWN = 50
"""Lines about failed slides on a terminal."""


def main() -> None:
    """Entry point of ``stflow-fast``."""
    try:
        app()
    except SlidesFailed as error:
        shown = list(error.failed[:MOST_SHOWN])
        if len(error.failed) > MOST_SHOWN:
            shown.append(f"and {len(error.failed) - MOST_SHOWN} more slides failed; slides.csv has them all")
        others = [others_written(error.n_written, error.folder)] if error.n_written else []
        complain("\n".join([*shown, *others]), code=3 if error.n_written else 2)
    except InputError as error:
        complain(str(error))
    except PermissionError as error:  # of a folder on the way to a file, wherever that is looked for
        if error.filename is None:
            raise
        complain(f"{error.filename}: {error.strerror}; give yourself the right to read it, or name another path")


def complain(said: str, code: int = 2) -> NoReturn:
    """Print each line of what is wrong, and end with the code."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    for line in said.splitlines():
        console.print(f"stflow-fast: {line}", markup=False)
    sys.exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


def screen(width: int) -> Console:
    """Standard output, as wide as the terminal, or ``width`` where it is none."""
    return Console(width=None if sys.stdout.isatty() else width)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    pass
