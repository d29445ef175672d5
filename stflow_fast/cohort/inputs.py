"""What a person names, files, folders and lists, as slides to be read: of the slides only names are looked at."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import os
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError, first_line
from ..inspection import expand
from ..slides import ReadOptions, Slide, SlideSource, recognise, sources

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
        order: the ids of both, as they were given.
    """

    slides: dict[str, SlideSource | Slide]
    reading: dict[str, dict[str, str]]
    refused: dict[str, tuple[str, str]]
    order: list[str]

    def part(self, chosen: slice) -> Given:
        """Some of all that was given."""
        order = self.order[chosen]
        slides = {name: self.slides[name] for name in order if name in self.slides}
        refused = {name: self.refused[name] for name in order if name in self.refused}
        return Given(slides, self.reading, refused, order)


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
    told: dict[str, list[_Item]] = {}
    for path, options, slides in _all(inputs, reading, nested):
        if isinstance(slides, InputError):
            item = _Item(Path(path).stem or path, path, described(options), str(slides))
            told.setdefault(item.name, []).append(item)
            continue
        for slide in slides:
            problem = _unfit(slide.id)
            fit = slide if problem is None else f"{_told(slide)}: {problem}".removeprefix(": ")
            item = _Item(slide.id if problem is None else slide.id[:100], _told(slide), described(options), fit)
            others = told.setdefault(item.name, [])
            if not any(item.is_same(other) for other in others):
                others.append(item)
    given = Given({}, {}, {}, [])
    for item in (item for items in told.values() for item in _apart(items)):
        name = _free(item.name, given.order)
        given.order.append(name)
        if isinstance(item.slide, str):
            given.refused[name] = item.path, item.slide
        else:
            given.slides[name], given.reading[name] = item.slide, item.reading
    return given


class _Item(NamedTuple):
    """A slide with its name, or why there is none."""

    name: str
    path: str
    reading: dict[str, str]
    slide: SlideSource | Slide | str

    def is_same(self, other: _Item) -> bool:
        """Whether one slide is given twice."""
        if isinstance(self.slide, Slide) or isinstance(other.slide, Slide):
            return self.slide is other.slide
        one, another = ((os.path.realpath(each.path), each.name, each.reading) for each in (self, other))
        return one == another


def _apart(items: list[_Item]) -> list[_Item]:
    """What has one name, as it is predicted: several slides of one name are none."""
    slides = [item for item in items if not isinstance(item.slide, str)]
    refused = [item for item in items if isinstance(item.slide, str)]
    if len(slides) < 2:
        return [*slides, *refused]
    where = " and ".join(filter(None, dict.fromkeys(item.path for item in slides)))
    told = f"is the name of several slides{f' ({where})' if where else ''}; rename one, each becomes a file"
    return [slides[0]._replace(slide=f"{slides[0].name}: {told}"), *refused]


def described(reading: ReadOptions) -> dict[str, str]:
    """What was said of how to read, of what decides a prediction; nothing where nothing was."""
    usual = ReadOptions()
    given = {field: getattr(reading, field) for field in OPTIONS}
    return {field: str(value) for field, value in given.items() if value != getattr(usual, field)}


Read = Sequence[SlideSource | Slide] | InputError
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


def _sources(path: Path, reading: ReadOptions) -> list[SlideSource] | InputError:
    try:
        return sources(path, reading)
    except InputError as error:
        return _no_slides(path, error)


def _no_slides(path: Path, error: InputError) -> InputError:
    """What is of no format may be meant for a list of slides."""
    try:
        recognise(path)
    except InputError:
        if columns := _columns(path):
            told = f"a list of slides has a column {PATH!r}, this has {', '.join(columns)}"
            return InputError(f"{path}: {told}; name it so")
    except OSError:  # which the error says
        pass
    return error


def _is_list(path: Path) -> bool:
    """Whether a path is a list of slides: a CSV whose first line has a column "path"."""
    return PATH in _columns(path)


def _columns(path: Path) -> list[str]:
    """Those of a CSV; none of another file."""
    if path.suffix.lower() != ".csv" or not os.path.isfile(path):
        return []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return next(csv.reader(file), [])
    except (OSError, UnicodeDecodeError, csv.Error):
        return []


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
            if not lines:
                raise InputError(f"{path}: lists no slide; give it a row for each")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)})") from error
    for number, row in lines:
        problem = "names no path" if not row[PATH] else "has more cells than columns" if None in row else None
        if problem:
            yield f"{path}, line {number}", reading, InputError(f"{path}, line {number}: {problem}; mend the list")
            continue
        here = path.parent / row[PATH]
        options: dict[str, Any] = {name: row[name] for name in OPTIONS if row.get(name)}
        if "embeddings" in options:
            options["embeddings"] = path.parent / options["embeddings"]
        of_row = dataclasses.replace(reading, **options)
        found = _sources(here, of_row)
        if row.get(ID) and not isinstance(found, InputError):
            yield str(here), of_row, _renamed(found, row[ID], f"{path}, line {number}")
        else:
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


def _free(name: str, taken: Container[str]) -> str:
    """The name, with a number behind it where others had it before."""
    return next(
        each for each in itertools.chain([name], (f"{name} ({i})" for i in itertools.count(2))) if each not in taken
    )


def _told(slide: SlideSource | Slide) -> str:
    return str(path_of(slide) or "")
