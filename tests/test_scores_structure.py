"""Moran's I and gene-gene correlations against formulas written out."""

from __future__ import annotations

import json

import numpy as np
import pytest

import stflow_fast.evaluation.scores as scores
import stflow_fast.evaluation.structure as room
from stflow_fast.evaluation import (
    GeneCorrelations,
    Structure,
    morans_i,
    neighbor_weights,
    top_overlap,
    zero_fraction,
)
from stflow_fast.graph import MISSING, knn_graph


def morans_i_written_out(coords: np.ndarray, values: np.ndarray) -> float:
    n, z = len(values), values - values.mean()
    weights = np.zeros((n, n))
    for spot, row in enumerate(knn_graph(coords, 8).tolist()):
        present = [other for other in row if other != MISSING]
        for other in present:
            weights[spot, other] = 1 / len(present)
    cross = sum(weights[i, j] * z[i] * z[j] for i in range(n) for j in range(n))
    return n / weights.sum() * cross / (z**2).sum()


@pytest.mark.parametrize("n", [2, 6, 9, 40])
@pytest.mark.parametrize("at_once", [2**20, 50])
def test_morans_i_is_its_formula(n: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "NUMBERS_AT_ONCE", at_once)
    rng = np.random.default_rng(n)
    coords, values = rng.uniform(0, 100, (n, 2)), rng.normal(7.0, 1.0, (n, 5))
    values[:, 1] = 3.7
    values[:, 2] = coords[:, 0]
    found = morans_i(neighbor_weights(coords), values)
    assert np.isnan(found).tolist() == [False, True, False, False, False]
    for gene in (0, 2, 3, 4):
        assert found[gene] == pytest.approx(morans_i_written_out(coords, values[:, gene]), rel=1e-9)


def test_morans_i_tells_patches_from_noise() -> None:
    coords = np.stack(np.meshgrid(np.arange(30.0), np.arange(30.0)), axis=-1).reshape(-1, 2)
    smooth = np.sin(coords[:, 0] / 5)
    noise = np.random.default_rng(0).permutation(smooth)
    checkered = coords.sum(axis=1) % 2
    patches, nothing, board = morans_i(neighbor_weights(coords), np.stack([smooth, noise, checkered], axis=1))
    assert patches > 0.9
    assert abs(nothing) < 0.1
    assert board < 0.1


def test_the_correlation_error_is_that_of_numpy() -> None:
    rng = np.random.default_rng(0)
    truth, other = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6)), rng.normal(size=(50, 6))
    off = ~np.eye(6, dtype=bool)
    expected = np.abs(np.corrcoef(truth.T) - np.corrcoef(other.T))[off].mean()
    assert GeneCorrelations(truth).error(other) == pytest.approx(expected, rel=1e-12)
    assert GeneCorrelations(truth).error(3 * truth + 1) == pytest.approx(0.0, abs=1e-12)
    assert GeneCorrelations(truth).error(truth * [1, 1, 1, 1, 1, -1]) > 0.1


def test_genes_that_do_not_vary_in_both_are_left_out() -> None:
    rng = np.random.default_rng(0)
    truth, other = rng.normal(size=(2, 50, 5))
    part = GeneCorrelations(truth[:, 2:]).error(other[:, 2:])
    truth[:, 0], other[:, 1] = 0.1, 0.1
    assert GeneCorrelations(truth).error(other) == part
    assert np.isnan(GeneCorrelations(truth[:, :3]).error(other[:, :3]))
    assert np.isnan(GeneCorrelations(truth[:, 2:3]).error(other[:, 2:3]))


def test_of_many_genes_the_most_variable_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    truth, other = rng.normal(size=(2, 50, 8))
    truth *= np.array([1, 9, 1, 8, 1, 7, 1, 6])
    monkeypatch.setattr(room, "MOST_GENES", 4)
    part = GeneCorrelations(truth[:, 1::2]).error(other[:, 1::2])
    assert GeneCorrelations(truth).error(other) == pytest.approx(part, rel=1e-12)


def test_zeros_are_exact_ones() -> None:
    assert zero_fraction(np.array([[0.0, -0.0], [1e-30, 2.0]])) == 0.5


def test_slides_count_by_their_spots() -> None:
    rng = np.random.default_rng(0)
    sizes = (12, 30)
    coords = [rng.uniform(0, 100, (n, 2)) for n in sizes]
    truth, other = ([rng.poisson(1.0, (n, 4)).astype(np.float32) for n in sizes] for _ in range(2))
    alone = [Structure([c], [t]).beside([o]) for c, t, o in zip(coords, truth, other, strict=True)]
    both = Structure(coords, truth).beside(other)
    assert set(both) == {"morans_i_mean", "morans_i_error", "gene_correlation_error", "zero_fraction"}
    for name, value in both.items():
        assert value == pytest.approx((12 * alone[0][name] + 30 * alone[1][name]) / 42)
    own, others = (morans_i(neighbor_weights(coords[0]), each) for each in (truth[0], other[0]))
    assert alone[0]["morans_i_mean"] == pytest.approx(others.mean())
    assert alone[0]["morans_i_error"] == pytest.approx(np.abs(own - others).mean())
    itself = Structure(coords, truth).beside(truth)
    assert itself["morans_i_error"] == itself["gene_correlation_error"] == 0.0


def test_slides_without_structure_are_left_out_and_nothing_is_none() -> None:
    rng = np.random.default_rng(0)
    coords, truth = rng.uniform(0, 100, (20, 2)), rng.normal(size=(20, 3))
    spot = np.array([[5.0, 5.0]]), np.zeros((1, 3))
    flat = Structure([coords], [truth]).beside([np.full((20, 3), 0.2)])
    assert flat == {
        "morans_i_mean": None,
        "morans_i_error": None,
        "gene_correlation_error": None,
        "zero_fraction": 0.0,
    }
    alone, beside = (
        Structure([coords], [truth]).beside([truth]),
        Structure([coords, spot[0]], [truth, spot[1]]).beside([truth, spot[1]]),
    )
    assert beside["morans_i_mean"] == alone["morans_i_mean"]
    assert beside["zero_fraction"] == pytest.approx(1 / 21)
    json.dumps(beside, allow_nan=False)


@pytest.mark.parametrize(("dtype", "expected"), [(np.float32, True), (np.float64, False), (np.int64, False)])
def test_what_is_constant_depends_on_the_precision(dtype: type, expected: bool) -> None:
    rows = np.array([[10**7, 10**7 + 1]], dtype=dtype)
    assert scores.is_constant(rows).tolist() == [expected]


def test_the_highest_spots_are_found_or_not():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(200, 4))
    made = np.column_stack([truth[:, 0] ** 3, -truth[:, 1], rng.normal(size=200), np.zeros(200)])
    overlap, chance = top_overlap(truth, made)
    assert chance == 0.1
    assert overlap[:2].tolist() == [1.0, 0.0]
    assert 0 <= overlap[2] <= 0.4
    assert overlap[3] == pytest.approx(0.1)  # all are equal: each is among the highest by a tenth


def test_ties_at_the_border_count_in_part():
    truth = np.array([3.0, 1.0, 1.0, 0.0])[:, None]
    made = np.array([2.0, 0.0, 2.0, 2.0])[:, None]
    overlap, chance = top_overlap(truth, made, share=0.5)
    assert chance == 0.5
    # The truth's two: the first, and half of each of the next two; the prediction's: two thirds of each of three.
    assert overlap == pytest.approx([(2 / 3 + 0.5 * 2 / 3) / 2])
    assert top_overlap(truth, truth, share=0.01)[0] == pytest.approx([1.0])
