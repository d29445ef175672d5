"""Slides and their readers: alignment by name, coordinates, normalisation, and what is refused."""

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
from stflow_fast.files import write_json
from stflow_fast.slides import HestTask, Slide, hest, normalize_counts, read, read_embeddings, read_h5ad

from .builders import (
    ENCODER,
    GENE_LIST,
    PATCH,
    arrays,
    embeddings_of,
    gene_names,
    write_embeddings,
    write_h5ad,
    write_split,
    write_task,
)


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("key", ["barcodes", "barcode"])
def test_embeddings_and_expression_meet_by_name(tmp_path: Path, text: bool, flat: bool, key: str) -> None:
    root, made = write_task(tmp_path / "task"), arrays("S0")
    order = np.random.default_rng(0).permutation(60)
    write_embeddings(embeddings_of(root, "S0"), made, order, text, flat, key)
    slide = HestTask(root, ENCODER).slide("S0")
    assert list(slide.barcodes) == list(made["barcodes"][order])
    assert np.array_equal(slide.features, made["features"][order])
    assert np.array_equal(slide.counts.toarray(), made["counts"][order])
    assert np.array_equal(slide.coords, made["centres"][order])
    assert slide.notes == ()
    assert slide.micron_per_pixel == 0.5


def test_what_does_not_match_is_counted_and_said(tmp_path: Path) -> None:
    root, made = write_task(tmp_path / "task"), arrays("S0")
    write_embeddings(embeddings_of(root, "S0"), made, np.arange(50))
    kept = {name: values[10:] for name, values in made.items()}
    write_h5ad(root / "adata" / "S0.h5ad", kept)
    slide = HestTask(root, ENCODER).slide("S0")
    assert list(slide.barcodes) == list(made["barcodes"][10:50])
    assert slide.notes == (
        f"10 of 50 rows of features have no spot in {root / 'adata' / 'S0.h5ad'} and are left out",
        f"10 of 50 spots have no features in {embeddings_of(root, 'S0')} and are left out",
    )


def test_slides_without_expression_have_centres_where_the_patch_size_is_known(tmp_path: Path) -> None:
    root, made = write_task(tmp_path / "task"), arrays("S0")
    path = embeddings_of(root, "S0")
    corners = HestTask(root, ENCODER).slide("S0", expression=False)
    assert np.abs(corners.coords - (made["centres"] - PATCH / 2)).max() <= 1
    assert "top-left" in corners.notes[0]
    write_embeddings(root / "patches" / "S0.h5", made, key="barcode", patch_size=PATCH)
    from_patches, found_beside = HestTask(root, ENCODER).slide("S0", expression=False), read(path)
    write_embeddings(path, made, patch_size=PATCH)
    (root / "patches" / "S0.h5").unlink()
    for slide in (from_patches, found_beside, read(path)):
        assert np.abs(slide.coords - made["centres"]).max() <= 1
        assert slide.notes == ()
        assert slide.counts is None


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


def test_patches_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, made = write_task(tmp_path / "task"), arrays("S0")
    write_embeddings(root / "patches" / "S0.h5", made, patch_size=PATCH)
    expected = read(embeddings_of(root, "S0")).coords
    monkeypatch.chdir(embeddings_of(root, "S0").parent)
    assert np.array_equal(read("S0.h5").coords, expected)


