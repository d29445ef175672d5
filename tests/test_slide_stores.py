"""Slides in SpatialData, wsidata and STImage-1K4M: written by what the ecosystem writes them with.

Tests of the first two run where those packages are; see :func:`spatial` for how to get there.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import PIL.Image
import pytest
import scipy.sparse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from stflow_fast.cli import app
from stflow_fast.errors import InputError
from stflow_fast.slides import ReadOptions, Slide, StoredRows, read, recognise
from stflow_fast.slides.places import SeveralSections
from stflow_fast.slides.registry import sources
from stflow_fast.slides.stimage import N_GENES, ORGANS, SEEDS, StImageTask, read_counts

N, N_GENES_THERE, F = 40, 12, 6
AFFINE = np.array([[0.0, -2.0, 500.0], [2.0, 0.0, 30.0], [0.0, 0.0, 1.0]])
"""A quarter turn, twice as large, and shifted: another scale, order or direction shows."""


def moved(xy: np.ndarray, matrix: np.ndarray = AFFINE) -> np.ndarray:
    return xy @ matrix[:2, :2].T + matrix[:2, 2]


def lattice(n: int = N) -> np.ndarray:
    row, column = np.divmod(np.arange(n), 8)
    return np.column_stack([column + 0.5 * (row % 2), 0.866 * row]) * 10.0


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


class Spatial:
    """What SpatialData's own models write."""

    def __init__(self) -> None:
        reason = "spatialdata is not installed"
        self.package = pytest.importorskip("spatialdata", reason=reason)
        from spatialdata import models, transformations

        self.models, self.transformations = models, transformations

    def affine(self, matrix: np.ndarray = AFFINE) -> Any:
        return self.transformations.Affine(matrix, input_axes=("x", "y"), output_axes=("x", "y"))

    def circles(self, xy: np.ndarray, index: Sequence[Any] | None = None, **systems: Any) -> Any:
        return self.models.ShapesModel.parse(
            xy,
            geometry=0,
            radius=3.0,
            index=np.arange(len(xy)) if index is None else index,
            transformations=systems or {"global": self.affine()},
        )

    def squares(self, xy: np.ndarray, side: float) -> Any:
        import geopandas
        import shapely

        boxes = shapely.box(*(xy - side / 2).T, *(xy + side / 2).T)
        return self.models.ShapesModel.parse(
            geopandas.GeoDataFrame(geometry=boxes), transformations={"global": self.affine()}
        )

    def annotating(self, table: anndata.AnnData) -> anndata.AnnData:
        regions = list(dict.fromkeys(table.obs["region"]))
        return self.models.TableModel.parse(
            table.copy(),
            region=regions if len(regions) > 1 else regions[0],
            region_key="region",
            instance_key="spot_id",
        )

    def write(self, path: Path, zarr_format: int = 3, **elements: Any) -> Path:
        from spatialdata._io.format import SpatialDataContainerFormatV01, SpatialDataContainerFormatV02

        layout = {2: SpatialDataContainerFormatV01, 3: SpatialDataContainerFormatV02}[zarr_format]()
        self.package.SpatialData(**elements).write(path, sdata_formats=layout)
        return path


@pytest.fixture
def spatial() -> Spatial:
    """Skips where spatialdata is not: ``pip install 'stflow-fast[spatialdata]'``."""
    return Spatial()


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(InputError) as error:
        read(path, ReadOptions(**options))
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message


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


ORGAN_SLIDES = tuple(f"Human_Breast_10X_{i:02d}_Visium" for i in range(10))


