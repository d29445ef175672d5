"""Predictions as files: what a table holds, and how it is written so that everybody's tools open it."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from .arrays import as_names
from .errors import InputError, first_line
from .files import atomic_files, atomic_path, growing_hdf5, hdf5_in_memory, temporary_of
from .slides import Origin, Slide
from .slides.genes import other_spelling, some_of
from .slides.places import spacing
from .slides.stores import opened

if TYPE_CHECKING:
    import anndata  # where it is used, it is imported, as in slides/anndata_file.py

LAYOUT = 2
"""Number of the layout of what is written, ``uns["stflow_fast"]["layout"]``; the README describes it ("Layouts"). It
grows when a reader of the last one would misread the next. Files without a number are of the first."""

ABOUT = "stflow_fast"
"""In ``uns``: what made a prediction."""

SHAPES, TABLE, REGION_KEY, INSTANCE_KEY = "spots", "table", "region", "instance_id"
"""Of a SpatialData: its circles, its table, and the columns of ``obs`` that tie the one to the other."""

CANVAS = 500
"""Pixels of the longer side of the white image that spots are drawn on; circles do not get coarser by it."""

CHUNK = (1024, 256)
"""Spots and genes of X that are stored together: a gene, and a neighbourhood, can be read without all the others."""

SUFFIXES = {"h5ad": ".h5ad", "spatialdata": ".zarr"}
DTYPES = ("float32", "float16")
_ABOUT_IN = {".h5ad": f"uns/{ABOUT}", ".zarr": f"tables/{TABLE}/uns/{ABOUT}"}


@dataclass(frozen=True)
class OutputConfig:
    """How predictions are written.

    Attributes:
        to: "h5ad", or "spatialdata" for a zarr folder.
        dtype: of X, "float32" or "float16", which keeps three digits of a number in half of the space.
        genes: the genes to write, in this order; all that the model predicts when None. Sampling needs all of them.
        quantiles: percentiles of x_1 to write of a prediction with draws, 0 to 100; layers "q5", "q50", ...
        keep_draws: write the draws themselves too; layers "draw_0", "draw_1", ...

    Raises:
        InputError: a value out of its range, with the field's name, or a spatialdata that cannot be imported.
    """

    to: str = "h5ad"
    dtype: str = "float32"
    genes: Sequence[str] | None = None
    quantiles: tuple[float, ...] = ()
    keep_draws: bool = False

    def __post_init__(self) -> None:
        for field, known in (("to", SUFFIXES), ("dtype", DTYPES)):
            value = getattr(self, field)
            if value not in known:
                raise InputError(f"{field}: must be {' or '.join(known)}, not {value!r}")
        if self.to == "spatialdata":
            _check_spatialdata()
        if self.genes is not None:
            object.__setattr__(self, "genes", _checked_genes(self.genes))
        beyond = [each for each in self.quantiles if not 0 < each < 100]
        if beyond:
            raise InputError(f"quantiles: must be percentiles between 0 and 100, such as 5,50,95, not {beyond[0]:g}")

    def layers(self, draws: int | None) -> tuple[str, ...]:
        """Names of what is written beside X of a prediction with so many draws.

        Raises:
            InputError: layers are wanted that only draws have.
        """
        if draws is None:
            if self.quantiles or self.keep_draws:
                name = "quantiles" if self.quantiles else "keep_draws"
                raise InputError(f"{name}: are of predictions with --draws; give it too")
            return ()
        kept = draws if self.keep_draws else 0
        return ("std", *(f"q{each:g}" for each in self.quantiles), *(f"draw_{number}" for number in range(kept)))

    def select(self, panel: Sequence[str]) -> np.ndarray | slice:
        """The columns to write of a prediction of the genes ``panel``.

        Raises:
            InputError: a gene that is not predicted.
        """
        if self.genes is None:
            return slice(None)
        column = {name: index for index, name in enumerate(panel)}
        missing = [name for name in self.genes if name not in column]
        if missing:
            raise InputError(
                f"genes: {len(missing)} of {len(self.genes)} are not among the {len(panel)} that the model predicts: "
                f"{some_of(missing)}{other_spelling(missing, panel, None)}"
            )
        return np.array([column[name] for name in self.genes])

    def describe(self, panel: Sequence[str]) -> dict[str, Any]:
        """What decides what is written of a prediction of the genes ``panel`` (plain JSON types)."""
        names = np.array(panel)[self.select(panel)].tolist()
        digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
        layers = {"quantiles": list(self.quantiles)} if self.quantiles else {}
        layers |= {"keep_draws": True} if self.keep_draws else {}
        return {"layout": LAYOUT, "to": self.to, "dtype": self.dtype, "genes_sha256": digest, **layers}

    def path(self, folder: Path, slide: str) -> Path:
        """Where the prediction of a slide goes."""
        return folder / f"{slide}{SUFFIXES[self.to]}"


def _checked_genes(genes: Sequence[str]) -> tuple[str, ...]:
    names = tuple(as_names("genes", genes).tolist())
    if not names:
        raise InputError("genes: names no gene; leave it out to write all")
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise InputError(f"genes: {twice[0]} is named twice; remove one")
    return names


class Expression(NamedTuple):
    """The X and the layers of a prediction, which are written as they are made.

    Attributes:
        shape: (N, G) of each.
        dtype: "float32" or "float16".
        blocks: slices of the spots, one behind the other, and their X and layers [n, G]; gone through once.
        layers: their names.
    """

    shape: tuple[int, int]
    dtype: str
    blocks: Iterable[tuple[slice, Sequence[np.ndarray]]]
    layers: tuple[str, ...] = ()

    @property
    def places(self) -> list[str]:
        """Of X and the layers in a file."""
        return ["X", *(f"layers/{name}" for name in self.layers)]


def prediction_table(slide: Slide, genes: Sequence[str], about: dict[str, Any]) -> anndata.AnnData:
    """A prediction as AnnData without its X, laid out so that squidpy and scanpy draw it as it is.

    Args:
        slide: what was predicted. Its ``obs`` is carried, with its barcodes as the index; columns of what anndata
            cannot write become text, and a note of the prediction names them.
        genes: the G names of X.
        about: what made it, plain types; becomes ``uns["stflow_fast"]`` with the slide, its notes, and where the
            diameter of its spots is from: "file", "spacing" (the distance between those of a library) or "unknown" (a
            library of a single spot: 1 pixel), each where it is so of all its libraries, else "mixed".
    """
    import anndata

    barcodes = _texts(slide.barcodes.tolist())
    libraries, drawn, known_from = _libraries(slide)
    obs, notes = _carried(slide.obs, barcodes, {"library_id": libraries})
    told = {**about, "slide": slide.id, "notes": "; ".join((*slide.notes, *notes)), "spot_diameter_from": known_from}
    if slide.micron_per_pixel is not None:
        told["micron_per_pixel"] = slide.micron_per_pixel
    return anndata.AnnData(
        obs=obs,
        var=pd.DataFrame(index=_texts(genes)),
        obsm={"spatial": slide.coords},
        uns={ABOUT: told, "spatial": drawn},
    )


def as_dtype(slide_id: str, expression: np.ndarray, dtype: str) -> np.ndarray:
    """[N, G] in the dtype that is written.

    Raises:
        InputError: numbers that are too large for it.
    """
    with np.errstate(over="ignore"):
        converted = expression.astype(dtype, copy=False)
    beyond = int(np.isinf(converted).sum())
    if beyond:
        largest = np.finfo(dtype).max
        raise InputError(
            f"slide {slide_id}: {beyond} of {converted.size} predicted numbers are beyond {largest}, the largest of "
            f"{dtype}; write --dtype float32"
        )
    return converted


def _libraries(slide: Slide) -> tuple[pd.Categorical, dict[str, Any], str]:
    """[N] the library of each spot (its section, or the slide where it has none), what each is drawn by
    (``uns["spatial"]``), and where the diameters of their spots are from."""
    given = np.full(slide.n_spots, slide.id) if slide.library_id is None else slide.library_id
    names, codes = np.unique(given, return_inverse=True)
    codes = codes.reshape(-1)
    keys = _free_names([_key(_text(name)) for name in names.tolist()])
    drawn, known_from = {}, set()
    for number, (key, name) in enumerate(zip(keys, names.tolist(), strict=True)):
        coords, factors = slide.coords[codes == number], _scalefactors(slide.origin, name, len(names))
        diameter, is_from = _spot_diameter(coords, factors)
        drawn[key] = _canvas(coords, {**factors, "spot_diameter_fullres": diameter})
        known_from.add(is_from)
    return pd.Categorical.from_codes(codes, _texts(keys)), drawn, "mixed" if len(known_from) > 1 else known_from.pop()


def _scalefactors(origin: Origin, library: str, n_libraries: int) -> Mapping[str, float]:
    """Those of the library; of the slide as a whole where the file tells them of no library, or it is the only one."""
    told = origin.library_scalefactors
    return told.get(library, {}) if told and (library in told or n_libraries > 1) else origin.scalefactors


def _spot_diameter(coords: np.ndarray, scalefactors: Mapping[str, float]) -> tuple[float, str]:
    """In level-0 pixels, and where it is from."""
    given = scalefactors.get("spot_diameter_fullres")
    if given is not None and given > 0:
        return float(given), "file"
    apart = spacing(coords)
    return (1.0, "unknown") if apart is None else (apart, "spacing")


def _canvas(coords: np.ndarray, scalefactors: dict[str, float]) -> dict[str, Any]:
    """``uns["spatial"][library]`` of a section. scanpy and squidpy want an image "hires", and squidpy shows what lies
    on it: it is white, reaches from the origin beyond the last spot, and has a factor of its own."""
    size = np.maximum(coords.max(axis=0) + scalefactors["spot_diameter_fullres"], 1.0)
    scale = CANVAS / size.max()
    width, height = np.ceil(size * scale).astype(int)
    return {
        "images": {"hires": np.full((height, width, 3), 255, dtype=np.uint8)},
        "scalefactors": {**scalefactors, "tissue_hires_scalef": float(scale)},
        "metadata": {},
    }


def _key(name: str) -> str:
    """A name that HDF5 and zarr take for one name, not for a path."""
    return re.sub(r"/|^\.+$", "_", name) or "_"


def _texts(values: Iterable[Any]) -> pd.Index:
    """Text that every version of anndata and pandas writes and reads: objects, and no type of pandas' own."""
    return pd.Index([_text(value) for value in values], dtype=object)


