"""``stflow-fast inspect``: what files are, with bad ones as rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from stflow_fast.cli import app
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
        "library_ids": [],
        "genes": 30,
        "genes_in_common": 7,
        "notes": [],
        "problem": None,
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
    say("inspect", good, narrow, bare)  # without a model they are what they are
    told = say("inspect", tmp_path / "in", tmp_path / "none.h5", code=3)
    assert told.count("cannot be predicted: ") == 4
    assert f"{tmp_path / 'none.h5'}: does not exist" in told


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
