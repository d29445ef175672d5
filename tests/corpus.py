"""Broken inputs of every format, each with words of the line that is said about it, and odd ones that are read.

A case is (words, how a slide with nothing wrong is written, what is then done to it); :func:`build` makes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse
import torch
import zarr

from .builders import N_SPOTS, PATCH, arrays, gene_names, write_embeddings, write_h5ad, write_model
from .format_cases import TRIDENT_COORDS, save_as_trident

ABSURD = 10**12
"""Spots of a file whose head is broken: terabytes."""

MADE = arrays("S0")
FEATURES, CENTRES, NAMES = MADE["features"], MADE["centres"], MADE["barcodes"].astype("S")
CORNERS = (CENTRES - PATCH / 2).astype(np.int64)

Make = Callable[[Path], Path]
"""Writes a slide at a path that lacks its suffix, and returns the path that it has."""

Edit = Callable[[Path], Path | None]
"""Changes what is at a path; returns another path where that is the one to give."""


def build(folder: Path, name: str, case: tuple[Any, ...]) -> Path:
    """Write a case into a folder of its own below this one: the path to give."""
    _, make, *edits = case
    folder = folder_of(folder, name)
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of anndata and zarr, about how they write
        path = make(folder / folder.name)
        for edit in edits:
            path = edit(path) or path
    return path


def folder_of(folder: Path, name: str) -> Path:
    return folder / name.replace(" ", "-")


# Slides with nothing wrong -------------------------------------------------------------------------------------------


def embeddings(path: Path) -> Path:
    return write_embeddings(path.with_suffix(".h5"), MADE, patch_size=PATCH)


def trident(path: Path) -> Path:
    return save_as_trident(
        path.with_suffix(".h5"), {"features": FEATURES, "coords": CORNERS}, {"coords": TRIDENT_COORDS}
    )


def h5ad(path: Path) -> Path:
    return write_h5ad(path.with_suffix(".h5ad"), MADE, features=True)


def zarr_2(path: Path) -> Path:
    return _zarr(path, 2)


def zarr_3(path: Path) -> Path:
    return _zarr(path, 3)


def _zarr(path: Path, format: int) -> Path:
    source, path = h5ad(path), path.with_suffix(".zarr")
    with anndata.settings.override(zarr_write_format=format):
        anndata.read_h5ad(source).write_zarr(path)
    source.unlink()
    return path


def spatialdata(path: Path) -> Path:
    """Spots as circles, with their features in obsm of a table."""
    from .store_cases import Spatial

    spatial = Spatial()
    table = anndata.AnnData(scipy.sparse.csr_matrix(MADE["counts"]), _annotation(), obsm={"features": FEATURES})
    shapes, tables = {"spots": spatial.circles(CENTRES)}, {"table": spatial.annotating(table)}
    return spatial.write(path.with_suffix(".zarr"), shapes=shapes, tables=tables)


def wsidata(path: Path) -> Path:
    """Tiles, with their features as X of a table, and the marks of wsidata."""
    from .store_cases import Spatial

    spatial = Spatial()
    shapes = spatial.squares(CENTRES, PATCH)
    shapes["tile_id"] = np.arange(N_SPOTS)
    tables = {"tiny_spots": spatial.annotating(anndata.AnnData(FEATURES, _annotation()))}
    attrs = {"tile_spec": {"spots": {}}, "slide_properties": {"mpp": 0.5, "shape": [900, 800]}}
    return spatial.write(path.with_suffix(".zarr"), shapes={"spots": shapes}, tables=tables, attrs=attrs)


def _annotation() -> pd.DataFrame:
    obs = {"region": pd.Categorical(["spots"] * N_SPOTS), "spot_id": np.arange(N_SPOTS)}
    return pd.DataFrame(obs, index=MADE["barcodes"].astype(str))


def stimage(path: Path) -> Path:
    """The file of places of a slide of STImage-1K4M, with its counts beside."""
    for name in ("coord", "gene_exp"):
        (path.parent / name).mkdir()
    places = pd.DataFrame({"yaxis": CENTRES[:, 1], "xaxis": CENTRES[:, 0], "r": 20.0}, MADE["barcodes"])
    counts = pd.DataFrame(MADE["counts"].astype(int), MADE["barcodes"], gene_names())
    places.to_csv(path.parent / "coord" / f"{path.name}_coord.csv")
    counts.to_csv(path.parent / "gene_exp" / f"{path.name}_count.csv")
    return path.parent / "coord" / f"{path.name}_coord.csv"


WHOLE: tuple[Make, ...] = (embeddings, trident, h5ad, zarr_2, zarr_3, spatialdata, wsidata, stimage)


# What is no slide ----------------------------------------------------------------------------------------------------


def other(suffix: str, write: Callable[[Path], object]) -> Make:
    """What anything writes at a path with this suffix."""

    def make(path: Path) -> Path:
        write(path.with_suffix(suffix))
        return path.with_suffix(suffix)

    return make


def holding(suffix: str, content: bytes) -> Make:
    return other(suffix, lambda path: path.write_bytes(content))


def a_link(to: str) -> Make:
    return other(".h5", lambda path: path.symlink_to(to))


def two_of_one_name(path: Path) -> Path:
    """A list of slides in two folders."""
    for folder in ("a", "b"):
        embeddings(path.parent / folder / "same")
    path.with_suffix(".csv").write_text("path\na/same.h5\nb/same.h5\n")
    return path.with_suffix(".csv")


EXECUTED = "executed"
"""Name of a file that :class:`Executes` writes into the working directory."""


class Executes:
    """Unpickled, it writes :data:`EXECUTED`."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (Path(EXECUTED),)


