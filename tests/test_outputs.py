"""What predictions hold, and that everybody's tools open and draw them."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
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
from stflow_fast.cohort import MANIFEST, SamplingConfig, predict
from stflow_fast.errors import InputError, OutputError
from stflow_fast.files import atomic_files, write_json
from stflow_fast.model import Denoiser
from stflow_fast.outputs import LAYOUT, Expression, OutputConfig, as_dtype, prediction_table, read_about, write_h5ad
from stflow_fast.slides import Origin, Slide

from .builders import arrays, small_model
from .builders import write_h5ad as write_input

GENES = ("ERBB2", "CD3E", "GATA3", "VWF")


@pytest.fixture(scope="module")
def model() -> Denoiser:
    return small_model(len(GENES), GENES, "tiny")


def slide(name: str = "S0", n: int = 60, **more: Any) -> Slide:
    made = arrays("S0", n)
    return Slide(name, made["features"], made["centres"], made["barcodes"], **more)


def table_of(one: Slide) -> anndata.AnnData:
    return prediction_table(one, ["A", "B"], {"layout": LAYOUT})


def zeros(table: anndata.AnnData) -> Expression:
    return Expression(table.shape, "float32", [(slice(0, table.n_obs), [np.zeros(table.shape, np.float32)])])


def reread(table: anndata.AnnData, path: Path) -> anndata.AnnData:
    write_h5ad(path, table, zeros(table))
    return anndata.read_h5ad(path)


def predict_one(model: Denoiser, path: Path, one: Slide | None = None, **options: Any) -> anndata.AnnData:
    [written] = predict(model, [one or slide()], path, output=OutputConfig(**options))
    return anndata.read_h5ad(written)


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


HUNDREDS = {"A": {"spot_diameter_fullres": 180.0, "fiducial_diameter_fullres": 900.0}}
TENS = {"B": {"spot_diameter_fullres": 18.0}}


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
    assert max(image.shape) == outputs.CANVAS


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


def test_spatialdata_that_is_not_installed_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spatialdata", None)
    with pytest.raises(InputError, match=r"^to: spatialdata .*; pip install 'stflow-fast\[spatialdata\]'$"):
        OutputConfig("spatialdata")


def run_in(python: str, script: str, *arguments: object) -> Any:
    """What a script prints as JSON in its last line, run by another interpreter."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "TRITON"))}
    command = [python, "-W", "ignore", "-c", script, *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, env=clean)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


READ = """
import json, sys
import anndata
table = anndata.read_h5ad(sys.argv[1])
plain = lambda each: {key: plain(value) for key, value in each.items()} if hasattr(each, "items") else (
    each.tolist() if hasattr(each, "tolist") else each)
print(json.dumps({
    "X": table.X.astype("float64").tolist(), "dtype": str(table.X.dtype), "var": list(table.var_names),
    "obs": {name: [None if missing else str(value) for value, missing in zip(table.obs[name], table.obs[name].isna())]
            for name in table.obs},
    "barcodes": list(table.obs_names), "spatial": table.obsm["spatial"].tolist(), "uns": plain(table.uns),
}))
"""


