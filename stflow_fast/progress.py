"""Progress bars of the long commands, on standard error."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)


def _progress(quiet: bool = False) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=8),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[status]}", markup=False),  # names of files, in which brackets are brackets
    )
    return Progress(*columns, console=Console(stderr=True), disable=quiet)


@contextlib.contextmanager
def epochs_bar(epochs: int, selected_on: str, quiet: bool = False) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar over epochs; yields what to call with each epoch's record. ``quiet`` shows nothing."""
    best: dict[str, Any] = {}
    with _progress(quiet) as progress:
        task = progress.add_task("epoch", total=epochs, status="")

        def update(record: dict[str, Any]) -> None:
            best.update(record if record["best"] else {})
            reached = best.get("selection_pearson")
            chosen = "" if reached is None else f", best Pearson {reached:.3f} on {selected_on}"
            status = f"loss {record['train_loss']:.3f}{chosen}"
            progress.update(task, completed=record["epoch"], status=status)
            if not progress.console.is_terminal and not quiet:  # a log has no bar
                progress.console.print(f"epoch {record['epoch']} of {epochs}: {status}", markup=False)

        yield update


@contextlib.contextmanager
def cases_bar() -> Iterator[tuple[Callable[[str, int, int], None], Callable[[dict[str, Any]], None]]]:
    """A bar over the runs of a benchmark; yields what to call with the name of each that begins, its number and how
    many there are, and what to call with the record of each epoch."""
    with _progress() as progress:
        task = progress.add_task("run", total=None, status="")
        name = ""

        def begin(path: str, number: int, total: int) -> None:
            nonlocal name
            name = path
            progress.update(task, completed=number, total=total, status=name)
            if not progress.console.is_terminal:  # a log has no bar
                progress.console.print(f"run {number + 1} of {total}: {name}", markup=False)

        def epoch(record: dict[str, Any]) -> None:
            progress.update(task, status=f"{name}, epoch {record['epoch']}, loss {record['train_loss']:.3f}")

        yield begin, epoch
        progress.update(task, completed=progress.tasks[task].total, status="")


@contextlib.contextmanager
def groups_bar() -> Iterator[Callable[[int, int, dict[str, Any]], None]]:
    """A bar over groups of slides that are left out in turn; yields what to call with the number of each, how many
    there are, and the record of each epoch."""
    with _progress() as progress:
        task = progress.add_task("left out", total=None, status="")

        def update(number: int, total: int, record: dict[str, Any]) -> None:
            status = f"epoch {record['epoch']}, loss {record['train_loss']:.3f}"
            progress.update(task, completed=number, total=total, status=status)
            if not progress.console.is_terminal:  # a log has no bar
                progress.console.print(f"left out {number + 1} of {total}: {status}", markup=False)

        yield update
        progress.update(task, completed=progress.tasks[task].total, status="")


@contextlib.contextmanager
def slides_bar() -> Iterator[Callable[[str, tuple[str, ...], int, int], None]]:
    """A bar over slides; yields what to call with the id of each that is done, its notes (each different one is printed
    once), the number of its spots, and how many slides there are."""
    begun, spots, told = time.monotonic(), 0, set[str]()
    with _progress() as progress:
        task = progress.add_task("slide", total=None, status="")

        def update(name: str, notes: tuple[str, ...], n_spots: int, total: int) -> None:
            nonlocal spots
            spots += n_spots
            for note in sorted(set(notes) - told):  # those of others are the same by the thousand
                progress.console.print(f"{name}: {note}", markup=False)
            told.update(notes)
            rate = spots / max(time.monotonic() - begun, 1e-3)
            progress.update(task, advance=1, total=total, status=f"{rate:,.0f} spots/s, {name}")

        yield update


@contextlib.contextmanager
def patches_bar(n_slides: int) -> Iterator[Callable[[str, int, int], None]]:
    """A bar over slides and one over the patches of a slide; yields what to call with a slide's id, how many of its
    patches are done, and how many it has."""
    progress = _progress()
    slides = progress.add_task("slide", total=n_slides, status="")
    patches = progress.add_task("patch", total=None, status="")

    def update(name: str, done: int, n: int) -> None:
        progress.start()  # not before: a model that is downloaded has a bar of its own
        progress.update(patches, total=n, completed=done, status=name)
        progress.update(slides, advance=1 if done == n else 0)

    try:
        yield update
    finally:
        if progress.live.is_started:
            progress.stop()


@contextlib.contextmanager
def paths_bar() -> Iterator[Callable[[str, int], None]]:
    """A bar over paths that are looked at; yields what to call with each that is done and how many there are."""
    with _progress() as progress:
        task = progress.add_task("file", total=None, status="")

        def update(path: str, total: int) -> None:
            progress.update(task, advance=1, total=total, status=path)

        yield update


@contextlib.contextmanager
def figures_bar(n_figures: int) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """A bar over the figures of a benchmark; yields what to call with what is being measured, and after each figure."""
    with _progress() as progress:
        task = progress.add_task("figure", total=n_figures, status="")

        def begin(what: str) -> None:
            progress.update(task, status=what)

        def done() -> None:
            progress.update(task, advance=1)

        yield begin, done
