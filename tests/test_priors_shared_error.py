"""What errors have in common: the field's law, its fit, and what it leaves alone."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kstest, norm

from stflow_fast.priors.shared_error import SharedError, _one_factor

LOADING = np.array([0.2, 0.5, 0.5, 0.7, 0.8, -0.4, 0.6, 0.3], np.float32)


def lattice(n: int, pitch: float = 1.0) -> np.ndarray:
    return pitch * np.column_stack([np.arange(n * n) % n, np.arange(n * n) // n])


def shared(slide: float, near: float, reach: float) -> SharedError:
    return SharedError(LOADING, np.array([slide, near, reach], np.float32))


def fields(error: SharedError, coords: np.ndarray, n: int) -> np.ndarray:
    return np.stack([error.drawn(coords, np.random.default_rng(seed)) for seed in range(n)])


def test_a_field_has_the_correlations_that_it_says() -> None:
    error = shared(0.2, 0.5, 3.0)
    coords = np.array([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0], [3.0, 9.0], [100.0, 0.0], [101.0, 0.0]])
    drawn = fields(error, coords, 6000)
    assert kstest(drawn[:, 2], norm.cdf).pvalue > 1e-3
    distance = np.hypot(*(coords[:, None] - coords).transpose(2, 0, 1))
    expected = np.where(distance > 0, 0.2 + 0.5 * np.exp(-distance / 3.0), 1.0)
    np.testing.assert_allclose(np.corrcoef(drawn.T), expected, atol=0.05)


def test_distances_are_in_pitches() -> None:
    """So a slide in pixels, in microns, or moved has the same field."""
    error = shared(0.1, 0.8, 5.0)
    one = error.drawn(lattice(20), np.random.default_rng(0))
    other = error.drawn(lattice(20, 137.5) + 1e4, np.random.default_rng(0))
    np.testing.assert_allclose(other, one, atol=2e-3)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_spots_and_spots_at_one_place(n: int) -> None:
    error = shared(0.1, 0.8, 5.0)
    assert error.drawn(np.zeros((n, 2)), np.random.default_rng(0)).shape == (n,)
    assert np.isfinite(error.drawn(np.zeros((n, 2)), np.random.default_rng(0))).all()
    scores = np.random.default_rng(0).standard_normal((max(n, 1), 8))
    assert SharedError.fit(scores, scores, [np.zeros((max(n, 1), 2))]).is_possible()


def test_noise_that_it_is_mixed_into_stays_standard_normal() -> None:
    rng = np.random.default_rng(0)
    field, noise = rng.standard_normal(200_000).astype(np.float32), rng.standard_normal((200_000, 8)).astype(np.float32)
    shared(0, 0, 1).mix_in(field, noise)
    expected = np.outer(LOADING, LOADING)
    np.fill_diagonal(expected, 1.0)
    np.testing.assert_allclose(np.cov(noise.T), expected, atol=0.015)


@pytest.mark.parametrize("zeros", [False, True], ids=["known", "half of them censored"])
def test_a_fit_finds_what_was_drawn(zeros: bool) -> None:
    error, rng = shared(0.2, 0.6, 4.0), np.random.default_rng(1)
    coords, scores = [lattice(18) for _ in range(24)], []
    for number, places in enumerate(coords):
        noise = rng.standard_normal((len(places), 8)).astype(np.float32)
        error.mix_in(error.drawn(places, np.random.default_rng(number)), noise)
        scores.append(noise)
    high = np.concatenate(scores)
    low = high.copy()
    if zeros:
        hidden = high < rng.uniform(-1, 1, 8)
        low[hidden], high = -np.inf, np.where(hidden, np.broadcast_to(high.max(axis=0), high.shape), high)
        high = np.where(hidden, np.where(hidden, np.concatenate(scores), -np.inf).max(axis=0), high)
    found = SharedError.fit(low, high, coords)
    sign = np.sign(found.loading[4])
    np.testing.assert_allclose(sign * found.loading, LOADING, atol=0.08)
    slide, near, reach = found.field
    for distance in (1.0, 3.0, 8.0):
        expected = 0.2 + 0.6 * np.exp(-distance / 4.0)
        assert slide + near * np.exp(-distance / reach) == pytest.approx(expected, abs=0.12)


def test_errors_that_are_independent_are_found_to_be() -> None:
    scores = np.random.default_rng(0).standard_normal((2000, 8))
    found = SharedError.fit(scores, scores, [lattice(20)] * 5)
    assert np.square(found.loading).mean() < 0.2  # a gene may be the factor itself
    assert np.sort(np.square(found.loading))[:6].max() < 0.05
    assert SharedError.none(8).is_possible()


def test_what_is_known_is_not_drawn() -> None:
    """Loadings of known scores are those of the one-factor model by itself, whatever is drawn."""
    rng = np.random.default_rng(0)
    scores = (
        rng.standard_normal((5000, 1)) * LOADING + rng.standard_normal((5000, 8)) * np.sqrt(1 - LOADING**2)
    ).astype(np.float32)
    loading, expected, beside = _one_factor(scores, scores)
    np.testing.assert_allclose(np.sign(loading[4]) * loading, LOADING, atol=0.05)
    assert 0 < beside < np.square(expected).mean() < 1
