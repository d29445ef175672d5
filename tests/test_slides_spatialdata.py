"""Slides in SpatialData and wsidata, written by those packages: tests run where they are (see :func:`spatial`)."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from stflow_fast.slides import ReadOptions, StoredRows, read, recognise
from stflow_fast.slides.places import SeveralSections
from stflow_fast.slides.registry import sources

from .store_cases import AFFINE, N_GENES_THERE, F, N, Spatial, lattice, refused

pytestmark = pytest.mark.spatialdata


def moved(xy: np.ndarray, matrix: np.ndarray = AFFINE) -> np.ndarray:
    return xy @ matrix[:2, :2].T + matrix[:2, 2]


def table_of(instances: Sequence[Any], regions: Sequence[str], seed: int = 0, **obsm: np.ndarray) -> anndata.AnnData:
    rng = np.random.default_rng(seed)
    n = len(instances)
    return anndata.AnnData(
        X=scipy.sparse.csr_matrix(rng.poisson(1.0, (n, N_GENES_THERE)).astype(np.float32)),
        obs=pd.DataFrame(
            {"region": pd.Categorical(regions), "spot_id": instances}, index=[f"spot-{seed}-{i}" for i in range(n)]
        ),
        var=pd.DataFrame(index=[f"GENE{i}" for i in range(N_GENES_THERE)]),
        obsm=obsm or {"features": rng.normal(size=(n, F)).astype(np.float32)},
    )


@pytest.fixture
def spatial() -> Spatial:
    """Skips where spatialdata is not: ``pip install 'stflow-fast[spatialdata]'``."""
    return Spatial()


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_circles_are_where_their_transformation_puts_them(tmp_path: Path, spatial: Spatial, zarr_format: int) -> None:
    xy, index = lattice(), np.random.default_rng(1).permutation(N) + 100
    table = table_of(np.arange(100, 100 + N), ["spots"] * N)
    table.obsm["spatial"] = np.random.default_rng(2).normal(size=(N, 2))  # the shapes decide
    spots = spatial.circles(xy, index, **{"global": spatial.affine(), "um": spatial.affine(np.diag([5, 5, 1]))})
    tables = {"table": spatial.annotating(table)}
    path = spatial.write(tmp_path / "sample.zarr", zarr_format, shapes={"spots": spots}, tables=tables)
    assert recognise(path) == "spatialdata"
    slide = read(path, ReadOptions(expression=True))
    of_row = xy[np.argsort(index)]
    np.testing.assert_allclose(slide.coords, moved(of_row), rtol=1e-12)
    assert slide.origin.scalefactors == pytest.approx({"spot_diameter_fullres": 12.0})
    assert (slide.id, slide.notes, slide.origin.format) == ("sample", (), "spatialdata")
    assert slide.barcodes.tolist() == table.obs_names.tolist()
    assert isinstance(slide.features, StoredRows)
    assert np.array_equal(slide.features, table.obsm["features"])
    assert np.array_equal(slide.counts.toarray(), table.X.toarray())
    in_um = read(path, ReadOptions(coordinate_system="um"))
    np.testing.assert_allclose(in_um.coords, 5 * of_row, rtol=1e-12)
    assert in_um.origin.scalefactors == pytest.approx({"spot_diameter_fullres": 30.0})
    assert in_um.counts is None
    assert "it has global, um" in refused(path, coordinate_system="hires")
    [note] = read(path, ReadOptions(spatial_key="spatial_um")).notes
    assert note == "obsm['spatial_um'] is not looked at: spots say where spots lie"


def test_the_size_of_a_pixel_is_that_of_the_pixels_of_the_image(tmp_path: Path, spatial: Spatial) -> None:
    """Of ``global``, as its readers of Visium have it; other coordinate systems have a unit of their own."""
    table = table_of(np.arange(N), ["spots"] * N)
    table.uns["micron_per_pixel"] = 0.5
    spots = spatial.circles(lattice(), **{"global": spatial.affine(), "um": spatial.affine(np.diag([5, 5, 1]))})
    path = spatial.write(tmp_path / "a.zarr", shapes={"spots": spots}, tables={"table": spatial.annotating(table)})
    assert read(path).micron_per_pixel == 0.5
    assert read(path, ReadOptions(coordinate_system="um")).micron_per_pixel is None


def test_shapes_are_read_without_what_is_private(
    tmp_path: Path, spatial: Spatial, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = spatial.annotating(table_of(np.arange(N), ["spots"] * N))
    path = spatial.write(tmp_path / "a.zarr", shapes={"spots": spatial.circles(lattice())}, tables={"table": table})
    want = read(path)
    monkeypatch.delattr("spatialdata._io.io_shapes._read_shapes")
    assert np.array_equal(read(path).coords, want.coords)
    assert read(path).origin.scalefactors == want.origin.scalefactors


def test_bins_of_two_sizes_are_two_tables(tmp_path: Path, spatial: Spatial) -> None:
    sizes = {"square_008um": lattice(), "square_016um": lattice(24) * 2}
    tables = {name: table_of(np.arange(len(xy)), [f"HD_{name}"] * len(xy)) for name, xy in sizes.items()}
    shapes = {f"HD_{name}": spatial.squares(xy, 8.0) for name, xy in sizes.items()}
    both = {name: spatial.annotating(table) for name, table in tables.items()}
    path = spatial.write(tmp_path / "hd.zarr", shapes=shapes, tables=both)
    for name, xy in sizes.items():
        slide = read(path, ReadOptions(table=name))
        np.testing.assert_allclose(slide.coords, moved(xy), rtol=1e-12)
        assert np.array_equal(slide.features, tables[name].obsm["features"])
        assert slide.origin.scalefactors == {}
    assert "square_008um, square_016um; choose one: --table" in refused(path)
    assert "its tables: square_008um, square_016um" in refused(path, table="square_002um")
    del tables["square_016um"].obsm["features"]
    some = {name: spatial.annotating(table) for name, table in tables.items()}
    path = spatial.write(tmp_path / "one.zarr", shapes=shapes, tables=some)
    assert read(path).n_spots == N


def test_only_what_is_needed_is_read(tmp_path: Path, spatial: Spatial) -> None:
    path = spatial.write(
        tmp_path / "sample.zarr",
        shapes={"spots": spatial.circles(lattice()), "cells": spatial.squares(lattice(), 1.0)},
        images={"he": spatial.models.Image2DModel.parse(np.zeros((3, 64, 64), dtype=np.uint8))},
        tables={
            "table": spatial.annotating(table_of(np.arange(N), ["spots"] * N)),
            "other": spatial.annotating(table_of(np.arange(N), ["cells"] * N, spatial=lattice())),
        },
    )
    (path / "shapes" / "cells" / "shapes.parquet").write_bytes(b"broken")
    for folder in (path / "images" / "he", path / "tables" / "other" / "X", path / "tables" / "table" / "X"):
        shutil.rmtree(folder)
    assert read(path).n_spots == N


def test_regions_of_a_table_are_slides(tmp_path: Path, spatial: Spatial) -> None:
    regions = np.array(["left", "right"])[np.arange(2 * N) % 2]
    instances = np.arange(2 * N) // 2
    table = table_of(instances, regions)
    table.obs["half"] = np.where(np.arange(2 * N) < N, "first", "second")
    there = {"left": lattice(), "right": lattice()[::-1] + 3.0}
    shapes = {name: spatial.circles(xy, **{"global": spatial.affine()}) for name, xy in there.items()}
    path = spatial.write(tmp_path / "two.zarr", shapes=shapes, tables={"table": spatial.annotating(table)})
    found = sources(path)
    assert [each.id for each in found] == ["two_left", "two_right"]
    for each, name in zip(found, there, strict=True):
        slide = each.read()
        rows = regions == name
        assert slide.id == each.id
        np.testing.assert_allclose(slide.coords, moved(there[name]), rtol=1e-12)
        assert np.array_equal(slide.features, table.obsm["features"][rows])
        assert slide.barcodes.tolist() == table.obs_names[rows].tolist()
    assert "has no section 'middle'; it has left, right" in refused(path, section="middle")
    with pytest.raises(SeveralSections, match="--library-key region"):
        read(path)
    [whole] = sources(path, ReadOptions(library_key=""))
    assert whole.id == "two"
    halves = [each.id for each in sources(path, ReadOptions(library_key="half"))]
    assert halves == ["two_first", "two_second"]
    first = read(path, ReadOptions(library_key="half", section="first", require_features=False))
    want = np.where((regions[:N] == "left")[:, None], there["left"][instances[:N]], there["right"][instances[:N]])
    np.testing.assert_allclose(first.coords, moved(want), rtol=1e-12)


def test_regions_are_one_slide_where_one_says_so(tmp_path: Path, spatial: Spatial) -> None:
    """As the tissue of one image that was annotated in two pieces."""
    xy, regions = lattice(2 * N), np.repeat(["left", "right"], N)
    table = spatial.annotating(table_of(np.tile(np.arange(N), 2), regions))
    shapes = {"left": spatial.circles(xy[:N]), "right": spatial.circles(xy[N:])}
    path = spatial.write(tmp_path / "two.zarr", shapes=shapes, tables={"table": table})
    options = ReadOptions(library_key="")
    [source] = sources(path, options)
    np.testing.assert_allclose(source.read().coords, moved(xy), rtol=1e-12)
    assert (source.id, source.read().n_spots) == ("two", 2 * N)


def test_instances_that_are_not_there_are_left_out_and_counted(tmp_path: Path, spatial: Spatial) -> None:
    names = [f"s{i}" for i in range(N)]
    table = table_of(names, ["spots"] * N)
    xy = lattice()
    path = spatial.write(
        tmp_path / "sample.zarr",
        shapes={"spots": spatial.circles(xy[5:], names[5:])},
        tables={"table": spatial.annotating(table)},
    )
    slide = read(path)
    assert slide.notes == ("5 of 40 spots of tables/table are not in spots and are left out",)
    np.testing.assert_allclose(slide.coords, moved(xy[5:]), rtol=1e-12)
    assert np.array_equal(slide.features, table.obsm["features"][5:])
    others = {"none": (range(N), "no instance in common with spots (they look like s0 and 0)")}
    others["twice"] = (["s1", *names[1:]], "shapes/spots: instance s1 stands twice")
    for name, (index, said) in others.items():
        shapes = {"spots": spatial.circles(xy, index)}
        path = spatial.write(tmp_path / f"{name}.zarr", shapes=shapes, tables={"table": spatial.annotating(table)})
        assert said in refused(path)


def test_a_table_without_elements_is_where_obsm_says(tmp_path: Path, spatial: Spatial) -> None:
    xy = lattice()
    bare = table_of(np.arange(N), ["spots"] * N)
    placed = bare.copy()
    placed.obsm["spatial"] = xy
    tied = spatial.annotating(placed)
    for name, table, note in (("bare", placed, "annotates no element"), ("tied", tied, "annotates spots")):
        path = spatial.write(tmp_path / f"{name}.zarr", tables={"table": table})
        slide = read(path)
        assert np.array_equal(slide.coords, xy)
        assert note in slide.notes[0]
        assert "no place in the coordinate system 'um'" in refused(path, coordinate_system="um")
    path = spatial.write(tmp_path / "nowhere.zarr", tables={"table": spatial.annotating(bare)})
    assert "no place in the coordinate system 'global'" in refused(path)


@pytest.mark.parametrize("kind", ["points", "labels"])
def test_points_and_labels_have_centres_too(tmp_path: Path, spatial: Spatial, kind: str) -> None:
    xy = np.column_stack([np.tile(np.arange(8), 5), np.repeat(np.arange(5), 8)]) * 4.0 + 2.0
    systems = {"global": spatial.affine()}
    if kind == "points":
        element = spatial.models.PointsModel.parse(xy, transformations=systems)
        instances = np.arange(N)
    else:
        image = np.repeat(np.repeat(np.arange(1, N + 1).reshape(5, 8), 4, axis=0), 4, axis=1)
        element = spatial.models.Labels2DModel.parse(image, dims=("y", "x"), transformations=systems)
        instances = np.arange(1, N + 1)
    table = spatial.annotating(table_of(instances[::-1], ["spots"] * N))
    path = spatial.write(tmp_path / "sample.zarr", **{kind: {"spots": element}}, tables={"table": table})
    np.testing.assert_allclose(read(path).coords, moved(xy[::-1]), rtol=1e-12)


def test_without_spatialdata_it_is_named(tmp_path: Path, spatial: Spatial, monkeypatch: pytest.MonkeyPatch) -> None:
    table = spatial.annotating(table_of(np.arange(N), ["spots"] * N))
    path = spatial.write(
        tmp_path / "sample.zarr", shapes={"spots": spatial.circles(lattice())}, tables={"table": table}
    )
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "spatialdata" else found(name))
    assert "pip install 'stflow-fast[spatialdata]'" in refused(path)


def test_a_store_without_tables_has_no_spots(tmp_path: Path, spatial: Spatial) -> None:
    path = spatial.write(tmp_path / "sample.zarr", shapes={"spots": spatial.circles(lattice())})
    assert "has no tables, so no spots with features; it has shapes" in refused(path)


TILE, STRIDE, DOWNSAMPLE = 64, 32, 2


@pytest.fixture
def lazyslide(tmp_path: Path) -> Callable[..., tuple[Path, np.ndarray, dict[str, np.ndarray]]]:
    """A store that wsidata writes for an image on the disk: its path, corners of the tiles, features by table."""
    wsidata = pytest.importorskip("wsidata", reason="wsidata is not installed")
    tifffile = pytest.importorskip("tifffile", reason="wsidata needs an image, and tifffile is not installed")
    import shapely

    def make(*tables: str, dropped: int = 0) -> tuple[Path, np.ndarray, dict[str, np.ndarray]]:
        rng = np.random.default_rng(0)
        image = tmp_path / "slide.tiff"
        tifffile.imwrite(image, np.zeros((768, 1024, 3), dtype=np.uint8), tile=(256, 256), photometric="rgb")
        wsi = wsidata.open_wsi(image)
        wsi.set_mpp(0.25)
        spec = wsidata.TileSpec.from_wsidata(wsi, tile_px=TILE, stride_px=STRIDE, mpp=0.25 * DOWNSAMPLE)
        x, y = np.meshgrid(np.arange(0, 896, 64), np.arange(0, 640, 64))
        corners = np.column_stack([x.ravel(), y.ravel()])
        wsidata.io.add_tissues(wsi, "tissues", [shapely.box(0, 0, 1024, 768)])
        wsidata.io.add_tiles(wsi, "tiles", corners, spec, np.arange(len(corners)) % 2)
        features = {name: rng.normal(size=(len(corners), F)).astype(np.float32) for name in tables}
        for name, values in features.items():
            wsidata.io.add_features(wsi, name, "tiles", values)
        if dropped:
            wsidata.io.subset_tiles(wsi, "tiles", np.arange(dropped, len(corners)))
        wsi.write()
        return tmp_path / "slide.zarr", corners, features

    return make


def test_tiles_of_wsidata_are_spots(lazyslide: Callable[..., Any]) -> None:
    path, corners, features = lazyslide("uni_tiles")
    assert recognise(path) == "wsidata"
    slide = read(path)
    assert np.array_equal(slide.coords, corners + TILE * DOWNSAMPLE / 2)
    assert isinstance(slide.features, StoredRows)
    assert np.array_equal(slide.features, features["uni_tiles"])
    assert slide.barcodes.tolist() == [str(i) for i in range(len(corners))]
    assert slide.obs["tissue_id"].tolist() == (np.arange(len(corners)) % 2).tolist()
    assert (slide.id, slide.notes, slide.micron_per_pixel) == ("slide", (), 0.25)
    assert (slide.origin.format, slide.origin.encoder) == ("wsidata", "uni")
    assert slide.origin.image_size == (1024, 768)
    assert slide.origin.scalefactors == {"spot_diameter_fullres": TILE * DOWNSAMPLE}


def test_the_table_of_features_is_chosen_by_its_encoder(lazyslide: Callable[..., Any]) -> None:
    path, corners, features = lazyslide("uni_tiles", "gigapath_tiles", dropped=3)
    for asked in ("uni", "uni_tiles"):
        slide = read(path, ReadOptions(features_key=asked))
        assert np.array_equal(slide.features, features["uni_tiles"][3:])
        assert np.array_equal(slide.coords, corners[3:] + TILE * DOWNSAMPLE / 2)
        assert slide.notes == (
            f"3 of {len(corners)} rows of tables/uni_tiles are not in shapes/tiles and are left out",
        )
    assert "2 tables of features, and one is read; there are: gigapath_tiles, uni_tiles" in refused(path)
    assert "0 tables of features that 'conch' names" in refused(path, features_key="conch")
    as_spatialdata = ReadOptions(format="spatialdata", table="uni_tiles", features_key="X")
    assert np.array_equal(read(path, as_spatialdata).coords, slide.coords)
