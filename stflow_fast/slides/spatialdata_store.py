"""SpatialData zarr stores: a table and the elements that it annotates (Visium, bins of Visium HD, and others).

The table is read as any AnnData in zarr, without the ``spatialdata`` package, so that features stay on the disk. Where
its spots lie is what the elements say, in one coordinate system: that is the package's work.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import InputError, first_line
from .anndata_file import Placed, features_part, placed_by_obsm, rows_of_section, slide_of
from .anndata_table import Table
from .options import COORDINATE_SYSTEM, SPATIAL_KEY, ReadOptions
from .slide import Origin, Slide
from .stores import names_in, opened, part_of

if TYPE_CHECKING:
    import pandas as pd

TABLES = "tables"
KINDS = ("shapes", "points", "labels")
"""Of elements that a table may annotate, by their group in the store."""

ATTRIBUTES = "spatialdata_attrs"


class Annotation(NamedTuple):
    """What a table says of the elements that its rows are instances of.

    Attributes:
        regions: names of the elements.
        region_key: column of ``obs`` with the element of each row.
        instance_key: column of ``obs`` with the index of each row in its element.
    """

    regions: tuple[str, ...]
    region_key: str
    instance_key: str


def read_spatialdata(path: Path, options: ReadOptions) -> Slide:
    """Read a slide from a SpatialData store.

    The table is ``options.table``, or the only one, or the only one that has the features. Coordinates are the
    centroids of what it annotates (circles, polygons, points; labels too, whose image is read into memory for that), in
    ``options.coordinate_system``; rows whose instances are not there are left out. The radius of circles gives the spot
    diameter. Of a table that annotates nothing in the store, ``obsm[options.spatial_key]`` is taken as it is.

    Raises:
        InputError: no table, several, or another than the one asked for; an element that is not in the coordinate
            system; no spatialdata package; or what AnnData readers and Slide refuse.
    """
    with opened(path) as store:
        table = _chosen_table(path, store, options)
        annotated = annotation_of(table)
        column = _section_column(annotated, options)
        options = options if column is None else dataclasses.replace(options, library_key=column)
        return slide_of(table, options, path.stem, _placed(store, table, annotated, options))


def sections_of(path: Path, options: ReadOptions) -> tuple[str, ...]:
    """The sections by ``library_key``; without it the regions, where the table annotates several: each is a slide."""
    with opened(path) as store:
        table = _chosen_table(path, store, options)
        column = _section_column(annotation_of(table), options)
        return () if column is None else tuple(dict.fromkeys(table.column("obs", column).tolist()))


def _section_column(annotated: Annotation | None, options: ReadOptions) -> str | None:
    if options.library_key is not None:
        return options.library_key or None
    return annotated.region_key if annotated is not None and len(annotated.regions) > 1 else None


def tables_in(path: Path, store: Any) -> dict[str, Table]:
    """The tables of a store, by name.

    Raises:
        InputError: it has none.
    """
    group = store.get(TABLES, {})
    tables = {name: Table(path, group[name], f"{TABLES}/{name}") for name in sorted(group) if "obs" in group[name]}
    if not tables:
        raise InputError(f"{path}: has no tables, so no spots with features; it has {names_in(store)}")
    return tables


def _chosen_table(path: Path, store: Any, options: ReadOptions) -> Table:
    tables = tables_in(path, store)
    if options.table is not None:
        if options.table not in tables:
            raise InputError(f"{path}: has no table {options.table!r}; its tables: {', '.join(tables)} (--table NAME)")
        return tables[options.table]
    key = features_part(options)
    fit = [table for table in tables.values() if len(tables) == 1 or table.part(key) is not None]
    if len(fit) == 1:
        return fit[0]
    found = f"{len(fit) or 'none'} of which have {key}"
    raise InputError(f"{path}: has {len(tables)} tables, {found}: {', '.join(tables)}; choose one: --table NAME")


def annotation_of(table: Table) -> Annotation | None:
    """What a table says of its elements; None where it says nothing."""
    if table.part(f"uns/{ATTRIBUTES}") is None:
        return None
    told = table.element(f"uns/{ATTRIBUTES}")
    regions, columns = told.get("region"), (told.get("region_key"), told.get("instance_key"))
    if regions is None or None in columns:
        return None
    return Annotation(tuple(map(str, np.ravel(regions).tolist())), *map(str, columns))


def _placed(store: Any, table: Table, annotated: Annotation | None, options: ReadOptions) -> Placed:
    if annotated is None:
        return _as_written(table, options, "annotates no element")
    import pandas as pd

    columns = {"region": annotated.region_key, "instance": annotated.instance_key}
    ties = pd.DataFrame({name: table.column("obs", column) for name, column in columns.items()})
    rows = rows_of_section(table, options)
    rows = np.arange(len(ties)) if rows is None else rows
    found = {name: kind_of(store, name) for name in ties["region"].iloc[rows].unique()}
    kinds = {name: kind for name, kind in found.items() if kind is not None}
    absent = [name for name in found if name not in kinds]
    if absent:
        there = ", ".join(f"{kind}/{name}" for kind in KINDS if kind in store for name in sorted(store[kind]))
        return _as_written(table, options, f"annotates {', '.join(absent)}, and there is {there or 'no element'}")
    return _aligned(table, ties, rows, kinds, options)


def _as_written(table: Table, options: ReadOptions, why: str) -> Placed:
    """As ``obsm`` says, because the table is tied to no element of the store."""
    said = f"{table.key} {why}"
    if options.coordinate_system != COORDINATE_SYSTEM or table.part(f"obsm/{options.spatial_key}") is None:
        raise InputError(
            f"{table.path}: {said}, so its spots have no place in the coordinate system {options.coordinate_system!r}; "
            f"annotate shapes, or have centres in obsm['{options.spatial_key}'] and leave the coordinate system out"
        )
    placed = placed_by_obsm(table, options, "spatialdata")
    as_it_stands = f"coordinates are obsm['{options.spatial_key}'] as it stands: {said}"
    return placed._replace(notes=(as_it_stands, *placed.notes))


def _aligned(table: Table, ties: pd.DataFrame, rows: np.ndarray, kinds: dict[str, str], options: ReadOptions) -> Placed:
    """Centroids of the instances of ``rows``, those that there are.

    Args:
        table: whose rows they are.
        ties: [N] columns region and instance of all of its rows.
        rows: that are meant.
        kinds: of the regions of these rows.
        options: the coordinate system is looked at; ``global`` is taken for that of level-0 pixels, as its readers of
            Visium have it.
    """
    import pandas as pd

    wanted, parts = ties.iloc[rows], []
    for name, kind in kinds.items():
        here = wanted["instance"][wanted["region"] == name]
        centres = _centres(table.path, kind, name, options.coordinate_system)
        parts.append(centres.reindex(here).set_axis(here.index))
    found = pd.concat(parts).loc[rows]
    kept = found["x"].notna().to_numpy()
    if not kept.any():
        example = f"{here.iloc[0]} and {centres.index[0]}"
        raise InputError(
            f"{table.path}: {table.key} has no instance in common with {', '.join(kinds)} (they look like {example}); "
            "tie them by the index of the element"
        )
    axes = [axis for axis in ("x", "y", "z") if axis in found]
    coords = np.full((len(ties), len(axes)), np.nan)
    coords[rows] = found[axes].to_numpy(dtype=np.float64)
    diameter = 2 * found["radius"].median() if "radius" in found else np.nan
    factors = {"spot_diameter_fullres": float(diameter)} if diameter > 0 else {}
    return Placed(
        coords,
        rows[kept],
        Origin(table.path, "spatialdata", scalefactors=factors),
        (*left_out(kept, f"spots of {table.key} are not in {', '.join(kinds)}"), *_unused_key(options, kinds)),
        in_pixels=options.coordinate_system == COORDINATE_SYSTEM,
    )


def _unused_key(options: ReadOptions, kinds: dict[str, str]) -> tuple[str, ...]:
    if options.spatial_key == SPATIAL_KEY:
        return ()
    return (f"obsm['{options.spatial_key}'] is not looked at: {', '.join(kinds)} say where spots lie",)


def check_unique(where: str, instances: pd.Index | pd.Series) -> None:
    """Raise InputError where an instance of an element stands twice."""
    twice = instances[instances.duplicated()]
    if len(twice):
        raise InputError(f"{where}: instance {next(iter(twice))} stands twice; make its index unique")


def left_out(kept: np.ndarray, what: str) -> tuple[str, ...]:
    """The note on the rows that are not ``kept`` [N]; none where all are."""
    return () if kept.all() else (f"{int((~kept).sum())} of {len(kept)} {what} and are left out",)


def kind_of(store: Any, name: str) -> str | None:
    """The group of the store that has an element of this name."""
    return next((kind for kind in KINDS if part_of(store, f"{kind}/{name}") is not None), None)


def _centres(path: Path, kind: str, name: str, system: str) -> pd.DataFrame:
    """Columns x, y (and z) of an element's centroids, and radius of circles, by its index as text."""
    element = read_element(path, kind, name)
    from spatialdata.transformations import get_transformation

    systems = get_transformation(element, get_all=True)
    if system not in systems:
        known = ", ".join(sorted(systems))
        raise InputError(
            f"{path}: {kind}/{name} has no coordinate system {system!r}; it has {known} (--coordinate-system NAME)"
        )
    if kind == "shapes":
        check_unique(f"{path}: {kind}/{name}", element.index)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an index that is not sorted, which is nobody's concern
        return _in_system(element, system)


