"""What files are: format, spots, features, spacing, expression, and what is wrong with them."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from .errors import InputError
from .model import Denoiser
from .slides import FORMATS, ReadOptions, Slide, SlideSource, StoredRows, recognise, sources
from .slides.genes import known_otherwise, other_spelling, some_of
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
        image_size: width and height of the image in level-0 pixels.
        library_ids: sections that the spots are of.
        genes: number of genes with expression, of the table that train would take; 0 without.
        genes_in_common: of the model's genes, how many are among them.
        notes: what a reader of the results should know.
        problem: what is wrong with it, in one line, with its path.
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
    image_size: tuple[int, int] | None = None
    library_ids: tuple[str, ...] = ()
    genes: int | None = None
    genes_in_common: int | None = None
    notes: tuple[str, ...] = ()
    problem: str | None = None

    @property
    def predictable(self) -> bool:
        """Whether a model can predict it: expression alone is no problem, but no features either."""
        return self.problem is None and self.features is not None

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "predictable": self.predictable}


def inspect(
    paths: str | Path | Iterable[str | Path],
    reading: ReadOptions | None = None,
    model: Denoiser | None = None,
    on_path: Callable[[str, int], None] | None = None,
    ignore_encoder: bool = False,
) -> list[Finding]:
    """Look at files, and at all that lie in folders; features stay on the disk.

    Args:
        paths: one or several: of files, of stores, or of folders with such.
        reading: how to read them. Features need not be there, but where it says their key or their file.
        model: to hold them against: size of its features, its encoder, and its genes.
        on_path: called with each path that is done, and how many there are.
        ignore_encoder: features of another encoder than the model's are no problem.

    Returns:
        One finding for each slide, and for each path that is none, in order.
    """
    reading = reading or ReadOptions()
    reading = dataclasses.replace(
        reading, require_features=reading.features_key is not None, gene_names=True, expression=False
    )
    found: list[Finding] = []
    given = [paths] if isinstance(paths, str | Path) else paths
    every = [each for path in given for each in expand(Path(path))]
    for path in every:
        found += _findings(path, reading, model, ignore_encoder)
        if on_path:
            on_path(str(path), len(every))
    return found


def expand(path: Path, nested: bool = True) -> Iterator[Path]:
    """The path itself, or of a folder that is no slide what lies in it, in the order of names; ``nested``: in folders
    of it, too."""
    if not os.path.isdir(path) or _is_one(path):
        yield path
        return
    empty = True
    for folder, names, files in os.walk(path):
        here = Path(folder)
        ones = sorted(name for name in names if _is_one(here / name))
        names[:] = sorted(set(names) - set(ones) - set(PASSED_BY)) if nested else []
        chosen = sorted(name for name in files if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."))
        for name in (*chosen, *ones):
            empty = False
            yield here / name
    if empty:
        yield path


def _is_one(folder: Path) -> bool:
    """Whether a folder is one row: of a format itself, a store, or closed to us, and reading it says why."""
    try:
        if not is_zarr(folder):
            recognise(folder)
    except InputError:
        return False
    except OSError:
        return True
    return True


def _findings(path: Path, reading: ReadOptions, model: Denoiser | None, ignore_encoder: bool) -> list[Finding]:
    try:
        return [finding_of(source, model, ignore_encoder) for source in sources(path, reading)]
    except InputError as error:
        return [Finding(str(path), path.stem, problem=str(error))]


def finding_of(source: SlideSource | Slide, model: Denoiser | None, ignore_encoder: bool = False) -> Finding:
    """What a slide is; of :func:`inspect`."""
    path = "" if isinstance(source, Slide) else str(source.path)
    try:
        slide = source if isinstance(source, Slide) else source.read()
    except InputError as error:
        return Finding(path, source.id, problem=str(error))
    pitch = spacing(slide.coords)
    micron = slide.micron_per_pixel
    genes = model.provenance.genes if model and slide.gene_names else ()
    known = set(slide.gene_names)
    missing = [name for name in genes if name not in known]
    return Finding(
        path,
        source.id,
        slide.origin.format,
        slide.n_spots,
        slide.feature_dim or None,
        _stored_type(slide),
        slide.origin.encoder or None,
        pitch,
        pitch * micron if pitch and micron else None,
        slide.origin.image_size,
        () if slide.library_id is None else tuple(dict.fromkeys(slide.library_id.tolist())),
        len(slide.gene_names),
        len(genes) - len(missing) if genes else None,
        (*slide.notes, *_spelling_note(slide, genes, missing)),
        _problem(slide, model, ignore_encoder),
    )


def _spelling_note(slide: Slide, genes: Sequence[str], missing: Sequence[str]) -> tuple[str, ...]:
    """That genes of a model are there by other names, or none of them at all. Prediction needs none."""
    say = other_spelling if len(missing) == len(genes) else known_otherwise
    spelling = say(missing, slide.gene_names, slide.var) if missing else ""
    if not spelling:
        return ()
    return (
        f"{len(missing)} of the model's {len(genes)} genes are not in its expression: {some_of(missing)}{spelling}",
    )


def _problem(slide: Slide, model: Denoiser | None, ignore_encoder: bool) -> str | None:
    if not slide.feature_dim and not slide.gene_names:
        return f"{_where(slide)}: has neither features nor expression"
    if model is None:
        return None
    return _size_misfit(slide, model) or (None if ignore_encoder else encoder_misfit(slide, model))


def _size_misfit(slide: Slide, model: Denoiser) -> str | None:
    if slide.feature_dim == model.config.feature_dim:
        return None
    has = f"has {slide.feature_dim} features" if slide.feature_dim else "has no features"
    return f"{_where(slide)}: {has}, the model takes {model.config.feature_dim}"


def encoder_misfit(slide: Slide, model: Denoiser) -> str | None:
    """What to say where a slide tells that its features are of another encoder than the model was trained with."""
    of_model, of_slide = model.provenance.encoder, slide.origin.encoder
    if not of_model or not of_slide or _same_encoder(of_model, of_slide):
        return None
    return (
        f"{_where(slide)}: features are of {of_slide!r}, but the model was trained with {of_model!r}; give those, or "
        "--ignore-encoder if it is another name of the same"
    )


def _same_encoder(one: str, other: str) -> bool:
    """Whether two names mean one encoder: written otherwise, or with the number of its first version."""
    one, other = (re.sub(r"[^a-z0-9]", "", name.lower()) for name in (one, other))
    return one == other or {one, other} == {one.removesuffix("v1"), f"{one.removesuffix('v1')}v1"}


def _where(slide: Slide) -> str:
    return str(slide.origin.path or f"slide {slide.id}")


def _stored_type(slide: Slide) -> str | None:
    if slide.features is None or not slide.feature_dim:
        return None
    return str(slide.features.stored if isinstance(slide.features, StoredRows) else slide.features.dtype)


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
    """A line for each note, with the number of slides that it is about, one for slides of expression alone, and one for
    each problem."""
    about: dict[str, list[str]] = {}
    for each in findings:
        for note in each.notes:
            about.setdefault(note, []).append(each.path)
    notes = [f"{_first(paths)}: {note}" for note, paths in about.items()]
    bare = [each.path for each in findings if not each.predictable and not each.problem]
    if bare:
        notes.append(f"{_first(bare)}: expression without features, which predict needs (--embeddings gives them)")
    problems = [each.problem for each in findings if each.problem]
    return [*(f"note: {note}" for note in notes), *(f"cannot be predicted: {problem}" for problem in problems)]


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
