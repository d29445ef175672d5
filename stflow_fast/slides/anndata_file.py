"""AnnData in HDF5 (.h5ad) or zarr: only the parts that are needed are read.

Files come from many programs and versions. What prediction does not need is not read, so an element that this anndata
does not know, in ``uns`` or beside the features, is in nobody's way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import h5py
import numpy as np
import scipy.sparse

from ..errors import InputError, first_line
from .options import FEATURES_KEY, ReadOptions, section_id
from .rows import StoredRows, rows_of, stored_rows
from .slide import Origin, Slide
from .stores import is_array, names_in, opened

if TYPE_CHECKING:
    import pandas as pd

PIXEL_SIZE_KEYS = ("pixel_size_um_estimated", "pixel_size_um_embedded", "micron_per_pixel")
"""Where HEST and its relatives keep the size of a level-0 pixel in ``uns``."""

SECTION_COLUMNS = ("library_id", "sample_id", "sample", "section", "slide_id", "batch")
"""Columns of ``obs`` that name the section of a spot, the field's first."""


@dataclass(frozen=True)
class Table:
    """The parts of an AnnData that is open, each read when it is asked for.

    Attributes:
        path: of the file, for messages.
        group: ``h5py.Group`` or ``zarr.Group`` of the table.
        key: of the group in the file; empty at its root.
        on_disk: whether ``group`` is the file itself, so that rows may stay in it.
    """

    path: Path
    group: Any
    key: str = ""
    on_disk: bool = True

    def element(self, key: str) -> Any:
        """One element, as anndata reads it.

        Raises:
            InputError: it cannot be read.
        """
        import anndata

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of encodings that are read all the same
                return anndata.io.read_elem(self.group[key])
        except Exception as error:  # whatever anndata raises for what it does not know
            raise InputError(f"{self.path}: {key} cannot be read ({first_line(error)})") from error

    def names(self, axis: str) -> np.ndarray:
        """The index of ``obs``, ``var`` or ``raw/var`` as text.

        Raises:
            InputError: it cannot be read.
        """
        if axis not in self.group:
            raise InputError(f"{self.path}: has no {axis}, so it is not AnnData; it has {names_in(self.group)}")
        index = str(self.group[axis].attrs.get("_index", "_index"))
        return np.array(list(self.element(f"{axis}/{index}")), dtype=np.str_)

    def columns(self, axis: str) -> list[str]:
        """Names of the columns of ``obs`` or ``var``."""
        order = self.group[axis].attrs.get("column-order", [])
        return [str(name) for name in order if str(name) in self.group[axis]]

    def frame(self, axis: str, text_only: bool = False) -> tuple[pd.DataFrame, list[str]]:
        """``obs`` or ``var`` without its index, and the columns that cannot be read."""
        import pandas as pd

        found, broken = {}, []
        for name in self.columns(axis):
            part = self.group[axis][name]
            if text_only and is_array(part) and np.dtype(part.dtype).kind in "biuf":
                continue
            try:
                found[name] = self.element(f"{axis}/{name}")
            except InputError:
                broken.append(name)
        return pd.DataFrame(found), broken

    def column(self, axis: str, name: str) -> np.ndarray:
        """[N] one column as text.

        Raises:
            InputError: there is none, or it has missing values.
        """
        import pandas as pd

        if name not in self.columns(axis):
            known = ", ".join(self.columns(axis)) or "none"
            raise InputError(f"{self.path}: {axis} has no column {name!r}; its columns: {known}")
        values = pd.Series(self.element(f"{axis}/{name}"))
        missing = int(values.isna().sum())
        if missing:
            raise InputError(f"{self.path}: {axis}[{name!r}] is missing in {missing} of {len(values)} rows; fill it")
        return values.astype(str).to_numpy(dtype=str)

    def part(self, key: str) -> Any:
        """A group or array, None where there is none or it is encoded as nothing."""
        found = self.group
        for name in key.split("/"):
            if is_array(found) or name not in found:
                return None
            found = found[name]
        return None if found.attrs.get("encoding-type") == "null" else found


@contextlib.contextmanager
def open_table(path: Path) -> Iterator[Table]:
    """An .h5ad file, or the folder of an AnnData zarr.

    Raises:
        InputError: it is missing, empty, locked, truncated, or not AnnData.
    """
    with opened(path) as store:
        if "obs" not in store:
            raise InputError(f"{path}: has no obs, so it is not AnnData; it has {names_in(store)}")
        if store.attrs.get("encoding-type") == "anndata":
            yield Table(path, store)
            return
    yield _of_old(path)


