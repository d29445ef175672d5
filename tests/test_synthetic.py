"""The synthetic cohort behaves like tissue, as far as a model that looks at neighbours can tell."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.spatial import cKDTree
from sklearn.linear_model import Ridge

from stflow_fast.errors import InputError
from stflow_fast.graph import knn_graph
from stflow_fast.slides import Slide
from stflow_fast.synthetic import (
    MARKERS,
    MICRON_PER_PIXEL,
    N_BACKGROUND,
    PITCH_MICRON,
    PROGRAMMES,
    Cohort,
    make_cohort,
)


@pytest.fixture(scope="module")
def cohort() -> Cohort:
    return make_cohort(n_train=2, train_spots=800, test_spots=1500, n_genes=40, feature_dim=64, seed=3)


def assert_same(one: Slide, other: Slide) -> None:
    assert one.id == other.id
    np.testing.assert_array_equal(one.features, other.features)
    np.testing.assert_array_equal(one.coords, other.coords)
    np.testing.assert_array_equal(one.barcodes, other.barcodes)
    assert (one.counts != other.counts).nnz == 0
    assert tuple(one.gene_names) == tuple(other.gene_names)


def log_expression(slide: Slide, genes: tuple[str, ...]) -> np.ndarray:
    column = {name: i for i, name in enumerate(slide.gene_names)}
    return np.log1p(slide.counts[:, [column[gene] for gene in genes]].toarray())


def neighbours(slide: Slide) -> np.ndarray:
    return knn_graph(slide.coords, 6).numpy()


def mean_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over the columns that vary."""
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    norm = np.linalg.norm(a, axis=0) * np.linalg.norm(b, axis=0)
    return float(((a * b).sum(axis=0)[norm > 0] / norm[norm > 0]).mean())


def test_the_same_seed_makes_the_same_cohort_and_another_one_does_not() -> None:
    sizes = {"n_train": 1, "train_spots": 60, "test_spots": 80, "n_genes": 10, "feature_dim": 8}
    first, again, other = make_cohort(**sizes, seed=1), make_cohort(**sizes, seed=1), make_cohort(**sizes, seed=2)
    for one, two in zip(first.train + first.test, again.train + again.test, strict=True):
        assert_same(one, two)
    assert not np.array_equal(first.test[0].features, other.test[0].features)
    assert (first.test[0].counts != other.test[0].counts).nnz > 0


def test_a_slide_does_not_depend_on_how_many_others_there_are_nor_on_their_size() -> None:
    few = make_cohort(n_train=1, train_spots=60, test_spots=80, n_genes=10, feature_dim=8)
    many = make_cohort(n_train=3, train_spots=60, test_spots=120, n_genes=10, feature_dim=8)
    assert_same(few.train[0], many.train[0])
    longer = make_cohort(n_train=3, train_spots=90, test_spots=80, n_genes=10, feature_dim=8)
    assert_same(few.test[0], longer.test[0])


def test_slides_of_a_cohort_differ(cohort: Cohort) -> None:
    first, second = cohort.train
    assert first.id != second.id
    assert not np.array_equal(first.features, second.features)
    assert not np.array_equal(first.coords, second.coords)


def test_sizes_and_names(cohort: Cohort) -> None:
    for slide, n in zip(cohort.train + cohort.test, (800, 800, 1500), strict=True):
        assert slide.features.shape == (n, 64)
        assert slide.counts.shape == (n, 40 + N_BACKGROUND)
        assert tuple(slide.gene_names[:40]) == cohort.genes
        assert len(set(slide.gene_names)) == len(slide.gene_names)
        assert len(set(slide.barcodes)) == n
        assert cohort.programmes[slide.id].shape == (n, len(PROGRAMMES))


def test_spots_are_100_micrometres_apart_on_a_hexagonal_lattice(cohort: Cohort) -> None:
    slide = cohort.test[0]
    assert slide.micron_per_pixel == MICRON_PER_PIXEL
    micron = slide.coords * slide.micron_per_pixel
    distance = cKDTree(micron).query(micron, k=7)[0][:, 1:]
    np.testing.assert_allclose(distance[:, 0], PITCH_MICRON, rtol=1e-5)
    inside = np.isclose(distance, PITCH_MICRON, rtol=1e-5).all(axis=1)  # six neighbours at one pitch
    assert inside.mean() > 0.8


