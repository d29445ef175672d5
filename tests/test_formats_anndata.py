"""Tables of anndata as other programs write them: keys, counts, genes, sections, libraries and layouts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import zarr

from stflow_fast.errors import InputError
from stflow_fast.slides import ReadOptions, SeveralSections, StoredRows, read, recognise, sources

from .builders import arrays, gene_names, write_embeddings, write_h5ad
from .format_cases import N, features, lattice, table


@pytest.mark.parametrize("store", ["h5ad", "zarr"])
def test_elements_that_prediction_does_not_need_are_not_read(tmp_path: Path, store: str) -> None:
    made, path = table(molecules=np.zeros((N, 2))), tmp_path / f"a.{store}"
    made.obs["kept"], made.obs["odd"] = np.arange(N), "x"
    made.uns["log1p"] = {"base": 1}
    getattr(made, f"write_{store}")(path)
    opened = h5py.File(path, "r+") if store == "h5ad" else zarr.open_group(str(path), mode="r+")
    for key in ("obsm/molecules", "uns/log1p/base", "obs/odd"):
        opened[key].attrs["encoding-type"] = "of-tomorrow"
    if store == "h5ad":
        opened.close()
    else:
        zarr.consolidate_metadata(str(path))
    slide = read(path)
    assert recognise(path) == "anndata"
    assert isinstance(slide.features, StoredRows)
    assert np.array_equal(slide.features, features())
    assert list(slide.obs.columns) == ["kept"]
    assert slide.notes == ("columns of obs that cannot be read are left out: odd",)


def test_other_keys_are_asked_for(tmp_path: Path) -> None:
    made = table(X_uni=features() + 1, spatial_um=lattice() / 2)
    made.write_h5ad(tmp_path / "a.h5ad")
    slide = read(tmp_path / "a.h5ad", ReadOptions(features_key="X_uni", spatial_key="spatial_um"))
    assert np.array_equal(slide.features, features() + 1)
    assert np.array_equal(slide.coords, lattice() / 2)
    with pytest.raises(InputError, match=r"no obsm\['uni'\] .*; obsm has X_uni, features, spatial.* \(--features-key"):
        read(tmp_path / "a.h5ad", ReadOptions(features_key="uni"))
    with pytest.raises(InputError, match=r"no obsm\['xy'\] .* it has X_uni, .*\(--spatial-key KEY\)"):
        read(tmp_path / "a.h5ad", ReadOptions(spatial_key="xy"))


@pytest.mark.parametrize("form", [np.asarray, scipy.sparse.csr_matrix])
def test_features_may_be_x(tmp_path: Path, form: Callable[[np.ndarray], object]) -> None:
    """As tile tables have them; what is X is no expression then."""
    made = anndata.AnnData(form(features()), obs=pd.DataFrame(index=[str(i) for i in range(N)]))
    made.obsm["spatial"] = lattice()
    made.write_h5ad(tmp_path / "a.h5ad")
    slide = read(tmp_path / "a.h5ad", ReadOptions(features_key="X", expression=True))
    assert np.array_equal(slide.features, features())
    assert slide.counts is None


def test_counts_come_from_raw_where_x_is_none(tmp_path: Path) -> None:
    made = arrays("S1")
    path = write_h5ad(tmp_path / "a.h5ad", made, features=True)
    kept = anndata.read_h5ad(path)
    kept.raw = kept.copy()
    kept = kept[:, :10].copy()
    kept.X = np.log1p(kept.X.toarray())
    kept.write_h5ad(path)
    slide = read(path, ReadOptions(expression=True))
    assert np.array_equal(slide.counts.toarray(), made["counts"])
    assert slide.gene_names == tuple(gene_names())
    assert slide.notes == ("counts are those of raw['X']: X is not in whole numbers",)


@pytest.mark.parametrize("names_only", [False, True])
def test_counts_come_from_what_is_whole(tmp_path: Path, names_only: bool) -> None:
    """Log values that are called counts are not taken for them where others are; where none are, it is said."""
    path, counts = tmp_path / "a.h5ad", arrays("S1")["counts"]
    made = anndata.read_h5ad(write_h5ad(path, arrays("S1"), features=True))
    made.layers["counts"] = np.log1p(counts)
    made.write_h5ad(path)
    slide = read(path, ReadOptions(expression=True))
    assert np.array_equal(slide.counts.toarray(), counts)
    assert slide.notes == ("counts are those of X: layers['counts'] is not in whole numbers",)
    made.raw = made[:, :7].copy()
    made.X = np.log1p(counts)
    made.write_h5ad(path)
    slide = read(path, ReadOptions(expression=not names_only, gene_names=names_only))
    assert slide.gene_names == tuple(gene_names()[:7])
    del made.raw
    made.write_h5ad(path)
    slide = read(path, ReadOptions(expression=True))
    assert "layers['counts'] is not in whole numbers: are these raw counts?" in slide.notes[0]


def test_no_gene_is_named_where_x_is_the_features(tmp_path: Path) -> None:
    made = anndata.AnnData(features(), obs=pd.DataFrame(index=[str(i) for i in range(N)]))
    made.obsm["spatial"] = lattice()
    made.write_h5ad(tmp_path / "a.h5ad")
    assert read(tmp_path / "a.h5ad", ReadOptions(features_key="X", gene_names=True)).gene_names == ()


def test_genes_may_have_their_names_in_a_column(tmp_path: Path) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", arrays("S1"), features=True)
    kept = anndata.read_h5ad(path)
    kept.var["symbol"] = pd.Categorical([f"SYM{i}" for i in range(30)])
    kept.var_names = [f"ENSG{i:011d}" for i in range(30)]
    kept.write_h5ad(path)
    with pytest.raises(InputError, match=r"var\['symbol'\] has 2 of them: --gene-key symbol"):
        read(path, ReadOptions(expression=True)).expression(["SYM3", "SYM4", "NOSUCH"])
    by_symbol = read(path, ReadOptions(expression=True, gene_key="symbol"))
    assert np.allclose(by_symbol.expression(["SYM3"])[:, 0], np.log1p(arrays("S1")["counts"][:, 3]))
    with pytest.raises(InputError, match=r"var has no column 'name'; its columns: symbol"):
        read(path, ReadOptions(expression=True, gene_key="name"))


def two_sections(path: Path, interleave: bool = False) -> Path:
    parts = {name: table() for name in ("A", "B/2")}
    parts["B/2"].obsm["features"] = features() + 10
    made = anndata.concat(parts, label="section_of", index_unique="-")
    made.obs["section_of"] = made.obs["section_of"].astype(str)
    if interleave:
        made = made[np.arange(2 * N).reshape(2, N).T.ravel()].copy()
    made.write_h5ad(path)
    return path


@pytest.mark.parametrize("interleave", [False, True])
def test_a_table_of_several_sections_is_several_slides(tmp_path: Path, interleave: bool) -> None:
    path = two_sections(tmp_path / "both.h5ad", interleave)
    with pytest.raises(SeveralSections, match="--library-key COLUMN"):
        read(path)
    first, second = sources(path, ReadOptions(library_key="section_of"))
    assert (first.id, second.id) == ("both_A", "both_B_2")
    for source, shift in ((first, 0), (second, 10)):
        slide = source.read()
        assert slide.id == source.id
        assert np.array_equal(slide.features, features() + shift)
        assert isinstance(slide.features, np.ndarray) == interleave, "rows that follow one another stay on the disk"
        assert np.array_equal(slide.coords, lattice())
        assert set(slide.library_id) == {source.options.section}
    with pytest.raises(InputError, match=r"obs has no column 'sample'; its columns: section_of"):
        sources(path, ReadOptions(library_key="sample"))
    with pytest.raises(InputError, match=r"obs\['section_of'\] has no section 'C'; it has A, B/2"):
        read(path, ReadOptions(library_key="section_of", section="C"))


def test_a_column_that_names_no_sections_is_passed_by_where_one_says_so(tmp_path: Path) -> None:
    made = table()
    made.obs["sample"] = ["a", "b"] * (N // 2)
    made.obsm["spatial"][1::2, 0] -= 400.0
    made.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(SeveralSections, match="split them with --library-key sample, .* or say --library-key '' if it"):
        read(tmp_path / "a.h5ad")
    options = ReadOptions(library_key="")
    [source] = sources(tmp_path / "a.h5ad", options)
    assert source.id == "a"
    assert source.read().library_id is None
    assert not any("sections (" in note for note in source.read().notes)


def test_features_of_another_file_are_matched_by_barcode(tmp_path: Path) -> None:
    made, order = arrays("S0"), np.random.default_rng(0).permutation(60)
    path = write_h5ad(tmp_path / "S0.h5ad", made)
    embedded = write_embeddings(tmp_path / "emb" / "S0.h5", made, order[:50])
    for given in (embedded, tmp_path / "emb"):
        slide = read(path, ReadOptions(embeddings=given))
        kept = np.sort(order[:50])
        assert np.array_equal(slide.features, made["features"][kept])
        assert np.array_equal(slide.coords, made["centres"][kept])
        assert slide.notes == (f"10 of 60 spots have no features in {embedded} and are left out",)
    assert read(path, ReadOptions(require_features=False)).features is None


def several_libraries(path: Path) -> Path:
    """Two sections of other pitches, as anndata.concat(uns_merge="unique") leaves them."""
    parts = {"A": table(), "B": table()}
    parts["B"].obsm["spatial"] = lattice() / 10 + 90_000
    made = anndata.concat(parts, label="library_id", index_unique="-")
    made.uns["spatial"] = {
        name: {"scalefactors": {"spot_diameter_fullres": size}} for name, size in (("A", 180.0), ("B", 18.0))
    }
    made.uns["pixel_size_um_estimated"] = 0.25
    made.obsm["spatial_um"] = made.obsm["spatial"] / 4
    made.write_h5ad(path)
    return path


def test_every_library_has_its_own_scale_factors(tmp_path: Path) -> None:
    path = several_libraries(tmp_path / "a.h5ad")
    whole = read(path)
    assert whole.origin.scalefactors == {}
    assert {name: dict(each) for name, each in whole.origin.library_scalefactors.items()} == {
        "A": {"spot_diameter_fullres": 180.0},
        "B": {"spot_diameter_fullres": 18.0},
    }
    for source, size in zip(sources(path, ReadOptions(library_key="library_id")), (180.0, 18.0), strict=True):
        assert source.read().origin.scalefactors == {"spot_diameter_fullres": size}
    made = anndata.read_h5ad(path)
    del made.uns["spatial"]["B"]
    made.write_h5ad(path)
    _, second = sources(path, ReadOptions(library_key="library_id"))
    assert second.read().origin.scalefactors == {}, "A's are not B's"


def test_pixel_sizes_and_scale_factors_are_of_pixels_alone(tmp_path: Path) -> None:
    slide = read(several_libraries(tmp_path / "a.h5ad"), ReadOptions(spatial_key="spatial_um"))
    assert slide.micron_per_pixel is None
    assert slide.origin.library_scalefactors == {}
    assert "pixel size and scale factors are those of obsm['spatial'], and are not taken" in slide.notes


def test_the_library_of_a_file_is_the_library_of_its_spots(tmp_path: Path) -> None:
    made = table()
    made.uns["spatial"] = {"V1": {"scalefactors": {"spot_diameter_fullres": 89.5}}}
    made.write_h5ad(tmp_path / "a.h5ad")
    assert set(read(tmp_path / "a.h5ad").library_id) == {"V1"}
    made.obs["library_id"], made.obs["batch"] = "L", ["a", "b"] * (N // 2)
    made.write_h5ad(tmp_path / "a.h5ad")
    slide = read(tmp_path / "a.h5ad")
    assert set(slide.library_id) == {"L"}, "it says that there is one, whatever other columns say"
    made.obs["library_id"] = ["L", None] * (N // 2)
    made.write_h5ad(tmp_path / "a.h5ad")
    assert set(read(tmp_path / "a.h5ad").library_id) == {"L", "missing"}


def test_scale_factors_of_the_input_are_kept(tmp_path: Path) -> None:
    made = table()
    factors = {"spot_diameter_fullres": 89.5, "tissue_hires_scalef": 0.1, "note": "text"}
    made.uns["spatial"] = {"V1": {"images": {"hires": np.zeros((2, 2, 3))}, "scalefactors": factors}}
    made.write_h5ad(tmp_path / "a.h5ad")
    assert read(tmp_path / "a.h5ad").origin.scalefactors == {"spot_diameter_fullres": 89.5, "tissue_hires_scalef": 0.1}


def write_as_of_07(path: Path) -> None:
    """The layout of anndata 0.7: categories beside the columns, a type for each group but the root's."""
    made = table()
    made.obs["kind"] = pd.Categorical(["a", "b"] * (N // 2))
    made.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        for name in ("encoding-type", "encoding-version"):
            for part in ("/", "obsm", "uns", "obs/_index", "obsm/features", "obsm/spatial"):
                file[part].attrs.pop(name, None)
        file["obs"].attrs["encoding-version"] = "0.1.0"
        codes, categories = file["obs/kind/codes"][()], file["obs/kind/categories"][()]
        del file["obs/kind"]
        file.create_dataset("obs/__categories/kind", data=categories)
        file["obs/kind"] = codes
        file["obs/kind"].attrs["categories"] = file["obs/__categories/kind"].ref


def test_files_of_an_old_anndata_are_read_or_called_old(tmp_path: Path) -> None:
    path = tmp_path / "a.h5ad"
    write_as_of_07(path)
    slide = read(path)
    assert np.array_equal(slide.features, features())
    assert list(slide.obs["kind"][:2]) == ["a", "b"]
    del slide  # it holds the file open
    with h5py.File(path, "r+") as file:
        del file["obs"]
        file["obs"] = np.array([1, 2])
    with pytest.raises(InputError, match=r"a\.h5ad: is of an old anndata \(before 0\.7"):
        read(path)
