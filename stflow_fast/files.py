"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

import h5py

from .errors import InputError, OutputError, first_line

LEFTOVER = ".part"
"""In the name of what a killed process could not remove."""

REMOVALS, BETWEEN_REMOVALS = 50, 0.1
"""Times that it is tried to remove a temporary folder, and seconds between them."""

ABOUT_CHUNKS = 2**20
"""Bytes for what HDF5 notes of the chunks that are added at a time: 80 of each of some hundred."""


@contextlib.contextmanager
def _writing(final: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise OutputError(f"{final}: cannot be written ({reason}); free space or choose another --out") from error


@contextlib.contextmanager
def atomic_path(final: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``final``; rename it on success, remove it on failure.

    The temporary name keeps the suffix of ``final`` (some writers choose the format by it).

    Raises:
        OutputError: the file cannot be written (no space, no permission); what stood at ``final`` is untouched.
    """
    final = Path(final)
    temporary = temporary_of(final)
    with _writing(final):
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, final)
        finally:
            temporary.unlink(missing_ok=True)


def temporary_of(final: Path) -> Path:
    """Where this process keeps half of it."""
    return final.with_name(f".{final.stem}.{os.getpid()}{LEFTOVER}{final.suffix}")


def remove_parts(folder: Path, stems: Container[str]) -> None:
    """Remove what killed processes have left of files with these stems. Nobody may be writing them."""
    if not folder.is_dir():
        return
    for name in os.listdir(folder):
        stem, mark, _ = name.rpartition(LEFTOVER)
        if mark and name.startswith(".") and stem[1:].rpartition(".")[0] in stems:
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_files(folder: str | os.PathLike[str], stem: str = "") -> Iterator[Path]:
    """Yield a temporary folder; when all its files are written, move them into ``folder``, beside what is there.
    ``stem``: by which :func:`remove_parts` finds it.

    Raises:
        OutputError: as :func:`atomic_path`.
    """
    folder = Path(folder)
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{stem}.", suffix=LEFTOVER, dir=folder))
        try:
            yield temporary
            for path in temporary.iterdir():
                os.replace(path, folder / path.name)
        except BaseException:
            _remove_until_gone(temporary)
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _remove_until_gone(folder: Path) -> None:
    """Threads of a library that has failed still write to it, as those of zarr do for a moment."""
    for _ in range(REMOVALS):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(BETWEEN_REMOVALS)
        if not folder.exists():
            break


@contextlib.contextmanager
def atomic_hdf5(final: str | os.PathLike[str]) -> Iterator[h5py.File]:
    """Yield an HDF5 file in memory; write it atomically on success.

    Raises:
        OutputError: as :func:`atomic_path`.
    """
    with atomic_path(final) as temporary, hdf5_in_memory(temporary) as file:
        yield file


@contextlib.contextmanager
def hdf5_in_memory(path: Path) -> Iterator[h5py.File]:
    """Yield an HDF5 file in memory, and write it to ``path`` on success: on a disk that fills up HDF5 does not fail, it
    crashes when the file is closed. An OSError says that it did."""
    with h5py.File(path.name, "w", driver="core", backing_store=False) as file:
        yield file
        file.flush()
        image = file.id.get_file_image()
    path.write_bytes(image)


@contextlib.contextmanager
def growing_hdf5(path: Path) -> Iterator[tuple[h5py.File, Callable[[int], None]]]:
    """Yield the HDF5 file at ``path``, to be added to on the disk, and what is to be called with the bytes that are
    added next: it takes that space of the disk, and so HDF5 finds none full (see :func:`hdf5_in_memory`). Where there
    is too little, it raises an OSError."""
    with path.open("r+b") as disk:
        with h5py.File(path, "r+", locking=False) as file:

            def reserve(n_bytes: int) -> None:
                if hasattr(os, "posix_fallocate"):  # not on macOS
                    os.posix_fallocate(disk.fileno(), file.id.get_filesize(), n_bytes + ABOUT_CHUNKS)

            reserve(0)
            yield file, reserve
            file.flush()
            size = file.id.get_filesize()
        disk.truncate(size)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write ``content`` as indented JSON, atomically; NaN is refused because JSON has none."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        InputError: the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))  # Windows editors leave a mark in front
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise InputError(f"{path}: is not valid JSON ({error})") from error


def is_same_file(one: Path, other: Path) -> bool:
    """Whether both are there and are one file or folder, by whatever path."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def check_output(folder: str | os.PathLike[str], marker: str, reuse: bool) -> Path:
    """Make sure that results may be written into ``folder``; nothing is touched or made.

    An earlier result is recognised by its file ``marker``, so that --overwrite never spoils somebody's other folder.

    Args:
        folder: absent, empty but for the marker, or with ``reuse`` an earlier result.
        marker: the file that every such result holds.
        reuse: the caller replaces or continues what is there.

    Raises:
        InputError: the folder is occupied.
    """
    folder = Path(folder)
    try:
        names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    except OSError as error:
        raise OutputError(
            f"{folder}: is not a folder to write into ({error.strerror}); choose another --out"
        ) from error
    inside = {name for name in names if not (name.startswith(".") and LEFTOVER in name)}
    if inside - {marker} and not reuse:
        raise InputError(
            f"{folder}: exists already; choose another --out, or pass --overwrite (train, predict: --resume)"
        )
    if inside and marker not in inside:
        raise InputError(f"{folder}: holds no {marker}, so it is not an earlier result; choose another --out")
    return folder
