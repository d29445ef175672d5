"""Genes on the tissue: truth beside prediction, the right way up."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from ..errors import InputError
from ..slides.places import spacing
from .looks import SOFT, save

PANEL = (3.9, 5.5)  # inches: width of a map, and its largest height
SCALE_BAR_STRIP = 0.34  # inches


def gene_maps(
    path: str | os.PathLike[str],
    slide_coords: np.ndarray,
    truth: np.ndarray,
    prediction: np.ndarray,
    names: Sequence[str],
    pearsons: Sequence[float | None],
    title: str,
    micron_per_pixel: float | None = None,
    labels: Sequence[str] = ("best", "median", "worst"),
    unit: str = "log1p counts",
) -> None:
    """Draw truth beside prediction on the tissue, one row per gene, as PNG.

    Each panel has its own colour scale, from its 1st to its 99th percentile: a prediction varies less than
    noisy counts do, and on a shared scale its pattern would vanish. The colour bars say how much less.

    Args:
        slide_coords: [N, 2] spot centres (x, y) in pixels; y points down as in an image.
        truth, prediction: [N, G'] expression.
        names, pearsons: the G' genes to draw and their correlations, None where there is none.
        micron_per_pixel: when known, a scale bar is drawn.
        labels: what the first rows are, such as best, median and worst; () for none.
        unit: of truth and prediction.

    Raises:
        InputError: shapes disagree, or the file cannot be written.
    """
    coords, truth, prediction = np.asarray(slide_coords), np.asarray(truth), np.asarray(prediction)
    expected = (len(coords), len(names))
    shapes_agree = truth.shape == prediction.shape == expected and len(pearsons) == len(names)
    if not (shapes_agree and truth.size):
        raise InputError(
            f"gene_maps: {len(coords)} spots and {len(names)} genes need as many correlations, truth and "
            f"prediction of shape {list(expected)}, not {list(truth.shape)} and {list(prediction.shape)}"
        )
    diameter = spot_diameter(coords)
    box = box_of(coords, 0.7 * diameter, with_strip=micron_per_pixel is not None)
    panel_height = float(np.clip(PANEL[0] * (box[3] - box[2]) / (box[1] - box[0]), 1.6, PANEL[1]))
    size = (2 * PANEL[0] + 1.8, len(names) * (panel_height + 0.35) + 0.7)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06))
    figure.suptitle(title, fontsize=13)
    panels = figure.subplots(len(names), 2, squeeze=False)
    for row, (name, pearson) in enumerate(zip(names, pearsons, strict=True)):
        label = f"{labels[row]}: " if row < len(labels) else ""
        correlation = "Pearson undefined" if pearson is None else f"Pearson {pearson:.2f}"
        captions = (f"{label}{name}, measured", f"{name}, predicted: {correlation}")
        for axes, values, caption in zip(panels[row], (truth[:, row], prediction[:, row]), captions, strict=True):
            draw_spots(axes, coords, values, diameter, box, unit)
            axes.set_title(caption, fontsize=11)
    if micron_per_pixel is not None:
        _draw_scale_bar(panels[-1, 0], box, micron_per_pixel)
    note = "Each panel has its own colour scale, from its 1st to its 99th percentile."
    figure.supxlabel(note, fontsize=9, color=SOFT)
    save(figure, path)


def spot_diameter(coords: np.ndarray) -> float:
    """In pixels: neighbours of a hexagonal lattice just overlap, and spots stay visible."""
    extent = float(np.ptp(coords, axis=0).max())
    return max(1.16 * (spacing(coords) or max(extent, 1.0)), extent / 500)


def box_of(coords: np.ndarray, margin: float, with_strip: bool) -> tuple[float, float, float, float]:
    """Left, right, top and bottom of a panel in pixels, with a strip under the tissue for the scale bar."""
    (left, top), (right, bottom) = coords.min(axis=0) - margin, coords.max(axis=0) + margin
    strip = SCALE_BAR_STRIP * max((right - left) / PANEL[0], (bottom - top) / PANEL[1])
    return left, right, top, bottom + strip * with_strip


def draw_spots(
    axes: Axes, coords: np.ndarray, values: np.ndarray, diameter: float, box: tuple[float, ...], unit: str
) -> None:
    low, high = np.percentile(values, (1, 99))
    if high <= low:
        low, high = float(values.min()), float(values.max())
    look: dict[str, Any] = {"array": values, "cmap": "magma", "linewidths": 0}
    spots = EllipseCollection(
        [diameter], [diameter], [0.0], units="xy", offsets=coords, offset_transform=axes.transData, **look
    )
    spots.set_clim(*((low, high) if high > low else (low - 0.5, low + 0.5)))
    axes.add_collection(spots)
    axes.set(xlim=box[:2], ylim=(box[3], box[2]), xticks=[], yticks=[], aspect="equal")
    axes.spines[:].set_visible(False)
    axes.set_facecolor("#eef0f2")
    bar = axes.figure.colorbar(spots, ax=axes, shrink=0.8, aspect=22, pad=0.02)
    bar.set_label(unit, fontsize=10)
    bar.locator = MaxNLocator(5)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=9)


def _draw_scale_bar(axes: Axes, box: tuple[float, ...], micron_per_pixel: float) -> None:
    width = (box[1] - box[0]) * micron_per_pixel / 1000  # of the panel, in mm
    length = _round_length(width / 4)
    pixels = length * 1000 / micron_per_pixel
    gap = 0.03 * (box[1] - box[0])
    y = box[3] - gap
    axes.plot([box[0] + gap, box[0] + gap + pixels], [y, y], color="black", linewidth=3, solid_capstyle="butt")
    axes.text(box[0] + 2 * gap + pixels, y, f"{length:g} mm", ha="left", va="center_baseline", fontsize=10)


def _round_length(most: float) -> float:
    """The largest of 1, 2, 5, 10, ... (times a power of ten) that is no longer than ``most``."""
    power = 10.0 ** np.floor(np.log10(most))
    return float(f"{max(step for step in (1, 2, 5) if step * power <= most * (1 + 1e-9)) * power:g}")