# Ways to break slides ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def editing(path: Path) -> Iterator[Any]:
    """An HDF5 file or a zarr store, to write into."""
    if path.is_dir():
        yield zarr.open_group(str(path), mode="r+", use_consolidated=False)
        zarr.consolidate_metadata(str(path))
    else:
        with h5py.File(path, "r+") as file:
            yield file


def edit(change: Callable[..., None]) -> Callable[..., Edit]:
    """Makes of what changes an open store and takes arguments what takes the arguments and changes a path."""

    def with_arguments(*arguments: Any, **named: Any) -> Edit:
        def at(path: Path) -> None:
            with editing(path) as store:
                change(store, *arguments, **named)

        return at

    return with_arguments


def replace(store: Any, key: str, **form: Any) -> None:
    """Another table in the place of one, with its attributes."""
    attributes = dict(store[key].attrs)
    del store[key]
    create = store.create_dataset if isinstance(store, h5py.Group) else store.create_array
    create(key, **form).attrs.update(attributes)


@edit
def put(store: Any, key: str, values: np.ndarray) -> None:
    replace(store, key, data=values)


@edit
def claim(store: Any, key: str, *shape: int, dtype: Any = "f4", chunks: tuple[int, ...] | None = None) -> None:
    """A table of this shape of which nothing is written; of HDF5 in one piece without ``chunks``."""
    replace(store, key, shape=shape, dtype=dtype, chunks=chunks)


@edit
def written(store: Any, key: str, values: Any) -> None:
    """Whatever anndata writes so."""
    if key in store:
        del store[key]
    anndata.io.write_elem(store, key, values)


@edit
def in_part(store: Any, key: str) -> None:
    """The first rows of a table are there, and the chunks of the others are not."""
    values = store[key][()]
    replace(store, key, shape=values.shape, dtype=values.dtype, chunks=(8, values.shape[1]))
    store[key][:50] = values[:50]


@edit
def told(store: Any, key: str, **attributes: Any) -> None:
    store[key].attrs.update(attributes)


@edit
def without(store: Any, key: str) -> None:
    del store[key]


@edit
def linked(store: Any, key: str, to: Any) -> None:
    """A link, of HDF5, in the place of a part."""
    if key in store:
        del store[key]
    store[key] = to


@edit
def virtual(store: Any, key: str, file: str) -> None:
    """A table of HDF5 whose numbers are those of this key in another file, or in its own: "."."""
    shape, dtype = store[key].shape, store[key].dtype
    layout = h5py.VirtualLayout(shape, dtype)
    layout[:] = h5py.VirtualSource(file, key, shape, dtype)
    del store[key]
    store.create_virtual_dataset(key, layout)


@edit
def of_a_device(store: Any, key: str) -> None:
    """A table of HDF5 whose bytes are those of another file."""
    replace(store, key, shape=store[key].shape, dtype="f4", external=[("/dev/zero", 0, h5py.h5f.UNLIMITED)])


@edit
def of_no_known_type(store: Any, key: str) -> None:
    """An attribute of a type that h5py has no word for."""
    h5py.h5a.create(store[key].id, b"when", h5py.h5t.UNIX_D32LE, h5py.h5s.create(h5py.h5s.SCALAR))


