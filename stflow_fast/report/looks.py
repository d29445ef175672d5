"""What all pictures have in common: colours, resolution, and how they are written."""

from __future__ import annotations

import os

from matplotlib.figure import Figure

from ..files import atomic_path

DPI = 150
MODEL_COLOR, PLAIN_COLOR, ACCENT_COLOR, SOFT = "#0072b2", "#5f6b6d", "#b87400", "#555555"


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write as PNG.

    Raises:
        InputError: the file cannot be written.
    """
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png")