def write_stimage(
    folder: Path, name: str, n: int = N, genes: Sequence[str] = ("A", "B", "C"), seed: int = 0, kind: str = "JPEG"
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A slide in the folder of a technology, and what is in its tables."""
    rng = np.random.default_rng(seed)
    barcodes = pd.Index([f"{name}_{row}x{column}" for row, column in zip(*divmod(np.arange(n), 8), strict=True)])
    xy = lattice(n) * 7
    places = pd.DataFrame({"yaxis": xy[:, 1], "xaxis": xy[:, 0], "r": 27.5}, index=barcodes)
    counts = pd.DataFrame(rng.poisson(rng.gamma(0.5, 4, len(genes)), (n, len(genes))), index=barcodes, columns=genes)
    for part in ("coord", "gene_exp", "image"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    places.to_csv(folder / "coord" / f"{name}_coord.csv")
    counts.to_csv(folder / "gene_exp" / f"{name}_count.csv")
    PIL.Image.new("RGB", (120, 80)).save(folder / "image" / f"{name}.png", format=kind)
    return places, counts


def write_features(path: Path, barcodes: Sequence[str], seed: int = 0) -> np.ndarray:
    """STFlow's embeddings of the spots of :func:`write_stimage`, in another order than they are given."""
    order = np.random.default_rng(seed).permutation(len(barcodes))
    features = np.random.default_rng(seed).normal(size=(len(barcodes), F)).astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["embeddings"], file["coords"] = features[order], (lattice(len(barcodes)) * 7 - 28)[order]
        file["barcodes"] = np.array(barcodes, dtype="S")[order]
    return features


def by_barcode(slide: Slide) -> pd.DataFrame:
    return pd.DataFrame(np.asarray(slide.features), index=slide.barcodes)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PNG"])
def test_a_folder_of_stimage_is_many_slides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    folder = tmp_path / "Visium"
    made = {name: write_stimage(folder, name, seed=i, kind=kind) for i, name in enumerate(("S1", "S2"))}
    features = {name: write_features(tmp_path / "uni" / f"{name}.h5", list(made[name][0].index)) for name in made}
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)  # what all but small images are over
    found = sources(folder, ReadOptions(embeddings=tmp_path / "uni", expression=True))
    assert [each.id for each in found] == ["S1", "S2"]
    for each in found:
        places, counts = made[each.id]
        slide = each.read()
        assert slide.id == each.id
        assert sorted(slide.barcodes) == sorted(places.index)
        want = places.loc[slide.barcodes]
        assert np.array_equal(slide.coords, want[["xaxis", "yaxis"]])
        assert np.array_equal(slide.counts.toarray(), counts.loc[slide.barcodes])
        assert slide.gene_names == ("A", "B", "C")
        assert np.array_equal(by_barcode(slide).loc[places.index], features[each.id])
        assert slide.origin.image_size == (120, 80)
        assert slide.origin.scalefactors == {"spot_diameter_fullres": 55.0}
        assert slide.notes == ()
    assert "no features" in refused(folder, section="S1")
    assert "has no slide 'S3'; it has 2, such as S1, S2" in refused(folder, section="S3", require_features=False)
    with pytest.raises(SeveralSections, match="has 2 slides"):
        read(folder, ReadOptions(require_features=False))


def test_one_file_of_places_is_one_slide(tmp_path: Path) -> None:
    places, _ = write_stimage(tmp_path / "ST", "S1")
    path = tmp_path / "ST" / "coord" / "S1_coord.csv"
    assert recognise(path) == "stimage"
    [source] = sources(path, ReadOptions(require_features=False))
    slide = source.read()
    assert source.id == slide.id == "S1"
    assert np.array_equal(slide.coords, places[["xaxis", "yaxis"]])
    assert slide.features is None
    assert slide.counts is None
    (tmp_path / "ST" / "image" / "S1.png").write_bytes(b"no image")
    assert read(path, ReadOptions(require_features=False)).origin.image_size is None


