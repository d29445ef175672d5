"""What the errors of a spot's genes have in common, and how far it reaches over the tissue.

Errors of a prediction are not independent of each other. On her2st a quarter to a third of their variance is one number
of the spot (how many molecules it gave), which neighbours share, and in part all spots of a slide. Draws without it
have the right law at every spot, and intervals of a region's mean that are far too narrow
(benchmarks/results/her2st_notes.md).

The score z of gene g at spot i, standard normal by its law, is ``l_g f_i + sqrt(1 - l_g^2) e_ig``: e independent, and
f a Gaussian field of variance 1, whose correlation between two spots is ``slide + near * exp(-distance / reach)``. This
is the model of one common factor (Spearman 1904), with a factor that depends on the place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls
from scipy.spatial import cKDTree
from scipy.special import ndtr, ndtri

from ..threads import blocks_of
from .streams import PIECE

WAVES = 64
"""That the part of a field which reaches from spot to spot is made of."""

WINDOW, MOST_WINDOWS, SETTLED = 10, 30, 0.001
"""Rounds of a fit whose means are compared, how many times at the most, and how little the mean size of loadings
changes then: of counts that are nearly all zero hundreds of rounds are needed."""

MOST_LOADING = 0.95
"""A gene has an error of its own too."""

MOST_SCORE = 6.0
"""Of a count: the probability of more is 1e-9."""

LAGS = np.array([0.5, 1.3, 1.8, 2.5, 3.5, 5.0, 7.0, 10.0, 14.0, 20.0, 28.0, 40.0])
"""Bounds of the distances whose correlations are averaged, in pitches."""

REACHES = np.geomspace(0.5, 40.0, 27)
"""Those that are tried."""

MOST_CENTRES = 512
"""Spots of a slide from which distances to all others are taken."""

LEAST_PAIRS = 100
"""Without as many, a correlation is not taken for one."""


@dataclass(frozen=True)
class SharedError:
    """The common part of errors.

    Attributes:
        loading: [G] float32, from -1 to 1: correlation of each gene's score with the field; 0 where it has none.
        field: [3] float32: ``slide`` and ``near``, shares of the field's variance whose sum is at most 1, and
            ``reach`` in pitches, the median distance from one place of a slide to the next.
    """

    loading: np.ndarray
    field: np.ndarray

    @classmethod
    def none(cls, n_genes: int) -> SharedError:
        """Errors that are independent."""
        return cls(np.zeros(n_genes, np.float32), np.array([0.0, 0.0, 1.0], np.float32))

    @classmethod
    def fit(cls, low: np.ndarray, high: np.ndarray, coords: Sequence[np.ndarray]) -> SharedError:
        """Of scores [N, G] that are known to lie between ``low`` and ``high`` (equal where a score is known), of the
        spots of slides at ``coords`` [N_i, 2] one after another: by expectation and maximisation, where scores that are
        not known are drawn anew in each round."""
        low, high = (np.clip(bound, -MOST_SCORE, MOST_SCORE).astype(np.float32) for bound in (low, high))
        # Of two chains: what one has of the factor the other has too, and what it has of chance alone it has alone.
        (loading, expected), (again, repeated) = (_one_factor(low, high, seed) for seed in (0, 1))
        sign = np.sign(loading @ again) or 1.0
        field = _correlation(coords, expected, sign * repeated)
        return cls(((loading + sign * again) / 2).astype(np.float32), field.astype(np.float32))

    def is_possible(self) -> bool:
        """Whether the numbers are in their ranges."""
        slide, near, reach = self.field
        shares = slide >= 0 and near >= 0 and slide + near <= 1 + 1e-6
        return bool(shares and 0 < reach < np.inf and (np.abs(self.loading) <= 1).all())

    def tensors(self) -> dict[str, np.ndarray]:
        """The constructor's arguments."""
        return {"loading": self.loading, "field": self.field}

    def drawn(self, places: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """[N] float32 of the field at the spots of a slide; the part of neighbours as a sum of waves whose directions
        and lengths are drawn (random Fourier features, Rahimi & Recht 2007), so that it costs the same for every spot.

        Args:
            places: [N, 2] of :func:`in_pitches`.
        """
        slide, near, reach = (float(number) for number in self.field)
        # The spectrum of exp(-distance / reach) in the plane is Cauchy's law of two dimensions.
        frequency = generator.standard_normal((2, WAVES)) / (reach * np.abs(generator.standard_normal(WAVES)))
        cosine, sine = (generator.standard_normal((2, WAVES)) * np.sqrt(near / WAVES)).astype(np.float32)
        level = np.sqrt(slide) * generator.standard_normal()
        field = generator.standard_normal(len(places), dtype=np.float32)
        field *= np.float32(np.sqrt(max(0.0, 1.0 - slide - near)))
        field += np.float32(level)
        if near:
            for rows in blocks_of(len(places), PIECE // WAVES):
                x, y = places[rows].T[..., None]
                phase = (x * frequency[0] + y * frequency[1]).astype(np.float32)
                field[rows] += (np.cos(phase) * cosine + np.sin(phase) * sine).sum(axis=1)
        return field

    def mix_in(self, field: np.ndarray, noise: np.ndarray) -> None:
        """Add the field [n] to standard normal noise [n, G], in place, so that it stays standard normal."""
        noise *= np.sqrt(1 - np.square(self.loading))
        noise += field[:, None] * self.loading


def _one_factor(low: np.ndarray, high: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Loadings [G] and the expected factor of each spot [N], in units of its standard deviation: means over the last
    :data:`WINDOW` rounds of a chain."""
    generator, before = np.random.default_rng(seed), np.inf
    score, loading, factor = np.empty_like(low), np.full(low.shape[1], 0.5), np.zeros(len(low))
    for _ in range(MOST_WINDOWS):
        loadings, factors = np.zeros(low.shape[1]), np.zeros(len(low))
        for _ in range(WINDOW):
            for genes in blocks_of(low.shape[1], max(1, PIECE // len(low))):
                around, own = factor[:, None] * loading[genes], np.sqrt(1 - np.square(loading[genes]))
                score[:, genes] = _drawn_between(low[:, genes], high[:, genes], around, own, generator)
            loading, expected, variance = _step(score, loading)
            factor = expected + np.sqrt(variance) * generator.standard_normal(len(low))
            loadings += loading / WINDOW
            factors += expected / WINDOW
        size = np.abs(loadings).mean()
        if abs(size - before) < SETTLED:
            break
        before = size
    return loadings, factors


def _step(score: np.ndarray, loading: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Of known scores [N, G] and loadings [G] the next loadings, and the mean [N] and the variance of each spot's
    factor, in units of its standard deviation (EM of factor analysis, Rubin & Thayer 1982)."""
    weight = loading / (1 - np.square(loading))
    variance = 1 / (1 + loading @ weight)
    expected = variance * (score @ weight.astype(np.float32)).astype(np.float64)
    spread = np.sqrt(np.square(expected).mean() + variance)
    expected /= spread
    deviation = np.maximum(np.sqrt(np.square(score).mean(axis=0, dtype=np.float64)), 1e-6)
    found = (expected.astype(np.float32) @ score).astype(np.float64) / (len(score) * deviation)
    return np.clip(found, -MOST_LOADING, MOST_LOADING), expected, variance / spread**2


def _drawn_between(
    low: np.ndarray, high: np.ndarray, mean: np.ndarray, std: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Of a normal law, what lies between bounds."""
    below, upto = ndtr((low - mean) / std), ndtr((high - mean) / std)
    drawn = mean + std * ndtri(below + generator.random(low.shape) * (upto - below))
    between: np.ndarray = np.clip(drawn, low, high)
    return between


def _correlation(coords: Sequence[np.ndarray], expected: np.ndarray, repeated: np.ndarray) -> np.ndarray:
    """``slide``, ``near`` and ``reach`` [3] by the correlations of the expected factor [N], of two chains, at distances
    apart.

    What is expected of a factor is r times it, r its variance, and something that is no other spot's: of two spots the
    product is r^2 times their correlation. Slides count alike, and distances that less than half of them have are left
    out: a large slide that is off as a whole would otherwise make the far distances its own.
    """
    generator = np.random.default_rng(0)
    ends = np.cumsum([len(places) for places in coords])[:-1]
    pairs = list(zip(np.split(expected, ends), np.split(repeated, ends), strict=True))
    found = [
        _by_distance(in_pitches(places), (one + other) / 2, generator)
        for places, (one, other) in zip(coords, pairs, strict=True)
    ]
    products, distances = (np.array(each) for each in zip(*found, strict=True))
    there = np.isfinite(products)
    kept = there.sum(axis=0) * 2 >= max(1, there.any(axis=1).sum())
    variance = np.mean([(one * other).mean() for one, other in pairs if len(one)])
    if not there.any() or variance <= 0:
        return np.array([0.0, 0.0, 1.0])
    products, distances = (np.nanmean(each[:, kept], axis=0) for each in (products, distances))
    return _fitted_curve(distances, products / variance**2)


def _by_distance(
    places: np.ndarray, values: np.ndarray, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Of the pairs of a slide's spots, at each of the :data:`LAGS`: mean product of their values, and mean distance;
    NaN where there are too few."""
    sums = np.zeros((3, len(LAGS) - 1))  # of products, of distances, and how many
    for centre in generator.permutation(len(places))[:MOST_CENTRES]:
        distance = np.hypot(*(places - places[centre]).T)
        lag = np.digitize(distance, LAGS) - 1
        inside = (lag >= 0) & (lag < sums.shape[1])
        for total, part in zip(sums, (values[centre] * values, distance, np.ones_like(distance)), strict=True):
            total += np.bincount(lag[inside], part[inside], sums.shape[1])
    pairs = np.where(sums[2] >= LEAST_PAIRS, sums[2], np.nan)
    return sums[0] / pairs, sums[1] / pairs


def _fitted_curve(distance: np.ndarray, correlation: np.ndarray) -> np.ndarray:
    best, least = np.array([0.0, 0.0, 1.0]), np.inf
    for reach in REACHES:
        shares, residual = nnls(np.column_stack([np.ones_like(distance), np.exp(-distance / reach)]), correlation)
        if residual < least:
            best, least = np.array([*shares / max(1.0, shares.sum()), reach]), residual
    return best


def in_pitches(coords: np.ndarray) -> np.ndarray:
    """[N, 2] coordinates in units of the median distance from one place to the next, about their middle. Places that
    differ by a hair are two."""
    coords = np.asarray(coords, dtype=np.float64)
    places = np.unique(coords, axis=0)
    if len(places) < 2:
        return np.zeros_like(coords)
    pitch = np.median(cKDTree(places).query(places, 2)[0][:, 1])
    moved: np.ndarray = (coords - places.mean(axis=0)) / pitch
    return moved
