"""Small pictures of one gene over a slide, by the thousand: a page shows them beside each slide."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from PIL import Image
from scipy.ndimage import distance_transform_edt

from ..files import atomic_path
from ..slides.places import spacing

COLORS = "viridis"

SIDE = 320
"""Pixels of the picture from the first spot to the last, along the longer side: twice as many as a page shows."""

COVERED = 0.71
"""Radius of a spot, in spacings: it reaches the corners of its own cell of a square lattice, and of a hexagonal one."""

LARGEST = SIDE // 8
"""Radius of a spot at most, where there are few."""


def draw_map(
    path: str | os.PathLike[str], expression: np.ndarray, coords: np.ndarray, micron_per_pixel: float | None
) -> float | None:
    """Draw one gene over a slide as a square PNG with a transparent ground, the tissue in its middle.

    Colours go from the 1st to the 99th percentile. Spots are as large as their spacing; where several fall on one pixel
    it has their mean. The time depends little on how many there are.

    Args:
        path: the picture; its folder is made.
        expression: [N] finite.
        coords: [N, 2] float64 spot centres (x, y) in level-0 pixels; y points down.
        micron_per_pixel: of level 0, None where it is not known.

    Returns:
        The width of the whole picture in micron; None where it is not known, or all spots lie at one place.

    Raises:
        OutputError: the file cannot be written.
    """
    pixels, step = _pixels(coords)
    shades = _shades(pixels, expression)
    with atomic_path(path) as temporary:
        _save(temporary, shades)
    return None if step is None or micron_per_pixel is None else len(shades) * step * micron_per_pixel


def _pixels(coords: np.ndarray) -> tuple[np.ndarray, float | None]:
    """[N, 2] int64 (x, y) within SIDE, and the width of a pixel in the unit of ``coords``."""
    if not len(coords):
        return np.empty((0, 2), np.int64), None
    low, high = coords.min(axis=0), coords.max(axis=0)
    extent = float((high - low).max())
    within = (coords - (low + high) / 2) / (extent or 1.0) + 0.5
    return np.rint(within * (SIDE - 1)).astype(np.int64), extent / (SIDE - 1) or None


def _shades(pixels: np.ndarray, expression: np.ndarray) -> np.ndarray:
    """[H, H] uint8: 0 is the ground, 1 to 255 the colours."""
    index = pixels[:, 1] * SIDE + pixels[:, 0]
    counts = np.bincount(index, minlength=SIDE * SIDE)
    sums = np.bincount(index, weights=expression, minlength=SIDE * SIDE)
    taken = np.flatnonzero(counts)
    if not len(taken):
        return np.zeros((SIDE, SIDE), np.uint8)
    y, x = np.divmod(taken, SIDE)
    # A centre is off by up to half the diagonal of a pixel, and so no hole comes of it.
    apart = spacing(np.stack([x, y], axis=1).astype(np.float64))
    radius = LARGEST if apart is None else min(COVERED * (apart + 1), LARGEST)
    margin = int(np.ceil(radius))
    drawn = np.zeros((SIDE + 2 * margin,) * 2, np.uint8)
    drawn[y + margin, x + margin] = 1 + np.rint(254 * _relative(sums[taken] / counts[taken])).astype(np.uint8)
    distance, nearest = distance_transform_edt(drawn == 0, return_indices=True)
    return np.where(distance <= radius, drawn[tuple(nearest)], 0).astype(np.uint8)


def _relative(values: np.ndarray) -> np.ndarray:
    """From 0 at the 1st percentile to 1 at the 99th; a half where all are the same."""
    low, high = np.percentile(values, (1, 99))
    if high <= low:
        low, high = values.min(), values.max()
    return np.clip((values - low) / (high - low), 0, 1) if high > low else np.full(len(values), 0.5)


def _save(path: Path, shades: np.ndarray) -> None:
    colors = colormaps[COLORS](np.linspace(0, 1, 255), bytes=True)[:, :3]
    picture = Image.fromarray(shades)
    picture.putpalette(bytes(3) + colors.tobytes())
    picture.save(path, format="PNG", transparency=0)
