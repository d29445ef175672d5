"""Scores against scipy and scikit-learn; baselines against the numbers that came with the real slides."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from scipy.spatial import cKDTree
from scipy.stats import pearsonr, spearmanr
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import stflow_fast.evaluation.scores as scores
from stflow_fast.errors import InputError
from stflow_fast.evaluation import ALPHAS, STRONG_ALPHA, Structure, baselines, compare, left_out_groups, score
from stflow_fast.slides import HestTask, StoredRows
from stflow_fast.synthetic import make_cohort

HER2ST = Path(__file__).resolve().parents[2] / "shared" / "data" / "her2st"
NAMES_IN_FILE = {
    "train_mean": "train_mean_constant",
    "hest_ridge": "hest_ridge",
    "ridge_alpha_1e4": "ridge_alpha_1e4",
    "depth_oracle": "oracle_true_depth_of_test_spot",
}
CHOSEN = ("ridge", "ridge_smoothed", "ridge_neighbors")


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
    spearman = [spearmanr(truth[:, g], prediction[:, g]).statistic for g in range(9)]
    for key, expected in (("pearson", pearson), ("spearman", spearman), ("r2", r2), ("mse", mse)):
        assert [gene[key] for gene in result["genes"]] == pytest.approx(list(expected), rel=1e-12)
        assert result[f"{key}_mean"] == pytest.approx(np.mean(expected))
        quartiles = [result[f"{key}_q{q}"] for q in (1, 2, 3)]
        assert quartiles == pytest.approx(list(np.percentile(expected, (25, 50, 75))))
    assert result["pearson_std"] == pytest.approx(np.std(pearson))
    assert (result["n_genes"], result["n_spots"], result["n_constant_genes"]) == (9, 60, 0)
    assert [gene["name"] for gene in result["genes"]] == names(9)


def test_spearman_gives_ties_their_mean_rank():
    rng = np.random.default_rng(0)
    truth, prediction = rng.poisson(0.7, (200, 4)), rng.poisson(1.5, (200, 4))
    result = score(truth, prediction, names(4))
    assert [gene["detected"] for gene in result["genes"]] == (truth > 0).mean(axis=0).tolist()
    for g, gene in enumerate(result["genes"]):
        assert gene["spearman"] == pytest.approx(spearmanr(truth[:, g], prediction[:, g]).statistic, rel=1e-12)
    assert score(truth, np.exp(prediction), names(4))["spearman_mean"] == pytest.approx(result["spearman_mean"])


@pytest.mark.parametrize("at_once", [1, 130, 200])
def test_genes_are_scored_alike_in_blocks_of_any_size(pair, monkeypatch, at_once):
    truth, prediction = pair
    truth[:, 2] = 4.0
    whole = score(truth, prediction, names(9))
    monkeypatch.setattr(scores, "NUMBERS_AT_ONCE", at_once)
    assert score(truth, prediction, names(9)) == whole


def test_constant_genes_are_counted_and_left_out_of_the_mean(pair):
    truth, prediction = pair
    whole = score(truth, prediction, names(9))
    truth[:, 0] = 0.0  # a gene that the test slide does not express
    prediction[:, 1] = 0.3  # a gene that the model gave up on
    result = score(truth, prediction, names(9))
    assert result["n_constant_genes"] == 2
    assert [gene["pearson"] for gene in result["genes"][:2]] == [None, None]
    assert [gene["spearman"] for gene in result["genes"][:2]] == [None, None]
    assert result["genes"][0]["r2"] is None
    assert result["genes"][1]["r2"] < 0
    for key in ("pearson", "spearman"):
        assert result[f"{key}_mean"] == pytest.approx(np.mean([gene[key] for gene in whole["genes"][2:]]))
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
    assert result["pearson_mean"] is result["spearman_mean"] is result["pearson_std"] is result["r2_q2"] is None
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
    made = baselines(cohort.train, cohort.test, cohort.genes)["depth_oracle"].prediction
    truth, depth = cohort.test[0].expression(cohort.genes), np.log1p(cohort.test[0].total_counts)
    for gene in range(len(cohort.genes)):
        expected = pearsonr(truth[:, gene], depth).statistic
        assert abs(pearsonr(truth[:, gene], made[:, gene]).statistic) == pytest.approx(abs(expected), abs=1e-4)


def test_baselines_see_nothing_of_the_test_slide_but_its_features_and_depth(cohort):
    [test] = scattered(cohort.test)  # on a lattice the order of spots decides between neighbours at one distance
    made = baselines(cohort.train, [test], cohort.genes)
    order = np.random.default_rng(0).permutation(test.n_spots)
    # Other counts of the same total: each spot's genes are dealt anew.
    shuffled = test.counts.toarray()[:, np.random.default_rng(1).permutation(len(test.gene_names))]
    blind = replace(
        test,
        features=test.features[order],
        coords=test.coords[order],
        counts=type(test.counts)(shuffled[order]),
        gene_names=test.gene_names,
    )
    again = baselines(cohort.train, [blind], cohort.genes)
    for name, baseline in made.items():
        assert baseline.prediction.shape == (test.n_spots, len(cohort.genes))
        assert np.allclose(baseline.prediction[order], again[name].prediction, atol=1e-4), name
        assert baseline.settings == again[name].settings


def test_baselines_repeat_and_take_any_size(cohort):
    first, second = (baselines(cohort.train, cohort.test, cohort.genes[:1]) for _ in range(2))
    assert all(np.array_equal(first[name].prediction, second[name].prediction) for name in first)
    assert all(first[name].settings == second[name].settings for name in first)


@pytest.mark.parametrize("n_spots", [2, 3, 5, 9, 300])  # fewer than neighbours, than components; a slide alone
def test_baselines_take_a_slide_of_any_size(cohort, n_spots):
    few = cohort.train[0].subset(np.arange(n_spots))
    made = baselines([few], [cohort.test[0], few.subset(np.arange(1))], cohort.genes)
    for name, baseline in made.items():
        assert np.isfinite(baseline.prediction).all(), name
        assert baseline.prediction.shape == (401, len(cohort.genes))
    chosen = [made[name].settings["alpha"] for name in CHOSEN]
    assert set(chosen) <= set(ALPHAS)
    if n_spots == 2:  # the spot that is left out has no correlation
        assert chosen == [STRONG_ALPHA] * 3


def independent_components(fitted, unseen):
    """HEST-bench's components of the features of slides."""
    pipeline = make_pipeline(StandardScaler(), PCA(32, random_state=1))
    pipeline.fit(np.concatenate([slide.features for slide in fitted]))
    return [[pipeline.transform(slide.features) for slide in slides] for slides in (fitted, unseen)]


