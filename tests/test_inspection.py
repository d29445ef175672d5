"""``stflow-fast inspect``: what files are, with bad ones as rows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from stflow_fast.cli import app
from stflow_fast.cohort import load_model
from stflow_fast.inspection import expand, inspect
from stflow_fast.slides import ReadOptions, StoredRows

from .builders import (
    ENCODER,
    FEATURES,
    arrays,
    embeddings_of,
    gene_names,
    write_embeddings,
    write_h5ad,
    write_model,
    write_task,
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", (*gene_names()[3:10], "ELSEWHERE"))


def say(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stdout


def test_a_file_is_described(tmp_path: Path, model: Path) -> None:
    made = arrays("S0")
    path = write_h5ad(tmp_path / "a.h5ad", {**made, "features": made["features"].astype(np.float16)}, features=True)
    [found] = json.loads(say("inspect", path, "--model", model, "--json"))
    assert found == {
        "path": str(path),
        "slide": "a",
        "format": "anndata",
        "spots": 60,
        "features": FEATURES,
        "features_dtype": "float16",
        "encoder": None,
        "spacing_px": pytest.approx(100.0, rel=1e-3),
        "spacing_um": pytest.approx(50.0, rel=1e-3),
        "image_size": None,
        "library_ids": [],
        "genes": 30,
        "genes_in_common": 7,
        "notes": [],
        "problem": None,
        "predictable": True,
    }
    said = say("inspect", path, "--model", model)
    for word in ("AnnData", "60", "16 float16", "30 genes", "100.0 px, 50.0 um", "genes of the model"):
        assert word in said


def test_bad_files_are_rows_and_the_exit_code_says_so(tmp_path: Path, model: Path) -> None:
    good = write_embeddings(tmp_path / "in" / "good.h5", arrays("S0"), patch_size=40)
    (tmp_path / "in" / "broken.h5").write_bytes(good.read_bytes()[:2000])
    (tmp_path / "in" / "empty.h5ad").touch()
    torch.save(torch.zeros(3, 4), tmp_path / "in" / "features.pt")
    narrow = write_embeddings(
        tmp_path / "in" / "narrow.h5", {**arrays("S1"), "features": np.zeros((60, 3))}, patch_size=40
    )
    bare = write_h5ad(tmp_path / "in" / "bare.h5ad", arrays("S2"))
    found = {
        each["slide"]: each for each in json.loads(say("inspect", tmp_path / "in", "--model", model, "--json", code=3))
    }
    assert [name for name, each in found.items() if each["problem"] is None] == ["good"]
    for name, said in {
        "broken": "is not readable HDF5, or is truncated",
        "empty": "is empty (0 bytes)",
        "features": "features without coordinates",
        "narrow": "has 3 features, the model takes 16",
        "bare": "has no features, the model takes 16",
    }.items():
        assert said in found[name]["problem"]
    assert all(
        each["problem"].startswith(str(tmp_path / "in" / name)) for name, each in found.items() if name != "good"
    )
    say("inspect", good, narrow, bare)  # without a model they are what they are
    told = say("inspect", tmp_path / "in", tmp_path / "none.h5", code=3)
    assert told.count("cannot be predicted: ") == 4
    assert f"{tmp_path / 'none.h5'}: does not exist" in told


def test_expression_alone_is_no_fault_and_cannot_be_predicted(tmp_path: Path, model: Path) -> None:
    bare = write_h5ad(tmp_path / "S2.h5ad", arrays("S2"))
    write_embeddings(tmp_path / "features" / "S2.h5", arrays("S2"))
    [found] = json.loads(say("inspect", bare, "--json"))
    assert (found["genes"], found["features"], found["predictable"], found["problem"]) == (30, None, False, None)
    assert f"note: {bare}: expression without features, which predict needs" in say("inspect", bare)
    [found] = json.loads(say("inspect", bare, "--model", model, "--embeddings", tmp_path / "features", "--json"))
    assert (found["genes"], found["features"], found["predictable"]) == (30, FEATURES, True)
    assert "S2.h5: does not exist" in say("inspect", bare, "--embeddings", tmp_path, code=3)
    neither = write_h5ad(tmp_path / "neither.h5ad", arrays("S0"), x=None)
    assert f"{neither}: has neither features nor expression" in say("inspect", neither, code=3)


def test_features_that_are_named_have_to_be_there(tmp_path: Path) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", arrays("S0"), features=True)
    said = say("inspect", path, "--features-key", "X_uni", code=3)
    assert f"cannot be predicted: {path}: has no obsm['X_uni'] with patch embeddings" in said


def test_the_encoder_is_held_against_the_models(tmp_path: Path, model: Path) -> None:
    def written(encoder: str) -> Path:
        return write_embeddings(tmp_path / "embeddings" / encoder / "fp32" / "S0.h5", arrays("S0"), patch_size=40)

    other = written("uni_v2")
    say("inspect", other)
    said = say("inspect", other, "--model", model, code=3)
    assert f"{other}: features are of 'uni_v2', but the model was trained with {ENCODER!r}" in said
    say("inspect", other, "--model", model, "--ignore-encoder")
    for name in (ENCODER.upper(), f"{ENCODER}_v1"):
        say("inspect", written(name), "--model", model)


@pytest.mark.parametrize("key", ["csr", "raw", "X"])
def test_expression_is_that_which_train_takes(tmp_path: Path, key: str) -> None:
    """Not features that lie in X, nor the few genes of an X that is no counts."""
    path = write_h5ad(tmp_path / "a.h5ad", arrays("S0"), features=True)
    table = anndata.read_h5ad(path)
    if key == "raw":
        table.raw = table.copy()
        table.X = np.log1p(table.X)
        table[:, :5].copy().write_h5ad(path)
    reading = ReadOptions(features_key="X") if key == "X" else None
    [found] = inspect(path, reading)
    assert found.genes == (0 if key == "X" else 30)
    assert found.predictable


def test_expression_of_stimage_is_told(tmp_path: Path, model: Path) -> None:
    made, folder = arrays("S0"), tmp_path / "Visium"
    places = pd.DataFrame({"yaxis": made["centres"][:, 1], "xaxis": made["centres"][:, 0]}, made["barcodes"])
    counts = pd.DataFrame(made["counts"].astype(int), made["barcodes"], gene_names())
    for name, table in (("coord/S0_coord.csv", places), ("gene_exp/S0_count.csv", counts)):
        (folder / name).parent.mkdir(parents=True)
        table.to_csv(folder / name)
    [found] = inspect(tmp_path, model=load_model(model, "cpu"))
    assert (found.path, found.format, found.genes, found.genes_in_common) == (str(folder), "stimage", 30, 7)


@pytest.mark.parametrize(
    ("spelled", "symbols", "said"),
    [
        (
            lambda name: name if name == "GENE9" else name.lower(),
            False,
            "^7 of the model's 8 genes are not .*GENE3, .* 6 of them .*for capital letters .*'gene3' for 'GENE3'",
        ),
        (
            lambda name: name.replace("GENE", "ENSG"),
            True,
            r"^8 of .* var\['symbol'\] has 7 of them: --gene-key symbol .*'GENE3', which is 'ENSG3' here",
        ),
        (lambda name: name.replace("GENE", "ENSG"), False, "^8 of .* it has names such as ENSG0, ENSG1"),
    ],
    ids=["mouse", "ensembl", "ensembl without symbols"],
)
def test_other_spellings_of_the_models_genes_are_told(
    tmp_path: Path, model: Path, spelled: Callable[[str], str], symbols: bool, said: str
) -> None:
    """A gene that is just not there is counted, and no word is lost on it."""
    path = write_h5ad(tmp_path / "a.h5ad", arrays("S0"), features=True)
    reading = ReadOptions(), load_model(model, "cpu")
    assert inspect(path, *reading)[0].notes == ()
    table = anndata.read_h5ad(path)
    if symbols:
        table.var["symbol"] = list(table.var_names)
    table.var_names = list(map(spelled, table.var_names))
    table.write_h5ad(path)
    [note] = inspect(path, *reading)[0].notes
    assert re.search(said, note)
    if symbols:
        [found] = inspect(path, ReadOptions(gene_key="symbol"), reading[1])
        assert (found.genes_in_common, found.notes) == (7, ())


def test_notes_are_told_once_for_all_files_that_they_are_about(tmp_path: Path) -> None:
    paths = [write_embeddings(tmp_path / f"S{i}.h5", arrays(f"S{i}")) for i in range(3)]
    said = say("inspect", *paths)
    assert said.count("note: ") == 1
    assert f"note: {paths[0]} and 2 more: coordinates stay top-left corners" in said


def test_sections_are_rows(tmp_path: Path) -> None:
    parts = {
        name: anndata.read_h5ad(write_h5ad(tmp_path / f"{name}.h5ad", arrays("S0"), features=True)) for name in "AB"
    }
    path = tmp_path / "both" / "both.h5ad"
    path.parent.mkdir()
    anndata.concat(parts, label="library_id", index_unique="-").write_h5ad(path)
    [found] = inspect([path])
    assert "--library-key library_id" in found.problem
    assert [each.slide for each in inspect([path], ReadOptions(library_key="library_id"))] == ["both_A", "both_B"]


def test_folders_are_looked_through(tmp_path: Path) -> None:
    """Not where patches are, which belong to features, and a store is one thing."""
    root = write_task(tmp_path / "task")
    write_embeddings(root / "patches" / "S0.h5", arrays("S0"))
    (root / "README.md").write_text("nothing to read")
    anndata.read_h5ad(write_h5ad(tmp_path / "a.h5ad", arrays("S0"), features=True)).write_zarr(
        root / "store" / "a.zarr"
    )
    names = [path.relative_to(root) for path in expand(root)]
    assert names == [
        *(Path("adata") / f"S{i}.h5ad" for i in range(3)),
        *(Path("embeddings") / ENCODER / "fp32" / f"S{i}.h5" for i in range(3)),
        Path("store/a.zarr"),
    ]
    assert [each.format for each in inspect([root])] == ["anndata"] * 3 + ["embeddings"] * 3 + ["anndata"]
    (tmp_path / "nothing").mkdir()
    [found] = inspect([tmp_path / "nothing"])
    assert "is a folder, and of no format itself; give the files in it" in found.problem


@pytest.mark.parametrize("given", [str, Path, lambda path: [str(path)]], ids=["text", "path", "list"])
def test_one_path_is_a_path(tmp_path: Path, given: Callable[[Path], object]) -> None:
    path = write_embeddings(tmp_path / "S0.h5", arrays("S0"), patch_size=40)
    assert [each.path for each in inspect(given(path))] == [str(path)]


def test_a_folder_that_may_not_be_read_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = write_embeddings(tmp_path / "a" / "S0.h5", arrays("S0"), patch_size=40)
    closed = tmp_path / "closed"
    closed.mkdir()

    def refusing(plain: Callable[..., object]) -> Callable[..., object]:
        def refuse(path: Path, *arguments: object) -> object:
            if closed in (path, *path.parents):
                raise PermissionError(13, "Permission denied", str(path))
            return plain(path, *arguments)

        return refuse

    for name in ("is_file", "iterdir"):  # as for whoever has no right: the superuser has all of them
        monkeypatch.setattr(Path, name, refusing(getattr(Path, name)))
    for given in ([tmp_path], [tmp_path / "a", closed]):
        first, second = sorted(inspect(given), key=lambda found: found.path)
        assert (first.path, first.predictable) == (str(good), True)
        assert re.match(f"{closed}: cannot be read .*Permission denied", second.problem)


def test_brackets_in_a_name_are_brackets(tmp_path: Path) -> None:
    path = write_embeddings(tmp_path / "a[" / "b].h5", arrays("S0"), patch_size=40)
    assert say("inspect", path, "--json").count(json.dumps(str(path))) == 1


def test_features_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_embeddings(embeddings_of(tmp_path, "S0"), arrays("S0"))
    with h5py.File(path, "a") as file:
        file["embeddings"][3] = np.nan

    def read(self: StoredRows, rows: object) -> None:
        raise AssertionError("features were read")

    monkeypatch.setattr(StoredRows, "__getitem__", read)
    assert inspect([path])[0].spots == 60


def test_real_slides(shared: Callable[[str], Path]) -> None:
    root = shared("data/her2st")
    found = [each for each in inspect([root]) if each.format == "embeddings"]
    assert [(each.slide, each.spots) for each in found[:2]] == [("A1", 346), ("B4", 283)]
    for each in found:
        assert (each.features, each.features_dtype, each.encoder) == (1280, "float32", "efficientnet_lite0")
        assert each.spacing_um == pytest.approx(200, rel=0.1)
        assert each.notes == ()
