"""Opening HDF5 files and zarr folders: one way, and one line for each that cannot be opened."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import stat
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np

from ..errors import InputError, first_line, with_path

ZARR_MARKS = ("zarr.json", ".zgroup")
"""What a zarr folder of format 3, or of format 2, has at its root."""

HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"

T = TypeVar("T")


def is_zarr(path: Path) -> bool:
    return any((path / mark).is_file() for mark in ZARR_MARKS)


def magic(path: Path, n: int = 8) -> bytes:
    """The first bytes of a file.

    Raises:
        InputError: it is missing, empty, no regular file, or may not be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe waits for who writes into it
            raise InputError(f"{path}: is a pipe or a device; give a file")
        with path.open("rb") as file:
            start = file.read(n)
    except FileNotFoundError as error:
        raise InputError(f"{path}: does not exist{_link_target(path)}; check its path") from error
    except OSError as error:
        raise InputError(f"{path}: {_unread(error)}") from error
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
        return f"is not readable HDF5, or is truncated ({first_line(error)}); copy it again"
    return f"is not readable HDF5: it does not begin as such a file does ({first_line(error)}); copy it again"


def _open_zarr(path: Path) -> Any:
    import zarr  # anndata brings it; files that are no folders need none of it

    if not is_zarr(path):
        raise InputError(f"{path}: is a folder without {' or '.join(ZARR_MARKS)}, so it is no zarr store; give a file")
    try:
        return zarr.open_group(str(path), mode="r")
    except Exception as error:  # zarr's own classes differ from version to version
        raise InputError(f"{path}: is not a readable zarr store ({first_line(error)}); copy it again") from error


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
        raise InputError(f"{path}: cannot be read, or is truncated ({_short(error)}); copy it again") from error
    finally:
        if isinstance(store, h5py.File):
            store.close()


def guarded(path: Path, work: Callable[[], T]) -> T:
    """What ``work`` returns. Whatever it raises is one line that names the path, so that the next file has its turn.

    Raises:
        InputError: always of the class that ``work`` raised, where that was one.
    """
    try:
        return work()
    except InputError as error:
        raise type(error)(_one_line(with_path(path, error))) from error
    except Exception as error:  # of a library below, for a file that nobody here has seen
        raise InputError(_one_line(f"{path}: {_unread(error)}")) from error


def _unread(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror}); check its path, and your right to read it"
    return f"cannot be read ({_short(error)}); copy or make it again"


def _short(error: Exception) -> str:
    kind = "" if isinstance(error, (OSError, zipfile.BadZipFile)) else f"{type(error).__name__}: "
    return kind + first_line(error)


