"""Priors: their distributions, and noise that belongs to a seed, a slide and a spot."""

from __future__ import annotations

import numpy as np
import pytest

from stflow_fast.errors import InputError
from stflow_fast.priors import PRIORS, Prior, slide_seed


def test_zinb_has_the_published_distribution() -> None:
    """theta 1 and logits 0.1 make a geometric distribution of mean e^0.1; half of the draws are excess zeros."""
    counts = np.expm1(Prior("zinb").draw(2000, 500, np.random.SeedSequence(0)))
    mean, n = np.exp(0.1), counts.size
    stop = 1 / (1 + mean)
    expected = [0.5 + 0.5 * stop, 0.5 * stop * (1 - stop), 0.5 * stop * (1 - stop) ** 2]
    for value, probability in enumerate(expected):
        share = np.isclose(counts, value, atol=1e-3).mean()
        assert abs(share - probability) < 5 * np.sqrt(probability * (1 - probability) / n)
    assert abs(counts.mean() - mean / 2) < 0.01


def test_the_other_priors() -> None:
    assert not Prior("zero").draw(10, 3, np.random.SeedSequence(0)).any()
    drawn = Prior("gaussian").draw(2000, 500, np.random.SeedSequence(0))
    assert abs(drawn.mean()) < 0.005
    assert abs(drawn.std() - 1) < 0.005


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"name": "normal"}, "prior"), ({"total_count": 0.0}, "total_count"), ({"logits": float("nan")}, "logits")],
)
def test_impossible_priors_are_refused(settings: dict[str, object], field: str) -> None:
    with pytest.raises(InputError, match=f"{field}: must be"):
        Prior(**settings)


@pytest.mark.parametrize("name", PRIORS)
def test_noise_of_a_spot_does_not_depend_on_the_spots_behind_it(name: str) -> None:
    seed = slide_seed(0, "a")
    assert np.array_equal(
        Prior(name, total_count=2.5).draw(5, 7, seed), Prior(name, total_count=2.5).draw(9, 7, seed)[:5]
    )


def test_noise_belongs_to_seed_and_slide() -> None:
    def draw(seed: int, name: str) -> np.ndarray:
        return Prior().draw(30, 4, slide_seed(seed, name))

    assert np.array_equal(draw(0, "a"), draw(0, "a"))
    assert not np.array_equal(draw(0, "a"), draw(1, "a"))
    assert not np.array_equal(draw(0, "a"), draw(0, "b"))