def test_spots_without_counts_or_place_are_counted(tmp_path: Path) -> None:
    places, counts = write_stimage(tmp_path, "S1")
    counts.iloc[::-1].iloc[:-3].to_csv(tmp_path / "gene_exp" / "S1_count.csv")
    places.iloc[:-2].to_csv(tmp_path / "coord" / "S1_coord.csv")
    slide = read(tmp_path, ReadOptions(section="S1", expression=True, require_features=False))
    assert slide.notes == (
        "3 of 38 spots have no counts and are left out",
        "2 of 37 spots with counts have no place and are left out",
    )
    assert slide.barcodes.tolist() == places.index[3:-2].tolist()
    assert np.array_equal(slide.counts.toarray(), counts.iloc[3:-2])


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("coord/S1_coord.csv", ",yaxis,r\na,1,2\n", "has no column xaxis; its columns: yaxis, r"),
        ("coord/S1_coord.csv", ",yaxis,xaxis,r\n", "has no spots"),
        ("coord/S1_coord.csv", ",yaxis,xaxis,r\na,1,2,3,4\nb,1\nc,1,2,3,4,5\n", "cannot be read"),
        ("gene_exp/S1_count.csv", "", "does not begin with names of genes"),
        ("gene_exp/S1_count.csv", ",A,B,C\nS1_0x0,1,2\n", "line 2 has 2 counts for 3 genes"),
        ("gene_exp/S1_count.csv", ",A,B,C\nS1_0x0,1,two,3\n", "line 2 is not a barcode and counts"),
        ("gene_exp/S1_count.csv", ",A,B,C\nS1_0x0,1,,3\n", "line 2 is not a barcode and counts"),
        ("gene_exp/S1_count.csv", ",A,B,C\nx,1,2,3\n", "no barcode in common"),
        ("gene_exp/S1_count.csv", ",A,B,C\nS1_0x0,1,2,3\nS1_0x0,1,2,3\n", "1 duplicated barcodes"),
    ],
)
def test_broken_tables_of_stimage_are_one_line(tmp_path: Path, file: str, content: str, said: str) -> None:
    write_stimage(tmp_path, "S1")
    (tmp_path / file).write_text(content)
    with pytest.raises(InputError) as error:
        read(tmp_path, ReadOptions(section="S1", expression=True, require_features=False))
    assert said in str(error.value)
    assert "S1" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "barcodes",
    [["001", "002", "010", "1"], ["1.10", "1.1", "2.0", "1e5"], ["NA", "nan", "", "null"], ["a,b", 'c"d', "e", "'f'"]],
)
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_NONNUMERIC, csv.QUOTE_ALL])
def test_barcodes_are_text_whatever_they_look_like(tmp_path: Path, barcodes: list[str], quoting: int) -> None:
    write_stimage(tmp_path, "S1", 4)
    places = pd.DataFrame({"yaxis": np.arange(4) * 9.5, "xaxis": 100 / 3, "r": 50.0}, index=barcodes)
    counts = pd.DataFrame(np.arange(8).reshape(4, 2), index=barcodes[::-1], columns=["A", "B"])
    places.to_csv(tmp_path / "coord" / "S1_coord.csv", quoting=quoting)
    counts.to_csv(tmp_path / "gene_exp" / "S1_count.csv", quoting=quoting)
    assert recognise(tmp_path / "coord" / "S1_coord.csv") == "stimage"
    slide = read(tmp_path, ReadOptions(section="S1", expression=True, require_features=False))
    assert slide.barcodes.tolist() == barcodes
    assert np.array_equal(slide.coords, places[["xaxis", "yaxis"]])
    assert np.array_equal(slide.counts.toarray(), counts.to_numpy()[::-1])
    assert slide.gene_names == ("A", "B")


def test_a_place_that_is_no_number_is_one_line(tmp_path: Path) -> None:
    places, _ = write_stimage(tmp_path, "S1")
    for value, said in (("far", "S1_coord.csv: xaxis is not a column of numbers"), ("NA", "coords of 1 of 40 spots")):
        places["xaxis"] = [value, *range(N - 1)]
        places.to_csv(tmp_path / "coord" / "S1_coord.csv")
        with pytest.raises(InputError, match=said):
            read(tmp_path, ReadOptions(section="S1", require_features=False))
    places["xaxis"], places["r"] = np.arange(N), ["wide", *["inf"] * (N - 1)]
    places.to_csv(tmp_path / "coord" / "S1_coord.csv")
    assert read(tmp_path, ReadOptions(section="S1", require_features=False)).origin.scalefactors == {}


