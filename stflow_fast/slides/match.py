"""Features of one file for the spots of another, matched by the name of the barcode, and held against their places.

All slides of a kind of array have the same barcodes, so these alone do not tell one slide from another. Places do: the
corners of patches differ from the centres of spots by half a patch, which is the same for all of a slide.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import InputError
from .embeddings import PatchFeatures, open_features
from .options import ReadOptions
from .places import spacing
from .rows import rows_of
from .slide import Slide
from .stores import guarded

OFF = 0.02
"""Of the spacing: so far from where they are expected places may lie, beside what rounding does. Features of the seven
slides of her2st are 0.002 off on their own (0.5 of 273 pixels: rounding), and 0.033 to 0.051 in the median on each of
the six others, with the scale that fits best. Turned by 0.1 degrees a Visium array is 0.06 off at its rim."""

SLIPS = 0.1
"""Of the spots: so many may be off, such as those whose patch was moved into the image. Of her2st 0.59 to 0.85 are for
features of another slide, none for those of their own."""


class _Fit(NamedTuple):
    """How places lie to corners.

    Attributes:
        off: share of the spots that do not lie where the others say.
        scale: of a pixel of the corners, in pixels of the places; 1 where that fits.
        shift: (x, y) from corners to places, in pixels of the corners.
        tolerance: of the shift, in the same pixels.
    """

    off: float
    scale: float
    shift: np.ndarray
    tolerance: float


def with_features(slide: Slide, path: Path) -> Slide:
    """A slide with the features of a file, or of ``{slide id}.h5`` in a folder; one that has features keeps its own.

    The spots stay in their order. A file of another name must have its patches around the spots of the slide.

    Raises:
        InputError: a missing or broken file, or as :func:`match`.
    """
    if slide.features is not None:
        note = f"features of its own are kept; those of {path} are for slides that have none"
        return dataclasses.replace(slide, notes=(*slide.notes, note))
    file = path / f"{slide.id}.h5" if path.is_dir() else path
    found = guarded(file, lambda: open_features(file, ReadOptions()))
    return match(slide, found, keep_order=True, named=file.stem == slide.id)


def match(slide: Slide, found: PatchFeatures, keep_order: bool = False, named: bool = True) -> Slide:
    """The spots that have features too; how many have not is noted.

    Args:
        slide: whose features are not looked at.
        found: features, with barcodes and corners of the patches.
        keep_order: of the slide; else of the features.
        named: whether it is known that they are of this slide; if not, their places have to show it.

    Raises:
        InputError: barcodes that stand twice, or none in common; corners that lie to one another as the spots of
            another slide do. A slide that differs from this one by a shift, and perhaps a scale, cannot be told from
            it, unless the shift is none of a patch around a spot: that is noted, and refused where not ``named``.
    """
    other = str(slide.origin.path or f"slide {slide.id}")
    of_slide, of_features = common(other, slide.barcodes, str(found.path), found.barcodes)
    left_out = _left_out(other, slide.n_spots, found, len(of_features))
    if not keep_order:
        order = np.argsort(of_features)
        of_slide, of_features = of_slide[order], of_features[order]
    places, corners = slide.coords[of_slide], found.corners[of_features]
    fit = _fit(places, corners)
    notes = _check_places(slide, found, fit, corners, named)
    same_pixels = fit is None or fit.scale == 1
    return dataclasses.replace(
        slide.subset(of_slide),
        features=rows_of(found.features, of_features),
        micron_per_pixel=slide.micron_per_pixel or (found.size.micron_per_pixel if same_pixels else None),
        notes=(*left_out, *notes, *slide.notes),
        origin=dataclasses.replace(slide.origin, encoder=found.encoder),
    )


def common(one: str, names: np.ndarray, other: str, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ``names`` [N] of ``one`` file that stand in ``others`` [M] of the ``other`` too, in their order, and
    their rows there.

    Raises:
        InputError: a name that stands twice in a file, or none in common.
    """
    row_of = {name: row for row, name in enumerate(others.tolist())}
    for where, n, unique in ((one, len(names), len(set(names.tolist()))), (other, len(others), len(row_of))):
        if unique < n:
            raise InputError(f"{where}: {n - unique} duplicated barcodes; make them unique")
    there = np.array([row_of.get(name, -1) for name in names.tolist()], dtype=np.intp)
    rows = np.flatnonzero(there >= 0)
    if not len(rows):
        raise InputError(f"{other}: no barcode in common with {one} (they look like {others[0]} and {names[0]})")
    return rows, there[rows]


