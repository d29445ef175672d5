"""Whose a slide is, and who stands on both sides of a fold."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..slides import HestTask, StImageTask, open_task
from .plan import Plan, Task


def leakage_of(task: Task, plan: Plan, patients: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Patients that stand on both sides of a fold, where it is known whose a slide is.

    Returns:
        ``{"checked": bool, "folds": {number: [patients on both sides]}, "unknown": [slides of nobody]}``.
    """
    known = patients if patients is not None else _patients_beside(Path(task.data))
    if known is None:
        return {"checked": False, "folds": {}, "unknown": []}
    opened: HestTask | StImageTask = open_task(task.data, plan.encoder, plan.embeddings, None, task.organ)
    folds, unknown = {}, set()
    for number in task.folds:
        fold = opened.fold(number)
        sides = [{known[name] for name in side if name in known} for side in ((*fold.train, *fold.val), fold.test)]
        unknown |= {name for name in (*fold.train, *fold.val, *fold.test) if name not in known}
        folds[str(number)] = sorted(sides[0] & sides[1])
    return {"checked": True, "folds": folds, "unknown": sorted(unknown)}


def read_patients(path: str | Path) -> dict[str, str]:
    """Slides and their patients, of a CSV with columns ``sample_id`` (or ``id``, as HEST's own table) and ``patient``.

    Raises:
        InputError: no such table, or without these columns.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), list(reader.fieldnames or ())
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a table ({error})") from error
    name = next((column for column in ("sample_id", "id") if column in columns), None)
    if name is None or "patient" not in columns:
        raise InputError(f"{path}: wants columns sample_id (or id) and patient; it has {', '.join(columns) or 'none'}")
    return {row[name]: row["patient"] for row in rows if row[name] and row["patient"]}


def _patients_beside(folder: Path) -> dict[str, str] | None:
    path = folder / "slides.csv"
    try:
        return read_patients(path) or None
    except InputError:
        return None
