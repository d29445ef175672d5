"""Features that stay on the disk until their rows are asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, first_line
from .stores import check_table, open_store, rows_at_once


@dataclass(frozen=True)
class StoredRows:
    """A table [N, F] of numbers in an HDF5 file or a zarr store, read by slices of rows.

    ``table[a:b]`` is a float32 array of those rows, and ``table[index]`` of rows by whole numbers or booleans;
    ``numpy.asarray(table)`` reads all. A leading axis of one in the file is passed by. The file is opened with the
    first rows, and closed with the last reference to the table.

    Attributes:
        path: the file or store.
        key: of the table in it.
        start, stop: the rows that are meant.
        columns: F.
        stored: dtype in the file.
        leading: whether the file has an axis of one in front.
        chunk_rows: rows of a chunk of the file; 0 where it has none.

    Raises:
        InputError: on reading, rows that cannot be read.
    """

    path: Path
    key: str
    start: int
    stop: int
    columns: int
    stored: np.dtype
    leading: bool = False
    chunk_rows: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        return self.stop - self.start, self.columns

    @property
    def dtype(self) -> np.dtype:
        """Of what is read."""
        return np.dtype(np.float32)

    def __len__(self) -> int:
        return self.stop - self.start

    @cached_property
    def _table(self) -> Any:
        return open_store(self.path)[self.key]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_table"}  # open files do not travel

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        if not isinstance(rows, slice):
            return self._picked(np.arange(len(self))[rows])
        begin, end, step = rows.indices(len(self))
        if step != 1:
            return self._picked(np.arange(len(self))[rows])
        return self.read_into(np.empty((max(0, end - begin), self.columns), dtype=np.float32), begin)

    def read_into(self, found: np.ndarray, begin: int) -> np.ndarray:
        """The rows from ``begin`` on, as many as ``found`` [n, F] float32 has; it is filled and returned."""
        for first in range(0, len(found), self._at_once):
            piece = found[first : first + self._at_once]
            self._read(piece, self.start + begin + first)
        return found

    def _read(self, piece: np.ndarray, first: int) -> None:
        """Fill ``piece`` [n, F] with rows of the file."""
        rows = slice(first, first + len(piece))
        where = (0, rows) if self.leading else rows
        try:
            if self.stored == piece.dtype and hasattr(self._table, "read_direct"):
                self._table.read_direct(piece, where)  # HDF5 need not make an array of its own
            else:
                with np.errstate(over="ignore"):  # what is too large is infinite, and refused as such
                    piece[:] = self._table[where]
        except InputError:
            raise
        except Exception as error:  # of HDF5, of zarr, or of a codec
            place = f"rows {first} to {first + len(piece)} of {self.key}"
            raise InputError(f"{self.path}: {place} cannot be read ({first_line(error)}); copy it again") from error

    @property
    def _at_once(self) -> int:
        return rows_at_once(self.stored.itemsize * self.columns, self.chunk_rows)

    def _picked(self, chosen: np.ndarray) -> np.ndarray:
        """Rows by number, block by block of the file."""
        picked = np.empty((*chosen.shape, self.columns), dtype=np.float32)
        for rows in self.blocks():
            here = (chosen >= rows.start) & (chosen < rows.stop)
            if here.any():
                picked[here] = self[rows][chosen[here] - rows.start]
        return picked

    def blocks(self, multiple: int = 1) -> Iterator[slice]:
        """Slices of rows to be read together, all but the last of a ``multiple`` of so many."""
        size = -(-self._at_once // multiple) * multiple
        for begin in range(0, len(self), size):
            yield slice(begin, min(begin + size, len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = self[:]
        return whole if dtype is None else whole.astype(dtype, copy=False)

    def between(self, begin: int, end: int) -> StoredRows:
        """The rows ``begin`` to ``end`` of these."""
        return dataclasses.replace(self, start=self.start + begin, stop=self.start + end)


def rows_of(values: Any, index: np.ndarray) -> Any:
    """Rows of any part of a slide by whole numbers or booleans: of an array, a sparse matrix, a data frame, or None.
    What is stored stays so where they follow one another, and is read elsewhere."""
    if values is None:
        return None
    if isinstance(values, StoredRows):
        chosen = np.arange(len(values))[index]
        if len(chosen) and (np.diff(chosen) == 1).all():
            return values.between(int(chosen[0]), int(chosen[-1]) + 1)
    return values.iloc[index] if hasattr(values, "iloc") else values[index]


def stored_rows(path: Path, key: str, table: Any) -> StoredRows:
    """The table [N, F] or [1, N, F] at ``key`` of a store that is open.

    Raises:
        InputError: another shape, no real numbers, or what :func:`.stores.check_table` refuses.
    """
    check_table(path, key, table)
    shape = tuple(table.shape)
    leading = len(shape) == 3 and shape[0] == 1
    if len(shape) - leading != 2:
        mend = "give one slide at a time" if len(shape) == 3 else "write a row for every spot"
        raise InputError(f"{path}: {key} must have shape [N, F], not {list(shape)}; {mend}")
    dtype = np.dtype(table.dtype)
    if dtype.kind not in "fiub":
        raise InputError(f"{path}: {key} is not a table of numbers (its type is {dtype}); make it again")
    n, columns = shape[-2:]
    if columns == 0:
        raise InputError(f"{path}: {key} has no columns (its shape is {list(shape)}); make the features again")
    chunk_rows = table.chunks[-2] if getattr(table, "chunks", None) else 0
    return StoredRows(Path(path), key, 0, n, columns, dtype, leading, chunk_rows)
