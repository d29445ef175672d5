"""AnnData in HDF5 (.h5ad) or zarr: only the parts that are needed are read.

Files come from many programs and versions. What prediction does not need is not read, so an element that this anndata
does not know, in ``uns`` or beside the features, is in nobody's way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import InputError
from .anndata_counts import read_counts, read_gene_names
from .anndata_table import Table, dense, is_numbers, key_text, keys_in, open_table
from .options import FEATURES_KEY, SPATIAL_KEY, ReadOptions, section_id
from .rows import StoredRows, rows_of, stored_rows
from .slide import Origin, Slide
from .stores import is_array

if TYPE_CHECKING:
    import pandas as pd

PIXEL_SIZE_KEYS = ("pixel_size_um_estimated", "pixel_size_um_embedded", "micron_per_pixel")
"""Where HEST and its relatives keep the size of a level-0 pixel in ``uns``."""

LIBRARY_ID = "library_id"
"""The field's column of ``obs`` for the section of a spot. Where it is there, it is the one that counts."""

SECTION_COLUMNS = (
    "sample_id",
    "sample",
    "sample_name",
    "section",
    "section_id",
    "slide",
    "slide_id",
    "slice",
    "slice_id",
    "library",
    "batch",
    "orig.ident",
)
"""Other columns that name sections, where they name several."""

MISSING = "missing"
"""The section of spots whose column says none."""


def read_h5ad(
    path: str | Path, features_key: str = FEATURES_KEY, expression: bool = True, options: ReadOptions | None = None
) -> Slide:
    """Read a slide from one AnnData file.

    Features come from ``obsm[features_key]``, or from X where that is "X", coordinates from ``obsm["spatial"]``, raw
    counts from ``layers["counts"]``, X, or ``raw`` where X is not counts (a file without them predicts, but cannot be
    scored). Features that are a plain array stay on the disk until they are used.

    Args:
        path: the file, or the folder of an AnnData zarr.
        features_key: of the patch embeddings in ``obsm``, or "X".
        expression: take the counts too.
        options: everything else that may be said; ``features_key`` and ``expression`` of it are not looked at.

    Raises:
        InputError: a missing, unreadable, locked or truncated file, missing keys, or what Slide refuses.
    """
    options = dataclasses.replace(options or ReadOptions(), features_key=features_key, expression=expression)
    return read_anndata(Path(path), options)


def read_anndata(path: Path, options: ReadOptions) -> Slide:
    """As :func:`read_h5ad`, with all options."""
    with open_table(path) as table:
        return slide_of(table, options, path.stem, placed_by_obsm(table, options, "anndata"))


def sections_of(path: Path, options: ReadOptions) -> tuple[str, ...]:
    """The sections by ``library_key``, in the order in which they come; none without it."""
    if not options.library_key:
        return ()
    with open_table(path) as table:
        return tuple(dict.fromkeys(table.column("obs", options.library_key).tolist()))


class Placed(NamedTuple):
    """Where the spots of a table lie.

    Attributes:
        coords: [N, 2] or [N, 3] centres of all rows of the table.
        rows: those that are meant; all when None. The coordinates of others may be anything.
        origin: of the slide, but for its library_key.
        notes: for people.
        in_pixels: whether the coordinates are in level-0 pixels, as pixel sizes and scale factors are.
    """

    coords: np.ndarray
    rows: np.ndarray | None
    origin: Origin
    notes: tuple[str, ...] = ()
    in_pixels: bool = True


def placed_by_obsm(table: Table, options: ReadOptions, format: str) -> Placed:
    """As ``obsm[spatial_key]`` says.

    Raises:
        InputError: there is no such key, or no section of the name that is asked for.
    """
    coords, rows = _coords(table, options), rows_of_section(table, options)
    libraries = _libraries(table)
    if options.spatial_key != SPATIAL_KEY:  # in a unit of its own
        said = f"pixel size and scale factors are those of obsm['{SPATIAL_KEY}'], and are not taken"
        known = bool(libraries) or _pixel_size(table) is not None
        return Placed(coords, rows, Origin(table.path, format), (said,) if known else (), in_pixels=False)
    own = libraries.get(options.section, {}) if options.section else _only(libraries)
    return Placed(coords, rows, Origin(table.path, format, scalefactors=own, library_scalefactors=libraries))


def slide_of(table: Table, options: ReadOptions, name: str, placed: Placed) -> Slide:
    """The slide, or the section of it, of a table that is open."""
    barcodes = table.names("obs")
    obs, unread = table.frame("obs")
    features = _features(table, options)
    counts, var = None, None
    genes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    if options.expression:
        counts, genes, var, notes = read_counts(table, options)
    elif options.gene_names:
        genes, var = read_gene_names(table, options)
    if unread:
        notes = (*notes, f"columns of obs that cannot be read are left out: {', '.join(unread)}")
    library_key, library = _library(obs, len(barcodes), placed.origin, options)
    slide: dict[str, Any] = {
        "features": features,
        "coords": placed.coords,
        "barcodes": barcodes,
        "counts": counts,
        "obs": obs if len(obs.columns) else None,
        "library_id": library,
    }
    if placed.rows is not None:  # before it is a slide: the coordinates of the others may be anything
        for part, value in slide.items():
            if value is not None and np.shape(value)[0] != len(barcodes):
                raise InputError(f"{table.path}: {part} has {np.shape(value)[0]} rows, obs {len(barcodes)}; write both")
        slide = {part: rows_of(value, placed.rows) for part, value in slide.items()}
    return Slide(
        id=name if options.section is None else section_id(name, options.section),
        gene_names=genes,
        micron_per_pixel=_pixel_size(table) if placed.in_pixels else None,
        notes=(*placed.notes, *notes),
        var=var,
        origin=dataclasses.replace(placed.origin, library_key=library_key),
        **slide,
    )