def _in_system(element: Any, system: str) -> pd.DataFrame:
    import spatialdata

    centres = spatialdata.get_centroids(element, coordinate_system=system).compute()
    if hasattr(element, "geom_type") and element.geom_type.iloc[0] == "Point":
        centres = centres.join(spatialdata.transform(element, to_coordinate_system=system)[["radius"]])
    return centres.set_axis(centres.index.astype(str))


def read_element(path: Path, kind: str, name: str) -> Any:
    """An element as spatialdata has it: a GeoDataFrame of shapes; what is lazy of the others.

    Raises:
        InputError: spatialdata is not installed, or it cannot be read.
    """
    if importlib.util.find_spec("spatialdata") is None:
        raise InputError(
            f"{path}: {kind}/{name} is read by spatialdata, which is not installed; "
            "pip install 'stflow-fast[spatialdata]'"
        )
    try:
        return _read_element(path, kind, name)
    except Exception as error:  # of whatever spatialdata reads with
        raise InputError(f"{path}: {kind}/{name} cannot be read ({first_line(error)}); copy the store again") from error


def _read_element(path: Path, kind: str, name: str) -> Any:
    import spatialdata

    if kind == "shapes":
        try:  # of its own, because read_zarr reads all shapes: of Visium HD also 11 million squares of 2 um
            from spatialdata._io.io_shapes import _read_shapes
        except ImportError:  # it is private, and may go any day
            return spatialdata.read_zarr(path, selection=(kind,))[name]
        return _read_shapes(path / kind / name)
    return spatialdata.read_zarr(path, selection=(kind,))[name]
