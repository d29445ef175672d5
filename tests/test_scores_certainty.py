"""Draws beside what was measured: CRPS by brute force, coverage of laws that are known."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable

import numpy as np
import pytest
import scoringrules
from scipy import stats

from stflow_fast.errors import InputError
from stflow_fast.evaluation import certainty, random_training_spots

room = importlib.import_module("stflow_fast.evaluation.certainty")  # the package has a function of this name


def slices_of(drawn: np.ndarray) -> Callable[[slice], np.ndarray]:
    return lambda rows: drawn[:, rows]


def fair_crps(truth: np.ndarray, drawn: np.ndarray) -> float:
    n = len(drawn)
    to_truth = np.abs(drawn - truth).mean(axis=0)
    between = sum(np.abs(one - other) for one in drawn for other in drawn) / (n * (n - 1))
    return float((to_truth - between / 2).mean())


@pytest.mark.parametrize("n_draws", [2, 3, 17])
@pytest.mark.parametrize(("n", "genes"), [(1, 1), (7, 1), (23, 6)])
def test_crps_and_spread_are_their_formulas(n_draws: int, n: int, genes: int) -> None:
    rng = np.random.default_rng(0)
    truth, mean = rng.normal(size=(2, n, genes))
    drawn = rng.normal(size=(n_draws, n, genes))
    found = certainty(truth, mean, slices_of(drawn))
    assert found["crps_mean"] == pytest.approx(fair_crps(truth, drawn), rel=1e-9)
    library = scoringrules.crps_ensemble(truth, drawn, m_axis=0, estimator="fair", backend="numpy")
    assert found["crps_mean"] == pytest.approx(library.mean(), rel=1e-9)
    spread = np.sqrt(drawn.var(axis=0, ddof=1).mean() / np.square(truth - mean).mean())
    assert found["spread_ratio"] == pytest.approx(spread, rel=1e-9)
    assert found["n_draws"] == n_draws
    json.dumps(found, allow_nan=False)


def test_coverage_is_by_numpys_quantiles() -> None:
    rng = np.random.default_rng(1)
    truth, drawn = rng.poisson(2.0, (40, 5)).astype(float), rng.poisson(2.0, (13, 40, 5)).astype(float)
    found = certainty(truth, truth + 1, slices_of(drawn))
    for level, observed in ((0.5, found["inclusive_50"]), (0.9, found["inclusive_90"])):
        low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0, method="weibull")
        assert observed == pytest.approx(((low <= truth) & (truth <= high)).mean())
    assert [level for level, _ in found["reliability"]] == pytest.approx(np.arange(0.1, 0.95, 0.1))
    by_level = {round(level, 1): observed for level, observed in found["reliability"]}
    assert (found["coverage_50"], found["coverage_90"]) == (by_level[0.5], by_level[0.9])


def test_a_truth_that_ties_with_draws_is_within_by_its_share() -> None:
    drawn = np.array([0.0, 0.0, 0.0, 1.0])[:, None, None]  # five ranks: a zero has the first four, of .0 to .8
    found = dict(certainty(np.zeros((1, 1)), np.ones((1, 1)), slices_of(drawn))["reliability"])
    assert found[0.9] == pytest.approx(0.75 / 0.8)
    assert found[0.5] == pytest.approx(0.5 / 0.8)


@pytest.mark.parametrize("n_draws", [19, 100])
def test_zeros_of_an_exact_law_are_within_as_often_as_said(n_draws: int) -> None:
    rng = np.random.default_rng(5)
    truth, drawn = rng.poisson(0.5, (2500, 8)), rng.poisson(0.5, (n_draws, 2500, 8))
    found = certainty(truth, np.full(truth.shape, 0.5), slices_of(drawn.astype(np.float32)))
    for level, observed in found["reliability"]:
        assert observed == pytest.approx(level, abs=0.011)
    assert found["inclusive_50"] > 0.8


@pytest.mark.parametrize("n_draws", [19, 100])
@pytest.mark.parametrize("law", [stats.norm(), stats.uniform(), stats.gamma(2.0)])
def test_a_truth_of_the_law_of_its_draws_is_covered_as_often_as_said(n_draws: int, law: stats.rv_continuous) -> None:
    rng = np.random.default_rng(2)
    shape = (2500, 8)
    truth, drawn = law.rvs(shape, random_state=rng), law.rvs((n_draws, *shape), random_state=rng)
    found = certainty(truth, np.full(shape, law.mean()), slices_of(drawn.astype(np.float32)))
    # Three standard errors of a share of 20,000 are 0.011.
    for level, observed in found["reliability"]:
        assert observed == pytest.approx(level, abs=0.011)
    assert found["spread_ratio"] == pytest.approx(1.0, abs=0.03)


def test_crps_of_a_normal_law_is_the_known_one() -> None:
    rng = np.random.default_rng(3)
    truth, drawn = rng.normal(size=(4000, 5)), rng.normal(size=(20, 4000, 5))
    found = certainty(truth, np.zeros_like(truth), slices_of(drawn))
    assert found["crps_mean"] == pytest.approx(1 / np.sqrt(np.pi), abs=0.01)


def test_a_narrower_law_covers_less_and_its_crps_is_higher() -> None:
    rng = np.random.default_rng(4)
    truth, drawn = rng.normal(size=(1000, 4)), rng.normal(size=(50, 1000, 4))
    right, narrow = (certainty(truth, np.zeros_like(truth), slices_of(scale * drawn)) for scale in (1.0, 0.3))
    assert narrow["coverage_90"] < right["coverage_90"] - 0.3
    assert narrow["crps_mean"] > right["crps_mean"]
    assert narrow["spread_ratio"] == pytest.approx(0.3 * right["spread_ratio"])


def test_zeros_of_shallow_counts_are_inside_whatever_the_level() -> None:
    truth = np.zeros((6, 3), dtype=np.float64)
    drawn = np.zeros((10, 6, 3), dtype=np.float32)
    drawn[9] = np.log1p(np.float32(1))
    found = certainty(truth, truth, slices_of(drawn))
    assert found["inclusive_50"] == found["inclusive_90"] == 1.0
    assert found["spread_ratio"] is None


def test_equal_numbers_of_other_precision_are_equal() -> None:
    truth = np.log1p(np.full((3, 2), 3.0))
    drawn = np.log1p(np.full((5, 3, 2), 3.0, dtype=np.float32))
    assert certainty(truth, truth, slices_of(drawn))["inclusive_50"] == 1.0
    counts = np.full((5, 3, 2), 3)
    assert certainty(np.full((3, 2), 3.5), truth, slices_of(counts))["coverage_50"] == 0.0


def test_blocks_change_nothing_and_follow_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    truth, drawn = rng.normal(size=(31, 3)), rng.normal(size=(4, 31, 3))
    whole = certainty(truth, truth + 1, slices_of(drawn))
    asked = []
    monkeypatch.setattr(room, "NUMBERS_AT_ONCE", 100)

    def draw(rows: slice) -> np.ndarray:
        asked.append(rows)
        return drawn[:, rows]

    parts = certainty(truth, truth + 1, draw)
    assert [spot for rows in asked for spot in range(rows.start, rows.stop)] == list(range(31))
    assert all((rows.stop - rows.start) * 12 <= 100 for rows in asked)
    assert parts["reliability"] == whole["reliability"]
    assert parts["crps_mean"] == pytest.approx(whole["crps_mean"], rel=1e-12)
    assert parts["spread_ratio"] == pytest.approx(whole["spread_ratio"], rel=1e-12)


@pytest.mark.parametrize(
    ("drawn", "message"),
    [
        (np.zeros((1, 4, 2)), "draws: 1 of each spot; two or more"),
        (np.zeros((3, 4, 5)), r"draws: must have shape \[R, 1, 2\], not \[3, 1, 5\]"),
        (np.full((3, 4, 2), np.nan), "draws: some are NaN"),
    ],
)
def test_draws_that_are_none_are_refused(drawn: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        certainty(np.ones((4, 2)), np.zeros((4, 2)), slices_of(drawn))


def test_means_of_another_shape_are_refused() -> None:
    with pytest.raises(InputError, match="mean: must have the shape of the truth"):
        certainty(np.ones((4, 2)), np.zeros((4, 3)), slices_of(np.zeros((3, 4, 2))))


def test_random_training_spots_are_whole_spots_and_alike_however_they_are_asked_for() -> None:
    known = np.arange(30, dtype=np.float32).reshape(10, 3)
    draw = random_training_spots(known, 50, 1)
    whole = draw(slice(0, 40))
    assert whole.shape == (50, 40, 3)
    assert whole.dtype == np.float32
    assert np.array_equal(np.concatenate([draw(slice(20, 40)), draw(slice(0, 20))], axis=1)[:, :20], whole[:, 20:])
    assert np.array_equal(draw(slice(7, 8)), whole[:, 7:8])
    spots = whole.reshape(-1, 3)
    assert {tuple(spot) for spot in spots.tolist()} == {tuple(spot) for spot in known.tolist()}
    assert not np.array_equal(random_training_spots(known, 50, 2)(slice(0, 40)), whole)
    share = np.unique(spots[:, 0], return_counts=True)[1] / len(spots)
    assert share == pytest.approx(np.full(10, 0.1), abs=0.03)