def rows_of_section(table: Table, options: ReadOptions) -> np.ndarray | None:
    """The rows that the options name, None where they name no section.

    Raises:
        InputError: no such section or column.
    """
    if options.section is None:
        return None
    if options.library_key is None:
        raise InputError(f"{table.path}: section {options.section!r} needs --library-key, the column that names it")
    labels = table.column("obs", options.library_key)
    rows = np.flatnonzero(labels == options.section)
    if not len(rows):
        known = ", ".join(dict.fromkeys(labels.tolist()))
        raise InputError(
            f"{table.path}: obs[{options.library_key!r}] has no section {options.section!r}; it has {known}"
        )
    return rows


def _library(obs: pd.DataFrame, n: int, origin: Origin, options: ReadOptions) -> tuple[str, np.ndarray | None]:
    """:func:`library_of`, or the section that is read, or the only library that the file has scale factors of."""
    if options.section is not None:
        return "", np.full(n, options.section)
    name, labels = library_of(obs, options.library_key)
    if labels is None and len(origin.library_scalefactors) == 1:
        labels = np.full(n, next(iter(origin.library_scalefactors)))
    return name, labels


def library_of(obs: pd.DataFrame, library_key: str | None) -> tuple[str, np.ndarray | None]:
    """The column that names the sections of spots, and the section of each [N]; "" and None where there is none.

    Args:
        obs: [N] columns.
        library_key: of the column; None for ``library_id``, or else another column by whose name it could be one and
            that has several; "" for none.
    """
    columns = (LIBRARY_ID, *SECTION_COLUMNS) if library_key is None else (library_key,)
    for name in columns:
        n = obs[name].nunique() if name in obs else 0
        told = library_key is not None or name == LIBRARY_ID
        if (1 < n < len(obs)) or (told and n == 1):
            labels = obs[name].astype(object).where(obs[name].notna(), MISSING)
            return name, labels.astype(str).to_numpy(dtype=str)
    return "", None


def features_part(options: ReadOptions) -> str:
    """The key in a table of the features that are asked for."""
    asked = options.features_key or FEATURES_KEY
    return "X" if asked == "X" else f"obsm/{asked}"


def _features(table: Table, options: ReadOptions) -> np.ndarray | StoredRows | None:
    key = features_part(options)
    part = table.part(key)
    if part is None:
        if options.require_features:
            raise InputError(
                f"{table.path}: has no {key_text(key)} with patch embeddings; obsm has "
                f"{keys_in(table, 'obsm')} (--features-key KEY, or X)"
            )
        return None
    if is_numbers(part) and len(part.shape) > 1:
        return stored_rows(table.path, f"{table.key}/{key}".lstrip("/"), part)
    return dense(table, key, np.float32)


def _coords(table: Table, options: ReadOptions) -> np.ndarray:
    key = f"obsm/{options.spatial_key}"
    if table.part(key) is None:
        raise InputError(
            f"{table.path}: has no {key_text(key)} (spot centres x, y in pixels); it has {keys_in(table, 'obsm')} "
            "(--spatial-key KEY)"
        )
    coords = dense(table, key, np.float64)
    if coords.ndim != 2 or coords.shape[1] < 2:
        raise InputError(f"{table.path}: {key_text(key)} must have shape [N, 2], not {list(coords.shape)}")
    return coords


def _pixel_size(table: Table) -> float | None:
    """Micrometres per level-0 pixel, None where unknown."""
    return next((size for key in PIXEL_SIZE_KEYS if (size := _scalar(table, f"uns/{key}")) and size > 0), None)


def _scalar(table: Table, key: str) -> float | None:
    """A number, None where there is none."""
    part = table.part(key)
    if not is_numbers(part) or part.shape not in ((), (1,)):
        return None
    value = float(np.asarray(part[()]).reshape(-1)[0])
    return value if np.isfinite(value) else None


def _libraries(table: Table) -> dict[str, dict[str, float]]:
    """Numbers of ``uns["spatial"][library]["scalefactors"]`` by library."""
    libraries = table.part("uns/spatial")
    if libraries is None or is_array(libraries):
        return {}
    return {name: _scalefactors(table, f"uns/spatial/{name}/scalefactors") for name in sorted(libraries.keys())}


def _scalefactors(table: Table, key: str) -> dict[str, float]:
    factors = table.part(key)
    names = [] if factors is None or is_array(factors) else list(factors.keys())
    values = {name: _scalar(table, f"{key}/{name}") for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _only(libraries: Mapping[str, dict[str, float]]) -> dict[str, float]:
    """Those of the only library; nothing where there are several."""
    return next(iter(libraries.values())) if len(libraries) == 1 else {}