def test_names_of_genes_are_read_without_their_counts(tmp_path: Path) -> None:
    write_stimage(tmp_path, "S1")
    with (tmp_path / "gene_exp" / "S1_count.csv").open("a") as file:
        file.write("no line of counts\n")
    slide = read(tmp_path, ReadOptions(section="S1", gene_names=True, require_features=False))
    assert (slide.gene_names, slide.counts) == (("A", "B", "C"), None)


def test_the_folder_above_says_which_to_give(tmp_path: Path) -> None:
    write_stimage(tmp_path / "Visium", "S1")
    assert "give its ST, Visium or VisiumHD" in refused(tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 6).flatmap(
        lambda n_genes: st.lists(
            st.lists(
                st.one_of(st.just(0), st.integers(0, 10**6), st.floats(0, 1e6, width=32)),
                min_size=n_genes,
                max_size=n_genes,
            ),
            min_size=1,
            max_size=6,
        )
    )
)
def test_counts_are_what_pandas_reads(tmp_path: Path, rows: list[list[float]]) -> None:
    path = tmp_path / "count.csv"
    genes = [f"GENE,{i}" for i in range(len(rows[0]))]  # quoted in the file
    pd.DataFrame(rows, index=[f"b{i}" for i in range(len(rows))], columns=genes, dtype=object).to_csv(path)
    barcodes, names, counts = read_counts(path)
    want = pd.read_csv(path, index_col=0)
    assert barcodes.tolist() == want.index.tolist()
    assert names == tuple(genes)
    assert np.array_equal(counts.toarray(), want.to_numpy(dtype=np.float32))


def write_bench(root: Path, names: Sequence[str] = ORGAN_SLIDES) -> dict[str, pd.DataFrame]:
    """The Visium folder, meta/ and embeddings of an organ's slides; what is returned are their counts."""
    genes = [f"GENE{i}" for i in range(N_GENES + 20)]
    made = {}
    for i, name in enumerate(names):
        own = [gene for gene in genes if gene != f"GENE{i}"] + [f"ONLY{i}"]  # none of these is shared
        _, made[name] = write_stimage(root / "Visium", name, 16 + i, own, seed=i)
        write_features(root / "embeddings" / "Breast" / "uni" / "fp32" / f"{name}.h5", list(made[name].index))
    rows = [(name, "human", "breast", "True", "Visium") for name in names]
    others = [
        ("Human_Breast_ST", "human", "breast", "True", "ST"),
        ("Human_Breast_healthy", "human", "breast", "False", "Visium"),
        ("Mouse_Breast", "mouse", "breast", "True", "Visium"),
        ("Human_Brain", "human", "brain", "True", "Visium"),
    ]
    columns = ["slide", "species", "tissue", "involve_cancer", "tech"]
    (root / "meta").mkdir()
    for file, content in (
        ("meta_all_gene.csv", others),
        ("meta_all_gene02122025.csv", rows[::-1] + others),
        ("meta_all_gene11302024.csv", others),
    ):
        pd.DataFrame(content, columns=columns).to_csv(root / "meta" / file, index=False)
    return made


def test_splits_of_the_bench(tmp_path: Path) -> None:
    write_bench(tmp_path)
    task = StImageTask(tmp_path, "uni")
    assert task.folds() == list(SEEDS)
    folds = [task.fold(number) for number in task.folds()]
    for fold in folds:
        assert (len(fold.train), len(fold.val), len(fold.test)) == (8, 1, 1)
        assert sorted((*fold.train, *fold.val, *fold.test)) == sorted(ORGAN_SLIDES)
    assert len(set(folds)) == len(SEEDS)
    assert folds == [StImageTask(tmp_path / "Visium", "uni", tmp_path / "embeddings").fold(k) for k in SEEDS]
    with pytest.raises(InputError, match="fold: must be one of 0, 1, 2, not 3"):
        task.fold(3)


