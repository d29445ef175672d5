"""Every broken input of the corpus is one line that says what is wrong, and stops no other; what is odd is read."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import anndata
import numpy as np
import pandas as pd
import pytest

from stflow_fast.cli.program import MOST_SHOWN
from stflow_fast.cohort import predict, read_lines
from stflow_fast.errors import InputError
from stflow_fast.slides import ReadOptions, read

from .builders import PANEL, gene_names, write_model
from .corpus import (
    BROKEN,
    CENTRES,
    EXECUTED,
    FEATURES,
    NO_COUNTS,
    ODD,
    build,
    column,
    embeddings,
    folder_of,
    h5ad,
    put,
    spatialdata,
    wsidata,
    zarr_3,
)

SPATIAL = importlib.util.find_spec("spatialdata") is not None
HERE = {name: case for name, case in BROKEN.items() if SPATIAL or case[1] not in (spatialdata, wsidata)}
"""Those that can be written here."""

AS_ANYONE = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
"""Before a command, takes away what lets the superuser read everything."""


class Ran(NamedTuple):
    """What became of all broken inputs and two good ones in one run."""

    folder: Path
    process: subprocess.CompletedProcess[str]
    said: dict[str, list[str]]  # by case


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("corpus")
    model = write_model(folder / "model", gene_names()[:8])
    good = [build(folder, name, ("", make)) for name, make in (("good_1", embeddings), ("good_2", zarr_3))]
    bad = {name: build(folder, name, case) for name, case in HERE.items()}
    options = ["--out", "out", "--workers", 1]
    command = [sys.executable, "-m", "stflow_fast", "predict", model, good[0], *bad.values(), good[1], *options]
    process = subprocess.run([*AS_ANYONE, *map(str, command)], cwd=folder, capture_output=True, text=True)
    lines = [line for line in read_lines(folder / "out").values() if not line.is_done]
    within = {name: f"{folder_of(folder, name)}/" for name in bad}
    said = {name: [line.reason for line in lines if line.input.startswith(start)] for name, start in within.items()}
    assert sum(map(len, said.values())) == len(lines)
    return Ran(folder, process, said)


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_one_line(ran: Ran, name: str) -> None:
    if name not in HERE:
        pytest.skip("spatialdata is not installed")
    [line] = ran.said[name]
    assert line.isprintable(), "it has another line, or moves the cursor"
    assert str(folder_of(ran.folder, name)) in line, "it names no file"
    assert re.search(r"; |\(--", line), "it says no mend"
    assert re.search(BROKEN[name][0], line), line


def test_no_other_is_stopped_and_nothing_executed(ran: Ran) -> None:
    assert ran.process.returncode == 3
    assert sorted(path.name for path in (ran.folder / "out").glob("*.h5ad")) == ["good_1.h5ad", "good_2.h5ad"]
    *lines, more, others = (line for line in ran.process.stderr.splitlines() if not line.startswith("slide "))
    assert len(lines) == MOST_SHOWN
    assert all(line.startswith("stflow-fast: ") for line in lines)
    assert more.startswith(f"stflow-fast: and {len(ran.said) - MOST_SHOWN} more slides failed")
    assert others == "stflow-fast: 2 other slides are in out"
    assert not (ran.folder / EXECUTED).exists()


@pytest.mark.parametrize("name", NO_COUNTS)
def test_what_has_no_counts_is_one_line(tmp_path: Path, name: str) -> None:
    path = build(tmp_path, name, NO_COUNTS[name])
    with pytest.raises(InputError, match=NO_COUNTS[name][0]) as error:
        read(path, ReadOptions(expression=True, require_features=False))
    assert str(error.value).isprintable()
    assert str(tmp_path) in str(error.value)
    assert "; " in str(error.value)


@pytest.mark.parametrize("name", ["counts of terabytes", "counts of themselves"])
def test_counts_are_looked_at_with_care_for_names_of_genes(tmp_path: Path, name: str) -> None:
    path = build(tmp_path, name, NO_COUNTS[name])
    with pytest.raises(InputError, match=NO_COUNTS[name][0]):
        read(path, ReadOptions(gene_names=True, require_features=False))


@pytest.mark.parametrize("name", ODD)
def test_what_is_odd_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    slide = read(build(tmp_path, name, ODD[name]))
    assert np.array_equal(slide.features, FEATURES)
    assert np.abs(slide.coords - CENTRES).max() <= 1
    assert "; ".join(slide.notes) == ODD[name][0]
    assert not Path(EXECUTED).exists()


def test_zeros_that_zarr_does_not_store_are_zeros(tmp_path: Path) -> None:
    path = build(tmp_path, "zeros", ODD["a column of zeros"])
    assert not list((path / "obs" / "odd").rglob("c/*"))
    assert read(path).obs["odd"].tolist() == [0] * len(CENTRES)


def test_rows_that_obs_has_not_are_in_no_section(tmp_path: Path) -> None:
    sections = column(pd.Categorical(["left"] * 30 + ["right"] * 30))
    path = build(tmp_path, "longer", ("", h5ad, sections, put("obsm/features", np.concatenate([FEATURES, FEATURES]))))
    with pytest.raises(InputError, match="features has 120 rows, obs 60; write both"):
        read(path, ReadOptions(library_key="odd", section="left"))


def test_a_model_without_genes_numbers_them(tmp_path: Path) -> None:
    predict(write_model(tmp_path / "model", ()), build(tmp_path, "good", ("", embeddings)), tmp_path / "out")
    assert anndata.read_h5ad(tmp_path / "out" / "good.h5ad").var_names.tolist() == [f"gene_{i}" for i in range(PANEL)]