@edit
def sparse(store: Any, key: str, **parts: Any) -> None:
    """A sparse matrix [60, 16] with parts (data, indices, indptr, or the attribute shape) that do not fit together."""
    if key in store:
        del store[key]
    anndata.io.write_elem(store, key, scipy.sparse.csr_matrix(FEATURES))
    for name, values in parts.items():
        if name == "shape":
            store[key].attrs["shape"] = values
        else:
            store[f"{key}/{name}"][...] = values


@edit
def column(store: Any, values: Any) -> None:
    """obs has a column "odd"."""
    anndata.io.write_elem(store["obs"], "odd", values)
    store["obs"].attrs["column-order"] = np.array(["odd"], dtype=object) if hasattr(store, "filename") else ["odd"]


def cut(share: float, inside: str = "") -> Edit:
    """The first part of a file, or of one in a folder."""

    def at(path: Path) -> None:
        file = path / inside
        file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])

    return at


def gone(inside: str) -> Edit:
    return lambda path: (path / inside).unlink()


def in_json(inside: str, **values: Any) -> Edit:
    """Other values in a JSON file of a zarr store."""

    def at(path: Path) -> None:
        (path / ".zmetadata").unlink(missing_ok=True)  # copies
        (path / inside).write_text(json.dumps({**json.loads((path / inside).read_text()), **values}))

    return at


def by_pickle(key: str) -> Edit:
    """A zarr array of format 2 that executes what is in it, where that is allowed."""

    def at(path: Path) -> None:
        filters = [{"id": "vlen-utf8"}, {"id": "pickle", "protocol": 4}]
        in_json(f"{key}/.zarray", filters=filters, dtype="|O", compressor=None, fill_value="")(path)
        for chunk in (path / key).glob("[0-9]*"):
            chunk.write_bytes(pickle.dumps(Executes()))

    return at


def closed(path: Path) -> None:
    path.chmod(0)


def called(name: str) -> Edit:
    return lambda path: path.rename(path.with_name(name))


def listed(**options: str) -> Edit:
    """A list of slides with this one, and how it is read."""

    def at(path: Path) -> Path:
        rows = [["path", *options], [path.name, *options.values()]]
        path.with_name("list.csv").write_text("\n".join(",".join(row) for row in rows) + "\n")
        return path.with_name("list.csv")

    return at


def linked_from_elsewhere(path: Path) -> Path:
    """A link in another folder."""
    (path.parent / "elsewhere").mkdir()
    link = path.parent / "elsewhere" / path.name
    link.symlink_to(Path("..") / path.name)
    return link


def annotating(name: str) -> tuple[Edit, ...]:
    """The only table of SpatialData is of another element."""
    of_spots = written("tables/table/obs/region", pd.Categorical([name] * N_SPOTS))
    return of_spots, written("tables/table/uns/spatialdata_attrs/region", name)


# The cases -----------------------------------------------------------------------------------------------------------

WITH_NAN = np.where(np.arange(N_SPOTS)[:, None] == 3, np.nan, FEATURES)
STRANGE = np.full((60, 1), b"A\r\nB\x1b[2J")
MISSING = np.where(np.arange(N_SPOTS)[:, None] < 2, 2**32 - 1, CORNERS)
TEXT = h5py.string_dtype()
SMALL = np.r_[0, 120, -120, np.zeros(58)].astype(np.int8)

SHAPES = "shapes/spots/shapes.parquet"
TRUNCATED = "is not readable HDF5, or is truncated .*; copy it again"
CLAIMS = r" claims [\d.]+ GiB \(shape \[.*\]\), and next to none of it is stored; copy it again"
NO_SHAPES = "shapes/spots cannot be read .*; copy the store again"
ELSEWHERE = " has its numbers in other files; write them into one"
REFUSED = "cannot be read .Permission denied"