def test_genes_of_the_bench_vary_most_among_those_that_all_slides_have(tmp_path: Path) -> None:
    made = write_bench(tmp_path)
    task = StImageTask(tmp_path, "uni")
    together = np.log1p(pd.concat(made.values(), join="inner"))
    variance = together.var().sort_index().sort_values(ascending=False, kind="stable")
    assert len(variance) == N_GENES + 20 - len(made)
    assert task.genes() == tuple(variance.index[:N_GENES])
    (tmp_path / "mine.txt").write_text("GENE30\nGENE40\n")
    assert task.genes("mine.txt") == ("GENE30", "GENE40")
    with pytest.raises(InputError, match="does not exist"):
        task.genes("other.txt")


def test_slides_of_the_bench_have_features_and_counts(tmp_path: Path) -> None:
    made = write_bench(tmp_path)
    name = ORGAN_SLIDES[2]
    slide = StImageTask(tmp_path, "uni").slide(name)
    assert isinstance(slide.features, np.ndarray)
    want = np.log1p(made[name].loc[slide.barcodes, ["GENE30", "GENE40"]].to_numpy()).astype(np.float32)
    assert np.array_equal(slide.expression(["GENE30", "GENE40"]), want)
    lazy = StImageTask(tmp_path, "uni").slide(name, expression=False)
    assert lazy.counts is None
    assert np.array_equal(lazy.features, slide.features)


def test_what_the_bench_lacks_is_said(tmp_path: Path) -> None:
    write_bench(tmp_path)
    for organ, said in (("Lung", "organ: must be one of Breast"), ("Brain", "names 1 human Visium cancer slides")):
        with pytest.raises(InputError, match=said):
            StImageTask(tmp_path, "uni", organ=organ)
    with pytest.raises(InputError, match="encoders there: uni"):
        StImageTask(tmp_path, "conch")
    (tmp_path / "Visium" / "coord" / f"{ORGAN_SLIDES[0]}_coord.csv").unlink()
    with pytest.raises(InputError, match="one of 1 missing files; download the whole organ"):
        StImageTask(tmp_path, "uni")
    shutil.rmtree(tmp_path / "meta")
    with pytest.raises(InputError, match="has no meta_all_gene"):
        StImageTask(tmp_path, "uni")


def test_the_bench_is_trained_and_scored_from_the_command_line(tmp_path: Path) -> None:
    write_bench(tmp_path / "stimage")
    small = [part for name in ("hidden_dim", "pairwise_hidden_dim") for part in ("--set", f"{name}=16")]
    train = ["train", tmp_path / "stimage", "--encoder", "uni", "--epochs", 1, "--set", "n_layers=1", *small]

    def say(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    said = say(*train, "--out", tmp_path / "run")
    assert f"is the folder of STImage-1K4M; name one of {', '.join(ORGANS)} with --organ" in str(said.exception)
    chosen = ["--select-on", "validation"]
    said = say(*train, "--organ", "Breast", "--fold", 2, "--out", tmp_path / "run", *chosen)
    assert said.exit_code == 0, said.output
    [val] = StImageTask(tmp_path / "stimage", "uni").fold(2).val
    assert f"chosen on held-out slides ({val})" in said.output
    said = say("evaluate", tmp_path / "run", tmp_path / "stimage", "--fold", 2, "--json", tmp_path / "scores.json")
    assert said.exit_code == 0, said.output
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert list(scores["per_slide"]) == list(StImageTask(tmp_path / "stimage", "uni").fold(2).test)
    assert scores["n_genes"] == N_GENES