def independent_neighbors(fitted, unseen):
    """Features standardised by their slide, beside their mean over neighbours."""
    found = []
    for slide in (*fitted, *unseen):
        own = StandardScaler().fit_transform(slide.features.astype(np.float64))
        found.append(np.hstack([own, neighbors_mean(slide, own)]))
    return found[: len(fitted)], found[len(fitted) :]


def neighbors_mean(slide, values):
    _, nearest = cKDTree(slide.coords).query(slide.coords, 9)
    return values[nearest[:, 1:]].mean(axis=1)


def independent_ridge(name, fitted, unseen, genes, alpha):
    """Predictions for each unseen slide, by scikit-learn and with the smoothing after the prediction."""
    designs = independent_neighbors if name == "ridge_neighbors" else independent_components
    known, seen = designs(fitted, unseen)
    target = np.concatenate([slide.expression(genes) for slide in fitted]).astype(np.float64)
    ridge = Ridge(alpha=alpha).fit(np.concatenate(known), target)
    made = [ridge.predict(values) for values in seen]
    if name != "ridge_smoothed":
        return made
    return [0.75 * one + 0.25 * neighbors_mean(slide, one) for slide, one in zip(unseen, made, strict=True)]


def scattered(slides):
    """The same slides where no two distances are equal."""
    rng = np.random.default_rng(5)
    return [replace(slide, coords=slide.coords + rng.normal(scale=20.0, size=slide.coords.shape)) for slide in slides]


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("n_train", [1, 3])
def test_alpha_is_the_one_that_predicts_left_out_training_slides_best(name, n_train):
    cohort = make_cohort(n_train=n_train, train_spots=150, test_spots=100, n_genes=6, feature_dim=32, seed=7)
    train, test, genes = scattered(cohort.train), scattered(cohort.test), cohort.genes
    made = baselines(train, test, genes)[name]
    reached = dict.fromkeys(ALPHAS, 0.0)
    for alpha in ALPHAS:
        for kept, left in left_out_groups(train):
            for slide, one in zip(left, independent_ridge(name, kept, left, genes, alpha), strict=True):
                truth = slide.expression(genes)
                reached[alpha] += np.mean([pearsonr(truth[:, g], one[:, g]).statistic for g in range(6)])
    assert made.settings == {"alpha": max(reached, key=reached.get)}
    expected = np.concatenate(independent_ridge(name, train, test, genes, made.settings["alpha"]))
    assert np.allclose(made.prediction, expected, atol=1e-4)


