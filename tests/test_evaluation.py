"""Scores against scipy and scikit-learn; baselines against the numbers that came with the real slides."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import pearsonr
from sklearn.metrics import r2_score

from stflow_fast.errors import InputError
from stflow_fast.evaluation import baselines, compare, score
from stflow_fast.slides import HestTask
from stflow_fast.synthetic import make_cohort

HER2ST = Path(__file__).resolve().parents[2] / "shared" / "data" / "her2st"
NAMES_IN_FILE = {
    "train_mean": "train_mean_constant",
    "hest_ridge": "hest_ridge",
    "ridge_alpha_1e4": "ridge_alpha_1e4",
    "depth_oracle": "oracle_true_depth_of_test_spot",
}


@pytest.fixture(scope="module")
def cohort():
    return make_cohort(n_train=2, train_spots=300, test_spots=400, n_genes=12, feature_dim=32, seed=3)


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    truth = rng.gamma(2.0, size=(60, 9))
    return truth, 0.5 * truth + rng.normal(size=truth.shape)


def names(n):
    return [f"gene{i}" for i in range(n)]


def test_score_equals_scipy_and_sklearn(pair):
    truth, prediction = pair
    result = score(truth, prediction, names(9))
    pearson = [pearsonr(truth[:, g], prediction[:, g]).statistic for g in range(9)]
    r2 = r2_score(truth, prediction, multioutput="raw_values")
    mse = np.square(truth - prediction).mean(axis=0)
    for key, expected in (("pearson", pearson), ("r2", r2), ("mse", mse)):
        assert [gene[key] for gene in result["genes"]] == pytest.approx(list(expected), rel=1e-12)
        assert result[f"{key}_mean"] == pytest.approx(np.mean(expected))
        quartiles = [result[f"{key}_q{q}"] for q in (1, 2, 3)]
        assert quartiles == pytest.approx(list(np.percentile(expected, (25, 50, 75))))
    assert result["pearson_std"] == pytest.approx(np.std(pearson))
    assert (result["n_genes"], result["n_spots"], result["n_constant_genes"]) == (9, 60, 0)
    assert [gene["name"] for gene in result["genes"]] == names(9)


def test_constant_genes_are_counted_and_left_out_of_the_mean(pair):
    truth, prediction = pair
    whole = score(truth, prediction, names(9))
    truth[:, 0] = 0.0  # a gene that the test slide does not express
    prediction[:, 1] = 0.3  # a gene that the model gave up on
    result = score(truth, prediction, names(9))
    assert result["n_constant_genes"] == 2
    assert [gene["pearson"] for gene in result["genes"][:2]] == [None, None]
    assert result["genes"][0]["r2"] is None
    assert result["genes"][1]["r2"] < 0
    assert result["pearson_mean"] == pytest.approx(np.mean([gene["pearson"] for gene in whole["genes"][2:]]))
    json.dumps(result, allow_nan=False)


def test_rounding_noise_on_a_constant_is_constant(pair):
    truth, prediction = (values.astype(np.float32) for values in pair)
    prediction[:, 0] = np.float32(1.7)
    prediction[::2, 0] = np.nextafter(np.float32(1.7), np.float32(2))
    prediction[:, 1] *= 1e-12  # small, but a prediction
    result = score(truth, prediction, names(9))
    assert result["genes"][0]["pearson"] is None
    assert result["genes"][1]["pearson"] is not None


def test_nothing_to_correlate_is_none_everywhere_and_valid_json():
    result = score(np.ones((1, 2)), np.zeros((1, 2)), names(2))
    assert result["pearson_mean"] is result["pearson_std"] is result["r2_q2"] is None
    assert result["n_constant_genes"] == 2
    assert result["mse_mean"] == 1.0
    assert json.loads(json.dumps(result, allow_nan=False)) == result


@pytest.mark.parametrize(
    ("truth", "prediction", "n", "message"),
    [
        (np.ones((4, 3)), np.ones((4, 2)), 3, r"prediction: .*\[4, 3\].*\[4, 2\]"),
        (np.ones((4, 3)), np.ones((4, 3)), 2, "truth: .*2 genes"),
        (np.ones((0, 3)), np.ones((0, 3)), 3, "truth: 0 spots"),
        (np.ones((4, 3)), np.full((4, 3), np.nan), 3, "prediction: 4 of 4 spots are NaN"),
        (np.array([[1.0], [np.inf]]), np.ones((2, 1)), 1, "truth: 1 of 2 spots"),
    ],
)
def test_score_refuses_what_it_cannot_score(truth, prediction, n, message):
    with pytest.raises(InputError, match=message):
        score(truth, prediction, names(n))


def test_depth_oracle_correlates_as_the_depth_of_the_test_spot_does(cohort):
    made = baselines(cohort.train, cohort.test, cohort.genes)["depth_oracle"]
    truth, depth = cohort.test[0].expression(cohort.genes), np.log1p(cohort.test[0].total_counts)
    for gene in range(len(cohort.genes)):
        expected = pearsonr(truth[:, gene], depth).statistic
        assert abs(pearsonr(truth[:, gene], made[:, gene]).statistic) == pytest.approx(abs(expected), abs=1e-4)


def test_baselines_see_nothing_of_the_test_slide_but_its_features_and_depth(cohort):
    made = baselines(cohort.train, cohort.test, cohort.genes)
    test = cohort.test[0]
    order = np.random.default_rng(0).permutation(test.n_spots)
    # Other counts of the same total: each spot's genes are dealt anew.
    shuffled = test.counts.toarray()[:, np.random.default_rng(1).permutation(len(test.gene_names))]
    blind = replace(
        test,
        features=test.features[order],
        counts=type(test.counts)(shuffled[order]),
        gene_names=test.gene_names,
    )
    again = baselines(cohort.train, [blind], cohort.genes)
    for name, prediction in made.items():
        assert prediction.shape == (test.n_spots, len(cohort.genes))
        assert np.allclose(prediction[order], again[name], atol=1e-4), name


def test_baselines_repeat_and_take_any_size(cohort):
    first, second = (baselines(cohort.train, cohort.test, cohort.genes[:1]) for _ in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    few = cohort.train[0].subset(np.arange(5))  # fewer spots than components
    made = baselines([few], cohort.test, cohort.genes)
    assert all(np.isfinite(prediction).all() for prediction in made.values())


def test_baselines_refuse_slides_that_do_not_belong_together(cohort):
    narrow = replace(cohort.test[0], id="narrow", features=cohort.test[0].features[:, :5])
    with pytest.raises(InputError, match="narrow: features have size 5"):
        baselines(cohort.train, [narrow], cohort.genes)
    with pytest.raises(InputError, match="train: no slides"):
        baselines([], cohort.test, cohort.genes)
    with pytest.raises(InputError, match="train: one spot"):
        baselines([cohort.train[0].subset(np.arange(1))], cohort.test, cohort.genes)


def test_compare_scores_pooled_and_per_slide(cohort):
    test = [cohort.test[0], cohort.train[1]]
    truth = [slide.expression(cohort.genes) for slide in test]
    rng = np.random.default_rng(0)
    prediction = np.concatenate(truth) + rng.normal(size=(sum(map(len, truth)), len(cohort.genes)))
    result = compare(cohort.train[:1], test, prediction, cohort.genes)
    own = score(truth[1], prediction[len(truth[0]) :], cohort.genes)
    assert result["per_slide"][test[1].id]["pearson_mean"] == own["pearson_mean"]
    assert list(result["per_slide"]) == [slide.id for slide in test]
    assert result["pearson_mean"] == score(np.concatenate(truth), prediction, cohort.genes)["pearson_mean"]
    assert list(result["baselines"]) == list(NAMES_IN_FILE)
    assert result["baselines"]["train_mean"]["n_constant_genes"] == len(cohort.genes)
    json.dumps(result, allow_nan=False)


def test_compare_refuses_a_slide_given_twice(cohort):
    prediction = np.zeros((2 * cohort.test[0].n_spots, len(cohort.genes)))
    with pytest.raises(InputError, match="ids repeat"):
        compare(cohort.train, cohort.test * 2, prediction, cohort.genes)


@pytest.mark.parametrize("fold", range(3))
def test_baselines_equal_those_published_with_real_slides(fold):
    if not HER2ST.is_dir():
        message = f"{HER2ST} is not there"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    published = json.loads((HER2ST / "baselines.json").read_text())["folds"][fold]
    task = HestTask(HER2ST, "efficientnet_lite0")
    train, test = ([task.slide(name) for name in published[part]] for part in ("train", "test"))
    genes = task.genes()
    n_spots = sum(slide.n_spots for slide in test)
    made = compare(train, test, np.zeros((n_spots, len(genes))), genes)["baselines"]
    for name, name_in_file in NAMES_IN_FILE.items():
        ours, theirs = made[name], published[name_in_file]
        assert ours["pearson_mean"] == pytest.approx(theirs["pearson_mean"], abs=1e-3), name
        assert ours["pearson_std"] == pytest.approx(theirs["pearson_std"], abs=1e-3), name
        assert ours["n_constant_genes"] == theirs["n_undefined_genes"], name
        if "mse" in theirs:
            assert ours["mse_mean"] == pytest.approx(theirs["mse"], abs=1e-3), name
        for slide, expected in theirs["pearson_mean_per_test_slide"].items():
            assert ours["per_slide"][slide]["pearson_mean"] == pytest.approx(expected, abs=1e-3), (
                name,
                slide,
            )
    for name in ("hest_ridge", "ridge_alpha_1e4"):
        ours = {gene["name"]: gene["pearson"] for gene in made[name]["genes"]}
        theirs = {gene: values[name] for gene, values in published["per_gene"].items()}
        assert ours == pytest.approx(theirs, abs=2e-3)
