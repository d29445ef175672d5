"""Sources that are fitted on training slides: their laws, what a draw depends on, and how they are kept."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stflow_fast.errors import InputError
from stflow_fast.priors import PRIORS, SOURCES, FittedSource, Prior, fit_source, load_source, slide_seed, zinb
from stflow_fast.slides import Slide

GENES = ("A", "B", "C", "D")
FITTED = SOURCES[len(PRIORS) :]
SEED = slide_seed(3, "a")


def slide(name: str, n: int = 400) -> Slide:
    """Gene A follows the first feature, B and C do not follow any, D is never there; E is of no panel."""
    rng = np.random.default_rng([n, *name.encode()])
    features = rng.normal(size=(n, 6)).astype(np.float32)
    mean = np.column_stack([np.exp(1 + features[:, 0]), np.full(n, 3.0), np.full(n, 0.4), np.zeros(n), np.full(n, 9.0)])
    counts = rng.poisson(rng.gamma(2.0, 0.5, mean.shape) * mean)
    counts[rng.random(counts.shape) < 0.2] = 0
    counts = scipy.sparse.csr_matrix(counts.astype(np.float32))
    return Slide(name, features, rng.uniform(size=(n, 2)) * 1000, np.arange(n).astype(str), counts, (*GENES, "E"))


SLIDES = [slide(name) for name in "abc"]


def fitted(name: str, normalize: str = "log1p") -> FittedSource:
    return fit_source(name, SLIDES, GENES, normalize)


def drawn_by_blocks(source: FittedSource, sizes: list[int], features: object) -> np.ndarray:
    draw = source.spots(len(GENES), SEED, features)
    return np.concatenate([draw(size) for size in sizes])


@pytest.mark.parametrize("name", FITTED)
@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=6), st.integers(0, 40))
def test_a_spots_bits_do_not_depend_on_blocks_nor_on_the_spots_behind(name: str, sizes: list[int], behind: int) -> None:
    source, n = KEPT[name], sum(sizes)
    features = np.random.default_rng(0).normal(size=(n + behind, 6)).astype(np.float32)
    whole = source.draw(n + behind, len(GENES), SEED, features)
    assert whole.dtype == np.float32
    assert np.array_equal(drawn_by_blocks(source, sizes, features[:n]), whole[:n])
    assert np.array_equal(drawn_by_blocks(source, sizes, torch.from_numpy(features)), whole[:n])


@pytest.mark.parametrize("name", FITTED)
def test_bits_do_not_depend_on_how_much_is_drawn_together(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "conditional":
        pytest.skip("its products have a size that no call chooses")
    expected = KEPT[name].draw(50, len(GENES), SEED)
    for module in ("prior", "fitted"):
        monkeypatch.setattr(f"stflow_fast.priors.{module}.PIECE", 10)
    assert np.array_equal(KEPT[name].draw(50, len(GENES), SEED), expected)


@pytest.mark.parametrize("name", FITTED)
def test_slides_and_seeds_have_noise_of_their_own(name: str) -> None:
    features = SLIDES[0].features
    draws = [KEPT[name].draw(400, 4, slide_seed(*of), features) for of in ((0, "a"), (1, "a"), (0, "b"))]
    assert not np.array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])


def test_zinb_genes_draws_the_law_of_each_gene() -> None:
    n, source = 60_000, KEPT["zinb-genes"]
    counts = np.expm1(source.draw(n, len(GENES), SEED).astype(np.float64))
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-3)
    zeros = zinb.cdf(np.array(0), source.mean, source.theta, source.pi)
    assert (np.abs((counts < 0.5).mean(axis=0) - zeros) < 5 * np.sqrt(zeros * (1 - zeros) / n) + 1e-6).all()
    mean = (1 - source.pi) * source.mean
    variance = mean * (1 + source.mean / source.theta + source.pi * source.mean)
    assert (np.abs(counts.mean(axis=0) - mean) < 5 * np.sqrt(variance / n) + 1e-6).all()
    np.testing.assert_allclose(counts.var(axis=0), variance, rtol=0.1, atol=1e-6)


def test_zinb_genes_has_the_mean_and_the_zeros_of_training() -> None:
    truth = np.concatenate([spots.expression(GENES, "counts") for spots in SLIDES])
    counts = fitted("zinb-genes", "counts").draw(60_000, len(GENES), SEED)
    np.testing.assert_allclose(counts.mean(axis=0), truth.mean(axis=0), rtol=0.1, atol=1e-6)
    np.testing.assert_allclose((counts == 0).mean(axis=0), (truth == 0).mean(axis=0), atol=0.03)
    assert KEPT["zinb-genes"].to_dict()["fitted_on"]["fell_back"] == 1  # D


@pytest.mark.parametrize("name", ["zinb-grid", "zinb-genes", "conditional"])
def test_counts_are_what_log1p_is_of(name: str) -> None:
    counts = fitted(name, "counts").draw(200, len(GENES), SEED, SLIDES[0].features)
    assert np.array_equal(np.log1p(counts), KEPT[name].draw(200, len(GENES), SEED, SLIDES[0].features))
    with pytest.raises(InputError, match=f"source: {name} draws counts, .* normalize by log1p or counts, or take"):
        fitted(name, "cp10k_log1p")


def test_zinb_grid_is_the_point_that_the_counts_came_from() -> None:
    rng, theta, logits = np.random.default_rng(0), 2.0, 0.4
    counts = rng.negative_binomial(theta, 1 / (1 + np.exp(logits)), (4000, 4))
    counts[rng.random(counts.shape) < 0.5] = 0
    counts = scipy.sparse.csr_matrix(counts.astype(np.float32))
    made = Slide("a", None, rng.uniform(size=(4000, 2)) * 1000, np.arange(4000).astype(str), counts, GENES)
    found = fit_source("zinb-grid", [made], GENES, "log1p")
    assert isinstance(found, Prior)
    assert (found.name, found.total_count, found.logits, found.zi_logits) == ("zinb-grid", theta, logits, 0.0)
    assert np.array_equal(found.draw(9, 4, SEED), Prior("zinb", theta, logits, 0.0).draw(9, 4, SEED))


@pytest.mark.parametrize("normalize", ["log1p", "cp10k_log1p", "counts"])
def test_empirical_draws_are_whole_training_spots(normalize: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stflow_fast.priors.fitted.STORED_BYTES", 4 * len(GENES) * 700)
    source = fitted("empirical", normalize)
    rows = {row.tobytes() for spots in SLIDES for row in spots.expression(GENES, normalize)}
    drawn = source.draw(5000, len(GENES), SEED)
    assert {row.tobytes() for row in drawn} <= rows
    assert source.expression.shape == (700, len(GENES))
    _, times = np.unique(drawn, axis=0, return_counts=True)
    np.testing.assert_allclose(drawn.mean(axis=0), source.expression.mean(axis=0), rtol=0.1)
    assert len(times) > 200


def test_conditional_follows_the_features() -> None:
    new = slide("new", 3000)
    source = fitted("conditional", "counts")
    counts = np.mean([source.draw(3000, 4, slide_seed(seed, "new"), new.features) for seed in range(20)], axis=0)
    assert np.corrcoef(np.log1p(counts[:, 0]), new.features[:, 0])[0, 1] > 0.9
    assert abs(np.corrcoef(counts[:, 1], new.features[:, 0])[0, 1]) < 0.3
    np.testing.assert_allclose(counts.mean(axis=0), new.expression(GENES, "counts").mean(axis=0), rtol=0.15, atol=1e-6)


def test_conditional_holds_to_counts_that_training_had_wherever_features_lead() -> None:
    drawn = fitted("conditional", "counts").draw(50, len(GENES), SEED, np.full((50, 6), 1e6, np.float32))
    assert np.isfinite(drawn).all()
    assert drawn[:, 0].mean() < 10 * max(spots.expression(GENES, "counts").max() for spots in SLIDES)


def test_conditional_needs_features_of_its_encoder() -> None:
    with pytest.raises(InputError, match="features: .*conditional.* give those of the spots"):
        KEPT["conditional"].draw(5, len(GENES), SEED)
    with pytest.raises(InputError, match="features: .*fitted on 6 features, not 5"):
        KEPT["conditional"].draw(5, len(GENES), SEED, np.zeros((5, 5), np.float32))
    with pytest.raises(InputError, match=r"features: must have 5 rows or more, not 4"):
        KEPT["conditional"].draw(5, len(GENES), SEED, np.zeros((4, 6), np.float32))


def test_conditional_of_one_slide_and_of_features_that_say_nothing() -> None:
    for features in (SLIDES[0].features, np.ones((400, 3), np.float32)):
        made = Slide("a", features, SLIDES[0].coords, SLIDES[0].barcodes, SLIDES[0].counts, SLIDES[0].gene_names)
        source = fit_source("conditional", [made], GENES, "counts")
        counts = source.draw(400, len(GENES), SEED, features)
        truth = made.expression(GENES, "counts")
        np.testing.assert_allclose(counts.mean(axis=0), truth.mean(axis=0), rtol=0.35, atol=1e-6)


def test_slides_without_what_is_read_are_refused() -> None:
    bare = Slide("bare", None, SLIDES[0].coords, SLIDES[0].barcodes, SLIDES[0].counts, SLIDES[0].gene_names)
    with pytest.raises(InputError, match="slide bare: has no features"):
        fit_source("conditional", [bare, SLIDES[0]], GENES, "log1p")
    with pytest.raises(InputError, match="slide a: 1 of 1 genes are not in its expression"):
        fit_source("zinb-genes", SLIDES, ("X",), "log1p")
    with pytest.raises(InputError, match="source: must be one of zinb-grid, .* to be fitted, not 'zinb'"):
        fit_source("zinb", SLIDES, GENES, "log1p")
    with pytest.raises(InputError, match="source: is fitted on training slides"):
        fit_source("zinb-genes", [], GENES, "log1p")


@pytest.mark.parametrize("name", FITTED)
def test_a_source_comes_back_from_what_is_kept_of_it(name: str) -> None:
    source, features = KEPT[name], SLIDES[0].features
    described = json.loads(json.dumps(source.to_dict()))
    assert described["name"] == name == source.name
    assert described["fitted_on"]["slides"] == ["a", "b", "c"]
    back = load_source(described, source.tensors(), GENES)
    assert json.loads(json.dumps(back.to_dict())) == described
    assert np.array_equal(back.draw(30, 4, SEED, features), source.draw(30, 4, SEED, features))


@pytest.mark.parametrize("name", FITTED)
def test_a_source_of_other_genes_or_parts_is_refused(name: str) -> None:
    source = KEPT[name]
    described, tensors = source.to_dict(), source.tensors()
    for genes, found in (
        (("A", "C", "B", "D"), r"2 genes differ, the first is gene 2: B there, C here"),
        (("A", "B", "C"), r"1 genes differ, the first is gene 4: D there, none here"),
    ):
        with pytest.raises(InputError, match=f"source: .*{found}"):
            load_source(described, tensors, genes)
    with pytest.raises(InputError, match="source: .*lacks parts, or has others \\(extra\\)"):
        load_source(described, {**tensors, "extra": np.zeros(4)}, GENES)
    with pytest.raises(InputError, match="source: must be one of .*, not 'other'"):
        load_source({**described, "name": "other"}, tensors, GENES)
    if not isinstance(source, Prior):
        with pytest.raises(InputError, match=f"source: {name} was fitted for 4 genes, not 5"):
            source.draw(2, 5, SEED, np.zeros((2, 6), np.float32))


@pytest.mark.parametrize("name", PRIORS)
def test_the_priors_that_are_not_fitted_pass_features_by(name: str) -> None:
    prior, features = Prior(name), np.zeros((7, 3), np.float32)
    assert np.array_equal(prior.draw(7, 5, SEED, features), prior.draw(7, 5, SEED))
    assert np.array_equal(prior.spots(5, SEED, features)(7), prior.draw(7, 5, SEED))


KEPT = {name: fitted(name) for name in FITTED}
