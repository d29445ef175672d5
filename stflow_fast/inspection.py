"""What files are: format, spots, features, spacing, expression, and what is wrong with them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from .errors import InputError
from .model import Denoiser
from .slides import FORMATS, ReadOptions, Slide, SlideSource, StoredRows, recognise, sources
from .slides.places import spacing
from .slides.stores import is_zarr

SUFFIXES = (".h5", ".hdf5", ".h5ad", ".pt")
"""Files of a folder that are looked at; a path that is given itself is looked at whatever its name."""

PASSED_BY = ("patches",)
"""Folders with images or places of patches, which belong to the features beside them."""


@dataclass(frozen=True)
class Finding:
    """What a path, or a section of it, is; None is unknown or absent (plain JSON types).

    Attributes:
        path: as it was given, or found in a folder that was.
        slide: its id.
        format: name of the reader.
        spots: their number.
        features, features_dtype, encoder: size of a feature vector, its type in the file, who is said to have made it.
        spacing_px, spacing_um: median distance from a spot to the nearest, in level-0 pixels and in micrometres.
        library_ids: sections that the spots are of.
        genes: number of genes with expression; 0 without.
        genes_in_common: of the model's genes, how many are among them.
        notes: what a reader of the results should know.
        problem: why it cannot be predicted, in one line.
    """

    path: str
    slide: str = ""
    format: str | None = None
    spots: int | None = None
    features: int | None = None
    features_dtype: str | None = None
    encoder: str | None = None
    spacing_px: float | None = None
    spacing_um: float | None = None
    library_ids: tuple[str, ...] = ()
    genes: int | None = None
    genes_in_common: int | None = None
    notes: tuple[str, ...] = ()
    problem: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def inspect(
    paths: Iterable[str | Path],
    reading: ReadOptions | None = None,
    model: Denoiser | None = None,
    on_path: Callable[[str, int], None] | None = None,
) -> list[Finding]:
    """Look at files, and at all that lie in folders; features stay on the disk.

    Args:
        paths: of files, of stores, or of folders with such.
        reading: how to read them; features need not be there.
        model: to hold them against: size of its features, and its genes.
        on_path: called with each path that is done, and how many there are.

    Returns:
        One finding for each slide, and for each path that is none, in order.
    """
    reading = dataclasses.replace(reading or ReadOptions(), require_features=False, gene_names=True, expression=False)
    found: list[Finding] = []
    every = [each for path in paths for each in expand(Path(path))]
    for path in every:
        found += _findings(path, reading, model)
        if on_path:
            on_path(str(path), len(every))
    return found


def expand(path: Path) -> Iterator[Path]:
    """The path itself, or of a folder that is no slide what lies in it, in the order of names."""
    if not path.is_dir() or is_zarr(path) or _is_one(path):
        yield path
        return
    empty = True
    for folder, names, files in os.walk(path):
        here = Path(folder)
        stores = sorted(name for name in names if is_zarr(here / name) or _is_one(here / name))
        names[:] = sorted(set(names) - set(stores) - set(PASSED_BY))
        chosen = sorted(name for name in files if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."))
        for name in (*chosen, *stores):
            empty = False
            yield here / name
    if empty:
        yield path


def _is_one(folder: Path) -> bool:
    """Whether a folder is of a format itself."""
    try:
        recognise(folder)
    except InputError:
        return False
    return True


def _findings(path: Path, reading: ReadOptions, model: Denoiser | None) -> list[Finding]:
    try:
        return [_finding(source, model) for source in sources(path, reading)]
    except InputError as error:
        return [Finding(str(path), path.stem, problem=str(error))]


def _finding(source: SlideSource, model: Denoiser | None) -> Finding:
    try:
        slide = source.read()
    except InputError as error:
        return Finding(str(source.path), source.id, problem=str(error))
    pitch = spacing(slide.coords)
    micron = slide.micron_per_pixel
    return Finding(
        str(source.path),
        slide.id,
        slide.origin.format,
        slide.n_spots,
        slide.feature_dim or None,
        _stored_type(slide),
        slide.origin.encoder or None,
        pitch,
        pitch * micron if pitch and micron else None,
        () if slide.library_id is None else tuple(dict.fromkeys(slide.library_id.tolist())),
        len(slide.gene_names),
        len(set(model.provenance.genes) & set(slide.gene_names)) if model and slide.gene_names else None,
        slide.notes,
        _misfit(slide, model),
    )


def _stored_type(slide: Slide) -> str | None:
    if slide.features is None:
        return None
    return str(slide.features.stored if isinstance(slide.features, StoredRows) else slide.features.dtype)


def _misfit(slide: Slide, model: Denoiser | None) -> str | None:
    """Why a model cannot predict it."""
    if model is None or slide.feature_dim == model.config.feature_dim:
        return None
    has = f"has {slide.feature_dim} features" if slide.feature_dim else "has no features"
    return f"slide {slide.id}: {has}, the model takes {model.config.feature_dim}"


def table_of(findings: list[Finding]) -> Table:
    """A table for people; :func:`remarks_of` goes below it."""
    table = Table()
    for heading in ("file", "slide", "format", "spots", "features", "spacing", "expression"):
        table.add_column(heading, justify="right" if heading == "spots" else "left", overflow="fold")
    with_model = any(each.genes_in_common is not None for each in findings)
    if with_model:
        table.add_column("genes of the model", justify="right")
    for each in findings:
        row = [each.path, each.slide, *_cells(each), *([_known(each.genes_in_common)] if with_model else [])]
        table.add_row(*map(Text, row), style="red" if each.problem else "")
    return table


def remarks_of(findings: list[Finding]) -> list[str]:
    """A line for each note, with the number of slides that it is about, and one for each problem."""
    about: dict[str, list[str]] = {}
    for each in findings:
        for note in each.notes:
            about.setdefault(note, []).append(each.path)
    notes = [f"{_first(paths)}: {note}" for note, paths in about.items()]
    problems = [_with_path(each.path, each.problem) for each in findings if each.problem]
    return [*(f"note: {note}" for note in notes), *(f"cannot be predicted: {problem}" for problem in problems)]


def _with_path(path: str, problem: str) -> str:
    return problem if problem.startswith(path) else f"{path}: {problem}"


def _first(paths: list[str]) -> str:
    return paths[0] + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


def _known(value: object) -> str:
    return "" if value is None else str(value)


def _cells(found: Finding) -> tuple[str, ...]:
    if found.format is None:
        return "?", "", "", "", ""
    features = "none" if found.features is None else f"{found.features} {found.features_dtype} {found.encoder or ''}"
    pitch = "" if found.spacing_px is None else f"{found.spacing_px:.1f} px"
    micron = "" if found.spacing_um is None else f", {found.spacing_um:.1f} um"
    expression = f"{found.genes:,} genes" if found.genes else "none"
    title = FORMATS[found.format].title if found.format in FORMATS else found.format
    return title, f"{found.spots:,}", features.strip(), pitch + micron, expression
