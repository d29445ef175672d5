"""Bad input to training and evaluation: one line and exit code 2, and no run that was there is lost."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from stflow_fast.config import DenoiserConfig
from stflow_fast.model import Denoiser
from stflow_fast.pretrained import Provenance

from .builders import (
    ENCODER,
    FEATURES,
    GENE_LIST,
    PANEL,
    arrays,
    cut,
    embeddings_of,
    gene_names,
    write_embeddings,
    write_h5ad,
    write_split,
)
from .command_cases import TRAIN, contents, model, say, task

__all__ = ["model", "say", "task"]  # fixtures


def delete_key(path: Path, key: str) -> None:
    with h5py.File(path, "a") as file:
        del file[key]


def replace_key(path: Path, key: str, value: object) -> None:
    with h5py.File(path, "a") as file:
        del file[key]
        file[key] = value


def regroup(path: Path, key: str) -> None:
    with h5py.File(path, "a") as file:
        file.move(key, "aside")
        file.create_group(key)


def spoil(path: Path, key: str, value: float) -> None:
    with h5py.File(path, "a") as file:
        file[key][3:5] = value


BREAKAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing embeddings": (lambda t: embeddings_of(t, "S1").unlink(), r"S1\.h5: does not exist"),
    "missing expression": (lambda t: (t / "adata" / "S1.h5ad").unlink(), r"S1\.h5ad: does not exist"),
    "truncated embeddings": (lambda t: cut(embeddings_of(t, "S1")), r"S1\.h5: is not readable HDF5, or is truncated"),
    "truncated expression": (
        lambda t: cut(t / "adata" / "S1.h5ad"),
        r"S1\.h5ad: is not readable HDF5, or is truncated",
    ),
    "no embeddings key": (
        lambda t: delete_key(embeddings_of(t, "S1"), "embeddings"),
        "has no 'embeddings' or 'features'; it has barcodes, coords",
    ),
    "no barcodes key": (
        lambda t: delete_key(embeddings_of(t, "S1"), "barcodes"),
        r"S1\.h5: no barcode in common with .*S1\.h5ad \(they look like 480_480 and 0x0\)",
    ),
    "no common barcodes": (
        lambda t: write_embeddings(embeddings_of(t, "S1"), {**arrays("S1"), "barcodes": np.arange(60).astype(str)}),
        r"S1\.h5: no barcode in common with .*S1\.h5ad",
    ),
    "duplicated barcodes": (
        lambda t: write_embeddings(embeddings_of(t, "S1"), arrays("S1"), np.r_[0, 0, 1:60]),
        r"S1\.h5: 1 duplicated barcodes",
    ),
    "embeddings in a group": (lambda t: regroup(embeddings_of(t, "S1"), "embeddings"), "must be tables, not groups"),
    "coordinates of one number": (lambda t: replace_key(embeddings_of(t, "S1"), "coords", 3.0), "must have shape"),
    "barcodes that are no text": (
        lambda t: replace_key(embeddings_of(t, "S1"), "barcodes", np.full((60, 1), b"\xe9")),
        "barcodes are not UTF-8 text",
    ),
    "a slide twice in a split": (
        lambda t: write_split(t, "train", ("S0", "S1", "S0")),
        r"train_0\.csv: names S0 twice; remove one",
    ),
    "a split without names": (lambda t: write_split(t, "train", ("S0", "")), r"train_0\.csv: names no slide in row 3"),
    "a split of other columns": (
        lambda t: (t / "splits" / "train_0.csv").write_text("slide,path\nS0,x\n"),
        r"train_0\.csv: has no column sample_id; it has slide, path",
    ),
    "NaN features": (lambda t: spoil(embeddings_of(t, "S1"), "embeddings", np.nan), "slide S1: features of 2 of 60"),
    "infinite coordinates": (
        lambda t: write_h5ad(t / "adata" / "S1.h5ad", {**arrays("S1"), "centres": np.full((60, 2), np.inf)}),
        "slide S1: coords of 60 of 60 spots",
    ),
    "genes missing": (
        lambda t: (t / GENE_LIST).write_text('{"genes": ["GENE1", "NOSUCH"]}'),
        "1 of 2 genes are not in its expression: NOSUCH",
    ),
    "no gene list": (lambda t: (t / GENE_LIST).unlink(), f"{GENE_LIST}: does not exist"),
    "empty slide": (
        lambda t: write_embeddings(embeddings_of(t, "S1"), arrays("S1"), np.arange(0)),
        r"S1\.h5: has no spots",
    ),
    "features of another size": (
        lambda t: write_embeddings(embeddings_of(t, "S1"), {**arrays("S1"), "features": np.zeros((60, 3), np.float32)}),
        "slide S1: features of size 3, others have 16",
    ),
    "no splits": (lambda t: [path.unlink() for path in (t / "splits").iterdir()], "fold: 0 is not in"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_training_on_broken_data(say: Callable[..., str], task: Path, tmp_path: Path, name: str) -> None:
    spoil_it, complaint = BREAKAGES[name]
    spoil_it(task)
    assert re.search(complaint, say("train", task, "--out", tmp_path / "run", *TRAIN))
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--set", "n_heads=5"], "hidden_dim: must be a multiple of n_heads"),
        (["--set", "width=5"], "--set width: is not a setting"),
        (["--set", "n_layers=two"], "--set n_layers: 'two' is not a int"),
        (["--normalize", "sqrt"], "normalize: must be one of"),
        (["--select-on", "luck"], "select_on: must be none, validation or test, not 'luck'"),
        (["--fold", "4"], "fold: 4 is not in"),
        (["--learning-rate", "0"], "learning_rate: must be above 0"),
        (["--precision", "fp7"], "precision: must be one of no, bf16, fp16"),
        (["--set", "learning_rate=1"], "--set learning_rate: has a flag of its own, --learning-rate"),
        (["--set", "prior_total_count=0"], "total_count: must be above 0"),
        (["--seed", "-1"], "seed: must be a whole number from 0"),
        (["--seed", "99999999999999999999"], "seed: must be a whole number from 0"),
    ],
)
def test_training_with_bad_settings(
    say: Callable[..., str], task: Path, tmp_path: Path, arguments: list[str], complaint: str
) -> None:
    assert complaint in say("train", task, "--out", tmp_path / "run", *TRAIN, *arguments)


def test_a_run_survives_bad_input_to_its_successor(say: Callable[..., str], task: Path, tmp_path: Path) -> None:
    say("train", task, "--out", tmp_path / "run", *TRAIN, code=0)
    before = contents(tmp_path / "run")
    cut(embeddings_of(task, "S1"))
    for mode in ([], ["--overwrite"], ["--resume"]):
        say("train", task, "--out", tmp_path / "run", *TRAIN, *mode)
    assert contents(tmp_path / "run") == before


def test_resuming_what_is_not_there_or_cut_off(say: Callable[..., str], task: Path, tmp_path: Path) -> None:
    assert "run.json: cannot be read" in say("train", task, "--out", tmp_path / "none", *TRAIN, "--resume")
    say("train", task, "--out", tmp_path / "run", *TRAIN, code=0)
    cut(tmp_path / "run" / "checkpoint.safetensors")
    complaint = say("train", task, "--out", tmp_path / "run", *TRAIN, "--resume")
    assert "checkpoint.safetensors: cannot be read" in complaint


def test_evaluating_what_cannot_be_scored(say: Callable[..., str], task: Path, model: Path, tmp_path: Path) -> None:
    config = DenoiserConfig(PANEL, FEATURES, hidden_dim=16, pairwise_hidden_dim=16, n_layers=1)
    Denoiser(config).save_pretrained(tmp_path / "nameless")
    assert "names no genes or no encoder" in say("evaluate", tmp_path / "nameless", task)
    told = Provenance(tuple(gene_names()[3:11]), ENCODER, training={"train": {"S2": 60}})
    Denoiser(config, told).save_pretrained(tmp_path / "cheat")
    assert "trained or chosen on its test slides S2" in say("evaluate", tmp_path / "cheat", task)
    chosen = {"train": {"S0": 60}, "selection": {"S2": 60}, "selected_on": "held-out slides"}
    Denoiser(config, dataclasses.replace(told, training=chosen)).save_pretrained(tmp_path / "peek")
    assert "trained or chosen on its test slides S2" in say("evaluate", tmp_path / "peek", task)
    out = tmp_path / "maps"
    assert "GENE29" in say("evaluate", model, task, "--maps", out, "--biomarkers", "GENE3,GENE29")
    assert not out.exists()
