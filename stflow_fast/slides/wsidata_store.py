"""Zarr stores of wsidata and LazySlide: tiles of a whole-slide image, and a table of features for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import InputError
from .anndata_table import Table
from .options import ReadOptions
from .patches import above_zero
from .rows import rows_of, stored_rows
from .slide import Origin, Slide
from .spatialdata_store import Annotation, annotation_of, check_unique, left_out, read_element, tables_in
from .stores import is_array, opened

if TYPE_CHECKING:
    import pandas as pd

MARKS = ("tile_spec", "slide_properties")
"""Attributes of the root of such a store."""

TILE_ID = "tile_id"


class _Features(NamedTuple):
    """A table of features, and what it says of its tiles."""

    name: str
    table: Table
    annotated: Annotation

    @property
    def tiles(self) -> str:
        """Name of the tiles' shapes."""
        return self.annotated.regions[0]

    @property
    def encoder(self) -> str:
        """As the table is called: ``{encoder}_{tiles}``."""
        return self.name.removesuffix(f"_{self.tiles}")


def read_wsidata(path: Path, options: ReadOptions) -> Slide:
    """Read a slide from a store of wsidata or LazySlide; its features stay on the disk.

    Features are X of the table ``options.features_key``, with or without the name of the tiles behind it ("uni",
    "uni_tiles"), or of the only one. Coordinates are the centres of the tiles, whose bounds are in level-0 pixels, the
    side of a tile is the spot diameter. There are no barcodes: ``tile_id`` stands for them.

    Raises:
        InputError: no such table, several, no spatialdata package, or what Slide refuses.
    """
    with opened(path) as store:
        found = _features(path, tables_in(path, store), options.features_key)
        properties = store.attrs.get("slide_properties")
        features = stored_rows(path, f"{found.table.key}/X", found.table.part("X"))
        names = found.table.column("obs", found.annotated.instance_key)
    if len(features) != len(names):
        rows = f"X has {len(features)} rows for {len(names)} tiles of obs"
        raise InputError(f"{path}: {found.table.key}: {rows}; make its features again")
    tiles = _tiles(path, found.tiles).reindex(names)
    kept = tiles["side"].notna().to_numpy()
    if not kept.any():
        raise InputError(f"{path}: {found.table.key} has no tile of shapes/{found.tiles}; make its features again")
    tiles = tiles[kept]
    properties = properties if isinstance(properties, Mapping) else {}
    return Slide(
        path.stem,
        rows_of(features, np.flatnonzero(kept)),
        tiles[["centre_x", "centre_y"]].to_numpy(),
        names[kept],
        micron_per_pixel=above_zero(properties, "mpp"),
        notes=left_out(kept, f"rows of {found.table.key} are not in shapes/{found.tiles}"),
        obs=tiles.drop(columns=["centre_x", "centre_y", "side"]),
        origin=Origin(
            path,
            "wsidata",
            found.encoder,
            _image_size(properties),
            {"spot_diameter_fullres": float(tiles["side"].median())},
        ),
    )


def _features(path: Path, tables: Mapping[str, Table], asked: str | None) -> _Features:
    """The table that is asked for, or the only one with a row of numbers for each tile."""
    known = []
    for name, table in tables.items():
        annotated, x = annotation_of(table), table.part("X")
        if annotated is not None and len(annotated.regions) == 1 and is_array(x) and len(x.shape) == 2 and x.shape[1]:
            known.append(_Features(name, table, annotated))
    fit = [each for each in known if asked in (None, each.name, each.encoder)]
    exact = [each for each in fit if each.name == asked]
    if len(exact or fit) == 1:
        return (exact or fit)[0]
    names = ", ".join(each.name for each in known) or "none"
    wanted = "" if asked is None else f" that {asked!r} names"
    raise InputError(
        f"{path}: has {len(fit)} tables of features{wanted}, and one is read; there are: {names} (--features-key NAME, "
        "or --format spatialdata for tables of other things)"
    )


def _tiles(path: Path, name: str) -> pd.DataFrame:
    """The tiles' own columns, centre_x, centre_y and side in level-0 pixels, by tile_id as text."""
    import pandas as pd

    shapes = read_element(path, "shapes", name)
    bounds = shapes.geometry.bounds
    tiles = pd.DataFrame(shapes.drop(columns="geometry")).assign(
        centre_x=(bounds["minx"] + bounds["maxx"]) / 2,
        centre_y=(bounds["miny"] + bounds["maxy"]) / 2,
        side=bounds["maxx"] - bounds["minx"],
    )
    ids = shapes.get(TILE_ID, shapes.index)
    check_unique(f"{path}: shapes/{name}", ids)
    return tiles.set_axis(ids.astype(str))


def _image_size(properties: Mapping[str, Any]) -> tuple[int, int] | None:
    """(width, height); the properties say (height, width)."""
    shape = properties.get("shape")
    if not isinstance(shape, list | tuple) or len(shape) != 2:
        return None
    sides = dict(zip(("height", "width"), shape, strict=True))
    width, height = above_zero(sides, "width"), above_zero(sides, "height")
    return (int(width), int(height)) if width and height else None
