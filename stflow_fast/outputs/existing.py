"""Predictions that are there: what made them, and whether another may take their place."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..slides.stores import opened
from .layout import ABOUT, TABLE

_ABOUT_IN = {".h5ad": f"uns/{ABOUT}", ".zarr": f"tables/{TABLE}/uns/{ABOUT}"}


def read_about(path: Path) -> dict[str, Any] | None:
    """What made the prediction at ``path``; None where there is none, or something else."""
    import anndata

    try:
        with opened(path) as store:
            about = anndata.io.read_elem(store[_ABOUT_IN[path.suffix]])
    except InputError:
        return None
    return about if isinstance(about, dict) else None


def check_replaceable(path: Path) -> None:
    """Make sure that a prediction may be written to ``path``: nothing is there, or an earlier one.

    Raises:
        InputError: something else stands there.
    """
    if path.exists() and read_about(path) is None:
        raise InputError(f"{path}: is no prediction of stflow-fast; move it away, or choose another --out")


def remove_prediction(path: Path) -> None:
    """Take a prediction away."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
