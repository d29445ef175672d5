"""Predictions as SpatialData: what it reads, and folders that are resumed, overwritten and left alone."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from stflow_fast import outputs
from stflow_fast.cohort import MANIFEST, SamplingConfig, predict
from stflow_fast.errors import InputError, OutputError
from stflow_fast.model import Denoiser
from stflow_fast.outputs import OutputConfig, read_about
from stflow_fast.slides import Origin

from .output_cases import HUNDREDS, TENS, model, predict_one, slide, table_of, zeros

__all__ = ["model"]  # a fixture

pytestmark = pytest.mark.spatialdata


def test_spatialdata_that_is_not_installed_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spatialdata", None)
    with pytest.raises(InputError, match=r"^to: spatialdata .*; pip install 'stflow-fast\[spatialdata\]'$"):
        OutputConfig("spatialdata")


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
