"""What a person names, files, folders and lists, as slides to be read: of the slides only names are looked at."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError, first_line
from ..inspection import expand
from ..slides import ReadOptions, Slide, SlideSource, sources

PATH, ID = "path", "sample_id"
"""Columns of a list of slides; others are options of how to read them."""

OPTIONS = ("format", "features_key", "spatial_key", "library_key", "coordinate_system", "table", "embeddings")
"""Fields of ReadOptions that decide what a slide is predicted from."""


class Given(NamedTuple):
    """What a run is to predict.

    Attributes:
        slides: by id, each to be read, or in memory; ids are names of files.
        reading: what was said of how to read each, by id, of what decides its prediction.
        refused: what is no slide or may not be predicted, by id: its path ("" of what is in memory), and why.
    """

    slides: dict[str, SlideSource | Slide]
    reading: dict[str, dict[str, str]]
    refused: dict[str, tuple[str, str]]

    def part(self, chosen: Callable[[int], bool]) -> Given:
        """Those whose number in the order of all is chosen; what is refused is numbered behind the others."""
        numbers = itertools.count()
        slides = {name: each for name, each in self.slides.items() if chosen(next(numbers))}
        return Given(slides, self.reading, {name: each for name, each in self.refused.items() if chosen(next(numbers))})


def path_of(slide: SlideSource | Slide) -> Path | None:
    """Where a slide is from; None of one that was made in memory."""
    return slide.origin.path if isinstance(slide, Slide) else slide.path


def given_slides(
    inputs: str | Path | Slide | Iterable[str | Path | Slide], reading: ReadOptions, nested: bool = False
) -> Given:
    """The slides of all inputs, in their order.

    Args:
        inputs: one or several: Slides; paths of slides, in any format; folders, of which every slide in them is meant;
            CSV lists with a column "path", relative to the list, and, where wanted, "sample_id" and fields of
            :class:`ReadOptions`.
        reading: how to read what says nothing else.
        nested: look into folders of folders too.
    """
    found: dict[str, SlideSource | Slide] = {}
    told: dict[str, dict[str, str]] = {}
    refused: dict[str, tuple[str, str]] = {}
    doubled: dict[str, list[str]] = {}
    for path, options, slides in _all(inputs, reading, nested):
        if isinstance(slides, InputError):
            refused[_free(Path(path).stem or path, refused)] = path, str(slides)
            continue
        for slide in slides:
            if slide.id in found:
                doubled.setdefault(slide.id, [_told(found[slide.id])]).append(_told(slide))
            elif problem := _unfit(slide.id):
                refused[_free(slide.id[:100], refused)] = _told(slide), problem
            else:
                found[slide.id], told[slide.id] = slide, described(options)
    for name, places in doubled.items():
        del found[name]
        where = " and ".join(filter(None, dict.fromkeys(places)))
        reason = (
            f"{name}: is the name of several slides{f' ({where})' if where else ''}; rename one, each becomes a file"
        )
        refused[_free(name, refused)] = places[0], reason
    return Given(found, told, refused)


def described(reading: ReadOptions) -> dict[str, str]:
    """What was said of how to read, of what decides a prediction; nothing where nothing was."""
    usual = ReadOptions()
    given = {field: getattr(reading, field) for field in OPTIONS}
    return {field: str(value) for field, value in given.items() if value != getattr(usual, field)}


Read = list[SlideSource | Slide] | InputError
"""The slides of a path, or what is wrong with it."""


def _all(
    inputs: str | Path | Slide | Iterable[str | Path | Slide], reading: ReadOptions, nested: bool
) -> Iterator[tuple[str, ReadOptions, Read]]:
    """The path, how it is read, and what is there."""
    for given in [inputs] if isinstance(inputs, str | Path | Slide) else inputs:
        if isinstance(given, Slide):
            yield _told(given), ReadOptions(), [given]
        elif _is_list(Path(given)):
            yield from _listed(Path(given), reading)
        else:
            yield from ((str(path), reading, _sources(path, reading)) for path in expand(Path(given), nested))


def _sources(path: Path, reading: ReadOptions) -> Read:
    try:
        return sources(path, reading)
    except InputError as error:
        return error


def _is_list(path: Path) -> bool:
    """Whether a path is a list of slides: a CSV whose first line has a column "path"."""
    if path.suffix.lower() != ".csv" or not path.is_file():
        return False
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return PATH in next(csv.reader(file), [])
    except (OSError, UnicodeDecodeError, csv.Error):
        return False


def _listed(path: Path, reading: ReadOptions) -> Iterator[tuple[str, ReadOptions, Read]]:
    """The slides of a list, a row each."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, strict=True)
            unknown = [name for name in rows.fieldnames or () if name not in (PATH, ID, *OPTIONS)]
            if unknown:
                known = ", ".join((PATH, ID, *OPTIONS))
                raise InputError(f"{path}: has a column {unknown[0]!r}; columns are {known}")
            lines = [(rows.line_num, row) for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)})") from error
    for number, row in lines:
        if not row[PATH]:
            yield f"{path}, line {number}", reading, InputError(f"{path}, line {number}: names no path")
            continue
        here = path.parent / row[PATH]
        options = {name: row[name] for name in OPTIONS if row.get(name)}
        if "embeddings" in options:
            options["embeddings"] = path.parent / options["embeddings"]
        of_row = dataclasses.replace(reading, **options)
        found = _sources(here, of_row)
        if row.get(ID) and isinstance(found, list):
            found = _renamed(found, row[ID], f"{path}, line {number}")
        yield str(here), of_row, found


def _renamed(found: list[SlideSource], name: str, where: str) -> Read:
    if len(found) > 1:
        return InputError(f"{where}: sample_id: {name!r} is for one slide, the path has {len(found)}; leave it empty")
    return [found[0]._replace(id=name)]


def _unfit(name: str) -> str | None:
    """Why an id cannot be the name of a file."""
    if not name or name in (".", "..") or "/" in name or "\0" in name or os.sep in name:
        return f"{name!r}: a slide's name becomes a file's, and cannot be empty or have a slash; rename it"
    if len(name.encode()) > MOST_BYTES:
        return f"{name[:40]}...: a slide's name becomes a file's, and {len(name)} characters are too many; rename it"
    return None


MOST_BYTES = 200
"""Of a slide's name: file systems take 255 for a file's, which has a suffix, and one more while it is written."""


def _free(name: str, taken: dict[str, tuple[str, str]]) -> str:
    """The name, with a number behind it where others had it before."""
    return next(
        each for each in itertools.chain([name], (f"{name} ({i})" for i in itertools.count(2))) if each not in taken
    )


def _told(slide: SlideSource | Slide) -> str:
    return str(path_of(slide) or "")
