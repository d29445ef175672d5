"""AnnData in HDF5 (.h5ad) or zarr: only the parts that are needed are read.

Files come from many programs and versions. What prediction does not need is not read, so an element that this anndata
does not know, in ``uns`` or beside the features, is in nobody's way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import scipy.sparse

from ..errors import InputError, first_line
from .options import FEATURES_KEY, SPATIAL_KEY, ReadOptions, section_id
from .rows import StoredRows, rows_of, stored_rows
from .slide import Origin, Slide
from .stores import (
    arrays_in,
    attribute,
    check_safe,
    check_size,
    check_table,
    is_array,
    names_in,
    opened,
    part_of,
)

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


@dataclass(frozen=True)
class Table:
    """The parts of an AnnData that is open, each read when it is asked for.

    Attributes:
        path: of the file, for messages.
        group: ``h5py.Group`` or ``zarr.Group`` of the table.
        key: of the group in the file; empty at its root.
    """

    path: Path
    group: Any
    key: str = ""

    def element(self, key: str) -> Any:
        """One element, as anndata reads it.

        Raises:
            InputError: it cannot be read, executes something, or claims more than is there.
        """
        import anndata

        try:
            part = self.group[key]
            self._check(key, part)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of encodings that are read all the same
                values = anndata.io.read_elem(part)
                if "categories" in part.attrs:
                    return self._categorical(values, part)
            if scipy.sparse.issparse(values):  # scipy falls over indices out of range
                if (np.diff(values.indptr.astype(np.int64)) < 0).any():  # which it does not see in int8, or without nnz
                    raise ValueError("its indptr decreases")
                values.check_format(full_check=True)
            return values
        except InputError:
            raise
        except Exception as error:  # whatever anndata raises for what it does not know
            raise InputError(f"{self.path}: {key} cannot be read ({first_line(error)}); write it again") from error

    def _check(self, key: str, part: Any) -> None:
        """Raise InputError for what is not to be read, or claims more than is there."""
        for name, array in arrays_in(key, part):
            check_safe(self.path, name, array)
            check_size(self.path, name, array)

    def _categorical(self, codes: np.ndarray, part: Any) -> Any:
        """A column as anndata before 0.8 wrote it: codes, and a reference to their categories."""
        import anndata
        import pandas as pd

        categories = self.group.file[part.attrs["categories"]]
        self._check("categories", categories)
        names = anndata.io.read_elem(categories)
        return pd.Categorical.from_codes(codes, list(map(_text, names)))

    def names(self, axis: str) -> np.ndarray:
        """The index of ``obs``, ``var`` or ``raw/var`` as text.

        Raises:
            InputError: it cannot be read.
        """
        self.size(axis)
        return np.array(list(map(_text, self.element(self._index(axis)))), dtype=np.str_)

    def _index(self, axis: str) -> str:
        """The key of the index of ``obs``, ``var`` or ``raw/var``."""
        if part_of(self.group, axis) is None:
            raise InputError(f"{self.path}: has no {axis}, so it is not AnnData; it has {names_in(self.group)}")
        return f"{axis}/{attribute(self.group[axis], '_index', '_index')}"

    def size(self, axis: str) -> int:
        """The number of rows of ``obs``, ``var`` or ``raw/var``.

        Raises:
            InputError: its index is not there, or there in part.
        """
        key = self._index(axis)
        index = part_of(self.group, key)
        if index is not None and not is_array(index):
            key, index = f"{key}/values", part_of(index, "values")  # beside which are missing
        if not is_array(index) or index.shape is None or len(index.shape) != 1:
            raise InputError(f"{self.path}: has no {key} with the names of {axis}; write it again with anndata")
        check_table(self.path, key, index)
        return index.shape[0]

    def columns(self, axis: str) -> list[str]:
        """Names of the columns of ``obs`` or ``var``."""
        order = map(str, np.ravel(attribute(self.group[axis], "column-order", [])).tolist())
        return [name for name in order if part_of(self.group[axis], name) is not None]

    def frame(self, axis: str, text_only: bool = False) -> tuple[pd.DataFrame, list[str]]:
        """``obs`` or ``var`` without its index, and the columns that cannot be read."""
        import pandas as pd

        n, found, broken = self.size(axis), {}, []
        for name in self.columns(axis):
            if text_only and _is_numbers(self.group[axis][name]):
                continue
            try:
                found[name] = self._values(axis, name, n)
            except InputError:
                broken.append(name)
        return pd.DataFrame(found), broken

    def _values(self, axis: str, name: str, n: int) -> Any:
        """[N] one column, as anndata reads it."""
        values = self.element(f"{axis}/{name}")
        if np.shape(values) != (n,):
            found = list(np.shape(values))
            raise InputError(f"{self.path}: {axis}[{name!r}] must have shape [{n}], as its index, not {found}")
        return values

    def column(self, axis: str, name: str) -> np.ndarray:
        """[N] one column as text.

        Raises:
            InputError: there is none, it is of another size, or it has missing values.
        """
        import pandas as pd

        if name not in self.columns(axis):
            known = ", ".join(self.columns(axis)) or "none"
            raise InputError(f"{self.path}: {axis} has no column {name!r}; its columns: {known}")
        values = pd.Series(self._values(axis, name, self.size(axis)))
        missing = int(values.isna().sum())
        if missing:
            raise InputError(f"{self.path}: {axis}[{name!r}] is missing in {missing} of {len(values)} rows; fill it")
        return values.astype(str).to_numpy(dtype=str)

    def part(self, key: str) -> Any:
        """A group or array, None where there is none or it is encoded as nothing."""
        found = part_of(self.group, key)
        return None if found is None or attribute(found, "encoding-type") == "null" else found


@contextlib.contextmanager
def open_table(path: Path) -> Iterator[Table]:
    """An .h5ad file, or the folder of an AnnData zarr.

    Raises:
        InputError: it is missing, empty, locked, truncated, or not AnnData.
    """
    with opened(path) as store:
        if "obs" not in store:
            raise InputError(f"{path}: has no obs, so it is not AnnData; it has {names_in(store)}")
        if is_array(store["obs"]):
            raise InputError(
                f"{path}: is of an old anndata (before 0.7: its obs is one table of records); open it with the anndata "
                "that wrote it, and write it with a newer one"
            )
        yield Table(path, store)


def _is_numbers(part: Any) -> bool:
    """Whether a part of a store is a table of real numbers."""
    return is_array(part) and np.dtype(part.dtype).kind in "biuf"


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


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
    counts, genes, var, notes = None, (), None, ()
    if options.expression:
        counts, genes, var, notes = read_counts(table, options)
    elif options.gene_names:
        source = _count_source(table, options, lambda key: _looks_whole(table, key))
        genes, var = ((), None) if source is None else _genes(table, _axis_of(source), options)
    if unread:
        notes = (*notes, f"columns of obs that cannot be read are left out: {', '.join(unread)}")
    library_key, library = _library(obs, len(barcodes), placed.origin, options)
    slide = {
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
                f"{table.path}: has no {_said(key)} with patch embeddings; obsm has "
                f"{_keys(table, 'obsm')} (--features-key KEY, or X)"
            )
        return None
    if _is_numbers(part) and len(part.shape) > 1:
        return stored_rows(table.path, f"{table.key}/{key}".lstrip("/"), part)
    return _dense(table, key, np.float32)


def _said(key: str) -> str:
    """A key in a table as people write it."""
    group, _, name = key.partition("/")
    return f"{group}[{name!r}]" if name else group


def _keys(table: Table, key: str) -> str:
    part = table.part(key)
    return "nothing" if part is None else names_in(part)


def _coords(table: Table, options: ReadOptions) -> np.ndarray:
    key = f"obsm/{options.spatial_key}"
    if table.part(key) is None:
        raise InputError(
            f"{table.path}: has no {_said(key)} (spot centres x, y in pixels); it has {_keys(table, 'obsm')} "
            "(--spatial-key KEY)"
        )
    coords = _dense(table, key, np.float64)
    if coords.ndim != 2 or coords.shape[1] < 2:
        raise InputError(f"{table.path}: {_said(key)} must have shape [N, 2], not {list(coords.shape)}")
    return coords


def _dense(table: Table, key: str, dtype: type) -> np.ndarray:
    """An element as a contiguous array, from an array, a sparse matrix or a data frame."""
    part = table.part(key)
    if is_array(part):
        check_table(table.path, key, part)
    values = table.element(key)
    if scipy.sparse.issparse(values):
        check_size(table.path, key, part["data"], values.shape)
        values = values.toarray()
    if np.asarray(values).dtype.kind in NO_NUMBERS:
        raise InputError(
            f"{table.path}: {_said(key)} is not a table of real numbers ({np.asarray(values).dtype}); write it so"
        )
    try:
        return np.ascontiguousarray(values, dtype=dtype)
    except (ValueError, TypeError) as error:
        raise InputError(f"{table.path}: {_said(key)} is not a table of numbers ({first_line(error)})") from error


NO_NUMBERS = "cmMV"
"""Kinds of dtypes that numpy makes real numbers of, and that mean none: complex numbers, times, records."""


COUNT_KEYS = ("layers/counts", "X", "raw/X")
"""Where counts may be, the first before the others."""

LOOKED_AT = 100_000
"""Numbers of a matrix that tell whether it is one of counts, where only names of genes are asked for."""

Counts = tuple[scipy.sparse.csr_matrix | None, tuple[str, ...], "pd.DataFrame | None", tuple[str, ...]]


def read_counts(table: Table, options: ReadOptions) -> Counts:
    """Raw counts [N, G] float32, names of their genes, what else is said of the genes, and notes.

    Of the first of ``layers["counts"]``, X and ``raw`` that is in whole numbers; where none is, of the first.
    """
    read: dict[str, scipy.sparse.csr_matrix | None] = {}

    def is_whole(key: str) -> bool:
        read[key] = _matrix(table, key)
        return read[key] is not None and _whole(read[key].data)

    source = _count_source(table, options, is_whole)
    counts = None if source is None else read[source]
    if counts is None:
        return None, (), None, ()
    axis, notes = _axis_of(source), ()
    if not _whole(counts.data):
        notes = (f"{_said(source)} is not in whole numbers: are these raw counts? They are taken for raw counts",)
    elif others := [_said(key) for key in read if key != source]:
        notes = (f"counts are those of {_said(source)}: {' and '.join(others)} is not in whole numbers",)
    elif source == "raw/X":
        notes = (f"counts are those of {_said(source)}: there are no others",)
    return counts, *_genes(table, axis, options), notes


def _count_source(table: Table, options: ReadOptions, is_whole: Callable[[str], bool]) -> str | None:
    """The key of :data:`COUNT_KEYS` that counts are read from."""
    keys = [key for key in COUNT_KEYS if table.part(key) is not None and not (key == options.features_key == "X")]
    return next((key for key in keys if is_whole(key)), keys[0] if keys else None)


def _axis_of(source: str) -> str:
    return "raw/var" if source == "raw/X" else "var"


def _genes(table: Table, axis: str, options: ReadOptions) -> tuple[tuple[str, ...], pd.DataFrame | None]:
    """Names of the genes, and what else is said of them; None where nothing is."""
    names = table.names(axis) if options.gene_key is None else table.column(axis, options.gene_key)
    var, _ = table.frame(axis, text_only=True)
    return tuple(names.tolist()), var if len(var.columns) else None


def _matrix(table: Table, key: str) -> scipy.sparse.csr_matrix | None:
    matrix = table.element(key)
    if matrix is None or matrix.shape[1:] == (0,):
        return None
    if len(matrix.shape) != 2 or getattr(matrix, "dtype", np.dtype("f4")).kind in NO_NUMBERS:
        found = f"{getattr(matrix, 'dtype', 'a frame')} of shape {list(matrix.shape)}"
        raise InputError(f"{table.path}: {_said(key)} must be counts [N, G], not {found}; write it so")
    try:
        return scipy.sparse.csr_matrix(matrix, dtype=np.float32)
    except (ValueError, TypeError) as error:
        raise InputError(f"{table.path}: {key} is not a table of numbers; give raw counts") from error


def _whole(numbers: np.ndarray) -> bool:
    return bool((numbers == np.rint(numbers)).all())


def _looks_whole(table: Table, key: str) -> bool:
    """Whether the first numbers of a matrix, dense or sparse, are whole."""
    part = table.part(key)
    numbers = part if is_array(part) else part_of(part, "data")
    if numbers is None:
        return False
    check_safe(table.path, key, numbers)
    check_size(table.path, key, numbers)
    return _whole(np.asarray(numbers[: max(1, LOOKED_AT // max(1, math.prod(numbers.shape[1:])))]))


def _pixel_size(table: Table) -> float | None:
    """Micrometres per level-0 pixel, None where unknown."""
    return next((size for key in PIXEL_SIZE_KEYS if (size := _scalar(table, f"uns/{key}")) and size > 0), None)


def _scalar(table: Table, key: str) -> float | None:
    """A number, None where there is none."""
    part = table.part(key)
    if not _is_numbers(part) or part.shape not in ((), (1,)):
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