def write_patches(path: Path, corners: np.ndarray, **attributes: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["coords"] = corners
        file["coords"].attrs.update(attributes)
    return path


def write_features(path: Path, corners: np.ndarray, **attributes: object) -> Path:
    """As TRIDENT and CLAM write them, with attributes of coords."""
    write_patches(path, corners, **attributes)
    with h5py.File(path, "r+") as file:
        file["features"] = np.random.default_rng(0).normal(size=(len(corners), 4)).astype(np.float32)
    return path


CORNERS = np.stack(np.meshgrid(np.arange(8), np.arange(8)), -1).reshape(-1, 2) * 512 + 2048


@pytest.mark.parametrize(
    "other", [CORNERS[:60], CORNERS + 7, CORNERS + np.array([256, 0])], ids=["fewer", "shifted", "aside"]
)
def test_patches_of_another_project_tell_no_size(tmp_path: Path, other: np.ndarray) -> None:
    """What lies in patches/ above may have only the name in common."""
    path = write_features(tmp_path / "project" / "features" / "s.h5", CORNERS)
    above = write_patches(tmp_path / "patches" / "s.h5", other, patch_size_level0=1000)
    slide = read(path)
    assert np.array_equal(slide.coords, CORNERS)
    assert f"{above} is of other patches: its corners differ" in slide.notes[0]
    write_patches(above, np.concatenate([other, CORNERS + 0.4])[::-1], patch_size_level0=512)
    assert np.array_equal(read(path).coords, CORNERS + 256)
    write_patches(tmp_path / "project" / "patches" / "s.h5", other, patch_size_level0=1000)
    assert np.array_equal(read(path).coords, CORNERS + 256), "the next one above is"
    assert read(path).notes == ()


@pytest.mark.parametrize("content", [b"garbage", b"", b"\x89HDF\r\n\x1a\n"])
def test_patches_that_cannot_be_read_are_in_nobodys_way(tmp_path: Path, content: bytes) -> None:
    path = write_features(tmp_path / "h5_files" / "s.h5", CORNERS)
    beside = tmp_path / "patches" / "s.h5"
    beside.parent.mkdir()
    beside.write_bytes(content)
    slide = read(path)
    assert np.array_equal(slide.coords, CORNERS)
    assert f"and {beside}: is " in slide.notes[0]
    write_patches(beside, np.zeros((64, 3)), patch_size_level0=512)
    assert f"and {beside}: coords must have shape [N, 2]" in read(path).notes[0]


@pytest.mark.parametrize(
    ("attributes", "half"),
    [
        ({"patch_size": 256, "level0_magnification": 40, "target_magnification": 20}, 256),
        ({"patch_size": 225, "level0_magnification": 20, "target_magnification": 40}, 56),
        ({"patch_size": 256, "patch_level": np.array([0, 1])}, 128),
        ({"patch_size": 256, "patch_level": "0"}, 128),
        ({"patch_size": 256, "level": "n/a"}, 0),
        ({"patch_size": 256, "patch_level": 0.5}, 0),
        ({"patch_size": 256, "level": h5py.Empty("f4")}, 0),
        ({"patch_size": "large", "level": 0}, 0),
        ({"patch_size_level0": np.nan, "level0_width": np.inf, "level0_height": 1}, 0),
        ({"patch_size_level0": 0, "patch_size": -256, "level": 0}, 0),
        ({"patch_size": 256, "target_magnification": 0, "level0_magnification": 40}, 0),
    ],
)
def test_whatever_stands_in_attributes_is_a_size_or_none(
    tmp_path: Path, attributes: dict[str, object], half: float
) -> None:
    root, path = write_task(tmp_path / "task"), write_features(tmp_path / "s.h5", CORNERS, **attributes)
    assert np.array_equal(read(path).coords, CORNERS + half)
    assert read(path).origin.image_size is None
    with h5py.File(embeddings_of(root, "S0"), "r+") as file:
        file["coords"].attrs.update(attributes)
    assert HestTask(root, ENCODER).slide("S0").n_spots == 60


def test_patches_at_one_place_are_numbered(tmp_path: Path) -> None:
    corners = CORNERS.copy()
    corners[[5, 9]] = corners[2]
    slide = read(write_features(tmp_path / "s.h5", corners, patch_size_level0=512))
    assert slide.barcodes[[0, 2, 5, 9]].tolist() == ["2048_2048", "3072_2048", "3072_2048_1", "3072_2048_2"]
    assert len(set(slide.barcodes.tolist())) == 64
    assert any("2 of 64 spots lie where another one does" in note for note in slide.notes)


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


def test_folds(tmp_path: Path) -> None:
    root = write_task(tmp_path / "task")
    task = HestTask(root, ENCODER)
    assert task.folds() == [0]
    assert (task.fold(0).train, task.fold(0).test, task.fold(0).val) == (("S0", "S1"), ("S2",), ())
    write_split(root, "train", ("S0",))
    write_split(root, "val", ("S1",))
    assert task.fold(0).val == ("S1",)
    assert task.genes(GENE_LIST) == tuple(gene_names()[3:11])


def test_embeddings_may_lie_elsewhere_and_below_the_name_of_the_task(tmp_path: Path) -> None:
    root = write_task(tmp_path / "task")
    (tmp_path / "embedded").mkdir()
    (root / "embeddings").rename(tmp_path / "embedded" / "task")
    assert HestTask(root, ENCODER, tmp_path / "embedded").slide("S0").n_spots == 60


@pytest.mark.parametrize(
    ("side", "names"), [("test", ("S2", "S0")), ("val", ("S2",)), ("val", ("S0",))], ids=["test", "val-test", "val"]
)
def test_a_slide_on_two_sides_is_refused(tmp_path: Path, side: str, names: tuple[str, ...]) -> None:
    root = write_task(tmp_path / "task")
    write_split(root, side, names)
    with pytest.raises(InputError, match="on two sides"):
        HestTask(root, ENCODER).fold(0)


def named_in_splits(root: Path, old: str, new: str) -> None:
    for split in (root / "splits").glob("*.csv"):
        split.write_text(split.read_text().replace(old, new))


def test_patches_are_those_that_the_split_names(tmp_path: Path) -> None:
    root, made = write_task(tmp_path / "task"), arrays("S0")
    other = write_embeddings(root / "other" / "S0.h5", made, key="barcode", patch_size=PATCH)
    named_in_splits(root, "patches/", "other/")
    slide = HestTask(root, ENCODER).slide("S0", expression=False)
    assert np.abs(slide.coords - made["centres"]).max() <= 1
    assert slide.notes == ()
    other.unlink()
    absent = f"{other}: does not exist; {root / 'splits' / 'train_0.csv'} names it as patches_path of S0"
    trained = HestTask(root, ENCODER).slide("S0")
    assert (trained.n_spots, trained.notes) == (60, (absent,))
    assert HestTask(root, ENCODER).slide("S0", expression=False).notes[1:] == (absent,)
    named_in_splits(root, "other/", "./nothing/../patches/")
    assert HestTask(root, ENCODER).slide("S0").notes == (), "the benchmark's own are often not downloaded"


def test_places_in_splits_are_compared_and_not_their_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_task(tmp_path / "task")
    for number, name in enumerate(("./adata/S0.h5ad", "adata//S0.h5ad", "st/../adata/S0.h5ad", root / "adata/S0.h5ad")):
        (root / "splits" / f"test_{number + 1}.csv").write_text(f"sample_id,expr_path\nS0,{name}\n")
    monkeypatch.chdir(tmp_path)
    for folder in (root, "task"):
        assert HestTask(folder, ENCODER).slide("S0").n_spots == 60


@pytest.mark.parametrize("name", ["notes_old.csv", "train_0_old.csv", "train_x.csv", "train_01.csv", "all_0.csv"])
def test_tables_beside_splits_are_none(tmp_path: Path, name: str) -> None:
    root = write_task(tmp_path / "task")
    (root / "splits" / name).write_text("a,b\n1,2\n")
    task = HestTask(root, ENCODER)
    assert task.folds() == [0]
    assert task.slide(task.fold(0).train[0]).n_spots == 60


@pytest.mark.parametrize(("broken", "file"), [("open_features", r"fp32/S0\.h5"), ("read_anndata", r"adata/S0\.h5ad")])
def test_whatever_breaks_in_a_task_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, file: str
) -> None:
    def raise_it(*_: object) -> None:
        raise OverflowError("deep inside")

    root = write_task(tmp_path / "task")
    monkeypatch.setattr(hest, broken, raise_it)
    with pytest.raises(InputError, match=file + r": cannot be read \(OverflowError: deep inside\)"):
        HestTask(root, ENCODER).slide("S0")