BROKEN: dict[str, tuple[Any, ...]] = {
    # Cut at bytes chosen by chance
    "embeddings cut early": (TRUNCATED, embeddings, cut(0.14)),
    "embeddings cut late": (TRUNCATED, embeddings, cut(0.93)),
    "h5ad cut early": (TRUNCATED, h5ad, cut(0.08)),
    "h5ad cut late": (TRUNCATED, h5ad, cut(0.81)),
    # Keys of patch features
    "features under another key": ("holds places of patches and no feat", embeddings, without("embeddings")),
    "no places": ("is of no format .*; it has barcodes, embed", embeddings, without("coords")),
    "places in a group": ("features, coords must be tables", trident, linked("coords", h5py.SoftLink("/"))),
    "places that link to nothing": ("it has features$", trident, linked("coords", h5py.ExternalLink("gone.h5", "/x"))),
    "features of themselves": ("no features", embeddings, linked("embeddings", h5py.SoftLink("/embeddings"))),
    # Their axes and types
    "features transposed": ("are transposed, write their .T", embeddings, put("embeddings", FEATURES.T)),
    "places transposed": ("they are transposed, write their .T", embeddings, put("coords", CORNERS.T)),
    "places with a third axis": (r"shape \[N, 2\], not \[60, 3\]", trident, put("coords", np.zeros((60, 3)))),
    "places that are text": ("coords are not numbers", trident, put("coords", CORNERS.astype("S"))),
    "places that are complex": ("coords are not numbers .*complex128", trident, put("coords", CORNERS + 1j)),
    "places that are NaN": ("60 of 60 spots are NaN.*; remove", trident, put("coords", np.full((60, 2), np.nan))),
    "places that mean missing": (r"2 of 60 spots are beyond 1e\+09 .*; remove", embeddings, put("coords", MISSING)),
    "places that overflow": ("coords of 60 of 60 spots are beyond", trident, put("coords", CENTRES * 1e300)),
    "places that are one": ("all 60 spots lie at one place; give", trident, put("coords", np.ones((60, 2)))),
    "features that are complex": ("is not a table of numbers .*complex64", trident, put("features", FEATURES + 1j)),
    "features that are NaN": ("1 of 60 spots are NaN or infinite; remove", trident, put("features", WITH_NAN)),
    "features that overflow": ("60 of 60 spots are NaN or inf", trident, put("features", FEATURES * np.float64(1e300))),
    "features without columns": ("features has no columns", trident, put("features", np.zeros((60, 0)))),
    "features of one axis": (r"must have shape \[N, F\], not \[60\]", trident, put("features", np.zeros(60))),
    "no spots": ("has no spots", trident, put("coords", np.zeros((0, 2))), put("features", np.zeros((0, 16)))),
    "features of a null shape": ("holds nothing .*; write", embeddings, put("embeddings", h5py.Empty("f4"))),
    "places of a null shape": ("holds nothing .*; write it again", embeddings, put("coords", h5py.Empty("f4"))),
    "barcodes twice": (r"59 duplicated barcodes, such as A\\r\\nB\\x1b\[2J", embeddings, put("barcodes", STRANGE)),
    "barcodes of other spots": (r"\[60, 2\] and 50\); write a row of each", embeddings, put("barcodes", NAMES[:50])),
    # Heads that claim terabytes, and numbers that are not in the file
    "features of terabytes": (f"features{CLAIMS}", trident, claim("features", ABSURD, 16)),
    "features of terabytes in width": (f"features{CLAIMS}", trident, claim("features", 60, ABSURD, chunks=(60, 1024))),
    "a chunk of gigabytes": (f"features{CLAIMS}", trident, claim("features", 2**26, 16, chunks=(2**26, 16))),
    "places of terabytes": (f"coords{CLAIMS}", trident, claim("coords", ABSURD, 2, chunks=(1024, 2))),
    "barcodes of terabytes": (f"barcodes{CLAIMS}", embeddings, claim("barcodes", ABSURD, dtype=TEXT)),
    "features that nobody wrote": ("1 of 1 chunks of features are missing; make", trident, claim("features", 60, 16)),
    "features written in part": ("1 of 8 chunks of features are missing; make it again", trident, in_part("features")),
    "features of a file that is gone": (f"embeddings{ELSEWHERE}", embeddings, virtual("embeddings", "gone.h5")),
    "features made of themselves": (f"embeddings{ELSEWHERE}", embeddings, virtual("embeddings", ".")),
    "features of a device": (f"embeddings{ELSEWHERE}", embeddings, of_a_device("embeddings")),
    # AnnData in HDF5 and zarr
    "h5ad without obs": ("has no obs, so it is not AnnData", h5ad, without("obs")),
    "h5ad without names": ("has no obs/_index with the names of obs; write", h5ad, without("obs/_index")),
    "zarr with names from elsewhere": (r"has no obs/\.\./\.\./x with", zarr_3, told("obs", _index="../../x")),
    "h5ad with fewer names": (r"must have shape \[50, F\]", h5ad, written("obs/_index", MADE["barcodes"][:50])),
    "h5ad with names twice": ("59 duplicated barcodes", h5ad, written("obs/_index", np.array(["A"] * 60, object))),
    "h5ad with names of terabytes": (f"obs/_index{CLAIMS}", h5ad, claim("obs/_index", ABSURD, dtype=TEXT)),
    "h5ad with virtual names": (f"obs/_index{ELSEWHERE}", h5ad, virtual("obs/_index", ".")),
    "h5ad with virtual places": (f"obsm/spatial{ELSEWHERE}", h5ad, virtual("obsm/spatial", ".")),
    "h5ad with places transposed": ("it is transposed, give its .T", h5ad, put("obsm/spatial", CENTRES.T)),
    "zarr with complex places": ("is not a table of real numbers", zarr_3, put("obsm/spatial", CENTRES + 1j)),
    "h5ad in a group of itself": (r"has no obsm\['spatial'\]", h5ad, linked("obsm", h5py.SoftLink("/"))),
    "h5ad with features of too few": (r"must have shape .*\[50, 16\]", h5ad, put("obsm/features", FEATURES[:50])),
    "h5ad with features from elsewhere": (r"has no obsm\['../../X'\]", h5ad, listed(features_key="../../X")),
    "h5ad without its sections": ("obs has no column 'part'; its columns: none", h5ad, listed(library_key="part")),
    "zarr with features of terabytes": (CLAIMS, zarr_3, claim("obsm/features", ABSURD, 16, chunks=(1024, 16))),
    "zarr with many chunks": (CLAIMS, zarr_3, claim("obsm/features", 10**6, 16, chunks=(1, 16))),
    "sparse features out of range": ("indices must be < 16", h5ad, sparse("obsm/features", indices=10**8)),
    "sparse features of terabytes": (f"obsm/features{CLAIMS}", h5ad, sparse("obsm/features", shape=[60, ABSURD])),
    "zarr 2 cut": ("is not a readable zarr store", zarr_2, cut(0.5, ".zmetadata")),
    "zarr 3 cut": ("is not a readable zarr store", zarr_3, cut(0.5, "zarr.json")),
    "zarr with features cut": ("rows 0 to 60 of obsm/features .*; copy", zarr_3, cut(0.5, "obsm/features/c/0/0")),
    "zarr with places cut": ("obsm/spatial cannot be read", zarr_2, cut(0.5, "obsm/spatial/0.0")),
    "zarr without a chunk": ("1 of 1 chunks of obsm/spatial are missing; copy", zarr_3, gone("obsm/spatial/c/0/0")),
    "zarr without names": ("1 of 1 chunks of obs/_index are missing; copy", zarr_2, gone("obs/_index/0")),
    "zarr of an unknown codec": ("codec not", zarr_2, in_json("obsm/features/.zarray", compressor={"id": "x"})),
    "zarr of less than nothing": ("be non-negative", zarr_2, in_json("obsm/features/.zarray", shape=[-60, 16])),
    "zarr with names by pickle": ("is packed by pickle, which can execute", zarr_2, by_pickle("obs/_index")),
    "zarr with features by pickle": ("is packed by pickle, which can execute", zarr_2, by_pickle("obsm/features")),
    # SpatialData and wsidata
    "spatialdata cut": (NO_SHAPES, spatialdata, cut(0.5, SHAPES)),
    "spatialdata of shapes elsewhere": (r"annotates \.\./x, and there is shapes", spatialdata, *annotating("../x")),
    "spatialdata with numbers for tables": ("has no tables", spatialdata, written("tables/table", np.arange(3))),
    "wsidata transposed": ("X has 16 rows for 60 tiles of obs; make", wsidata, put("tables/tiny_spots/X", FEATURES.T)),
    # What is no slide, hides what it is, or may not be read
    "stimage without features": ("has no features; give those of .*: --embeddings FOLDER", stimage),
    "a folder x h5": ("is a folder, and of no format itself; give the files in it", other(".h5", Path.mkdir)),
    "a folder x zarr": ("is a folder, and of no format itself; give the files in it", other(".zarr", Path.mkdir)),
    "a file x zarr": ("is of no format that is known", holding(".zarr", b"zarr")),
    "a page x h5ad": ("is not readable HDF5, or is truncated.*; copy it again", holding(".h5ad", b"<html>404")),
    "a file of nothing": (r"is empty \(0 bytes\); copy or make it again", holding(".h5ad", b"")),
    "a packed file": ("is packed with gzip; unpack it", holding(".h5ad", b"\x1f\x8b\x08\x00")),
    "a checkpoint that executes": (
        "without coordinates .*; give the",
        other(".pt", lambda path: torch.save(Executes(), path)),
    ),
    "an array x npy": ("is a NumPy array, without places; give an .h5", holding(".npy", b"\x93NUMPY\x01\x00")),
    "a model": ("is a model; give it first, and then slides", lambda path: write_model(path, ())),
    "two slides of one name": ("same: is the name of several slides .*; rename one", two_of_one_name),
    "a link to nothing": (r"does not exist \(it is a link to gone.h5\)", a_link("gone.h5")),
    "a link to itself": ("cannot be read .*symbolic links", other(".h5", lambda path: path.symlink_to(path.name))),
    "a link to a device": ("is a pipe or a device; give a file", a_link("/dev/zero")),
    "a name of 300 characters": ("cannot be read .File name too long", lambda path: path.with_name("x" * 300 + ".h5")),
    "a name with a line break": (
        r"/a\\nb\\x1b\[2J.h5: is not",
        holding(".h5", b"text"),
        called("a\nb\x1b[2J.h5"),
    ),
    "a path out of the folder": (r"\.\./\.\./gone.h5: does not exist", lambda path: path / ".." / ".." / "gone.h5"),
    "a closed file": (REFUSED, embeddings, closed),
    "a closed zarr": (REFUSED, zarr_3, closed),
    "a closed folder": (REFUSED, other(".h5", Path.mkdir), closed),
}
"""What is not predicted. Beside what others have in tests/test_bad_input_training.py, test_formats_refused.py,
test_slides_spatialdata.py, test_slides_stimage.py."""

