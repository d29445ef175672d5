"""Means over neighbours, groups of training slides, and ridges for many alphas."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from sklearn.linear_model import Ridge

from stflow_fast.evaluation import NEAREST, left_out_groups, neighbor_mean
from stflow_fast.evaluation.ridge import RidgePath
from stflow_fast.slides import Slide
from stflow_fast.synthetic import make_cohort


def slide_of(n: int, name: str = "S", seed: int = 0) -> Slide:
    rng = np.random.default_rng(seed)
    return Slide(name, rng.normal(size=(n, 4)), rng.uniform(0, 9000, (n, 2)), [f"{name}-{spot}" for spot in range(n)])


@pytest.mark.parametrize("n", [2, 5, 8, 9, 10, 200])
def test_the_mean_is_over_the_nearest_other_spots(n: int) -> None:
    rng = np.random.default_rng(n)
    coords, values = rng.uniform(0, 100, (n, 2)), rng.normal(size=(n, 3)).astype(np.float32)
    distance = cdist(coords, coords)
    np.fill_diagonal(distance, np.inf)
    nearest = np.argsort(distance, axis=1)[:, : min(NEAREST, n - 1)]
    expected = values.astype(np.float64)[nearest].mean(axis=1)
    assert np.allclose(neighbor_mean(coords, values), expected, rtol=1e-12, atol=1e-12)


def test_a_spot_alone_is_its_own_neighbour() -> None:
    assert neighbor_mean(np.array([[3.0, 4.0]]), np.array([[2.5, -1.0]])).tolist() == [[2.5, -1.0]]


@given(st.lists(st.integers(1, 40), min_size=2, max_size=12), st.integers(2, 6), st.integers(0, 9))
def test_every_slide_is_left_out_once_and_kept_otherwise(sizes: list[int], most: int, seed: int) -> None:
    slides = [replace(slide_of(n), id=f"S{number}") for number, n in enumerate(sizes)]
    splits = left_out_groups(slides, seed, most)
    assert len(splits) == min(len(slides), most)
    everyone = [slide.id for slide in slides]
    assert sorted(slide.id for _, left in splits for slide in left) == sorted(everyone)
    for kept, left in splits:
        outside = {slide.id for slide in left}
        assert [slide.id for slide in kept] == [name for name in everyone if name not in outside]
    spots = [sum(slide.n_spots for slide in left) for _, left in splits]
    if len(slides) > most:
        assert max(spots) - min(spots) <= max(sizes)


def test_the_seed_deals_slides_of_one_size_anew() -> None:
    slides = [replace(slide_of(20), id=f"S{number}") for number in range(12)]

    def dealt(seed: int) -> list[list[str]]:
        return [[slide.id for slide in left] for _, left in left_out_groups(slides, seed)]

    assert dealt(3) == dealt(3)
    assert len({str(dealt(seed)) for seed in range(5)}) > 1


@pytest.mark.parametrize(("n", "groups"), [(1, 0), (2, 2), (40, 4), (41, 4)])
def test_a_slide_alone_is_left_out_by_regions(n: int, groups: int) -> None:
    slide = slide_of(n)
    splits = left_out_groups([slide])
    assert len(splits) == groups
    for [kept], [left] in splits:
        assert sorted([*kept.barcodes, *left.barcodes]) == sorted(slide.barcodes)
        for axis, middle in enumerate(np.median(slide.coords, axis=0)):
            assert len(set(left.coords[:, axis] > middle)) == 1
    assert sorted(name for _, [left] in splits for name in left.barcodes) == (sorted(slide.barcodes) if groups else [])


def test_no_slide_makes_no_group() -> None:
    assert left_out_groups([]) == []


@pytest.mark.parametrize(("n", "columns"), [(60, 8), (20, 50), (30, 30)])
@pytest.mark.parametrize("alpha", [1e1, 1e3, 1e7])
def test_one_decomposition_gives_the_ridge_of_every_alpha(n: int, columns: int, alpha: float) -> None:
    rng = np.random.default_rng(0)
    design, target = rng.normal(2.0, 3.0, (n, columns)), rng.normal(5.0, 1.0, (n, 4))
    unseen = rng.normal(2.0, 3.0, (7, columns))
    path = RidgePath.fit(design, target)
    expected = Ridge(alpha=alpha).fit(design, target).predict(unseen)
    assert np.allclose(path.predict(path.project(unseen), alpha), expected, rtol=1e-10)


def test_regions_of_a_slide_have_features_and_counts() -> None:
    [slide] = make_cohort(n_train=1, train_spots=100, test_spots=20, n_genes=3, feature_dim=8, seed=0).train
    for [kept], [left] in left_out_groups([slide]):
        for part in (kept, left):
            assert part.features.shape == (part.n_spots, 8)
            assert part.counts.shape[0] == part.n_spots
