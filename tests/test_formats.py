"""Files as other programs write them: recognised by content, read as they mean, or refused in one line."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
import zarr

from stflow_fast.errors import InputError
from stflow_fast.slides import HestTask, ReadOptions, SeveralSections, StoredRows, read, recognise, sources

from .builders import ENCODER, PATCH, arrays, embeddings_of, gene_names, write_embeddings, write_h5ad, write_task

N, F = 64, 12


def lattice(side: int = 8, pitch: float = 512.0, start: float = 2048.0) -> np.ndarray:
    return np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2) * pitch + start


def features(n: int = N) -> np.ndarray:
    return np.random.default_rng(n).normal(size=(n, F)).astype(np.float32)


def save_as_trident(path: Path, assets: dict[str, np.ndarray], attributes: dict[str, dict[str, object]]) -> Path:
    """As ``save_h5`` of TRIDENT and CLAM writes: tables that can grow, in chunks of one row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, values in assets.items():
            growing = {"maxshape": (None, *values.shape[1:]), "chunks": (1, *values.shape[1:])} if values.size else {}
            file.create_dataset(key, data=values, **growing).attrs.update(attributes.get(key, {}))
    return path


TRIDENT_COORDS = {
    "patch_size": 256,
    "patch_size_level0": 512,
    "level0_magnification": 40,
    "target_magnification": 20,
    "overlap": 0,
    "level0_width": 9000,
    "level0_height": 8000,
    "name": "slide",
}


def trident(path: Path, leading: bool = False, **attributes: object) -> Path:
    assets = {"features": features(), "coords": lattice().astype(np.int64)}
    if leading:
        assets["features"] = assets["features"][None]
    of_features = {"encoder": "uni_v1", "name": "slide", **attributes}
    return save_as_trident(path, assets, {"features": of_features, "coords": TRIDENT_COORDS})


@pytest.mark.parametrize("leading", [False, True])
def test_trident(tmp_path: Path, leading: bool) -> None:
    path = trident(tmp_path / "20x_256px_0px_overlap" / "features_uni_v1" / "slide.h5", leading)
    assert recognise(path) == "trident"
    slide = read(path)
    assert isinstance(slide.features, StoredRows)
    assert np.array_equal(slide.features, features())
    assert np.array_equal(slide.coords, lattice() + 256)
    assert list(slide.barcodes[:2]) == ["2048_2048", "2560_2048"]
    assert slide.origin.encoder == "uni_v1"
    assert slide.origin.image_size == (9000, 8000)
    assert slide.origin.scalefactors == {"spot_diameter_fullres": 512.0}
    assert slide.notes == ()


def test_the_encoder_is_told_by_the_folder_where_the_file_does_not(tmp_path: Path) -> None:
    assert read(trident(tmp_path / "features_conch_v15" / "a.h5", encoder="None")).origin.encoder == "conch_v15"
    assert read(trident(tmp_path / "somewhere" / "a.h5", encoder="")).origin.encoder == ""
    made = write_embeddings(tmp_path / "phikon" / "fp16" / "a.h5", arrays("S0"))
    assert read(made).origin.encoder == "phikon"


def clam(root: Path, patches: dict[str, object] | None) -> Path:
    corners = lattice().astype(np.int32)
    if patches is not None:
        save_as_trident(root / "patches" / "slide.h5", {"coords": corners}, {"coords": patches})
    path = root / "features" / "h5_files" / "slide.h5"
    return save_as_trident(path, {"features": features(), "coords": corners}, {})


@pytest.mark.parametrize(
    ("patches", "half"),
    [
        ({"patch_size": 256, "patch_level": 0, "downsample": (1.0, 1.0)}, 128),
        ({"patch_size": 256, "patch_level": 1, "downsample": (4.0, 4.0)}, 512),
        ({"patch_size": 256, "patch_level": 0}, 128),
        ({"patch_size": 256, "patch_level": 0, "custom_downsample": 2}, 256),
        ({"patch_size": 224, "level": 0}, 112),
        ({"patch_size_src": 163.5}, 81.75),
    ],
)
def test_clam_with_its_patches_beside(tmp_path: Path, patches: dict[str, object], half: float) -> None:
    path = clam(tmp_path, patches)
    assert recognise(path) == "clam"
    assert np.array_equal(read(path).coords, lattice() + half)
    assert read(path).notes == ()


