"""Predictions added to a table in memory."""

from __future__ import annotations

import warnings
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from stflow_fast.cohort import SamplingConfig
from stflow_fast.errors import InputError
from stflow_fast.model import Denoiser
from stflow_fast.sampling import sample
from stflow_fast.slides import SeveralSections, Slide
from stflow_fast.tables import predict_adata

from .builders import arrays, small_model

GENES = ("ERBB2", "CD3E", "GATA3", "VWF")


@pytest.fixture(scope="module")
def model() -> Denoiser:
    return small_model(len(GENES), GENES, "tiny")


def table(genes: tuple[str, ...] = GENES, n: int = 60, **more: Any) -> anndata.AnnData:
    made = arrays("S0", n)
    return anndata.AnnData(
        X=scipy.sparse.random(n, len(genes), 0.5, "csr", random_state=0, dtype=np.float32) if genes else None,
        obs=pd.DataFrame(
            {"section": np.repeat(["left", "right"], [n // 2, n - n // 2])}, index=made["barcodes"].astype(str)
        ),
        var=pd.DataFrame(index=np.array(genes, dtype=str)),
        obsm={"X_uni": made["features"], "spatial": made["centres"]},
        **more,
    )


def predicted(model: Denoiser, adata: anndata.AnnData, name: str = "adata", rows: Any = slice(None)) -> np.ndarray:
    part = Slide(name, adata.obsm["X_uni"][rows], adata.obsm["spatial"][rows], adata.obs_names[rows])
    return sample(model, part).expression.numpy()


def test_a_layer_has_each_gene_in_its_column(model: Denoiser) -> None:
    adata = table(("VWF", "ACTB", "CD3E"))
    before = adata.X.copy()
    with pytest.warns(UserWarning, match="^2 of 4 predicted genes are not in adata.var_names, and left out$"):
        predict_adata(model, adata)
    layer, expected = adata.layers["stflow"], predicted(model, adata)
    assert layer.dtype == np.float32
    assert np.array_equal(layer[:, [0, 2]], expected[:, [3, 1]])
    assert np.isnan(layer[:, 1]).all()
    assert (before != adata.X).nnz == 0
    about = adata.uns["stflow"]
    assert (about["in"], about["encoder"], about["normalize"], about["seed"]) == ("layers", "tiny", "log1p", 0)


@pytest.mark.parametrize("genes", [("ACTB", "MYC"), ()])
def test_a_table_without_the_genes_gets_a_data_frame(model: Denoiser, genes: tuple[str, ...]) -> None:
    """A table that has genes, none of them predicted, is warned of."""
    adata = table(genes)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        predict_adata(model, adata, key_added="made")
    said = (
        "none of 4 predicted genes is in adata.var_names, so the prediction is in obsm; it has names such as ACTB, MYC"
    )
    assert [str(each.message) for each in warned] == ([said] if genes else [])
    found = adata.obsm["made"]
    assert list(found.columns) == list(GENES)
    assert list(found.index) == list(adata.obs_names)
    assert np.array_equal(found.to_numpy(), predicted(model, adata))
    assert adata.uns["made"]["in"] == "obsm"
    assert not adata.layers


@pytest.mark.parametrize(
    ("genes", "said"),
    [
        (("erbb2", "cd3e", "gata3", "vwf"), "none of 4 .*capital letters.*'erbb2' for 'ERBB2'"),
        (("ENSG1", "ENSG2", "ENSG3", "ENSG4"), r"none of 4 .*var\['symbol'\] has 4 of them.*'ERBB2', which is 'ENSG1'"),
        (("ERBB2", "CD3E", "Gata3", "VWF"), "1 of 4 .*left out; .*'Gata3' for 'GATA3'"),
    ],
)
def test_genes_that_are_spelled_otherwise_are_warned_of(model: Denoiser, genes: tuple[str, ...], said: str) -> None:
    adata = table(genes)
    if genes[0].startswith("ENSG"):
        adata.var["symbol"] = GENES
    with pytest.warns(UserWarning, match=said):
        predict_adata(model, adata)


def test_genes_are_named_by_a_column(model: Denoiser) -> None:
    adata = table(("ENSG1", "ENSG2", "ENSG3"))
    adata.var["symbol"] = ["VWF", "ACTB", "CD3E"]
    with pytest.warns(UserWarning, match=r"^2 of 4 predicted genes are not in adata.var\['symbol'\], and left out$"):
        predict_adata(model, adata, gene_key="symbol")
    assert np.array_equal(adata.layers["stflow"][:, [0, 2]], predicted(model, adata)[:, [3, 1]])


def overlaid() -> anndata.AnnData:
    """Two sections in one table, the second a third of a pitch aside."""
    adata = anndata.concat([table(), table()], index_unique="-")
    adata.obs["library_id"] = np.repeat(["A", "B"], 60)
    adata.obsm["spatial"][60:] += [33, 21]
    return adata


def test_sections_over_one_another_are_not_mixed(model: Denoiser) -> None:
    adata = overlaid()
    with pytest.raises(SeveralSections, match=r"^slide adata: .*--library-key library_id"):
        predict_adata(model, adata)
    assert not adata.layers
    predict_adata(model, adata, library_key="library_id")
    assert adata.uns["stflow"]["slides"] == ["A", "B"]


def test_what_is_strange_about_the_slides_is_kept(model: Denoiser) -> None:
    """Sections side by side are predicted as one slide, unless told that they are none."""
    adata = table()
    adata.obs["library_id"] = np.repeat(["A", "B"], 30)
    predict_adata(model, adata)
    assert adata.uns["stflow"]["notes"].startswith(
        "adata: obs['library_id'] names 2 sections (A, B), which are predict"
    )
    predict_adata(model, adata, library_key="")
    assert adata.uns["stflow"]["notes"] == ""
    assert np.array_equal(adata.layers["stflow"], predicted(model, adata))


@pytest.mark.parametrize("genes", [GENES, ()])
def test_each_section_is_a_slide_of_its_own(model: Denoiser, genes: tuple[str, ...]) -> None:
    adata = table(genes)
    mixed = adata[np.random.default_rng(0).permutation(adata.n_obs)].copy()
    predict_adata(model, mixed, library_key="section")
    found = mixed.layers["stflow"] if genes else mixed.obsm["stflow"].to_numpy()
    for name in ("left", "right"):
        rows = np.flatnonzero(mixed.obs["section"] == name)
        assert np.array_equal(found[rows], predicted(model, mixed, name, rows))
    assert sorted(mixed.uns["stflow"]["slides"]) == ["left", "right"]


def test_features_of_any_make_and_place(model: Denoiser) -> None:
    adata, expected = table(()), predicted(model, table(()))
    frame = pd.DataFrame(adata.obsm["X_uni"], index=adata.obs_names)
    adata.obsm["frame"], adata.obsm["xy"] = frame, adata.obsm["spatial"]
    del adata.obsm["spatial"]
    predict_adata(model, adata, "frame", spatial_key="xy", sampling=SamplingConfig(seed=0))
    assert np.array_equal(adata.obsm["stflow"], expected)
    of_x = anndata.AnnData(frame.to_numpy(), obs=adata.obs, obsm={"spatial": adata.obsm["xy"]})
    predict_adata(model, of_x, "X")
    assert np.array_equal(of_x.obsm["stflow"], expected)


def test_a_prediction_is_replaced_and_written_with_its_table(model: Denoiser, tmp_path: Any) -> None:
    adata = table()
    predict_adata(model, adata)
    first = adata.layers["stflow"]
    predict_adata(model, adata, sampling=SamplingConfig(seed=1))
    assert not np.array_equal(adata.layers["stflow"], first)
    adata.write_h5ad(tmp_path / "x.h5ad")
    read = anndata.read_h5ad(tmp_path / "x.h5ad")
    assert np.array_equal(read.layers["stflow"], adata.layers["stflow"])
    assert read.uns["stflow"]["seed"] == 1


def test_an_earlier_prediction_goes_wherever_it_is(model: Denoiser) -> None:
    """It was a layer, the next is in obsm, and the other way round."""
    adata = table()
    predict_adata(model, adata)
    symbols, adata.var_names = adata.var_names, ["g1", "g2", "g3", "g4"]
    with pytest.warns(UserWarning, match="none of 4"):
        predict_adata(model, adata)
    assert (list(adata.layers), "stflow" in adata.obsm, adata.uns["stflow"]["in"]) == ([], True, "obsm")
    adata.var_names = symbols
    predict_adata(model, adata)
    assert (list(adata.layers), "stflow" in adata.obsm, adata.uns["stflow"]["in"]) == (["stflow"], False, "layers")


@pytest.mark.parametrize("part", ["layers", "obsm"])
def test_what_stands_beside_an_earlier_prediction_is_not_its_own(model: Denoiser, part: str) -> None:
    """The earlier one is in the other part; what has its name here is the user's."""
    adata = table(() if part == "layers" else GENES)
    predict_adata(model, adata)
    earlier = {"layers": "obsm", "obsm": "layers"}[part]
    own = np.zeros((60, adata.n_vars if part == "layers" else 2))
    getattr(adata, part)["stflow"] = own
    with pytest.raises(InputError, match=rf"^key_added: adata\.{part}\['stflow'\] is no prediction; choose another"):
        predict_adata(model, adata)
    assert (getattr(adata, part)["stflow"] == own).all()
    assert "stflow" in getattr(adata, earlier)


def spoiled(section: str) -> anndata.AnnData:
    """Features are NaN in one section."""
    adata = table()
    adata.obsm["X_uni"][adata.obs["section"] == section] = np.nan
    return adata


def twice() -> anndata.AnnData:
    adata = table()
    adata.var_names = ["VWF", "VWF", "CD3E", "ACTB"]
    return adata


@pytest.mark.parametrize(
    ("adata", "options", "complaint"),
    [
        (table(), {"features": "X_conch"}, r"^adata: has no obsm\['X_conch'\]; obsm has X_uni, spatial"),
        (table(), {"spatial_key": "xy"}, r"^adata: has no obsm\['xy'\]"),
        (table(()), {"features": "X"}, r"^adata: has no X"),
        (table(), {"features": "spatial"}, r"^slide adata: features: must have shape \[N, 16\], not \[60, 2\]"),
        (table(), {"library_key": "slide"}, r"^library_key: adata.obs has no column 'slide'; its columns: section"),
        (table(), {"gene_key": "symbol"}, r"^gene_key: adata.var has no column 'symbol'; its columns: none"),
        (table(), {"key_added": "X_uni"}, r"^key_added: adata.obsm\['X_uni'\] is no prediction"),
        (table(layers={"counts": np.ones((60, 4))}), {"key_added": "counts"}, r"^key_added: adata.layers\['counts'\]"),
        (table(uns={"pca": {}}), {"key_added": "pca"}, r"^key_added: adata.uns\['pca'\] is no prediction"),
        (spoiled("right"), {"library_key": "section"}, "^slide right: features of 30 of 30 spots are NaN"),
        (twice(), {}, "^adata: gene VWF stands in several columns"),
        (table(n=0), {}, "^adata: has no spots"),
    ],
)
def test_what_cannot_be_predicted_leaves_the_table_as_it_was(
    model: Denoiser, adata: anndata.AnnData, options: dict[str, Any], complaint: str
) -> None:
    before = {part: list(getattr(adata, part)) for part in ("obs", "obsm", "layers", "uns")}
    with pytest.raises(InputError, match=complaint):
        predict_adata(model, adata, **options)
    assert before == {part: list(getattr(adata, part)) for part in ("obs", "obsm", "layers", "uns")}


def test_what_is_no_table_is_refused(model: Denoiser) -> None:
    with pytest.raises(InputError, match="^adata: must be an AnnData, not DataFrame"):
        predict_adata(model, pd.DataFrame())