def test_counts_are_whole_over_dispersed_and_zero_inflated(cohort: Cohort) -> None:
    counts = cohort.test[0].counts.toarray()
    assert (counts >= 0).all()
    assert (counts == np.round(counts)).all()
    mean, variance = counts.mean(axis=0), counts.var(axis=0)
    frequent = mean > 1
    assert frequent.sum() > 100
    assert np.median(variance[frequent] / mean[frequent]) > 1.5
    # Where a negative binomial of the same mean and variance has no zero to speak of, there are zeros all the same.
    size = mean**2 / np.maximum(variance - mean, 1e-9)
    expected = (size / (size + mean)) ** size
    plentiful = mean > 20
    assert plentiful.sum() > 5
    assert ((counts == 0).mean(axis=0) - expected)[plentiful].min() > 0.02


def test_depth_differs_between_spots_and_between_slides(cohort: Cohort) -> None:
    totals = [np.asarray(slide.counts.sum(axis=1)).ravel() for slide in cohort.train + cohort.test]
    assert all(total.std() / total.mean() > 0.2 for total in totals)
    medians = np.array([np.median(total) for total in totals])
    assert medians.max() / medians.min() > 1.1


def test_neighbours_share_programmes_but_not_the_noise_of_their_patches(cohort: Cohort) -> None:
    slide = cohort.test[0]
    near, programmes = neighbours(slide)[:, 0], cohort.programmes[slide.id]
    assert mean_correlation(programmes, programmes[near]) > 0.8
    # What the programmes leave unexplained in the features is the patch's own; quadratic, because the view saturates.
    one, other = np.triu_indices(len(PROGRAMMES))
    known = np.column_stack([programmes, programmes[:, one] * programmes[:, other]])
    noise = slide.features - Ridge(alpha=1e-3).fit(known, slide.features).predict(known)
    assert noise.std() > 0.3
    assert abs(mean_correlation(noise, noise[near])) < 0.03


def test_the_patches_around_a_spot_predict_it_better_than_its_own(cohort: Cohort) -> None:
    def score(of_slide: Callable[[Slide], np.ndarray]) -> float:
        train = np.concatenate([of_slide(slide) for slide in cohort.train])
        known = np.concatenate([log_expression(slide, cohort.genes) for slide in cohort.train])
        [test] = cohort.test
        found = Ridge(alpha=100.0).fit(train, known).predict(of_slide(test))
        return mean_correlation(found, log_expression(test, cohort.genes))

    own = score(lambda slide: slide.features)
    around = score(lambda slide: slide.features[neighbours(slide)].mean(axis=1))
    assert own > 0.15
    assert around > own + 0.05


def test_markers_follow_their_programme(cohort: Cohort) -> None:
    slide = cohort.test[0]
    programmes = cohort.programmes[slide.id]
    own, others = [], []
    for p, names in enumerate(MARKERS.values()):
        genes = tuple(name for name in names if name in cohort.genes)
        expression = log_expression(slide, genes)
        for q in range(len(PROGRAMMES)):
            value = mean_correlation(np.repeat(programmes[:, [q]], len(genes), axis=1), expression)
            (own if q == p else others).append(value)
    assert np.mean(own) > 0.3
    assert np.mean(own) > np.mean(others) + 0.3


@pytest.mark.parametrize("n_genes", [1, 8, 51, 700])
def test_panels_of_any_size(n_genes: int) -> None:
    made = make_cohort(n_train=1, train_spots=30, test_spots=30, n_genes=n_genes, feature_dim=4)
    assert len(made.genes) == len(set(made.genes)) == n_genes
    [slide] = made.test
    assert slide.counts.shape[1] == len(set(slide.gene_names)) == n_genes + N_BACKGROUND


def test_a_slide_of_one_spot() -> None:
    made = make_cohort(n_train=1, train_spots=1, test_spots=1, n_genes=3, feature_dim=1)
    assert made.test[0].features.shape == (1, 1)
    assert np.isfinite(made.test[0].features).all()


@pytest.mark.parametrize("name", ["n_train", "train_spots", "test_spots", "n_genes", "feature_dim"])
@pytest.mark.parametrize("value", [0, -3])
def test_a_count_below_one_is_refused_by_name(name: str, value: int) -> None:
    with pytest.raises(InputError, match=f"{name}: must be 1 or larger, not {value}"):
        make_cohort(**{name: value})


def test_a_negative_seed_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="seed: must be 0 or larger, not -1"):
        make_cohort(seed=-1)