@pytest.mark.parametrize("patches", [None, {"patch_size": 256, "patch_level": 1}])
def test_what_was_sought_is_said_where_no_file_tells_the_size(tmp_path: Path, patches: dict[str, object]) -> None:
    """Level 1 without a downsample is no size: the levels of a pyramid differ."""
    slide = read(clam(tmp_path, patches))
    assert np.array_equal(slide.coords, lattice())
    [note] = slide.notes
    assert "patch_size_level0, patch_size_src, patch_size with downsample or patch_level 0" in note
    assert (f"nor have those of {tmp_path / 'patches' / 'slide.h5'}" in note) == (patches is not None)


def test_older_hest_patches_tell_the_size_by_their_images(tmp_path: Path) -> None:
    root = write_task(tmp_path / "task")
    (root / "patches").mkdir()
    with h5py.File(root / "patches" / "S0.h5", "w") as file:
        file["coords"] = np.zeros((60, 2), np.int64)
        file.create_dataset("img", (60, 20, 20, 3), np.uint8).attrs["downsample"] = 2.0
    assert np.abs(HestTask(root, ENCODER).slide("S0", expression=False).coords - arrays("S0")["centres"]).max() <= 1
    with pytest.raises(InputError, match=r"S0\.h5: holds images of patches and no features; .* stflow-fast embed"):
        read(root / "patches" / "S0.h5")


def test_files_beside_a_link_come_before_those_beside_its_target(tmp_path: Path) -> None:
    """Hubs and workflow managers keep files in a store, and links to them in folders that people see."""
    path, store = clam(tmp_path / "job", {"patch_size_level0": 100}), tmp_path / "store" / "blobs"
    store.mkdir(parents=True)
    path.rename(store / "0123abcd")
    path.symlink_to(os.path.relpath(store / "0123abcd", path.parent))
    assert np.array_equal(read(path).coords, lattice() + 50)
    assert read(path).id == "slide"
    other = tmp_path / "elsewhere" / "slide.h5"
    other.parent.mkdir()
    of_target = tmp_path / "store" / "patches" / "0123abcd"
    save_as_trident(of_target, {"coords": lattice()}, {"coords": {"patch_size_src": 60}})
    other.symlink_to(store / "0123abcd")
    assert np.array_equal(read(other).coords, lattice() + 30)
    (store / "0123abcd").unlink()
    with pytest.raises(InputError, match=r"slide\.h5: does not exist \(it is a link to .*0123abcd\)"):
        read(path)


@pytest.mark.parametrize("sub", ["fp32", "fp16", ""])
@pytest.mark.parametrize("between", ["", "task"])
def test_embeddings_of_a_task_lie_where_people_have_them(tmp_path: Path, sub: str, between: str) -> None:
    root, base = write_task(tmp_path / "task"), tmp_path / "embedded"
    folder = base / between / "uni" / sub
    for name in ("S0", "S1", "S2"):
        made = arrays(name)
        write_embeddings(folder / f"{name}.h5", {**made, "features": made["features"].astype(np.float16)})
    task = HestTask(root, "uni", base)
    assert task.embeddings_folder == folder
    slide = task.slide("S0")
    assert slide.features.dtype == np.float32
    assert np.array_equal(slide.features, arrays("S0")["features"].astype(np.float16).astype(np.float32))
    with pytest.raises(InputError, match=r"looked for .*gigapath/fp32, .*gigapath/fp16, .*; encoders there: .*uni"):
        HestTask(root, "gigapath", base)


def test_half_precision_is_read_where_there_is_no_other(tmp_path: Path) -> None:
    root = write_task(tmp_path / "task")
    (root / "embeddings" / ENCODER / "fp32").rename(root / "embeddings" / ENCODER / "fp16")
    assert HestTask(root, ENCODER).slide("S1").n_spots == 60


@pytest.mark.parametrize("absolute", [False, True])
def test_expression_is_what_the_split_names(tmp_path: Path, absolute: bool) -> None:
    root, others = write_task(tmp_path / "task"), tmp_path / "task" / "st"
    for name in ("S0", "S1", "S2"):
        write_h5ad(others / f"{name}.h5ad", {**arrays(name), "counts": arrays(name)["counts"] + 1})
    base = str(others) if absolute else "st"
    for split in (root / "splits").glob("*.csv"):
        split.write_text(split.read_text().replace("adata/", f"{base}/"))
    slide = HestTask(root, ENCODER).slide("S0")
    assert np.array_equal(slide.counts.toarray(), arrays("S0")["counts"] + 1)
    (others / "S0.h5ad").unlink()
    with pytest.raises(InputError, match=r"st/S0\.h5ad: does not exist; .*train_0\.csv names it as expr_path of S0"):
        HestTask(root, ENCODER).slide("S0")


