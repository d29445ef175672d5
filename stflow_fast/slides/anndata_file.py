"""AnnData files (.h5ad), with or without patch features."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np
import scipy.sparse

from ..errors import InputError, first_line
from .slide import Slide

if TYPE_CHECKING:
    import anndata  # where it is used, it is imported: it takes a second, and sampling tensors needs none of it

PIXEL_SIZE_KEYS = ("pixel_size_um_estimated", "pixel_size_um_embedded", "micron_per_pixel")
"""Where HEST and its relatives keep the size of a level-0 pixel in ``uns``."""


def open_h5ad(path: Path, expression: bool = True) -> anndata.AnnData:
    """Read an .h5ad, without X and layers if ``expression`` is false.

    Raises:
        InputError: it is missing, truncated, or not AnnData.
    """
    import anndata

    if not path.is_file():
        raise InputError(f"{path}: does not exist")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(Observation|Variable) names are not unique")  # refused by Slide
            return anndata.read_h5ad(path) if expression else _without_expression(path)
    except (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path}: is not a readable .h5ad, or is truncated ({first_line(error)})") from error


def _without_expression(path: Path) -> anndata.AnnData:
    import anndata

    with h5py.File(path, "r") as file:
        if "encoding-type" in file.attrs:
            parts = {name: anndata.io.read_elem(file[name]) for name in ("obs", "obsm", "uns") if name in file}
            return anndata.AnnData(**parts)
    return anndata.read_h5ad(path)  # of a time before its parts could be read one by one


def counts_of(table: anndata.AnnData, path: Path) -> scipy.sparse.csr_matrix | None:
    """[N, G] float32 raw counts: ``layers["counts"]`` where there is one, else X; None without either."""
    matrix = table.layers.get("counts", table.X)
    if matrix is None or matrix.shape[1] == 0:
        return None
    try:
        return scipy.sparse.csr_matrix(matrix, dtype=np.float32)
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: X is not a table of numbers; give raw counts") from error


def count_notes(counts: scipy.sparse.csr_matrix | None) -> tuple[str, ...]:
    """What a person should hear about counts."""
    if counts is None or (counts.data == np.rint(counts.data)).all():
        return ()
    return ("expression is not in whole numbers: are these raw counts? They are taken for raw counts",)


def spatial_of(table: anndata.AnnData, path: Path) -> np.ndarray:
    """[N, 2] float64 spot centres. Raises InputError without ``obsm["spatial"]``."""
    if "spatial" not in table.obsm:
        raise InputError(f"{path}: has no obsm['spatial'] (spot centres x, y in pixels); it has {_names(table.obsm)}")
    return _dense(table, "spatial", np.float64, path)[:, :2]


def pixel_size_of(table: anndata.AnnData) -> float | None:
    """Micrometres per level-0 pixel, None where unknown."""
    for key in PIXEL_SIZE_KEYS:
        value = table.uns.get(key)
        if isinstance(value, (int, float, np.number)) and np.isfinite(value) and value > 0:
            return float(value)
    return None


def _dense(table: anndata.AnnData, key: str, dtype: type, path: Path) -> np.ndarray:
    """``obsm[key]`` as a contiguous array, from an array, a sparse matrix or a data frame."""
    values = table.obsm[key]
    try:
        return np.ascontiguousarray(values.toarray() if scipy.sparse.issparse(values) else values, dtype=dtype)
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: obsm['{key}'] is not a table of numbers ({first_line(error)})") from error


def read_h5ad(path: str | Path, features_key: str = "features", expression: bool = True) -> Slide:
    """Read a slide from one AnnData file.

    Features come from ``obsm[features_key]``, coordinates from ``obsm["spatial"]``, raw counts from
    ``layers["counts"]`` or else X (a file without X predicts, but cannot be scored).

    Args:
        path: the file.
        features_key: of the patch embeddings in ``obsm``.
        expression: take the counts too.

    Raises:
        InputError: a missing, unreadable or truncated file, missing keys, or what Slide refuses.
    """
    path = Path(path)
    table = open_h5ad(path, expression)
    if features_key not in table.obsm:
        raise InputError(
            f"{path}: has no obsm['{features_key}'] with patch embeddings; it has {_names(table.obsm)} (--features-key)"
        )
    counts = counts_of(table, path) if expression else None
    return Slide(
        id=path.stem,
        features=_dense(table, features_key, np.float32, path),
        coords=spatial_of(table, path),
        barcodes=table.obs_names.to_numpy(dtype=str),
        counts=counts,
        gene_names=() if counts is None else tuple(table.var_names.astype(str)),
        micron_per_pixel=pixel_size_of(table),
        notes=count_notes(counts),
    )


def _names(mapping: object) -> str:
    return ", ".join(sorted(mapping)) or "nothing"
