"""A lattice of spots, what SpatialData writes of them, and the line of a refusal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest

from stflow_fast.errors import InputError
from stflow_fast.slides import ReadOptions, read

N, N_GENES_THERE, F = 40, 12, 6
AFFINE = np.array([[0.0, -2.0, 500.0], [2.0, 0.0, 30.0], [0.0, 0.0, 1.0]])
"""A quarter turn, twice as large, and shifted: another scale, order or direction shows."""


def lattice(n: int = N) -> np.ndarray:
    row, column = np.divmod(np.arange(n), 8)
    return np.column_stack([column + 0.5 * (row % 2), 0.866 * row]) * 10.0


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


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(InputError) as error:
        read(path, ReadOptions(**options))
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message
