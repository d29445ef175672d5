"""What a mean over tissue loses though its correlations are high: how patchy genes are in space, how they go together,
and how often nothing is there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse

from ..threads import blocks_of
from .neighbors import neighbor_weights
from .scores import NUMBERS_AT_ONCE, is_constant

MOST_GENES = 2000
"""Genes whose correlations with each other are compared: 32 MB for a matrix of them."""


def morans_i(weights: scipy.sparse.csr_matrix, values: np.ndarray) -> np.ndarray:
    """Moran's I of each gene: 1 where neighbours are alike, about -1 / (N - 1) where places do not matter, below where
    neighbours differ.

    I = N / W * sum_ij w_ij z_i z_j / sum_i z_i^2, z the deviation from the mean (Moran 1950). Rows of the weights sum
    to 1, so N / W is 1.

    Args:
        weights: [N, N] of :func:`neighbor_weights`.
        values: [N, G] finite.

    Returns:
        [G] float64; NaN of genes that are constant.
    """
    found = np.full(values.shape[1], np.nan)
    for genes in blocks_of(values.shape[1], max(1, NUMBERS_AT_ONCE // len(values))):
        part = values[:, genes]
        deviation = part - part.mean(axis=0, dtype=np.float64)
        squares = np.square(deviation).sum(axis=0)
        flat = is_constant(part.T)
        along = (deviation * (weights @ deviation)).sum(axis=0)
        found[genes] = np.where(flat, np.nan, along / np.where(flat, 1.0, squares))
    return found


class GeneCorrelations:
    """How the genes of a truth [N, G] go together, to hold others against.

    Genes that are constant in it are left out. Of more than :data:`MOST_GENES` others, those that vary the most are
    compared.
    """

    def __init__(self, truth: np.ndarray) -> None:
        varies = np.flatnonzero(~is_constant(truth.T))
        most = np.argsort(-truth[:, varies].var(axis=0, dtype=np.float64), kind="stable")[:MOST_GENES]
        self._genes = np.sort(varies[most])
        self._of_truth = _correlations(truth[:, self._genes])

    def error(self, other: np.ndarray) -> float:
        """Mean absolute difference between the gene-gene Pearson correlations of the truth and of ``other`` [N, G],
        over pairs of genes, without those that are constant in ``other``: from 0 to 2; NaN where fewer than two are
        left."""
        other = other[:, self._genes]
        varies = ~is_constant(other.T)
        n_genes = np.count_nonzero(varies)
        if n_genes < 2:
            return np.nan
        difference = np.abs(self._of_truth[np.ix_(varies, varies)] - _correlations(other[:, varies]))
        np.fill_diagonal(difference, 0.0)
        return float(difference.sum() / (n_genes * (n_genes - 1)))


def _correlations(values: np.ndarray) -> np.ndarray:
    centred = values - values.mean(axis=0, dtype=np.float64)
    centred /= np.linalg.norm(centred, axis=0)
    correlations: np.ndarray = centred.T @ centred
    return correlations


def zero_fraction(values: np.ndarray) -> float:
    """Share of the values that are exactly zero."""
    return 1.0 - np.count_nonzero(values) / values.size


class Structure:
    """The spatial and the joint structure of the truth of some slides, to hold others against."""

    def __init__(self, coords: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> None:
        """
        Args:
            coords: [N_i, 2] of each slide.
            truth: [N_i, G] of each slide.
        """
        self._sizes = np.array([len(part) for part in truth], dtype=np.float64)
        self._slides = [_OfSlide(*parts) for parts in zip(coords, truth, strict=True)]

    def beside(self, other: Sequence[np.ndarray]) -> dict[str, float | None]:
        """What ``other`` [N_i, G] of each slide, a prediction, a draw, or the truth itself, has of it.

        Returns:
            ``morans_i_mean`` (of ``other``, over its genes), ``morans_i_error`` (mean absolute difference from the
            truth's, over genes that have one in both), ``gene_correlation_error`` and ``zero_fraction`` (of ``other``).
            Each is computed slide by slide and averaged over slides by their spots; a slide where it does not exist,
            because genes are constant, is left out; None where it exists on none.
        """
        found = [of_slide.beside(made) for of_slide, made in zip(self._slides, other, strict=True)]
        return {name: _average([one[name] for one in found], self._sizes) for name in found[0]}


class _OfSlide:
    def __init__(self, coords: np.ndarray, truth: np.ndarray) -> None:
        self._weights, self._correlations = neighbor_weights(coords), GeneCorrelations(truth)
        self._morans_i = morans_i(self._weights, truth)

    def beside(self, other: np.ndarray) -> dict[str, float]:
        made = morans_i(self._weights, other)
        return {
            "morans_i_mean": _mean(made),
            "morans_i_error": _mean(np.abs(made - self._morans_i)),
            "gene_correlation_error": self._correlations.error(other),
            "zero_fraction": zero_fraction(other),
        }


def _mean(values: np.ndarray) -> float:
    """Over what is not NaN; NaN where all is."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else np.nan


def _average(values: Sequence[float], weights: np.ndarray) -> float | None:
    defined = ~np.isnan(values)
    return float(np.average(np.asarray(values)[defined], weights=weights[defined])) if defined.any() else None