@pytest.mark.parametrize("dtype", outputs.DTYPES)
def test_other_versions_of_anndata_read_the_same(model: Denoiser, tmp_path: Path, dtype: str) -> None:
    pythons = os.environ.get("STFLOW_ANNDATA_PYTHONS")
    if not pythons:
        pytest.skip(
            "STFLOW_ANNDATA_PYTHONS names no interpreters (with colons between) that have other versions of anndata"
        )
    n = 60
    obs = pd.DataFrame(
        {
            "number": np.linspace(0, 1, n),
            "text": [f"cell {i}" for i in range(n)],
            "missing": ["a", None] * (n // 2),
            "whole": pd.array([1, None] * (n // 2), dtype="Int64"),
            "flag": pd.array([True, None] * (n // 2), dtype="boolean"),
            "string": pd.array(["q", "r"] * (n // 2), dtype="string"),
            "ordered": pd.Categorical(["hi", "lo"] * (n // 2), categories=["lo", "hi"], ordered=True),
        }
    )
    output = OutputConfig(dtype=dtype, genes=GENES[:3])
    [path] = predict(model, [slide(obs=obs, notes=("ä note",))], tmp_path / "out", output=output)
    expected, *others = [run_in(python, READ, path) for python in (sys.executable, *pythons.split(":"))]
    assert expected["dtype"] == dtype
    assert expected["obs"]["whole"] == ["1", None] * (n // 2)
    for found in others:
        assert found == expected


DRAW = """
import json, sys
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import anndata, numpy as np, scanpy, squidpy

table = anndata.read_h5ad(sys.argv[1])
gene = table.var_names[0]
several = {"library_key": "library_id"} if len(table.uns["spatial"]) > 1 else {}
drawings = {
    "squidpy": lambda: squidpy.pl.spatial_scatter(table, color=gene, **several),
    "embedding": lambda: scanpy.pl.embedding(table, basis="spatial", color=gene, show=False),
}
if not several:
    drawings["scanpy"] = lambda: scanpy.pl.spatial(table, color=gene, show=False)
shares = {}
for name, draw in drawings.items():
    plt.close("all")
    draw()
    figure = plt.gcf()
    figure.savefig(f"{sys.argv[2]}/{name}.png")
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[::-1, :, :3].astype(int)
    boxes = [axes.get_window_extent() for axes in figure.axes if axes.get_label() != "<colorbar>"]
    panels = [pixels[int(box.y0) : int(box.y1), int(box.x0) : int(box.x1)] for box in boxes]
    shares[name] = [float((np.ptp(panel, axis=-1) > 30).mean()) for panel in panels]
print(json.dumps(shares))
"""


@pytest.mark.parametrize("sections", [1, 2])
def test_squidpy_and_scanpy_draw_predictions_as_they_are(model: Denoiser, tmp_path: Path, sections: int) -> None:
    """Circles fill a good part of each panel: of several sections, one has a panel of its own."""
    python = os.environ.get("STFLOW_SQUIDPY_PYTHON")
    if not python:
        pytest.skip("STFLOW_SQUIDPY_PYTHON names no interpreter that has squidpy and scanpy")
    n = 200
    library = None if sections == 1 else np.where(np.arange(n) < n // 2, "upper", "lower")
    [path] = predict(model, [slide(n=n, library_id=library)], tmp_path / "out")
    shares = run_in(python, DRAW, path, tmp_path)
    assert len(shares["squidpy"]) == sections
    assert all(share > 0.2 for panels in shares.values() for share in panels), shares


@pytest.fixture
def spatialdata() -> Any:
    reason = "spatialdata is not installed; pip install 'stflow-fast[spatialdata]'"
    return pytest.importorskip("spatialdata", reason=reason)


ODD_OBS = {"percent mt (%)": 0.5, "Region": "cortex", "region": "gyrus", "__x": 1, "day": pd.Timestamp("2026-01-01")}


def test_spatialdata_reads_what_is_written_for_it(spatialdata: Any, model: Denoiser, tmp_path: Path) -> None:
    from spatialdata import models
    from spatialdata.transformations import Identity, get_transformation

    one = slide(obs=pd.DataFrame(ODD_OBS, index=range(60)), origin=Origin(scalefactors={"spot_diameter_fullres": 55.0}))
    expected = predict_one(model, tmp_path / "h5ad", one)
    [path] = predict(model, [one], tmp_path / "out", output=OutputConfig("spatialdata", "float16"))
    assert path == tmp_path / "out" / "S0.zarr"
    found = spatialdata.read_zarr(path)
    table, circles = found.tables["table"], found.shapes["spots"]
    models.TableModel().validate(table)
    models.ShapesModel().validate(circles)
    assert np.array_equal(table.X, expected.X.astype(np.float16))
    assert list(table.obs_names) == list(circles.index) == list(one.barcodes)
    assert np.array_equal(np.column_stack([circles.geometry.x, circles.geometry.y]), one.coords)
    assert (circles["radius"] == 27.5).all()
    assert get_transformation(circles, get_all=True) == {"global": Identity()}
    names = ["percent_mt____", "Region_1", "region_2", "_x", "day"]
    assert list(table.obs) == ["library_id", *names, "region", "instance_id"]
    assert [table.obs[name].iloc[0] for name in names[:4]] == [0.5, "cortex", "gyrus", 1]
    about = {**expected.uns["stflow_fast"], "to": "spatialdata", "dtype": "float16"}
    assert table.uns["stflow_fast"] == about
    assert np.array_equal(table.obsm["spatial"], one.coords)


def test_circles_are_as_large_as_the_spots_of_their_library(spatialdata: Any, model: Denoiser, tmp_path: Path) -> None:
    library = np.repeat(["A", "B"], 30)
    one = slide(library_id=library, origin=Origin(library_scalefactors={**HUNDREDS, **TENS}))
    [path] = predict(model, [one], tmp_path / "out", output=OutputConfig("spatialdata"))
    radii = spatialdata.read_zarr(path).shapes["spots"]["radius"]
    assert radii.tolist() == [90.0] * 30 + [9.0] * 30


def test_the_table_annotates_the_circles(spatialdata: Any, model: Denoiser, tmp_path: Path) -> None:
    [path] = predict(model, [slide()], tmp_path / "out", output=OutputConfig("spatialdata"))
    found = spatialdata.read_zarr(path)
    _, matched = spatialdata.match_element_to_table(found, "spots", "table")
    assert list(matched.obs_names) == list(slide().barcodes)
    values = spatialdata.get_values("CD3E", sdata=found, element_name="spots", table_name="table")
    assert np.array_equal(values["CD3E"], found.tables["table"][:, "CD3E"].X.ravel())


def test_spatialdata_is_resumed_and_overwritten(spatialdata: Any, model: Denoiser, tmp_path: Path) -> None:
    out, zarr = tmp_path / "out", OutputConfig("spatialdata")
    [first] = predict(model, [slide()], out)
    with pytest.raises(InputError, match=rf"{MANIFEST}: to differs from this call"):
        predict(model, [slide()], out, output=zarr, resume=True)
    assert predict(model, [slide()], out, output=zarr, overwrite=True) == [out / "S0.zarr"]
    assert not first.exists()
    made = (out / "S0.zarr").stat().st_ctime_ns
    both = predict(model, [slide(), slide("S1")], out, output=zarr, resume=True)
    assert (out / "S0.zarr").stat().st_ctime_ns == made
    assert [read_about(path)["slide"] for path in both] == ["S0", "S1"]
    predict(model, [slide()], out, output=zarr, sampling=SamplingConfig(seed=1), overwrite=True)
    assert read_about(out / "S0.zarr")["seed"] == 1
    assert sorted(path.name for path in out.glob("S*")) == ["S0.zarr"]
    predict(model, [slide()], out, overwrite=True)
    assert sorted(path.name for path in out.glob("S*")) == ["S0.h5ad"]


@pytest.mark.parametrize("flags", [{"overwrite": True}, {"resume": True}])
def test_somebody_elses_folder_is_not_replaced(
    spatialdata: Any, model: Denoiser, tmp_path: Path, flags: dict[str, bool]
) -> None:
    out, zarr = tmp_path / "out", OutputConfig("spatialdata")
    [made] = predict(model, [slide("S1")], out, output=zarr)
    (out / "S0.zarr").mkdir()
    (out / "S0.zarr" / "thesis.txt").write_text("years of work")
    before, manifest = made.stat().st_ctime_ns, (out / MANIFEST).read_text()
    with pytest.raises(InputError, match=r"S0\.zarr: is no prediction of stflow-fast; move it away"):
        predict(model, [slide("S1"), slide("S2"), slide()], out, output=zarr, **flags)
    with pytest.raises(InputError, match=r"S0\.zarr: is no prediction of stflow-fast; move it away"):
        outputs.write_spatialdata(out / "S0.zarr", table_of(slide()), zeros(table_of(slide())))
    assert (out / "S0.zarr" / "thesis.txt").read_text() == "years of work"
    assert (made.stat().st_ctime_ns, (out / MANIFEST).read_text()) == (before, manifest)
    assert not (out / "S2.zarr").exists()


def test_spatialdata_that_cannot_be_written_leaves_the_last_one(
    spatialdata: Any, model: Denoiser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, zarr = tmp_path / "out", OutputConfig("spatialdata")
    predict(model, [slide()], out, output=zarr)
    write = spatialdata.SpatialData.write

    def fills_up(self: Any, path: Path, **options: Any) -> None:
        write(self, path, **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(spatialdata.SpatialData, "write", fills_up)
    with pytest.raises(OutputError, match=r"out: cannot be written \(No space left on device\)"):
        predict(model, [slide()], out, output=zarr, sampling=SamplingConfig(seed=1), overwrite=True)
    assert read_about(out / "S0.zarr")["seed"] == 0
    assert sorted(path.name for path in out.glob("S*")) == ["S0.zarr"]


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