def _of_old(path: Path) -> Table:
    """A file of anndata before 0.8, brought into today's form in memory."""
    import anndata

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table = anndata.read_h5ad(path)
            file = h5py.File(path.name, "w", driver="core", backing_store=False)
            anndata.io.write_elem(file, "/", table)
    except Exception as error:  # of another time: it may raise anything
        raise InputError(
            f"{path}: is of an old anndata, and this one cannot read it ({type(error).__name__}: {first_line(error)}); "
            "open it with the anndata that wrote it, and write it with a newer one"
        ) from error
    return Table(path, file, on_disk=False)


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
    """

    coords: np.ndarray
    rows: np.ndarray | None
    origin: Origin
    notes: tuple[str, ...] = ()


def placed_by_obsm(table: Table, options: ReadOptions, format: str) -> Placed:
    """As ``obsm[spatial_key]`` says.

    Raises:
        InputError: there is no such key, or no section of the name that is asked for.
    """
    origin = Origin(table.path, format, scalefactors=_scalefactors(table, options.section))
    return Placed(_coords(table, options), rows_of_section(table, options), origin)


def slide_of(table: Table, options: ReadOptions, name: str, placed: Placed) -> Slide:
    """The slide, or the section of it, of a table that is open."""
    barcodes = table.names("obs")
    obs, unread = table.frame("obs")
    features = _features(table, options, len(barcodes))
    counts, genes, var, notes = None, (), None, ()
    if options.expression:
        counts, genes, var, notes = read_counts(table, options)
    elif options.gene_names and any(table.part(key) is not None for key in (*COUNT_KEYS, "raw/X")):
        genes = _gene_names(table, "var", options)
    if unread:
        notes = (*notes, f"columns of obs that cannot be read are left out: {', '.join(unread)}")
    library_key, library = _library(obs, options.library_key) if options.section is None else ("", None)
    slide = {
        "features": features,
        "coords": placed.coords,
        "barcodes": barcodes,
        "counts": counts,
        "obs": obs if len(obs.columns) else None,
        "library_id": library,
    }
    return Slide(
        id=name if options.section is None else section_id(name, options.section),
        gene_names=genes,
        micron_per_pixel=_pixel_size(table),
        notes=(*placed.notes, *notes),
        var=var,
        origin=dataclasses.replace(placed.origin, library_key=library_key),
        **(slide if placed.rows is None else _chosen(slide, placed.rows)),
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


def _chosen(parts: dict[str, Any], rows: np.ndarray) -> dict[str, Any]:
    """Those rows of every part of a slide."""
    chosen = {}
    for name, value in parts.items():
        if value is None:
            chosen[name] = None
        elif isinstance(value, StoredRows):
            chosen[name] = rows_of(value, rows)
        else:
            chosen[name] = value.iloc[rows] if hasattr(value, "iloc") else value[rows]
    return chosen


def _library(obs: pd.DataFrame, library_key: str | None) -> tuple[str, np.ndarray | None]:
    """The column that names several sections, and the section of each spot [N]; nothing where there is none."""
    columns = SECTION_COLUMNS if library_key is None else (library_key,)
    for name in columns:
        if name in obs and 1 < obs[name].nunique() < len(obs) and not obs[name].isna().any():
            return name, obs[name].astype(str).to_numpy(dtype=str)
    return "", None


def _features(table: Table, options: ReadOptions, n: int) -> np.ndarray | StoredRows | None:
    asked = options.features_key or FEATURES_KEY
    key = "X" if asked == "X" else f"obsm/{asked}"
    part = table.part(key)
    if part is None:
        if options.require_features:
            raise InputError(
                f"{table.path}: has no {_said(asked)} with patch embeddings; obsm has "
                f"{_keys(table, 'obsm')} (--features-key KEY, or X)"
            )
        return None
    if is_array(part) and len(part.shape) > 1 and table.on_disk and np.dtype(part.dtype).kind in "biuf":
        return stored_rows(table.path, f"{table.key}/{key}".lstrip("/"), part)
    return _dense(table, key, _said(asked), np.float32)


def _said(features_key: str) -> str:
    return "X" if features_key == "X" else f"obsm['{features_key}']"


def _keys(table: Table, key: str) -> str:
    part = table.part(key)
    return "nothing" if part is None else names_in(part)


def _coords(table: Table, options: ReadOptions) -> np.ndarray:
    key = options.spatial_key
    if table.part(f"obsm/{key}") is None:
        raise InputError(
            f"{table.path}: has no obsm['{key}'] (spot centres x, y in pixels); it has {_keys(table, 'obsm')} "
            "(--spatial-key KEY)"
        )
    coords = _dense(table, f"obsm/{key}", f"obsm['{key}']", np.float64)
    if coords.ndim != 2 or coords.shape[1] < 2:
        raise InputError(f"{table.path}: obsm['{key}'] must have shape [N, 2], not {list(coords.shape)}")
    return coords


def _dense(table: Table, key: str, said: str, dtype: type) -> np.ndarray:
    """An element as a contiguous array, from an array, a sparse matrix or a data frame."""
    values = table.element(key)
    try:
        return np.ascontiguousarray(values.toarray() if scipy.sparse.issparse(values) else values, dtype=dtype)
    except (ValueError, TypeError) as error:
        raise InputError(f"{table.path}: {said} is not a table of numbers ({first_line(error)})") from error


COUNT_KEYS = ("layers/counts", "X")
"""Where counts are, the first before the second."""

Counts = tuple[scipy.sparse.csr_matrix | None, tuple[str, ...], "pd.DataFrame | None", tuple[str, ...]]


def read_counts(table: Table, options: ReadOptions) -> Counts:
    """Raw counts [N, G] float32, names of their genes, what else is said of the genes, and notes.

    Of ``layers["counts"]`` where there is one, else X; of ``raw`` where X is not in whole numbers and that is.
    """
    used_for_features = options.features_key == "X"
    key = next((key for key in COUNT_KEYS if table.part(key) is not None), None)
    counts = None if key is None or (key == "X" and used_for_features) else _matrix(table, key)
    axis, notes = "var", ()
    if (counts is None or not _whole(counts)) and table.part("raw/X") is not None:
        raw = _matrix(table, "raw/X")
        if raw is not None and _whole(raw):
            reason = "there are no others" if counts is None else f"{key} is not in whole numbers"
            counts, axis, notes = raw, "raw/var", (f"counts are those of raw: {reason}",)
    if counts is None:
        return None, (), None, ()
    if not _whole(counts):
        notes = ("expression is not in whole numbers: are these raw counts? They are taken for raw counts",)
    var, _ = table.frame(axis, text_only=True)
    return counts, _gene_names(table, axis, options), var if len(var.columns) else None, notes


def _gene_names(table: Table, axis: str, options: ReadOptions) -> tuple[str, ...]:
    names = table.names(axis) if options.gene_key is None else table.column(axis, options.gene_key)
    return tuple(names.tolist())


def _matrix(table: Table, key: str) -> scipy.sparse.csr_matrix | None:
    matrix = table.element(key)
    if matrix is None or matrix.shape[1] == 0:
        return None
    try:
        return scipy.sparse.csr_matrix(matrix, dtype=np.float32)
    except (ValueError, TypeError) as error:
        raise InputError(f"{table.path}: {key} is not a table of numbers; give raw counts") from error


def _whole(counts: scipy.sparse.csr_matrix) -> bool:
    return bool((counts.data == np.rint(counts.data)).all())


def _pixel_size(table: Table) -> float | None:
    """Micrometres per level-0 pixel, None where unknown."""
    return next((size for key in PIXEL_SIZE_KEYS if (size := _scalar(table, f"uns/{key}")) and size > 0), None)


def _scalar(table: Table, key: str) -> float | None:
    """A number, None where there is none."""
    part = table.part(key)
    if part is None or not is_array(part) or part.shape not in ((), (1,)) or np.dtype(part.dtype).kind not in "iuf":
        return None
    value = float(np.asarray(part[()]).reshape(-1)[0])
    return value if np.isfinite(value) else None


def _scalefactors(table: Table, section: str | None) -> dict[str, float]:
    """Numbers of ``uns["spatial"][library]["scalefactors"]``, of the section's library or the only one."""
    libraries = table.part("uns/spatial")
    if libraries is None or is_array(libraries):
        return {}
    names: Sequence[str] = sorted(libraries.keys())
    library = section if section in names else (names[0] if len(names) == 1 else None)
    factors = None if library is None else table.part(f"uns/spatial/{library}/scalefactors")
    if factors is None or is_array(factors):
        return {}
    values = {name: _scalar(table, f"uns/spatial/{library}/scalefactors/{name}") for name in factors.keys()}  # noqa: SIM118
    return {name: value for name, value in values.items() if value is not None}
