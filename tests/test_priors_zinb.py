"""The zero-inflated negative binomial of counts: likelihood, fit, draws, distribution function."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from stflow_fast.errors import InputError
from stflow_fast.priors import zinb

GENES = list(itertools.product((0.05, 0.3, 1.0, 5.0, 20.0), (0.3, 1.0, 3.0, 10.0), (0.0, 0.1, 0.3, 0.6)))
MEAN, THETA, PI = map(np.array, zip(*GENES, strict=True))
N_SPOTS = 5000

laws = st.tuples(st.floats(1e-3, 50.0), st.floats(1e-2, 1e3), st.floats(0.0, 0.95))


def simulated(base: np.ndarray, seed: int = 0) -> np.ndarray:
    """By numpy's own negative binomial; [N, G]."""
    rng = np.random.default_rng(seed)
    counts = rng.negative_binomial(THETA, THETA / (THETA + MEAN * base))
    counts[rng.random(counts.shape) < PI] = 0
    return counts


def bases() -> list[np.ndarray | None]:
    return [None, np.random.default_rng(1).lognormal(0.0, 0.7, (N_SPOTS, len(GENES)))]


@given(laws, st.integers(0, 30))
def test_the_likelihood_is_that_of_scipys_negative_binomial_with_excess_zeros(
    law: tuple[float, float, float], count: int
) -> None:
    mean, theta, pi = law
    regular = (1 - pi) * scipy.stats.nbinom.pmf(count, theta, theta / (theta + mean))
    expected = np.log(regular + pi * (count == 0))
    found = zinb.log_likelihood(np.array([count]), np.array([mean]), np.array([theta]), np.array([pi]))
    np.testing.assert_allclose(found, [expected], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("base", bases(), ids=["marginal", "around a base"])
def test_parameters_are_recovered_within_sampling_error(base: np.ndarray | None) -> None:
    """Gene by gene, by the likelihood ratio of three parameters: it exceeds its bound in one of a million genes."""
    of_spots = np.ones((N_SPOTS, len(GENES))) if base is None else base
    counts = simulated(of_spots)
    found = zinb.fit(counts, base)
    at_fit = zinb.log_likelihood(counts, found.scale * of_spots, found.theta, found.pi).sum(axis=0)
    at_truth = zinb.log_likelihood(counts, MEAN * of_spots, THETA, PI).sum(axis=0)
    ratio = 2 * (at_fit - at_truth)
    assert (ratio >= -2 * zinb.FLAT).all()
    assert (ratio < scipy.stats.chi2.isf(1e-6, 3)).all()
    rich = (MEAN >= 5) & (THETA >= 1)
    np.testing.assert_allclose(found.scale[rich], MEAN[rich], rtol=0.15)
    np.testing.assert_allclose(found.theta[rich], THETA[rich], rtol=0.3)
    np.testing.assert_allclose(found.pi[rich], PI[rich], atol=0.06)
    assert not found.fell_back[MEAN >= 1].any()


@pytest.mark.parametrize("base", bases(), ids=["marginal", "around a base"])
def test_no_optimiser_that_starts_from_the_truth_finds_a_higher_likelihood(base: np.ndarray | None) -> None:
    of_spots = np.ones((N_SPOTS, len(GENES))) if base is None else base
    counts = simulated(of_spots, seed=2)
    found = zinb.fit(counts, base)
    for gene in range(0, len(GENES), 7):

        def value(scale: float, theta: float, pi: float, gene: int = gene) -> float:
            mean = scale * of_spots[:, gene]
            return float(zinb.log_likelihood(counts[:, gene], mean, np.array(theta), np.array(pi)).sum())

        by_scipy = scipy.optimize.minimize(
            lambda x, value=value: -value(np.exp(x[0]), np.exp(x[1]), x[2]),
            [np.log(MEAN[gene]), np.log(THETA[gene]), PI[gene]],
            bounds=[(None, None), tuple(np.log(zinb.THETA_RANGE)), (0.0, 1 - 1e-6)],
        )
        assert value(found.scale[gene], found.theta[gene], found.pi[gene]) > -by_scipy.fun - 2 * zinb.FLAT


@pytest.mark.parametrize("base", bases(), ids=["marginal", "around a base"])
def test_genes_are_fitted_alone_however_they_come(base: np.ndarray | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """To where rounding ends the climb: rich genes in all digits that matter, all genes in their likelihood."""
    counts = simulated(np.ones((N_SPOTS, len(GENES))))[:300]
    base = None if base is None else base[:300]
    of_spots = np.ones(counts.shape) if base is None else base
    expected, rich = zinb.fit(counts, base), (MEAN >= 5) & (THETA <= 3)
    reached = zinb.log_likelihood(counts, expected.scale * of_spots, expected.theta, expected.pi).sum(axis=0)
    monkeypatch.setattr(zinb, "AT_ONCE", 300 * 7)
    for given_as in (counts.astype(np.float32), scipy.sparse.csr_matrix(counts), scipy.sparse.coo_matrix(counts)):
        found = zinb.fit(given_as, base)
        value = zinb.log_likelihood(counts, found.scale * of_spots, found.theta, found.pi).sum(axis=0)
        np.testing.assert_allclose(value, reached, rtol=0, atol=zinb.FLAT)
        for part, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(part[rich], wanted[rich], rtol=1e-3, atol=1e-4)


def test_what_the_counts_cannot_tell_falls_back_and_says_so() -> None:
    rng = np.random.default_rng(0)
    n = 400
    one = np.zeros(n)
    one[7] = 1
    even = np.tile([1, 2], n // 2)
    excess = np.where(rng.random(n) < 0.5, 0, np.tile([3, 4, 5, 4], n // 4))
    spread = rng.negative_binomial(0.5, 0.5 / (0.5 + 4.0), n)
    found = zinb.fit(np.column_stack([np.zeros(n), one, even, excess, spread]))
    assert found.fell_back.tolist() == [True, True, True, True, False]
    np.testing.assert_allclose(found.theta[:4], zinb.THETA_RANGE[1])
    np.testing.assert_allclose(found.scale[:3], [zinb.SMALLEST_SCALE, 1 / n, 1.5], rtol=1e-6)
    assert found.pi[:3].tolist() == [0, 0, 0]
    assert abs(found.pi[3] - 0.5) < 0.1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2000), min_size=3, max_size=3), min_size=1, max_size=30), st.booleans())
def test_a_fit_is_never_worse_than_poissons(rows: list[list[int]], with_base: bool) -> None:
    counts = np.array(rows)
    base = np.random.default_rng(0).lognormal(size=counts.shape) if with_base else np.ones(counts.shape)
    found = zinb.fit(counts, base if with_base else None)
    assert all(np.isfinite(part).all() for part in found)
    assert ((found.theta > 0) & (found.scale > 0) & (found.pi >= 0) & (found.pi < 1)).all()
    poisson = np.maximum(counts.sum(axis=0) / base.sum(axis=0), zinb.SMALLEST_SCALE)
    at_poisson = zinb.log_likelihood(counts, poisson * base, np.array(zinb.THETA_RANGE[1]), np.array(0.0)).sum(axis=0)
    at_fit = zinb.log_likelihood(counts, found.scale * base, found.theta, found.pi).sum(axis=0)
    assert (at_fit >= at_poisson - 1e-6).all()


def test_impossible_fits_are_refused() -> None:
    with pytest.raises(InputError, match="counts: of no spots"):
        zinb.fit(np.zeros((0, 3)))
    for base in (np.zeros((2, 3)), np.ones((2, 2))):
        with pytest.raises(InputError, match=r"base: must be above 0 and of shape \[2, 3\]"):
            zinb.fit(np.zeros((2, 3)), base)
    assert all(part.shape == (0,) for part in zinb.fit(np.zeros((2, 0))))


@given(laws, st.floats(0.0, 0.9999))
def test_a_quantile_is_the_smallest_count_that_reaches_its_probability(
    law: tuple[float, float, float], probability: float
) -> None:
    mean, theta, pi = map(np.array, law)
    count = zinb.quantile(np.array(probability), mean, theta, pi)
    assert count >= 0
    assert count == np.round(count)
    assert zinb.cdf(count, mean, theta, pi) >= probability - 1e-9
    assert count == 0 or zinb.cdf(count - 1, mean, theta, pi) < probability + 1e-9


def test_the_distribution_function_sums_the_likelihood() -> None:
    counts = np.arange(200)[:, None]
    mean, theta, pi = np.array([0.3, 8.0]), np.array([0.5, 4.0]), np.array([0.0, 0.4])
    summed = np.cumsum(np.exp(zinb.log_likelihood(counts, mean, theta, pi)), axis=0)
    np.testing.assert_allclose(zinb.cdf(counts, mean, theta, pi), summed, rtol=1e-9)
    assert not zinb.cdf(np.array(-1.0), mean, theta, pi).any()


def test_draws_have_the_law() -> None:
    n = 40_000
    mean, theta, pi = np.broadcast_to([0.2, 3.0, 15.0], (n, 3)), np.array([0.4, 2.0, 1e4]), np.array([0.0, 0.3, 0.1])
    drawn = zinb.draw(mean, theta, pi, np.random.default_rng(0).spawn(3))
    assert drawn.dtype == np.float32
    for count in (0, 1, 3, 15):
        expected = zinb.cdf(np.array(count), mean[0], theta, pi)
        bound = 5 * np.sqrt(expected * (1 - expected) / n) + 1e-12
        assert (np.abs((drawn <= count).mean(axis=0) - expected) < bound).all()
