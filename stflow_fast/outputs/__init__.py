"""Predictions as files: what a table holds, and how it is written so that everybody's tools open it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .existing import check_replaceable, read_about, remove_prediction
from .expression import Expression, as_dtype
from .h5ad import write_h5ad
from .layout import DTYPES, LAYOUT, SUFFIXES
from .settings import OutputConfig
from .spatialdata_store import write_spatialdata
from .table import prediction_table

__all__ = [
    "DTYPES",
    "LAYOUT",
    "SUFFIXES",
    "WRITERS",
    "Expression",
    "OutputConfig",
    "as_dtype",
    "check_replaceable",
    "prediction_table",
    "read_about",
    "remove_prediction",
    "write_h5ad",
    "write_spatialdata",
]

WRITERS: dict[str, Callable[[Path, Any, Expression], None]] = {"h5ad": write_h5ad, "spatialdata": write_spatialdata}
"""By :attr:`OutputConfig.to`."""