def _one_line(said: str) -> str:
    """With what moves a terminal's cursor, in names that files have or tell, as Python writes it."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: repr(found[0])[1:-1], said)


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


def read_all(path: Path, key: str, table: Any) -> np.ndarray:
    """A table [N, ...] of a store in memory, read piece by piece.

    Raises:
        InputError: it is not to be read, claims more than is there, or is there in part.
    """
    check_table(path, key, table)
    n = table.shape[0] if table.shape else 0
    chunk_rows = table.chunks[0] if n and getattr(table, "chunks", None) else 0
    size = rows_at_once(np.dtype(table.dtype).itemsize * int(np.prod(table.shape[1:])), chunk_rows)
    if n <= size:
        whole: np.ndarray = table[()]
        return whole
    return np.concatenate([table[start : start + size] for start in range(0, n, size)])


def is_array(item: Any) -> bool:
    """Whether a part of a store is a table of numbers or names and not a group."""
    return hasattr(item, "shape") and hasattr(item, "dtype")


def part_of(group: Any, name: str) -> Any:
    """A group or a table in a group, None where there is none: a link may lead nowhere, or round in circles."""
    try:
        return group.get(name, None)
    except Exception:  # of HDF5 or of zarr
        return None


def attribute(item: Any, name: str, default: Any = None) -> Any:
    """One of them, the default where it is not there or cannot be read."""
    try:
        return item.attrs.get(name, default)
    except Exception:  # see attributes_of
        return default


def attributes_of(item: Any) -> dict[str, Any]:
    """Those that can be read. People hang anything there, also what h5py has no word for."""
    found = {}
    for name in item.attrs:
        with contextlib.suppress(Exception):
            found[name] = item.attrs[name]
    return found


def arrays_in(key: str, part: Any) -> Iterator[tuple[str, Any]]:
    """The tables in a part of a store, with their keys: the part itself, or those of a group and of its groups."""
    if is_array(part):
        yield key, part
        return
    for name in part.keys():  # noqa: SIM118
        yield from arrays_in(f"{key}/{name}", part[name])


UNSUSPICIOUS = 2**28
"""Bytes up to which a table may take whatever its file has."""

MOST_PACKED = 1000
"""Bytes of a table to one of its file, at the most: so far gzip packs zeros, and no features, places or names."""


CHUNK_BYTES = 4096
"""In which a chunk is described while it is read, by HDF5; zarr takes the time of so many."""


def check_table(path: Path, key: str, table: Any) -> None:
    """Raise InputError for a table of which any value cannot be read as it is meant."""
    check_safe(path, key, table)
    check_size(path, key, table)
    check_whole(path, key, table)


def check_safe(path: Path, key: str, table: Any) -> None:
    """Raise InputError for a table that is not to be read, whatever is in it: one that holds nothing or is in another
    file than it seems (HDF5 fills with zeros what is not there, and falls over a table that is made of itself), or one
    that executes what is in it."""
    if isinstance(table, h5py.Dataset):
        if table.shape is None:
            raise InputError(f"{path}: {key} holds nothing (its shape is null); write it again")
        if table.is_virtual or table.external:
            raise InputError(f"{path}: {key} has its numbers in other files; write them into one: file[key] = table[:]")
    elif "pickle" in _codecs(table):
        raise InputError(f"{path}: {key} is packed by pickle, which can execute anything; write it without")


def _codecs(table: Any) -> list[str]:
    """Names of what a zarr array of format 2 is packed by; format 3 has none that executes."""
    compressors = table.compressors if hasattr(table, "compressors") else (table.compressor,)  # zarr 3, and before
    return [getattr(codec, "codec_id", "") for codec in (*(table.filters or ()), *compressors)]


def check_size(path: Path, key: str, table: Any, shape: tuple[int, ...] | None = None) -> None:
    """Raise InputError for a table that claims far more memory than what is stored of it can fill.

    Args:
        path: of the store.
        key: of the table, for messages.
        table: HDF5 or zarr.
        shape: that it takes in memory, where that is another one.
    """
    sizes = math.prod(table.shape if shape is None else shape), math.prod(table.chunks or ())
    claimed = max(max(sizes) * np.dtype(table.dtype).itemsize, CHUNK_BYTES * _n_chunks(table))
    if claimed > UNSUSPICIOUS and claimed > MOST_PACKED * stored_bytes(path, table):
        told = f"claims {claimed / 2**30:.1f} GiB (shape {list(shape or table.shape)})"
        raise InputError(f"{path}: {key} {told}, and next to none of it is stored; copy it again")


def stored_bytes(path: Path, table: Any) -> int:
    """Of the HDF5 file that a table is in, or of the folder of a zarr array."""
    if isinstance(table, h5py.Dataset):
        return os.stat(table.file.filename).st_size
    return sum(os.stat(file).st_size for file in _files(path, table))


def check_whole(path: Path, key: str, table: Any) -> None:
    """Raise InputError where chunks of a table are missing: it would be read as zeros there."""
    chunks, there = _n_chunks(table), _chunks_there(path, table)
    if there < chunks:
        mend = "make it again" if isinstance(table, h5py.Dataset) else "copy the store again"
        raise InputError(f"{path}: {chunks - there} of {chunks} chunks of {key} are missing; {mend}")


def _n_chunks(table: Any) -> int:
    """How many chunks, or shards of them, a table has; in HDF5 it may be in one piece."""
    size = getattr(table, "shards", None) or table.chunks or table.shape
    return math.prod(-(-whole // max(1, part)) for whole, part in zip(table.shape, size, strict=True))


def _chunks_there(path: Path, table: Any) -> int:
    """How many chunks, or shards of them, have been written."""
    if not isinstance(table, h5py.Dataset):
        return sum(not file.name.startswith(".") and file.name not in ZARR_MARKS for file in _files(path, table))
    return table.id.get_num_chunks() if table.chunks else int(table.id.get_storage_size() > 0)


def _files(path: Path, table: Any) -> Iterator[Path]:
    """Those of a zarr array."""
    return (Path(folder) / name for folder, _, names in os.walk(path / table.path) for name in names)


def names_in(group: Any) -> str:
    """What a group has, for messages."""
    return ", ".join(sorted(group.keys())) or "nothing"
