"""What became of each slide and what was predicted of it, as tables that any program opens."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..files import atomic_path
from .state import SlideLine

SLIDES_TABLE, GENES_TABLE = "slides.csv", "genes.csv"
SLIDES_HEADER = ("slide", "input", "status", "spots", "genes", "seconds", "reason", "attempts", "file", "notes")
GENES_HEADER = ("slide", "gene", "mean", "std", "zeros")

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""A spreadsheet computes what begins so (the last four are wide forms of the first four)."""


def in_order(lines: Iterable[SlideLine]) -> list[SlideLine]:
    """Failures first, then by id."""
    return sorted(lines, key=lambda line: (line.is_done, line.slide))


def write_tables(folder: Path, lines: Sequence[SlideLine]) -> None:
    """Write ``slides.csv``, a row for each slide, and ``genes.csv``, one for each gene of each slide that has
    statistics (:attr:`SlideLine.statistics`), in UTF-8.

    Text that begins as a formula does (:data:`FORMULA`) gets an apostrophe in front: names come from files, and a
    spreadsheet computes a cell that begins with "=". Numbers stay as they are. What is not known is empty.

    Raises:
        OutputError: a table cannot be written.
    """
    ordered = in_order(lines)
    _write(folder / SLIDES_TABLE, SLIDES_HEADER, map(_slide_row, ordered))
    _write(folder / GENES_TABLE, GENES_HEADER, (row for line in ordered for row in _gene_rows(line)))


def _slide_row(line: SlideLine) -> list[Any]:
    texts = {"slide": line.slide, "input": line.input, "reason": line.reason, "file": line.file or ""}
    texts["notes"] = "; ".join(line.notes)
    return [_safe(texts[name]) if name in texts else getattr(line, name) for name in SLIDES_HEADER]


def _gene_rows(line: SlideLine) -> Iterable[tuple[Any, ...]]:
    numbers = [line.statistics.get(name, ()) for name in GENES_HEADER[2:]]
    slide = _safe(line.slide)
    return ((slide, _safe(gene), *row) for gene, *row in zip(line.statistics.get("genes", ()), *numbers, strict=True))


def _safe(text: str) -> str:
    return f"'{text}" if text.startswith(FORMULA) else text


def _write(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    # A file's name need not be UTF-8: what is not becomes an escape.
    with (
        atomic_path(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
