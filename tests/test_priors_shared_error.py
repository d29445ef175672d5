"""What errors have in common: the field's law, its fit, and what it leaves alone."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kstest, norm

from stflow_fast.priors.shared_error import SharedError, in_pitches

LOADING = np.array([0.2, 0.5, 0.5, 0.7, 0.8, -0.4, 0.6, 0.3], np.float32)


def lattice(n: int, pitch: float = 1.0) -> np.ndarray:
    return pitch * np.column_stack([np.arange(n * n) % n, np.arange(n * n) // n])


def shared(slide: float, near: float, reach: float) -> SharedError:
    return SharedError(LOADING, np.array([slide, near, reach], np.float32))


def fields(error: SharedError, coords: np.ndarray, n: int) -> np.ndarray:
    places = in_pitches(coords)
    return np.stack([error.drawn(places, np.random.default_rng(seed)) for seed in range(n)])


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
    one = error.drawn(in_pitches(lattice(20)), np.random.default_rng(0))
    other = error.drawn(in_pitches(lattice(20, 137.5) + 1e4), np.random.default_rng(0))
    np.testing.assert_allclose(other, one, atol=2e-3)


def test_places_that_are_taken_twice_are_one() -> None:
    coords = lattice(6, 100.0)
    twice = np.concatenate([coords, coords])
    np.testing.assert_allclose(in_pitches(twice)[:36], in_pitches(coords))
    np.testing.assert_allclose(np.ptp(in_pitches(coords), axis=0), [5.0, 5.0])


@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_spots_and_spots_at_one_place(n: int) -> None:
    error = shared(0.1, 0.8, 5.0)
    drawn = error.drawn(in_pitches(np.zeros((n, 2))), np.random.default_rng(0))
    assert drawn.shape == (n,)
    assert np.isfinite(drawn).all()
    scores = np.random.default_rng(0).standard_normal((max(n, 1), 8))
    assert SharedError.fit(scores, scores, [np.zeros((max(n, 1), 2))]).is_possible()


def test_noise_that_it_is_mixed_into_stays_standard_normal() -> None:
    rng = np.random.default_rng(0)
    field, noise = rng.standard_normal(200_000).astype(np.float32), rng.standard_normal((200_000, 8)).astype(np.float32)
    shared(0, 0, 1).mix_in(field, noise)
    expected = np.outer(LOADING, LOADING)
    np.fill_diagonal(expected, 1.0)
    np.testing.assert_allclose(np.cov(noise.T), expected, atol=0.015)


@pytest.mark.parametrize("hidden", [0.0, 0.5, 0.9, 0.97], ids="{:.0%} are zero".format)
def test_a_fit_finds_what_was_drawn(hidden: float) -> None:
    """Of scores below a bound it is known only that they are."""
    loading = np.tile(LOADING, 5)
    error, rng = SharedError(loading, np.array([0.2, 0.6, 4.0], np.float32)), np.random.default_rng(1)
    coords, scores = [lattice(16)] * 24, []
    for number, places in enumerate(coords):
        noise = rng.standard_normal((len(places), len(loading))).astype(np.float32)
        error.mix_in(error.drawn(in_pitches(places), np.random.default_rng(number)), noise)
        scores.append(noise)
    score = np.concatenate(scores)
    bound = np.quantile(score, hidden) if hidden else -np.inf
    found = SharedError.fit(np.where(score < bound, -np.inf, score), np.maximum(score, bound), coords)
    sign = np.sign(found.loading[4])
    np.testing.assert_allclose(sign * found.loading.reshape(5, 8).mean(axis=0), LOADING, atol=0.07)
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


def test_known_scores_have_the_loadings_of_their_correlations() -> None:
    """Of one factor, the correlation of two genes is the product of their loadings."""
    rng = np.random.default_rng(0)
    own = np.sqrt(1 - np.square(LOADING))
    scores = rng.standard_normal((20_000, 1)) * LOADING + rng.standard_normal((20_000, 8)) * own
    found = SharedError.fit(scores, scores, [lattice(100), lattice(100)])
    products = np.outer(found.loading, found.loading)
    np.testing.assert_allclose((products - np.corrcoef(scores.T))[~np.eye(8, dtype=bool)], 0.0, atol=0.03)
    slide, near, _ = found.field
    assert slide + near < 0.1
