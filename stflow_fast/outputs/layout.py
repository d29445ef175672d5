"""The layout of what is written: forms, names, and the number by which a reader knows it."""

from __future__ import annotations

LAYOUT = 2
"""Number of the layout of what is written, ``uns["stflow_fast"]["layout"]``; ``cohort/README.md`` describes it
("Layouts"). It grows when a reader of the last one would misread the next. Files without a number are of the first."""

ABOUT = "stflow_fast"
"""In ``uns``: what made a prediction."""

SHAPES, TABLE, REGION_KEY, INSTANCE_KEY = "spots", "table", "region", "instance_id"
"""Of a SpatialData: its circles, its table, and the columns of ``obs`` that tie the one to the other."""

SUFFIXES = {"h5ad": ".h5ad", "spatialdata": ".zarr"}
DTYPES = ("float32", "float16")