NO_COUNTS: dict[str, tuple[Any, ...]] = {
    "counts out of range": ("X cannot be read .*indices must be >= 0", h5ad, sparse("X", indices=-1)),
    "counts out of order in int8": ("its indptr decreases", h5ad, put("X/indptr", SMALL)),
    "counts of terabytes": (f"X{CLAIMS}", h5ad, written("X", np.zeros((1, 1))), claim("X", ABSURD, 1000)),
    "counts of themselves": (f"X{ELSEWHERE}", h5ad, written("X", MADE["counts"]), virtual("X", ".")),
    "counts of one axis": (r"X must be counts \[N, G\], not .* \[60\]", h5ad, written("X", np.zeros(60))),
    "counts that are complex": (r"X must be counts \[N, G\], not complex", h5ad, written("X", np.ones((60, 30)) * 1j)),
    "no names of genes": ("has no var/_index with the names of var", h5ad, without("var/_index")),
    "places cut in a row": ("its last row has 2 of 4 columns; copy it again", stimage, cut(0.991)),
}
"""What has no expression to learn from; predictions need none."""

LEFT_OUT = "columns of obs that cannot be read are left out: odd"

ODD: dict[str, tuple[Any, ...]] = {
    "a link out of the folder": ("", embeddings, linked_from_elsewhere),
    "a link to a store": ("", zarr_3, linked_from_elsewhere),
    "links to nothing beside": ("", embeddings, linked("old", h5py.ExternalLink("gone.h5", "/x"))),
    "attributes of no known type": ("", embeddings, *map(of_no_known_type, ("/", "coords", "embeddings"))),
    "zarr called h5": ("", zarr_2, called("x.h5")),
    "a name of no characters": ("", embeddings, called(os.fsdecode(b"\xff\xfe.h5"))),
    "a longer column": (LEFT_OUT, h5ad, column(np.arange(61))),
    "a wider column": (LEFT_OUT, zarr_3, column(np.zeros((60, 2)))),
    "a column of terabytes": (LEFT_OUT, h5ad, column(np.arange(60)), claim("obs/odd", ABSURD, chunks=(1024,))),
    "a virtual column": (LEFT_OUT, h5ad, column(np.arange(60)), virtual("obs/odd", ".")),
    "a column that is obs": (LEFT_OUT, h5ad, column(np.arange(60)), linked("obs/odd", h5py.SoftLink("/obs"))),
    "a column by pickle": (LEFT_OUT, zarr_2, column(np.array(["a"] * 60, dtype=object)), by_pickle("obs/odd")),
    "a column of zeros": ("", zarr_3, column(np.zeros(60, int))),
    "other things in uns": ("", h5ad, written("uns/spatial", np.arange(3.0))),
}
"""What is strange, and read all the same; the words are those of a note."""