def test_harmless_columns_refuse_no_slide_of_a_task(tmp_path: Path) -> None:
    """The splits say what a slide is: a column of batches that are strewn over it says nothing else."""
    root, path = write_task(tmp_path / "task"), tmp_path / "task" / "adata" / "S0.h5ad"
    table = anndata.read_h5ad(path)
    table.obs["batch"] = np.random.default_rng(0).permutation(np.repeat(["a", "b"], 30))
    table.write_h5ad(path)
    slide = HestTask(root, ENCODER).slide("S0")
    assert (slide.n_spots, slide.notes) == (60, ())


@pytest.mark.parametrize("content", [{"genes": ["A", "A"]}, {"genes": []}, {"names": ["A"]}, [], "A", {"genes": [1]}])
def test_broken_gene_lists_are_refused(tmp_path: Path, content: object) -> None:
    root = write_task(tmp_path / "task")
    write_json(root / "list.json", content)
    with pytest.raises(InputError, match=r"list\.json: "):
        HestTask(root, ENCODER).genes("list.json")


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


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "slide.svs").write_bytes(b"II*\0 an image")
    with pytest.raises(InputError, match=r"slide\.svs: is an image; give features of its patches"):
        read(tmp_path / "slide.svs")
    (tmp_path / "slide.txt").write_text("nothing of the kind")
    with pytest.raises(InputError, match=r"slide\.txt: is of no format that is known"):
        read(tmp_path / "slide.txt")
    with pytest.raises(InputError, match="does not exist"):
        read_embeddings(tmp_path / "slide.h5")