def test_splits_that_contradict_one_another_are_refused(tmp_path: Path) -> None:
    root = write_task(tmp_path / "task")
    (root / "splits" / "test_1.csv").write_text("sample_id,expr_path\nS0,st/S0.h5ad\n")
    with pytest.raises(
        InputError, match=r"train_0\.csv: expr_path of S0 is adata/S0\.h5ad, but st/S0\.h5ad in test_1\.csv"
    ):
        HestTask(root, ENCODER).slide("S0")


def test_expression_of_hest_1k_lies_in_st(tmp_path: Path) -> None:
    root = write_task(tmp_path / "task")
    for split in (root / "splits").glob("*.csv"):
        names = [line.split(",")[0] for line in split.read_text().splitlines()]
        split.write_text("\n".join(names))
    (root / "adata").rename(root / "st")
    assert HestTask(root, ENCODER).slide("S0").n_spots == 60
    (root / "st").rename(root / "gone")
    with pytest.raises(InputError, match=r"adata/S0\.h5ad: does not exist, nor does .*st/S0\.h5ad"):
        HestTask(root, ENCODER).slide("S0")


def table(n: int = N, **obsm: object) -> anndata.AnnData:
    made = anndata.AnnData(obs=pd.DataFrame(index=[f"c{i}" for i in range(n)]))
    made.obsm["features"] = features(n)
    made.obsm["spatial"] = lattice()[:n]
    for key, value in obsm.items():
        made.obsm[key] = value
    return made


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


def test_options_that_a_format_does_not_have_are_said(tmp_path: Path) -> None:
    assert read(trident(tmp_path / "a.h5"), ReadOptions(library_key="x", table="y")).notes == (
        "--library-key is nothing that TRIDENT features has, and was not looked at",
        "--table is nothing that TRIDENT features has, and was not looked at",
    )


def test_chunks_that_are_missing_are_not_zeros(tmp_path: Path) -> None:
    """A zarr store that was copied in part would be read as zeros."""
    made, path = table(), tmp_path / "a.zarr"
    made.write_zarr(path, chunks=(16, F))
    lost = [part for part in (path / "obsm" / "features").rglob("*") if part.is_file() and "zarr" not in part.name]
    lost[0].unlink()
    with pytest.raises(
        InputError, match=r"a\.zarr: 1 of \d+ chunks of obsm/features are missing; copy the store again"
    ):
        read(path)


def test_scale_factors_of_the_input_are_kept(tmp_path: Path) -> None:
    made = table()
    factors = {"spot_diameter_fullres": 89.5, "tissue_hires_scalef": 0.1, "note": "text"}
    made.uns["spatial"] = {"V1": {"images": {"hires": np.zeros((2, 2, 3))}, "scalefactors": factors}}
    made.write_h5ad(tmp_path / "a.h5ad")
    assert read(tmp_path / "a.h5ad").origin.scalefactors == {"spot_diameter_fullres": 89.5, "tissue_hires_scalef": 0.1}


# What cannot be read -------------------------------------------------------------------------------------------------


def test_a_locked_file_is_called_locked(tmp_path: Path) -> None:
    path = trident(tmp_path / "a.h5")
    write = (
        f"import h5py, sys\nwith h5py.File({str(path)!r}, 'a'):\n    print('open', flush=True)\n    sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", write], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        with pytest.raises(InputError, match=r"a\.h5: is locked: another program is writing it"):
            read(path)
        writer.stdin.close()
    assert read(path).n_spots == N


@pytest.mark.parametrize("name", ["a.h5", "a.h5ad", "a.csv"])
def test_an_empty_file_is_called_empty(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=f"{name}: is empty \\(0 bytes\\)"):
        read(tmp_path / name)


@pytest.mark.parametrize("keep", [9, 3000])
def test_a_truncated_file_is_called_truncated(tmp_path: Path, keep: int) -> None:
    path = trident(tmp_path / "a.h5")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"a\.h5: is not readable HDF5, or is truncated"):
        read(path)
    path.write_bytes(b"<html>404 Not Found</html>")
    with pytest.raises(InputError, match=r"a\.h5: is not readable HDF5"):
        read(path)


