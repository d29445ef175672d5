"""What predictions hold: columns of the input, libraries and their spots, genes, precision, and the layout."""

from __future__ import annotations

import dataclasses
import errno
import json
import threading
import time
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from stflow_fast import outputs
from stflow_fast.cli import app
from stflow_fast.cohort import MANIFEST, predict
from stflow_fast.errors import InputError, OutputError
from stflow_fast.files import atomic_files, write_json
from stflow_fast.model import Denoiser
from stflow_fast.outputs import LAYOUT, OutputConfig, as_dtype
from stflow_fast.outputs.table import CANVAS
from stflow_fast.slides import Origin, Slide

from .builders import arrays
from .builders import write_h5ad as write_input
from .output_cases import GENES, HUNDREDS, TENS, model, predict_one, reread, slide, table_of

__all__ = ["model"]  # a fixture


def test_obs_of_the_input_is_carried(model: Denoiser, tmp_path: Path) -> None:
    n = 60
    given = {
        "n_counts": np.arange(n, dtype=np.int32),
        "percent mt (%)": np.linspace(0, 1, n),
        "layer": pd.Categorical(["L2", "L1"] * (n // 2), categories=["L2", "L1"], ordered=True),
        "donor": ["d1", None] * (n // 2),
        "cell": [f"cell {i}" for i in range(n)],
        "cluster": pd.array([1, None] * (n // 2), dtype="Int64"),
        "in_tissue": np.arange(n) % 3 == 0,
    }
    obs = pd.DataFrame(given, index=range(7, 7 + n))
    found = predict_one(model, tmp_path / "out", slide(obs=obs)).obs
    assert list(found.index) == list(slide().barcodes)
    assert list(found) == ["library_id", *given]
    for name in ("n_counts", "percent mt (%)", "cell", "in_tissue"):
        assert found[name].tolist() == obs[name].tolist()
    assert found["layer"].cat.ordered
    assert list(found["layer"].cat.categories) == ["L2", "L1"]
    for name in ("layer", "donor", "cluster"):
        assert found[name].isna().tolist() == obs[name].isna().tolist()
        assert found[name].dropna().tolist() == obs[name].dropna().tolist()


def test_what_anndata_cannot_write_becomes_text_and_a_note(tmp_path: Path) -> None:
    n = 6
    obs = pd.DataFrame(
        {
            "mixed": [1, "x", None] * 2,
            "day": pd.date_range("2026-01-01", periods=n),
            "raw": [b"a", b"b"] * 3,
            "nothing": [None] * n,
            "plain": range(n),
        }
    )
    found = reread(table_of(slide(n=n, obs=obs)), tmp_path / "x.h5ad")
    assert found.obs["mixed"].tolist()[:2] == ["1", "x"]
    assert found.obs["mixed"].isna().tolist() == [False, False, True] * 2
    assert found.obs["day"].tolist()[0].startswith("2026-01-01")
    assert found.obs["raw"].tolist()[:2] == ["a", "b"]
    assert found.obs["nothing"].isna().all()
    assert found.obs["plain"].tolist() == list(range(n))
    assert found.uns["stflow_fast"]["notes"] == "obs: what is in mixed, day, raw was written as text"


CELLS = (
    st.integers(-5, 5)
    | st.floats(-100, 100, width=16)
    | st.text(alphabet="ab/ .é\0\ud800", max_size=3)
    | st.binary(max_size=2)
    | st.sampled_from([None, True, np.nan, np.inf, pd.NA, pd.NaT, pd.Timestamp("2026-01-02"), 1j, (1, 2)])
)
COLUMNS = st.lists(CELLS, min_size=5, max_size=5)
KINDS = st.sampled_from([None, "category", "string", "Int64", "Float64", "boolean", "datetime64[ns]", "float16"])
NAMES = st.sampled_from(["_index", "library_id", "a/b", "a_b", "", ".", "x", 7, ("t", 1)])


@given(st.lists(st.tuples(NAMES, KINDS, COLUMNS), max_size=4))
def test_any_obs_is_written_and_read_back(
    tmp_path_factory: pytest.TempPathFactory, made: list[tuple[object, str | None, list[object]]]
) -> None:
    """A row stays a row, a missing value missing, and a column a column of its own name."""
    columns = []
    for _, kind, values in made:
        try:
            columns.append(pd.Series(values, dtype=object).astype(kind or object))
        except (ValueError, TypeError, OverflowError):  # no column of that kind
            columns.append(pd.Series(values, dtype=object))
    obs = pd.concat(columns, axis=1) if columns else pd.DataFrame(index=range(5))
    obs.columns = pd.Index([name for name, _, _ in made], dtype=object, tupleize_cols=False)
    found = reread(table_of(slide(n=5, obs=obs)), tmp_path_factory.mktemp("obs") / "x.h5ad").obs
    assert len(set(found)) == len(found.columns) == 1 + len(columns)
    for place, column in enumerate(columns):
        assert found.iloc[:, 1 + place].isna().tolist() == column.isna().tolist()


def test_a_column_of_the_input_with_a_name_of_ours_is_kept_beside(tmp_path: Path) -> None:
    halves = np.repeat(["a", "b"], 100)
    other = slide(n=200, obs=pd.DataFrame({"library_id": halves}))
    found = reread(table_of(other), tmp_path / "x.h5ad").obs
    assert found["library_id"].tolist() == ["S0"] * 200
    assert found["library_id_1"].tolist() == halves.tolist()
    same = table_of(dataclasses.replace(other, library_id=halves)).obs
    assert list(same) == ["library_id"]
    assert same["library_id"].tolist() == halves.tolist()


@pytest.mark.parametrize(
    ("scalefactors", "n", "diameter", "known_from"),
    [
        ({"spot_diameter_fullres": 55.0, "fiducial_diameter_fullres": 144.0}, 60, 55.0, "file"),
        ({}, 60, 100.0, "spacing"),
        ({"spot_diameter_fullres": 0.0}, 60, 100.0, "spacing"),
        ({}, 1, 1.0, "unknown"),
    ],
)
def test_spots_have_a_diameter_and_where_it_is_from(
    tmp_path: Path, scalefactors: dict[str, float], n: int, diameter: float, known_from: str
) -> None:
    one = slide(n=n, origin=Origin(scalefactors=scalefactors))
    found = reread(table_of(one), tmp_path / "x.h5ad")
    assert found.uns["stflow_fast"]["spot_diameter_from"] == known_from
    drawn_by = found.uns["spatial"]["S0"]
    assert drawn_by["scalefactors"]["spot_diameter_fullres"] == pytest.approx(diameter, rel=1e-3)
    assert drawn_by["scalefactors"].get("fiducial_diameter_fullres") == scalefactors.get("fiducial_diameter_fullres")
    assert list(found.obs["library_id"].cat.categories) == ["S0"]


@pytest.mark.parametrize(
    ("origin", "diameters", "known_from"),
    [
        (Origin(library_scalefactors={**HUNDREDS, **TENS}), (180.0, 18.0), "file"),
        (Origin(library_scalefactors=HUNDREDS), (180.0, 50.0), "mixed"),
        (Origin(scalefactors=HUNDREDS["A"], library_scalefactors=HUNDREDS), (180.0, 50.0), "mixed"),
        (Origin(scalefactors=HUNDREDS["A"], library_scalefactors={"C": HUNDREDS["A"]}), (100.0, 50.0), "spacing"),
        (Origin(scalefactors=HUNDREDS["A"]), (180.0, 180.0), "file"),
        (Origin(), (100.0, 50.0), "spacing"),
    ],
)
def test_each_library_is_drawn_by_scale_factors_of_its_own(
    tmp_path: Path, origin: Origin, diameters: tuple[float, float], known_from: str
) -> None:
    """Spots of the second lie half as far apart, and none of the first's factors are said of them."""
    coarse = arrays("S0")["centres"]
    coords = np.concatenate([coarse, coarse / 2 + 5000])
    library = np.repeat(["A", "B"], len(coarse))
    names = [f"b{i}" for i in range(len(coords))]
    one = Slide("S0", np.zeros((len(coords), 2), np.float32), coords, names, library_id=library, origin=origin)
    found = reread(table_of(one), tmp_path / "x.h5ad").uns
    factors = [found["spatial"][name]["scalefactors"] for name in "AB"]
    assert [each["spot_diameter_fullres"] for each in factors] == pytest.approx(diameters, rel=1e-3)
    assert ("fiducial_diameter_fullres" in factors[0]) == (diameters[0] == 180.0)
    assert found["stflow_fast"]["spot_diameter_from"] == known_from


@pytest.mark.parametrize("column", [["zz"] * 60, pd.Categorical(["zz"] * 60)])
def test_the_only_library_of_a_file_keeps_its_name(model: Denoiser, tmp_path: Path, column: Any) -> None:
    given = anndata.read_h5ad(write_input(tmp_path / "obs.h5ad", arrays("S0"), features=True))
    given.obs["library_id"] = column
    given.uns["spatial"] = {"zz": {"scalefactors": {"spot_diameter_fullres": 55.0, "tissue_hires_scalef": 0.1}}}
    given.write_h5ad(tmp_path / "obs.h5ad")
    [path] = predict(model, tmp_path / "obs.h5ad", tmp_path / "out")
    found = anndata.read_h5ad(path)
    assert list(found.obs) == ["library_id"]
    assert set(found.obs["library_id"]) == set(found.uns["spatial"]) == {"zz"}
    assert found.uns["spatial"]["zz"]["scalefactors"]["spot_diameter_fullres"] == 55.0
    assert found.uns["stflow_fast"]["spot_diameter_from"] == "file"


def test_all_spots_lie_on_the_image_that_they_are_drawn_on() -> None:
    table = table_of(slide())
    drawn_by = table.uns["spatial"]["S0"]
    image, factors = drawn_by["images"]["hires"], drawn_by["scalefactors"]
    reach = (table.obsm["spatial"].max(axis=0) + factors["spot_diameter_fullres"] / 2) * factors["tissue_hires_scalef"]
    assert (reach <= image.shape[1::-1]).all()
    assert max(image.shape) == CANVAS


def test_sections_of_a_table_are_libraries(tmp_path: Path) -> None:
    sections = np.repeat(["p1/left", "right"], 100)
    found = reread(table_of(slide(n=200, library_id=sections)), tmp_path / "x.h5ad")
    assert found.obs["library_id"].tolist() == ["p1_left"] * 100 + ["right"] * 100
    assert set(found.uns["spatial"]) == {"p1_left", "right"}


def test_genes_are_written_in_the_order_that_was_asked_for(model: Denoiser, tmp_path: Path) -> None:
    whole = predict_one(model, tmp_path / "whole")
    some = predict_one(model, tmp_path / "some", genes=["VWF", "ERBB2"])
    assert list(some.var_names) == ["VWF", "ERBB2"]
    assert np.array_equal(some.X, whole[:, ["VWF", "ERBB2"]].X)


@pytest.mark.parametrize(
    ("genes", "complaint"),
    [
        (["VWF", "erbb2", "X"], r"^genes: 2 of 3 are not among the 4 that the model predicts: erbb2, X; 1 of them are"),
        (["VWF", "VWF"], "^genes: VWF is named twice"),
        ([], "^genes: names no gene"),
        ("VWF", "^genes: must be a list of names"),
    ],
)
def test_genes_that_cannot_be_written(model: Denoiser, tmp_path: Path, genes: Any, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        predict_one(model, tmp_path / "out", genes=genes)
    assert not (tmp_path / "out").exists()


def test_half_precision_is_the_rounded_prediction(model: Denoiser, tmp_path: Path) -> None:
    whole, half = predict_one(model, tmp_path / "whole"), predict_one(model, tmp_path / "half", dtype="float16")
    assert half.X.dtype == np.float16
    assert np.array_equal(half.X, whole.X.astype(np.float16))
    assert (tmp_path / "half" / "S0.h5ad").stat().st_size < (tmp_path / "whole" / "S0.h5ad").stat().st_size


def test_numbers_too_large_for_half_precision_are_refused() -> None:
    counts = np.array([[1.0, 65504.0], [7e4, 1e6]], np.float32)
    assert as_dtype("S0", counts, "float32") is counts
    with pytest.raises(InputError, match=r"^slide S0: 2 of 4 predicted numbers are beyond 65504.0, .*--dtype float32$"):
        as_dtype("S0", counts, "float16")


@pytest.mark.parametrize("options", [{"to": "csv"}, {"dtype": "int8"}])
def test_impossible_outputs_are_refused(options: dict[str, str]) -> None:
    [field] = options
    with pytest.raises(InputError, match=f"^{field}: must be .* or .*, not '"):
        OutputConfig(**options)


def test_resuming_mixes_no_layouts(model: Denoiser, tmp_path: Path) -> None:
    out = tmp_path / "out"
    [path] = predict(model, [slide()], out)
    about = anndata.read_h5ad(path).uns["stflow_fast"]
    assert about["layout"] == json.loads((out / MANIFEST).read_text())["layout"] == LAYOUT
    for field, options in (("dtype", {"dtype": "float16"}), ("genes_sha256", {"genes": GENES[::-1]})):
        with pytest.raises(InputError, match=rf"{MANIFEST}: {field} differs from this call"):
            predict(model, [slide()], out, output=OutputConfig(**options), resume=True)
    before = path.read_bytes()
    predict(model, [slide()], out, output=OutputConfig(genes=GENES), resume=True)  # names the same genes
    assert path.read_bytes() == before
    manifest = json.loads((out / MANIFEST).read_text())
    write_json(out / MANIFEST, {key: value for key, value in manifest.items() if key != "layout"})
    with pytest.raises(InputError, match=rf"{MANIFEST}: tells no layout, an earlier version made it; .* --overwrite"):
        predict(model, [slide()], out, resume=True)


def test_a_prediction_of_another_layout_is_made_again(
    model: Denoiser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where overwriting those of an earlier version was interrupted."""
    out = tmp_path / "out"
    [path] = predict(model, [slide()], out)
    now = path.read_bytes()
    with monkeypatch.context() as earlier:
        earlier.setattr(outputs, "LAYOUT", LAYOUT - 1)
        predict(model, [slide()], out, overwrite=True)
    manifest = json.loads((out / MANIFEST).read_text())
    write_json(out / MANIFEST, {**manifest, "layout": LAYOUT})
    predict(model, [slide()], out, resume=True)
    assert anndata.read_h5ad(path).uns["stflow_fast"]["layout"] == LAYOUT
    assert path.read_bytes() == now


def test_the_command_takes_a_list_of_genes_and_a_dtype(model: Denoiser, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    made = write_input(tmp_path / "S0.h5ad", arrays("S0"), features=True)
    (tmp_path / "genes.txt").write_text("# of interest\nGATA3\nCD3E\n")
    command = ["predict", tmp_path / "model", made, "--genes", tmp_path / "genes.txt", "--dtype", "float16"]
    said = CliRunner().invoke(app, [*map(str, command), "--out", str(tmp_path / "out")], catch_exceptions=False)
    assert said.exit_code == 0, said.output
    found = anndata.read_h5ad(tmp_path / "out" / "S0.h5ad")
    assert list(found.var_names) == ["GATA3", "CD3E"]
    assert found.X.dtype == np.float16


def test_nothing_half_written_stays_where_a_librarys_threads_outlive_its_failure(tmp_path: Path) -> None:
    def write_on(folder: Path) -> None:
        for number in range(20):
            (folder / f"{number}").mkdir(parents=True, exist_ok=True)
            time.sleep(0.01)

    writers = []

    def fail() -> None:
        with atomic_files(tmp_path) as temporary:
            writers.append(threading.Thread(target=write_on, args=(temporary,)))
            writers[0].start()
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match="No space left"):
        fail()
    writers[0].join()
    assert not list(tmp_path.iterdir())