def _categories(values: Sequence[str | None]) -> pd.Categorical:
    codes, names = pd.factorize(np.array(values, dtype=object), sort=True)
    return pd.Categorical.from_codes(codes, _texts(names))


def _carried(
    obs: pd.DataFrame | None, index: pd.Index, own: dict[str, pd.Categorical]
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Columns ``own``, then those of ``obs`` as every anndata writes and reads them; and notes about those."""
    columns, as_text = dict(own), []
    given = () if obs is None else (obs.iloc[:, place] for place in range(obs.shape[1]))
    kept = [column for column in given if not _repeats(column, own.get(column.name))]
    names = [_key(_text(column.name)) if column.name != "_index" else "index" for column in kept]
    for name, column in zip(_free_names(names, taken=own), kept, strict=True):
        columns[name], is_of_its_kind = _writable(column.infer_objects())
        if not is_of_its_kind:
            as_text.append(name)
    notes = (f"obs: what is in {', '.join(as_text)} was written as text",) if as_text else ()
    return pd.DataFrame(columns, index=index), notes


def _repeats(column: pd.Series, own: pd.Categorical | None) -> bool:
    """Whether a column of the input says what the one of ours with its name says."""
    return own is not None and list(map(_text, column)) == list(own)


def _free_names(
    names: Sequence[str], taken: Iterable[str] = (), same: Callable[[str], str] = lambda name: name
) -> list[str]:
    """The names, with a number behind those that others have before them; ``same`` makes what counts as one equal."""
    used, found = set(map(same, taken)), []
    for name in names:
        free, number = name, 1
        while same(free) in used:
            free, number = f"{name}_{number}", number + 1
        used.add(same(free))
        found.append(free)
    return found


def _writable(column: pd.Series) -> tuple[Any, bool]:
    """The values of a column as every anndata writes and reads them, and whether they are still of their kind."""
    kind = column.dtype
    if isinstance(kind, pd.CategoricalDtype):
        return _writable_categories(column)
    if isinstance(column.array, (pd.arrays.IntegerArray, pd.arrays.BooleanArray)):
        return column.array, True
    if pd.api.types.is_float_dtype(kind):
        single = getattr(kind, "itemsize", 8) <= 4
        return column.to_numpy(dtype=np.float32 if single else np.float64, na_value=np.nan), True
    if isinstance(kind, np.dtype) and kind.kind in "biu":
        return column.to_numpy(), True
    return _writable_text(column)


def _writable_categories(column: pd.Series) -> tuple[Any, bool]:
    names = column.cat.categories
    if pd.api.types.infer_dtype(names) == "string" and _texts(names).is_unique:
        return column.cat.rename_categories(_texts(names)).array, True
    if isinstance(names.dtype, np.dtype) and names.dtype.kind in "iuf":
        return column.array, True
    return _writable_text(column)


def _writable_text(column: pd.Series) -> tuple[Any, bool]:
    """As ``AnnData.write_h5ad`` writes text: as categories where some repeats or is missing."""
    values = [None if missing else value for value, missing in zip(column.tolist(), column.isna(), strict=True)]
    texts = [value if value is None else _text(value) for value in values]
    if not any(text is not None for text in texts):
        return np.full(len(texts), np.nan), True
    categories = _categories(texts)
    is_text = all(value is None or isinstance(value, str) for value in values)
    return (categories if len(categories.categories) < len(texts) else _texts(texts)), is_text


def _text(value: Any) -> str:
    """Text that can be written: UTF-8 without NUL."""
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return text.encode(errors="replace").decode().replace("\0", " ")


def check_replaceable(path: Path) -> None:
    """Make sure that a prediction may be written to ``path``: nothing is there, or an earlier one.

    Raises:
        InputError: something else stands there.
    """
    if path.exists() and read_about(path) is None:
        raise InputError(f"{path}: is no prediction of stflow-fast; move it away, or choose another --out")


def write_h5ad(path: Path, table: anndata.AnnData, expression: Expression) -> None:
    """Write a prediction as .h5ad, atomically, as every anndata from 0.10 on reads it: a table of
    :func:`prediction_table`, and its X.

    Raises:
        InputError: what stands there is no prediction.
        OutputError: the file cannot be written.
    """
    import anndata

    check_replaceable(path)
    with atomic_path(path) as temporary:
        with hdf5_in_memory(temporary) as file:
            anndata.io.write_elem(file, "/", table, dataset_kwargs={"compression": "gzip"})
            for absent in ("X", "raw"):  # anndata 0.12 writes that there is none, in a way that 0.11 cannot read
                file.pop(absent, None)
        with growing_hdf5(temporary) as (file, reserve):
            # Shuffled, predictions take 77 % of their bytes at 43 MB/s of a core; by gzip alone 89 % at 20 MB/s.
            packed = {"compression": "gzip", "shuffle": True}
            _fill([file.create_dataset(**how, **packed) for how in _stored(expression)], expression, reserve)


def _stored(expression: Expression) -> list[dict[str, Any]]:
    """How HDF5 and zarr are to store X and layers."""
    shape = expression.shape
    chunk = tuple(max(1, min(each)) for each in zip(shape, CHUNK, strict=True))
    return [{"name": name, "shape": shape, "dtype": expression.dtype, "chunks": chunk} for name in expression.places]


def _fill(arrays: Sequence[Any], expression: Expression, reserve: Callable[[int], None]) -> None:
    """Write X and layers into arrays of HDF5 or zarr; ``reserve`` is called with the bytes that come next."""
    for array in arrays:
        array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    for rows, parts in expression.blocks:
        for array, part in zip(arrays, parts, strict=True):
            reserve(part.nbytes)
            array[rows] = part


def write_spatialdata(path: Path, table: anndata.AnnData, expression: Expression) -> None:
    """Write a prediction as SpatialData: circles "spots" in the coordinate system "global" (level-0 pixels, identity),
    and a table "table" of :func:`prediction_table`, with its X, that annotates them by its barcodes.

    Columns of ``obs`` get names that SpatialData takes (letters, digits, ``_-.``; none that differ in capitals alone).
    A folder that stands at ``path`` is taken away when the new one is whole.

    Raises:
        InputError: what stands there is no prediction.
        OutputError: the folder cannot be written.
    """
    import zarr

    check_replaceable(path)
    aside = temporary_of(path)
    with atomic_files(path.parent, path.stem) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries about each other's next versions
        _as_spatialdata(table).write(temporary / path.name, update_sdata_path=False)
        annotation = zarr.open_group(temporary / path.name / f"tables/{TABLE}", mode="r+", use_consolidated=False)
        _fill([annotation.create_array(**how) for how in _stored(expression)], expression, lambda n_bytes: None)
        zarr.consolidate_metadata(temporary / path.name)
        if path.exists():
            os.replace(path, aside)
    shutil.rmtree(aside, ignore_errors=True)


def _check_spatialdata() -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import spatialdata  # noqa: F401
    except Exception as error:  # of any of its dependencies
        reason = first_line(error)
        raise InputError(
            f"to: spatialdata cannot be imported ({reason}); pip install 'stflow-fast[spatialdata]'"
        ) from error


def _as_spatialdata(table: anndata.AnnData) -> Any:
    import anndata
    from spatialdata import SpatialData
    from spatialdata.models import ShapesModel, TableModel
    from spatialdata.transformations import Identity

    libraries, drawn = table.obs["library_id"].array, table.uns["spatial"]
    diameters = np.array([drawn[key]["scalefactors"]["spot_diameter_fullres"] for key in libraries.categories])
    circles = ShapesModel.parse(
        table.obsm["spatial"],
        geometry=0,
        radius=diameters[libraries.codes] / 2,
        index=table.obs_names,
        transformations={"global": Identity()},
    )
    ties = {REGION_KEY: _categories([SHAPES] * table.n_obs), INSTANCE_KEY: table.obs_names}
    names = _free_names(list(map(_spatialdata_name, table.obs)), taken=ties, same=str.lower)
    obs = table.obs.set_axis(names, axis=1).assign(**ties)
    annotation = anndata.AnnData(obs=obs, var=table.var, obsm=dict(table.obsm), uns=dict(table.uns))
    annotation = TableModel.parse(annotation, region=SHAPES, region_key=REGION_KEY, instance_key=INSTANCE_KEY)
    return SpatialData(shapes={SHAPES: circles}, tables={TABLE: annotation})


def _spatialdata_name(name: str) -> str:
    return re.sub(r"^__+", "_", re.sub(r"[^\w.-]", "_", name))


WRITERS: dict[str, Callable[[Path, Any, Expression], None]] = {"h5ad": write_h5ad, "spatialdata": write_spatialdata}
"""By :attr:`OutputConfig.to`."""


def read_about(path: Path) -> dict[str, Any] | None:
    """What made the prediction at ``path``; None where there is none, or something else."""
    import anndata

    try:
        with opened(path) as store:
            about = anndata.io.read_elem(store[_ABOUT_IN[path.suffix]])
    except InputError:
        return None
    return about if isinstance(about, dict) else None


def remove_prediction(path: Path) -> None:
    """Take a prediction away."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
