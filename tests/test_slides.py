"""Slides and their .h5ad: features, counts, normalisation, subsets, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from stflow_fast.errors import InputError
from stflow_fast.slides import HestTask, Slide, normalize_counts, read_h5ad

from .builders import arrays, gene_names, write_h5ad


@pytest.mark.parametrize("form", ["csr", "csc", "dense", "int"])
def test_h5ad_with_features(tmp_path: Path, form: str) -> None:
    made = arrays("S1")
    slide = read_h5ad(write_h5ad(tmp_path / "sample.h5ad", made, form, features=True))
    assert slide.id == "sample"
    assert np.array_equal(slide.features, made["features"])
    assert np.array_equal(slide.coords, made["centres"])
    genes = ["GENE7", "GENE2"]
    assert np.allclose(slide.expression(genes), np.log1p(made["counts"][:, [7, 2]]))


@pytest.mark.parametrize("form", ["sparse", "frame", "half"])
def test_features_come_in_many_forms(tmp_path: Path, form: str) -> None:
    made = arrays("S1")
    path = write_h5ad(tmp_path / "a.h5ad", made, features=True)
    table = anndata.read_h5ad(path)
    forms = {
        "sparse": scipy.sparse.csr_matrix,
        "frame": lambda values: pd.DataFrame(values, index=table.obs_names, columns=[f"f{i}" for i in range(16)]),
        "half": lambda values: values.astype(np.float16),
    }
    table.obsm["features"] = forms[form](made["features"])
    table.obsm["spatial"] = np.column_stack([made["centres"], np.zeros(60)])
    table.write_h5ad(path)
    slide = read_h5ad(path)
    assert np.allclose(slide.features, made["features"], atol=1e-2 if form == "half" else 0)
    assert np.array_equal(slide.coords, made["centres"])


def test_features_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", arrays("S1"), features=True)
    table = anndata.read_h5ad(path)
    table.obsm["features"] = pd.DataFrame({"f": ["x"] * 60}, index=table.obs_names)
    table.write_h5ad(path)
    with pytest.raises(InputError, match=r"a.h5ad: obsm\['features'\] is not a table of numbers"):
        read_h5ad(path)


def test_expression_that_is_no_counts_is_noted(tmp_path: Path) -> None:
    made = arrays("S1")
    logged = {**made, "counts": np.log1p(made["counts"])}
    slide = read_h5ad(write_h5ad(tmp_path / "a.h5ad", logged, features=True))
    assert "not in whole numbers" in slide.notes[0]
    assert read_h5ad(tmp_path / "a.h5ad", expression=False).notes == ()


def test_expression_that_is_not_wanted_is_not_read(tmp_path: Path) -> None:
    made = arrays("S1")
    path = write_h5ad(tmp_path / "a.h5ad", made, features=True)
    with h5py.File(path, "a") as file:
        del file["X"]
        file["X"] = "no table at all"
    slide = read_h5ad(path, expression=False)
    assert slide.counts is None
    assert np.array_equal(slide.features, made["features"])
    assert slide.micron_per_pixel == 0.5


def test_h5ad_layers_of_counts_come_before_x(tmp_path: Path) -> None:
    made = arrays("S1")
    path = write_h5ad(tmp_path / "a.h5ad", made, features=True)
    table = anndata.read_h5ad(path)
    table.layers["counts"] = table.X.copy()
    table.X = np.log1p(table.X.toarray())
    table.write_h5ad(path)
    assert np.array_equal(read_h5ad(path).counts.toarray(), made["counts"])


def test_h5ad_without_x_predicts_but_has_no_expression(tmp_path: Path) -> None:
    slide = read_h5ad(write_h5ad(tmp_path / "a.h5ad", arrays("S1"), None, features=True))
    assert slide.counts is None
    with pytest.raises(InputError, match="slide a: has no expression"):
        slide.expression(["GENE1"])


def test_normalisations() -> None:
    counts, total = np.array([[3.0, 0.0], [5.0, 5.0], [0.0, 0.0]]), np.array([30.0, 10.0, 0.0])
    assert np.allclose(normalize_counts(counts, total, "log1p"), np.log1p(counts))
    assert np.array_equal(normalize_counts(counts, total, "counts"), counts)
    expected = np.log1p([[1000.0, 0.0], [5000.0, 5000.0], [0.0, 0.0]])
    assert np.allclose(normalize_counts(counts, total, "cp10k_log1p"), expected)
    with pytest.raises(InputError, match="normalize: must be one of"):
        normalize_counts(counts, total, "sqrt")


def test_depth_counts_every_gene(tmp_path: Path) -> None:
    made = arrays("S1")
    slide = read_h5ad(write_h5ad(tmp_path / "a.h5ad", made, features=True))
    assert np.allclose(slide.total_counts, made["counts"].sum(axis=1))
    per_10k = made["counts"][:, [4]] * 1e4 / made["counts"].sum(axis=1, keepdims=True)
    assert np.allclose(slide.expression(["GENE4"], "cp10k_log1p"), np.log1p(per_10k), atol=1e-5)


def test_subsets_keep_everything_in_line(tmp_path: Path) -> None:
    slide = read_h5ad(write_h5ad(tmp_path / "a.h5ad", arrays("S1"), features=True))
    index = np.array([5, 3, 40])
    part = slide.subset(index)
    assert (part.id, part.n_spots, part.gene_names) == (slide.id, 3, slide.gene_names)
    for name in ("features", "coords", "barcodes"):
        assert np.array_equal(getattr(part, name), getattr(slide, name)[index])
    assert np.array_equal(part.counts.toarray(), slide.counts.toarray()[index])


def good_slide() -> Slide:
    made = arrays("S0")
    counts = scipy.sparse.csr_matrix(made["counts"])
    return Slide("s", made["features"], made["centres"], made["barcodes"], counts, tuple(gene_names()))


def spoiled(values: np.ndarray, value: float) -> np.ndarray:
    values = values.copy()
    values[[1, 7]] = value
    return values


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda s: {"features": spoiled(s.features, np.nan)}, "slide s: features of 2 of 60 spots are NaN"),
        (lambda s: {"coords": spoiled(s.coords, np.inf)}, "slide s: coords of 2 of 60 spots are NaN"),
        (lambda s: {"barcodes": np.repeat(s.barcodes[:30], 2)}, "slide s: 30 duplicated barcodes, such as 0x0"),
        (lambda s: {"features": s.features[:5]}, r"slide s: features: must have shape \[60, F\]"),
        (lambda s: {"coords": s.coords[:, :1]}, r"slide s: coords: must have shape \[60, 2\]"),
        (lambda s: {"counts": s.counts[:, :3]}, r"slide s: counts: must have shape \[60, 30\]"),
        (lambda s: {"counts": s.counts * -1}, "counts are negative"),
    ],
)
def test_slides_are_checked_when_made(change: Callable[[Slide], dict[str, object]], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        dataclasses.replace(good_slide(), **change(good_slide()))


def test_genes_that_are_missing_or_ambiguous_are_named() -> None:
    with pytest.raises(InputError, match="slide s: 2 of 3 genes are not in its expression: X, Y"):
        good_slide().expression(["X", "GENE1", "Y"])
    twice = dataclasses.replace(good_slide(), gene_names=("GENE1", *gene_names()[1:]))
    with pytest.raises(InputError, match="gene GENE1 stands in several columns"):
        twice.expression(["GENE1"])
    assert twice.expression(["GENE5"]).shape == (60, 1)


def test_real_slides(shared: Callable[[str], Path]) -> None:
    root = shared("data/her2st")
    task = HestTask(root, "efficientnet_lite0")
    assert task.folds() == [0, 1, 2]
    assert task.fold(2).train == ("A1", "B4")
    spots = {"A1": 346, "B4": 283, "C2": 187, "C3": 180, "C4": 184, "C5": 181, "C6": 178}
    genes = list(task.genes())
    for name, n in spots.items():
        slide, table = task.slide(name), anndata.read_h5ad(root / "adata" / f"{name}.h5ad")
        assert (slide.n_spots, slide.feature_dim, slide.notes) == (n, 1280, ())
        expected = np.log1p(table[slide.barcodes, genes].X.toarray())
        assert np.allclose(slide.expression(genes), expected)
        alone = task.slide(name, expression=False)
        assert np.abs(alone.coords - slide.coords).max() <= 1.0
        assert 0.6 < slide.micron_per_pixel < 1.0