def test_baselines_read_features_that_are_stored(cohort, tmp_path):
    slide = cohort.train[0]
    with h5py.File(tmp_path / "features.h5", "w") as file:
        file["features"] = slide.features
    table = StoredRows(tmp_path / "features.h5", "features", 0, slide.n_spots, slide.feature_dim, slide.features.dtype)
    stored = replace(slide, features=table)
    made, again = (baselines([first], cohort.test, cohort.genes) for first in (slide, stored))
    assert all(np.array_equal(made[name].prediction, again[name].prediction) for name in made)


def test_features_that_are_constant_on_a_slide_say_nothing_there(cohort):
    """Of another slide they may be other constants: what differs between slides alone is no tissue."""
    train, test = (
        [
            replace(slide, features=np.hstack([slide.features, np.full((slide.n_spots, 1), 0.1 * (1 + number))]))
            for number, slide in enumerate(slides)
        ]
        for slides in (cohort.train, cohort.test)
    )
    with_constant, without = (
        baselines(*slides, cohort.genes)["ridge_neighbors"] for slides in ((train, test), (cohort.train, cohort.test))
    )
    assert with_constant.settings == without.settings
    assert np.allclose(with_constant.prediction, without.prediction, atol=1e-5)


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
    for key in ("pearson_mean", "spearman_mean"):
        assert result["per_slide"][test[1].id][key] == own[key]
    assert list(result["per_slide"]) == [slide.id for slide in test]
    assert result["pearson_mean"] == score(np.concatenate(truth), prediction, cohort.genes)["pearson_mean"]
    assert list(result["baselines"]) == [
        "train_mean",
        "hest_ridge",
        "ridge_alpha_1e4",
        *CHOSEN,
        "depth_oracle",
    ]
    assert result["baselines"]["train_mean"]["n_constant_genes"] == len(cohort.genes)
    json.dumps(result, allow_nan=False)


def test_compare_says_what_is_tissue_and_what_is_depth(cohort):
    test, genes = cohort.test, cohort.genes
    truth = test[0].expression(genes)
    result = compare(cohort.train, test, truth, genes)
    assert result["pearson_mean"] == pytest.approx(1.0)
    deep = score(test[0].expression(genes, "cp10k_log1p"), truth, genes)
    assert result["depth_normalised"] == {key: deep[key] for key in ("pearson_mean", "spearman_mean")}
    oracle = result["baselines"]["depth_oracle"]
    assert abs(oracle["depth_normalised"]["pearson_mean"]) < oracle["pearson_mean"]
    other = compare(cohort.train, test, test[0].expression(genes, "cp10k_log1p"), genes, "cp10k_log1p")
    assert "depth_normalised" not in other


def test_compare_sets_the_structure_of_a_prediction_beside_that_of_the_truth(cohort):
    truth = cohort.test[0].expression(cohort.genes)
    noise = truth[np.random.default_rng(0).permutation(len(truth))]
    result = compare(cohort.train, cohort.test, noise, cohort.genes)
    structure = Structure([cohort.test[0].coords], [truth])
    assert result["structure_of_truth"] == structure.beside([truth])
    assert result["structure"] == structure.beside([noise])
    assert abs(result["structure"]["morans_i_mean"]) < result["structure_of_truth"]["morans_i_mean"]
    ridges = result["baselines"]
    smoothed, plain = (ridges[name]["structure"]["morans_i_mean"] for name in ("ridge_smoothed", "ridge_alpha_1e4"))
    assert smoothed > plain


def test_compare_reports_the_alpha_of_every_ridge(cohort):
    made = compare(cohort.train, cohort.test, cohort.test[0].expression(cohort.genes), cohort.genes)["baselines"]
    for name in CHOSEN:
        assert made[name]["alpha"] in ALPHAS
    assert made["hest_ridge"]["alpha"] == 100 / (32 * len(cohort.genes))
    assert made["ridge_alpha_1e4"]["alpha"] == STRONG_ALPHA
    assert "alpha" not in made["train_mean"]


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
