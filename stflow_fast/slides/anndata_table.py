"""The table of an AnnData that is open: its parts, each checked and read when it is asked for."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse

from ..errors import InputError, first_line
from .stores import arrays_in, attribute, check_safe, check_size, check_table, is_array, names_in, opened, part_of

if TYPE_CHECKING:
    import pandas as pd

NO_NUMBERS = "cmMV"
"""Kinds of dtypes that numpy makes real numbers of, and that mean none: complex numbers, times, records."""


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
        rows: int = index.shape[0]
        return rows

    def columns(self, axis: str) -> list[str]:
        """Names of the columns of ``obs`` or ``var``."""
        order = map(str, np.ravel(attribute(self.group[axis], "column-order", [])).tolist())
        return [name for name in order if part_of(self.group[axis], name) is not None]

    def frame(self, axis: str, text_only: bool = False) -> tuple[pd.DataFrame, list[str]]:
        """``obs`` or ``var`` without its index, and the columns that cannot be read."""
        import pandas as pd

        n, found, broken = self.size(axis), {}, []
        for name in self.columns(axis):
            if text_only and is_numbers(self.group[axis][name]):
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
        texts: np.ndarray = values.astype(str).to_numpy(dtype=str)
        return texts

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


def is_numbers(part: Any) -> bool:
    """Whether a part of a store is a table of real numbers."""
    return is_array(part) and np.dtype(part.dtype).kind in "biuf"


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def key_text(key: str) -> str:
    """A key in a table as people write it."""
    group, _, name = key.partition("/")
    return f"{group}[{name!r}]" if name else group


def keys_in(table: Table, key: str) -> str:
    """What a group of a table has, for messages."""
    part = table.part(key)
    return "nothing" if part is None else names_in(part)


def dense(table: Table, key: str, dtype: type) -> np.ndarray:
    """An element as a contiguous array of ``dtype``, from an array, a sparse matrix or a data frame.

    Raises:
        InputError: it cannot be read, or is not of real numbers.
    """
    part = table.part(key)
    if is_array(part):
        check_table(table.path, key, part)
    values = table.element(key)
    if scipy.sparse.issparse(values):
        check_size(table.path, key, part["data"], values.shape)
        values = values.toarray()
    if np.asarray(values).dtype.kind in NO_NUMBERS:
        raise InputError(
            f"{table.path}: {key_text(key)} is not a table of real numbers ({np.asarray(values).dtype}); write it so"
        )
    try:
        return np.ascontiguousarray(values, dtype=dtype)
    except (ValueError, TypeError) as error:
        raise InputError(f"{table.path}: {key_text(key)} is not a table of numbers ({first_line(error)})") from error