def _left_out(other: str, n_spots: int, found: PatchFeatures, n_common: int) -> tuple[str, ...]:
    n_rows, notes = len(found.barcodes), []
    if n_common < n_rows:
        notes.append(f"{n_rows - n_common} of {n_rows} rows of features have no spot in {other} and are left out")
    if n_common < n_spots:
        notes.append(f"{n_spots - n_common} of {n_spots} spots have no features in {found.path} and are left out")
    return tuple(notes)


def _fit(places: np.ndarray, corners: np.ndarray) -> _Fit | None:
    """How ``places`` [N, 2] lie to ``corners`` [N, 2], by a shift, else by a shift and a scale (the image may have been
    made smaller); None where the corners are one place, or none."""
    known = np.isfinite(corners).all(axis=1)
    places, corners = places[known], corners[known]
    if not len(corners) or not np.ptp(corners, axis=0).any():
        return None
    allowed = OFF * (spacing(places) or 0.0) + _rounding(places)
    centred = corners - corners.mean(axis=0)
    best = float((centred * places).sum() / (centred**2).sum())
    fits = []
    for scale in (1.0, best) if best > 0 else (1.0,):
        tolerance = allowed / scale + _rounding(corners)
        apart = places / scale - corners
        shift = np.median(apart, axis=0)
        off = (np.abs(apart - shift) > tolerance).any(axis=1).mean()
        fits.append(_Fit(float(off), scale, shift, tolerance))
    return next((fit for fit in fits if fit.off <= SLIPS), min(fits, key=lambda fit: fit.off))


def _rounding(coords: np.ndarray) -> float:
    """A pixel, if all are whole numbers: they are rounded, or cut."""
    return 1.0 if (coords == np.rint(coords)).all() else 0.0


def _check_places(
    slide: Slide, found: PatchFeatures, fit: _Fit | None, corners: np.ndarray, named: bool
) -> tuple[str, ...]:
    """Notes on features whose places do not show that they are of the slide; ``corners`` [N, 2] are of its spots."""
    if fit is None:
        doubt = "corners of patches are all at one place, so nothing shows that features are of this slide"
    elif fit.off > SLIPS:
        raise InputError(
            f"{found.path}: features of another slide than {slide.id}: corners of patches lie otherwise to one another "
            f"than its spots do ({fit.off:.0%} of {len(corners)} are off, by whatever shift and scale); give the "
            "features of this slide"
        )
    elif not _around_spots(fit, corners):
        x, y = fit.shift
        doubt = f"spots lie ({x:.0f}, {y:.0f}) pixels from the corners of their patches, which is half of no patch"
    else:
        return () if named else (f"features are those of {found.path}",)
    if named:
        return (f"{found.path}: {doubt}; see that it is of this slide",)
    raise InputError(f"{found.path}: {doubt}; call it {slide.id}.h5 if it is of slide {slide.id}")


def _around_spots(fit: _Fit, corners: np.ndarray) -> bool:
    """Whether the shift is half of a patch: the same in x and y, not below 0, and less than all spots extend."""
    x, y = fit.shift
    extent = np.nanmax(corners, axis=0) - np.nanmin(corners, axis=0)
    return abs(x - y) <= 2 * fit.tolerance and -fit.tolerance <= min(x, y) and bool(max(x, y) <= extent.max())
