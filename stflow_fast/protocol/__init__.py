"""The field's benchmarks by one command: every task, fold, seed and way of choosing the epoch, and one table of all."""

from .leakage import leakage_of, read_patients
from .page import CERTAINTY_HEAD, CERTAINTY_NOTE, cells_of, certainty_cells_of, notes_of
from .plan import Case, Plan, Task, hest_tasks, stimage_tasks
from .results import averages_of, rows_of
from .run import PAGE_FILE, run_protocol

__all__ = [
    "CERTAINTY_HEAD",
    "CERTAINTY_NOTE",
    "PAGE_FILE",
    "Case",
    "Plan",
    "Task",
    "averages_of",
    "cells_of",
    "certainty_cells_of",
    "hest_tasks",
    "leakage_of",
    "notes_of",
    "read_patients",
    "rows_of",
    "run_protocol",
    "stimage_tasks",
]
