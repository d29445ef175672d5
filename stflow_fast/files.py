"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import InputError


@contextlib.contextmanager
def atomic_path(final: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside ``final``; rename it on success, remove it on failure.

    The temporary name keeps the suffix of ``final`` (some writers choose the format by it).

    Raises:
        InputError: the file cannot be written (no space, no permission); what stood at ``final`` is untouched.
    """
    final = Path(final)
    temporary = final.with_name(f".{final.stem}.{os.getpid()}.part{final.suffix}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, final)
    except OSError as error:
        raise InputError(
            f"{final}: cannot be written ({error.strerror or error}); free space or choose another --out"
        ) from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        elif temporary.is_file():
            temporary.unlink()


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write ``content`` as indented JSON, atomically; NaN is refused because JSON has none."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike) -> Any:
    """Read a JSON file.

    Raises:
        InputError: the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(Path(path).read_text())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise InputError(f"{path}: is not valid JSON ({error})") from error


def claim_output(folder: str | os.PathLike, marker: str, reuse: bool) -> Path:
    """Make sure that results may be written into ``folder``; nothing in it is touched.

    An earlier result is recognised by its file ``marker``, so that --overwrite never spoils somebody's other folder.

    Args:
        folder: absent, empty, or with ``reuse`` an earlier result.
        marker: the file that every such result holds.
        reuse: the caller replaces or continues what is there.

    Raises:
        InputError: the folder is occupied, or cannot be made.
    """
    folder = Path(folder)
    try:
        occupied = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
        if occupied and not reuse:
            raise InputError(f"{folder}: exists already; choose another --out, or pass --overwrite or --resume")
        if occupied and not (folder / marker).exists():
            raise InputError(f"{folder}: holds no {marker}, so it is not an earlier result; choose another --out")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror or error}); choose another --out") from error
    return folder