def test_rows_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    """A file that was damaged after its head: the table is there, and some of its rows are not."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["coords"] = lattice().astype(np.int64)
        file.create_dataset("features", data=features(), chunks=(8, F), compression="gzip", shuffle=True)
        where = file["features"].id.get_chunk_info(5)
    slide = read(path)
    with path.open("r+b") as file:
        file.seek(where.byte_offset)
        file.write(b"\xff" * where.size)
    assert np.array_equal(slide.features[:40], features()[:40])
    with pytest.raises(InputError, match=r"a\.h5: rows 40 to 48 of features cannot be read"):
        slide.features[40:48]


USELESS: dict[str, tuple[Callable[[Path], object], str]] = {
    "pt": (lambda path: torch.save(torch.zeros(3, 4), path), r"holds features without coordinates .* give the \.h5"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps([1, 2])), "features without coordinates"),
    "npz": (lambda path: np.savez(path.open("wb"), x=features()), "is a zip or a NumPy archive; give what it holds"),
    "zarr in a zip": (
        lambda path: zipfile.ZipFile(path, "w").writestr("zarr.json", "{}"),
        "is a zarr store in a zip; unpack it",
    ),
    "coords": (lambda path: save_as_trident(path, {"coords": lattice()}, {}), "places of patches and no features"),
    "no tissue": (
        lambda path: save_as_trident(path, {"features": np.empty((0,)), "coords": np.empty((0, 2), int)}, {}),
        "has no spots",
    ),
    "two slides": (
        lambda path: save_as_trident(path, {"features": np.zeros((2, N, F)), "coords": lattice()}, {}),
        r"features must have shape \[N, F\], not \[2, 64, 12\]; give one slide at a time",
    ),
    "text": (
        lambda path: save_as_trident(path, {"features": np.full((N, F), b"x"), "coords": lattice()}, {}),
        "features is not a table of numbers",
    ),
    "unequal": (
        lambda path: save_as_trident(path, {"features": features(60), "coords": lattice()}, {}),
        r"features, coords disagree in size \(\[60, 12\], \[64, 2\] and 64\)",
    ),
}


@pytest.mark.parametrize("kind", USELESS)
def test_what_is_no_use_is_refused_with_the_mend(tmp_path: Path, kind: str) -> None:
    make, complaint = USELESS[kind]
    make(tmp_path / "slide")
    with pytest.raises(InputError, match=f"slide: .*{complaint}"):
        read(tmp_path / "slide")


def test_a_format_is_forced_or_unknown(tmp_path: Path) -> None:
    path = clam(tmp_path, None)
    assert read(path, ReadOptions(format="trident")).origin.format == "trident"
    with pytest.raises(InputError, match=r"format: must be one of .*anndata, .*, not 'excel'"):
        read(path, ReadOptions(format="excel"))
    with pytest.raises(InputError, match=r"slide\.h5: has no obs, so it is not AnnData; it has coords, features"):
        read(path, ReadOptions(format="anndata"))


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


# Rows that stay on the disk ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f2", ">f4", "f8", "i4", "u1"])
@pytest.mark.parametrize("leading", [False, True])
def test_stored_rows_are_the_array(tmp_path: Path, dtype: str, leading: bool) -> None:
    values = (features() * 20).astype(dtype)
    assets = {"features": values[None] if leading else values, "coords": lattice()}
    path = save_as_trident(tmp_path / "a.h5", assets, {})
    rows, expected = read(path).features, values.astype(np.float32)
    assert (rows.shape, rows.dtype, rows.stored) == ((N, F), np.float32, np.dtype(dtype))
    for index in (slice(3, 9), slice(60, 99), slice(5, 5), np.array([7, 7, 0]), np.arange(N) % 3 == 0, slice(0, 9, 2)):
        assert np.array_equal(rows[index], expected[index])
    part = rows.between(10, 20)
    assert np.array_equal(part, expected[10:20])
    assert np.array_equal(part[5:], expected[15:20])
    _ = rows[:1]
    for twin in (pickle.loads(pickle.dumps(rows)), copy.deepcopy(rows)):
        assert np.array_equal(twin, expected)


def test_what_is_too_large_becomes_infinite_in_silence(tmp_path: Path) -> None:
    path = save_as_trident(tmp_path / "a.h5", {"features": np.full((N, F), 1e300), "coords": lattice()}, {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isinf(read(path).features[:2]).all()


def test_subsets_of_stored_rows_stay_stored_where_they_can(tmp_path: Path) -> None:
    slide = read(trident(tmp_path / "a.h5"))
    assert isinstance(slide.subset(np.arange(5, 9)).features, StoredRows)
    picked = slide.subset(np.array([9, 2, 30]))
    assert np.array_equal(picked.features, features()[[9, 2, 30]])


def test_patches_are_sought_in_the_folder_of_a_task(tmp_path: Path) -> None:
    root = write_task(tmp_path / "task")
    write_embeddings(root / "patches" / "S0.h5", arrays("S0"), patch_size=PATCH)
    assert np.abs(read(embeddings_of(root, "S0")).coords - arrays("S0")["centres"]).max() <= 1
