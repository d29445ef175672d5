"""Features of one file for the spots of another, matched by the name of the barcode."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from ..errors import InputError
from .embeddings import PatchFeatures, open_features
from .options import ReadOptions
from .rows import rows_of
from .slide import Slide


def with_features(slide: Slide, path: Path) -> Slide:
    """A slide with the features of a file, or of ``{slide id}.h5`` in a folder.

    Raises:
        InputError: a missing or broken file, or no barcode in common.
    """
    return match(slide, open_features(path / f"{slide.id}.h5" if path.is_dir() else path, ReadOptions()))


def match(slide: Slide, found: PatchFeatures) -> Slide:
    """The spots that have features too, in the order of the features; how many have not is noted.

    Raises:
        InputError: barcodes that stand twice, or none in common.
    """
    repeated = len(found.barcodes) - len(np.unique(found.barcodes))
    if repeated:
        raise InputError(f"{found.path}: {repeated} duplicated barcodes; make them unique")
    _, of_features, of_slide = np.intersect1d(found.barcodes, slide.barcodes, return_indices=True)
    if not len(of_features):
        example = f"{found.barcodes[0]} and {slide.barcodes[0]}"
        other = slide.origin.path or f"slide {slide.id}"
        raise InputError(f"{found.path}: no barcode in common with {other} (they look like {example})")
    in_file_order = np.argsort(of_features)
    of_features, of_slide = of_features[in_file_order], of_slide[in_file_order]
    left_out = _left_out(len(found.barcodes), slide.n_spots, len(of_features))
    return dataclasses.replace(
        slide.subset(of_slide),
        features=rows_of(found.features, of_features),
        micron_per_pixel=slide.micron_per_pixel or found.size.micron_per_pixel,
        notes=(*left_out, *slide.notes),
        origin=dataclasses.replace(slide.origin, encoder=found.encoder),
    )


def _left_out(n_embedded: int, n_expressed: int, n_common: int) -> tuple[str, ...]:
    notes = []
    if n_common < n_embedded:
        notes.append(f"{n_embedded - n_common} of {n_embedded} embeddings have no expression and are left out")
    if n_common < n_expressed:
        notes.append(
            f"{n_expressed - n_common} of {n_expressed} spots with expression have no embedding and are left out"
        )
    return tuple(notes)
