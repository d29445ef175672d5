"""The folder of a HEST-bench task: splits, and where embeddings, patches and expression of its slides lie."""

from __future__ import annotations

from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest

from stflow_fast.errors import InputError
from stflow_fast.files import write_json
from stflow_fast.slides import HestTask, hest, read

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


def test_patches_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, made = write_task(tmp_path / "task"), arrays("S0")
    write_embeddings(root / "patches" / "S0.h5", made, patch_size=PATCH)
    expected = read(embeddings_of(root, "S0")).coords
    monkeypatch.chdir(embeddings_of(root, "S0").parent)
    assert np.array_equal(read("S0.h5").coords, expected)


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


def test_older_hest_patches_tell_the_size_by_their_images(tmp_path: Path) -> None:
    root = write_task(tmp_path / "task")
    (root / "patches").mkdir()
    with h5py.File(root / "patches" / "S0.h5", "w") as file:
        file["coords"] = np.zeros((60, 2), np.int64)
        file.create_dataset("img", (60, 20, 20, 3), np.uint8).attrs["downsample"] = 2.0
    assert np.abs(HestTask(root, ENCODER).slide("S0", expression=False).coords - arrays("S0")["centres"]).max() <= 1
    with pytest.raises(InputError, match=r"S0\.h5: holds images of patches and no features; .* stflow-fast embed"):
        read(root / "patches" / "S0.h5")


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


def test_patches_are_sought_in_the_folder_of_a_task(tmp_path: Path) -> None:
    root = write_task(tmp_path / "task")
    write_embeddings(root / "patches" / "S0.h5", arrays("S0"), patch_size=PATCH)
    assert np.abs(read(embeddings_of(root, "S0")).coords - arrays("S0")["centres"]).max() <= 1
