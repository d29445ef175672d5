"""The mean expression that the image of a spot predicts: a ridge, small and closed in form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..arrays import as_array
from ..errors import InputError
from ..slides import Slide
from ..threads import blocks_of

N_COMPONENTS = 64
"""Principal components of the features, at the most."""

ALPHAS = tuple(10.0**power for power in range(-1, 6))
"""Ridge penalties, per unit of a component's variance, that the left-out slides choose among."""

CONSTANT = 1e-6
"""A feature or a component that varies less, beside the others, is none."""

ROWS = 512
"""Spots whose features are multiplied together."""


class ImageMean(NamedTuple):
    """From the features of a spot to its log1p counts: ``[1, (features - center) @ projection] @ weights``, within the
    range that training spots had. float32."""

    center: np.ndarray  # [F]
    projection: np.ndarray  # [F, components] to components of variance one
    weights: np.ndarray  # [1 + components, G]
    ceiling: np.ndarray  # [G] the largest log1p count in training

    def design(self, features: np.ndarray) -> np.ndarray:
        """[n, 1 + components] of features [n, F]."""
        return np.column_stack([np.ones(len(features), np.float32), (features - self.center) @ self.projection])

    def log1p_counts(self, design: np.ndarray, genes: slice = slice(None)) -> np.ndarray:
        """[n, G] of those genes."""
        clipped: np.ndarray = np.clip(design @ self.weights[:, genes], 0.0, self.ceiling[genes])
        return clipped


def rows_of_features(features: Any, rows: slice, columns: int | str = "F") -> np.ndarray:
    """Those rows of an array, a tensor on any device, or :class:`.slides.StoredRows`, float32 [n, F].

    Raises:
        InputError: another shape.
    """
    return as_array("features", features[rows], (rows.stop - rows.start, columns), np.float32)


def fit_image_mean(slides: Sequence[Slide], genes: tuple[str, ...]) -> tuple[ImageMean, float]:
    """Standardised features, their principal components, and a ridge whose penalty has the smallest squared error on
    slides that are left out in turn (quarters of a slide's spots, where there is only one).

    Returns:
        The mean, and the penalty.

    Raises:
        InputError: features that are missing, of several sizes, NaN or infinite, or of one spot alone.
    """
    center, projection = _components(slides)
    unfitted = ImageMean(center, projection, np.empty((0, 0)), np.empty(0))
    parts = _parts(slides)
    ceiling = np.zeros(len(genes), np.float32)
    total = _Products.none(1 + projection.shape[1], len(genes))
    for part in parts:
        products, largest = _products(unfitted, part, genes)
        total, ceiling = total + products, np.maximum(ceiling, largest)
    errors = np.zeros(len(ALPHAS))
    for part in parts:
        left_out, _ = _products(unfitted, part, genes)
        rest = total - left_out
        errors += [left_out.error(rest.ridge(alpha)) for alpha in ALPHAS]
    alpha = ALPHAS[int(errors.argmin())]
    return ImageMean(center, projection, total.ridge(alpha).astype(np.float32), ceiling), alpha


@dataclass(frozen=True)
class _Products:
    """All that a ridge knows of some spots, float64; x is their design, y their log1p counts."""

    xx: np.ndarray  # [D, D]
    xy: np.ndarray  # [D, G]
    yy: float

    @classmethod
    def none(cls, n_columns: int, n_genes: int) -> _Products:
        return cls(np.zeros((n_columns, n_columns)), np.zeros((n_columns, n_genes)), 0.0)

    def __add__(self, other: _Products) -> _Products:
        return _Products(self.xx + other.xx, self.xy + other.xy, self.yy + other.yy)

    def __sub__(self, other: _Products) -> _Products:
        return _Products(self.xx - other.xx, self.xy - other.xy, self.yy - other.yy)

    def ridge(self, alpha: float) -> np.ndarray:
        """Weights [D, G]; the first column of the design, the intercept, has no penalty."""
        penalty = np.diag([0.0, *[alpha] * (len(self.xx) - 1)])
        return np.linalg.solve(self.xx + penalty, self.xy)

    def error(self, weights: np.ndarray) -> float:
        """Sum of squares of what those weights leave."""
        return self.yy - 2 * float((weights * self.xy).sum()) + float((weights * (self.xx @ weights)).sum())


def _products(mean: ImageMean, slide: Slide, genes: tuple[str, ...]) -> tuple[_Products, np.ndarray]:
    """Those of a slide, and its largest log1p count of each gene [G]."""
    x = np.concatenate([mean.design(part) for part in blocks_of_features(slide)]).astype(np.float64)
    y = slide.expression(genes, "log1p")
    products = _Products(x.T @ x, x.T @ y, float(np.vdot(y, y)))
    return products, y.max(axis=0)


def _parts(slides: Sequence[Slide]) -> list[Slide]:
    """What is left out in turn."""
    if len(slides) > 1:
        return list(slides)
    spots = np.arange(slides[0].n_spots)
    return [slides[0].subset(part) for part in np.array_split(spots, 4) if len(part)]


def blocks_of_features(slide: Slide) -> Iterator[np.ndarray]:
    """All features of a slide, some rows at a time."""
    for rows in blocks_of(slide.n_spots, ROWS):
        yield rows_of_features(slide.features, rows)


def _components(slides: Sequence[Slide]) -> tuple[np.ndarray, np.ndarray]:
    """Center [F] of the features, and the projection [F, components] of what is standardised to its principal ones."""
    _check(slides)
    n, width = sum(slide.n_spots for slide in slides), slides[0].feature_dim
    total, squares = np.zeros(width), np.zeros((width, width))
    for slide in slides:
        total += sum(block.sum(axis=0, dtype=np.float64) for block in blocks_of_features(slide))
        if not np.isfinite(total).all():
            raise InputError(f"slide {slide.id}: features are NaN or infinite; remove those spots or embed them again")
    center = total / n
    for slide in slides:
        for block in blocks_of_features(slide):
            squares += (block - center).T @ (block - center)
    spread = np.sqrt(squares.diagonal() / n)
    varying = spread > CONSTANT * spread.max()
    scale = np.divide(1.0, spread, out=np.zeros(width), where=varying)
    variances, vectors = np.linalg.eigh(squares / n * np.outer(scale, scale))
    kept = np.flatnonzero(variances > CONSTANT * max(1, varying.sum()))[::-1][:N_COMPONENTS]
    projection = scale[:, None] * vectors[:, kept] / np.sqrt(variances[kept])
    return center.astype(np.float32), projection.astype(np.float32)


def _check(slides: Sequence[Slide]) -> None:
    for slide in slides:
        if slide.features is None:
            raise InputError(f"slide {slide.id}: has no features, which this source is of; embed its patches")
        if slide.feature_dim != slides[0].feature_dim:
            others = f"slide {slides[0].id} has {slides[0].feature_dim}"
            raise InputError(f"slide {slide.id}: has {slide.feature_dim} features, {others}; embed all by one encoder")
    if sum(slide.n_spots for slide in slides) < 2:
        raise InputError("train: one spot in all; this source needs two or more")
