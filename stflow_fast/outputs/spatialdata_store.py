"""Predictions as SpatialData: a zarr folder with circles, and a table that annotates them."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError, first_line
from ..files import atomic_files, temporary_of
from .existing import check_replaceable
from .expression import Expression, fill, stored
from .layout import INSTANCE_KEY, REGION_KEY, SHAPES, TABLE
from .names import categories_of, free_names

if TYPE_CHECKING:
    import anndata  # where it is used, it is imported, as in slides/anndata_table.py


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
        fill([annotation.create_array(**how) for how in stored(expression)], expression, lambda n_bytes: None)
        zarr.consolidate_metadata(temporary / path.name)
        if path.exists():
            os.replace(path, aside)
    shutil.rmtree(aside, ignore_errors=True)


def check_spatialdata() -> None:
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
    ties = {REGION_KEY: categories_of([SHAPES] * table.n_obs), INSTANCE_KEY: table.obs_names}
    names = free_names(list(map(_spatialdata_name, table.obs)), taken=ties, same=str.lower)
    obs = table.obs.set_axis(names, axis=1).assign(**ties)
    annotation = anndata.AnnData(obs=obs, var=table.var, obsm=dict(table.obsm), uns=dict(table.uns))
    annotation = TableModel.parse(annotation, region=SHAPES, region_key=REGION_KEY, instance_key=INSTANCE_KEY)
    return SpatialData(shapes={SHAPES: circles}, tables={TABLE: annotation})


def _spatialdata_name(name: str) -> str:
    return re.sub(r"^__+", "_", re.sub(r"[^\w.-]", "_", name))
