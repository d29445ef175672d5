"""What became of each slide: a line each, on the disk before the next one begins. By these lines a run is resumed, and
from them its tables and its page are drawn."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..errors import InputError, OutputError, first_line

STATES = "states"
"""In a folder of predictions: a file of lines for each shard."""

DONE, FAILED = "done", "failed"


@dataclass(frozen=True)
class SlideLine:
    """What became of a slide.

    Attributes:
        slide: its id.
        input: the path that it is from; "" of what was in memory.
        status: "done", or "failed".
        reason: why it failed, one line.
        made: a digest of what decides its prediction; see :func:`.worker.digest`.
        file: its prediction, a name in the folder; None where it failed.
        spots, genes: numbers of its prediction's rows and columns.
        seconds, computing: for reading, computing and writing it; of these for computing.
        attempts: how often it was tried, over all runs.
        notes: what the reader says of it.
        micron_per_pixel: of its coordinates, None where it is not known.
        maps: pictures by gene: "path", relative to the folder, and "micron", the width of the picture or None.
        statistics: of the genes that are written, up to :data:`.worker.MOST_STATISTICS` of them or those with maps:
            lists "genes", "mean", "std" and "zeros" (the share of spots that are exactly zero).
        when: the end, UTC, ISO 8601.
    """

    slide: str
    input: str
    status: str
    reason: str = ""
    made: str = ""
    file: str | None = None
    spots: int | None = None
    genes: int | None = None
    seconds: float | None = None
    computing: float | None = None
    attempts: int = 1
    notes: tuple[str, ...] = ()
    micron_per_pixel: float | None = None
    maps: dict[str, dict[str, Any]] = field(default_factory=dict)
    statistics: dict[str, list[Any]] = field(default_factory=dict)
    when: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="milliseconds"))

    @property
    def is_done(self) -> bool:
        return self.status == DONE

    def path(self, folder: Path) -> Path | None:
        """The prediction, in the folder that the line is of."""
        return None if self.file is None else folder / self.file

    def is_written(self, folder: Path) -> bool:
        """Whether the prediction is there, in the folder that the line is of."""
        path = self.path(folder)
        return path is not None and path.exists()


FIELDS = frozenset(each.name for each in dataclasses.fields(SlideLine))


def read_lines(folder: Path) -> dict[str, SlideLine]:
    """The newest line of each slide, over all shards; a line that a killed process cut off is none.

    Raises:
        InputError: a file of lines that cannot be read.
    """
    found: dict[str, SlideLine] = {}
    for path in sorted((folder / STATES).glob("*.jsonl")):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read ({first_line(error)}); remove it to begin anew") from error
        newest = {line.slide: line for line in filter(None, map(_parsed, text.splitlines()))}
        for name, line in newest.items():
            if name not in found or found[name].when <= line.when:
                found[name] = line
    return found


def _parsed(text: str) -> SlideLine | None:
    try:
        content = json.loads(text)
    except ValueError:
        return None
    if not isinstance(content, dict) or not {"slide", "input", "status"} <= content.keys():
        return None
    known = {name: value for name, value in content.items() if name in FIELDS}
    return SlideLine(**{**known, "notes": tuple(known.get("notes", ()))})


class Journal:
    """Where a run, or a shard of one, writes its lines."""

    def __init__(self, path: Path, file: Any) -> None:
        self._path, self._file = path, file

    def add(self, line: SlideLine) -> None:
        """The line is on the disk when this returns.

        Raises:
            OutputError: it cannot be written.
        """
        text = json.dumps(dataclasses.asdict(line)) + "\n"
        try:
            self._file.write(text)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _not_written(self._path, error) from error


@contextlib.contextmanager
def journal(folder: Path, shard: tuple[int, int]) -> Iterator[Journal]:
    """The file of a shard (which one, of how many), behind what it has.

    Raises:
        OutputError: it cannot be written, or another process is writing it.
    """
    path = folder / STATES / f"{shard[0]}-of-{shard[1]}.jsonl"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise _not_written(path, error) from error
    with contextlib.closing(file):
        _lock(
            file, f"{folder}: another process predicts into it; wait for its end, choose another --out, or --shard I/N"
        )
        _check_other_shards(folder, shard[1])
        _end_last_line(file)
        yield Journal(path, file)


def _check_other_shards(folder: Path, count: int) -> None:
    """Raise OutputError where a run of another number of shards is writing: it would do the same slides."""
    for path in (folder / STATES).glob("*-of-*.jsonl"):
        if path.stem.rpartition("-")[2] == str(count):
            continue
        with contextlib.suppress(OSError), path.open("a") as file:
            _lock(file, f"{folder}: a process predicts shard {path.stem} into it; wait for its end, or choose its N")


def _lock(file: Any, busy: str) -> None:
    """Until it is closed. Raises OutputError, which says ``busy``, where another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputError(busy) from error
    except OSError:
        pass  # a file system without locks


def _end_last_line(file: Any) -> None:
    """A killed process may have left half of one."""
    with open(file.fileno(), "rb", closefd=False) as raw:
        size = raw.seek(0, os.SEEK_END)
        raw.seek(max(0, size - 1))
        torn = size > 0 and raw.read(1) != b"\n"
    if torn:
        file.write("\n")
        file.flush()


def _not_written(path: Path, error: OSError) -> OutputError:
    reason = error.strerror or first_line(error)
    return OutputError(f"{path}: cannot be written ({reason}); free space or choose another --out")
