"""Opening HDF5 files and zarr folders: one way, and one line for each that cannot be opened."""

from __future__ import annotations

import contextlib
import errno
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..errors import InputError, first_line, with_path

ZARR_MARKS = ("zarr.json", ".zgroup")
"""What a zarr folder of format 3, or of format 2, has at its root."""

HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"


def is_zarr(path: Path) -> bool:
    return any((path / mark).is_file() for mark in ZARR_MARKS)


def magic(path: Path, n: int = 8) -> bytes:
    """The first bytes of a file.

    Raises:
        InputError: it is missing, empty, or may not be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(n)
    except FileNotFoundError as error:
        raise InputError(f"{path}: does not exist{_link_target(path)}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or first_line(error)})") from error
    if not start:
        raise InputError(f"{path}: is empty (0 bytes); copy or make it again")
    return start


def _link_target(path: Path) -> str:
    return f" (it is a link to {os.readlink(path)})" if path.is_symlink() else ""


def open_store(path: Path) -> Any:
    """An ``h5py.File`` or a ``zarr.Group`` for reading; both have groups, arrays and ``attrs``.

    Raises:
        InputError: it is missing, empty, locked, truncated or neither of the two.
    """
    if path.is_dir():
        return _open_zarr(path)
    start = magic(path)
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise InputError(f"{path}: {_why_not(error, start)}") from error


def _why_not(error: OSError, start: bytes) -> str:
    if error.errno in (errno.EAGAIN, errno.EACCES) and "lock" in str(error).lower():
        return (
            "is locked: another program is writing it; wait until it has ended "
            "(or set HDF5_USE_FILE_LOCKING=FALSE where the file system has no locks)"
        )
    if start.startswith(HDF5_MAGIC):
        return f"is not readable HDF5, or is truncated ({first_line(error)})"
    return f"is not readable HDF5: it does not begin as such a file does ({first_line(error)})"


def _open_zarr(path: Path) -> Any:
    import zarr  # anndata brings it; files that are no folders need none of it

    if not is_zarr(path):
        raise InputError(f"{path}: is a folder without {' or '.join(ZARR_MARKS)}, so it is no zarr store; give a file")
    try:
        return zarr.open_group(str(path), mode="r")
    except Exception as error:  # zarr's own classes differ from version to version
        raise InputError(f"{path}: is not a readable zarr store ({first_line(error)})") from error


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """:func:`open_store`, closed afterwards. What breaks while it is read is an InputError too, whatever it is."""
    store = open_store(path)
    try:
        yield store
    except InputError:
        raise
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise InputError(f"{path}: cannot be read, or is truncated ({_short(error)})") from error
    finally:
        if isinstance(store, h5py.File):
            store.close()


def guarded(path: Path, work: Callable[[], Any]) -> Any:
    """What ``work`` returns. Whatever it raises is one line that names the path, so that the next file has its turn.

    Raises:
        InputError: always of the class that ``work`` raised, where that was one.
    """
    try:
        return work()
    except InputError as error:
        raise type(error)(with_path(path, error)) from error
    except Exception as error:  # of a library below, for a file that nobody here has seen
        raise InputError(f"{path}: cannot be read ({type(error).__name__}: {first_line(error)})") from error


def _short(error: Exception) -> str:
    kind = "" if isinstance(error, (OSError, zipfile.BadZipFile)) else f"{type(error).__name__}: "
    return kind + first_line(error)


READ_AT_ONCE = 8 * 2**20
"""Bytes of a table that are read together."""

CHUNKS_AT_ONCE = 1024
"""Chunks of a table that are read together, at the most. TRIDENT's are of one row, and HDF5 describes each that a call
reads in 4 kB: 2.4 GB for the places of 605,471 patches in one call; in such calls 35 MB, and half the time."""

FEWEST_CHUNKS = 4
"""Chunks that are read together, at the least: one that lies across two reads is read, and unpacked, twice."""


def rows_at_once(row_bytes: int, chunk_rows: int) -> int:
    """Rows of a table that are read together; ``chunk_rows`` is 0 of one that is not in chunks."""
    rows = max(1, READ_AT_ONCE // max(1, row_bytes))
    return max(min(rows, CHUNKS_AT_ONCE * chunk_rows), FEWEST_CHUNKS * chunk_rows) if chunk_rows else rows


def read_all(table: Any) -> np.ndarray:
    """A table [N, ...] in memory, read piece by piece."""
    n = table.shape[0] if table.shape else 0
    chunk_rows = table.chunks[0] if n and getattr(table, "chunks", None) else 0
    size = rows_at_once(np.dtype(table.dtype).itemsize * int(np.prod(table.shape[1:])), chunk_rows)
    if n <= size:
        return table[()]
    return np.concatenate([table[start : start + size] for start in range(0, n, size)])


def is_array(item: Any) -> bool:
    """Whether a part of a store is a table of numbers or names and not a group."""
    return hasattr(item, "shape") and hasattr(item, "dtype")


def check_whole(path: Path, key: str, table: Any) -> None:
    """Raise InputError where chunks of a zarr array are missing: it would be read as zeros there."""
    chunks = getattr(table, "nchunks", None)
    if chunks is None:  # of HDF5, which is truncated then
        return
    there = table.nchunks_initialized
    if there < chunks:
        raise InputError(f"{path}: {chunks - there} of {chunks} chunks of {key} are missing; copy the store again")


def names_in(group: Any) -> str:
    """What a group has, for messages."""
    return ", ".join(sorted(group.keys())) or "nothing"
